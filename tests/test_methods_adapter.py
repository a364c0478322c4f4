"""AdapterViT against bottlenecks written out."""

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
from tiny import noise

from spt_fast.errors import InputError
from spt_fast.methods import build_model
from spt_fast.methods.adapter import AdapterViT


class Bottlenecks(Unchanged):
    """``h + W_up GELU(W_down h + b_down) + b_up``."""

    def __init__(self, state):
        self.state = state

    def _bottleneck(self, h, name):
        weights = [
            self.state.get(f"{name}.{part}") for part in ("down.weight", "down.bias", "up.weight", "up.bias")
        ]
        if weights[0] is None:
            return h
        down_weight, down_bias, up_weight, up_bias = weights
        a = h @ down_weight.T + down_bias
        gelu = a * 0.5 * (1 + torch.erf(a / 2**0.5))
        return h + gelu @ up_weight.T + up_bias

    def attended(self, h, block):
        return self._bottleneck(h, f"after_attention.{block}")

    def mlp_added(self, h, block):
        return self._bottleneck(h, f"after_mlp.{block}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
def test_logits_and_gradients(make_backbone, variant, placement):
    def build(backbone, **kwargs):
        return AdapterViT(backbone, bottleneck=5, placement=placement, **kwargs)

    model, backbone, pool, images = double_case(make_backbone, build, variant)
    assert any(name.startswith("after_attention") for name in model.task_state()) == (placement == "houlsby")

    def expected(state):
        features = naive_features(backbone, images, pool, Bottlenecks(state))
        return features @ state["head.weight"].T + state["head.bias"]

    assert_same_logits_and_gradients(model, images, expected)


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_what_moves(make_backbone, checkpoint_blocks):
    backbone = make_backbone()
    model = AdapterViT(backbone, num_classes=4, placement="houlsby", checkpoint_blocks=checkpoint_blocks)
    assert_only_the_task_moves(model, backbone, noise(6))


def test_starts_from_the_frozen_backbone(make_backbone):
    backbone = make_backbone()
    features = AdapterViT(backbone, num_classes=4, placement="houlsby").forward_features(noise(3))
    torch.testing.assert_close(features, backbone(noise(3)))


def test_bfloat16_and_compiled(make_backbone):
    model = AdapterViT(make_backbone(depth=1), num_classes=4, bottleneck=4)
    assert_runs_in_bfloat16_and_compiled(model, noise(4))


def test_number_of_parameters(make_backbone):
    backbone = make_backbone()
    layers, width, bottleneck = 3, 48, 12
    per_adapter = 2 * width * bottleneck + bottleneck + width
    for placement, adapters in (("pfeiffer", layers), ("houlsby", 2 * layers)):
        added = build_model("adapter", backbone, num_classes=4, placement=placement).added_parameters()
        assert sum(value.numel() for value in added.values()) == adapters * per_adapter
    # Tables 3 and S4: 0.41 M and 0.27 M with the heads, 0.18 M and 0.04 M on average over the tasks.
    vit_b = 12 * (2 * 768 * bottleneck + bottleneck + 768)
    assert (round(vit_b / 1e6 + 0.18, 2), round(vit_b / 1e6 + 0.04, 2)) == (0.41, 0.27)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck": 0}, "bottleneck must be .* got 0"),
        ({"placement": "before"}, "placement must be .* 'before'"),
    ],
)
def test_wrong_options(make_backbone, options, message):
    with pytest.raises(InputError, match=message):
        build_model("adapter", make_backbone(), num_classes=4, **options)
