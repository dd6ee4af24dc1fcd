"""What may befall a run, with real processes: kills at any moment, damaged files, a busy place."""

import logging
import multiprocessing
import random
import shutil
import time

import psutil  # needed by ipykernel
import pytest
import torch

from evolq_lite import QuantConfig, SearchConfig
from evolq_lite.parallel import Pool
from evolq_lite.record import RunFolder, load_scales, save_scales
from evolq_lite.runs import Run, embedded_task

pytestmark = [pytest.mark.faults, pytest.mark.slow]

QUANT = QuantConfig(weight_bits=3)
SEARCH = SearchConfig(passes=3, batch=30, mutation="adaptive")
KILLS = 20


@pytest.fixture(autouse=True)
def one_thread():
    """The same number of threads here as in the processes that are killed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(out, resume=False):
    """A search of the embedded CNN from its beginning or from where it stands, to its end."""
    torch.set_num_threads(1)
    task = embedded_task("cnn", 60, 0)
    with Run(task, QUANT, SEARCH, out, resume) as whole:
        whole.evolve(lambda _: None)


def content(out):
    """What a run ended with: its scales, bit for bit, and its history but for seconds."""
    history = [{**line, "seconds": 0.0} for line in RunFolder(out).history()]
    return (out / "scales.safetensors").read_bytes(), history


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing has happened to."""
    threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(out)
    yield out
    torch.set_num_threads(threads)


@pytest.fixture
def copy(undisturbed, tmp_path):
    """A copy of it that may be damaged."""
    return shutil.copytree(undisturbed, tmp_path / "copy")


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported the package already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evolq_lite.runs"])
    first = context.Process(target=int)  # starts the server, which imports: seconds
    first.start()
    first.join()
    return context


def test_killed_at_random_moments_and_resumed_it_ends_like_one_undisturbed(
    undisturbed, processes, tmp_path
):
    moments, kills, finished = random.Random(0), 0, 0
    began = time.monotonic()
    process = processes.Process(target=run, args=(tmp_path / "timed",))
    process.start()
    process.join()
    usual = time.monotonic() - began
    while kills < KILLS:
        out = tmp_path / str(finished)
        process = processes.Process(target=run, args=(out, (out / "config.json").is_file()))
        process.start()
        process.join(moments.uniform(0, usual))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            assert content(out) == content(undisturbed)
            finished += 1
    run(tmp_path / str(finished), (tmp_path / str(finished) / "config.json").is_file())
    assert content(tmp_path / str(finished)) == content(undisturbed)


def flip_a_bit(path):
    """Change one bit in the middle of the numbers."""
    data = bytearray(path.read_bytes())
    data[-len(data) // 4] ^= 0b100
    path.write_bytes(data)


def test_scales_with_a_flipped_bit_are_noticed_and_the_visit_before_is_used(
    undisturbed, copy, caplog
):
    flip_a_bit(copy / "scales.safetensors")
    with caplog.at_level(logging.WARNING):
        run(copy, resume=True)
    assert "digest differs; going on from the visit before" in caplog.text
    assert content(copy) == content(undisturbed)


def test_two_damaged_files_of_scales_are_refused_and_left(copy):
    for name in ("scales.safetensors", "scales.previous.safetensors"):
        flip_a_bit(copy / name)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(ValueError, match=r"scales\.previous\.safetensors.*start anew"):
        run(copy, resume=True)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_a_file_of_scales_that_is_refused_changes_no_model(tmp_path):
    task = embedded_task("cnn", 60, 0)
    with Run(task, QUANT, SEARCH, tmp_path / "run") as whole:
        save_scales(tmp_path / "scales", whole.qmodel)
        flip_a_bit(tmp_path / "scales")
        before = {k: v.clone() for k, v in whole.qmodel.state_dict().items()}
        with pytest.raises(ValueError, match="digest differs"):
            load_scales(tmp_path / "scales", whole.qmodel)
        after = whole.qmodel.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("letters", [1, 30, 130])
def test_a_history_that_is_cut_in_the_middle_of_a_line(undisturbed, tmp_path, letters):
    """The power fails while a line of the visit under way is written."""

    class Off(Exception):
        pass

    out, lines = tmp_path / "run", 0

    def stop(_):
        nonlocal lines
        lines += 1
        if lines == 12:
            raise Off

    with Run(embedded_task("cnn", 60, 0), QUANT, SEARCH, out) as whole, pytest.raises(Off):
        whole.evolve(stop)
    history = out / "history.jsonl"
    history.write_bytes(history.read_bytes()[:-letters])
    run(out, resume=True)
    assert content(out) == content(undisturbed)


def hold(out, ready, leave):
    """Be a run in a folder until told to leave."""
    with Run(embedded_task("cnn", 60, 0), QUANT, SEARCH, out, resume=True):
        ready.set()
        leave.wait()


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(copy, processes):
    ready, leave = processes.Event(), processes.Event()
    first = processes.Process(target=hold, args=(copy, ready, leave))
    first.start()
    assert ready.wait(120)
    for resume in (True, False):
        with pytest.raises(FileExistsError, match=r"another run is at .*give another --out"):
            RunFolder.claim(copy, resume, replace=not resume)
    with pytest.raises(FileExistsError, match="another run is at work"):
        run(copy, resume=True)
    with pytest.raises(FileExistsError, match="another run is at work"):
        Run(embedded_task("cnn", 60, 0), QUANT, SEARCH, copy, replace=True)
    leave.set()
    first.join()
    run(copy, resume=True)


def test_a_killed_run_leaves_no_lock(copy, processes):
    ready, leave = processes.Event(), processes.Event()
    first = processes.Process(target=hold, args=(copy, ready, leave))
    first.start()
    assert ready.wait(120)
    first.kill()
    first.join()
    run(copy, resume=True)


def run_with_workers(out, seen):
    """A run on two worker processes, which says who they are."""
    with Pool.local(2) as pool, Run(embedded_task("cnn", 60, 0), QUANT, SEARCH, out) as whole:

        def heard(_):
            seen.put([child.pid for child in psutil.Process().children(recursive=True)])

        whole.evolve(heard, pool)


def test_workers_end_with_a_run_that_is_killed(processes, tmp_path):
    context = multiprocessing.get_context("forkserver")
    seen = context.Queue()
    process = context.Process(target=run_with_workers, args=(tmp_path / "run", seen))
    process.start()
    workers = [psutil.Process(pid) for pid in seen.get(timeout=120)]
    assert len(workers) >= 2
    process.kill()
    process.join()
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_a_clock_that_jumps_back_changes_nothing(undisturbed, tmp_path, monkeypatch):
    jumps = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    monkeypatch.setattr(time, "time_ns", lambda: 10**9 * next(jumps))
    run(tmp_path / "run")
    monkeypatch.undo()
    assert content(tmp_path / "run") == content(undisturbed)
    assert all(line["seconds"] >= 0 for line in RunFolder(tmp_path / "run").history())
