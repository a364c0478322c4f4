"""From what was typed to what works: backbones, data sets, prototypes and trained models."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from spt_fast.adapters import Adapter
from spt_fast.backbones import backbone_identity, image_settings, load_backbone
from spt_fast.building import Method, build_prototypes
from spt_fast.cli.options import Layout
from spt_fast.cli.printing import report_skipped, warn
from spt_fast.data import ImageDataset, cache_images, load_dataset, make_transform
from spt_fast.devices import choose_device
from spt_fast.distributed import process_group
from spt_fast.errors import InputError
from spt_fast.feeding import prototype_loader, skipped_by_all, workers_for
from spt_fast.low_precision import WeightDtype, check_weight_dtype
from spt_fast.multi_task_vit import MultiTaskViT
from spt_fast.progress import Progress
from spt_fast.prompted_vit import PromptedViT
from spt_fast.prototypes import Prototypes
from spt_fast.run_folder import refuse_other_kind
from spt_fast.separate_tasks import SeparateTasks
from spt_fast.sweep_folder import read_json
from spt_fast.token_store import Budget
from spt_fast.tuned_vit import TunedViT


def check_folder(option: str, folder: Path) -> None:
    """Raise before the work, not after it, where files could not be written into ``folder``."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise InputError(f"{option}: {nearest} is a file, expected a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{option}: the folder {nearest} cannot be written to")


def open_backbone(
    name: str,
    checkpoint: str | None,
    pretrained: bool,
    pairs: list[str] | None,
    device: str,
    seed: int,
    weight_dtype: WeightDtype | None = None,
) -> VisionTransformer:
    chosen = choose_device(device)
    if weight_dtype is not None:
        check_weight_dtype(weight_dtype, chosen)
    # A backbone without weights of its own is random; the same seed makes the same one again.
    torch.manual_seed(seed)
    arguments = parse_pairs("--model-kwarg", pairs or [])
    for key in arguments.keys() & {"name", "checkpoint", "pretrained", "weight_dtype"}:
        option = "model" if key == "name" else key.replace("_", "-")
        raise InputError(f"--model-kwarg {key} has an option of its own, --{option}")
    backbone = load_backbone(
        name, checkpoint=checkpoint, pretrained=pretrained, weight_dtype=weight_dtype, **arguments
    )
    if checkpoint is None and not pretrained:
        warn("the backbone has random weights; --checkpoint or --pretrained gives it trained ones")
    return backbone.to(chosen)


def parse_pairs(option: str, pairs: list[str]) -> dict[str, Any]:
    """``["img_size=32", "global_pool=avg"]`` as keyword arguments; values are json where they can be."""
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"{option} must be KEY=VALUE, got {pair!r}")
        try:
            parsed[key] = json.loads(value)
        except json.JSONDecodeError:
            parsed[key] = value
    return parsed


def open_images(
    data: str,
    split: str,
    backbone: VisionTransformer,
    layout: Layout,
    recipe: str,
    strict: bool,
    *,
    train: bool,
    image_cache: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ImageDataset:
    """One split behind its transform; decoded into ``image_cache`` if there is one."""
    images = load_dataset(data, split, layout=layout, strict=strict)
    chosen = images.recipe if recipe == "auto" else recipe
    images = images.with_transform(make_transform(chosen, train=train, **image_settings(backbone)))
    if image_cache is None:
        return images
    decoding = workers_for(images, 32, workers, device=next(backbone.parameters()).device)
    return cache_images(images, image_cache, num_workers=decoding, progress=progress)


def build_from(
    backbone: VisionTransformer,
    images: ImageDataset,
    *,
    method: Method,
    seed: int,
    batch_size: int,
    workers: int | None,
    progress: Progress,
    **arguments: Any,
) -> tuple[dict[int, Prototypes], int]:
    """Prototypes of ``images`` by number of prompts, and how many files could not be read."""
    device = next(backbone.parameters()).device
    with process_group(device):
        loader = prototype_loader(
            images, method, batch_size=batch_size, seed=seed, device=device, num_workers=workers
        )
        built = build_prototypes(backbone, loader, method=method, seed=seed, progress=progress, **arguments)
        skipped = skipped_by_all(loader)
    for each in built.values():
        each.metadata["data"] = images.name
    report_skipped("prototypes", skipped)
    return built, skipped


def parse_bytes(option: str, text: str) -> Budget:
    """``"auto"``, or a number of bytes: ``"1000"``, ``"500MB"``, ``"8GiB"``."""
    if text == "auto":
        return "auto"
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kMGT])(i?)B?|B)?", text.strip())
    if number is None:
        raise InputError(f"{option} must be auto or a size such as 500MB or 8GiB, got {text!r}")
    amount, prefix, binary = number.groups()
    base = 1024 if binary else 1000
    return int(float(amount) * base ** ("kMGT".index(prefix) + 1 if prefix else 0))


def check_same_run(output: Path, method: str, *, prunes: bool) -> None:
    """Raise before anything is built if ``--resume`` finds the run of another method."""
    refuse_other_kind(output, prunes=prunes)
    begun_with = (read_json(output / "config.json") or {}).get("method", method)
    if begun_with != method:
        raise InputError(
            f"the run in {output} began with --method {begun_with} and this call asks for --method {method}"
        )


def start_of_run(
    output: Path,
    given: Prototypes | None,
    wanted: dict[str, Any],
    build: Callable[[], Prototypes],
    *,
    resume: bool,
) -> Prototypes:
    """What the prompts of a run start from: ``given``, or what ``build`` builds.

    It is kept in the run's folder, so that a resumed run goes on from the same; if that is not as ``wanted``, it is an
    error and not another start.
    """
    kept = output / "prompts.safetensors"
    if resume and kept.exists():
        start = Prototypes.load(kept)
        if given is not None and not torch.equal(given.values, start.values):
            raise InputError(f"the run in {output} started from other prompts than those in --prompts")
        for name, value in {} if given else wanted.items():
            if start.metadata.get(name) != value:
                raise InputError(
                    f"the run in {output} started with {name}={start.metadata.get(name)!r} "
                    f"and this call asks for {name}={value!r}"
                )
        return start
    if resume and (output / "checkpoint.pt").exists():
        raise InputError(
            f"the run in {output} started without {kept.name}, and this call starts from prompts"
        )
    start = given or build()
    start.save(kept)
    return start


def warn_of_other_backbone(start: Prototypes, backbone: VisionTransformer) -> None:
    record = start.metadata.get("backbone", {})
    if start.metadata.get("method") != "uniform" and record.get("identity") != backbone_identity(backbone):
        warn(f"the prompts were built from another backbone ({record.get('name')})")


def open_trained(
    path: Path, checkpoint: str | None, device: str
) -> tuple[TunedViT, Callable[[Any], torch.Tensor]]:
    """The model of an adapter file, and the transform for the images it judges."""
    chosen = choose_device(device)
    adapter = Adapter.load(path)
    model = adapter.attach(backbone_of(adapter, checkpoint)).to(chosen)
    return model, make_transform(**settings_of(adapter, model.backbone), train=False)


def open_tasks(
    paths: list[Path], checkpoint: str | None, device: str
) -> tuple[MultiTaskViT | SeparateTasks, dict[str, Callable[[Any], torch.Tensor]]]:
    """One model of several adapter files of one backbone, and for each of its tasks the transform for the images it
    judges: the same object where the settings are the same."""
    chosen = choose_device(device)
    adapters = dict(zip(_task_names(paths), map(Adapter.load, paths), strict=True))
    backbone = backbone_of(next(iter(adapters.values())), checkpoint).to(chosen)
    share = all(adapter.method == PromptedViT.name for adapter in adapters.values())
    model = MultiTaskViT(backbone, adapters) if share else SeparateTasks(backbone, adapters).eval()
    known: dict[str, Callable[[Any], torch.Tensor]] = {}
    transforms = {}
    for name, adapter in adapters.items():
        settings = settings_of(adapter, backbone)
        key = json.dumps(settings, sort_keys=True)
        transforms[name] = known.setdefault(key, make_transform(**settings, train=False))
    return model, transforms


def _task_names(paths: list[Path]) -> list[str]:
    """What to call the tasks of adapter files: their stems, or the paths of those that have the same."""
    stems = Counter(path.stem for path in paths)
    names = [path.stem if stems[path.stem] == 1 else str(path) for path in paths]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(f"--adapter {name} was given {count} times")
    return names


def backbone_of(adapter: Adapter, checkpoint: str | None) -> VisionTransformer:
    if checkpoint is not None:
        adapter.config["backbone"]["source"]["checkpoint"] = checkpoint
    # As in training: what is random about the backbone follows from the seed.
    torch.manual_seed(adapter.config.get("training", {}).get("seed", 0))
    return adapter.load_backbone()


def settings_of(adapter: Adapter, backbone: VisionTransformer) -> dict[str, Any]:
    """What the images of an adapter must look like: the arguments of ``make_transform``."""
    return {"recipe": "vtab", **image_settings(backbone), **adapter.config.get("images", {})}
