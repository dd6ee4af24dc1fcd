"""How long all claims would take on this machine: `python benchmarks/claims.py`.

Some cells of each claim, drawn at random, are computed again, two at a time with one thread each
(as `reproduce --workers 2` does). Their mean, times the number of cells, divided by the number of
workers, is what that claim would take here. A few cells give a rough estimate, so its standard
error is printed too. Nothing is written to disk.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from statistics import mean, stdev

import torch
from tqdm import tqdm

from evolq_lite.experiments import CLAIMS
from evolq_lite.experiments.cells import compute_with_one_thread
from evolq_lite.runs.workers import Workers


def estimate(seconds: list[float], cells: int, workers: int) -> tuple[float, float]:
    """Seconds of so many cells on so many workers, from those of some cells; its standard error."""
    error = stdev(seconds) / len(seconds) ** 0.5 if len(seconds) > 1 else float("nan")
    return cells * mean(seconds) / workers, cells * error / workers


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, default=4, help="of each claim (default: 4)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.cells < 1 or options.workers < 1:
        parser.error("give --cells and --workers above 0")
    draw = random.Random(options.seed)
    tasks = [
        (claim, cell)
        for claim in CLAIMS.values()
        for cell in draw.sample(claim.cells(False), min(options.cells, len(claim.cells(False))))
    ]
    took: dict[str, list[float]] = defaultdict(list)
    with Workers.local(options.workers, patience=7200) as workers, tqdm(total=len(tasks)) as bar:
        for _, content in workers.each(compute_with_one_thread, tasks):
            took[content["claim"]].append(content["seconds"])
            bar.update()
    print(f"{torch.backends.cpu.get_cpu_capability()}, {options.workers} workers of one thread")
    rows = []
    for name, seconds in took.items():
        cells = len(CLAIMS[name].cells(False))
        rows.append(estimate(seconds, cells, options.workers))
        here, error = (x / 60 for x in rows[-1])
        print(
            f"{name}: {cells:3} cells, {mean(seconds):5.1f} s per cell, "
            f"{here:4.0f} ± {error:.0f} min"
        )
    hours = sum(here for here, _ in rows) / 3600
    error = sum(error**2 for _, error in rows) ** 0.5 / 3600
    print(f"all claims: {hours:.1f} ± {error:.1f} h")
    return 0


if __name__ == "__main__":
    sys.exit(main())
