"""Checks of single arguments: a wrong kind or a wrong size is one sentence, whatever was passed.

All take the argument's name, for the sentence, and what came.

Example:
    >>> check_share("dropout", 1.0)
    Traceback (most recent call last):
    spt_fast.errors.InputError: dropout must be a number in [0, 1), got 1.0
"""

from __future__ import annotations

import math
from typing import Any

from spt_fast.errors import InputError


def check_whole_number(name: str, value: Any, *, at_least: int = 1) -> None:
    """Raise :class:`InputError` unless ``value`` is an ``int``, and not a ``bool``, of at least this size."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise InputError(f"{name} must be a whole number of at least {at_least}, got {value!r}")


def check_number(name: str, value: Any, *, at_least: float = -math.inf) -> None:
    """Raise :class:`InputError` unless ``value`` is a finite number, and not a ``bool``, of at least this size."""
    if not _is_number(value) or not at_least <= value or not math.isfinite(value):
        size = "" if at_least == -math.inf else f" of at least {at_least}"
        raise InputError(f"{name} must be a finite number{size}, got {value!r}")


def check_share(name: str, value: Any) -> None:
    """Raise :class:`InputError` unless ``value`` is a number from 0 to below 1, as dropout is."""
    if not _is_number(value) or not 0 <= value < 1:
        raise InputError(f"{name} must be a number in [0, 1), got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise :class:`InputError` unless ``value`` is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
