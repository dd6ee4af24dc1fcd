"""Workers: the same numbers as alone, whatever their number, and in spite of what befalls them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

import evolq_lite
from evolq_lite import BlockObjective, QuantConfig, SearchConfig, parallel
from evolq_lite.cli import main
from evolq_lite.evolve import visits_of
from evolq_lite.parallel import Answer, LostWorkers, Pool, Task, evaluate
from evolq_lite.runs import Run, embedded_task

QUANT = QuantConfig(weight_bits=3)
SEARCH = SearchConfig(passes=1, batch=30)


@pytest.fixture(autouse=True)
def one_thread():
    """Workers have one thread; other numbers of threads may sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(out, pool=None, search=SEARCH):
    """A short search of the embedded CNN: what it ended with, but for seconds."""
    whole = Run(embedded_task("cnn", 60, 0), QUANT, search, out)
    whole.evolve(lambda _: None, pool)
    history = [{**line, "seconds": 0} for line in whole.folder.history()]
    return (out / "scales.safetensors").read_bytes(), history


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The search without workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run(tmp_path_factory.mktemp("alone") / "run")
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_ends_like_none(alone, tmp_path, workers):
    with Pool.local(workers) as pool:
        assert run(tmp_path / "run", pool) == alone


@pytest.mark.slow
def test_several_candidates_at_a_time_are_another_search_but_the_same_with_workers(alone, tmp_path):
    search = replace(SEARCH, parallel=3)
    expected = run(tmp_path / "alone", search=search)
    assert expected != alone
    with Pool.local(2) as pool:
        assert run(tmp_path / "pooled", pool, search) == expected


def test_a_pooled_objective_equals_the_serial_one_bit_for_bit(tmp_path):
    whole = Run(embedded_task("cnn", 100, 0), QUANT, replace(SEARCH, batch=25), tmp_path / "run")
    visit = visits_of(whole.chain, whole.search)[0]
    serial = BlockObjective(
        whole.chain,
        visit.blocks,
        whole.task.calibration,
        whole.task.targets,
        batch=25,
        genome=visit.genome,
    )
    population = serial.start * torch.linspace(0.9, 1.1, 3)[:, None]
    with Pool.local(2) as pool:
        pooled = whole.pooled(pool, visit)
        assert torch.equal(pooled(population), serial(population))
        assert torch.equal(pooled.start, serial.start)


def first_call(flag: str) -> bool:
    """Whether this is the first worker to ask, over all processes: it removes the file."""
    try:
        os.unlink(flag)
    except OSError:
        return False
    return True


def dies_once(flag: str, task: Task) -> Answer:
    """A worker that is killed in the middle of a task, late: the scales have changed by then."""
    if task.blocks == ("layer1.0",) and first_call(flag):
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(task)


def hangs_once(flag: str, task: Task) -> Answer:
    """A worker that does not come back from its first task."""
    if first_call(flag):
        time.sleep(3600)
    return evaluate(task)


def differs(task: Task) -> Answer:
    """A worker on another kind of processor."""
    answer = evaluate(task)
    return replace(answer, stamp=(*answer.stamp, task.batch)) if task.batch else answer


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("broken", [dies_once, hangs_once])
def test_a_lost_worker_changes_nothing(alone, tmp_path, broken):
    flag = tmp_path / "first"
    flag.touch()
    with Pool.local(2, patience=15) as pool:
        pool.work = partial(broken, str(flag))
        assert run(tmp_path / "run", pool) == alone
    assert not flag.exists(), "no worker was lost: this tested nothing"


@pytest.mark.faults
@pytest.mark.slow
def test_a_worker_that_computes_other_numbers_is_refused(tmp_path):
    with Pool.local(1) as pool, pytest.raises(ValueError, match="computes other numbers than"):
        pool.work = differs
        run(tmp_path / "run", pool)


def always_dies(task: Task) -> Answer:
    """A worker that cannot do the task."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.slow
def test_workers_of_another_kind_do_not_go_on_with_a_run(tmp_path):
    class Stop(Exception):
        pass

    def stop(evaluation):
        if evaluation.visit == 1:
            raise Stop

    task, out = embedded_task("cnn", 60, 0), tmp_path / "run"
    with Pool.local(1) as pool:
        with Run(task, QUANT, SEARCH, out) as whole, pytest.raises(Stop):
            whole.evolve(stop, pool)
        file = out / "environment.json"
        state = json.loads(file.read_text())
        state["workers"][0] += 1e-6
        file.write_text(json.dumps(state))
        with (
            Run(task, QUANT, SEARCH, out, resume=True) as whole,
            pytest.raises(ValueError, match="began with workers"),
        ):
            whole.evolve(lambda _: None, pool)
    assert json.loads(file.read_text()) == state


STAMP = """
from evolq_lite import QuantConfig, SearchConfig
from evolq_lite.parallel import Bench, Recipe
from evolq_lite.runs import embedded_parts
recipe = Recipe(embedded_parts, ("cnn", 20, 0), QuantConfig(weight_bits=3), SearchConfig(batch=20))
print(Bench(recipe).stamp)
"""


@pytest.mark.slow
def test_a_worker_s_stamp_tells_kernels_apart():
    """The same processor, told to use its vector instructions and not to."""
    stamps = [
        subprocess.check_output([sys.executable, "-c", STAMP], text=True, env=os.environ | more)
        for more in ({}, {}, {"ATEN_CPU_CAPABILITY": "default"})
    ]
    assert stamps[0] == stamps[1]
    assert stamps[2] != stamps[0] or "DEFAULT" in stamps[0]


def test_a_file_that_a_worker_lacks_is_named_and_no_lost_worker(monkeypatch):
    def missing(recipe):
        raise FileNotFoundError("photograph.jpg is not there")

    monkeypatch.setattr(parallel, "bench", missing)
    task = Task(None, b"", (), None, b"", 0)
    with pytest.raises(ValueError, match=r"process \d+: photograph\.jpg is not there"):
        evaluate(task)


def test_versions_tell_sources_apart(monkeypatch, tmp_path):
    shutil.copytree(Path(evolq_lite.__file__).parent, tmp_path / "evolq_lite")
    mine = parallel.versions()["evolq_lite"]
    monkeypatch.setattr(evolq_lite, "__file__", str(tmp_path / "evolq_lite" / "__init__.py"))
    assert parallel.versions()["evolq_lite"] == mine
    (tmp_path / "evolq_lite" / "numerics.py").write_text("# another")
    assert parallel.versions()["evolq_lite"] != mine


@pytest.mark.faults
@pytest.mark.slow
def test_workers_that_always_die_end_the_run_resumable(alone, tmp_path):
    with Pool.local(1) as pool, pytest.raises(LostWorkers, match="lost 4 times in a row"):
        pool.work = always_dies
        run(tmp_path / "run", pool)
    whole = Run(embedded_task("cnn", 60, 0), QUANT, SEARCH, tmp_path / "run", resume=True)
    whole.evolve(lambda _: None)
    assert (tmp_path / "run" / "scales.safetensors").read_bytes() == alone[0]


@pytest.mark.slow
def test_no_process_is_left(tmp_path):
    before = set(active_children())
    with Pool.local(2) as pool:
        run(tmp_path / "run", pool)
    deadline = time.monotonic() + 20
    while set(active_children()) - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert set(active_children()) <= before
    assert not [t for t in threading.enumerate() if "QueueManager" in t.name and t.is_alive()]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--workers", "0"], "--workers must be at least 1"),
        (["--workers", "two"], "'two' is not a whole number"),
        (["--workers", "1", "--scheduler", "tcp://127.0.0.1:9"], "not both"),
        (["--parallel", "0"], "parallel must be at least 1"),
    ],
)
def test_bad_options_are_refused_before_any_work(tmp_path, capsys, more, words):
    out = tmp_path / "run"
    assert main(["demo", "--model", "cnn", "--out", str(out), *more]) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_the_command_line_with_workers(tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--calibration-images", "60", "--batch", "30", "--passes", "1", "--workers", "2"]
    assert main(["demo", "--model", "cnn", "--out", str(out), *options]) == 0
    assert json.loads((out / "summary.json").read_text())["evaluations"] == 13
