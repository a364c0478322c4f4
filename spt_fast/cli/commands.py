"""The commands: each turns its options into calls of the library and prints what came of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text

import spt_fast
from spt_fast.backbones import image_settings
from spt_fast.cli.bench import BenchmarkGroup
from spt_fast.cli.inputs import (
    build_from,
    check_folder,
    open_backbone,
    open_images,
    open_tasks,
    open_trained,
    parse_bytes,
    start_of_run,
    warn_of_other_backbone,
)
from spt_fast.cli.options import (
    AdapterOption,
    AdaptersOption,
    CaptureOption,
    CheckpointMinutesOption,
    CheckpointOption,
    DataOption,
    DepthOption,
    DeviceOption,
    FractionOption,
    JsonOption,
    LayersOption,
    LayoutOption,
    MethodOption,
    ModelKwargOption,
    ModelOption,
    MovedCheckpointOption,
    NumPromptsListOption,
    NumPromptsOption,
    PoolChoice,
    PretrainedOption,
    RecipeOption,
    ResumeOption,
    SeedOption,
    Split,
    StrictOption,
    TokenBudgetOption,
    TokenCacheOption,
    WeightDtypeOption,
    WorkersOption,
)
from spt_fast.cli.printing import (
    fail,
    is_first,
    new_table,
    out,
    print_json,
    report_skipped,
    say,
    show,
    status,
    warn,
)
from spt_fast.data import load_dataset, read_image
from spt_fast.devices import choose_device
from spt_fast.errors import InputError, SptFastError
from spt_fast.evaluation import evaluate
from spt_fast.kernels import BackendError
from spt_fast.machine import machine_facts
from spt_fast.optimizer import LearningRateScale
from spt_fast.progress import progress_bar
from spt_fast.training_config import Dtype, TrainingConfig

# Rows of a batch of `predict`: enough to keep a processor busy, few enough for any memory.
PREDICTED_AT_ONCE = 64

app = typer.Typer(
    name="spt-fast",
    help="Self-Prompt Tuning of frozen vision transformers: from a folder of images to a trained adapter.",
    epilog="Example: `spt-fast demo`",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.out(f"spt-fast {spt_fast.__version__}", highlight=False)
        raise typer.Exit


app.add_typer(
    typer.Typer(cls=BenchmarkGroup),
    name="bench",
    help="Measure: the benchmarks of a source checkout.",
    epilog="Example: `spt-fast bench attention --device cpu`",
    no_args_is_help=True,
)


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Example: `spt-fast prototypes --model vit_base_patch16_224 --checkpoint mae.pth --data birds/ "
    "--num-prompts 20 --output prompts.safetensors`"
)
def prototypes(
    model: ModelOption,
    data: DataOption,
    output: Annotated[
        Path,
        typer.Option(
            help="Safetensors file to write; with several --num-prompts, {num_prompts} stands for the number."
        ),
    ],
    checkpoint: CheckpointOption = None,
    pretrained: PretrainedOption = False,
    model_kwarg: ModelKwargOption = None,
    weight_dtype: WeightDtypeOption = None,
    num_prompts: NumPromptsListOption = None,
    method: MethodOption = "kmeans",
    depth: DepthOption = "deep",
    layers: LayersOption = "same",
    data_fraction: FractionOption = 1.0,
    capture: CaptureOption = "paper",
    token_budget: TokenBudgetOption = "auto",
    token_cache: TokenCacheOption = None,
    checkpoint_minutes: CheckpointMinutesOption = 1.0,
    split: Annotated[Split, typer.Option(help="Which images to look at.")] = "train",
    layout: LayoutOption = "auto",
    recipe: RecipeOption = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    strict: StrictOption = False,
    resume: ResumeOption = False,
    export_released: Annotated[
        Path | None,
        typer.Option(help="Also write depth_{i}.txt files for the authors' code into this folder."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Build the vectors prompts start from out of a folder's own patch tokens."""
    numbers = num_prompts or [20]
    paths = {number: Path(str(output).replace("{num_prompts}", str(number))) for number in numbers}
    if len(set(paths.values())) < len(numbers):
        raise InputError(
            f"--output must contain {{num_prompts}}, and --num-prompts differ, for {len(numbers)} files, got {output}"
        )
    if export_released is not None and len(numbers) > 1:
        raise InputError(
            "--export-released writes one set of prototypes, and several --num-prompts were given"
        )
    for path in paths.values():
        if path.is_dir():
            raise InputError(f"--output {path} is a folder, expected a file to write")
        check_folder("--output", path.parent)
    if export_released is not None:
        check_folder("--export-released", export_released)
    if token_cache is not None:
        check_folder("--token-cache", token_cache)
    backbone = open_backbone(model, checkpoint, pretrained, model_kwarg, device, seed, weight_dtype)
    images = open_images(data, split, backbone, layout, recipe, strict, train=False)
    unfinished = output.with_name(output.name + ".partial")
    with _resumable(unfinished):
        built, skipped = build_from(
            backbone,
            images,
            num_prompts=numbers,
            method=method,
            depth=depth,
            layers=layers,
            data_fraction=data_fraction,
            capture=capture,
            token_budget=parse_bytes("--token-budget", token_budget),
            token_cache=token_cache,
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            checkpoint=unfinished,
            checkpoint_minutes=checkpoint_minutes,
            resume=resume,
        )
    results = []
    for number, each in built.items():
        if is_first:
            each.save(paths[number])
            if export_released is not None:
                each.export_released(export_released)
        result = {
            "output": str(paths[number]),
            "shape": list(each.values.shape),
            "method": method,
            "images": each.metadata.get("images", 0),
            "skipped": skipped,
            "tokens_per_block": each.metadata.get("tokens", 0),
            "tokens_kept": each.metadata.get("tokens_kept"),
            "inertia": None if each.inertia is None else each.inertia.tolist(),
            "seconds": each.metadata["seconds"],
        }
        results.append(result)
    if as_json and len(results) > 1:
        print_json(results)
    else:
        for result in results:
            show(result, as_json)


@app.command(
    epilog="Example: `spt-fast train --model vit_base_patch16_224 --checkpoint mae.pth --pool avg --data birds/ "
    "--output runs/birds`"
)
def train(
    context: typer.Context,
    model: ModelOption,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Folder for adapters, metrics and the state of training.")],
    checkpoint: CheckpointOption = None,
    pretrained: PretrainedOption = False,
    model_kwarg: ModelKwargOption = None,
    weight_dtype: WeightDtypeOption = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prototypes from `spt-fast prototypes`, instead of building them now.")
    ] = None,
    method: MethodOption = "kmeans",
    num_prompts: NumPromptsOption = 20,
    depth: DepthOption = "deep",
    layers: LayersOption = "same",
    data_fraction: FractionOption = 1.0,
    capture: CaptureOption = "paper",
    pool: Annotated[
        PoolChoice,
        typer.Option(help="What the head sees; timm: the model's own pooling. MAE is used with avg."),
    ] = "timm",
    freeze_prompts: Annotated[
        bool, typer.Option("--freeze-prompts", help="Train the head alone (Table 4a).")
    ] = False,
    prompt_dropout: Annotated[float, typer.Option(help="Dropout on prompts.")] = 0.0,
    checkpoint_blocks: Annotated[
        bool, typer.Option("--checkpoint-blocks", help="Less memory, for a second forward pass.")
    ] = False,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = TrainingConfig.epochs,
    warmup_epochs: Annotated[
        int | None, typer.Option(help="Linear warm-up; a tenth of the epochs if not given.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per step and process.")] = TrainingConfig.batch_size,
    learning_rate: Annotated[float, typer.Option("--lr", help="Base rate.")] = TrainingConfig.learning_rate,
    lr_scale: Annotated[
        LearningRateScale,
        typer.Option(help="rms: scale each block's prompt rate by the size of its start; none: the paper."),
    ] = TrainingConfig.lr_scale,
    weight_decay: Annotated[float, typer.Option(help="Of the prompts.")] = TrainingConfig.weight_decay,
    head_weight_decay: Annotated[float, typer.Option(help="Of the head.")] = TrainingConfig.head_weight_decay,
    label_smoothing: Annotated[float, typer.Option(help="Of the cross-entropy.")] = 0.0,
    mixup: Annotated[float, typer.Option(help="Alpha of mixup; 0 is off.")] = 0.0,
    ema_decay: Annotated[float | None, typer.Option(help="Decay of a moving average of the weights.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the frozen weights and activations.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
    split: Annotated[Split, typer.Option(help="Images to train on.")] = "train",
    val_split: Annotated[Split, typer.Option(help="Images to validate on.")] = "val",
    validate: Annotated[
        bool, typer.Option("--validate/--no-validate", help="Look at --val-split at all.")
    ] = True,
    layout: LayoutOption = "auto",
    recipe: RecipeOption = "auto",
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    strict: StrictOption = False,
    resume: ResumeOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in OUTPUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train prompts and head on a folder of images, the backbone staying frozen."""
    wanted_start: dict[str, Any] = {
        "method": method,
        "num_prompts": num_prompts,
        "depth": depth,
        "layers": layers,
        "data_fraction": data_fraction,
        "capture": capture,
    }
    typed = [name for name in wanted_start if _was_given(context, name)]
    if prompts is not None and typed:
        option = "--" + typed[0].replace("_", "-")
        raise typer.BadParameter(f"--prompts are prototypes already; {option} says how to build them")
    if resume and overwrite:
        raise typer.BadParameter("--resume goes on with the earlier run and --overwrite replaces it")
    config = TrainingConfig(
        epochs=epochs,
        warmup_epochs=epochs // 10 if warmup_epochs is None else warmup_epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scale=lr_scale,
        weight_decay=weight_decay,
        head_weight_decay=head_weight_decay,
        label_smoothing=label_smoothing,
        mixup=mixup,
        ema_decay=ema_decay,
        dtype=dtype,
        compile=compile,
        seed=seed,
        num_workers=workers,
    )
    check_folder("--output", output)
    if (output / "config.json").exists() and not (resume or overwrite):
        raise InputError(
            f"--output {output} already holds a run; --resume it, --overwrite it or name another folder"
        )
    backbone = open_backbone(model, checkpoint, pretrained, model_kwarg, device, seed, weight_dtype)
    train_images = open_images(data, split, backbone, layout, recipe, strict, train=True)
    val_images = (
        open_images(data, val_split, backbone, layout, recipe, strict, train=False) if validate else None
    )

    given = None if prompts is None else spt_fast.Prototypes.load(prompts)

    def prompted(start: spt_fast.Prototypes | torch.Tensor) -> spt_fast.PromptedViT:
        torch.manual_seed(seed)
        return spt_fast.PromptedViT(
            backbone,
            start,
            num_classes=len(train_images.classes),
            pool=None if pool == "timm" else pool,
            train_prompts=not freeze_prompts,
            prompt_dropout=prompt_dropout,
            checkpoint_blocks=checkpoint_blocks,
        )

    def build() -> spt_fast.Prototypes:
        images = open_images(data, split, backbone, layout, recipe, strict, train=False)
        built, _ = build_from(
            backbone,
            images,
            **{**wanted_start, "num_prompts": [num_prompts]},
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            checkpoint=output / "prompts.partial",
            resume=resume,
        )
        return built[num_prompts]

    # Options that do not go together are found here, not after the prototypes have been built.
    prompted(given or torch.zeros(1, 1, backbone.embed_dim))
    with _resumable(output / "prompts.partial", output / "prompts.safetensors"):
        start = start_of_run(output, given, {**wanted_start, "seed": seed}, build, resume=resume)
        warn_of_other_backbone(start, backbone)
        chosen_recipe = train_images.recipe if recipe == "auto" else recipe
        with progress_bar(status) as progress:
            trained = spt_fast.train(
                prompted(start),
                train_images,
                val_images,
                output=output,
                config=config,
                resume=resume,
                overwrite=overwrite,
                metadata={
                    "start": start.metadata,
                    "images": {"recipe": chosen_recipe, **image_settings(backbone)},
                },
                progress=progress,
            )
    report_skipped("training", trained.skipped)
    result = {
        "output": str(output),
        "best_accuracy": trained.best_accuracy,
        "best_epoch": trained.best_epoch,
        "final_accuracy": trained.metrics[-1]["val_accuracy"],
        "final_train_loss": trained.metrics[-1]["train_loss"],
        "train_seconds": trained.train_seconds,
        "skipped": trained.skipped,
    }
    show(result, as_json)


@app.command(
    "eval", epilog="Example: `spt-fast eval --adapter runs/birds/best.safetensors --data birds/ --split test`"
)
def evaluate_adapter(
    adapter: AdapterOption,
    data: DataOption,
    split: Annotated[Split, typer.Option(help="Which images to judge on.")] = "val",
    layout: LayoutOption = "auto",
    checkpoint: MovedCheckpointOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    device: DeviceOption = "auto",
    workers: WorkersOption = 0,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Accuracy of a trained adapter on a folder of images."""
    model, transform = open_trained(adapter, checkpoint, device)
    images = load_dataset(data, split, layout=layout, strict=strict)
    if images.classes != model.classes:
        raise InputError(
            f"--data {data} has the classes {_few(images.classes)} and the adapter was trained on "
            f"{_few(model.classes or [])}"
        )
    with progress_bar(status) as progress:
        judged = evaluate(
            model,
            images.with_transform(transform),
            batch_size=batch_size,
            num_workers=workers,
            progress=progress,
        )
    report_skipped("evaluation", judged.skipped)
    show({"adapter": str(adapter), "split": split, **judged.as_dict()}, as_json)


@app.command(epilog="Example: `spt-fast predict --adapter runs/birds/best.safetensors photo.jpg other.png`")
def predict(
    adapter: AdaptersOption,
    images: Annotated[list[Path], typer.Argument(help="Image files.", metavar="IMAGE...")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show per image.")] = 3,
    checkpoint: MovedCheckpointOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Class names and probabilities for image files, by one adapter or by several at once."""
    model, transforms = open_tasks(adapter, checkpoint, device)
    results: list[dict[str, Any]] = []
    for path, task, logits in _task_logits(model, transforms, images):
        names = model.classes[task]
        probabilities, indices = logits[: len(names)].double().softmax(dim=0).topk(min(top, len(names)))
        ranked = [
            {"class": names[index], "probability": probability}
            for index, probability in zip(indices.tolist(), probabilities.tolist(), strict=True)
        ]
        results.append({"image": str(path), "task": task, "predictions": ranked})
    # One adapter needs no name.
    labels = ("image", "task") if len(adapter) > 1 else ("image",)
    if as_json:
        print_json([{key: result[key] for key in (*labels, "predictions")} for result in results])
        return
    table = new_table(*labels, "class", "probability")
    for result in results:
        shown = {**result, "image": result["image"] if result["task"] == model.tasks[0] else ""}
        for rank, entry in enumerate(result["predictions"]):
            cells = ["" if rank else shown[label] for label in labels]
            table.add_row(*map(Text, [*cells, entry["class"]]), f"{entry['probability']:.1%}")
    out.print(table)


@app.command(epilog="Example: `spt-fast demo --output runs/demo`")
def demo(
    output: Annotated[Path, typer.Option(help="Folder for adapters, metrics, curves and the report.")] = Path(
        "runs/demo"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 5,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """SPT-Deep next to VPT-Deep on real digits with the bundled backbone, offline, in minutes."""
    # Imported here because it brings matplotlib, which no other command needs.
    from spt_fast.demo import run_demo

    check_folder("--output", output)
    with progress_bar(status) as progress:
        results = run_demo(output, epochs=epochs, device=choose_device(device), progress=progress)
    if as_json:
        print_json(results)
        return
    table = new_table("method", "test accuracy", "prototypes", "training", "trainable parameters")
    for result in results:
        table.add_row(
            result["name"],
            f"{result['test_accuracy']:.1%}",
            f"{result['prototype_seconds']:.1f} s",
            f"{result['train_seconds']:.1f} s",
            f"{result['trainable_parameters']:,}",
        )
    out.print(table)
    say(f"look at {output}/report.html")


@app.command(epilog="Example: `spt-fast info --json`")
def info(as_json: JsonOption = False) -> None:
    """Versions, devices, and which kernel backends can run here."""
    facts = machine_facts()
    if as_json:
        print_json(facts)
        return
    table = new_table("what", "here", show_header=False)
    for section, entries in facts.items():
        for name, value in entries.items():
            table.add_row(f"{section}: {name}", ", ".join(value) if isinstance(value, list) else value)
        table.add_section()
    out.print(table)


def main() -> None:
    """Run the command line; a mistake of the user is one sentence and exit code 1 (2 for wrong usage)."""
    warnings.showwarning = lambda message, *_, **__: warn(str(message))
    try:
        app()
    except (SptFastError, BackendError) as error:
        fail(str(error))
    except torch.OutOfMemoryError as error:
        fail(f"the device is out of memory, fewer images at a time need less: {error}")
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _task_logits(
    model: spt_fast.MultiTaskViT, transforms: dict[str, Callable[[Any], torch.Tensor]], images: list[Path]
) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """The logits of every image by every task: as many images at a time as make a batch of ``PREDICTED_AT_ONCE``."""
    at_once = max(1, PREDICTED_AT_ONCE // len(transforms))
    device = next(model.backbone.parameters()).device
    for start in range(0, len(images), at_once):
        asked, views = [], []
        for path in images[start : start + at_once]:
            image = read_image(path)
            seen = {transform: transform(image) for transform in transforms.values()}
            asked += [(path, task) for task in transforms]
            views += [seen[transform] for transform in transforms.values()]
        sizes = {task: tuple(view.shape[1:]) for task, view in zip(transforms, views, strict=False)}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{task} {height}x{width}" for task, (height, width) in sizes.items())
            raise InputError(
                f"the adapters look at images of different sizes ({listed}); ask one size at a time"
            )
        with torch.no_grad():
            logits = model(torch.stack(views).to(device), [task for _, task in asked])
        yield from ((path, task, row) for (path, task), row in zip(asked, logits, strict=True))


def _was_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


@contextmanager
def _resumable(*kept: Path) -> Iterator[None]:
    """Say on Ctrl-C how to go on, if anything of ``kept`` is there to go on from."""
    try:
        yield
    except KeyboardInterrupt:
        if any(path.exists() for path in kept):
            status.print("interrupted; the same command with --resume goes on from here")
        else:
            status.print("interrupted")
        raise  # which typer makes exit code 130


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" ... ({len(names)})" if len(names) > 5 else "")
