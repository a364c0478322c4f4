"""``spt-fast analyze``: what prompts have to do with the patch tokens of a folder of images."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spt_fast._version import __version__
from spt_fast.adapters import Adapter, check_identity
from spt_fast.analysis import analyze_prompts
from spt_fast.analysis.mutual_information import Per
from spt_fast.analysis.prompt_sets import (
    PromptSet,
    prompts_of_adapter,
    prompts_of_prototypes,
    prompts_of_run,
)
from spt_fast.backbones import backbone_identity, source_of
from spt_fast.cli.chosen_recipe import was_given, weights_for
from spt_fast.cli.inputs import (
    backbone_of,
    check_folder,
    open_backbone,
    open_images,
    settings_of,
    warn_of_other_backbone,
)
from spt_fast.cli.options import (
    DataOption,
    DeviceOption,
    JsonOption,
    LayoutOption,
    ModelKwargOption,
    PretrainedOption,
    RecipeOption,
    SeedOption,
    Split,
    StrictOption,
    WorkersOption,
)
from spt_fast.cli.printing import new_table, out, print_json, report_skipped, say, status
from spt_fast.clustering import seeded_generator
from spt_fast.data import ImageDataset, load_dataset, make_loader, make_transform
from spt_fast.devices import choose_device
from spt_fast.errors import InputError
from spt_fast.feeding import workers_for
from spt_fast.progress import progress_bar
from spt_fast.prototypes import Prototypes
from spt_fast.run_folder import PRUNED_PARTS, holds_pruned_run

# What says which backbone prototypes belong to; an adapter knows its own.
BACKBONE_OPTIONS = ("model", "pretrained", "model_kwarg", "recipe")


def analyze(
    context: typer.Context,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Folder for analysis.json and the pictures.")],
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="A trained adapter; repeat it to compare several of one backbone."),
    ] = None,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="Prototypes from `spt-fast prototypes`; may be repeated.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of a training run: its prompts from the start to the end.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="For --prompts alone: the timm model they belong to.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="The backbone's weights: those of --model, or an adapter's if they have moved."),
    ] = None,
    pretrained: PretrainedOption = False,
    model_kwarg: ModelKwargOption = None,
    images: Annotated[int, typer.Option(min=1, help="How many images to look at, drawn by --seed.")] = 256,
    nearest: Annotated[int, typer.Option(min=1, help="Patches to show for each prompt.")] = 8,
    per: Annotated[
        Per, typer.Option(help="Mutual information with all tokens, or with those of each image, averaged.")
    ] = "dataset",
    sample_size: Annotated[
        int, typer.Option(min=2, help="Tokens of each block whose distances to each other the MMD looks at.")
    ] = 1024,
    split: Annotated[Split, typer.Option(help="Which images to look at.")] = "train",
    layout: LayoutOption = "auto",
    recipe: RecipeOption = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare prompts with patch tokens: mutual information (Eq. 8), CKA, MMD, cluster sizes, nearest patches."""
    # Imported here because it brings matplotlib, which few other commands need.
    from spt_fast.analysis.writing import shown, write_analysis

    check_folder("--output", output)
    sets = _open_prompts(prompts or [], adapter or [], run)
    adapters = [each.origin for each in sets if isinstance(each.origin, Adapter)]
    if adapters:
        typed = [name for name in BACKBONE_OPTIONS if was_given(context, name)]
        if typed:
            option = "--" + typed[0].replace("_", "-")
            raise typer.BadParameter(
                f"{option} is for --prompts alone; an adapter knows its backbone and its images"
            )
        backbone = backbone_of(adapters[0], checkpoint).to(choose_device(device))
        opened = load_dataset(data, split, layout=layout, strict=strict)
        opened = opened.with_transform(make_transform(**settings_of(adapters[0], backbone), train=False))
    elif model is None:
        raise typer.BadParameter("--prompts needs --model, the backbone that they belong to")
    else:
        weights = weights_for(context, checkpoint, pretrained)
        backbone = open_backbone(model, *weights, model_kwarg, device, seed)
        opened = open_images(data, split, backbone, layout, recipe, strict, train=False)
    for each in sets:
        _check_backbone(each, backbone)

    batches = _NumberedBatches(
        opened, images, batch_size=batch_size, seed=seed, workers=workers, backbone=backbone
    )
    with progress_bar(status) as progress:
        found = analyze_prompts(
            {each.name: each.values for each in sets},
            backbone,
            batches,
            per=per,
            sample_size=sample_size,
            nearest_of=[sets[-1].name],
            k=nearest,
            seed=seed,
            progress=progress,
        )
    report_skipped("analysis", len(batches.skipped))
    facts = {
        "version": __version__,
        "torch": torch.__version__,
        "data": opened.name,
        "backbone": {**source_of(backbone), "identity": backbone_identity(backbone)},
        "nmi_per": per,
        "mmd_sample_size": sample_size,
        "seed": seed,
        "skipped": len(batches.skipped),
    }
    record = write_analysis(output, found, sets, backbone, batches.dataset, batches.seen, facts)
    if as_json:
        print_json(record)
        return
    table = new_table("prompts", "blocks", "NMI", "CKA, same block", "squared MMD", "effective clusters")
    for entry in record["prompts"]:
        if entry["name"] in shown(sets):
            table.add_row(*_row(entry))
    out.print(table)
    say(f"means of {found.images} images and all blocks; look at {output}")


def _open_prompts(prompts: list[Path], adapters: list[Path], run: Path | None) -> list[PromptSet]:
    """All sets of prompts, those of a run last."""
    if not prompts and not adapters and run is None:
        raise typer.BadParameter("nothing to look at: name --adapter, --prompts or --run")
    files = [*prompts, *adapters]
    stems = Counter(file.stem for file in files)
    names = [file.stem if stems[file.stem] == 1 else str(file) for file in files]
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{name} was given {count} times")
    sets = [prompts_of_prototypes(*each) for each in zip(prompts, names, strict=False)]
    sets += [prompts_of_adapter(*each) for each in zip(adapters, names[len(prompts) :], strict=True)]
    if run is not None and holds_pruned_run(run):
        parts = " and ".join(str(run / part) for part in PRUNED_PARTS)
        raise InputError(
            f"--run {run} is two runs, before and after its prompts were pruned: {parts}; name one"
        )
    of_run = [] if run is None else prompts_of_run(run)
    for each in of_run:
        if each.name in names:
            raise InputError(f"{each.file}: {each.name} is the name of another file as well; rename that one")
    return sets + of_run


def _check_backbone(prompts: PromptSet, backbone: VisionTransformer) -> None:
    if isinstance(prompts.origin, Prototypes):
        warn_of_other_backbone(prompts.origin, backbone)
    else:
        try:
            check_identity(prompts.origin.config["backbone"]["identity"], backbone)
        except InputError as error:
            raise InputError(f"{prompts.file}: {error}") from error


class _NumberedBatches:
    """Batches of some images of a data set in random order, which remembers the images that could be read.

    Attributes:
        dataset: the chosen images, in the order in which they pass.
        seen: the numbers of those that have passed.
        skipped: files that could not be read.
    """

    def __init__(
        self,
        images: ImageDataset,
        most: int,
        *,
        batch_size: int,
        seed: int,
        workers: int | None,
        backbone: VisionTransformer,
    ) -> None:
        order = torch.randperm(len(images), generator=seeded_generator(seed))[:most].tolist()
        self.dataset = images.subset(order)
        self.seen: list[int] = []
        # In place of its class each image has its number: unreadable ones leave gaps.
        numbered = copy.copy(self.dataset)
        numbered.samples = [(source, number) for number, (source, _) in enumerate(self.dataset.samples)]
        device = next(backbone.parameters()).device
        self._loader = make_loader(
            numbered,
            batch_size=batch_size,
            num_workers=workers_for(numbered, batch_size, workers, device=device),
            pin_memory=device.type == "cuda",
        )

    def __iter__(self) -> Iterator[Tensor]:
        self.seen = []
        for images, numbers in self._loader:
            self.seen += numbers.tolist()
            yield images

    @property
    def skipped(self) -> list[str]:
        return self._loader.skipped


def _row(entry: dict[str, Any]) -> list[Text | str]:
    same = [row[block] for block, row in enumerate(entry["cka"]) if row[block] is not None]
    mmd = entry["mmd"]
    return [
        Text(entry["name"]),
        str(len(entry["nmi"])),
        f"{entry['nmi_mean']:.4f}",
        f"{sum(same) / len(same):.3f}" if same else "-",
        f"{sum(mmd) / len(mmd):.4f}" if mmd else "-",
        f"{sum(entry['effective_clusters']) / len(entry['effective_clusters']):.1f} of {entry['shape'][1]}",
    ]
