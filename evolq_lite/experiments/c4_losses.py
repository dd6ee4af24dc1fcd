"""C4: does infoNCE guide the search better than other losses, and overfit less?

The paper's search with each loss as fitness. The gap between the loss on calibration images and on
fresh ones, in shares of what the search gained, says how much was overfitted.
"""

from collections import defaultdict
from statistics import fmean as mean

import numpy as np
import torch
from scipy.stats import ttest_rel

from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.experiments.cells import UNDECIDED, Cell, Claim, Result, paired, verdict_of
from evolq_lite.experiments.plots import forest
from evolq_lite.experiments.setup import (
    Setting,
    evolved,
    fitness_on,
    fresh_images,
    setting,
    tested,
)
from evolq_lite.figures import Picture
from evolq_lite.fitness import cosine, info_nce
from evolq_lite.landscape import direction
from evolq_lite.objective import BlockObjective

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


def run(cell: Cell) -> Result:
    """Search with one loss; test; compare the loss on calibration and on fresh images."""
    config = QuantConfig(weight_bits=cell["weight_bits"])
    made = setting("vit", cell["images"], cell["seed"], config)
    if cell["loss"] == "correlation":
        return correlation(made.demo.calibration, made)
    if cell["loss"] == "start":
        return tested(made.qmodel, cell["every"])
    search = SearchConfig(
        passes=cell["passes"],
        fitness=cell["loss"],
        temperature=cell["temperature"],
        seed=cell["seed"],
        batch=min(100, cell["images"]),
    )
    fresh = fresh_images(made.demo, 200 if cell["passes"] == 1 else 1000, cell["seed"])
    before = fitness_on(made, search, *fresh)
    found = evolved(made, search)
    after = fitness_on(made, search, *fresh)
    return {
        **found,
        "fresh_before": before,
        "fresh": after,
        **tested(made.qmodel, cell["every"]),
    }


@torch.no_grad()
def correlation(images: torch.Tensor, made: Setting) -> Result:
    """Pearson's correlation of infoNCE at T = 3, and 0.07, with cosine over 60 neighbours."""
    values = []
    for fitness in (info_nce, cosine, lambda q, k: info_nce(q, k, 0.07)):
        objective = BlockObjective(
            made.chain,
            made.chain.searchable,
            images,
            made.demo.targets,
            fitness,
            min(100, len(images)),
        )
        start = objective.start
        near = torch.stack([start + 0.02 * direction(start, "gaussian", s) for s in range(60)])
        values.append(objective(near.abs()).numpy())
    table = np.corrcoef(np.stack(values))
    return {"cosine_and_t3": float(table[0, 1]), "cosine_and_t007": float(table[1, 2])}


def name_of(r: Result) -> str:
    """How a loss is called."""
    return f"infoNCE T={r['temperature']:g}" if r["loss"] == "info_nce" else str(r["loss"])


def by_loss(results: list[Result]) -> dict[int, dict[str, list[Result]]]:
    """Results by number of calibration images and loss, in the order of seeds."""
    out: dict[int, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for r in sorted(results, key=lambda r: r["seed"]):
        if r["loss"] != "correlation":
            out[r["cell"]["images"]][name_of(r)].append(r)
    return out


def figure(results: list[Result]) -> Picture:
    """Gain over the start of each loss, one panel for each number of images."""
    groups = {}
    for images, found in sorted(by_loss(results).items()):
        start = found.pop("start")
        groups[f"{images} calibration images"] = {
            name: paired(start, rs) for name, rs in found.items()
        }
    return forest(groups, "Gain over MinMax by loss, W3A8")


def gap(results: list[Result]) -> float:
    """The share of the gain on calibration images that is missing on fresh ones."""
    own = mean([r["fitness_before"] - r["fitness"] for r in results])
    fresh = mean([r["fresh_before"] - r["fresh"] for r in results])
    return 1 - fresh / own if own else float("nan")


def verdict(results: list[Result]) -> tuple[str, str]:
    """InfoNCE (T = 3) against the best other loss, and its overfitting against theirs.

    Gains are compared at the largest number of images, gaps as means over all numbers. The best
    other loss is best on the test images, which is in its favour.
    """
    sizes = by_loss(results)
    found = sizes[max(sizes)]
    start, ours = found.pop("start"), found["infoNCE T=3"]
    others = [name for name in found if not name.startswith("infoNCE")]
    temperatures = [name for name in found if name not in others]
    rival = max(others, key=lambda name: paired(start, found[name]).gain)
    race = paired(found[rival], ours)
    seeds = range(len(ours))
    if len(seeds) < 2:
        return UNDECIDED, "One seed cannot tell."
    # Numbers of images are averaged first: one seed draws one order, its 100 are among its 300.
    gaps = {
        name: [mean(gap([size[name][i]]) for size in sizes.values()) for i in seeds]
        for name in found
    }
    less = {name: ttest_rel(gaps[name], gaps["infoNCE T=3"]) for name in others}
    general = [test.statistic > 0 and test.pvalue < 0.05 for test in less.values()]
    pair = next(r for r in results if r["loss"] == "correlation")
    said = "; ".join(
        f"{images} images: "
        + ", ".join(f"{name} {100 * gap(size[name]):.0f} %" for name in (*temperatures, *others))
        for images, size in sizes.items()
    )
    tests = ", ".join(f"{name} p = {test.pvalue:.2g}" for name, test in less.items())
    open_ = [name for name, test in less.items() if test.statistic > 0 and test.pvalue >= 0.05]
    if open_:
        tests += f"; less than {', '.join(open_)}, but so few seeds cannot decide it"
    return verdict_of((race.gain > 0 and race.significant, *general)), (
        f"With {max(sizes)} images infoNCE at T = 3 gains {paired(start, ours)}, the best other "
        f"loss (by test images, {rival}) {paired(start, found[rival])}; between them {race}. Share "
        f"of the gain on calibration images that fresh images do not see, {said} (infoNCE at T = 3 "
        "against "
        f"others, means over numbers of images, paired t-test over {len(seeds)} seeds: {tests}). "
        "Over 60 neighbours the correlation of cosine with infoNCE is "
        f"{pair['cosine_and_t3']:.4f} at T = 3 and {pair['cosine_and_t007']:.4f} at "
        "T = 0.07."
    )


CLAIM = Claim(
    "C4",
    "Does infoNCE guide the search better than other losses, and overfit less?",
    cells,
    run,
    figure,
    verdict,
)
