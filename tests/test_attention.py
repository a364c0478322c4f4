"""prompt_attention against the softmax written out, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spt_fast.kernels import BackendError, attention_torch, available_backends, prompt_attention

NAMES = ("q", "k", "v", "prompt_k", "prompt_v")


def written_out(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float) -> Tensor:
    """Image by image, head by head, query by query."""
    out = torch.zeros_like(q)
    for b, h, n in itertools.product(range(q.shape[0]), range(q.shape[1]), range(q.shape[2])):
        own_k, own_v = (t[h] if t.ndim == 3 else t[b, h] for t in (prompt_k, prompt_v))
        keys, values = torch.cat([own_k, k[b, h]]), torch.cat([own_v, v[b, h]])
        weights = torch.exp(keys @ q[b, h, n] * scale)
        out[b, h, n] = (weights[:, None] * values).sum(dim=0) / weights.sum()
    return out


def tensors(
    batch: int, heads: int, queries: int, keys: int, prompts: int, width: int, shared: bool
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch * 1000 + keys * 10 + prompts)
    prompt = (heads, prompts, width) if shared else (batch, heads, prompts, width)
    shapes = [
        (batch, heads, queries, width),
        (batch, heads, keys, width),
        (batch, heads, keys, width),
        prompt,
        prompt,
    ]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "batch, heads, queries, keys, prompts, width",
    [(2, 3, 5, 5, 4, 8), (1, 1, 1, 7, 1, 5), (3, 2, 1, 6, 9, 40), (2, 1, 4, 3, 0, 16), (2, 2, 3, 0, 5, 10)],
)
def test_equals_the_softmax_written_out(
    batch: int, heads: int, queries: int, keys: int, prompts: int, width: int, shared: bool
) -> None:
    inputs = tensors(batch, heads, queries, keys, prompts, width, shared)
    for scale in (None, 0.3):
        expected = written_out(*inputs, scale=width**-0.5 if scale is None else scale)
        torch.testing.assert_close(prompt_attention(*inputs, scale=scale), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_of_every_subset_of_inputs(shared: bool) -> None:
    inputs = tensors(2, 2, 3, 4, 3, 6, shared)
    cotangent = torch.randn(2, 2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    full = [tensor.clone().requires_grad_() for tensor in inputs]
    written_out(*full, scale=6**-0.5).backward(cotangent)
    for wanted in itertools.product([False, True], repeat=5):
        if not any(wanted):
            continue
        ours = [tensor.clone().requires_grad_(need) for tensor, need in zip(inputs, wanted, strict=True)]
        prompt_attention(*ours).backward(cotangent)
        for tensor, reference, need in zip(ours, full, wanted, strict=True):
            if need:
                torch.testing.assert_close(tensor.grad, reference.grad, rtol=1e-10, atol=1e-12)
            else:
                assert tensor.grad is None


@pytest.mark.parametrize("shared", [True, False])
def test_gradcheck(shared: bool) -> None:
    inputs = [tensor.requires_grad_() for tensor in tensors(2, 1, 2, 3, 2, 4, shared)]
    assert torch.autograd.gradcheck(prompt_attention, inputs)


PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)]


def relative_errors(inputs: list[Tensor], dtype: torch.dtype) -> list[float]:
    """Of the output and the five gradients in ``dtype``, against the definition in float64 on the same numbers."""
    rounded = [tensor.to(dtype) for tensor in inputs]
    passes = []
    for function, leaves in (
        (prompt_attention, [t.clone().requires_grad_() for t in rounded]),
        (concatenated, [t.double().requires_grad_() for t in rounded]),
    ):
        out = function(*leaves)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(out.dtype)
        passes.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    assert all(ours.dtype == dtype for ours in passes[0])
    return [
        ((ours.double() - expected).norm() / expected.norm()).item()
        for ours, expected in zip(*passes, strict=True)
    ]


def concatenated(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
    if prompt_k.ndim == 3:
        prompt_k, prompt_v = (t.expand(len(q), -1, -1, -1) for t in (prompt_k, prompt_v))
    keys, values = torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2)
    return F.scaled_dot_product_attention(q, keys, values)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("shared", [True, False])
def test_low_precision(dtype: torch.dtype, tolerance: float, shared: bool) -> None:
    assert max(relative_errors(tensors(2, 3, 17, 17, 5, 40, shared), dtype)) <= tolerance
    assert max(relative_errors(tensors(40, 1, 3, 50, 20, 64, shared), dtype)) <= tolerance


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_low_precision_of_values_with_much_in_common(dtype: torch.dtype, tolerance: float) -> None:
    """Gradients of scores are differences of products with the values: rounded products must not drown them."""
    q, k, v, prompt_k, prompt_v = tensors(2, 3, 17, 30, 5, 32, True)
    errors = relative_errors([q, k, v + 8, prompt_k, prompt_v + 8], dtype)
    # The values themselves keep only what their own type holds behind an 8.
    assert max(errors) <= tolerance if dtype == torch.float32 else max(errors) <= 2 * tolerance


@pytest.mark.parametrize("shared", [True, False])
def test_scores_of_any_size(shared: bool) -> None:
    """Weights of 0 and 1, whose gradients vanish."""
    q, *others = (t.float() for t in tensors(2, 2, 5, 9, 4, 16, shared))
    inputs = [t.requires_grad_() for t in (300 * q, *others)]
    got = prompt_attention(*inputs)
    torch.testing.assert_close(got, concatenated(*(t.double() for t in inputs)).float(), rtol=1e-4, atol=1e-4)
    got.sum().backward()
    assert all(t.grad.isfinite().all() for t in inputs)


def test_float16_does_not_overflow_on_the_way() -> None:
    q, k, v = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 3000, 8), torch.full((1, 1, 3000, 8), 60.0)
    out = prompt_attention(*(t.half() for t in (q, k, v, k[0, :, :5], v[0, :, :5])))
    torch.testing.assert_close(out, torch.full_like(out, 60.0))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("scores", [3 * 4 * 54, 3 * 54, 1], ids=["images", "heads", "head by head"])
def test_in_pieces(shared: bool, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 images of 7 at a time, 3 heads of 4, one of each."""
    monkeypatch.setattr(attention_torch, "SCORES_ON_CPU", scores)
    assert max(relative_errors(tensors(7, 4, 6, 6, 3, 8, shared), torch.float64)) < 1e-12


@pytest.mark.parametrize(
    "name, change",
    [
        ("q", lambda t: t[0]),
        ("k", lambda t: t[:1]),
        ("k", lambda t: t[..., :-1]),
        ("v", lambda t: t[:, :, :-1]),
        ("prompt_k", lambda t: t[:-1]),
        ("prompt_v", lambda t: t[:, :-1]),
        ("prompt_v", lambda t: t.float()),
        ("k", lambda t: t.to("meta")),
    ],
)
def test_inputs_that_do_not_belong_together_are_named(name: str, change: object) -> None:
    inputs = dict(zip(NAMES, tensors(2, 3, 5, 5, 4, 8, True), strict=True))
    inputs[name] = change(inputs[name])  # type: ignore[operator]
    with pytest.raises(ValueError, match=name):
        prompt_attention(*inputs.values())


def test_backend_by_argument_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors(1, 1, 2, 2, 1, 4, True)
    assert available_backends()["prompt_attention"][-1] == "torch"
    prompt_attention(*inputs, backend="torch")
    with pytest.raises(BackendError, match="backend=cuda.*it has triton, torch"):
        prompt_attention(*inputs, backend="cuda")
    with pytest.raises(
        BackendError, match="backend=triton: prompt_attention cannot run on it here: .*float64"
    ):
        prompt_attention(*inputs, backend="triton")
    monkeypatch.setenv("SPT_FAST_BACKEND", "abacus")
    with pytest.raises(BackendError, match="SPT_FAST_BACKEND=abacus"):
        prompt_attention(*inputs)
    prompt_attention(*inputs, backend="torch")  # the argument goes before the environment
