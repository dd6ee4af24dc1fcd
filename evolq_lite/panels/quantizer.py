"""Lesson 1: bits, symmetry, granularity and clipping of one tensor of the embedded ViT."""

from functools import cache
from typing import Any

import ipywidgets as W
import numpy as np
import torch
from torch import Tensor

from evolq_lite.data import load_demo
from evolq_lite.figures import PETROFF, Picture, new_figure
from evolq_lite.numerics import IntRange, affine_params, fake_quantize
from evolq_lite.panels.base import FloatSlider, IntSlider, Panel, control
from evolq_lite.panels.worker import Tick

TENSORS = {
    "weights of blocks.0.attn.qkv": ("blocks.0.attn.qkv", "weight"),
    "weights of blocks.5.mlp.fc2": ("blocks.5.mlp.fc2", "weight"),
    "input of blocks.0.attn.qkv": ("blocks.0.attn.qkv", "input"),
    "input of blocks.5.mlp.fc2 (after GELU)": ("blocks.5.mlp.fc2", "input"),
}


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


class QuantizerPanel(Panel):
    """Bits, symmetric or not, a scale per tensor or per channel, and how much of the range."""

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
        shares = np.linspace(0.05, 1.0, 20)
        errors = torch.stack([split_error(x, *args, float(share)) for share in shares])
        here = split_error(x, *args, values["clip"])
        return x, quantized(x, *args, values["clip"]), shares, errors, here

    def draw(self, result: Any, **values: Any) -> tuple[Picture, str]:
        """Staircase, histogram with levels, rounding against clipping."""
        x, q, shares, errors, here = result
        rounding, clipping = here.tolist()
        power = float((x**2).mean())
        share = (rounding + clipping) / power
        kind = "symmetric" if values["symmetric"] else "asymmetric"
        grain = "per channel" if values["channels"] else "per tensor"
        levels = len(q[0].unique()) if values["channels"] else len(q.unique())
        said = (
            f"{values['bits']} bits, {kind}, {grain}, {values['clip']:.0%} of the range kept: "
            f"{share:.2%} of the signal's power is lost, {rounding / power:.2%} to rounding, "
            f"{clipping / power:.2%} to clipping; {levels} levels are in use"
            f"{' in channel 0' if values['channels'] else ''}."
        )
        best = float(shares[int(errors.sum(1).argmin())])
        figure = new_figure(
            9.6, 3.2, f"Quantization of {values['tensor']}. {said} Least error at {best:.0%}."
        )
        stairs, histogram, curve = figure.subplots(1, 3)
        row, out = (t[0] if values["channels"] else t.flatten() for t in (x, q))
        at = torch.linspace(float(row.min()), float(row.max()), 2000)  # every level has its step
        args = values["bits"], values["symmetric"], values["clip"]
        stairs.plot(at, at, "--", color="0.6", lw=1, label="exact")
        stairs.plot(
            at, staircase(x, at, values["channels"], *args), color=PETROFF[0], label="quantized"
        )
        stairs.set(xlabel="value", ylabel="after quantization", title="Staircase")
        stairs.legend(fontsize="small")
        histogram.hist(row.numpy(), bins=60, color=PETROFF[0], alpha=0.6, density=True)
        for level in out.unique()[:64].tolist():
            histogram.axvline(level, color=PETROFF[1], lw=0.8)
        histogram.set(xlabel="value", ylabel="density", title="Values, and levels as lines")
        parts = errors.numpy() / power
        for i, (label, style) in enumerate((("rounding", "--"), ("clipping", ":"))):
            curve.plot(shares, parts[:, i], style, color=PETROFF[i], label=label)
        curve.plot(shares, parts.sum(1), color="0.25", label="both")
        curve.plot(values["clip"], (rounding + clipping) / power, "o", color=PETROFF[2])
        curve.set(xlabel="share of the range kept", title="Lost share of the power", yscale="log")
        curve.set_ylim(max(1e-6, parts.sum(1).min() / 30), parts.sum(1).max() * 2)
        curve.legend(fontsize="small")
        return figure, said
