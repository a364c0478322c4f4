"""Work that goes on beside the backbone's forward pass on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStream:
    """Lets batch ``i`` be worked on while the forward pass of batch ``i + 1`` runs.

    On a GPU the work is queued on a stream of its own; it may wait for its own results without holding up the forward
    pass, which was queued before. On a CPU there is nothing to overlap, and nothing is made ahead of its time.

    Args:
        device: where the batches are made.

    Example:
        >>> side = SideStream(torch.device("cpu"))
        >>> total = 0
        >>> for batch in side.ahead([[torch.ones(2)], [torch.ones(3)]]):
        ...     with side.beside(batch):
        ...         total += batch[0].sum().item()
        >>> total
        5.0
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._made: torch.cuda.Event | None = None

    def ahead(self, batches: Iterable[list[Tensor]]) -> Iterator[list[Tensor]]:
        """The batches, each handed out when the making of the next has been queued."""
        if self._stream is None:
            yield from batches
            return
        waiting: tuple[list[Tensor], torch.cuda.Event] | None = None
        for batch in batches:
            made = torch.cuda.Event()
            made.record(torch.cuda.current_stream(self._device))
            if waiting is not None:
                batch_before, self._made = waiting
                yield batch_before
            waiting = batch, made
        if waiting is not None:
            batch_before, self._made = waiting
            yield batch_before

    @contextmanager
    def beside(self, batch: Sequence[Tensor]) -> Iterator[None]:
        """Queue what is done in the block beside the forward pass, after ``batch`` was made."""
        if self._stream is None:
            yield
            return
        if self._made is not None:
            self._stream.wait_event(self._made)
        with torch.cuda.stream(self._stream):
            yield
        for tensor in batch:  # its memory must not be given to another before the work is done
            tensor.record_stream(self._stream)

    def join(self) -> None:
        """Let everything after wait for the work."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
