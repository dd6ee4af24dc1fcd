"""One quantization point of a network: a module with a scale and a zero point. Read with lesson 2.

A point sits wherever a number would become an integer on a chip: before each matrix product, on
each weight, after each sum. It has two lives:

    while calibrating      x passes unchanged; an observer looks at it and proposes a scale
    afterwards             x becomes to_integers(x) * step_size, what the integers can tell apart

Scale and zero point are *buffers*, not parameters: `model.parameters()` are the float weights of
the network as trained, and the vector that Evol-Q searches is made of the buffers.
"""

import torch
from torch import Tensor, nn

from evolq_lite.config import QuantConfig
from evolq_lite.numerics import IntRange, along, log2_fake_quantize, to_integers
from evolq_lite.observers import OBSERVERS, Observer


class Quantizer(nn.Module):
    """A uniform quantization point; `axis` is the channel axis of its scales, None for one scale.

    `passing` lets float numbers through: while calibrating, or to keep the point out of a network.
    A point that is neither calibrated nor passing raises RuntimeError.
    """

    scale: Tensor  # () or (channels,)
    zero_point: Tensor  # of the same shape, or () beside (channels,)

    def __init__(
        self,
        integers: IntRange,
        observer: str,
        symmetric: bool,
        axis: int | None = None,
        **options: int,
    ) -> None:
        """`options` are those of the observer."""
        super().__init__()
        self.integers, self.observer_name, self.options = integers, observer, options
        self.symmetric, self.axis = symmetric, axis
        self.register_buffer("scale", torch.tensor(torch.nan))
        self.register_buffer("zero_point", torch.tensor(0.0))
        self.observer: Observer | None = None
        self.passing = False
        self.stays_float = False  # passing for good
        self.frozen = False

    def observe(self) -> None:
        """Start looking at what passes."""
        observer = OBSERVERS[self.observer_name]
        self.observer = observer(self.integers, self.axis, self.symmetric, **self.options)
        self.passing = True

    def freeze(self) -> None:
        """Stop looking, and choose scale and zero point from what was seen."""
        assert self.observer is not None
        self.scale, self.zero_point = self.observer.params()
        self.observer, self.passing, self.frozen = None, False, True

    def stay_float(self) -> None:
        """Let floats pass for good: calibration leaves the point alone."""
        self.passing = self.stays_float = True

    @property
    def step_size(self) -> Tensor | float:
        """What one integer is worth, 1 while floats pass.

        In float64, so that a product of several step sizes is rounded once, when it is used.
        """
        return 1.0 if self.passing else self.scale.double()

    def to_integers(self, x: Tensor, unit: Tensor | float = 1.0) -> Tensor:
        """The integers that stand for x * unit (any shape), counted from the zero point.

        `unit` is what a sum of integer products is worth; it divides the scale, as on a chip, where
        the sum is multiplied once. While floats pass, x * unit.
        """
        if self.passing:
            x = x * unit
            if self.observer is not None:
                self.observer.update(x)
            return x
        if not self.frozen:
            raise RuntimeError(
                "this network is not calibrated; call calibrate(qmodel, images) first"
            )
        return to_integers(x, self.scale / unit, self.zero_point, self.integers, self.axis)

    def forward(self, x: Tensor, unit: Tensor | float = 1.0) -> Tensor:
        """Fake-quantize x * unit, of any shape."""
        integers = self.to_integers(x, unit)
        return integers if self.passing else integers * along(self.scale, x.ndim, self.axis)


class FixedIntegers(Quantizer):
    """A weight's point that holds its integers whatever its scale is: weight = integer * scale."""

    fixed: Tensor  # int16, of the weight's shape, counted from the zero point

    @classmethod
    def of(cls, point: Quantizer, weight: Tensor) -> "FixedIntegers":
        """A point that holds the integers that another one gives a weight now."""
        new = cls(point.integers, point.observer_name, point.symmetric, point.axis)
        new.scale, new.zero_point, new.frozen = point.scale, point.zero_point, True
        new.register_buffer("fixed", point.to_integers(weight.detach()).to(torch.int16))
        return new

    def thaw(self) -> Quantizer:
        """The point that rounds again."""
        point = Quantizer(self.integers, self.observer_name, self.symmetric, self.axis)
        point.scale, point.zero_point, point.frozen = self.scale, self.zero_point, True
        return point

    def to_integers(self, x: Tensor, unit: Tensor | float = 1.0) -> Tensor:
        """Those that it holds, whatever x is."""
        return x * unit if self.passing else self.fixed.to(x.dtype)


class Log2Quantizer(nn.Module):
    """Probabilities as powers of two; it has no scale, so there is nothing to calibrate."""

    step_size = 1.0

    def __init__(self, integers: IntRange) -> None:
        super().__init__()
        self.integers = integers
        self.passing = False
        self.stays_float = False

    def stay_float(self) -> None:
        """Let floats pass for good."""
        self.passing = self.stays_float = True

    def to_integers(self, x: Tensor) -> Tensor:
        """Powers of two for probabilities of any shape: their integers are the exponents."""
        return x if self.passing else log2_fake_quantize(x, self.integers.bits)


def act_quantizer(config: QuantConfig) -> Quantizer:
    """One scale for a whole tensor of activations."""
    integers = IntRange(config.act_bits, signed=config.act_symmetric)
    return Quantizer(integers, config.act_observer, config.act_symmetric)


def sum_quantizer(config: QuantConfig) -> Quantizer:
    """For a residual sum (..., channels): one scale, factors of two, or one scale per channel."""
    integers, symmetric = IntRange(config.act_bits, config.act_symmetric), config.act_symmetric
    match config.sums:
        case "ptf":
            return Quantizer(integers, "ptf", symmetric, axis=-1, levels=config.ptf_levels)
        case "channel":
            return Quantizer(integers, config.act_observer, symmetric, axis=-1)
        case _:
            return act_quantizer(config)


def probability_quantizer(config: QuantConfig) -> Quantizer | Log2Quantizer:
    """For softmax outputs: uniform from 0 to the largest seen, or powers of two."""
    integers = IntRange(config.attention_bits or config.act_bits, signed=False)
    if config.log2_attention:
        return Log2Quantizer(integers)
    return Quantizer(integers, config.act_observer, symmetric=False)


def weight_quantizer(config: QuantConfig) -> Quantizer:
    """One scale per output channel (axis 0): these scales are what Evol-Q searches."""
    integers = IntRange(config.weight_bits, signed=config.weight_symmetric)
    return Quantizer(integers, config.weight_observer, config.weight_symmetric, axis=0)
