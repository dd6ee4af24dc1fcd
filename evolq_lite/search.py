"""Search by ask and tell: an optimiser proposes candidates, hears their values, knows no models.

`EvolQ` is the paper's search of one block (method: population 15, tournament 10, cycles of one
mutation):

    population = K copies of the present scales
    repeat: draw S members with replacement, the best of them is the parent
            child = | parent + U(-step, step) |    in every coordinate at once; scales are positive
            evaluate the child, insert it, drop the worst

With few cycles this is hardly a population: K - 1 of K members are copies of the start. `ask(1)` is
the paper's; `ask(n)` with n > 1 draws n children from one population, a parallel generalisation
that is ours.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
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

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, random state included."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        ...


def ranked(value: float) -> float:
    """A value to sort by: a failed evaluation (NaN) is infinitely bad."""
    return float("inf") if value != value else value


class RandomSearch:
    """The baseline at equal cost: every candidate mutates the start, whatever has been learnt.

    `start` (d,) with its `value`; `step` is the mutation width, in the units of the scale, or with
    `relative` as a share of it (child = start * (1 + U(-step, step)), made positive).
    """

    def __init__(
        self, start: Vector, value: float, step: float, seed: int = 0, relative: bool = False
    ) -> None:
        self.start, self.step, self.relative = start, step, relative
        self._best = (start, ranked(float(value)))
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def best(self) -> tuple[Vector, float]:
        """The best vector told so far, the start included, and its value."""
        return self._best

    def mutated(self, parent: Vector) -> Vector:
        """One child: | parent + U(-step, step) | in every coordinate."""
        noise = (2 * torch.rand(len(parent), generator=self.generator) - 1) * self.step
        noise = noise.to(parent)
        return (parent + noise * parent if self.relative else parent + noise).abs()

    def parent(self) -> Vector:
        """What the next child is mutated from."""
        return self.start

    def ask(self, n: int = 1) -> Population:
        """Propose n children."""
        return torch.stack([self.mutated(self.parent()) for _ in range(n)])

    def tell(self, population: Population, values: Values) -> None:
        """Keep the best; the first of equals stays."""
        for vector, value in zip(population, values.tolist()):
            if ranked(value) < self._best[1]:
                self._best = (vector, value)

    def state_dict(self) -> dict[str, Any]:
        """The best so far and the random state."""
        return {"best": self._best, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._best = state["best"]
        self.generator.set_state(state["generator"])


class EvolQ(RandomSearch):
    """The paper's evolution (arXiv 2308.10814; official code: evolution over a heap of K copies).

    Adds to `RandomSearch` a population of `population` members and tournaments of `tournament`
    draws. Ties are broken by age, so that equal values never crash the sort, as they do in the
    official code.
    """

    def __init__(
        self,
        start: Vector,
        value: float,
        step: float,
        population: int = 15,
        tournament: int = 10,
        seed: int = 0,
        relative: bool = False,
    ) -> None:
        super().__init__(start, value, step, seed, relative)
        self.tournament = tournament
        self.members: list[tuple[float, Tensor]] = [(ranked(float(value)), start)] * population

    def parent(self) -> Vector:
        """The best of `tournament` members drawn with replacement."""
        drawn = torch.randint(
            len(self.members), (self.tournament,), generator=self.generator
        ).tolist()
        return min((self.members[i] for i in drawn), key=lambda member: member[0])[1]

    def tell(self, population: Population, values: Values) -> None:
        """Insert each child, then drop the worst member; among equals the youngest goes."""
        super().tell(population, values)
        for vector, value in zip(population, values.tolist()):
            self.members = sorted(
                [*self.members, (ranked(value), vector)], key=lambda member: member[0]
            )[:-1]

    def state_dict(self) -> dict[str, Any]:
        """The population, the best so far and the random state."""
        return {**super().state_dict(), "members": list(self.members)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        super().load_state_dict(state)
        self.members = list(state["members"])


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
