"""Learned rounding: follow the gradient to a block's integers. Read with lesson 8.

GPTQ looks at one layer at a time, and rounds one input after another. AdaRound (Nagel et al., arXiv
2004.10568) decides about all weights at once. It makes the choice between two neighbors on the
grid continuous, and lets Adam learn v:

    weight = (low + h) * scale,    h = clamp(1.2 sigmoid(v) - 0.1, 0, 1)

A penalty, 1 - |2 h - 1|^power with a power that falls from 20 to 2, leaves h free at first and
drives it to 0 or 1 in the end. The loss is how far a whole block's output is from that of the float
network, as in BRECQ (Li et al., arXiv 2102.05426), so layers can make up for each other. Here it
starts at integers that are chosen already, learns biases too, and keeps what it started from where
it finds nothing better.

With `drop`, numbers that a block reads stay float at random: otherwise it learns the quirks of
rounded activations on a few images (QDrop, Wei et al., arXiv 2203.05740).

What makes this a rival for searches: in v, weights are not rounded, so their part of the gradient
is a true one; activations still need the straight-through estimator. The price is a block's loss
instead of the network's.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evolq_lite.layers import QuantConv2d, QuantLinear
from evolq_lite.numerics import along

COST_OF_GRADIENT = 3  # forwards
REACH = 10.0  # how far a v can go in all steps together; from 0, it is decided at 2.4
WARM = 0.2  # share of the steps without a penalty: first find out what is good, then decide
PENALTY = 300.0  # on weights that are wholly undecided; the loss is 1 at first
TRUST = 0.9  # where h starts: this share of the way from the float weight to the present integer
BIAS = 0.05  # a bias's rate beside that of v
AT_ONCE = 100  # images in one forward without gradients


class Choice(nn.Module):
    """In the place of a weight's point while its rounding is learned: low + h, times the scale.

    The choice is between the present integer and the next one towards the float weight.
    """

    passing = False

    def __init__(self, layer: QuantLinear | QuantConv2d, float_weight: Tensor) -> None:
        super().__init__()
        point, weight = layer.weight_quant, layer.weight
        self.scale = along(point.scale, weight.ndim, 0)
        zero = along(point.zero_point, weight.ndim, 0)
        now, exact = point.to_integers(weight), float_weight / self.scale
        low = torch.where(now <= exact, now, now - 1)
        self.low = low.clamp(point.integers.lo - zero, point.integers.hi - zero - 1)
        share = (TRUST * now + (1 - TRUST) * exact - self.low).clamp(0.01, 0.99)
        self.v = nn.Parameter(((share + 0.1) / (1.1 - share)).log())

    @property
    def share(self) -> Tensor:
        """h: 0 for the lower integer, 1 for the upper one."""
        return (1.2 * self.v.sigmoid() - 0.1).clamp(0, 1)

    def undecided(self, power: float) -> Tensor:
        """How far each h is from a decision, 0 to 1."""
        return 1 - (2 * self.share - 1).abs().pow(power)

    def forward(self, weight: Tensor) -> Tensor:
        return (self.low + self.share) * self.scale

    def decide(self) -> Tensor:
        """The nearer of both integers."""
        return self.low + (self.share.detach() > 0.5)


@dataclass(frozen=True, eq=False)
class Block:
    """What is to be reconstructed: a part of the network, and what goes in and should come out."""

    run: Callable[[Tensor], Tensor]
    layers: Mapping[str, QuantLinear | QuantConv2d]  # rounded already
    float_weights: Mapping[str, Tensor]
    inputs: Tensor  # (images, ...), as the quantized network makes them
    float_inputs: Tensor
    targets: Tensor  # (images, ...): what the float network makes of them
    weights: Tensor  # how much each number of the output counts, broadcastable

    def loss(self, index: Tensor, inputs: Tensor) -> Tensor:
        """The weighted squared error of some images."""
        lost = self.run(inputs) - self.targets[index]
        return (self.weights[index] * lost.square()).mean()

    @torch.no_grad()
    def error(self) -> float:
        """The loss on all images."""
        parts = torch.arange(len(self.inputs), device=self.inputs.device).split(AT_ONCE)
        losses = [self.loss(part, self.inputs[part]) * len(part) for part in parts]
        return float(torch.stack(losses).sum()) / len(self.inputs)


def learn(
    block: Block, budget: int, drop: float = 0.0, batch: int = 32, seed: int = 0
) -> tuple[float, float]:
    """Learn the rounding of a block's layers, in place; its output's error before and after.

    The errors are shares of the output's energy. `budget` is in forwards of the block on all
    images. `drop` is the probability that a number which a layer reads stays float.
    """
    energy = max(float((block.weights * block.targets.square()).mean()), 1e-30)
    before = block.error()
    kept = {name: (layer.chosen, layer.bias) for name, layer in block.layers.items()}
    steps = max(1, budget * len(block.inputs) // (COST_OF_GRADIENT * batch))
    choices, biases = relax(block, before, steps, drop, batch, seed)
    for name, layer in block.layers.items():
        layer.set_integers(choices[name].decide(), layer.weight_quant.scale)
        layer.bias = biases[name]
    after = block.error()
    if not after < before:
        after = before
        for name, layer in block.layers.items():
            chosen, layer.bias = kept[name]
            assert chosen is not None
            layer.set_integers(*chosen)
    return before / energy, after / energy


def relax(
    block: Block, before: float, steps: int, drop: float, batch: int, seed: int
) -> tuple[dict[str, Choice], dict[str, nn.Parameter | None]]:
    """Adam's choices and biases of each layer; the layers are left as they were."""
    generator = torch.Generator().manual_seed(seed)
    layers, device = block.layers, block.inputs.device
    kept = {name: (layer.weight_quant, layer.bias) for name, layer in layers.items()}
    choices = {name: Choice(layer, block.float_weights[name]) for name, layer in layers.items()}
    biases = {
        name: None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        for name, layer in layers.items()
    }
    rate = REACH / steps
    groups: list[dict[str, Any]] = [
        {"params": [choice.v for choice in choices.values()]},
        {"params": [b for b in biases.values() if b is not None], "lr": rate * BIAS},
    ]
    adam = torch.optim.Adam(groups, rate)
    for name, layer in layers.items():
        layer.weight_quant, layer.bias = choices[name], biases[name]  # type: ignore[assignment]
    try:
        with torch.enable_grad(), drop_points(layers.values(), drop, generator):
            for step in range(steps):
                index = torch.randint(len(block.inputs), (batch,), generator=generator).to(device)
                inputs = block.inputs[index]
                if drop:
                    inputs = mix(block.float_inputs[index], inputs, drop, generator)
                loss = block.loss(index, inputs) / max(before, 1e-30)
                progress = (step / steps - WARM) / (1 - WARM)
                if progress > 0:
                    power = 20 - 18 * progress
                    open_ = [choice.undecided(power).flatten() for choice in choices.values()]
                    loss = loss + PENALTY * torch.cat(open_).mean()
                adam.zero_grad()
                loss.backward()
                adam.step()
    finally:  # whatever interrupts it, no undecided weights are left behind
        for name, layer in layers.items():
            layer.weight_quant, layer.bias = kept[name]
    for bias in biases.values():
        if bias is not None:
            bias.requires_grad_(False)
    return choices, biases


def mix(floats: Tensor, rounded: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """Numbers of which a share `drop`, at random, is not rounded."""
    coin = torch.rand(rounded.shape, generator=generator).to(rounded.device)
    return torch.where(coin < drop, floats, rounded)


@contextmanager
def drop_points(
    layers: Iterable[QuantLinear | QuantConv2d], drop: float, generator: torch.Generator
) -> Iterator[None]:
    """Leave each number that a layer reads float with probability `drop`."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return mix(inputs[0], output, drop, generator)

    points = [layer.input_quant for layer in layers] if drop else []
    hooks = [point.register_forward_hook(hook) for point in points]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
