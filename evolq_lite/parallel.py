"""An objective evaluated elsewhere: the batches of candidates are tasks for a pool of workers.

A task is plain data: a `Recipe` from which a worker makes the network and the calibration batches
once, the scales that the model holds now, a candidate, and the number of a batch. Its answer is one
loss. Losses are averaged here, in the order of batches, so the result does not depend on how many
workers there are, which of them is quick, or which of them dies: a lost task is asked again.

Any `concurrent.futures` executor will do: `Pool.local` starts processes here, `Pool.cluster` uses a
Dask scheduler. A worker computes with one thread. Two processors, or two kernels, may round
differently, and a difference in the last digit would depend on who computed what; so every answer
says what its worker makes of one shared candidate, and a worker that differs is refused.
"""

import hashlib
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as Late
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from evolq_lite.chain import Chain, chain_of
from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.convert import calibrate, quantize, set_execution
from evolq_lite.fitness import fitness_of
from evolq_lite.genome import Genome, Vector
from evolq_lite.objective import BlockObjective, Population, Values, batches

KEPT_BATCHES = 64  # whose block inputs a worker keeps
TRIES = 4  # of a task, before its failures are the run's
PATIENCE = 600.0  # seconds for an answer, before a worker counts as hanging

T = TypeVar("T")
R = TypeVar("R")
Parts = tuple[nn.Module, Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to make a float network, calibration images and their targets, and how they are used.

    `make(*arguments)` returns them; it must be a function at the top of a module, its arguments
    plain values. Two recipes that are equal make the same thing.
    """

    make: Callable[..., Parts]
    arguments: tuple[Any, ...]
    quant: QuantConfig
    search: SearchConfig


@dataclass(frozen=True)
class Task:
    """One loss: of `vector` in `genome`, on batch number `batch`, the model holding `state`."""

    recipe: Recipe
    state: bytes  # safetensors: scales, zero points, corrected biases
    blocks: tuple[str, ...]
    genome: Genome
    vector: bytes  # float32
    batch: int


@dataclass(frozen=True)
class Answer:
    """A loss, and who computed it: `stamp` is what the worker makes of the shared candidate."""

    loss: float
    worker: str
    stamp: tuple[Any, ...]


def state_of(model: nn.Module) -> bytes:
    """All that a search or a calibration has changed in a quantized model."""
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
        if name.endswith((".scale", ".zero_point", ".bias"))
    }
    return save(tensors)


class Bench:
    """What a worker keeps of a recipe: the network, the batches, and the inputs of blocks."""

    def __init__(self, recipe: Recipe) -> None:
        torch.set_num_threads(1)
        model, images, targets = recipe.make(*recipe.arguments)
        self.qmodel = quantize(model, recipe.quant)
        calibrate(self.qmodel, images[: recipe.search.batch], recipe.quant)
        self.execution = set_execution(self.qmodel, recipe.quant.execution)
        self.chain = chain_of(self.qmodel)
        self.chain.fit_chunk(images[:1])
        self.images = batches(images, recipe.search.batch)
        self.targets = batches(targets, recipe.search.batch)
        self.fitness = fitness_of(recipe.search.fitness, recipe.search.temperature)
        self.state = b""
        self.prefixes: list[bytes] = []
        self.traces: OrderedDict[int, list[tuple[bytes, Tensor]]] = OrderedDict()
        # The shared candidate: what calibration on the first batch gives, whatever the run is at.
        with torch.no_grad():
            loss = float(self.fitness(self.chain(self.images[0]), self.targets[0]))
        kind = torch.backends.cpu.get_cpu_capability()
        self.stamp = (loss, torch.__version__, kind, self.execution, self.chain.chunk)

    def load(self, state: bytes) -> None:
        """Take over scales, and know for each segment whether something before it has changed."""
        if state == self.state:
            return
        tensors = load(state)
        own = {**dict(self.qmodel.named_buffers()), **dict(self.qmodel.named_parameters())}
        with torch.no_grad():
            for name, value in tensors.items():
                own[name].copy_(value)
        self.state = state
        self.prefixes = self.digests(tensors)

    def digests(self, tensors: dict[str, Tensor]) -> list[bytes]:
        """For each segment, a digest of all scales that its input depends on."""
        digest, out = hashlib.sha256(), []
        searched = [name for name, _, searchable in self.chain.segments if searchable]
        rest = [n for n in sorted(tensors) if not any(n.startswith(f"{s}.") for s in searched)]
        for name in rest:  # of the stem and the head: never searched
            digest.update(tensors[name].numpy().tobytes())
        for segment in self.chain.names:
            out.append(digest.digest())
            for name in sorted(tensors):
                if name.startswith(f"{segment}."):
                    digest.update(tensors[name].numpy().tobytes())
        return out

    def input_of(self, batch: int, segment: int) -> Tensor:
        """What enters a segment; a forward of the whole batch only if its past has changed."""
        kept = self.traces.get(batch)
        if kept is None or kept[segment][0] != self.prefixes[segment]:
            trace = self.chain.trace(self.images[batch])
            self.traces[batch] = kept = list(zip(self.prefixes, trace))
            while len(self.traces) > KEPT_BATCHES:
                self.traces.popitem(last=False)
        self.traces.move_to_end(batch)
        return kept[segment][1]

    @torch.no_grad()
    def loss(self, task: Task) -> float:
        """One candidate on one batch."""
        self.load(task.state)
        first = min(self.chain.index(block) for block in task.blocks)
        objective = BlockObjective(
            self.chain,
            task.blocks,
            self.images[task.batch],
            self.targets[task.batch],
            self.fitness,
            batch=len(self.images[task.batch]),
            genome=task.genome,
            inputs=[self.input_of(task.batch, first)],
        )
        return float(objective.loss(torch.frombuffer(bytearray(task.vector), dtype=torch.float32)))


bench = lru_cache(maxsize=1)(Bench)


def evaluate(task: Task) -> Answer:
    """What a worker does; ValueError if it lacks a file, which another try would not bring."""
    worker = f"{socket.gethostname()} process {os.getpid()}"
    try:
        mine = bench(task.recipe)
        return Answer(mine.loss(task), worker, mine.stamp)
    except OSError as error:
        raise ValueError(f"{worker}: {error}") from None


def end_with_parent() -> None:
    """In a worker process: end when the run that started it is gone, even if it was killed."""

    def watch() -> None:
        parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class LostWorkers(RuntimeError):
    """Workers, or their scheduler, were lost; the run can go on later."""


class Pool:
    """Workers for tasks. `make` starts an executor, `stop` ends one and the work it has in hand.

    `patience` is how many seconds an answer may take before its worker counts as hanging, `lost`
    the errors by which an executor tells that a worker is gone.
    """

    def __init__(
        self,
        make: Callable[[], Executor],
        stop: Callable[[Executor], None],
        patience: float = PATIENCE,
        lost: tuple[type[Exception], ...] = (),
    ) -> None:
        self.make, self.stop, self.patience = make, stop, patience
        always = BrokenProcessPool, CancelledError, Late, OSError
        self.lost: tuple[type[Exception], ...] = (*always, *lost)
        self.executor, self.work = make(), evaluate
        self.stamp: tuple[str, tuple[Any, ...]] | None = None

    @classmethod
    @contextmanager
    def local(cls, workers: int, patience: float = PATIENCE) -> "Iterator[Pool]":
        """Processes on this machine, one thread each; ValueError for fewer than one."""
        if workers < 1:
            raise ValueError(f"--workers must be at least 1, not {workers}")
        before = set(active_children())

        def stop(executor: Executor) -> None:
            executor.shutdown(wait=False, cancel_futures=True)
            for process in set(active_children()) - before:
                process.kill()

        def make() -> Executor:
            return ProcessPoolExecutor(workers, get_context("forkserver"), end_with_parent)

        pool = cls(make, stop, patience)
        try:
            yield pool
        finally:
            pool.stop(pool.executor)

    @classmethod
    @contextmanager
    def cluster(
        cls, address: str, ready: Callable[[], str] = str, patience: float = PATIENCE
    ) -> "Iterator[Pool]":
        """The workers of a Dask scheduler; ValueError if there are none, or none that fit.

        `ready` is called on every worker first, and says in a sentence what that one lacks.
        """
        client, lost = connect(address)

        def stop(executor: Executor) -> None:
            mine, busy = set(client.futures), client.processing()
            executor.shutdown(wait=False)  # cancels: Dask's has no `cancel_futures`
            if hanging := sorted(worker for worker, keys in busy.items() if mine & {*keys}):
                client.restart_workers(hanging, timeout=60, raise_for_error=False)

        with client:
            check_cluster(client, address, ready)
            pool = cls(lambda: client.get_executor(pure=False), stop, patience, lost)
            yield pool
            if client.status == "running":
                pool.stop(pool.executor)

    def answers(self, tasks: Sequence[Task]) -> list[Answer]:
        """The answers, in the order of tasks.

        LostWorkers as in `each`; ValueError for a worker whose arithmetic differs from the first's.
        """
        found: dict[int, Answer] = {}
        for i, answer in self.each(self.work, tasks):
            self.check(answer)
            found[i] = answer
        return [found[i] for i in range(len(tasks))]

    def each(self, work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R]]:
        """`work` on every task: number and result, as they come; what was lost is asked again.

        LostWorkers when workers were lost `TRIES` times, with nothing done in between.
        """
        left, tries = set(range(len(tasks))), 0
        while left:
            try:
                futures = {self.executor.submit(work, tasks[i]): i for i in sorted(left)}
                # Twice as long each time: workers that start anew load their data first.
                for future in self.finished(futures, 2**tries * self.patience):
                    result = future.result()
                    left.remove(futures[future])
                    tries = 0
                    yield futures[future], result
            except self.lost as error:
                tries += 1
                self.renew(error)
                if tries == TRIES:
                    raise LostWorkers(
                        f"workers were lost {TRIES} times in a row "
                        f"({type(error).__name__}: {error}), see their logs"
                    ) from None

    def renew(self, error: Exception) -> None:
        """Another executor in place of one that lost workers; LostWorkers if there is none."""
        try:
            self.stop(self.executor)
            self.executor = self.make()
        except Exception as gone:
            raise LostWorkers(
                f"the scheduler is gone ({type(gone).__name__} after {type(error).__name__}), "
                "start it again"
            ) from error

    def finished(self, futures: Iterable[Future[R]], patience: float) -> Iterator[Future[R]]:
        """Futures as they are done; TimeoutError when none is for so many seconds."""
        waiting = set(futures)
        while waiting:
            done = next(as_completed(waiting, timeout=patience))
            waiting.remove(done)
            yield done

    def check(self, answer: Answer) -> None:
        """Refuse a worker that would compute other numbers than the first one."""
        if self.stamp is None:
            self.stamp = answer.worker, answer.stamp
        first, stamp = self.stamp
        if answer.stamp != stamp:
            raise ValueError(
                f"{answer.worker} computes other numbers than {first} ({answer.stamp} against "
                f"{stamp}); use workers of one kind of processor and the same versions"
            )


def check_certificates(address: str) -> None:
    """ValueError if a tls:// address lacks certificates, which Dask takes from its environment."""
    from distributed.security import Security

    if not address.startswith("tls:"):
        return
    try:
        found = Security().get_connection_args("client").get("ssl_context")
    except OSError as error:
        raise ValueError(f"the certificates for {address} cannot be read: {error}") from None
    if found is None:
        raise ValueError(
            f"{address} needs certificates: set DASK_DISTRIBUTED__COMM__TLS__CA_FILE, "
            "DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT and ..._TLS__CLIENT__KEY"
        )


def connect(address: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """A client of a Dask scheduler, and the errors by which it tells of losses; else ValueError."""
    try:
        from distributed import Client, KilledWorker
        from distributed.client import ClosedClientError
    except ModuleNotFoundError:
        raise ValueError(
            "--scheduler needs the package distributed: pip install distributed"
        ) from None
    check_certificates(address)  # first: a client that fails for them takes 20 s to close
    try:
        client = Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"no Dask scheduler answers at {address} ({why}); start one with: dask scheduler"
        ) from None
    return client, (KilledWorker, ClosedClientError)


def check_cluster(client: Any, address: str, ready: Callable[[], str]) -> None:
    """ValueError if a cluster has no workers, or workers with other versions or without files."""
    if not client.scheduler_info(n_workers=-1)["workers"]:
        raise ValueError(
            f"the scheduler at {address} has no workers; start some with: dask worker {address}"
        )
    mine = versions()
    try:
        all_of_them = client.run(versions)
    except ImportError as error:
        raise ValueError(
            f"a worker of {address} has no evolq_lite ({error}); install it on all of them"
        ) from None
    for worker, theirs in all_of_them.items():
        for package, version in mine.items():
            if theirs.get(package) != version:
                raise ValueError(
                    f"worker {worker} has {package} {theirs.get(package)}, here it is {version}; "
                    "install the same versions everywhere (requirements.lock)"
                )
    for worker, lack in client.run(ready).items():
        if lack:
            raise ValueError(f"worker {worker}: {lack}")


def versions() -> dict[str, str]:
    """The versions that must agree between machines."""
    import timm

    import evolq_lite

    source = hashlib.sha256()
    for path in sorted(Path(evolq_lite.__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    return {
        "evolq_lite": f"{evolq_lite.__version__} ({source.hexdigest()[:8]})",
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


class Pooled:
    """`BlockObjective` on a pool: the mean over `batches` batches, each computed by some worker.

    The scales are those that `chain` holds when this is built, as a visit does.
    """

    def __init__(
        self,
        pool: Pool,
        recipe: Recipe,
        batches: int,
        chain: Chain,
        blocks: Sequence[str],
        genome: Genome,
    ) -> None:
        self.pool, self.recipe, self.batches, self.chain = pool, recipe, batches, chain
        self.blocks, self.genome = tuple(blocks), genome
        self.state = state_of(chain.model)

    @property
    def start(self) -> Vector:
        """The scales that are in the model now."""
        return self.genome.read(self.chain.model)

    def __call__(self, population: Population) -> Values:
        """Evaluate all batches of all candidates at the same time."""
        vectors = [vector.detach().cpu().float().numpy().tobytes() for vector in population]
        tasks = [
            Task(self.recipe, self.state, self.blocks, self.genome, vector, i)
            for vector in vectors
            for i in range(self.batches)
        ]
        losses = torch.tensor([answer.loss for answer in self.pool.answers(tasks)])
        return torch.stack([row.mean() for row in losses.split(self.batches)])

    def commit(self, vector: Vector) -> None:
        """Write a vector into the model."""
        self.genome.write(self.chain.model, vector)
