"""Make the bundled backbone: masked-autoencoder pre-training of a timm ViT on a folder of images.

    python -m benchmarks.pretrain_backbone --data train.zip --output backbone.safetensors --epochs 800

The images live on the device as one uint8 tensor and everything random is drawn there, so no step waits for
the host. Once a second the loss is read, and only then do checkpoint, time limit and progress bar have a turn.
On a machine lent for minutes, repeat the command with ``--max-minutes 9 --resume`` until the output is there.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor

from benchmarks.command import console, load_with_progress, mistakes_in_one_sentence
from benchmarks.masked_autoencoder import MaskedAutoencoder, create_backbone
from benchmarks.record import machine
from spt_fast.devices import choose_device, device_name, prefers_bfloat16
from spt_fast.errors import CheckpointError, InputError
from spt_fast.files import atomic_path

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.05
WARMUP_SHARE = 0.05
LEARNING_RATE_BATCH = 256
SHIFT = 4


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, beside the images themselves.

    Attributes:
        model: timm's name of a ViT with a class token.
        img_size: image height and width in pixels, a multiple of ``patch_size``.
        patch_size: patch height and width in pixels.
        epochs: passes over the images; what is left over after the last full batch of a pass is dropped.
        batch_size: images of one step.
        learning_rate: peak for a batch of 256 images; scaled linearly with ``batch_size``.
        mask_ratio: share of the patches that are hidden.
        decoder_depth: transformer blocks of the decoder.
        decoder_width: token width of the decoder, a multiple of 32.
        seed: of the initial weights, the order of the images, the augmentation and the masks.
    """

    model: str = "vit_tiny_patch16_224"
    img_size: int = 32
    patch_size: int = 4
    epochs: int = 800
    batch_size: int = 256
    learning_rate: float = 1e-3
    mask_ratio: float = 0.75
    decoder_depth: int = 1
    decoder_width: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise InputError(f"{name} is {value}, but a positive number was expected.")

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate * self.batch_size / LEARNING_RATE_BATCH


@dataclass(frozen=True)
class Report:
    """Where a training run stands; handed to ``on_report`` about once a second.

    Attributes:
        step: optimizer steps done, of ``total_steps``.
        loss: mean masked loss over the current epoch so far.
        images_per_second: since the previous report.
    """

    step: int
    total_steps: int
    loss: float
    images_per_second: float


@dataclass(frozen=True)
class Pretrained:
    """What :func:`pretrain` returns.

    Attributes:
        backbone: the encoder, float32.
        losses: float32 ``[epochs]`` on the CPU, mean masked loss of each epoch; zero after the run stopped.
        seconds: spent training, all runs together.
        finished: whether the schedule was run to its end; if not, a checkpoint waits to be resumed.
    """

    backbone: VisionTransformer
    losses: Tensor
    seconds: float
    finished: bool


def pretrain(
    recipe: Recipe,
    images: Tensor,
    checkpoint: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    compile_mode: str | None = None,
    resume: bool = False,
    checkpoint_minutes: float = 2.0,
    max_minutes: float = math.inf,
    report_seconds: float = 1.0,
    on_report: Callable[[Report], None] | None = None,
) -> Pretrained:
    """Pre-train a backbone by ``recipe``.

    A run that was killed and resumed gives the weights of one that was not, bit for bit on the CPU.

    Args:
        recipe: see :class:`Recipe`.
        images: uint8 ``[n, 3, S, S]`` with ``S = recipe.img_size`` and ``n >= recipe.batch_size``.
        checkpoint: file that the whole state is written to, every ``checkpoint_minutes`` and at the end.
        device: where to train. bfloat16 autocast is used where the device computes in it.
        compile_mode: mode of ``torch.compile`` for forward pass and loss; None: no compilation.
        resume: continue from ``checkpoint`` if it exists; without ``resume`` an existing one is an error.
        checkpoint_minutes: minutes between two checkpoints.
        max_minutes: stop with a checkpoint after this many minutes in this call.
        report_seconds: seconds between two looks at the loss and the clock; each waits for the device.
        on_report: called with a :class:`Report` after each look.

    Raises:
        InputError: images or recipe do not fit each other, or the loss is not finite any more.
        CheckpointError: ``checkpoint`` exists without ``resume``, cannot be read, or is of another recipe.

    Example:
        >>> import tempfile
        >>> images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
        >>> recipe = Recipe("test_vit", img_size=8, patch_size=2, epochs=2, batch_size=4, decoder_width=32)
        >>> result = pretrain(recipe, images, f"{tempfile.mkdtemp()}/checkpoint.pt")
        >>> result.finished, result.losses.shape
        (True, torch.Size([2]))
    """
    device = torch.device(device)
    checkpoint = Path(checkpoint)
    _check_images(images, recipe)
    if checkpoint.exists() and not resume:
        raise CheckpointError(f"the checkpoint {str(checkpoint)!r} exists; resume from it or remove it.")

    steps_per_epoch = len(images) // recipe.batch_size
    total_steps = recipe.epochs * steps_per_epoch
    identity = {**asdict(recipe), "images": len(images), "device": device.type}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        backbone = create_backbone(recipe.model, recipe.img_size, recipe.patch_size)
        autoencoder = MaskedAutoencoder(
            backbone, recipe.mask_ratio, recipe.decoder_depth, recipe.decoder_width
        )
    autoencoder.to(device)
    optimizer = torch.optim.AdamW(
        param_groups_weight_decay(autoencoder, WEIGHT_DECAY, no_weight_decay_list=["*pos_embed", "*_token"]),
        betas=BETAS,
        fused=device.type == "cuda",
    )
    generator = torch.Generator(device).manual_seed(recipe.seed)
    images = images.to(device)
    order = torch.arange(len(images), device=device)
    losses = torch.zeros(recipe.epochs, device=device)
    first_step, earlier_seconds = 0, 0.0

    if resume and checkpoint.exists():
        state = _read_checkpoint(checkpoint, identity)
        autoencoder.load_state_dict(state["autoencoder"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        order.copy_(state["order"])
        losses.copy_(state["losses"])
        first_step, earlier_seconds = state["step"], state["seconds"]

    started = last_report = last_checkpoint = time.monotonic()

    def save(step: int) -> None:
        state = {
            "identity": identity,
            "autoencoder": autoencoder.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "order": order,
            "losses": losses,
            "step": step,
            "seconds": earlier_seconds + time.monotonic() - started,
        }
        with atomic_path(checkpoint) as temporary:
            torch.save(state, temporary)

    loss_of: Callable[[Tensor, Tensor], Tensor] = autoencoder
    if compile_mode is not None:
        loss_of = torch.compile(autoencoder, mode=compile_mode, dynamic=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=prefers_bfloat16(device))
    autoencoder.train()
    done, reported_step = first_step, first_step

    while done < total_steps:
        epoch, step_of_epoch = divmod(done, steps_per_epoch)
        if step_of_epoch == 0:
            order = torch.randperm(len(images), generator=generator, device=device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.peak_learning_rate * schedule(done, total_steps)

        chosen = order[step_of_epoch * recipe.batch_size :][: recipe.batch_size]
        batch = shift_and_flip(images[chosen], generator)
        noise = torch.rand(len(batch), autoencoder.num_patches, generator=generator, device=device)

        with autocast:
            loss = loss_of(batch, noise.argsort(dim=1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[epoch] += loss.detach() / steps_per_epoch
        done += 1

        if time.monotonic() - last_report < report_seconds and done < total_steps:
            continue
        epoch_loss = losses[epoch].item() * steps_per_epoch / (step_of_epoch + 1)  # waits for the device
        if not math.isfinite(epoch_loss):
            raise InputError(
                f"learning_rate is {recipe.learning_rate}, but with it the loss is {epoch_loss} at step {done}."
            )
        now = time.monotonic()
        stopping = now - started >= max_minutes * 60
        if stopping or done == total_steps or now - last_checkpoint >= checkpoint_minutes * 60:
            save(done)
            last_checkpoint = time.monotonic()
        if on_report is not None:
            speed = (done - reported_step) * recipe.batch_size / (now - last_report)
            on_report(Report(done, total_steps, epoch_loss, speed))
        last_report, reported_step = now, done
        if stopping:
            break

    seconds = earlier_seconds + time.monotonic() - started
    return Pretrained(backbone.eval(), losses.cpu(), seconds, finished=done == total_steps)


def schedule(step: int, total_steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over 5 % of the steps, then half a cosine to zero."""
    warmup_steps = max(1, round(WARMUP_SHARE * total_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


def shift_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each of ``images`` uint8 ``[B, 3, S, S]`` by up to 4 pixels over black; mirror half of them."""
    batch, channels, size, _ = images.shape
    device = images.device
    corner = torch.randint(0, 2 * SHIFT + 1, (2, batch, 1), generator=generator, device=device)
    rows, columns = corner + torch.arange(size, device=device)
    mirrored = torch.rand(batch, 1, generator=generator, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(batch, device=device).view(batch, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, channels, 1, 1)
    padded = F.pad(images, [SHIFT] * 4)
    return padded[image, channel, rows.view(batch, 1, size, 1), columns.view(batch, 1, 1, size)]


def save_backbone(
    path: str | os.PathLike[str], backbone: VisionTransformer, metadata: dict[str, Any]
) -> None:
    """Write the weights as bfloat16 under timm's names; ``metadata`` goes in as json, named ``pretraining``.

    Example:
        >>> import tempfile, timm
        >>> from safetensors.torch import load_file
        >>> backbone, path = create_backbone("test_vit", 8, 2), f"{tempfile.mkdtemp()}/backbone.safetensors"
        >>> save_backbone(path, backbone, {"epochs": 0})
        >>> model = timm.create_model("test_vit", img_size=8, patch_size=2, num_classes=0)
        >>> model.load_state_dict(load_file(path))
        <All keys matched successfully>
    """
    weights = {
        name: value.to("cpu", torch.bfloat16).contiguous() for name, value in backbone.state_dict().items()
    }
    with atomic_path(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt", "pretraining": json.dumps(metadata)})


def _check_images(images: Tensor, recipe: Recipe) -> None:
    expected = (3, recipe.img_size, recipe.img_size)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != expected:
        came = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise InputError(f"images is {came}, but uint8 [n, {', '.join(map(str, expected))}] was expected.")
    if len(images) < recipe.batch_size:
        raise InputError(f"batch_size is {recipe.batch_size}, but there are only {len(images)} images.")


def _read_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint and see that it was made by the same recipe."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        theirs = state["identity"]
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"the checkpoint {str(path)!r} cannot be read: {reason}") from error
    differences = [
        f"{key}={theirs.get(key)!r}, now {value!r}"
        for key, value in identity.items()
        if theirs.get(key) != value
    ]
    if differences:
        raise CheckpointError(f"the checkpoint {str(path)!r} was made with {'; '.join(differences)}.")
    return state


class CompileMode(str, Enum):
    """Modes of torch.compile."""

    default = "default"
    reduce_overhead = "reduce-overhead"
    max_autotune = "max-autotune"


app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def main(
    data: Annotated[
        Path,
        typer.Option(help="Folder <class>/<image> of training images, or a zip of one. Labels are not used."),
    ],
    output: Annotated[Path, typer.Option(help="Where to write the backbone (safetensors).")],
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = Recipe.epochs,
    batch_size: Annotated[int, typer.Option(help="Images of one step.")] = Recipe.batch_size,
    learning_rate: Annotated[
        float, typer.Option(help="Peak for a batch of 256; scaled linearly with --batch-size.")
    ] = Recipe.learning_rate,
    mask_ratio: Annotated[
        float, typer.Option(help="Share of the patches that are hidden.")
    ] = Recipe.mask_ratio,
    decoder_depth: Annotated[int, typer.Option(help="Blocks of the decoder.")] = Recipe.decoder_depth,
    decoder_width: Annotated[
        int, typer.Option(help="Token width of the decoder, a multiple of 32.")
    ] = Recipe.decoder_width,
    model: Annotated[str, typer.Option(help="timm's name of a ViT with a class token.")] = Recipe.model,
    img_size: Annotated[
        int, typer.Option(help="Image size in pixels; other images are resized.")
    ] = Recipe.img_size,
    patch_size: Annotated[int, typer.Option(help="Patch size in pixels.")] = Recipe.patch_size,
    compile: Annotated[bool, typer.Option(help="Compile forward pass and loss with torch.compile.")] = True,
    compile_mode: Annotated[
        CompileMode, typer.Option(help="Mode of torch.compile; all but 'default' use CUDA graphs on a GPU.")
    ] = CompileMode.reduce_overhead,
    device: Annotated[str, typer.Option(help="'auto', 'cuda', 'cuda:1', 'cpu' ...")] = "auto",
    checkpoint_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.", min=0)] = 2.0,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop with a checkpoint after this many minutes of training.", min=0)
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue from the checkpoint beside --output, if there is one.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights, order, augmentation and masks.")] = Recipe.seed,
) -> None:
    """Pre-train a ViT as a masked autoencoder on a folder of images.

    The state is kept in OUTPUT.checkpoint.pt. Example:

        python -m benchmarks.pretrain_backbone --data train.zip --output backbone.safetensors --epochs 800
    """
    with mistakes_in_one_sentence():
        recipe = Recipe(
            model,
            img_size,
            patch_size,
            epochs,
            batch_size,
            learning_rate,
            mask_ratio,
            decoder_depth,
            decoder_width,
            seed,
        )
        where = choose_device(device)
        checkpoint = output.with_name(f"{output.name}.checkpoint.pt")
        # A wrong name should not cost the time to read the images.
        create_backbone(model, img_size, patch_size)
        images, _, _ = load_with_progress(data, img_size)
        console.print(
            f"{len(images):,} images of {img_size} x {img_size}; training {model} on {device_name(where)}"
        )
        if resume:
            found = "continuing from" if checkpoint.exists() else "starting at step 0, for there is no"
            console.print(f"{found} {checkpoint}", markup=False, soft_wrap=True)

        with Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} images/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        ) as progress:
            task = progress.add_task("", total=None, epoch=0, epochs=epochs, loss=math.nan, speed=0.0)

            def show(report: Report) -> None:
                progress.update(
                    task,
                    completed=report.step,
                    total=report.total_steps,
                    epoch=math.ceil(report.step * epochs / report.total_steps),
                    loss=report.loss,
                    speed=report.images_per_second,
                )

            result = pretrain(
                recipe,
                images,
                checkpoint,
                device=where,
                compile_mode=compile_mode.value if compile else None,
                resume=resume,
                checkpoint_minutes=checkpoint_minutes,
                max_minutes=math.inf if max_minutes is None else max_minutes,
                on_report=show,
            )

        if not result.finished:
            console.print(
                f"stopped after {max_minutes:g} minutes; --resume continues from {checkpoint}",
                markup=False,
                soft_wrap=True,
            )
            return
        save_backbone(
            output,
            result.backbone,
            {
                "objective": "masked autoencoder (He et al. 2022), per-patch normalised pixels",
                **asdict(recipe),
                "images": len(images),
                "betas": BETAS,
                "weight_decay": WEIGHT_DECAY,
                "peak_learning_rate": recipe.peak_learning_rate,
                "schedule": f"{WARMUP_SHARE:.0%} linear warm-up, cosine to 0",
                "augmentation": f"horizontal flips, shifts by up to {SHIFT} pixels",
                "precision": "bfloat16 autocast" if prefers_bfloat16(where) else "float32",
                "final_loss": result.losses[-1].item(),
                "seconds": round(result.seconds, 1),
                **machine(where),
            },
        )
        console.print(
            f"masked loss {result.losses[-1]:.4f} after {epochs} epochs in {result.seconds:,.0f} s; wrote {output}",
            markup=False,
            soft_wrap=True,
        )


if __name__ == "__main__":
    app()
