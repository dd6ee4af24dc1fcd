"""C12: does a search still gain on a good start, and what is the best network?

The paper searches from scales that nobody would keep: MinMax, every weight rounded to nearest. Here
some searches of the same cost begin at a start of each kind, and the test images say, once at the
end, what each adds to its own start. A search that gains on a poor start and nothing on a good one
repairs the start. One search minimizes KL instead of infoNCE: close to the float network, infoNCE
can fall while the distance grows (lesson 8).

Scales are searched as the paper does, those of attention's weights. Weights that GPTQ has rounded
are values on their grid; when a scale moves they are rounded again, to nearest.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pandas as pd
import torch

from evolq_lite.chain import chain_of
from evolq_lite.config import PRESETS, QuantConfig, SearchConfig
from evolq_lite.convert import twin
from evolq_lite.evaluate import LOSSES, Gain, LossChange, unpack_values
from evolq_lite.experiments.cells import Claim, Tables, count_correct, measure_gain, measure_loss
from evolq_lite.experiments.plots import NAMES, plot_starts
from evolq_lite.experiments.results import Cell, Result, by
from evolq_lite.experiments.setup import (
    Setting,
    follow_gradient,
    measure_test,
    prepare,
    search_scales,
)
from evolq_lite.experiments.verdicts import Row, Verdict, count_seeds, decide
from evolq_lite.figures import Picture

STARTS: dict[str, QuantConfig] = {
    "paper": PRESETS["paper"],
    "official": PRESETS["official"],
    "recommended, nearest": replace(PRESETS["recommended"], rounding="nearest"),
    "recommended": PRESETS["recommended"],
    "recommended, learned": replace(PRESETS["recommended"], rounding="learned"),
}
BEST = "recommended"
NONE, EVOLQ, RANDOM, KL = "none", "EvolQ", "random", "EvolQ by KL"
SEARCHES: dict[str, dict[str, Any]] = {
    EVOLQ: {},
    "adaptive EvolQ": {"mutation": "adaptive"},
    RANDOM: {"algorithm": "random"},
    KL: {"fitness": "kl"},
}
# Gradients came later, on another processor, where GPTQ finds other integers: their cells hold
# their own start, so that each is compared with what it began with.
START = "start itself"
GRADIENTS = {"SGD": ("sgd", 3e-3), "Adam": ("adam", 3e-2)}  # relative steps, as C3 chooses them


def cells(quick: bool) -> list[Cell]:
    """Every network, bit-width, start and search; without a search, one seed is another draw."""
    return [
        {
            "network": network,
            "weight_bits": bits,
            "start": start,
            "search": search,
            "seed": seed,
            "images": 24 if quick else 300,
            "passes": 1 if quick else 10,
            "every": 21 if quick else 1,
        }
        | ({"step": GRADIENTS[search][1]} if search in GRADIENTS else {})
        for network in (("vit",) if quick else ("vit", "cnn"))
        for bits in ((3,) if quick else (4, 3))
        for start in (("paper", BEST) if quick else STARTS)
        if (network, start) != ("cnn", "official")  # its points are those of a ViT
        for search in ((NONE, EVOLQ) if quick else (NONE, *SEARCHES, *GRADIENTS))
        if search not in GRADIENTS or start in ("paper", BEST)
        for seed in ((0,) if quick else (0, 1, 2))
    ]


def stage_of(cell: Cell) -> int:
    """The search that is guided by KL came later, and then gradients with steps that C3 chose."""
    return 2 if cell["search"] in GRADIENTS else int(cell["search"] == KL)


def run(cell: Cell) -> Result:
    """Quantize, round, search, test."""
    at = tuple(cell[name] for name in ("network", "images", "seed", "start", "weight_bits"))
    setting = copy_of(start_from(*at))
    told: Result = {}
    search = SearchConfig(
        passes=cell["passes"],
        seed=cell["seed"],
        batch=min(100, cell["images"]),
        **SEARCHES.get(cell["search"], {}),
    )
    if cell["search"] in GRADIENTS:
        told = {START: measure_start(*at, cell["every"])}
        told |= follow_gradient(setting, search, *GRADIENTS[cell["search"]])
    elif cell["search"] != NONE:
        told = search_scales(setting, search)
    return {**told, **measure_test(setting, cell["every"])}


@lru_cache(maxsize=3)  # the seeds of one start, which all searches share
def start_from(network: str, images: int, seed: int, start: str, bits: int) -> Setting:
    """A calibrated and rounded network; it is to be copied."""
    return prepare(network, images, seed, replace(STARTS[start], weight_bits=bits))


@lru_cache(maxsize=3)
def measure_start(
    network: str, images: int, seed: int, start: str, bits: int, every: int
) -> Result:
    """The test images as the start has them."""
    return measure_test(start_from(network, images, seed, start, bits), every)


def copy_of(setting: Setting) -> Setting:
    """The same, with a network of its own."""
    qmodel = twin(setting.qmodel)
    chain = chain_of(qmodel)
    chain.chunk = setting.chain.chunk
    return Setting(setting.demo, qmodel, chain)


def group(results: pd.DataFrame) -> dict[str, dict[tuple[str, str], pd.DataFrame]]:
    """Results by setting, then by start and search."""
    return {
        f"{NAMES[network]} W{bits}A8": by(found, "start", "search")
        for (network, bits), found in by(results, "network", "weight_bits").items()
    }


def began(found: dict[tuple[str, str], pd.DataFrame], start: str, search: str) -> pd.DataFrame:
    """What a search of a setting began with, a row for each seed."""
    if search not in GRADIENTS:
        return found[start, NONE]
    mine = found[start, search]
    return mine.assign(**{key: [was[key] for was in mine[START]] for key in ("correct", *LOSSES)})


def measure_gains(found: dict[tuple[str, str], pd.DataFrame]) -> dict[tuple[str, str], Gain]:
    """What each search of a setting gains over its own start."""
    return {
        (start, search): measure_gain(began(found, start, search), mine)
        for (start, search), mine in found.items()
        if search != NONE
    }


def measure_changes(
    found: dict[tuple[str, str], pd.DataFrame],
) -> dict[str, dict[str, LossChange]]:
    """What each search of a setting changes in KL to float, by start and search."""
    changes: dict[str, dict[str, LossChange]] = {}
    for (start, search), mine in found.items():
        searches = changes.setdefault(start, {})
        if search != NONE:
            searches[search] = measure_loss(began(found, start, search), mine, "kl")
    return changes


def mean_of(column: pd.Series) -> float:
    """The mean of a loss over typefaces and seeds."""
    return float(torch.stack([unpack_values(text) for text in column]).mean())


def figure(results: pd.DataFrame) -> Picture:
    """What each search makes of each start, one panel for each network and bit-width."""
    changes = {setting: measure_changes(found) for setting, found in group(results).items()}
    return plot_starts(changes, "Searches from each start, equal cost")


def verdict(results: pd.DataFrame) -> Verdict:
    """Does the paper's search gain significantly on the best start, in every setting?"""
    rows: list[Row] = []
    others: list[Row] = []
    poor: list[bool] = []
    worse: list[bool] = []
    for setting, found in group(results).items():
        changes = measure_changes(found)
        for (start, search), gain in measure_gains(found).items():
            clear = gain.gain > 0 and gain.significant
            counts = (start, search) == (BEST, EVOLQ)
            row = Row.of(f"{setting}: {search} on {start}", gain, clear if counts else None)
            (rows if counts else others).append(row)
            poor += [clear] * ((start, search) == ("paper", EVOLQ))
            kl = changes[start][search]
            others.append(Row.of_loss(f"{setting}: {search} on {start}, KL", kl))
            worse += [kl.worse] * counts
        for start in dict.fromkeys(start for start, _ in found if start != "paper"):
            race = measure_gain(found["paper", EVOLQ], found[start, NONE])
            others.append(Row.of(f"{setting}: {start}, unsearched, over EvolQ on paper", race))
    holds = [bool(row.holds) for row in rows]
    return Verdict(
        decide(holds),
        f"On the embedded networks (Typefaces-62, {count_seeds(results)}), the paper's search "
        f"gains on MinMax in {sum(poor)} of {len(poor)} settings, on GPTQ's integers in "
        f"{sum(holds)}; there it raises KL in {sum(worse)}.",
        (*rows, *others),
    )


def tables(results: pd.DataFrame) -> Tables:
    """Top-1 of each start and search, mean over seeds, and the losses."""
    rows = []
    for setting, found in group(results).items():
        for (start, search), mine in found.items():
            means = {loss: mean_of(mine[loss]) for loss in LOSSES}
            was = mean_of(began(found, start, search)["kl"])
            own = f" (its start: KL {was:.4f})" if search in GRADIENTS else ""
            top1 = [count_correct(r).top1 for _, r in mine.iterrows()]
            rows.append(
                {
                    "setting": setting,
                    "start": start,
                    "search": search + own,
                    "top-1, %": f"{100 * sum(top1) / len(top1):.2f}",
                    "KL to float": f"{means['kl']:.4f}",
                    "cross-entropy": f"{means['cross_entropy']:.4f}",
                }
            )
    return {"Means over seeds on the 9,920 test images": pd.DataFrame(rows)}


CLAIM = Claim(
    "C12",
    "Does the paper's search still gain on a good start?",
    cells,
    run,
    figure,
    verdict,
    tables,
    real="R12",
    stage=stage_of,
)
