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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import linregress
from torch import Tensor, nn

from evolq_lite.config import KINDS, QuantConfig
from evolq_lite.convert import calibrate, quantize
from evolq_lite.data import Demo, load_demo
from evolq_lite.descent import descend
from evolq_lite.experiments.cells import Claim, Tables
from evolq_lite.experiments.plots import NAMES
from evolq_lite.experiments.results import Cell, Result, by, where
from evolq_lite.experiments.verdicts import Row, Verdict, decide
from evolq_lite.figures import MARKERS, PETROFF, Picture, new_figure
from evolq_lite.landscape import (
    direction,
    layer_objective,
    local_minima,
    noise_floor,
    other_ways,
    random_lines,
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
OTHER = "weights' integers only"
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


def quantize_for(demo: Demo, cell: Cell) -> nn.Module:
    """The demo's network with the cell's activations, calibrated."""
    config = QuantConfig(cell["weight_bits"])
    if cell["activations"] == FLOAT:
        config = replace(config, float_points=",".join(k for k in KINDS if k != "weights"))
    else:
        config = replace(config, act_bits=int(cell["activations"]))
    qmodel = quantize(demo.model, config)
    calibrate(qmodel, demo.calibration, config)
    return qmodel


def landscape_of(
    qmodel: nn.Module, demo: Demo, block: str, cell: Cell
) -> tuple[BlockObjective, Callable[..., BlockObjective]]:
    """The fitness over one layer's weight scales, and how to make it anew for another network."""
    if cell["integers"] == FROZEN:
        freeze_integers(qmodel)
    make = partial(
        layer_objective,
        block=block,
        layer=cell["layer"],
        images=demo.calibration[: cell["images"]],
        targets=demo.targets[: cell["images"]],
    )
    return make(qmodel), make


def run(cell: Cell) -> Result:
    """Lines with their noise floor, or a search."""
    demo = load_demo(cell["network"], max(500, cell["images"]), cell["seed"])
    objective, make = landscape_of(quantize_for(demo, cell), demo, BLOCK[cell["network"]], cell)
    return measure_lines(cell, objective, make) if cell["look"] == "line" else race(cell, objective)


def measure_lines(
    cell: Cell, objective: BlockObjective, make: Callable[..., BlockObjective]
) -> Result:
    """The values on lines through the start, how rough they are, and the noise floor."""
    start = objective.start
    ways = [objective, *other_ways(objective, make, chunks=(10,), last_bits=False)]
    points = torch.stack([start, start + REACH * direction(start, 90)])
    floor, _ = noise_floor(ways, points.abs())
    return describe_lines(lines_of(objective, cell), floor)


def lines_of(objective: BlockObjective, cell: Cell) -> Tensor:
    """The values on lines through the start (lines, points)."""
    return random_lines(objective, objective.start, REACH, cell["lines"], cell["points"])


def describe_lines(values: Tensor, floor: float) -> Result:
    """Lines (lines, points), how rough they are, and their minima above a noise floor."""
    return {
        "roughness": [bend(row) for row in values],
        "minima": [local_minima(row, floor) for row in values],
        "range": [float(row.max() - row.min()) for row in values],
        "noise_floor": floor,
        "lines_values": tell_lines(values),
    }


def tell_lines(values: Tensor) -> list[list[float]]:
    """Lines as a file keeps them."""
    return [[round(v, 8) for v in row] for row in values.tolist()]


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


def slope(
    results: pd.DataFrame, integers: str, activations: str
) -> tuple[float, tuple[float, float]]:
    """The power of the number of images with which roughness falls, over lines, with its interval.

    Each line is compared with itself: its mean over numbers of images is taken out first.
    """
    found = where(results, look="line", integers=integers, activations=activations)
    xs, ys, lines = [], [], 0
    for _, mine in by(found, "network", "layer").items():
        logs = np.log(np.stack(mine["roughness"].to_list()))  # (numbers of images, lines)
        counts = np.log(mine["images"].to_numpy(float))[:, None]
        xs.append(np.broadcast_to(counts - counts.mean(), logs.shape).ravel())
        ys.append((logs - logs.mean(0)).ravel())
        lines += logs.shape[1]
    x, y = np.concatenate(xs), np.concatenate(ys)
    fit = linregress(x, y)
    free = len(x) - lines - 1  # each mean that was taken out costs a degree of freedom
    half = 1.96 * float(fit.stderr) * ((len(x) - 2) / free) ** 0.5
    power = float(fit.slope)
    return power, (power - half, power + half)


SOURCES = {  # what may jump: integers, activations
    "both": (FREE, "8"),
    "activations only": (FROZEN, "8"),
    OTHER: (FREE, FLOAT),
    "neither": (FROZEN, FLOAT),
}


def slopes_of(results: pd.DataFrame) -> dict[str, tuple[float, tuple[float, float]]]:
    """The power of images for each source of jumps; where nothing jumps there is none."""
    return {name: slope(results, *how) for name, how in SOURCES.items() if name != "neither"}


def figure(results: pd.DataFrame) -> Picture:
    """One line through four landscapes, and roughness against the number of images."""
    lines = where(results, look="line")
    powers = {name: power for name, (power, _) in slopes_of(results).items()}
    share, _ = ratio(roughness_of(results, integers=FROZEN, activations=FLOAT), both_of(results))
    alt = (
        f"Left, one line through four landscapes; where neither integers nor activations jump it "
        f"is smooth ({100 * share:.1f} % of the roughness). Right, roughness falls as images to "
        f"the power {powers['activations only']:.2f} if only activations jump, "
        f"{powers[OTHER]:.2f} if only integers."
    )
    picture = new_figure(11, 4.6, alt)
    parts: Any = picture.subfigures(1, 2, width_ratios=(3, 2))
    draw_lines(parts[0], lines)
    draw_sources(parts[1], lines, powers)
    return picture


def draw_lines(part: Any, lines: pd.DataFrame) -> None:
    """The first line through a layer of the ViT for each source of jumps, on few images."""
    few, layer = lines["images"].min(), LAYERS["vit"][0]
    shown = where(lines, network="vit", layer=layer, images=few)
    title = f"{NAMES['vit']} {layer}, {few} images, 3-bit weights"
    draw_landscapes(part, shown, {"lines_values": ""}, title)


def draw_landscapes(
    part: Any, results: pd.DataFrame, computed: Mapping[str, str], title: str
) -> None:
    """The first line of a layer for each source of jumps, as often as it was computed.

    `computed` holds columns of lines, each with its name in the legend.
    """
    grid = part.subplots(2, 2, sharex=True, sharey=True)
    for axes, (name, (integers, bits)) in zip(grid.flat, SOURCES.items()):
        row = where(results, integers=integers, activations=bits).iloc[0]
        for i, (column, label) in enumerate(computed.items()):
            values = 1000 * np.array(row[column][0])
            radii = 100 * np.linspace(-REACH, REACH, len(values))
            # The last is the thinnest: where they agree, all are to be seen.
            last = i == len(computed) - 1
            style = {"color": PETROFF[i], "ms": 2.5 if last else 5, "lw": 1 if last else 2}
            form = MARKERS[i] + ("--" if i else "-")
            axes.plot(radii, values - values.mean(), form, label=label, **style)
        axes.set_title(f"what jumps: {name}", fontsize="medium")
    for axes in grid[-1]:
        axes.set_xlabel("all scales of the layer moved by, %")
    part.suptitle(title, fontsize="medium")
    part.supylabel("change of the loss, thousandths", fontsize="medium")


def draw_sources(part: Any, lines: pd.DataFrame, powers: Mapping[str, float]) -> None:
    """Roughness against the number of images, geometric mean over all lines."""
    axes = part.subplots()
    counts = np.array(sorted(lines["images"].unique()), float)
    for i, (name, power) in enumerate(powers.items()):
        integers, bits = SOURCES[name]
        means = [
            np.exp(
                np.log(roughness_of(lines, integers=integers, activations=bits, images=n)).mean()
            )
            for n in counts.astype(int)
        ]
        style = {"color": PETROFF[i], "label": f"{name}: power {power:.2f}"}
        axes.loglog(counts, 1000 * np.array(means), MARKERS[i] + "-", **style)
        if i == 0:
            top = 1000 * means[0]
    axes.loglog(counts, top * (counts / counts[0]) ** -0.5, "--", color="0.4", label="1/√images")
    axes.set(xlabel="calibration images", ylabel="roughness, thousandths")
    axes.set_xticks(counts, [f"{n:.0f}" for n in counts])
    axes.minorticks_off()
    ticks = [0.1, 0.2, 0.5, 1, 2]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(0.09, 2.5)
    axes.legend(loc="lower left", fontsize="small")
    axes.set_title("all layers, mean |second difference|", fontsize="medium")


def both_of(results: pd.DataFrame) -> list[float]:
    """The roughness where integers and 8-bit activations may jump."""
    return roughness_of(results, integers=FREE, activations="8")


def verdict(results: pd.DataFrame) -> Verdict:
    """Do activations make it, do images average it away, is it smooth without both?"""
    powers = slopes_of(results)
    shares = {
        NAMES[network]: {
            name: ratio(roughness_of(mine, integers=integers, activations=bits), both_of(mine))
            for name, (integers, bits) in SOURCES.items()
        }
        for network, mine in by(results, "network").items()
    }
    rows = [
        *(
            Row(
                f"{network}, {name}: share of the roughness with both",
                share,
                ends,
                holds={"activations only": share > 0.5, "neither": share < 0.05}.get(name),
                unit="",
                form=".4f" if name == "neither" else ".3f",
            )
            for network, found in shares.items()
            for name, (share, ends) in found.items()
            if name != "both"
        ),
        *(
            Row(
                f"Roughness as images to the power (own flips: -0.5), what jumps: {name}",
                power,
                interval,
                holds=interval[0] <= -0.5 <= interval[1] if name != OTHER else None,
                unit="",
            )
            for name, (power, interval) in powers.items()
        ),
        *compare_races(results),
    ]
    makes, keeps = (
        " and ".join(f"{100 * found[source][0]:.0f}" for found in shares.values())
        for source in ("activations only", OTHER)
    )
    return Verdict(
        decide([row.holds for row in rows]),
        f"In one block of the embedded {' and '.join(shares)} (one seed), activations alone make "
        f"{makes} % of the jaggedness, weights' integers alone {keeps} %.",
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
    "Do activations make the jaggedness, and do more images average it away?",
    cells,
    run,
    figure,
    verdict,
    tables,
    real="R9",
    note="In its race, EvolQ and Adam both have steps of 0.001 of each scale, which are short: for "
    "the whole network C3 chooses steps thirty times as long for Adam.",
)
