"""Search by ask and tell: an optimizer proposes candidates and is told their values.

Read with lesson 5.

`EvolQ` is the paper's search of one block (method: population 15, tournament 10, cycles of one
mutation):

    population = K copies of the current scales
    repeat: draw S members with replacement, the best of them is the parent
            child = | parent + U(-step, step) |    in every coordinate at once; scales are positive
            evaluate the child, insert it, drop the worst

With few cycles this is hardly a population: K - 1 of K members are copies of the start. `ask(1)` is
the paper's; `ask(n)` with n > 1 draws n children from one population, a parallel generalization
that is ours.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from evolq_lite.genome import Vector
from evolq_lite.objective import Objective, Population, Values


@runtime_checkable
class Optimizer(Protocol):
    """Ask for candidates (n, d), tell values (n,); `best` is the best vector yet and its value."""

    @property
    def best(self) -> tuple[Vector, float]:
        """The best vector told so far, and its value."""
        ...

    def ask(self, n: int = 1) -> Population:
        """Propose n candidates, one a row."""
        ...

    def tell(self, population: Population, values: Values) -> None:
        """Learn what the candidates are worth; NaN counts as the worst."""
        ...


def rank(value: float) -> float:
    """A value to sort by: a failed evaluation (NaN) is infinitely bad."""
    return float("inf") if value != value else value


class RandomSearch:
    """The baseline at equal cost: every candidate mutates the start, whatever has been learned.

    `start` (d,) with its `value`; `step` is the mutation width, in the units of the scale, or with
    `relative` in its logarithm (child = start * exp(U(-step, step))).
    """

    def __init__(
        self, start: Vector, value: float, step: float, seed: int = 0, relative: bool = False
    ) -> None:
        self.start, self.step, self.relative = start, step, relative
        self._best = (start, rank(float(value)))
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def best(self) -> tuple[Vector, float]:
        """The best vector told so far, the start included, and its value."""
        return self._best

    def mutate(self, parent: Vector) -> Vector:
        """One child: | parent + U(-step, step) |, or parent * exp(U(-step, step))."""
        # U(-step, step), one number per scale (d,); drawn on the CPU, so that a seed means the same
        # on every device
        noise = (2 * torch.rand(len(parent), generator=self.generator) - 1) * self.step
        noise = noise.to(parent)
        # |...|: a scale is positive, and what would fall below zero is mirrored
        return parent * noise.exp() if self.relative else (parent + noise).abs()

    def parent(self) -> Vector:
        """What the next child is mutated from."""
        return self.start

    def ask(self, n: int = 1) -> Population:
        """Propose n children."""
        return torch.stack([self.mutate(self.parent()) for _ in range(n)])

    def tell(self, population: Population, values: Values) -> None:
        """Keep the best; the first of equals stays."""
        for vector, value in zip(population, values.tolist()):
            if rank(value) < self._best[1]:
                self._best = (vector, value)


class EvolQ(RandomSearch):
    """The paper's evolution (arXiv 2308.10814; official code: evolution over a heap of K copies).

    Adds to `RandomSearch` a population of `population` members and tournaments of `tournament`
    draws. Ties are broken by age, so that equal values never crash the sort, as they do in the
    official code. With `adapt` (ours) the step follows Rechenberg's rule: wider after a success,
    narrower after a failure, in balance at one success in five.
    """

    gain = 1.5  # of the step after a success

    @classmethod
    def adapt_step(cls, step: float, success: bool) -> float:
        """The step after one more candidate, by the 1/5 rule."""
        return step * (cls.gain if success else cls.gain**-0.25)

    def __init__(
        self,
        start: Vector,
        value: float,
        step: float,
        population: int = 15,
        tournament: int = 10,
        seed: int = 0,
        relative: bool = False,
        adapt: bool = False,
    ) -> None:
        super().__init__(start, value, step, seed, relative)
        self.tournament, self.adapt = tournament, adapt
        self.members: list[tuple[float, Tensor]] = [(rank(float(value)), start)] * population

    def parent(self) -> Vector:
        """The best of `tournament` members drawn with replacement."""
        draws = torch.randint(len(self.members), (self.tournament,), generator=self.generator)
        # `min` takes the first of equals, so a tie never compares two tensors
        return min((self.members[i] for i in draws.tolist()), key=lambda member: member[0])[1]

    def tell(self, population: Population, values: Values) -> None:
        """Insert each child, then drop the worst member; among equals the youngest goes."""
        best = self.best[1]
        super().tell(population, values)
        for vector, value in zip(population, values.tolist()):
            if self.adapt:
                self.step = self.adapt_step(self.step, rank(value) < best)
                best = min(best, rank(value))
            # `sorted` is stable: behind its equals the newest member stands last, and goes
            self.members = sorted(
                [*self.members, (rank(value), vector)], key=lambda member: member[0]
            )[:-1]


class SPSA:
    """Simultaneous perturbation (Spall, 1992): a gradient from two evaluations, all coordinates.

    Pairs x + c D and x - c D with D of random signs; then x moves against the difference. `step` is
    c, and the length of the first move in each coordinate; both shrink with Spall's exponents.
    """

    def __init__(self, start: Vector, value: float, step: float, seed: int = 0) -> None:
        self.x, self.step, self.pairs, self.gain = start, step, 0, 0.0
        self._best = (start, rank(float(value)))
        self.signs: list[Tensor] = []  # of pairs that were asked for and not wholly told
        self.values: list[float] = []
        self.asked = 0
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def best(self) -> tuple[Vector, float]:
        """The best vector told so far, the start included, and its value."""
        return self._best

    def ask(self, n: int = 1) -> Population:
        """Propose the next n halves of pairs."""
        rows = []
        for _ in range(n):
            if self.asked % 2 == 0:
                # a new pair begins: D, one sign per coordinate (d,)
                signs = 2.0 * torch.randint(2, (len(self.x),), generator=self.generator) - 1
                self.signs.append(signs.to(self.x))
            width = self.width(self.asked // 2)
            rows.append(self.x + (-1) ** self.asked * width * self.signs[-1])
            self.asked += 1
        return torch.stack(rows)

    def width(self, pair: int) -> float:
        """How far pair number `pair`, from 0, reaches."""
        return self.step / (pair + 1) ** 0.101

    def tell(self, population: Population, values: Values) -> None:
        """Move after each whole pair; a failed half leaves x where it is."""
        for vector, value in zip(population, values.tolist()):
            if rank(value) < self._best[1]:
                self._best = (vector, value)
            self.values.append(value)
            if len(self.values) == 2:
                # (f(x + c D) - f(x - c D)) / 2c: the slope along D
                slope = (self.values[0] - self.values[1]) / (2 * self.width(self.pairs))
                signs, self.values = self.signs.pop(0), []
                if np.isfinite(slope):
                    # the first slope sets the gain, so that the first move is one step long
                    self.gain = self.gain or self.step / max(abs(slope), 1e-12)
                    self.x = self.x - self.gain / (self.pairs + 1) ** 0.602 * slope * signs
                self.pairs += 1


class CoordinateSearch(RandomSearch):
    """One coordinate at a time, up, else down, in random order; what helps is kept."""

    def __init__(self, start: Vector, value: float, step: float, seed: int = 0) -> None:
        super().__init__(start, value, step, seed)
        self.moves: list[tuple[int, float]] = []  # still to try

    def ask(self, n: int = 1) -> Population:
        """Propose the next n single-coordinate moves from the best vector."""
        rows = []
        for _ in range(n):
            if not self.moves:
                order = torch.randperm(len(self.start), generator=self.generator).tolist()
                self.moves = [(i, sign * self.step) for i in order for sign in (1.0, -1.0)]
            (i, by), row = self.moves.pop(0), self.best[0].clone()
            row[i] += by
            rows.append(row)
        return torch.stack(rows)

    def tell(self, population: Population, values: Values) -> None:
        """Keep the best; after a success upwards the way down need not be tried."""
        before = self.best
        super().tell(population, values)
        if len(population) == 1 and self.best is not before and len(self.moves) % 2:
            self.moves.pop(0)


class SepCMA:
    """Covariance matrix adaptation with a diagonal matrix, by the `cmaes` package.

    It learns from whole generations: the package tells how many. ValueError says how to install it.
    """

    def __init__(self, start: Vector, value: float, step: float, seed: int = 0) -> None:
        try:
            import cmaes
        except ModuleNotFoundError:
            raise ValueError(
                "this search needs the package cmaes: pip install evolq_lite[rivals]"
            ) from None
        self.cma = cmaes.SepCMA(mean=start.double().numpy(), sigma=step, seed=seed)
        self._best = (start, rank(float(value)))
        self.generation: list[tuple[np.ndarray, float]] = []
        self.seed, self.asked = seed, 0

    @property
    def best(self) -> tuple[Vector, float]:
        """The best vector told so far, the start included, and its value."""
        return self._best

    def ask(self, n: int = 1) -> Population:
        """Draw n candidates from the present distribution."""
        rows = []
        for _ in range(n):  # the random state follows from the count, so copies go on alike
            self.cma.reseed_rng((self.seed * 1_000_003 + self.asked) % 2**32)
            rows.append(self.cma.ask())
            self.asked += 1
        return torch.from_numpy(np.stack(rows)).to(self._best[0])

    def tell(self, population: Population, values: Values) -> None:
        """Collect, and adapt at the end of each generation."""
        for vector, value in zip(population, values.tolist()):
            if rank(value) < self._best[1]:
                self._best = (vector, value)
            self.generation.append((vector.double().numpy(), rank(value)))
            if len(self.generation) == self.cma.population_size:
                self.cma.tell(self.generation)
                self.generation = []


class LogSpace:
    """An optimizer that works on the logarithms of the scales: its steps are relative ones.

    `make` builds it from the start in log space: `LogSpace(start, lambda x: SPSA(x, value, 0.01))`.
    """

    def __init__(self, start: Vector, make: Callable[[Vector], Optimizer]) -> None:
        self.start, self.log = start, start.log()
        self.inner = make(self.log)

    @property
    def best(self) -> tuple[Vector, float]:
        """The best vector told so far, the start included, and its value."""
        vector, value = self.inner.best
        return self.start if vector is self.log else vector.exp(), value

    def ask(self, n: int = 1) -> Population:
        """Propose n vectors of scales."""
        return self.inner.ask(n).exp()

    def tell(self, population: Population, values: Values) -> None:
        """Learn what they are worth."""
        self.inner.tell(population.log(), values)


class LayerFactors:
    """An optimizer that finds one factor for each group of scales, in practice for each layer.

    A layer of 192 channels has 192 scales, which errors of rounding pull all one way: their common
    factor is one number. `sizes` says how many scales each group has, in the order of the vector;
    `make` builds the optimizer from the start in log space, which is zero everywhere:
    `LayerFactors(start, genome.sizes, lambda x: SepCMA(x, value, 0.02))`.
    """

    def __init__(
        self, start: Vector, sizes: Sequence[int], make: Callable[[Vector], Optimizer]
    ) -> None:
        self.start = start
        self.group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))  # (d,)
        self.first = torch.tensor([0, *sizes[:-1]]).cumsum(0)  # the first scale of each, (groups,)
        self.inner = make(torch.zeros(len(sizes)))

    @property
    def best(self) -> tuple[Vector, float]:
        """The best vector told so far, the start included, and its value."""
        factors, value = self.inner.best
        return self.expand(factors[None])[0], value

    def expand(self, factors: Float[Tensor, "p groups"]) -> Population:
        """The scales of logarithms of factors."""
        return self.start * factors.exp()[:, self.group]

    def ask(self, n: int = 1) -> Population:
        """Propose n vectors of scales."""
        return self.expand(self.inner.ask(n))

    def tell(self, population: Population, values: Values) -> None:
        """Learn what they are worth."""
        self.inner.tell((population / self.start)[:, self.first].log(), values)


def minimize(
    objective: Objective,
    optimizer: Optimizer,
    evaluations: int,
    callback: Callable[[Vector, float], None] | None = None,
    parallel: int = 1,
) -> tuple[Vector, float]:
    """Ask, evaluate, tell, until the evaluations are spent; returns the best vector and its value.

    `callback(vector, value)` is called after each evaluation, and may raise to stop. `parallel`
    candidates are asked for at a time; 1 is the paper.
    """
    while evaluations > 0:
        population = optimizer.ask(min(parallel, evaluations))
        values = objective(population)
        optimizer.tell(population, values)
        evaluations -= len(population)
        if callback is not None:
            for vector, value in zip(population, values.tolist()):
                callback(vector, value)
    return optimizer.best
