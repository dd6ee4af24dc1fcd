"""Candidates per second, one by one and many at once: `python benchmarks/many_candidates.py`.

On a GPU a candidate of a small network is bound by the launching of kernels, not by arithmetic. So
there may be something to gain from many candidates at once. For blocks at the beginning, in the
middle and at the end of a network this takes turns between

- a loop, as the search has it, with the layers that are made for speed ("simulate"),
- the same loop with the layers that the lessons print ("plain"), which `torch.vmap` needs,
- `torch.vmap` over candidates, on those layers,
- a loop with all calibration batches in one forward, whose logits are cut into batches afterwards.

Products are in full float32 (no TF32): see `runs.environment.fix_kernels`.
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
from torch import Tensor, nn

from evolq_lite.networks import unfused
from evolq_lite.runs.environment import device_of, environment, fix_kernels, tell_device

LOOP, PLAIN, VMAP, JOINED = "loop", "loop, plain", "vmap, plain", "loop, batches joined"
NETWORKS = EMBEDDED, DEIT = ("embedded ViT", "DeiT-Tiny")
WAYS = (LOOP, PLAIN, VMAP, JOINED)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Run once, timed, until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - began


def jobs_of(objective: eq.BlockObjective, population: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The ways to evaluate the same candidates (p, d), by name."""
    model, batch = objective.chain.model, len(objective.targets[0])
    joined = torch.cat(objective.inputs)

    def execute(execution: str, values: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            eq.set_execution(model, execution)
            return values().cpu()

        return run

    def at_once(vector: Tensor) -> Tensor:
        logits = objective._logits(joined, objective.named(vector)).split(batch)
        losses = [objective.fitness(x, t) for x, t in zip(logits, objective.targets, strict=True)]
        return torch.stack(losses).mean()

    there = population.to(joined.device)
    return {
        LOOP: execute("simulate", lambda: objective(population)),
        PLAIN: execute("plain", lambda: objective(population)),
        VMAP: execute("plain", lambda: torch.vmap(objective.loss)(there)),
        JOINED: execute("simulate", lambda: torch.stack([at_once(v) for v in population])),
    }


def load(name: str, images: int) -> tuple[nn.Module, Tensor]:
    """A float network and images for it; those of DeiT-Tiny, and its weights, are random."""
    if name == EMBEDDED:
        demo = eq.load_demo("vit", calibration=images)
        return demo.model, demo.calibration
    model = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    return unfused(model).eval(), torch.randn(images, 3, 224, 224)


@torch.no_grad()
def measure(
    name: str, model: nn.Module, images: Tensor, candidates: int, repeats: int
) -> list[dict[str, Any]]:
    """Seconds a candidate in each way, a row for each block."""
    qmodel = eq.quantize(model, eq.QuantConfig(weight_bits=4, act_bits=8))
    eq.calibrate(qmodel, images)
    chain = eq.chain_of(qmodel)
    chain.fit_chunk(images[:1])
    targets = torch.cat([model(x) for x in images.split(100)])
    blocks = chain.searchable
    rows = []
    for block in dict.fromkeys((blocks[0], blocks[len(blocks) // 2], blocks[-1])):
        objective = eq.BlockObjective(chain, block, images, targets, batch=100)
        start = objective.start
        population = start * (1 + 0.01 * torch.rand(candidates, len(start)))
        row: dict[str, Any] = {"network": name, "images": len(images), "block": block}
        values: dict[str, Tensor] = {}
        for way, job in jobs_of(objective, population).items():
            try:
                values[way] = job()  # warms up
                took = [seconds(job, images.device) for _ in range(repeats)]
                row[way] = statistics.median(took) / candidates
            except torch.cuda.OutOfMemoryError:
                row[way] = None
        apart = [float((v - values[LOOP]).abs().max()) for v in values.values()]
        rows.append({**row, "apart": max(apart)})
        print(tell(rows[-1]), flush=True)
    return rows


def tell(row: dict[str, Any]) -> str:
    """A row of the table: candidates per second in each way."""
    ways = ("     -" if row[w] is None else f"{1 / row[w]:6.1f}" for w in WAYS)
    line = f"| {row['network']} | {row['images']} | {row['block']} | " + " | ".join(ways)
    return f"{line} | {row['apart']:.1g} |"


def main() -> int:
    """Measure both networks and print candidates per second."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda (default: cuda if there is one)"
    )
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="default: both"
    )
    parser.add_argument("--candidates", type=int, default=8, help="at once (default: 8)")
    parser.add_argument("--images", type=int, nargs="+", default=[100, 1000], help="100 1000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if min(arguments.candidates, arguments.repeats) < 1 or min(arguments.images) < 2:
        parser.error("give --candidates and --repeats of at least 1, --images of at least 2")
    fix_kernels()
    torch.manual_seed(0)
    device = device_of(arguments.device)
    rows = []
    print(f"{tell_device(device)}; candidates per second, {arguments.candidates} at a time\n")
    print(f"| network | images | block | {' | '.join(WAYS)} | apart |")
    print("|---|---|---|---|---|---|---|---|")
    for images in arguments.images:
        for name in arguments.networks:
            model, x = (part.to(device) for part in load(name, images))
            rows += measure(name, model, x, arguments.candidates, arguments.repeats)
    if arguments.json is not None:
        told = {"environment": environment(device=tell_device(device)), "rows": rows}
        arguments.json.write_text(json.dumps(told, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
