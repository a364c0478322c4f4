"""What the hardware allows: bandwidth and matrix rate, measured in the same run as what is compared with them.

``docs/roofline.md`` derives the bytes and operations that each benchmark passes to :meth:`Ceilings.limit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.timing import Work, take_turns


@dataclass(frozen=True)
class Limit:
    """The least time for a piece of work.

    Attributes:
        seconds: that time.
        by: ``"memory"`` or ``"arithmetic"``, whichever takes longer.
        moved_bytes: what has to pass the memory.
        operations: multiplications and additions.
        dtype: whose matrix rate counts.
    """

    seconds: float
    by: str
    moved_bytes: float
    operations: float
    dtype: str


@dataclass(frozen=True)
class Ceilings:
    """The best rates seen of a device.

    Attributes:
        copy: bytes per second of a large copy, read and written.
        read: bytes per second of a large maximum, read only.
        matmul: operations per second of a large product of random numbers, by dtype name.
        samples: the seconds behind them.
    """

    copy: float
    read: float
    matmul: dict[str, float]
    samples: dict[str, list[float]]

    @property
    def bandwidth(self) -> float:
        """The faster of the two ways to move bytes."""
        return max(self.copy, self.read)

    def limit(self, *, moved_bytes: float, operations: float, dtype: str) -> Limit:
        """What so many bytes and operations take at least.

        Example:
            >>> ceilings = Ceilings(copy=8e9, read=1e10, matmul={"float32": 1e11}, samples={})
            >>> limit = ceilings.limit(moved_bytes=2e10, operations=1e11, dtype="float32")
            >>> limit.seconds, limit.by
            (2.0, 'memory')
        """
        # No hardware here multiplies float16 and bfloat16 at different rates.
        rate = self.matmul["bfloat16" if dtype == "float16" else dtype]
        bounds = {"memory": moved_bytes / self.bandwidth, "arithmetic": operations / rate}
        by = max(bounds, key=lambda each: bounds[each])
        return Limit(bounds[by], by, moved_bytes, operations, dtype)

    def as_dict(self) -> dict[str, Any]:
        """For a record."""
        return {
            "copy_bytes_per_second": self.copy,
            "read_bytes_per_second": self.read,
            "matmul_operations_per_second": self.matmul,
            "seconds": self.samples,
        }


def measure_ceilings(
    device: torch.device, dtypes: tuple[str, ...] = ("float32", "bfloat16"), rounds: int = 7
) -> Ceilings:
    """Measure them; under a second on a GPU, a few on a CPU."""
    gpu = device.type == "cuda"
    numbers = (1 << 30) if gpu else (1 << 26)  # float32: 4 GiB and 256 MiB, far more than a cache
    side = 8192 if gpu else 2048
    source = torch.empty(numbers, device=device).uniform_()
    target = torch.empty_like(source)
    factors = {name: [_random(side, name, device) for _ in range(2)] for name in dtypes}

    def product(pair: list[torch.Tensor], number: int) -> None:
        torch.mm(*pair)

    works: dict[str, Work] = {
        "copy": lambda number: target.copy_(source),
        "read": lambda number: source.amax(),
        **{f"matmul {name}": partial(product, pair) for name, pair in factors.items()},
    }
    samples = take_turns(device, works, rounds)
    return Ceilings(
        copy=2 * source.nbytes / min(samples["copy"]),
        read=source.nbytes / min(samples["read"]),
        matmul={name: 2 * side**3 / min(samples[f"matmul {name}"]) for name in dtypes},
        samples=samples,
    )


def name_of(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def _random(side: int, dtype: str, device: torch.device) -> torch.Tensor:
    return torch.randn(side, side, device=device).to(getattr(torch, dtype))
