"""``spt-fast sweep`` and ``spt-fast vtab``: hyper-parameters chosen on the validation split, test looked at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from rich.text import Text
from timm.models.vision_transformer import VisionTransformer

from spt_fast.backbones import image_settings
from spt_fast.cli.chosen_recipe import apply_vtab_recipe, chosen, warn_of_counts, weights_for
from spt_fast.cli.inputs import check_folder, open_backbone, open_images
from spt_fast.cli.options import (
    CaptureOption,
    CheckpointBlocksOption,
    CheckpointOption,
    CompileOption,
    DataOption,
    DepthOption,
    DeviceOption,
    DtypeOption,
    EpochsOption,
    FractionOption,
    FreezePromptsOption,
    JsonOption,
    LayersOption,
    LayoutOption,
    LrScaleOption,
    MethodOption,
    ModelKwargOption,
    ModelOption,
    PoolOption,
    PretrainedOption,
    PromptDropoutOption,
    RecipeOption,
    StrictOption,
    WarmupEpochsOption,
    WeightDtypeOption,
    WorkersOption,
)
from spt_fast.cli.printing import new_table, out, print_json, report_skipped, say, status
from spt_fast.data import ImageDataset, load_dataset
from spt_fast.dataset_facts import dataset_facts
from spt_fast.devices import choose_device
from spt_fast.distributed import process_group
from spt_fast.progress import Progress, progress_bar
from spt_fast.sweep import Images, SweepResult
from spt_fast.sweep import sweep as run_sweep
from spt_fast.training_config import TrainingConfig
from spt_fast.vtab import VtabResult, find_tasks, run_vtab

# What may be given several times.
REPEATABLE = (
    "learning_rate",
    "weight_decay",
    "head_weight_decay",
    "batch_size",
    "label_smoothing",
    "mixup",
    "ema_decay",
    "num_prompts",
)

OutputOption = Annotated[
    Path, typer.Option(help="Folder for runs, adapters and results; the same command goes on in it.")
]
LearningRatesOption = Annotated[
    list[float] | None,
    typer.Option(
        "--lr", help=f"Base rate; repeat it to try several. Default: {TrainingConfig.learning_rate}."
    ),
]
WeightDecaysOption = Annotated[
    list[float] | None,
    typer.Option(
        "--weight-decay",
        help=f"Of the prompts; repeat it to try several. Default: {TrainingConfig.weight_decay}.",
    ),
]
HeadWeightDecaysOption = Annotated[
    list[float] | None,
    typer.Option(
        "--head-weight-decay",
        help=f"Of the head; repeat it to try several. Default: {TrainingConfig.head_weight_decay}.",
    ),
]
BatchSizesOption = Annotated[
    list[int] | None,
    typer.Option(
        "--batch-size",
        help=f"Images per step and process; repeat it to try several. Default: {TrainingConfig.batch_size}.",
    ),
]
LabelSmoothingsOption = Annotated[
    list[float] | None,
    typer.Option("--label-smoothing", help="Of the cross-entropy; repeat it to try several. Default: 0."),
]
MixupsOption = Annotated[
    list[float] | None,
    typer.Option("--mixup", help="Alpha of mixup; repeat it to try several. Default: 0, which is off."),
]
EmaDecaysOption = Annotated[
    list[float] | None,
    typer.Option("--ema-decay", help="Decay of a moving average of the weights; repeat it to try several."),
]
NumPromptsToTryOption = Annotated[
    list[int] | None,
    typer.Option("--num-prompts", help="Prompt tokens per block; repeat it to try several. Default: 20."),
]
SeedsOption = Annotated[
    list[int] | None,
    typer.Option(
        "--seed", min=0, help="Repeat it to train every point with several: mean and deviation. Default: 0."
    ),
]
TrialsOption = Annotated[
    int | None, typer.Option(min=1, help="Try only so many points, drawn at random, instead of all.")
]
SharedImagesOption = Annotated[
    Path | None,
    typer.Option(
        "--image-cache",
        help="Folder for decoded images, which other runs can share; OUTPUT/images if not given.",
        show_default=False,
    ),
]
VtabRecipeOption = Annotated[
    str,
    typer.Option(
        help="What a recipe's name says of the backbone, such as mae-vitb; its values become the defaults here.",
        callback=apply_vtab_recipe,
        is_eager=True,
        show_default=False,
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Start over, whatever is in OUTPUT.")]


def sweep(
    context: typer.Context,
    model: ModelOption,
    data: DataOption,
    output: OutputOption,
    learning_rate: LearningRatesOption = None,
    weight_decay: WeightDecaysOption = None,
    head_weight_decay: HeadWeightDecaysOption = None,
    num_prompts: NumPromptsToTryOption = None,
    batch_size: BatchSizesOption = None,
    label_smoothing: LabelSmoothingsOption = None,
    mixup: MixupsOption = None,
    ema_decay: EmaDecaysOption = None,
    seed: SeedsOption = None,
    trials: TrialsOption = None,
    checkpoint: CheckpointOption = None,
    pretrained: PretrainedOption = False,
    model_kwarg: ModelKwargOption = None,
    weight_dtype: WeightDtypeOption = None,
    method: MethodOption = "kmeans",
    depth: DepthOption = "deep",
    layers: LayersOption = "same",
    data_fraction: FractionOption = 1.0,
    capture: CaptureOption = "paper",
    pool: PoolOption = "timm",
    freeze_prompts: FreezePromptsOption = False,
    prompt_dropout: PromptDropoutOption = 0.0,
    checkpoint_blocks: CheckpointBlocksOption = False,
    epochs: EpochsOption = TrainingConfig.epochs,
    warmup_epochs: WarmupEpochsOption = None,
    lr_scale: LrScaleOption = TrainingConfig.lr_scale,
    dtype: DtypeOption = TrainingConfig.dtype,
    compile: CompileOption = False,
    layout: LayoutOption = "auto",
    recipe: RecipeOption = "auto",
    image_cache: SharedImagesOption = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    strict: StrictOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Try hyper-parameters, choose the best on val, train it on train + val and score it once on test."""
    asked = SimpleNamespace(**locals())
    arguments = _library_arguments(asked)
    # What every search ends with must be there before anything is decoded.
    trainval, _ = (load_dataset(data, split, layout=layout) for split in ("trainval", "test"))
    transform = trainval.recipe if recipe == "auto" else recipe
    with process_group(choose_device(device)), _as_far_as_it_got(), progress_bar(status) as progress:
        backbone = _backbone(context, asked)
        named = chosen(context)
        if named is not None:
            warn_of_counts(named.dataset, data, layout)
        found = run_sweep(
            backbone,
            _images_of(asked, data, backbone, transform, progress),
            output=output,
            metadata=_metadata(transform, backbone),
            progress=progress,
            **arguments,
        )
    _report_skipped(found.skipped)
    if as_json:
        print_json({"output": str(output), **found.summary(), "points": found.points})
    else:
        _show_sweep(found)


def vtab(
    context: typer.Context,
    model: ModelOption,
    data: Annotated[Path, typer.Option(help="Folder of the folders of VTAB-1k tasks.")],
    output: OutputOption,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task, such as dtd; repeat it for several. Default: all 19.", show_default=False),
    ] = None,
    learning_rate: LearningRatesOption = None,
    weight_decay: WeightDecaysOption = None,
    head_weight_decay: HeadWeightDecaysOption = None,
    num_prompts: NumPromptsToTryOption = None,
    batch_size: BatchSizesOption = None,
    label_smoothing: LabelSmoothingsOption = None,
    mixup: MixupsOption = None,
    ema_decay: EmaDecaysOption = None,
    seed: SeedsOption = None,
    trials: TrialsOption = None,
    checkpoint: CheckpointOption = None,
    pretrained: PretrainedOption = False,
    model_kwarg: ModelKwargOption = None,
    weight_dtype: WeightDtypeOption = None,
    method: MethodOption = "kmeans",
    depth: DepthOption = "deep",
    layers: LayersOption = "same",
    data_fraction: FractionOption = 1.0,
    capture: CaptureOption = "paper",
    pool: PoolOption = "timm",
    freeze_prompts: FreezePromptsOption = False,
    prompt_dropout: PromptDropoutOption = 0.0,
    checkpoint_blocks: CheckpointBlocksOption = False,
    epochs: EpochsOption = TrainingConfig.epochs,
    warmup_epochs: WarmupEpochsOption = None,
    lr_scale: LrScaleOption = TrainingConfig.lr_scale,
    dtype: DtypeOption = TrainingConfig.dtype,
    compile: CompileOption = False,
    layout: LayoutOption = "auto",
    recipe: VtabRecipeOption = "",
    image_cache: SharedImagesOption = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    strict: StrictOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sweep the tasks of VTAB-1k and report them as the paper does: each task, each group, the mean of the groups."""
    asked = SimpleNamespace(**locals())
    arguments = _library_arguments(asked)
    folders = find_tasks(data, task)  # before the backbone is loaded
    with process_group(choose_device(device)), _as_far_as_it_got(), progress_bar(status) as progress:
        for name, folder in folders.items():
            warn_of_counts(dataset_facts()[name], str(folder), layout)
        backbone = _backbone(context, asked)
        found = run_vtab(
            backbone,
            data,
            lambda folder: _images_of(asked, str(folder), backbone, "vtab", progress),
            output=output,
            tasks=task,
            metadata=_metadata("vtab", backbone),
            progress=progress,
            **arguments,
        )
    _report_skipped(*(row["skipped"] for row in found.tasks))
    if as_json:
        print_json({"output": str(output), **found.as_dict()})
    else:
        _show_vtab(found)


def _library_arguments(asked: SimpleNamespace) -> dict[str, Any]:
    """What both commands ask of :func:`spt_fast.sweep.sweep`."""
    check_folder("--output", asked.output)
    if asked.image_cache is not None:
        check_folder("--image-cache", asked.image_cache)
    given = {name: getattr(asked, name) for name in REPEATABLE}
    return {
        # An option that is given once is a part of the space too: it may be given twice when the search goes on.
        "space": {name: values for name, values in given.items() if values},
        "seeds": asked.seed or [0],
        "trials": asked.trials,
        "config": TrainingConfig(
            epochs=asked.epochs,
            warmup_epochs=asked.epochs // 10 if asked.warmup_epochs is None else asked.warmup_epochs,
            lr_scale=asked.lr_scale,
            dtype=asked.dtype,
            compile=asked.compile,
            num_workers=asked.workers,
        ),
        "start": {
            name: getattr(asked, name) for name in ("method", "depth", "layers", "data_fraction", "capture")
        },
        "model": {
            "pool": None if asked.pool == "timm" else asked.pool,
            "train_prompts": not asked.freeze_prompts,
            "prompt_dropout": asked.prompt_dropout,
            "checkpoint_blocks": asked.checkpoint_blocks,
        },
        "overwrite": asked.overwrite,
    }


def _backbone(context: typer.Context, asked: SimpleNamespace) -> VisionTransformer:
    seed = (asked.seed or [0])[0]
    return open_backbone(
        asked.model,
        *weights_for(context, asked.checkpoint, asked.pretrained),
        asked.model_kwarg,
        asked.device,
        seed,
        asked.weight_dtype,
    )


def _images_of(
    asked: SimpleNamespace, data: str, backbone: VisionTransformer, recipe: str, progress: Progress
) -> Images:
    """Opens the splits of ``data``; those that every run reads again and again are decoded once."""
    cache = asked.image_cache or asked.output / "images"

    def images(split: str, train: bool) -> ImageDataset:
        kept = cache if train or split == "val" else None
        return open_images(
            data,
            split,
            backbone,
            asked.layout,
            recipe,
            asked.strict,
            train=train,
            image_cache=kept,
            workers=asked.workers,
            progress=progress,
        )

    return images


def _metadata(recipe: str, backbone: VisionTransformer) -> dict[str, Any]:
    """What the adapters have to know of the images that they judge."""
    return {"images": {"recipe": recipe, **image_settings(backbone)}}


@contextmanager
def _as_far_as_it_got() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        status.print("interrupted; the same command goes on from here, without --overwrite if it has that")
        raise  # which typer makes exit code 130


def _report_skipped(*skipped: dict[str, int]) -> None:
    for stage in ("training", "test"):
        report_skipped(stage, sum(counts[stage] for counts in skipped))


def _show_sweep(found: SweepResult) -> None:
    if len(found.points) > 1:
        table = new_table(*found.parameters, "val accuracy", "")
        for row in found.points:
            judged = _accuracy(row["val_accuracy_mean"], row["val_accuracy_std"])
            remark = "best" if row["point"] == found.point else row["failure"] or ""
            table.add_row(*(Text(str(row[name])) for name in found.parameters), judged, Text(remark))
        out.print(table)
    seeds = f" over {len(found.seeds)} seeds" if len(found.seeds) > 1 else ""
    say(f"test accuracy {_accuracy(found.test_accuracy_mean, found.test_accuracy_std)}{seeds}")
    for adapter in found.adapters:
        say(str(found.output / adapter))


def _show_vtab(found: VtabResult) -> None:
    table = new_table("task", "group", "test accuracy")
    for row in found.tasks:
        accuracy = _accuracy(row["test_accuracy_mean"], row["test_accuracy_std"])
        table.add_row(row["title"], row["group"], accuracy)
    table.add_section()
    for group, mean in found.groups.items():
        if mean is not None:
            table.add_row(f"mean of {group}", group, _accuracy(mean, None))
    if found.mean is not None:
        table.add_row("mean of the groups", "", _accuracy(found.mean, None))
    out.print(table)


def _accuracy(mean: float | None, std: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.2%}" if std is None else f"{mean:.2%} ± {100 * std:.2f}"
