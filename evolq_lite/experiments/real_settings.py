"""R1: what bits and schemes of quantization cost trained ViT-Tiny and DeiT-Tiny, unsearched.

The paper's scheme; one thing of it changed at a time: MSE scales of weights, a scale per channel
for residual sums; what the published script really does; and this repo's recommendation with each
way of rounding. One seed, which draws the calibration images. What 8 bits cost ViT-Tiny under the
paper's scheme is no matter of bits: single channels of its residual sums are so wide that powers of
two up to 8 leave all others a step that is too coarse.

Networks and photographs are not in this repo: give their folders. Most cells take two minutes of
one core, learned rounding a quarter of an hour.
"""

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from evolq_lite.config import PRESETS, QuantConfig
from evolq_lite.evaluate import Accuracy, SeedComparison, unpacked
from evolq_lite.experiments.cells import Claim, Tables
from evolq_lite.experiments.plots import plot_gains
from evolq_lite.experiments.real_cells import (
    FLOAT,
    NETWORKS,
    Place,
    check_of,
    mean_loss,
    measure_gain,
    measure_loss,
    read_test,
    source_of,
    start_from,
)
from evolq_lite.experiments.results import Cell, Result, by
from evolq_lite.experiments.verdicts import Row, Verdict, decide
from evolq_lite.figures import Picture

PAPER, MSE, CHANNELS, GPTQ, LEARNED = "paper", "MSE", "sums by channel", "GPTQ", "learned"
BEST, SLOWEST = f"recommended, {GPTQ}", f"recommended, {LEARNED}"
SCHEMES: dict[str, QuantConfig] = {
    PAPER: PRESETS["paper"],
    MSE: replace(PRESETS["paper"], weight_observer="mse"),
    CHANNELS: replace(PRESETS["paper"], sums="channel"),
    "official": PRESETS["official"],
    "recommended, nearest": replace(PRESETS["recommended"], rounding="nearest"),
    BEST: PRESETS["recommended"],
    SLOWEST: replace(PRESETS["recommended"], rounding="learned"),
}
BITS = (8, 4, 3)
IMAGES = 256  # for calibration, as in R12
QUANTIZED = "quantized"


def cells(quick: bool) -> list[Cell]:
    """Every network, bit-width and scheme; nothing of it is quick."""
    if quick:
        return []
    found = [
        {"network": network, "weight_bits": bits, "scheme": scheme, "seed": 0, "images": IMAGES}
        for network in NETWORKS
        for bits in BITS
        for scheme in SCHEMES
        if bits < 8 or LEARNED not in scheme  # at 8 bits the nearest integer will do
    ]
    return sorted(found, key=stage_of)


def stage_of(cell: Cell) -> int:
    """Learned rounding takes longer than all else, and is for the fewest bits."""
    return (LEARNED in cell["scheme"]) * (1 + (cell["weight_bits"] > min(BITS)))


def run(cell: Cell, place: Place) -> Result:
    """Quantize, round, test."""
    source = source_of(cell, place, cell["images"])
    start = start_from(
        source, replace(SCHEMES[cell["scheme"]], weight_bits=cell["weight_bits"]), place.device
    )
    return read_test(source, {FLOAT: start.demo.model, QUANTIZED: start.qmodel})


Schemes = Mapping[str, pd.DataFrame]  # results by scheme


def group(results: pd.DataFrame) -> dict[tuple[str, int], Schemes]:
    """The results of each network and bit-width."""
    settings = by(results, "network", "weight_bits").items()
    return {(NETWORKS[n], bits): by(found, "scheme") for (n, bits), found in settings}


def compare(was: pd.DataFrame, now: pd.DataFrame, column: str = QUANTIZED) -> SeedComparison:
    """Top-1 of some quantized networks against what others, or the float one, reach."""
    return measure_gain(was[column], now[QUANTIZED], int(was["test_images"].iloc[0]))


def figure(results: pd.DataFrame) -> Picture:
    """What each scheme loses, a panel for each network and bit-width."""
    gains = {
        f"{network} W{bits}A8": {s: compare(r, r, FLOAT) for s, r in found.items()}
        for (network, bits), found in group(results).items()
    }
    return plot_gains(gains, f"{check_of(results)}: top-1 against the float network, no search")


def verdict(results: pd.DataFrame) -> Verdict:
    """Do fewer bits cost accuracy under the paper's scheme, and do other scales or sums move it?"""
    settings = group(results)
    rows: list[Row] = []
    lost, back = [], []
    for network in dict.fromkeys(network for network, _ in settings):
        at = {bits: settings[network, bits] for bits in BITS}
        eight, three = at[8][PAPER], at[3][PAPER]
        fall, mse = compare(eight, three), compare(three, at[3][MSE])
        rows.append(Row.of(f"{network} W3A8, over W8A8", fall, fall.gain < 0 and fall.significant))
        rows.append(Row.of(f"{network} W3A8 by MSE, over MinMax", mse, mse.significant))
        lost.append(-100 * compare(eight, eight, FLOAT).gain)
        recovered = compare(eight, at[8][CHANNELS])
        back.append(
            f"{100 * recovered.gain:.1f}" + " (not significant)" * (not recovered.significant)
        )
    for (network, bits), found in settings.items():
        pairs = [(PAPER, scheme) for scheme in found if scheme != PAPER]
        for was, now in (*pairs, *[(BEST, SLOWEST)] * (SLOWEST in found)):
            name = f"{network} W{bits}A8: {now}, over {was}"
            change = measure_loss(found[was][QUANTIZED], found[now][QUANTIZED], "kl")
            rows.append(Row.of(name, compare(found[was], found[now])))
            rows.append(Row.of_loss(f"{name}, KL", change))
    names = list(NETWORKS.values())
    cost = " and ".join(f"{name} {points:.1f}" for name, points in zip(names, lost, strict=True))
    return Verdict(
        decide(row.holds for row in rows),
        f"On a {check_of(results)} (one seed), the paper's W8A8 scheme costs {cost} points; "
        f"residual sums scaled by channel recover {' and '.join(back)}.",
        tuple(rows),
    )


def tables(results: pd.DataFrame) -> Tables:
    """Top-1 with its interval and the losses of each scheme."""
    rows, whole = [], {}
    for (network, bits), found in group(results).items():
        for scheme, these in found.items():
            result = these.iloc[0]
            whole[network] = top1_of(result, FLOAT)
            rows.append(
                {
                    "setting": f"{network} W{bits}A8",
                    "scheme": scheme,
                    "top-1": str(top1_of(result, QUANTIZED)),
                    "KL to float": mean_loss(these[QUANTIZED], "kl"),
                    "cross-entropy": mean_loss(these[QUANTIZED], "cross_entropy"),
                }
            )
    told = ", ".join(f"{network} {top1}" for network, top1 in whole.items())
    return {f"On 1,000 test photographs, without a search (float: {told})": pd.DataFrame(rows)}


def top1_of(result: pd.Series, column: str) -> Accuracy:
    """Top-1 of one network of a result."""
    right = unpacked(result[column]["correct"], int(result["test_images"]))
    return Accuracy(int(right.sum()), len(right))


CLAIM = Claim(
    "R1",
    "Do scales and bit-widths decide the accuracy of trained ViT-Tiny and DeiT-Tiny?",
    cells,
    run,
    figure,
    verdict,
    tables,
    stage=stage_of,
)
