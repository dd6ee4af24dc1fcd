"""What the loss looks like around a vector of scales: lines, planes, roughness. Read with lesson 3.

The objective is the one that searches use; here it is only looked at. A line is

    f(r) = objective(center + r * direction)        for radii r

and a plane the same with two directions. With `relative` directions every scale moves by a share of
itself, so that r = 0.01 means "one per cent of every scale" in any layer of any network; absolute
directions move all scales by the same amount, as the paper's mutation does.

A quantized network is a chain of roundings: a change in the last bit of one kernel's sum can flip a
rounding, which flips others. So the same network computed with another kernel, or in batches of
another size, has another loss. `other_ways` computes one objective in several such ways,
`noise_floor` measures how far they differ, and no bump smaller than that says anything about the
landscape. In a deep network flips add up from block to block: `inputs_by_another_kernel` imitates a
machine whose last bits differ in all of them, and `noise_of_lines` tells what lines then share.

`JaggedBowl` is a landscape of two scales that was made up for teaching: small enough to draw.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.signal import find_peaks
from torch import Tensor, nn

from evolq_lite.chain import chain_of
from evolq_lite.convert import twin
from evolq_lite.fast import set_execution
from evolq_lite.fitness import Fitness, info_nce
from evolq_lite.genome import Vector, genome_of
from evolq_lite.numerics import round_ste
from evolq_lite.objective import BlockObjective, Objective, Population, Values

OnCell = Callable[[Tensor], None]


def direction(center: Vector, seed: int = 0, relative: bool = True) -> Vector:
    """A random direction (d,): Gaussian, of mean square 1, times |center| if `relative`."""
    noise = torch.randn(len(center), generator=torch.Generator().manual_seed(seed))
    return noise * center.abs() if relative else noise


def line(
    objective: Objective,
    center: Vector,
    along: Vector,
    radii: Float[Tensor, " n"],
    on_cell: OnCell = lambda values: None,
) -> Float[Tensor, " n"]:
    """The objective at center + r * along for each radius r, as values (n,).

    `on_cell(values)` is called after each new one with all so far, NaN where there is none yet.
    Towards another vector: along = other - center, radii from 0 to 1.
    """
    return fill(objective, [center + r * along for r in radii], on_cell)


def random_lines(
    objective: Objective,
    center: Vector,
    step: float,
    lines: int,
    points: int,
    relative: bool = True,
    seed: int = 0,
) -> Float[Tensor, "lines points"]:
    """Lines from -step to step in random directions, those of seed, seed + 1 and so on."""
    radii = torch.linspace(-step, step, points)  # in units of the direction
    directions = [direction(center, seed + i, relative) for i in range(lines)]
    return torch.stack([line(objective, center, along, radii) for along in directions])


def plane(
    objective: Objective,
    center: Vector,
    along: tuple[Vector, Vector],
    radii: Float[Tensor, " n"],
    on_cell: OnCell = lambda values: None,
) -> Float[Tensor, "n n"]:
    """The objective at center + r * along[0] + s * along[1]: (n, n) with r down, s across."""
    n = len(radii)
    points = [center + r * along[0] + s * along[1] for r in radii for s in radii]
    return fill(objective, points, lambda flat: on_cell(flat.view(n, n))).view(n, n)


def fill(objective: Objective, points: Sequence[Vector], on_cell: OnCell) -> Tensor:
    """The objective at each point, one after another."""
    values = torch.full((len(points),), torch.nan)
    for i, point in enumerate(points):
        # A scale is positive: what would fall below zero is mirrored, as a mutation would be.
        values[i] = objective(point.abs()[None])[0]
        on_cell(values)
    return values


@dataclass(frozen=True)
class Roughness:
    """How jagged a landscape is around a vector, in units of the objective.

    `change` is the mean |f(x + e d) - f(x)| over random directions d, `spread` its standard error;
    `minima` counts the local minima inside a line that are deeper than the noise floor; `variation`
    is the line's total variation over its range: 1 for a slope, at most 2 for one valley.
    """

    change: float
    spread: float
    minima: float
    variation: float


def roughness(
    objective: Objective,
    center: Vector,
    step: float,
    floor: float = 0.0,
    relative: bool = True,
    lines: int = 4,
    points: int = 21,
    seed: int = 0,
) -> tuple[Roughness, Float[Tensor, "lines points"]]:
    """Roughness within `step` of a vector, and the `lines` of `points` values that it is read from.

    Lines run from -step to step in random directions; their ends are the x + e d. Minima and
    variation are means over lines.
    """
    values = random_lines(objective, center, step, lines, points, relative, seed)
    middle = float(objective(center[None])[0])
    changes = (values[:, [0, -1]] - middle).abs().flatten()  # (2 lines,): both ends of each
    spread = float(changes.std() / len(changes) ** 0.5)
    minima = sum(local_minima(row, floor) for row in values) / lines
    variation = sum(total_variation(row) for row in values) / lines
    return Roughness(float(changes.mean()), spread, minima, variation), values


def local_minima(values: Float[Tensor, " n"], floor: float = 0.0) -> int:
    """Minima inside a line whose walls on both sides are higher than `floor`."""
    return len(find_peaks(-values.numpy(), prominence=max(floor, 1e-12))[0])


def total_variation(values: Float[Tensor, " n"]) -> float:
    """Sum of |differences| over the range of the values; 1 for a slope, 0 for a constant."""
    span = float(values.max() - values.min())
    return float(values.diff().abs().sum()) / span if span > 0 else 0.0


def layer_objective(
    qmodel: nn.Module,
    block: str,
    layer: str,
    images: Tensor,
    targets: Tensor,
    fitness: Fitness = info_nce,
    chunk: int | None = None,
    inputs: list[Tensor] | None = None,
) -> BlockObjective:
    """A fitness as a function of the weight scales of one layer, such as "attn.qkv" of "blocks.2".

    `chunk` images are computed at a time, None for as many as fit the processor's cache; `inputs`
    are those of the block, where known. ValueError if there is no such block or layer.
    """
    chain = chain_of(qmodel)
    if chunk is None:
        chain.fit_chunk(images[:1])
    else:
        chain.chunk = chunk
    genome = genome_of(qmodel, [f"{block}.{layer}"], "weights")
    return BlockObjective(chain, block, images, targets, fitness, genome=genome, inputs=inputs)


def other_ways(
    objective: BlockObjective,
    make: Callable[..., BlockObjective],
    chunks: Sequence[int],
    last_bits: bool = True,
) -> list[BlockObjective]:
    """An objective computed in other ways: the same on paper, but not in its last digits.

    Once in each size of `chunks` (for single images, convolutions have another kernel); once with
    products simulated in float, where they were of integers; and, if `last_bits` or where nothing
    was of integers (on a GPU), once with every input of the block one last bit up or down, as if
    another kernel had made it. The same objective is `make(qmodel)`, `make(qmodel, chunk=n)` and
    `make(qmodel, inputs=tensors)`.
    """
    qmodel = objective.chain.model
    simulated = twin(qmodel)
    integer = any(getattr(module, "integer", False) for module in qmodel.modules())
    set_execution(simulated, "simulate")
    ways = [*(make(qmodel, chunk=chunk) for chunk in chunks), make(simulated)]
    if last_bits or not integer:
        generator = torch.Generator().manual_seed(0)
        inputs = [move_last_bits(x, generator) for x in objective.inputs]
        ways.append(make(qmodel, inputs=inputs))
    return ways


def move_last_bits(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every number one last bit up or down, as if another kernel had made it."""
    bits = 2 * torch.randint(2, x.shape, generator=generator) - 1
    return x * (1 + torch.finfo(x.dtype).eps * bits.to(x.device))


@torch.no_grad()
def inputs_by_another_kernel(
    objective: BlockObjective, images: Tensor, seed: int = 0
) -> list[Tensor]:
    """What enters the block of an objective, if every segment before it had other last bits.

    Another machine does just that, and this can be computed on any. In a deep network the flips of
    each segment make more in the next: at the tenth block of DeiT-Tiny (W3A8), about seven of ten
    photographs have other inputs.
    """
    chain, generator = objective.chain, torch.Generator().manual_seed(seed)
    x = images
    for i in range(objective.first):
        x = move_last_bits(chain(x, start=i, stop=i + 1), generator)
    return list(x.split([len(part) for part in objective.inputs]))


def noise_floor(
    kernels: Sequence[Callable[[Tensor], Tensor]], points: Float[Tensor, "p d"]
) -> tuple[float, Float[Tensor, "k p"]]:
    """The largest |difference| between computations of the same objective, and all their values.

    `kernels` are the objective computed in several ways, for instance in chunks of other sizes;
    `points` (p, d) are where they are compared.
    """
    values = torch.stack([kernel(points) for kernel in kernels])
    return float((values.amax(0) - values.amin(0)).max()), values


def noise_of_lines(
    lines: Float[Tensor, "l n"], again: Float[Tensor, "l n"]
) -> tuple[float, Float[Tensor, " l"]]:
    """How far two computations of the same lines differ in shape, and how well they agree.

    The first is the largest range of their difference along a line: an offset of a whole line moves
    no minimum. The second is the correlation of their second differences, line by line: 1 if the
    jumps are the same, 0 if they have nothing in common.
    """
    apart = lines - again
    bends = torch.stack([lines, again]).double().diff(n=2)  # (2, l, n - 2)
    bends = bends - bends.mean(2, keepdim=True)
    agreement = F.cosine_similarity(bends[0], bends[1], dim=1)
    return float((apart.amax(1) - apart.amin(1)).max()), agreement


class JaggedBowl:
    """A toy objective of two scales: a bowl, made jagged by roundings, as quantization would.

    f(x) = |x - centre|^2 / reach^2 + depth * mean of (t - round(t) + 1/2) over the four numbers
    t = waves @ (x - centre). Each t is a sum in which both scales take part; t - round(t) is a
    slope that jumps back where the rounding flips. Population (p, 2) to values (p,).
    """

    centre = torch.tensor([0.080, 0.060])
    reach, depth = 0.006, 0.7
    waves = torch.tensor([[1250.0, 220.0], [-250.0, 580.0], [-100.0, -830.0], [500.0, -700.0]])

    @property
    def start(self) -> Vector:
        """Where a search begins (2,): in a pit, well up the wall of the bowl."""
        return torch.tensor([0.0761, 0.0633])

    def __call__(self, population: Population) -> Values:
        """Evaluate candidates, one per row."""
        away = population - self.centre
        sums = away @ self.waves.T
        jagged = (sums - round_ste(sums) + 0.5).mean(1)
        return (away / self.reach).square().sum(1) + self.depth * jagged

    def gradient(self, vector: Vector) -> tuple[Vector, float]:
        """Straight-through gradient (2,) and value: t - round(t) has slope 0, the bowl is left."""
        vector = vector.detach().requires_grad_()
        with torch.enable_grad():
            value = self(vector[None])[0]
        return torch.autograd.grad(value, vector)[0], float(value.detach())
