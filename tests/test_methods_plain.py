"""Linear probing, full fine-tuning and BitFit: what learns, and that the caller's backbone is left alone."""

import copy

import pytest
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
from spt_fast.methods import build_model, model_class
from spt_fast.methods.own_backbone import own_backbone

NAMES = ["linear", "full", "bitfit"]


def with_weights(backbone, state):
    """A copy of the backbone in which those weights that ``state`` has are its tensors."""
    copied = copy.deepcopy(backbone)
    for name, value in state.items():
        if name.startswith("backbone."):
            path, _, leaf = name.removeprefix("backbone.").rpartition(".")
            module = copied.get_submodule(path)
            delattr(module, leaf)
            setattr(module, leaf, value)
    return copied


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients(make_backbone, name, variant):
    model, backbone, pool, images = double_case(make_backbone, model_class(name), variant)

    def expected(state):
        features = naive_features(with_weights(backbone, state), images, pool, Unchanged())
        return features @ state["head.weight"].T + state["head.bias"]

    assert_same_logits_and_gradients(model, images, expected)


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_moves(make_backbone, name, checkpoint_blocks):
    backbone = make_backbone(reg_tokens=2)
    model = build_model(name, backbone, num_classes=4, pool="token", checkpoint_blocks=checkpoint_blocks)
    assert_only_the_task_moves(model, backbone, noise(6))


def test_what_learns(make_backbone):
    backbone = make_backbone(num_classes=7)
    inside = [name for name, _ in backbone.named_parameters() if not name.startswith("head.")]
    learns = {
        "linear": [],
        "full": inside,
        "bitfit": [name for name in inside if name.endswith("bias")],
    }
    for name, expected in learns.items():
        model = build_model(name, backbone, num_classes=4)
        assert [*model.added_parameters()] == [f"backbone.{each}" for each in expected]
        # Timm's own classifier is left out of all of them.
        assert not any(value.requires_grad for value in model.backbone.head.parameters())


def test_only_what_learns_is_copied(make_backbone):
    backbone = make_backbone()
    own = dict(build_model("bitfit", backbone, num_classes=4).backbone.named_parameters())
    for name, value in backbone.named_parameters():
        assert (own[name] is value) != name.endswith("bias"), name


def test_number_of_parameters(make_backbone):
    backbone = make_backbone()
    full, bias = (
        sum(value.numel() for value in build_model(name, backbone, num_classes=4).added_parameters().values())
        for name in ("full", "bitfit")
    )
    assert full == sum(value.numel() for value in backbone.parameters())
    # Two norms, proj and fc2 have D biases, qkv has 3 D and fc1 4 D; patch embedding and final norm D.
    assert bias == 48 * (3 * 11 + 2)
    # Tables 3 and S4: 0.28 M and 0.14 M with the heads, 0.18 M and 0.04 M on average over the tasks.
    vit_b = 768 * (12 * 11 + 2)
    assert (round(vit_b / 1e6 + 0.18, 2), round(vit_b / 1e6 + 0.04, 2)) == (0.28, 0.14)


@pytest.mark.parametrize("name", ["linear", "full"])
def test_bfloat16_and_compiled(make_backbone, name):
    assert_runs_in_bfloat16_and_compiled(build_model(name, make_backbone(depth=1), num_classes=4), noise(4))


def test_eight_bit_weights_cannot_learn(make_backbone):
    backbone = make_backbone()
    backbone.spt_fast_source = {"weight_dtype": "int8"}
    with pytest.raises(InputError, match="the backbone has 8-bit weights"):
        own_backbone(backbone)
