"""R8: C8's race on trained ViT-Tiny and DeiT-Tiny.

The method that C8 chose on the embedded networks, with nothing chosen anew, against the paper's
search from MinMax, and against its own start. Searches are one pass long and cost the same number
of forwards; the test photographs are read once by all networks of a cell.

Networks and photographs are not in this repo: give their folders. A cell takes ten minutes of one
core, and twenty if integers are to be learned that `runs/real/starts` does not hold yet.
"""

from dataclasses import replace
from pathlib import Path

import pandas as pd
from torch import nn

from evolq_lite.config import SearchConfig
from evolq_lite.evaluate import SeedComparison
from evolq_lite.experiments.c8_beyond import (
    AHEAD,
    CHOSEN,
    GAIN,
    PAPER,
    START_AHEAD,
    STARTS,
    UNSEARCHED,
    VARIANTS,
    run_search,
)
from evolq_lite.experiments.cells import Claim, Tables
from evolq_lite.experiments.plots import plot_gains
from evolq_lite.experiments.real_cells import (
    FLOAT,
    NETWORKS,
    measure_gain,
    measure_loss,
    read_test,
    source_of,
    start_from,
    tell_means,
)
from evolq_lite.experiments.results import Cell, Result, by
from evolq_lite.experiments.verdicts import Row, Verdict, count_seeds, decide
from evolq_lite.figures import Picture

IMAGES = 256  # for calibration, as in R12
RACERS = (PAPER, UNSEARCHED, CHOSEN)
PAIRS = {AHEAD: (PAPER, CHOSEN), START_AHEAD: (PAPER, UNSEARCHED), GAIN: (UNSEARCHED, CHOSEN)}


def cells(quick: bool) -> list[Cell]:
    """Both networks at 4 and 3 bits, three seeds; nothing of it is quick."""
    if quick:
        return []
    return [
        {"network": network, "weight_bits": bits, "chosen": CHOSEN, "seed": seed}
        | {"images": IMAGES, "passes": 1}
        for seed in (0, 1, 2)
        for network in NETWORKS
        for bits in (4, 3)
    ]


def stage_of(cell: Cell) -> int:
    """Seeds are shown one after another."""
    return int(cell["seed"])


def run(cell: Cell, weights: Path, photographs: Path) -> Result:
    """Round, search; then one reading of the test images."""
    source = source_of(cell, weights, photographs, cell["images"])
    networks: dict[str, nn.Module] = {}
    told: dict[str, Result] = {}
    for racer in RACERS:
        variant = VARIANTS[racer]
        setting = start_from(
            source, replace(STARTS[variant.start], weight_bits=cell["weight_bits"])
        )
        search = SearchConfig(passes=cell["passes"], seed=cell["seed"], **variant.options)
        networks.setdefault(FLOAT, setting.demo.model)
        told[racer] = run_search(variant.search, setting, search)
        networks[racer] = setting.qmodel
    read = read_test(source, networks)
    return {**read, **{racer: told[racer] | read[racer] for racer in RACERS}}


def group(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The results of each network and bit-width, a row for each seed."""
    settings = by(results, "network", "weight_bits").items()
    return {f"{NETWORKS[network]} W{bits}A8": found for (network, bits), found in settings}


def measure_gains(results: pd.DataFrame) -> dict[str, dict[str, SeedComparison]]:
    """What each comparison gains in top-1, by setting."""
    images = int(results["test_images"].iloc[0])
    return {
        setting: {
            name: measure_gain(found[was], found[now], images) for name, (was, now) in PAIRS.items()
        }
        for setting, found in group(results).items()
    }


def figure(results: pd.DataFrame) -> Picture:
    """The chosen search against the paper's, a panel for each network and bit-width."""
    return plot_gains(measure_gains(results), "1,000-image check: C8's choice against the paper's")


def verdict(results: pd.DataFrame) -> Verdict:
    """Is the chosen search significantly ahead in top-1 and in KL, in every setting?"""
    rows: list[Row] = []
    ahead, gained = [], []
    for setting, gains in measure_gains(results).items():
        found = group(results)[setting]
        for name, gain in gains.items():
            was, now = PAIRS[name]
            change, counts = measure_loss(found[was], found[now], "kl"), name == AHEAD
            clear = gain.gain > 0 and gain.significant
            rows.append(Row.of(f"{setting}: {name}", gain, clear if counts else None))
            label = f"{setting}: {name}, KL"
            rows.append(Row.of_loss(label, change, change.better if counts else None))
            if counts:
                ahead.append(clear and change.better)
            elif name == GAIN:
                gained.append(change.better)
    return Verdict(
        decide(ahead),
        f"On a 1,000-image check ({count_seeds(results)}, one pass), C8's choice beats the paper's "
        f"search in {sum(ahead)} of {len(ahead)} settings (top-1 and KL), its own start in "
        f"{sum(gained)} (KL).",
        tuple(rows),
    )


def tables(results: pd.DataFrame) -> Tables:
    """Top-1 and losses of each network, mean over seeds."""
    images = int(results["test_images"].iloc[0])
    rows = [
        {"setting": setting, "network": name, **tell_means(found[name], images)}
        for setting, found in group(results).items()
        for name in (FLOAT, *RACERS)
    ]
    return {f"Means over seeds on {images:,} test photographs": pd.DataFrame(rows)}


CLAIM = Claim(
    "R8",
    "Does this repo's best search beat the paper's algorithm, on trained ViT-Tiny and DeiT-Tiny?",
    cells,
    run,
    figure,
    verdict,
    tables,
    stage=stage_of,
)
