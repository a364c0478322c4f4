"""LoraViT against weight matrices with their low-rank changes added."""

import builtins
import copy

import pytest
import torch
from naive_methods import (
    VARIANTS,
    Unchanged,
    assert_only_the_task_moves,
    assert_runs_in_bfloat16_and_compiled,
    assert_same_logits_and_gradients,
    double_case,
    naive_features,
)
from timm.layers import SwiGLU
from tiny import noise, tiny_backbone

from spt_fast import load_adapter, save_adapter
from spt_fast.errors import AdapterMismatchError, CheckpointError, InputError, UnsupportedModelError
from spt_fast.methods import build_model
from spt_fast.methods.lora import LAYERS, LoraViT

pytest.importorskip("peft")


class LowRank(Unchanged):
    """``(W + alpha / rank B A) x + b``."""

    def __init__(self, state, scale):
        self.state, self.scale = state, scale

    def _change(self, block, name):
        at = f"backbone.blocks.{block}.{LAYERS[name]}.lora_{{}}.default.weight"
        if at.format("A") not in self.state:
            return 0
        return self.scale * self.state[at.format("B")] @ self.state[at.format("A")]

    def layer(self, layer, x, block, name):
        if name in ("norm1", "norm2"):
            return layer(x)
        if name == "qkv":
            rows = layer.weight.chunk(3)
            parts = [w + self._change(block, part) for w, part in zip(rows, "qkv", strict=True)]
            weight = torch.cat(parts) + self._change(block, "qkv")
        else:
            weight = layer.weight + self._change(block, name)
        return x @ weight.T + (0 if layer.bias is None else layer.bias)


@pytest.mark.parametrize(
    ("variant", "layers"),
    [
        *((variant, ["q", "v", "proj", "fc1"]) for variant in VARIANTS),
        ("plain", ["k", "fc2"]),
        ("plain", ["qkv"]),
        ("scaled_layers", ["qkv", "fc1", "fc2"]),
    ],
)
def test_logits_and_gradients(make_backbone, variant, layers):
    def build(backbone, **kwargs):
        return LoraViT(backbone, rank=3, alpha=6, layers=layers, **kwargs)

    model, backbone, pool, images = double_case(make_backbone, build, variant)
    assert len(model.added_parameters()) == 2 * 2 * len(layers)

    def expected(state):
        features = naive_features(backbone, images, pool, LowRank(state, 2.0))
        return features @ state["head.weight"].T + state["head.bias"]

    assert_same_logits_and_gradients(model, images, expected)


@pytest.mark.parametrize("options", [{}, {"layers": ("q", "v"), "checkpoint_blocks": True}])
def test_what_moves(make_backbone, options):
    backbone = make_backbone()
    assert_only_the_task_moves(LoraViT(backbone, num_classes=4, **options), backbone, noise(6))


def test_frozen_weights_are_not_copied(make_backbone):
    backbone = make_backbone()
    own = LoraViT(backbone, num_classes=4, layers=("q", "v")).backbone
    assert own.blocks[0].mlp.fc1.weight is backbone.blocks[0].mlp.fc1.weight
    qkv = backbone.blocks[0].attn.qkv.weight
    assert own.blocks[0].attn.qkv.k.weight.data_ptr() == qkv[48:].data_ptr()


def test_dropout_in_training_alone(make_backbone):
    model = LoraViT(make_backbone(), num_classes=4, dropout=0.5)
    with torch.no_grad():
        for value in model.added_parameters().values():
            value.normal_()
    model.train()
    assert not torch.equal(model(noise(2)), model(noise(2)))
    assert not model.backbone.training
    model.eval()
    assert torch.equal(model(noise(2)), model(noise(2)))


def test_starts_from_the_frozen_backbone(make_backbone):
    backbone = make_backbone()
    features = LoraViT(backbone, num_classes=4, layers=("q", "v")).forward_features(noise(3))
    torch.testing.assert_close(features, backbone(noise(3)))


@pytest.mark.parametrize("layers", ["qkv", ("q", "v")])
def test_adapter_file(tmp_path, layers):
    backbone = tiny_backbone()
    model = LoraViT(backbone, num_classes=3, rank=2, alpha=5, layers=layers, pool="avg").eval()
    with torch.no_grad():
        for value in model.task_state().values():
            value.normal_()
    save_adapter(tmp_path / "lora.safetensors", model)
    images = noise(2, size=16)
    assert torch.equal(load_adapter(tmp_path / "lora.safetensors", backbone)(images), model(images))
    with pytest.raises(AdapterMismatchError, match="another backbone"):
        load_adapter(tmp_path / "lora.safetensors", tiny_backbone(1))


def test_bfloat16_and_compiled(make_backbone):
    model = LoraViT(make_backbone(depth=1), num_classes=4)
    assert_runs_in_bfloat16_and_compiled(model, noise(4))


def test_a_backbone_that_is_bfloat16_already(make_backbone):
    backbone = copy.deepcopy(make_backbone()).bfloat16()
    model = LoraViT(backbone, num_classes=4)
    assert {value.dtype for value in model.task_state().values()} == {torch.float32}
    assert model.forward_features(noise(2)).dtype == torch.bfloat16


def test_number_of_parameters(make_backbone):
    backbone, rank, width = make_backbone(), 8, 48
    for layers, numbers in (
        ("qkv", rank * (width + 3 * width)),
        (("q", "v"), 2 * rank * (width + width)),
        (("fc1", "fc2"), 2 * rank * (width + 4 * width)),
    ):
        added = build_model("lora", backbone, num_classes=4, layers=layers).added_parameters()
        assert sum(value.numel() for value in added.values()) == 3 * numbers
    # Table S4: 0.32 M with the heads, 0.04 M on average over the tasks.
    assert 12 * rank * 4 * 768 == 294_912


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"alpha": 0.5}, "alpha must be a whole number of at least 1, got 0.5"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"dropout": "abc"}, r"dropout must be a number in \[0, 1\), got 'abc'"),
        ({"dropout": True}, r"dropout must be a number in \[0, 1\), got True"),
        ({"layers": ()}, r"layers must be some of qkv, .* got \(\)"),
        ({"layers": 5}, "layers must be some of qkv, .* got 5"),
        ({"layers": None}, "layers must be some of qkv, .* got None"),
        ({"layers": [["q"]]}, r"layers must be some of qkv, .* got \[\['q'\]\]"),
        ({"layers": {"q": 1}}, r"layers must be some of qkv, .* got \{'q': 1\}"),
        ({"layers": "keys"}, r"layers must be some of qkv, .* got 'keys'"),
        ({"layers": ("qkv", "v")}, r"layers has qkv and parts of it \(v\)"),
    ],
)
def test_wrong_options(make_backbone, options, message):
    with pytest.raises(InputError, match=message):
        build_model("lora", make_backbone(), num_classes=4, **options)


@pytest.mark.parametrize(
    ("layers", "missing"), [(("q", "fc1"), "fc1"), (("fc1",), "fc1"), (("fc2", "fc1"), "fc1")]
)
def test_layers_that_a_block_does_not_have(make_backbone, layers, missing):
    backbone = make_backbone("aimv2_large_patch14_224")
    with pytest.raises(UnsupportedModelError, match=f"block 0, whose MLP is a SwiGLU, has no {missing}$"):
        build_model("lora", backbone, num_classes=4, pool="avg", layers=layers)
    assert build_model("lora", backbone, num_classes=4, pool="avg", layers=("q", "fc2")).layers == [
        "q",
        "fc2",
    ]


def test_one_block_of_several_that_lacks_a_layer(make_backbone):
    backbone = make_backbone()
    backbone.blocks[2].mlp = SwiGLU(48, 64)
    with pytest.raises(UnsupportedModelError, match="block 2, whose MLP is a SwiGLU, has no fc1$"):
        build_model("lora", backbone, num_classes=4, layers=["qkv", "fc1"])


def test_float32_is_computed_on_a_bfloat16_backbone_where_asked(make_backbone):
    backbone = copy.deepcopy(make_backbone()).bfloat16()
    model = LoraViT(backbone, num_classes=4, layers=("q", "v")).eval()
    learning = list(model.task_state().values())
    with torch.no_grad():
        model.cast_backbone(torch.float32)
        assert model.forward_features(noise(2)).dtype == torch.float32
        expected = LoraViT(copy.deepcopy(backbone).float(), num_classes=4, layers=("q", "v"))
        expected.load_task_state(model.task_state())
        torch.testing.assert_close(model(noise(2)), expected.eval()(noise(2)))
    # The objects that an optimizer holds, and the caller's own backbone, are as before.
    assert all(a is b for a, b in zip(learning, model.task_state().values(), strict=True))
    assert {value.dtype for value in backbone.parameters()} == {torch.bfloat16}


def test_without_the_library(make_backbone, monkeypatch, tmp_path):
    backbone, stored = make_backbone(), tmp_path / "lora.safetensors"
    save_adapter(stored, LoraViT(backbone, num_classes=4))
    original = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(InputError, match=r"pip install spt-fast\[lora\]"):
        build_model("lora", make_backbone(), num_classes=4)
    # An adapter that is sound is not called a damaged one.
    with pytest.raises(
        UnsupportedModelError, match=r"of lora cannot be used here: .*spt-fast\[lora\]"
    ) as caught:
        load_adapter(stored, backbone)
    assert not isinstance(caught.value, CheckpointError)
