"""Shared fixtures; shapes and types of the package's signatures are checked while the tests run."""

import time
from collections.abc import Callable, Iterator
from importlib import import_module

from jaxtyping import install_import_hook

CHECKED = ["numerics", "fitness", "observers", "genome", "objective", "search", "evaluate"]
with install_import_hook([f"evolq_lite.{name}" for name in CHECKED], "beartype.beartype"):
    for module in CHECKED:
        import_module(f"evolq_lite.{module}")

import os
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from commands import call, make_photos, sentence, small_network, tree
from safetensors.torch import save_file
from serving import NO_CHROMIUM, find_chromium
from torch import Tensor, nn

from evolq_lite import gptq
from evolq_lite.networks import unfused
from evolq_lite.panels import Panel
from evolq_lite.runs import source

# Four stages of one block each, 16 to 40 channels wide, in groups of 8.
SMALL_REGNET = {"w0": 16, "wa": 8.0, "wm": 1.4, "depth": 4, "group_size": 8, "stem_width": 8}
SMALL_LEVIT = {
    "img_size": 64,
    "embed_dim": (32, 48, 64),
    "num_heads": (2, 3, 4),
    "depth": (1, 1, 1),
}
TOYS = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    ),
    "deit": (
        "deit_tiny_distilled_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3)},
    ),
    "levit": ("levit_128s", SMALL_LEVIT),
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}),
    "bottleneck": ("resnet50", {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}),
    "regnetx": ("regnetx_002", SMALL_REGNET),
    "regnety": ("regnety_002", SMALL_REGNET),
}


def enliven(model: nn.Module) -> nn.Module:
    """Give a new network nontrivial BatchNorm statistics, and weights that 8 bits can hold.

    timm starts some parameters so small that they would vanish beside the others.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    for name, parameter in model.named_parameters():
        if name in ("cls_token", "dist_token", "pos_embed"):
            nn.init.normal_(parameter, std=0.5)
        elif name.endswith("weight") and parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
    return model


def toy(name: str, seed: int = 0) -> nn.Module:
    """A small random network of a supported family, with nontrivial BatchNorm statistics."""
    torch.manual_seed(seed)
    architecture, options = TOYS[name]
    if name == "deit":
        options = {**options, "num_heads": 3}
    model = unfused(
        timm.create_model(architecture, pretrained=False, num_classes=10, **options)
    ).eval()
    return enliven(model)


def toy_images(name: str, n: int = 12) -> Tensor:
    """Random images of the size that a toy network takes."""
    size = TOYS[name][1].get("img_size", 32)
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def slowness() -> float:
    """Seconds of the clock for a second of this processor: a busy machine is no panel's fault."""
    began, used = time.perf_counter(), time.process_time()
    while time.process_time() - used < 0.2:
        pass
    return (time.perf_counter() - began) / 0.2


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until something is true that another thread does; long, for a busy machine."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not true after {seconds} s"
        time.sleep(0.002)


@pytest.fixture(params=list(TOYS))
def family(request: pytest.FixtureRequest) -> str:
    """The name of each supported family in turn."""
    return request.param


# One, where another process tests beside this one.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2


@pytest.fixture(autouse=True)
def same_threads() -> None:
    """The same number of threads in every test; fixtures of a module come before it."""
    torch.set_num_threads(THREADS)


def pytest_sessionstart() -> None:
    """The same number of threads from the beginning."""
    torch.set_num_threads(THREADS)


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call the command line, which must say why and how to go on, and change no file."""

    def check(arguments: tuple[object, ...], *words: str) -> str:
        before = tree(tmp_path)
        capsys.readouterr()
        status, said = call(*arguments), sentence(capsys.readouterr().err)
        assert status == 2
        assert tree(tmp_path) == before
        for word in words:
            assert re.search(word, said), (word, said)
        return said

    return check


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Options of a good `run`: 3 classes of 2 images, and a checkpoint of a small network."""
    photos = make_photos(tmp_path / "photos")
    real = timm.create_model

    def create(name: str, **options: object) -> nn.Module:
        return small_network(**options) if name == "resnet10t" else real(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    save_file(small_network().state_dict(), tmp_path / "net.safetensors")
    return {
        "--model": "resnet10t",
        "--checkpoint": tmp_path / "net.safetensors",
        "--calibration": photos,
        "--test": photos,
        "--out": tmp_path / "out",
    }


@pytest.fixture
def few_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQ with every fourth scale of a row: several times as quick, for tests of what follows."""
    monkeypatch.setattr(gptq, "FACTORS", gptq.FACTORS[::4])


@pytest.fixture
def few_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on the embedded CNN read 620 test images, where the numbers do not matter."""
    images, labels = source.demo_test("cnn")
    faces = source.test_faces()
    monkeypatch.setattr(source, "demo_test", lambda network: (images[:620], labels[:620]))
    monkeypatch.setattr(source, "test_faces", lambda: faces[:620])


@pytest.fixture
def no_silent_callbacks(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail where an exception in a widget's callback or a timer was only logged."""
    yield
    heard = [r for r in caplog.get_records("call") if "Exception in callback" in r.getMessage()]
    assert not heard, heard[0].getMessage()


@pytest.fixture
def panels_are_closed() -> Iterator[None]:
    """No panel that a test opened stays open, and none of their threads."""
    yield
    for panel in list(Panel.alive):
        panel.close()
        panel.worker.pool.shutdown(wait=True)


LONG_FILES = ["test_browser", "test_lessons", "test_site", "test_workers", "test_experiments"]
LONG_FILES += ["test_grading", "test_assignments", "test_export", "test_rounding"]
LEFT_OUT = pytest.StashKey[dict[str, int]]()  # by marker


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out browser tests where there is no browser, except where one is expected.

    So are long tests, except where all are wanted. Files that take minutes come first: where
    several processes share the tests, none is left with one of them at the end.
    """
    items.sort(key=lambda item: item.path.stem not in LONG_FILES)
    if find_chromium() is None and not os.environ.get("CI_BROWSER"):
        leave_out("browser", config, items)
    if not os.environ.get("ALL_TESTS") and "long" not in config.getoption("markexpr"):
        leave_out("long", config, items)


def leave_out(marker: str, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take the tests with a marker away, and remember how many they were."""
    out = [item for item in items if item.get_closest_marker(marker)]
    items[:] = [item for item in items if not item.get_closest_marker(marker)]
    config.hook.pytest_deselected(items=out)
    config.stash.setdefault(LEFT_OUT, {})[marker] = len(out)
    if hasattr(config, "workeroutput"):  # one of several processes, each of which counts the same
        config.workeroutput["left out"] = config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Learn from a process that tests (pytest-xdist) what was left out."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left out", {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out, and how long the lessons ran."""
    left_out = terminalreporter.config.stash.get(LEFT_OUT, {})
    if count := left_out.get("browser"):
        terminalreporter.write_line(f"{count} browser tests were left out: {NO_CHROMIUM}")
    if count := left_out.get("long"):
        terminalreporter.write_line(f"{count} long tests were left out; ALL_TESTS=1 runs them.")
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    told = [words for r in reports for name, words in r.user_properties if name == "lesson"]
    if told:
        terminalreporter.write_line(f"Lessons ran in: {'; '.join(sorted(told))}.")
