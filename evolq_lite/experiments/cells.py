"""Experiments as cells: each is computed once, kept as one JSON file, and never trusted blindly.

A claim is a module with cells (plain dicts of parameters), `run(cell)` that computes one, and
`figure` and `verdict`, which see the results only. A stopped `reproduce` loses at most the cell in
work; a cell whose file is there, whole and about the same parameters, is skipped.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from evolq_lite.config import parsed
from evolq_lite.data import test_faces
from evolq_lite.evaluate import Accuracy, Comparison, Gain, SeedComparison, unpacked
from evolq_lite.figures import Picture
from evolq_lite.record import environment, fix_kernels, write_whole

VERSION = 1  # of what a cell means; a result of another version is computed anew
Cell = dict[str, Any]
Result = dict[str, Any]
log = logging.getLogger("evolq_lite")


@dataclass(frozen=True)
class Claim:
    """One claim of the paper as an experiment."""

    name: str  # C1 ... C8
    question: str
    cells: Callable[[bool], list[Cell]]  # from `quick`
    run: Callable[[Cell], Result]
    figure: Callable[[list[Result]], Picture]
    verdict: Callable[
        [list[Result]], tuple[str, str]
    ]  # a word of VERDICTS, or UNDECIDED, and a sentence


VERDICTS = ("holds here", "holds partly", "does not hold here")
UNDECIDED = "not decided"  # too little was computed


def verdict_of(parts: Sequence[bool]) -> str:
    """The verdict on a claim from whether each of its parts holds."""
    return VERDICTS[0 if all(parts) else 1 if any(parts) else 2]


def path_of(folder: Path, claim: str, cell: Cell) -> Path:
    """Where a cell's result lies: readable parameters, and a hash that tells all of them apart."""
    words = "-".join(str(value) for value in cell.values())
    digest = hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:8]
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in words)[:60]
    return folder / claim / f"{safe}-{digest}.json"


def read(path: Path, claim: str, cell: Cell) -> Result | None:
    """A cell's result, or None if it must be computed; says so if a file is there but is not it."""
    if not path.is_file():
        return None
    try:
        found = parsed(path.read_bytes())
        if (found["claim"], found["cell"], found["version"]) != (claim, cell, VERSION):
            raise ValueError("it is about something else")
        if found["sha256"] != digest_of(found):
            raise ValueError("it is not as it was written: its digest differs")
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is not a result of this cell (%s); it is computed anew", path, error)
        return None
    # The cell apart as well: `images` is that of calibration in it, of the test in a result.
    return {**cell, **found["result"], "cell": cell, "seconds": found["seconds"]}


def digest_of(content: dict[str, Any]) -> str:
    """A hash of all that a cell's file says, but for the hash itself."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def computed(claim: Claim, cell: Cell) -> dict[str, Any]:
    """Run a cell; returns what its file holds."""
    began = perf_counter()
    result = claim.run(cell)
    # A run that was stopped and gone on with knows how long its search took in all.
    seconds = max(perf_counter() - began, result.get("search_seconds", 0.0))
    content = {
        "claim": claim.name,
        "version": VERSION,
        "cell": cell,
        "result": result,
        "seconds": round(seconds, 2),
        "environment": environment(),
    }
    content = json.loads(json.dumps(content))  # as it will be read: tuples are lists there
    return {**content, "sha256": digest_of(content)}


def computed_elsewhere(task: tuple[Claim, Cell]) -> dict[str, Any]:
    """The same on a worker, which computes with one thread."""
    torch.set_num_threads(1)
    fix_kernels()
    return computed(*task)


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write a cell's file."""
    path = path_of(folder, content["claim"], content["cell"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def right(result: Result) -> Tensor:
    """Which images (n,) a result has right."""
    return unpacked(result["correct"], result["images"])


def accuracy_of(result: Result) -> Accuracy:
    """Top-1 of a result that has `correct` and `images`."""
    return Accuracy(int(right(result).sum()), result["images"])


def paired(before: Sequence[Result], after: Sequence[Result]) -> Gain:
    """Compare results on the same images, a pair for each seed.

    Every n-th embedded test image (`every`) comes in typefaces; other images stand for themselves.
    """
    was, now = (torch.stack([right(r) for r in results]) for results in (before, after))
    if every := before[0].get("every"):
        return SeedComparison.of(was, now, test_faces()[::every])
    return Comparison.of(was[0], now[0]) if len(was) == 1 else SeedComparison.of(was, now)
