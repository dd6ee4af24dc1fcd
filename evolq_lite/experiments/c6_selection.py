"""C6: what does choosing the snapshot by test accuracy hide? (The official code does it.)

After every visit the test images are looked at, and three snapshots are compared: the one that is
best on the test images, the one with the best calibration fitness, and the last. How much of the
first one's lead is luck shows when it is picked on one half of the images and measured on the
other.
"""

from statistics import fmean as mean

import numpy as np
import torch

from evolq_lite.config import QuantConfig, SearchConfig
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
            "every": 20 if quick else 2,
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


def table(r: Result) -> torch.Tensor:
    """Which images each snapshot has right, (snapshots, images)."""
    return torch.stack([unpacked(text, r["images"]) for text in r["snapshots"]])


def inflation(tables: list[torch.Tensor], halves: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Points that the snapshot picked on one half of the images loses on the other, both ways.

    The last snapshot's difference between the halves is taken off: it was not picked. Mean over the
    tables, one a seed; `halves` are image numbers.
    """
    out = []
    for rows in tables:
        one, two = (rows[:, half].float().mean(1) for half in halves)
        for here, there in ((one, two), (two, one)):
            best = int(here.argmax())
            out.append(float((here[best] - there[best]) - (here[-1] - there[-1])))
    return 100 * mean(out)


def bootstrap(tables: list[torch.Tensor], draws: int = 300) -> tuple[float, float, float]:
    """The inflation and its 95 % interval over resampled images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.arange(tables[0].shape[1])
    halves = images[::2], images[1::2]
    found = []
    for _ in range(draws):
        one, two = (
            half[torch.randint(len(half), (len(half),), generator=generator)] for half in halves
        )
        found.append(inflation(tables, (one, two)))
    low, high = np.quantile(found, [0.025, 0.975])
    return inflation(tables, halves), float(low), float(high)


def figure(results: list[Result]) -> Picture:
    """Gain over the start of the three snapshots, one panel for each bit-width."""
    groups: dict[str, dict[str, Gain]] = {}
    for bits in sorted({r["weight_bits"] for r in results}):
        mine = [r for r in results if r["weight_bits"] == bits]
        starts = torch.stack([unpacked(r["before"], r["images"]) for r in mine])
        picks = {"best on test": [], "best fitness": [], "last": []}  # type: ignore[var-annotated]
        for r in mine:
            rows = table(r)
            picks["best on test"].append(rows[rows.float().mean(1).argmax()])
            picks["best fitness"].append(rows[int(np.argmin(r["fitness"]))])
            picks["last"].append(rows[-1])
        groups[f"W{bits}A8"] = {
            name: SeedComparison.of(starts, torch.stack(rows)) for name, rows in picks.items()
        }
    return forest(groups, "Gain over MinMax of the snapshot picked in three ways")


def verdict(results: list[Result]) -> tuple[str, str]:
    """The inflation in points by bit-width; the claim is that selection flatters."""
    said, clear = [], []
    for bits in sorted({r["weight_bits"] for r in results}):
        tables = [table(r) for r in results if r["weight_bits"] == bits]
        value, low, high = bootstrap(tables)
        shares = [100 * rows.float().mean(1) for rows in tables]
        lead = mean([float(share.max() - share[-1]) for share in shares])
        said.append(
            f"W{bits}A8: the best of {len(tables[0])} snapshots is {lead:.2f} points above the "
            f"last, of which {value:+.2f} [{low:+.2f}, {high:+.2f}] vanish on the other half"
        )
        clear.append(value > 0)
    return verdict_of(clear), "; ".join(said) + "."


CLAIM = Claim(
    "C6",
    "Does choosing the snapshot on the test set flatter the result?",
    cells,
    run,
    figure,
    verdict,
)
