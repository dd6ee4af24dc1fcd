"""What a command prints, on whatever there is to print to.

A terminal may know ASCII only, a pipe may be closed (`| head -1`), a disk full (`> /dev/full`), and
a process may have no standard streams at all (`2>&-`, a service, a window without a console). None
of that is worth a result: what cannot be shown is replaced, and after a stream has failed once,
nothing more is sent to it. The exit status says at last whether output was lost.

A closed standard stream has one more trap. The next file that a process opens takes its number, so
what a library prints to "standard error" would be written into that file; `run` fills the gaps.
"""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

LOST = 2  # the exit status where output could not be written


class Safe:
    """A stream that replaces what its encoding lacks and falls silent when it fails."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:  # isatty, encoding, fileno, ...
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write; returns the number of characters, be they shown or not."""
        if self.stream is not None and self.failure is None:
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            shown = text.encode(encoding, errors="replace").decode(encoding, errors="replace")
            self._try(self.stream.write, shown)
        return len(text)

    def flush(self) -> None:
        """Flush, unless the stream has failed."""
        if self.stream is not None and self.failure is None:
            self._try(self.stream.flush)

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            self.failure = error
            self._empty()
        except ValueError:  # closed by someone else
            self.failure = OSError(errno.EPIPE, os.strerror(errno.EPIPE))

    def _empty(self) -> None:
        """Let Python flush what it still holds, at exit, to nowhere."""
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
        except (OSError, ValueError):  # not a file of the system
            return


def say(text: object = "", error: bool = False) -> None:
    """Print a line, or several, to the standard output, or to the standard error."""
    stream = _safe(sys.stderr if error else sys.stdout)
    stream.write(f"{text}\n")
    stream.flush()


def progress(
    total: int | None, what: str, unit: str, initial: int = 0, delay: float = 0.5
) -> "tqdm[Any]":
    """A progress bar on the standard error, as a context; unseen where there is none.

    What is done within `delay` seconds shows no bar.
    """
    stream = _safe(sys.stderr)
    return tqdm(total=total, desc=what, unit=unit, initial=initial, file=stream, delay=delay)


def run(command: Callable[[], int]) -> int:
    """Run a command with safe standard streams, for `print` too; returns the exit status.

    A reader who wanted no more (a closed pipe) lost nothing. Other failures of the output are said,
    if they can be, and make a success a failure.
    """
    before = sys.stdout, sys.stderr
    _fill_gaps()
    out, err = _safe(sys.stdout), _safe(sys.stderr)
    sys.stdout, sys.stderr = out, err
    try:
        status = command()
    except SystemExit as stop:  # argparse's --help; a text is a failure that Python would print
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            say(stop.code, error=True)
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
    if out.failure is None or out.failure.errno == errno.EPIPE:
        return status
    say(f"evolq_lite: the output could not be written ({out.failure.strerror})", error=True)
    return status or LOST


def _safe(stream: Any) -> Safe:
    return stream if isinstance(stream, Safe) else Safe(stream)


def _fill_gaps() -> None:
    """Open nothing under the numbers of standard streams that are closed."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
