"""Bad input: one sentence on stderr, exit status 2, nothing half-written, nothing lost."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import SHORT, call, command, sentence, tree
from conftest import toy, toy_images
from safetensors.torch import load_file, save_file

from evolq_lite import (
    BlockObjective,
    QuantConfig,
    SearchConfig,
    calibrate,
    chain_of,
    cli,
    convert,
    fast,
    quantize,
)
from evolq_lite import data as data_module
from evolq_lite.data import (
    DEMO_MODELS,
    build_demo_model,
    load_demo,
)
from evolq_lite.figures import new_figure, save_figure
from evolq_lite.files import write_whole
from evolq_lite.runs import run as run_module
from evolq_lite.runs import source as source_module
from evolq_lite.runs.folder import RunFolder
from evolq_lite.runs.scales import load_scales, save_scales

DEMO = ("demo", "--calibration-images", 20, *SHORT)
SMALL = {"vit": {"embed_dim": 24, "depth": 2}, "cnn": {"channels": [8, 8, 8, 8]}}
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder, with one thread (small networks); leave no temporary file."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("*.new"))


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small stand-in for data/: 40 and 30 images of noise, and untrained networks."""
    folder, noise = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, n in (("train", 40), ("test", 30)):
        arrays = {key: np.arange(n, dtype=np.int16) for key in ("labels", "faces", "groups")}
        images = noise.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        np.savez_compressed(folder / f"typefaces-{part}.npz", images=images, **arrays)
    with pytest.MonkeyPatch.context() as patch:
        use_data(patch, folder)
        for name in SMALL:
            torch.manual_seed(0)
            state = build_demo_model(name).state_dict()
            save_file(state, folder / data_module.demo_file(name))
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in folder.iterdir()]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder


def forget_data() -> None:
    """Let nothing that was read from other files stay in memory."""
    source_module.demo_test.cache_clear()
    data_module.test_faces.cache_clear()


@pytest.fixture(autouse=True)
def leave_nothing_behind() -> Iterator[None]:
    """Other tests read the embedded files."""
    yield
    forget_data()


def use_data(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the embedded files be elsewhere, the networks be small and figures be quick."""
    for name, more in SMALL.items():
        monkeypatch.setitem(DEMO_MODELS, name, {**DEMO_MODELS[name], **more})
    for name in ("history_figure", "top1_figure"):
        monkeypatch.setattr(run_module, name, lambda *_: None)
    monkeypatch.setattr(run_module, "save_figure", lambda _, path: path.touch())
    forget_data()
    monkeypatch.setattr(data_module, "DATA", folder)


@pytest.fixture
def demo_data(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in is in use."""
    use_data(monkeypatch, tiny_data)
    return tiny_data


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished demo."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        use_data(patch, tiny_data)
        assert call(*DEMO, "--threads", 1, "--out", folder) == 0
    return folder


@pytest.fixture
def run_folder(finished: Path, demo_data: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def no_work(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Fail the test if one of these functions of `cli` is called."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work began before an error that could be known")

    for name in names:
        monkeypatch.setattr(cli, name, work)


# Options


BITS = ["1", "9", "0", "-3", "99999999999999999999", "four", "3.5", "4.0", "nan", ""]
NAMES = ["execution", "weight-observer", "act-observer", "fitness", "mutation", "scales"]
NAMES += ["granularity", "order", "algorithm"]
WORDS = ["1.5", "ten", "many", "hot", "wide", "x", "two", "all"]
COUNTS = ["passes", "cycles", "population", "tournament"]
NUMBERS = [(f"--{name}", v, "1") for name in COUNTS for v in ("0", "-2", "1.5", "ten")]
NUMBERS += [("--batch", v, "2") for v in ("1", "0", "-5", "many")]
NUMBERS += [("--temperature", v, "0.001") for v in ("nan", "0", "-1", "inf", "hot")]
NUMBERS += [("--step", v, "0") for v in ("nan", "-1e-3", "-inf", "inf", "wide")]
NUMBERS += [("--seed", v, "0") for v in ("-1", "1.5", "x", str(2**62), str(2**64))]
NUMBERS += [("--threads", v, "1") for v in ("0", "-1", "two", "1.5", str(10**12))]
NUMBERS += [("--calibration-images", v, "2") for v in ("0", "1", "-5", "all")]


@pytest.mark.parametrize("value", BITS)
@pytest.mark.parametrize("flag", ["--weight-bits", "--act-bits", "--attention-bits"])
def test_bits(refused, flag, value):
    """Bits other than 2 to 8 are refused, whatever they are."""
    refused(("demo", f"{flag}={value}"), flag.strip("-").replace("-", "."), "2 to 8")


@pytest.mark.parametrize("name", NAMES)
def test_unknown_names(refused, name):
    """A name that is no choice is answered with the choices."""
    known = next(
        f.metadata["choices"]
        for cls in (QuantConfig, SearchConfig)
        for f in cls.__dataclass_fields__.values()
        if f.name == name.replace("-", "_")
    )
    said = refused(("demo", f"--{name}", "mimax"), name.replace("-", "."), "mimax")
    assert all(choice in said for choice in known)


@pytest.mark.parametrize(("flag", "value", "least"), NUMBERS)
def test_numbers(refused, demo_data, flag, value, least):
    """Numbers out of range, and what is no number, are answered with what is possible."""
    accepted = r"number" if value in WORDS else rf"\b{re.escape(least)}\b|at most"
    refused(("demo", f"{flag}={value}"), flag.strip("-").replace("-", "."), accepted)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "cpu:x", "meta", "mkldnn", "vulkan"])
def test_devices(refused, demo_data, device):
    """A device that torch does not know, or that is not there, is answered with what works."""
    refused(("demo", "--device", device), "--device", "cpu")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--no-weight-symmetric", "--weight-bits", "7"), ["VNNI", "simulate"]),
        (("--weight-bits", "8"), ["VNNI", "simulate"]),
    ],
)
def test_integer_execution_that_cannot_be(refused, demo_data, monkeypatch, more, words):
    """What is missing is named, and nothing is simulated in silence."""
    monkeypatch.setattr(fast, "missing", lambda bits, _: "no VNNI here" if bits == 8 else "")
    refused((*DEMO, "--execution", "integer", *more), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["demo", "run", "check"]),
        (("dmeo",), ["dmeo", "demo"]),
        (("demo", "--weigth-bits", "4"), ["--weigth-bits", "help"]),
        (("demo", "--weight-bits"), ["--weight-bits"]),
        (("run", "--model", "resnet10t", "--test", "x"), ["--calibration"]),
        (("check", "--out", "x"), ["--out", "help"]),
    ],
)
def test_grammar(refused, arguments, words):
    """A mistyped command line gets one sentence too, and not the whole usage."""
    refused(arguments, *words)


@pytest.mark.parametrize("value", [1, 9, 4.0, "4", True, None, float("nan"), [4]])
@pytest.mark.parametrize("name", ["weight_bits", "act_bits"])
def test_bits_in_python(name, value):
    """The same from Python: ValueError names the field."""
    with pytest.raises(ValueError, match=name):
        QuantConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("passes", 0), ("population", -1), ("population", 2.0), ("batch", 1), ("seed", -1)],
        *[("seed", 2**62), ("temperature", float("nan")), ("temperature", 0)],
        *[("step", float("inf")), ("fitness", "mae"), ("fitness", ["mse"])],
        *[("mutation", None), ("algorithm", "adam")],
    ],
)
def test_search_options_in_python(name, value):
    """A search that could not run cannot be configured."""
    with pytest.raises(ValueError, match=name):
        SearchConfig(**{name: value})


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"fitness": "mse", "temperature": 1.0}, "temperature"),
        ({"algorithm": "random", "population": 5}, "population"),
        ({"algorithm": "random", "tournament": 5}, "tournament"),
        ({"algorithm": "random", "mutation": "adaptive"}, "mutation"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options, idle):
    with pytest.raises(ValueError, match=f"{idle} .* has no effect without"):
        SearchConfig(**options)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"bits": 4}', '{"act_bits": 9}', "null", "4"])
def test_config_from_json(text):
    """A config file that is none, or has unknown fields, is a ValueError."""
    with pytest.raises(ValueError, match=r"JSON|act_bits"):
        QuantConfig.from_json(text)


# Networks and checkpoints


@pytest.mark.parametrize("name", ["vti", "", "resnet18", "../vit", "VIT"])
def test_unknown_embedded_network(refused, demo_data, name):
    """The known names are listed."""
    refused(("demo", "--model", name), f"'{name}'", "vit, cnn")


@pytest.mark.parametrize("replace", [True, False])
def test_weights_that_overflow(refused, folders, run_folder, replace):
    """Finite weights with infinite activations are found before a run is begun or removed."""
    state = {name: value.clone() for name, value in load_file(folders["--checkpoint"]).items()}
    state["conv1.0.weight"].mul_(1e38)
    save_file(state, folders["--checkpoint"])
    if not replace:
        shutil.rmtree(run_folder)
    refused(command(folders, *["--replace"] * replace), "NaN or infinite", "checkpoint")


@pytest.mark.parametrize("wanted", ["41", "1000000000"])
def test_too_many_demo_images(refused, demo_data, wanted):
    """The embedded pool has an end."""
    refused(("demo", "--calibration-images", wanted), wanted, r"\b40\b")


# The library


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_images_that_are_not_finite(name, value):
    """One NaN among the calibration images is an error that says where it was met."""
    qmodel, images = quantize(toy(name), QuantConfig()), toy_images(name)
    images[3, 0, 5, 5] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        calibrate(qmodel, images)


def test_no_calibration_images():
    """Zero images are too few."""
    with pytest.raises(ValueError, match="at least one"):
        calibrate(quantize(toy("resnet"), QuantConfig()), torch.zeros(0, 3, 32, 32))


@pytest.mark.parametrize(
    ("images", "targets", "batch"),
    [(12, 11, 100), (11, 12, 4), (12, 0, 100), (1, 1, 100), (12, 12, 1), (12, 12, 0), (12, 12, -3)],
)
def test_objective_of_numbers_that_do_not_match(images, targets, batch):
    """Images and targets are as many, and a batch has at least two."""
    qmodel = quantize(toy("resnet"), QuantConfig())
    calibrate(qmodel, toy_images("resnet"))
    chain, x, y = chain_of(qmodel), toy_images("resnet")[:images], torch.zeros(targets, 10)
    with pytest.raises(ValueError, match=r"targets|at least 2"):
        BlockObjective(chain, chain.searchable[-1], x, y, batch=batch)


# Run folders


def options_of(path: Path) -> dict[str, object]:
    """The config.json of a run."""
    return json.loads((path / "config.json").read_text())


def test_run_folder_that_exists(refused, run_folder, monkeypatch):
    """A run is never overwritten unasked."""
    no_work(monkeypatch, "source_of")
    refused((*DEMO, "--out", run_folder), "out", "--out", "--resume", "--replace")


@pytest.mark.parametrize("more", [(), ("--replace",), ("--resume",)])
@pytest.mark.parametrize("kind", ["file", "below a file", "folder", "foreign config", "link"])
def test_out_that_holds_no_run(refused, demo_data, tmp_path, monkeypatch, kind, more):
    """What is no run is neither removed nor written to, and this is known before any work."""
    no_work(monkeypatch, "source_of")
    out = tmp_path / "mine"
    if "file" in kind:
        out.write_text("precious")
        out = out / "run" if "below" in kind else out
    else:
        out.mkdir()
        (out / "precious.txt").write_text("precious")
    if kind == "foreign config":
        (out / "config.json").write_text('{"architectures": ["ViTForImageClassification"]}')
    if kind == "link":
        (tmp_path / "link").symlink_to(out)
        out = tmp_path / "link"
    refused((*DEMO, "--out", out, *more), re.escape(str(out)), "--out|no run")


def test_replace_keeps_what_it_did_not_write(refused, run_folder):
    """A user's notes in a run folder are not removed with the run."""
    (run_folder / "notes.txt").write_text("precious")
    refused((*DEMO, "--out", run_folder, "--replace"), "notes.txt", "--out")


def test_replace_after_an_error(refused, run_folder, folders):
    """The old run is still there when the new one cannot begin."""
    refused(command({**folders, "--checkpoint": "none.pt"}, "--replace"), "none.pt")


def test_replace(run_folder):
    """A run alone in its folder is replaced."""
    environment = (run_folder / "environment.json").stat().st_mtime_ns
    assert call(*DEMO, "--out", run_folder, "--replace", "--seed", 1) == 0
    assert options_of(run_folder)["search"]["seed"] == 1
    assert (run_folder / "environment.json").stat().st_mtime_ns != environment


def test_resume_and_replace(refused, run_folder, monkeypatch):
    """Both together make no sense."""
    no_work(monkeypatch, "source_of")
    refused(
        (*DEMO, "--out", run_folder, "--resume", "--replace"), "--resume", "--replace", "one of"
    )


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_resume_without_a_run(refused, demo_data, tmp_path, monkeypatch, kind):
    """There is nothing to go on with, which is known before any work."""
    no_work(monkeypatch, "source_of")
    if kind == "empty":
        (tmp_path / "out").mkdir()
    refused((*DEMO, "--out", tmp_path / "out", "--resume"), "no run", "omit --resume")


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (("--seed", 1), ["search.seed"]),
        (("--weight-bits", 4, "--passes", 2), ["quantization.weight_bits", "search.passes"]),
        (("--calibration-images", 21), ["calibration_images"]),
        (("--model", "cnn"), ["model"]),
        (("--sums", "ptf"), None),
        (("--sums", "tensor", "--temperature", "2"), ["quantization.sums", "search.temperature"]),
    ],
)
def test_resume_with_other_options(refused, run_folder, capsys, more, names):
    """Exactly the options that differ are named."""
    if names is None:
        assert call(*DEMO, "--out", run_folder, "--resume", *more) == 0
        return
    said = refused((*DEMO, "--out", run_folder, "--resume", *more), "other options", "same")
    assert re.search(r"\((.*)\)", said)[1].split(", ") == names


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("execution", "elsewhere"),
        ("device", "cuda:0"),
        ("chunk", 3),
        ("threads", 77),
        ("vector_instructions", "MMX"),
        ("torch", "1.0"),
    ],
)
def test_resume_with_other_kernels(refused, run_folder, name, value):
    """A run that began with other kernels would end elsewhere, so it is not gone on with."""
    file = run_folder / "environment.json"
    state = json.loads(file.read_text())
    (state["versions"] if name == "torch" else state)[name] = value
    file.write_text(json.dumps(state))
    refused((*DEMO, "--out", run_folder, "--resume"), f"{name} {value}", "--out|such a machine")
    assert json.loads(file.read_text()) == state  # what the first half was computed with


def test_a_run_alone_does_not_go_on_with_workers_of_another_processor(run_folder):
    """Nor the reverse: who computes is compared, with workers as they say it of themselves."""
    file = run_folder / "environment.json"
    alone = json.loads(file.read_text())
    kind = alone["vector_instructions"]
    workers = [0.5, torch.__version__, kind, alone["execution"], alone["chunk"]]
    folder = RunFolder(run_folder)
    for old, new, differs in (
        ({"threads": 1}, {"workers": workers}, ""),
        ({"threads": 2}, {"workers": workers}, "threads 2, here it is 1; give --threads 2"),
        ({"threads": 1}, {"workers": [*workers[:2], "MMX", *workers[3:]]}, "MMX"),
        ({"workers": workers}, {"workers": None, "threads": 1}, ""),
        ({"workers": workers}, {"workers": None, "threads": 3}, "threads 1, here it is 3"),
        ({"workers": workers}, {"workers": [0.25, *workers[1:]]}, "workers"),
    ):
        file.write_text(json.dumps({**alone, "workers": None, **old}))
        if differs:
            with pytest.raises(ValueError, match=differs):
                folder.enter({**alone, **new})
        else:
            folder.enter({**alone, **new})


def test_a_run_killed_while_its_config_was_written_can_be_begun_again(demo_data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".config.json.new").write_text("{")
    RunFolder.claim(tmp_path / "out", resume=False, replace=False)
    RunFolder.create(tmp_path / "out", {}).close()


def test_resume_with_other_files(refused, run_folder):
    """Other images or weights under the same names would be searched on with the old fitness."""
    file = run_folder / "environment.json"
    state = json.loads(file.read_text())
    state["sha256"]["typefaces-train.npz"] = "0" * 64
    file.write_text(json.dumps(state))
    refused((*DEMO, "--out", run_folder, "--resume"), "typefaces-train.npz", "put them back")


def test_workers_compute_on_processors(refused, tmp_path):
    options = ("--out", tmp_path / "out", "--workers", 2, "--device", "cuda")
    refused((*DEMO, *options), "workers compute on processors, not on cuda")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("REAL", "--quick"), "nothing of REAL is quick"),
        (("C1", "--report"), "--report is about all results"),
    ],
)
def test_reproduce_refuses_what_it_would_ignore(refused, tmp_path, more, said):
    refused(("reproduce", *more, "--out", tmp_path / "out"), said)


def test_scales_that_are_not_positive(tmp_path):
    qmodel = quantize(toy("vit"), QuantConfig())
    calibrate(qmodel, toy_images("vit"))
    point = next(iter(convert.quantizers(qmodel).values()))
    point.scale = -point.scale
    save_scales(tmp_path / "scales.safetensors", qmodel)
    with pytest.raises(ValueError, match="not positive"):
        load_scales(tmp_path / "scales.safetensors", qmodel)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbled(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00garbled}\n" * 3)


def worded(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


DAMAGED = [
    *[("config.json", d) for d in (cut, garbled, worded(""), worded("[]"), worded("null"))],
    *[("environment.json", d) for d in (cut, garbled, worded(""), worded("[]"), worded("{}"))],
]


@pytest.mark.parametrize("n", range(len(DAMAGED)))
def test_resume_of_a_damaged_run(refused, run_folder, n):
    """The damaged file is named and left as it is."""
    name, damage = DAMAGED[n]
    damage(run_folder / name)
    refused((*DEMO, "--out", run_folder, "--resume"), re.escape(name), "--out|start over")


@pytest.mark.parametrize("damage", [garbled, worded("x}\n"), worded("{}\n"), worded(""), cut])
def test_resume_with_a_damaged_history(run_folder, finished, caplog, damage):
    """What is behind the last whole line is computed again, and the run ends as it would have."""
    damage(run_folder / "history.jsonl")
    assert_resumes(run_folder, finished)


@pytest.mark.parametrize("name", ["history.jsonl", "scales.safetensors"])
def test_resume_without_a_file(run_folder, finished, name):
    (run_folder / name).unlink()
    assert_resumes(run_folder, finished)


# Embedded files


EMBEDDED = ["typefaces-train.npz", "typefaces-vit.safetensors", "SHA256SUMS"]


@pytest.mark.parametrize("command", ["demo", "check"])
@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.parametrize("damage", [cut, garbled, Path.unlink, worded("")])
def test_damaged_data(tiny_data, tmp_path, monkeypatch, capsys, command, name, damage):
    """A file that is missing or altered is named, with the way to restore it."""
    folder = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    use_data(monkeypatch, folder)
    damage(folder / name)
    assert call(command, *(("--out", tmp_path / "out") if command == "demo" else ())) == 2
    out, error = capsys.readouterr()
    said = out if command == "check" else sentence(error)
    assert "git checkout -- data" in said
    assert name in said
    assert not (tmp_path / "out").exists()


def test_damaged_test_part(refused, tiny_data, tmp_path, monkeypatch):
    """The test part is checked before the search, not after it."""
    folder = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    use_data(monkeypatch, folder)
    cut(folder / "typefaces-test.npz")
    refused((*DEMO, "--out", tmp_path / "out"), "typefaces-test.npz", "git checkout -- data")


def test_damaged_data_in_python(tiny_data, tmp_path, monkeypatch):
    """`load_demo` raises ValueError."""
    use_data(monkeypatch, Path(shutil.copytree(tiny_data, tmp_path / "data")))
    cut(tmp_path / "data" / "typefaces-train.npz")
    with pytest.raises(ValueError, match=r"typefaces-train\.npz is damaged"):
        load_demo("vit", 20)


# Disks and interruptions


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_from(monkeypatch: pytest.MonkeyPatch, write: int, error: BaseException) -> None:
    """Let the n-th file that is written whole, and all after it, fail."""
    real, count = os.fsync, iter(range(1, 10**6))

    def fsync(file: int) -> None:
        if next(count) >= write:
            raise error
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)


def test_write_whole_on_a_full_disk(tmp_path, monkeypatch):
    """The old file stays, and no temporary one."""
    path = tmp_path / "file"
    write_whole(path, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert tree(tmp_path) == {"file": b"old"}


def test_full_disk_at_the_start(refused, demo_data, tmp_path, monkeypatch):
    """Not even the folder stays, so that the same command can be given again."""
    monkeypatch.setattr(os, "fsync", full)
    refused((*DEMO, "--out", tmp_path / "out"), "No space", "free some space")


@pytest.mark.faults
@pytest.mark.parametrize("write", range(2, 10))
def test_full_disk_on_the_way(demo_data, finished, tmp_path, monkeypatch, capsys, write):
    """Wherever the disk is full, space and --resume bring the run to the same end."""
    with monkeypatch.context() as patch:
        fail_from(patch, write, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        assert call(*DEMO, "--out", tmp_path / "out") == 2
    said = sentence(capsys.readouterr().err)
    assert "No space" in said
    assert "free some space" in said
    assert "--resume" in said
    assert_resumes(tmp_path / "out", finished)


def assert_resumes(out: Path, finished: Path) -> None:
    """Go on, and compare with a run that was never stopped."""
    assert call(*DEMO, "--out", out, "--resume") == 0
    scales = [load_file(p / "scales.safetensors") for p in (out, finished)]
    assert all(torch.equal(scales[0][name], value) for name, value in scales[1].items())
    histories = [
        [replace(event, seconds=0.0) for event in RunFolder(p).history()] for p in (out, finished)
    ]
    assert histories[0] == histories[1]
    summaries = [json.loads((p / "summary.json").read_text()) for p in (out, finished)]
    same = {"search_seconds": 0, "peak_memory_mib": 0}
    assert summaries[0] | same == summaries[1] | same


@pytest.mark.parametrize("after", [0, 2])
def test_full_disk_in_the_history(demo_data, finished, tmp_path, monkeypatch, capsys, after):
    """A line that was cut off is written again."""
    real, count = RunFolder.append, iter(range(100))

    def append(self, evaluation):
        if next(count) == after:
            with open(self.path / "history.jsonl", "a") as file:
                file.write('{"visit": 1, "pa')
            full()
        real(self, evaluation)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", append)
        assert call(*DEMO, "--out", tmp_path / "out") == 2
    assert "free some space" in sentence(capsys.readouterr().err)
    assert_resumes(tmp_path / "out", finished)


@pytest.mark.parametrize("write", [2, 4, 5, 6])
def test_interrupt_and_resume(demo_data, finished, tmp_path, monkeypatch, capsys, write):
    """Ctrl-C says how to go on, and a run that goes on ends like one that was never stopped."""
    with monkeypatch.context() as patch:
        fail_from(patch, write, KeyboardInterrupt())
        assert call(*DEMO, "--out", tmp_path / "out") == 130
    said = capsys.readouterr().err
    assert "--resume" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert_resumes(tmp_path / "out", finished)


def test_interrupt_before_the_run(demo_data, tmp_path, monkeypatch, capsys):
    """Where no run was begun, --resume is not what is advised."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "source_of", stop)
    assert call(*DEMO, "--out", tmp_path / "out") == 130
    said = capsys.readouterr().err
    assert "stopped" in said
    assert "--resume" not in said
    assert not (tmp_path / "out").exists()


def test_figure_on_a_full_disk(tmp_path, monkeypatch):
    """A figure is written whole or not at all."""
    path = tmp_path / "top1.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_figure(new_figure(1, 1, "empty"), path)
    assert tree(tmp_path) == {"top1.png": b"old"}


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_read_only_disk(refused, demo_data, tmp_path, monkeypatch, code):
    """A place that cannot be written to is named, and another --out is asked for."""

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    out = tmp_path / "out"
    refused((*DEMO, "--out", out), os.strerror(code), re.escape(str(out)), "--out")


def test_out_with_a_long_name(refused, demo_data, monkeypatch):
    """A name that the file system does not take is an answer like the others."""
    no_work(monkeypatch, "source_of")
    refused((*DEMO, "--out", "x" * 300), "File name too long", "--out")
