"""Run cells one after another in a fresh kernel, within limits of time and memory.

A cell that runs too long is interrupted, and the next one goes on. A kernel that takes too much
memory, that dies, or that ignores the interrupt is replaced by a new one, in which all cells but
the tests and the culprit run again: so one bad cell costs its own marks and no others.

This is no sandbox. The cells run with the rights of whoever grades; INSTRUCTORS.md says what to do.
"""

from __future__ import annotations

import os
import queue
import re
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

import psutil
from jupyter_client.manager import KernelManager

START_SECONDS = 120  # for a kernel to come up
GRACE_SECONDS = 5  # to obey an interrupt
SHARE = 4  # a cell may take a quarter of the notebook's time
RESTARTS = 3
# Sums are then the same however many notebooks run at a time.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
TEXT = 4000  # characters that are kept of what a cell prints

# Memory: RLIMIT_DATA, where the system has it, makes an allocation fail, which stops one cell; the
# watch on the resident size in `Kernel.run` stops the rest. Numbers: the same random ones for every
# cell, whatever ran before. `exit()` would stop the kernel some time later, in another cell.
PROLOGUE = """
def _prologue():
    import random, sys
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))
    except (ImportError, OSError, ValueError):
        pass
    def seed(*_):
        random.seed(0)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        if "torch" in sys.modules:
            sys.modules["torch"].manual_seed(0)
    get_ipython().events.register("pre_run_cell", seed)
    get_ipython().ask_exit = lambda: None
_prologue(); del _prologue
"""
NO_MEMORY = re.compile(
    r"MemoryError|can't allocate memory|not enough memory|Cannot allocate memory"
)


@dataclass(frozen=True)
class Limits:
    """For one notebook: seconds in all, megabytes for its kernel and the kernel's children."""

    seconds: float = 900.0
    megabytes: int = 4096


@dataclass(frozen=True)
class Cell:
    """Code to run; `test` cells are not repeated when a kernel must be replaced."""

    code: str
    test: bool = False


@dataclass(frozen=True)
class Ran:
    """How a cell ended: "ok", "error", "time", "memory", "died" or "not run".

    `error` is the exception as "Kind: message", or why the cell was not run; `text` is the end of
    what was printed, `value` the last expression as text.
    """

    how: str
    error: str = ""
    text: str = ""
    value: str = ""


class Kernel:
    """One kernel process, in an empty folder of its own."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        env = (
            os.environ
            | ONE_THREAD
            | {"PYTHONHASHSEED": "0", "IPYTHONDIR": self.folder.name, "PYTHONWARNINGS": "ignore"}
        )
        place = {} if os.name == "nt" else {"transport": "ipc", "ip": f"{self.folder.name}/socket"}
        self.manager = KernelManager(kernel_name="python3", **place)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.manager.start_kernel(env=env, cwd=self.folder.name, **quiet)
        self.pid: int = self.manager.provisioner.pid  # type: ignore[union-attr]
        self.client = self.manager.client()
        self.client.start_channels()
        self.usable = True
        try:
            self.client.wait_for_ready(timeout=START_SECONDS)
        except RuntimeError:
            self.close()
            raise
        self.run(PROLOGUE.format(limit=limits.megabytes * 2**20), START_SECONDS)

    def close(self) -> None:
        """Kill the kernel, its children and its folder."""
        children = self.processes()
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        for process in children:
            with suppress(psutil.Error):
                process.kill()
        self.folder.cleanup()

    def processes(self) -> list[psutil.Process]:
        """The kernel and all that it has started."""
        try:
            kernel = psutil.Process(self.pid)
            return [kernel, *kernel.children(recursive=True)]
        except psutil.Error:
            return []

    def megabytes(self) -> float:
        """Resident memory of the kernel and its children."""
        size = 0
        for process in self.processes():
            with suppress(psutil.Error):
                size += process.memory_info().rss
        return size / 2**20

    def run(self, code: str, seconds: float) -> Ran:
        """Run one cell; afterwards `usable` says whether the kernel can take another."""
        sent = self.client.execute(code, allow_stdin=False, stop_on_error=False)
        deadline, interrupted, looked = monotonic() + seconds, False, 0.0
        text = value = ""
        while True:
            if monotonic() > deadline:
                if interrupted:
                    self.usable = False
                    return Ran("time", text=text)
                self.manager.interrupt_kernel()
                interrupted, deadline = True, monotonic() + GRACE_SECONDS
            if monotonic() - looked > 0.05:
                looked = monotonic()
                if self.megabytes() > self.limits.megabytes:
                    self.usable = False
                    return Ran("memory", text=text)
                if not self.manager.is_alive():
                    self.usable = False
                    return Ran("died", text=text)
            try:
                message = self.client.get_iopub_msg(timeout=0.05)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") != sent:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream" and content["name"] == "stdout":
                text = (text + content["text"])[-TEXT:]
            elif kind == "execute_result":
                value = content["data"].get("text/plain", "")
            elif kind == "status" and content["execution_state"] == "idle":
                break
        if interrupted:
            return Ran("time", text=text)
        error = self.error(sent)
        if NO_MEMORY.search(error):
            self.usable = False  # what filled the memory may still be held
            return Ran("memory", text=text)
        return Ran("error", error, text) if error else Ran("ok", text=text, value=value)

    def error(self, sent: str) -> str:
        """The exception with which a cell ended, as the kernel says, "" if there was none."""
        try:
            while True:
                message = self.client.get_shell_msg(timeout=GRACE_SECONDS)
                if message["parent_header"].get("msg_id") == sent:
                    break
        except queue.Empty:
            return "KernelError: it did not say how the cell ended"
        content = message["content"]
        if content["status"] == "ok":
            return ""
        return one_line(f"{content.get('ename', 'Error')}: {content.get('evalue', '')}")


def one_line(text: str, most: int = 300) -> str:
    """A text without colours and line breaks, and not too long."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
    text = re.sub(r"\([0-9]+\.py, line ", "(line ", text)  # IPython's name for a cell
    return text if len(text) <= most else text[: most - 1] + "…"


def run_cells(cells: Sequence[Cell], limits: Limits) -> list[Ran]:
    """Run cells in order; never raises for what they do."""
    out: list[Ran] = []
    kernel, restarts = Kernel(limits), 0
    end = monotonic() + limits.seconds
    try:
        for cell in cells:
            left = end - monotonic()
            if left <= 0 or not kernel.usable:
                late = f"the limit of {limits.seconds:g} s was reached"
                lost = f"the kernel broke more than {RESTARTS} times"
                out.append(Ran("not run", late if left <= 0 else lost))
                continue
            out.append(kernel.run(cell.code, min(left, limits.seconds / SHARE)))
            while not kernel.usable and restarts < RESTARTS:
                began = monotonic()
                restarts += 1
                kernel.close()
                kernel = Kernel(limits)
                end += monotonic() - began  # starting is not the student's time
                for earlier, ran in zip(cells, list(out)):
                    left = min(end - monotonic(), limits.seconds / SHARE)
                    if not earlier.test and ran.how in ("ok", "error") and left > 0:
                        kernel.run(earlier.code, left)
                    if not kernel.usable:
                        break
    finally:
        kernel.close()
    return out
