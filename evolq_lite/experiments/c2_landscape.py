"""C2: is the loss over the scales jagged, more in ViTs than in CNNs, in attention than in MLPs?

Roughness of one layer's weight scales, beside the noise floor of the same objective: the largest
difference between the same network computed in other chunks and by another execution. Probes on
test images (loss, error) are for looking only; nothing is chosen by them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from evolq_lite.chain import chain_of
from evolq_lite.config import QuantConfig
from evolq_lite.convert import set_execution
from evolq_lite.experiments.cells import Cell, Claim, Result
from evolq_lite.experiments.setup import Setting, setting, test_part
from evolq_lite.figures import PETROFF, Picture, new_figure
from evolq_lite.fitness import Fitness, info_nce
from evolq_lite.genome import genome_of
from evolq_lite.landscape import direction, noise_floor, roughness
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
    """Every layer, step and probe; more images for the layer that the paper calls rugged."""
    networks = ("vit",) if quick else ("vit", "cnn")
    steps = STEPS[1:2] if quick else STEPS
    probes = ("fitness",) if quick else tuple(PROBES)
    sizes = (100,) if quick else (100, 500)
    out = []
    for network in networks:
        for layer in LAYERS[network][:2] if quick else LAYERS[network]:
            for kind, step in steps:
                for probe in probes:
                    for images in sizes if probe == "fitness" else (500,):
                        out.append(
                            {
                                "network": network,
                                "layer": layer,
                                "weight_bits": 3,
                                "kind": kind,
                                "step": step,
                                "probe": probe,
                                "images": images,
                                "lines": 2 if quick else 4,
                                "points": 7 if quick else 17,
                                "seed": 0,
                            }
                        )
    return out


def objective_of(made: Setting, cell: Cell, chunk: int | None) -> BlockObjective:
    """The probe as a function of one layer's weight scales."""
    images, targets = made.demo.calibration[: cell["images"]], made.demo.targets[: cell["images"]]
    if cell["probe"] != "fitness":
        images, labels = (part[:: len(part) // cell["images"]] for part in test_part())
        targets = F.one_hot(labels, 62).float()
    block = BLOCK[cell["network"]]
    chain = chain_of(made.qmodel)
    chain.chunk = chunk
    genome = genome_of(made.qmodel, [f"{block}.{cell['layer']}"], "weights")
    return BlockObjective(chain, block, images, targets, PROBES[cell["probe"]], genome=genome)


def run(cell: Cell) -> Result:
    """Roughness and noise floor of one layer."""
    config = QuantConfig(weight_bits=cell["weight_bits"])
    made = setting(cell["network"], max(500, cell["images"]), cell["seed"], config)
    relative = cell["kind"] == "relative"
    objectives = [objective_of(made, cell, chunk) for chunk in (made.chain.chunk, 10, 27)]
    start = objectives[0].start
    points = torch.stack(
        [
            start,
            *(start + cell["step"] * direction(start, "gaussian", s, relative) for s in (90, 91)),
        ]
    )
    set_execution(made.qmodel, "simulate")
    _, simulated = noise_floor([objective_of(made, cell, None)], points.abs())
    set_execution(made.qmodel, "auto")
    _, values = noise_floor(objectives, points.abs())
    kernels = torch.cat([values, simulated])
    floor = float((kernels.amax(0) - kernels.amin(0)).max())
    rough, lines = roughness(
        objectives[0], start, cell["step"], floor, relative, cell["lines"], cell["points"]
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
    said = "; ".join(
        f"{r['network']} {r['layer']}: mean change {r['change']:.2g}, noise "
        f"{r['noise_floor']:.2g}, {r['minima']:.1f} minima a line"
        for r in shown
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
        axes.ticklabel_format(axis="y", scilimits=(-2, 2))
        axes.legend(fontsize="small")
    return picture


def verdict(results: list[Result]) -> tuple[str, str]:
    """ViT against CNN, attention against MLP, at equal relative steps of one per cent."""
    at = {
        (r["network"], r["layer"]): r
        for r in results
        if r["probe"] == "fitness" and r["kind"] == "relative" and r["step"] == 1e-2
    }
    if not all((n, layer) in at for n, layers in LAYERS.items() for layer in layers):
        return "holds partly", "Only a part of the cells was computed."
    minima = {key: r["minima"] for key, r in at.items()}
    vit = [minima["vit", layer] for layer in LAYERS["vit"]]
    cnn = [minima["cnn", layer] for layer in LAYERS["cnn"]]
    jagged = min(vit) >= 1
    smooth = max(cnn) < min(vit)
    attention = min(minima["vit", "attn.qkv"], minima["vit", "attn.proj"])
    rugged = attention > max(minima["vit", "mlp.fc1"], minima["vit", "mlp.fc2"])
    count = sum((jagged, smooth, rugged))
    word = "holds here" if count == 3 else "holds partly" if count else "does not hold here"
    numbers = ", ".join(f"{n} {layer} {value:.1f}" for (n, layer), value in minima.items())
    sentence = (
        f"Minima a line deeper than the noise floor, relative step 0.01: {numbers}. The ViT is "
        f"{'' if jagged else 'not '}jagged in every layer; the CNN is {'' if smooth else 'not '}"
        f"smoother than all of them; qkv and proj are {'' if rugged else 'not '}more rugged than "
        "fc1 and fc2."
    )
    return word, sentence


CLAIM = Claim(
    "C2",
    "Is the loss over the scales jagged, in attention most, and not in CNNs?",
    cells,
    run,
    figure,
    verdict,
)
