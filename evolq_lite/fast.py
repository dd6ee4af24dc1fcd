"""The layers again, fast: the same numbers at a fraction of the time. No lesson needs this file.

`set_execution` puts these classes in the place of the plain ones of `layers` (the same objects in
another class), and takes them back. Where does a simulated layer spend its time? Not in the matrix
product, but in six passes over each activation for scaling, rounding, clamping and scaling back,
each into fresh memory. Four things help:

- *Buffers are used up in place* where nobody else needs them.
- *Weights are kept*: quantized once, and again only when their scale or weight is another one.
- *Plain numbers instead of tensors of one number*: clamping to a number is several times as fast.
- *Integers*: with execution "integer", linear layers multiply uint8 codes by int8 weights
  (`kernels`), and what travels from fc1 to fc2 are the codes themselves. With one thread, large
  products of attention are made of integers too.

While gradients are recorded, or where a point lets floats pass, a layer does as the plain one does.
"""

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from evolq_lite.kernels import (
    EXECUTIONS,
    Packed,
    batch_pays,
    kernel_name,
    missing,
    multiply,
    multiply_batch,
    pack,
)
from evolq_lite.layers import QuantBlock, QuantConv2d, QuantLinear, QuantProducts, QuantWeight
from evolq_lite.numerics import IntRange, along, match_moments
from evolq_lite.quantizer import Quantizer


def scale_into(x: Tensor, factor: Tensor | float) -> Tensor:
    """x * factor in one pass, into a new contiguous buffer whatever the strides of x."""
    return torch.mul(x, factor, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))


def round_into(
    x: Tensor,
    step: Tensor | float,
    zero_point: Tensor | int,
    integers: IntRange,
    spend: bool = False,
) -> Tensor:
    """The integers that stand for x, counted from the zero point, in one buffer.

    `step` and `zero_point` must broadcast against x. `spend`: the buffer may be that of x.
    """
    inverse = 1 / step if isinstance(step, float) else step.reciprocal()
    # round(x) + z in [lo, hi] <=> round(x) in [lo - z, hi - z]
    lo: Any = integers.lo - zero_point
    hi: Any = integers.hi - zero_point
    steps = x.mul_(inverse) if spend else scale_into(x, inverse)
    return steps.round_().clamp_(lo, hi)


class Kept:
    """Values made from tensors, each kept until one of its sources is another or was written to.

    A candidate's scales are other tensors, so it pays for the weights of the searched block only,
    and once. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self.sources: dict[str, tuple[tuple[Tensor, int], ...]] = {}
        self.values: dict[str, Any] = {}

    def get(self, name: str, sources: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
        """The value of that name for these tensors; `make` is called if it is not at hand."""
        if any(tensor.is_inference() for tensor in sources):  # they do not count their changes
            return make()
        known = self.sources.get(name, ())
        if len(known) != len(sources) or any(
            tensor is not old or tensor._version != version
            for tensor, (old, version) in zip(sources, known, strict=True)
        ):
            self.values[name] = make()
            self.sources[name] = tuple((tensor, tensor._version) for tensor in sources)
        return self.values[name]

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return Kept, ()


class FastQuantizer(Quantizer):
    """A point that works in one buffer, and knows its scale as a plain number."""

    kept: Kept

    @property
    def plain(self) -> bool:
        """Whether the plain class must do it."""
        return self.passing or not self.frozen or torch.is_grad_enabled()

    @property
    def number(self) -> float:
        """The one scale of a tensor, as a number: asking a tensor for it takes long."""
        return self.kept.get("scale", (self.scale,), lambda: float(self.scale))

    @property
    def zero(self) -> int:
        """The one zero point of a tensor, as a number."""
        return self.kept.get("zero", (self.zero_point,), lambda: int(self.zero_point))

    def forward(self, x: Tensor, unit: Tensor | float = 1.0, spend: bool = False) -> Tensor:
        """Fake-quantize x * unit; `spend`: x may be overwritten."""
        if self.plain:
            return super().forward(x, unit)
        integers = self.to_integers(x, unit, spend)
        if self.axis is None:
            return integers.mul_(self.number)
        return integers.mul_(along(self.scale, x.ndim, self.axis))

    def to_integers(self, x: Tensor, unit: Tensor | float = 1.0, spend: bool = False) -> Tensor:
        """The integers that stand for x * unit; uint8 is taken for codes that fc1 has made."""
        if x.dtype is torch.uint8:
            return x.float() - self.code_of_zero
        if self.plain:
            return super().to_integers(x, unit)
        # One scale or one per channel; its unit divides it, so that x is passed over once.
        step = self.number if self.axis is None else along(self.scale, x.ndim, self.axis)
        many = self.zero_point.ndim > 0
        zero = along(self.zero_point, x.ndim, self.axis) if many else self.zero
        return round_into(x, step / unit, zero, self.integers, spend)

    def codes(self, x: Tensor) -> Tensor:
        """The integers as uint8, counted from the smallest: 0 ... 2^bits - 1."""
        # By way of int8, 128 less: to uint8 floats are cast one by one, three times as slowly.
        signed = self.to_integers(x).add_(self.code_of_zero - 128).to(torch.int8)
        return signed.view(torch.uint8).bitwise_xor_(128)

    @property
    def code_of_zero(self) -> int:
        """The code that stands for 0."""
        return self.zero - self.integers.lo

    @property
    def middle(self) -> int:
        """What to subtract from `to_integers` so that the integers are signed ones of its bits."""
        return (self.integers.lo + self.integers.hi + 1) // 2 - self.zero


class FastWeight(QuantWeight):
    """Common to both layers with weights: the quantized weight is kept."""

    kept: Kept

    @property
    def plain(self) -> bool:
        """Whether the plain class must do it; an input that stays float is no reason."""
        calibrating = self.input_quant.passing and not self.input_quant.stays_float
        return calibrating or self.weight_quant.passing or torch.is_grad_enabled()

    def keep_weight(self) -> Tensor:
        """The fake-quantized weight, made anew only for another or a rewritten scale or weight."""
        sources = self.weight_quant.scale, self.weight
        return self.kept.get("weight", sources, self.quantize_weight)

    def simulate(self, x: Tensor) -> Tensor:
        """The layer in float, on a kept weight."""
        return self.product(self.input_quant(x), self.keep_weight(), self.bias)


class FastConv2d(FastWeight, QuantConv2d):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.plain else self.simulate(x)


class FastLinear(FastWeight, QuantLinear):  # type: ignore[misc]
    """A linear layer that keeps its weight; with `integer`, one that multiplies integers."""

    integer = False

    def forward(
        self, x: Tensor, act: nn.Module | None = None, into: Quantizer | None = None
    ) -> Tensor:
        """(..., in), float or this layer's uint8 codes, to (..., out), with an activation function.

        `into` is the point that sees the output next: the layer then returns its codes.
        """
        point = self.code_point
        if self.plain or point is None:
            y = super().forward(x) if self.plain else self.simulate(x)
            return y if act is None else act(y)
        codes = x if x.dtype is torch.uint8 else point.codes(x)
        packed, shift = self.pack_weight()
        source = codes, point.number, point.code_of_zero, packed, self.bias
        if shift is not None:  # the kernel knows none, so its activation would come too early
            total = codes.sum(-1, dtype=torch.int32) - self.in_features * point.code_of_zero
            y = multiply(*source).addcmul_(total[..., None] * point.number, shift)
            return y if act is None else act(y)
        form = ("none", "") if act is None else kernel_name(act)
        if form is None:
            assert act is not None
            return act(multiply(*source))
        if into is None:
            return multiply(*source, *form)
        assert isinstance(into, FastQuantizer)
        out = multiply(*source, *form, out=(into.number, into.code_of_zero))
        most = into.integers.hi - into.integers.lo
        return out if most == 255 else out.clamp_(max=most)

    @property
    def code_point(self) -> FastQuantizer | None:
        """The point whose codes it multiplies, None if it simulates."""
        point = self.input_quant
        integer = self.integer and isinstance(point, FastQuantizer) and not point.passing
        return cast(FastQuantizer, point) if integer else None

    def pack_weight(self) -> tuple[Packed, Tensor | None]:
        """The weight as the kernel wants it, made anew as `keep_weight` is, and a shift (out,).

        The shift belongs to every weight of a row; None for no shift.
        """
        point = self.weight_quant

        def make() -> tuple[Packed, Tensor | None]:
            integers, scale = point.to_integers(self.weight), point.scale
            shift: Tensor | None = None
            if self.moment_correction:
                scale, shift = match_moments(integers, self.weight)
            if not point.symmetric and point.integers.bits == 8:
                # From a zero point, 8 bits count -255 ... 255; from the middle they fit into int8.
                middle = 128 - point.zero_point
                shift = scale * middle + (0.0 if shift is None else shift)
                integers = integers - along(middle, 2, 0)
            return pack(integers.to(torch.int8), scale), shift

        return self.kept.get("packed", (point.scale, point.zero_point, self.weight), make)


class FastMlp(Mlp):
    """timm's `Mlp`: what fc1 writes may already be the codes that fc2 reads."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to the same."""
        fc1, fc2 = self.fc1, self.fc2
        whole = isinstance(fc1, FastLinear) and isinstance(fc2, FastLinear)
        if not whole or fc1.plain or fc2.plain:
            return super().forward(x)
        ready = isinstance(self.norm, nn.Identity) and fc1.code_point and kernel_name(self.act)
        into = fc2.code_point if ready else None
        return self.drop2(fc2(self.norm(self.drop1(fc1(x, act=self.act, into=into)))))


class FastProducts(QuantProducts):
    """Attention's two products, in place; units are folded into the next scale.

    With `integer`, products large enough to be worth it are made of integers.
    """

    integer = False

    def product(
        self, left: Tensor, left_point: FastQuantizer, right: Tensor, right_point: FastQuantizer
    ) -> Tensor:
        """`left @ right` for the integers of two points, used up; both ways give the same."""
        if self.integer and batch_pays(left, right):
            return multiply_batch(left, left_point.middle, right, right_point.middle)
        return left @ right

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As the plain one."""
        points = self.q, self.k, self.v, self.scores
        if torch.is_grad_enabled() or any(p.passing for p in (*points, self.probabilities)):
            return super().forward(q, k, v, scale, bias, mask)
        fast_q, fast_k, fast_v, fast_scores = points
        assert isinstance(fast_q, FastQuantizer) and isinstance(fast_k, FastQuantizer)
        assert isinstance(fast_v, FastQuantizer) and isinstance(fast_scores, FastQuantizer)
        keys = fast_k.to_integers(k).transpose(-2, -1)
        scores = self.product(fast_q.to_integers(q), fast_q, keys, fast_k)
        unit = fast_q.number * fast_k.number * scale
        if bias is not None:
            scores, unit = scores * unit + bias, 1.0
        scores = fast_scores(scores, unit, spend=True)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        shares, values, step = scores.softmax(-1), fast_v.to_integers(v), fast_v.number
        if isinstance(self.probabilities, FastQuantizer):
            shares = self.probabilities.to_integers(shares, spend=True)
            step = self.probabilities.number * step
            attended = self.product(shares, self.probabilities, values, fast_v)
        else:  # powers of two
            attended = self.probabilities.to_integers(shares) @ values
        return scale_into(attended.transpose(1, 2), step).flatten(2)


class FastBlock(QuantBlock):
    """timm's ViT block: nobody else needs the sums, so they are quantized in place."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(images, tokens, channels) to the same."""
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = self.sum1(x + self.drop_path1(self.ls1(attended)), spend=True)
        return self.sum2(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), spend=True)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    Quantizer: FastQuantizer,
    QuantLinear: FastLinear,
    QuantConv2d: FastConv2d,
    QuantProducts: FastProducts,
    QuantBlock: FastBlock,
    Mlp: FastMlp,
}
PLAIN = {fast: plain for plain, fast in FAST.items()}


def set_execution(qmodel: nn.Module, execution: str = "auto") -> str:
    """Choose how a quantized network computes; returns which of the first three it is now.

    "plain" is the classes that lessons print, "simulate" the same in float and fast, "integer"
    multiplies integers in linear layers. "auto" takes integers where they are exact, and otherwise
    simulates and logs why; "integer" raises ValueError there.
    """
    if execution not in EXECUTIONS:
        raise ValueError(f"unknown execution {execution!r}; known: {', '.join(EXECUTIONS)}")
    reason = why_not_integer(qmodel)
    if reason and execution == "integer":
        raise ValueError(
            f"integer execution is not possible: {reason}; give execution simulate, or auto"
        )
    if reason and execution == "auto":
        logging.getLogger("evolq_lite").info("execution is simulated: %s", reason)
    if execution == "auto":
        execution = "simulate" if reason else "integer"
    for module in qmodel.modules():
        kind = PLAIN.get(type(module), type(module))
        if kind in FAST:
            module.__class__ = kind if execution == "plain" else FAST[kind]
            if not hasattr(module, "kept"):  # what is there knows by itself whether it is stale
                module.kept = Kept()  # type: ignore[assignment]
        if isinstance(module, FastLinear | FastProducts):
            module.integer = execution == "integer"
    return execution


def why_not_integer(qmodel: nn.Module) -> str:
    """What keeps a quantized network from integer execution on this machine; "" if nothing."""
    layers = [module for module in qmodel.modules() if isinstance(module, QuantLinear)]
    if not layers:
        return "the network has no quantized linear layer"
    for layer in layers:
        weight, point = layer.weight, layer.weight_quant
        if weight.dtype != torch.float32:
            return (
                f"weights are {str(weight.dtype).removeprefix('torch.')}, its kernel takes float32"
            )
        # Counted from its zero point, an asymmetric weight takes one bit more, up to 8.
        if reason := missing(
            min(point.integers.bits + (not point.symmetric), 8), weight.device.type
        ):
            return reason
    return ""
