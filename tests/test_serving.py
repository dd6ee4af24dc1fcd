"""What the browser tests stand on: the browser is found or left out, servers start and end."""

import time
from types import SimpleNamespace

import conftest
import psutil  # needed by ipykernel
import pytest
import serving


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


@pytest.mark.parametrize("expected", [False, True])
def test_without_a_browser_one_line_says_so_and_ci_fails(monkeypatch, tmp_path, expected):
    monkeypatch.setenv("CHROMIUM", str(tmp_path / "no-such-browser"))
    monkeypatch.setenv("CI_BROWSER", "1" if expected else "")
    left_out, lines = [], []
    items = [
        SimpleNamespace(get_closest_marker=lambda name, mark=mark: mark if mark == name else None)
        for mark in ("browser", "slow", "browser")
    ]
    config = SimpleNamespace(
        stash=pytest.Stash(),
        hook=SimpleNamespace(pytest_deselected=lambda *, items: left_out.extend(items)),
    )
    conftest.pytest_collection_modifyitems(config, items)
    conftest.pytest_terminal_summary(
        SimpleNamespace(config=config, stats={}, write_line=lines.append)
    )
    if expected:
        assert len(items) == 3 and not left_out and not lines
        with pytest.raises(RuntimeError, match="no Chromium: apt-get"), serving.chromium():
            pass
    else:
        assert len(items) == 1 and len(left_out) == 2
        assert lines == [f"2 browser tests were left out: {serving.NO_CHROMIUM}"]


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
