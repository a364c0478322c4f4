"""``train --method NAME --init START``: which method of tuning, and what its prompts start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import typer

from spt_fast.building import Depth
from spt_fast.building import Method as Start
from spt_fast.cli.chosen_recipe import was_given
from spt_fast.cli.inputs import parse_pairs
from spt_fast.methods import Method, find_method
from spt_fast.methods.e2vpt import E2VPTViT
from spt_fast.prototypes import Prototypes

# Options that say how prompts are built or used; the second kind holds for given prompts as well.
BUILDING = ("init", "num_prompts", "depth", "layers", "data_fraction", "capture")
PROMPTING = ("prompts", "freeze_prompts", "prompt_dropout")


@dataclass(frozen=True)
class ChosenMethod:
    """What ``--method`` and its companions come to.

    Attributes:
        name: of the method of tuning.
        method: the method.
        given: the prompts of ``--prompts``.
        init: how its prompts are built; ``None``: they are given, it takes none, or it needs no start.
        depth: of its prompts.
        num_prompts: prompts per block.
        learning_rate: base rate, where none was asked for.
        options: of the model's class.
        pruning: shares of prompts and of their segments that :func:`~spt_fast.pruned_training.train_pruned` prunes from
            E2VPT; ``None``: it is trained once.
    """

    name: str
    method: Method
    given: Prototypes | None
    init: Start | None
    depth: Depth
    num_prompts: int
    learning_rate: float
    options: dict[str, Any]
    pruning: tuple[float, float] | None


def choose_method(
    context: typer.Context,
    prompts: Path | None,
    *,
    method: str,
    init: Start | None,
    depth: Depth,
    num_prompts: int | None,
    learning_rate: float | None,
    method_option: list[str] | None,
) -> ChosenMethod:
    """What was typed, where something was, then what a recipe says, then what the method was published with.

    The name of a start stands for SPT or VPT with this start.

    Args:
        context: of the command.
        prompts, method, init, depth, num_prompts, learning_rate, method_option: the options.

    Raises:
        InputError: there is no such method.
        MissingFileError, CheckpointError: no prototypes can be read from ``--prompts``.
        typer.BadParameter: options that do not go together.
    """
    taken = [name for name in BUILDING if was_given(context, name)]
    if method in get_args(Start):
        if was_given(context, "method"):
            taken.insert(0, "method")
        if was_given(context, "init"):
            raise typer.BadParameter(f"--method {method} is a start as --init is; give one of them")
        init, method = method, ""  # type: ignore[assignment]
    if prompts is not None and taken:
        raise typer.BadParameter(
            f"--prompts are prototypes already; {_option(taken[0])} says how to build them"
        )
    given = None if prompts is None else Prototypes.load(prompts)
    named = was_given(context, "method") and method != ""
    if not named and method in ("", "spt_deep"):
        if given is not None:
            depth = "deep" if len(given.values) > 1 else "shallow"
        method = f"spt_{depth}"
    found = find_method(method)
    if found.depth is None:
        taken += [name for name in PROMPTING if was_given(context, name)]
        if taken:
            raise typer.BadParameter(f"{_option(taken[0])} is for prompts, and {method} has none")
    elif named and was_given(context, "depth") and depth != found.depth:
        raise typer.BadParameter(f"--depth {depth} does not go with --method {method}; leave one out")

    def settled(name: str, value: Any, published: Any) -> Any:
        """A recipe's value is for the recipe's method: one that is named without it is trained as published."""
        return published if value is None or (named and not was_given(context, name)) else value

    options = parse_pairs("--method-option", method_option or [])
    pruning = _take_pruning(options, method, found)
    return ChosenMethod(
        method,
        found,
        given,
        None if found.depth is None or given is not None else settled("init", init, found.init),
        found.depth or depth,
        settled("num_prompts", num_prompts, found.num_prompts),
        settled("learning_rate", learning_rate, found.learning_rate),
        options,
        pruning,
    )


def _take_pruning(options: dict[str, Any], method: str, found: Method) -> tuple[float, float] | None:
    """Take the shares to prune, which are of the training and not of the model, out of the options."""
    shares = options.pop("prune_tokens", 0.0), options.pop("prune_segments", 0.0)
    if not any(shares):
        return None
    if found.model is not E2VPTViT:
        raise typer.BadParameter(f"--method-option prune_... is for e2vpt, not for {method}")
    return shares


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
