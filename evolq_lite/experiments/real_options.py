"""R7: C7's widths of mutation and genome on trained ViT-Tiny and DeiT-Tiny.

The paper adds uniform noise of at most 0.001 to a scale, whatever the scale. What that is worth
depends on the network and its bits, so its rivals are relative: noise of a share of each scale. One
variant searches all scales, not only those of attention's weights. All start from MinMax and cost
one pass; the test photographs are read once by all of a cell's networks, and KL decides.

Networks and photographs are not in this repo: give their folders. A cell takes nine minutes of one
core.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd

from evolq_lite.config import PRESETS, SearchConfig
from evolq_lite.experiments.cells import Claim, Tables
from evolq_lite.experiments.plots import plot_starts
from evolq_lite.experiments.real_cells import (
    NETWORKS,
    Change,
    Place,
    change_loss,
    check_of,
    group_settings,
    mean_loss,
    measure_loss,
    search_each,
    source_of,
    start_from,
)
from evolq_lite.experiments.results import Cell, Result
from evolq_lite.experiments.setup import Setting, search_scales
from evolq_lite.experiments.verdicts import WORDS, Row, Verdict, count_seeds
from evolq_lite.figures import Picture
from evolq_lite.genome import genome_of

PAPER, START = "absolute 0.001 (paper)", "start"
VARIANTS: dict[str, dict[str, Any]] = {
    PAPER: {},
    **{
        f"relative {step}": {"mutation": "relative", "step": step}
        for step in (0.003, 0.01, 0.03, 0.1)
    },
    "all scales": {"scales": "all"},
}
IMAGES = 256  # for calibration


def cells(quick: bool) -> list[Cell]:
    """Both networks at 4 and 3 bits, three seeds; nothing of it is quick."""
    if quick:
        return []
    return [
        {"network": network, "weight_bits": bits, "seed": seed, "images": IMAGES, "passes": 1}
        for seed in (0, 1, 2)
        for network in NETWORKS
        for bits in (4, 3)
    ]


def stage_of(cell: Cell) -> int:
    """Seeds are shown one after another."""
    return int(cell["seed"])


def run(cell: Cell, place: Place) -> Result:
    """Every variant of the search from one start; one reading of the test images."""
    source = source_of(cell, place, cell["images"])
    start = start_from(
        source, replace(PRESETS["paper"], weight_bits=cell["weight_bits"]), place.device
    )
    searches = {
        name: partial(
            search_scales,
            config=SearchConfig(passes=cell["passes"], seed=cell["seed"], **options),
        )
        for name, options in VARIANTS.items()
    }
    found = search_each(source, start, START, searches)
    return {**found, "median_scale": median_scale(start)}


def median_scale(setting: Setting) -> float:
    """The median of the scales that the paper's search changes."""
    return float(genome_of(setting.qmodel, setting.chain.searchable).read(setting.qmodel).median())


def figure(results: pd.DataFrame) -> Picture:
    """KL before and after each variant of the search, a panel for each network and bit-width."""
    changes = change_loss(group_settings(results), START, VARIANTS, "after the search")
    return plot_starts(
        changes, f"{check_of(results)}: one option of the search changed, from MinMax"
    )


def verdict(results: pd.DataFrame) -> Verdict:
    """Does any variant end significantly below the paper's choice in KL, at the same cost?"""
    settings, images = group_settings(results), int(results["test_images"].iloc[0])
    others = [name for name in VARIANTS if name != PAPER]
    many = len(settings) * len(others)  # comparisons: Bonferroni
    rows: list[Row] = []
    starts: list[Row] = []
    better: list[tuple[str, str]] = []
    for setting, found in settings.items():
        for name in VARIANTS:
            kl = measure_loss(found[START], found[name], "kl")
            starts.append(Row.of_loss(f"{setting}: {name}, over MinMax, KL", kl))
        for name in others:
            change = Change.of(found[PAPER], found[name], images)
            ahead = change.kl.better and many * change.kl.p_value < 0.05
            better += [(name, setting)] * ahead
            row, *more = change.rows(f"{setting}: {name}, over the paper's choice", not ahead)
            rows.append(row)
            starts += more
    which = f": {better[0][0]} ({better[0][1]})" if len(better) == 1 else ""
    return Verdict(
        WORDS[2 if better else 0],
        f"On a {check_of(results)} ({count_seeds(results)}, one pass), variants beat the paper's "
        f"choice significantly in KL (Bonferroni) in {len(better)} of {many} comparisons{which}.",
        (*rows, *starts),
    )


def tables(results: pd.DataFrame) -> Tables:
    """KL and cross-entropy of each variant, and what the paper's width is relative to scales."""
    rows = []
    for setting, found in group_settings(results).items():
        width = SearchConfig().width(int(found["weight_bits"].iloc[0]))
        share = 100 * width / found["median_scale"].mean()
        for name in (START, *VARIANTS):
            rows.append(
                {
                    "setting": setting,
                    "search": name,
                    "the paper's width, % of the median scale": f"{share:.1f}",
                    "KL to float": mean_loss(found[name], "kl"),
                    "cross-entropy": mean_loss(found[name], "cross_entropy"),
                }
            )
    return {"Means over seeds on 1,000 test photographs": pd.DataFrame(rows)}


CLAIM = Claim(
    "R7",
    "Are the paper's width and genome the best choice on trained ViT-Tiny and DeiT-Tiny?",
    cells,
    run,
    figure,
    verdict,
    tables,
    stage=stage_of,
)
