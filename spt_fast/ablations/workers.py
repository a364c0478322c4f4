"""The same function for many tasks: one after the other in this process, or in several."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """What does the tasks; :func:`workers` opens it."""

    def __init__(self, pool: Executor | None) -> None:
        self._pool = pool

    def each(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], done: Callable[[int], None]
    ) -> list[Result]:
        """What ``function`` returns for every task, in the order of the tasks.

        Args:
            function: importable by its name, with arguments and results that can be pickled; the same process gets
                several tasks, so that it may keep what it has opened.
            tasks: what to do.
            done: called with the number of finished tasks, at first with 0.
        """
        done(0)
        if self._pool is None:
            results = []
            for number, task in enumerate(tasks, start=1):
                results.append(function(task))
                done(number)
            return results
        futures = [self._pool.submit(function, task) for task in tasks]
        for number, future in enumerate(as_completed(futures), start=1):
            future.result()  # the first error ends it
            done(number)
        return [future.result() for future in futures]


@contextmanager
def workers(jobs: int) -> Iterator[Workers]:
    """Workers for the length of the block; an error in it drops what has not been begun.

    Args:
        jobs: processes, which share the cores; 1 works in this process.
    """
    if jobs == 1:
        yield Workers(None)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    # A process that has used CUDA or threads cannot be forked.
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_begin, initargs=(threads,))
    try:
        yield Workers(pool)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    # Ctrl-C reaches all processes; one that waits in vain would hold up the one that reports it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(threads)
