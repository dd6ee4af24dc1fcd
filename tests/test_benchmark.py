"""The benchmark runs and its ratios follow from what it measured; speed is not for a test."""

import sys
from pathlib import Path

import pytest

from evolq_lite import load_demo

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import candidate_cost


def test_candidate_cost_on_the_embedded_vit():
    demo = load_demo("vit", calibration=10)
    result = candidate_cost.measure("embedded", demo.model, demo.calibration, repeats=1)
    rows = result["blocks"]
    assert len(rows) == 6 and all(value > 0 for row in rows for value in row.values())
    mean = {key: sum(row[key] for row in rows) / 6 for key in rows[0]}
    assert result["candidate_over_suffix"] == pytest.approx(mean["candidate"] / mean["suffix"])
    assert result["candidate_over_full"] == pytest.approx(mean["candidate"] / mean["full"])
    assert result["share_matmul"] == pytest.approx(mean["matmul"] / mean["suffix"])
