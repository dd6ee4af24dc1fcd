"""The gradient's turn: descent on the scales through the straight-through estimator.

Read with lesson 5.

`round` has derivative zero; `round_ste` (numerics) pretends that it is one, which gives the loss a
gradient in every scale. SGD, Adam and AdamW follow it; the paper says that the landscape is too
jagged for them, so they race against the searches at equal cost.

Scales live on very different levels, so the steps are taken in their logarithms: a step of 0.01
changes a scale by one per cent. Cost is counted in forwards of the objective: a gradient counts
three, as backward costs about two forwards; a search's candidate counts one.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from evolq_lite.genome import Vector
from evolq_lite.objective import Objective

COST_OF_GRADIENT = 3  # forwards

OPTIMIZERS: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    "sgd": lambda x, lr: torch.optim.SGD(x, lr, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": lambda x, lr: torch.optim.AdamW(x, lr, weight_decay=0.01),
}


class Differentiable(Objective, Protocol):
    """What descent needs of an objective: a gradient (d,) with the value, too."""

    def gradient(self, vector: Vector) -> tuple[Vector, float]:
        """The straight-through gradient at a vector, and the value there."""
        ...


class Descent:
    """A descent a step at a time; `best` is the best vector met and its value.

    `step` is the relative step: the learning rate of Adam and AdamW; SGD's learning rate is chosen
    so that its first step has this root mean square. `ended` once a gradient was not finite.
    ValueError for an unknown optimizer.
    """

    def __init__(self, objective: Differentiable, optimizer: str, step: float) -> None:
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {optimizer!r}; known: {', '.join(OPTIMIZERS)}")
        self.objective, self.optimizer, self.size = objective, optimizer, step
        self.log = objective.start.log().requires_grad_()
        self.best: tuple[Vector, float] = (objective.start, float("inf"))
        self.rule: torch.optim.Optimizer | None = None
        self.ended = False

    def step(self) -> tuple[Vector, float]:
        """Follow the gradient once; returns where it was computed, and the value there."""
        vector = self.log.detach().exp()
        gradient, value = self.objective.gradient(vector)
        self.keep(vector, value)
        slope = gradient * vector  # the chain rule of exp
        if self.rule is None:
            size = float(slope.square().mean().sqrt())
            rate = self.size / max(size, 1e-12) if self.optimizer == "sgd" else self.size
            self.rule = OPTIMIZERS[self.optimizer]([self.log], rate)
        self.ended = not bool(torch.isfinite(slope).all())
        if not self.ended:
            self.log.grad = slope
            self.rule.step()
        return vector, value

    def look(self) -> None:
        """Evaluate where the last step went, which costs one forward."""
        vector = self.log.detach().exp()
        self.keep(vector, float(self.objective(vector[None])[0]))

    def keep(self, vector: Vector, value: float) -> None:
        """Remember a vector if it is the best so far."""
        if value < self.best[1]:
            self.best = (vector, value)


def descend(
    objective: Differentiable,
    optimizer: str,
    step: float,
    budget: int,
    on_step: Callable[[Vector, float], None] = lambda vector, value: None,
) -> tuple[Vector, float]:
    """Follow the gradient for `budget` forwards; returns the best vector met and its value.

    `step` is that of `Descent`; `on_step` is called with each vector where a gradient was computed,
    and the value there. What is left of the budget pays for a look at where the last step went.
    ValueError for an unknown optimizer.
    """
    descent = Descent(objective, optimizer, step)
    for _ in range(budget // COST_OF_GRADIENT):
        on_step(*descent.step())
        if descent.ended:
            break
    if budget % COST_OF_GRADIENT and not descent.ended:
        descent.look()
    return descent.best
