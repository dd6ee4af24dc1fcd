"""How a quantizer finds its first scale: look at numbers, then choose a range. Read with lesson 2.

An observer sees tensors (`update`) and answers with a scale and a zero point (`params`). With
`axis`, each channel along that axis gets its own; without, the tensor gets one. They differ only in
the range that they take:

| observer | range |
|---|---|
| `MinMax` | smallest to largest value ever seen: clips nothing, one outlier spoils the rest |
| `MovingAverage` | smallest and largest of each batch, averaged with weight 0.9 on the past |
| `Percentile` | leaves out the outermost 0.01 % on either side |
| `MeanSquaredError` | the clip with the smallest squared error, searched for each channel |
| `PowerOfTwo` | one range per tensor; each channel divides its scale by a power of two (PTF) |
"""

from collections.abc import Callable

import torch
from torch import Tensor

from evolq_lite.numerics import IntRange, affine_params, fake_quantize

# Values that an observer keeps at most: enough for a percentile, small enough for a laptop, where a
# network has a hundred observers.
SAMPLES = 2**20


class Observer:
    """Common part: running range, and samples for those that need them.

    `integers` and `symmetric` are the quantizer's; `axis` is the channel axis, None for one range
    per tensor.
    """

    keeps_samples = False

    def __init__(
        self, integers: IntRange, axis: int | None = None, symmetric: bool = False
    ) -> None:
        self.integers, self.axis, self.symmetric = integers, axis, symmetric
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None
        self.samples: list[Tensor] = []
        self.every = 1  # one value in so many is kept
        self.generator = torch.Generator().manual_seed(0)

    def rows(self, x: Tensor) -> Tensor:
        """Reshape to (channels, values), or (1, values) without an axis."""
        return x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).flatten(1)

    def update(self, x: Tensor) -> None:
        """See one batch; ValueError if it holds NaN or infinity."""
        rows = self.rows(x.detach())
        lo, hi = rows.amin(1), rows.amax(1)
        if not (torch.isfinite(lo).all() and torch.isfinite(hi).all()):
            raise ValueError(
                "calibration met NaN or infinite values; check the images and the checkpoint"
            )
        self.lo, self.hi = (
            (lo, hi) if self.lo is None or self.hi is None else self.merge(self.lo, self.hi, lo, hi)
        )
        if self.keeps_samples:
            self.keep(rows)

    def forget_samples(self) -> None:
        """Keep the range only; samples start anew with the next batch."""
        self.samples, self.every = [], 1

    def keep(self, rows: Tensor) -> None:
        """Sample a batch (channels, values); thins out all samples whenever they are too many."""
        if self.axis is None:
            rows = self.drawn(rows)
        self.samples.append(rows[:, :: self.every].clone())
        while sum(part.numel() for part in self.samples) > SAMPLES:
            if max(part.shape[1] for part in self.samples) == 1:
                return
            self.samples = [part[:, ::2].clone() for part in self.samples]
            self.every *= 2

    def drawn(self, rows: Tensor) -> Tensor:
        """The values (1, n) of all channels in random order, at most SAMPLES.

        In their own order, one value in 2^k would belong to the same few channels every time.
        """
        n = rows.shape[1]
        if n > SAMPLES:
            order = torch.randint(n, (SAMPLES,), generator=self.generator)
        else:
            order = torch.randperm(n, generator=self.generator)
        return rows[:, order.to(rows.device)]

    def merge(
        self, lo: Tensor, hi: Tensor, new_lo: Tensor, new_hi: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Combine the range so far with that of a new batch, shapes (channels,)."""
        return torch.minimum(lo, new_lo), torch.maximum(hi, new_hi)

    def range(self) -> tuple[Tensor, Tensor]:
        """The range chosen, two tensors of shape (channels,)."""
        if self.lo is None or self.hi is None:
            raise ValueError("the observer has seen no data; calibrate with at least one batch")
        return self.lo, self.hi

    def params(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, of shape (channels,), or () without an axis."""
        scale, zero_point = affine_params(*self.range(), self.integers, self.symmetric)
        return (scale, zero_point) if self.axis is not None else (scale[0], zero_point[0])


class MinMax(Observer):
    """Smallest to largest value seen."""


class MovingAverage(Observer):
    """Exponential moving average of each batch's smallest and largest value."""

    momentum = 0.9

    def merge(
        self, lo: Tensor, hi: Tensor, new_lo: Tensor, new_hi: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keep 0.9 of the past."""
        m = self.momentum
        return m * lo + (1 - m) * new_lo, m * hi + (1 - m) * new_hi


class Percentile(Observer):
    """Between the 0.01th and the 99.99th percentile of the samples."""

    keeps_samples = True
    share = 1e-4

    def range(self) -> tuple[Tensor, Tensor]:
        """The values at the two percentiles of each channel."""
        super().range()
        ordered = torch.cat(self.samples, 1).sort(1).values  # (channels, samples)
        out = round(self.share * (ordered.shape[1] - 1))
        return ordered[:, out], ordered[:, ordered.shape[1] - 1 - out]


class MeanSquaredError(Observer):
    """The clip with the smallest mean squared error on the samples, searched for each channel.

    Tries 1.00, 0.99, ... 0.20 of the MinMax range, so it is never worse than MinMax on the samples.
    (The official code takes one factor for all channels, from the last batch only.)
    """

    keeps_samples = True
    factors = [1 - 0.01 * i for i in range(81)]

    def range(self) -> tuple[Tensor, Tensor]:
        """MinMax, shrunk channel by channel."""
        lo, hi = super().range()
        values = torch.cat(self.samples, 1)  # (channels, samples)
        best = torch.full_like(lo, torch.inf)  # squared error of each channel so far
        factor = torch.ones_like(lo)
        for candidate in self.factors:
            params = affine_params(lo * candidate, hi * candidate, self.integers, self.symmetric)
            error = (
                (fake_quantize(values, *params, self.integers, axis=0) - values).square_().mean(1)
            )
            better = error < best  # channel by channel: each keeps a factor of its own
            best, factor = torch.where(better, error, best), torch.where(better, candidate, factor)
        return lo * factor, hi * factor


class PowerOfTwo(Observer):
    """FQ-ViT's power-of-two factor: one scale and zero point, channels divide by 1, 2, 4, 8 ...

    Inputs of LayerNorm vary between channels by an order of magnitude (arXiv 2111.13824, section
    3.2). Factors that are powers of two are shifts in integer arithmetic. Needs an `axis`.
    """

    keeps_samples = True

    def __init__(
        self,
        integers: IntRange,
        axis: int | None = None,
        symmetric: bool = False,
        levels: int = 4,
    ) -> None:
        """`levels` is how many factors there are: 1, 2, 4 ... 2^(levels - 1)."""
        super().__init__(integers, axis, symmetric)
        self.levels = levels

    def params(self) -> tuple[Tensor, Tensor]:
        """Scales (channels,), coarsest / 2^k with least squared error; one zero point ()."""
        lo, hi = self.range()
        # One range for all channels, as if per tensor; finer channels then divide its scale.
        coarsest, zero_point = affine_params(lo.amin(), hi.amax(), self.integers, self.symmetric)
        values = torch.cat(self.samples, 1)
        scales = torch.stack([coarsest / 2**k for k in range(self.levels)])
        errors = torch.stack(
            [
                (fake_quantize(values, s, zero_point, self.integers) - values).square_().mean(1)
                for s in scales
            ]
        )
        return scales[errors.argmin(0)], zero_point


OBSERVERS: dict[str, Callable[..., Observer]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": MeanSquaredError,
    "ptf": PowerOfTwo,
}
