"""R3: C3's question on trained ViT-Tiny and DeiT-Tiny: is evolution ahead of gradients?

From MinMax, the paper's search meets SGD and Adam, which follow the straight-through gradient of
all attention weight scales at once, at the cost of one pass. A pass has room for six gradients, so
the size of their steps decides much. It was chosen in cells of their own, on ViT-Tiny with another
seed, by the fitness on the calibration photographs; the search has the paper's width. The test
photographs are read once by all of a race's networks, and KL to the float network decides.

Networks and photographs are not in this repo: give their folders. A cell takes a quarter of an hour
of one core, a choice twice as long.
"""

from dataclasses import replace
from functools import partial

import pandas as pd

from evolq_lite.config import PRESETS, SearchConfig
from evolq_lite.experiments.c12_starts import copy_of
from evolq_lite.experiments.cells import Claim, Tables
from evolq_lite.experiments.plots import plot_starts
from evolq_lite.experiments.real_cells import (
    NETWORKS,
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
from evolq_lite.experiments.results import Cell, Result, where
from evolq_lite.experiments.setup import follow_gradient, search_scales
from evolq_lite.experiments.verdicts import Row, Verdict, count_seeds, decide
from evolq_lite.figures import Picture

START, EVOLQ = "start", "EvolQ"
SIZES = (0.003, 0.01, 0.03, 0.1)  # of a step, relative: among these it is chosen
CHOSEN = {"SGD": 0.01, "Adam": 0.1}
CHOICE_SEED, CHOICE_NETWORK = 100, "vit_tiny_patch16_224"
IMAGES = 100  # for calibration


def cells(quick: bool) -> list[Cell]:
    """The choice of steps, then both networks at 4 and 3 bits with five seeds; nothing is quick."""
    if quick:
        return []
    settings: list[Cell] = [
        {"network": network, "weight_bits": bits} for network in NETWORKS for bits in (4, 3)
    ]
    choice = [
        {"role": "choice", **setting, "seed": CHOICE_SEED, "images": IMAGES, "passes": 1}
        for setting in settings
        if setting["network"] == CHOICE_NETWORK
    ]
    steps = {f"{method} step": step for method, step in CHOSEN.items()}
    race = [
        {"role": "race", **setting, "seed": seed, "images": IMAGES, "passes": 1, **steps}
        for seed in range(5)
        for setting in settings
    ]
    return [*choice, *race]


def stage_of(cell: Cell) -> int:
    """Seeds are shown one after another, the choice with the first."""
    return int(cell["seed"]) if cell["role"] == "race" else 0


def at_step(method: str, step: float) -> str:
    """What a choice calls a descent."""
    return f"{method}, step {step:g}"


def run(cell: Cell, place: Place) -> Result:
    """In a choice, the fitness after every descent; in a race, one reading of the test images."""
    source = source_of(cell, place, cell["images"])
    config = replace(PRESETS["paper"], weight_bits=cell["weight_bits"])
    start = start_from(source, config, place.device)
    search = SearchConfig(passes=cell["passes"], seed=cell["seed"])
    if cell["role"] == "choice":
        return {
            at_step(method, step): follow_gradient(copy_of(start), search, method.lower(), step)[
                "fitness"
            ]
            for method in CHOSEN
            for step in SIZES
        }
    descents = {
        method: partial(
            follow_gradient, config=search, optimizer=method.lower(), step=cell[f"{method} step"]
        )
        for method in CHOSEN
    }
    searches = {EVOLQ: partial(search_scales, config=search), **descents}
    return search_each(source, start, START, searches)


def choose_steps(results: pd.DataFrame) -> dict[str, float]:
    """The step of each method with the best calibration fitness, mean over settings."""
    choice = where(results, role="choice")
    return {
        method: min(SIZES, key=lambda step: choice[at_step(method, step)].mean())
        for method in CHOSEN
    }


def figure(results: pd.DataFrame) -> Picture:
    """KL before and after the search and each descent, a panel for each network and bit-width."""
    settings = group_settings(where(results, role="race"))
    changes = change_loss(settings, START, (EVOLQ, *CHOSEN), "after it")
    return plot_starts(
        changes, f"{check_of(results)}: the paper's search and gradients, from MinMax"
    )


def verdict(results: pd.DataFrame) -> Verdict:
    """Does EvolQ end below both gradient methods in KL, in every setting?"""
    race = where(results, role="race")
    images = int(race["test_images"].iloc[0])
    rows: list[Row] = []
    others: list[Row] = []
    ahead, behind = [], []
    for setting, found in group_settings(race).items():
        for method in CHOSEN:
            change = Change.of(found[method], found[EVOLQ], images)
            row, *more = change.rows(f"{setting}: {EVOLQ}, over {method}", change.kl.better)
            rows.append(row)
            others += more
            ahead.append(change.kl.better)
            behind.append(change.kl.worse)
        for name in (EVOLQ, *CHOSEN):
            change = Change.of(found[START], found[name], images)
            others += change.rows(f"{setting}: {name}, over MinMax")
    return Verdict(
        decide(ahead),
        f"On a {check_of(race)} ({count_seeds(race)}, one pass), {EVOLQ} from MinMax ends below "
        f"SGD or Adam in KL in {sum(ahead)} of {len(ahead)} comparisons, above in {sum(behind)}.",
        (*rows, *others),
    )


def tables(results: pd.DataFrame) -> Tables:
    """Top-1 and losses after the search and each descent; how the steps were chosen."""
    race, choice = where(results, role="race"), where(results, role="choice")
    images = int(race["test_images"].iloc[0])
    rows = [
        {"setting": setting, "search": name, **tell_means(found[name], images)}
        for setting, found in group_settings(race).items()
        for name in (START, EVOLQ, *CHOSEN)
    ]
    steps = [
        {"step": f"{step:g}"}
        | {
            method: f"**{fitness:.5f}** (chosen)" if step == CHOSEN[method] else f"{fitness:.5f}"
            for method in CHOSEN
            for fitness in [choice[at_step(method, step)].mean()]
        }
        for step in SIZES
    ]
    return {
        f"Means over seeds on {images:,} test photographs": pd.DataFrame(rows),
        "The choice of steps: infoNCE on calibration photographs, mean over ViT-Tiny's settings": (
            pd.DataFrame(steps)
        ),
    }


CLAIM = Claim(
    "R3",
    "Does the paper's search end below gradients, on trained ViT-Tiny and DeiT-Tiny?",
    cells,
    run,
    figure,
    verdict,
    tables,
    stage=stage_of,
    note="The steps of the gradients were chosen (Adam's is the longest that was tried), the width "
    "of the search was not: R7 tries other widths with other photographs, and none lowers KL as "
    "much. What is equal is the cost in forwards, where a gradient counts three, as in C3. In "
    "seconds a gradient costs more than that: a batch that is cut into chunks runs forward twice, "
    "and only candidates compute with integers. A descent moves all scales at once, the search "
    "those of one block. Scales by MSE, unsearched, end lower than all of them (R1).",
)
