"""C7: what do granularity, genome, passes, population and mutation width change?

The paper's search with one option changed at a time, at W3A8 on the ViT.
"""

from collections import defaultdict
from statistics import fmean as mean
from typing import Any

from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.experiments.cells import UNDECIDED, Cell, Claim, Result, paired
from evolq_lite.experiments.plots import forest
from evolq_lite.experiments.setup import evolved, setting, tested
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
# The paper's choice is computed once, as granularity block, and shown in every group.
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
    made = setting("vit", cell["images"], cell["seed"], QuantConfig(cell["weight_bits"]))
    if cell["group"] == "start":
        return tested(made.qmodel, cell["every"])
    search = SearchConfig(
        **{"seed": cell["seed"], "batch": min(100, cell["images"]), **cell["options"]}
    )
    return {**evolved(made, search), **tested(made.qmodel, cell["every"])}


def grouped(results: list[Result]) -> tuple[list[Result], dict[str, dict[str, list[Result]]]]:
    """The starts, and results by group and variant, in the order of seeds."""
    out: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for r in sorted(results, key=lambda r: r["seed"]):
        first, *more = r["options"].values() or ("start",)
        passes = [f", {n} passes" for n in more if isinstance(n, int)]
        name = (f"{first:g}" if isinstance(first, float) else str(first)) + "".join(passes)
        out[r["group"]][name].append(r)
    start = next(iter(out.pop("start").values()))
    if "granularity" in out:
        paper = out["granularity"]["block"]
        out.update({g: {f"{name} (paper)": paper, **out[g]} for g, name in PAPER.items()})
    return start, out


def figure(results: list[Result]) -> Picture:
    """Gain over the start of every variant, one panel for each option."""
    start, found = grouped(results)
    groups = {g: {n: paired(start, rs) for n, rs in rows.items()} for g, rows in found.items()}
    return forest(groups, "Gain over MinMax, W3A8, one option changed at a time")


def verdict(results: list[Result]) -> tuple[str, str]:
    """Does any variant beat the paper's choice significantly?"""
    start, found = grouped(results)
    if "granularity" not in found:
        return UNDECIDED, "Only a part of the cells was computed."
    paper = found["granularity"]["block"]
    better = {}
    many = sum(len(rows) for rows in VARIANTS.values()) - 1  # comparisons: Bonferroni
    for group, rows in found.items():
        for name, rs in rows.items():
            gain = paired(paper, rs)
            if rs is paper or gain.gain <= 0 or not gain.significant:
                continue
            if many * gain.p_value < 0.05:
                better[f"{group} {name}"] = (gain, mean([r["evaluations"] for r in rs]))
    cost = mean([r["evaluations"] for r in paper])
    fair = {n: g for n, (g, evaluations) in better.items() if evaluations <= 1.05 * cost}
    said = "; ".join(f"{n} {g}" for n, (g, _) in better.items()) or "none"
    word = "holds here" if not better else "does not hold here" if fair else "holds partly"
    return word, (
        f"The paper's choice gains {paired(start, paper)} in {cost:.0f} evaluations. Significantly "
        f"better than it (5 %, Bonferroni over {many} comparisons): {said}. "
        f"At no more evaluations: {', '.join(fair) or 'none'}."
    )


CLAIM = Claim(
    "C7",
    "Are the paper's granularity, genome, budget and width the best choice?",
    cells,
    run,
    figure,
    verdict,
)
