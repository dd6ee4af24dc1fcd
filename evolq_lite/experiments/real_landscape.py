"""R9 and R2: the landscapes of C9 and C2 in one block of trained ViT-Tiny and DeiT-Tiny.

Lines through the scales of each layer of a block, with weights' integers free or frozen and
activations in 8 bits or float, on few and on more calibration images: roughness and minima as in
C9. R9 asks whether activations make the jaggedness, R2 whether any of it is deeper than the noise.

So deep a network has another landscape on another machine: a last bit that differs flips a
rounding, and by the tenth block most images are no longer what they were. So every line is computed
again with other last bits. The noise floor is how far the two differ in shape, and R9 asks how much
of the jumps they have in common.

Networks and photographs are not in this repo: give their folders. Every forward of a line runs the
network from the block on, so a late block is taken. No test image is read.
"""

from functools import lru_cache
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from evolq_lite.convert import twin
from evolq_lite.data import Demo
from evolq_lite.experiments.c2_landscape import (
    SEVERAL,
    count_layers,
    difference,
    draw_layer,
    has_several,
    interval,
    label_layers,
)
from evolq_lite.experiments.c9_origin import (
    FLOAT,
    FREE,
    FROZEN,
    OTHER,
    REACH,
    SOURCES,
    describe_lines,
    draw_landscapes,
    landscape_of,
    lines_of,
    quantize_for,
    ratio,
    roughness_of,
    tell_lines,
)
from evolq_lite.experiments.cells import Claim, Tables
from evolq_lite.experiments.real_cells import NETWORKS, Place, source_of
from evolq_lite.experiments.results import Cell, Result, by, where
from evolq_lite.experiments.verdicts import Row, Verdict, count_seeds, decide
from evolq_lite.figures import MARKERS, PETROFF, Picture, new_figure
from evolq_lite.landscape import inputs_by_another_kernel, local_minima, noise_of_lines
from evolq_lite.runs.environment import device_here, tell_device

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
BLOCK = "blocks.9"  # of twelve
CALIBRATION = 500  # images
FEW, MORE = 100, 500
COMPUTED = {"lines_values": "as it is", "again": "other last bits before the block"}
SEEDS = (0, 1, 2)


def cells(quick: bool) -> list[Cell]:
    """Every layer of a block and each landscape of it, few images first; nothing of it is quick."""
    if quick:
        return []
    return [
        {"look": "line", "network": network, "layer": layer, "integers": integers}
        | {"activations": bits, "images": images, "seed": seed}
        | {"weight_bits": 3, "lines": 3, "points": 21}
        for images in (FEW, MORE)
        for seed in SEEDS
        for network in NETWORKS
        for bits in ("8", FLOAT)
        for layer in LAYERS
        for integers in (FREE, FROZEN)
    ]


def stage_of(cell: Cell) -> int:
    """Seeds are shown one after another, on few images and then on more."""
    return int(cell["seed"]) + len(SEEDS) * (cell["images"] > FEW)


def run(cell: Cell, place: Place) -> Result:
    """Lines, the same with other last bits before the block, and how far they agree."""
    options = (cell[key] for key in ("network", "seed", "activations", "weight_bits"))
    demo, qmodel = start_from(*options, place)
    objective, make = landscape_of(twin(qmodel), demo, BLOCK, cell)
    inputs = inputs_by_another_kernel(objective, demo.calibration[: cell["images"]])
    other = make(objective.chain.model, inputs=inputs)
    lines, again = lines_of(objective, cell), lines_of(other, cell)
    floor, agreement = noise_of_lines(lines, again)
    return {
        **describe_lines(lines, floor),
        "again": tell_lines(again),
        "agreement": agreement.tolist(),
        "device": tell_device(inputs[0].device),
    }


@lru_cache(maxsize=1)  # the calibrated network that neighboring cells share; it is to be copied
def start_from(
    network: str, seed: int, activations: str, weight_bits: int, place: Place
) -> tuple[Demo, nn.Module]:
    """A network with its calibration photographs, and its quantized form."""
    cell = {"network": network, "seed": seed, "activations": activations}
    model, images, targets = source_of(cell, place, CALIBRATION).load(
        device=device_here(place.device)
    )
    demo = Demo(network, model, images, targets)
    return demo, quantize_for(demo, {**cell, "weight_bits": weight_bits})


def name_of(result: pd.Series) -> str:
    """A layer of a network."""
    return f"{NETWORKS[result['network']]} {result['layer']}"


def figure(results: pd.DataFrame) -> Picture:
    """One line through four landscapes in two computations; roughness of every layer."""
    shown = best_known(results)
    shares = {name: share_of(results, name)[0] for name in SOURCES if name != "both"}
    told = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
    alt = (
        "Left, one line through four landscapes, computed twice with other last bits: correlation "
        f"of the jumps {agreement_of(results)[0]:.2f} if both jump. Right, the roughness of "
        f"{shown.groupby(['network', 'layer']).ngroups} layers: {told} of it."
    )
    picture = new_figure(11, 4.8, alt)
    parts: Any = picture.subfigures(1, 2, width_ratios=(3, 2))
    draw_twice(parts[0], where(shown, seed=shown["seed"].min()))
    draw_layers(parts[1], shown)
    return picture


def draw_twice(part: Any, results: pd.DataFrame) -> None:
    """The first line through the first layer of DeiT-Tiny for each source of jumps."""
    network, layer = list(NETWORKS)[-1], LAYERS[0]
    shown = where(results, network=network, layer=layer)
    title = f"{NETWORKS[network]} {layer}, {shown['images'].iloc[0]} images, 3-bit weights"
    draw_landscapes(part, shown, COMPUTED, title)
    labels = part.axes[0].get_legend_handles_labels()
    part.legend(*labels, loc="outside lower center", ncols=len(COMPUTED))


def draw_layers(part: Any, results: pd.DataFrame) -> None:
    """Mean roughness of each layer, a marker for each source of jumps."""
    names = list(dict.fromkeys(name_of(r) for _, r in results.iterrows()))
    axes = part.subplots()
    for i, (source, (integers, bits)) in enumerate(SOURCES.items()):
        mine = where(results, integers=integers, activations=bits)
        groups: dict[str, list[float]] = {name: [] for name in names}
        for _, row in mine.iterrows():
            groups[name_of(row)] += row["roughness"]
        means = [1000 * fmean(groups[name]) for name in names]
        axes.plot(means, range(len(names)), MARKERS[i], color=PETROFF[i], label=source)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("roughness, thousandths")
    axes.set_title("all lines, mean |second difference|", fontsize="medium")
    part.legend(loc="outside lower center", ncols=2)


def share_of(
    results: pd.DataFrame, source: str, **values: object
) -> tuple[float, tuple[float, float]]:
    """How much of the roughness with both sources stays with this one, line by line."""
    integers, bits = SOURCES[source]
    mine = roughness_of(results, integers=integers, activations=bits, **values)
    return ratio(mine, roughness_of(results, integers=FREE, activations="8", **values))


def agreement_of(
    results: pd.DataFrame, source: str = "both", **values: object
) -> tuple[float, tuple[float, float]]:
    """Mean correlation of the jumps of two computations of a line, with its interval over lines."""
    integers, bits = SOURCES[source]
    found = where(results, integers=integers, activations=bits, **values)
    each = [x for row in found["agreement"] for x in row]
    return fmean(each), interval(each)


def kept_of(results: pd.DataFrame, **values: object) -> tuple[float, tuple[float, float]]:
    """Of what the lowest point of a line gains over the line's mean, the share that is left of it
    with other last bits, as the network is quantized; with its interval, by drawing lines.

    Each computation chooses once, and the other judges.
    """
    found = where(results, integers=FREE, activations="8", **values)
    lines, again = (np.concatenate([np.array(x) for x in found[key]]) for key in COMPUTED)
    gained, kept = np.zeros(len(lines)), np.zeros(len(lines))
    for chooses, judges in ((lines, again), (again, lines)):
        lowest = chooses.argmin(1)[:, None]
        gained += chooses.mean(1) - np.take_along_axis(chooses, lowest, 1)[:, 0]
        kept += judges.mean(1) - np.take_along_axis(judges, lowest, 1)[:, 0]
    drawn = np.random.default_rng(0).integers(len(lines), size=(2000, len(lines)))
    low, high = np.quantile(kept[drawn].sum(1) / gained[drawn].sum(1), (0.025, 0.975))
    return float(kept.sum() / gained.sum()), (float(low), float(high))


def verdict(results: pd.DataFrame) -> Verdict:
    """Do activations make most of it, and is it smooth without both, on each network?"""
    rows = []
    for network, name in NETWORKS.items():
        for source in ("activations only", OTHER, "neither"):
            share, ends = share_of(results, source, network=network)
            holds = {"activations only": share > 0.5, "neither": share < 0.05}.get(source)
            label = f"{name}, {source}: share of the roughness with both"
            form = ".4f" if source == "neither" else ".3f"
            rows.append(Row(label, share, ends, holds=holds, unit="", form=form))
        for source in SOURCES:
            mean, ends = agreement_of(results, source, network=network)
            label = f"{name}, {source}: correlation of the jumps, with other last bits"
            rows.append(Row(label, mean, ends, unit=""))
        share, ends = kept_of(results, network=network)
        label = f"{name}, both: left of the gain of a line's lowest point, with other last bits"
        rows.append(Row(label, share, ends, unit="", form=".2f"))
    makes, keeps = (
        " and ".join(f"{100 * share_of(results, source, network=n)[0]:.0f}" for n in NETWORKS)
        for source in ("activations only", OTHER)
    )
    names = " and ".join(NETWORKS.values())
    return Verdict(
        decide(row.holds for row in rows),
        f"In one block of {names} ({scope_of(results)}), activations alone make {makes} % of the "
        f"jaggedness, weights' integers alone {keeps} %.",
        tuple(rows),
    )


def cells_of_layers(quick: bool) -> list[Cell]:
    """The cells with the network as it is quantized."""
    return [cell for cell in cells(quick) if (cell["integers"], cell["activations"]) == (FREE, "8")]


def best_known(results: pd.DataFrame) -> pd.DataFrame:
    """The results with one number of images: that with most seeds, and of these the largest."""
    seeds = results.groupby("images")["seed"].nunique()
    return where(results, images=seeds[seeds == seeds.max()].index.max())


def scope_of(results: pd.DataFrame) -> str:
    """What a verdict rests on."""
    images = " and ".join(map(str, sorted(results["images"].unique())))
    return f"{count_seeds(results)}, {images} photographs, W3A8"


def layers_of(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The cells of each layer as the network is quantized, by its name: `best_known`."""
    shown = best_known(where(results, integers=FREE, activations="8"))
    return {name_of(mine.iloc[0]): mine for mine in by(shown, "network", "layer").values()}


def noise_of(results: pd.DataFrame) -> dict[str, float]:
    """The noise beside each layer: the largest of its network's.

    A layer with a lower floor than others would have more minima for that reason alone.
    """
    layers = layers_of(results)
    networks = pd.concat(layers.values()).groupby("network")["noise_floor"].max()
    return {name: float(networks[mine["network"].iloc[0]]) for name, mine in layers.items()}


def count_minima(results: pd.DataFrame, above_noise: bool = True) -> dict[str, list[int]]:
    """Minima of each line by layer: all of them, or those that are deeper than the noise."""
    floors = noise_of(results)
    return {
        name: [
            local_minima(torch.tensor(line), floors[name] if above_noise else 0.0)
            for lines in mine["lines_values"]
            for line in lines
        ]
        for name, mine in layers_of(results).items()
    }


def verdict_on_layers(results: pd.DataFrame) -> Verdict:
    """Is every layer jagged beyond the noise, as C2 asks? And attention more than the MLP?

    Without a floor, white noise is jagged too, so that counts for nothing.
    """
    every, deep = count_minima(results, above_noise=False), count_minima(results)
    jagged, beyond = has_several(every), has_several(deep)
    rows = [
        count_layers(f"{SEVERAL.capitalize()}, deeper than the noise", beyond, all(beyond)),
        count_layers(f"{SEVERAL.capitalize()}, however flat", jagged),
    ]
    for network in NETWORKS.values():
        attention, mlp = (join(every, f"{network} {part}") for part in ("attn", "mlp"))
        label = f"{network}'s attention (qkv, proj), over its MLP (fc1, fc2), however flat"
        rows.append(difference(label, attention, mlp))
    return Verdict(
        decide(row.holds for row in rows),
        f"In one block of two trained networks ({scope_of(best_known(results))}), {sum(beyond)} of "
        f"{len(beyond)} layers have several minima per line that are deeper than what other last "
        f"bits change.",
        tuple(rows),
    )


def figure_of_layers(results: pd.DataFrame) -> Picture:
    """Lines through every layer, above the noise of its network."""
    found, floors, counts = layers_of(results), noise_of(results), count_minima(results)
    alt = (
        f"Change of the loss along lines through the first scales of {len(found)} layers of "
        f"trained networks, 1 % to both sides, above a band as wide as the noise: "
        f"{max(fmean(n) for n in counts.values()):.1f} minima per line are deeper, at most."
    )
    picture = new_figure(14.4, 5.8, alt)
    grid = picture.subplots(2, -(-len(found) // 2), squeeze=False, sharex=True, sharey="row")
    for axes, (name, mine) in zip(grid.flat, found.items()):
        lines = [np.array(line) for row in mine["lines_values"] for line in row]
        changes = [line - line.mean() for line in lines]
        draw_layer(axes, name, REACH, changes, floors[name])
    label_layers(picture, grid)
    return picture


def tables_of_layers(results: pd.DataFrame) -> Tables:
    """Minima and range of the lines of each layer."""
    every, deep = count_minima(results, above_noise=False), count_minima(results)
    floors = noise_of(results)
    rows = []
    for name, mine in layers_of(results).items():
        ranges = [np.ptp(line) for row in mine["lines_values"] for line in row]
        rows.append(
            {
                "layer": name,
                "lines": len(ranges),
                "range of a line": f"{fmean(ranges):.2g}",
                "noise floor of the network": f"{floors[name]:.2g}",
                "minima per line": f"{fmean(every[name]):.1f}",
                "deeper than the noise": f"{fmean(deep[name]):.1f}",
            }
        )
    points = int(results["points"].iloc[0])
    white = f"{(points - 2) / 3:.1f}"  # each inner point is the lowest of three
    title = f"Lines of {points} points, 1 % to both sides (white noise has {white} minima per line)"
    return {title: pd.DataFrame(rows)}


def join(counts: dict[str, list[int]], start: str) -> list[int]:
    """The counts of all layers whose name begins so."""
    return [n for name, found in counts.items() if name.startswith(start) for n in found]


def tables(results: pd.DataFrame) -> Tables:
    """Roughness and minima of every landscape, mean over lines and seeds."""
    keys = ["network", "layer", "integers", "activations", "images"]
    rows = []
    for (network, layer, integers, bits, images), found in results.groupby(keys, sort=False):
        rough, minima, agreement = (
            fmean(x for row in found[key] for x in row)
            for key in ("roughness", "minima", "agreement")
        )
        rows.append(
            {
                "layer": f"{NETWORKS[network]} {layer}",
                "integers": integers,
                "activations": bits,
                "images": images,
                "roughness": f"{rough:.2g}",
                "noise floor": f"{found['noise_floor'].max():.1g}",
                "minima deeper than it, per line": f"{minima:.1f}",
                "correlation with other last bits": f"{agreement:.2f}",
            }
        )
    return {f"Lines through the first scales of {BLOCK}, 1 % to both sides": pd.DataFrame(rows)}


CLAIM = Claim(
    "R9",
    "Do activations make the jaggedness of trained ViT-Tiny and DeiT-Tiny?",
    cells,
    run,
    figure,
    verdict,
    tables,
    stage=stage_of,
    note="With other last bits few of these bumps are where they were (*correlation* in the table; "
    "R2), except where activations are in float.",
)
LAYERS_CLAIM = Claim(
    "R2",
    "Is the loss over the scales of trained ViT-Tiny and DeiT-Tiny jagged, in attention most?",
    cells_of_layers,
    run,
    figure_of_layers,
    verdict_on_layers,
    tables_of_layers,
    stage=stage_of,
    note="This is with 8-bit activations. With activations in float, the bumps of weights' "
    "integers are the same in both computations, and several per line are deeper than the noise "
    "(R9).",
    reads="R9",
)
