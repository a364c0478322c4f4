"""MultiTaskViT: one frozen backbone serves many trained tasks at once, in batches in which each image names its own.

The adapters share everything but their prompts and heads. In the deep form a task is, for a block, no more than a few
keys and values, and these never change: an image's attention reads those of its task where they lie
(``prompt_index`` of :func:`spt_fast.kernels.prompt_attention`), and all heads are one product.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spt_fast.adapters import Adapter, check_identity
from spt_fast.backbones import backbone_identity, check_backbone, check_images, embed, final_norm, freeze
from spt_fast.batch_plan import BatchPlan, FormGroup, plan_batch
from spt_fast.errors import InputError, UnsupportedModelError
from spt_fast.pooling import Pool, pooled, reads_prefix_only
from spt_fast.prompted_block import prompt_keys_values, prompted_block
from spt_fast.prompted_vit import PromptedViT
from spt_fast.sharded_block import is_sharded
from spt_fast.task_banks import Task, TaskBanks, stack_tasks
from spt_fast.tuned_vit import TunedViT


class MultiTaskViT(nn.Module):
    """Many adapters on one frozen backbone, for batches of images of different tasks.

    Equal to running every image through the :class:`~spt_fast.PromptedViT` of its task. Tasks may differ in number of
    prompts, form (deep, shallow), pooling and classes. For inference: nothing here learns, and what was learned is in
    the adapters, of which the model keeps copies.

    Args:
        backbone: the backbone of all adapters; it is frozen, put in eval mode and kept there.
        adapters: name of the task -> what :meth:`add` takes.

    Raises:
        UnsupportedModelError: the backbone cannot be prompted.
        AdapterMismatchError: an adapter of another backbone; the message names the task and the difference.
        InputError: as for :meth:`add`.

    Example:
        >>> from spt_fast import PromptedViT, load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> birds = PromptedViT(backbone, torch.randn(2, 5, 192), num_classes=4)
        >>> cars = PromptedViT(backbone, torch.randn(1, 8, 192), num_classes=3, pool="avg")
        >>> model = MultiTaskViT(backbone, {"birds": birds, "cars": cars})
        >>> logits = model(torch.randn(3, 3, 32, 32), ["cars", "birds", "cars"])
        >>> logits.shape, logits[0, 3].item(), model.classes["cars"]
        (torch.Size([3, 4]), -inf, ['0', '1', '2'])
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        adapters: Mapping[str, Adapter | PromptedViT | str | os.PathLike[str]],
    ) -> None:
        super().__init__()
        if is_sharded(check_backbone(backbone)):
            raise UnsupportedModelError(
                "a backbone whose blocks are sharded trains tasks, it does not serve them"
            )
        self.backbone = freeze(backbone)
        self._banks: TaskBanks = stack_tasks(backbone, {})
        self._extend(adapters)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order in which they came."""
        return list(self._banks.tasks)

    @property
    def classes(self) -> dict[str, list[str]]:
        """Task -> names of its outputs; numbers where an in-memory model has no names."""
        return {name: list(task.classes) for name, task in self._banks.tasks.items()}

    def add(self, name: str, adapter: Adapter | PromptedViT | str | os.PathLike[str]) -> None:
        """Serve one more task.

        Args:
            name: what images will call it.
            adapter: an :class:`~spt_fast.Adapter`, the path of one, or a :class:`~spt_fast.PromptedViT`, which is
                taken as it is now; its backbone may be another copy of this model's.

        Raises:
            InputError: the name is taken or not a string, or the adapter is neither of these.
            AdapterMismatchError: the adapter belongs to another backbone; the message names the difference.
            MissingFileError: no such file.
            CheckpointError: the file is not an adapter.
        """
        self._extend({name: adapter})

    def drop(self, name: str) -> None:
        """Stop serving a task.

        Raises:
            InputError: there is no such task; the message lists those there are.
        """
        before = self._banks
        if name not in before.tasks:
            raise InputError(f"there is no task {name!r} to drop; {self._known()}")
        kept = {each: task for each, task in before.tasks.items() if each != name}
        with torch.no_grad():
            self._banks = stack_tasks(self.backbone, kept, before)

    def train(self, mode: bool = True) -> MultiTaskViT:
        """Nothing learns here: the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def cast_backbone(self, dtype: torch.dtype) -> MultiTaskViT:
        """Use a copy of the backbone in ``dtype`` from now on; heads keep theirs. Returns ``self``.

        The caller's own backbone object stays as it is.
        """
        if next(self.backbone.parameters()).dtype != dtype:
            self.backbone = copy.deepcopy(self.backbone).to(dtype)
            self._compute_banks(self._banks.tasks)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiTaskViT:
        """What ``to``, ``cuda``, ``double`` and the like do. Keys and values are computed again from the prompts, so
        that they are as exact as the new type allows."""
        super()._apply(fn, recurse)
        tasks = {
            name: replace(
                task, prompts=fn(task.prompts), head_weight=fn(task.head_weight), head_bias=fn(task.head_bias)
            )
            for name, task in self._banks.tasks.items()
        }
        self._compute_banks(tasks)
        return self

    def forward(self, images: Tensor, tasks: Sequence[str]) -> Tensor:
        """Logits of images, each by the adapter of its task.

        Args:
            images: ``[B, 3, H, W]``.
            tasks: ``B`` names.

        Returns:
            ``[B, C]``, ``C`` being the most classes that a task of this model has; minus infinity behind the classes of
            an image's own task, so that a softmax is over these alone.

        Raises:
            InputError: images of the wrong shape, a task that is not there, or not one task for each image.
        """
        return self.logits(images, self.plan(tasks))

    @torch.compiler.disable
    def plan(self, tasks: Sequence[str]) -> BatchPlan:
        """Everything about a batch that the images have no part in, for :meth:`logits`.

        A plan may be used as often as batches of the same tasks come. It holds the tasks as they are now, also if they
        are dropped afterwards; after ``to`` or :meth:`cast_backbone` it has to be made again.

        Args:
            tasks: the name of the task of each image.

        Raises:
            InputError: a task that is not there; the message lists those there are.
        """
        banks = self._banks
        if isinstance(tasks, str):
            raise InputError(
                f"tasks must be a sequence of names, one for each image, got the string {tasks!r}"
            )
        names = list(tasks)
        for index, name in enumerate(names):
            if not isinstance(name, str) or name not in banks.tasks:
                raise InputError(
                    f"tasks[{index}] is {name!r}, which is no task of this model; {self._known()}"
                )
        with torch.no_grad():
            return plan_batch(banks, names)

    def logits(self, images: Tensor, plan: BatchPlan) -> Tensor:
        """What :meth:`forward` returns, for a plan made before: tensors alone, which is what to compile.

        Args:
            images: ``[B, 3, H, W]``.
            plan: of :meth:`plan`.

        Raises:
            InputError: images of the wrong shape, or another number than the plan is for.

        Example:
            >>> from spt_fast import PromptedViT, load_backbone
            >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
            >>> birds = PromptedViT(backbone, torch.randn(2, 5, 192), num_classes=4)
            >>> model = MultiTaskViT(backbone, {"birds": birds})
            >>> compiled = torch.compile(model.logits)  # runs at the first call
            >>> images, plan = torch.randn(2, 3, 32, 32), model.plan(["birds", "birds"])
            >>> model.logits(images, plan).shape
            torch.Size([2, 4])
        """
        check_images(self.backbone, images)
        if images.shape[0] != plan.size:
            raise InputError(
                f"tasks must name one task for each of the {images.shape[0]} images, got {plan.size}"
            )
        if not plan.groups:
            return plan.head_bias.new_empty(0, plan.head_bias.shape[1])
        x = embed(self.backbone, images if plan.order is None else images[plan.order])
        features: list[Tensor] = []
        for group in plan.groups:
            features += (self._deep if group.deep else self._shallow)(x[group.images], group)
        # One product for all heads. A task that has fewer images than another repeats one; torch's own grouped product
        # knows no float64 and wants its rows aligned.
        by_task = torch.cat(features).to(plan.head_weight.dtype)[plan.slots]
        logits = torch.baddbmm(plan.head_bias[:, None], by_task, plan.head_weight.transpose(1, 2))
        return logits.flatten(0, 1)[plan.answers]

    def _deep(self, x: Tensor, group: FormGroup) -> list[Tensor]:
        """Eq. 6/13 up to what the heads see, ``[.., D]`` for each pooling of the group."""
        *blocks, last = self.backbone.blocks
        for block, prompts in zip(blocks, group.prompts, strict=False):
            x = prompted_block(block, x, prompts)
        features = []
        for pool, images in group.parts:
            tokens, num_tokens = x[images], x.shape[1]
            queries = None
            if pool == "avg_with_prompts":
                queries = torch.cat([tokens, group.rows[group.sets[images]]], dim=1)
            elif reads_prefix_only(self.backbone, pool):
                queries = tokens[:, : self.backbone.num_prefix_tokens]
            prompts = group.prompts[-1]._replace(prompt_index=group.sets[images])
            tokens = prompted_block(last, tokens, prompts, queries=queries)
            features.append(self._pooled(pool, tokens, num_tokens, group, images))
        return features

    def _shallow(self, x: Tensor, group: FormGroup) -> list[Tensor]:
        """Eq. 4-5/11-12: prompts are rows of the sequence all the way. Where tasks differ in how many they have, rows
        that are not there are computed with the others, but nothing attends to them."""
        num_tokens = x.shape[1]
        x = torch.cat([x, group.rows[group.sets]], dim=1)
        lengths = None if group.lengths is None else group.lengths[group.sets]
        for block in self.backbone.blocks:
            if lengths is None:
                x = prompted_block(block, x)
            else:
                prompts = prompt_keys_values(block, x[:, num_tokens:])._replace(prompt_lengths=lengths)
                x = prompted_block(block, x[:, :num_tokens], prompts, queries=x)
        return [self._pooled(pool, x[images], num_tokens, group, images) for pool, images in group.parts]

    def _pooled(
        self, pool: Pool | None, x: Tensor, num_tokens: int, group: FormGroup, images: slice
    ) -> Tensor:
        """What the heads see of the last block's rows: the image's own, and behind them its prompts' where there are
        any."""
        x, prompts = x[:, :num_tokens], x[:, num_tokens:]
        if pool != "avg_with_prompts" or group.lengths is None:
            return pooled(self.backbone, pool, x, prompts)
        missing = _missing(group.lengths[group.sets[images]], prompts.shape[1])
        averaged = x[:, 1:] if self.backbone.has_class_token else x
        rows = torch.cat([prompts.masked_fill(missing[:, :, None], 0), averaged], dim=1)
        count = rows.shape[1] - missing.sum(dim=1, keepdim=True)
        total = rows.sum(dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
        return final_norm(self.backbone)((total / count).to(x.dtype))

    def _extend(self, adapters: Mapping[str, Adapter | PromptedViT | str | os.PathLike[str]]) -> None:
        """Take all of these or, if something is wrong with one of them, none."""
        before = self._banks
        tasks = dict(before.tasks)
        for name, adapter in adapters.items():
            if not isinstance(name, str):
                raise InputError(f"the name of a task must be a string, got {name!r}")
            if name in tasks:
                raise InputError(f"there is a task {name!r} already; drop it first, or use another name")
            try:
                tasks[name] = self._task(adapter)
            except InputError as error:
                raise type(error)(f"task {name!r}: {error}") from error
        with torch.no_grad():
            self._banks = stack_tasks(self.backbone, tasks, before)

    def _task(self, adapter: Any) -> Task:
        if isinstance(adapter, (str, os.PathLike)):
            adapter = Adapter.load(adapter)
        if isinstance(adapter, Adapter):
            model = adapter.attach(self.backbone)
        elif isinstance(adapter, TunedViT):
            model = adapter
            if model.backbone is not self.backbone:
                check_identity(backbone_identity(model.backbone), self.backbone)
        else:
            raise InputError(f"expected an Adapter, its path or a PromptedViT, got {type(adapter).__name__}")
        if not isinstance(model, PromptedViT) or model.name != PromptedViT.name:
            raise InputError(
                f"an adapter of {model.name} is no prompts and a head, which is what one pass can serve many of; "
                "load_adapter serves it alone"
            )
        names = model.classes
        if names is None:
            names = [str(index) for index in range(model.head.out_features)]
        prompts, weight, bias = (
            tensor.detach().to(next(self.backbone.parameters()).device, copy=True)
            for tensor in (model.prompts, model.head.weight, model.head.bias)
        )
        return Task(prompts, weight, bias, model.pool, tuple(names), model.deep)

    def _compute_banks(self, tasks: dict[str, Task]) -> None:
        with torch.no_grad():
            self._banks = stack_tasks(self.backbone, tasks)

    def _known(self) -> str:
        names = self.tasks
        return f"it has {', '.join(names)}" if names else "it has none yet: add(name, adapter) gives it one"


def _missing(lengths: Tensor, num_prompts: int) -> Tensor:
    """True where there is no prompt: ``[B]`` to ``[B, num_prompts]``."""
    return torch.arange(num_prompts, device=lengths.device) >= lengths[:, None]
