"""REAL: the headline on trained ViT-Tiny and DeiT-Tiny and real photographs, a 1,000-image check.

1,000 calibration images, 1,000 others to test, one pass of the search instead of ten, one seed: it
says whether the picture of C5 and C8 carries over, not more. One setting was also searched for the
paper's ten passes, which says what the other nine are worth there. C8 chooses among starts by the
loss on calibration images: `chosen` does so among the two that were searched. Networks and
photographs are not in this repo: give their folders. A run in work is kept in `runs/real` and gone
on with.
"""

import json
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from evolq_lite.evaluate import Accuracy, Comparison, unpacked
from evolq_lite.experiments.cells import Cell, Claim, Result, verdict_of
from evolq_lite.experiments.plots import forest
from evolq_lite.figures import Picture

NETWORKS = {"vit_tiny_patch16_224": "ViT-Tiny", "deit_tiny_patch16_224": "DeiT-Tiny"}
CORRECTED = {"weight-observer": "mse", "bias-correction": True}
METHODS: dict[str, dict[str, Any]] = {
    "EvolQ from MinMax": {},
    "EvolQ from MSE": {"weight-observer": "mse"},
    "random from MinMax": {"algorithm": "random"},
    "adaptive from MSE": {"weight-observer": "mse", "mutation": "adaptive"},
    "adaptive from corrected MSE": {**CORRECTED, "mutation": "adaptive"},
}
WHOLE = "EvolQ from MinMax, ten passes"  # the paper's whole search, in one setting
CALIBRATION = 1000  # images
RUNS = Path("runs/real")


def cells(quick: bool) -> list[Cell]:
    """Every method at 4 and 3 bits, and one whole search; nothing of it is quick."""
    if quick:
        return []
    whole = {"network": "deit_tiny_patch16_224", "weight_bits": 4, "method": WHOLE}
    return [{**whole, "seed": 0, "passes": 10}] + [
        {"network": network, "weight_bits": bits, "method": method, "seed": 0, "passes": 1}
        for method in METHODS
        for network in NETWORKS
        for bits in (4, 3)
    ]


def options(cell: Cell, weights: Path, photographs: Path, out: Path) -> list[str]:
    """The command line of a cell."""
    given = {
        "model": cell["network"],
        "checkpoint": weights / f"{cell['network']}.safetensors",
        "calibration": photographs / "calibration",
        "test": photographs / "validation",
        "class-map": photographs / "wnids.txt",
        "calibration-images": CALIBRATION,
        "weight-bits": cell["weight_bits"],
        "act-bits": 8,
        "passes": cell["passes"],
        "seed": cell["seed"],
        **METHODS.get(cell["method"], {}),
        "out": out,
    }
    flags = [f"--{k}" if v is True else f"--{k}={v}" for k, v in given.items()]
    return ["run", *flags, *(["--resume"] if (out / "config.json").is_file() else [])]


def run(cell: Cell, weights: Path, photographs: Path) -> Result:
    """Run it as a reader would, on the command line; returns its summary."""
    from evolq_lite.cli import main

    out = RUNS / "-".join(str(value).replace(" ", "_") for value in cell.values())
    status = main(options(cell, weights, photographs, out))
    if status == 130:
        raise KeyboardInterrupt
    if status != 0:
        raise ValueError(f"the run in {out} has failed, see above")
    summary: Result = json.loads((out / "summary.json").read_text())
    return summary


def nowhere(cell: Cell) -> Result:
    """The claim without its folders can be shown, not computed."""
    raise ValueError("real networks need folders: see real.on")


def on(weights: Path, photographs: Path) -> Claim:
    """The claim with other folders; ValueError if they do not hold what is needed."""
    for path in (*(weights / f"{name}.safetensors" for name in NETWORKS), photographs):
        if not path.exists():
            raise ValueError(
                f"{path} is not there; give --weights FOLDER with {' and '.join(NETWORKS)} as "
                ".safetensors, and --photographs FOLDER with calibration/, validation/, wnids.txt"
            )
    return replace(CLAIM, run=partial(run, weights=weights, photographs=photographs))


def right_of(result: Result, network: str) -> Tensor:
    """Which images (n,) "float", "before" or "evolved" of a run has right."""
    return unpacked(result["correct"][network], result["images"])


def gain_of(result: Result) -> Comparison:
    """What a search gains over its start."""
    return Comparison.of(right_of(result, "before"), right_of(result, "evolved"))


def race(found: dict[str, Result], method: str, network: str) -> Comparison:
    """A method's network against that of EvolQ from MinMax, of the results of one setting."""
    paper, other = (right_of(found[name], network) for name in ("EvolQ from MinMax", method))
    return Comparison.of(paper, other)


def chosen(found: dict[str, Result]) -> str:
    """The adaptive search that C8 would take, whose start has the least loss for calibration."""
    adaptive = [method for method in found if method.startswith("adaptive")]
    return min(adaptive, key=lambda method: float(found[method]["fitness_before"]))


def grouped(results: list[Result]) -> dict[str, dict[str, Result]]:
    """Results by setting, then by method."""
    out: dict[str, dict[str, Result]] = defaultdict(dict)
    for r in sorted(results, key=lambda r: r["method"] == WHOLE):
        out[f"{NETWORKS[r['network']]} W{r['weight_bits']}A8"][r["method"]] = r
    return out


def figure(results: list[Result]) -> Picture:
    """What each search gains over its start, one panel for each network and bit-width."""
    groups = {
        setting: {method: gain_of(r) for method, r in found.items()}
        for setting, found in grouped(results).items()
    }
    return forest(groups, "1,000-image check: gains over the start, one pass, one seed")


def verdict(results: list[Result]) -> tuple[str, str]:
    """Does the paper's search gain significantly over MinMax, in one pass?"""
    groups = grouped(results)
    gains = [gain_of(found["EvolQ from MinMax"]) for found in groups.values()]
    random = [race(found, "random from MinMax", "evolved") for found in groups.values()]
    best = [race(found, chosen(found), "evolved") for found in groups.values()]
    starts = [race(found, chosen(found), "before") for found in groups.values()]
    said = [
        f"1,000-image check. Significantly, in {len(groups)} settings: EvolQ against its MinMax "
        f"start is {score(gains)}; against EvolQ at the same cost, random search is "
        f"{score(random)}, the adaptive search whose start has the least loss {score(best)}; that "
        f"start, unsearched, against MinMax {score(starts)}",
        *(f"{setting}: {told(found)}" for setting, found in groups.items()),
    ]
    return verdict_of([g.gain > 0 and g.significant for g in gains]), ". ".join(said) + "."


def score(comparisons: list[Comparison]) -> str:
    """How many of them gain significantly, and how many lose."""
    clear = [c.gain > 0 for c in comparisons if c.significant]
    return f"ahead in {clear.count(True)} and behind in {clear.count(False)}"


def told(found: dict[str, Result]) -> str:
    """One setting in words."""
    paper = found["EvolQ from MinMax"]
    rows = [f"float {Accuracy(round(paper['float_top1'] * paper['images']), paper['images'])}"]
    for method, r in found.items():
        rows.append(
            f"{method}: top-1 {100 * r['before_top1']:.1f} to {100 * r['after_top1']:.1f} % "
            f"({gain_of(r)}), loss {r['fitness_before']:.3f} to {r['fitness_after']:.3f}"
        )
        if r is not paper:
            rows[-1] += f", against EvolQ from MinMax {race(found, method, 'evolved')}"
    return "; ".join(rows)


QUESTION = "Does one pass of the search gain on trained ViT-Tiny and DeiT-Tiny, at 4 and 3 bits?"
CLAIM = Claim("REAL", QUESTION, cells, nowhere, figure, verdict)
