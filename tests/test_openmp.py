"""The bound on OpenMP's spinning holds in every process that the product starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from evolq_lite._memory import KEEP_MEMORY
from evolq_lite._openmp import SPIN
from evolq_lite.runs.workers import Workers

ROOT = Path(__file__).resolve().parents[1]


def clean():
    """The environment without the switches."""
    return {k: v for k, v in os.environ.items() if k not in SPIN and k != "OMP_WAIT_POLICY"}


def run(code, **more):
    """What a Python process prints, and its stderr."""
    environment = {**clean(), "PYTHONPATH": str(ROOT), **more}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout, done.stderr


def switches():
    """The switches as this process has them."""
    return {name: os.environ.get(name) for name in SPIN}


def test_importing_the_package_sets_them_before_torch():
    code = "import evolq_lite, os; print([os.environ[n] for n in evolq_lite._openmp.SPIN])"
    assert run(code)[0].strip() == str(list(SPIN.values()))
    assert run("import evolq_lite; print(evolq_lite._openmp.UNBOUND)")[0].strip() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is that of Linux")
def test_the_library_has_read_them():
    """GNU's OpenMP says what it goes by when it is loaded."""
    _, said = run("import evolq_lite", OMP_DISPLAY_ENV="verbose")
    found = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", said)
    assert found and set(found) == {SPIN["GOMP_SPINCOUNT"]}, said


def test_too_late_is_said():
    said, _ = run("import torch, evolq_lite; print(evolq_lite._openmp.UNBOUND)")
    assert "import evolq_lite first" in said


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_a_user_has_set_stays(name):
    value = {"GOMP_SPINCOUNT": "77", "OMP_WAIT_POLICY": "PASSIVE"}[name]
    code = f"import evolq_lite, os; print(os.environ[{name!r}], evolq_lite._openmp.UNBOUND)"
    assert run(code, **{name: value})[0].split() == [value]


@pytest.mark.slow
def test_workers_have_them():
    with Workers.local(1) as workers:
        ((_, found),) = workers.each(lambda _: switches(), [None])
        ((_, started),) = workers.each(lambda _: psutil.Process().environ(), [None])
    assert found == {name: os.environ.get(name, value) for name, value in SPIN.items()}
    # What a process was started with: set later, the memory variables do nothing.
    assert {name: started.get(name) for name in KEEP_MEMORY} == KEEP_MEMORY


@pytest.mark.parametrize("target", ["demo", "test", "lab", "app", "grade", "notebooks"])
def test_make_gives_them_to_what_it_starts(target):
    """The commands of a target, as make would run them, under a shell that shows the variables."""
    options = ["SUBMISSIONS=x", "OUT=y"]
    done = subprocess.run(
        ["make", "-p", "-n", "-o", ".venv/.installed", target, *options],
        cwd=ROOT,
        env=clean(),
        capture_output=True,
        text=True,
        check=True,
    )
    for name, value in SPIN.items():
        assert re.search(rf"^(export )?{name} :?\??= ?{value}$", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_notebook_kernels_have_them():
    """A kernel inherits from Jupyter; a lesson imports evolq_lite before torch in any case."""
    for source in sorted((ROOT / "notebooks" / "src").glob("*.py")):
        text = source.read_text()
        first = re.search(r"^(?:import|from) (evolq_lite|torch|timm)\b", text, re.MULTILINE)
        assert first is None or first[1] == "evolq_lite", source.name
