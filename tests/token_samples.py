"""Tokens to cluster, made up and of real images, and when two clusterings of them are the same."""

import zipfile
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spt_fast.backbones import image_settings
from spt_fast.clustering import KMeans
from spt_fast.data import make_transform
from spt_fast.tokens import stream_layer_tokens


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(count: int, tokens: int, width: int, seed: int = 0, spread: float = 4.0) -> Tensor:
    """``tokens`` tokens around ``count`` centres that overlap a little, in random order."""
    centers = spread * noise(count, width, seed=seed)
    labels = torch.randint(count, (tokens,), generator=torch.Generator().manual_seed(seed + 1))
    return centers[labels] + noise(tokens, width, seed=seed + 2)


def assert_same_clustering(one: KMeans, other: KMeans) -> None:
    """Up to float rounding."""
    for name in ("cluster_centers_", "inertia_"):
        ours, theirs = (np.asarray(getattr(each, name)) for each in (one, other))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4, err_msg=name)
    assert np.array_equal(np.asarray(one.counts_), np.asarray(other.counts_))
    assert one.n_iter_ == other.n_iter_


@cache
def real_tokens(backbone: VisionTransformer, cifar10: Path, images: int) -> Tensor:
    """The layer tokens ``[12, 64 * images, 192]`` of real images, of all classes in turn."""
    batches = _images(cifar10 / "train.zip", images, **image_settings(backbone))
    parts = [
        torch.stack([captured[layer].flatten(0, 1) for layer in sorted(captured)])
        for captured in stream_layer_tokens(backbone, batches)
    ]
    return torch.cat(parts, dim=1)


def _images(archive: Path, count: int, **settings) -> Iterator[Tensor]:
    transform = make_transform("vtab", train=False, **settings)
    with zipfile.ZipFile(archive) as opened:
        names = sorted(name for name in opened.namelist() if name.endswith((".jpg", ".jpeg", ".png")))
        # 7 and the number of names have no factor in common: the steps go round through all classes.
        stride = 7 * len(names) // 100 + 1
        chosen = [names[index * stride % len(names)] for index in range(count)]
        for start in range(0, count, 100):
            decoded = (
                Image.open(BytesIO(opened.read(name))).convert("RGB") for name in chosen[start : start + 100]
            )
            yield torch.stack([transform(image) for image in decoded])
