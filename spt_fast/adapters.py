"""Adapters: what a task stores. What it learned and a record of the backbone it belongs to, never the backbone."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spt_fast._version import __version__
from spt_fast.backbones import backbone_identity, load_backbone, source_of
from spt_fast.errors import AdapterMismatchError, CheckpointError, InputError, UnsupportedModelError
from spt_fast.methods import model_class
from spt_fast.prompted_vit import PromptedViT
from spt_fast.tensor_files import read_tensors, write_tensors
from spt_fast.tuned_vit import HEAD, TunedViT

# Prompts and head alone; and what only :mod:`spt_fast.methods` understands.
FORMAT, METHOD_FORMAT = "spt_fast.adapter.1", "spt_fast.adapter.2"


@dataclass(frozen=True)
class Adapter:
    """An adapter as it lies in a file.

    Attributes:
        prompts: ``[L, P, D]`` or ``[1, P, D]``; ``None`` where the method has none.
        head_weight: ``[C, D]``.
        head_bias: ``[C]``.
        config: json record: ``backbone`` (how to load it, and its identity), ``pool``, ``classes``, ``version`` of the
            package, ``tuning`` (name and options of a method beyond prompts), and whatever the writer added (training
            adds ``training`` and ``images``).
        added: what a method beyond prompts learned, by name.
    """

    prompts: Tensor | None
    head_weight: Tensor
    head_bias: Tensor
    config: dict[str, Any]
    added: dict[str, Tensor] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The name of the kind of model, ``"prompted"`` for prompts and a head alone."""
        return self.config.get("tuning", {}).get("name", PromptedViT.name)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Adapter:
        """Read a file written by :func:`save_adapter`.

        Raises:
            MissingFileError: no such file.
            CheckpointError: not an adapter.
        """
        tensors, config = read_tensors(path, (FORMAT, METHOD_FORMAT), "an adapter")
        weight, bias = (tensors.pop(name) for name in HEAD)
        return cls(tensors.pop("prompts", None), weight, bias, config, tensors)

    def load_backbone(self) -> VisionTransformer:
        """Load the backbone this adapter was trained on, from the record of how it was loaded then.

        Raises:
            InputError: the backbone was not made by :func:`spt_fast.load_backbone` and so cannot be made again.
        """
        source = self.config["backbone"]["source"]
        if source["timm_kwargs"] is None:
            raise InputError(
                f"this adapter's backbone ({source['name']}) was not made by load_backbone with plain arguments; "
                "pass the backbone"
            )
        arguments = {
            "checkpoint": source["checkpoint"],
            "pretrained": source["pretrained"],
            "weight_dtype": source.get("weight_dtype"),  # older records have no such entry
            **source["timm_kwargs"],
        }
        return load_backbone(source["name"], **arguments)

    def attach(self, backbone: VisionTransformer) -> TunedViT:
        """The trained model: this adapter on its backbone, in eval mode.

        Raises:
            AdapterMismatchError: another backbone; the message names the difference.
            CheckpointError: what was stored is not what the method stores.
            UnsupportedModelError: the method cannot be used on this backbone or with what is installed; the message
                says why.
        """
        check_identity(self.config["backbone"]["identity"], backbone)
        state = {**dict(zip(HEAD, (self.head_weight, self.head_bias), strict=True)), **self.added}
        arguments = {"num_classes": len(self.head_bias), "pool": self.config["pool"]}
        if self.prompts is not None:
            state["prompts"] = arguments["prompts"] = self.prompts
        try:
            options = self.config.get("tuning", {}).get("options", {})
            model = model_class(self.method)(backbone, **arguments, **options)
            model.load_task_state(state)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"this adapter of {self.method} cannot be used here: {error}"
            ) from error
        except (InputError, TypeError) as error:
            raise CheckpointError(f"this is not an adapter of {self.method}: {error}") from error
        model.classes = list(self.config["classes"])
        return model.eval()


def check_identity(expected: dict[str, Any], backbone: VisionTransformer) -> None:
    """Raise unless ``backbone`` has the :func:`~spt_fast.backbones.backbone_identity` that an adapter expects.

    Raises:
        AdapterMismatchError: it has another; the message names the differences.
    """
    got = backbone_identity(backbone)
    differences = [
        f"{key} {got.get(key)} instead of {value}" for key, value in expected.items() if got.get(key) != value
    ]
    if differences:
        raise AdapterMismatchError(
            f"this adapter belongs to another backbone: this one has {', '.join(differences)}"
        )


def save_adapter(
    path: str | os.PathLike[str],
    model: TunedViT,
    *,
    classes: list[str] | None = None,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write what ``model`` learned as float32 safetensors, with what is needed to make the model again.

    Args:
        path: the file; an interruption leaves the old one or the new one.
        model: the trained model.
        classes: names of the outputs; ``None`` numbers them.
        metadata: json-able extra entries of the record, for example the training configuration.

    Raises:
        InputError: ``classes`` of the wrong length.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from spt_fast import PromptedViT, load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> model = PromptedViT(backbone, torch.randn(2, 5, 192), num_classes=2, pool="avg").eval()
        >>> file = tempfile.mkdtemp() + "/adapter.safetensors"
        >>> save_adapter(file, model, classes=["cat", "dog"])
        >>> same = load_adapter(file, backbone)
        >>> images = torch.randn(1, 3, 32, 32)
        >>> bool((same(images) == model(images)).all()), same.classes
        (True, ['cat', 'dog'])
    """
    count = model.head.out_features
    classes = [str(index) for index in range(count)] if classes is None else list(classes)
    if len(classes) != count:
        raise InputError(f"classes must name the {count} outputs of the head, got {len(classes)}")
    config = {
        **(metadata or {}),
        "backbone": {"source": source_of(model.backbone), "identity": backbone_identity(model.backbone)},
        "pool": model.pool,
        "classes": classes,
        "version": __version__,
    }
    kept = {name: value.detach().float().cpu().contiguous() for name, value in model.task_state().items()}
    if model.name == PromptedViT.name:
        return write_tensors(path, FORMAT, kept, config)
    config["tuning"] = {"name": model.name, "options": model.options}
    write_tensors(path, METHOD_FORMAT, kept, config)


def load_adapter(path: str | os.PathLike[str], backbone: VisionTransformer | None = None) -> TunedViT:
    """The trained model of an adapter file.

    Args:
        path: a file written by :func:`save_adapter`.
        backbone: its backbone; ``None`` loads it again as it was loaded for training.

    Returns:
        The model in eval mode; ``model.classes`` names its outputs.

    Raises:
        MissingFileError: no such file, or the backbone's checkpoint is gone.
        CheckpointError: not an adapter.
        AdapterMismatchError: ``backbone`` is not the one it was trained on; the message names the difference.
        UnsupportedModelError: its method cannot be used on ``backbone`` (8-bit weights that a method changes, for
            example) or with what is installed; the message says why.
    """
    adapter = Adapter.load(path)
    return adapter.attach(adapter.load_backbone() if backbone is None else backbone)
