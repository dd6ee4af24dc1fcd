"""Lesson 4: temperature, negatives and what they do to the gradient, on real logits."""

from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from evolq_lite.config import QuantConfig
from evolq_lite.convert import calibrate, quantize
from evolq_lite.data import CHARACTERS, load_demo
from evolq_lite.fitness import cosine, info_nce
from evolq_lite.panels.base import IntSlider, LogSlider, Panel, control
from evolq_lite.panels.drawing import BLUE, COLORS, DASHES, Drawing, Plot
from evolq_lite.panels.worker import Tick

COLDEST, HOTTEST = 0.03, 30.0  # arrow keys reach the 3 of the paper's code
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


def softmax(outputs: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The softmax p (n, n) of infoNCE: row i is how output i is shared among the targets."""
    return (similarity(outputs, targets) / temperature).softmax(1)


def ordered(bits: int, batch: int) -> tuple[Tensor, Tensor]:
    """Outputs and targets (batch, classes), ordered by class."""
    outputs, targets = (part[:batch] for part in logits(bits))
    order = targets.argmax(1).argsort(stable=True)
    return outputs[order], targets[order]


@lru_cache(maxsize=512)
def curves_of(bits: int, batch: int) -> np.ndarray:
    """Both `shares` (temperatures, 2): they depend on everything but the temperature slider."""
    outputs, targets = ordered(bits, batch)
    return np.array([shares(outputs, targets, float(t)) for t in TEMPERATURES])


class InfoNCEPanel(Panel):
    """Temperature, batch size and weight bits; softmax, loss, and what the negatives do."""

    live = True
    shipped = True
    presets = {
        "T = 0.05": {"temperature": 0.05},
        "2 images": {"temperature": 3.0, "batch": 2},
        "8 bits": {"temperature": 3.0, "batch": 32, "bits": 8},
    }

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

    def show_stored(self) -> bool:
        """While the stored picture is looked at, the network that the first move needs is made."""
        shown, values = super().show_stored(), self.values

        def prepare(tick: Tick) -> None:
            self.compute(tick, **values)

        if shown:
            self.worker.follow(prepare)
        return shown

    def changed(self, change: Any) -> None:
        """A control has moved; another network takes a second the first time, so say so."""
        if change is not None and change.owner is self.controls["bits"]:
            self.view.add_class("evolq-stale")
            self.say(f"{self.note}Computing …")
        super().changed(change)

    def compute(self, tick: Tick, **values: Any) -> Any:
        """Outputs and targets (n, classes) ordered by class, and the shares at all temperatures."""
        return *ordered(values["bits"], values["batch"]), curves_of(values["bits"], values["batch"])

    def draw(self, result: Any, **values: Any) -> tuple[Drawing, str]:
        """The softmax, the negatives' part over the temperature, infoNCE against cosine."""
        outputs, targets, curves = result
        temperature, n = values["temperature"], len(outputs)
        loss = float(info_nce(outputs, targets, temperature))
        distance = float(cosine(outputs, targets))
        losses = each_loss(outputs, targets, temperature)
        distances = 1 - similarity(outputs, targets).diagonal()
        part, hardest = shares(outputs, targets, temperature)
        rank = f"{float(spearmanr(losses.numpy(), distances.numpy()).statistic):.2f}"
        setting = f"W{values['bits']}A8, {n} images, T = {temperature:.2g}"
        said = (
            f"{setting}: infoNCE {loss:.4f}, cosine distance {distance:.4f}. {part:.0%} of the "
            f"gradient comes from the negatives. The hardest negative has {hardest:.0%} of their "
            f"weight (equal shares: {1 / (n - 1):.0%}). Rank correlation of the two losses over "
            f"the images: {rank}."
        )
        own = float(softmax(outputs, targets, temperature).diagonal().mean())
        alt = (
            f"{setting}: infoNCE {loss:.4f}. The softmax gives the own target {own:.0%} on "
            f"average. Negatives have {part:.0%} of the gradient, the hardest {hardest:.0%} of "
            "the negatives' weight."
        )
        return Drawing(
            alt,
            draw_softmax(softmax(outputs, targets, temperature), targets),
            draw_shares(curves, temperature, (part, hardest)),
            draw_losses(losses, distances),
        ), said


def draw_softmax(p: Tensor, targets: Tensor) -> Plot:
    """p (n, n): output i in row i, target j in column j."""
    n = len(p)
    names = [CHARACTERS[int(i)] for i in targets.argmax(1)]
    limits = (-0.5, n - 0.5)
    title = "Softmax p (blue 0, yellow 1)"
    plot = Plot(title, limits, limits[::-1], "target of image j", "output of image i", rows=0)
    if n <= 40:
        plot.xticks = plot.yticks = [(i, name) for i, name in enumerate(names) if i % 2 == 0]
    # The square root makes small probabilities visible.
    plot.cells(p.sqrt().numpy(), (0, 1), np.arange(n), np.arange(n))
    hardest = p.masked_fill(torch.eye(n, dtype=torch.bool), 0).argmax(1)
    for i in range(n):  # what the pointer is told: the own target, and the hardest negative
        for j in (i, int(hardest[i])):
            words = f"output {names[i]}, target {names[j]}: p = {float(p[i, j]):.3g}"
            plot.hint(j, i, 1, words)
    return plot


def draw_shares(curves: np.ndarray, temperature: float, now: tuple[float, float]) -> Plot:
    """What negatives do, over the temperature."""
    limits = COLDEST * 0.9, HOTTEST * 1.1
    plot = Plot("What negatives do", limits, (-0.03, 1.03), "temperature T", "share", "x", rows=2)
    labels = "negatives: of the gradient", "hardest: of the negatives"
    for i, label in enumerate(labels):
        plot.line(TEMPERATURES, curves[:, i], COLORS[i], DASHES[i], label)
        words = f"{now[i]:.0%} at T = {temperature:.2g}"
        plot.points([temperature], [now[i]], COLORS[i], ("circle", "square")[i], 6, titles=[words])
    return plot


def draw_losses(losses: Tensor, distances: Tensor) -> Plot:
    """One point for each image."""
    plot = Plot(
        "One point per image",
        widened(distances),
        widened(losses),
        "cosine distance",
        "infoNCE",
        rows=0,
        left=64,
    )
    titles = [f"infoNCE {a:.4g}, distance {b:.4g}" for a, b in zip(losses, distances)]
    plot.points(distances.numpy(), losses.numpy(), BLUE, titles=titles)
    return plot


def widened(values: Tensor) -> tuple[float, float]:
    """The range of values, with some room."""
    low, high = float(values.min()), float(values.max())
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room
