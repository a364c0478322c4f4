"""What the k-means comparisons share: tokens of a case, the least time for a pass over them, what centres are worth."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.ceilings import Ceilings, Limit
from benchmarks.record import Row
from spt_fast.kernels import kmeans_step

# Layers, tokens, features and clusters: the letters L, T, D and K.
Case = dict[str, int]
EXTRAS = {
    "inertia": lambda row: f"{row['inertia']:.6g}",
    "iterations": lambda row: str(row["iterations"]),
}


def made_up_tokens(case: Case, device: torch.device) -> Tensor:
    """float32 ``[L, T, D]`` on the CPU, bfloat16 on a GPU: overlapping clusters around an offset that all share."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    features = case["features"]
    x = torch.empty(case["layers"], case["tokens"], features, device=device, dtype=dtype)
    for layer in x:
        centers = torch.randn(64, features, device=device, generator=generator) + 1
        for part in layer.split(1 << 20):
            own = torch.randint(64, (len(part),), device=device, generator=generator)
            noise = torch.randn(part.shape, device=device, generator=generator)
            part.copy_(centers[own] + 2 * noise)
    return x


def pass_limit(ceilings: Ceilings, case: Case, dtype: str, passes: int = 1) -> Limit:
    """The least time for one or more Lloyd passes: every token is read once, and compared with every centre."""
    numbers = case["layers"] * case["tokens"] * case["features"]
    once = ceilings.limit(
        moved_bytes=numbers * getattr(torch, dtype).itemsize,
        operations=numbers * (2 * case["clusters"] + 1),  # and added to the sum of one
        dtype=dtype,
    )
    return replace(
        once,
        seconds=passes * once.seconds,
        moved_bytes=passes * once.moved_bytes,
        operations=passes * once.operations,
    )


def worth(x: Tensor, centers: Tensor) -> float:
    """The inertia of tokens ``[L, T, D]`` under centres ``[L, K, D]``."""
    return float(kmeans_step(x, centers.to(x.device, torch.float32)).inertia.sum())


def title(what: str, case: Case) -> str:
    layers, tokens, features, clusters = case.values()
    return f"{what}, L={layers} T={tokens:,} D={features} K={clusters}"


def first_line(error: Exception) -> str:
    """Why something of somebody else's does not run here."""
    return f"does not run here: {(str(error) or type(error).__name__).splitlines()[0]}"


def in_case(measure: str, case: Case) -> Row:
    return {"measure": measure, **case}
