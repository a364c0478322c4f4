"""What the library is for: prototypes from images, a training step, many tasks in one batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.conftest import Measure
from spt_fast import MultiTaskViT, PromptedViT, build_prototypes, load_backbone
from spt_fast.building import Method
from spt_fast.devices import choose_device, prefers_bfloat16

GPU = choose_device().type == "cuda"
MANY = 16 if GPU else 1
CLASSES = 10


def random_images(device: torch.device, count: int, backbone: VisionTransformer) -> Tensor:
    weight = next(backbone.parameters())
    return torch.randn(count, 3, *backbone.patch_embed.img_size, device=device).to(weight.dtype)


def vit_tiny(device: torch.device) -> VisionTransformer:
    dtype = torch.bfloat16 if prefers_bfloat16(device) else torch.float32
    return load_backbone("vit_tiny_patch16_224").to(device, dtype)


def random_prompts(backbone: VisionTransformer, count: int) -> Tensor:
    return torch.randn(len(backbone.blocks), count, backbone.embed_dim)


@pytest.mark.parametrize("num_prompts", [20, 100])
def test_training_step(measure: Measure, device: torch.device, num_prompts: int) -> None:
    backbone = vit_tiny(device)
    model = PromptedViT(
        backbone, random_prompts(backbone, num_prompts), num_classes=CLASSES, pool="avg"
    ).train()
    images = random_images(device, MANY * 2, backbone)
    labels = torch.randint(CLASSES, (len(images),), device=device)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images).float(), labels).backward()
        optimizer.step()

    measure(step)


@pytest.mark.parametrize("method", ["kmeans", "minibatch_kmeans"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # it is not meant to converge
def test_build_prototypes(measure: Measure, device: torch.device, method: Method) -> None:
    backbone = load_backbone(
        "vit_tiny_patch16_224", checkpoint="bundled:vit_tiny_mae_cifar10", img_size=32, patch_size=4
    ).to(device)
    batches = random_images(device, MANY * 8, backbone).split(MANY * 4)
    measure(lambda: build_prototypes(backbone, batches, num_prompts=10, method=method, max_iter=4))


def test_many_tasks(measure: Measure, device: torch.device) -> None:
    backbone = vit_tiny(device)
    tasks = {
        f"task {number}": PromptedViT(backbone, random_prompts(backbone, 20), num_classes=CLASSES)
        for number in range(4)
    }
    model = MultiTaskViT(backbone, tasks)
    images = random_images(device, MANY * 4, backbone)
    names = [f"task {number % len(tasks)}" for number in range(len(images))]
    with torch.inference_mode():
        measure(lambda: model(images, names))
