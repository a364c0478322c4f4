"""The commands: each turns its options into calls of the library and prints what came of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text

import spt_fast
from spt_fast.cli.ablate import ablate
from spt_fast.cli.analyze import analyze
from spt_fast.cli.bench import BenchmarkGroup
from spt_fast.cli.chosen_recipe import was_given, weights_for
from spt_fast.cli.inputs import (
    build_from,
    check_folder,
    open_backbone,
    open_images,
    open_tasks,
    open_trained,
    parse_bytes,
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
    ImageCacheOption,
    JsonOption,
    LayersOption,
    LayoutOption,
    MethodOption,
    ModelKwargOption,
    ModelOption,
    MovedCheckpointOption,
    NumPromptsListOption,
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
    resumable,
    say,
    show,
    status,
    warn,
)
from spt_fast.cli.recipes import recipes
from spt_fast.cli.search import sweep, vtab
from spt_fast.cli.train import train
from spt_fast.data import load_dataset, read_image
from spt_fast.devices import choose_device
from spt_fast.distributed import process_group
from spt_fast.errors import InputError, SptFastError
from spt_fast.evaluation import evaluate
from spt_fast.kernels import BackendError
from spt_fast.machine import machine_facts
from spt_fast.progress import progress_bar
from spt_fast.separate_tasks import SeparateTasks

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
    context: typer.Context,
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
    vipamin_neighbors: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of how many positions a prompt of vipamin is the mean; 32, or all patches, if not given.",
            show_default=False,
        ),
    ] = None,
    vipamin_lambda: Annotated[
        float, typer.Option(min=0, max=1, help="The share of the orthogonal part in vipamin.")
    ] = 0.1,
    token_budget: TokenBudgetOption = "auto",
    token_cache: TokenCacheOption = None,
    checkpoint_minutes: CheckpointMinutesOption = 1.0,
    split: Annotated[Split, typer.Option(help="Which images to look at.")] = "train",
    layout: LayoutOption = "auto",
    recipe: RecipeOption = "auto",
    image_cache: ImageCacheOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
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
    for name in ("vipamin_neighbors", "vipamin_lambda"):
        if method != "vipamin" and was_given(context, name):
            raise typer.BadParameter(f"--{name.replace('_', '-')} is for --method vipamin, not for {method}")
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
    for option, folder in (("--token-cache", token_cache), ("--image-cache", image_cache)):
        if folder is not None:
            check_folder(option, folder)
    unfinished = output.with_name(output.name + ".partial")
    with (
        process_group(choose_device(device)),
        resumable(unfinished),
        progress_bar(status) as progress,
    ):
        weights = weights_for(context, checkpoint, pretrained)
        backbone = open_backbone(model, *weights, model_kwarg, device, seed, weight_dtype)
        images = open_images(
            data,
            split,
            backbone,
            layout,
            recipe,
            strict,
            train=False,
            image_cache=image_cache,
            workers=workers,
            progress=progress,
        )
        built, skipped = build_from(
            backbone,
            images,
            num_prompts=numbers,
            method=method,
            depth=depth,
            layers=layers,
            data_fraction=data_fraction,
            capture=capture,
            vipamin_neighbors=vipamin_neighbors,
            vipamin_lambda=vipamin_lambda,
            token_budget=parse_bytes("--token-budget", token_budget),
            token_cache=token_cache,
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            progress=progress,
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


app.command(
    epilog="Example: `spt-fast train --model vit_base_patch16_224 --checkpoint mae.pth --pool avg --data birds/ "
    "--output runs/birds`, or with the values of a recipe "
    "`spt-fast train --recipe cub200-mae-vitb --data birds/`"
)(train)
app.command(
    epilog="Example: `spt-fast sweep --model vit_base_patch16_224 --checkpoint mae.pth --pool avg --data birds/ "
    "--output runs/birds --lr 0.01 --lr 0.03 --seed 0 --seed 1`"
)(sweep)
app.command(
    epilog="Example: `spt-fast vtab --recipe mae-vitb --data vtab-1k/`",
)(vtab)
app.command(
    epilog="Example: `spt-fast ablate sampling --model vit_base_patch16_224 --checkpoint mae.pth --pool avg "
    "--data birds/ --output runs/sampling`"
)(ablate)
app.command(epilog="Example: `spt-fast recipes cub200-mae-vitb`")(recipes)
app.command(epilog="Example: `spt-fast analyze --run runs/birds --data birds/ --output analysis`")(analyze)


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
    workers: WorkersOption = None,
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
    model: spt_fast.MultiTaskViT | SeparateTasks,
    transforms: dict[str, Callable[[Any], torch.Tensor]],
    images: list[Path],
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


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" ... ({len(names)})" if len(names) > 5 else "")
