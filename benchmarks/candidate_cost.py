"""What one candidate of the search costs, in float forwards: `make bench`.

Times mean little on a shared machine, ratios within one run mean more. For every block the
benchmark takes turns between

- a candidate: new scales for that block, fitness on all images, only the suffix recomputed,
- a float forward of the same suffix, with timm's own layers and plain attention,
- a float forward of the whole network,

and prints medians and ratios. The official code spends 5.5 whole float forwards on a candidate
(DeiT-Tiny, 100 images, 2 cores).
`share_matmul` is the share of a float suffix's time in its matrix products alone: the cost that no
simulation can avoid.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import evolq_lite as eq  # isort: skip  (before timm: see evolq_lite/_torchvision.py)

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from evolq_lite.data import unfused
from evolq_lite.record import environment


def seconds(function: Callable[[], Any]) -> float:
    """Run once, timed."""
    began = perf_counter()
    function()
    return perf_counter() - began


def products_of(model: nn.Module, suffix: Callable[[], Any]) -> Callable[[], Any]:
    """A function that replays the linear layers and attention products of a suffix."""
    jobs: list[Callable[[], Any]] = []

    def linear(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].clone()
        jobs.append(lambda: F.linear(x, layer.weight))

    def attention(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        images, tokens, _ = inputs[0].shape
        q = torch.randn(images, layer.num_heads, tokens, layer.head_dim)
        jobs.append(lambda: (q @ q.transpose(-2, -1)) @ q)

    hooks = [m.register_forward_hook(linear) for m in model.modules() if isinstance(m, nn.Linear)]
    attentions = [m for m in model.modules() if isinstance(m, timm.layers.Attention)]
    hooks += [m.register_forward_hook(attention) for m in attentions]
    suffix()
    for hook in hooks:
        hook.remove()
    return lambda: [job() for job in jobs]


def measure_block(
    chain: eq.Chain, whole: eq.Chain, block: str, images: Tensor, targets: Tensor, repeats: int
) -> dict[str, float]:
    """Median seconds of a candidate, a float suffix, a whole float forward and the products."""
    objective = eq.BlockObjective(chain, block, images, targets, batch=len(images))
    first = chain.index(block)
    inputs = whole(images, stop=first)
    products = products_of(whole.model, lambda: whole(inputs, start=first))
    start = objective.start
    times: dict[str, list[float]] = {"candidate": [], "suffix": [], "full": [], "matmul": []}
    for i in range(repeats + 1):
        vector = start * (1 + 0.01 * torch.rand(len(start)))
        took = {
            "candidate": seconds(lambda v=vector: objective(v[None])),
            "suffix": seconds(lambda: whole(inputs, start=first)),
            "full": seconds(lambda: whole(images)),
            "matmul": seconds(products),
        }
        if i:  # the first round warms up
            for key, value in took.items():
                times[key].append(value)
    return {key: statistics.median(values) for key, values in times.items()}


@torch.no_grad()
def measure(name: str, model: nn.Module, images: Tensor, repeats: int) -> dict[str, Any]:
    """All ratios for one network, medians over `repeats` rounds of each block."""
    qmodel = eq.quantize(model, eq.QuantConfig(weight_bits=4, act_bits=8))
    eq.calibrate(qmodel, images)
    chain, whole = eq.chain_of(qmodel), eq.chain_of(model)
    targets = model(images)
    rows = [
        measure_block(chain, whole, block, images, targets, repeats)
        for block in tqdm(chain.searchable, desc=name, unit="block")
    ]
    mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
    return {
        "network": name,
        "execution": "simulate",
        "images": len(images),
        "candidate_over_suffix": mean["candidate"] / mean["suffix"],
        "candidate_over_full": mean["candidate"] / mean["full"],
        "share_matmul": mean["matmul"] / mean["suffix"],
        "blocks": rows,
    }


def main() -> int:
    """Measure both networks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--repeats", type=int, default=3, help="rounds per block (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    demo = eq.load_demo("vit", calibration=100)
    deit = unfused(timm.create_model("deit_tiny_patch16_224", pretrained=False)).eval()
    results = [
        measure("embedded ViT", demo.model, demo.calibration, arguments.repeats),
        measure("DeiT-Tiny geometry", deit, torch.randn(100, 3, 224, 224), arguments.repeats),
    ]
    state = environment()
    print(f"\n{state['processor']}, {state['vector_instructions']}, {state['threads']} threads")
    head = ("block", "candidate ms", "suffix ms", "full ms", "ratio")
    print(f"{'network':20}{head[0]:>10}{head[1]:>14}{head[2]:>11}{head[3]:>9}{head[4]:>7}")
    for result in results:
        for i, row in enumerate(result["blocks"]):
            print(
                f"{result['network']:20}{i:>10}{1e3 * row['candidate']:>14.1f}"
                f"{1e3 * row['suffix']:>11.1f}{1e3 * row['full']:>9.1f}"
                f"{row['candidate'] / row['suffix']:>7.2f}"
            )
    for result in results:
        print(
            f"{result['network']}: a candidate costs {result['candidate_over_suffix']:.2f} float "
            f"forwards of its suffix, {result['candidate_over_full']:.2f} of the whole network; "
            f"matrix products are {100 * result['share_matmul']:.0f} % of a float suffix"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"environment": state, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
