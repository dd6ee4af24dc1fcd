"""A run on many processes: the batches of candidates are tasks for the workers of a Dask cluster.

`Workers.local(n)` starts a cluster of processes on this machine, `Workers.cluster(address)` uses
the scheduler that somebody has started; the rest is the same code. A task is plain data: the run's
source and configs, from which a worker makes the network and the calibration batches once, the
scales that the model holds now, a candidate, and the number of a batch. Its answer is one loss.
Where integers were chosen, or bits are searched, each worker is sent the integers once beside it.
Losses are averaged here, in the order of batches, so the result does not depend on how many workers
there are, which of them is quick, or which of them dies: Dask asks a lost task again.

A worker computes with one thread, which is checked: two threads would exchange the scales of the
one network that they share. Two processors, or two kernels, may round differently, and a difference
in the last digit would depend on who computed what; so every answer says what its worker makes of
one shared candidate, and a worker that differs is refused.

A Dask scheduler and its workers execute whatever a client sends them: see docs/cluster.md.
"""

import hashlib
import os
import socket
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from evolq_lite._memory import KEEP_MEMORY
from evolq_lite.bits import (
    BitsGenome,
    BitsTable,
    TrialNetwork,
    layer_bits,
    set_mixed_bits,
    table_of,
    tensors_of,
)
from evolq_lite.chain import chain_of
from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.convert import calibrate, quantize
from evolq_lite.fast import set_execution
from evolq_lite.fitness import fitness_of
from evolq_lite.genome import Genome
from evolq_lite.objective import BlockObjective, Population, Values, batches
from evolq_lite.rounding import freeze_integers
from evolq_lite.runs.scales import extras_of, put_extras
from evolq_lite.runs.source import Source

KEPT_BATCHES = 64  # whose block inputs a worker keeps
MOST = 1024  # workers of one machine
TRIES = 4  # of a task, before its failures are the run's
TABLE = "table."  # what names of a table's tensors begin with
SCHEMES = ("tcp", "tls", "ws", "wss")
CONNECTING = 10  # seconds for a scheduler to answer
PATIENCE = 600.0  # seconds for an answer, before a worker counts as hanging

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Task:
    """One loss: of `vector` in `genome`, on batch number `batch`, the model holding `state`.

    What `rounding_of` says of the model comes beside the task (see `Workers.share`): it is as large
    as the network, or several times as large, and the same in all tasks.
    """

    source: Source
    quant: QuantConfig
    search: SearchConfig
    state: bytes  # safetensors: scales, zero points, corrected biases
    blocks: tuple[str, ...]
    genome: Genome | BitsGenome
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
        name: value.detach().cpu().clone()  # a point may stand under several names
        for name, value in model.state_dict().items()
        if name.endswith((".scale", ".zero_point", ".bias"))
    }
    return save(tensors)


def rounding_of(model: nn.Module, mixed: bool = False, table: BitsTable | None = None) -> bytes:
    """The integers of a rounded model, and factors of channels, packed; b"" if none were chosen.

    With `mixed`, each layer's bits, which are not the config's; while bits are searched, the table.
    """
    tensors = extras_of(model)
    if mixed:
        tensors |= {f"{name}.bits": torch.tensor(b) for name, b in layer_bits(model).items()}
    for name, value in tensors_of(table or {}).items():
        # a copy: rows of a table may share a tensor
        tensors[f"{TABLE}{name}"] = value.detach().cpu().clone().contiguous()
    return zlib.compress(save(tensors), 1) if tensors else b""


class Bench:
    """What a worker keeps of a run: the network, the batches, and the inputs of blocks."""

    def __init__(self, source: Source, quant: QuantConfig, search: SearchConfig) -> None:
        torch.set_num_threads(1)
        model, images, targets = source.load()
        if search.searches_bits:  # the widest width decides how candidates are computed
            quant = replace(quant, weight_bits=search.bit_widths[-1])
        self.qmodel = quantize(model, quant)
        calibrate(self.qmodel, images[: search.batch], quant)
        self.execution = set_execution(self.qmodel, quant.execution)
        self.chain = chain_of(self.qmodel)
        self.chain.fit_chunk(images[:1])
        self.images = batches(images, search.batch)
        self.targets = batches(targets, search.batch)
        self.fitness = fitness_of(search.fitness, search.temperature)
        self.frozen = search.integers == "frozen"
        self.state = b""
        self.rounding = b""
        self.table: dict[str, Tensor] = {}
        self.trial: TrialNetwork | None = None  # of a search of bits
        self.prefixes: list[bytes] = []
        self.traces: OrderedDict[int, list[tuple[bytes, Tensor]]] = OrderedDict()
        # The shared candidate: what calibration on the first batch gives, whatever the run is at.
        with torch.no_grad():
            loss = float(self.fitness(self.chain(self.images[0]), self.targets[0]))
        kind = torch.backends.cpu.get_cpu_capability()
        self.stamp = (loss, torch.__version__, kind, self.execution, self.chain.chunk)

    def load(self, state: bytes, rounding: bytes) -> None:
        """Take over scales, and know for each segment whether something before it has changed."""
        if rounding == self.rounding and state == self.state:
            return
        tensors = load(state)
        if rounding != self.rounding:
            # Integers fit the zero points that they were chosen with.
            self.put({name: t for name, t in tensors.items() if name.endswith(".zero_point")})
            self.put_rounding(load(zlib.decompress(rounding)))
            self.rounding = rounding
            self.traces.clear()
        self.put(tensors)
        self.state, self.trial = state, None
        self.prefixes = self.digest_prefixes(tensors)

    @torch.no_grad()
    def put(self, tensors: dict[str, Tensor]) -> None:
        """Write what `state_of` says into the network."""
        own = self.qmodel.state_dict()  # the very tensors, under all names of a shared point
        for name, value in tensors.items():
            own[name].copy_(value)

    def put_rounding(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `rounding_of` has packed."""
        self.table, bits, extras = {}, {}, {}
        for name, value in tensors.items():
            if name.startswith(TABLE):
                self.table[name.removeprefix(TABLE)] = value
            elif name.endswith(".bits"):
                bits[name.removesuffix(".bits")] = int(value)
            else:
                extras[name] = value
        if bits:
            set_mixed_bits(self.qmodel, bits)
        put_extras(self.qmodel, extras)
        if self.frozen and not self.table:  # while bits are searched, nothing is frozen yet
            freeze_integers(self.qmodel)
        set_execution(self.qmodel, self.execution)  # points that were exchanged are plain ones

    def digest_prefixes(self, tensors: dict[str, Tensor]) -> list[bytes]:
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
    def loss(self, task: Task, rounding: bytes) -> float:
        """One candidate on one batch."""
        self.load(task.state, rounding)
        vector = torch.frombuffer(bytearray(task.vector), dtype=torch.float32)
        if isinstance(task.genome, BitsGenome):
            return float(self.loss_of_bits(task.genome, vector, task.batch))
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
        return float(objective.loss(vector))

    def loss_of_bits(self, genome: BitsGenome, vector: Tensor, batch: int) -> Tensor:
        """The loss of each layer's bits (d,) on a batch."""
        if self.trial is None:
            table = table_of(self.table, self.qmodel, genome)
            self.trial = TrialNetwork(self.chain, genome, table)
        return self.fitness(self.trial.hold(vector)(self.images[batch]), self.targets[batch])


bench = lru_cache(maxsize=1)(Bench)
ALONE = threading.Lock()  # one candidate at a time writes to a worker's network


def evaluate(task: Task, rounding: bytes = b"") -> Answer:
    """What a worker does; ValueError if it lacks a file, which another try would not bring.

    `rounding` is what `rounding_of` says of the model.
    """
    worker = f"{socket.gethostname()} process {os.getpid()}"
    try:
        with ALONE:
            mine = bench(task.source, task.quant, task.search)
            return Answer(mine.loss(task, rounding), worker, mine.stamp)
    except OSError as error:
        raise ValueError(f"{worker}: {error}") from None


class LostWorkers(RuntimeError):
    """Workers, or their scheduler, were lost; the run can go on later."""


class Workers:
    """The workers of a Dask cluster, as a context made by `local` or `cluster`.

    `patience` is how many seconds an answer may take before its worker counts as hanging.
    """

    def __init__(self, client: Any, patience: float = PATIENCE) -> None:
        from distributed.client import ClosedClientError
        from distributed.comm import CommClosedError

        self.client, self.patience, self.work = client, patience, evaluate
        self.lost = (
            ClosedClientError,
            CommClosedError,
            CancelledError,
            TimeoutError,
            OSError,
        )
        self.stamp: tuple[str, tuple[Any, ...]] | None = None
        self.shared: tuple[bytes, Any] | None = None

    @classmethod
    @contextmanager
    def local(cls, count: int, patience: float = PATIENCE) -> "Iterator[Workers]":
        """Processes on this machine, one thread each; ValueError for none, or far too many."""
        if not 1 <= count <= MOST:
            raise ValueError(f"--workers must be at least 1 and at most {MOST:,}, not {count}")
        import dask
        from distributed import Client, LocalCluster

        with (
            # Dask's own setting is to give memory back as early as possible, and its tasks run in a
            # thread: these count only where a process has them from its first moment.
            dask.config.set({"distributed.nanny.pre-spawn-environ": KEEP_MEMORY}),
            LocalCluster(
                n_workers=count,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                memory_limit=None,
                silence_logs="ERROR",
            ) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            check_threads(client)
            yield cls(client, patience)

    @classmethod
    @contextmanager
    def cluster(
        cls, address: str, lack: Callable[[], str] = str, patience: float = PATIENCE
    ) -> "Iterator[Workers]":
        """The workers of a Dask scheduler; ValueError if there are none, or none that fit.

        `lack` is called on every worker first, and says in a sentence what that one lacks.
        """
        with connect(address) as client:
            check_cluster(client, address, lack)
            yield cls(client, patience)

    def answer(self, tasks: Sequence[Task], rounding: bytes = b"") -> list[Answer]:
        """The answers, in the order of tasks; `rounding` as in `evaluate`.

        LostWorkers as in `each`; ValueError for a worker whose arithmetic differs from the first's.
        """
        found: dict[int, Answer] = {}
        more = (self.share(rounding),) if rounding else ()
        for i, answer in self.each(self.work, tasks, *more):
            self.check(answer)
            found[i] = answer
        return [found[i] for i in range(len(tasks))]

    def share(self, data: bytes) -> Any:
        """What stands for data that many tasks read: each worker is sent it once.

        It is the result of a task, so Dask makes it again where the worker that held it is lost.
        """
        if self.shared is None or self.shared[0] != data:
            self.shared = data, self.client.submit(bytes, data, pure=False)
        return self.shared[1]

    def each(
        self, work: Callable[..., R], tasks: Sequence[T], *shared: Any
    ) -> Iterator[tuple[int, R]]:
        """`work` on every task: number and result, as they come; what was lost is asked again.

        `shared` is what `share` returned, for every call of `work`.

        LostWorkers when a task kills its workers, or when workers hang or vanish `TRIES` times with
        nothing done in between.
        """
        from distributed import KilledWorker, wait

        left, tries = dict(enumerate(tasks)), 0
        while left:
            futures = {
                self.client.submit(work, task, *shared, pure=False): i for i, task in left.items()
            }
            waiting = set(futures)
            try:
                while waiting:
                    # Twice as long each time: workers that start again load their data first.
                    patience = 2**tries * self.patience
                    with self.client.as_current():
                        done, waiting = wait(waiting, patience, "FIRST_COMPLETED")
                    for future in done:
                        result = future.result()
                        del left[futures[future]]
                        tries = 0
                        yield futures[future], result
            except KilledWorker as error:  # Dask has tried it on several
                raise LostWorkers(f"workers die of a task, see their logs ({error})") from None
            except self.lost as error:
                tries += 1
                self.recover(list(futures), error)
                if tries == TRIES:
                    raise LostWorkers(
                        f"workers were lost {TRIES} times in a row "
                        f"({type(error).__name__}: {error}), see their logs"
                    ) from None
            finally:
                if self.client.status == "running":
                    self.client.cancel(list(waiting), force=True)

    def recover(self, futures: list[Any], error: Exception) -> None:
        """Restart the workers that hang on these futures; LostWorkers if the scheduler is gone."""
        mine = {future.key for future in futures}
        try:
            if self.client.status != "running":
                raise error
            busy = self.client.processing()
            hanging = sorted(worker for worker, keys in busy.items() if mine & {*keys})
            self.client.cancel(futures, force=True)
            if hanging:
                self.client.restart_workers(hanging, timeout=60, raise_for_error=False)
        except Exception as gone:
            raise LostWorkers(
                f"the scheduler is gone ({type(gone).__name__}), start it again"
            ) from error

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


def check_search(search: SearchConfig) -> None:
    """ValueError for a search that workers do not know."""
    if search.racing:
        raise ValueError(
            "racing compares one batch after another, and workers compute all of them at the same "
            "time; omit --workers and --scheduler, or --racing"
        )


def connect(address: str) -> Any:
    """A client of a Dask scheduler; ValueError if none answers."""
    from distributed import Client

    scheme = address.partition("://")[0] if "://" in address else "tcp"
    if scheme not in SCHEMES:
        raise ValueError(
            f"no Dask scheduler can be reached at {address}; give an address that begins with "
            f"{', '.join(f'{known}://' for known in SCHEMES)}"
        )
    check_certificates(address)  # first: a client that fails for them takes 20 s to close
    try:
        return Client(address, timeout=CONNECTING, set_as_default=False)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"no Dask scheduler answers at {address} ({why}); start one with: dask scheduler"
        ) from None


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


def check_cluster(client: Any, address: str, lack: Callable[[], str]) -> None:
    """ValueError if a cluster has no workers, or workers with other versions or without files."""
    if not client.scheduler_info(n_workers=-1)["workers"]:
        raise ValueError(
            f"the scheduler at {address} has no workers; start some with: dask worker {address} "
            "--nthreads 1"
        )
    check_threads(client)
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
    for worker, reason in client.run(lack).items():
        if reason:
            raise ValueError(f"worker {worker}: {reason}")


def check_threads(client: Any) -> None:
    """ValueError for a worker of several threads: they would write into one another's network."""
    for worker, about in client.scheduler_info(n_workers=-1)["workers"].items():
        if about["nthreads"] != 1:
            raise ValueError(
                f"worker {worker} has {about['nthreads']} threads; start workers with --nthreads 1 "
                "(and --nworkers for more of them): threads would share one network"
            )


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


class WorkersObjective:
    """`BlockObjective` on workers: the mean over batches, each computed by one of them.

    Or `BitsObjective`, for a genome of bits. `state` is the network as it is when the visit begins,
    `rounding` what `rounding_of` says of it.
    """

    def __init__(
        self,
        workers: Workers,
        source: Source,
        quant: QuantConfig,
        search: SearchConfig,
        state: bytes,
        blocks: tuple[str, ...],
        genome: Genome | BitsGenome,
        count: int,
        rounding: bytes = b"",
    ) -> None:
        self.workers, self.source, self.quant, self.search = workers, source, quant, search
        self.state, self.blocks, self.genome = state, blocks, genome
        self.count, self.rounding = count, rounding

    def __call__(self, population: Population) -> Values:
        """Evaluate all batches of all candidates (p, d) at the same time."""
        vectors = [vector.detach().cpu().float().numpy().tobytes() for vector in population]
        tasks = [
            Task(
                self.source,
                self.quant,
                self.search,
                self.state,
                self.blocks,
                self.genome,
                vector,
                i,
            )
            for vector in vectors
            for i in range(self.count)
        ]
        losses = torch.tensor([answer.loss for answer in self.workers.answer(tasks, self.rounding)])
        return torch.stack([row.mean() for row in losses.split(self.count)])
