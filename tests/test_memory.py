"""The process keeps freed memory where glibc can be told so, and only then."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evolq_lite import _memory
from evolq_lite._memory import KEEP_MEMORY, keep_memory

ROOT = Path(__file__).resolve().parents[1]
# Pages that a second buffer of 64 MiB costs, after one was freed: none if the process keeps them.
# Without torch: glibc alone is what is looked at.
FAULTS = """
import ctypes, importlib.util, resource
spec = importlib.util.spec_from_file_location("memory", "evolq_lite/_memory.py")
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def use():
    buffer = c.malloc(2**26)
    ctypes.memset(buffer, 1, 2**26)
    c.free(buffer)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(memory.KEPT, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
clean = {k: v for k, v in os.environ.items() if k not in KEEP_MEMORY and k != "GLIBC_TUNABLES"}
glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="mallopt is glibc's, on Linux"
)


def measure(**variables: str) -> tuple[str, int]:
    """Whether a new process keeps its memory, and the pages that a second buffer costs."""
    run = [sys.executable, "-c", FAULTS]
    done = subprocess.run(
        run, cwd=ROOT, env={**clean, **variables}, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@glibc
def test_a_buffer_that_was_freed_costs_no_pages_again():
    kept, faults = measure()
    assert kept == "True" and faults < 100
    # As glibc comes, all of them: 64 MiB are 16,384 pages, or 32 large ones.
    kept, faults = measure(GLIBC_TUNABLES="")
    assert kept == "False" and faults >= 32


@glibc
@pytest.mark.parametrize("name", [*KEEP_MEMORY, "GLIBC_TUNABLES"])
def test_what_a_user_has_set_stays(monkeypatch, name):
    for known in (*KEEP_MEMORY, "GLIBC_TUNABLES"):
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv(name, "")
    assert not keep_memory()


def test_elsewhere_nothing_happens(monkeypatch):
    for name in (*KEEP_MEMORY, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_memory.sys, "platform", "linux")
    monkeypatch.setattr(_memory.ctypes, "CDLL", lambda name: object())  # musl has no mallopt
    assert not keep_memory()
    monkeypatch.setattr(_memory.sys, "platform", "darwin")
    monkeypatch.setattr(_memory.ctypes, "CDLL", lambda name: pytest.fail("asked"))
    assert not keep_memory()
