"""prompt_attention, forward and backward: our backends against what people write around torch's own attention.

    python -m benchmarks.attention                             # ViT-B/16's shape in bfloat16
    python -m benchmarks.attention --device cuda --batch-size 64 --batch-size 256

All read queries, keys and values from the packed output of a qkv projection and leave its gradient there. Each has to
agree with float64 in output and gradients before its time counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.ceilings import Ceilings, Limit, name_of
from benchmarks.command import (
    DeviceOption,
    MinutesOption,
    ResultsOption,
    RoundsOption,
    measuring,
    show,
)
from benchmarks.record import RESULTS, Record
from benchmarks.timing import rotated, take_turns
from spt_fast.devices import choose_device
from spt_fast.errors import InputError
from spt_fast.kernels import available_backends, prompt_attention_packed

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# Heads, their width and the tokens of an image.
SHAPES = {
    "vit_small_patch16_224": (6, 64, 197),
    "vit_base_patch16_224": (12, 64, 197),
    "vit_large_patch16_224": (16, 64, 197),
    "vit_huge_patch14_224": (16, 80, 257),
}
# Relative errors in norm against float64: so many rounding errors of the dtype, with some room.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # qkv [B, N, 3, H, d], prompts [H, P, d] -> [B, N, H, d]


@dataclass
class Peer:
    """A way to attend; ``forward_only`` says why there is no backward pass."""

    name: str
    attend: Attend
    forward_only: str | None = None


@app.command()
def main(
    context: typer.Context,
    model: Annotated[
        list[str] | None, typer.Option(help=f"Whose shape: {', '.join(SHAPES)}; may be repeated.")
    ] = None,
    num_prompts: Annotated[list[int] | None, typer.Option(help="Prompts; may be repeated.")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="Images; may be repeated.")] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(TOLERANCE)}.")] = "bfloat16",
    rounds: RoundsOption = 15,
    minutes: MinutesOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """prompt_attention, forward and backward, against torch's attention kernels and FlexAttention."""
    with measuring("attention", context, device, results, minutes, rounds=rounds) as (record, ceilings):
        chosen = choose_device(device)
        unknown = [name for name in model or [] if name not in SHAPES]
        if unknown or dtype not in TOLERANCE:
            raise InputError(
                f"--model must be one of {', '.join(SHAPES)} and --dtype one of {', '.join(TOLERANCE)}, "
                f"got {', '.join(unknown) or dtype}"
            )
        gpu = chosen.type == "cuda"
        for name in model or (list(SHAPES)[1:] if gpu else ["vit_base_patch16_224"]):
            for batch in batch_size or [64 if gpu else 8]:
                for prompts in num_prompts or [20, 100, 200]:
                    if not record.may_begin():
                        return
                    case = {"model": name, "batch_size": batch, "num_prompts": prompts, "dtype": dtype}
                    compare(record, ceilings, case, chosen, rounds)
                    record.save()


def compare(
    record: Record, ceilings: Ceilings, case: dict[str, Any], device: torch.device, rounds: int
) -> None:
    """Add the rows of one shape: forward alone, and forward with backward."""
    heads, width, tokens = SHAPES[case["model"]]
    dtype = getattr(torch, case["dtype"])
    shapes = [
        (case["batch_size"], tokens, 3, heads, width),
        *[(heads, case["num_prompts"], width)] * 2,
    ]
    inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    upstream = torch.randn_like(inputs[0][:, :, 0])
    expected = outcome(concatenated(SDPBackend.MATH), [each.double() for each in inputs], upstream.double())
    copies = rotated(*inputs)
    bare = [detached(each) for each in copies]
    works: dict[str, dict[str, Callable[[int], object]]] = {"forward": {}, "forward + backward": {}}
    peers = list(peers_on(device))
    reasons: dict[tuple[str, str], str] = {}

    def backward(peer: Peer, number: int) -> None:
        outcome(peer.attend, copies[number % len(copies)], upstream)

    def forward(peer: Peer, number: int) -> None:
        peer.attend(*bare[number % len(bare)])

    for peer in peers:
        for name, part, run in (
            ("forward", expected[:1], forward),
            ("forward + backward", expected, backward),
        ):
            reason = peer.forward_only if run is backward else None
            if reason is None:
                reason = why_not(peer.attend, inputs, upstream, part, TOLERANCE[case["dtype"]])
            if reason is None:
                works[name][peer.name] = partial(run, peer)
            else:
                reasons[name, peer.name] = reason
    for name, runnable in works.items():
        own = {**case, "pass": name}
        samples = take_turns(device, runnable, rounds)
        limit = attention_limit(ceilings, inputs, backward=name != "forward")
        before = len(record.rows)
        for peer in peers:
            if peer.name in samples:
                record.measured(own, peer.name, samples[peer.name], limit=limit)
            else:
                record.missing(own, peer.name, reasons[name, peer.name])
        shown = (
            f"{case['model']}, batch {case['batch_size']}, P={case['num_prompts']}, {case['dtype']}: {name}"
        )
        show(shown, record.rows[before:], against=peers[0].name)


def outcome(attend: Attend, inputs: Any, upstream: Tensor) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    out = attend(*inputs)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


def detached(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers, no gradients asked."""
    return [each.detach() for each in inputs]


def why_not(
    attend: Attend, inputs: list[Tensor], upstream: Tensor, expected: list[Tensor], tolerance: float
) -> str | None:
    """Why a peer's time cannot be taken: it does not run here, or it is wrong."""
    try:
        found = outcome(attend, inputs, upstream) if len(expected) > 1 else [attend(*detached(inputs))]
    except Exception as error:  # a kernel of somebody else's that does not take these shapes here
        return f"does not run here: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    worst = max(
        ((ours.double() - theirs).norm() / theirs.norm()).item()
        for ours, theirs in zip(found, expected, strict=True)
    )
    return None if worst < tolerance else f"computes something else: relative error {worst:.2g}"


def peers_on(device: torch.device) -> Iterator[Peer]:
    """Ours first."""
    gpu = device.type == "cuda"
    fitting = ("triton", "torch") if gpu else ("torch",)
    for backend in available_backends()["prompt_attention"]:
        if backend in fitting:

            def ours(qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor, backend: str = backend) -> Tensor:
                return prompt_attention_packed(qkv, prompt_k, prompt_v, backend=backend)

            yield Peer(f"spt-fast {backend}", ours)
    yield Peer("concatenate + SDPA", concatenated(None))
    kernels = [("flash", SDPBackend.FLASH_ATTENTION), ("math", SDPBackend.MATH)]
    if gpu:
        kernels += [
            ("cuDNN", SDPBackend.CUDNN_ATTENTION),
            ("memory-efficient", SDPBackend.EFFICIENT_ATTENTION),
        ]
    for name, kernel in kernels:
        yield Peer(f"concatenate + SDPA, {name}", concatenated(kernel))
    yield Peer(
        "concatenate + FlexAttention",
        flex,
        forward_only=None if gpu else "FlexAttention has no backward pass on CPUs",
    )
    yield Peer("naive: prompts with queries", with_prompt_rows)


def concatenated(kernel: SDPBackend | None) -> Attend:
    """Prompts copied for every image, then scaled_dot_product_attention."""

    def attend(qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
        q, keys, values = concatenate(qkv, prompt_k, prompt_v)
        with nullcontext() if kernel is None else sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2)

    return attend


def flex(qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
    """The same through FlexAttention, compiled as its documentation asks."""
    return compiled_flex_attention()(*concatenate(qkv, prompt_k, prompt_v)).transpose(1, 2)


@lru_cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def with_prompt_rows(qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
    """As VPT computes a block: the prompts of every image are tokens with queries too, whose outputs are dropped."""
    q, keys, values = concatenate(qkv, prompt_k, prompt_v)
    prompts = prompt_k.shape[1]
    queries = torch.cat([keys[:, :, :prompts], q], dim=2)
    weights = (queries @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights @ values)[:, :, prompts:].transpose(1, 2)


def concatenate(qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, H, N, d]``, keys and values ``[B, H, P + N, d]``."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    keys = torch.cat([prompt_k.expand(len(q), -1, -1, -1), k], dim=2)
    values = torch.cat([prompt_v.expand(len(q), -1, -1, -1), v], dim=2)
    return q, keys, values


def attention_limit(ceilings: Ceilings, inputs: list[Tensor], *, backward: bool) -> Limit:
    """Two products forward and four backward; all that is read and written passes the memory once."""
    qkv, prompt_k, _ = inputs
    batch, tokens, _, heads, width = qkv.shape
    product = 2 * batch * heads * tokens * (tokens + prompt_k.shape[1]) * width
    read, out = sum(each.nbytes for each in inputs), qkv.nbytes // 3
    # Backward reads inputs, output and its gradient again, and writes the inputs' gradients.
    moved = read + out + (2 * read + 2 * out if backward else 0)
    operations = product * (6 if backward else 2)
    return ceilings.limit(moved_bytes=moved, operations=operations, dtype=name_of(qkv.dtype))


if __name__ == "__main__":
    app()
