"""``--recipe NAME``: what a recipe says becomes the defaults of a command; what was typed beside it comes first."""

from __future__ import annotations

import os
from typing import Any

from spt_fast.cli.printing import warn
from spt_fast.data import RECIPES, ImageDataset, load_dataset
from spt_fast.distributed import gathered_numbers
from spt_fast.errors import InputError, MissingFileError
from spt_fast.recipe import DatasetFacts, Recipe, explain_counts, fetch_weights, load_recipe, vtab_tasks


def apply_recipe(context: Any, value: str) -> str:
    """The callback of ``--recipe``, which is read before the other options.

    Returns:
        The transform of the images.
    """
    if value in ("auto", *RECIPES):
        return value
    recipe = load_recipe(value)
    values = {**recipe.options, "pool": recipe.pool or "timm"}
    folders = {"train": recipe.name, "sweep": f"{recipe.name}-sweep"}
    if context.info_name in folders:
        values["output"] = f"runs/{folders[context.info_name]}"
    if "num_workers" in values:
        values["workers"] = values.pop("num_workers")
    if values.get("warmup_epochs") == values.get("epochs", 0) // 10:
        del values["warmup_epochs"]  # the rule of the commands, which follows other --epochs
    several = {
        parameter.name for parameter in context.command.params if getattr(parameter, "multiple", False)
    }
    context.default_map = {
        name: recipe.search.get(name, [value]) if name in several else value for name, value in values.items()
    }
    context.obj = recipe
    return str(recipe.options["transform"])


def apply_vtab_recipe(context: Any, value: str) -> str:
    """The callback of ``vtab --recipe``: all tasks have the values of the first.

    Returns:
        What was typed.
    """
    if value:
        apply_recipe(context, f"{vtab_tasks()[0].name}-{value}")
        context.default_map["output"] = f"runs/vtab-{value}"
    return value


def chosen(context: Any) -> Recipe | None:
    """The recipe that the command was called with."""
    return context.obj if isinstance(context.obj, Recipe) else None


def weights_for(context: Any, checkpoint: str | None, pretrained: bool) -> tuple[str | None, bool]:
    """Checkpoint and ``pretrained`` for :func:`spt_fast.load_backbone`: typed, or the recipe's, fetched if need be.

    Called by all processes of a group; one of each machine fetches.

    Raises:
        InputError: nobody has released the weights of the recipe.
    """
    recipe = chosen(context)
    if recipe is None or was_given(context, "model"):
        return checkpoint, pretrained
    if checkpoint is not None:
        return checkpoint, was_given(context, "pretrained")
    if pretrained:
        return None, True
    if recipe.weights_url is None:
        raise InputError(f"--recipe {recipe.name}: its weights were not released; --checkpoint names yours")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        fetch_weights(recipe, progress=True)
    gathered_numbers([0])  # the others wait
    return str(fetch_weights(recipe)), False


def warn_of_untried(context: Any) -> None:
    """Say which values of this run are only the first try of a recipe that wants them to be searched."""
    recipe = chosen(context)
    untried = [name for name in recipe.search if not was_given(context, name)] if recipe is not None else []
    if recipe is not None and untried:
        warn(
            f"{recipe.name} leaves {', '.join(untried)} to a search (spt-fast sweep): this run takes a first try"
        )


def warn_of_counts(facts: DatasetFacts, data: str, layout: str, *opened: ImageDataset) -> None:
    """Explain where what lies on disk is not what the paper worked with (Table S1).

    Args:
        facts: what the data set should hold.
        data: the data set.
        layout: of its folder.
        *opened: splits that are open already; the name of each ends in its split.
    """
    found = {images.name.rpartition("/")[2]: (len(images), len(images.classes)) for images in opened}
    for split in {"train", "val", "test"} - found.keys():
        try:
            images = load_dataset(data, split, layout=layout)
        except (InputError, MissingFileError):
            continue  # it is not there
        found[split] = len(images), len(images.classes)
    for sentence in explain_counts(facts, found):
        warn(sentence)


def was_given(context: Any, option: str) -> bool:
    """Whether an option was typed."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"
