"""Uniform quantization in a few pure functions: the lecture of lesson 1.

A real number x is stored as an integer q in a small range [lo, hi] of `bits` bits:

    q  = clamp(round(x / scale) + zero_point, lo, hi)        quantize
    x' = (q - zero_point) * scale                            dequantize

`fake_quantize` does both at once and stays in float: x' is what the integer network would see. Two
errors arise. Inside the range x' is off by at most scale / 2 (*rounding*); outside it x' is the
nearest end of the range (*clipping*). A larger scale clips less and rounds more: choosing it is
what observers (lesson 2) and Evol-Q (lesson 6) are about.

`round` has derivative zero wherever it has one. Between two flips x' moves evenly with the scale;
where an integer flips it jumps, and the true gradient does not see the jumps. `round_ste` pretends
that the derivative is one (Bengio et al., arXiv 1308.3432): the gradient that lesson 5 races.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST_SCALE = torch.finfo(torch.float32).eps  # of a channel that is all zeros


@dataclass(frozen=True)
class IntRange:
    """The integers of a bit-width: `IntRange(4, True)` is -8 to 7, `IntRange(8, False)` 0 to 255.

    Raises ValueError for bits outside 2 to 8.
    """

    bits: int
    signed: bool

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be a whole number from 2 to 8, not {self.bits!r}")

    @property
    def lo(self) -> int:
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def hi(self) -> int:
        return self.lo + 2**self.bits - 1


def affine_params(
    lo: Tensor, hi: Tensor, integers: IntRange, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point so that integers cover [lo, hi] (any one shape), widened to hold zero.

    Symmetric: zero point 0 (in the middle of the integers), scale = 2 max(|lo|, |hi|) / (number of
    steps), as FQ-ViT does; the largest value then clips by half a step. Asymmetric: the ends of
    [lo, hi] are the ends of the integers.
    """
    # Zero must be a number of its own: padding and ReLU make many exact zeros.
    lo, hi = lo.clamp(max=0.0), hi.clamp(min=0.0)
    steps = integers.hi - integers.lo  # 2^bits - 1
    if symmetric:
        scale = (2 * torch.maximum(-lo, hi) / steps).clamp(min=SMALLEST_SCALE)
        middle = 0 if integers.signed else (steps + 1) // 2
        return scale, torch.full_like(scale, middle)
    scale = ((hi - lo) / steps).clamp(min=SMALLEST_SCALE)
    return scale, (integers.lo - (lo / scale).round()).clamp(integers.lo, integers.hi)


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged (straight-through estimator)."""
    return x + (x.round() - x).detach()


def along(parameter: Tensor, ndim: int, axis: int | None) -> Tensor:
    """View a scale () or (channels,) so that it broadcasts along `axis` of `ndim` dimensions."""
    if axis is None or parameter.ndim == 0:
        return parameter
    shape = [1] * ndim
    shape[axis] = -1
    return parameter.view(shape)


def to_integers(
    x: Float[Tensor, "*shape"],
    scale: Tensor,
    zero_point: Tensor,
    integers: IntRange,
    axis: int | None = None,
) -> Float[Tensor, "*shape"]:
    """The integers that stand for x, counted from the zero point: q - zero_point, as floats.

    `scale` and `zero_point` have shape () for one pair per tensor, or (channels,) along `axis`.
    """
    scale, zero_point = along(scale, x.ndim, axis), along(zero_point, x.ndim, axis)
    # Times the reciprocal, as torch's own kernel does; x / scale rounds differently now and then.
    q = round_ste(x * scale.reciprocal()) + zero_point
    return q.clamp(integers.lo, integers.hi) - zero_point


def fake_quantize(
    x: Float[Tensor, "*shape"],
    scale: Tensor,
    zero_point: Tensor,
    integers: IntRange,
    axis: int | None = None,
) -> Float[Tensor, "*shape"]:
    """Quantize and dequantize: the real numbers that the integers can tell apart.

    Shapes as in `to_integers`. Equals `torch.fake_quantize_per_channel_affine` bit for bit, and is
    differentiable in x and in scale through `round_ste`.
    """
    return to_integers(x, scale, zero_point, integers, axis) * along(scale, x.ndim, axis)


def match_moments(integers: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift (channels,), so that integers * scale + shift has the weight's moments.

    Both are (channels, ...), and the moments are each channel's mean and variance. A channel whose
    integers are all equal has no variance to scale: its scale is 1.
    """
    q, w = integers.flatten(1), weight.detach().flatten(1)
    variance = q.var(1, correction=0)
    flat = variance == 0
    ratio = w.var(1, correction=0) / torch.where(flat, 1.0, variance)
    scale = torch.where(flat, 1.0, ratio.sqrt())
    return scale, w.mean(1) - scale * q.mean(1)


def log2_fake_quantize(x: Float[Tensor, "*shape"], bits: int) -> Float[Tensor, "*shape"]:
    """Round probabilities in [0, 1] to powers of two, 2^0 ... 2^-(2^bits - 1), smaller to zero.

    Softmax outputs are mostly tiny: powers of two spend their levels there (FQ-ViT, arXiv
    2111.13824, section 3.3).
    """
    # x = 2^-exponent; log2 of zero would be infinite, so the smallest float stands for it
    exponent = -x.clamp(min=torch.finfo(x.dtype).tiny).log2()
    rounded = round_ste(exponent)
    # below the last power there is only zero
    return torch.where(rounded > 2**bits - 1, 0.0, (-rounded).exp2())
