"""How a batch whose images belong to different tasks is computed; all of it is decided on the host.

Images are sorted by form of prompts, pooling and task. What has to differ between forms and poolings then works on
slices of the batch; what differs between tasks is an index, or a row of one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from spt_fast.pooling import Pool
from spt_fast.prompted_block import PromptKeysValues
from spt_fast.task_banks import TaskBanks

POOLS: tuple[Pool | None, ...] = (None, *get_args(Pool))


class PoolSlice(NamedTuple):
    """Images of a group that are pooled alike.

    Attributes:
        pool: as for :class:`~spt_fast.PromptedViT`.
        images: which of the group's.
    """

    pool: Pool | None
    images: slice


class FormGroup(NamedTuple):
    """The images of a batch whose tasks have the same form of prompts; ``P`` is the most prompts that one of them has.

    Attributes:
        deep: the form.
        images: which of the sorted batch, ``b`` of them.
        sets: int64 ``[b]``: the set of every image.
        rows: ``[S, P, D]``, see :class:`~spt_fast.task_banks.PromptBank`.
        lengths: int64 ``[S]``; ``None``: all tasks that occur have ``P``.
        prompts: for each block what it is given (deep).
        parts: the images by pooling.
    """

    deep: bool
    images: slice
    sets: Tensor
    rows: Tensor
    lengths: Tensor | None
    prompts: tuple[PromptKeysValues, ...]
    parts: tuple[PoolSlice, ...]


class BatchPlan(NamedTuple):
    """What :meth:`spt_fast.MultiTaskViT.logits` needs to know of a batch.

    Attributes:
        size: images in the batch, ``B``.
        order: int64 ``[B]`` that sorts the images, or ``None`` where they are sorted.
        groups: one for each form of prompts that occurs.
        head_weight: ``[G, C, D]``: the heads of the ``G`` tasks that occur.
        head_bias: ``[G, C]``.
        slots: int64 ``[G, M]``: the sorted images of each of these tasks; ``M`` is the most that one has, and the slots
            that are left over repeat an image.
        answers: int64 ``[B]``: the slot of every image, numbered through, in the order in which they came.
    """

    size: int
    order: Tensor | None
    groups: tuple[FormGroup, ...]
    head_weight: Tensor
    head_bias: Tensor
    slots: Tensor
    answers: Tensor


class _Run(NamedTuple):
    """The images of one task, which stand together in the sorted batch."""

    shallow: bool
    pool: Pool | None
    head: int
    images: range


def plan_batch(banks: TaskBanks, names: Sequence[str]) -> BatchPlan:
    """The plan for a batch.

    Args:
        banks: the tasks; the plan keeps what it needs of them.
        names: the task of every image, all of them known.
    """
    places = {
        name: (not task.deep, POOLS.index(task.pool), head)
        for head, (name, task) in enumerate(banks.tasks.items())
    }
    order = sorted(range(len(names)), key=lambda image: places[names[image]])
    runs: list[_Run] = []
    for (shallow, pool, head), of_task in groupby(order, key=lambda image: places[names[image]]):
        start = runs[-1].images.stop if runs else 0
        runs.append(_Run(shallow, POOLS[pool], head, range(start, start + len(list(of_task)))))

    set_of = {name: index for bank in banks.prompts.values() for index, name in enumerate(bank.names)}
    sets = [set_of[names[image]] for image in order]
    slots, answers = _slots(runs, order)
    on_device = _on_device(banks.head_weight.device, order, sets, [run.head for run in runs], slots, answers)
    order_tensor, sets_tensor, heads, slots_tensor, answers_tensor = on_device
    return BatchPlan(
        len(names),
        None if order == sorted(order) else order_tensor,
        tuple(
            _group(banks, list(of_form), sets_tensor) for _, of_form in groupby(runs, lambda run: run.shallow)
        ),
        banks.head_weight[heads],
        banks.head_bias[heads],
        slots_tensor.view(len(runs), -1) if runs else slots_tensor.view(0, 0),
        answers_tensor,
    )


def _slots(runs: list[_Run], order: list[int]) -> tuple[list[int], list[int]]:
    """Slots and answers of a plan, flat."""
    most = max((len(run.images) for run in runs), default=0)
    slots: list[int] = []
    answers = [0] * len(order)
    for run in runs:
        for slot, image in enumerate(run.images, start=len(slots)):
            answers[order[image]] = slot
        slots += [*run.images, *[run.images[0]] * (most - len(run.images))]
    return slots, answers


def _group(banks: TaskBanks, runs: list[_Run], sets: Tensor) -> FormGroup:
    """The group of these tasks. What only tasks need that are not in the batch is cut off."""
    bank = banks.prompts[not runs[0].shallow]
    first, stop = runs[0].images.start, runs[-1].images.stop
    tasks = list(banks.tasks.values())
    numbers = {tasks[run.head].num_prompts for run in runs}
    most = max(numbers)
    lengths = None if len(numbers) == 1 else bank.lengths.clamp(max=most)
    parts = []
    for pool, of_pool in groupby(runs, lambda run: run.pool):
        alike = [run.images for run in of_pool]
        parts.append(PoolSlice(pool, slice(alike[0].start - first, alike[-1].stop - first)))
    own = sets[first:stop]
    return FormGroup(
        not runs[0].shallow,
        slice(first, stop),
        own,
        bank.rows[:, :most],
        lengths,
        tuple(
            PromptKeysValues(each.keys[:, :, :most], each.values[:, :, :most], own, lengths)
            for each in bank.keys_values
        ),
        tuple(parts),
    )


def _on_device(device: torch.device, *lists: list[int]) -> tuple[Tensor, ...]:
    """Each list as an int64 tensor; they travel in one copy that the host does not wait for."""
    numbers = torch.tensor([number for each in lists for number in each], dtype=torch.int64)
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True).split([len(each) for each in lists])
