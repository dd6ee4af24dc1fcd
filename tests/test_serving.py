"""What the browser tests stand on: the browser is found or left out, servers start and end."""

import re
import time
from pathlib import Path
from types import SimpleNamespace

import conftest
import psutil  # needed by ipykernel
import pytest
import serving

ROOT = Path(__file__).resolve().parents[1]


def test_the_browser_is_the_named_one_or_the_first_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    assert serving.find_chromium() is None
    for name in ("google-chrome", "chromium", "mine"):
        (tmp_path / name).touch(mode=0o755)
    assert serving.find_chromium() == str(tmp_path / "chromium")
    monkeypatch.setenv("CHROMIUM", str(tmp_path / "mine"))
    assert serving.find_chromium() == str(tmp_path / "mine")
    monkeypatch.setenv("CHROMIUM", str(tmp_path / "another"))
    assert serving.find_chromium() is None


class Config(SimpleNamespace):
    """What the hooks of conftest.py need of pytest's config."""

    def __init__(self, markers: str = "") -> None:
        self.left_out: list[object] = []
        super().__init__(
            stash=pytest.Stash(),
            getoption=lambda name: markers,
            hook=SimpleNamespace(pytest_deselected=lambda *, items: self.left_out.extend(items)),
        )


def collect(config, *markers):
    """Which of some tests with one marker each are run, and what is said at the end."""
    items = [item_of("test_any", mark) for mark in markers]
    conftest.pytest_collection_modifyitems(config, items)
    return items, told_at_the_end(config)


def item_of(file, mark=""):
    """What the hooks need of a test."""
    return SimpleNamespace(
        path=Path(f"{file}.py"), get_closest_marker=lambda name: mark if mark == name else None
    )


def told_at_the_end(config):
    lines = []
    terminal = SimpleNamespace(config=config, stats={}, write_line=lines.append)
    conftest.pytest_terminal_summary(terminal)
    return lines


@pytest.mark.parametrize("expected", [False, True])
def test_without_a_browser_one_line_says_so_and_ci_fails(monkeypatch, tmp_path, expected):
    monkeypatch.setenv("CHROMIUM", str(tmp_path / "no-such-browser"))
    monkeypatch.setenv("CI_BROWSER", "1" if expected else "")
    config = Config()
    items, lines = collect(config, "browser", "slow", "browser")
    if expected:
        assert len(items) == 3 and not config.left_out and not lines
        with pytest.raises(RuntimeError, match="no Chromium: apt-get"), serving.chromium():
            pass
    else:
        assert len(items) == 1 and len(config.left_out) == 2
        assert lines == [f"2 browser tests were left out: {serving.NO_CHROMIUM}"]


@pytest.mark.parametrize(("wanted", "markers", "run"), [("", "", 1), ("1", "", 3), ("", "long", 3)])
def test_long_tests_run_where_they_are_asked_for(monkeypatch, wanted, markers, run):
    monkeypatch.setenv("ALL_TESTS", wanted)
    items, lines = collect(Config(markers), "long", "slow", "long")
    assert len(items) == run
    told = ["2 long tests were left out; ALL_TESTS=1 runs them."]
    assert lines == (told if run == 1 else [])


def test_what_processes_left_out_is_told_by_the_one_that_started_them(monkeypatch):
    monkeypatch.setenv("ALL_TESTS", "")
    started, here = Config(), Config()
    started.workeroutput = {}
    collect(started, "long", "slow", "long")
    node = SimpleNamespace(config=here, workeroutput=started.workeroutput)
    assert told_at_the_end(here) == []
    conftest.pytest_testnodedown(node, None)
    assert told_at_the_end(here) == ["2 long tests were left out; ALL_TESTS=1 runs them."]


def test_files_that_take_minutes_come_first():
    """All of them are there, and the others stay in order."""
    assert all((ROOT / "tests" / f"{name}.py").is_file() for name in conftest.LONG_FILES)
    items = [item_of(name) for name in ("test_bits", "test_workers", "test_cli", "test_export")]
    conftest.pytest_collection_modifyitems(Config(), items)
    order = [item.path.stem for item in items]
    assert order == ["test_workers", "test_export", "test_bits", "test_cli"]


def test_ci_runs_every_test():
    """On the machine that merges, and on GitHub's."""
    assert "export CI_BROWSER=1 ALL_TESTS=1" in (ROOT / ".ci" / "run").read_text()
    assert re.search(
        r"^    env:\n(?:      .*\n)*?      ALL_TESTS: 1\b",
        (ROOT / ".github" / "workflows" / "test.yml").read_text(),
        re.MULTILINE,
    )


def test_a_server_that_ends_at_once_is_reported_with_its_log(tmp_path):
    began = time.monotonic()
    with (
        pytest.raises(RuntimeError, match="No module named no_such_server"),
        serving.server(["no_such_server"], tmp_path, "http://127.0.0.1:9/"),
    ):
        pass
    assert time.monotonic() - began < 60


def test_a_server_ends_with_its_block_and_so_do_its_children(tmp_path):
    before = set(psutil.Process().children(recursive=True))
    # Stands for a kernel: a process of its own session, which does not end with its parent.
    (tmp_path / "stubborn.py").write_text(
        "import http.server, subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True)\n"
        "handler = http.server.SimpleHTTPRequestHandler\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), handler).serve_forever()\n"
    )
    port = serving.free_port()
    began = set()
    with (
        pytest.raises(ZeroDivisionError),
        serving.server(["stubborn", str(port)], tmp_path, f"http://127.0.0.1:{port}/"),
    ):
        began = set(psutil.Process().children(recursive=True)) - before
        1 / 0  # noqa: B018
    assert len(began) == 2 and not any(process.is_running() for process in began)


def test_a_notebook_is_written_with_its_cells(tmp_path):
    path = serving.notebook_of(tmp_path / "one.ipynb", "1 + 1", "print(2)")
    assert path.read_text().count('"cell_type": "code"') == 2
