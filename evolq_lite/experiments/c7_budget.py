"""C7: what do granularity, genome, passes, population and mutation width change?

The paper's search with one option changed at a time, at W3A8 on the ViT.
"""

from typing import Any

import pandas as pd

from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.experiments.cells import Claim, measure_gain
from evolq_lite.experiments.plots import plot_gains
from evolq_lite.experiments.results import Cell, Result, by
from evolq_lite.experiments.setup import measure_top1, prepare, search_scales
from evolq_lite.experiments.verdicts import UNDECIDED, WORDS, Row, Verdict, count_seeds
from evolq_lite.figures import Picture

# Layers are visited twice as often as blocks, the whole network once a pass: passes make up for it.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "granularity": [
        {"granularity": "layer", "passes": 5},
        {"granularity": "block"},
        {"granularity": "global", "passes": 60},
    ],
    "scales": [{"scales": "weights"}, {"scales": "all"}],
    "passes": [{"passes": passes} for passes in (1, 2, 5, 20)],
    "population": [{"population": size} for size in (1, 5, 40)],
    "absolute width": [{"step": step} for step in (1e-4, 3e-4, 3e-3, 1e-2)],
    "relative width": [{"step": step, "mutation": "relative"} for step in (3e-3, 1e-2, 3e-2, 1e-1)],
}
# The paper's choice is computed once, as granularity block, and shown in its groups.
PAPER = {
    "scales": "attention",
    "passes": "10",
    "population": "15",
    "absolute width": "0.001",
}


def cells(quick: bool) -> list[Cell]:
    """The start, and every variant, for three seeds."""
    groups = {"passes": [{"passes": 1}]} if quick else VARIANTS
    fixed = {
        "weight_bits": 3,
        "images": 60 if quick else 300,
        "every": 21 if quick else 1,
    }
    changed = [("start", {}), *((g, options) for g, rows in groups.items() for options in rows)]
    return [
        {"group": group, "options": options, "seed": seed, **fixed}
        for group, options in changed
        for seed in ((0,) if quick else (0, 1, 2))
    ]


def run(cell: Cell) -> Result:
    """Search with the options of the cell; test."""
    setting = prepare("vit", cell["images"], cell["seed"], QuantConfig(cell["weight_bits"]))
    if cell["group"] == "start":
        return measure_top1(setting.qmodel, cell["every"])
    search = SearchConfig(
        **{"seed": cell["seed"], "batch": min(100, cell["images"]), **cell["options"]}
    )
    return {**search_scales(setting, search), **measure_top1(setting.qmodel, cell["every"])}


def name_of(options: dict[str, Any]) -> str:
    """A variant in a word or two: its first option, and the passes that make up for it."""
    first, *more = options.values() or ("start",)
    passes = [f", {n} passes" for n in more if isinstance(n, int)]
    return (f"{first:g}" if isinstance(first, float) else str(first)) + "".join(passes)


def group(results: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, dict[str, pd.DataFrame]]]:
    """The starts, and results by group and variant; the paper's choice stands in its groups."""
    named = results.assign(name=results["options"].map(name_of))
    groups = {name: by(found, "name") for name, found in by(named, "group").items()}
    start = groups.pop("start")["start"]
    for name, choice in PAPER.items() if "granularity" in groups else ():
        variants = {f"{choice} (paper)": groups["granularity"]["block"], **groups[name]}
        if choice[0].isdigit():
            variants = dict(sorted(variants.items(), key=lambda item: float(item[0].split()[0])))
        groups[name] = variants
    return start, groups


def figure(results: pd.DataFrame) -> Picture:
    """Gain over the start of every variant, one panel for each option."""
    start, groups = group(results)
    gains = {
        name: {variant: measure_gain(start, rs) for variant, rs in variants.items()}
        for name, variants in groups.items()
    }
    return plot_gains(
        gains, "Gain over MinMax, W3A8, one option changed at a time", same_scale=True
    )


def verdict(results: pd.DataFrame) -> Verdict:
    """Does any variant beat the paper's choice significantly?

    Partly, if one does that takes more evaluations.
    """
    start, groups = group(results)
    if "granularity" not in groups:
        return Verdict(UNDECIDED, "Only some of the cells were computed.")
    paper = groups["granularity"]["block"]
    many = sum(len(variants) for variants in VARIANTS.values()) - 1  # comparisons: Bonferroni
    cost = paper["evaluations"].mean()
    rows, gains = [], []
    better = fair = 0
    for name, variants in groups.items():
        for variant, found in variants.items():
            label = f"{name} {variant}, {found['evaluations'].mean():.0f} evaluations"
            gains.append(Row.of(f"{label}, over MinMax", measure_gain(start, found)))
            if found is paper:
                continue
            gain = measure_gain(paper, found)
            ahead = gain.gain > 0 and gain.significant and many * gain.p_value < 0.05
            rows.append(Row.of(f"{label}, over the paper's choice", gain, not ahead))
            better += ahead
            fair += ahead and found["evaluations"].mean() <= 1.05 * cost
    return Verdict(
        WORDS[0 if not better else 2 if fair else 1],
        f"On the embedded ViT (Typefaces-62, W3A8, {count_seeds(paper)}), {better} of {many} "
        f"variants beat the paper's choice significantly (Bonferroni), {fair} of them at no more "
        "evaluations.",
        (*rows, *gains),
    )


CLAIM = Claim(
    "C7",
    "Are the paper's granularity, genome, budget and width the best choice?",
    cells,
    run,
    figure,
    verdict,
    real="R7",
)
