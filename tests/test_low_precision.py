"""8-bit frozen weights: the products and their gradients, judged in float64 by the weights that 8 bits hold, and that
a backbone with them is in every other way the backbone it was."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_line import TINY, TRAIN, check_refused, make_photos, run
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import spt_fast.low_precision
from spt_fast import Adapter, PromptedViT, load_adapter, load_backbone, save_adapter
from spt_fast.backbones import backbone_identity, source_of
from spt_fast.errors import InputError, UnsupportedModelError
from spt_fast.low_precision import (
    EightBitLinear,
    WeightDtype,
    check_weight_dtype,
    linear_rows,
    why_not,
)

pytest.importorskip("torchao")

CPU = torch.device("cpu")
VIT = "vit_tiny_patch16_224"
TINY_VIT: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}
BUNDLED: dict[str, Any] = {"checkpoint": "bundled:vit_tiny_mae_cifar10", "img_size": 32, "patch_size": 4}
LARGEST = {"int8": 127.0, "float8": 448.0}


def prepare(weight_dtype: WeightDtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip what cannot run here. torch emulates float8 products on CPUs, which is no use to anybody but a test."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    reason = why_not(weight_dtype, torch.device(device))
    if weight_dtype == "float8" and device == "cpu":
        try:
            few = torch.ones(16, 16).to(torch.float8_e4m3fn)
            scales = torch.ones(16, 1)
            torch._scaled_mm(few, few.t(), scale_a=scales, scale_b=scales.t(), out_dtype=torch.bfloat16)
        except RuntimeError:
            pytest.skip("this release of torch does not emulate float8 products on the CPU")
        monkeypatch.setattr(spt_fast.low_precision, "why_not", lambda *_: None)
    elif reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=["int8", "float8"])
def weight_dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> WeightDtype:
    prepare(request.param, "cpu", monkeypatch)
    return request.param


@pytest.fixture
def int8(monkeypatch: pytest.MonkeyPatch) -> WeightDtype:
    prepare("int8", "cpu", monkeypatch)
    return "int8"


@pytest.fixture(
    params=[
        *itertools.product(["int8", "float8"], ["cpu"]),
        *(pytest.param((kind, "cuda"), marks=pytest.mark.gpu) for kind in ("int8", "float8")),
    ],
    ids=lambda param: "-".join(param),
)
def layer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> EightBitLinear:
    """48 to 80; the outputs' weights are of very different sizes, as one scale for all could not hold them."""
    kind, device = request.param
    prepare(kind, device, monkeypatch)
    return EightBitLinear(uneven(48, 80), kind).to(device)


def uneven(inputs: int, outputs: int) -> nn.Linear:
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs)
    with torch.no_grad():
        plain.weight.mul_(torch.logspace(-2, 2, outputs)[:, None])
    return plain


def held(layer: EightBitLinear) -> Tensor:
    """The weight that the layer holds, in float64 on the CPU."""
    return (layer.numbers.float().double() * layer.scale.double()).cpu()


def exact_values(rows: int, columns: int, kind: WeightDtype) -> Tensor:
    """Random values that are 8-bit numbers times a power of two, the largest number in every row: no rounding."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(rows, columns, generator=generator) * LARGEST[kind] / 4
    noise = noise.clamp(-LARGEST[kind], LARGEST[kind])
    values = noise.round() if kind == "int8" else noise.to(torch.float8_e4m3fn).float()
    values[:, 0] = LARGEST[kind]
    return values * 2.0 ** torch.randint(-6, 7, (rows, 1), generator=generator)


def rounding_bound(rows: Tensor, weight: Tensor, kind: WeightDtype) -> Tensor:
    """How far ``rows @ weight`` can be off when every row is rounded to 8 bits with a scale of its own."""
    rows, weight = rows.abs(), weight.abs()
    step = rows.amax(dim=-1, keepdim=True) / LARGEST[kind]
    if kind == "int8":
        return (step / 2).expand_as(rows) @ weight
    # e4m3 has three bits behind the point; under 2^-6 its numbers are 2^-9 apart.
    return (rows * 2**-4 + step * 2**-10) @ weight


@pytest.mark.parametrize("shape", [(1,), (5,), (17,), (2, 3), (4, 33)], ids=str)
def test_values_that_8_bits_hold_are_multiplied_exactly(
    layer: EightBitLinear, shape: tuple[int, ...]
) -> None:
    kind, device, weight = layer.weight_dtype, layer.scale.device, held(layer)
    rows = torch.Size(shape).numel()
    x = exact_values(rows, 48, kind).reshape(*shape, 48).to(device).requires_grad_()
    # Gradients are quantised together with the scales of the outputs.
    scaled = exact_values(rows, 80, kind).reshape(*shape, 80).double()
    grad = (scaled / layer.scale.cpu().flatten()).float()
    out = layer(x)
    out.backward(grad.to(device))
    assert layer.bias is not None and x.grad is not None and out.dtype == x.dtype

    # float32 sums in int8; float8 kernels answer in bfloat16.
    tolerance = 2e-6 if kind == "int8" else 2**-8
    for got, expected, size in [
        (
            out - layer.bias,
            x.detach().cpu().double() @ weight.T,
            x.detach().cpu().double().abs() @ weight.abs().T,
        ),
        (x.grad, grad.double() @ weight, grad.double().abs() @ weight.abs()),
    ]:
        assert ((got.detach().cpu().double() - expected).abs() <= tolerance * size).all()


def test_rows_are_rounded_each_with_its_own_scale(layer: EightBitLinear) -> None:
    kind, device, weight = layer.weight_dtype, layer.scale.device, held(layer)
    torch.manual_seed(2)
    sizes = torch.tensor([0.0, 1e-30, 1e-6, 1.0, 1e3, 1e6])[:, None]
    x = (torch.randn(6, 48) * sizes).to(device).requires_grad_()
    grad = torch.randn(6, 80) * sizes
    out = layer(x)
    out.backward(grad.to(device))
    assert x.grad is not None and layer.bias is not None
    inputs, bias = x.detach().cpu().double(), layer.bias.cpu().double()
    scaled, numbers = (
        grad.double() * layer.scale.cpu().double().flatten(),
        layer.numbers.cpu().float().double(),
    )
    for got, expected, bound in [
        (out, inputs @ weight.T + bias, rounding_bound(inputs, weight.T, kind)),
        (x.grad, grad.double() @ weight, rounding_bound(scaled, numbers, kind)),
    ]:
        error = (got.detach().cpu().double() - expected).abs()
        assert (error <= 1.01 * bound + 2**-7 * expected.abs()).all()
    assert error.max() > 0, "the gradient was not quantised at all"
    assert torch.equal(out[0], layer.bias) and not x.grad[0].any()


def test_each_output_has_a_scale_of_its_own(weight_dtype: WeightDtype) -> None:
    plain = uneven(48, 80)
    layer = EightBitLinear(plain, weight_dtype)
    assert layer.scale.shape == (80, 1) and layer.numbers.element_size() == 1
    error = (held(layer) - plain.weight.double()).abs()
    bound = rounding_bound(plain.weight.double(), torch.eye(48, dtype=torch.float64), weight_dtype)
    # torchao's int8 scales are a little smaller or larger than ours: it divides by 127.5.
    assert (error <= 1.01 * bound).all() and error.amax(dim=1).all()


def test_backward_keeps_8_bit_weights_and_no_activations(layer: EightBitLinear) -> None:
    kept: list[Tensor] = []
    x = torch.randn(100, 48, device=layer.scale.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        layer(x)
    assert kept and sum(tensor.nbytes for tensor in kept) == 48 * 80 + 4 * 80


def test_second_derivatives_are_refused(layer: EightBitLinear) -> None:
    x = torch.randn(3, 48, device=layer.scale.device, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(0, 80), (16, 80), (3, 50), (79, 80)], ids=str)
def test_some_outputs_are_those_of_the_whole_layer(
    rows: tuple[int, int], bias: bool, weight_dtype: WeightDtype
) -> None:
    plain = uneven(48, 80)
    if not bias:
        plain.bias = None
    x = torch.randn(2, 5, 48)
    start, stop = rows
    expected = plain(x)[..., start:stop]
    torch.testing.assert_close(linear_rows(plain, x, start, stop), expected)
    layer = EightBitLinear(plain, weight_dtype)
    torch.testing.assert_close(linear_rows(layer, x, start, stop), layer(x)[..., start:stop])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_and_copies_keep_the_8_bits(dtype: torch.dtype, weight_dtype: WeightDtype) -> None:
    layer = EightBitLinear(uneven(48, 80), weight_dtype)
    cast = copy.deepcopy(layer).to(dtype).eval().requires_grad_(False)
    assert cast.numbers.dtype == layer.numbers.dtype and cast.weight_dtype == weight_dtype
    for name in ("numbers", "scale"):
        mine, theirs = getattr(layer, name), getattr(cast, name)
        assert torch.equal(mine.float(), theirs.float()) and mine.data_ptr() != theirs.data_ptr()
    assert cast.bias is not None and cast.bias.dtype == dtype
    x = torch.randn(7, 48).to(dtype).requires_grad_()
    out = cast(x)
    out.sum().backward()
    assert out.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
    expected = layer(x.detach().float())
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())


def test_autocast_decides_the_dtype(weight_dtype: WeightDtype) -> None:
    layer = EightBitLinear(uneven(48, 80), weight_dtype)
    x = torch.randn(7, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    # Nothing is left to autocast on a real device; within torch's emulation of float8 it rounds once more.
    assert relative(out, layer(x.bfloat16())) < 2**-8
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32 and x.grad.any()


# --- in torch.compile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float32, "inductor"), (torch.bfloat16, "aot_eager")], ids=str
)
def test_compiled_layer_gives_the_same(layer: EightBitLinear, dtype: torch.dtype, backend: str) -> None:
    torch._dynamo.reset()
    x, grad = (torch.randn(20, width, device=layer.scale.device).to(dtype) for width in (48, 80))
    x.requires_grad_()
    layer = layer.to(dtype)
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        x.grad = None
        out = function(x)
        out.backward(grad)
        assert x.grad is not None
        results.append((out.detach(), x.grad))
    for eager, compiled in zip(*results, strict=True):
        # Compiled code rounds less often to bfloat16 on its way, and so a value on the border between two 8-bit numbers
        # may go to the other one.
        assert eager.any() and relative(compiled, eager) < 0.02


def test_compiled_model_has_no_graph_breaks(weight_dtype: WeightDtype) -> None:
    torch._dynamo.reset()
    model = prompted(noisy(weight_dtype))
    images = torch.randn(3, 3, 16, 16)
    model(images).sum().backward()
    assert model.prompts.grad is not None
    expected, model.prompts.grad = model.prompts.grad, None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(images)
    out.sum().backward()
    assert model.prompts.grad is not None and expected.any()
    assert relative(out, model(images)) < 1e-2 and relative(model.prompts.grad, expected) < 1e-2


# --- a whole backbone -------------------------------------------------------------------------------------------------


def noisy(weight_dtype: WeightDtype | None = None, seed: int = 0) -> VisionTransformer:
    """A tiny backbone of random weights, the same ones in every precision."""
    torch.manual_seed(seed)
    return load_backbone(VIT, weight_dtype=weight_dtype, **TINY_VIT)


def prompted(backbone: VisionTransformer, **kwargs: Any) -> PromptedViT:
    torch.manual_seed(1)
    prompts = torch.randn(len(backbone.blocks), 4, backbone.embed_dim)
    model = PromptedViT(backbone, prompts, num_classes=3, pool="avg", **kwargs).eval()
    nn.init.normal_(model.head.weight, std=0.1)
    return model


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_backbone_loses_little(
    dtype: torch.dtype, weight_dtype: WeightDtype, bundled_backbone: VisionTransformer, digit_images: Tensor
) -> None:
    results = []
    for backbone in (bundled_backbone, load_backbone(VIT, weight_dtype=weight_dtype, **BUNDLED)):
        model = prompted(backbone).cast_backbone(dtype if results else torch.float32)
        logits = model(digit_images[:8])
        F.cross_entropy(logits, torch.arange(8) % 3).backward()
        assert model.prompts.grad is not None
        results.append((logits.detach(), model.prompts.grad))
    (logits, grad), (got_logits, got_grad) = results
    # Rounding to 8 bits is 0.4 % of a weight in int8 and 2.5 % in float8; twelve blocks add to it. Twice what is seen.
    allowed = {"int8": (0.03, 0.05), "float8": (0.07, 0.1)}[weight_dtype]
    assert 1e-4 < relative(got_logits, logits) < allowed[0]
    assert 1e-4 < relative(got_grad, grad) < allowed[1]
    for block in range(len(grad)):
        assert F.cosine_similarity(got_grad[block].flatten(), grad[block].flatten(), dim=0) > 0.99


def test_only_the_linear_layers_of_blocks_are_8_bit(weight_dtype: WeightDtype) -> None:
    plain, backbone = noisy(), noisy(weight_dtype)
    eight_bit = {name for name, layer in backbone.named_modules() if isinstance(layer, EightBitLinear)}
    assert eight_bit == {
        f"blocks.{index}.{name}"
        for index in range(2)
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert not any(parameter.requires_grad for parameter in backbone.parameters()) and not backbone.training
    for name, value in plain.state_dict().items():
        if name.removesuffix(".weight") not in eight_bit:
            assert torch.equal(backbone.state_dict()[name], value), name
    held_bytes = sum(
        layer.numbers.nbytes + layer.scale.nbytes for layer in map(backbone.get_submodule, eight_bit)
    )
    assert held_bytes < 0.4 * sum(plain.get_submodule(name).weight.nbytes for name in eight_bit)


def test_prompted_vit_casts_the_rest_of_the_backbone(weight_dtype: WeightDtype) -> None:
    backbone = noisy(weight_dtype)
    model = prompted(backbone).cast_backbone(torch.bfloat16)
    assert model.backbone is not backbone and backbone.cls_token.dtype == torch.float32
    one: Any = model.backbone.blocks[0]
    other: Any = backbone.blocks[0]
    assert one.attn.qkv.bias.dtype == one.norm1.weight.dtype == torch.bfloat16
    assert one.attn.qkv.numbers.dtype == other.attn.qkv.numbers.dtype
    images = torch.randn(5, 3, 16, 16)
    assert relative(model(images), prompted(backbone)(images)) < 0.05


def test_it_trains_in_several_processes(weight_dtype: WeightDtype, tmp_path: Path) -> None:
    """DistributedDataParallel sends every parameter around when it starts, which some kinds of tensors do not allow."""
    model = prompted(noisy(weight_dtype))
    images = torch.randn(3, 3, 16, 16)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        out = DistributedDataParallel(model)(images)
        out.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(out, model(images))
    assert model.prompts.grad is not None and model.prompts.grad.any()


# --- which backbone it is ---------------------------------------------------------------------------------------------


def test_it_is_the_same_backbone_in_every_precision(weight_dtype: WeightDtype) -> None:
    identity = backbone_identity(noisy())
    backbone = noisy(weight_dtype)
    assert backbone_identity(backbone) == identity
    assert backbone_identity(copy.deepcopy(backbone).to(torch.bfloat16)) == identity
    assert backbone_identity(noisy(weight_dtype, seed=1)) != identity
    backbone.norm.weight.mul_(1.5)
    assert backbone_identity(backbone) != identity, "what is not 8-bit is still looked at"


def test_source_is_how_to_load_it_again(int8: WeightDtype) -> None:
    assert source_of(noisy())["weight_dtype"] is None
    source = json.loads(json.dumps(source_of(noisy(int8))))
    assert source["weight_dtype"] == int8 and "weight_dtype" not in source["timm_kwargs"]


def test_adapters_go_with_every_precision(int8: WeightDtype, tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    backbone = load_backbone(VIT, weight_dtype=int8, **BUNDLED)
    model = prompted(backbone)
    save_adapter(file, model)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_adapter(file)(images), model(images)), "it comes back at 8 bits"
    plain = load_backbone(VIT, **BUNDLED)
    assert torch.equal(load_adapter(file, plain)(images), prompted_like(model, plain)(images))

    save_adapter(file, prompted_like(model, plain))
    assert torch.equal(load_adapter(file, backbone)(images), model(images))


def prompted_like(model: PromptedViT, backbone: VisionTransformer) -> PromptedViT:
    other = PromptedViT(backbone, model.prompts.detach(), num_classes=3, pool="avg").eval()
    other.head.load_state_dict(model.head.state_dict())
    return other


# --- what is refused --------------------------------------------------------------------------------------------------


def test_unknown_weight_dtype_is_refused() -> None:
    with pytest.raises(InputError, match="weight_dtype must be None or one of int8, float8, got 'int4'"):
        load_backbone(VIT, weight_dtype="int4", **TINY_VIT)  # type: ignore[arg-type]


def test_without_torchao_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match=r"pip install spt-fast\[low-precision\]"):
        load_backbone(VIT, weight_dtype="int8", **TINY_VIT)
    assert load_backbone(VIT, **TINY_VIT), "nobody else needs it"


@pytest.mark.parametrize(
    ("overrides", "layer"),
    [({"embed_dim": 40}, "0.attn.qkv is 40 to 120"), ({"mlp_ratio": 1.25}, "0.mlp.fc1 is 32 to 40")],
)
def test_widths_that_do_not_suit_the_kernels_are_refused(
    overrides: dict[str, Any], layer: str, int8: WeightDtype
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"multiples of 16, and blocks.{layer}"):
        load_backbone(VIT, weight_dtype=int8, **{**TINY_VIT, **overrides})


def test_float8_is_refused_where_no_device_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(
        InputError, match=r"float8 products cannot run here: they need a CUDA device .* 8\.9 or newer"
    ):
        load_backbone(VIT, weight_dtype="float8", **TINY_VIT)
    # Loaded beside a device that can, it still must not be run on the CPU.
    layer = EightBitLinear(nn.Linear(32, 32), "float8")
    with pytest.raises(
        UnsupportedModelError, match="has float8 weights, and float8 products cannot run on cpu"
    ):
        layer(torch.randn(2, 32))


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 0), set()),
        ((7, 5), {"int8"}),
        ((8, 6), {"int8"}),
        ((8, 9), {"int8", "float8"}),
        ((10, 0), {"int8", "float8"}),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_cuda_devices_can_run(
    capability: tuple[int, int], runs: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.version, "hip", None)
    reasons = {kind: why_not.__wrapped__(kind, torch.device("cuda", 3)) for kind in LARGEST}
    assert {kind for kind, reason in reasons.items() if reason is None} == runs
    assert all("which Some GPU does not have" in reason for reason in reasons.values() if reason)


@pytest.mark.parametrize(
    ("capabilities", "runs"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx2": True, "avx_vnni": False}, False),
        ({"architecture": "x86_64", "avx_vnni": True}, True),
        ({"architecture": "x86_64", "amx_int8": True}, True),
        ({"architecture": "aarch64"}, True),
    ],
)
def test_cpus_that_saturate_are_refused(
    capabilities: dict[str, Any], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    reason = why_not.__wrapped__("int8", CPU)
    assert (reason is None) == runs and (runs or "AVX512-VNNI" in reason)


def test_other_devices_are_refused() -> None:
    for kind in ("int8", "float8"):
        with pytest.raises(InputError, match=f"{kind} products cannot run here: they need a .*not mps"):
            check_weight_dtype(kind, torch.device("mps"))


# --- on the command line ----------------------------------------------------------------------------------------------


def test_command_line_trains_at_8_bits(int8: WeightDtype, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos")
    common = [*TINY, *TRAIN, "--data", photos, "--epochs", 1, "--weight-dtype"]
    done = run("train", *common, int8, "--output", tmp_path / "run")
    assert done.code == 0, done
    adapter = Adapter.load(tmp_path / "run" / "last.safetensors")
    assert adapter.config["backbone"]["source"]["weight_dtype"] == int8
    done = run(
        "eval", "--adapter", tmp_path / "run" / "last.safetensors", "--data", photos, "--device", "cpu"
    )
    assert done.code == 0, done

    refused = run("train", *common, "float8", "--output", tmp_path / "other")
    check_refused(refused, "weight_dtype='float8'", "need a CUDA device of compute capability 8.9")
    assert not (tmp_path / "other").exists()
    refused = run("train", *common, int8, "-k", "weight_dtype=int8", "--output", tmp_path / "other")
    check_refused(refused, "--weight-dtype")
