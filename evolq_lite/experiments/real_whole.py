"""R5 and R6: the paper's whole search, ten passes from MinMax, on trained ViT-Tiny and DeiT-Tiny.

R5 asks C5's question: does it gain over its start, and over random search of the same cost? R6 asks
C6's: what does choosing the snapshot by test accuracy hide? For that, the network is kept after
every visit that changed it, and all of them read the test photographs together, at the end. KL to
the float network decides R5; R6 is about top-1, by which the official code chooses.

Networks and photographs are not in this repo: give their folders. A cell takes ten minutes of a
large GPU that it shares with a dozen others, and an estimated hour of one core.
"""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor, nn

from evolq_lite.config import PRESETS, SearchConfig
from evolq_lite.convert import twin
from evolq_lite.evaluate import SeedComparison, unpacked
from evolq_lite.evolve import Committed
from evolq_lite.experiments.c6_selection import Selection, pick_rows, tell_range
from evolq_lite.experiments.c12_starts import copy_of
from evolq_lite.experiments.cells import Claim, Tables
from evolq_lite.experiments.plots import plot_gains, plot_starts
from evolq_lite.experiments.real_cells import (
    FLOAT,
    NETWORKS,
    Change,
    Place,
    change_loss,
    check_of,
    group_settings,
    read_test,
    source_of,
    stack,
    start_from,
    tell_means,
)
from evolq_lite.experiments.results import Cell, Result
from evolq_lite.experiments.setup import Setting, search_scales
from evolq_lite.experiments.verdicts import Row, Verdict, count_seeds, decide
from evolq_lite.figures import Picture

START, EVOLQ, RANDOM = "MinMax", "EvolQ", "random"
SETTINGS = [(network, bits) for network in reversed(NETWORKS) for bits in (4, 3)]
SEEDS = 3


def cells(quick: bool) -> list[Cell]:
    """Both networks at 4 and 3 bits, three seeds each; nothing of it is quick."""
    if quick:
        return []
    return [
        {"network": network, "weight_bits": bits, "seed": seed, "images": 1000, "passes": 10}
        for network, bits in SETTINGS
        for seed in range(SEEDS)
    ]


def stage_of(cell: Cell) -> int:
    """Cells are shown one after another: a setting's first seed is worth an hour, too."""
    return SEEDS * SETTINGS.index((cell["network"], cell["weight_bits"])) + int(cell["seed"])


def run(cell: Cell, place: Place) -> Result:
    """Both searches from one start; one reading of the test images, by all snapshots as well."""
    source = source_of(cell, place, cell["images"])
    config = replace(PRESETS["paper"], weight_bits=cell["weight_bits"])
    start = start_from(source, config, place.device)
    search = SearchConfig(passes=cell["passes"], seed=cell["seed"], batch=min(100, cell["images"]))
    evolved, random = copy_of(start), copy_of(start)
    told, visits, snapshots = search_and_keep(evolved, search)
    rival = search_scales(random, replace(search, algorithm=RANDOM))
    networks = {FLOAT: start.demo.model, START: start.qmodel}
    networks |= {EVOLQ: evolved.qmodel, RANDOM: random.qmodel}
    named = {f"snapshot {i}": network for i, network in enumerate(snapshots)}
    read = read_test(source, {**networks, **named})
    seen = [read.pop(name)["correct"] for name in named]
    return {
        **read,
        EVOLQ: told | read[EVOLQ],
        RANDOM: rival | read[RANDOM],
        "snapshots": seen,
        "visits": visits,
    }


def search_and_keep(
    setting: Setting, config: SearchConfig
) -> tuple[Result, list[dict[str, float]], list[nn.Module]]:
    """Search in place; what it says of itself, its visits, and the networks that they left.

    A visit has its fitness and the number of its network: most visits leave what they found.
    """
    visits: list[dict[str, float]] = []
    snapshots: list[nn.Module] = []

    def keep(visit: Committed) -> None:
        if not visits or visit.fitness != visits[-1]["fitness"]:
            snapshots.append(twin(setting.qmodel))
        visits.append({"fitness": visit.fitness, "snapshot": len(snapshots) - 1})

    return search_scales(setting, config, see=keep), visits, snapshots


def scope_of(results: pd.DataFrame) -> str:
    """What a sentence begins with."""
    groups = group_settings(results)
    networks = {setting.split()[0] for setting in groups}
    of = f" of {next(iter(groups if len(groups) == 1 else networks))}" * (len(networks) == 1)
    counts, seeds = {setting: len(found) for setting, found in groups.items()}, count_seeds(results)
    if of and len(set(counts.values())) > 1:
        each = ", ".join(
            f"{setting.split()[1]}: {f'{n} seeds' if n > 1 else 'one'}"
            for setting, n in counts.items()
        )
        return f"On a {check_of(results)}{of} ({each})"
    least = min(counts.values())
    several = f"{least} to {seeds}" if least < results["seed"].nunique() else seeds
    return f"On a {check_of(results)}{of} ({several})"


# R5


def figure(results: pd.DataFrame) -> Picture:
    """KL before and after both searches, a panel for each network and bit-width."""
    changes = change_loss(group_settings(results), START, (EVOLQ, RANDOM), "after ten passes")
    return plot_starts(changes, f"{check_of(results)}: the paper's whole search, and random search")


def verdict(results: pd.DataFrame) -> Verdict:
    """Does the paper's search end significantly below its start in KL, in every setting?"""
    images = int(results["test_images"].iloc[0])
    rows: list[Row] = []
    others: list[Row] = []
    beaten = 0
    for setting, found in group_settings(results).items():
        for was, now, name in (
            (START, EVOLQ, "EvolQ, over MinMax"),
            (RANDOM, EVOLQ, "EvolQ, over random search at the same cost"),
            (START, RANDOM, "random search, over MinMax"),
        ):
            change = Change.of(found[was], found[now], images)
            counts = (was, now) == (START, EVOLQ)
            kl, *more = change.rows(f"{setting}: {name}", change.kl.better if counts else None)
            (rows if counts else others).append(kl)
            others += more
            beaten += was == RANDOM and change.kl.better
        name = "EvolQ's ten passes, over the first of them"
        others.append(Row.of(f"{setting}: {name}", measure_passes(found, images)))
    holds = [bool(row.holds) for row in rows]
    return Verdict(
        decide(holds),
        f"{scope_of(results)}, {tell_end(holds, beaten)}.",
        (*rows, *others),
    )


def measure_passes(found: pd.DataFrame, images: int) -> SeedComparison:
    """Top-1 after all passes against that after the first, in one setting."""
    visits = [unpack_snapshots(row, images) for _, row in found.iterrows()]
    passes = int(found["passes"].iloc[0])
    first = torch.stack([after[len(after) // passes - 1] for after in visits])
    return SeedComparison.of(first, torch.stack([after[-1] for after in visits]))


def tell_end(holds: Sequence[bool], beaten: int) -> str:
    """In how many settings KL was lowered, and ended below that of random search."""
    if len(holds) > 1:
        return (
            f"ten passes of the paper's search lower KL in {sum(holds)} of {len(holds)} settings, "
            f"below random search in {beaten}"
        )
    lower, end = "lower" if holds[0] else "do not lower", "end" if beaten else "do not end"
    return f"ten passes of the paper's search {lower} KL from MinMax, and {end} below random search"


def tables(results: pd.DataFrame) -> Tables:
    """Top-1 and losses of each network, and how many candidates were accepted."""
    images = int(results["test_images"].iloc[0])
    rows = []
    for setting, found in group_settings(results).items():
        for name in (START, EVOLQ, RANDOM):
            told = pd.DataFrame(list(found[name]))
            accepted = "" if name == START else f"{told['accepted'].mean():.0f}"
            evaluated = "" if name == START else f"{told['evaluations'].mean():.0f}"
            rows.append(
                {
                    "setting": setting,
                    "search": name,
                    "evaluations": evaluated,
                    "accepted": accepted,
                    **tell_means(found[name], images),
                }
            )
    return {f"Means over seeds on {images:,} test photographs": pd.DataFrame(rows)}


# R6


def unpack_snapshots(result: pd.Series, images: int) -> Tensor:
    """Which images the network after each visit has right, (visits, images)."""
    seen = [unpacked(text, images) for text in result["snapshots"]]
    return torch.stack([seen[int(visit["snapshot"])] for visit in result["visits"]])


def pick_snapshots(found: pd.DataFrame, images: int) -> dict[str, Tensor]:
    """Which images (seeds, n) the snapshot of each seed has right, by the way it is picked."""
    tables = [unpack_snapshots(row, images) for _, row in found.iterrows()]
    return pick_rows(tables, [[visit["fitness"] for visit in v] for v in found["visits"]])


def gains_of(found: pd.DataFrame, images: int) -> dict[str, SeedComparison]:
    """Gain over MinMax of the snapshot picked in each way."""
    start = stack(found[START], lambda result: unpacked(result["correct"], images))
    picks = pick_snapshots(found, images)
    return {name: SeedComparison.of(start, rows) for name, rows in picks.items()}


def figure_of_picks(results: pd.DataFrame) -> Picture:
    """Gain over MinMax of the three snapshots, a panel for each network and bit-width."""
    images = int(results["test_images"].iloc[0])
    gains = {setting: gains_of(found, images) for setting, found in group_settings(results).items()}
    return plot_gains(gains, f"{check_of(results)}: snapshots picked in three ways")


def verdict_on_picks(results: pd.DataFrame) -> Verdict:
    """Does the snapshot that test images pick show more than it is worth on other images?"""
    images = int(results["test_images"].iloc[0])
    rows: list[Row] = []
    others: list[Row] = []
    picked: list[Selection] = []
    for setting, found in group_settings(results).items():
        tables = [unpack_snapshots(row, images) for _, row in found.iterrows()]
        half, picks = Selection.of(tables, torch.arange(images)), pick_snapshots(found, images)
        lead = 100 * float(picks["best on test"].float().mean() - picks["last"].float().mean())
        picked.append(half)
        band = half.lost - 1.96 * half.error, half.lost + 1.96 * half.error
        name = f"{setting}: luck of picking on half; the best on all images leads by {lead:+.2f}"
        rows.append(Row(name, half.lost, band, holds=lead > 0 and band[0] > 0))
        others += [
            Row(f"{setting}: picked on half, over the last, on that half", half.here),
            Row(f"{setting}: picked on half, over the last, on the other half", half.there),
            *(
                Row.of(f"{setting}: {n}, over MinMax", g)
                for n, g in gains_of(found, images).items()
            ),
        ]
    return Verdict(
        decide(row.holds for row in rows),
        f"{scope_of(results)}, snapshots picked on half the images lead the last by "
        f"{tell_range([s.here for s in picked])} points there, "
        f"{tell_range([s.there for s in picked])} elsewhere.",
        (*rows, *others),
    )


CLAIM = Claim(
    "R5",
    "Does the paper's whole search gain over its start, on trained ViT-Tiny and DeiT-Tiny?",
    cells,
    run,
    figure,
    verdict,
    tables,
    stage=stage_of,
)
PICKS_CLAIM = Claim(
    "R6",
    "Does choosing the snapshot on the test set flatter, on trained ViT-Tiny and DeiT-Tiny?",
    cells,
    run,
    figure_of_picks,
    verdict_on_picks,
    stage=stage_of,
    reads="R5",
)
