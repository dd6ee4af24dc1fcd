"""C5: how much does the search gain, over which start, at how many bits, on a ViT and on a CNN?

Every method at the same cost: the paper's 10 passes. Random search draws as many candidates around
the present scales as evolution does. Gains are against the start that a method began from.
"""

import pandas as pd

from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.evaluate import Gain
from evolq_lite.experiments.cells import Claim, measure_gain
from evolq_lite.experiments.plots import NAMES, plot_gains
from evolq_lite.experiments.results import Cell, Result, by
from evolq_lite.experiments.setup import measure_top1, prepare, search_scales
from evolq_lite.experiments.verdicts import Row, Verdict, count_seeds, decide
from evolq_lite.figures import Picture

# What is compared: the observer of the first scales, and the search from there.
METHODS = {
    "float": ("none", "none"),
    "MinMax": ("minmax", "none"),
    "MSE": ("mse", "none"),
    "EvolQ from MinMax": ("minmax", "evolq"),
    "EvolQ from MSE": ("mse", "evolq"),
    "random from MinMax": ("minmax", "random"),
}


def cells(quick: bool) -> list[Cell]:
    """Every network, bit-width, method and seed; without a search, one seed is another start."""
    networks, bits = (("vit",), (3,)) if quick else (("vit", "cnn"), (8, 4, 3))
    methods = (
        ("float", "MinMax", "EvolQ from MinMax", "random from MinMax") if quick else tuple(METHODS)
    )
    return [
        {
            "network": network,
            "weight_bits": b,
            "method": method,
            "seed": seed,
            "images": 60 if quick else 500,
            "passes": 1 if quick else 10,
            "every": 21 if quick else 1,
        }
        for network in networks
        for b in bits
        for method in methods
        for seed in ((0,) if quick else (0, 1, 2))
    ]


def run(cell: Cell) -> Result:
    """Quantize, search, test."""
    observer, algorithm = METHODS[cell["method"]]
    config = QuantConfig(
        weight_bits=cell["weight_bits"],
        weight_observer="minmax" if observer == "none" else observer,
    )
    setting = prepare(cell["network"], cell["images"], cell["seed"], config)
    if observer == "none":
        return measure_top1(setting.demo.model, cell["every"])
    told: Result = {}
    if algorithm != "none":
        search = SearchConfig(
            passes=cell["passes"],
            algorithm=algorithm,
            seed=cell["seed"],
            batch=min(100, cell["images"]),
        )
        told = search_scales(setting, search)
    return {**told, **measure_top1(setting.qmodel, cell["every"])}


def group(results: pd.DataFrame) -> dict[str, dict[str, pd.DataFrame]]:
    """Results by setting, then by method."""
    return {
        f"{NAMES[network]} W{bits}A8": by(found, "method")
        for (network, bits), found in by(results, "network", "weight_bits").items()
    }


def measure_gains(found: dict[str, pd.DataFrame]) -> dict[str, Gain]:
    """What each method of a setting gains over the scales that it starts from."""
    gains = {}
    for method, mine in found.items():
        start = "MSE" if method == "EvolQ from MSE" else "MinMax"
        name = f"{method}, over {start}" if method == "MSE" else method
        if method not in ("MinMax", "float"):
            gains[name] = measure_gain(found[start], mine)
    return gains


def figure(results: pd.DataFrame) -> Picture:
    """Gains of each method, one panel for each network and bit-width."""
    groups = {setting: measure_gains(found) for setting, found in group(results).items()}
    return plot_gains(groups, "Gain over the scales that each search starts from")


def verdict(results: pd.DataFrame) -> Verdict:
    """Does the search gain significantly over MinMax in every setting?"""
    rows, races = [], []
    for setting, found in group(results).items():
        for name, gain in measure_gains(found).items():
            counts = gain.gain > 0 and gain.significant if name == "EvolQ from MinMax" else None
            over = "" if "over" in name else ", over its start"
            rows.append(Row.of(f"{setting}: {name}{over}", gain, counts))
        lost = measure_gain(found["float"], found["MinMax"])
        race = measure_gain(found["random from MinMax"], found["EvolQ from MinMax"])
        rows.append(Row.of(f"{setting}: MinMax, over float", lost))
        rows.append(Row.of(f"{setting}: EvolQ, over random search at the same cost", race))
        races.append(race.gain > 0 and race.significant)
    parts = [row.holds for row in rows if row.holds is not None]
    return Verdict(
        decide(parts),
        f"On the embedded networks (Typefaces-62, {count_seeds(results)}), the paper's search "
        f"gains significantly over MinMax in {sum(parts)} of {len(parts)} settings, and over "
        f"random search at the same cost in {sum(races)}.",
        tuple(rows),
    )


CLAIM = Claim(
    "C5",
    "Does the search gain over its start, at 8, 4 and 3 bits, on a ViT and a CNN?",
    cells,
    run,
    figure,
    verdict,
    real="R5",
)
