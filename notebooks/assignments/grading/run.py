"""Step 3, run: cells one after another in a fresh kernel, within limits, then points.

A cell that runs too long is interrupted, and the next one goes on. A kernel that takes too much
memory, that dies, or that ignores the interrupt is replaced by a new one, in which all cells but
the tests and the culprit run again. Each exercise has a time of its own, so a slow or broken answer
costs its own points and no others. A cell of ours that fails without any code of the student's is
our failure: `GraderFailed`, and nobody is charged for it.
"""

from __future__ import annotations

import builtins
import math
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import KernelManager

from grading.assignment import Assignment
from grading.isolate import NOBODY, Isolation, environment
from grading.repair import Plan, Step

START_SECONDS = 120  # for a kernel to come up, and for a cell of setup
GRACE_SECONDS = 5  # to obey an interrupt
# Limits are on the time that a processor works for a cell, so other work on this machine costs
# nobody points; a cell that only waits uses up its limit this many times more slowly.
PATIENCE = 4
SECTION = 4  # an exercise may take as long as this many cells, and what its cells are given more
TEXT = 4000  # characters that are kept of what a cell prints
PROCESSES = 512

# Memory: RLIMIT_DATA, where the system has it, makes an allocation fail, which stops one cell; the
# watch on the resident size in `Kernel.run` stops the rest. Numbers: the same random ones for every
# cell, whatever ran before. `exit()` would stop the kernel some time later, in another cell.
PROLOGUE = """
def _prologue():
    import random, sys
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))
        if {alone}:
            resource.setrlimit(resource.RLIMIT_NPROC, ({processes}, {processes}))
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
FRAME = re.compile(r"In ?\[(\d+)\]")  # IPython's name of a cell in a traceback


class GraderFailed(Exception):
    """What is ours did not work: nothing is stored, and no points are lost by it."""


@dataclass(frozen=True)
class Limits:
    """Seconds for a cell that says nothing else; megabytes for a kernel and its children.

    Seconds are those that a processor works; of waiting, `PATIENCE` count as one.
    """

    seconds: float = 30.0
    megabytes: int = 4096

    def of(self, step: Step) -> float:
        """Seconds for one cell; what cells are given is meant for the usual 30."""
        if step.kind == "setup":
            return START_SECONDS
        return self.seconds if step.seconds is None else step.seconds * self.seconds / 30

    def of_section(self, steps: Sequence[Step], section: str) -> float:
        """Seconds for all cells of an exercise together."""
        mine = [step for step in steps if step.section == section and step.kind != "setup"]
        return SECTION * self.seconds + sum(self.of(s) for s in mine if s.seconds is not None)


@dataclass(frozen=True)
class Ran:
    """How a cell ended: "ok", "error", "time", "memory", "died" or "not run".

    `error` is the exception as "Kind: message", or why the cell was not run; `through` are the
    numbers of the cells whose code the exception came through; `text` is the end of what was
    printed, `value` the last expression as text.
    """

    how: str
    error: str = ""
    text: str = ""
    value: str = ""
    through: frozenset[int] = frozenset()


class _OneSpec(KernelSpecManager):
    """Knows one kernel: this Python, wrapped in what keeps it apart."""

    def __init__(self, argv: list[str]) -> None:
        super().__init__()
        self.spec = KernelSpec(argv=argv, display_name="grading", language="python")

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The same one for every name."""
        return self.spec


class Kernel:
    """One kernel process, in an empty folder of its own below `base`."""

    def __init__(self, limits: Limits, isolation: Isolation, base: Path) -> None:
        self.limits = limits
        self.folder = tempfile.mkdtemp(dir=base)
        self.cells: dict[int, int] = {}  # execution count -> number of the cell that ran
        self.usable = True
        self.cost = 0.0
        self._copy_font_cache()
        env = environment(self.folder)
        launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        argv = isolation.command(launch, self.folder, env)
        place = {} if os.name == "nt" else {"transport": "ipc", "ip": f"{self.folder}/socket"}
        self.manager = KernelManager(
            kernel_spec_manager=_OneSpec(argv),
            connection_file=f"{self.folder}/connection.json",
            **place,
        )
        self.manager.write_connection_file()
        if isolation.other_user:
            for path in (self.folder, *map(str, Path(self.folder).rglob("*"))):
                os.chown(path, NOBODY, NOBODY)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        outside = env if os.name == "nt" else {"PATH": os.environ.get("PATH", os.defpath)}
        self.manager.start_kernel(env=outside, cwd=self.folder, **quiet)
        self.pid: int = self.manager.provisioner.pid  # type: ignore[union-attr]
        self.client = self.manager.client()
        self.client.start_channels()
        try:
            self.client.wait_for_ready(timeout=START_SECONDS)
        except RuntimeError as error:
            self.close()
            raise GraderFailed(f"the kernel did not start ({one_line(str(error))})") from None
        prologue = PROLOGUE.format(
            limit=limits.megabytes * 2**20, processes=PROCESSES, alone=isolation.way != "none"
        )
        self.run(prologue, START_SECONDS, silent=True)

    def _copy_font_cache(self) -> None:
        """Spare each kernel matplotlib's search for fonts, which takes seconds."""
        import matplotlib

        for path in Path(matplotlib.get_cachedir()).glob("fontlist-*.json"):
            with suppress(OSError):
                shutil.copy(path, self.folder)

    def close(self) -> None:
        """Kill the kernel, its children and its folder."""
        children = self.processes()
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        for process in children:
            with suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

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

    def worked(self) -> float:
        """Seconds that processors have worked for the kernel and its children."""
        seconds = 0.0
        for process in self.processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                seconds += times.user + times.system
        return seconds

    def run(self, code: str, seconds: float, number: int = -1, silent: bool = False) -> Ran:
        """Run one cell; afterwards `usable` says whether the kernel can take another.

        `cost` is then what the cell used of its limit.
        """
        began, worked = monotonic(), self.worked()
        sent = self.client.execute(code, silent=silent, allow_stdin=False, stop_on_error=False)
        interrupted, looked, self.cost = False, 0.0, 0.0
        text = value = ""
        while True:
            if monotonic() - looked > 0.05:
                looked = monotonic()
                waited = (monotonic() - began) / PATIENCE
                self.cost = max(self.cost, self.worked() - worked, waited)
                if self.cost > seconds:
                    if interrupted:
                        self.usable = False
                        return Ran("time", text=text)
                    self.manager.interrupt_kernel()
                    interrupted, seconds = True, self.cost + GRACE_SECONDS
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
            if kind == "execute_input":
                self.cells[content["execution_count"]] = number
            elif kind == "stream" and content["name"] == "stdout":
                text = (text + content["text"])[-TEXT:]
            elif kind == "execute_result":
                value = content["data"].get("text/plain", "")
            elif kind == "status" and content["execution_state"] == "idle":
                break
        if interrupted:
            return Ran("time", text=text)
        reply = self._reply(sent)
        if reply["status"] == "ok":
            return Ran("ok", text=text, value=value)
        error = one_line(f"{reply.get('ename', 'Error')}: {reply.get('evalue', '')}")
        if NO_MEMORY.search(error):
            self.usable = False  # what filled the memory may still be held
            return Ran("memory", text=text)
        counts = FRAME.findall("\n".join(map(str, reply.get("traceback", ()))))
        through = frozenset(self.cells.get(int(count), -1) for count in counts)
        return Ran("error", error, text, through=through)

    def _reply(self, sent: str) -> dict[str, Any]:
        """How the kernel says that a cell ended."""
        try:
            while True:
                message = self.client.get_shell_msg(timeout=GRACE_SECONDS)
                if message["parent_header"].get("msg_id") == sent:
                    return message["content"]
        except queue.Empty:
            return {"status": "error", "ename": "KernelError", "evalue": "it sent no reply"}


def one_line(text: str, most: int = 300) -> str:
    """A text without colours and line breaks, and not too long."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
    text = re.sub(r"\([0-9]+\.py, line ", "(line ", text)  # IPython's name for a cell
    return text if len(text) <= most else text[: most - 1] + "…"


class Session:
    """The cells of one submission in a kernel, and in its successors if it breaks."""

    def __init__(
        self, steps: Sequence[Step], limits: Limits, isolation: Isolation, base: Path
    ) -> None:
        self.steps, self.limits, self.isolation, self.base = steps, limits, isolation, base
        self.ran: list[Ran] = []
        self.broke: set[int] = set()  # cells that made a kernel unusable: they run once
        self.used: dict[str, float] = defaultdict(float)  # seconds by exercise
        self.stopped: set[str] = set()  # exercises whose public check had to be stopped
        self.kernel: Kernel | None = None

    def close(self) -> None:
        """End the kernel."""
        if self.kernel is not None:
            self.kernel.close()
            self.kernel = None

    def run_all(self) -> list[Ran]:
        """Run every cell that still has time; never raises for what a student did."""
        try:
            for number, step in enumerate(self.steps):
                self.ran.append(self._why_not(step) or self._run(number, step))
        finally:
            self.close()
        return self.ran

    def _why_not(self, step: Step) -> Ran | None:
        """Why a cell is not run at all."""
        if step.kind == "test" and step.section in self.stopped:
            return Ran("not run", f"the public check of {step.section} had to be stopped")
        limit = self.limits.of_section(self.steps, step.section)
        if step.kind != "setup" and self.used[step.section] >= limit:
            return Ran("not run", f"{step.section} had used up its {limit:g} s")
        return None

    def _run(self, number: int, step: Step) -> Ran:
        """Run one cell, in a new kernel if there is none."""
        kernel = self.kernel or self._replace(number)
        allowed = self.limits.of(step)
        if step.kind != "setup":
            left = self.limits.of_section(self.steps, step.section) - self.used[step.section]
            allowed = min(allowed, left)
        ran = kernel.run(step.code, allowed, number)
        if step.kind != "setup":
            self.used[step.section] += kernel.cost
        if not kernel.usable:
            self.broke.add(number)
            self.close()
        stopped = ran.how in ("time", "memory", "died")
        if stopped and step.kind == "test" and not step.hidden:
            self.stopped.add(step.section)
        if step.kind == "setup" and ran.how != "ok":
            self._blame(number, step, ran)
        return ran

    def _replace(self, number: int) -> Kernel:
        """A new kernel in which all earlier cells but tests and culprits have run."""
        while True:
            self.kernel = kernel = Kernel(self.limits, self.isolation, self.base)
            for earlier in range(number):
                step, ran = self.steps[earlier], self.ran[earlier]
                if step.kind == "test" or earlier in self.broke or ran.how not in ("ok", "error"):
                    continue
                kernel.run(step.code, self.limits.of(step), earlier)
                if not kernel.usable:
                    self.broke.add(earlier)
                    break
            if kernel.usable:
                return kernel
            self.close()

    def _blame(self, number: int, step: Step, ran: Ran) -> None:
        """GraderFailed if a cell of ours fails without the student's code, too."""
        kernel = Kernel(self.limits, self.isolation, self.base)
        try:
            for own in self.steps[: number + 1]:
                if own.kind == "setup":
                    alone = kernel.run(own.code, START_SECONDS)
                    if alone.how != "ok":
                        why = alone.error or alone.how
                        raise GraderFailed(f"cell {own.name} of the assignment failed: {why}")
        finally:
            kernel.close()


# Points


@dataclass
class Tested:
    """A test cell and what it earned; `says` is "" if it passed."""

    id: str
    points: float
    out_of: float
    says: str
    hidden: bool


# The last of its line: what stands before it was printed by the submission, not by the test.
LEADERBOARD = re.compile(r"^.*leaderboard: ([+-]?[0-9.]+) (.*)$", re.MULTILINE)


def earned(ran: Ran, points: float) -> float:
    """The points of a test cell that ended so, by nbgrader's rule.

    All of them if it ended without an error, or as many as its last expression says.
    """
    if ran.how != "ok":
        return 0.0
    try:
        found = float(ran.value)
    except ValueError:  # no last expression, or no number
        return points
    return min(max(found, 0.0), points) if math.isfinite(found) else 0.0


def says(ran: Ran, steps: Sequence[Step], step: Step, limits: Limits) -> str:
    """A sentence about a cell that did not end well.

    Of an exception from a student's code in hidden tests only the kind is told: its message could
    carry the tests out.
    """
    if ran.how == "error":
        kind = ran.error.partition(":")[0]
        if kind == "NotImplementedError":
            return "not done yet (NotImplementedError)"
        theirs = any(n >= 0 and steps[n].kind in ("own", "extra") for n in ran.through)
        if step.hidden and (theirs or kind != "AssertionError"):
            known = isinstance(getattr(builtins, kind, None), type)
            return f"your code raised {kind if known else 'an exception of its own'}"
        return ran.error
    return {
        "ok": "",
        "time": "it ran too long and was stopped",
        "memory": f"it used more than {limits.megabytes} MB of memory and was stopped",
        "died": "the kernel died in it",
        "not run": f"not run, because {ran.error}",
    }[ran.how]


@dataclass
class Marked:
    """What running gave: points, notes, and the leaderboard's entry if the assignment has one."""

    tests: list[Tested]
    notes: list[str]
    leaderboard: str = ""
    gain: float | None = None


def run(
    plan: Plan, assignment: Assignment, limits: Limits, isolation: Isolation, base: Path
) -> Marked:
    """Run and mark one submission; raises only GraderFailed."""
    steps = plan.steps
    out = Marked([], [])
    for step, ran in zip(steps, Session(steps, limits, isolation, base).run_all()):
        why = says(ran, steps, step, limits)
        if step.kind == "test":
            given = assignment.cell(step.name)
            points = earned(ran, given.points)
            why = why or ("" if points == given.points else "passed in part")
            out.tests.append(Tested(step.name, points, given.points, why, given.hidden))
            board = LEADERBOARD.findall(ran.text) if ran.how == "ok" else []
            if board and "leaderboard:" in given.source:  # not what a student's cell may print
                out.gain, out.leaderboard = float(board[-1][0]), " ".join(board[-1])
        if ran.how in ("time", "memory", "died") or (ran.how == "error" and step.kind != "test"):
            out.notes.append(f"Cell {step.name}: {why}.")
        elif ran.how == "not run" and step.kind != "test":
            out.notes.append(f"Cell {step.name} was {why}.")
    return out
