"""Would `torch.compile` pay? `python benchmarks/compiled.py` (needs a C++ compiler).

The three chains of element-wise passes that a candidate of integer execution consists of, next to
its products, as `evolq_lite/fast.py` writes them and as the compiler fuses them: CPU seconds of one
thread, in turns within one process, and whether the numbers are the same, bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import evolq_lite as eq  # noqa: F401  # isort: skip  (before torch: see evolq_lite/_openmp.py)

import torch
from torch import Tensor

LOW, HIGH = -140.0, 115.0
SHAPES = {"DeiT-Tiny, 13 images": (13, 197, 192), "embedded ViT, 100 images": (100, 50, 48)}
HEADS = 3


def codes(x: Tensor, inverse: float) -> Tensor:
    """What enters a linear layer: scale, round, clamp, and as uint8."""
    steps = (x * inverse).round_().clamp_(LOW, HIGH).add_(12)
    return steps.to(torch.int8).view(torch.uint8).bitwise_xor_(128)


def codes_fused(x: Tensor, inverse: float) -> Tensor:
    """The same, as a compiler wants it."""
    return ((x * inverse).round().clamp(LOW, HIGH) + 140).to(torch.uint8)


def sums(x: Tensor, inverse: Tensor, scale: Tensor) -> Tensor:
    """Residual sums with a scale per channel, in place."""
    return x.mul_(inverse).round_().clamp_(LOW, HIGH).mul_(scale)


def sums_fused(x: Tensor, inverse: Tensor, scale: Tensor) -> Tensor:
    """The same, as a compiler wants it."""
    return (x * inverse).round().clamp(LOW, HIGH) * scale


def shares(x: Tensor, inverse: float, step: float) -> Tensor:
    """Attention's scores, quantized, and the integers of their softmax, in place."""
    scores = x.mul_(inverse).round_().clamp_(LOW, HIGH).mul_(step)
    return scores.softmax(-1).mul_(255.0).round_().clamp_(0.0, 255.0)


def shares_fused(x: Tensor, inverse: float, step: float) -> Tensor:
    """The same, as a compiler wants it."""
    scores = (x * inverse).round().clamp(LOW, HIGH) * step
    return (scores.softmax(-1) * 255.0).round().clamp(0.0, 255.0)


def compare(
    plain: Callable[..., Tensor], fused: Callable[..., Tensor], x: Tensor, *rest: Any, repeats: int
) -> str:
    """CPU milliseconds of both forms on copies of x, in turns, and what compiling took."""
    began = perf_counter()
    compiled = torch.compile(fused, dynamic=False)
    found = compiled(x.clone(), *rest)
    warm_up = perf_counter() - began
    differ = int((plain(x.clone(), *rest) != found).sum())
    times: dict[Callable[..., Tensor], list[float]] = {plain: [], compiled: []}
    for _ in range(repeats):
        for form, took in times.items():
            copy, began = x.clone(), process_time()
            form(copy, *rest)
            took.append(process_time() - began)
    before, after = (1000 * statistics.median(took) for took in times.values())
    return (
        f"{plain.__name__:7} {before:6.2f} ms, compiled {after:6.2f}: {after / before:.2f} "
        f"({differ} values differ; compiled in {warm_up:.1f} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, shape in SHAPES.items():
        images, tokens, channels = shape
        x = 2 * torch.randn(shape)
        scores = 20 * torch.randn(images, HEADS, tokens, tokens)
        scale = 0.03 * (0.5 + torch.rand(channels))
        with torch.inference_mode():
            print(name)
            print(" ", compare(codes, codes_fused, x, 1 / 0.03, repeats=repeats))
            print(" ", compare(sums, sums_fused, x, 1 / scale, scale, repeats=repeats))
            print(" ", compare(shares, shares_fused, scores, 1 / 0.4, 0.05, repeats=repeats))


if __name__ == "__main__":
    main()
