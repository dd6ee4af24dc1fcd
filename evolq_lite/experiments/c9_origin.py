"""C9: where does the jaggedness come from? Our own question; the paper does not ask it.

A loss over scales can jump in two ways. When a scale moves, weights are rounded to other integers;
and activations, which are sums over many weights, cross the boundaries of their own rounding. Lines
through one layer's scales tell the two apart: weights' integers are free to flip or frozen (the
weight is then integer times scale, so it moves smoothly), and activations have 4, 6 or 8 bits or
stay float. A third way is the average: the loss is a mean over images, and what flips on one image
does not flip on another.

Roughness here is the mean absolute second difference of neighboring points on a line: zero for a
straight line, small for a bowl, large where neighbors know nothing of each other. Then a race on
the same four landscapes: does the gradient win where the landscape is smooth?
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import linregress
from torch import Tensor

from evolq_lite.config import KINDS, QuantConfig
from evolq_lite.convert import calibrate, quantize
from evolq_lite.data import load_demo
from evolq_lite.descent import descend
from evolq_lite.experiments.cells import Claim, Tables
from evolq_lite.experiments.plots import NAMES
from evolq_lite.experiments.results import Cell, Result, by, where
from evolq_lite.experiments.verdicts import Row, Verdict, decide
from evolq_lite.figures import MARKERS, PETROFF, Picture, new_figure
from evolq_lite.landscape import (
    direction,
    layer_objective,
    line,
    local_minima,
    noise_floor,
    other_ways,
)
from evolq_lite.objective import BlockObjective
from evolq_lite.rounding import freeze_integers
from evolq_lite.search import EvolQ, minimize

LAYERS = {"vit": ("attn.qkv", "attn.proj", "mlp.fc1"), "cnn": ("conv1", "conv2")}
BLOCK = {"vit": "blocks.2", "cnn": "layer2.0"}
FREE, FROZEN = "free", "frozen"
FLOAT = "float"
ACTIVATIONS = ("4", "6", "8", FLOAT)
IMAGES = (50, 200, 1000)
REACH = 1e-2  # of each scale, to both sides
METHODS = {"EvolQ": 1e-3, "Adam": 1e-3}  # relative widths


def cells(quick: bool) -> list[Cell]:
    """Lines through each layer for each kind of landscape, then a race on some of them."""
    layers = [(network, layer) for network, names in LAYERS.items() for layer in names]
    activations = ("8", FLOAT) if quick else ACTIVATIONS
    images = (20, 60) if quick else IMAGES
    sizes = {"weight_bits": 3, "lines": 2 if quick else 6, "points": 9 if quick else 41}
    lines = [
        {"look": "line", "network": network, "layer": layer, "integers": integers}
        | {"activations": bits, "images": n, "seed": 0, **sizes}
        for network, layer in (layers[:1] if quick else layers)
        for integers in (FREE, FROZEN)
        for bits in activations
        for n in images
    ]
    race = [
        {"look": method, "network": "vit", "layer": "attn.qkv", "integers": integers}
        | {"activations": bits, "images": images[-1], "seed": seed}
        | {"weight_bits": 3, "budget": 6 if quick else 120}
        for method in METHODS
        for integers in (FREE, FROZEN)
        for bits in ("8", FLOAT)
        for seed in ((0,) if quick else (0, 1, 2))
    ]
    return lines + race


def objective_of(cell: Cell) -> tuple[BlockObjective, Any]:
    """The fitness over one layer's weight scales, and how to make it anew for another network."""
    demo = load_demo(cell["network"], max(500, cell["images"]), cell["seed"])
    config = QuantConfig(cell["weight_bits"])
    if cell["activations"] == FLOAT:
        config = replace(config, float_points=",".join(k for k in KINDS if k != "weights"))
    else:
        config = replace(config, act_bits=int(cell["activations"]))
    qmodel = quantize(demo.model, config)
    calibrate(qmodel, demo.calibration, config)
    if cell["integers"] == FROZEN:
        freeze_integers(qmodel)
    make = partial(
        layer_objective,
        block=BLOCK[cell["network"]],
        layer=cell["layer"],
        images=demo.calibration[: cell["images"]],
        targets=demo.targets[: cell["images"]],
    )
    return make(qmodel), make


def run(cell: Cell) -> Result:
    """Lines with their noise floor, or a search."""
    objective, make = objective_of(cell)
    start = objective.start
    if cell["look"] != "line":
        return race(cell, objective)
    radii = torch.linspace(-REACH, REACH, cell["points"])
    ways = [objective, *other_ways(objective, make, chunks=(10,), last_bits=False)]
    points = torch.stack([start, start + REACH * direction(start, 90)])
    floor, _ = noise_floor(ways, points.abs())
    values = [
        line(objective, start, direction(start, seed), radii) for seed in range(cell["lines"])
    ]
    return {
        "roughness": [bend(row) for row in values],
        "minima": [local_minima(row, floor) for row in values],
        "range": [float(row.max() - row.min()) for row in values],
        "noise_floor": floor,
        "lines_values": [[round(v, 8) for v in row.tolist()] for row in values],
    }


def bend(values: Tensor) -> float:
    """Mean absolute second difference of values (n,) on a line."""
    return float(values.double().diff(n=2).abs().mean())


def race(cell: Cell, objective: BlockObjective) -> Result:
    """EvolQ or Adam on the layer's scales for `budget` forwards; the values before and after."""
    start, budget = objective.start, cell["budget"]
    before = float(objective(start[None])[0])
    step = METHODS[cell["look"]]
    if cell["look"] == "Adam":
        vector, _ = descend(objective, "adam", step, budget)
        after = min(before, float(objective(vector[None])[0]))
    else:
        search = EvolQ(start, before, step, seed=cell["seed"], relative=True)
        _, after = minimize(objective, search, budget)
    return {"before": before, "after": after}


def roughness_of(results: pd.DataFrame, **values: Any) -> list[float]:
    """The roughness of each line of the results with these values."""
    return [x for row in where(results, look="line", **values)["roughness"] for x in row]


def ratio(those: Sequence[float], than: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Geometric mean of the ratio, line by line, with its 95 % interval."""
    logs = np.log(np.maximum(those, 1e-12)) - np.log(np.maximum(than, 1e-12))
    half = 1.96 * stdev(logs) / len(logs) ** 0.5 if len(logs) > 1 else np.inf
    low, middle, high = np.exp([fmean(logs) - half, fmean(logs), fmean(logs) + half])
    return float(middle), (float(low), float(high))


def slope(results: pd.DataFrame) -> tuple[float, tuple[float, float]]:
    """The power of the number of images with which roughness falls, over lines, with its interval.

    Each line is compared with itself: its mean over numbers of images is taken out first.
    """
    found = where(results, look="line", integers=FREE, activations="8")
    xs, ys = [], []
    for _, mine in by(found, "network", "layer").items():
        logs = np.log(np.stack(mine["roughness"].to_list()))  # (numbers of images, lines)
        counts = np.log(mine["images"].to_numpy(float))[:, None]
        xs.append(np.broadcast_to(counts - counts.mean(), logs.shape).ravel())
        ys.append((logs - logs.mean(0)).ravel())
    fit = linregress(np.concatenate(xs), np.concatenate(ys))
    power, half = float(fit.slope), 1.96 * float(fit.stderr)
    return power, (power - half, power + half)


def figure(results: pd.DataFrame) -> Picture:
    """One line through four landscapes, and roughness against the number of images."""
    lines = where(results, look="line")
    few, network = lines["images"].min(), "vit"
    power, _ = slope(results)
    share, _ = ratio(*frozen_and_free(results, FLOAT))
    alt = (
        f"Left, one line through four landscapes: with 8-bit activations jagged, with float "
        f"activations and frozen integers smooth. Right, roughness falls as the number of images "
        f"to the power {power:.2f}. Freezing integers leaves {100 * share:.1f} % with float "
        f"activations."
    )
    picture = new_figure(11, 4.6, alt)
    parts: Any = picture.subfigures(1, 2, width_ratios=(3, 2))
    left, right = parts
    grid = left.subplots(2, 2, sharex=True, sharey=True)
    layer = LAYERS[network][0]
    for axes, (integers, bits) in zip(
        grid.flat, [(FREE, "8"), (FROZEN, "8"), (FREE, FLOAT), (FROZEN, FLOAT)]
    ):
        mine = where(lines, network=network, layer=layer, images=few)
        row = where(mine, integers=integers, activations=bits).iloc[0]
        radii = 100 * np.linspace(-REACH, REACH, int(row["points"]))
        values = np.array(row["lines_values"][0])
        axes.plot(radii, 1000 * (values - values.mean()), "o-", ms=2.5, lw=1, color=PETROFF[0])
        told = "float activations" if bits == FLOAT else f"{bits}-bit activations"
        axes.set_title(f"{told}, integers {integers}", fontsize="medium")
    for axes in grid[-1]:
        axes.set_xlabel("all scales of the layer moved by, %")
    left.suptitle(
        f"{NAMES[network]} {layer}, {few} images; integers are those of the weights",
        fontsize="medium",
    )
    left.supylabel("change of the loss, thousandths", fontsize="medium")
    axes = right.subplots()
    vit = where(lines, network=network, integers=FREE)
    for i, (bits, mine) in enumerate(by(vit, "activations").items()):
        means = {n: np.exp(np.log(np.concatenate(r.to_list())).mean()) for n, r in by_images(mine)}
        label = "float" if bits == FLOAT else f"{bits} bits"
        axes.loglog(
            list(means), list(means.values()), MARKERS[i] + "-", color=PETROFF[i], label=label
        )
    counts = np.array(sorted(lines["images"].unique()), float)
    top = max(roughness_of(vit, images=int(counts[0])))
    axes.loglog(counts, top * (counts / counts[0]) ** -0.5, "--", color="0.4", label="1/√images")
    axes.set(xlabel="calibration images", ylabel="roughness: mean |second difference|")
    axes.set_xticks(counts, [f"{n:.0f}" for n in counts])
    axes.minorticks_off()
    axes.legend(title="activations", fontsize="small")
    axes.set_title("ViT, integers free", fontsize="medium")
    return picture


def by_images(results: pd.DataFrame) -> list[tuple[int, pd.Series]]:
    """The roughness of lines by number of images."""
    return [(int(n), found["roughness"]) for n, found in by(results, "images").items()]


def frozen_and_free(results: pd.DataFrame, bits: str) -> tuple[list[float], list[float]]:
    """Roughness with frozen and with free integers, the same lines in the same order."""
    frozen = roughness_of(results, integers=FROZEN, activations=bits)
    return frozen, roughness_of(results, integers=FREE, activations=bits)


def verdict(results: pd.DataFrame) -> Verdict:
    """Do activations make it, do images average it away, is it smooth without both?"""
    both = roughness_of(results, integers=FREE, activations="8")
    kept, kept_interval = ratio(*frozen_and_free(results, "8"))
    weights, weights_interval = ratio(roughness_of(results, integers=FREE, activations=FLOAT), both)
    neither, neither_interval = ratio(
        roughness_of(results, integers=FROZEN, activations=FLOAT), both
    )
    power, power_interval = slope(results)
    share = "share of the roughness with free integers and 8-bit activations"
    rows = [
        Row(
            f"Integers frozen, 8-bit activations: {share}",
            kept,
            kept_interval,
            holds=kept > 0.5,
            unit="",
            form=".3f",
        ),
        Row(
            f"Integers free, float activations: {share}",
            weights,
            weights_interval,
            unit="",
            form=".3f",
        ),
        Row(
            f"Integers frozen, float activations: {share}",
            neither,
            neither_interval,
            holds=neither < 0.05,
            unit="",
            form=".4f",
        ),
        Row(
            "Roughness falls with the number of images to the power (independent flips: -0.5)",
            power,
            power_interval,
            holds=power_interval[0] <= -0.5 <= power_interval[1],
            unit="",
        ),
        *compare_races(results),
    ]
    return Verdict(
        decide([row.holds for row in rows]),
        f"On one block of each embedded network, rounding of activations alone keeps "
        f"{100 * kept:.0f} % of the jaggedness; without it and with frozen integers "
        f"{100 * neither:.1f} % are left.",
        tuple(rows),
    )


def compare_races(results: pd.DataFrame) -> list[Row]:
    """How much more Adam gains than EvolQ on each landscape."""
    rows = []
    for integers in (FREE, FROZEN):
        for bits in ("8", FLOAT):
            found = where(results, integers=integers, activations=bits)
            gains = {
                method: where(found, look=method)["before"] - where(found, look=method)["after"]
                for method in METHODS
            }
            told = "float activations" if bits == FLOAT else f"{bits}-bit activations"
            ahead = 1000 * float(gains["Adam"].mean() - gains["EvolQ"].mean())
            rows.append(
                Row(
                    f"Adam's gain in loss, minus EvolQ's: integers {integers}, {told}",
                    ahead,
                    holds=ahead > 0 if (integers, bits) == (FROZEN, FLOAT) else None,
                    unit="thousandths",
                    form="+.3f",
                )
            )
    return rows


def tables(results: pd.DataFrame) -> Tables:
    """Roughness and minima of every landscape, mean over lines."""
    rows = [
        {
            "layer": f"{NAMES[r['network']]} {r['layer']}",
            "integers": r["integers"],
            "activations": r["activations"],
            "images": r["images"],
            "roughness": f"{fmean(r['roughness']):.2g}",
            "range": f"{fmean(r['range']):.2g}",
            "minima per line": f"{fmean(r['minima']):.1f}",
            "noise floor": f"{r['noise_floor']:.1g}",
        }
        for _, r in where(results, look="line").iterrows()
    ]
    return {"Lines of 41 points through the first scales, 1 % to both sides": pd.DataFrame(rows)}


CLAIM = Claim(
    "C9",
    "Where does the jaggedness come from: weights, activations, or too few images?",
    cells,
    run,
    figure,
    verdict,
    tables,
)
