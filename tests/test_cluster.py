"""A Dask cluster of real processes: the same numbers as alone, in spite of what befalls it."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import test_workers
import torch
from commands import sentence
from test_workers import QUANT, SEARCH, SOURCE, dies_once, hangs_once, run

from evolq_lite.cli import main
from evolq_lite.evolve import Evaluated
from evolq_lite.runs import workers as workers_module
from evolq_lite.runs.run import Run
from evolq_lite.runs.source import Folders
from evolq_lite.runs.workers import LostWorkers, Workers, evaluate

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    # Dask's own clean-up of sockets and loops when a scheduler is gone
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
HERE = Path(__file__).parent
SECONDS = 120


@pytest.fixture(autouse=True)
def one_thread():
    """Workers have one thread; other numbers of threads may sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


alone = test_workers.alone


def dask(folder, *words):
    """Start one of Dask's own commands, as the README shows it."""
    command = [sys.executable, "-m", "distributed.cli.dask_" + words[0], *words[1:]]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    with open(folder / f"{words[0]}.log", "a") as log:
        return subprocess.Popen(
            command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )


def kill(process):
    """End a command and all that it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def scheduler(folder):
    """A scheduler on the loopback, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ("--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
    process = dask(folder, "scheduler", *words)
    try:
        listening(port)
        yield f"tcp://127.0.0.1:{port}", process
    finally:
        kill(process)


def listening(port):
    """Wait until somebody does."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A scheduler with two workers, its address."""
    from distributed import Client

    folder = tmp_path_factory.mktemp("cluster")
    with scheduler(folder) as (address, _):
        words = (address, "--nworkers", "2", "--nthreads", "1", "--no-dashboard")
        workers = dask(folder, "worker", *words)
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=SECONDS)
        yield address
        kill(workers)


def test_a_cluster_ends_like_no_cluster(alone, cluster, tmp_path):
    with Workers.cluster(cluster) as workers:
        assert run(tmp_path / "run", workers) == alone


@pytest.mark.usefixtures("few_test_images", "few_factors")
def test_the_command_line_with_a_scheduler(alone, cluster, tmp_path):
    out = tmp_path / "run"
    options = ["--calibration-images", "60", "--batch", "30", "--passes", "1", "--threads", "1"]
    assert (
        main(["demo", "--model", "cnn", "--out", str(out), *options, "--scheduler", cluster]) == 0
    )
    assert (out / "scales.safetensors").read_bytes() == alone[0]


@pytest.mark.parametrize(
    "broken",
    # That local workers hang is tested in any case.
    [dies_once, pytest.param(hangs_once, marks=pytest.mark.long)],
)
def test_a_lost_worker_changes_nothing(alone, cluster, tmp_path, broken):
    flag = tmp_path / "first"
    flag.touch()
    with Workers.cluster(cluster, patience=20) as workers:
        workers.work = partial(broken, str(flag))
        assert run(tmp_path / "run", workers) == alone
    assert not flag.exists(), "no worker was lost: this tested nothing"


def test_a_lost_scheduler_ends_the_run_resumable(alone, tmp_path):
    with scheduler(tmp_path) as (address, process):
        words = (address, "--nworkers", "1", "--nthreads", "1", "--no-dashboard")
        worker = dask(tmp_path, "worker", *words)
        whole = Run(SOURCE, QUANT, SEARCH, tmp_path / "run")
        with whole, pytest.raises(LostWorkers, match=r"the scheduler is gone|lost 4 times"):
            from distributed import Client

            with Client(address, set_as_default=False) as client:
                client.wait_for_workers(1, timeout=SECONDS)
            with Workers.cluster(address, patience=30) as workers:
                for event in whole.evolve(workers):
                    if isinstance(event, Evaluated) and event.visit == 2:
                        process.send_signal(signal.SIGKILL)
        kill(worker)
    assert len(whole.past) >= 7
    assert run(tmp_path / "run", resume=True) == alone


def refused(capsys, out, *more):
    """The sentence of a command that has begun nothing."""
    assert main(["demo", "--model", "cnn", "--out", str(out), *more]) == 2
    said = sentence(capsys.readouterr().err)
    assert not out.exists()
    return said


@pytest.fixture
def impatient(monkeypatch):
    """Nobody answers, however long one waits."""
    monkeypatch.setattr(workers_module, "CONNECTING", 1)


def test_an_unreachable_scheduler(tmp_path, capsys, impatient):
    said = refused(capsys, tmp_path / "run", "--scheduler", "tcp://127.0.0.1:9")
    assert "no Dask scheduler answers at tcp://127.0.0.1:9" in said and "dask scheduler" in said


@pytest.mark.parametrize(
    "address", ["nonsense", "tcp://", "http://127.0.0.1:9", "tcp://no.invalid:1"]
)
def test_an_address_that_is_none(tmp_path, capsys, impatient, address):
    assert f"at {address}" in refused(capsys, tmp_path / "run", "--scheduler", address)


def test_tls_without_certificates(tmp_path, capsys):
    said = refused(capsys, tmp_path / "run", "--scheduler", "tls://127.0.0.1:9")
    assert "needs certificates: set DASK_DISTRIBUTED__COMM__TLS__CA_FILE" in said
    from dask import config

    none = str(tmp_path / "none.pem")
    tls = {"distributed.comm.tls.ca-file": none, "distributed.comm.tls.client.cert": none}
    with config.set(tls):
        said = refused(capsys, tmp_path / "run", "--scheduler", "tls://127.0.0.1:9")
    assert "certificates for tls://127.0.0.1:9 cannot be read" in said


def test_a_scheduler_without_workers(tmp_path, capsys):
    with scheduler(tmp_path) as (address, _):
        said = refused(capsys, tmp_path / "run", "--scheduler", address)
    assert "has no workers" in said and f"dask worker {address}" in said


def old_torch(client, real=workers_module.versions):
    """The versions of everybody, but for the process `client`, which has another torch."""
    return {**real(), "torch": "1.0"} if os.getpid() == client else real()


def test_workers_with_other_versions(cluster, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workers_module, "versions", partial(old_torch, os.getpid()))
    said = refused(capsys, tmp_path / "run", "--scheduler", cluster)
    assert "here it is 1.0" in said and "same versions" in said and "worker tcp://" in said


def test_workers_without_the_files(cluster):
    source = Folders("resnet18", None, "/no/such/folder", "/no", None, 2, None, 0)
    with (
        pytest.raises(ValueError, match=r"worker tcp://.*/no/such/folder is not there"),
        Workers.cluster(cluster, source.lack),
    ):
        pass


def other_numbers(task):
    """A worker on another kind of processor."""
    answer = evaluate(task)
    return replace(answer, stamp=(*answer.stamp, task.batch)) if task.batch else answer


def test_a_worker_that_computes_other_numbers_is_named(cluster, tmp_path):
    with (
        Workers.cluster(cluster) as workers,
        pytest.raises(ValueError, match=r"process .* computes other numbers than"),
    ):
        workers.work = other_numbers
        run(tmp_path / "run", workers)


def test_workers_of_several_threads_are_refused_before_any_work(tmp_path, capsys):
    """They would exchange the scales of the one network that they share."""
    from distributed import Client

    with scheduler(tmp_path) as (address, _):
        worker = dask(tmp_path, "worker", address, "--nthreads", "4", "--no-dashboard")
        try:
            with Client(address, set_as_default=False) as client:
                client.wait_for_workers(1, timeout=SECONDS)
            said = refused(capsys, tmp_path / "run", "--scheduler", address)
        finally:
            kill(worker)
    assert "has 4 threads" in said and "--nthreads 1" in said
