"""SnfViT against flows written out."""

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
from spt_fast.methods.snf import Flow, SnfViT


class Flows(Unchanged):
    """An affine map of the entries, then planar flows."""

    def __init__(self, state, length):
        self.state, self.length = state, length

    def shortcut(self, x, block, past):
        flow = {
            name.removeprefix(f"past_{past}.{block}."): value
            for name, value in self.state.items()
            if name.startswith(f"past_{past}.{block}.")
        }
        tokens = []
        for token in x:
            z = flow["mu"] + torch.exp(flow["log_sigma"]) * token
            for index in range(self.length):
                u, w, b = (flow[f"planar.{index}.{part}"] for part in "uwb")
                z = z + u * torch.tanh(torch.dot(w, z) + b)
            tokens.append(z)
        return torch.stack(tokens)


@pytest.mark.parametrize(
    ("variant", "length"), [*((variant, 1) for variant in VARIANTS), ("plain", 0), ("norms", 3)]
)
def test_logits_and_gradients(make_backbone, variant, length):
    def build(backbone, **kwargs):
        return SnfViT(backbone, flow_length=length, **kwargs)

    model, backbone, pool, images = double_case(make_backbone, build, variant)

    def expected(state):
        features = naive_features(backbone, images, pool, Flows(state, length))
        return features @ state["head.weight"].T + state["head.bias"]

    assert_same_logits_and_gradients(model, images, expected)


def test_a_flow_loses_nothing():
    """Where ``w . u > -1`` different tokens stay different: the Jacobian's determinant keeps its sign."""
    torch.manual_seed(0)
    flow = Flow(5, 2).double()
    with torch.no_grad():
        for planar in flow.planar:
            planar.w.copy_(torch.randn(5))
            planar.u.copy_(torch.randn(5))
            planar.u -= planar.w * (planar.w @ planar.u + 0.9) / (planar.w @ planar.w)  # w . u = -0.9
    for token in 3 * torch.randn(50, 5, dtype=torch.float64):
        assert torch.linalg.det(torch.autograd.functional.jacobian(flow, token)) > 0


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_what_moves(make_backbone, checkpoint_blocks):
    backbone = make_backbone()
    model = SnfViT(backbone, num_classes=4, checkpoint_blocks=checkpoint_blocks)
    assert_only_the_task_moves(model, backbone, noise(6))


def test_starts_from_the_frozen_backbone(make_backbone):
    backbone = make_backbone()
    features = SnfViT(backbone, num_classes=4, flow_length=2).forward_features(noise(3))
    torch.testing.assert_close(features, backbone(noise(3)))


def test_bfloat16_and_compiled(make_backbone):
    assert_runs_in_bfloat16_and_compiled(SnfViT(make_backbone(depth=1), num_classes=4), noise(4))


def test_number_of_parameters(make_backbone):
    for length in (0, 1, 3):
        added = build_model("snf", make_backbone(), num_classes=4, flow_length=length).added_parameters()
        assert sum(value.numel() for value in added.values()) == 2 * 3 * (2 * 48 + length * (2 * 48 + 1))
    # The authors' abstract has 0.036 M, and Table 3 0.25 M with the heads, 0.18 M on average over the tasks.
    affine, planar = 2 * 12 * 2 * 768, 2 * 12 * (2 * 768 + 1)
    assert affine == 36_864
    assert round((affine + planar) / 1e6 + 0.18, 2) == 0.25


def test_wrong_options(make_backbone):
    with pytest.raises(InputError, match="flow_length must be a whole number of at least 0, got -1"):
        build_model("snf", make_backbone(), num_classes=4, flow_length=-1)
