"""The frozen backbone: any plain timm ``VisionTransformer``, with weights from timm or from a file.

A backbone stays a timm model; nothing here wraps or patches it. This module loads one, refuses those that cannot be
prompted, and says which backbone an adapter belongs to.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import clean_state_dict
from timm.models.vision_transformer import Attention, Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from spt_fast.errors import CheckpointError, InputError, MissingFileError, UnsupportedModelError
from spt_fast.low_precision import WeightDtype, check_weight_dtype, entries_by_name, quantize_blocks
from spt_fast.sharded_block import original_class

BUNDLED_PREFIX = "bundled:"
CLASSIFIER_PREFIXES = ("head.", "head_dist.", "fc.")


def load_backbone(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    weight_dtype: WeightDtype | None = None,
    **timm_kwargs: Any,
) -> VisionTransformer:
    """Load a timm vision transformer, frozen and in eval mode.

    Args:
        name: a timm model name, for example ``"vit_base_patch16_224"`` or ``"deit_tiny_distilled_patch16_224"``.
        checkpoint: weights to load: a ``.safetensors`` file, a ``.pth`` file (read with ``weights_only=True``), or
            ``"bundled:NAME"`` for weights that come with the package. timm's own layout and the released MAE, MoCo-v3
            and DeiT layouts are understood; position and patch embeddings are resized as timm does.
        pretrained: let timm download its own weights (needs a network); not together with ``checkpoint``.
        weight_dtype: ``"int8"`` or ``"float8"`` store the weights of the blocks' Linear layers in 8 bits and multiply
            in 8 bits, forwards and backwards: half the memory of bfloat16, and less time under torch.compile, for an
            error of one percent (int8) or a few (float8) in the gradient of the prompts. Needs torchao (``pip install
            spt-fast[low-precision]``); int8 runs on x86 CPUs with AVX512-VNNI, AVX-VNNI or AMX and on CUDA devices of
            compute capability 7.5, float8 on those of 8.9. It is the same backbone for adapters in every precision.
        **timm_kwargs: passed on to ``timm.create_model``, for example ``img_size=32, patch_size=4``. The classifier
            is left out (``num_classes=0``) unless asked for.

    Returns:
        The model, with ``requires_grad=False`` on every parameter. ``backbone.pretrained_cfg["mean"]`` and ``["std"]``
        are the statistics images are to be normalised with: ImageNet's for the released MAE, MoCo-v3 and DeiT layouts
        and the bundled weights, timm's entry for this name otherwise.

    Raises:
        InputError: an unknown name, or arguments that timm refuses; or a ``weight_dtype`` that is unknown or that
            nothing here can multiply in.
        MissingFileError: ``checkpoint`` does not exist.
        CheckpointError: ``checkpoint`` cannot be read, or anything but the classifier does not fit the model; or timm
            could not download its weights.
        UnsupportedModelError: the model cannot be prompted, or its widths do not suit ``weight_dtype``; the message
            says why.

    Example:
        >>> backbone = load_backbone(
        ...     "vit_tiny_patch16_224", checkpoint="bundled:vit_tiny_mae_cifar10", img_size=32, patch_size=4
        ... )
        >>> backbone.embed_dim, len(backbone.blocks), backbone.training
        (192, 12, False)
    """
    if checkpoint is not None and pretrained:
        raise InputError("checkpoint and pretrained=True both ask for weights; give one of them")
    if weight_dtype is not None:
        check_weight_dtype(weight_dtype)
    # Names like "hf-hub:..." or "local-dir:..." are for timm to resolve.
    if not isinstance(name, str) or not (":" in name or timm.is_model(name)):
        near = difflib.get_close_matches(str(name), timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() lists them"
        raise InputError(f"name={name!r} is not a timm model{hint}")
    timm_kwargs = {"num_classes": 0, **timm_kwargs}
    try:
        created = timm.create_model(name, pretrained=pretrained, **timm_kwargs)
    except (TypeError, AssertionError, ValueError, KeyError, RuntimeError, ArithmeticError) as error:
        raise InputError(f"timm could not build {name!r} with {timm_kwargs}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"timm could not get the weights of {name!r}: {error}") from error
    model = check_backbone(created)
    if checkpoint is not None:
        _load_checkpoint(model, checkpoint)
    if weight_dtype is not None:
        quantize_blocks(model, weight_dtype)
    source = {
        "name": name,
        "checkpoint": _lasting_name(checkpoint),
        "pretrained": pretrained,
        "weight_dtype": weight_dtype,
        "timm_kwargs": timm_kwargs,
    }
    model.spt_fast_source = source  # type: ignore[assignment]
    return freeze(model)


def freeze(model: VisionTransformer) -> VisionTransformer:
    """Put ``model`` in eval mode and stop gradients to all its parameters; returns the same object.

    Raises:
        UnsupportedModelError: it is another model's own copy, which that model changes.
    """
    if getattr(model, "spt_fast_changes", False):  # see spt_fast.methods.own_backbone
        raise UnsupportedModelError(
            "backbone is that of a model which changes it, such as full or lora; pass the backbone that was loaded"
        )
    return model.eval().requires_grad_(False)


def check_backbone(model: nn.Module) -> VisionTransformer:
    """Return ``model`` if prompts can be inserted into it, else raise.

    Raises:
        UnsupportedModelError: with the reason.
    """
    kind = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(
            f"{kind} cannot be prompted: prompts are extra tokens of a plain global self-attention, so the model must "
            "be a timm VisionTransformer (not windows, convolutions, rotary positions or a pyramid)"
        )
    if not len(model.blocks):
        raise UnsupportedModelError(f"{kind} cannot be prompted: it has no blocks (depth=0)")
    for index, block in enumerate(model.blocks):
        if original_class(block) is not Block:
            raise UnsupportedModelError(
                f"{kind} cannot be prompted: block {index} is a {type(block).__name__}, and prompts are defined for "
                "timm's pre-norm Block (attention, then MLP, each behind its own LayerNorm)"
            )
        if type(block.attn) is not Attention:
            raise UnsupportedModelError(
                f"{kind} cannot be prompted: block {index} uses {type(block.attn).__name__}, and prompts are defined "
                "for timm's plain softmax Attention"
            )
    return model


def embed(
    backbone: VisionTransformer, images: Tensor, adjust: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The sequence that enters the first block, prefix tokens first (Eq. 1).

    Args:
        backbone: the model.
        images: ``[B, C, H, W]``, any floating dtype; cast to the dtype of the backbone.
        adjust: what is done to the embedded patches ``[B, .., D]`` before they get their positions.

    Returns:
        ``[B, N, D]`` in the dtype of the backbone.

    Raises:
        InputError: images of the wrong shape or dtype.
        UnsupportedModelError: timm loses the prefix tokens on the way.
    """
    check_images(backbone, images)
    patches = backbone.patch_embed(images.to(next(backbone.parameters()).dtype))
    if adjust is not None:
        patches = adjust(patches)
    tokens = backbone._pos_embed(patches)
    if tokens.shape[1] != patches.flatten(1, -2).shape[1] + backbone.num_prefix_tokens:
        # Early releases of timm did so for models without position embedding.
        raise UnsupportedModelError(
            "this release of timm drops the class token of this backbone; use a newer one"
        )
    return backbone.norm_pre(backbone.patch_drop(tokens))


def check_images(backbone: VisionTransformer, images: Tensor) -> None:
    """Raise :class:`InputError` unless ``images`` is a floating ``[B, C, H, W]`` batch of the backbone's size."""
    if not isinstance(images, Tensor):
        raise InputError(f"images must be tensors [B, C, H, W], got {type(images).__name__}")
    channels = getattr(backbone, "in_chans", 3)
    if images.ndim != 4 or images.shape[1] != channels:
        raise InputError(f"images must be [B, {channels}, H, W], got {list(images.shape)}")
    if not images.is_floating_point():
        raise InputError(f"images must be normalised floating point values, got {images.dtype}")
    size = getattr(backbone.patch_embed, "img_size", None)
    if size is not None and not backbone.dynamic_img_size and tuple(images.shape[2:]) != tuple(size):
        raise InputError(
            f"images are {images.shape[2]}x{images.shape[3]} and this backbone takes {size[0]}x{size[1]}; resize "
            "them, or load the backbone with img_size=... or dynamic_img_size=True"
        )


def final_norm(backbone: VisionTransformer) -> nn.Module:
    """The LayerNorm before the head: timm's ``norm`` or ``fc_norm``, whichever is not an identity."""
    return backbone.fc_norm if isinstance(backbone.norm, nn.Identity) else backbone.norm


def image_settings(backbone: VisionTransformer) -> dict[str, Any]:
    """What images must look like for ``backbone``: keyword arguments ``image_size`` (height, width), ``mean`` and
    ``std`` of :func:`spt_fast.data.make_transform`."""
    cfg = getattr(backbone, "pretrained_cfg", None) or {}
    size = getattr(backbone.patch_embed, "img_size", None) or cfg.get("input_size", (3, 224, 224))[1:]
    return {
        "image_size": tuple(size),
        "mean": tuple(cfg.get("mean", IMAGENET_DEFAULT_MEAN)),
        "std": tuple(cfg.get("std", IMAGENET_DEFAULT_STD)),
    }


def backbone_identity(backbone: VisionTransformer) -> dict[str, Any]:
    """What makes two backbones the same for an adapter: the architecture, and a fingerprint of the weights.

    The fingerprint hashes up to 4,096 evenly spaced entries of every weight, rounded to bfloat16, so that a backbone
    cast to bfloat16 keeps its fingerprint; 8-bit weights have that of the weights they were made from. The classifier
    does not count.

    Returns:
        A json-able dict.
    """
    known: Any = getattr(backbone, "spt_fast_identity", None)  # of weights that are no longer all here
    if known is not None:
        return known
    digest = hashlib.sha256()
    for key, sample in sorted(entries_by_name(backbone).items()):
        if key.startswith(CLASSIFIER_PREFIXES):
            continue
        digest.update(key.encode())
        digest.update(sample.numpy().tobytes())
    patch = backbone.patch_embed
    first_block: Any = backbone.blocks[0]
    return {
        "class": type(backbone).__name__,
        "embed_dim": backbone.embed_dim,
        "depth": len(backbone.blocks),
        "num_heads": first_block.attn.num_heads,
        "patch_size": list(getattr(patch, "patch_size", ())),
        "img_size": list(getattr(patch, "img_size", None) or ()),
        "num_prefix_tokens": backbone.num_prefix_tokens,
        "weights": digest.hexdigest()[:16],
    }


def bundled_backbones() -> list[str]:
    """Names of the weights that come with the package."""
    folder = files("spt_fast") / "assets"
    return sorted(
        path.name.removesuffix(".safetensors")
        for path in folder.iterdir()
        if path.name.endswith(".safetensors")
    )


def _load_checkpoint(model: VisionTransformer, checkpoint: str | Path) -> None:
    path = _checkpoint_path(checkpoint)
    state, released = _unwrap(_read(path), path)
    released = released or str(checkpoint).startswith(BUNDLED_PREFIX)
    try:
        state = checkpoint_filter_fn(state, model, adapt_layer_scale=True)
    except (RuntimeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} does not fit this model: {error}") from error
    own = model.state_dict()
    # A model that pools patch tokens keeps its final norm under another name than the released checkpoints do.
    for name in ("weight", "bias"):
        if f"norm.{name}" in state and f"norm.{name}" not in own and f"fc_norm.{name}" in own:
            state.setdefault(f"fc_norm.{name}", state.pop(f"norm.{name}"))

    def is_classifier(key: str) -> bool:
        return key.startswith(CLASSIFIER_PREFIXES)

    state = {
        key: value
        for key, value in state.items()
        if not is_classifier(key) or (key in own and own[key].shape == value.shape)
    }
    problems = [
        f"{key} is {list(state[key].shape)} in the file and {list(value.shape)} in the model"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    problems += [
        f"{key} is missing from the file" for key in own if key not in state and not is_classifier(key)
    ]
    problems += [f"{key} has no place in the model" for key in state if key not in own]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"checkpoint {path} does not fit this model: {'; '.join(problems[:3])}{more}")
    unsound = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if unsound:
        raise CheckpointError(f"checkpoint {path} holds NaN or infinite weights in {unsound[0]}")
    model.load_state_dict(state, strict=False)
    if released:
        cfg: Any = model.pretrained_cfg
        cfg = {**cfg, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
        model.pretrained_cfg = cfg


def _lasting_name(checkpoint: str | Path | None) -> str | None:
    """The name of a checkpoint as it can be found from another working directory."""
    if checkpoint is None or str(checkpoint).startswith(BUNDLED_PREFIX):
        return None if checkpoint is None else str(checkpoint)
    return str(Path(checkpoint).resolve())


def _checkpoint_path(checkpoint: str | Path) -> Path:
    text = str(checkpoint)
    if text.startswith(BUNDLED_PREFIX):
        name = text.removeprefix(BUNDLED_PREFIX)
        if name not in bundled_backbones():
            raise MissingFileError(
                f"checkpoint={text!r}: the package bundles {', '.join(bundled_backbones())}"
            )
        return Path(str(files("spt_fast") / "assets" / f"{name}.safetensors"))
    path = Path(checkpoint)
    if not path.is_file():
        raise MissingFileError(f"checkpoint {path} does not exist or is not a file")
    return path


def _read(path: Path) -> Any:
    """Read a file of weights without running anything that may be pickled in it."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Training scripts of MAE, MoCo-v3 and DeiT keep their command line beside the weights; a Namespace is inert.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read as plain weights: it is damaged or holds pickled objects other than "
            "tensors, which are never loaded"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        # Damaged bytes make the readers raise nearly anything: KeyError, AssertionError, struct.error, ...
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def _unwrap(content: Any, path: Path) -> tuple[dict[str, Tensor], bool]:
    """The flat dict of weights in a checkpoint, and whether it lay in one of the released self-supervised layouts."""
    released = False
    if isinstance(content, Mapping):
        for key in ("model", "state_dict"):
            if isinstance(content.get(key), Mapping):
                content, released = content[key], True
                break
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(v, Tensor) for v in content.values())
    ):
        raise CheckpointError(
            f"checkpoint {path} holds no dictionary of tensors (flat, or under 'model' or 'state_dict')"
        )
    state = clean_state_dict(dict(content))
    # MoCo-v3's pre-training file: the encoder that is kept, its momentum copy and the predictor side by side.
    encoder = {k.removeprefix("base_encoder."): v for k, v in state.items() if k.startswith("base_encoder.")}
    state = encoder or state
    # MAE's full pre-training file also has the decoder, which no classifier uses.
    if any(key.startswith("decoder_") for key in state):
        state = {k: v for k, v in state.items() if k != "mask_token" and not k.startswith("decoder_")}
    return state, released


def source_of(backbone: VisionTransformer) -> dict[str, Any]:
    """How ``backbone`` was made, as json: the arguments of :func:`load_backbone`, or timm's name for a model that was
    built elsewhere (``"timm_kwargs"`` is then ``None``: it cannot be rebuilt from this record alone)."""
    source = getattr(backbone, "spt_fast_source", None)
    if source is None:
        cfg = getattr(backbone, "pretrained_cfg", None) or {}
        return {
            "name": cfg.get("architecture"),
            "checkpoint": None,
            "pretrained": False,
            "weight_dtype": None,
            "timm_kwargs": None,
        }
    try:
        json.dumps(source)
    except TypeError:
        return {**source, "timm_kwargs": None}
    return source
