"""``spt-fast ablate``: runs that differ in one thing, in a table and a figure shaped like the paper's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from spt_fast.ablations.definitions import ABLATIONS, WITH_VALUES, Choices
from spt_fast.ablations.paper_values import DATASETS, PRETRAININGS, paper_settings
from spt_fast.ablations.running import run_ablation
from spt_fast.ablations.splits import usual_choose_split, usual_test_split
from spt_fast.ablations.variants import exact
from spt_fast.ablations.workplace import ModelSource, Workplace
from spt_fast.cli.chosen_recipe import chosen, warn_of_counts, was_given, weights_for
from spt_fast.cli.inputs import check_folder, parse_pairs
from spt_fast.cli.options import (
    CaptureOption,
    CompileOption,
    DeviceOption,
    DtypeOption,
    EpochsOption,
    JsonOption,
    LayoutOption,
    LrScaleOption,
    ModelKwargOption,
    PoolOption,
    PretrainedOption,
    RecipeOption,
    Split,
    StrictOption,
    WarmupEpochsOption,
    WorkersOption,
)
from spt_fast.cli.printing import new_table, out, print_json, say, status, warn
from spt_fast.errors import InputError
from spt_fast.machine import machine_facts
from spt_fast.progress import progress_bar
from spt_fast.recipe import Recipe
from spt_fast.training_config import TrainingConfig

Name = Literal[
    "sampling",
    "layers",
    "cross-task",
    "prompt-length",
    "prototype-fraction",
    "training-fraction",
    "model-size",
    "few-shot",
    "long-tail",
    "methods",
    "nmi",
]


def ablate(
    context: typer.Context,
    name: Annotated[Name, typer.Argument(help="Which ablation.", show_default=False)],
    model: Annotated[
        list[str],
        typer.Option("--model", help="timm model name; repeat it for model-size.", show_default=False),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data", help="Folder of images, or digits; repeat it for cross-task.", show_default=False
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for runs, table and figure; the same command goes on in it.")
    ],
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(help="Weights, as for `spt-fast train`; one for each --model.", show_default=False),
    ] = None,
    pretrained: PretrainedOption = False,
    model_kwarg: ModelKwargOption = None,
    pool: PoolOption = "timm",
    num_prompts: Annotated[
        list[int] | None,
        typer.Option(
            help="Prompt tokens per block of deep methods (as published if not given); repeat it for prompt-length."
        ),
    ] = None,
    shallow_prompts: Annotated[
        int | None, typer.Option(help="Prompt tokens of shallow methods; as published if not given.")
    ] = None,
    values: Annotated[
        str | None,
        typer.Option(
            help="What to try, separated by commas: shares for prototype-fraction and training-fraction, images a "
            "class for few-shot, how many times larger the first class is than the last for long-tail."
        ),
    ] = None,
    capture: CaptureOption = "paper",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant, with seeds 0, 1 ...")] = 3,
    epochs: EpochsOption = TrainingConfig.epochs,
    warmup_epochs: WarmupEpochsOption = None,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = TrainingConfig.batch_size,
    learning_rate: Annotated[
        float | None, typer.Option("--lr", help="Base rate of all runs; each method's own if not given.")
    ] = None,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            "--lrs",
            help="Base rates, separated by commas: each variant gets the one that is best on --val-split with seed 0.",
        ),
    ] = None,
    lr_scale: LrScaleOption = TrainingConfig.lr_scale,
    weight_decay: Annotated[float, typer.Option(help="Of the prompts.")] = TrainingConfig.weight_decay,
    head_weight_decay: Annotated[float, typer.Option(help="Of the head.")] = TrainingConfig.head_weight_decay,
    dtype: DtypeOption = "auto",
    compile: CompileOption = False,
    split: Annotated[Split, typer.Option(help="Images to train on.")] = "train",
    val_split: Annotated[
        Split | None,
        typer.Option(
            help="Images to choose --lrs on: val, or held out of --split if val is trained or judged on."
        ),
    ] = None,
    test_split: Annotated[
        Split | None, typer.Option(help="Images to judge on: test, or val if there is no test.")
    ] = None,
    images_per_class: Annotated[
        int | None, typer.Option(min=1, help="At most so many training images of a class.")
    ] = None,
    max_test_images: Annotated[
        int | None, typer.Option(min=1, help="At most so many images of --test-split.")
    ] = None,
    layout: LayoutOption = "auto",
    recipe: RecipeOption = "auto",
    paper_column: Annotated[
        str | None,
        typer.Option(
            help=f"Show the paper's numbers of this data set beside ours: {' or '.join(DATASETS)}, also as DATASET-mae "
            "...; a --recipe of one of them does so too."
        ),
    ] = None,
    device: DeviceOption = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time; the cores are shared out.")] = 1,
    workers: WorkersOption = None,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare variants that differ in one thing: each with several seeds, in a table and a figure."""
    # Imported here because it brings matplotlib.
    from spt_fast.ablations.figures import write_figures
    from spt_fast.ablations.tables import arranged, cells_of, notes_of, write_tables

    check_folder("--output", output)
    # A recipe's rate and number of prompts are for one method.
    learning_rate = learning_rate if was_given(context, "learning_rate") else None
    num_prompts = num_prompts if was_given(context, "num_prompts") else None
    if learning_rate is not None and learning_rates is not None:
        raise typer.BadParameter(
            "--lr is the rate of all runs and --lrs are rates to choose from; give one of them"
        )
    rates = (
        _numbers("--lrs", learning_rates)
        if learning_rates is not None
        else []
        if learning_rate is None
        else [learning_rate]
    )
    for option, given, ablation_name in (("--model", model, "model-size"), ("--data", data, "cross-task")):
        if len(given) > 1 and name != ablation_name:
            raise typer.BadParameter(
                f"{option} was given {len(given)} times, which only {ablation_name} can use"
            )
    tried = _values(name, values, num_prompts)
    test = test_split or usual_test_split(data[0], layout)
    choose = (val_split or usual_choose_split(split, test)) if len(rates) > 1 else None
    named = chosen(context)
    config = replace(
        _config_of(named),
        epochs=epochs,
        warmup_epochs=epochs // 10 if warmup_epochs is None else warmup_epochs,
        batch_size=batch_size,
        lr_scale=lr_scale,
        weight_decay=weight_decay,
        head_weight_decay=head_weight_decay,
        dtype=dtype,
        compile=compile,
        num_workers=workers,
    )
    checkpoints = _checkpoints(model, checkpoint)
    choices = Choices(
        num_prompts=num_prompts[0] if num_prompts and name != "prompt-length" else None,
        shallow_prompts=shallow_prompts,
        values=tuple(tried),
        data=_labels("--data", [Path(each).name or each for each in data], data),
        models=_model_labels(model, checkpoints),
    )
    ablation = ABLATIONS[name](choices)
    settings = _paper_settings(paper_column, named)
    if named is not None:
        warn_of_counts(named.dataset, data[0], layout)
    workplace = Workplace(
        models=_sources(context, model, checkpoints, pretrained, model_kwarg),
        data=tuple(data),
        output=output,
        config=config,
        split=split,
        choose_split=choose,
        test_split=test,
        images_per_class=images_per_class,
        max_test_images=max_test_images,
        pool=None if pool == "timm" else pool,
        layout=layout,
        recipe=recipe,
        strict=strict,
        capture=capture,
        device=device,
    )
    try:
        with progress_bar(status) as progress:
            finished = run_ablation(
                ablation, workplace, seeds=range(seeds), learning_rates=rates, jobs=jobs, progress=progress
            )
    except KeyboardInterrupt:
        status.print("interrupted; the same command goes on from here")
        raise  # which typer makes exit code 130
    cells = cells_of(ablation, finished, settings)
    about = {"test_split": test, "choose_split": choose, "jobs": jobs, "machine": machine_facts()["device"]}
    files = [*write_tables(output, ablation, cells, about), *write_figures(output, ablation, cells)]
    if as_json:
        print_json(
            {"output": str(output), "ablation": name, "cells": cells, "files": [str(file) for file in files]}
        )
        return
    header, rows = arranged(ablation, cells)
    table = new_table(*header)
    for column in table.columns[:2]:  # what a line is about stays readable on a narrow screen
        column.no_wrap = True
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)
    for note in notes_of(ablation, cells, about):
        say(f"- {note}")
    for file in files:
        say(str(file))


def _numbers(option: str, text: str) -> list[float]:
    """``"0.1,0.3"`` as different numbers."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} must be numbers separated by commas, got {text!r}") from None
    return _different(option, numbers)


def _different(option: str, numbers: Sequence[float]) -> list[float]:
    if len(set(numbers)) < len(numbers):
        raise InputError(f"{option} must be different numbers, got {', '.join(map(exact, numbers))}")
    return list(numbers)


def _values(name: str, values: str | None, num_prompts: Sequence[int] | None) -> list[float]:
    """What an ablation about a number tries."""
    if name == "prompt-length":
        if values is not None:
            raise typer.BadParameter(
                "prompt-length tries the numbers of --num-prompts, which may be repeated"
            )
        return _different("--num-prompts", num_prompts or ())
    if num_prompts and len(num_prompts) > 1:
        raise typer.BadParameter("--num-prompts was given several times, which only prompt-length can use")
    if values is None:
        return []
    if name not in WITH_VALUES:
        raise typer.BadParameter(f"--values are for {', '.join(WITH_VALUES[1:])}, and {name} has none")
    return _numbers("--values", values)


def _labels(option: str, *ways: Sequence[str]) -> tuple[str, ...]:
    """What tables call folders or models: the first of the ways to name them in which no two have one name."""
    for names in ways:
        name, count = Counter(names).most_common(1)[0]
        if count == 1:
            return tuple(names)
    raise InputError(f"{option} {name} was given {count} times, expected different ones")


def _model_labels(models: Sequence[str], checkpoints: Sequence[str | None]) -> tuple[str, ...]:
    """Models by their names or, where those are the same, with the files of their weights."""
    pairs = list(zip(models, checkpoints, strict=True))
    return _labels(
        "--model",
        [Path(model).name for model in models],
        [f"{model}, {Path(checkpoint).name}" if checkpoint else model for model, checkpoint in pairs],
        [f"{model}, {checkpoint}" if checkpoint else model for model, checkpoint in pairs],
    )


def _checkpoints(models: Sequence[str], given: Sequence[str] | None) -> Sequence[str | None]:
    """The weights of each model."""
    if not given:
        return [None] * len(models)
    if len(given) != len(models):
        raise typer.BadParameter(f"--checkpoint was given {len(given)} times for {len(models)} --model")
    return given


def _sources(
    context: typer.Context,
    models: Sequence[str],
    checkpoints: Sequence[str | None],
    pretrained: bool,
    model_kwarg: list[str] | None,
) -> tuple[ModelSource, ...]:
    kwargs = json.dumps(parse_pairs("--model-kwarg", model_kwarg or []))
    sources = []
    for model, checkpoint in zip(models, checkpoints, strict=True):
        checkpoint, own = weights_for(context, checkpoint, pretrained)
        if checkpoint is None and not own:
            warn(f"{model} has random weights; --checkpoint or --pretrained gives it trained ones")
        sources.append(ModelSource(model, checkpoint, own, kwargs))
    return tuple(sources)


def _config_of(recipe: Recipe | None) -> TrainingConfig:
    """What a recipe says about training that has no option here, such as the decay of a moving average."""
    said = {} if recipe is None else recipe.options
    if said.get("prompt_dropout"):
        warn(
            f"the recipe's prompt_dropout={said['prompt_dropout']} is left out: not all methods have prompts"
        )
    return TrainingConfig(
        **{each.name: said[each.name] for each in fields(TrainingConfig) if each.name in said}
    )


def _paper_settings(typed: str | None, recipe: Recipe | None) -> list[tuple[str, str]]:
    """Whose numbers of the paper are shown: those that were asked for, or the recipe's."""
    if typed is not None:
        return paper_settings(typed)
    if recipe is None or recipe.dataset.name not in DATASETS:
        return []
    pretraining = recipe.name.removeprefix(f"{recipe.dataset.name}-").split("-")[0]
    dataset = recipe.dataset.name
    return paper_settings(f"{dataset}-{pretraining}" if pretraining in PRETRAININGS else dataset)
