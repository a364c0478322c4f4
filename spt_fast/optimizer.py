"""AdamW with one learning rate per block of prompts, and for all else that a method learns.

A prompt enters a block only through LayerNorm, so its scale does not change the function; but Adam moves every entry by
about the learning rate whatever its size, so the scale decides how far a step turns it. Token prototypes are tens of
times longer than VPT's uniform start, and deep layers' tokens longer than shallow ones'. Multiplying each block's rate
by the root mean square of its start makes one base rate mean the same turn everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

LearningRateScale = Literal["rms", "none"]


class PromptAdamW(torch.optim.AdamW):
    """AdamW over a prompt parameter ``[L, P, D]`` block by block, over a head, and over whatever else learns.

    Each block is a parameter group of its own that shares the storage of ``prompts``, so that blocks can differ in
    learning rate. Make it after the model is where it will be trained: moving the model later parts the two.

    Args:
        prompts: the prompts, trained if they require a gradient; ``None``: there are none.
        head: the classifier.
        lr: base learning rate.
        weight_decay: of the prompts.
        head_weight_decay: of the head.
        lr_scale: ``"rms"`` multiplies each block's learning rate by the root mean square of its entries now (1 for a
            block of zeros); ``"none"`` leaves all at ``lr``, as the paper does.
        fused: one kernel for all parameters and, on a GPU, rates on the device, so that a CUDA graph can hold the step.
        others: what else learns, each with what multiplies ``lr`` for it. Matrices decay as prompts do; vectors and
            scalars (biases, scales, gates) do not.
    """

    def __init__(
        self,
        prompts: nn.Parameter | None,
        head: nn.Linear,
        *,
        lr: float,
        weight_decay: float,
        head_weight_decay: float,
        lr_scale: LearningRateScale = "rms",
        fused: bool = False,
        others: Iterable[tuple[nn.Parameter, float]] = (),
    ) -> None:
        self.prompts = prompts
        learning = prompts if prompts is not None and prompts.requires_grad else None
        self.blocks: list[Tensor] = [] if learning is None else list(learning.detach())
        groups: list[dict[str, Any]] = []
        for block in self.blocks:
            rms = float(block.double().square().mean().sqrt())
            scale = rms if lr_scale == "rms" and rms > 0 else 1.0
            # These are timm's names: its schedulers start from "initial_lr" and multiply what they make of it by
            # "lr_scale". Without a schedule "lr" has to hold the product from the beginning.
            rates = {"lr": lr * scale, "initial_lr": lr, "lr_scale": scale}
            groups.append({"params": [block], "weight_decay": weight_decay, **rates})
        alike: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter, scale in others:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            alike.setdefault((scale, decay), []).append(parameter)
        for (scale, decay), parameters in alike.items():
            rates = {"lr": lr * scale, "initial_lr": lr, "lr_scale": scale}
            groups.append({"params": parameters, "weight_decay": decay, **rates})
        groups.append({"params": list(head.parameters()), "weight_decay": head_weight_decay, "lr_scale": 1.0})
        device = head.weight.device
        on_gpu = device.type == "cuda"
        super().__init__(groups, lr=lr, fused=fused or None, capturable=fused and on_gpu)
        self._rates = torch.empty(len(groups), device=device) if fused and on_gpu else None

    def send_rates(self) -> None:
        """Take the learning rates of the groups to the device, without waiting for it."""
        if self._rates is not None:
            rates = torch.tensor([group["lr"] for group in self.param_groups], pin_memory=True)
            self._rates.copy_(rates, non_blocking=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take the gradient that backward left in ``prompts.grad`` to the blocks, then step."""
        if self.prompts is not None and self.prompts.grad is not None:
            for block, gradient in zip(self.blocks, self.prompts.grad, strict=True):
                block.grad = gradient
        if self._rates is None:
            return super().step(closure)
        numbers = [group["lr"] for group in self.param_groups]
        try:
            for group, rate in zip(self.param_groups, self._rates, strict=True):
                group["lr"] = rate
            return super().step(closure)
        finally:  # schedules and files want numbers
            for group, number in zip(self.param_groups, numbers, strict=True):
                group["lr"] = number

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, also one that was saved on another kind of device."""
        own = [{name: group[name] for name in ("fused", "capturable")} for group in self.param_groups]
        groups = [{**theirs, **ours} for theirs, ours in zip(state_dict["param_groups"], own, strict=True)]
        super().load_state_dict({**state_dict, "param_groups": groups})

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self.prompts is not None:
            self.prompts.grad = None


def cosine_schedule(
    optimizer: torch.optim.Optimizer, *, steps: int, warmup_steps: int, min_learning_rate: float
) -> CosineLRScheduler:
    """Linear warm-up, then cosine down to ``min_learning_rate`` at the last of ``steps`` (Sec. 4.1).

    Call ``schedule.step_update(n)`` before the ``n``-th optimizer step, counted from 1.
    """
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, steps - warmup_steps),
        lr_min=min_learning_rate,
        warmup_t=warmup_steps,
        warmup_prefix=True,
        t_in_epochs=False,
    )
