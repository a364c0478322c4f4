"""The points of a search: what of the configuration is tried, and how a point is called and recognised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from sklearn.model_selection import ParameterGrid, ParameterSampler

from spt_fast.arguments import check_whole_number
from spt_fast.errors import InputError
from spt_fast.training_config import TrainingConfig

# The seed is no choice between points: every point is trained with all seeds.
SEARCHABLE = (*(field.name for field in fields(TrainingConfig) if field.name != "seed"), "num_prompts")
# What leaves no trace in the result of a run.
TRACELESS = ("num_workers", "checkpoint_minutes")


@dataclass(frozen=True)
class Point:
    """One choice of hyper-parameters.

    Attributes:
        name: of its folder, from the parameters of the space.
        config: how to train; its seed is not part of the point.
        num_prompts: prompt tokens per block.
        settings: json-able record of all its hyper-parameters, also those that the space leaves alone: two points with
            equal settings are the same point.
    """

    name: str
    config: TrainingConfig
    num_prompts: int
    settings: dict[str, Any]


def points_of(
    space: Mapping[str, Sequence[Any]],
    config: TrainingConfig,
    num_prompts: int,
    *,
    trials: int | None = None,
    seed: int = 0,
) -> list[Point]:
    """The points of ``space``, in order: all of them, or ``trials`` of them drawn without repetition.

    Args:
        space: values to try by the name of a field of :class:`TrainingConfig` or ``"num_prompts"``.
        config: what the space leaves alone.
        num_prompts: if the space leaves it alone.
        trials: how many points at most; ``None`` takes all.
        seed: of the drawing.

    Raises:
        InputError: an unknown name, no values, a value twice, or one that is refused; the message names it.

    Example:
        >>> points = points_of({"num_prompts": [5, 20], "learning_rate": [0.1]}, TrainingConfig(), 20)
        >>> [point.name for point in points]
        ['learning_rate=0.1,num_prompts=5', 'learning_rate=0.1,num_prompts=20']
    """
    checked = {name: _values(name, values) for name, values in space.items()}
    if trials is not None:
        check_whole_number("trials", trials)
    # Every single value is looked at, also one that is not drawn.
    grid = ParameterGrid(checked)
    points = {_name(parameters): _point(parameters, config, num_prompts) for parameters in map(_sorted, grid)}
    if trials is None or trials >= len(grid):
        return list(points.values())
    drawn = ParameterSampler(checked, trials, random_state=seed)
    return [points[_name(_sorted(parameters))] for parameters in drawn]


def recorded_point(name: str, settings: dict[str, Any], config: TrainingConfig) -> Point:
    """A point of an earlier search from its :attr:`Point.settings`; ``config`` says what leaves no trace."""
    changes = {key: value for key, value in settings.items() if key != "num_prompts"}
    return Point(name, replace(config, **changes), settings["num_prompts"], settings)


def _values(name: str, values: Any) -> list[Any]:
    if name not in SEARCHABLE:
        raise InputError(f"space has {name!r}, expected names among {', '.join(SEARCHABLE)}")
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, (Sequence, np.ndarray)):
        raise InputError(f"space[{name!r}] must be a list of values to try, got {values!r}")
    # NumPy's numbers, from logspace for example, become Python's, which json can write.
    listed = [value.item() if isinstance(value, np.generic) else value for value in values]
    if not listed:
        raise InputError(f"space[{name!r}] is empty, expected at least one value to try")
    for index, value in enumerate(listed):
        if value in listed[:index]:
            raise InputError(f"space[{name!r}] has {value!r} twice, expected different values")
    return listed


def _point(parameters: dict[str, Any], config: TrainingConfig, num_prompts: int) -> Point:
    num_prompts = parameters.get("num_prompts", num_prompts)
    check_whole_number("num_prompts", num_prompts)
    changes = {name: value for name, value in parameters.items() if name != "num_prompts"}
    try:
        chosen = replace(config, **changes)
    except TypeError as error:  # a value that cannot even be compared with a number
        raise InputError(f"space has a value of the wrong kind among {parameters}: {error}") from None
    settings = {**asdict(chosen), "num_prompts": num_prompts}
    free = {"seed", *TRACELESS} - parameters.keys()
    settings = {name: value for name, value in settings.items() if name not in free}
    return Point(_name(parameters), chosen, num_prompts, settings)


def _sorted(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(parameters.items()))


def _name(parameters: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in parameters.items()) or "as_configured"
