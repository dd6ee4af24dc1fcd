"""C1: how much do scale and bit-width decide? Top-1 against bits, for each observer and network."""

from collections import defaultdict

import numpy as np

from evolq_lite.config import QuantConfig
from evolq_lite.experiments.cells import (
    UNDECIDED,
    Cell,
    Claim,
    Result,
    accuracy_of,
    paired,
    verdict_of,
)
from evolq_lite.experiments.setup import setting, tested
from evolq_lite.figures import PETROFF, Picture, new_figure

OBSERVERS = ("minmax", "percentile", "mse")
NETWORKS = ("vit", "cnn")


def cells(quick: bool) -> list[Cell]:
    """Every network, observer and pair of bits; bits 32 are the float network."""
    networks, observers = (("vit",), ("minmax",)) if quick else (NETWORKS, OBSERVERS)
    bits = [(3, 8), (8, 8)] if quick else [(w, a) for a in (8, 6, 4) for w in range(2, 9)]
    out = [cell(network, "none", 32, 32, quick) for network in networks]
    out += [cell(n, o, w, a, quick) for n in networks for o in observers for w, a in bits]
    return out


def cell(network: str, observer: str, weights: int, activations: int, quick: bool) -> Cell:
    """The parameters of one cell."""
    return {
        "network": network,
        "observer": observer,
        "weight_bits": weights,
        "act_bits": activations,
        "images": 100 if quick else 500,
        "seed": 0,
        "every": 21 if quick else 1,
    }


def run(cell: Cell) -> Result:
    """Quantize and test."""
    if cell["observer"] == "none":
        return tested(setting(cell["network"], 2, 0, QuantConfig()).demo.model, cell["every"])
    config = QuantConfig(
        weight_bits=cell["weight_bits"],
        act_bits=cell["act_bits"],
        weight_observer=cell["observer"],
        act_observer=cell["observer"],
    )
    made = setting(cell["network"], cell["images"], cell["seed"], config)
    return tested(made.qmodel, cell["every"])


def figure(results: list[Result]) -> Picture:
    """One panel a network and activation bit-width, one line an observer, bands of 95 %."""
    networks = list(dict.fromkeys(r["network"] for r in results))
    widths = sorted({r["act_bits"] for r in results if r["observer"] != "none"}, reverse=True)
    float_top1 = {r["network"]: r["top1"] for r in results if r["observer"] == "none"}
    worst = min(results, key=lambda r: r["top1"])
    alt = (
        "Top-1 against weight bits for each observer, a panel for each network and activation "
        f"bits. {falls(results)} The lowest is {100 * worst['top1']:.1f} % "
        f"(W{worst['weight_bits']}A{worst['act_bits']}, {worst['network']}, {worst['observer']})."
    )
    picture = new_figure(4.2 * len(widths), 3.4 * len(networks), alt)
    grid = picture.subplots(len(networks), len(widths), squeeze=False, sharey=True)
    for row, network in zip(grid, networks, strict=True):
        for axes, width in zip(row, widths, strict=True):
            lines = defaultdict(list)
            for r in results:
                if r["network"] == network and r["act_bits"] == width:
                    lines[r["observer"]].append((r["weight_bits"], accuracy_of(r)))
            for i, (observer, found) in enumerate(lines.items()):
                found.sort(key=lambda pair: pair[0])
                bits = [bit for bit, _ in found]
                band = 100 * np.array([a.interval for _, a in found]).T
                axes.plot(
                    bits,
                    [100 * a.top1 for _, a in found],
                    "osD"[i % 3] + "-",
                    color=PETROFF[i],
                    label=observer,
                )
                axes.fill_between(bits, *band, color=PETROFF[i], alpha=0.2)
            axes.axhline(100 * float_top1[network], color="0.4", ls="--", label="float")
            axes.set_title(f"{network}, {width}-bit activations", fontsize="medium")
            axes.set(xlabel="weight bits", ylabel="top-1, %")
            axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize="small")
    return picture


def known(results: list[Result]) -> dict[tuple[str, str, int, int], Result]:
    """Results by network, observer, bits of weights and of activations."""
    return {(r["network"], r["observer"], r["weight_bits"], r["act_bits"]): r for r in results}


def falls(results: list[Result]) -> str:
    """MinMax at a few bit-widths of weights, in words."""
    by, words = known(results), []
    for network in dict.fromkeys(r["network"] for r in results):
        for activations in (8, 4):
            row = [(w, by.get((network, "minmax", w, activations))) for w in (8, 4, 3, 2)]
            said = ", ".join(f"{100 * r['top1']:.0f} % at W{w}" for w, r in row if r)
            words += [f"{network} with MinMax and A{activations}: {said}."] if said else []
    return " ".join(words)


def verdict(results: list[Result]) -> tuple[str, str]:
    """Do bits and the way scales are chosen decide the accuracy?"""
    by = known(results)
    if not any(observer == "mse" for _, observer, _, _ in by):
        return UNDECIDED, "Only a part of the cells was computed."
    said, seen = [], []
    for network in dict.fromkeys(r["network"] for r in results):
        whole = by[network, "none", 32, 32]
        low, high = by[network, "minmax", 3, 8], by[network, "minmax", 8, 8]
        drops = [paired([whole], [r]) for r in (high, low)]
        seen.append(drops[1].significant and drops[1].gain < drops[0].gain)
        scales = [
            paired([by[network, "minmax", *bits]], [by[network, "mse", *bits]])
            for bits in ((3, 8), (8, 4))
        ]
        seen += [change.significant for change in scales]
        said.append(
            f"{network}: W8A8 {drops[0]}, W3A8 {drops[1]} against float (MinMax); scales by MSE "
            f"instead of MinMax: W3A8 {scales[0]}, W8A4 {scales[1]}"
        )
    return verdict_of(seen), "; ".join(said) + "."


CLAIM = Claim("C1", "Do scales and bit-widths decide the accuracy?", cells, run, figure, verdict)
