"""Fixtures that several test files share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spt_fast import load_backbone
from spt_fast.backbones import freeze, image_settings
from spt_fast.data import load_dataset, make_transform

if "PYTEST_XDIST_WORKER" in os.environ:
    # Test processes share the processor: threads of their own would only wait for each other's.
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)
    # The width of xdist's own terminal, which a console takes for good when it is made.
    os.environ.pop("COLUMNS", None)

TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 0,
}


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """What a test draws from torch's own generator does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Processes that are compared bit for bit add up in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_backbone() -> Callable[..., VisionTransformer]:
    """``make_backbone(name, seed=0, **timm_kwargs)``: a tiny frozen ViT, every parameter of which is noise.

    timm's own start has zero biases and a class token of 1e-6, behind which mistakes hide.
    """

    def make(name: str = "vit_tiny_patch16_224", *, seed: int = 0, **overrides: Any) -> VisionTransformer:
        model = timm.create_model(name, **{**TINY, **overrides})
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim == 1:
                    parameter.copy_(1 + 0.3 * noise)
                elif len(parameter) == 1:  # class token, position embedding and the like
                    parameter.copy_(noise)
                else:
                    parameter.copy_(noise / parameter[0].numel() ** 0.5)
        return freeze(model)

    return make


@pytest.fixture(scope="session")
def bundled_backbone() -> VisionTransformer:
    return load_backbone(
        "vit_tiny_patch16_224", checkpoint="bundled:vit_tiny_mae_cifar10", img_size=32, patch_size=4
    )


@pytest.fixture(scope="session")
def digit_images(bundled_backbone: VisionTransformer) -> Tensor:
    """The first 100 of scikit-learn's digits as ``[100, 3, 32, 32]``, normalised for the bundled backbone."""
    settings = image_settings(bundled_backbone)
    digits = load_dataset("digits", "train", transform=make_transform("vtab", train=False, **settings))
    return torch.stack([digits[index][0] for index in range(100)])


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """The folder with CIFAR-10 as ``train.zip`` and ``val.zip``, one folder a class in each."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"
    folder = Path(os.environ.get("SPT_FAST_CIFAR10", beside))
    if not all((folder / name).is_file() for name in ("train.zip", "val.zip")):
        pytest.skip(f"needs CIFAR-10 as train.zip and val.zip in {folder} (set SPT_FAST_CIFAR10)")
    return folder
