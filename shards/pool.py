"""Processes that work for this one: each job in one of them, results in the order of the jobs.

They are spawned, not forked, so that no lock of another thread is copied in its locked state. They end with this
process, however it ends: they hold one end of a pipe and stop in the middle of whatever they do when the other is
gone, after `kill -9` too.
"""

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerLostError(OSError):
    """A worker ended by something else than its job."""


class Pool(contextlib.AbstractContextManager, Generic[Job, Result]):
    """A number of workers that do one thing.

    Args:
        function: job -> result, picklable with all it needs; it travels once to each worker.
        workers: processes; 1 works in this process and starts none.
    """

    def __init__(self, function: Callable[[Job], Result], workers: int) -> None:
        self._executor: Executor
        if workers == 1:
            self.at_once, self._executor, self._alive = 1, _Here(function), None
            return
        context = get_context("spawn")
        there, self._alive = context.Pipe(duplex=False)
        self.at_once = 2 * workers  # jobs in flight: one in work and one waiting for each
        self._executor = ProcessPoolExecutor(workers, context, _begin, (there, function))

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Waits for the workers; where something went wrong, they stop at once."""
        if self._alive is not None and error is not None:
            self._alive.close()
        self._executor.shutdown(cancel_futures=True)
        if self._alive is not None:
            self._alive.close()

    def submit(self, job: Job) -> "Future[Result]":
        """Hands over one job."""
        # A worker inherits the mask, so that Ctrl-C, which goes to all processes of a terminal, is ours alone.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._executor.submit(_work, job)
        except BrokenProcessPool:
            raise _lost() from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def each(self, jobs: Iterable[Job]) -> Iterator[Result]:
        """The results in order; jobs are taken as they can be worked on.

        Raises:
            WorkerLostError: a worker was killed.
            Exception: what the first job in order that failed raised.
        """
        waiting: deque[Future[Result]] = deque()
        for job in jobs:
            waiting.append(self.submit(job))
            if len(waiting) >= self.at_once:
                yield result_of(waiting.popleft())
        while waiting:
            yield result_of(waiting.popleft())


def result_of(future: "Future[Result]") -> Result:
    """What a job gave or raised.

    Raises:
        WorkerLostError: its worker was killed.
    """
    try:
        return future.result()
    except BrokenProcessPool:
        raise _lost() from None


def _lost() -> WorkerLostError:
    return WorkerLostError(
        "a worker was killed, by want of memory or by hand; the same command goes on, with fewer --workers in less"
    )


class _Here(Executor):
    """This process."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def submit(self, work: object, job: Any) -> "Future[Any]":  # type: ignore[override]
        future: Future[Any] = Future()
        try:
            future.set_result(self.function(job))
        except Exception as error:
            future.set_exception(error)
        return future


_function: Callable[[Any], Any]  # of this worker


def _begin(alive: Connection, function: Callable[[Any], Any]) -> None:
    """In a worker, first."""
    global _function  # noqa: PLW0603 - an initializer has no other way
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    _function = function


def _end_with(alive: Connection) -> None:
    alive.poll(None)  # nothing is ever sent: it returns when the other end is gone
    os._exit(1)


def _work(job: Any) -> Any:
    return _function(job)
