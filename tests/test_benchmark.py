"""The benchmark runs and its ratios follow from what it measured; speed is not for a test."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import toy, toy_images

from evolq_lite import QuantConfig, SearchConfig, load_demo
from evolq_lite.kernels import missing

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import busy
import candidate_cost
import claims
import export
import scaling
import soak
import two_machines
import whole_run


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


def test_the_account_of_a_run_adds_up(tmp_path):
    search = SearchConfig(passes=2, cycles=1, batch=3)
    source = whole_run.Random("test_vit", images=6)
    account, run, blocks = whole_run.account_for(source, QuantConfig(), search, tmp_path / "run")
    parts, count = account.parts, 2 * len(run.chain.searchable) + 1
    assert len(blocks) == len(account.candidates) == parts["candidates"].calls == count
    assert parts["history"].calls == count and parts["scales after a visit"].calls == count - 1
    assert 1 <= parts["inputs of a pass"].calls <= 2
    named = [parts[name] for name in ("candidates", *whole_run.IN_SEARCH)]
    for key in ("wall", "cpu", "faults"):
        whole = sum(getattr(cost, key) for cost in (*named, account.rest))
        assert whole == pytest.approx(getattr(parts["search"], key))
    share = sum(cost.wall for cost in account.candidates) / parts["search"].wall
    assert account.overhead("wall") == pytest.approx(1 / share - 1) and 0 < share < 1
    candidates = whole_run.compare(account, run, blocks, repeats=1)
    told = whole_run.tell(account, candidates)
    assert all(block in told for block in run.chain.searchable) and "more than its cand" in told
    # The methods that were watched are themselves again.
    assert whole_run.RunFolder.append.__name__ == "append"


@pytest.mark.long
def test_scaling_on_few_images(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "vit_b", lambda images: (10.0, 2**20))
    out = tmp_path / "out.json"
    words = ["scaling.py", "--images", "20", "--batch", "10", "--repeats", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    threads = torch.get_num_threads()
    scaling.main()
    torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert found["tasks"] == 2 and min(found[f"workers_{n}"] for n in (1, 2)) > 0
    assert "512 workers" in capsys.readouterr().out


def test_what_is_expected_of_workers():
    """Ten tasks cannot keep more than ten workers busy; handing out costs in the end."""
    alone, ten = (scaling.expected(1.0, 0.0, 0, workers, 1) for workers in (1, 10))
    assert alone["efficiency"] == pytest.approx(1, abs=1e-3)
    assert ten["speedup"] == pytest.approx(10, rel=1e-2)
    assert scaling.expected(1.0, 0.0, 0, 64, 1)["speedup"] == ten["speedup"]
    assert scaling.expected(1.0, 0.1, 0, 512, 52)["speedup"] == pytest.approx(10, rel=1e-2)


def test_what_all_cells_take_follows_from_some():
    assert claims.estimate([10.0, 20.0, 30.0], cells=100, workers=2) == pytest.approx(
        (1000, 100 * 10 / 3**0.5 / 2)
    )


def test_a_soak_tells_a_leak():
    rows = [{"seconds": 60.0 * i, "mib": 500 + i} for i in range(20)]
    assert soak.slope(rows) == pytest.approx(60)
    assert len(soak.soak(1e-6, 0)) == 1


@pytest.mark.long
def test_a_candidate_is_timed_beside_a_busy_process():
    assert busy.measure_in_process(busy.SPIN, busy=True, images=20, repeats=2) > 0


@pytest.mark.long
def test_what_an_exported_network_weighs_and_takes():
    images = toy_images("vit", 4)
    result = export.measure("toy", toy("vit"), images, QuantConfig(weight_bits=4), repeats=1)
    sizes, seconds = result["bytes"], result["seconds"]
    assert sizes["float"] > sizes["int8"] > sizes["int4"] > result["bytes_on_paper"]
    assert list(seconds) == [1]  # not enough images for 32
    for form, value in seconds[1].items():
        assert value > 0
        assert result["over_float"][1][form] == pytest.approx(value / seconds[1]["float"])
    assert "MB on paper" in export.tell(result)


def test_what_another_machine_changes_is_read_from_the_results():
    table = two_machines.compare()
    assert list(table["start"]) == [
        f"{name} W{bits}A8" for name in ("ViT-Tiny", "DeiT-Tiny") for bits in (4, 3)
    ]
    assert table["photographs that change sides"].iloc[0] == "195 of 1,000"
    readme = (Path(two_machines.__file__).parents[1] / "README.md").read_text()
    assert "195 of the 1,000" in readme
    for column in ("top-1, CPU", "top-1, GPU"):
        assert table[column].iloc[0] in readme
