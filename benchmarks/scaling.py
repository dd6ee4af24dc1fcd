"""What workers are worth: `python benchmarks/scaling.py`.

One visit of the embedded ViT is evaluated here in this process (one thread) and by 1 and 2 worker
processes (one thread each): speed-up, and what a task costs beside its computation. From the two,
on paper, follows what to expect of 8, 64 and 512 workers for ViT-B, with the paper's ten batches of
100 images and with several candidates at a time (`--parallel`). benchmarks/README.md discusses it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import evolq_lite as eq  # isort: skip  (before timm: see evolq_lite/_torchvision.py)

import timm
import torch
from torch import Tensor, nn

from evolq_lite.evolve import visits_of
from evolq_lite.objective import BlockObjective
from evolq_lite.runs.environment import environment
from evolq_lite.runs.run import Run
from evolq_lite.runs.source import Embedded
from evolq_lite.runs.workers import Workers, state_of

BATCHES = 10  # of 100 images: the paper's 1,000
LINK = 125e6  # bytes a second between machines: 1 Gb/s
LATENCY = 1e-3  # seconds for a message there and back


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median of several runs after one that warms up."""
    function()
    times = []
    for _ in range(repeats):
        began = perf_counter()
        function()
        times.append(perf_counter() - began)
    return statistics.median(times)


def measure(images: int, batch: int, repeats: int) -> dict[str, float]:
    """Seconds of one candidate alone and with workers, and the size of a task."""
    torch.set_num_threads(1)
    quant, search = eq.QuantConfig(weight_bits=3), eq.SearchConfig(batch=batch)
    with (
        tempfile.TemporaryDirectory() as folder,
        Run(Embedded("vit", images, 0), quant, search, Path(folder) / "run") as run,
    ):
        visit = visits_of(run.chain, run.search)[len(run.chain.searchable) // 2]
        objective = BlockObjective(
            run.chain, visit.blocks, run.parts.images, run.parts.targets, batch=batch,
            genome=visit.genome,
        )  # fmt: skip
        candidate: Tensor = objective.start[None] * 1.001
        found = {
            "tasks": math.ceil(images / batch),
            "task_bytes": len(state_of(run.qmodel)) + 4 * candidate.numel(),
            "alone": median_seconds(lambda: objective(candidate), repeats),
        }
        for count in (1, 2):
            with Workers.local(count) as workers:
                remote = run.objective_of(workers, visit)
                for _ in range(3):  # every worker loads its data, and keeps the inputs of blocks
                    remote(candidate.repeat(4, 1))
                found[f"workers_{count}"] = median_seconds(
                    lambda remote=remote: remote(candidate), repeats
                )
    return found


def vit_b(images: int) -> tuple[float, int]:
    """Seconds of a candidate on 100 images, one thread, in ViT-B's middle block; a task's bytes.

    Random weights: time, not values. Measured on a few images.
    """
    model = timm.create_model("vit_base_patch16_224").eval()
    config = eq.QuantConfig()
    qmodel, x = eq.quantize(model, config), torch.randn(images, 3, 224, 224)
    eq.calibrate(qmodel, x[:2], config)
    eq.set_execution(qmodel, "auto")
    chain = eq.chain_of(qmodel)
    chain.fit_chunk(x[:1])
    with torch.no_grad():
        inputs = [chain.trace(x)[chain.index("blocks.6")]]
    objective = BlockObjective(
        chain, ["blocks.6"], x, torch.randn(images, 1000), batch=images, inputs=inputs
    )
    seconds = median_seconds(lambda: objective(objective.start[None] * 1.001), 3)
    return 100 / images * seconds, bytes_of(model)


def bytes_of(model: nn.Module) -> int:
    """What a task of a network sends: scale, zero point and bias of every output channel."""
    return 4 * 3 * sum(m.out_features for m in model.modules() if isinstance(m, nn.Linear))


def expected(
    seconds: float, overhead: float, size: int, workers: int, candidates: int
) -> dict[str, float]:
    """Speed-up and efficiency of so many workers, if one task takes so many seconds.

    The run hands out and takes in one task after the other; workers compute side by side.
    """
    tasks = BATCHES * candidates
    serial = tasks * (overhead + size / LINK)
    time = max(serial, math.ceil(tasks / workers) * seconds + overhead + size / LINK) + LATENCY
    speedup = tasks * seconds / time
    return {"speedup": speedup, "efficiency": speedup / workers}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=1000, help="calibration images")
    parser.add_argument("--batch", type=int, default=100, help="images a task")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    if options.images < 1 or options.batch < 1 or options.repeats < 1:
        parser.error("give --images, --batch, --repeats above 0")
    found = measure(options.images, options.batch, options.repeats)
    tasks, alone = found["tasks"], found["alone"]
    overhead = (found["workers_1"] - alone) / tasks
    print(f"embedded ViT, {options.images} images in {tasks} tasks, one candidate:")
    print(f"  in this process        {1e3 * alone:8.1f} ms")
    for workers in (1, 2):
        time = found[f"workers_{workers}"]
        print(f"  {workers} workers              {1e3 * time:8.1f} ms   {alone / time:.2f} x")
    print(
        f"  overhead of a task     {1e3 * overhead:8.2f} ms, {found['task_bytes'] / 1024:.0f} KiB"
    )
    seconds, size = vit_b(4)
    print(
        f"On paper, ViT-B: {seconds:.1f} s a task of 100 images, one thread (measured on 4); "
        f"{size / 2**20:.1f} MiB a task"
    )
    paper = []
    for workers in (8, 64, 512):
        for candidates in (1, 8, 52):
            row = expected(seconds, max(overhead, 0.0), size, workers, candidates)
            paper.append({"workers": workers, "parallel": candidates, **row})
            print(
                f"  {workers:4} workers, --parallel {candidates:2}: {row['speedup']:6.1f} x, "
                f"efficiency {row['efficiency']:.0%}"
            )
    if options.json:
        content = {**found, "overhead": overhead, "paper": paper, "environment": environment()}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
