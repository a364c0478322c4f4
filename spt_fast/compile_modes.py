"""Which mode of torch.compile runs a model fastest on its device: measured, not guessed."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

EAGER = "eager"
# CUDA graphs, which "reduce-overhead" and "max-autotune" add, exist on CUDA only.
MODES = {"cpu": (EAGER, "default"), "cuda": (EAGER, "default", "reduce-overhead", "max-autotune")}
WARM_UP, ROUNDS = 3, 7


def measure_modes(model: nn.Module, images: Tensor, use: Callable[[str], None]) -> dict[str, float]:
    """Seconds a step of ``model`` takes in each mode, the median of a few.

    A step is a forward and a backward pass if the model is in training mode, else a forward pass. No parameter, no
    gradient and no random state is changed.

    Args:
        model: the model, on its device.
        images: a batch as it will be given.
        use: called with a mode, switches ``model`` to it.

    Returns:
        Mode -> seconds; a mode that cannot run here is left out, with a warning that says why.
    """
    seconds = {}
    gradients = [parameter.grad for parameter in model.parameters()]
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for mode in MODES.get(images.device.type, (EAGER, "default")):
            use(mode)
            try:
                for _ in range(WARM_UP):
                    _step(model, images)
                seconds[mode] = statistics.median(_step(model, images) for _ in range(ROUNDS))
            except Exception as error:
                if mode == EAGER:
                    raise
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                warnings.warn(f"torch.compile mode {mode!r} does not run here: {reason}", stacklevel=3)
            finally:
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.grad = gradient
    return seconds


def _step(model: nn.Module, images: Tensor) -> float:
    begun = time.perf_counter()
    with torch.set_grad_enabled(model.training):
        logits = model(images)
    if logits.requires_grad:
        for parameter in model.parameters():
            parameter.grad = None
        logits.float().logsumexp(dim=1).sum().backward()
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - begun
