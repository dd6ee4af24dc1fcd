"""Whatever there is to print to, or is not: no result is lost, and the exit status tells."""

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import call, command

from evolq_lite import terminal
from evolq_lite.terminal import progress, run, say

ROOT = Path(__file__).resolve().parents[1]
TEXT = "naïve café 写真 ± 🙂 \udcff"


class Broken(io.StringIO):
    """A stream that fails from its n-th writing on."""

    encoding = "utf-8"

    def __init__(self, code: int, after: int = 0) -> None:
        super().__init__()
        self.code, self.left, self.calls = code, after, 0

    def write(self, text: str) -> int:
        self.calls += 1
        if self.left <= 0:
            raise OSError(self.code, os.strerror(self.code))
        self.left -= 1
        return super().write(text)


class Held(Broken):
    """One that fails when it is flushed, as files do."""

    def write(self, text: str) -> int:
        return io.StringIO.write(self, text)

    def flush(self) -> None:
        raise OSError(self.code, os.strerror(self.code))


def narrow(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")


def shown(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437", "utf-8", "utf-16"])
def test_what_cannot_be_shown_is_replaced(monkeypatch, encoding, error):
    """Names of files hold anything, bytes that are no text too."""
    stream = narrow(encoding)
    monkeypatch.setattr(sys, "stderr" if error else "stdout", stream)
    say(TEXT, error=error)
    text = shown(stream)
    assert text.startswith("na") and text.endswith("?\n") and len(text) == len(TEXT) + 1
    assert ("写真" in text) == encoding.startswith("utf")


@pytest.mark.parametrize("kind", [Broken, Held])
@pytest.mark.parametrize(
    ("code", "status"), [(errno.EPIPE, 0), (errno.ENOSPC, 2), (errno.EIO, 2), (errno.EDQUOT, 2)]
)
def test_a_stream_that_fails(monkeypatch, code, status, kind):
    """The command goes on to its end; a reader who went away lost nothing, others are told."""
    out, err, done = kind(code), io.StringIO(), []
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def work() -> int:
        for _ in range(3):
            say("a line")
            print("another, by print", flush=True)
        done.append(True)
        return 0

    assert run(work) == status
    assert done
    assert out.calls <= 1
    told = [line for line in err.getvalue().splitlines() if line]
    assert len(told) == (status != 0)
    assert all(os.strerror(code) in line and line.startswith("evolq_lite: ") for line in told)
    assert sys.stdout is out and sys.stderr is err


def test_the_status_of_a_failure_stays(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(errno.ENOSPC))
    assert run(lambda: say("x") or 130) == 130


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_is_closed_or_not_there(monkeypatch, name):
    for stream in (None, io.StringIO()):
        if stream is not None:
            stream.close()
        monkeypatch.setattr(sys, name, stream)

        def work() -> int:
            say(TEXT, error=name == "stderr")
            print(TEXT, file=getattr(sys, name))
            with progress(3, "work", "step") as bar:
                bar.update(3)
                bar.set_postfix(block="x", refresh=True)
            return 0

        assert run(work) == 0


@pytest.mark.parametrize(
    "stream", [None, Broken(errno.EPIPE), Broken(errno.EIO, 1), Held(errno.ENOSPC), narrow("ascii")]
)
def test_progress_bars_need_no_standard_error(monkeypatch, stream):
    """A terminal that was closed in the middle of a long run does not stop the run."""
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(100, "Füße 写真", "image") as bar:
        bar.mininterval = 0
        for _ in range(100):
            bar.update()
            bar.refresh()
    assert bar.n == 100


def test_a_bar_is_seen_where_it_can_be(monkeypatch):
    stream = narrow("utf-8")
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(4, "search", "evaluation", initial=1, delay=0) as bar:
        bar.update(3)
    assert "search: 100%" in shown(stream) and "4/4" in shown(stream)


def test_a_command_may_end_by_exit(capsys):
    assert run(sys.exit) == 0
    assert run(lambda: sys.exit(3)) == 3
    assert run(lambda: sys.exit("a reason")) == 1
    assert capsys.readouterr().err == "a reason\n"


@pytest.mark.parametrize(
    ("out", "err", "status"),
    [
        (Broken(errno.ENOSPC), io.StringIO(), 2),
        (Broken(errno.EPIPE, 2), Broken(errno.EPIPE, 2), 0),
        (None, None, 0),
        (narrow("ascii"), narrow("ascii"), 0),
    ],
)
def test_no_output_costs_a_summary(folders, monkeypatch, out, err, status):
    """Full disk, closed pipe, no streams, ASCII: the whole run, and its results."""
    torch.set_num_threads(1)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        assert run(lambda: call(*command(folders))) == status
    for name in ("summary.json", "scales.safetensors", "history.jsonl"):
        assert (folders["--out"] / name).is_file()


# As a shell starts it

ALONE = (  # the module without the package, which takes seconds to import
    "import importlib.util as u, os, sys; s = u.spec_from_file_location('t', sys.argv[1]);"
    "t = u.module_from_spec(s); s.loader.exec_module(t);"
)


def shell(line: str, code: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a line of bash in which $P is Python, with code that uses the module as `t`."""
    start = [sys.executable, "-c", ALONE + code, terminal.__file__]
    env = {**os.environ, "P": sys.executable, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", line, *start], capture_output=True, text=True, env=env, check=False
    )


LINES = "sys.exit(t.run(lambda: [print(i) for i in range(99999)] and 0))"
FILE = (
    "sys.exit(t.run(lambda: open('f', 'w').write('history') and"
    " (os.write(2, b'spoilt'), t.say('x', error=True), 0)[-1]))"
)


FULL = Path("/dev/full").exists()  # on Linux


@pytest.mark.parametrize(
    ("line", "code", "status", "out", "err"),
    [
        ('"$0" "$@" | head -1; exit ${PIPESTATUS[0]}', LINES, 0, "0\n", ""),
        *[('"$0" "$@" > /dev/full', LINES, 2, "", "evolq_lite: .*No space left")] * FULL,
        *[('"$0" "$@" > /dev/full 2>&1', LINES, 2, "", "")] * FULL,
        ('"$0" "$@" >&-', LINES, 0, "", ""),
        ('"$0" "$@" >&- 2>&- <&-', LINES, 0, "", ""),
        ('PYTHONIOENCODING=ascii "$0" "$@"', "sys.exit(t.run(lambda: print('é')))", 0, r"\?\n", ""),
        ('cd "$(mktemp -d)"; "$0" "$@" 2>&-; echo $? $(cat f)', FILE, 0, "0 history\n", ""),
    ],
)
def test_shell(line, code, status, out, err):
    """No traceback, nothing left in a buffer, and no file under the number of a closed stream."""
    done = shell(line, code)
    assert done.returncode == status
    assert re.fullmatch(out, done.stdout) and re.match(err, done.stderr), (done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == (err != "")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("$P -m evolq_lite check | head -1; exit ${PIPESTATUS[0]}", 0),
        *[("$P -m evolq_lite --help > /dev/full 2>&-", 2)] * FULL,
        ("PYTHONIOENCODING=ascii $P -m evolq_lite convert 写真.pth é.safetensors 2>&1", 2),
    ],
)
def test_command_line(line, status):
    """`python -m evolq_lite` and what argparse prints are covered too."""
    done = shell(line)
    assert done.returncode == status and done.stderr == ""
    assert "Traceback" not in done.stdout
