"""Compiles Triton kernels for GPUs that need not be there, and says what the machine code takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Collection
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


SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of a program, by architecture
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
KMEANS_POINTERS = {
    "labels": "*i64",
    "order": "*i64",
    "starts": "*i64",
    "partial_counts": "*i32",
    "partial_inertia": "*fp64",
}
KMEANS_INTEGERS = ("T", "K", "slots", "tiles", "layer_units", "token_units", "stride_feature")
ATTENTION_POINTERS = {
    **dict.fromkeys(("prompt_index", "prompt_lengths", "order", "starts", "lengths"), "*i64"),
    **dict.fromkeys(("lse", "delta"), "*fp32"),
}


def check_fits(took: Resources, architecture: int) -> None:
    assert took.stack == 0, f"{took} spills registers"
    assert took.registers > 32, f"{took}: the compiler has dropped the kernel's work"
    assert took.shared <= SHARED_MEMORY[architecture], took


def kmeans_resources(kernel_name: str, config: Any, x: Tensor, architecture: int, **more: Any) -> Resources:
    """Compile one k-means kernel as the launcher would for tokens like ``x`` [L, T, D] (a meta tensor will do)."""
    from spt_fast.kernels import kmeans_triton, kmeans_triton_kernels

    constants = kmeans_triton.constants(kernel_name, config, x) | more
    if x.stride(2) == 1:
        constants["stride_feature"] = 1  # Triton takes integers that are 1 as constants

    def kind(name: str) -> str:
        if name in KMEANS_INTEGERS:
            return "i32"
        if name == "distances" and not constants["PER_TOKEN"]:
            return "*fp64"
        return "*" + ELEMENTS[x.dtype] if name in ("x", "terms") else KMEANS_POINTERS.get(name, "*fp32")

    kernel = getattr(kmeans_triton_kernels, kernel_name)
    unaligned = () if constants["UNIT"] > 1 else ("x",)
    return _resources(kernel, kind, constants, unaligned, kmeans_triton.options(config), architecture)


def prepare_resources(width: int, dtype: torch.dtype, architecture: int) -> Resources:
    """Compile the kernel that prepares centroids for tokens of a dtype."""
    from spt_fast.kernels import kmeans_triton_kernels

    constants = {"WIDTH": width, "PIECE": 64, "TERMS": 1 if dtype == torch.float32 else 2, "BLOCK": 2048}

    def kind(name: str) -> str:
        return "i32" if name == "K" else "*" + (ELEMENTS[dtype] if name == "terms" else "fp32")

    kernel = kmeans_triton_kernels.prepare_kernel
    return _resources(kernel, kind, constants, (), {"num_warps": 4}, architecture)


def attention_resources(
    kernel_name: str,
    shape: Any,
    width: int,
    dtype: torch.dtype,
    architecture: int,
    *,
    without: Collection[str] = (),
    partial: bool = False,
    **more: Any,
) -> Resources:
    """Compile one attention kernel as the launcher would.

    Args:
        kernel_name: one of the kernels.
        shape: one of the shapes that the launcher chooses from.
        width: features per head.
        dtype: of the inputs.
        architecture: 80, 90 or 100.
        without: tensors that are ``None``.
        partial: whether gradients of keys and values are written in float32, a sum for each chunk.
        more: compile-time arguments that are the kernel's own.
    """
    from spt_fast.kernels import attention_triton, attention_triton_kernels

    kernel = getattr(attention_triton_kernels, kernel_name)
    constants = attention_triton.constants(width, dtype, 16 // torch.empty(0, dtype=dtype).element_size())
    constants = {name: constant for name, constant in constants.items() if name in kernel.arg_names}
    constants |= attention_triton.blocks_of(kernel, shape) | dict.fromkeys(without) | more

    def kind(name: str) -> str:
        if name == "scale":
            return "fp32"
        if name in attention_triton_kernels.NUMBERS:
            return "i32"
        if partial and name in ("grad_k", "grad_v"):
            return "*fp32"
        return ATTENTION_POINTERS.get(name, "*" + ELEMENTS[dtype])

    options = attention_triton.options(shape) | attention_triton.FUSED
    return _resources(kernel, kind, constants, (), options, architecture)


def _resources(
    kernel: Any,
    kind: Callable[[str], str],
    constants: dict[str, Any],
    unaligned: Collection[str],
    options: dict[str, Any],
    architecture: int,
) -> Resources:
    """Compile a kernel; ``kind`` is the type of each argument that is not among the constants, and pointers are to 16
    bytes unless named in ``unaligned``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else kind(name)
        if signature[name].startswith("*") and name not in unaligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
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
