"""Lesson 1: bits, symmetry, granularity and clipping of one tensor of the embedded ViT."""

from functools import cache, lru_cache
from typing import Any

import ipywidgets as W
import numpy as np
import torch
from torch import Tensor

from evolq_lite.data import load_demo
from evolq_lite.numerics import IntRange, affine_params, fake_quantize
from evolq_lite.panels.base import FloatSlider, IntSlider, Panel, control
from evolq_lite.panels.drawing import BLUE, COLORS, DASHES, ORANGE, PINK, Drawing, Plot
from evolq_lite.panels.worker import Tick

TENSORS = {
    "weights of blocks.0.attn.qkv": ("blocks.0.attn.qkv", "weight"),
    "weights of blocks.5.mlp.fc2": ("blocks.5.mlp.fc2", "weight"),
    "input of blocks.0.attn.qkv": ("blocks.0.attn.qkv", "input"),
    "input of blocks.5.mlp.fc2 (after GELU)": ("blocks.5.mlp.fc2", "input"),
}

SHARES = np.linspace(0.05, 1.0, 20)


@cache
def tensor_of(name: str) -> Tensor:
    """A weight (out, in), or an input as (channels, samples), of the embedded ViT."""
    demo, (layer, what) = load_demo("vit", 20), TENSORS[name]
    module = demo.model.get_submodule(layer)
    if what == "weight":
        return module.weight.detach()  # type: ignore[operator]
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        demo.model(demo.calibration)
    hook.remove()
    return seen[0].flatten(0, 1).T[:, ::5].contiguous()


def quantized(x: Tensor, bits: int, symmetric: bool, channels: bool, clip: float) -> Tensor:
    """A tensor (channels, n) as its integers tell it apart; `clip` is the share of its range."""
    integers = IntRange(bits, signed=True)
    lo, hi = (x.amin(1), x.amax(1)) if channels else (x.min(), x.max())
    scale, zero = affine_params(clip * lo, clip * hi, integers, symmetric)
    return fake_quantize(x, scale, zero, integers, axis=0 if channels else None)


def staircase(x: Tensor, at: Tensor, channels: bool, *args: Any) -> Tensor:
    """What values `at` (n,) become when x (channels, m), or its first channel, is quantized."""
    bits, symmetric, clip = args
    integers = IntRange(bits, signed=True)
    row = x[0] if channels else x
    scale, zero = affine_params(clip * row.min(), clip * row.max(), integers, symmetric)
    return fake_quantize(at, scale, zero, integers)


def split_error(x: Tensor, bits: int, symmetric: bool, channels: bool, clip: float) -> Tensor:
    """Mean square errors (2,) of a tensor: from rounding inside the range, from clipping outside.

    A value is clipped if the nearest integer that it would need does not exist.
    """
    integers = IntRange(bits, signed=True)
    lo, hi = (x.amin(1), x.amax(1)) if channels else (x.min(), x.max())
    scale, zero = affine_params(clip * lo, clip * hi, integers, symmetric)
    scale, zero = (p.view(-1, 1) if channels else p for p in (scale, zero))
    wanted = (x / scale).round() + zero
    outside = (wanted < integers.lo) | (wanted > integers.hi)
    error = (quantized(x, bits, symmetric, channels, clip) - x) ** 2
    return torch.stack([error[~outside].sum(), error[outside].sum()]) / x.numel()


@lru_cache(maxsize=256)
def errors_of(name: str, bits: int, symmetric: bool, channels: bool) -> Tensor:
    """Errors (shares, 2) of a tensor by the share of its range that is kept."""
    x = tensor_of(name)
    return torch.stack([split_error(x, bits, symmetric, channels, float(s)) for s in SHARES])


class QuantizerPanel(Panel):
    """Bits, symmetric or not, a scale per tensor or per channel, and how much of the range."""

    live = True
    presets = {
        "Question 1": {"tensor": next(iter(TENSORS)), "bits": 4, "symmetric": True, "clip": 1.0},
        "Question 2": {"tensor": list(TENSORS)[3], "bits": 4, "symmetric": True, "clip": 1.0},
        "Question 3": {"tensor": next(iter(TENSORS)), "bits": 3, "channels": True, "clip": 1.0},
    }

    def make_controls(self) -> dict[str, Any]:
        """Five controls."""
        return {
            "tensor": control(
                W.Dropdown,
                "Tensor",
                "A tensor of the ViT that ships with the course",
                options=list(TENSORS),
            ),
            "bits": control(IntSlider, "Bits", "Bits per integer", value=4, min=2, max=8),
            "symmetric": control(
                W.Checkbox,
                "Symmetric",
                "Zero point 0: the range extends equally far below and above zero",
                value=True,
                indent=True,
            ),
            "channels": control(
                W.Checkbox, "Per channel", "One scale per channel", value=False, indent=True
            ),
            "clip": control(
                FloatSlider,
                "Range kept",
                "Share of the range that the integers cover; values beyond it are clipped",
                value=1.0,
                min=0.05,
                max=1.0,
                step=0.05,
                readout_format=".0%",
            ),
        }

    def compute(self, tick: Tick, **values: Any) -> Any:
        """The tensor, what becomes of it, and both errors over the share that is kept."""
        x = tensor_of(values["tensor"])
        args = values["bits"], values["symmetric"], values["channels"]
        here = split_error(x, *args, values["clip"])
        return x, quantized(x, *args, values["clip"]), errors_of(values["tensor"], *args), here

    def draw(self, result: Any, **values: Any) -> tuple[Drawing, str]:
        """Staircase, histogram with levels, rounding against clipping."""
        x, q, errors, here = result
        channels = values["channels"]
        rounding, clipping = here.tolist()
        power = float((x**2).mean())
        lost = (rounding + clipping) / power
        kind = "symmetric" if values["symmetric"] else "asymmetric"
        grain = "per channel" if channels else "per tensor"
        setting = f"{values['bits']} bits, {kind}, {grain}, {values['clip']:.0%} of the range kept"
        levels = len(q[0].unique()) if channels else len(q.unique())
        said = (
            f"{setting}: {lost:.2%} of the signal's power is lost, {rounding / power:.2%} to "
            f"rounding and {clipping / power:.2%} to clipping. {levels} levels are in use"
            f"{' in channel 0' if channels else ''}."
        )
        name = values["tensor"][0].upper() + values["tensor"][1:]
        alt = f"{name}: {setting}. Lost power {lost:.2%}, {levels} levels."
        row, out = ((t[0] if channels else t.flatten()) for t in (x, q))
        ends = float(row.min()), float(row.max())
        args = values["bits"], values["symmetric"], values["clip"]
        return Drawing(
            alt,
            draw_stairs(x, ends, channels, *args),
            draw_values(row, out, ends),
            draw_errors(errors.numpy() / power, values["clip"], lost),
        ), said


def draw_stairs(x: Tensor, ends: tuple[float, float], channels: bool, *args: Any) -> Plot:
    """What each value becomes."""
    plot = Plot("Staircase", ends, ends, "value", "after quantization")
    at = torch.linspace(*ends, 2000)  # so that every level has its step
    after = staircase(x, at, channels, *args)
    corner = torch.ones(len(at), dtype=torch.bool)
    corner[1:-1] = (after[1:-1] != after[:-2]) | (after[1:-1] != after[2:])
    plot.line(ends, ends, "currentColor", DASHES[1], "exact", width=1)
    plot.line(at[corner].numpy(), after[corner].numpy(), BLUE, label="quantized")
    return plot


def draw_values(row: Tensor, out: Tensor, ends: tuple[float, float]) -> Plot:
    """How often values occur, and which levels they have."""
    counts, edges = np.histogram(row.numpy(), bins=50)
    shares = 100 * counts / counts.sum()
    plot = Plot("Values and levels", ends, (0, 1.08 * shares.max()), "value", "% of the values")
    titles = [
        f"{share:.1f} % of the values lie between {low:.3g} and {high:.3g}"
        for share, low, high in zip(shares, edges, edges[1:])
    ]
    plot.uprights(out.unique()[:64].numpy(), ORANGE, label="level")
    plot.bars(edges, shares, BLUE, titles)
    return plot


def draw_errors(parts: np.ndarray, kept: float, lost: float) -> Plot:
    """Lost shares of the power (shares, 2), by rounding and by clipping, over the share kept."""
    both = parts.sum(1)
    limits = max(1e-6, both.min() / 30), 2 * both.max()
    plot = Plot("Lost power", (0, 1.03), limits, "share of the range kept", "lost share", "y")
    for i, label in enumerate(("rounding", "clipping")):
        ys = np.maximum(parts[:, i], limits[0] / 10)
        plot.line(SHARES, ys, COLORS[i], DASHES[i + 1], label)
    plot.line(SHARES, both, "currentColor", label="both")
    plot.points([kept], [lost], PINK, size=6, titles=[f"{lost:.2%} lost at {kept:.0%}"])
    return plot
