"""C4: does infoNCE guide the search better than other losses, and overfit less?

The paper's search with each loss as fitness. The gap between the loss on calibration images and on
fresh ones, in shares of what the search gained, says how much was overfitted.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import ttest_rel

from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.evaluate import Gain
from evolq_lite.experiments.cells import Claim, Tables, measure_gain
from evolq_lite.experiments.plots import plot_gains
from evolq_lite.experiments.results import Cell, Result, by, where
from evolq_lite.experiments.setup import (
    Setting,
    draw_fresh_images,
    measure_top1,
    prepare,
    search_and_generalize,
)
from evolq_lite.experiments.verdicts import UNDECIDED, Row, Verdict, count_seeds, decide
from evolq_lite.figures import Picture
from evolq_lite.fitness import cosine, info_nce
from evolq_lite.landscape import direction
from evolq_lite.objective import BlockObjective

EQUAL = 0.0025  # a difference in top-1, 0 to 1, that an interval must exclude for "equivalent"
LOSSES = (
    ("info_nce", 0.07),
    ("info_nce", 0.2),
    ("info_nce", 1.0),
    ("info_nce", 3.0),
    ("mse", 3.0),
    ("cosine", 3.0),
    ("kl", 3.0),
    ("fisher", 3.0),
)


def cells(quick: bool) -> list[Cell]:
    """The start, every loss at every number of images, and the correlation of two losses."""
    sizes, seeds = ((60,), (0,)) if quick else ((100, 300, 1000), (0, 1, 2))
    out = []
    for images in sizes:
        for seed in seeds:
            for loss, temperature in (("start", 0.0), *(LOSSES[3:5] if quick else LOSSES)):
                out.append(
                    {
                        "loss": loss,
                        "temperature": temperature,
                        "images": images,
                        "seed": seed,
                        "weight_bits": 3,
                        "passes": 1 if quick else 5,
                        "every": 21 if quick else 1,
                    }
                )
    return [*out, {**out[0], "loss": "correlation", "images": sizes[-1]}]


OURS = "infoNCE T=3"  # the paper's


def run(cell: Cell) -> Result:
    """Search with one loss; test; compare the loss on calibration and on fresh images."""
    config = QuantConfig(weight_bits=cell["weight_bits"])
    setting = prepare("vit", cell["images"], cell["seed"], config)
    if cell["loss"] == "correlation":
        return correlate(setting, count_neighbors(cell["passes"]))
    if cell["loss"] == "start":
        return measure_top1(setting.qmodel, cell["every"])
    search = SearchConfig(
        passes=cell["passes"],
        fitness=cell["loss"],
        temperature=cell["temperature"],
        seed=cell["seed"],
        batch=min(100, cell["images"]),
    )
    fresh = draw_fresh_images(setting.demo, 200 if cell["passes"] == 1 else 1000, cell["seed"])
    found = search_and_generalize(setting, search, fresh)
    return {**found, **measure_top1(setting.qmodel, cell["every"])}


def count_neighbors(passes: int) -> int:
    """Of how many vectors of scales a correlation is measured; fewer if the cell is quick."""
    return 60 if passes > 1 else 10


@torch.no_grad()
def correlate(setting: Setting, neighbors: int) -> Result:
    """Pearson's correlation of infoNCE at T = 3, and 0.07, with cosine over neighbors."""
    images, values = setting.demo.calibration, []
    for fitness in (info_nce, cosine, lambda q, k: info_nce(q, k, 0.07)):
        objective = BlockObjective(
            setting.chain,
            setting.chain.searchable,
            images,
            setting.demo.targets,
            fitness,
            min(100, len(images)),
        )
        start = objective.start
        near = torch.stack([start + 0.02 * direction(start, s) for s in range(neighbors)])
        values.append(objective(near.abs()).numpy())
    table = np.corrcoef(np.stack(values))
    return {"cosine_and_t3": float(table[0, 1]), "cosine_and_t007": float(table[1, 2])}


def group(results: pd.DataFrame) -> dict[int, dict[str, pd.DataFrame]]:
    """Results by number of calibration images and loss; "start" holds the unsearched scales."""
    searched = results[results["loss"] != "correlation"]
    temperature = searched["temperature"].map("infoNCE T={:g}".format)
    names = searched["loss"].where(searched["loss"] != "info_nce", temperature)
    return {
        images: by(found, "name")
        for images, found in by(searched.assign(name=names), "images").items()
    }


def measure_gains(results: pd.DataFrame) -> dict[str, dict[str, Gain]]:
    """What a search with each loss gains over the start, by number of images."""
    gains: dict[str, dict[str, Gain]] = {}
    for images, found in sorted(group(results).items()):
        start = found.pop("start")
        gains[f"{images} calibration images"] = {
            name: measure_gain(start, rs) for name, rs in found.items()
        }
    return gains


def figure(results: pd.DataFrame) -> Picture:
    """Gain over the start of each loss, one panel for each number of images."""
    return plot_gains(measure_gains(results), "Gain over MinMax by loss, W3A8", same_scale=True)


def measure_gap(results: pd.DataFrame) -> float:
    """The share of the gain on calibration images that is missing on fresh ones."""
    own = (results["fitness_before"] - results["fitness"]).mean()
    fresh = (results["fresh_before"] - results["fresh"]).mean()
    return float(1 - fresh / own) if own else float("nan")


def verdict(results: pd.DataFrame) -> Verdict:
    """InfoNCE (T = 3) against the best other loss, and its overfitting against theirs.

    Gains are compared at the largest number of images, gaps as means over all numbers. The best
    other loss is best on the test images, which is in its favour.
    """
    sizes, gains = group(results), measure_gains(results)
    most = max(sizes)
    found, last = sizes[most], gains[f"{most} calibration images"]
    ours, others = found[OURS], [name for name in last if not name.startswith("infoNCE")]
    if len(ours) < 2:
        return Verdict(UNDECIDED, "One seed is not enough.")
    rival = max(others, key=lambda name: last[name].gain)
    race = measure_gain(found[rival], ours)
    rows = [
        Row.of(
            f"{OURS}, over the best other loss ({rival}), {most} images",
            race,
            race.gain > 0 and race.significant,
        )
    ]
    # Numbers of images are averaged first: one seed draws one order, its 100 are among its 300.
    gaps = {
        name: np.mean(
            [[measure_gap(one) for one in split(size[name])] for size in sizes.values()], 0
        ).tolist()
        for name in last
    }
    gaps_told = compare_gaps(gaps, others)
    rows += gaps_told
    rows += [
        Row.of(f"{name}, {title}, over the start", gain)
        for title, row in gains.items()
        for name, gain in row.items()
    ]
    pair = where(results, loss="correlation").iloc[0]
    neighbors = count_neighbors(pair["passes"])
    rows += [
        Row(
            f"Correlation of cosine with infoNCE at T = {name}, {neighbors} neighbors",
            pair[key],
            unit="",
            form=".4f",
        )
        for name, key in (("3", "cosine_and_t3"), ("0.07", "cosine_and_t007"))
    ]
    decided = [row for row in gaps_told if row.holds is not None]
    less = f"overfits less than {sum(bool(row.holds) for row in decided)} of {len(others)} others"
    if not decided:
        less = f"whether it overfits less is not decided (p from {least_p(gaps_told):.2g})"
    return Verdict(
        decide(row.holds for row in rows),
        f"On the embedded ViT (Typefaces-62, W3A8, {count_seeds(ours)}), infoNCE is "
        f"{compare_words(race)} the best other loss ({rival}); {less}.",
        tuple(rows),
    )


def compare_gaps(
    gaps: Mapping[str, Sequence[float]], others: Sequence[str], setting: str = ""
) -> list[Row]:
    """Does each other loss overfit more than infoNCE? From the gaps of each loss, by seed."""
    ours, rows = np.array(gaps[OURS]), []
    for name in others:
        theirs = np.array(gaps[name])
        test = ttest_rel(theirs, ours)
        rows.append(
            Row(
                f"{setting}{name} overfits more than {OURS} (paired t-test over {len(ours)} seeds)",
                100 * float((theirs - ours).mean()),
                p=float(test.pvalue),
                # Few seeds: what is not significant is not decided.
                holds=bool(test.statistic > 0) if test.pvalue < 0.05 else None,
                unit="% of the gain",
                form="+.0f",
            )
        )
    return rows


def compare_words(race: Gain) -> str:
    """How two losses compare in top-1: no significant difference is not yet equality."""
    if race.significant:
        return f"significantly {'ahead of' if race.gain > 0 else 'behind'}"
    reach = max(abs(end) for end in race.interval)
    if reach >= EQUAL:
        return "within chance of"
    return f"equivalent (within {100 * reach:.2f} points) to"


def least_p(rows: Sequence[Row]) -> float:
    """The smallest p-value of some rows."""
    return min(row.p for row in rows if row.p is not None)


def split(results: pd.DataFrame) -> list[pd.DataFrame]:
    """One table per seed."""
    return list(by(results, "seed").values())


def tables(results: pd.DataFrame) -> Tables:
    """Overfitting of each loss at each number of images."""
    gaps = {
        f"{images} images": {
            name: f"{100 * measure_gap(rs):.0f} %" for name, rs in found.items() if name != "start"
        }
        for images, found in sorted(group(results).items())
    }
    title = "Share of the gain on calibration images that fresh images do not see"
    return {title: pd.DataFrame(gaps).rename_axis("loss").reset_index()}


CLAIM = Claim(
    "C4",
    "Does infoNCE guide the search better than other losses, and overfit less?",
    cells,
    run,
    figure,
    verdict,
    tables,
    real="R4",
)
