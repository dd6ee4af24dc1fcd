"""From a trained timm network to a calibrated quantized one: `quantize`, `calibrate`, `describe`.

`quantize` swaps every layer that it knows **exactly** for its quantized form: a subclass may
compute something else, so it is left alone. Two checks make sure that nothing is silently wrong.
The new network, its points letting floats pass, must compute what the float network computes; and
every matrix product that no point guards is found by watching the products, and listed.

Read with lesson 2.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch
from timm.data import resolve_model_data_config
from timm.layers import BatchNormAct2d, Mlp
from timm.models import levit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode

from evolq_lite.chain import chain_of
from evolq_lite.config import QuantConfig, preset_of
from evolq_lite.families import LAST_ACTIVATION, ONLY_VIT, QUANTIZED, QuantTokens
from evolq_lite.fast import set_execution
from evolq_lite.layers import ChannelFactors, QuantProducts, QuantWeight
from evolq_lite.quantizer import (
    FixedIntegers,
    Log2Quantizer,
    Quantizer,
    act_quantizer,
    sum_quantizer,
)

Point = Quantizer | Log2Quantizer
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # with which channels' ranges are evened out


def quantize(model: nn.Module, config: QuantConfig) -> nn.Module:
    """A quantized copy of a timm model in evaluation mode, still to be calibrated.

    It shares the weights, and the model stays as it was; how it multiplies is said by
    `config.execution` (see `set_execution`). BatchNorm is folded into the convolution
    before it. ValueError for networks that `chain_of` does not know, or that would compute
    something else.
    """
    chain_of(model)
    qmodel = swap_layers(fold_batch_norms(twin(model).eval()), config)
    if config.outputs:
        if type(qmodel) is not VisionTransformer:
            raise ValueError(f"outputs {ONLY_VIT}")
        qmodel = QuantTokens.from_float(qmodel, config)
    if isinstance(qmodel, VisionTransformer):  # the tokens that enter the first block are a sum too
        qmodel.norm_pre = nn.Sequential(qmodel.norm_pre, sum_quantizer(config))
    if isinstance(qmodel, SwinTransformer):
        norm = cast(nn.Module, qmodel.patch_embed.norm)
        qmodel.patch_embed.norm = nn.Sequential(norm, sum_quantizer(config))
    if config.gelu_factors:
        for mlp in mlps_with_gelu(qmodel):
            mlp.norm = ChannelFactors(mlp.fc2.in_features).to(mlp.fc2.weight.device)
    apply_exceptions(qmodel, config)
    qmodel.quant_config = config  # type: ignore[assignment]  # what `calibrate` goes by
    check_same(model, qmodel)
    set_execution(qmodel, config.execution)
    return qmodel


def apply_exceptions(qmodel: nn.Module, config: QuantConfig) -> None:
    """Give the points that the config treats apart their own bits, observer, or float numbers."""
    modules = dict(qmodel.named_modules())
    if config.edge_bits is not None:
        edges = replace(config, weight_bits=config.edge_bits, act_bits=config.edge_bits)
        for name in edge_layers(qmodel):
            cast(QuantWeight, modules[name]).add_points(edges)
    if config.gelu_observer is not None:
        gelu = replace(config, act_observer=config.gelu_observer)
        for name, module in modules.items():
            if isinstance(module, QuantWeight) and kind_of(f"{name}.input_quant") == "gelu":
                module.input_quant = act_quantizer(gelu)
    for name, module in qmodel.named_modules():
        if isinstance(module, Point) and kind_of(name) in config.float_kinds:
            module.stay_float()


def mlps_with_gelu(qmodel: nn.Module) -> list[Any]:
    """timm's MLPs that have GELU, and nothing of their own between it and fc2."""
    found: list[Any] = [module for module in qmodel.modules() if isinstance(module, Mlp)]
    return [
        mlp
        for mlp in found
        if isinstance(mlp.act, nn.GELU)
        and isinstance(mlp.norm, nn.Identity)
        and isinstance(mlp.fc2, QuantWeight)
    ]


def factors_of(qmodel: nn.Module) -> dict[str, Tensor]:
    """The factors (channels,) of each `ChannelFactors`, by the name of its MLP."""
    return {
        name: module.norm.factor
        for name, module in qmodel.named_modules()
        if isinstance(module, Mlp) and isinstance(module.norm, ChannelFactors)
    }


def set_factors(qmodel: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Divide channels by these factors, and multiply the weights behind by them.

    Powers of two: the products stay the same, bit for bit, and what is set is undone exactly.
    """
    for name, factor in factors.items():
        mlp: Any = qmodel.get_submodule(name)
        new = factor.to(mlp.norm.factor.device, copy=True)
        mlp.fc2.multiply_inputs(new / mlp.norm.factor)
        mlp.norm.factor = new


@torch.no_grad()
def choose_factors(qmodel: nn.Module, images: Tensor, batch: int) -> None:
    """Choose the factors of each `ChannelFactors` by what passes it in float.

    Even activations make uneven weights, which is worse the fewer bits weights have. So several
    strengths are tried, and the one with the least error in fc2's output is taken.
    """
    mlps: dict[str, Any] = {name: qmodel.get_submodule(name) for name in factors_of(qmodel)}
    if not mlps:
        return
    set_factors(qmodel, {name: torch.ones_like(mlp.norm.factor) for name, mlp in mlps.items()})
    for mlp in mlps.values():
        mlp.norm.seen = []
    try:
        with pass_floats(qmodel):
            for x in images.split(batch):
                qmodel(x)
        found = {}
        for name, mlp in mlps.items():
            x = torch.cat(mlp.norm.seen)
            x = x[:: max(1, len(x) // 4096)]
            tried = [mlp.norm.even_out(strength) for strength in STRENGTHS]
            errors = [error_with(mlp.fc2, x, factor) for factor in tried]
            found[name] = tried[errors.index(min(errors))]
        set_factors(qmodel, found)
    finally:
        for mlp in mlps.values():
            mlp.norm.seen = None


def error_with(layer: Any, x: Tensor, factor: Tensor) -> float:
    """Squared error of a linear layer's output on inputs (n, in) that are divided by a factor."""
    rounded = []
    for point, value in (
        (layer.input_quant, x / factor),
        (layer.weight_quant, layer.weight * factor),
    ):
        if point.stays_float:
            rounded.append(value)
            continue
        probe = Quantizer(
            point.integers, point.observer_name, point.symmetric, point.axis, **point.options
        )
        probe.observe()
        probe(value)
        probe.freeze()
        rounded.append(probe(value))
    return float((rounded[0] @ rounded[1].T - x @ layer.weight.T).square().mean())


def edge_layers(qmodel: nn.Module) -> list[str]:
    """The names of the first layer and of the last: timm says which they are."""
    facts = cast(dict[str, Any], getattr(qmodel, "pretrained_cfg", {}) or {})
    named: list[str] = []
    for key in ("first_conv", "classifier"):
        found = facts.get(key) or ()
        named += [found] if isinstance(found, str) else list(found)
    return [
        name
        for name, module in qmodel.named_modules()
        if isinstance(module, QuantWeight)
        # LeViT's layers are fused with their BatchNorm, and lose the last part of their name.
        and any(name == edge or edge.startswith(f"{name}.") for edge in named)
    ]


def kind_of(name: str) -> str:
    """The kind of a quantization point by its name, one of `config.KINDS`."""
    *above, last = name.split(".")
    if last == "weight_quant":
        return "weights"
    if last == "input_quant":  # what GELU writes, fc2 reads; ln2 is LeViT's name for it
        return "gelu" if above[-2:-1] == ["mlp"] and above[-1] in ("fc2", "ln2") else "inputs"
    if last in ("q", "k", "v"):
        return "qkv"
    if last in ("output", "tokens", "positions", "logits"):
        return "outputs"
    return last if last in ("scores", "probabilities") else "sums"


def twin(model: nn.Module) -> nn.Module:
    """A copy with scales of its own that shares the weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Fold each BatchNorm into its convolution; LeViT's layers know how to fuse themselves.

    timm's BatchNorm with a built-in activation leaves that activation in its place.
    """
    if type(module) in (levit.ConvNorm, levit.LinearNorm, levit.NormLinear):
        fused = cast(Any, module)
        weight = fused.linear.weight
        return fused.fuse().to(weight.device).requires_grad_(weight.requires_grad)
    for before, name in pairwise(list(module._modules)):
        conv, bn = module._modules[before], module._modules[name]
        follows = before.isdigit() or (
            before.startswith("conv") and name == before.replace("conv", "bn")
        )
        if not follows or type(conv) is not nn.Conv2d:
            continue
        if type(bn) is nn.BatchNorm2d or type(bn) is BatchNormAct2d:
            setattr(module, before, fuse_conv_bn_eval(conv, bn))
            activation = bn.act if isinstance(bn, BatchNormAct2d) else nn.Identity()
            setattr(module, name, activation)
    for name, child in list(module.named_children()):
        setattr(module, name, fold_batch_norms(child))
    return module


def swap_layers(module: nn.Module, config: QuantConfig) -> nn.Module:
    """Replace every layer that has a quantized form, children first."""
    for name, child in list(module.named_children()):
        setattr(module, name, swap_layers(child, config))
    if (slot := LAST_ACTIVATION.get(type(module))) is not None:
        setattr(module, slot, nn.Sequential(getattr(module, slot), act_quantizer(config)))
    form = QUANTIZED.get(type(module))
    return module if form is None else form.from_float(module, config)  # type: ignore[return-value]


def example_images(model: nn.Module, images: int = 2) -> Tensor:
    """Random images (images, channels, height, width) of the size that a timm model takes."""
    _, height, width = resolve_model_data_config(model)["input_size"]
    if (size := getattr(getattr(model, "patch_embed", None), "img_size", None)) is not None:
        height, width = size
    if isinstance(model, levit.Levit):  # it does not say, but its position biases are a table
        net = cast(Any, model)
        tokens = len(net.stages[0].blocks[0].attn.attention_bias_idxs)
        height = width = math.isqrt(tokens) * net.stem.stride
    first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    weight = first.weight
    noise = torch.randn(
        images, first.in_channels, height, width, generator=torch.Generator().manual_seed(0)
    )
    return noise.to(weight.device, weight.dtype)


@torch.no_grad()
def check_same(model: nn.Module, qmodel: nn.Module) -> None:
    """Compare the networks segment by segment, floats passing; note the products that stay float.

    ValueError names the first segment that differs by more than folding BatchNorm explains.
    """
    images = example_images(model)
    training = model.training
    model.eval()
    try:
        with pass_floats(qmodel), WatchProducts() as watch:
            found, wanted = chain_of(qmodel), chain_of(model)
            traces = found.trace(images), wanted.trace(images)
            outputs = found(images), wanted(images)
    finally:
        model.train(training)
    names = dict(qmodel.named_modules())
    counts = Counter(watch.float_products)
    qmodel.float_products = {  # type: ignore[assignment]
        name: counts[module] // 2 or 1  # once by `trace`, once by the forward
        for name, module in names.items()
        if module in counts
    }
    tolerance = 1e-3 if images.dtype == torch.float32 else 0.1
    ends = [*zip(traces[0][1:], traces[1][1:], strict=True), outputs]
    for name, (a, b) in zip(wanted.names, ends, strict=True):
        if not torch.isfinite(b).all():
            raise ValueError(
                f"the float network computes NaN or infinite values, from {name} on; check the "
                "checkpoint"
            )
        scale = float(b.abs().max())
        difference = float((a - b).abs().max()) / max(scale, 1e-12)
        if not difference <= tolerance:
            raise ValueError(
                f"the quantized {type(model).__name__} would compute something else than the float "
                f"network: they differ from {name} on (relative difference {difference:.2g}); "
                "it has a layer that is not supported"
            )


@contextmanager
def pass_floats(qmodel: nn.Module) -> Iterator[None]:
    """Let floats pass all points for a while."""
    points = [module for module in qmodel.modules() if isinstance(module, Point)]
    before = [point.passing for point in points]
    for point in points:
        point.passing = True
    try:
        yield
    finally:
        for point, passing in zip(points, before, strict=True):
            point.passing = passing


class WatchProducts(TorchDispatchMode):
    """Notes in `float_products` the module of every matrix product that no point guards.

    torch tells each operator that it runs; hooks tell which module is at work.
    """

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "convolution")

    def __init__(self) -> None:
        super().__init__()
        self.float_products: list[nn.Module] = []
        self.at_work: list[nn.Module] = []
        self.hooks: list[Any] = []

    def __enter__(self) -> "WatchProducts":
        self.hooks = [
            register_module_forward_pre_hook(lambda module, _: self.at_work.append(module)),
            register_module_forward_hook(
                lambda *_: (self.at_work.pop(), None)[1], always_call=True
            ),
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = operator._schema.name.split("::")[-1].removeprefix("_")
        product = name in self.PRODUCTS or "scaled_dot_product" in name
        guarded = any(isinstance(m, QuantWeight | QuantProducts) for m in self.at_work)
        if product and self.at_work and not guarded:
            self.float_products.append(self.at_work[-1])
        return operator(*args, **(kwargs or {}))


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
    layers = {
        f"{name}.weight_quant": module
        for name, module in qmodel.named_modules()
        if isinstance(module, QuantWeight)
    }
    for layer in layers.values():
        layer.forget_rounding()
    choose_factors(qmodel, images, batch)
    points = quantizers(qmodel)
    try:
        with pass_floats(qmodel):
            for name, point in points.items():
                if name not in layers and not point.stays_float:
                    point.observe()
            for x in images.split(batch):
                if config.sample_batches == "last":
                    for point in points.values():
                        if point.observer is not None:
                            point.observer.forget_samples()
                qmodel(x)
        for name, point in points.items():
            if point.stays_float:
                continue
            try:
                if name in layers:  # the same in every batch: looked at once
                    point.observe()
                    point(layers[name].weight)
                point.freeze()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    finally:
        for point in points.values():
            point.observer, point.passing = None, point.stays_float
    if config.bias_correction:
        correct_biases(qmodel, images, batch)


def correct_biases(qmodel: nn.Module, images: Tensor, batch: int) -> None:
    """Add to each bias the mean of W x - W' x over the calibration images (W' is quantized)."""
    layers: list[Any] = [module for module in qmodel.modules() if isinstance(module, QuantWeight)]
    lost: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

    def record(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        missing = layer.product(
            layer.input_quant(inputs[0]), layer.weight - layer.quantize_weight(), None
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
class Row:
    """One row of `describe`: a quantization point."""

    name: str
    bits: int | None  # None: it stays float
    signed: bool
    granularity: str
    observer: str
    values: int  # how many scales it has


def points(qmodel: nn.Module) -> list[Row]:
    """Every quantization point of a model, weights and activations, log2 points with 0 scales."""
    rows = []
    names = Counter(module for _, module in qmodel.named_modules(remove_duplicate=False))
    for name, module in qmodel.named_modules():
        if isinstance(module, Point) and module.stays_float:
            rows.append(Row(name, None, False, "float", "none", 0))
        elif isinstance(module, Log2Quantizer):
            rows.append(Row(name, module.integers.bits, False, "powers of two", "none", 0))
        elif isinstance(module, Quantizer):
            granularity = "per tensor" if module.axis is None else "per channel"
            if module.observer_name == "ptf":
                granularity = "per channel, powers of two"
            if names[module] == 3:
                granularity = "per tensor, for q, k and v"
            values = module.scale.numel() if module.frozen else 0
            integers = module.integers
            rows.append(
                Row(name, integers.bits, integers.signed, granularity, module.observer_name, values)
            )
    return rows


def describe(qmodel: nn.Module) -> str:
    """A table of what is quantized, how, and what stays float."""
    rows = points(qmodel)
    width = max([len(row.name) for row in rows] + [5])
    lines = [
        f"{'point':{width}}  bits  sign      granularity                 observer        scales"
    ]
    lines += [
        f"{r.name:{width}}  {r.bits or '-':>4}  "
        f"{'' if r.bits is None else 'signed' if r.signed else 'unsigned':8}  "
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
    if isinstance(config := getattr(qmodel, "quant_config", None), QuantConfig):
        lines.append(f"preset: {preset_of(config)}")
    lines.append(f"stays float: biases, softmax, additions before their quantizer; {kept}")
    weights = [m for m in qmodel.modules() if isinstance(m, QuantWeight)]
    bits = [m.weight_quant.integers.bits for m in weights if not m.weight_quant.stays_float]
    if len(set(bits)) > 1:
        sizes = [m.weight.numel() for m in weights if not m.weight_quant.stays_float]
        mean = sum(n * b for n, b in zip(sizes, bits, strict=True)) / sum(sizes)
        lines.append(f"weights have {mean:.2f} bits on average, each layer its own")
    if rounded := sum(m.rounded for m in qmodel.modules() if isinstance(m, QuantWeight)):
        frozen = any(isinstance(m, FixedIntegers) for m in qmodel.modules())
        how = "frozen" if frozen else "chosen"
        lines.append(f"weights whose integers were {how}: {rounded} layers")
    lines.append(f"matrix products that stay float: {tell_float_products(qmodel)}")
    return "\n".join(lines)


def tell_float_products(qmodel: nn.Module) -> str:
    """The matrix products of a quantized network that stay float, in words."""
    found = cast(dict[str, int], getattr(qmodel, "float_products", {}))
    if not found:
        return "none"
    return f"{sum(found.values())}, in " + ", ".join(found)
