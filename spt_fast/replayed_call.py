"""A function of tensors that a GPU repeats by itself: one launch for all of its kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class ReplayedCall:
    """Calls a function a few times, then records it as a CUDA graph and replays that.

    Every call is carried out once, recorded or not. The function must be made for it: it takes tensors whose shapes
    and dtypes never change, never waits for the device, and leaves its results in tensors that it owns.

    Args:
        function: what to call.
        device: the CUDA device it works on.

    Warns:
        RuntimeWarning: the function cannot be recorded; it goes on being called.
    """

    # So often the function is called first: it compiles, tunes and allocates, none of which can be recorded.
    WARM_UP = 3

    def __init__(self, function: Callable[..., None], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._inputs: tuple[Tensor, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0
        self._refused = False

    def __call__(self, *tensors: Tensor) -> None:
        self._calls += 1
        if self._graph is None and self._calls > self.WARM_UP and not self._refused:
            self._record(tensors)
        if self._graph is None:
            self._call_beside(tensors)
            return
        for kept, given in zip(self._inputs, tensors, strict=True):
            kept.copy_(given, non_blocking=True)
        self._graph.replay()

    def _call_beside(self, tensors: tuple[Tensor, ...]) -> None:
        """On the stream that will record: what the function allocates for good belongs to it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._function(*tensors)
        for tensor in tensors:
            tensor.record_stream(self._stream)
        current.wait_stream(self._stream)

    def _record(self, tensors: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(tensor.clone() for tensor in tensors)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (of a loader) may use the device meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._function(*self._inputs)
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            warnings.warn(
                f"the step could not be recorded as a CUDA graph and is launched kernel by kernel: {reason}",
                RuntimeWarning,
                stacklevel=4,
            )
            self._refused = True
            return
        self._graph = graph
