"""Run folders: content and not paths, places without locks, SIGTERM, results before words."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
import timm
import torch
from commands import call, command, make_photos, noise_image, sentence
from safetensors.torch import load_file, save_file

from evolq_lite import cli
from evolq_lite.evolve import Evaluated
from evolq_lite.runs.folder import RunFolder
from evolq_lite.runs.source import load_once

LONGER = ("--passes", 2, "--cycles", 3, "--threads", 1)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Work in an empty folder, with one thread, and with no network left over from another test."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    load_once.cache_clear()


def history(out: Path) -> list[Evaluated]:
    return [replace(event, seconds=0.0) for event in RunFolder(out).history()]


def stop_after(monkeypatch, evaluations: int) -> None:
    """Let Ctrl-C come after so many evaluations."""
    append, count = RunFolder.append, iter(range(1, 100))

    def stop(self, event):
        append(self, event)
        if next(count) == evaluations:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "append", stop)


@pytest.fixture
def stopped(folders, tmp_path, monkeypatch):
    """A whole run, and one with the same options that was stopped after three evaluations."""
    assert call(*command({**folders, "--out": tmp_path / "whole"}, *LONGER)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert call(*command(folders, *LONGER)) == 130
    return folders


@pytest.mark.parametrize("kind", ["moved", "relative"])
def test_a_run_resumes_after_its_files_have_moved(stopped, tmp_path, monkeypatch, kind):
    options = dict(stopped)
    if kind == "moved":
        (tmp_path / "elsewhere").mkdir()
        shutil.move(tmp_path / "photos", tmp_path / "elsewhere" / "pictures of mine")
        shutil.move(tmp_path / "net.safetensors", tmp_path / "elsewhere" / "weights.safetensors")
        shutil.move(tmp_path / "out", tmp_path / "elsewhere" / "run")
        photos, root = "elsewhere/pictures of mine", Path("elsewhere")
        options |= {"--checkpoint": "elsewhere/weights.safetensors", "--out": root / "run"}
    else:
        photos = "photos"
        options |= {"--checkpoint": "net.safetensors", "--out": "out"}
    options |= {"--calibration": photos, "--test": photos}
    assert call(*command(options, "--resume", *LONGER)) == 0
    out = Path(options["--out"])
    assert history(out) == history(tmp_path / "whole")
    scales = [(p / "scales.safetensors").read_bytes() for p in (out, tmp_path / "whole")]
    assert scales[0] == scales[1]


@pytest.mark.parametrize("what", ["calibration images", "test images", "checkpoint"])
def test_other_content_under_the_same_names_is_refused(stopped, tmp_path, capsys, what):
    options = dict(stopped)
    if what == "checkpoint":
        weights = load_file(tmp_path / "net.safetensors")
        save_file({k: v * 1.01 for k, v in weights.items()}, tmp_path / "net.safetensors")
    else:
        noise_image(77).save(tmp_path / "photos" / "a" / "0.png")
    before = (tmp_path / "out" / "history.jsonl").read_bytes()
    assert call(*command(options, "--resume", *LONGER)) == 2
    said = sentence(capsys.readouterr().err)
    assert "began with other files" in said and what in said and "put them back" in said
    assert (tmp_path / "out" / "history.jsonl").read_bytes() == before


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "no")])
def test_a_place_without_locks_is_told_and_can_be_used_all_the_same(
    folders, monkeypatch, capsys, tmp_path, error
):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert call(*command(folders)) == 2
    said = sentence(capsys.readouterr().err)
    assert "without locks" in said and "--no-lock" in said
    assert not (tmp_path / "out").exists()
    assert call(*command(folders, "--no-lock")) == 0
    assert (tmp_path / "out" / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_sigterm_is_ctrl_c(tmp_path):
    """What a cluster's time limit or `kill` sends: the run says how to resume, and resumes."""
    out = tmp_path / "run"
    options = ["--model", "cnn", "--calibration-images", "60", "--batch", "30", "--out", str(out)]
    line = [sys.executable, "-m", "evolq_lite", "demo", *options, "--passes", "40"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    end = time.monotonic() + 120
    while not (out / "history.jsonl").is_file():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "--resume" in said.splitlines()[-1] and "Traceback" not in said
    assert history(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [
        pytest.param("pipe", marks=pytest.mark.long),
        "closed",
        pytest.param("ascii", marks=pytest.mark.long),
        *["full"] * Path("/dev/full").exists(),
    ],
)
def test_a_summary_is_never_lost_to_the_output(tmp_path, target):
    """Whatever the standard output is, the result is in the folder first."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "net.safetensors")
    photos, class_map = make_photos(tmp_path / "photos"), tmp_path / "classes.txt"
    class_map.write_text("\n".join(["a", "b", "c", *map(str, range(997))]))
    out = tmp_path / "run"
    options = f"--checkpoint {tmp_path / 'net.safetensors'} --calibration {photos} --test {photos}"
    more = f"--class-map {class_map} --passes 1 --cycles 1 --granularity global --out {out}"
    command_line = f"{sys.executable} -m evolq_lite run --model test_resnet {options} {more}"
    shell = {
        "pipe": f"{command_line} | true",
        "full": f"{command_line} > /dev/full",
        "closed": f"{command_line} >&- 2>&-",
        "ascii": f"PYTHONIOENCODING=ascii LC_ALL=C {command_line} > {tmp_path / 'said'}",
    }[target]
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=False)
    assert json.loads((out / "summary.json").read_text())["images"] == 6, done.stderr
    assert "Traceback" not in done.stderr


def test_results_are_written_before_anything_is_said(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "report", lambda *_: (_ for _ in ()).throw(OSError(errno.EPIPE, "x")))
    call(*command(folders))
    assert (tmp_path / "out" / "summary.json").is_file()
