"""Reading yaml that a person wrote: what is in it is compared with what was expected, key by key."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import yaml

from spt_fast.errors import InputError, MissingFileError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # Python 3.10 has it in another place

# YAML 1.1 takes 1e-3 (no point) for text, and nobody who writes it means text.
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}


def read_yaml(path: Path | Traversable) -> dict[str, Any]:
    """The keys and values of a yaml file; nothing but plain values is ever made of it.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is not yaml, or holds no keys and values.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist or is not a file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # Odd input makes the reader raise nearly anything: YAMLError, ValueError, KeyError, RecursionError, ...
        raise InputError(f"{path} is not yaml: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold keys and values, got {type(content).__name__}")
    return content


def checked(
    values: Mapping[str, Any], kinds: Mapping[str, Any], where: str, *, required: Collection[str] = ()
) -> dict[str, Any]:
    """``values`` with numbers like ``1e-3`` as numbers, if every key is known and every value is of its kind.

    Args:
        values: what was read.
        kinds: the type of each key that there may be, as an annotation: ``int``, ``float`` (finite), ``bool``, ``str``,
            ``Literal``, a union, ``list``, ``tuple`` (a list in yaml) or ``dict`` of them, or ``Any``.
        where: what errors begin with: the file, and the key that holds ``values``, if one does.
        required: keys that must be there.

    Raises:
        InputError: an unknown or missing key, or a value of another kind.

    Example:
        >>> checked({"learning_rate": "1e-3"}, {"learning_rate": float}, "mine.yaml: options")
        {'learning_rate': 0.001}
    """
    for key in values:
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, n=1)
            hint = f"; did you mean {near[0]}?" if near else f", expected {', '.join(kinds)}"
            raise InputError(f"{where}: there is no key {key!r}{hint}")
    for key in required:
        if key not in values:
            raise InputError(f"{where}: the key {key!r} is missing")
    found = {key: with_number(value, kinds[key]) for key, value in values.items()}
    for key, value in found.items():
        if not fits(value, kinds[key]):
            raise InputError(f"{where}: {key} must be {in_words(kinds[key])}, got {value!r}")
    return found


def with_number(value: Any, kind: Any) -> Any:
    """``value``, or the number that it is the text of where ``kind`` asks for a number."""
    takes_float = kind is float or float in get_args(kind)
    return float(value) if takes_float and isinstance(value, str) and NUMBER.fullmatch(value) else value


def fits(value: Any, kind: Any) -> bool:
    """Whether ``value``, as yaml gives it, is of ``kind``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in arguments)
    if origin in (list, tuple):
        return isinstance(value, list) and all(fits(each, arguments[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(name, arguments[0]) and fits(each, arguments[1]) for name, each in value.items()
        )
    if kind is float:
        return type(value) in (int, float) and -math.inf < value < math.inf
    return type(value) is kind  # not isinstance: True is an int


def in_words(kind: Any) -> str:
    """What ``kind`` asks for, to end a sentence with."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(filter(None, [", ".join(arguments[:-1]), arguments[-1]]))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if each is type(None) else in_words(each) for each in arguments)
    if origin in (list, tuple):
        return "a list" if arguments[0] is Any else f"a list, each entry {in_words(arguments[0])}"
    if origin is dict:
        return "keys and values" if arguments[1] is Any else f"keys and values, each {in_words(arguments[1])}"
    return WORDS[kind]
