"""Which implementation of an op runs: asked for by argument or environment, never swapped silently."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

ENVIRONMENT_VARIABLE = "SPT_FAST_BACKEND"


class BackendError(ValueError):
    """The backend that was asked for cannot run here; the message says why."""


def anywhere(*tensors: Tensor) -> str | None:
    """Nothing speaks against any input."""
    return None


def never(*tensors: Tensor) -> bool:
    """For no input."""
    return False


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        run: called with the tensors of the op, or the module that holds the functions of its passes.
        why_not: called with the same tensors: why this implementation cannot take them here, or ``None`` if it can.
        leads: called with the same tensors, which it can take: whether it is better than those before it for these.
    """

    run: Any
    why_not: Callable[..., str | None] = anywhere
    leads: Callable[..., bool] = never


def choose_backend(op: str, backends: Mapping[str, Backend], backend: str | None, *tensors: Tensor) -> Any:
    """The implementation of ``op`` to run.

    Args:
        op: name of the op, for the message.
        backends: name -> implementation, best first.
        backend: the backend asked for; ``None`` asks the environment variable ``SPT_FAST_BACKEND``, then takes the
            best that can take ``tensors``.
        tensors: what the op was called with.

    Raises:
        BackendError: the backend that was asked for does not exist for this op (the message lists those that do), or
            cannot take these tensors here (the message says why).
    """
    asked, origin = backend, "backend="
    if asked is None:
        asked, origin = os.environ.get(ENVIRONMENT_VARIABLE) or None, f"{ENVIRONMENT_VARIABLE}="
    if asked is None:
        able = [each for each in backends.values() if each.why_not(*tensors) is None]
        return next((each for each in able if each.leads(*tensors)), able[0]).run
    if asked not in backends:
        raise BackendError(f"{origin}{asked}: {op} has no such backend; it has {', '.join(backends)}")
    reason = backends[asked].why_not(*tensors)
    if reason is not None:
        raise BackendError(f"{origin}{asked}: {op} cannot run on it here: {reason}")
    return backends[asked].run
