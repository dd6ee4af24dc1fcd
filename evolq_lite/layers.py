"""Layers whose numbers pass through quantizers: every quantization point, on two screens.

A layer is made from a trained one with `from_float`: the same object in a new class, with
quantizers added. It shares the weights (nothing is copied) and keeps timm's names, so
`blocks.3.attn.qkv.weight` stays where it was. Only `forward` is written anew, and only where timm
has no slot for a quantizer: between a matrix product and a softmax, after a sum.

In a transformer block, with [ ] for a quantizer:

    x --+--> norm1 --> [] qkv --> [q] [k] --> q k^T --> [scores] --> softmax --+
        |   +------------------------------------------------------------------+
        |   +--> [probabilities] x [v] --> [] proj --+--> [sum]
        +--------------------------------------------+

and the same for norm2 --> [] fc1 --> GELU --> [] fc2. The weights of qkv, proj, fc1, fc2 have one
scale per output channel; these scales are what Evol-Q searches.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from timm.models import levit, resnet, swin_transformer, vision_transformer
from torch import Tensor, nn

from evolq_lite.config import QuantConfig
from evolq_lite.integer import Packed, kernel_name, multiply, pack
from evolq_lite.numerics import IntRange, along, centred, log2_fake_quantize, scaled
from evolq_lite.observers import OBSERVERS, Observer


class Kept:
    """A value made from tensors, kept until one of them is another or was written to.

    A candidate's scales are other tensors, so it pays for the weights of the searched block only,
    and once. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self.sources: tuple[tuple[Tensor, int], ...] = ()
        self.value: Any = None

    def get(self, sources: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
        """The value for these tensors; `make` is called if it is not at hand."""
        if any(tensor.is_inference() for tensor in sources):  # they do not count their changes
            return make()
        if len(sources) != len(self.sources) or any(
            tensor is not old or tensor._version != version
            for tensor, (old, version) in zip(sources, self.sources, strict=True)
        ):
            self.value = make()
            self.sources = tuple((tensor, tensor._version) for tensor in sources)
        return self.value

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return Kept, ()


class Quantizer(nn.Module):
    """One quantization point: scale and zero point are buffers; `parameters()` stay float weights.

    `axis` is the channel axis of per-channel scales, None for one scale per tensor. While
    `observing`, tensors pass unchanged and are only looked at; `freeze` then sets the buffers.
    Before that, using it raises RuntimeError.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, integers: IntRange, observer: str, symmetric: bool, axis: int | None = None
    ) -> None:
        super().__init__()
        self.integers, self.observer_name = integers, observer
        self.symmetric, self.axis = symmetric, axis
        self.register_buffer("scale", torch.tensor(torch.nan))
        self.register_buffer("zero_point", torch.tensor(0.0))
        self.observer: Observer | None = None
        self.frozen = False
        self._zero, self._unit = Kept(), Kept()  # numbers: asking a tensor for them takes long

    def observe(self) -> None:
        """Start looking at what passes."""
        self.observer = OBSERVERS[self.observer_name](self.integers, self.axis, self.symmetric)

    def freeze(self) -> None:
        """Stop looking, and choose scale and zero point."""
        assert self.observer is not None
        self.scale, self.zero_point = self.observer.params()
        self.observer, self.frozen = None, True

    @property
    def unit(self) -> Tensor | float:
        """What one step of `centred` is worth: the scale, 1 while observing.

        A plain number for one scale per tensor, unless its gradient is asked for.
        """
        if self.observer is not None:
            return 1.0
        if self.scale.ndim or self.scale.requires_grad:
            return self.scale
        return self._unit.get((self.scale,), lambda: float(self.scale))

    @property
    def zero(self) -> int:
        """The one zero point of a tensor, as a number."""
        return self._zero.get((self.zero_point,), lambda: int(self.zero_point))

    @property
    def code_of_zero(self) -> int:
        """The code that stands for 0, with one zero point per tensor."""
        return self.zero - self.integers.lo

    def forward(self, x: Tensor, unit: Tensor | float = 1.0, spend: bool = False) -> Tensor:
        """Fake-quantize x * unit, or look on; any shape. `spend`: x may be overwritten."""
        integers, scale = self.centred(x, unit, spend), self.unit
        if self.observer is not None:
            return integers
        if isinstance(scale, Tensor):
            scale = along(scale, x.ndim, self.axis)
        if integers.requires_grad or (isinstance(scale, Tensor) and scale.requires_grad):
            return integers * scale
        return integers.mul_(scale)

    def centred(self, x: Tensor, unit: Tensor | float = 1.0, spend: bool = False) -> Tensor:
        """The integers q - zero_point of x * unit as floats; while observing, x * unit itself.

        uint8 is taken for codes that another layer has already made.
        """
        if x.dtype is torch.uint8:
            return x.float() - self.code_of_zero
        if self.observer is not None:
            x = x * unit
            self.observer.update(x)
            return x
        if not self.frozen:
            raise RuntimeError(
                "this network is not calibrated; call calibrate(qmodel, images) first"
            )
        scale = self.unit
        if isinstance(scale, Tensor):
            scale = along(scale, x.ndim, self.axis)
        zero = self.zero if self.zero_point.ndim == 0 else along(self.zero_point, x.ndim, self.axis)
        return centred(x, scale / unit, zero, self.integers, spend)

    def codes(self, x: Tensor) -> Tensor:
        """The integers as uint8 codes, counted from the smallest: 0 ... 2^bits - 1; any shape.

        uint8 is taken for codes that another layer has already made.
        """
        if x.dtype is torch.uint8:
            return x
        return self.centred(x).add_(self.code_of_zero).to(torch.uint8)


class Log2Quantizer(nn.Module):
    """Probabilities as powers of two; has no scale, so there is nothing to calibrate."""

    def __init__(self, integers: IntRange) -> None:
        super().__init__()
        self.integers = integers
        self.passing = False

    unit = 1.0

    def centred(self, x: Tensor, spend: bool = False) -> Tensor:
        """Fake-quantize probabilities of any shape."""
        return x if self.passing else log2_fake_quantize(x, self.integers.bits)


def act_quantizer(config: QuantConfig) -> Quantizer:
    """A per-tensor activation quantizer."""
    symmetric = config.act_symmetric
    return Quantizer(IntRange(config.act_bits, signed=symmetric), config.act_observer, symmetric)


def sum_quantizer(config: QuantConfig) -> Quantizer:
    """Quantizer of a residual sum (..., channels): power-of-two factors if the config says so."""
    integers = IntRange(config.act_bits, signed=config.act_symmetric)
    if not config.ptf:
        return act_quantizer(config)
    return Quantizer(integers, "ptf", config.act_symmetric, axis=-1)


def probability_quantizer(config: QuantConfig) -> Quantizer | Log2Quantizer:
    """A quantizer of softmax outputs: uniform on [0, max], or log2."""
    integers = IntRange(config.attention_bits or config.act_bits, signed=False)
    return (
        Log2Quantizer(integers)
        if config.log2_attention
        else Quantizer(integers, config.act_observer, False)
    )


def weight_quantizer(config: QuantConfig) -> Quantizer:
    """A quantizer of weights, one scale per output channel (axis 0)."""
    symmetric = config.weight_symmetric
    return Quantizer(
        IntRange(config.weight_bits, signed=symmetric), config.weight_observer, symmetric, axis=0
    )


class FromFloat:
    """Mixin: become the quantized form of a timm or torch module."""

    @classmethod
    def from_float(cls, module: Any, config: QuantConfig) -> Self:
        """Make this layer from a float one, which stays as it was; parameters are shared."""
        new = cls.__new__(cls)
        new.__dict__ = module.__dict__.copy()
        for kind in ("_parameters", "_buffers", "_modules"):
            new.__dict__[kind] = module.__dict__[kind].copy()
        new.add_quantizers(config)
        return new

    def add_quantizers(self, config: QuantConfig) -> None:
        """Create the quantizers that `forward` uses."""
        raise NotImplementedError


class QuantWeight(FromFloat):
    """Common to linear and convolution: quantized input times quantized weight, which is kept."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    integer = False  # see `convert.set_execution`

    def add_quantizers(self, config: QuantConfig) -> None:
        """One quantizer for the input, one for the weight."""
        self.input_quant = act_quantizer(config)
        self.weight_quant = weight_quantizer(config)
        self._simulated, self._packed = Kept(), Kept()
        self._float_bias = (self.bias,)  # a tuple, so that torch sees one bias only

    def forget_correction(self) -> None:
        """Go back to the float layer's bias."""
        self.bias = self._float_bias[0]

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's matrix product."""
        raise NotImplementedError

    def quantized_weight(self) -> Tensor:
        """The fake-quantized weight; made anew only for another or rewritten scale or weight."""
        scale, weight = self.weight_quant.scale, self.weight
        observer = self.weight_quant.observer
        if observer is not None and observer.lo is not None:
            return weight  # seen already: every batch has the same one
        if observer is not None or (torch.is_grad_enabled() and scale.requires_grad):
            return self.weight_quant(weight)
        with torch.no_grad():
            return self._simulated.get((scale, weight), lambda: self.weight_quant(weight))

    def forward(self, x: Tensor) -> Tensor:
        """As the float layer, on quantized numbers."""
        return self.product(self.input_quant(x), self.quantized_weight(), self.bias)


class QuantLinear(QuantWeight, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` on quantized input and weight; the one place that may multiply integers."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in) times (out, in), plus bias (out,)."""
        return F.linear(x, weight, bias)

    def forward(
        self, x: Tensor, act: nn.Module | None = None, into: Quantizer | None = None
    ) -> Tensor:
        """(..., in), float or this layer's codes, to (..., out), with an activation function.

        `into` is the quantizer that sees the output next: integer execution then returns its codes,
        which it recognises as such. Where a gradient flows, or the network is being calibrated, the
        layer simulates.
        """
        scale, observing = self.weight_quant.scale, self.input_quant.observer is not None
        flows = torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)
        if self.integer and not (observing or flows):
            with torch.no_grad():
                return self._multiplied(self.input_quant.codes(x), act, into)
        y = super().forward(x)
        return y if act is None else act(y)

    def _multiplied(self, codes: Tensor, act: nn.Module | None, into: Quantizer | None) -> Tensor:
        """The integer product of codes (..., in)."""
        scale, weight = self.weight_quant.scale, self.weight
        packed: Packed = self._packed.get(
            (scale, weight),
            lambda: pack(self.weight_quant.centred(weight).to(torch.int8), scale),
        )
        point = self.input_quant
        source = codes, float(point.unit), point.code_of_zero, packed, self.bias
        form = ("none", "") if act is None else kernel_name(act)
        if form is None:
            assert act is not None
            return act(multiply(*source))
        if into is None:
            return multiply(*source, *form)
        most = into.integers.hi - into.integers.lo
        out = multiply(*source, *form, out=(float(into.unit), into.code_of_zero))
        return out if most == 255 else out.clamp_(max=most)


class QuantConv2d(QuantWeight, nn.Conv2d):  # type: ignore[misc]
    """`nn.Conv2d` on quantized input and weight."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(images, in, height, width) convolved with (out, in / groups, kernel, kernel)."""
        return self._conv_forward(x, weight, bias)


class QuantProducts(nn.Module):
    """Attention's two products, all five operands quantized: q, k, scores, probabilities, v.

    Both products are of integers held in floats, exact below 2^24, and scaled afterwards: the same
    in either execution.
    """

    def __init__(self, config: QuantConfig) -> None:
        super().__init__()
        self.q, self.k, self.v = act_quantizer(config), act_quantizer(config), act_quantizer(config)
        self.scores, self.probabilities = act_quantizer(config), probability_quantizer(config)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend: q, k (images, heads, tokens, key dim), v (images, heads, tokens, value dim).

        Returns (images, tokens, heads * value dim), which the projection reads. `scale` multiplies
        the scores; `bias` is added to them before they are quantized, `mask` (0 or very negative,
        or boolean) after.
        """
        scores = self.q.centred(q) @ self.k.centred(k).transpose(-2, -1)
        unit = self.q.unit * self.k.unit * scale
        if bias is not None:
            scores, unit = scores * unit + bias, 1.0
        scores = self.scores(scores, unit, spend=True)
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            )
        attended = self.probabilities.centred(scores.softmax(-1), spend=True) @ self.v.centred(v)
        unit = self.probabilities.unit * self.v.unit
        return scaled(attended.transpose(1, 2), unit).flatten(2)


class QuantAttention(FromFloat, Attention):
    """timm's `Attention` (ViT, DeiT), with `attn_mask`; ValueError for gated or causal variants."""

    def add_quantizers(self, config: QuantConfig) -> None:
        """Quantize the operands of both products."""
        if self.gate is not None:
            raise ValueError(
                "gated attention is not supported; quantize it by hand with QuantProducts"
            )
        self.products = QuantProducts(config)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(images, tokens, channels) to the same."""
        if is_causal:
            raise ValueError("causal attention is not supported: pass attn_mask instead")
        images, tokens, _ = x.shape
        q, k, v = (
            self.qkv(x)
            .view(images, tokens, 3, self.num_heads, self.head_dim)
            .permute(2, 0, 3, 1, 4)
        )
        x = self.products(self.q_norm(q), self.k_norm(k), v, self.scale, mask=attn_mask)
        return self.proj_drop(self.proj(self.norm(x)))


class QuantMlp(FromFloat, Mlp):
    """timm's `Mlp` (ViT, DeiT, Swin): what fc1 writes may already be the codes that fc2 reads."""

    def add_quantizers(self, config: QuantConfig) -> None:
        """None of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to the same."""
        if not (isinstance(self.fc1, QuantLinear) and isinstance(self.norm, nn.Identity)):
            return super().forward(x)
        x = self.drop1(self.fc1(x, act=self.act, into=self.fc2.input_quant))
        return self.drop2(self.fc2(x))


class QuantBlock(FromFloat, vision_transformer.Block):
    """timm's ViT block, both residual sums quantized: they are the inputs of the next LayerNorm."""

    def add_quantizers(self, config: QuantConfig) -> None:
        """Quantize the sums."""
        self.sum1, self.sum2 = sum_quantizer(config), sum_quantizer(config)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(images, tokens, channels) to the same."""
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = self.sum1(x + self.drop_path1(self.ls1(attended)), spend=True)
        return self.sum2(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), spend=True)


class QuantWindowAttention(FromFloat, swin_transformer.WindowAttention):
    """timm's Swin attention within windows, with relative position bias."""

    def add_quantizers(self, config: QuantConfig) -> None:
        """Quantize the operands of both products."""
        self.products = QuantProducts(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(windows, tokens, channels) to the same; mask (windows per image, tokens, tokens)."""
        windows, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(windows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        # One mask for every window of an image, the same for all images and heads.
        if mask is not None:
            mask = mask.repeat(windows // len(mask), 1, 1).unsqueeze(1)
        x = self.products(q, k, v, self.scale, bias=self._get_rel_pos_bias(), mask=mask)
        return self.proj_drop(self.proj(x))


class QuantSwinBlock(FromFloat, swin_transformer.SwinTransformerBlock):
    """timm's Swin block, with its two residual sums quantized."""

    def add_quantizers(self, config: QuantConfig) -> None:
        """Quantize the sums."""
        self.sum1, self.sum2 = sum_quantizer(config), sum_quantizer(config)

    def forward(self, x: Tensor) -> Tensor:
        """(images, height, width, channels) to the same."""
        x = self.sum1(x + self.drop_path1(self._attn(self.norm1(x))), spend=True)
        return self.sum2(x + self.drop_path2(self.mlp(self.norm2(x))), spend=True)


class QuantLevitAttention(FromFloat, levit.Attention):
    """timm's LeViT attention, in its linear form."""

    def add_quantizers(self, config: QuantConfig) -> None:
        """Quantize the operands of both products; ValueError for the convolutional form."""
        if self.use_conv:
            raise ValueError("LeViT with convolutions (levit_conv_*) is not supported; use levit_*")
        self.products = QuantProducts(config)

    def forward(self, x: Tensor) -> Tensor:
        """(images, tokens, channels) to the same."""
        images, tokens, _ = x.shape
        qkv = self.qkv(x).view(images, tokens, self.num_heads, -1).transpose(1, 2)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=3)
        x = self.products(q, k, v, self.scale, bias=self.get_attention_biases(x.device))
        return self.proj(x)


class QuantLevitDownsample(FromFloat, levit.AttentionDownsample):
    """timm's LeViT attention with fewer queries than keys, between stages."""

    def add_quantizers(self, config: QuantConfig) -> None:
        """Quantize the operands of both products; ValueError for the convolutional form."""
        if self.use_conv:
            raise ValueError("LeViT with convolutions (levit_conv_*) is not supported; use levit_*")
        self.products = QuantProducts(config)

    def forward(self, x: Tensor) -> Tensor:
        """(images, tokens, channels) to (images, fewer tokens, more channels)."""
        images, tokens, _ = x.shape
        kv = self.kv(x).view(images, tokens, self.num_heads, -1).transpose(1, 2)
        k, v = kv.split([self.key_dim, self.val_dim], dim=3)
        q = self.q(x).view(images, -1, self.num_heads, self.key_dim).transpose(1, 2)
        x = self.products(q, k, v, self.scale, bias=self.get_attention_biases(x.device))
        return self.proj(x)


class QuantLevitBlock(FromFloat, levit.LevitBlock):
    """timm's LeViT block, both residual sums quantized (per tensor: no LayerNorm follows)."""

    def add_quantizers(self, config: QuantConfig) -> None:
        """Quantize the sums."""
        self.sum1, self.sum2 = act_quantizer(config), act_quantizer(config)

    def forward(self, x: Tensor) -> Tensor:
        """(images, tokens, channels) to the same."""
        x = self.sum1(x + self.drop_path1(self.attn(x)), spend=True)
        return self.sum2(x + self.drop_path2(self.mlp(x)), spend=True)


QUANTIZED: dict[type[nn.Module], type[FromFloat]] = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
    Attention: QuantAttention,
    Mlp: QuantMlp,
    vision_transformer.Block: QuantBlock,
    swin_transformer.WindowAttention: QuantWindowAttention,
    swin_transformer.SwinTransformerBlock: QuantSwinBlock,
    levit.Attention: QuantLevitAttention,
    levit.AttentionDownsample: QuantLevitDownsample,
    levit.LevitBlock: QuantLevitBlock,
}
LAST_ACTIVATION: dict[type[nn.Module], str] = {resnet.BasicBlock: "act2", resnet.Bottleneck: "act3"}
