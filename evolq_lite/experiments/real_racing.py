"""R10: C10's races on trained DeiT-Tiny, over one pass.

The paper's search, which evaluates every candidate whole; a race with as many candidates; and a
race that goes on until it has computed as many batches. All start from MinMax, and the test
photographs are read once by all of a cell's networks; KL to the float network decides.

Network and photographs are not in this repo: give their folders. A cell takes two or three minutes
of a large GPU that it shares with a dozen others, and an estimated twenty of one core.
"""

from dataclasses import replace
from functools import partial

import pandas as pd

from evolq_lite.config import PRESETS
from evolq_lite.experiments.c10_racing import (
    EQUAL,
    PAPER,
    RACE,
    START,
    config_of,
    race,
    search_and_keep,
)
from evolq_lite.experiments.cells import Claim, Tables
from evolq_lite.experiments.plots import plot_starts
from evolq_lite.experiments.real_cells import (
    Change,
    Place,
    change_loss,
    check_of,
    group_settings,
    search_each,
    source_of,
    start_from,
    tell_means,
)
from evolq_lite.experiments.results import Cell, Result
from evolq_lite.experiments.setup import Setting
from evolq_lite.experiments.verdicts import Row, Verdict, count_seeds, decide
from evolq_lite.figures import Picture

NETWORK = "deit_tiny_patch16_224"
SEARCHES = (PAPER, RACE, EQUAL)


def cells(quick: bool) -> list[Cell]:
    """Two bit-widths, five seeds; nothing of it is quick."""
    if quick:
        return []
    return [
        {"network": NETWORK, "weight_bits": bits, "seed": seed}
        | {"images": 1000, "batch": 100, "passes": 1}
        for seed in range(5)
        for bits in (4, 3)
    ]


def stage_of(cell: Cell) -> int:
    """Seeds are shown one after another."""
    return int(cell["seed"])


def run(cell: Cell, place: Place) -> Result:
    """Three searches from one start; one reading of the test photographs."""
    source = source_of(cell, place, cell["images"])
    start = start_from(
        source, replace(PRESETS["paper"], weight_bits=cell["weight_bits"]), place.device
    )
    searches = {name: partial(search, name=name, cell=cell) for name in SEARCHES}
    return search_each(source, start, START, searches)


def search(setting: Setting, name: str, cell: Cell) -> Result:
    """Search in place; what the search says of itself."""
    whole = {**cell, "search": name}
    if name == PAPER:
        return search_and_keep(setting, config_of(whole, racing=False))
    return race(setting, whole)


def cost_of(found: pd.DataFrame) -> float:
    """What as many candidates cost when they race, as a share."""
    shares = [race["cost"] / paper["cost"] for race, paper in zip(found[RACE], found[PAPER])]
    return sum(shares) / len(shares)


def figure(results: pd.DataFrame) -> Picture:
    """KL before and after each search, a panel for each bit-width."""
    changes = change_loss(group_settings(results), START, SEARCHES, "after the search")
    return plot_starts(changes, f"{check_of(results)}: with and without racing, from MinMax")


def verdict(results: pd.DataFrame) -> Verdict:
    """Does a race at the paper's cost end significantly lower in KL, at both bit-widths?"""
    images = int(results["test_images"].iloc[0])
    rows: list[Row] = []
    others: list[Row] = []
    shares: list[float] = []
    for setting, found in group_settings(results).items():
        shares.append(cost_of(found))
        searched = Change.of(found[START], found[PAPER], images)
        others += searched.rows(f"{setting}: the paper's search, over MinMax")
        for name in (EQUAL, RACE):
            change = Change.of(found[PAPER], found[name], images)
            counts = name == EQUAL
            label = f"{setting}: {name}, over the paper's search"
            kl, *more = change.rows(label, change.kl.better if counts else None)
            (rows if counts else others).append(kl)
            others += more
    return Verdict(
        decide(row.holds for row in rows),
        f"On a {check_of(results)} of DeiT-Tiny ({count_seeds(results)}, one pass), as many "
        f"candidates cost {100 * sum(shares) / len(shares):.0f} % when they race; at equal cost KL "
        f"ends lower in {sum(bool(row.holds) for row in rows)} of {len(rows)} settings.",
        (*rows, *others),
    )


def tables(results: pd.DataFrame) -> Tables:
    """What each search costs and finds, in the mean over seeds."""
    images = int(results["test_images"].iloc[0])
    rows = []
    for setting, found in group_settings(results).items():
        for name in (START, *SEARCHES):
            told = pd.DataFrame(list(found[name]))
            searched = name != START
            rows.append(
                {
                    "setting": setting,
                    "search": name,
                    "candidates": f"{told['evaluations'].mean():.0f}" if searched else "",
                    "cost, evaluations": f"{told['cost'].mean():.0f}" if searched else "",
                    **tell_means(found[name], images),
                }
            )
    return {f"Means over seeds on {images:,} test photographs": pd.DataFrame(rows)}


CLAIM = Claim(
    "R10",
    "Does dropping candidates early gain at the paper's cost, on trained DeiT-Tiny?",
    cells,
    run,
    figure,
    verdict,
    tables,
    stage=stage_of,
)
