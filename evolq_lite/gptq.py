"""GPTQ: which integer does a weight become? Not always the nearest one. Read with lesson 8.

A layer computes W x. Quantized, it computes Q x, where each row q of Q is integers times a scale.
What counts is not how far Q is from W, but how far Q x is from W x on the inputs that the layer
sees. For one row (one output channel):

    error(q) = mean over inputs x of (w x - q x)^2 = (w - q) H (w - q)^T,    H = mean of x x^T

Rounding to nearest is right only where H is diagonal. It never is: inputs are correlated, so what
one weight loses another can make up for. With 3 bits and 192 inputs there are 8^192 rows to choose
from; GPTQ (Frantar et al., arXiv 2210.17323) finds a good one in one sweep:

    for each input i, the most active first
        q_i = w_i, rounded to nearest
        e   = (w_i - q_i) / U_ii
        w_j = w_j - e U_ij    for all j > i        the weights that are still float make up for it

U is the upper triangular root of the inverse, H^-1 = U^T U. Row i of U holds what is left of H^-1
once inputs 0 to i - 1 are fixed, so one factorization serves all steps, and all rows at once. It is
made in float64. A damping on the diagonal keeps H invertible where inputs depend on each other.

Two additions, both measured on calibration images. A row is rounded with several scales and keeps
the one with the smallest error: a scale that was chosen for rounding to nearest is too large here.
And a row that this makes no better than rounding to nearest stays at nearest.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from evolq_lite.numerics import IntRange

FACTORS = tuple(1.2 - 0.04 * i for i in range(24))  # of a row's scale: 1.2 down to 0.28
TOGETHER = 6  # factors in one sweep: six times the rows take hardly longer than one
PANEL = 64  # inputs between two updates of all later ones


@dataclass(frozen=True, eq=False)
class Elimination:
    """What a Hessian (groups, inputs, inputs) says about the order, and about making up."""

    order: Tensor  # (groups, inputs)
    root: Tensor  # U, in that order
    damping: float  # the one that it took
    dead: int  # inputs that never vary

    @classmethod
    def of(cls, hessian: Tensor, damping: float, by_activation: bool) -> Self:
        """Factorize; the damping, a share of the mean diagonal, is raised until that succeeds."""
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        inputs = torch.arange(diagonal.shape[1], device=diagonal.device)
        order = inputs.expand_as(diagonal)
        if by_activation:
            order = diagonal.argsort(1, descending=True)
        hessian = hessian.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None], 2)
        mean = diagonal.mean(1, keepdim=True)
        dead = (diagonal <= 1e-9 * mean).take_along_dim(order, 1)
        while True:
            # An input that never varies has a row of zeros; a 1 there rounds it to nearest.
            damped = hessian + torch.diag_embed(damping * mean + dead)
            # Backwards, H = L L^T. So H^-1 = U^T U with U the inverse of L, backwards.
            lower, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
            if not failed.any():
                break
            damping = max(10 * damping, 1e-8)
        eye = torch.eye(len(inputs), dtype=hessian.dtype, device=hessian.device)
        root = torch.linalg.solve_triangular(lower, eye.expand_as(hessian), upper=False).flip(1, 2)
        return cls(order, root, damping, int(dead.sum()))


def sweep(
    weight: Tensor, elimination: Elimination, scale: Tensor, zero_point: Tensor, integers: IntRange
) -> Tensor:
    """The integers, counted from the zero point, of float64 rows (groups, rows, inputs).

    `scale` and `zero_point` are (groups, rows).
    """
    groups, rows, inputs = weight.shape
    order, root = elimination.order[:, :, None], elimination.root
    w = weight.transpose(1, 2).take_along_dim(order, 1)  # (groups, inputs, rows)
    q = torch.empty_like(w)
    lo, hi = integers.lo - zero_point, integers.hi - zero_point
    for start in range(0, inputs, PANEL):
        stop = min(start + PANEL, inputs)
        errors = w.new_empty(groups, stop - start, rows)
        for i in range(start, stop):
            q[:, i] = (w[:, i] / scale).round_().clamp_(lo, hi)
            errors[:, i - start] = (w[:, i] - q[:, i] * scale) / root[:, i, i, None]
            w[:, i + 1 : stop] -= errors[:, i - start, None] * root[:, i, i + 1 : stop, None]
        # The same for all inputs behind the panel, as one matrix product.
        w[:, stop:] -= root[:, start:stop, stop:].mT @ errors
    return torch.empty_like(q).scatter_(1, order.expand_as(q), q).mT


def squared_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """(w - q) H (w - q)^T of each row: (groups, rows, inputs) to (groups, rows)."""
    lost = weight - rounded
    return ((lost @ hessian) * lost).sum(2)


def round_rows(
    weight: Tensor,
    hessian: Tensor,
    elimination: Elimination,
    scale: Tensor,
    zero_point: Tensor,
    integers: IntRange,
    refit_scales: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers (groups, rows, inputs) and scales (groups, rows) of float64 rows; two errors.

    The errors (groups, rows) are those of rounding to nearest with the given scale, and of what is
    returned, which is nowhere larger. Integers are counted from the zero point. `scale` is float32,
    as it will be stored.
    """
    lo, hi = (integers.lo - zero_point)[..., None], (integers.hi - zero_point)[..., None]
    step = scale.double()[..., None]
    q = (weight / step).round().clamp(lo, hi)  # what stays unless a row gets better
    error = nearest = squared_error(weight, q * step, hessian)
    for factors in scale.new_tensor(FACTORS if refit_scales else (1.0,)).split(TOGETHER):
        # Every row once for each factor: (groups, factors * rows, inputs).
        scales = scale[:, None] * factors[:, None]  # (groups, factors, rows)
        steps = scales.double().flatten(1)
        many, zeros = weight.repeat(1, len(factors), 1), zero_point.repeat(1, len(factors))
        found = sweep(many, elimination, steps, zeros, integers)
        errors = squared_error(many, found * steps[..., None], hessian).view(scales.shape)
        best, which = errors.min(1, keepdim=True)  # (groups, 1, rows)
        found = found.view(*scales.shape, -1).take_along_dim(which[..., None], 1)[:, 0]
        better = best[:, 0] < error
        q = torch.where(better[..., None], found, q)
        scale = torch.where(better, scales.take_along_dim(which, 1)[:, 0], scale)
        error = torch.where(better, best[:, 0], error)
    return q, scale, nearest, error
