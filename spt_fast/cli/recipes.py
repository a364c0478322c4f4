"""``spt-fast recipes``: which recipes there are, and what one of them says."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer
from rich.text import Text

from spt_fast.cli.options import JsonOption
from spt_fast.cli.printing import new_table, out, print_json, say
from spt_fast.dataset_facts import DatasetFacts, dataset_facts
from spt_fast.recipe import PRETRAININGS, SIZES, Recipe, load_recipe, recipe_names


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A recipe to show, or a .yaml file of your own; lists all without it.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """With which values the paper's experiments are run, and where each value comes from."""
    if name is None:
        if as_json:
            print_json(recipe_names())
        else:
            _show_names()
        return
    recipe = load_recipe(name)
    if as_json:
        print_json(recipe.as_dict())
    else:
        _show(recipe, name)


def commands(recipe: Recipe, typed: str) -> list[list[str]]:
    """The words of the commands that train with a recipe and search with it.

    Args:
        recipe: the recipe.
        typed: its name, or the file it is in.

    Example:
        >>> commands(load_recipe("dtd-sup21k-vitb"), "dtd-sup21k-vitb")[0][:4]
        ['spt-fast', 'train', '--recipe', 'dtd-sup21k-vitb']
    """
    weights = [] if recipe.pretrained or recipe.weights_url is not None else ["--checkpoint", "FILE"]
    rest = ["--recipe", typed, *weights, "--data", "FOLDER", "--output", f"runs/{recipe.name}"]
    return [["spt-fast", command, *rest] for command in (["train", "sweep"] if recipe.search else ["train"])]


def _show_names() -> None:
    table = new_table("DATASET", "", "")
    groups: dict[str, list[DatasetFacts]] = {}
    for facts in dataset_facts().values():
        groups.setdefault(", ".join(filter(None, [facts.benchmark, facts.group])), []).append(facts)
    for group, members in groups.items():
        table.add_row(group, " ".join(facts.name for facts in members), str(len(members)))
    table.add_section()
    table.add_row("PRETRAINING", " ".join(PRETRAININGS), str(len(PRETRAININGS)))
    table.add_row("SIZE", " ".join(SIZES), str(len(SIZES)))
    out.print(table)
    say(f"{len(recipe_names())} recipes, called DATASET-PRETRAINING-SIZE, for example cub200-mae-vitb")


def _show(recipe: Recipe, typed: str) -> None:
    facts = recipe.dataset
    table = new_table("what", "value", "from")
    counts = {"train": facts.train, "val": facts.val, "test": facts.test}
    known = [f"{count:,} {split}" for split, count in counts.items() if count is not None]
    table.add_row("data set", Text(facts.title), "")
    table.add_row("images", Text(", ".join(known)), Text(facts.counts_from if known else ""))
    table.add_row("classes", f"{facts.num_classes:,}", Text(facts.counts_from))
    weights = "timm's own" if recipe.pretrained else recipe.weights_url
    untold = {key: None for key in recipe.search if key not in recipe.options}
    values = {"weights_url": weights, **recipe.options, **untold}
    del values["pretrained"]  # the weights say it
    table.add_section()
    for key, value in values.items():
        tried = ", ".join(map(_plain, recipe.search.get(key, [])))
        first = f"; first try {_plain(value)}" if key in recipe.options else ""
        shown = f"search {tried}{first}" if tried else _plain(value)
        table.add_row(key, Text(shown), Text(recipe.sources.get(key, "")))
    out.print(table)
    for note in recipe.notes:
        say(f"- {note}")
    for words in commands(recipe, typed):
        say(shlex.join(words))


def _plain(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
