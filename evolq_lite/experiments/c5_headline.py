"""C5: how much does the search gain, over which start, at how many bits, on a ViT and on a CNN?

Every method at the same cost: the paper's 10 passes. Random search draws as many candidates around
the present scales as evolution does. Gains are against the start that a method began from.
"""

from collections import defaultdict

from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.experiments.cells import Cell, Claim, Result, paired, verdict_of
from evolq_lite.experiments.plots import forest
from evolq_lite.experiments.setup import evolved, setting, tested
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
    made = setting(cell["network"], cell["images"], cell["seed"], config)
    if observer == "none":
        return tested(made.demo.model, cell["every"])
    said: Result = {}
    if algorithm != "none":
        search = SearchConfig(
            passes=cell["passes"],
            algorithm=algorithm,
            seed=cell["seed"],
            batch=min(100, cell["images"]),
        )
        said = evolved(made, search)
    return {**said, **tested(made.qmodel, cell["every"])}


def grouped(results: list[Result]) -> dict[tuple[str, int], dict[str, list[Result]]]:
    """Results by network and bits, then by method, in the order of seeds."""
    out: dict[tuple[str, int], dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for r in sorted(results, key=lambda r: r["seed"]):
        out[r["network"], r["weight_bits"]][r["method"]].append(r)
    return out


def start_of(method: str) -> str:
    """The method whose scales another one starts from; MinMax for what does not search."""
    return "MSE" if method.endswith("MSE") and method != "MSE" else "MinMax"


def figure(results: list[Result]) -> Picture:
    """Gains of each method, one panel for each network and bit-width."""
    groups = {
        f"{network} W{bits}A8": {
            f"{m}, over {start_of(m)}" if m == "MSE" else m: paired(found[start_of(m)], rs)
            for m, rs in found.items()
            if m not in ("MinMax", "float")
        }
        for (network, bits), found in grouped(results).items()
    }
    return forest(groups, "Gains over the scales that each search starts from")


def verdict(results: list[Result]) -> tuple[str, str]:
    """Does the search gain significantly over MinMax in every setting?"""
    said, clear = [], []
    for (network, bits), found in grouped(results).items():
        lost = paired(found["float"], found["MinMax"])
        gain = paired(found["MinMax"], found["EvolQ from MinMax"])
        clear.append(gain.gain > 0 and gain.significant)
        random = paired(found["random from MinMax"], found["EvolQ from MinMax"])
        said.append(
            f"{network} W{bits}A8: MinMax {lost} against float, EvolQ {gain}; "
            f"against random search at the same cost {random}"
        )
    return verdict_of(clear), "; ".join(said) + "."


CLAIM = Claim(
    "C5",
    "Does the search gain over its start, at 8, 4 and 3 bits, on a ViT and a CNN?",
    cells,
    run,
    figure,
    verdict,
)
