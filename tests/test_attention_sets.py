"""prompt_attention with sets of prompts to choose from, and with its input as the projection leaves it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spt_fast.kernels import attention_torch, prompt_attention, prompt_attention_packed

BATCH, HEADS, LENGTH, PROMPTS, WIDTH, SETS = 5, 2, 6, 4, 8, 3
INDEX = torch.tensor([2, 0, 2, 1, 2])
LENGTHS = torch.tensor([4, 0, 1])


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """qkv, prompt_k, prompt_v."""
    qkv = noise(BATCH, LENGTH, 3, HEADS, WIDTH, seed=1, dtype=dtype)
    # As a projection leaves them: heads behind prompts in memory.
    sets = (noise(SETS, PROMPTS, HEADS, WIDTH, seed=seed, dtype=dtype).transpose(1, 2) for seed in (2, 3))
    return [t.requires_grad_() for t in (qkv, *sets)]


def image_by_image(qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor, index: Tensor, lengths: Tensor) -> Tensor:
    outs = []
    for image, which in zip(qkv, index.tolist(), strict=True):
        q, k, v = image.permute(1, 2, 0, 3)
        count = int(lengths[which])
        keys = torch.cat([prompt_k[which, :, :count], k], dim=1)
        values = torch.cat([prompt_v[which, :, :count], v], dim=1)
        outs.append(F.scaled_dot_product_attention(q, keys, values).transpose(0, 1))
    return torch.stack(outs)


def packed(qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
    return prompt_attention_packed(qkv, prompt_k, prompt_v, prompt_index=INDEX, prompt_lengths=LENGTHS)


def unpacked(qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = prompt_attention(q, k, v, prompt_k, prompt_v, prompt_index=INDEX, prompt_lengths=LENGTHS)
    assert out.transpose(1, 2).is_contiguous()
    return out.transpose(1, 2)


@pytest.mark.parametrize("scores", [1 << 20, 60], ids=["whole", "in pieces"])
@pytest.mark.parametrize("ours", [packed, unpacked])
@pytest.mark.parametrize("wanted", itertools.product([False, True], repeat=3))
def test_sets_by_index_with_lengths(
    ours: object, wanted: tuple[bool, ...], scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_torch, "SCORES_ON_CPU", scores)
    inputs, judged = leaves(), leaves()
    for tensor, need in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(need)
    got, expected = ours(*inputs), image_by_image(*judged, INDEX, LENGTHS)  # type: ignore[operator]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    if not any(wanted):
        assert not got.requires_grad
        return
    cotangent = noise(*got.shape, seed=4)
    got.backward(cotangent)
    expected.backward(cotangent)
    for tensor, reference, need in zip(inputs, judged, wanted, strict=True):
        if need:
            torch.testing.assert_close(tensor.grad, reference.grad, rtol=1e-10, atol=1e-12)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("ours", [packed, unpacked])
def test_gradcheck(ours: object) -> None:
    assert torch.autograd.gradcheck(ours, leaves(), fast_mode=True)


def test_lengths_of_each_images_own_prompts() -> None:
    qkv, _, _ = leaves()
    own = [noise(BATCH, HEADS, PROMPTS, WIDTH, seed=seed) for seed in (5, 6)]
    lengths = torch.tensor([0, 1, 4, 2, 3])
    expected = image_by_image(qkv, *own, torch.arange(BATCH), lengths)
    torch.testing.assert_close(prompt_attention_packed(qkv, *own, prompt_lengths=lengths), expected)


def test_what_lies_behind_the_length_of_a_set_is_ignored() -> None:
    clean, dirty = leaves(), leaves()
    with torch.no_grad():
        for tensor in dirty[1:]:
            for which, length in enumerate(LENGTHS.tolist()):
                tensor[which, :, length:] = float("nan")
    for inputs in (clean, dirty):
        packed(*inputs).square().sum().backward()
    for ours, expected in zip(dirty, clean, strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


def test_a_query_without_keys_gets_zeros() -> None:
    q, nothing = noise(1, 1, 2, 4).requires_grad_(), noise(1, 1, 0, 4)
    sets = [noise(1, 1, 3, 4, seed=seed).requires_grad_() for seed in (1, 2)]
    out = prompt_attention(q, nothing, nothing, *sets, prompt_lengths=torch.tensor([0]))
    out.sum().backward()
    assert all(bool((t == 0).all()) for t in (out, q.grad, sets[0].grad, sets[1].grad))


def test_index_and_lengths_may_be_32_bits_wide() -> None:
    inputs = leaves()
    got = prompt_attention_packed(*inputs, prompt_index=INDEX.int(), prompt_lengths=LENGTHS.int())
    assert torch.equal(got, packed(*inputs))


BAD = {
    "index out of range": ("prompt_index", {"prompt_index": INDEX + 1}),
    "negative index": ("prompt_index", {"prompt_index": INDEX - 1}),
    "index of another batch": ("prompt_index", {"prompt_index": INDEX[:-1]}),
    "index of another type": ("prompt_index", {"prompt_index": INDEX.float()}),
    "index elsewhere": ("prompt_index", {"prompt_index": INDEX.to("meta")}),
    "lengths of other sets": ("prompt_lengths", {"prompt_lengths": LENGTHS[:-1]}),
    "lengths of another type": ("prompt_lengths", {"prompt_lengths": LENGTHS.bool()}),
    "no index": ("prompt_k", {"prompt_index": None}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    name, change = BAD[case]
    with pytest.raises(ValueError, match=name):
        prompt_attention_packed(*leaves(), **{"prompt_index": INDEX, "prompt_lengths": LENGTHS} | change)


def test_shared_prompts_have_no_lengths_and_no_index() -> None:
    qkv, prompt_k, prompt_v = leaves()
    with pytest.raises(ValueError, match="prompt_lengths"):
        prompt_attention_packed(qkv, prompt_k[0], prompt_v[0], prompt_lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match="prompt_k"):
        prompt_attention_packed(qkv, prompt_k[0], prompt_v[0], prompt_index=INDEX)


def test_a_packed_projection_of_another_shape_is_refused() -> None:
    qkv, prompt_k, prompt_v = leaves()
    with pytest.raises(ValueError, match=r"qkv must be \[B, N, 3, H, d\], got"):
        prompt_attention_packed(qkv.transpose(1, 2), prompt_k[0], prompt_v[0])


# ------------------------------------------------------------------------------------------------- as an op of torch


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, True), (True, False, False)])
def test_opcheck(wanted: tuple[bool, ...]) -> None:
    qkv, *sets = (t.requires_grad_(need) for t, need in zip(leaves(), wanted, strict=True))
    q, k, v = qkv.detach().permute(2, 0, 3, 1, 4)
    q = q[:, :, :2].requires_grad_(wanted[0])
    for more in ((INDEX, LENGTHS), (INDEX, None)):
        single = [
            t.detach().float() for t in (qkv, *sets)
        ]  # torch's own attention, which has its own strides
        torch.library.opcheck(torch.ops.spt_fast.prompt_attention_packed.default, (*single, *more, 0.3, None))
        torch.library.opcheck(
            torch.ops.spt_fast.prompt_attention_packed.default, (qkv, *sets, *more, 0.3, None)
        )
        torch.library.opcheck(torch.ops.spt_fast.prompt_attention.default, (q, k, v, *sets, *more, 0.3, None))


@pytest.mark.parametrize("ours", [packed, unpacked])
def test_compiled_without_graph_breaks(ours: object) -> None:
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    inputs, judged = leaves(torch.float32), leaves(torch.float32)
    got, expected = compiled(*inputs), ours(*judged)  # type: ignore[operator]
    torch.testing.assert_close(got, expected)
    cotangent = noise(*got.shape, seed=4, dtype=torch.float32)
    got.backward(cotangent)
    expected.backward(cotangent)
    for tensor, reference in zip(inputs, judged, strict=True):
        torch.testing.assert_close(tensor.grad, reference.grad)


def test_autocast_casts_as_it_does_for_torchs_own_attention() -> None:
    inputs = leaves(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = packed(*inputs)
    got.sum().backward()
    assert got.dtype == torch.bfloat16
    assert all(tensor.grad.dtype == torch.float32 for tensor in inputs)
    assert torch.equal(got, packed(*(t.bfloat16() for t in inputs)))
    q, k, v = (noise(1, 1, 3, 4, seed=seed, dtype=torch.float32) for seed in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prompt_attention(q, k.bfloat16(), v, k[0], v[0]).dtype == torch.bfloat16


def test_activation_checkpointing() -> None:
    plain, checkpointed = leaves(), leaves()
    packed(*plain).square().sum().backward()
    checkpoint(packed, *checkpointed, use_reentrant=False).square().sum().backward()
    for tensor, reference in zip(checkpointed, plain, strict=True):
        assert torch.equal(tensor.grad, reference.grad)


def test_no_gradient_is_computed_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that enter the first block need none: only the prompts' gradients are to be formed."""
    asked = []
    real = attention_torch.backward

    def spy(inputs: object, grad_out: object, out: object, lse: object, *wanted: object) -> object:
        asked.append(wanted)
        return real(inputs, grad_out, out, lse, *wanted)  # type: ignore[arg-type]

    monkeypatch.setattr(attention_torch, "backward", spy)
    qkv, prompt_k, prompt_v = leaves()
    packed(qkv.detach(), prompt_k, prompt_v).sum().backward()
    assert asked == [(None, None, None, True, True)]
