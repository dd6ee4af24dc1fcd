"""R11: C11's question on trained ViT-Tiny and DeiT-Tiny: does evolving bit-widths gain?

Even bits, a ranking that measures one layer at a time, random walks and the evolution get the same
integers by GPTQ and the same budget of bits; walks and evolution get half of C11's evaluations, and
fewer widths. The test photographs are read once by all of a cell's networks; KL to the float
network decides.

Networks and photographs are not in this repo: give their folders. A cell takes ten minutes of a
large GPU that it shares with a dozen others, and an estimated hour of one core, most of it for
evaluations of the whole network.
"""

from functools import partial

import pandas as pd

from evolq_lite.bits import bits_genome, bits_table, start_bits
from evolq_lite.experiments.c11_bits import (
    EVEN,
    EVOLUTION,
    QUANT,
    RANDOM,
    RANKING,
    choose_bits,
    search_of,
)
from evolq_lite.experiments.cells import Claim, Tables
from evolq_lite.experiments.plots import plot_starts
from evolq_lite.experiments.real_cells import (
    NETWORKS,
    Change,
    Place,
    change_loss,
    check_of,
    search_each,
    source_of,
    start_from,
    tell_means,
)
from evolq_lite.experiments.results import Cell, Result, by
from evolq_lite.experiments.setup import Setting
from evolq_lite.experiments.verdicts import Row, Verdict, count_seeds, decide
from evolq_lite.figures import Picture

METHODS = (RANKING, RANDOM, EVOLUTION)  # the even bits are where they start
FIRST = (2.5, 3.0)  # mean bits that are computed first
SEEDS = 5


def cells(quick: bool) -> list[Cell]:
    """Both networks at four budgets, five seeds; nothing of it is quick."""
    if quick:
        return []
    sizes = {"images": 256, "widths": "2,3,4,8", "evaluations": 180}
    found = [
        {"network": network, "mean_bits": mean, "seed": seed, **sizes}
        for seed in range(SEEDS)
        for mean in (*FIRST, 2.25, 4.0)
        for network in NETWORKS
    ]
    return sorted(found, key=stage_of)


def stage_of(cell: Cell) -> int:
    """What is shown together: the first two budgets seed after seed, then the others."""
    return int(cell["seed"]) + SEEDS * (cell["mean_bits"] not in FIRST)


def run(cell: Cell, place: Place) -> Result:
    """Round at all widths, choose bits by each method; one reading of the test photographs."""
    source = source_of(cell, place, cell["images"])
    setting = start_from(source, QUANT, place.device, choose_integers=False)  # `bits_table` does
    search = search_of(cell, EVEN)
    genome = bits_genome(setting.qmodel, search.bit_widths, search.mean_bits)
    table = bits_table(setting.qmodel, setting.demo.calibration, genome)
    start_bits(setting.qmodel, genome, table)

    def choose(setting: Setting, method: str) -> Result:
        return choose_bits(method, setting, genome, table, search_of(cell, method))

    return search_each(
        source, setting, EVEN, {method: partial(choose, method=method) for method in METHODS}
    )


def group(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The results of each network and budget, a row for each seed."""
    settings = by(results, "network", "mean_bits").items()
    return {
        f"{NETWORKS[network]}, mean {mean:g} bits": found for (network, mean), found in settings
    }


def figure(results: pd.DataFrame) -> Picture:
    """KL of even bits and after each choice, a panel for each network and budget."""
    changes = change_loss(group(results), EVEN, METHODS, "instead of even bits")
    return plot_starts(changes, f"{check_of(results)}: bits of each layer, equal budget")


def verdict(results: pd.DataFrame) -> Verdict:
    """Does the evolution end significantly below every rival in KL, in every setting?"""
    images = int(results["test_images"].iloc[0])
    rows: list[Row] = []
    others: list[Row] = []
    ahead = {rival: 0 for rival in (EVEN, RANKING, RANDOM)}
    behind: set[str] = set()
    settings = group(results)
    for setting, found in settings.items():
        for rival in ahead:
            change = Change.of(found[rival], found[EVOLUTION], images)
            kl, *more = change.rows(f"{setting}: evolution, over {rival}", change.kl.better)
            rows.append(kl)
            others += more
            ahead[rival] += change.kl.better
            if change.kl.worse:
                behind.add(setting)
    told = ", ".join(f"{rival} in {count}" for rival, count in ahead.items())
    return Verdict(
        decide(row.holds for row in rows),
        f"On a {check_of(results)} ({count_seeds(results)}), evolved bits end below {told} of "
        f"{len(settings)} settings (KL), above a rival in {len(behind)}.",
        (*rows, *others),
    )


def tables(results: pd.DataFrame) -> Tables:
    """What each method finds, in the mean over seeds."""
    images = int(results["test_images"].iloc[0])
    rows = [
        {"setting": setting, "bits by": name, **tell_means(found[name], images)}
        for setting, found in group(results).items()
        for name in (EVEN, *METHODS)
    ]
    return {f"Means over seeds on {images:,} test photographs": pd.DataFrame(rows)}


CLAIM = Claim(
    "R11",
    "Does evolving the bits of each layer gain, on trained ViT-Tiny and DeiT-Tiny?",
    cells,
    run,
    figure,
    verdict,
    tables,
    stage=stage_of,
    note="P-values are not corrected for the number of comparisons.",
)
