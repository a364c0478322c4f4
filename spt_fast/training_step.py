"""One training step as one call: forward pass, loss, backward pass, sum over processes, optimizer, moving average.

Nothing in it waits for the device: what a step measured is added up there and read when somebody needs it. On a GPU it
is replayed as one CUDA graph: it has a thousand kernels, which Python launches more slowly than they run. Recorded or
compiled, it always sees batches of one size, so that nothing is recorded or compiled twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from spt_fast.distributed import all_reduced, world
from spt_fast.optimizer import PromptAdamW
from spt_fast.replayed_call import ReplayedCall
from spt_fast.tuned_vit import TunedViT


class TrainingStep:
    """A step of AdamW down the mean loss of a batch, which all processes of a group take together.

    The loss is summed over the images of all processes and divided by their number, so that a step of ``W`` processes
    with ``B`` images each is that of one process with ``W * B``, also where a batch is not full.

    Args:
        model: the model, on its device, in its dtype.
        optimizer: of its prompts and head.
        sums: float64 ``[3]`` on the device; loss, hits and images of every step are added to it.
        batch_size: images of a full batch of this process.
        label_smoothing: of the cross-entropy.
        average: called after the optimizer's step, for a moving average of the weights.
        compile: run forward and backward pass through torch.compile.

    Attributes:
        totals: float32 ``[3]`` on the device: summed loss, hits and images of the last step, over all processes.
        compile_seconds: what the first step took where it is compiled, else ``None``.

    Example:
        >>> from spt_fast import PromptedViT, load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> model = PromptedViT(backbone, torch.randn(2, 5, 192), num_classes=2, pool="avg")
        >>> rates = {"lr": 0.01, "weight_decay": 0.0, "head_weight_decay": 0.0}
        >>> optimizer = PromptAdamW(model.prompts, model.head, **rates)
        >>> step = TrainingStep(model, optimizer, torch.zeros(3, dtype=torch.float64), batch_size=4)
        >>> step(torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 1]))
        >>> int(step.totals[2])
        3
    """

    def __init__(
        self,
        model: TunedViT,
        optimizer: PromptAdamW,
        sums: Tensor,
        *,
        batch_size: int,
        label_smoothing: float = 0.0,
        average: Callable[[], None] | None = None,
        compile: bool = False,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._sums = sums
        self._learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._label_smoothing = label_smoothing
        self._average = average
        # Several processes talk to each other in the middle of a step.
        replayed = sums.device.type == "cuda" and world()[1] == 1
        self._batch_size = batch_size if compile or replayed else None
        self._compiles = compile
        self._loss = self._loss_and_hits
        self._advance: Callable[..., None] = self._take
        self.totals = torch.zeros(3, device=sums.device)
        self.compile_seconds: float | None = None
        if compile:
            self._loss = torch.compile(self._loss_and_hits, dynamic=False)
        if replayed:
            self._advance = ReplayedCall(self._take, sums.device)

    def __call__(self, images: Tensor, labels: Tensor, targets: Tensor | None = None) -> None:
        """Take the step for one batch.

        Args:
            images: ``[n, 3, H, W]`` with ``n`` up to ``batch_size``, on the device.
            labels: int64 ``[n]``.
            targets: float ``[n, C]``, the shares of the classes where images are mixed; ``None`` takes the labels.
        """
        if not len(labels) and world()[1] == 1:
            self.totals.zero_()  # nothing to learn from; several processes only stay equal if all of them step
            return
        begun = time.perf_counter()
        batch = [images, labels, torch.ones(len(labels), device=images.device)]
        if targets is not None:
            batch.append(targets)
        if self._batch_size is not None and len(labels) < self._batch_size:
            # Images that do not count: a graph has one shape.
            missing = self._batch_size - len(labels)
            batch = [F.pad(each, (0, 0) * (each.ndim - 1) + (0, missing)) for each in batch]
        self._optimizer.send_rates()
        self._advance(*batch)
        if self._compiles and self.compile_seconds is None:
            if images.device.type == "cuda":
                torch.cuda.synchronize(images.device)  # once
            self.compile_seconds = time.perf_counter() - begun

    def _take(self, images: Tensor, labels: Tensor, valid: Tensor, targets: Tensor | None = None) -> None:
        self._optimizer.zero_grad()  # of a step that was broken off, while it was being recorded for example
        loss, hits = self._loss(images, labels, valid, targets)
        loss.backward()
        gradients = [_gradient(parameter) for parameter in self._learned]
        totals = torch.stack([loss.detach().float(), hits, valid.sum()])
        if world()[1] > 1:
            # All that processes tell each other, in one message: the gradients of prompts and head, and the numbers.
            message = all_reduced(torch.cat([*(gradient.flatten() for gradient in gradients), totals]))
            *summed, totals = message.split([gradient.numel() for gradient in gradients] + [3])
            for gradient, total in zip(gradients, summed, strict=True):
                gradient.copy_(total.view_as(gradient))
        torch._foreach_div_(gradients, totals[2].clamp(min=1))
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._average is not None:
            self._average()
        self.totals.copy_(totals)
        self._sums += totals

    def _loss_and_hits(
        self, images: Tensor, labels: Tensor, valid: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits = self._model(images).float()
        wanted = labels if targets is None else targets
        losses = F.cross_entropy(logits, wanted, label_smoothing=self._label_smoothing, reduction="none")
        return (losses * valid).sum(), ((logits.argmax(dim=1) == labels) * valid).sum()


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
