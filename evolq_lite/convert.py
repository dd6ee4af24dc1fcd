"""From a trained timm network to a calibrated quantized one: `quantize`, `calibrate`, `describe`.

Read with lesson 2.
"""

import copy
import logging
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from timm.models import levit, resnet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from evolq_lite.chain import chain_of
from evolq_lite.config import QuantConfig
from evolq_lite.integer import EXECUTIONS, missing
from evolq_lite.layers import (
    LAST_ACTIVATION,
    QUANTIZED,
    Log2Quantizer,
    Quantizer,
    QuantLinear,
    QuantWeight,
    act_quantizer,
    sum_quantizer,
)


def quantize(model: nn.Module, config: QuantConfig) -> nn.Module:
    """A quantized copy of a timm model, still to be calibrated.

    It shares the weights, and the model stays as it was; how it multiplies is said by
    `config.execution` (see `set_execution`). BatchNorm is folded into the convolution
    before it. ValueError for networks that `chain_of` does not know.
    """
    chain_of(model)
    qmodel = _swapped(_folded(twin(model).eval()), config)
    if isinstance(qmodel, VisionTransformer):  # the tokens that enter the first block are a sum too
        qmodel.norm_pre = nn.Sequential(qmodel.norm_pre, sum_quantizer(config))
    if isinstance(qmodel, SwinTransformer):
        qmodel.patch_embed.norm = nn.Sequential(
            cast(nn.Module, qmodel.patch_embed.norm), sum_quantizer(config)
        )
    set_execution(qmodel, config.execution)
    qmodel.quant_config = config  # type: ignore[assignment]  # what `calibrate` goes by
    return qmodel


def _folded(module: nn.Module) -> nn.Module:
    """Fold BatchNorms into neighbours: LeViT layers fuse themselves, in ResNets bn follows conv."""
    if isinstance(module, levit.ConvNorm | levit.LinearNorm | levit.NormLinear):
        weight = module.linear.weight
        return module.fuse().to(weight.device).requires_grad_(weight.requires_grad)
    names = list(module._modules)
    for before, name in pairwise(names):
        conv, bn = module._modules[before], module._modules[name]
        follows = before.isdigit() or (
            before.startswith("conv") and name == before.replace("conv", "bn")
        )
        if follows and isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
            setattr(module, before, fuse_conv_bn_eval(conv, bn))
            setattr(module, name, nn.Identity())
    for name, child in list(module.named_children()):
        setattr(module, name, _folded(child))
    return module


def _swapped(module: nn.Module, config: QuantConfig) -> nn.Module:
    """Replace every layer that has a quantized form, children first."""
    for name, child in list(module.named_children()):
        setattr(module, name, _swapped(child, config))
    if (slot := LAST_ACTIVATION.get(type(module))) is not None:
        assert isinstance(module, resnet.BasicBlock | resnet.Bottleneck)
        setattr(module, slot, nn.Sequential(getattr(module, slot), act_quantizer(config)))
    form = QUANTIZED.get(type(module))
    return module if form is None else form.from_float(module, config)  # type: ignore[return-value]


def twin(model: nn.Module) -> nn.Module:
    """A copy with scales of its own that shares the weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def set_execution(qmodel: nn.Module, execution: str = "auto") -> str:
    """Let linear layers multiply in `integer` or `simulate` it in float; returns which it is.

    "auto" takes integer where it is exact and logs the reason where it is not; "integer" raises
    ValueError there.
    """
    if execution not in EXECUTIONS:
        raise ValueError(f"unknown execution {execution!r}; known: {', '.join(EXECUTIONS)}")
    layers = [module for module in qmodel.modules() if isinstance(module, QuantLinear)]
    reason = "the network has no quantized linear layer"
    for layer in layers:
        point = layer.weight_quant
        reason = missing(point.integers.bits, layer.weight.device.type)
        if not point.symmetric:
            reason = "weights are asymmetric, its kernel takes zero point 0 only"
        if reason:
            break
    if reason and execution == "integer":
        raise ValueError(
            f"integer execution is not possible: {reason}; give execution simulate, or auto"
        )
    if reason and execution == "auto":
        logging.getLogger("evolq_lite").info("execution is simulated: %s", reason)
    integer = execution != "simulate" and not reason
    for layer in layers:
        layer.integer = integer
    return "integer" if integer else "simulate"


def quantizers(qmodel: nn.Module) -> dict[str, Quantizer]:
    """All quantizers with a scale, by name, in the order in which they were built."""
    return {
        name: module for name, module in qmodel.named_modules() if isinstance(module, Quantizer)
    }


@torch.no_grad()
def calibrate(
    qmodel: nn.Module, images: Tensor, config: QuantConfig | None = None, batch: int = 100
) -> None:
    """Choose every scale by watching calibration images (n, channels, height, width) pass in float.

    With `bias_correction` in the config (that of `quantize`, unless another is given), biases are
    shifted so that the mean output of each layer is as with float weights. ValueError for no
    images, or NaN or infinite values in them or in the network's activations (which names the
    point).
    """
    if len(images) == 0:
        raise ValueError("no calibration images; give at least one")
    config = config or cast(QuantConfig, qmodel.quant_config)
    for layer in qmodel.modules():
        if isinstance(layer, QuantWeight):
            layer.forget_correction()
    points = quantizers(qmodel)
    logs = [module for module in qmodel.modules() if isinstance(module, Log2Quantizer)]
    for point in points.values():
        point.observe()
    for log in logs:
        log.passing = True
    try:
        for x in images.split(batch):
            qmodel(x)
        for name, point in points.items():
            try:
                point.freeze()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    finally:
        for point in points.values():
            point.observer = None
        for log in logs:
            log.passing = False
    if config.bias_correction:
        _correct_biases(qmodel, images, batch)


def _correct_biases(qmodel: nn.Module, images: Tensor, batch: int) -> None:
    """Add to each bias the mean of W x - W' x over the calibration images (W' is quantized)."""
    layers: list[Any] = [module for module in qmodel.modules() if isinstance(module, QuantWeight)]
    lost: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

    def record(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        missing = layer.product(
            layer.input_quant(inputs[0]), layer.weight - layer.quantized_weight(), None
        )
        channels = 1 if isinstance(layer, nn.Conv2d) else -1
        lost[layer].append(missing.movedim(channels, 0).flatten(1).mean(1))

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        for x in images.split(batch):
            qmodel(x)
    finally:
        for hook in hooks:
            hook.remove()
    for layer in layers:
        shift = torch.stack(lost[layer]).mean(0)
        layer.bias = nn.Parameter(
            shift if layer.bias is None else layer.bias + shift, requires_grad=False
        )


@dataclass(frozen=True)
class Point:
    """One row of `describe`: a quantization point."""

    name: str
    bits: int
    signed: bool
    granularity: str
    observer: str
    values: int  # how many scales it has


def points(qmodel: nn.Module) -> list[Point]:
    """Every quantization point of a model, weights and activations, log2 points with 0 scales."""
    rows = []
    for name, module in qmodel.named_modules():
        if isinstance(module, Log2Quantizer):
            rows.append(Point(name, module.integers.bits, False, "powers of two", "none", 0))
        elif isinstance(module, Quantizer):
            granularity = "per tensor" if module.axis is None else "per channel"
            granularity = (
                "per channel, powers of two" if module.observer_name == "ptf" else granularity
            )
            values = module.scale.numel() if module.frozen else 0
            kind = module.integers.bits, module.integers.signed, granularity
            rows.append(Point(name, *kind, module.observer_name, values))
    return rows


def describe(qmodel: nn.Module) -> str:
    """A table of what is quantized, how, and what stays float."""
    rows = points(qmodel)
    width = max([len(row.name) for row in rows] + [5])
    lines = [
        f"{'point':{width}}  bits  sign      granularity                 observer        scales"
    ]
    lines += [
        f"{r.name:{width}}  {r.bits:>4}  {'signed' if r.signed else 'unsigned':8}  "
        f"{r.granularity:26}  "
        f"{r.observer:14}  {r.values or '-':>6}"
        for r in rows
    ]
    quiet = (Quantizer, Log2Quantizer, QuantWeight, nn.Identity, nn.Dropout)
    left = Counter(
        type(module).__name__
        for module in qmodel.modules()
        if not list(module.children()) and not isinstance(module, quiet)
    )
    kept = ", ".join(f"{count} {name}" for name, count in sorted(left.items()))
    lines.append(f"stays float: biases, softmax, additions before their quantizer; {kept}")
    return "\n".join(lines)
