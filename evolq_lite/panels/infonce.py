"""Lesson 4: temperature, negatives and what they do to the gradient, on real logits."""

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from evolq_lite.config import QuantConfig
from evolq_lite.convert import calibrate, quantize
from evolq_lite.data import load_demo
from evolq_lite.figures import PETROFF, Picture, new_figure
from evolq_lite.fitness import cosine, info_nce
from evolq_lite.panels.base import IntSlider, LogSlider, Panel, control
from evolq_lite.panels.worker import Tick

COLDEST, HOTTEST = 0.02, 10.0
MOST = 64
CALIBRATION = 100
TEMPERATURES = np.geomspace(COLDEST, HOTTEST, 28)


@cache
def logits(bits: int) -> tuple[Tensor, Tensor]:
    """Logits (64, 62) of the embedded ViT for calibration images: W`bits`A8 by MinMax, and float.

    In double precision: at small temperatures single precision would round most losses to 0.
    """
    demo = load_demo("vit", CALIBRATION)
    qmodel = quantize(demo.model, QuantConfig(weight_bits=bits))
    calibrate(qmodel, demo.calibration)
    with torch.no_grad():
        return qmodel(demo.calibration)[:MOST].double(), demo.targets[:MOST].double()


def similarity(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cosines (n, n) of every output (n, classes) with every target (n, classes)."""
    return F.normalize(outputs, dim=1) @ F.normalize(targets, dim=1).T


def against_negatives(outputs: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The logits (n, n) of infoNCE's softmax without the diagonal, which is minus infinity."""
    logits = similarity(outputs, targets) / temperature
    return logits.masked_fill(torch.eye(len(logits), dtype=torch.bool), -torch.inf)


def each_loss(outputs: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """InfoNCE (n,) of each image; their mean is `info_nce`."""
    own = similarity(outputs, targets).diagonal() / temperature
    others = against_negatives(outputs, targets, temperature).logsumexp(1)
    return 2 * temperature * F.softplus(others - own)


def pull_and_push(outputs: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Two parts (n, classes) of infoNCE's gradient in the outputs; their sum is the gradient.

    With p = softmax over the batch, output i is pulled to its own target with weight 1 - p[i, i]
    and pushed from each negative j with weight p[i, j]. What points along the output itself changes
    no cosine and is left out.
    """
    q, k = F.normalize(outputs, dim=1), F.normalize(targets, dim=1)
    whole = (similarity(outputs, targets) / temperature).logsumexp(1, keepdim=True)
    p = (against_negatives(outputs, targets, temperature) - whole).exp()  # of the negatives
    size = 2 / len(q) / outputs.norm(dim=1, keepdim=True)
    parts = -size * p.sum(1, keepdim=True) * k, size * (p @ k)
    pull, push = (part - (part * q).sum(1, keepdim=True) * q for part in parts)
    return pull, push


def shares(outputs: Tensor, targets: Tensor, temperature: float) -> tuple[float, float]:
    """The negatives' share of the gradient, and the hardest one's share of their weight.

    The first is a share of lengths, summed over images; the second a mean over images.
    """
    pull, push = (part.norm(dim=1).sum() for part in pull_and_push(outputs, targets, temperature))
    hardest = against_negatives(outputs, targets, temperature).softmax(1).amax(1)
    return float(push / (pull + push)), float(hardest.mean())


class InfoNCEPanel(Panel):
    """Temperature, batch size and weight bits; similarities, loss, and what the negatives do."""

    shipped = True

    def make_controls(self) -> dict[str, Any]:
        """Three controls."""
        return {
            "temperature": control(
                LogSlider,
                "Temperature",
                "Small: only the most similar negatives count. The paper's code uses 3",
                value=3.0,
                low=COLDEST,
                high=HOTTEST,
                step=0.05,
                readout_format=".2f",
            ),
            "batch": control(
                IntSlider,
                "Batch",
                "Number of images that are compared with each other",
                value=32,
                min=2,
                max=MOST,
            ),
            "bits": control(
                IntSlider, "Weight bits", "Bits of every weight", value=3, min=2, max=8
            ),
        }

    def compute(self, tick: Tick, **values: Any) -> Any:
        """Outputs and targets (n, classes) ordered by class, and the shares at all temperatures."""
        outputs, targets = (part[: values["batch"]] for part in logits(values["bits"]))
        tick(0.5)
        order = targets.argmax(1).argsort(stable=True)
        outputs, targets = outputs[order], targets[order]
        curves = [shares(outputs, targets, float(t)) for t in TEMPERATURES]
        return outputs, targets, np.array(curves)

    def draw(self, result: Any, **values: Any) -> tuple[Picture, str]:
        """Similarities, the negatives' part over the temperature, infoNCE against cosine."""
        outputs, targets, curves = result
        temperature, n = values["temperature"], len(outputs)
        table = similarity(outputs, targets)
        loss, distance = (
            float(info_nce(outputs, targets, temperature)),
            float(cosine(outputs, targets)),
        )
        losses = each_loss(outputs, targets, temperature)
        distances = 1 - table.diagonal()
        part, hardest = shares(outputs, targets, temperature)
        rank = f"{float(spearmanr(losses.numpy(), distances.numpy()).statistic):.2f}"
        said = (
            f"W{values['bits']}A8, {n} images, T = {temperature:.2g}: infoNCE {loss:.4f}, cosine "
            f"distance {distance:.4f}. {part:.0%} of the gradient comes from the negatives, whose "
            f"hardest has {hardest:.0%} of their weight (equal parts: {1 / (n - 1):.0%}). Rank "
            f"correlation of both losses over the images: {rank}."
        )
        other = (table.sum() - table.trace()) / (n * n - n)
        figure = new_figure(
            10.2,
            3.5,
            f"InfoNCE on real logits. {said} Mean cosine with the own target "
            f"{float(table.diagonal().mean()):.2f}, with a negative {float(other):.2f}.",
        )
        grid, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
        image = grid.imshow(table.numpy(), cmap="cividis", vmin=-0.5, vmax=1)
        grid.set(xlabel="target of image", ylabel="output for image", title="Cosines, by class")
        figure.colorbar(image, ax=grid, shrink=0.8)
        names = ("negatives: share of the gradient", "hardest: share of the negatives")
        for i, (name, now) in enumerate(zip(names, (part, hardest))):
            middle.plot(TEMPERATURES, curves[:, i], ("-", "--")[i], color=PETROFF[i], label=name)
            middle.plot(temperature, now, "os"[i], color=PETROFF[i])
        middle.set(
            xscale="log", ylim=(-0.03, 1.45), xlabel="temperature T", title="What negatives do"
        )
        middle.set_yticks([0, 0.25, 0.5, 0.75, 1])
        middle.legend(fontsize="x-small", loc="upper center")
        right.plot(distances, losses, "o", color=PETROFF[0], ms=4)
        right.set(xlabel="cosine distance", ylabel="infoNCE", title="One point for each image")
        return figure, said
