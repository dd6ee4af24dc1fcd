"""C2: is the loss over the scales jagged, more in ViTs than in CNNs, in attention than in MLPs?

Roughness of one layer's weight scales, beside the noise floor of the same objective: the largest
difference between the same network computed in other chunks, image by image, and by another
execution. "Rugged" is measured in two ways, which need not agree: how many minima a line has, and
how much the value changes from the first scales to a line's ends. Probes on test images (loss,
error) are for looking only; nothing is chosen by them.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean as mean
from statistics import stdev
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from scipy.stats import t, ttest_ind
from torch import Tensor, nn

from evolq_lite.chain import chain_of
from evolq_lite.config import QuantConfig
from evolq_lite.experiments.cells import Claim, Tables
from evolq_lite.experiments.plots import NAMES
from evolq_lite.experiments.results import Cell, Result, where
from evolq_lite.experiments.setup import Setting, load_test, prepare
from evolq_lite.experiments.verdicts import UNDECIDED, Row, Verdict, decide
from evolq_lite.figures import PETROFF, Picture, new_figure
from evolq_lite.fitness import Fitness, info_nce
from evolq_lite.genome import genome_of
from evolq_lite.landscape import direction, local_minima, noise_floor, other_ways, roughness
from evolq_lite.objective import BlockObjective

LAYERS = {
    "vit": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "cnn": ("conv1", "conv2"),
}
BLOCK = {"vit": "blocks.2", "cnn": "layer2.0"}
STEPS = (("relative", 1e-3), ("relative", 1e-2), ("relative", 5e-2), ("absolute", 1e-3))
FEW, MANY = 100, 500  # calibration images
QUICK = [("relative", 1e-2, "fitness", 40)]


def test_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy against one-hot labels: a probe, not a fitness."""
    return F.cross_entropy(outputs, labels)


def test_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Share of wrong images against one-hot labels: a probe, not a fitness."""
    return (outputs.argmax(1) != labels.argmax(1)).float().mean()


SEVERAL = "layers with several minima per line"
PROBES: dict[str, Fitness] = {"fitness": info_nce, "test loss": test_loss, "test error": test_error}


def cells(quick: bool) -> list[Cell]:
    """Every layer and step on few images; more images and the test probes at some of the steps."""
    looks = [(kind, step, "fitness", FEW) for kind, step in STEPS]
    looks.append(("relative", 1e-2, "fitness", MANY))
    for probe in ("test loss", "test error"):
        looks += [("relative", 1e-2, probe, MANY), ("absolute", 1e-3, probe, MANY)]
    wanted = [("vit", layer) for layer in LAYERS["vit"]]
    wanted += [("cnn", layer) for layer in LAYERS["cnn"]]
    return [
        {
            "network": network,
            "layer": layer,
            "weight_bits": 3,
            "kind": kind,
            "step": step,
            "probe": probe,
            "images": images,
            "lines": 2 if quick else 8,
            "points": 7 if quick else 17,
            "seed": 0,
        }
        for network, layer in (wanted[:2] if quick else wanted)
        for kind, step, probe, images in (QUICK if quick else looks)
    ]


def objective_of(
    qmodel: nn.Module, setting: Setting, cell: Cell, chunk: int | None = None
) -> BlockObjective:
    """The probe as a function of one layer's weight scales; by default all images at a time."""
    images, targets = (
        setting.demo.calibration[: cell["images"]],
        setting.demo.targets[: cell["images"]],
    )
    if cell["probe"] != "fitness":
        every, wanted = len(load_test()[1]) // cell["images"], cell["images"]
        images, labels = (part[::every][:wanted] for part in load_test())
        targets = F.one_hot(labels, 62).float()
    block = BLOCK[cell["network"]]
    chain = chain_of(qmodel)
    chain.chunk = chunk
    genome = genome_of(qmodel, [f"{block}.{cell['layer']}"], "weights")
    return BlockObjective(chain, block, images, targets, PROBES[cell["probe"]], genome=genome)


def run(cell: Cell) -> Result:
    """Roughness and noise floor of one layer."""
    config = QuantConfig(weight_bits=cell["weight_bits"])
    # All cells share one calibration; those that are quick have fewer images than any other.
    images = cell["images"] if cell["images"] < FEW else MANY
    setting = prepare(cell["network"], images, cell["seed"], config)
    relative = cell["kind"] == "relative"
    make = partial(objective_of, setting=setting, cell=cell)
    objective = make(setting.qmodel, chunk=setting.chain.chunk)
    start = objective.start
    points = torch.stack(
        [
            start,
            *(start + cell["step"] * direction(start, s, relative) for s in (90, 91)),
        ]
    )
    ways = [objective, *other_ways(objective, make, chunks=(10, 27, 1), last_bits=False)]
    floor, values = noise_floor(ways, points.abs())
    rough, lines = roughness(
        objective, start, cell["step"], floor, relative, cell["lines"], cell["points"]
    )
    return {
        "change": rough.change,
        "spread": rough.spread,
        "minima": rough.minima,
        "variation": rough.variation,
        "noise_floor": floor,
        "at_start": float(values[0, 0]),
        "lines_values": [[round(v, 7) for v in row] for row in lines.tolist()],
    }


def figure(results: pd.DataFrame) -> Picture:
    """Lines through the fitness of every layer at one relative step, the noise floor as a band."""
    shown = where(results, probe="fitness", kind="relative")
    step = 1e-2 if (shown["step"] == 1e-2).any() else shown["step"].iloc[0]
    shown = where(shown, step=step)
    shown = where(shown, images=shown["images"].max())
    found = {name: mean(counts) for name, counts in count_minima(shown).items()}
    least, most = (f(found, key=lambda name: found[name]) for f in (min, max))
    alt = (
        f"Change of fitness along {shown['lines'].iloc[0]} random lines through the first scales "
        f"of {len(shown)} layers, relative step {step}, above a noise floor. Minima per line: from "
        f"{found[least]:.1f} ({least}) to {found[most]:.1f} ({most})."
    )
    down, across = (1, len(shown)) if len(shown) < 4 else (2, -(-len(shown) // 2))
    picture = new_figure(3.6 * across, 2.9 * down, alt)
    grid = picture.subplots(down, across, squeeze=False, sharex=True)
    for axes, (_, r) in zip(grid.flat, shown.iterrows()):
        changes = [np.array(row) - r["at_start"] for row in r["lines_values"]]
        draw_layer(axes, name_of(r), r["step"], changes, r["noise_floor"])
    label_layers(picture, grid)
    return picture


def draw_layer(
    axes: Axes, name: str, step: float, changes: Sequence[np.ndarray], floor: float
) -> None:
    """Lines through the first scales of a layer, above a band as wide as the noise."""
    for i, change in enumerate(changes):
        radii = np.linspace(-step, step, len(change))
        axes.plot(radii, 1000 * change, color=PETROFF[i % len(PETROFF)], lw=1)
    half = 1000 * floor / 2
    axes.axhspan(-half, half, color="0.6", alpha=0.4, label="noise floor")
    axes.set_title(name, fontsize="medium")
    axes.set_xticks([-step, 0, step])


def label_layers(picture: Picture, grid: np.ndarray) -> None:
    """What the axes of a grid of layers show, said at its rim."""
    for axes in grid[-1]:
        axes.set_xlabel("relative step")
    for axes in grid[:, 0]:
        axes.set_ylabel("change of fitness, thousandths")
    grid.flat[0].legend(fontsize="small")
    picture.align_ylabels()


def name_of(result: pd.Series) -> str:
    """A layer of a network."""
    return f"{NAMES[result['network']]} {result['layer']}"


def count_minima(results: pd.DataFrame, own: bool = False, **values: Any) -> dict[str, list[int]]:
    """Minima of each line by layer, of the results about calibration fitness with these values.

    The largest of their noise floors is that of all, because under a lower one a layer has more
    minima; with `own`, each layer has its own.
    """
    found = where(results, **{"probe": "fitness", **values})
    return {
        name_of(r): [
            local_minima(torch.tensor(row), r["noise_floor"] if own else found["noise_floor"].max())
            for row in r["lines_values"]
        ]
        for _, r in found.iterrows()
    }


def measure_changes(results: pd.DataFrame, **values: Any) -> dict[str, list[float]]:
    """Mean |change| from the first scales to both ends of each line, by layer."""
    return {
        name_of(r): [
            mean([abs(row[0] - r["at_start"]), abs(row[-1] - r["at_start"])])
            for row in r["lines_values"]
        ]
        for _, r in where(results, **values).iterrows()
    }


def group(found: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Values of lines by layer, joined: of the ViT's attention, its MLP, all of it, and the CNN."""
    parts = {"qkv and proj": "ViT attn", "fc1 and fc2": "ViT mlp", "ViT": "ViT", "CNN": "CNN"}
    return {
        part: [x for name, values in found.items() if name.startswith(start) for x in values]
        for part, start in parts.items()
    }


def interval(counts: Sequence[float]) -> tuple[float, float]:
    """95 % t-interval of the mean over lines."""
    middle, error = mean(counts), stdev(counts) / len(counts) ** 0.5
    half = float(t.ppf(0.975, len(counts) - 1)) * error
    return middle - half, middle + half


def welch(those: Sequence[float], than: Sequence[float]) -> float:
    """p of Welch's test for a difference of means."""
    return float(ttest_ind(those, than, equal_var=False).pvalue)


def verdict(results: pd.DataFrame) -> Verdict:
    """Is the ViT jagged, the CNN not, attention more than the MLP? At relative steps of 1 %."""
    look: dict[str, Any] = {"kind": "relative", "step": 1e-2, "images": MANY}
    minima = count_minima(results, **look)
    if len(minima) < sum(len(layers) for layers in LAYERS.values()):
        return Verdict(UNDECIDED, "Only some of the cells were computed.")
    jagged, ragged = (has_several(minima, network) for network in ("ViT", "CNN"))
    found, finer = group(minima), group(count_minima(results, own=True, **look))
    attention, mlp = found["qkv and proj"], found["fc1 and fc2"]
    rugged = mean(attention) > mean(mlp) and welch(attention, mlp) < 0.05
    rows = (
        count_layers(f"ViT {SEVERAL}", jagged, holds=all(jagged)),
        count_layers(f"CNN {SEVERAL}", ragged, holds=not any(ragged)),
        difference("Attention (qkv, proj), over MLP (fc1, fc2)", attention, mlp, rugged),
        difference("ViT, over CNN", found["ViT"], found["CNN"]),
        difference("ViT, over CNN, under each layer's own floor", finer["ViT"], finer["CNN"]),
    )
    return Verdict(
        decide((all(jagged), not any(ragged), rugged)),
        f"In one block of each embedded network (one seed), {sum(jagged)} of {len(jagged)} ViT and "
        f"{sum(ragged)} of {len(ragged)} CNN layers are jagged; attention has "
        f"{'' if rugged else 'not '}significantly more minima than the MLP.",
        rows,
    )


def has_several(minima: Mapping[str, Sequence[int]], start: str = "") -> list[bool]:
    """Whether each layer whose name begins so has more minima than the one of a bowl.

    By the interval over lines.
    """
    found = [counts for name, counts in minima.items() if name.startswith(start)]
    return [interval(counts)[0] > 1 for counts in found]


def count_layers(name: str, jagged: Sequence[bool], holds: bool | None = None) -> Row:
    """How many layers have more than one minimum per line, by the interval of the mean."""
    unit = f"of {len(jagged)} layers"
    return Row(name, sum(jagged), holds=holds, unit=unit, form="d")


def difference(
    name: str, those: Sequence[int], than: Sequence[int], holds: bool | None = None
) -> Row:
    """How many more minima a line has on average."""
    p = welch(those, than)
    return Row(name, mean(those) - mean(than), p=p, holds=holds, unit="minima per line")


def tables(results: pd.DataFrame) -> Tables:
    """Minima by layer, and the mean change at the ends of a line by group of layers."""
    at = {"kind": "relative", "step": 1e-2}
    looks: dict[str, dict[str, Any]] = {
        f"1 %, {MANY} images": {**at, "images": MANY},
        f"1 %, {FEW} images": {**at, "images": FEW},
        f"0.001 (as the paper), {FEW} images": {"kind": "absolute", "step": 1e-3, "images": FEW},
    }
    layers = describe_layers(results)
    if layers.empty:  # only some of the cells were computed
        return {}
    counted = {title: count_minima(results, **look) for title, look in looks.items()}
    minima = pd.DataFrame(counted).map(tell_mean).rename_axis("layer").reset_index()
    rows = []
    for probe in PROBES:
        for kind, step in (("relative", 1e-2), ("absolute", 1e-3)):
            changes = measure_changes(results, probe=probe, kind=kind, step=step, images=MANY)
            if changes:
                rows.append({"of": probe, "step": f"{kind} {step:g}", **tell_changes(changes)})
    return {
        f"Each layer, relative step 1 %, {MANY} images": layers,
        "Minima per line, deeper than the largest noise floor (mean and 95 % interval)": minima,
        "Mean change from the first scales to the ends of a line (test images: probes only)": (
            pd.DataFrame(rows)
        ),
    }


def describe_layers(results: pd.DataFrame) -> pd.DataFrame:
    """What was measured of each layer at relative steps of 1 % on many images, as text."""
    look: dict[str, Any] = {"kind": "relative", "step": 1e-2, "images": MANY}
    found = where(results, probe="fitness", **look)
    return pd.DataFrame(
        {
            "layer": count_minima(results, **look).keys(),
            "mean change": found["change"].map("{:.2g}".format),
            "noise floor": found["noise_floor"].map("{:.2g}".format),
            "minima per line": [f"{mean(n):.2f}" for n in count_minima(results, **look).values()],
            "total variation": found["variation"].map("{:.2f}".format),
        }
    )


def tell_mean(counts: Sequence[int]) -> str:
    """A mean with its interval, as text."""
    low, high = interval(counts)
    return f"{mean(counts):.1f} [{low:.1f}, {high:.1f}]"


def tell_changes(changes: dict[str, list[float]]) -> dict[str, str]:
    """Mean changes of groups of layers and what Welch's test says of them, as text."""
    found = group(changes)
    told = {part: f"{mean(values):.2g}" for part, values in found.items()}
    for first, second in (("qkv and proj", "fc1 and fc2"), ("ViT", "CNN")):
        told[f"p, {first} against {second}"] = f"{welch(found[first], found[second]):.2g}"
    return told


CLAIM = Claim(
    "C2",
    "Is the loss over the scales jagged, in attention most, and not in CNNs?",
    cells,
    run,
    figure,
    verdict,
    tables,
    real="R2",
)
