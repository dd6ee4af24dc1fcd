"""REAL: the headline on trained ViT-Tiny and DeiT-Tiny and real photographs, a 1,000-image check.

1,000 calibration images, 1,000 others to test, one pass of the search instead of ten, one seed: it
says whether the picture of C5 and C8 carries over, not more. Networks and photographs are not in
this repo: give their folders. A run in work is kept in `runs/real` and gone on with.
"""

import json
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from evolq_lite.evaluate import Comparison, unpacked
from evolq_lite.experiments.cells import Cell, Claim, Result, verdict_of
from evolq_lite.experiments.plots import forest
from evolq_lite.figures import Picture

NETWORKS = ("vit_tiny_patch16_224", "deit_tiny_patch16_224")
# C8's search from the start that its choice found best, and the rows of C5.
METHODS: dict[str, dict[str, Any]] = {
    "EvolQ from MinMax": {},
    "C8's search": {"weight-observer": "mse", "bias-correction": True, "mutation": "adaptive"},
    "EvolQ from MSE": {"weight-observer": "mse"},
    "random from MinMax": {"algorithm": "random"},
}
STARTS = {"EvolQ from MinMax": "MinMax", "C8's search": "C8's start", "EvolQ from MSE": "MSE"}
CALIBRATION = 1000  # images
RUNS = Path("runs/real")


def cells(quick: bool) -> list[Cell]:
    """Every method, the first two first, at 4 and 3 bits; nothing of it is quick."""
    return [
        {"network": network, "weight_bits": bits, "method": method, "seed": 0, "passes": 1}
        for method in METHODS
        for network in NETWORKS
        for bits in (4, 3)
        if not quick
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
        **METHODS[cell["method"]],
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


def race(found: dict[str, Result]) -> Comparison:
    """C8's search against the paper's, of the results of one setting."""
    paper, ours = (right_of(found[name], "evolved") for name in list(METHODS)[:2])
    return Comparison.of(paper, ours)


def grouped(results: list[Result]) -> dict[str, dict[str, Result]]:
    """Results by setting, then by method."""
    out: dict[str, dict[str, Result]] = defaultdict(dict)
    for r in results:
        out[f"{r['network'].split('_')[0]} W{r['weight_bits']}A8"][r["method"]] = r
    return out


def figure(results: list[Result]) -> Picture:
    """What each search gains over its start, one panel for each network and bit-width."""
    groups = {
        setting: {
            **{f"{method} - start": gain_of(r) for method, r in found.items()},
            "C8's search - EvolQ": race(found),
        }
        for setting, found in grouped(results).items()
    }
    return forest(groups, "1,000-image check on real networks: gains of one pass, one seed")


def verdict(results: list[Result]) -> tuple[str, str]:
    """Does the paper's search gain significantly over MinMax, in one pass?"""
    said, clear = [], []
    for setting, found in grouped(results).items():
        gain = gain_of(found["EvolQ from MinMax"])
        clear.append(gain.gain > 0 and gain.significant)
        rows = [f"float {100 * found['EvolQ from MinMax']['float_top1']:.1f} %"]
        for method, r in found.items():
            if method in STARTS:
                rows.append(f"{STARTS[method]} {100 * r['before_top1']:.1f} %")
            rows.append(f"{method} {100 * r['after_top1']:.1f} % ({gain_of(r)} over its start)")
        rows.append(f"C8's search against the paper's {race(found)}")
        said.append(f"{setting}: {', '.join(rows)}")
    return verdict_of(clear), "1,000-image check. " + "; ".join(said) + "."


QUESTION = "Does one pass of the search gain on trained ViT-Tiny and DeiT-Tiny, at 4 and 3 bits?"
CLAIM = Claim("REAL", QUESTION, cells, nowhere, figure, verdict)
