"""Lesson 8: which integer each weight of a layer becomes, and what that does to the network."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import ipywidgets as W
import numpy as np
import torch
from torch import Tensor, nn

from evolq_lite.config import QuantConfig
from evolq_lite.convert import calibrate, quantize, twin
from evolq_lite.data import DEMO_MODELS, Demo, load_demo
from evolq_lite.evaluate import Accuracy, accuracy
from evolq_lite.fast import set_execution
from evolq_lite.fitness import kl
from evolq_lite.numerics import IntRange, to_integers
from evolq_lite.panels.base import IntSlider, Panel, control
from evolq_lite.panels.drawing import BLUE, COLORS, DASHES, ORANGE, PINK, Drawing, Plot
from evolq_lite.panels.vit import draw_accuracies
from evolq_lite.panels.worker import Tick
from evolq_lite.rounding import quant_layers, round_weights

IMAGES, HELD_OUT = 200, 400  # to calibrate and round with, and to look at
MINMAX, MSE = "nearest, MinMax scales", "nearest, MSE scales"
BARE, GPTQ = "GPTQ alone", "GPTQ, scales and means"
OPTIONS: dict[str, dict[str, Any]] = {  # of `round_weights`
    BARE: {"refit_scales": False, "restore_means": False, "weigh": False},
    GPTQ: {},
}
PARTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
LAYERS = [f"blocks.{i}.{part}" for i in range(DEMO_MODELS["vit"]["depth"]) for part in PARTS]
CHANNEL = 0  # whose weights are drawn


@cache
def network() -> tuple[Demo, Tensor, Tensor]:
    """The embedded ViT with images to calibrate with, held-out images, its logits for these."""
    demo = load_demo("vit", IMAGES + HELD_OUT)
    seen = Demo(demo.name, demo.model, demo.calibration[:IMAGES], demo.targets[:IMAGES])
    return seen, demo.calibration[IMAGES:], demo.targets[IMAGES:]


@cache
def calibrated(bits: int, observer: str) -> nn.Module:
    """The ViT with weights of `bits` bits, rounded to nearest; to be copied."""
    demo, _, _ = network()
    config = QuantConfig(weight_bits=bits, act_bits=8, weight_observer=observer)
    qmodel = quantize(demo.model, config)
    calibrate(qmodel, demo.calibration)
    return qmodel


@dataclass(frozen=True)
class Look:
    """A rounded network on held-out images, and its integers."""

    errors: dict[str, float]  # of each layer's output, relative to the float network's
    same: Accuracy  # predictions that are the float network's
    divergence: float  # KL to the float network, nats
    integers: dict[str, Tensor]  # (out, in) of each layer
    scales: dict[str, Tensor]  # (out,)


@torch.no_grad()
def outputs_of(model: nn.Module, images: Tensor, tick: Tick) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the outputs of every layer, of half the images: memory is limited."""
    found: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, y, name=name: found[name].append(y)
        )
        for name in LAYERS
    ]
    logits = []
    for part in images.split(100):
        logits.append(model(part))
        tick(0.9)
        if len(logits) == 2:
            for hook in hooks:
                hook.remove()
    return torch.cat(logits), {name: torch.cat(parts) for name, parts in found.items()}


@cache
def float_outputs() -> dict[str, Tensor]:
    """The float network's outputs of every layer."""
    demo, images, _ = network()
    return outputs_of(demo.model, images, lambda fraction: None)[1]


def look(bits: int, rounding: str, tick: Tick) -> Look:
    """Round a whole network and look at it."""
    demo, images, targets = network()
    tick(0.05)
    qmodel = twin(calibrated(bits, "minmax" if rounding == MINMAX else "mse"))
    if rounding in OPTIONS:
        events = round_weights(qmodel, demo.calibration, "gptq", **OPTIONS[rounding])
        for done, _ in enumerate(events, 1):
            tick(0.1 + 0.7 * done / (len(LAYERS) + 2))
    set_execution(qmodel, "plain")  # the fast layers pass integers on: not what a layer computes
    exact = float_outputs()
    logits, outputs = outputs_of(qmodel, images, tick)
    errors = {
        name: float((outputs[name] - exact[name]).norm() / exact[name].norm()) for name in LAYERS
    }
    layers = quant_layers(qmodel)
    integers = {
        name: layers[name].weight_quant.to_integers(layers[name].weight).detach() for name in LAYERS
    }
    scales = {name: layers[name].weight_quant.scale for name in LAYERS}
    same = accuracy(logits.argmax(1), targets.argmax(1))
    return Look(errors, same, float(kl(logits, targets)), integers, scales)


class RoundingPanel(Panel):
    """Rounding and bits of a whole network, and a layer to look at."""

    slow = True
    shipped = True
    presets = {
        "Nearest, MinMax": {"bits": 3, "rounding": MINMAX},
        "Nearest, MSE": {"bits": 3, "rounding": MSE},
        "GPTQ alone": {"bits": 3, "rounding": BARE},
        "GPTQ": {"bits": 3, "rounding": GPTQ},
        "GPTQ, 2 bits": {"bits": 2, "rounding": GPTQ},
    }

    def __init__(self, name: str | None = None, **values: Any) -> None:
        self.known: dict[tuple[int, str], Look] = {}  # what has been computed
        super().__init__(name, **values)

    def make_controls(self) -> dict[str, Any]:
        """Three controls."""
        return {
            "layer": control(
                W.Dropdown,
                "Layer",
                "The layer whose integers are drawn",
                options=LAYERS,
                value="blocks.2.mlp.fc1",
            ),
            "rounding": control(
                W.Dropdown,
                "Rounding",
                "How the integers of all weights are chosen",
                options=[MINMAX, MSE, BARE, GPTQ],
                value=GPTQ,
            ),
            "bits": control(
                IntSlider,
                "Weight bits",
                "Bits of every weight; activations have 8",
                value=3,
                min=2,
                max=6,
            ),
        }

    def compute(self, tick: Tick, **values: Any) -> Any:
        """All that is known of roundings with these bits, by name; another layer costs nothing."""
        bits = values["bits"]
        for rounding in (MINMAX, values["rounding"]):
            if (bits, rounding) not in self.known:
                self.known[bits, rounding] = look(bits, rounding, tick)
        return {name: seen for (b, name), seen in self.known.items() if b == bits}

    def draw(self, result: Any, **values: Any) -> tuple[Drawing, str]:
        """Weights and their integers, the error of each layer, agreement with the float network."""
        layer, rounding, bits = values["layer"], values["rounding"], values["bits"]
        here, usual = result[rounding], result[MINMAX]
        demo, _, _ = network()
        float_layer: Any = demo.model.get_submodule(layer)
        weight, scales = float_layer.weight.detach(), here.scales[layer]
        levels = IntRange(bits, signed=True)
        moved = here.integers[layer] != to_integers(weight, scales, torch.tensor(0.0), levels, 0)
        share = float(moved.float().mean())
        error, before = here.errors[layer], usual.errors[layer]
        said = (
            f"W{bits}A8, {rounding}: in {layer}, {share:.0%} of the weights do not become the "
            f"nearest integer. Its output is off by {error:.1%} (to nearest with MinMax scales "
            f"{before:.1%}). On {HELD_OUT} held-out calibration images the network predicts what "
            f"the float network predicts for {here.same}; KL {here.divergence:.3f} nats."
        )
        alt = (
            f"{layer}, {bits} bits, {rounding}: {share:.0%} of the integers are not the nearest, "
            f"output error {error:.1%}. Same prediction as float: {here.same.top1:.1%}, to nearest "
            f"with MinMax {usual.same.top1:.1%}."
        )
        row = (weight[CHANNEL] / scales[CHANNEL]).numpy()
        chosen = here.integers[layer][CHANNEL].numpy()
        order = [name for name in (MINMAX, MSE, BARE, GPTQ) if name in result]
        agreement = draw_accuracies(
            {name: result[name].same for name in order},
            "Predicts what float predicts",
            "share of held-out images, %",
            left=176,
        )
        return Drawing(
            alt,
            draw_integers(row, chosen, moved[CHANNEL].numpy(), 2 ** (bits - 1)),
            draw_layers(here.errors, usual.errors, layer),
            agreement,
        ), said


def draw_integers(weight: np.ndarray, chosen: np.ndarray, moved: np.ndarray, half: int) -> Plot:
    """Weights in units of the scale, and their integers, beside the staircase of the nearest."""
    edge = max(float(np.abs(weight).max()), half) + 0.3
    plot = Plot(
        f"Channel {CHANNEL}: which integer a weight becomes",
        (-edge, edge),
        (-half - 0.6, half - 0.4),
        "weight / scale",
        "integer",
        width=420,
        rows=2,
        height=320,
        yticks=[(q, f"{q}") for q in range(-half, half, max(1, half // 4))],
    )
    levels = np.arange(-half, half)
    corners = np.concatenate([[-edge], np.repeat(levels[:-1] + 0.5, 2), [edge]])
    plot.line(corners, np.repeat(levels, 2), "currentColor", DASHES[1], "nearest", width=1)
    for those, color, shape, label in (
        (~moved, BLUE, "circle", "became the nearest"),
        (moved, ORANGE, "diamond", "became another"),
    ):
        titles = [f"{w:.2f} scales became {q:.0f}" for w, q in zip(weight[those], chosen[those])]
        plot.points(weight[those], chosen[those], color, shape, 4, titles=titles, label=label)
    return plot


def draw_layers(errors: Mapping[str, float], usual: Mapping[str, float], layer: str) -> Plot:
    """Relative error of each layer's output."""
    names, values = list(errors), np.array(list(errors.values()))
    others = np.array([usual[name] for name in names])
    n = len(names)
    ticks = [(len(PARTS) * i + 1.5, f"block {i}") for i in range(n // len(PARTS))]
    plot = Plot(
        "Error at the output of each layer",
        (-0.8, n - 0.2),
        (0, 110 * max(values.max(), others.max())),
        "qkv, proj, fc1, fc2 of each block",
        "relative error, %",
        width=470,
        height=320,
        rows=2,
        xticks=ticks,
    )
    titles = [f"{name}: {value:.1%}" for name, value in zip(names, values)]
    plot.bars(np.arange(n + 1) - 0.5, 100 * values, BLUE, titles, label="this rounding")
    plot.points(range(n), 100 * others, COLORS[1], "cross", 4, label=MINMAX)
    at = names.index(layer)
    plot.points([at], [100 * values[at]], PINK, "down", 6, titles=[titles[at]], label=layer)
    return plot
