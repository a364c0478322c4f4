"""``train --method NAME --init START``: which method of tuning, and what its prompts start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import typer

from spt_fast.arguments import check_share
from spt_fast.building import Depth
from spt_fast.building import Method as Start
from spt_fast.cli.chosen_recipe import was_given
from spt_fast.cli.inputs import parse_pairs
from spt_fast.errors import InputError
from spt_fast.methods import Method, find_method, options_of
from spt_fast.methods.e2vpt import E2VPTViT
from spt_fast.prototypes import Prototypes

# Options that say how prompts are built or used; the second kind holds for given prompts as well.
BUILDING = ("init", "num_prompts", "depth", "layers", "data_fraction", "capture")
PROMPTING = ("prompts", "freeze_prompts", "prompt_dropout")
# Options of methods that --method-option leaves to an option of the command.
ELSEWHERE = {
    "checkpoint_blocks": "--checkpoint-blocks",
    "train_prompts": "--freeze-prompts",
    "prompt_dropout": "--prompt-dropout",
}
PRUNING = ("prune_tokens", "prune_segments")


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
        InputError: there is no such method, or a ``method_option`` is none of it.
        MissingFileError, CheckpointError: no prototypes can be read from ``--prompts``.
        typer.BadParameter: options that do not go together.
    """
    taken = [name for name in BUILDING if was_given(context, name)]
    named_start = method in get_args(Start)
    if named_start:
        if was_given(context, "method"):
            taken.insert(0, "method")
        if was_given(context, "init"):
            raise typer.BadParameter(f"--method {method} is a start as --init is; give one of them")
        init = method  # type: ignore[assignment]
    if prompts is not None and taken:
        raise typer.BadParameter(
            f"--prompts are prototypes already; {_option(taken[0])} says how to build them"
        )
    given = None if prompts is None else Prototypes.load(prompts)
    named = was_given(context, "method") and not named_start
    if named_start or (not named and method == "spt_deep"):
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
    _check_options(options, method, found)
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
    if found.model is not E2VPTViT and options.keys() & set(PRUNING):
        raise typer.BadParameter(f"--method-option prune_... is for e2vpt, not for {method}")
    for name in options.keys() & set(PRUNING):
        check_share(f"--method-option {name}", options[name])
    tokens, segments = (options.pop(name, 0.0) for name in PRUNING)
    return (tokens, segments) if tokens or segments else None


def _check_options(options: dict[str, Any], method: str, found: Method) -> None:
    """Every name is one of the method's own, and none of those that have an option of the command."""
    own = options_of(method)
    for name in options:
        if name not in own:
            there = [each for each in own if each not in ELSEWHERE]
            there += PRUNING if found.model is E2VPTViT else ()
            raise InputError(
                f"--method-option {name} is no option of {method}; it has {', '.join(there) or 'none'}"
            )
        if name in ELSEWHERE:
            raise InputError(f"--method-option {name} has an option of its own, {ELSEWHERE[name]}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
