"""R12: C12's question on trained ViT-Tiny and DeiT-Tiny: does a search still gain on a good start?

Four searches of the same cost, one pass each, begin at each start; the 1,000 test photographs are
read when all of a cell's networks are there. Top-1 on 1,000 images decides little, so the verdict
looks at KL to the float network, image by image. The starts `paper` and `recommended` have five
seeds, which draw the calibration images and the mutations; the two others have one. The report
shows what is there after each stage (`stage_of`).

Networks and photographs are not in this repo: give their folders. A cell takes a quarter of an hour
of one core, most of it for the searches, and holds all searches of one start.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd

from evolq_lite.config import SearchConfig
from evolq_lite.evaluate import LossChange
from evolq_lite.experiments import c12_starts
from evolq_lite.experiments.c12_starts import EVOLQ, KL, NONE, RANDOM, SEARCHES
from evolq_lite.experiments.cells import Claim, Tables
from evolq_lite.experiments.plots import plot_starts
from evolq_lite.experiments.real_cells import (
    NETWORKS,
    Change,
    Place,
    check_of,
    measure_loss,
    search_each,
    source_of,
    start_from,
    tell_means,
)
from evolq_lite.experiments.results import Cell, Result, by
from evolq_lite.experiments.setup import search_scales
from evolq_lite.experiments.verdicts import Row, Verdict, count_seeds, decide
from evolq_lite.figures import Picture

POOR, SCRIPT, GOOD, BEST = "paper", "official", "recommended", "recommended, learned"
STARTS = (POOR, SCRIPT, GOOD, BEST)  # as C12 has them
SEEDS = {POOR: 5, GOOD: 5}  # the others: one
IMAGES = 256  # for calibration


def cells(quick: bool) -> list[Cell]:
    """Every network, bit-width and start, stage after stage; nothing of it is quick."""
    if quick:
        return []
    found = [
        {"network": network, "weight_bits": bits, "start": start, "seed": seed}
        | {"images": IMAGES, "passes": 1}
        for seed in range(max(SEEDS.values()))
        for start in STARTS
        if seed < SEEDS.get(start, 1)
        for network in NETWORKS
        for bits in (4, 3)
    ]
    return sorted(found, key=stage_of)


def stage_of(cell: Cell) -> int:
    """What is shown together: the first seed of two starts, the other starts, further seeds."""
    return cell["seed"] + (cell["seed"] > 0 or cell["start"] not in SEEDS)


def run(cell: Cell, place: Place) -> Result:
    """Every search from the cell's start; then one reading of the test images by all networks."""
    source = source_of(cell, place, cell["images"])
    config = replace(c12_starts.STARTS[cell["start"]], weight_bits=cell["weight_bits"], act_bits=8)
    searches = {
        name: partial(
            search_scales,
            config=SearchConfig(passes=cell["passes"], seed=cell["seed"], **options),
        )
        for name, options in SEARCHES.items()
    }
    return search_each(source, start_from(source, config, place.device), NONE, searches)


Networks = Mapping[str, pd.Series]  # by search: one result for each seed


def group(results: pd.DataFrame) -> dict[tuple[str, str], Networks]:
    """By setting, then start: what each search has found, a result for each seed."""
    known = by(results, "network", "weight_bits", "start")
    return {
        (f"{NETWORKS[network]} W{bits}A8", start): {
            name: known[network, bits, start][name] for name in (NONE, *SEARCHES)
        }
        for network in NETWORKS
        for bits in (4, 3)
        for start in STARTS
        if (network, bits, start) in known
    }


def figure(results: pd.DataFrame) -> Picture:
    """What each search makes of each start, one panel for each network and bit-width."""
    return draw(results, STARTS, tuple(SEARCHES), f"{check_of(results)}: searches from each start")


def draw(
    results: pd.DataFrame, starts: Sequence[str], searches: Sequence[str], title: str
) -> Picture:
    """What some searches make of some starts, one panel for each network and bit-width."""
    changes: dict[str, dict[str, dict[str, LossChange]]] = {}
    for (setting, start), found in group(results).items():
        if start in starts:
            changes.setdefault(setting, {})[start] = {
                name: measure_loss(found[NONE], found[name], "kl") for name in searches
            }
    return plot_starts(changes, title)


def verdict(results: pd.DataFrame) -> Verdict:
    """Does the paper's search lower KL significantly on the best start, in every setting?"""
    images = int(results["test_images"].iloc[0])
    rows: list[Row] = []
    others: list[Row] = []
    lowered: dict[tuple[str, str], list[bool]] = {}  # KL of each setting, by start and search
    for (setting, start), found in group(results).items():
        for name in SEARCHES:
            decides = (start, name) == (GOOD, EVOLQ)
            label = f"{setting}: {name} on {start}"
            change = Change.of(found[NONE], found[name], images)
            kl, *more = change.rows(label, change.kl.better if decides else None)
            (rows if decides else others).append(kl)
            others += more
            lowered.setdefault((start, name), []).append(change.kl.better)
        for rival, known in ((RANDOM, "random search"), (KL, KL)):
            label = f"{setting}: {EVOLQ}, over {known}, on {start}"
            others += Change.of(found[rival], found[EVOLQ], images).rows(label)
    holds = lowered[GOOD, EVOLQ]
    seeds = count_seeds(results[results["start"] == GOOD])
    return Verdict(
        decide(holds),
        f"On a {check_of(results)} ({seeds}, one pass), the paper's search lowers KL in "
        f"{sum(lowered[POOR, EVOLQ])} of {len(holds)} settings from MinMax, random search in "
        f"{sum(lowered[POOR, RANDOM])}; from GPTQ's integers, {sum(holds)} and "
        f"{sum(lowered[GOOD, RANDOM])}.",
        (*rows, *others),
    )


def tables(results: pd.DataFrame) -> Tables:
    """Top-1 and losses of each start and search, mean over seeds."""
    images = int(results["test_images"].iloc[0])
    rows = []
    for (setting, start), found in group(results).items():
        for name in (NONE, *SEARCHES):
            rows.append(
                {
                    "setting": setting,
                    "start": start,
                    "search": name,
                    "seeds": str(len(found[name])),
                    **tell_means(found[name], images),
                }
            )
    return {f"Means over seeds on {images:,} test photographs": pd.DataFrame(rows)}


CLAIM = Claim(
    "R12",
    "Does a search still gain on a good start, on trained ViT-Tiny and DeiT-Tiny?",
    cells,
    run,
    figure,
    verdict,
    tables,
    stage=stage_of,
)
