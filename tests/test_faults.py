"""What may befall a run, with real processes: kills at any moment, damaged files, a busy place."""

import json
import logging
import multiprocessing
import random
import shutil
import time
from dataclasses import replace

import psutil  # needed by ipykernel
import pytest
import torch

from evolq_lite import QuantConfig, SearchConfig
from evolq_lite.evolve import Evaluated
from evolq_lite.runs.folder import RunFolder
from evolq_lite.runs.run import Run
from evolq_lite.runs.scales import load_scales, save_scales
from evolq_lite.runs.source import Embedded
from evolq_lite.runs.workers import Workers

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SOURCE = Embedded("cnn", 60, 0)
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
    with Run(SOURCE, QUANT, SEARCH, out, resume) as whole:
        for _ in whole.evolve():
            pass


def content(out):
    """What a run ended with: its scales, bit for bit, and its history but for seconds."""
    history = [replace(event, seconds=0.0) for event in RunFolder(out).history()]
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
    context.set_forkserver_preload(["evolq_lite.runs.run"])
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


def flip_a_bit(path, at):
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0b100
    path.write_bytes(data)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.5, 0.8, 0.999])
def test_a_flipped_bit_in_the_history_is_noticed_and_the_end_is_the_same(
    undisturbed, copy, caplog, share
):
    """In a field, a number, a checksum or between lines: the run resumes behind the line before."""
    history = copy / "history.jsonl"
    flip_a_bit(history, int(share * (history.stat().st_size - 1)))
    whole = len(RunFolder(copy).history())
    assert whole < len(RunFolder(undisturbed).history())
    with caplog.at_level(logging.WARNING):
        run(copy, resume=True)
    assert f"is damaged behind line {whole}" in caplog.text
    assert content(copy) == content(undisturbed)


def damage(kind, lines):
    """The lines of a history (bytes) as some accident has left them."""
    changed = {
        "lost": lambda: lines[:4] + lines[5:],
        "doubled": lambda: lines[:5] + lines[4:],
        "exchanged": lambda: [*lines[:3], lines[4], lines[3], *lines[5:]],
        "empty": list,
        "all zeros": lambda: [bytes(len(b"".join(lines)))],
        "zeros behind": lambda: [*lines[:9], bytes(400)],
        "no newline": lambda: [*lines[:6], lines[6].rstrip(), *lines[7:]],
        "foreign": lambda: [*lines[:7], b'{"visit": 2}\n', *lines[7:]],
        "edited": lambda: [*lines[:5], edit(lines[5]), *lines[6:]],
    }
    return changed[kind]()


def edit(line):
    """A line whose fitness somebody has improved."""
    values = json.loads(line)
    return json.dumps({**values, "fitness": values["fitness"] - 1}).encode() + b"\n"


KINDS = ["lost", "doubled", "exchanged", "empty", "all zeros", "zeros behind", "no newline"]


@pytest.mark.parametrize("kind", [*KINDS, "foreign", "edited"])
def test_a_damaged_history_leads_to_the_same_end(undisturbed, copy, kind):
    history = copy / "history.jsonl"
    history.write_bytes(b"".join(damage(kind, history.read_bytes().splitlines(keepends=True))))
    run(copy, resume=True)
    assert content(copy) == content(undisturbed)


def test_a_history_of_another_run_is_dropped(undisturbed, copy, tmp_path):
    with Run(SOURCE, QUANT, replace(SEARCH, seed=1), tmp_path / "other") as other:
        for _ in other.evolve():
            pass
    shutil.copy(tmp_path / "other" / "history.jsonl", copy)
    assert RunFolder(copy).history() == []
    run(copy, resume=True)
    assert content(copy) == content(undisturbed)


def test_damaged_or_lost_scales_do_not_matter(undisturbed, copy):
    """They are an export."""
    flip_a_bit(copy / "scales.safetensors", -9)
    run(copy, resume=True)
    assert content(copy) == content(undisturbed)
    (copy / "scales.safetensors").unlink()
    run(copy, resume=True)
    assert content(copy) == content(undisturbed)


def test_a_file_of_scales_that_is_refused_changes_no_model(tmp_path):
    with Run(SOURCE, QUANT, SEARCH, tmp_path / "run") as whole:
        save_scales(tmp_path / "scales", whole.qmodel)
        flip_a_bit(tmp_path / "scales", -9)
        before = {k: v.clone() for k, v in whole.qmodel.state_dict().items()}
        with pytest.raises(ValueError, match="digest differs"):
            load_scales(tmp_path / "scales", whole.qmodel)
        after = whole.qmodel.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("letters", [1, 30, 130])
def test_a_history_that_is_cut_in_the_middle_of_a_line(undisturbed, tmp_path, letters):
    """The power fails while a line of the visit under way is written."""
    out = tmp_path / "run"
    with Run(SOURCE, QUANT, SEARCH, out) as whole:
        for event in whole.evolve():
            if isinstance(event, Evaluated) and len(whole.past) == 12:
                break
    history = out / "history.jsonl"
    history.write_bytes(history.read_bytes()[:-letters])
    run(out, resume=True)
    assert content(out) == content(undisturbed)


def test_a_folder_of_version_0_1_is_refused_with_its_version(copy):
    config, environment = copy / "config.json", copy / "environment.json"
    old = json.loads(config.read_text())
    del old["format"], old["paths"]
    config.write_text(json.dumps(old))
    state = json.loads(environment.read_text())
    state["versions"]["evolq-lite"] = "0.1.0"
    environment.write_text(json.dumps(state))
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(ValueError, match=r"was made by evolq_lite 0\.1\.0, .*start over"):
        run(copy, resume=True)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def hold(out, ready, leave):
    """Be a run in a folder until told to leave."""
    with Run(SOURCE, QUANT, SEARCH, out, resume=True):
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
        Run(SOURCE, QUANT, SEARCH, copy, replace=True)
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
    with Workers.local(2) as workers, Run(SOURCE, QUANT, SEARCH, out) as whole:
        for _ in whole.evolve(workers):
            seen.put([child.pid for child in psutil.Process().children(recursive=True)])


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
    assert all(event.seconds >= 0 for event in RunFolder(tmp_path / "run").history())
