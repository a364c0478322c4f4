"""Launches of Triton kernels: the first of its kind goes through Triton, those like it straight to the GPU.

Before a launch Triton works out what the arguments are (types, alignment, which machine code, which shape the autotuner
found), which takes the host several times as long as the launch itself. For tensors of the same shapes, strides, dtypes
and alignment the answer is always the same, and so are the numbers that a launcher computes from them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Described(NamedTuple):
    """A launch, all but its tensors.

    Attributes:
        kernel: the kernel, or the autotuner around it.
        grid: programs, or a function from the compile-time arguments to them.
        numbers: arguments that follow the tensors.
        named: compile-time arguments, except those that the autotuner adds, and options of the compiler.
    """

    kernel: Any
    grid: Any
    numbers: tuple[float, ...]
    named: dict[str, Any]


# So many kinds of launches are remembered: more than a model has, few enough that images of ever new sizes cost no
# memory to speak of.
MOST_KINDS = 4096

_kinds: dict[Hashable, tuple[Callable[..., None], tuple[Any, ...]]] = {}


def launch(
    kind: Hashable, tensors: tuple[Tensor | None, ...], describe: Callable[[], Described | None]
) -> None:
    """Run a kernel on the current stream of the device that the first of ``tensors`` is on.

    Args:
        kind: with the tensors' shapes, strides, dtypes and alignment, all that ``describe`` depends on.
        tensors: the first arguments of the kernel.
        describe: the rest, or ``None`` if there is nothing to do; called for the first launch of a kind.
    """
    first = tensors[0]
    assert first is not None
    if not first.is_cuda:
        if (described := describe()) is not None:
            described.kernel[described.grid](*tensors, *described.numbers, **described.named)
        return
    addresses: list[int | None] = []
    facts: list[Hashable] = [kind, first.device.index]
    for tensor in tensors:
        if tensor is None:
            addresses.append(None)
            facts.append(None)
            continue
        address = tensor.data_ptr()
        addresses.append(address)
        # Triton has other machine code for addresses that are not multiples of 16.
        facts += (tensor.shape, tensor.stride(), tensor.dtype, not address % 16)
    key = tuple(facts)
    known = _kinds.get(key)
    here = first.device.index == torch.cuda.current_device()
    with nullcontext() if here else torch.cuda.device(first.device):
        if known is not None:
            run, rest = known
            run(*addresses, *rest)
            return
        if (described := describe()) is None:
            known = _nothing, ()
        else:
            compiled = described.kernel[described.grid](*tensors, *described.numbers, **described.named)
            known = _straight(compiled, described)
    if known is not None:  # a kernel that Triton has not compiled, as in its interpreter, is not
        if len(_kinds) >= MOST_KINDS:
            _kinds.clear()
        _kinds[key] = known


def _nothing(*arguments: Any) -> None:
    """What there is to do for a kind without programs."""


def _straight(compiled: Any, described: Described) -> tuple[Callable[..., None], tuple[Any, ...]] | None:
    """What launches the machine code that has just run, and all of its arguments but the tensors."""
    from triton.compiler import CompiledKernel

    if not isinstance(compiled, CompiledKernel):
        return None
    tuner = described.kernel
    kernel, chosen = tuner, {}
    if hasattr(tuner, "best_config"):
        kernel, chosen = tuner.fn, tuner.best_config.kwargs
    values = {**described.named, **chosen}
    compile_time = [values[name] for name in kernel.arg_names if name in values]
    grid = described.grid(values) if callable(described.grid) else described.grid
    return compiled[(*grid, 1, 1)[:3]], (*described.numbers, *compile_time)
