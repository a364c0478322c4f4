"""A tiny random backbone, noise and coloured squares, for tests in this process and in others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spt_fast import PromptedViT, load_backbone
from spt_fast.data import ImageDataset, make_transform
from spt_fast.tokens import layer_tokens

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
CLASSES = list(COLOURS)


def tiny_backbone(seed: int = 0, **timm_kwargs: Any) -> VisionTransformer:
    """16 x 16 images, 16 patches, width 32, 2 blocks; every weight is random, also those that timm starts at 0 or 1."""
    kwargs: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        **timm_kwargs,
    }
    backbone = load_backbone("vit_tiny_patch16_224", **kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            centre = 1.0 if parameter.ndim == 1 and parameter.mean() == 1 else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return backbone


def tiny_model(seed: int = 0, *, deep: bool = True, num_classes: int = 3, **kwargs: Any) -> PromptedViT:
    """Three prompts in each block; prompts and head start from ``seed``, the backbone is always the same."""
    backbone = kwargs.pop("backbone", None) or tiny_backbone()
    torch.manual_seed(seed)
    prompts = torch.randn(2 if deep else 1, 3, 32) * torch.tensor([0.5, 4.0])[: 2 if deep else 1, None, None]
    return PromptedViT(backbone, prompts, num_classes=num_classes, **{"pool": "avg", **kwargs})


def squares(
    count: int,
    *,
    seed: int = 0,
    recipe: str = "vtab",
    unreadable: dict[int, Path] | None = None,
    **kwargs: Any,
) -> ImageDataset:
    """``count`` squares of three noisy colours, in memory; those in ``unreadable`` are files that are no images."""
    generator = torch.Generator().manual_seed(seed)
    samples: list[Any] = []
    for index in range(count):
        label = index % 3
        noise = torch.randint(-40, 41, (20, 20, 3), generator=generator)
        pixels = (torch.tensor(COLOURS[CLASSES[label]]) + noise).clamp(0, 255).to(torch.uint8)
        samples.append((Image.fromarray(pixels.numpy()), label))
    for index, path in (unreadable or {}).items():
        path.write_bytes(b"not an image")
        samples[index] = (path, samples[index][1])
    transform = make_transform(recipe, image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3, train=True)
    return ImageDataset(samples, CLASSES, transform=transform, name="squares", **kwargs)


def noise(count: int, *, size: int = 32, seed: int = 0) -> Tensor:
    """``[count, 3, size, size]``."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def batches(count: int = 4, size: int = 10) -> list[Tensor]:
    """``count`` batches of ``size`` images of 32 x 32."""
    return list(noise(count * size).split(size))


class ReIterable:
    """Re-iterable, but of unknown length; counts how often it was begun.

    Attributes:
        passes: so often.
    """

    def __init__(self, content: list[Any]) -> None:
        self.content = content
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.content)


def all_tokens(backbone: nn.Module, images: list[Tensor], **kwargs: Any) -> dict[int, Tensor]:
    """``{block: [T, D]}`` of all images."""
    captured = [layer_tokens(backbone, batch, **kwargs) for batch in images]
    return {i: torch.cat([tokens[i].flatten(0, 1) for tokens in captured]) for i in captured[0]}


def stacked_tokens(backbone: nn.Module, images: list[Tensor], **kwargs: Any) -> Tensor:
    """``[L, T, D]`` of all images."""
    return torch.stack(list(all_tokens(backbone, images, **kwargs).values()))


class Interrupted(Exception):
    """Stops a build in the middle."""


def learned(model: PromptedViT) -> dict[str, torch.Tensor]:
    """What training changes, as copies."""
    tensors = {"prompts": model.prompts, "head.weight": model.head.weight, "head.bias": model.head.bias}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
