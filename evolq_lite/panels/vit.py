"""Lesson 2: what bits and observers cost a whole vision transformer."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import ipywidgets as W
import numpy as np
import torch
from torch import Tensor

from evolq_lite.chain import chain_of
from evolq_lite.config import TENSOR_OBSERVERS, QuantConfig
from evolq_lite.convert import calibrate, quantize
from evolq_lite.data import CHARACTERS, Demo, load_demo
from evolq_lite.evaluate import Accuracy, accuracy, compare
from evolq_lite.panels.base import IntSlider, Panel, control
from evolq_lite.panels.drawing import BLUE, COLORS, Drawing, Plot, Tiles
from evolq_lite.panels.worker import Tick

EVERY = 21  # test image: 473 of all typefaces and, as 21 and 62 have no divisor, all characters
CALIBRATION = 100
SHOWN = 8


@cache
def network() -> tuple[Demo, list[Tensor], Tensor, Tensor, Tensor]:
    """The embedded ViT, its trace on calibration images, a test subset, labels, predictions."""
    demo = load_demo("vit", CALIBRATION)
    images, labels = (part[::EVERY] for part in demo.test)
    with torch.no_grad():
        trace = chain_of(demo.model).trace(demo.calibration)
        found = torch.cat([demo.model(x).argmax(1) for x in images.split(100)])
    return demo, trace, images, labels, found


def make_quant_controls() -> dict[str, Any]:
    """Controls for four options of QuantConfig."""
    return {
        "weight_bits": control(
            IntSlider, "Weight bits", "Bits of every weight", value=3, min=2, max=8
        ),
        "act_bits": control(
            IntSlider, "Activation bits", "Bits of every activation", value=8, min=3, max=8
        ),
        "weight_observer": control(
            W.Dropdown,
            "Observer",
            "How the first scales of the weights are chosen",
            options=list(TENSOR_OBSERVERS),
        ),
        "sums": control(
            W.Dropdown,
            "Residual sums",
            "One scale, one with a power-of-two factor per channel, or one per channel",
            options=["tensor", "ptf", "channel"],
            value=QuantConfig().sums,
        ),
    }


class ViTPanel(Panel):
    """Weight bits, activation bits and observer; top-1, error by layer, labels that change."""

    slow = True
    shipped = True
    presets = {
        "W8A8": {"weight_bits": 8, "act_bits": 8},
        "W3A8 MSE": {"weight_bits": 3, "act_bits": 8, "weight_observer": "mse"},
        "W8A4": {"weight_bits": 8, "act_bits": 4, "weight_observer": "minmax", "sums": "ptf"},
        "W8A4, one scale for sums": {
            "weight_bits": 8,
            "act_bits": 4,
            "weight_observer": "minmax",
            "sums": "tensor",
        },
    }

    def __init__(self, name: str | None = None, **values: Any) -> None:
        self.known: dict[QuantConfig, Any] = {}  # what has been computed
        super().__init__(name, **values)

    def make_controls(self) -> dict[str, Any]:
        """Five options of QuantConfig."""
        usual = QuantConfig()
        return {
            **make_quant_controls(),
            "log2_attention": control(
                W.Checkbox,
                "Log2 attention",
                "Round attention probabilities to powers of two",
                value=usual.log2_attention,
            ),
        }

    def compute(self, tick: Tick, **values: Any) -> Any:
        """Predictions on the test subset, and the error at the end of every segment."""
        demo, exact, images, labels, was = network()
        config = QuantConfig(**values)
        if config in self.known:
            return self.known[config]
        qmodel = quantize(demo.model, config)
        tick(0.1)
        calibrate(qmodel, demo.calibration, config)
        tick(0.3)
        found: list[Tensor] = []
        with torch.no_grad():
            chain = chain_of(qmodel)
            trace = chain.trace(demo.calibration)
            errors = [float((q - x).norm() / x.norm()) for q, x in zip(trace[1:], exact[1:])]
            for part in images.split(50):
                tick(0.4 + 0.6 * len(found) / 10)
                found.append(qmodel(part).argmax(1))
        self.known[config] = errors, chain.names, images, labels, was, torch.cat(found)
        return self.known[config]

    def draw(self, result: Any, **values: Any) -> tuple[Drawing, str]:
        """Three pictures in one: top-1, error by segment, characters whose label changed."""
        errors, names, images, labels, was, found = result
        before, after = accuracy(was, labels), accuracy(found, labels)
        changed = (was != found).nonzero().flatten()
        setting = f"W{values['weight_bits']}A{values['act_bits']}, {values['weight_observer']}"
        difference = compare(was, found, labels)
        said = (
            f"{setting}: top-1 {after} on {len(labels)} test images, float {before}, difference "
            f"{difference}. {len(changed)} labels changed."
        )
        worst = int(np.argmax(errors))
        alt = (
            f"{setting}: top-1 {after.top1:.1%}, float {before.top1:.1%}; {len(changed)} labels "
            f"changed. Largest relative error {errors[worst]:.2f}, at the end of {names[worst]}."
        )
        characters = [
            f"{CHARACTERS[int(was[i])]} → {CHARACTERS[int(found[i])]} "
            f"{'✓' if found[i] == labels[i] else '✗'}"
            for i in changed[:SHOWN]
        ]
        title = "Changed labels" if characters else "No label changed"
        return Drawing(
            alt,
            draw_accuracies({"float": before, setting: after}),
            draw_errors(errors, names),
            Tiles(title, images[changed[:SHOWN], 0].numpy(), characters),
        ), said


def draw_accuracies(
    rows: dict[str, Accuracy],
    title: str = "Top-1 with 95 % interval",
    label: str = "top-1, %",
    left: int = 110,
) -> Plot:
    """Points with 95 % intervals."""
    ticks = list(enumerate(rows))
    plot = Plot(
        title,
        (0, 100),
        (len(rows) - 0.5, -0.7),
        label,
        width=290 + left,
        left=left,
        rows=0,
        yticks=ticks,
    )
    for i, value in enumerate(rows.values()):
        point, (low, high) = 100 * value.top1, (100 * end for end in value.interval)
        plot.interval(low, high, i, COLORS[i])
        words = f"{point:.1f} %"
        shape = ("circle", "square", "diamond", "up")[i % 4]
        plot.points([point], [i], COLORS[i], shape, 5, titles=[words])
        plot.words(point, i, words, "end" if point > 90 else "middle")
    return plot


def draw_errors(errors: list[float], names: Sequence[str]) -> Plot:
    """Relative error at the end of every segment."""
    edges = np.arange(len(errors) + 1) - 0.5
    ticks = [(i, name.removeprefix("blocks.")) for i, name in enumerate(names[: len(errors)])]
    plot = Plot(
        "Error at the end of each segment",
        (-0.6, len(errors) - 0.4),
        (0, 1.08 * max(errors)),
        "segment (numbers are blocks)",
        "relative error",
        width=420,
        rows=0,
        xticks=ticks,
    )
    plot.bars(edges, errors, BLUE, [f"{n}: {e:.3f}" for n, e in zip(names, errors)])
    return plot
