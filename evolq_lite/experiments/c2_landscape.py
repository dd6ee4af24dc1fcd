"""C2: is the loss over the scales jagged, more in ViTs than in CNNs, in attention than in MLPs?

Roughness of one layer's weight scales, beside the noise floor of the same objective: the largest
difference between the same network computed in other chunks, image by image, and by another
execution. "Rugged" is measured in two ways, which need not agree: how many minima a line has, and
how much the value changes from the first scales to a line's ends. Probes on test images (loss,
error) are for looking only; nothing is chosen by them.
"""

from collections.abc import Sequence
from functools import partial
from statistics import fmean as mean
from statistics import stdev
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import t, ttest_ind
from torch import Tensor, nn

from evolq_lite.chain import chain_of
from evolq_lite.config import QuantConfig
from evolq_lite.experiments.cells import UNDECIDED, Cell, Claim, Result, verdict_of
from evolq_lite.experiments.setup import Setting, setting, test_part
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


def test_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy against one-hot labels: a probe, not a fitness."""
    return F.cross_entropy(outputs, labels)


def test_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Share of wrong images against one-hot labels: a probe, not a fitness."""
    return (outputs.argmax(1) != labels.argmax(1)).float().mean()


PROBES: dict[str, Fitness] = {"fitness": info_nce, "test loss": test_loss, "test error": test_error}


def cells(quick: bool) -> list[Cell]:
    """Every layer and step on 100 images; more images and the test probes at some of the steps."""
    looks = [(kind, step, "fitness", 100) for kind, step in STEPS]
    looks.append(("relative", 1e-2, "fitness", 500))
    for probe in ("test loss", "test error"):
        looks += [("relative", 1e-2, probe, 500), ("absolute", 1e-3, probe, 500)]
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
        for kind, step, probe, images in (looks[1:2] if quick else looks)
    ]


def objective_of(
    qmodel: nn.Module, made: Setting, cell: Cell, chunk: int | None = None
) -> BlockObjective:
    """The probe as a function of one layer's weight scales; by default all images at a time."""
    images, targets = made.demo.calibration[: cell["images"]], made.demo.targets[: cell["images"]]
    if cell["probe"] != "fitness":
        every, wanted = len(test_part()[1]) // cell["images"], cell["images"]
        images, labels = (part[::every][:wanted] for part in test_part())
        targets = F.one_hot(labels, 62).float()
    block = BLOCK[cell["network"]]
    chain = chain_of(qmodel)
    chain.chunk = chunk
    genome = genome_of(qmodel, [f"{block}.{cell['layer']}"], "weights")
    return BlockObjective(chain, block, images, targets, PROBES[cell["probe"]], genome=genome)


def run(cell: Cell) -> Result:
    """Roughness and noise floor of one layer."""
    config = QuantConfig(weight_bits=cell["weight_bits"])
    made = setting(cell["network"], max(500, cell["images"]), cell["seed"], config)
    relative = cell["kind"] == "relative"
    make = partial(objective_of, made=made, cell=cell)
    objective = make(made.qmodel, chunk=made.chain.chunk)
    start = objective.start
    points = torch.stack(
        [
            start,
            *(start + cell["step"] * direction(start, "gaussian", s, relative) for s in (90, 91)),
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


def figure(results: list[Result]) -> Picture:
    """Lines through the fitness of every layer at one relative step, the noise floor as a band."""
    shown = [r for r in results if r["probe"] == "fitness" and r["kind"] == "relative"]
    step = 1e-2 if any(r["step"] == 1e-2 for r in shown) else shown[0]["step"]
    shown = [r for r in shown if r["step"] == step]
    shown = [r for r in shown if r["images"] == max(r["images"] for r in shown)]
    minima = minima_of(shown)
    said = "; ".join(
        f"{name}: mean change {r['change']:.2g}, noise {r['noise_floor']:.2g}, "
        f"{mean(minima[name]):.1f} minima a line"
        for r in shown
        if (name := f"{r['network']} {r['layer']}")
    )
    alt = f"Fitness along random lines of one layer's scales, relative step {step}. {said}."
    picture = new_figure(2.9 * len(shown), 3.2, alt)
    for axes, r in zip(picture.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        radii = torch.linspace(-r["step"], r["step"], r["points"])
        for i, row in enumerate(r["lines_values"]):
            moved = [v - r["at_start"] for v in row]
            axes.plot(radii, moved, color=PETROFF[i % len(PETROFF)], lw=1)
        half = r["noise_floor"] / 2
        axes.axhspan(-half, half, color="0.6", alpha=0.4, label="noise floor")
        axes.set_title(f"{r['network']} {r['layer']}", fontsize="medium")
        axes.set(xlabel="relative step", ylabel="change of fitness")
        axes.set_xticks([-r["step"], 0, r["step"]])
        axes.ticklabel_format(axis="y", scilimits=(-2, 2))
    picture.axes[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return picture


def matching(results: list[Result], **where: Any) -> list[Result]:
    """The results whose cells have these values."""
    return [r for r in results if all(r[key] == value for key, value in where.items())]


def minima_of(results: list[Result], own: bool = False, **where: Any) -> dict[str, list[int]]:
    """Minima of each line by layer, of the results about calibration fitness that match.

    The largest of their noise floors is that of all, because under a lower one a layer has more
    minima; with `own`, each layer has its own.
    """
    found = matching(results, **{"probe": "fitness", **where})
    floor = max((r["noise_floor"] for r in found), default=0.0)
    return {
        f"{r['network']} {r['layer']}": [
            local_minima(torch.tensor(row), r["noise_floor"] if own else floor)
            for row in r["lines_values"]
        ]
        for r in found
    }


def changes_of(results: list[Result], **where: Any) -> dict[str, list[float]]:
    """Mean |change| from the first scales to both ends of each line, by network and layer."""
    return {
        f"{r['network']} {r['layer']}": [
            mean([abs(row[0] - r["at_start"]), abs(row[-1] - r["at_start"])])
            for row in r["lines_values"]
        ]
        for r in matching(results, **where)
    }


def by_change(results: list[Result], **where: Any) -> str:
    """Attention against the MLP and ViT against CNN by mean change, in words."""
    found = changes_of(results, **where)
    vit, cnn = ([found[f"{net} {layer}"] for layer in LAYERS[net]] for net in LAYERS)
    pairs = (("qkv and proj", vit[:2]), ("fc1 and fc2", vit[2:])), (("ViT", vit), ("CNN", cnn))
    said = []
    for (name, those), (other, than) in pairs:
        a, b = ([x for line in lines for x in line] for lines in (those, than))
        p = welch(a, b)
        said.append(f"{name} {mean(a):.2g} against {other} {mean(b):.2g} (p = {p:.2g})")
    return ", ".join(said)


def interval(counts: list[int]) -> tuple[float, float]:
    """95 % t-interval of the mean over lines."""
    middle, error = mean(counts), stdev(counts) / len(counts) ** 0.5
    half = float(t.ppf(0.975, len(counts) - 1)) * error
    return middle - half, middle + half


def welch(those: Sequence[float], than: Sequence[float]) -> float:
    """p of Welch's test for a difference of means."""
    return float(ttest_ind(those, than, equal_var=False).pvalue)


def more(those: list[int], than: list[int]) -> tuple[bool, str]:
    """Whether some lines have more minima than others on average (Welch's test, 5 %), in words."""
    p = welch(those, than)
    return mean(those) > mean(than) and p < 0.05, f"{mean(those) - mean(than):+.2f}, p = {p:.2g}"


def verdict(results: list[Result]) -> tuple[str, str]:
    """Is the ViT jagged, the CNN not, attention more than the MLP? At relative steps of 1 %."""
    where: dict[str, Any] = {"kind": "relative", "step": 1e-2, "images": 500}
    minima, finer = minima_of(results, **where), minima_of(results, own=True, **where)
    if len(minima) < sum(len(layers) for layers in LAYERS.values()):
        return UNDECIDED, "Only a part of the cells was computed."
    vit = [minima[f"vit {layer}"] for layer in LAYERS["vit"]]
    jagged, ragged = (  # a bowl has one
        [interval(minima[f"{net} {layer}"])[0] > 1 for layer in LAYERS[net]]
        for net in ("vit", "cnn")
    )
    by, apart = (
        more(*([n for layer in LAYERS[net] for n in m[f"{net} {layer}"]] for net in LAYERS))[1]
        for m in (minima, finer)
    )
    rugged, over = more(vit[0] + vit[1], vit[2] + vit[3])

    def listed(found: dict[str, list[int]]) -> str:
        return ", ".join(
            f"{name} {mean(counts):.1f} [{interval(counts)[0]:.1f}, {interval(counts)[1]:.1f}]"
            for name, counts in found.items()
        )

    fewer = minima_of(results, kind="relative", step=1e-2, images=100)
    absolute = minima_of(results, kind="absolute", images=100)
    sentence = (
        "Minima a line that are deeper than the largest noise floor (mean and 95 % interval over "
        f"{len(vit[0])} lines), relative step 0.01, 500 images: {listed(minima)}. Jagged (more "
        f"than one minimum, by the interval) are {sum(jagged)} of {len(jagged)} layers of the ViT, "
        f"all of one block, and {sum(ragged)} of {len(ragged)} of the CNN. The ViT against the "
        f"CNN: {by}; with each layer's own noise floor {apart}. qkv and proj are "
        f"{'' if rugged else 'not '}more rugged than fc1 and fc2 ({over}). With 100 images: "
        f"{listed(fewer)}; there at the paper's absolute step "
        f"0.001: {listed(absolute)}. By another measure, the mean change from the first scales to "
        f"the ends of a line: {by_change(results, probe='fitness', **where)}. On test images "
        "(probes, one block, nothing chosen by them): "
        + "; ".join(
            f"{probe} at {kind} steps of {step:g}: "
            f"{by_change(results, probe=probe, kind=kind, step=step, images=500)}"
            for probe in ("test loss", "test error")
            for kind, step in (("relative", 1e-2), ("absolute", 1e-3))
        )
        + "."
    )
    return verdict_of((all(jagged), not any(ragged), rugged)), sentence


CLAIM = Claim(
    "C2",
    "Is the loss over the scales jagged, in attention most, and not in CNNs?",
    cells,
    run,
    figure,
    verdict,
)
