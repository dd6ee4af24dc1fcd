"""C6: what does choosing the snapshot by test accuracy hide? (The official code does it.)

After every visit the test images are looked at, and three snapshots are compared: the one that is
best on the test images, the one with the best calibration fitness, and the last. How much of the
first one's lead is luck shows when it is picked on one half of the typefaces and measured on the
other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.data import test_faces
from evolq_lite.evaluate import Gain, SeedComparison, unpacked
from evolq_lite.evolve import Committed, evolve
from evolq_lite.experiments.cells import Claim, unpack_correct
from evolq_lite.experiments.plots import plot_gains
from evolq_lite.experiments.results import Cell, Result, by
from evolq_lite.experiments.setup import measure_top1, prepare
from evolq_lite.experiments.verdicts import Row, Verdict, count_seeds, decide
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
    setting = prepare("vit", cell["images"], cell["seed"], QuantConfig(cell["weight_bits"]))
    search = SearchConfig(passes=cell["passes"], seed=cell["seed"], batch=min(100, cell["images"]))
    before = measure_top1(setting.qmodel, cell["every"])
    seen: list[Result] = []
    demo = setting.demo
    for event in evolve(setting.chain, demo.calibration, demo.targets, search):
        if not isinstance(event, Committed):
            continue
        if seen and event.fitness == seen[-1]["fitness"]:  # nothing accepted: the same network
            seen.append(seen[-1])
        else:
            look = measure_top1(setting.qmodel, cell["every"])
            seen.append({**look, "fitness": event.fitness})
    return {
        "before": before["correct"],
        "images": before["images"],
        "snapshots": [look["correct"] for look in seen],
        "fitness": [look["fitness"] for look in seen],
    }


def unpack_snapshots(result: pd.Series) -> Tensor:
    """Which images each snapshot has right, (snapshots, images)."""
    images = result["test_images"]
    return torch.stack([unpacked(text, images) for text in result["snapshots"]])


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


def pick_snapshots(results: pd.DataFrame) -> dict[str, Tensor]:
    """Which images (seeds, n) the snapshot of each seed has right, by the way it is picked."""
    return pick_rows([unpack_snapshots(r) for _, r in results.iterrows()], results["fitness"])


def pick_rows(tables: Iterable[Tensor], fitness: Iterable[Sequence[float]]) -> dict[str, Tensor]:
    """The same from the table (snapshots, n) of each seed, and the fitness of its snapshots."""
    picks: dict[str, list[Tensor]] = {"best on test": [], "best fitness": [], "last": []}
    for rows, values in zip(tables, fitness, strict=True):
        picks["best on test"].append(rows[rows.float().mean(1).argmax()])
        picks["best fitness"].append(rows[int(np.argmin(values))])
        picks["last"].append(rows[-1])
    return {name: torch.stack(rows) for name, rows in picks.items()}


def faces_of(results: pd.DataFrame) -> Tensor:
    """The typeface of each test image that was looked at."""
    return test_faces()[:: int(results["every"].iloc[0])]


def measure_gains(results: pd.DataFrame) -> dict[str, dict[str, Gain]]:
    """Gain over the start of the three snapshots, by bit-width."""
    return {
        f"W{bits}A8": {
            name: SeedComparison.of(unpack_correct(mine, "before"), rows, faces_of(mine))
            for name, rows in pick_snapshots(mine).items()
        }
        for bits, mine in sorted(by(results, "weight_bits").items())
    }


def figure(results: pd.DataFrame) -> Picture:
    """Gain over the start of the three snapshots, one panel for each bit-width."""
    title = "Gain over MinMax of the snapshot picked in three ways"
    return plot_gains(measure_gains(results), title, same_scale=True)


def verdict(results: pd.DataFrame) -> Verdict:
    """Does the snapshot that test images pick show more than the last, and than it is worth?"""
    rows, picked = [], []
    for bits, mine in sorted(by(results, "weight_bits").items()):
        tables = [unpack_snapshots(r) for _, r in mine.iterrows()]
        found, picks = Selection.of(tables, faces_of(mine)), pick_snapshots(mine)
        lead = 100 * float(picks["best on test"].float().mean() - picks["last"].float().mean())
        picked.append(found)
        flatters = lead > 0 and found.lost > 1.96 * found.error
        band = (found.lost - 1.96 * found.error, found.lost + 1.96 * found.error)
        name = f"W{bits}A8"
        rows += [
            Row(
                f"{name}: luck of picking on half; the best on all images leads by {lead:+.2f}",
                found.lost,
                band,
                holds=flatters,
            ),
            Row(f"{name}: the best of {len(tables[0])} on all test images, over the last", lead),
            Row(f"{name}: picked on half, over the last, on that half", found.here),
            Row(f"{name}: picked on half, over the last, on the other half", found.there),
        ]
    rows += [
        Row.of(f"{setting}: {name}, over MinMax", gain)
        for setting, gains in measure_gains(results).items()
        for name, gain in gains.items()
    ]
    return Verdict(
        decide(row.holds for row in rows),
        f"On the embedded ViT (Typefaces-62, {count_seeds(results)}), snapshots picked on half of "
        f"the test typefaces lead the last by {tell_range([s.here for s in picked])} points there, "
        f"and by {tell_range([s.there for s in picked])} elsewhere.",
        tuple(rows),
    )


def tell_range(values: Sequence[float]) -> str:
    ends = f"{min(values):+.2f}", f"{max(values):+.2f}"
    return " to ".join(dict.fromkeys(ends))


CLAIM = Claim(
    "C6",
    "Does choosing the snapshot on the test set flatter the result?",
    cells,
    run,
    figure,
    verdict,
    real="R6",
)
