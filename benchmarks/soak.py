"""Does memory stay constant? `python benchmarks/soak.py --minutes 120`.

Searches of the embedded CNN, one after another, each in a new run folder, with and without worker
processes by turns. After each: resident memory, open files, threads, child processes. At the end a
line through memory over the second half says how much is lost an hour; a leak is what grows.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from time import monotonic

import evolq_lite as eq  # isort: skip  (before timm: see evolq_lite/_torchvision.py)

import numpy as np
import psutil
import torch

from evolq_lite.runs.run import Run
from evolq_lite.runs.source import Embedded
from evolq_lite.runs.workers import Workers


def search(out: Path, count: int) -> None:
    """One short run, as the command line does it, without the test images."""
    config = eq.SearchConfig(passes=1, batch=30)
    with (
        Workers.local(count) if count else nullcontext() as workers,
        Run(Embedded("cnn", 60, 0), eq.QuantConfig(weight_bits=3), config, out) as run,
    ):
        for _ in run.evolve(workers):
            pass


def state(process: psutil.Process) -> dict[str, float]:
    """What could leak, children after a moment to go."""
    gc.collect()
    return {
        "mib": process.memory_info().rss / 2**20,
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
    }


def soak(minutes: float, every: int) -> list[dict[str, float]]:
    """Search until the time is over; every so many searches use workers."""
    process, began, rows = psutil.Process(os.getpid()), monotonic(), []
    while monotonic() - began < 60 * minutes:
        with tempfile.TemporaryDirectory() as folder:
            search(Path(folder) / "run", 2 if every and len(rows) % every == every - 1 else 0)
        rows.append({"seconds": monotonic() - began, **state(process)})
        print(
            f"{len(rows):5} searches, {rows[-1]['seconds'] / 60:6.1f} min: "
            + ", ".join(f"{rows[-1][key]:.0f} {key}" for key in ("mib", "files", "threads")),
            flush=True,
        )
    return rows


def slope(rows: list[dict[str, float]]) -> float:
    """MiB an hour, of a line through the second half."""
    half = rows[len(rows) // 2 :]
    if len(half) < 2:
        return 0.0
    line = np.polyfit([r["seconds"] / 3600 for r in half], [r["mib"] for r in half], 1)
    return float(line[0])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--every", type=int, default=20, help="with workers, 0: never")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error("give --minutes above 0")
    torch.set_num_threads(1)
    rows = soak(options.minutes, options.every)
    print(
        f"{len(rows)} searches in {rows[-1]['seconds'] / 60:.0f} min; "
        f"{rows[0]['mib']:.0f} MiB after the first, {rows[-1]['mib']:.0f} after the last, "
        f"{slope(rows):+.1f} MiB an hour in the second half"
    )
    if options.json:
        options.json.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
