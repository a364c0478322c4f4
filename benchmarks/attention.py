"""prompt_attention, forward and backward: our backends against concatenation and torch's own attention.

    python -m benchmarks.attention                             # ViT-B/16's shape in bfloat16 on this CPU
    python -m benchmarks.attention --device cuda --batch-size 64 --batch-size 256

All read queries, keys and values from the packed output of a qkv projection and leave its gradient there. Peers take
turns, round by round, and each has to agree with the first in output and gradients before its time counts.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.command import console, machine, mistakes_in_one_sentence
from benchmarks.timing import timed
from spt_fast.devices import choose_device
from spt_fast.files import write_text
from spt_fast.kernels import available_backends, prompt_attention_packed

app = typer.Typer(pretty_exceptions_enable=False)

# Heads, their width and the tokens of an image.
SHAPES = {
    "vit_base_patch16_224": (12, 64, 197),
    "vit_large_patch16_224": (16, 64, 197),
    "vit_huge_patch14_224": (16, 80, 257),
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # qkv [B, N, 3, H, d], prompts [H, P, d] -> [B, N, H, d]


@dataclass
class Peer:
    """A way to attend, and what was measured of it."""

    name: str
    attend: Attend
    missing: str | None = None
    forward_ms: list[float] = field(default_factory=list)
    both_ms: list[float] = field(default_factory=list)


@app.command()
def main(
    model: Annotated[
        list[str] | None, typer.Option(help=f"Whose shape: {', '.join(SHAPES)}; may be repeated.")
    ] = None,
    num_prompts: Annotated[list[int] | None, typer.Option(help="Prompts; may be repeated.")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="Images; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(min=1, help="Times that every peer has its turn.")] = 15,
    output: Annotated[Path | None, typer.Option(help="Write all samples to this json file.")] = None,
) -> None:
    """Time prompt attention, forward alone and with its backward pass."""
    with mistakes_in_one_sentence():
        chosen = choose_device(device)
    record: dict[str, Any] = {"machine": machine(chosen), "dtype": dtype, "rows": []}
    for name in model or ["vit_base_patch16_224"]:
        heads, width, tokens = SHAPES[name]
        for batch in batch_size or [8]:
            for prompts in num_prompts or [20, 100, 200]:
                qkv = torch.randn(batch, tokens, 3, heads, width, device=chosen)
                sets = torch.randn(2, heads, prompts, width, device=chosen)
                qkv, prompt_k, prompt_v = (t.to(getattr(torch, dtype)) for t in (qkv, *sets))
                rows = compare(qkv, prompt_k, prompt_v, rounds)
                common = {"model": name, "batch_size": batch, "num_prompts": prompts}
                record["rows"] += [common | row for row in rows]
                show(f"{name}, batch {batch}, P={prompts}, {dtype}, {record['machine']['device']}", rows)
    if output is not None:
        write_text(output, json.dumps(record, indent=1) + "\n")


def compare(qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor, rounds: int) -> list[dict[str, Any]]:
    """A row for each peer."""
    device = qkv.device
    inputs = [t.requires_grad_() for t in (qkv, prompt_k, prompt_v)]
    upstream = torch.randn_like(qkv[:, :, 0])
    peers, expected = list(peers_on(device)), None

    def both(peer: Peer) -> list[Tensor]:
        out = peer.attend(*inputs)
        return [out, *torch.autograd.grad(out, inputs, upstream)]

    for peer in peers:
        try:
            outcome = both(peer)
        except RuntimeError as error:  # a backend of torch that does not take these shapes here
            peer.missing = str(error).splitlines()[0]
            continue
        expected = expected or outcome
        for ours, theirs in zip(expected, outcome, strict=True):
            error_of_norm = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
            if not error_of_norm < 0.03:
                raise RuntimeError(f"{peer.name} computes something else: relative error {error_of_norm:.2g}")
    # So many calls at a time that a GPU's clock ticks often enough.
    repeats = 20 if device.type == "cuda" else 1

    def forward_only(peer: Peer) -> None:
        for _ in range(repeats):
            with torch.no_grad():
                peer.attend(*inputs)

    def forward_and_backward(peer: Peer) -> None:
        for _ in range(repeats):
            both(peer)

    for number in range(rounds + 2):
        for peer in peers:
            if peer.missing is None:
                seconds = (timed(device, work, peer) for work in (forward_only, forward_and_backward))
                forward, together = (1e3 * each / repeats for each in seconds)
                if number >= 2:  # the first are warm-up
                    peer.forward_ms.append(forward)
                    peer.both_ms.append(together)
    return [
        {"peer": peer.name, "missing": peer.missing}
        if peer.missing is not None
        else {"peer": peer.name, "forward_ms": peer.forward_ms, "ms": peer.both_ms}
        for peer in peers
    ]


def peers_on(device: torch.device) -> Iterator[Peer]:
    fitting = ("triton", "torch") if device.type == "cuda" else ("torch",)
    for backend in available_backends()["prompt_attention"]:
        if backend in fitting:

            def ours(qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor, backend: str = backend) -> Tensor:
                return prompt_attention_packed(qkv, prompt_k, prompt_v, backend=backend)

            yield Peer(f"spt-fast {backend}", ours)
    yield Peer("concatenate + torch's choice", concatenated(None))
    if device.type == "cuda":
        for name, kernel in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("cuDNN", SDPBackend.CUDNN_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ):
            yield Peer(f"concatenate + {name}", concatenated(kernel))


def concatenated(kernel: SDPBackend | None) -> Attend:
    """Prompts copied for every image, then scaled_dot_product_attention."""

    def attend(qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        keys = torch.cat([prompt_k.expand(len(q), -1, -1, -1), k], dim=2)
        values = torch.cat([prompt_v.expand(len(q), -1, -1, -1), v], dim=2)
        with nullcontext() if kernel is None else sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2)

    return attend


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """The rows as a table; ratios are medians of the ratios within a round."""
    table = Table(title=title, title_justify="left")
    for header in ("", "forward, ms", "with backward, ms", "time of spt-fast"):
        table.add_column(header, justify="left" if not header else "right")
    first = rows[0]
    for row in rows:
        if "ms" not in row:
            table.add_row(row["peer"], row["missing"], "", "")
            continue
        ratio = statistics.median(a / b for a, b in zip(row["ms"], first["ms"], strict=True))
        forward, both = (statistics.median(row[name]) for name in ("forward_ms", "ms"))
        table.add_row(row["peer"], f"{forward:.3g}", f"{both:.3g}", f"{ratio:.2f}x")
    console.print(table)


if __name__ == "__main__":
    app()
