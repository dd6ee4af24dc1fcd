"""What one candidate of the search costs, in float forwards: `make bench`.

Times mean little on a shared machine, ratios within one run mean more. For every block the
benchmark takes turns between

- a candidate: new scales for that block, fitness on all images, only the suffix recomputed, once
  simulated in float and once in integers,
- a float forward of the same suffix, with timm's own layers and plain attention, all images at once
  as one would run it, and in the chunks that the candidate uses,
- a float forward of the whole network,

and prints medians and ratios; benchmarks/README.md says what they mean. The official code spends
5.5 whole float forwards on a candidate (DeiT-Tiny, 100 images, 2 cores).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import cache
from math import nan
from pathlib import Path
from time import perf_counter
from typing import Any

import evolq_lite as eq  # isort: skip  (before timm: see evolq_lite/_torchvision.py)

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from evolq_lite.kernels import batch_pays, multiply, multiply_batch, pack
from evolq_lite.networks import unfused
from evolq_lite.runs.environment import environment

# Long, and the same for every block, or only for a share: one round after the warm-up is enough.
SECONDARY = ("full", "products", "simulate products", "integer products")


def seconds(function: Callable[[], Any]) -> float:
    """Run once, timed."""
    began = perf_counter()
    function()
    return perf_counter() - began


def products_of(model: nn.Module, forward: Callable[[], Any]) -> Callable[[], Any]:
    """A function that repeats the matrix products of a forward pass, and nothing else of it."""
    jobs: list[Callable[[], Any]] = []
    operand = cache(torch.randn)  # one buffer a shape: time, not values
    codes = cache(lambda shape: torch.randint(256, shape, dtype=torch.uint8))

    def linear(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shape = inputs[0].shape
        if getattr(layer, "integer", False):
            scale = torch.ones(layer.out_features)
            packed = pack(torch.ones(layer.weight.shape, dtype=torch.int8), scale)
            out = (1.0, 0) if output.dtype is torch.uint8 else None
            jobs.append(lambda: multiply(codes(shape), 1.0, 0, packed, None, out=out))
        else:
            jobs.append(lambda: F.linear(operand(shape), layer.weight))

    def attention(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        images, tokens, _ = inputs[0].shape
        shape = (images, layer.num_heads, tokens, layer.head_dim)
        integer = getattr(getattr(layer, "products", None), "integer", False)

        def product(left: Tensor, right: Tensor) -> Tensor:
            if integer and batch_pays(left, right):
                return multiply_batch(left, 0, right, 0)
            return left @ right

        def both() -> Tensor:
            q, k, v = operand(shape), operand(shape), operand(shape)
            return product(product(q, k.transpose(-2, -1)), v)

        jobs.append(both)

    hooks = [m.register_forward_hook(linear) for m in model.modules() if isinstance(m, nn.Linear)]
    attentions = [m for m in model.modules() if isinstance(m, timm.layers.Attention)]
    hooks += [m.register_forward_hook(attention) for m in attentions]
    forward()
    for hook in hooks:
        hook.remove()
    return lambda: [job() for job in jobs]


def jobs_of(
    chain: eq.Chain, whole: eq.Chain, block: str, images: Tensor, targets: Tensor
) -> dict[str, Callable[[], Any]]:
    """What is timed for one block, by name; `chain` is quantized, `whole` float."""
    objective = eq.BlockObjective(chain, block, images, targets, batch=len(images))
    first, start = chain.index(block), objective.start
    inputs = whole(images, stop=first)
    chunked = eq.Chain(whole.model, whole.segments, chain.chunk)
    jobs: dict[str, Callable[[], Any]] = {
        "full": lambda: whole(images),
        "suffix": lambda: whole(inputs, start=first),
        "suffix in chunks": lambda: chunked(inputs, start=first),
        "products": products_of(whole.model, lambda: whole(inputs, start=first)),
    }
    for execution in dict.fromkeys(("simulate", eq.set_execution(chain.model, "auto"))):
        eq.set_execution(chain.model, execution)
        products = products_of(chain.model, lambda: objective(start[None]))

        def candidate(execution: str = execution) -> None:
            eq.set_execution(chain.model, execution)
            objective((start * (1 + 0.01 * torch.rand(len(start))))[None])

        jobs[execution], jobs[f"{execution} products"] = candidate, products
    return jobs


@torch.no_grad()
def measure(name: str, model: nn.Module, images: Tensor, repeats: int) -> list[dict[str, Any]]:
    """All ratios for one network, one entry an execution, medians over rounds of each block."""
    qmodel = eq.quantize(model, eq.QuantConfig(weight_bits=4, act_bits=8))
    eq.calibrate(qmodel, images)
    chain, whole = eq.chain_of(qmodel), eq.chain_of(model)
    chain.fit_chunk(images[:1])
    targets = model(images)
    rows = []
    for block in tqdm(chain.searchable, desc=name, unit="block"):
        jobs = jobs_of(chain, whole, block, images, targets)
        times: dict[str, list[float]] = {job: [] for job in jobs}
        for i in range(repeats + 1):
            for job, function in jobs.items():
                if i < 2 or job not in SECONDARY:
                    times[job].append(seconds(function))
        # The first round warms up.
        rows.append({job: statistics.median(took[1:]) for job, took in times.items()})
    mean = {job: statistics.mean(row[job] for row in rows) for job in rows[0]}
    return [
        {
            "network": name,
            "execution": execution,
            "images": len(images),
            "chunk": chain.chunk,
            "candidate_over_suffix": mean[execution] / mean["suffix"],
            "candidate_over_chunked_suffix": mean[execution] / mean["suffix in chunks"],
            "candidate_over_full": mean[execution] / mean["full"],
            "share_matmul": mean[f"{execution} products"] / mean[execution],
            "float_share_matmul": mean["products"] / mean["suffix"],
            "blocks": rows,
        }
        for execution in ("simulate", "integer")
        if execution in mean
    ]


def main() -> int:
    """Measure both networks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--repeats", type=int, default=2, help="rounds per block (default: 2)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: 2)")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.threads < 1:
        parser.error("give --repeats, --threads above 0")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    demo = eq.load_demo("vit", calibration=100)
    deit = unfused(timm.create_model("deit_tiny_patch16_224", pretrained=False)).eval()
    results = [
        *measure("embedded ViT", demo.model, demo.calibration, arguments.repeats),
        *measure("DeiT-Tiny geometry", deit, torch.randn(100, 3, 224, 224), arguments.repeats),
    ]
    state = environment()
    print(f"\n{state['processor']}, {state['vector_instructions']}, {state['threads']} threads")
    print("candidate in float forwards; in brackets, the share of its own matrix products\n")
    print(f"{'network':20}{'block':>6}{'suffix ms':>11}{'simulate':>10}{'integer':>9}")
    for result in results[:: len(results) // 2]:
        for i, row in enumerate(result["blocks"]):
            ratios = [row[e] / row["suffix"] if e in row else nan for e in ("simulate", "integer")]
            print(
                f"{result['network']:20}{i:>6}{1e3 * row['suffix']:>11.1f}"
                f"{ratios[0]:>10.2f}{ratios[1]:>9.2f}"
            )
    print(f"\n{'network':20}{'execution':11}{'suffix':>15}{'chunked':>9}{'whole':>7}{'chunk':>7}")
    for result in results:
        print(
            f"{result['network']:20}{result['execution']:11}"
            f"{result['candidate_over_suffix']:>8.2f} [{100 * result['share_matmul']:2.0f} %]"
            f"{result['candidate_over_chunked_suffix']:>9.2f}"
            f"{result['candidate_over_full']:>7.2f}{result['chunk']:>7}"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"environment": state, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
