"""The product that all Triton kernels are built on."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, sum, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """``sum + a @ b``; Triton's interpreter cannot multiply bfloat16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum, input_precision="ieee")
    else:
        return tl.dot(a, b, sum, input_precision=PRECISION)
