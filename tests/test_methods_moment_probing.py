"""MomentProbingViT against second moments written out."""

import pytest
import torch
import torch.nn.functional as F
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
from tiny import noise
from torch import nn

from spt_fast.errors import InputError
from spt_fast.methods import build_model
from spt_fast.methods.moment_probing import MomentProbingViT, SecondMoments


class Recalibrated(Unchanged):
    """``(1 + w) * MLP + b`` with ``w`` and ``b`` from one bottleneck, where there is one."""

    def __init__(self, state):
        self.state = state

    def fed_forward(self, h, x, block):
        name = f"recalibrations.{block}"
        if f"{name}.down.weight" not in self.state:
            return h
        shared = (x @ self.state[f"{name}.down.weight"].T).clamp(min=0)
        w, b = (shared @ self.state[f"{name}.{part}.weight"].T for part in ("weight", "bias"))
        return (1 + w) * h + b


def naive_moments(tokens, state, heads):
    """``[B, N, D]`` to features, image by image and head by head."""
    features = []
    for x in tokens:
        projected = x @ state["moments.project.weight"].T + state["moments.project.bias"]
        parts = []
        for part in projected.chunk(heads, dim=1):
            centred = part - part.mean(dim=1, keepdim=True)
            normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
            part = normed * state["moments.norm.weight"] + state["moments.norm.bias"]
            parts.append(part - part.mean())
        maps = []
        for left, right in zip(parts, parts[1:], strict=False):
            product = sum(torch.outer(a, b) for a, b in zip(left, right, strict=True)) / len(x)
            maps.append(product / product.square().sum(dim=0).sqrt())
        first = F.conv2d(torch.stack(maps)[None], state["moments.reduce.0.weight"], stride=2)
        features.append(F.conv2d(F.gelu(first), state["moments.reduce.2.weight"], stride=2).flatten())
    return torch.stack(features)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recalibration", [0, 3])
def test_logits_and_gradients(make_backbone, variant, recalibration):
    heads = 3 if recalibration else 2

    def build(backbone, **kwargs):
        return MomentProbingViT(
            backbone, hidden=11 * heads, heads=heads, recalibration=recalibration, **kwargs
        )

    model, backbone, pool, images = double_case(make_backbone, build, variant)

    def expected(state):
        changes = Recalibrated(state)
        norm = backbone.fc_norm if isinstance(backbone.norm, nn.Identity) else backbone.norm
        patches = norm(naive_tokens(backbone, images, changes))[:, backbone.num_prefix_tokens :]
        first = naive_features(backbone, images, pool, changes) @ state["head.weight"].T + state["head.bias"]
        second = (
            naive_moments(patches, state, heads) @ state["moment_head.weight"].T + state["moment_head.bias"]
        )
        return (first + second) / 2

    assert_same_logits_and_gradients(model, images, expected)


@pytest.mark.parametrize("recalibration", [0, 4])
def test_what_moves(make_backbone, recalibration):
    backbone = make_backbone()
    model = MomentProbingViT(backbone, num_classes=4, hidden=32, recalibration=recalibration)
    assert_only_the_task_moves(model, backbone, noise(6))


def test_nothing_flows_back_into_the_backbone(make_backbone):
    model = MomentProbingViT(make_backbone(), num_classes=4, hidden=32)
    assert not model.forward_features(noise(2)).requires_grad


def test_starts_from_the_frozen_backbone(make_backbone):
    backbone = make_backbone()
    features = MomentProbingViT(backbone, num_classes=4, hidden=32, recalibration=4).forward_features(
        noise(3)
    )
    torch.testing.assert_close(features, backbone(noise(3)))


def test_bfloat16_and_compiled(make_backbone):
    model = MomentProbingViT(make_backbone(depth=1), num_classes=4, hidden=32, recalibration=4)
    assert_runs_in_bfloat16_and_compiled(model, noise(4))


def test_number_of_parameters(make_backbone):
    assert SecondMoments(48, 512, 4).out_features == 3 * 31 * 31 == 2883  # 128 -> 63 -> 31
    options = {"num_classes": 4, "hidden": 60, "heads": 3, "recalibration": 5}
    added = build_model("moment_probing", make_backbone(), **options).added_parameters()
    maps, features = 2, 2 * 4 * 4  # 20 -> 9 -> 4
    head = 49 * 60 + 2 * 20 + 2 * 9 * maps**2 + (features + 1) * 4
    assert sum(value.numel() for value in added.values()) == head + 3 * (3 * 48 * 5)
    # Table 3: 1.20 M with the heads, which depend on the number of classes; here with CUB-200's.
    vit_b = 769 * 512 + 2 * 128 + 2 * 81 + (2883 + 1) * 200 + 769 * 200
    assert vit_b == 1_124_746


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 1}, "heads must be a whole number of at least 2, got 1"),
        ({"hidden": 30}, "hidden must be a multiple of heads=4, 7 times or more, got 30"),
        ({"hidden": 24}, "hidden must be a multiple of heads=4, 7 times or more, got 24"),
        ({"recalibration": -1}, "recalibration must be a whole number of at least 0, got -1"),
    ],
)
def test_wrong_options(make_backbone, options, message):
    with pytest.raises(InputError, match=message):
        build_model("moment_probing", make_backbone(), num_classes=4, **options)
