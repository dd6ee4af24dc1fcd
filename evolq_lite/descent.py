"""The gradient's turn: descent on the scales through the straight-through estimator. Lesson 5.

`round` has derivative zero; `round_ste` (numerics) pretends that it is one, which gives the loss a
gradient in every scale. SGD, Adam and AdamW follow it; the paper says that the landscape is too
jagged for them, so they race against the searches at equal cost.

Scales live on very different levels, so the steps are taken in their logarithms: a step of 0.01
changes a scale by one per cent. Cost is counted in forwards of the objective: a gradient counts
three, as backward costs about two forwards; a search's candidate counts one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from evolq_lite.genome import Vector
from evolq_lite.objective import BlockObjective

COST_OF_GRADIENT = 3  # forwards

OPTIMIZERS: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    "sgd": lambda x, lr: torch.optim.SGD(x, lr, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": lambda x, lr: torch.optim.AdamW(x, lr, weight_decay=0.01),
}


def descend(
    objective: BlockObjective,
    optimizer: str,
    step: float,
    budget: int,
    on_step: Callable[[Vector, float], None] = lambda vector, value: None,
) -> tuple[Vector, float]:
    """Follow the gradient for `budget` forwards; returns the best vector met and its value.

    `step` is the relative step: the learning rate of Adam and AdamW; SGD's learning rate is chosen
    so that its first step has this root mean square. `on_step` is called with each vector and its
    value.
    ValueError for an unknown optimizer.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; known: {', '.join(OPTIMIZERS)}")
    best = (objective.start, float("inf"))
    log = objective.start.log().requires_grad_()
    rule: torch.optim.Optimizer | None = None
    for _ in range(budget // COST_OF_GRADIENT):
        vector = log.detach().exp()
        gradient, value = objective.gradient(vector)
        if value < best[1]:
            best = (vector, value)
        on_step(vector, value)
        log.grad = gradient * vector  # the chain rule of exp
        if rule is None:
            size = float(log.grad.square().mean().sqrt())
            rate = step / max(size, 1e-12) if optimizer == "sgd" else step
            rule = OPTIMIZERS[optimizer]([log], rate)
        if not torch.isfinite(log.grad).all():
            break
        rule.step()
    return best
