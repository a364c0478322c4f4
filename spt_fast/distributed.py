"""The little that is needed of torch.distributed: one process does without, torchrun brings more."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

_groups = itertools.count()
Batch = TypeVar("Batch")


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int]]:
    """Join the processes that torchrun started, for the length of the block.

    Args:
        device: CUDA devices talk over nccl, others over gloo.

    Yields:
        ``(rank, world_size)``; ``(0, 1)`` outside torchrun.
    """
    if dist.is_initialized():
        yield dist.get_rank(), dist.get_world_size()
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where nccl, and whoever asks for the current device, is to work
    store, rank, world_size = next(rendezvous("env://"))
    # Processes find each other through addresses in the store. Under the same keys a second group could be given the
    # addresses that the first left there, and processes that torchrun has started again those of the dead.
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"spt_fast/{restarts}/{next(_groups)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield rank, world_size
        dist.barrier()  # nobody hangs up while another is still busy
    finally:
        dist.destroy_process_group()


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give all processes the values that ``tensors`` have in rank 0, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            there = tensor.detach().to(transport_device())
            dist.broadcast(there, src=0)
            tensor.detach().copy_(there)


def all_reduced(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes; ``values`` itself when there is only one."""
    if world()[1] > 1:
        there = values.to(transport_device())
        dist.all_reduce(there)
        values.copy_(there)
    return values


def world() -> tuple[int, int]:
    """``(rank, world_size)`` of the group that was joined; ``(0, 1)`` without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_rank_0(make: Callable[[], Any]) -> Any:
    """What ``make`` returns in the first process, in all of them; if it raises there, the same error in all."""
    if world()[1] == 1:
        return make()
    outcome: list[Any] = [None]
    if world()[0] == 0:
        try:
            outcome = [make()]
        except Exception as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def in_step(batches: Iterable[Batch]) -> Iterator[Batch | None]:
    """The batches of this process, followed by ``None`` until every process has come to the end of its own."""
    pending = iter(batches)
    while True:
        batch = next(pending, None)
        if not gathered_numbers([batch is not None]).any():
            return
        yield batch


def gathered_numbers(numbers: Sequence[int]) -> Tensor:
    """A few whole numbers of every process: int64 ``[world_size, len(numbers)]`` on the CPU."""
    return torch.cat(gathered_rows(torch.tensor([list(numbers)])))


def gathered_rows(rows: Tensor) -> list[Tensor]:
    """``rows`` ``[R, ...]`` of every process, in the order of ranks; ``R`` may differ, the rest may not."""
    size = world()[1]
    if size == 1:
        return [rows]
    transport = transport_device()
    counts = _all_gather(torch.tensor([len(rows)], device=transport))
    most = int(max(counts))
    if most == 0:
        return [rows] * size
    # Padded to one length and sent as bytes: not every transport knows half-precision numbers.
    padded = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype, device=transport)
    padded[: len(rows)] = rows
    parts = _all_gather(padded.flatten().view(torch.uint8))
    return [
        part.view(rows.dtype).view_as(padded)[: int(count)].to(rows.device)
        for part, count in zip(parts, counts, strict=True)
    ]


def _all_gather(value: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(world()[1])]
    dist.all_gather(parts, value)
    return parts


def transport_device() -> torch.device:
    """Where tensors have to be for processes to exchange them."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
