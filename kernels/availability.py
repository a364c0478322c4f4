"""Which backends can run on this machine, and why the others cannot."""

import torch

from . import attention, kmeans

_OPS = {
    "kmeans_assign": kmeans.ASSIGN_BACKENDS,
    "kmeans_step": kmeans.STEP_BACKENDS,
    "prompt_attention": attention.BACKENDS,
}


def available_backends() -> dict[str, list[str]]:
    """Op name -> names of the backends that can run on one of this machine's devices, best first.

    Example:
        >>> available_backends()["prompt_attention"][-1]
        'torch'
    """
    missing = unavailable_backends()
    return {op: [name for name in backends if name not in missing[op]] for op, backends in _OPS.items()}


def unavailable_backends() -> dict[str, dict[str, str]]:
    """Op name -> why each of the other backends cannot run here.

    Example:
        >>> "torch" in unavailable_backends()["prompt_attention"]
        False
    """
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    # Two small tensors of an ordinary width stand for what a backend may be given.
    probes = [[torch.zeros(1, 64, device=device)] * 2 for device in devices]
    reasons: dict[str, dict[str, str]] = {}
    for op, backends in _OPS.items():
        answers = {name: [each.why_not(*probe) for probe in probes] for name, each in backends.items()}
        reasons[op] = {name: said[0] for name, said in answers.items() if said[0] and all(said)}
    return reasons
