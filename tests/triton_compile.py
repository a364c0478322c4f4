"""Compiles Triton kernels for GPUs that need not be there, and says what the machine code takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Resources(NamedTuple):
    """What a program of a compiled kernel takes: registers of a thread, bytes of spilled registers and other stack of a
    thread, bytes of shared memory."""

    registers: int
    stack: int
    shared: int


ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = {"labels": "i64", "partial_counts": "i32", "partial_inertia": "fp64"}
INTEGERS = ("T", "K", "slots", "tiles", "layer_units", "token_units", "stride_feature")


def kmeans_resources(kernel_name: str, config: Any, x: Tensor, architecture: int) -> Resources:
    """Compile one k-means kernel as the launcher would for tokens like ``x`` [L, T, D] (a meta tensor will do)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spt_fast.kernels import kmeans_triton, kmeans_triton_kernels

    kernel = getattr(kmeans_triton_kernels, kernel_name)
    constants = kmeans_triton.constants(kernel_name, config, x)
    if x.stride(2) == 1:
        constants["stride_feature"] = 1  # Triton takes integers that are 1 as constants
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS:
            signature[name] = "i32"
        else:
            element = ELEMENTS[x.dtype] if name in ("x", "terms") else POINTERS.get(name, "fp32")
            signature[name] = "*" + element
            if name != "x" or constants["UNIT"] > 1:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options=kmeans_triton.options(config),
    )
    registers, stack = _usage(compiled.asm["cubin"])
    return Resources(registers, stack, compiled.metadata.shared)


def _usage(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])
