"""SsfViT against scales and shifts written out."""

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
    naive_tokens,
)
from timm.layers import SwiGLU
from tiny import noise

from spt_fast.errors import InputError, UnsupportedModelError
from spt_fast.methods import build_model
from spt_fast.methods.ssf import SsfViT


class ScalesAndShifts(Unchanged):
    """``gamma * y + beta`` after every operation."""

    def __init__(self, state):
        self.state = state

    def _adjust(self, y, name):
        return y * self.state[f"{name}.scale"] + self.state[f"{name}.shift"]

    def layer(self, layer, x, block, name):
        return self._adjust(layer(x), f"after.{block}.{name}")

    def patches(self, x):
        return self._adjust(x, "after_patch_embed")

    def normed(self, x):
        return self._adjust(x, "after_final_norm")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients(make_backbone, variant):
    model, backbone, pool, images = double_case(make_backbone, SsfViT, variant)

    def expected(state):
        features = naive_features(backbone, images, pool, ScalesAndShifts(state))
        return features @ state["head.weight"].T + state["head.bias"]

    assert_same_logits_and_gradients(model, images, expected)


def test_patch_grid(make_backbone):
    model, backbone, _, images = double_case(make_backbone, SsfViT, "plain")
    grid = model.forward_features(images, patch_grid=True)
    changes = ScalesAndShifts(model.task_state())
    patches = changes.normed(backbone.norm(naive_tokens(backbone, images, changes)))[:, 1:]
    assert grid.shape == (3, 48, 4, 4)
    torch.testing.assert_close(grid.flatten(2).transpose(1, 2), patches)


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_what_moves(make_backbone, checkpoint_blocks):
    backbone = make_backbone()
    model = SsfViT(backbone, num_classes=4, checkpoint_blocks=checkpoint_blocks)
    assert_only_the_task_moves(model, backbone, noise(6))


def test_start(make_backbone):
    backbone = make_backbone()
    features = SsfViT(backbone, num_classes=4, init_std=0.0).forward_features(noise(3))
    torch.testing.assert_close(features, backbone(noise(3)))
    added = SsfViT(backbone, num_classes=4).added_parameters()
    for part, centre in (("scale", 1.0), ("shift", 0.0)):
        values = torch.cat([value.detach() for name, value in added.items() if name.endswith(part)])
        assert abs(float(values.mean()) - centre) < 0.003
        assert abs(float(values.std()) - 0.02) < 0.003


def test_bfloat16_and_compiled(make_backbone):
    assert_runs_in_bfloat16_and_compiled(SsfViT(make_backbone(depth=1), num_classes=4), noise(4))


def test_number_of_parameters(make_backbone):
    added = build_model("ssf", make_backbone(), num_classes=4).added_parameters()
    # norm1, proj, norm2 and fc2 have D outputs, qkv has 3 D and fc1 4 D; patch embedding and final norm D.
    assert sum(value.numel() for value in added.values()) == 2 * 48 * (3 * 11 + 2)
    # Tables 3 and S4: 0.39 M and 0.24 M with the heads, 0.18 M and 0.04 M on average over the tasks.
    vit_b = 2 * 768 * (12 * 11 + 2)
    assert (round(vit_b / 1e6 + 0.18, 2), round(vit_b / 1e6 + 0.034, 2)) == (0.39, 0.24)


def test_wrong_options(make_backbone):
    with pytest.raises(InputError, match="init_std must be a finite number of at least 0, got -1"):
        build_model("ssf", make_backbone(), num_classes=4, init_std=-1)
    with pytest.raises(UnsupportedModelError, match="fc1 and fc2, got a SwiGLU"):
        build_model("ssf", make_backbone(mlp_layer=SwiGLU), num_classes=4)
