"""What a busy machine costs: `python benchmarks/busy.py`.

One candidate of the embedded ViT is evaluated alone, and beside one other process that multiplies
matrices; first with the bounded spin of `evolq_lite/_openmp.py`, then as torch comes. Each setting
is a process of its own, because OpenMP reads its switches once. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import evolq_lite as eq  # isort: skip  (before torch: see evolq_lite/_openmp.py)

import torch

from evolq_lite._openmp import SPIN

ROOT = Path(__file__).resolve().parents[1]
UNBOUNDED = {"GOMP_SPINCOUNT": "infinity", "KMP_BLOCKTIME": "infinite"}
BUSY = "import torch; x = torch.randn(1500, 1500)\nwhile True: x @ x"


def measure(images: int, repeats: int) -> float:
    """Median seconds of one candidate of the middle block, with two threads."""
    torch.set_num_threads(2)
    demo = eq.load_demo("vit", calibration=images)
    qmodel = eq.quantize(demo.model, eq.QuantConfig(weight_bits=3))
    eq.calibrate(qmodel, demo.calibration)
    chain = eq.chain_of(qmodel)
    chain.fit_chunk(demo.calibration[:1])
    objective = eq.BlockObjective(chain, "blocks.3", demo.calibration, demo.targets)
    times = []
    for i in range(repeats + 1):
        began = perf_counter()
        objective(objective.start[None] * (1 + 1e-3 * i))
        times.append(perf_counter() - began)
    return statistics.median(times[1:])  # the first warms up


def measure_in_process(switches: dict[str, str], busy: bool, images: int, repeats: int) -> float:
    """The same in a process with these switches, beside a busy one or not."""
    environment = {**os.environ, **switches, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    try:
        command = [sys.executable, __file__, "--images", str(images), "--repeats", str(repeats)]
        done = subprocess.run(
            [*command, "--only"], env=environment, capture_output=True, text=True, check=True
        )
    finally:
        if other is not None:
            other.kill()
            other.wait()
    return float(json.loads(done.stdout))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=300, help="calibration images")
    parser.add_argument("--repeats", type=int, default=12, help="timed candidates")
    parser.add_argument("--only", action="store_true", help="measure in this process, print JSON")
    options = parser.parse_args()
    if options.images < 2 or options.repeats < 1:
        parser.error("give --images of at least 2 and --repeats of at least 1")
    if options.only:
        print(json.dumps(measure(options.images, options.repeats)))
        return
    print(f"one candidate of the embedded ViT on {options.images} images, seconds (median)")
    print(f"{'':28}{'idle':>8}{'busy':>8}")
    for name, switches in (("bounded spin", SPIN), ("unbounded", UNBOUNDED)):
        idle, busy = (
            measure_in_process(switches, busy, options.images, options.repeats)
            for busy in (False, True)
        )
        print(f"{name:28}{idle:8.3f}{busy:8.3f}")


if __name__ == "__main__":
    main()
