"""C1: how much do scale and bit-width decide? Top-1 against bits, for each observer and network."""

from typing import Any

import numpy as np
import pandas as pd

from evolq_lite.config import QuantConfig
from evolq_lite.experiments.cells import Claim, Tables, count_correct, measure_gain
from evolq_lite.experiments.plots import NAMES
from evolq_lite.experiments.results import Cell, Result, by, where
from evolq_lite.experiments.setup import measure_top1, prepare
from evolq_lite.experiments.verdicts import UNDECIDED, Row, Verdict, decide
from evolq_lite.figures import PETROFF, Picture, new_figure

OBSERVERS = ("minmax", "percentile", "mse")
NETWORKS = ("vit", "cnn")


def cells(quick: bool) -> list[Cell]:
    """Every network, observer and pair of bits; bits 32 are the float network."""
    networks, observers = (("vit",), ("minmax",)) if quick else (NETWORKS, OBSERVERS)
    bits = [(3, 8), (8, 8)] if quick else [(w, a) for a in (8, 6, 4) for w in range(2, 9)]
    out = [cell_of(network, "none", 32, 32, quick) for network in networks]
    out += [cell_of(n, o, w, a, quick) for n in networks for o in observers for w, a in bits]
    return out


def cell_of(network: str, observer: str, weight_bits: int, act_bits: int, quick: bool) -> Cell:
    return {
        "network": network,
        "observer": observer,
        "weight_bits": weight_bits,
        "act_bits": act_bits,
        "images": 100 if quick else 500,
        "seed": 0,
        "every": 21 if quick else 1,
    }


def run(cell: Cell) -> Result:
    """Quantize and test."""
    if cell["observer"] == "none":
        return measure_top1(prepare(cell["network"], 2, 0, QuantConfig()).demo.model, cell["every"])
    config = QuantConfig(
        weight_bits=cell["weight_bits"],
        act_bits=cell["act_bits"],
        weight_observer=cell["observer"],
        act_observer=cell["observer"],
    )
    setting = prepare(cell["network"], cell["images"], cell["seed"], config)
    return measure_top1(setting.qmodel, cell["every"])


def figure(results: pd.DataFrame) -> Picture:
    """One panel per network and activation bit-width, one line per observer, bands of 95 %."""
    float_top1 = by(where(results, observer="none"), "network")
    quantized = results[results["observer"] != "none"]
    networks = list(by(quantized, "network").items())
    widths = sorted(quantized["act_bits"].unique(), reverse=True)
    worst = quantized.loc[quantized["top1"].idxmin()]
    alt = (
        "Top-1 over weight bits, a panel for each network and activation width, a line for each "
        f"observer. Lowest: {100 * worst['top1']:.1f} % ({NAMES[worst['network']]} "
        f"W{worst['weight_bits']}A{worst['act_bits']}, {worst['observer']})."
    )
    picture = new_figure(4.2 * len(widths), 3.4 * len(networks), alt)
    grid = picture.subplots(len(networks), len(widths), squeeze=False, sharex=True, sharey=True)
    for row, (network, mine) in zip(grid, networks, strict=True):
        for axes, width in zip(row, widths, strict=True):
            lines = by(where(mine, act_bits=width), "observer")
            for i, (observer, unsorted) in enumerate(lines.items()):
                line = unsorted.sort_values("weight_bits")
                band = np.array([count_correct(r).interval for _, r in line.iterrows()])
                bits, look = line["weight_bits"], "osD"[i] + "-"
                axes.plot(bits, 100 * line["top1"], look, color=PETROFF[i], label=observer)
                axes.fill_between(bits, *100 * band.T, color=PETROFF[i], alpha=0.2)
            whole = 100 * float_top1[network]["top1"].item()
            axes.axhline(whole, color="0.4", ls="--", label="float")
            axes.set_title(f"{NAMES[network]}, {width}-bit activations", fontsize="medium")
            axes.grid(alpha=0.3)
        row[0].set_ylabel("top-1, %")
    for axes in grid[-1]:
        axes.set_xlabel("weight bits")
    grid[0][0].legend(fontsize="small")
    return picture


def verdict(results: pd.DataFrame) -> Verdict:
    """Do bits and the way scales are chosen decide the accuracy?"""
    if "mse" not in set(results["observer"]):
        return Verdict(UNDECIDED, "Only some of the cells were computed.")
    rows: list[Row] = []
    for network, mine in by(results, "network").items():
        name, whole = NAMES[network], where(mine, observer="none")
        first = measure_gain(whole, pick(mine, "minmax", 8, 8))
        low = measure_gain(whole, pick(mine, "minmax", 3, 8))
        falls = low.significant and low.gain < first.gain
        rows.append(Row.of(f"{name} W8A8 by MinMax, over float", first))
        rows.append(Row.of(f"{name} W3A8 by MinMax, over float", low, falls))
        for bits in ((3, 8), (8, 4)):
            change = measure_gain(pick(mine, "minmax", *bits), pick(mine, "mse", *bits))
            setting = f"{name} W{bits[0]}A{bits[1]}"
            rows.append(Row.of(f"{setting} by MSE, over MinMax", change, change.significant))
    lost = max(-row.gain for row in rows if row.holds is None)
    moved = [abs(row.gain) for row in rows if row.holds is not None]
    return Verdict(
        decide(row.holds for row in rows),
        f"On the embedded ViT and CNN (Typefaces-62, one seed), W8A8 loses at most {lost:.2f} "
        f"points; fewer bits or other scales move top-1 by {min(moved):.1f} to {max(moved):.1f}.",
        tuple(rows),
    )


def pick(results: pd.DataFrame, observer: str, weight_bits: int, act_bits: int) -> pd.DataFrame:
    """The results of one setting."""
    return where(results, observer=observer, weight_bits=weight_bits, act_bits=act_bits)


def tables(results: pd.DataFrame) -> Tables:
    """Top-1 in every setting, a row for each activation width and observer."""
    shown = results.assign(
        network=results["network"].map(NAMES),
        bits="W" + results["weight_bits"].astype(str),
        percent=(100 * results["top1"]).map("{:.1f}".format),
    )
    quantized = shown[shown["observer"] != "none"]
    keys: Any = {"index": ["network", "act_bits", "observer"], "columns": "bits"}
    table = quantized.pivot(values="percent", **keys).reset_index()
    table = table.sort_values(["network", "act_bits"], ascending=False, kind="stable")
    whole = where(shown, observer="none")
    told = ", ".join(f"{n} {p}" for n, p in zip(whole["network"], whole["percent"]))
    table = table.rename(columns={"act_bits": "activation bits"})
    return {f"Top-1 in % by bits of weights (float: {told})": table}


CLAIM = Claim(
    "C1",
    "Do scales and bit-widths decide the accuracy?",
    cells,
    run,
    figure,
    verdict,
    tables,
    real="R1",
)
