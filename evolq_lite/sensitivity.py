"""Which quantization point costs what? Leave one kind float at a time, and look at the predictions.

The measure is the Kullback-Leibler divergence from the float network's predicted distribution to
the quantized one's, in nats per image. It needs no labels, so calibration images will do, and it
tells apart what top-1 on a few hundred images cannot. Read with lesson 2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evolq_lite.config import KINDS
from evolq_lite.convert import Point, edge_layers, kind_of, pass_floats
from evolq_lite.fitness import kl
from evolq_lite.layers import QuantWeight


@dataclass(frozen=True)
class Sensitivity:
    """What leaving some points float is worth: `divergence` is what is left with them float."""

    name: str
    points: int
    divergence: float  # nats per image


@torch.no_grad()
def sensitivity(
    qmodel: nn.Module, images: Tensor, layers: bool = False, batch: int = 50
) -> list[Sensitivity]:
    """The divergence of a calibrated network (first row), then with each kind of point float.

    `images` (n, channels, height, width). "edges" are all points of the first and the last layer.
    With `layers`, the weights of each layer follow, one layer at a time.
    """
    with pass_floats(qmodel):
        wanted = torch.cat([qmodel(x) for x in images.split(batch)])

    def measure(name: str, points: list[Point]) -> Sensitivity:
        with let_pass(points):
            found = torch.cat([qmodel(x) for x in images.split(batch)])
        return Sensitivity(name, len(points), float(kl(found, wanted)))

    points = {
        name: module
        for name, module in qmodel.named_modules()
        if isinstance(module, Point) and not module.stays_float
    }
    rows = [measure("all quantized", [])]
    for kind in KINDS:
        chosen = [point for name, point in points.items() if kind_of(name) == kind]
        if chosen:
            rows.append(measure(kind, chosen))
    edges = tuple(f"{name}." for name in edge_layers(qmodel))
    if chosen := [point for name, point in points.items() if name.startswith(edges)]:
        rows.append(measure("edges", chosen))
    if layers:
        for name, module in qmodel.named_modules():
            if isinstance(module, QuantWeight):
                rows.append(measure(f"{name}, weights", [module.weight_quant]))
    return rows


@contextmanager
def let_pass(points: list[Point]) -> Iterator[None]:
    """Keep these points out of the network for a while."""
    before = [(point.passing, point.stays_float) for point in points]
    for point in points:
        point.passing = point.stays_float = True
    try:
        yield
    finally:
        for point, (passing, stays_float) in zip(points, before, strict=True):
            point.passing, point.stays_float = passing, stays_float


def tell_sensitivity(rows: list[Sensitivity]) -> str:
    """The rows as a table of text, worst kind first: what each one alone would save."""
    whole, *kinds = rows
    kinds = sorted(kinds, key=lambda row: row.divergence)
    width = max(len(row.name) for row in rows) + 7
    lines = [f"{'left float':{width}}  points  KL to float, nats"]
    lines.append(f"{'nothing':{width}}  {'':6}  {whole.divergence:.4f}")
    lines += [
        f"{row.name:{width}}  {row.points:6}  {row.divergence:.4f} "
        f"({row.divergence - whole.divergence:+.4f})"
        for row in kinds
    ]
    return "\n".join(lines)
