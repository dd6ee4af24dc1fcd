"""C6: what does choosing the snapshot by test accuracy hide? (The official code does it.)

After every visit the test images are looked at, and three snapshots are compared: the one that is
best on the test images, the one with the best calibration fitness, and the last. How much of the
first one's lead is luck shows when it is picked on one half of the typefaces and measured on the
other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.data import test_faces
from evolq_lite.evaluate import Gain, SeedComparison, unpacked
from evolq_lite.experiments.cells import Cell, Claim, Result, verdict_of
from evolq_lite.experiments.plots import forest
from evolq_lite.experiments.setup import evolved, setting, tested
from evolq_lite.figures import Picture


def cells(quick: bool) -> list[Cell]:
    """Three seeds at the paper's three settings."""
    settings = ((3,), (0,)) if quick else ((3, 4, 8), (0, 1, 2))
    return [
        {
            "weight_bits": bits,
            "seed": seed,
            "images": 60 if quick else 500,
            "passes": 1 if quick else 10,
            "every": 21 if quick else 3,  # no divisor of 62: all characters
        }
        for bits in settings[0]
        for seed in settings[1]
    ]


def run(cell: Cell) -> Result:
    """The paper's search, tested after every visit as the official code does."""
    made = setting("vit", cell["images"], cell["seed"], QuantConfig(cell["weight_bits"]))
    search = SearchConfig(passes=cell["passes"], seed=cell["seed"], batch=min(100, cell["images"]))
    before = tested(made.qmodel, cell["every"])
    seen: list[Result] = []

    def look(visits: int, fitness: float) -> None:
        if seen and fitness == seen[-1]["fitness"]:  # nothing accepted, so the same network
            seen.append(seen[-1])
        else:
            seen.append({**tested(made.qmodel, cell["every"]), "fitness": fitness})

    evolved(made, search, look)
    return {
        "before": before["correct"],
        "images": before["images"],
        "snapshots": [s["correct"] for s in seen],
        "fitness": [s["fitness"] for s in seen],
    }


def table(r: Result) -> Tensor:
    """Which images each snapshot has right, (snapshots, images)."""
    return torch.stack([unpacked(text, r["images"]) for text in r["snapshots"]])


@dataclass(frozen=True)
class Selection:
    """What picking on one half of the typefaces does, in points above the last snapshot.

    Means over seeds and random halves. `there` is on the half that did not pick: what is real.
    """

    here: float  # on the half that picked
    there: float
    error: float  # of here - there, over typefaces, the picks as they are

    @classmethod
    def of(cls, tables: Sequence[Tensor], faces: Tensor, halvings: int = 100) -> "Selection":
        """From which images (snapshots, n) each seed has right, and the typefaces (n,)."""
        generator = torch.Generator().manual_seed(0)
        _, faces = faces.unique(return_inverse=True)
        many = int(faces.max()) + 1
        here, there = torch.zeros(many), torch.zeros(many)
        for rows in tables:
            sums = torch.zeros(len(rows), many).index_add_(1, faces, rows.float())
            for _ in range(halvings):
                order = torch.randperm(many, generator=generator)
                for half in (order[: many // 2], order[many // 2 :]):
                    best = int(sums[:, half].sum(1).argmax())
                    lead = sums[best] - sums[-1]
                    rest = torch.ones(many, dtype=torch.bool).index_fill_(0, half, False)
                    here[half] += lead[half]
                    there[rest] += lead[rest]
        # Each typeface picks once a halving, so these are means over all images.
        scale = 100 / (len(tables) * halvings * len(faces))
        lost = (here - there) * scale
        error = sqrt(many / (many - 1) * float((lost - lost.mean()).square().sum()))
        return cls(float(here.sum()) * scale, float(there.sum()) * scale, error)

    @property
    def lost(self) -> float:
        """Points that selection only seems to win."""
        return self.here - self.there

    def __str__(self) -> str:
        low, high = self.lost - 1.96 * self.error, self.lost + 1.96 * self.error
        return (
            f"{self.here:+.2f} points above the last on the half of the typefaces that picked it, "
            f"{self.there:+.2f} on the other half: {self.lost:+.2f} [{low:+.2f}, {high:+.2f}] "
            "are selection"
        )


def picked(results: list[Result]) -> dict[str, Tensor]:
    """Which images (seeds, n) the snapshot of each seed has right, by the way it is picked."""
    picks: dict[str, list[Tensor]] = {"best on test": [], "best fitness": [], "last": []}
    for r in results:
        rows = table(r)
        picks["best on test"].append(rows[rows.float().mean(1).argmax()])
        picks["best fitness"].append(rows[int(np.argmin(r["fitness"]))])
        picks["last"].append(rows[-1])
    return {name: torch.stack(rows) for name, rows in picks.items()}


def figure(results: list[Result]) -> Picture:
    """Gain over the start of the three snapshots, one panel for each bit-width."""
    groups: dict[str, dict[str, Gain]] = {}
    for bits in sorted({r["weight_bits"] for r in results}):
        mine = [r for r in results if r["weight_bits"] == bits]
        starts = torch.stack([unpacked(r["before"], r["images"]) for r in mine])
        faces = test_faces()[:: mine[0]["every"]]
        groups[f"W{bits}A8"] = {
            name: SeedComparison.of(starts, rows, faces) for name, rows in picked(mine).items()
        }
    return forest(groups, "Gain over MinMax of the snapshot picked in three ways")


def verdict(results: list[Result]) -> tuple[str, str]:
    """Does the snapshot that test images pick show more than the last, and than it is worth?"""
    said, clear = [], []
    for bits in sorted({r["weight_bits"] for r in results}):
        mine = [r for r in results if r["weight_bits"] == bits]
        found = Selection.of([table(r) for r in mine], test_faces()[:: mine[0]["every"]])
        rows = picked(mine)
        lead = 100 * float(rows["best on test"].float().mean() - rows["last"].float().mean())
        said.append(
            f"W{bits}A8: of {len(mine[0]['fitness'])} snapshots, the best on all test images is "
            f"{lead:+.2f} points above the last; picked on half, it is {found}"
        )
        clear.append(lead > 0 and found.lost > 1.96 * found.error)
    return verdict_of(clear), "; ".join(said) + "."


CLAIM = Claim(
    "C6",
    "Does choosing the snapshot on the test set flatter the result?",
    cells,
    run,
    figure,
    verdict,
)
