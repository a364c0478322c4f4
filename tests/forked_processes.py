"""Processes that start at once: forked from one that has imported everything and done nothing.

Another Python takes seconds to import torch; and autograd does not run in forks of a process that has used it.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from typing import Any
from unittest import mock

import torch
from training_cases import child_environment

import spt_fast  # noqa: F401  # for those who are forked

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["forked_processes"])
CALLS = itertools.count()


def start(target: Callable[..., None], *arguments: Any, world_size: int = 1) -> list[ForkServerProcess]:
    """Start ``target(*arguments)`` in ``world_size`` processes that know of each other as those of torchrun do."""
    port = free_port()
    with mock.patch.dict(os.environ, child_environment()):  # Python 3.11 does not tell it where modules are
        forkserver.ensure_running()
    processes = []
    for rank in range(world_size):
        processes.append(FORKS.Process(target=_run, args=(rank, world_size, port, target, arguments)))
        processes[-1].start()
    return processes


def free_port() -> int:
    """A port for processes to meet at.

    Of those that the system itself would name, another test's connection may take it before it is listened to. These
    are below them, and each process of tests asks for others first.
    """
    first, calls = 10_000 + 100 * (os.getpid() % 200), next(CALLS)
    for each in range(100):
        port = first + (calls + each) % 100
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port from {first} to {first + 99} is free")


def finish(processes: list[ForkServerProcess], timeout: float = 300) -> list[int | None]:
    """Wait for all and return their exit codes; if one fails the others are killed, since they may wait for it."""
    while running := [process for process in processes if process.exitcode is None]:
        ended = connection.wait([process.sentinel for process in running], timeout)
        if not ended or any(process.exitcode for process in processes):
            for process in running:
                process.kill()
                process.join()
    return [process.exitcode for process in processes]


def run_together(target: Callable[[Any], None], argument: Any, world_size: int) -> None:
    """Run ``target(argument)`` in processes that know of each other; all must succeed."""
    errors = FORKS.SimpleQueue()
    codes = finish(start(_reporting, errors, target, argument, world_size=world_size))
    assert codes == [0] * world_size, errors.get() if not errors.empty() else codes


def _run(rank: int, world_size: int, port: int, target: Callable[..., None], arguments: Any) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        values = (str(rank), str(rank), str(world_size), "127.0.0.1", str(port))
        os.environ.update(zip(names, values, strict=True))
    target(*arguments)


def _reporting(errors: Any, target: Callable[[Any], None], argument: Any) -> None:
    try:
        target(argument)
    except BaseException:
        errors.put(traceback.format_exc())
        raise
