"""The commands, from end to end on the embedded CNN, which is quick."""

import json

import pytest
import torch
from safetensors.torch import load_file

from evolq_lite.cli import main
from evolq_lite.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("few_test_images", "few_factors")
SHORT = ["--calibration-images", "60", "--batch", "30", "--passes", "2"]


def demo(out, *more):
    return main(["demo", "--model", "cnn", "--out", str(out), *SHORT, *more])


def test_demo_writes_the_whole_run_folder(tmp_path, capsys):
    out = tmp_path / "run"
    assert demo(out) == 0
    printed = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    for key in ("float_top1", "before_top1", "after_top1", "gain", "gain_interval", "p_value"):
        assert key in summary
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert summary["evaluations"] == len(history) == 2 * 4 * 3 + 1
    assert set(history[0]) == {
        "visit",
        "pass",
        "block",
        "cycle",
        "fitness",
        "accepted",
        "seconds",
        "crc32",
    }
    assert summary["images"] == 620
    assert summary["gain"] == pytest.approx(summary["after_top1"] - summary["before_top1"])
    assert summary["fitness_after"] <= summary["fitness_before"]
    assert ("no significant" in printed) == (summary["p_value"] >= 0.05)
    assert f"{100 * summary['after_top1']:.2f} %" in printed
    environment = json.loads((out / "environment.json").read_text())
    assert environment["execution"] in ("integer", "simulate") and environment["device"] == "cpu"
    assert environment["tf32"] is False and environment["chunk"] >= 1
    assert summary["peak_memory_mib"] > 100
    assert environment["attention"] == "unfused" and environment["threads"] >= 1
    assert environment["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert len(environment["sha256"]) == 3
    for name in ("fitness.png", "top1.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob(".*.new"))


def test_a_stopped_run_resumes_to_the_same_end(tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle of a visit, then --resume: same scales, same history, same result."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert demo(whole) == 0
    append, count = RunFolder.append, 0

    def interrupted(self, evaluation):
        nonlocal count
        count += 1
        append(self, evaluation)
        if count == 12:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", interrupted)
        assert demo(part) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (part / "summary.json").exists()
    assert demo(part, "--resume") == 0
    one, two = load_file(whole / "scales.safetensors"), load_file(part / "scales.safetensors")
    assert all(torch.equal(one[key], two[key]) for key in one) and one.keys() == two.keys()
    assert len({(out / "scales.safetensors").read_bytes() for out in (whole, part)}) == 1
    keys = ("visit", "pass", "block", "cycle", "fitness", "accepted")
    lines = [
        [
            tuple(json.loads(x)[k] for k in keys)
            for x in (out / "history.jsonl").read_text().splitlines()
        ]
        for out in (whole, part)
    ]
    assert lines[0] == lines[1]
    results = [json.loads((out / "summary.json").read_text()) for out in (whole, part)]
    for result in results:
        result.pop("search_seconds"), result.pop("peak_memory_mib")
    assert results[0] == results[1]
    for name in ("kl", "cross_entropy"):
        loss = results[0]["losses"][name]
        assert loss["interval_low"] < loss["change"] < loss["interval_high"]
        assert loss["change"] == pytest.approx(loss["evolved"] - loss["before"])
    assert results[0]["top1"]["GPTQ"] > results[0]["top1"]["before"]


def test_check_says_ready(capsys):
    assert main(["check"]) == 0
    printed = capsys.readouterr().out
    assert "Ready." in printed and "typefaces-vit.safetensors is OK" in printed


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    for word in ("--weight-bits", "--granularity", "--class-map", "--resume", "default: 10"):
        assert word in text


def test_a_run_on_weights_rounded_by_gptq_resumes_to_the_same_end(tmp_path, capsys, monkeypatch):
    """The integers are taken over from the folder."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    more = ("--rounding", "gptq", "--describe")
    assert demo(whole, *more) == 0
    assert "integers were chosen: " in capsys.readouterr().out
    append, count = RunFolder.append, iter(range(100))

    def interrupted(self, event):
        append(self, event)
        if next(count) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", interrupted)
        assert demo(part, *more) == 130
    assert demo(part, *more, "--resume") == 0
    assert len({(out / "scales.safetensors").read_bytes() for out in (whole, part)}) == 1
    assert demo(tmp_path / "nearest") == 0
    fitness = [
        json.loads((out / "summary.json").read_text())["fitness_before"]
        for out in (whole, tmp_path / "nearest")
    ]
    assert fitness[0] < fitness[1]
