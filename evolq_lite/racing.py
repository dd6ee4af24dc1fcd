"""Racing: candidates that fall behind are dropped before all images are seen. Read with lesson 6.

The paper evaluates every candidate on all calibration images, and rejects most of them. A race
compares a candidate's loss with the best one's, batch by batch, on the same images:

    difference[i] = loss of the candidate on batch i - loss of the best on batch i

After k of n batches the mean of the differences so far forecasts their mean over all. Batches are
drawn without replacement from the n, so the forecast's standard error is s sqrt(1/k - 1/n), with
the standard deviation s of the differences so far; it is zero once all are known. The candidate is
dropped when Student's t with k - 1 degrees of freedom leaves it a chance below `LEVEL` to come out
ahead. It is told to the optimizer by its forecast, which is never better than the best.

A candidate that survives is evaluated on everything, so nothing is accepted that the paper's search
would reject; but now and then one is dropped that would have won. That is a deviation, therefore
off by default: `SearchConfig(racing=True)`, `--racing`. C10 measures what it saves and costs. The
idea is F-Race's (Birattari et al., GECCO 2002).
"""

from collections.abc import Callable, Iterable
from functools import partial
from math import sqrt

import torch
from jaxtyping import Float
from scipy.special import stdtr
from torch import Tensor

from evolq_lite.objective import BlockObjective, Population, Values, batches
from evolq_lite.search import Optimizer

Losses = Float[Tensor, "batches"]
LEVEL = 0.05  # the chance to come out ahead below which a candidate is dropped
LEAST = 2  # batches before the first decision: one has no standard deviation


def is_hopeless(differences: Losses, total: int, level: float = LEVEL) -> bool:
    """Whether a candidate is dropped after k of `total` batches; NaN and infinity always are."""
    k = len(differences)
    if not bool(differences.isfinite().all()):
        return True
    if k < LEAST or k == total:
        return False
    mean, deviation = float(differences.mean()), float(differences.std())
    error = deviation * sqrt(1 / k - 1 / total)
    if error == 0:
        return mean > 0
    return bool(stdtr(k - 1, -mean / error) < level)


class Race:
    """Evaluates the candidates of a whole search; keeps the best one's loss on each batch.

    `losses` are those of the best network so far. They stay between visits, because the network
    that a visit leaves is the one that the next begins with. Before the first candidate and after a
    replay they are not known, and computed at the cost of one evaluation.
    """

    def __init__(self) -> None:
        self.losses: Losses | None = None
        self.shares: list[float] = []  # of the batches, for each candidate since the last question

    def among(
        self, objective: BlockObjective, optimizer: Optimizer
    ) -> Callable[[Population], Values]:
        """What evaluates the candidates of one visit, whose best the optimizer knows."""
        return partial(self.values, objective, optimizer)

    @torch.no_grad()
    def values(
        self, objective: BlockObjective, optimizer: Optimizer, population: Population
    ) -> Values:
        """Race candidates (p, d), one after another, against the best before all of them."""
        vector, value = optimizer.best
        if self.losses is None or float(self.losses.mean()) != value:
            self.losses = torch.stack(list(objective.batch_losses(vector)))
        best, values = self.losses, []
        for candidate in population:
            losses = run_race(objective.batch_losses(candidate), best)
            values.append(forecast(losses, best))
            self.shares.append(len(losses) / len(best))
            if len(losses) == len(best) and not losses.mean() >= self.losses.mean():
                self.losses = losses
        return torch.stack(values).cpu()

    def take_shares(self, count: int) -> list[float]:
        """What part of the batches the last `count` candidates took; 1 for those not raced here."""
        shares, self.shares = self.shares, []
        return [1.0] * (count - len(shares)) + shares


def run_race(losses: Iterable[Tensor], best: Losses, level: float = LEVEL) -> Losses:
    """The losses of a candidate, batch by batch, to the one after which it is dropped.

    Against a best that is not finite nobody is dropped.
    """
    found = best[:0]
    for loss in losses:
        found = torch.cat([found, loss[None]])
        if best.isfinite().all() and is_hopeless(found - best[: len(found)], len(best), level):
            break
    return found


def forecast(losses: Losses, best: Losses) -> Float[Tensor, ""]:
    """The mean loss over all batches, from those that were computed."""
    if len(losses) == len(best):
        return losses.mean()
    return best.mean() + (losses - best[: len(losses)]).mean()


def check_batches(images: int, batch: int) -> None:
    """ValueError if so few batches leave nothing to drop."""
    count = len(batches(torch.empty(images), batch))
    if count <= LEAST:
        raise ValueError(
            f"racing drops a candidate after {LEAST} batches at the earliest, and {images} "
            f"calibration images in batches of {batch} are {count}; give more images, a smaller "
            "batch, or omit racing"
        )
