"""prompt_attention in Triton: online softmax over prompts and own keys where they lie in memory, nothing copied.

The forward pass is one launch. The backward pass is up to four, each left out where nobody asked for what it computes:
the rows' ``sum(out * grad_out)``, the queries' gradient, the own keys' and values', the prompts'. The first block of a
ViT, whose tokens need no gradient, runs two of them. There are no atomics; sums run in an order that depends on nothing
but the inputs' shapes and the GPU, so that results repeat bit for bit, whichever shapes the autotuner prefers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import triton_device
from .attention_inputs import AttentionInputs
from .triton_device import capability, is_interpreted, power_of_two, processors
from .triton_launch import Described, launch

WIDEST_HEAD = 128


class Shape(NamedTuple):
    """How a kernel is cut into pieces.

    Attributes:
        queries: queries looked at together, a power of two.
        keys: keys looked at together, a power of two.
        stages: blocks under way from memory at a time, the one in use included.
        warps: warps of a program.
    """

    queries: int
    keys: int
    stages: int
    warps: int


class Description(NamedTuple):
    """A launch, all but its kernel and tensors.

    Attributes:
        programs: how many there are in a shape.
        shapes: to choose from.
        sizes: about which the fastest depends.
        numbers: arguments that follow the tensors.
        constant: compile-time arguments, apart from the shape's.
    """

    programs: Callable[[Shape], int]
    shapes: tuple[Shape, ...]
    sizes: tuple[int, ...]
    numbers: tuple[float, ...]
    constant: dict[str, Any]


def why_not(*tensors: Tensor) -> str | None:
    """Why the Triton kernels cannot take these tensors, the queries first, or ``None``."""
    q = tensors[0]
    if find_spec("triton") is None:
        return "Triton is not installed"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {str(q.dtype)[6:]}"
    if q.shape[-1] > WIDEST_HEAD:
        return f"the kernels take up to {WIDEST_HEAD} features per head, not {q.shape[-1]}"
    return triton_device.why_not(q, "queries", lambda: _kernel("forward_kernel"))


def forward(inputs: AttentionInputs, out: Tensor) -> Tensor:
    """Write the attention into ``out`` ``[B, H, Nq, d]``; returns the log-sum-exp of the scores ``[B, H, Nq]``."""
    q, k, v, prompt_k, prompt_v, index, lengths, scale = _readable(inputs)
    batch, heads, num_queries, width = q.shape
    lse = q.new_empty(batch, heads, num_queries, dtype=torch.float32)

    def describe() -> Description:
        unit = wide_reads(q, k, v, prompt_k, prompt_v, out)
        return Description(
            lambda shape: batch * heads * -(-num_queries // shape.queries),
            query_shapes("forward_kernel", width, q.dtype, capability(q), num_queries),
            (num_queries, prompt_k.shape[2] + k.shape[2]),
            (
                *_strides(unit, q, k, v),
                *_set_strides(unit, inputs, prompt_k, prompt_v),
                *_strides(unit, out),
                abs(scale) or 1.0,
                heads,
                num_queries,
                k.shape[2],
                prompt_k.shape[2],
            ),
            constants(width, q.dtype, unit) | {"SIGN": (scale > 0) - (scale < 0)},
        )

    tensors = (q, k, v, prompt_k, prompt_v, index, lengths, out, lse)
    _launch("forward_kernel", tensors, (scale, inputs.shared), describe)
    return lse


def backward(
    inputs: AttentionInputs,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    needs_prompt_k: bool,
    needs_prompt_v: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Write the gradients that are not ``None``; returns those of the prompts that are needed."""
    inputs = _readable(inputs)
    grad_out, out, lse = _rows(grad_out), _rows(out), lse.contiguous()
    delta = None
    if grad_q is not None or grad_k is not None or needs_prompt_k:
        delta = _delta(out, grad_out)
    if grad_q is not None:
        _write_grad_q(inputs, grad_out, lse, delta, grad_q)
    if grad_k is not None or grad_v is not None:
        _write_keys(
            inputs,
            (inputs.k, inputs.v),
            (None, None, None),
            1,
            (grad_out, lse, delta),
            *(None if gradient is None else gradient[None] for gradient in (grad_k, grad_v)),
        )
    if not (needs_prompt_k or needs_prompt_v):
        return None, None
    return _prompt_gradients(inputs, (grad_out, lse, delta), needs_prompt_k, needs_prompt_v)


def _delta(out: Tensor, grad_out: Tensor) -> Tensor:
    batch, heads, num_queries, width = out.shape
    delta = out.new_empty(batch, heads, num_queries, dtype=torch.float32)

    def describe() -> Description:
        unit = wide_reads(out, grad_out)
        return Description(
            lambda shape: batch * heads * -(-num_queries // shape.queries),
            query_shapes("delta_kernel", width, out.dtype, capability(out), num_queries),
            (num_queries,),
            (*_strides(unit, out, grad_out), heads, num_queries),
            constants(width, out.dtype, unit),
        )

    _launch("delta_kernel", (out, grad_out, delta), (), describe)
    return delta


def _write_grad_q(
    inputs: AttentionInputs, grad_out: Tensor, lse: Tensor, delta: Tensor | None, grad_q: Tensor
) -> None:
    q, k, v, prompt_k, prompt_v, index, lengths, scale = inputs
    batch, heads, num_queries, width = q.shape

    def describe() -> Description:
        unit = wide_reads(q, k, v, prompt_k, prompt_v, grad_out, grad_q)
        return Description(
            lambda shape: batch * heads * -(-num_queries // shape.queries),
            query_shapes("queries_kernel", width, q.dtype, capability(q), num_queries),
            (num_queries, prompt_k.shape[2] + k.shape[2]),
            (
                *_strides(unit, q, k, v),
                *_set_strides(unit, inputs, prompt_k, prompt_v),
                *_strides(unit, grad_out, grad_q),
                scale,
                heads,
                num_queries,
                k.shape[2],
                prompt_k.shape[2],
            ),
            constants(width, q.dtype, unit),
        )

    tensors = (q, k, v, prompt_k, prompt_v, index, lengths, grad_out, lse, delta, grad_q)
    _launch("queries_kernel", tensors, (scale, inputs.shared), describe)


def _prompt_gradients(
    inputs: AttentionInputs,
    upstream: tuple[Tensor, Tensor, Tensor | None],
    needs_prompt_k: bool,
    needs_prompt_v: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Those of all images that have a set, a chunk of the images for each program, then the chunks in their order."""
    q, prompt_k, index = inputs.q, inputs.prompt_k, inputs.prompt_index
    sets, heads, num_prompts, _ = prompt_k.shape
    images = len(q) if inputs.shared or index is not None else 1
    order, starts, chunks = None, None, 1
    if index is not None:
        ordered, order = index.sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(sets + 1, device=index.device))
        images = -(-images // max(1, sets))
    if images > 1:
        chunks = chunks_of_images(images, sets * heads * -(-num_prompts // 64), 2 * processors(q))
    dtype = q.dtype if chunks == 1 else torch.float32
    partial_k, partial_v = (
        torch.empty(chunks, *prompt_k.shape, dtype=dtype, device=q.device) if needed else None
        for needed in (needs_prompt_k, needs_prompt_v)
    )
    prompts = (prompt_k, inputs.prompt_v)
    _write_keys(
        inputs, prompts, (order, starts, inputs.prompt_lengths), chunks, upstream, partial_k, partial_v
    )
    grad_prompt_k, grad_prompt_v = (
        None if partial is None else partial[0] if chunks == 1 else partial.sum(dim=0).to(q.dtype)
        for partial in (partial_k, partial_v)
    )
    return grad_prompt_k, grad_prompt_v


def _write_keys(
    inputs: AttentionInputs,
    keys_and_values: tuple[Tensor, Tensor],
    sets: tuple[Tensor | None, Tensor | None, Tensor | None],
    chunks: int,
    upstream: tuple[Tensor, Tensor, Tensor | None],
    grad_k: Tensor | None,
    grad_v: Tensor | None,
) -> None:
    """Gradients ``[chunks, S, H, N, d]`` of own or prompt keys and values ``[S, H, N, d]``.

    ``sets`` are order, starts and lengths, ``upstream`` the gradient of the output, log-sum-exp and delta.
    """
    q = inputs.q
    (k, v), (grad_out, lse, delta) = keys_and_values, upstream
    batch, heads, num_queries, width = q.shape
    num_sets, _, num_keys, _ = k.shape
    shared = k is inputs.prompt_k and inputs.shared

    def describe() -> Description:
        written = [gradient for gradient in (grad_k, grad_v) if gradient is not None]
        unit = wide_reads(q, k, v, grad_out, *written)
        strides = [
            number
            for gradient in (grad_k, grad_v)
            for number in ((0,) * 4 if gradient is None else _strides(unit, gradient))
        ]
        return Description(
            lambda shape: chunks * num_sets * heads * -(-num_keys // shape.keys),
            key_shapes(width, q.dtype, capability(q), num_queries, num_keys),
            (num_queries, num_keys, grad_k is None, grad_v is None),
            (
                *_strides(unit, q, k, v, grad_out),
                *strides,
                inputs.scale,
                batch,
                num_sets,
                heads,
                num_queries,
                num_keys,
                chunks,
            ),
            constants(width, q.dtype, unit) | {"SHARED": shared},
        )

    tensors = (q, k, v, *sets, grad_out, lse, None if grad_k is None else delta, grad_k, grad_v)
    _launch("keys_kernel", tensors, (inputs.scale, shared, chunks), describe)


@lru_cache(maxsize=1024)
def chunks_of_images(images: int, programs: int, at_a_time: int) -> int:
    """Into how many chunks to divide ``images`` that ``programs`` programs would walk through together: the number with
    which the GPU, running ``at_a_time`` programs at once, is through soonest; of equal ones the lowest."""

    def duration(chunks: int) -> int:
        return -(-programs * chunks // at_a_time) * -(-images // chunks)

    return min(range(1, min(images, at_a_time) + 1), key=duration)


def piece(width: int, dtype: torch.dtype) -> int:
    """How many features are multiplied together; what is left of the width makes a last piece."""
    whole = power_of_two(width)
    if dtype == torch.float32:
        # These products do not run on tensor cores: their operands have to fit in registers.
        return min(32, max(16, whole))
    rest = width - whole // 2
    # 80 as 64 and 16, but 100 as 128.
    return max(16, whole // 2 if whole > width and max(16, power_of_two(rest)) < whole // 2 else whole)


def constants(width: int, dtype: torch.dtype, unit: int) -> dict[str, Any]:
    """The compile-time arguments that all shapes of a kernel share."""
    whole = piece(width, dtype)
    rest = width % whole
    return {
        "WIDTH": width,
        "PIECE": whole,
        "REST": max(16, power_of_two(rest)) if rest else 0,
        "UNIT": unit,
        # Three tf32 products would do for float32, but Triton 3.6 compiles them to nothing for compute capability 10.0.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "INTERPRETED": is_interpreted(_kernel("forward_kernel")),
    }


# Sums run over blocks of keys in the forward and in the queries' gradient, over blocks of queries in the keys'. Those
# blocks are fixed and only the others are tuned, so that tuning changes no bit of any result. What there is to choose
# is how often a row is read again (large blocks), how many programs fit on a multiprocessor (small ones) and how early
# loads start (stages). The shapes below compile for compute capability 8.0, 9.0 and 10.0 without spilling registers.
# They were not yet timed; nor were TMA descriptors, which cannot read a block that begins among the prompts.


def query_shapes(
    kernel: str, width: int, dtype: torch.dtype, capability: tuple[int, int], num_queries: int
) -> tuple[Shape, ...]:
    """Shapes to choose from for a kernel whose programs own a block of queries, the default first."""
    if kernel == "delta_kernel":
        shapes = [Shape(64, 0, 1, 4)]
    elif dtype == torch.float32:
        shapes = [Shape(64, 32, 1, 8), Shape(32, 32, 1, 8)]
    else:
        shapes = [Shape(128, 64, 3, 8), Shape(128, 64, 2, 8)]
        if width <= 64 or capability >= (9, 0):  # before, a wide head takes the registers of 8 warps
            shapes = [Shape(64, 64, 3, 4), Shape(64, 64, 2, 4), *shapes]
    return _at_most(shapes, num_queries=num_queries)


def key_shapes(
    width: int, dtype: torch.dtype, capability: tuple[int, int], num_queries: int, num_keys: int
) -> tuple[Shape, ...]:
    """Shapes to choose from for the kernel whose programs own a block of keys, the default first.

    It has the most to hold in registers, sums of keys' and of values' gradients: hence fewer queries for wide heads.
    """
    if dtype == torch.float32:
        shapes = [Shape(16, 32, 1, 8), Shape(16, 64, 1, 8)]
    elif width <= 64:
        shapes = [Shape(64, 64, 3, 4), Shape(64, 64, 2, 4), Shape(64, 128, 2, 8)]
    else:
        shapes = [Shape(32, 64, 2, 8), Shape(32, 32, 2, 4)]
        if capability >= (9, 0):
            shapes = [Shape(32, 64, 3, 4), Shape(32, 64, 2, 4), Shape(32, 128, 2, 8)]
    if num_queries <= 16:  # without many queries large blocks of keys only take registers
        shapes = [shape._replace(keys=min(shape.keys, 64)) for shape in shapes]
    return _at_most(shapes, num_queries, num_keys)


def _at_most(shapes: list[Shape], num_queries: int, num_keys: int | None = None) -> tuple[Shape, ...]:
    """The shapes with smaller blocks where there are fewer rows: few queries (of the class alone), few prompts."""
    fitted = []
    for shape in shapes:
        queries = 16 if num_queries <= 16 else shape.queries
        keys = shape.keys if num_keys is None else min(shape.keys, max(16, power_of_two(num_keys)))
        # Of 8 warps some would have nothing to multiply.
        warps = 4 if shape.queries * shape.keys >= 2 * queries * keys else shape.warps
        fitted.append(Shape(queries, keys, shape.stages, warps))
    return tuple(dict.fromkeys(fitted))


def _readable(inputs: AttentionInputs) -> AttentionInputs:
    """With contiguous rows."""
    return inputs._replace(
        q=_rows(inputs.q),
        k=_rows(inputs.k),
        v=_rows(inputs.v),
        prompt_k=_rows(inputs.prompt_k),
        prompt_v=_rows(inputs.prompt_v),
    )


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def wide_reads(*tensors: Tensor) -> int:
    """How many entries of the first tensor can be read at once, 16 bytes, wherever a row starts; 1 if it is no more."""
    unit = 16 // tensors[0].element_size()
    wide = all(
        tensor.data_ptr() % 16 == 0 and all(stride % unit == 0 for stride in _strides(1, tensor))
        for tensor in tensors
    )
    return unit if wide else 1


def _strides(unit: int, *tensors: Tensor) -> list[int]:
    """In units, of all dimensions but the last; 0 for those that one step does not leave."""
    return [
        stride // unit if size > 1 else 0
        for tensor in tensors
        for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
    ]


def _set_strides(unit: int, inputs: AttentionInputs, *prompts: Tensor) -> list[int]:
    """Those of prompts; an image without a set of its own stays at the shared one."""
    return [
        number
        for tensor in prompts
        for number in _strides(unit, tensor[0][None].expand(2, -1, -1, -1) if inputs.shared else tensor)
    ]


# Multiply and add in one, which later versions of Triton do not do unasked.
FUSED = {"enable_fp_fusion": True}


def options(shape: Shape) -> dict[str, int]:
    """How a kernel is to be compiled, apart from what it is in all shapes."""
    # Without a limit the assembler may spill a few registers to fit more programs on a multiprocessor.
    return {"num_warps": shape.warps, "num_stages": shape.stages, "maxnreg": 255}


def _kernel(name: str) -> Any:
    # Imported here, so that a machine without Triton can import this module.
    from . import attention_triton_kernels

    return getattr(attention_triton_kernels, name)


def _launch(
    name: str,
    tensors: tuple[Tensor | None, ...],
    more: tuple[Hashable, ...],
    describe: Callable[[], Description],
) -> None:
    """Run a kernel in the fastest of its shapes, found at the first call with about the same sizes.

    ``more`` is what the description depends on besides the tensors.
    """

    def through_triton() -> Described | None:
        described, kernel = describe(), _kernel(name)
        if not described.programs(described.shapes[0]):
            return None
        constant = {key: value for key, value in described.constant.items() if key in kernel.arg_names}
        if is_interpreted(kernel):
            shape = described.shapes[0]
            return Described(
                kernel, (described.programs(shape),), described.numbers, constant | blocks_of(kernel, shape)
            )
        rounded = tuple(power_of_two(size) if size else 0 for size in described.sizes)
        q = tensors[0]
        assert q is not None
        tuned = _tuned(name, described.shapes, rounded, q.dtype, tuple(constant.items()), capability(q))

        def grid(chosen: dict[str, Any]) -> tuple[int]:
            return (described.programs(Shape(chosen["BLOCK_Q"], chosen.get("BLOCK_K", 1), 0, 0)),)

        return Described(tuned, grid, described.numbers, constant | FUSED)

    launch((name, more), tensors, through_triton)


def blocks_of(kernel: Any, shape: Shape) -> dict[str, int]:
    """The compile-time arguments of a kernel that its shape decides."""
    named = {"BLOCK_Q": shape.queries, "BLOCK_K": shape.keys, "STAGES": shape.stages}
    return {key: value for key, value in named.items() if key in kernel.arg_names}


@cache
def _tuned(name: str, shapes: tuple[Shape, ...], *case: Any) -> Any:
    """The kernel with Triton's autotuner around it, one for each case."""
    import triton

    kernel = _kernel(name)
    configs = [triton.Config(blocks_of(kernel, shape), **options(shape)) for shape in shapes]
    return triton.autotune(configs, key=[])(kernel)
