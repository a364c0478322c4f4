"""What a model of many tasks keeps of them, stacked: which task an image belongs to is then an index, and no loop.

Backbone and prompts are frozen, so a deep prompt's key and value in a block never change: they are computed when a task
comes and not again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spt_fast.pooling import Pool
from spt_fast.prompted_block import PromptKeysValues, prompt_keys_values


@dataclass(frozen=True)
class Task:
    """One task as it came.

    Attributes:
        prompts: ``[L, P, D]`` (deep) or ``[1, P, D]`` (shallow).
        head_weight: ``[C, D]``.
        head_bias: ``[C]``.
        pool: as for :class:`~spt_fast.PromptedViT`.
        classes: names of the ``C`` outputs.
        deep: whether every block has prompts of its own.
    """

    prompts: Tensor
    head_weight: Tensor
    head_bias: Tensor
    pool: Pool | None
    classes: tuple[str, ...]
    deep: bool

    @property
    def num_prompts(self) -> int:
        """Prompt tokens per block, ``P``."""
        return self.prompts.shape[1]


class PromptBank(NamedTuple):
    """The prompts of the tasks of one form, deep or shallow; ``P`` is the most that one of them has.

    Attributes:
        names: the ``S`` tasks, in the order of the sets.
        lengths: int64 ``[S]``: how many prompts each task has; what lies behind them means nothing.
        rows: ``[S, P, D]``: the prompts that enter the last block (deep) or the first (shallow).
        keys_values: for each block ``[S, H, P, d]``; empty for shallow prompts, which depend on the image after the
            first block.
    """

    names: tuple[str, ...]
    lengths: Tensor
    rows: Tensor
    keys_values: tuple[PromptKeysValues, ...]


@dataclass(frozen=True)
class TaskBanks:
    """All tasks of a model. Never changed, only replaced by another one, so that no one sees half of a change.

    Attributes:
        tasks: name -> task, in the order of the heads.
        prompts: whether deep -> the bank of that form, where it has tasks.
        head_weight: ``[S, C, D]``, ``C`` being the most classes that a task has; zero behind a task's own.
        head_bias: ``[S, C]``; minus infinity behind a task's own classes, which is what their logits become.
    """

    tasks: dict[str, Task]
    prompts: dict[bool, PromptBank]
    head_weight: Tensor
    head_bias: Tensor


def stack_tasks(
    backbone: VisionTransformer, tasks: dict[str, Task], before: TaskBanks | None = None
) -> TaskBanks:
    """The banks of ``tasks``.

    Args:
        backbone: the frozen model that gives prompts their keys and values.
        tasks: name -> task.
        before: banks made with the same backbone, in the same dtype and on the same device; the keys and values of
            tasks that are there are taken over. Tasks that are new come behind those that are not.

    Returns:
        Prompts in the backbone's dtype and heads in their own, on the backbone's device.
    """
    prompts = {}
    for deep in (True, False):
        of_this_form = {name: task for name, task in tasks.items() if task.deep == deep}
        if of_this_form:
            prompts[deep] = _bank(backbone, of_this_form, deep, before.prompts.get(deep) if before else None)
    return TaskBanks(tasks, prompts, *_heads(backbone, list(tasks.values())))


def _bank(
    backbone: VisionTransformer, tasks: dict[str, Task], deep: bool, before: PromptBank | None
) -> PromptBank:
    names = tuple(tasks)
    if before is not None and before.names == names:
        return before
    like = next(backbone.parameters())
    known = () if before is None else before.names
    kept = [known.index(name) for name in names if name in known]
    new = [task for name, task in tasks.items() if name not in known]
    most = max(task.num_prompts for task in tasks.values())
    keys_values = []
    if deep:
        for index, block in enumerate(backbone.blocks):
            parts = []
            if before is not None and kept:
                # A negative padding cuts: the longest prompts may have gone.
                parts.append(
                    [F.pad(t[kept], (0, 0, 0, most - t.shape[2])) for t in before.keys_values[index][:2]]
                )
            if new:
                fresh = prompt_keys_values(block, _padded([task.prompts[index] for task in new], like, most))
                parts.append([fresh.keys, fresh.values])
            keys_values.append(PromptKeysValues(*(torch.cat(pair) for pair in zip(*parts, strict=True))))
    return PromptBank(
        names,
        torch.tensor([task.num_prompts for task in tasks.values()], device=like.device),
        _padded([task.prompts[-1] for task in tasks.values()], like, most),
        tuple(keys_values),
    )


def _padded(prompts: list[Tensor], like: Tensor, most: int) -> Tensor:
    """Prompts ``[P, D]`` of several tasks as one ``[S, most, D]``, in the dtype and on the device of ``like``."""
    rows = pad_sequence([each.to(like.device, like.dtype) for each in prompts], batch_first=True)
    return F.pad(rows, (0, 0, 0, most - rows.shape[1]))


def _heads(backbone: VisionTransformer, tasks: list[Task]) -> tuple[Tensor, Tensor]:
    device = next(backbone.parameters()).device
    dtype = torch.float32
    for task in tasks:
        dtype = torch.promote_types(dtype, task.head_weight.dtype)
    most = max((len(task.classes) for task in tasks), default=0)
    weight = torch.zeros(len(tasks), most, backbone.embed_dim, dtype=dtype, device=device)
    bias = torch.full((len(tasks), most), -torch.inf, dtype=dtype, device=device)
    for index, task in enumerate(tasks):
        weight[index, : len(task.classes)] = task.head_weight
        bias[index, : len(task.classes)] = task.head_bias
    return weight, bias
