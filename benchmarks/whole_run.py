"""Where the time of a whole run goes: `python benchmarks/whole_run.py`.

A run is made as `demo` and `run` make it (runs.run.Run, in a folder of its own), and every part of
it is timed: candidates, the sweeps that prepare the inputs of a pass, the lines of the history, the
scales after each visit, calibration, the test. What a search costs above its candidates is
overhead. Then the same candidates are evaluated alone, block by block, outside of any run: if they
take longer in a run, something else is in their way.

Seconds of the processor ("CPU", all threads, this process only) are steadier than those of the
clock where other programs run.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import evolq_lite as eq  # isort: skip  (before timm: see evolq_lite/_torchvision.py)

import timm
import torch
from torch import Tensor

from evolq_lite._memory import KEPT
from evolq_lite.data import DEMO_MODELS
from evolq_lite.evolve import Evaluated, Inputs
from evolq_lite.networks import unfused
from evolq_lite.objective import BlockObjective
from evolq_lite.runs.environment import environment, peak_memory
from evolq_lite.runs.folder import RunFolder
from evolq_lite.runs.run import Run
from evolq_lite.runs.source import Embedded, Parts, Progress, Source, quiet

CANDIDATES = "candidates"
# What happens within a search, besides candidates, and which method does it.
IN_SEARCH = {
    "inputs of a pass": (Inputs, "sweep"),
    "history": (RunFolder, "append"),
    "scales after a visit": (Run, "export"),
}


@dataclass(frozen=True)
class Random(Embedded):
    """A timm network with random weights on random images: what it costs, not what it is worth.

    Three test images a run, so that the search is what is measured.
    """

    note = "random images"

    @property
    def files(self) -> tuple[str, ...]:
        return ()

    def identity(self) -> dict[str, Any]:
        return {"model": f"{self.network}, random", "calibration_images": self.images}

    def check(self, progress: Progress = quiet) -> dict[str, str]:
        return {"files": "none"}

    def load(self, progress: Progress = quiet) -> Parts:
        return load_random(self.network, self.images, self.seed)

    def test(self, batch: int) -> Iterator[Tensor]:
        yield self.load().images[:3]

    def labels(self) -> Tensor:
        return self.load().targets[:3].argmax(1)

    def groups(self) -> None:
        return None


@lru_cache(maxsize=1)
def load_random(name: str, images: int, seed: int) -> Parts:
    """The network, images and its logits, drawn by seed."""
    torch.manual_seed(seed)
    model = unfused(timm.create_model(name, pretrained=False)).eval()
    x = torch.randn(images, *model.default_cfg["input_size"])
    with torch.no_grad():
        return Parts(model, x, torch.cat([model(part) for part in x.split(100)]))


@dataclass(frozen=True)
class Cost:
    """What something took: how often it was done, seconds of the clock and of the processor."""

    calls: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    faults: int = 0  # pages that the system had to hand out

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values())))

    @classmethod
    def now(cls) -> Cost:
        """What this process has taken until now."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return cls(0, perf_counter(), used.ru_utime + used.ru_stime, used.ru_minflt)

    def since(self, before: Cost) -> Cost:
        """What was taken in between, as one call."""
        return Cost(1, self.wall - before.wall, self.cpu - before.cpu, self.faults - before.faults)


@dataclass
class Account:
    """Costs by the name of what took them."""

    parts: dict[str, Cost] = field(default_factory=dict)
    candidates: list[Cost] = field(default_factory=list)  # one by one, in order

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens in this context."""
        before = Cost.now()
        yield
        cost = Cost.now().since(before)
        self.parts[name] = self.parts.get(name, Cost()) + cost
        if name == CANDIDATES:
            self.candidates.append(cost)

    @contextmanager
    def watch(self, owner: type, method: str, name: str) -> Iterator[None]:
        """Count each call of a method."""
        original = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return original(*arguments, **options)

        with patch.object(owner, method, timed):
            yield

    @property
    def rest(self) -> Cost:
        """What a search took besides all that is named."""
        named = [self.parts.get(name, Cost()) for name in (CANDIDATES, *IN_SEARCH)]
        wall, cpu, faults = (
            getattr(self.parts["search"], key) - sum(getattr(cost, key) for cost in named)
            for key in ("wall", "cpu", "faults")
        )
        return Cost(1, wall, cpu, faults)

    def overhead(self, key: str = "cpu") -> float:
        """What a search costs above its candidates, as a share of them."""
        whole, own = self.parts["search"], self.parts[CANDIDATES]
        return float(getattr(whole, key) / getattr(own, key) - 1)


def account_for(
    source: Source, quant: eq.QuantConfig, search: eq.SearchConfig, out: Path
) -> tuple[Account, Run, list[str]]:
    """Make a run in `out`; returns what its parts took, the run, and each candidate's block."""
    account, blocks = Account(), []
    with account.part("load"):
        hashes, parts = source.check(), source.load()
    with ExitStack() as stack:
        with account.part("quantize and calibrate"):
            run = stack.enter_context(Run(source, quant, search, out, parts=parts, hashes=hashes))
        stack.enter_context(account.watch(BlockObjective, "__call__", CANDIDATES))
        for name, (owner, method) in IN_SEARCH.items():
            stack.enter_context(account.watch(owner, method, name))
        with account.part("search"):
            for event in run.evolve():
                if isinstance(event, Evaluated):
                    blocks.append(event.block)
        with account.part("test"):
            outcome = run.test()
        with account.part("summary and figures"):
            run.write(outcome)
    return account, run, blocks


@torch.no_grad()
def alone(run: Run, block: str, repeats: int) -> Cost:
    """A candidate of a block outside of a run, the median of some; the first warms up."""
    _, images, targets = run.parts
    objective = BlockObjective(run.chain, block, images, targets, batch=run.search.batch)
    costs = []
    for _ in range(repeats + 1):
        before = Cost.now()
        objective((objective.start * (1 + 1e-3 * torch.rand(len(objective.start))))[None])
        costs.append(Cost.now().since(before))
    return median(costs[1:])


def median(costs: list[Cost]) -> Cost:
    """A typical cost, number by number."""
    keys = ("wall", "cpu", "faults")
    wall, cpu, faults = (statistics.median(getattr(cost, key) for cost in costs) for key in keys)
    return Cost(1, wall, cpu, int(faults))


def compare(
    account: Account, run: Run, blocks: list[str], repeats: int
) -> dict[str, dict[str, Cost]]:
    """What a candidate of each block took in the run, and takes alone."""
    found = {}
    for block in dict.fromkeys(blocks):
        inside = [cost for name, cost in zip(blocks, account.candidates) if name == block]
        found[block] = {"in the run": median(inside), "alone": alone(run, block, repeats)}
    return found


def tell(account: Account, candidates: dict[str, dict[str, Cost]]) -> str:
    """Both tables."""
    lines = [f"{'part':26}{'calls':>7}{'seconds':>10}{'CPU':>9}{'of search':>11}{'faults':>11}"]
    whole = account.parts["search"]
    rows = {**account.parts, "rest of the search": account.rest}
    for name in ("load", "quantize and calibrate", "search", CANDIDATES, *IN_SEARCH):
        if name in rows:
            lines.append(row(name, rows[name], whole))
    for name in ("rest of the search", "test", "summary and figures"):
        lines.append(row(name, rows[name], whole))
    lines.append(
        f"\nA search costs {100 * account.overhead():.1f} % more than its candidates (CPU), "
        f"{100 * account.overhead('wall'):.1f} % by the clock.\n"
    )
    lines.append(f"{'a candidate of':20}{'in the run':>18}{'alone':>18}{'ratio':>8}{'faults':>9}")
    for block, costs in candidates.items():
        inside, outside = costs["in the run"], costs["alone"]
        lines.append(
            f"{block:20}{1e3 * inside.cpu:>11.1f} ms CPU{1e3 * outside.cpu:>11.1f} ms CPU"
            f"{inside.cpu / outside.cpu:>8.2f}{inside.faults:>9}"
        )
    return "\n".join(lines)


def row(name: str, cost: Cost, whole: Cost) -> str:
    """A line of the first table."""
    inside = name in (CANDIDATES, *IN_SEARCH, "rest of the search")
    share = f"{100 * cost.cpu / whole.cpu:.1f} %" if inside else ""
    shown = f"  {name}" if inside else name
    return (
        f"{shown:26}{cost.calls:>7}{cost.wall:>10.2f}{cost.cpu:>9.2f}{share:>11}{cost.faults:>11,}"
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="vit", help="vit, cnn, or timm's name, random weights")
    parser.add_argument("--images", type=int, default=500, help="calibration images")
    parser.add_argument("--passes", type=int, default=10, help="passes over the blocks")
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="candidates alone, per block")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if min(options.passes, options.threads, options.repeats) < 1 or options.images < 2:
        parser.error("give --images of at least 2; --passes, --threads, --repeats of at least 1")
    started = Cost.now()  # Python and imports
    torch.set_num_threads(options.threads)
    make = Embedded if options.model in DEMO_MODELS else Random
    source = make(options.model, options.images)
    quant = eq.QuantConfig(weight_bits=options.weight_bits)
    search = eq.SearchConfig(passes=options.passes)
    with tempfile.TemporaryDirectory() as folder:
        account, run, blocks = account_for(source, quant, search, Path(folder) / "run")
        candidates = compare(account, run, blocks, options.repeats)
    state = environment(execution=run.state["execution"], chunk=run.chain.chunk, keeps_memory=KEPT)
    print(
        f"{options.model}, {options.images} images, {len(blocks)} evaluations, "
        f"{state['execution']}, chunks of {state['chunk']} images, {state['threads']} threads, "
        f"{state['processor']}, glibc {'keeps memory' if KEPT else 'as its environment says'}\n"
        f"start of Python and imports: {started.cpu:.2f} s CPU; peak memory {peak_memory()} MiB\n"
    )
    print(tell(account, candidates))
    if options.json is not None:
        figures = {
            "environment": state,
            "parts": {name: asdict(cost) for name, cost in account.parts.items()},
            "rest": asdict(account.rest),
            "overhead": account.overhead(),
            "candidates": {
                block: {where: asdict(cost) for where, cost in costs.items()}
                for block, costs in candidates.items()
            },
        }
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
