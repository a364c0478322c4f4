"""The Triton backend of prompt_attention against concatenation in float64, under Triton's interpreter."""

from __future__ import annotations

import copy
import inspect
import os
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from attention_judge import NAMES, check_close, concatenated, inputs, judge, noise
from interpreted import Case, outcomes_of, print_outcomes
from judged_vits import (
    judge_vit,
    logits_and_gradients,
    make_images,
    make_prompts,
    naive_logits_and_gradients,
    relative_error,
)

pytest.importorskip("triton")

from spt_fast import MultiTaskViT, PromptedViT
from spt_fast.kernels import (
    attention_triton,
    prompt_attention,
    prompt_attention_packed,
    triton_device,
    unavailable_backends,
)
from spt_fast.kernels.attention_inputs import AttentionInputs

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


def shape_case(*arguments: Any) -> Case:
    return lambda: judge(**inputs(*arguments))


# dtype, B, H, Nq, N, P, d, sets
SHAPES = [
    (FLOAT, 2, 2, 17, 17, 5, 32, "shared"),
    (FLOAT, 1, 1, 5, 100, 100, 64, "shared"),
    (FLOAT, 4, 1, 20, 20, 17, 80, "index-lengths"),
    (FLOAT, 2, 1, 1, 50, 0, 48, "own"),
    (FLOAT, 2, 2, 5, 0, 17, 88, "own"),
    (FLOAT, 3, 1, 7, 3, 4, 96, "own-lengths"),
    (FLOAT, 1, 2, 18, 20, 4, 128, "index"),
    (FLOAT, 9, 1, 3, 4, 20, 17, "shared"),
    (FLOAT, 2, 1, 5, 9, 1, 40, "shared"),
    (FLOAT, 1, 1, 3, 4, 2, 1, "own"),
    (FLOAT, 0, 2, 3, 4, 5, 32, "shared"),
    (FLOAT, 0, 2, 3, 4, 5, 32, "index"),
    (FLOAT, 2, 1, 0, 4, 3, 32, "shared"),
    (FLOAT, 2, 0, 2, 4, 3, 32, "shared"),
    (FLOAT, 2, 1, 3, 0, 0, 16, "shared"),
    (HALF, 2, 1, 66, 66, 20, 64, "shared"),
    (HALF, 3, 1, 5, 17, 5, 80, "index"),
    (HALF, 2, 1, 1, 17, 50, 17, "own-lengths"),
    (BRAIN, 2, 1, 50, 50, 1, 32, "shared"),
    (BRAIN, 2, 2, 17, 17, 5, 48, "own"),
    (BRAIN, 1, 1, 5, 100, 100, 64, "index-lengths"),
    (BRAIN, 1, 1, 17, 70, 70, 80, "shared"),
    (BRAIN, 9, 1, 2, 17, 5, 88, "shared"),
    (BRAIN, 4, 1, 5, 5, 17, 96, "index-lengths"),
    (BRAIN, 1, 1, 100, 33, 0, 128, "shared"),
    (BRAIN, 2, 1, 3, 6, 2, 40, "own"),
]

CASES: dict[str, Case] = {
    f"{str(dtype)[6:]}-{'x'.join(map(str, sizes))}": shape_case(dtype, *sizes) for dtype, *sizes in SHAPES
}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


@case
def every_subset_of_gradients_and_no_other_work() -> None:
    launched: list[str] = []
    launch = attention_triton._launch

    def spy(name: str, *arguments: Any) -> None:
        launched.append(name)
        launch(name, *arguments)

    attention_triton._launch = spy
    try:
        for wanted in product([False, True], repeat=5):
            if not any(wanted):
                continue
            launched.clear()
            judge(**inputs(FLOAT, 1, 1, 3, 4, 3, 8, "shared"), wanted=wanted)
            q, k, v, prompt_k, prompt_v = wanted
            expected = ["forward_kernel"]
            expected += ["delta_kernel"] * (q or k or prompt_k) + ["queries_kernel"] * q
            expected += ["keys_kernel"] * ((k or v) + (prompt_k or prompt_v))
            assert launched == expected, f"{wanted}: {launched}"
    finally:
        attention_triton._launch = launch


@case
def subsets_of_gradients_of_sets_by_index() -> None:
    for wanted in (
        (False, False, False, True, True),
        (False, False, True, False, True),
        (True, False) * 2 + (False,),
    ):
        judge(**inputs(BRAIN, 4, 1, 3, 4, 5, 16, "index-lengths"), wanted=wanted)


@case
def every_shape_to_choose_from() -> None:
    query_shapes, key_shapes = attention_triton.query_shapes, attention_triton.key_shapes
    try:
        for which, dtype in [*product(range(2), (FLOAT, BRAIN)), (2, BRAIN), (3, BRAIN)]:
            attention_triton.query_shapes = lambda *a, which=which: (s := query_shapes(*a))[which % len(s) :]
            attention_triton.key_shapes = lambda *a, which=which: (s := key_shapes(*a))[which % len(s) :]
            judge(**inputs(dtype, 1, 1, 70, 67, 70, 16 if dtype == FLOAT else 64 + 16 * which, "shared"))
    finally:
        attention_triton.query_shapes, attention_triton.key_shapes = query_shapes, key_shapes


@case
def every_kind_of_strides() -> None:
    prompts = noise(2, 3, 8, seed=1), noise(2, 3, 8, seed=2)
    packed = noise(2, 5, 3, 2, 8)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    for dtype in (FLOAT, BRAIN):
        judge([t.to(dtype) for t in (q, k, v, *prompts)])
    every_other, transposed = noise(2, 2, 5, 16)[..., ::2], noise(2, 2, 8, 5).mT
    of_one_image, of_one_head = (
        noise(1, 2, 5, 8).expand(2, -1, -1, -1),
        noise(2, 1, 5, 8).expand(-1, 2, -1, -1),
    )
    shifted = noise(2, 2, 6, 9)[:, :, 1:, 1:]
    judge(
        (
            every_other,
            of_one_image,
            transposed,
            prompts[0].transpose(0, 1).contiguous().transpose(0, 1),
            prompts[1],
        )
    )
    judge((shifted, of_one_head, of_one_image, noise(2, 8, 3).mT, noise(2, 3, 9)[..., 1:]))
    judge((transposed, shifted, every_other[:, :, :1].expand(-1, -1, 5, -1), *prompts))
    judge(
        (
            q,
            k[:, :, ::2],
            v[:, :, 1:4],
            noise(2, 3, 2, 8).transpose(1, 2),
            noise(1, 2, 3, 8).expand(2, -1, -1, -1),
        )
    )


@case
def packed_projections() -> None:
    index, lengths = torch.tensor([1, 1, 0]), torch.tensor([2, 3])
    for dtype, width in ((FLOAT, 8), (BRAIN, 40)):
        tensors = [noise(3, 5, 3, 2, width), noise(2, 2, 3, width, seed=1), noise(2, 2, 3, width, seed=2)]
        ours = [t.to(dtype).requires_grad_() for t in tensors]
        judged = [t.detach().double().requires_grad_() for t in ours]
        out = prompt_attention_packed(*ours, prompt_index=index, prompt_lengths=lengths, backend="triton")
        q, k, v = judged[0].permute(2, 0, 3, 1, 4)
        expected, _ = concatenated(q, k, v, *judged[1:], width**-0.5, index, lengths)
        check_close("out", out, expected.transpose(1, 2))
        cotangent = noise(*out.shape, seed=9).to(dtype)
        out.backward(cotangent)
        expected.backward(cotangent.double().transpose(1, 2))
        for name, tensor, reference in zip(("qkv", *NAMES[3:]), ours, judged, strict=True):
            check_close(name, tensor.grad, reference.grad)


@case
def gradients_of_the_output_with_any_strides() -> None:
    tensors = inputs(FLOAT, 2, 1, 3, 4, 3, 8, "shared")["tensors"]
    ours = [t.requires_grad_() for t in tensors]
    judged = [t.detach().double().requires_grad_() for t in tensors]
    prompt_attention(*ours, backend="triton").sum().backward()  # expanded from a single number
    concatenated(*judged, 8**-0.5)[0].sum().backward()
    for name, tensor, reference in zip(NAMES, ours, judged, strict=True):
        check_close(name, tensor.grad, reference.grad)


@case
def other_scales() -> None:
    for scale in (0.7, -0.4, 0.0):
        given = inputs(FLOAT, 2, 1, 5, 20, 4, 16, "own-lengths")
        if scale:
            judge(**given, scale=scale)
        else:  # the gradients that vanish leave no norm to measure an error by
            judge(**given, scale=scale, wanted=(False, False, True, False, True))


@case
def log_sum_exp() -> None:
    for sets in ("shared", "index-lengths"):
        given = inputs(FLOAT, 4, 2, 3, 40, 30, 16, sets)
        q, k, v, *prompts = given["tensors"]
        index, lengths = given.get("index"), given.get("lengths")
        for scale in (0.3, -0.3):
            out = torch.empty_like(q)
            as_sets = [t[None] if t.ndim == 3 else t for t in prompts]
            lse = attention_triton.forward(AttentionInputs(q, k, v, *as_sets, index, lengths, scale), out)
            double = [t.double() for t in given["tensors"]]
            check_close("lse", lse, concatenated(*double, scale, index, lengths)[1])


@case
def large_scores() -> None:
    """Of some 10,000: their powers overflow, and weights are 0 and 1 but for the few that are close."""
    for dtype in (FLOAT, BRAIN, HALF):
        tensors = [
            t * 300 if which in (0, 1, 3) else t
            for which, t in enumerate(inputs(dtype, 2, 1, 5, 70, 9, 16, "shared")["tensors"])
        ]
        tensors[0] = tensors[0].clone()
        scores = (
            tensors[0].double() @ torch.cat([tensors[3].expand(2, -1, -1, -1), tensors[1]], 2).double().mT / 4
        )
        assert scores.max() > 1e4
        top = scores.topk(2, dim=3).values
        assert (top[..., 0] - top[..., 1]).min() > 20, "the sums' own rounding would decide between two keys"
        ours = [t.detach().requires_grad_() for t in tensors]
        out = prompt_attention(*ours, backend="triton")
        check_close("out", out, concatenated(*(t.double() for t in tensors), 0.25)[0])
        out.backward(noise(*out.shape, seed=9).to(dtype))
        assert all(bool(t.grad.isfinite().all()) for t in ours)


@case
def scores_far_below_zero() -> None:
    """Beside them the score of a key that is not there, 0, would have an infinite power."""
    for sets in ("shared", "own-lengths"):
        given = inputs(FLOAT, 2, 1, 5, 20, 4, 16, sets)
        q, k, v, prompt_k, prompt_v = given["tensors"]
        given["tensors"] = [q + 8, k - 8, v, prompt_k - 8, prompt_v]
        judge(**given, slack=100)  # a score of -256 has two digits less behind the point


@case
def what_lies_behind_a_length_is_ignored() -> None:
    for dtype in (FLOAT, BRAIN):
        given = inputs(dtype, 4, 1, 3, 4, 5, 16, "index-lengths")
        clean, dirty = ([t.clone() for t in given["tensors"]] for _ in range(2))
        for tensor, (which, length) in product(dirty[3:], enumerate(given["lengths"].tolist())):
            tensor[which, :, length:] = float("nan")
        gradients = []
        for tensors in (clean, dirty):
            leaves = [t.requires_grad_() for t in tensors]
            out = prompt_attention(
                *leaves, prompt_index=given["index"], prompt_lengths=given["lengths"], backend="triton"
            )
            out.square().sum().backward()
            gradients.append([out, *(t.grad for t in leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        for gradient, (which, length) in product(gradients[1][4:], enumerate(given["lengths"].tolist())):
            assert (gradient[which, :, length:] == 0).all()


@case
def queries_without_keys_get_zeros() -> None:
    nothing = torch.zeros(2, 1, 0, 16)
    q = noise(2, 1, 3, 16)
    for prompts, lengths in ((noise(2, 1, 5, 16, seed=1), torch.tensor([0, 2])), (noise(1, 0, 16), None)):
        ours = [t.clone().requires_grad_() for t in (q, nothing, nothing, prompts, prompts)]
        out = prompt_attention(*ours, prompt_lengths=lengths, backend="triton")
        out.sum().backward()
        assert (out[0] == 0).all() and (ours[0].grad[0] == 0).all()
        assert all((t.grad[0] == 0).all() for t in ours[3:])
        assert all(t.grad.isfinite().all() for t in ours)
        assert (out[1] != 0).any() == (lengths is not None)
    out = torch.empty_like(q)
    empty = torch.zeros(1, 1, 0, 16)
    lse = attention_triton.forward(AttentionInputs(q, nothing, nothing, empty, empty, None, None, 1.0), out)
    assert (lse == -torch.inf).all() and (out == 0).all()


@case
def sets_that_no_image_has_get_zeros() -> None:
    given = inputs(FLOAT, 3, 1, 2, 3, 4, 16, "index")
    given["index"] = torch.tensor([2, 0, 2])
    leaves = [t.requires_grad_() for t in given["tensors"]]
    prompt_attention(*leaves, prompt_index=given["index"], backend="triton").sum().backward()
    assert all((t.grad[1] == 0).all() and (t.grad[[0, 2]] != 0).any() for t in leaves[3:])


@case
def results_repeat_bit_for_bit() -> None:
    for sets in ("shared", "index"):
        runs = []
        for _ in range(2):
            given = inputs(BRAIN, 5, 1, 20, 20, 5, 16, sets)
            leaves = [t.requires_grad_() for t in given["tensors"]]
            out = prompt_attention(*leaves, prompt_index=given.get("index"), backend="triton")
            out.backward(noise(*out.shape, seed=9).to(BRAIN))
            runs.append([out, *(t.grad for t in leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@case
def offsets_beyond_32_bits() -> None:
    # Of the four gigabytes only the pages that are written exist.
    far = (1 << 31) + 64
    memory = torch.empty(far + 1024, dtype=HALF)
    for image, row in ((far, 16), (64, far)):
        tensors = []
        for which in range(3):
            view = memory.as_strided((2, 1, 2, 16), (image, 512, row, 1), 128 * which)
            view.copy_(noise(2, 1, 2, 16, seed=which))
            tensors.append(view)
        judge([*tensors, noise(1, 3, 16, seed=3).half(), noise(1, 3, 16, seed=4).half()])


@case
def cpu_tensors_are_taken() -> None:
    x = torch.zeros(1, 8)
    assert attention_triton.why_not(x, x) is None
    assert "triton" not in unavailable_backends()["prompt_attention"]


@case
def whole_models() -> None:
    """All that a model asks of the op: packed and unpacked, class-only queries, sets of different lengths."""
    judged = judge_vit("qk_norm"), judge_vit("plain")
    os.environ["SPT_FAST_BACKEND"] = "triton"
    try:
        for backbone in judged:
            images = make_images(backbone)
            model = PromptedViT(
                copy.deepcopy(backbone).float(), make_prompts(backbone, "deep"), num_classes=7
            )
            expected = naive_logits_and_gradients(backbone, model.prompts, model.head, images, None)
            for a, e in zip(logits_and_gradients(model, images), expected, strict=True):
                assert relative_error(a, e) < 2e-5
        more = PromptedViT(model.backbone, make_prompts(backbone, "deep", 3), num_classes=4, pool="avg")
        tasks = MultiTaskViT(model.backbone, {"five": model, "three": more})
        with torch.no_grad():
            logits = tasks(images, ["three", "five", "three"])
            torch.testing.assert_close(logits[1], model(images)[1])
            torch.testing.assert_close(logits[0, :4], more(images)[0])
    finally:
        del os.environ["SPT_FAST_BACKEND"]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """Case -> its traceback, or ``None`` if it went well."""
    return outcomes_of(__file__)


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name: str, outcomes: dict[str, str | None]) -> None:
    if outcomes[name]:
        pytest.fail(str(outcomes[name]))


def test_what_the_kernels_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons = {
        attention_triton.why_not(*[torch.zeros(1, width, dtype=dtype, device=device)] * 5)
        for width, dtype, device in (
            (64, FLOAT, "cpu"),
            (64, torch.float64, "cpu"),
            (129, HALF, "cpu"),
            (8, HALF, "meta"),
        )
    }
    assert reasons == {
        "queries are on cpu and Triton's interpreter is off (TRITON_INTERPRET=1)",
        "the kernels take float32, float16 and bfloat16, not float64",
        "the kernels take up to 128 features per head, not 129",
        "queries are on meta and Triton's interpreter is off (TRITON_INTERPRET=1)",
    }


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_triton, "find_spec", lambda name: None)
    assert attention_triton.why_not(torch.zeros(1, 8)) == "Triton is not installed"


def test_every_shape_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches themselves, with nothing behind them: what is tuned, over which programs, and when again."""
    launches: list[tuple[str, int, int]] = []

    class Driver:
        def get_benchmarker(self) -> Any:
            # The shape with the fewest warps is fastest.
            def measure(launch: Case, quantiles: Any) -> list[float]:
                launch()
                return [launches[-1][2]] * 3

            return measure

    def launch(
        kernel: Any, *arguments: Any, grid: Any, warmup: bool, num_warps: int, **constants: Any
    ) -> None:
        assert {constants.pop("maxnreg"), constants.pop("enable_fp_fusion")} == {255, True}
        constants.pop("num_stages"), constants.pop("num_ctas", None)
        bound = inspect.signature(kernel.fn).bind(*arguments, **constants).arguments
        (programs,) = grid(bound) if callable(grid) else grid
        launches.append((kernel.__name__, programs, num_warps))

    monkeypatch.setattr("triton.runtime.driver._active", Driver())
    monkeypatch.setattr("triton.runtime.jit.JITFunction.run", launch)
    monkeypatch.setattr(attention_triton, "_tuned", cache(attention_triton._tuned.__wrapped__))

    def run(batch: int) -> None:
        q, k, v, *prompts = inputs(BRAIN, batch, 2, 150, 150, 20, 64, "shared")["tensors"]
        given = AttentionInputs(q, k, v, *(t[None] for t in prompts), None, None, 0.1)
        out, grad_q, grad_k, grad_v = (torch.empty_like(q) for _ in range(4))
        lse = attention_triton.forward(given, out)
        attention_triton.backward(given, out, out, lse, grad_q, grad_k, grad_v, True, True)

    run(3)
    tried: dict[str, set[tuple[int, int]]] = {}
    for name, programs, warps in launches:
        tried.setdefault(name, set()).add((programs, warps))
    rows_of_64, rows_of_128 = (3 * 2 * 3, 4), (3 * 2 * 2, 8)
    assert tried["forward_kernel"] == tried["queries_kernel"] == {rows_of_64, rows_of_128}
    assert tried["delta_kernel"] == {rows_of_64}
    chunks = attention_triton.chunks_of_images(3, 2, 8)
    assert tried["keys_kernel"] == {rows_of_64, rows_of_128, (2 * chunks, 4)}
    launches.clear()
    run(5)  # another batch size is no other case
    assert launches == [
        ("forward_kernel", 5 * 2 * 3, 4),
        ("delta_kernel", 5 * 2 * 3, 4),
        ("queries_kernel", 5 * 2 * 3, 4),
        ("keys_kernel", 5 * 2 * 3, 4),
        ("keys_kernel", 2 * attention_triton.chunks_of_images(5, 2, 8), 4),
    ]


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda:0")

    for capability, expected in (
        ((7, 5), "Triton's tensor-core products need compute capability 8.0"),
        ((8, 0), None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert triton_device.why_not(OnGpu(), "queries", lambda: None) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "width, pieces",
    [(1, [16]), (16, [16]), (17, [32]), (40, [32, 16]), (48, [32, 16]), (64, [64])]
    + [(80, [64, 16]), (88, [64, 32]), (96, [64, 32]), (100, [128]), (128, [128])],
)
def test_pieces_of_a_head(width: int, pieces: list[int]) -> None:
    whole = attention_triton.piece(width, BRAIN)
    rest = attention_triton.constants(width, BRAIN, 1)["REST"]
    assert [whole] * (width // whole) + [rest] * (rest > 0) == pieces


@pytest.mark.parametrize(
    "images, programs, at_a_time", [(256, 24, 264), (64, 12, 264), (7, 300, 264), (512, 170, 264)]
)
def test_chunks_of_images_fill_the_gpu(images: int, programs: int, at_a_time: int) -> None:
    chunks = attention_triton.chunks_of_images(images, programs, at_a_time)
    assert 1 <= chunks <= images
    # Images that programs walk through one after the other, at best with no program ever waiting.
    walked = -(-programs * chunks // at_a_time) * -(-images // chunks)
    assert walked <= 1.25 * max(1, programs * images / at_a_time) + 1


if __name__ == "__main__":
    print_outcomes(CASES)
