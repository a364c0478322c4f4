"""One block of a prompted ViT, without the rows whose outputs nobody reads.

A deep prompt's output is thrown away (Eq. 6, 13), so a prompt never needs a query, an output projection or an MLP. All
it gives a block is a key and a value, and these do not depend on the image: they are computed once for the whole batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from spt_fast.kernels import prompt_attention, prompt_attention_packed
from spt_fast.low_precision import linear_rows


class PromptKeysValues(NamedTuple):
    """What prompts are to the attention of a block; see :func:`spt_fast.kernels.prompt_attention`.

    Attributes:
        keys: ``[H, P, d]``, shared by the batch, or ``[B, H, P, d]``, or with ``prompt_index`` sets ``[S, H, P, d]``.
        values: of the same shape.
        prompt_index: int64 ``[B]``, the set of every image.
        prompt_lengths: int64 ``[S]`` or ``[B]``, how many prompts a set has.
    """

    keys: Tensor
    values: Tensor
    prompt_index: Tensor | None = None
    prompt_lengths: Tensor | None = None


def prompt_keys_values(block: Any, prompts: Tensor) -> PromptKeysValues:
    """The keys and values of prompts in a block.

    Args:
        block: timm's pre-norm ``Block``, in eval mode.
        prompts: ``[P, D]``, shared by the batch, or ``[B, P, D]``.

    Returns:
        :class:`PromptKeysValues` with ``[H, P, d]`` or ``[B, H, P, d]``.
    """
    attn = block.attn
    keys, values = _project(attn, block.norm1(prompts), first=1).unbind(-3)
    return PromptKeysValues(attn.k_norm(keys.transpose(-3, -2)), values.transpose(-3, -2))


def prompted_block(
    block: Any,
    x: Tensor,
    prompts: PromptKeysValues | None = None,
    *,
    queries: Tensor | None = None,
    temperature: Tensor | None = None,
) -> Tensor:
    """A timm block whose tokens also attend to prompts.

    Args:
        block: timm's pre-norm ``Block``, in eval mode.
        x: tokens ``[B, N, D]``, which give keys and values.
        prompts: what else is attended to; ``None``: nothing.
        queries: tokens ``[B, Nq, D]`` whose outputs are wanted; ``None``: ``x`` itself.
        temperature: what the scores of the attention are divided by, one number, learnable; ``None``: nothing.

    Returns:
        ``[B, N, D]`` or ``[B, Nq, D]``: what the block gives for these tokens with the prompts in its sequence.
    """
    attn = block.attn
    hidden = block.norm1(x)
    if queries is None:
        queries, query_hidden = x, hidden
    else:
        query_hidden = block.norm1(queries)
    out = attn.norm(_attention(attn, hidden, query_hidden, prompts, temperature).flatten(2))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        out = out * gate(query_hidden).sigmoid()
    queries = queries + block.ls1(attn.proj(out))
    return queries + block.ls2(block.mlp(block.norm2(queries)))


def _attention(
    attn: Any,
    hidden: Tensor,
    query_hidden: Tensor,
    prompts: PromptKeysValues | None,
    temperature: Tensor | None,
) -> Tensor:
    """From normalised tokens to heads ``[B, Nq, H, d]``."""
    if query_hidden is hidden:
        qkv = attn.qkv(hidden).unflatten(-1, (3, attn.num_heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)
    else:
        qkv = None
        q = _project(attn, query_hidden, last=1).squeeze(-3).transpose(1, 2)
        k, v = _project(attn, hidden, first=1).transpose(1, 3).unbind(2)
    if prompts is None:
        prompts = PromptKeysValues(*(v.new_empty(v.shape[1], 0, v.shape[3]) for _ in range(2)))
    keys, values, index, lengths = prompts
    how = {"scale": attn.scale, "prompt_index": index, "prompt_lengths": lengths}
    plain = isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)
    if qkv is not None and plain and temperature is None:
        # The projection is read where it lies, and its gradient comes back in one piece.
        return prompt_attention_packed(qkv, keys, values, **how)
    q = attn.q_norm(q)
    if temperature is not None:  # q k / temperature
        q = q / temperature
    # Under autocast a query or key norm answers in float32 where the values stay in the low precision.
    q, k, keys = (t.to(v.dtype) for t in (q, attn.k_norm(k), keys))
    return prompt_attention(q, k, v, keys, values, **how).transpose(1, 2)


def _project(attn: Any, hidden: Tensor, first: int = 0, last: int = 3) -> Tensor:
    """Some of queries (0), keys (1) and values (2): ``[.., N, D]`` to ``[.., N, last - first, H, d]``."""
    width = attn.qkv.out_features // 3
    projected = linear_rows(attn.qkv, hidden, first * width, last * width)
    return projected.unflatten(-1, (last - first, attn.num_heads, -1))
