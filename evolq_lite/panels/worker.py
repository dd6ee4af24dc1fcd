"""One job at a time in a thread, the latest wins, and a job can be cancelled where it ticks.

A slider that is dragged asks for many results of which only the last is wanted. `Worker.request`
waits a moment for the next request, tells the job under way to stop, and runs the new one.
`Worker.follow` is for jobs of milliseconds: the one under way may end, so that its result is seen.
A job is a function of `tick`; it calls `tick(fraction)` between its batches, where it may be
stopped.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

Tick = Callable[[float], None]
Job = Callable[[Tick], None]


class Cancelled(Exception):
    """Raised by `tick` in a job that is to stop."""


class Worker:
    """Runs jobs in one thread; `wait` seconds are given to a next request to replace the last."""

    def __init__(
        self,
        wait: float,
        on_progress: Callable[[float], None],
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        self.wait, self.on_progress, self.on_end = wait, on_progress, on_end
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="evolq-panel")
        self.stop = threading.Event()  # of the latest job
        self.timer: asyncio.TimerHandle | None = None
        self.future: Future[None] | None = None

    def request(self, job: Job) -> None:
        """Run a job soon, instead of the one under way, which ends without a word."""
        self.forget()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no event loop, as in plain Python: nothing could come in between
            self.submit(job)
            return
        self.timer = loop.call_later(self.wait, self.submit, job)

    def follow(self, job: Job) -> None:
        """Run a short job after the one under way, instead of any that still waits for that."""
        if self.future is not None:
            self.future.cancel()
        self.stop = threading.Event()
        self.future = self.pool.submit(self.run, job, self.stop)

    def submit(self, job: Job) -> None:
        """Run a job as soon as the thread is free, which the one under way is told to leave."""
        self.stop.set()
        self.timer, self.stop = None, threading.Event()
        self.future = self.pool.submit(self.run, job, self.stop)

    def run(self, job: Job, stop: threading.Event) -> None:
        """Run a job to its end, and say how it ended unless another has taken its place."""

        def tick(fraction: float) -> None:
            if stop.is_set():
                raise Cancelled
            self.on_progress(fraction)

        ended: BaseException | None = None
        try:
            tick(0.0)
            job(tick)
        except BaseException as error:  # also what a notebook's interrupt may throw
            ended = error
        if self.stop is stop:
            self.on_end(ended)

    def forget(self) -> None:
        """Stop the job under way at its next tick, drop one that waits; `on_end` is not told."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.stop.set()
        self.stop = threading.Event()  # no job's

    def cancel(self) -> None:
        """Stop the job under way at its next tick, or drop the one that waits; `on_end` is told."""
        if self.timer is None:
            self.stop.set()
        else:
            self.forget()
            self.on_end(Cancelled())

    @property
    def idle(self) -> bool:
        """Whether no job is under way or waits."""
        return self.timer is None and (self.future is None or self.future.done())

    def wait_until_done(self, seconds: float | None = None) -> None:
        """Wait for the job under way: for tests and for scripts without an event loop."""
        if self.future is not None:
            self.future.result(seconds)

    def close(self) -> None:
        """Stop, and let the thread go."""
        self.forget()
        self.pool.shutdown(wait=False, cancel_futures=True)
