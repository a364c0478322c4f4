"""Several tasks on one backbone, one forward pass each: for adapters of methods that cannot share a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spt_fast.adapters import Adapter
from spt_fast.errors import InputError


class SeparateTasks(nn.Module):
    """What :class:`~spt_fast.MultiTaskViT` does for prompts, for the adapters of any methods, task after task.

    Args:
        backbone: the backbone of all of them.
        adapters: by the name of the task.

    Raises:
        AdapterMismatchError: an adapter belongs to another backbone.
        CheckpointError: an adapter does not hold what its method stores.
        UnsupportedModelError: its method cannot be used here.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1)
        >>> SeparateTasks(backbone, {}).tasks
        []
    """

    def __init__(self, backbone: VisionTransformer, adapters: Mapping[str, Adapter]) -> None:
        super().__init__()
        self.backbone = backbone
        # Not by name: names of modules cannot hold dots.
        self._models = nn.ModuleList()
        self._index = {name: index for index, name in enumerate(adapters)}
        self.classes: dict[str, list[str]] = {}
        for name, adapter in adapters.items():
            model = adapter.attach(backbone)
            self._models.append(model)
            self.classes[name] = list(model.classes or [])

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self._index)

    def forward(self, images: Tensor, tasks: Sequence[str]) -> Tensor:
        """Logits ``[B, C]`` of images ``[B, 3, H, W]``, each by the adapter of its task; minus infinity behind the
        classes of an image's own task."""
        unknown = [name for name in tasks if name not in self._index]
        if unknown or len(tasks) != len(images):
            raise InputError(f"tasks must be {len(images)} of {', '.join(self.tasks)}, got {list(tasks)}")
        most = max(len(classes) for classes in self.classes.values())
        logits = images.new_full((len(images), most), -torch.inf, dtype=torch.float32)
        for name in dict.fromkeys(tasks):
            rows = torch.tensor(
                [index for index, task in enumerate(tasks) if task == name], device=images.device
            )
            own = self._models[self._index[name]](images[rows]).float()
            logits[rows, : own.shape[1]] = own
        return logits
