"""R9 and R2: the landscapes of C9 and C2 in one block of trained ViT-Tiny and DeiT-Tiny.

Lines through the scales of each layer of a block, with weights' integers free or frozen and
activations in 8 bits or float, on few and on more calibration images: roughness, minima, and the
noise floor beside them, measured as in C9. R9 asks where the jaggedness comes from, R2 whether
there is any, and more in attention than in the MLP.

Networks and photographs are not in this repo: give their folders. Every forward of a line runs the
network from the block on, so a late block is taken. No test image is read.
"""

from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean

import pandas as pd
import torch
from torch import nn

from evolq_lite.convert import twin
from evolq_lite.data import Demo
from evolq_lite.experiments.c2_landscape import count_layers, difference, interval, welch
from evolq_lite.experiments.c9_origin import (
    FLOAT,
    FREE,
    FROZEN,
    OTHER,
    SOURCES,
    landscape_of,
    measure_lines,
    quantize_for,
    ratio,
    roughness_of,
)
from evolq_lite.experiments.cells import Claim, Tables
from evolq_lite.experiments.real_cells import NETWORKS, Place, source_of
from evolq_lite.experiments.results import Cell, Result, where
from evolq_lite.experiments.verdicts import Row, Verdict, count_seeds, decide
from evolq_lite.figures import MARKERS, PETROFF, Picture, new_figure
from evolq_lite.landscape import local_minima
from evolq_lite.runs.environment import device_here

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
BLOCK = "blocks.9"  # of twelve
CALIBRATION = 500  # images
FEW, MORE = 100, 500


def cells(quick: bool) -> list[Cell]:
    """Every layer of a block and each landscape of it; nothing of it is quick."""
    if quick:
        return []
    return [
        {"look": "line", "network": network, "layer": layer, "integers": integers}
        | {"activations": bits, "images": images, "seed": seed}
        | {"weight_bits": 3, "lines": 3, "points": 21}
        for seed in (0, 1, 2)
        for network in NETWORKS
        for bits in ("8", FLOAT)
        for layer in LAYERS
        for integers in (FREE, FROZEN)
        for images in (FEW, MORE)
    ]


def stage_of(cell: Cell) -> int:
    """Seeds are shown one after another."""
    return int(cell["seed"])


def run(cell: Cell, place: Place) -> Result:
    """Lines with their noise floor."""
    options = (cell[key] for key in ("network", "seed", "activations", "weight_bits"))
    demo, qmodel = start_from(*options, place)
    return measure_lines(cell, *landscape_of(twin(qmodel), demo, BLOCK, cell))


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
    """Roughness of each layer on the most images, a marker for each source of jumps."""
    shown = where(results, images=results["images"].max())
    names = list(dict.fromkeys(name_of(r) for _, r in shown.iterrows()))
    shares = {name: share_of(results, name) for name in SOURCES if name != "both"}
    told = ", ".join(f"{name} {100 * middle:.1f} %" for name, (middle, _) in shares.items())
    alt = (
        f"Roughness of {len(names)} layers of two trained networks, a marker for each source of "
        f"jumps. Of the roughness with both sources stays: {told}."
    )
    picture = new_figure(7.5, 0.4 * len(names) + 1.4, alt)
    axes = picture.subplots()
    for i, (source, (integers, bits)) in enumerate(SOURCES.items()):
        mine = where(shown, integers=integers, activations=bits)
        groups: dict[str, list[float]] = {name: [] for name in names}
        for _, row in mine.iterrows():
            groups[name_of(row)] += row["roughness"]
        means = [1000 * fmean(groups[name]) for name in names]
        axes.plot(means, range(len(names)), MARKERS[i], color=PETROFF[i], label=source)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("roughness (mean |second difference|), thousandths (log)")
    axes.set_title("What jumps, in one block of each network", fontsize="medium")
    picture.legend(loc="outside lower center", ncols=len(SOURCES))
    return picture


def share_of(
    results: pd.DataFrame, source: str, **values: object
) -> tuple[float, tuple[float, float]]:
    """How much of the roughness with both sources stays with this one, line by line."""
    integers, bits = SOURCES[source]
    mine = roughness_of(results, integers=integers, activations=bits, **values)
    return ratio(mine, roughness_of(results, integers=FREE, activations="8", **values))


def verdict(results: pd.DataFrame) -> Verdict:
    """Do activations make most of it, and is it smooth without both, on each network?"""
    rows = []
    for network, name in NETWORKS.items():
        for source in ("activations only", OTHER, "neither"):
            share, ends = share_of(results, source, network=network)
            holds = {"activations only": share > 0.5, "neither": share < 0.05}.get(source)
            label = f"{name}, {source}: share of the roughness with both"
            rows.append(Row(label, share, ends, holds=holds, unit="", form=".3f"))
    makes, keeps, neither = (
        share_of(results, source)[0] for source in ("activations only", OTHER, "neither")
    )
    return Verdict(
        decide(row.holds for row in rows),
        f"In one block of two trained networks ({count_seeds(results)}), activations alone make "
        f"{100 * makes:.0f} % of the jaggedness, weights' integers {100 * keeps:.0f} %, neither "
        f"{100 * neither:.1f} %.",
        tuple(rows),
    )


def count_minima(results: pd.DataFrame) -> dict[str, list[int]]:
    """Minima of each line by layer, on the most images, as the network is quantized.

    The largest noise floor counts for all, because under a lower one a layer has more minima.
    """
    shown = where(results, integers=FREE, activations="8", images=results["images"].max())

    counts: dict[str, list[int]] = {}
    for _, row in shown.iterrows():
        counts.setdefault(name_of(row), []).extend(
            local_minima(torch.tensor(values), shown["noise_floor"].max())
            for values in row["lines_values"]
        )
    return counts


def verdict_on_layers(results: pd.DataFrame) -> Verdict:
    """Is every layer jagged, and attention more than the MLP?"""
    minima = count_minima(results)
    jagged = [interval(counts)[0] > 1 for counts in minima.values()]  # a bowl has one minimum
    rows = [count_layers("Trained networks'", jagged, holds=all(jagged))]
    rugged: list[bool] = []
    for network in NETWORKS.values():
        attention, mlp = (join(minima, f"{network} {part}") for part in ("attn", "mlp"))
        rugged.append(fmean(attention) > fmean(mlp) and welch(attention, mlp) < 0.05)
        label = f"{network}: attention (qkv, proj), over MLP (fc1, fc2)"
        rows.append(difference(label, attention, mlp, rugged[-1]))
    return Verdict(
        decide(row.holds for row in rows),
        f"In one block of two trained networks ({count_seeds(results)}), {sum(jagged)} of "
        f"{len(jagged)} layers are jagged; attention is significantly worse than the MLP in "
        f"{sum(rugged)} of {len(rugged)}.",
        tuple(rows),
    )


def join(counts: dict[str, list[int]], start: str) -> list[int]:
    """The counts of all layers whose name begins so."""
    return [n for name, found in counts.items() if name.startswith(start) for n in found]


def tables(results: pd.DataFrame) -> Tables:
    """Roughness and minima of every landscape, mean over lines and seeds."""
    keys = ["network", "layer", "integers", "activations", "images"]
    rows = []
    for (network, layer, integers, bits, images), found in results.groupby(keys, sort=False):
        rough: Sequence[float] = [x for row in found["roughness"] for x in row]
        rows.append(
            {
                "layer": f"{NETWORKS[network]} {layer}",
                "integers": integers,
                "activations": bits,
                "images": images,
                "roughness": f"{fmean(rough):.2g}",
                "minima per line": f"{fmean(n for row in found['minima'] for n in row):.1f}",
                "noise floor": f"{found['noise_floor'].max():.1g}",
            }
        )
    return {f"Lines through the first scales of {BLOCK}, 1 % to both sides": pd.DataFrame(rows)}


CLAIM = Claim(
    "R9",
    "Where does the jaggedness of trained ViT-Tiny and DeiT-Tiny come from?",
    cells,
    run,
    figure,
    verdict,
    tables,
    stage=stage_of,
)
LAYERS_CLAIM = Claim(
    "R2",
    "Is the loss over the scales of trained ViT-Tiny and DeiT-Tiny jagged, in attention most?",
    cells,
    run,
    figure,
    verdict_on_layers,
    stage=stage_of,
    reads="R9",
)
