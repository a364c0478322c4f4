"""``spt-fast train``: from a folder of images to a trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from timm.models.vision_transformer import VisionTransformer

import spt_fast
from spt_fast.backbones import image_settings
from spt_fast.cli.chosen_method import choose_method
from spt_fast.cli.chosen_recipe import chosen, warn_of_counts, warn_of_untried, weights_for
from spt_fast.cli.inputs import (
    build_from,
    check_folder,
    check_same_run,
    open_backbone,
    open_images,
    start_of_run,
    warn_of_other_backbone,
)
from spt_fast.cli.options import (
    CaptureOption,
    CheckpointBlocksOption,
    CheckpointMinutesOption,
    CheckpointOption,
    CompileOption,
    DataOption,
    DepthOption,
    DeviceOption,
    DtypeOption,
    EpochsOption,
    FractionOption,
    FreezePromptsOption,
    ImageCacheOption,
    InitOption,
    JsonOption,
    LayersOption,
    LayoutOption,
    LrScaleOption,
    MethodOptionOption,
    ModelKwargOption,
    ModelOption,
    PoolOption,
    PretrainedOption,
    PromptDropoutOption,
    RecipeOption,
    ResumeOption,
    SeedOption,
    Split,
    StrictOption,
    TuningMethodOption,
    WarmupEpochsOption,
    WeightDtypeOption,
    WorkersOption,
)
from spt_fast.cli.printing import report_skipped, resumable, show, status
from spt_fast.data import load_dataset
from spt_fast.devices import choose_device
from spt_fast.distributed import from_rank_0, process_group
from spt_fast.errors import InputError
from spt_fast.low_precision import WeightDtype
from spt_fast.methods import build_model
from spt_fast.methods.e2vpt import E2VPTViT
from spt_fast.progress import Progress, progress_bar
from spt_fast.pruned_training import train_pruned
from spt_fast.run_folder import START, holds_run, remove_run
from spt_fast.sharding import shard_blocks
from spt_fast.training import training_dtype
from spt_fast.training_config import Dtype, TrainingConfig
from spt_fast.tuned_vit import TunedViT


def train(
    context: typer.Context,
    model: ModelOption,
    data: DataOption,
    output: Annotated[
        Path,
        typer.Option(help="Folder for adapters, metrics and the state of training; a --recipe names one."),
    ],
    checkpoint: CheckpointOption = None,
    pretrained: PretrainedOption = False,
    model_kwarg: ModelKwargOption = None,
    weight_dtype: WeightDtypeOption = None,
    shard_backbone: Annotated[
        bool,
        typer.Option(
            "--shard-backbone",
            help="Spread the frozen weights over all processes, if one device cannot hold them.",
        ),
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="Prototypes from `spt-fast prototypes`, instead of building them now.")
    ] = None,
    method: TuningMethodOption = "spt_deep",
    method_option: MethodOptionOption = None,
    init: InitOption = None,
    num_prompts: Annotated[
        int | None, typer.Option(help="Prompt tokens per block: 20 deep, 100 shallow if not given.")
    ] = None,
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
    batch_size: Annotated[int, typer.Option(help="Images per step and process.")] = TrainingConfig.batch_size,
    learning_rate: Annotated[
        float | None, typer.Option("--lr", help="Base rate; what suits the method if not given.")
    ] = None,
    lr_scale: LrScaleOption = TrainingConfig.lr_scale,
    min_learning_rate: Annotated[
        float, typer.Option("--min-lr", help="Where the cosine ends.")
    ] = TrainingConfig.min_learning_rate,
    weight_decay: Annotated[
        float, typer.Option(help="Of prompts, and of matrices that a method adds.")
    ] = TrainingConfig.weight_decay,
    head_weight_decay: Annotated[float, typer.Option(help="Of the head.")] = TrainingConfig.head_weight_decay,
    label_smoothing: Annotated[float, typer.Option(help="Of the cross-entropy.")] = 0.0,
    mixup: Annotated[float, typer.Option(help="Alpha of mixup; 0 is off.")] = 0.0,
    ema_decay: Annotated[float | None, typer.Option(help="Decay of a moving average of the weights.")] = None,
    dtype: DtypeOption = "auto",
    compile: CompileOption = False,
    split: Annotated[Split, typer.Option(help="Images to train on.")] = "train",
    val_split: Annotated[Split, typer.Option(help="Images to validate on.")] = "val",
    validate: Annotated[
        bool, typer.Option("--validate/--no-validate", help="Look at --val-split at all.")
    ] = True,
    val_interval: Annotated[int, typer.Option(help="Validate after every so many epochs, and the last.")] = 1,
    layout: LayoutOption = "auto",
    recipe: RecipeOption = "auto",
    image_cache: ImageCacheOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    strict: StrictOption = False,
    checkpoint_minutes: CheckpointMinutesOption = TrainingConfig.checkpoint_minutes,
    snapshot_interval: Annotated[
        int | None,
        typer.Option(help="Keep the adapters of the start and of every so many epochs in OUTPUT/snapshots."),
    ] = None,
    resume: ResumeOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in OUTPUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train prompts and head, or what another method adds, on a folder of images; the backbone stays frozen."""
    if resume and overwrite:
        raise typer.BadParameter("--resume goes on with the earlier run and --overwrite replaces it")
    tuning = choose_method(
        context,
        prompts,
        method=method,
        init=init,
        depth=depth,
        num_prompts=num_prompts,
        learning_rate=learning_rate,
        method_option=method_option,
    )
    wanted_start: dict[str, Any] = {
        "method": tuning.init,
        "num_prompts": tuning.num_prompts,
        "depth": tuning.depth,
        "layers": layers,
        "data_fraction": data_fraction,
        "capture": capture,
    }
    config = TrainingConfig(
        epochs=epochs,
        warmup_epochs=epochs // 10 if warmup_epochs is None else warmup_epochs,
        batch_size=batch_size,
        learning_rate=tuning.learning_rate,
        lr_scale=lr_scale,
        min_learning_rate=min_learning_rate,
        weight_decay=weight_decay,
        head_weight_decay=head_weight_decay,
        label_smoothing=label_smoothing,
        mixup=mixup,
        ema_decay=ema_decay,
        dtype=dtype,
        compile=compile,
        seed=seed,
        num_workers=workers,
        val_interval=val_interval,
        checkpoint_minutes=checkpoint_minutes,
        snapshot_interval=snapshot_interval,
    )
    check_folder("--output", output)
    if image_cache is not None:
        check_folder("--image-cache", image_cache)
    warn_of_untried(context)
    if holds_run(output) and not (resume or overwrite):
        raise InputError(
            f"--output {output} already holds a run; --resume it, --overwrite it or name another folder"
        )
    if resume:
        check_same_run(output, tuning.name, prunes=tuning.pruning is not None)
    chosen_device = choose_device(device)
    if chosen(context) is not None:
        load_dataset(data, split, layout=layout)  # a mistake is found before weights are fetched
    with (
        process_group(chosen_device),
        resumable(*(output / name for name in (*START, "checkpoint.pt"))),
        progress_bar(status) as progress,
    ):
        weights = weights_for(context, checkpoint, pretrained)
        if shard_backbone:
            backbone = _open_in_shards(model, *weights, model_kwarg, seed, weight_dtype, chosen_device, dtype)
        else:
            backbone = open_backbone(model, *weights, model_kwarg, device, seed, weight_dtype)

        def images(split: Split, *, train: bool, progress: Progress | None = progress) -> Any:
            return open_images(
                data,
                split,
                backbone,
                layout,
                recipe,
                strict,
                train=train,
                image_cache=image_cache,
                workers=workers,
                progress=progress,
            )

        train_images = images(split, train=True)
        val_images = images(val_split, train=False) if validate else None
        named = chosen(context)
        if named is not None:
            opened = [train_images] if val_images is None else [train_images, val_images]
            warn_of_counts(named.dataset, data, layout, *opened)

        def tuned(start: spt_fast.Prototypes | torch.Tensor | None) -> TunedViT:
            torch.manual_seed(seed)
            options = {**tuning.options, "checkpoint_blocks": checkpoint_blocks}
            if freeze_prompts:
                options["train_prompts"] = False
            if prompt_dropout:
                options["prompt_dropout"] = prompt_dropout
            draws = start is None and tuning.method.depth is not None
            return build_model(
                tuning.name,
                backbone,
                num_classes=len(train_images.classes),
                prompts=start,
                num_prompts=tuning.num_prompts if draws else None,
                pool=None if pool == "timm" else pool,
                **options,
            )

        def build() -> spt_fast.Prototypes:
            built, _ = build_from(
                backbone,
                images(split, train=False),
                **{**wanted_start, "num_prompts": [tuning.num_prompts]},
                seed=seed,
                batch_size=batch_size,
                workers=workers,
                progress=progress,
                checkpoint=output / "prompts.partial",
                resume=resume,
            )
            return built[tuning.num_prompts]

        starts = tuning.given is not None or tuning.init is not None
        rows = len(backbone.blocks) if tuning.depth == "deep" else 1
        # Options that do not go together are found here, not after the prototypes have been built.
        tuned(tuning.given or torch.zeros(rows, 1, backbone.embed_dim) if starts else None)
        if not resume:
            # After an interruption --resume must not find what is being replaced.
            from_rank_0(lambda: remove_run(output))
        metadata: dict[str, Any] = {"method": tuning.name}
        start = None
        if starts:
            start = start_of_run(output, tuning.given, {**wanted_start, "seed": seed}, build, resume=resume)
            warn_of_other_backbone(start, backbone)
            metadata["start"] = start.metadata
        transform = train_images.recipe if recipe == "auto" else recipe
        how: dict[str, Any] = {
            "output": output,
            "config": config,
            "resume": resume,
            "overwrite": overwrite,
            "metadata": {**metadata, "images": {"recipe": transform, **image_settings(backbone)}},
            "progress": progress,
        }
        if tuning.pruning is None:
            trained = spt_fast.train(tuned(start), train_images, val_images, **how)
        else:
            whole = tuned(start)
            assert isinstance(whole, E2VPTViT)
            tokens, segments = tuning.pruning
            _, trained = train_pruned(
                whole, train_images, val_images, tokens=tokens, segments=segments, **how
            )
    report_skipped("training", trained.skipped)
    result = {
        "output": str(trained.output),
        "best_accuracy": trained.best_accuracy,
        "best_epoch": trained.best_epoch,
        "final_accuracy": trained.metrics[-1]["val_accuracy"],
        "final_train_loss": trained.metrics[-1]["train_loss"],
        "train_seconds": trained.train_seconds,
        "data_wait": trained.data_wait,
        "compile_seconds": trained.compile_seconds,
        "skipped": trained.skipped,
    }
    show(result, as_json)


def _open_in_shards(
    model: str,
    checkpoint: str | None,
    pretrained: bool,
    model_kwarg: list[str] | None,
    seed: int,
    weight_dtype: WeightDtype | None,
    device: torch.device,
    dtype: Dtype,
) -> VisionTransformer:
    """The backbone in the dtype it is used in, its blocks spread over processes before any of them is on a device."""
    if weight_dtype is not None:
        raise InputError(
            "--shard-backbone and --weight-dtype do not go together: 8-bit weights are not sharded"
        )
    whole = open_backbone(model, checkpoint, pretrained, model_kwarg, "cpu", seed)
    return shard_blocks(whole.to(training_dtype(dtype, device)), device)
