"""Workers: the same numbers as alone, whatever their number, and in spite of what befalls them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import filterfalse
from pathlib import Path

import psutil
import pytest
import torch

import evolq_lite
from evolq_lite import BlockObjective, QuantConfig, SearchConfig
from evolq_lite.cli import main
from evolq_lite.evolve import Committed, visits_of
from evolq_lite.runs import workers as workers_module
from evolq_lite.runs.run import Run
from evolq_lite.runs.source import Embedded
from evolq_lite.runs.workers import Answer, LostWorkers, Task, Workers, check_threads, evaluate

QUANT = QuantConfig(weight_bits=3)
SEARCH = SearchConfig(passes=1, batch=30)


@pytest.fixture(autouse=True)
def one_thread():
    """Workers have one thread; other numbers of threads may sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SOURCE = Embedded("cnn", 60, 0)


def run(out, workers=None, search=SEARCH, quant=QUANT, **options):
    """A short search of the embedded CNN: what it ended with, but for seconds."""
    with Run(SOURCE, quant, search, out, **options) as whole:
        for _ in whole.evolve(workers):
            pass
        history = [replace(event, seconds=0.0) for event in whole.folder.history()]
    return (out / "scales.safetensors").read_bytes(), history


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The search without workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run(tmp_path_factory.mktemp("alone") / "run")
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_workers_ends_like_none(alone, tmp_path, count):
    with Workers.local(count) as workers:
        assert run(tmp_path / "run", workers) == alone


@pytest.mark.slow
def test_several_candidates_at_a_time_are_another_search_but_the_same_with_workers(alone, tmp_path):
    search = replace(SEARCH, parallel=3)
    expected = run(tmp_path / "alone", search=search)
    assert expected != alone
    with Workers.local(2) as workers:
        assert run(tmp_path / "with", workers, search) == expected


@pytest.mark.usefixtures("few_factors")
@pytest.mark.parametrize("integers", ["free", "frozen"])
def test_workers_compute_with_integers_that_were_chosen_here(tmp_path, integers):
    search = replace(SEARCH, cycles=1, integers=integers)
    quant = replace(QUANT, rounding="gptq")
    expected = run(tmp_path / "alone", None, search, quant)
    with Workers.local(2) as workers:
        assert run(tmp_path / "with", workers, search, quant) == expected


def test_workers_search_bits_and_then_scales_like_none(tmp_path):
    budget = {"mean_bits": 2.5, "widths": "2,3,5", "evaluations": 3}
    search = replace(SEARCH, search="both", cycles=1, integers="frozen", parallel=2, **budget)
    expected = run(tmp_path / "alone", None, search, QuantConfig())
    with Workers.local(2) as workers:
        assert run(tmp_path / "with", workers, search, QuantConfig()) == expected


def test_an_objective_on_workers_equals_the_serial_one_bit_for_bit(tmp_path):
    source, search = Embedded("cnn", 100, 0), replace(SEARCH, batch=25)
    with Run(source, QUANT, search, tmp_path / "run") as whole, Workers.local(2) as workers:
        visit = visits_of(whole.chain, whole.search)[0]
        _, images, targets = whole.parts
        serial = BlockObjective(
            whole.chain, visit.blocks, images, targets, batch=25, genome=visit.genome
        )
        population = serial.start * torch.linspace(0.9, 1.1, 3)[:, None]
        remote = whole.objective_of(workers, visit)
        assert torch.equal(remote(population), serial(population))


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
    with Workers.local(2, patience=15) as workers:
        workers.work = partial(broken, str(flag))
        assert run(tmp_path / "run", workers) == alone
    assert not flag.exists(), "no worker was lost: this tested nothing"


@pytest.mark.faults
@pytest.mark.slow
def test_a_worker_that_computes_other_numbers_is_refused(tmp_path):
    with (
        Workers.local(1) as workers,
        pytest.raises(ValueError, match="computes other numbers than"),
    ):
        workers.work = differs
        run(tmp_path / "run", workers)


def always_dies(task: Task) -> Answer:
    """A worker that cannot do the task."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.slow
def test_workers_of_another_kind_do_not_resume_a_run(tmp_path):
    out = tmp_path / "run"
    with Workers.local(1) as workers:
        with Run(SOURCE, QUANT, SEARCH, out) as whole:
            for event in whole.evolve(workers):
                if isinstance(event, Committed):
                    break
        file = out / "environment.json"
        state = json.loads(file.read_text())
        state["workers"][0] += 1e-6
        file.write_text(json.dumps(state))
        with pytest.raises(ValueError, match="began with workers"):
            run(out, workers, resume=True)
    assert json.loads(file.read_text()) == state


STAMP = """
from evolq_lite import QuantConfig, SearchConfig
from evolq_lite.runs.source import Embedded
from evolq_lite.runs.workers import Bench
print(Bench(Embedded("cnn", 20, 0), QuantConfig(weight_bits=3), SearchConfig(batch=20)).stamp)
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
    def missing(*_):
        raise FileNotFoundError("photograph.jpg is not there")

    monkeypatch.setattr(workers_module, "bench", missing)
    task = Task(None, None, None, b"", (), None, b"", 0)
    with pytest.raises(ValueError, match=r"process \d+: photograph\.jpg is not there"):
        evaluate(task)


def test_versions_tell_sources_apart(monkeypatch, tmp_path):
    shutil.copytree(Path(evolq_lite.__file__).parent, tmp_path / "evolq_lite")
    mine = workers_module.versions()["evolq_lite"]
    monkeypatch.setattr(evolq_lite, "__file__", str(tmp_path / "evolq_lite" / "__init__.py"))
    assert workers_module.versions()["evolq_lite"] == mine
    (tmp_path / "evolq_lite" / "numerics.py").write_text("# another")
    assert workers_module.versions()["evolq_lite"] != mine


@pytest.mark.faults
@pytest.mark.slow
def test_workers_that_always_die_end_the_run_resumable(alone, tmp_path):
    with Workers.local(1) as workers, pytest.raises(LostWorkers, match="workers die of a task"):
        workers.work = always_dies
        run(tmp_path / "run", workers)
    assert run(tmp_path / "run", resume=True) == alone


@pytest.mark.slow
def test_no_process_is_left(tmp_path):
    me = psutil.Process()
    before = set(me.children(recursive=True))
    with Workers.local(2) as workers:
        run(tmp_path / "run", workers)
        assert len(set(me.children(recursive=True)) - before) >= 2
    left = set(me.children(recursive=True)) - before
    assert not psutil.wait_procs({*filterfalse(is_resource_tracker, left)}, timeout=30)[1]


def is_resource_tracker(process):
    """Whether this is multiprocessing's own helper, which ends with Python."""
    with suppress(psutil.NoSuchProcess):  # it may end while one asks
        return "resource_tracker" in " ".join(process.cmdline())
    return False


class Threads:
    """A client of workers with so many threads each."""

    def __init__(self, *threads):
        self.threads = threads

    def scheduler_info(self, n_workers):
        return {"workers": {f"tcp://{i}": {"nthreads": n} for i, n in enumerate(self.threads)}}


def test_a_worker_of_several_threads_is_refused():
    check_threads(Threads(1, 1))
    with pytest.raises(ValueError, match=r"worker tcp://1 has 4 threads.*--nthreads 1"):
        check_threads(Threads(1, 4))


def test_threads_of_one_process_do_not_exchange_their_scales():
    """What several threads a worker would do, if they were let."""
    source, search = Embedded("cnn", 60, 0), SearchConfig(passes=1, batch=30)
    mine = workers_module.bench(source, QUANT, search)
    visit, state = visits_of(mine.chain, search)[0], workers_module.state_of(mine.qmodel)
    start = visit.genome.read(mine.qmodel)
    tasks = [
        Task(source, QUANT, search, state, visit.blocks, visit.genome, vector.numpy().tobytes(), 0)
        for vector in start * torch.linspace(0.8, 1.2, 8)[:, None]
    ]
    alone = [evaluate(task).loss for task in tasks]
    with ThreadPoolExecutor(4) as threads:
        assert [answer.loss for answer in threads.map(evaluate, tasks)] == alone


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--workers", "0"], "--workers must be at least 1"),
        (["--workers", "1000000"], "at most 1,024, not 1000000"),
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
@pytest.mark.usefixtures("few_test_images")
def test_the_command_line_with_workers(tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--calibration-images", "60", "--batch", "30", "--passes", "1", "--workers", "2"]
    assert main(["demo", "--model", "cnn", "--out", str(out), *options]) == 0
    assert json.loads((out / "summary.json").read_text())["evaluations"] == 13
