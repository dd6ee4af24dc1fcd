"""Experiments as cells: each is computed once, kept as one line of a file, and compared in pairs.

A claim is a module with cells (plain dicts of parameters), `run(cell)` that computes one, and
`figure` and `verdict`, which see the results only. A stopped `reproduce` loses at most the cell in
work; a cell whose result is there is not computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor

from evolq_lite.data import test_faces
from evolq_lite.evaluate import (
    Accuracy,
    Gain,
    LossChange,
    SeedComparison,
    unpack_values,
    unpacked,
)
from evolq_lite.experiments.results import VERSION, Cell, Result
from evolq_lite.experiments.verdicts import Verdict
from evolq_lite.figures import Picture
from evolq_lite.runs.environment import environment, fix_kernels

Tables = dict[str, pd.DataFrame]


def no_tables(results: pd.DataFrame) -> Tables:
    """What a claim shows whose rows and figure say everything."""
    return {}


@dataclass(frozen=True)
class Claim:
    """One claim of the paper as an experiment. All but `run` see results only, a row per cell."""

    name: str  # C1, C2 ...
    question: str
    cells: Callable[[bool], list[Cell]]  # from `quick`
    run: Callable[..., Result]  # from a cell; on real networks, from folders as well: real_cells
    figure: Callable[[pd.DataFrame], Picture]
    verdict: Callable[[pd.DataFrame], Verdict]
    tables: Callable[[pd.DataFrame], Tables] = no_tables  # more numbers, by title
    real: str = ""  # the claim that asks the same of real networks
    note: str = ""  # what a reader must know beside the verdict
    reads: str = ""  # the claim whose cells and results it is told from, if not its own
    # Results are shown when all cells of a stage are there, and of those before it.
    stage: Callable[[Cell], int] = lambda cell: 0


class Work(Protocol):
    """What can compute cells: a claim, or the paper's grid."""

    @property
    def name(self) -> str:
        """What its file of results is called."""
        ...

    @property
    def run(self) -> Callable[[Cell], Result]:
        """What was measured for a cell."""
        ...


def compute(claim: Work, cell: Cell) -> dict[str, Any]:
    """Run a cell; returns what its line says, `environment` being a description."""
    began = perf_counter()
    result = claim.run(cell)
    # A run that was stopped and resumed knows how long its search took in all.
    seconds = max(perf_counter() - began, result.get("search_seconds", 0.0))
    return {
        "claim": claim.name,
        "cell": cell,
        "result": result,
        "seconds": round(seconds, 2),
        "environment": environment(),
        "version": VERSION,
    }


def compute_with_one_thread(task: tuple[Work, Cell]) -> dict[str, Any]:
    """The same on a worker; ValueError where a file or the disk is in the way.

    Where workers compute, an OSError would mean that one was lost, and the cell be tried again.
    """
    torch.set_num_threads(1)
    fix_kernels()
    try:
        return compute(*task)
    except OSError as error:
        raise ValueError(f"{type(error).__name__} in a cell of {task[0].name}: {error}") from None


def unpack_correct(results: pd.DataFrame, column: str = "correct") -> Tensor:
    """Which test images each result has right, (results, images)."""
    rows = zip(results[column], results["test_images"].astype(int))
    return torch.stack([unpacked(text, images) for text, images in rows])


def count_correct(result: pd.Series) -> Accuracy:
    """Top-1 of one result."""
    right = unpacked(result["correct"], result["test_images"])
    return Accuracy(int(right.sum()), len(right))


def measure_gain(before: pd.DataFrame, after: pd.DataFrame) -> Gain:
    """Compare results on the same test images, a pair for each seed.

    Every n-th of the embedded test images was read (the column `every`), and they are grouped by
    typeface.
    """
    faces = test_faces()[:: int(before["every"].iloc[0])]
    return SeedComparison.of(unpack_correct(before), unpack_correct(after), faces)


def measure_loss(before: pd.DataFrame, after: pd.DataFrame, loss: str) -> LossChange:
    """The change of a loss, typeface by typeface, a pair for each seed."""
    was, now = (torch.stack([unpack_values(t) for t in r[loss]]) for r in (before, after))
    return LossChange.of(was, now)
