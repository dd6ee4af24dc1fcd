"""The same networks on a CPU and on a GPU: `python benchmarks/two_machines.py`; computes nothing.

R12 and R7 measured the same unsearched starts: the same network, scheme, calibration photographs
and seed. Where one of them ran on a CPU and the other on a GPU, their results show what another
machine changes, photograph by photograph. (The versions of the libraries differ, too.)
"""

from __future__ import annotations

import sys

import pandas as pd

from evolq_lite.evaluate import LossChange, unpack_values, unpacked
from evolq_lite.experiments import real_options, real_starts
from evolq_lite.experiments.c12_starts import NONE
from evolq_lite.experiments.real_cells import NETWORKS
from evolq_lite.experiments.report import load_results
from evolq_lite.experiments.verdicts import to_markdown

SAME = ["network", "weight_bits", "seed", "images"]  # what makes two starts the same


def compare() -> pd.DataFrame:
    """A row for each start that two kinds of device have measured."""
    starts = load_results("R12")
    starts = starts[starts["start"] == real_starts.POOR].drop(columns="start")
    pairs = starts.merge(load_results("R7"), on=SAME, suffixes=("_r12", "_r7"))
    rows = []
    for _, pair in pairs.iterrows():
        devices = [kind_of(pair[f"device_{claim}"]) for claim in ("r12", "r7")]
        if devices[0] == devices[1]:
            continue
        first, other = pair[NONE], pair[real_options.START]
        images = int(pair["test_images_r12"])
        here, there = (unpacked(start["correct"], images) for start in (first, other))
        rows.append(
            {
                "start": f"{NETWORKS[pair['network']]} W{pair['weight_bits']}A8",
                f"top-1, {devices[0]}": f"{100 * float(here.float().mean()):.1f} %",
                f"top-1, {devices[1]}": f"{100 * float(there.float().mean()):.1f} %",
                "photographs that change sides": f"{int((here != there).sum())} of {images:,}",
                "KL, change": str(LossChange.of(*(unpack_values(x["kl"]) for x in (first, other)))),
            }
        )
    return pd.DataFrame(rows)


def kind_of(device: object) -> str:
    """CPU or GPU; results from before devices were named are a CPU's."""
    return "GPU" if str(device).startswith("cuda") else "CPU"


if __name__ == "__main__":
    print(to_markdown(compare()))
    sys.exit()
