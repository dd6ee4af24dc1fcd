"""The benchmark runs and its ratios follow from what it measured; speed is not for a test."""

import sys
from pathlib import Path

import pytest

from evolq_lite import load_demo
from evolq_lite.integer import missing

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import candidate_cost


def test_candidate_cost_on_the_embedded_vit():
    demo = load_demo("vit", calibration=10)
    results = candidate_cost.measure("embedded", demo.model, demo.calibration, repeats=1)
    executions = [result["execution"] for result in results]
    assert executions == (["simulate"] if missing(4) else ["simulate", "integer"])
    for result in results:
        rows, execution = result["blocks"], result["execution"]
        assert len(rows) == 6 and all(value > 0 for row in rows for value in row.values())
        mean = {key: sum(row[key] for row in rows) / 6 for key in rows[0]}
        for key, over in (
            ("candidate_over_suffix", "suffix"),
            ("candidate_over_chunked_suffix", "suffix in chunks"),
            ("candidate_over_full", "full"),
        ):
            assert result[key] == pytest.approx(mean[execution] / mean[over])
        share = mean[f"{execution} products"] / mean[execution]
        assert result["share_matmul"] == pytest.approx(share)
