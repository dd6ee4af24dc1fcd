"""The layers of a vision transformer on quantized numbers: every point of a block, on two screens.

Read with lesson 2.

In a transformer block, with [ ] for a quantization point:

    x --+--> norm1 --> [] qkv --> [q] [k] --> q k^T --> [scores] --> softmax --+
        |   +------------------------------------------------------------------+
        |   +--> [probabilities] x [v] --> [] proj --+--> [sum]
        +--------------------------------------------+

and the same for norm2 --> [] fc1 --> GELU --> [] fc2. The weights of qkv, proj, fc1, fc2 have one
scale per output channel; those of qkv and proj are what Evol-Q searches.

A layer is made from a trained one with `from_float`: the same object in a new class, with points
added. It shares the weights (nothing is copied) and keeps timm's names, so
`blocks.3.attn.qkv.weight` stays where it was. Only `forward` is written anew, and only where timm
has no slot for a point: between a matrix product and a softmax, after a sum.

This is the definition of right, written to be read. `fast` computes the same numbers in a fraction
of the time, and a test holds the two together.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models import vision_transformer
from torch import Tensor, nn

from evolq_lite.config import QuantConfig
from evolq_lite.numerics import along, match_moments
from evolq_lite.quantizer import (
    FixedIntegers,
    act_quantizer,
    probability_quantizer,
    sum_quantizer,
    weight_quantizer,
)


class FromFloat:
    """Mixin: become the quantized form of a timm or torch module."""

    @classmethod
    def from_float(cls, module: Any, config: QuantConfig) -> Self:
        """Make this layer from a float one, which stays as it was; parameters are shared."""
        layer = cls.__new__(cls)
        layer.__dict__ = module.__dict__.copy()
        for kind in ("_parameters", "_buffers", "_modules"):
            layer.__dict__[kind] = module.__dict__[kind].copy()
        layer.add_points(config)
        return layer

    def add_points(self, config: QuantConfig) -> None:
        """Create the quantization points that `forward` uses; ValueError if it cannot be done."""
        raise NotImplementedError


class QuantWeight(FromFloat):
    """Common to linear and convolution: a quantized input times a quantized weight."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def add_points(self, config: QuantConfig) -> None:
        self.input_quant = act_quantizer(config)
        self.weight_quant = weight_quantizer(config)
        self.moment_correction = config.moment_correction
        self._float = (self.weight, self.bias)  # a tuple, so that torch sees one of each only
        self.chosen: tuple[Tensor, Tensor] | None = None  # integers and scale of a rounded weight
        self.calibrated: Tensor | None = None  # the scale before them

    def forget_rounding(self) -> None:
        """Go back to the float layer's weight and bias, and to the scale before rounding."""
        self.weight, self.bias = self._float
        self.thaw()
        if self.calibrated is not None:
            self.weight_quant.scale = self.calibrated
        self.chosen = self.calibrated = None

    def thaw(self) -> None:
        """Let the integers follow the scale, if they were frozen."""
        if isinstance(self.weight_quant, FixedIntegers):
            self.weight_quant = self.weight_quant.thaw()

    def multiply_inputs(self, factor: Tensor) -> None:
        """Multiply the weights of each input by a factor (inputs,), for good."""
        self.forget_rounding()
        self.weight = nn.Parameter(self.weight * factor, requires_grad=False)
        self._float = (self.weight, self.bias)

    @property
    def rounded(self) -> bool:
        """Whether the weight is integers times scale already (see `rounding`)."""
        return self.chosen is not None

    def set_integers(self, integers: Tensor, scale: Tensor) -> None:
        """Make the weight these integers, counted from the zero point, times a scale (rows,).

        Both are remembered: a search writes other scales over the point's.
        """
        self.thaw()
        if self.calibrated is None:
            self.calibrated = self.weight_quant.scale.clone()
        weight = integers * along(scale, integers.ndim, 0)
        self.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        self.weight_quant.scale = scale.clone()
        self.chosen = integers.to(torch.int16), scale.clone()

    def quantize_weight(self) -> Tensor:
        """The weight that the product takes: integers times scale, with the moments restored."""
        point = self.weight_quant
        if not self.moment_correction or point.passing:
            return point(self.weight)
        integers = point.to_integers(self.weight)
        # The point's own scale has chosen the integers; from the result it cancels out.
        scale, shift = match_moments(integers, self.weight)
        return integers * along(scale, integers.ndim, 0) + along(shift, integers.ndim, 0)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own matrix product."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """As the float layer, on quantized numbers."""
        return self.product(self.input_quant(x), self.quantize_weight(), self.bias)


class QuantLinear(QuantWeight, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` on quantized input and weight."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in) times (out, in), plus bias (out,)."""
        return F.linear(x, weight, bias)


class QuantConv2d(QuantWeight, nn.Conv2d):  # type: ignore[misc]
    """`nn.Conv2d` on quantized input and weight."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(images, in, height, width) convolved with (out, in / groups, kernel, kernel)."""
        return self._conv_forward(x, weight, bias)


class ChannelFactors(nn.Module):
    """Divides each channel (last axis) by a power of two, by which the next weights are multiplied.

    One scale serves a whole tensor badly where a few channels are a hundred times as large as the
    others, as in GELU's output. The network is the same, bit for bit, because powers of two are
    exact; only the points behind see other numbers. SmoothQuant (arXiv 2211.10438) moves ranges
    between activations and weights in this way.
    """

    factor: Tensor  # (channels,)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(channels))
        self.seen: list[Tensor] | None = None  # rows (n, channels) that have passed, if watched

    def even_out(self, strength: float) -> Tensor:
        """Factors (channels,) for what was seen: 1 for the median, and for silent channels.

        With strength 1 all channels get nearly the same range, with 0 all factors are 1.
        """
        assert self.seen is not None
        largest = torch.cat(self.seen).abs().amax(0)
        loud = largest > 0
        if not loud.any():
            return torch.ones_like(largest)
        logs = (largest / largest[loud].median()).log2().clamp(-16, 16)
        return torch.where(loud, (strength * logs).round().exp2(), 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to the same."""
        if self.seen is not None:
            rows = x.detach().flatten(0, -2)
            self.seen.append(rows[:: max(1, len(rows) // 2048)].clone())
        return x / self.factor


class QuantProducts(nn.Module):
    """Attention's two products on quantized q, k, probabilities and v; so are the scores."""

    def __init__(self, config: QuantConfig) -> None:
        super().__init__()
        self.q, self.k, self.v = act_quantizer(config), act_quantizer(config), act_quantizer(config)
        if config.qkv == "shared":
            self.k = self.v = self.q  # one point under three names
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
        # Sums of integer products, exact in float32 below 2^24; one is worth `unit`.
        scores = self.q.to_integers(q) @ self.k.to_integers(k).transpose(-2, -1)
        unit = self.q.step_size * self.k.step_size * scale
        if bias is not None:
            scores, unit = scores * unit + bias, 1.0  # (images, heads, queries, keys)
        scores = self.scores(scores, unit)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        probabilities = self.probabilities.to_integers(scores.softmax(-1))
        attended = probabilities @ self.v.to_integers(v)  # (images, heads, queries, value dim)
        unit = self.probabilities.step_size * self.v.step_size
        return (attended.transpose(1, 2) * unit).flatten(2)


class QuantAttention(FromFloat, Attention):
    """timm's `Attention` (ViT, DeiT), with `attn_mask`; ValueError for gated or causal variants."""

    def add_points(self, config: QuantConfig) -> None:
        if getattr(self, "gate", None) is not None:  # older versions of timm have none
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
        qkv = self.qkv(x).view(images, tokens, 3, self.num_heads, self.head_dim)
        # The three come from one layer, so they share one input point and one vector of scales.
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (images, heads, tokens, head dim)
        x = self.products(self.q_norm(q), self.k_norm(k), v, self.scale, mask=attn_mask)
        return self.proj_drop(self.proj(self.norm(x)))


class QuantBlock(FromFloat, vision_transformer.Block):
    """timm's ViT block, both residual sums quantized: they are the inputs of the next LayerNorm."""

    def add_points(self, config: QuantConfig) -> None:
        self.sum1, self.sum2 = sum_quantizer(config), sum_quantizer(config)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(images, tokens, channels) to the same."""
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = self.sum1(x + self.drop_path1(self.ls1(attended)))
        return self.sum2(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


# timm's MLP needs no form of its own: its two linear layers are quantized where they are.
QUANTIZED: dict[type[nn.Module], type[FromFloat]] = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
    Attention: QuantAttention,
    vision_transformer.Block: QuantBlock,
}
