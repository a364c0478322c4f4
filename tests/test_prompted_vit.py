"""PromptedViT against the plain concatenation of `naive_vpt`, on the many small ViTs of `judged_vits`."""

import copy
import inspect
from typing import Any

import pytest
import timm
import torch
from judged_vits import (
    BFLOAT16_VITS,
    CASES,
    NUM_CLASSES,
    SMALL,
    VITS,
    assert_equal_to_1e_10,
    assert_matches_judge,
    judge_vit,
    logits_and_gradients,
    make_images,
    make_prompts,
    make_vit,
    naive_logits_and_gradients,
    random_loss,
    randomize,
    relative_error,
    seed_for,
)
from timm.layers import Attention
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

import spt_fast
from benchmarks.naive_vpt import naive_forward
from spt_fast.errors import InputError, UnsupportedModelError

# Blocks that a fast path could easily get subtly wrong: to refuse them is fine, to compute something else is not.
UNUSUAL_BLOCKS: dict[str, dict[str, Any]] = {
    "res_post_norm": {"block_fn": ResPostBlock, "init_values": 0.1},
}
# timm releases before this option have no such blocks.
if "attn_layer" in inspect.signature(VisionTransformer.__init__).parameters:
    UNUSUAL_BLOCKS["differential_attention"] = {"attn_layer": "diff"}
# The same for timm's Attention with options that its ViTs never set; not every timm release knows all of them.
UNUSUAL_ATTENTIONS: dict[str, dict[str, Any]] = {
    name: {name: value}
    for name, value in {"gated": True, "attn_head_dim": 20}.items()
    if name in inspect.signature(Attention.__init__).parameters
}

# ---------------------------------------------------------------------------------------------------- the judge itself


@pytest.mark.parametrize("name", VITS)
def test_judge_without_prompts_is_the_bare_vit(name):
    backbone = judge_vit(name)
    images = make_images(backbone).double()
    expected = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
    for num_layers in (1, len(backbone.blocks)):
        no_prompts = torch.zeros(num_layers, 0, backbone.embed_dim, dtype=torch.float64)
        torch.testing.assert_close(naive_forward(backbone, no_prompts, nn.Identity(), images), expected)


@pytest.mark.parametrize("name", VITS)
def test_random_weights_make_every_parameter_matter(name):
    backbone = make_vit(name).double().requires_grad_()
    prompts = make_prompts(backbone, "deep").double()
    head = nn.Linear(backbone.embed_dim, NUM_CLASSES).double()
    random_loss(naive_forward(backbone, prompts, head, make_images(backbone).double())).backward()
    silent = [n for n, p in backbone.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]
    # The same bias on every key shifts all scores of a query alike, which softmax does not see; and the ViT's own
    # classifier is replaced by the head.
    assert [n for n in silent if not n.endswith("k_norm.bias") and not n.startswith("head")] == []


# ------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize(("name", "depth", "pool"), CASES)
def test_equals_naive_concatenation_in_float64(name, depth, pool):
    judge = judge_vit(name)
    model = spt_fast.PromptedViT(
        make_vit(name), make_prompts(judge, depth), num_classes=NUM_CLASSES, pool=pool
    ).double()
    assert_matches_judge(model, judge, make_images(judge), pool)


@pytest.mark.parametrize("name", [*UNUSUAL_BLOCKS, *UNUSUAL_ATTENTIONS])
@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_unusual_block_is_exact_or_refused(name, depth):
    backbone = timm.create_model("vit_tiny_patch16_224", **{**SMALL, **UNUSUAL_BLOCKS.get(name, {})})
    if name in UNUSUAL_ATTENTIONS:
        for block in backbone.blocks:
            block.attn = Attention(48, num_heads=3, qkv_bias=True, **UNUSUAL_ATTENTIONS[name])
    randomize(backbone, seed_for(name)).eval()
    try:
        model = spt_fast.PromptedViT(
            copy.deepcopy(backbone), make_prompts(backbone, depth), num_classes=NUM_CLASSES
        ).double()
    except UnsupportedModelError:
        return
    assert_matches_judge(model, backbone, make_images(backbone), None)


@pytest.mark.parametrize("num_prompts", [1, 50])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("pool", [None, "avg", "avg_with_prompts"])
def test_any_number_of_prompts_and_images(num_prompts, batch, depth, pool):
    judge = judge_vit("registers")
    prompts = make_prompts(judge, depth, num_prompts)
    model = spt_fast.PromptedViT(make_vit("registers"), prompts, num_classes=NUM_CLASSES, pool=pool).double()
    assert_matches_judge(model, judge, make_images(judge, batch), pool)


@pytest.mark.parametrize(
    "name", ["plain", "registers", "no_class_token", "clip_pre_norm", "deit_distilled", "qk_norm"]
)
@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("pool", [None, "avg_with_prompts"])
def test_float32(name, depth, pool):
    judge = judge_vit(name)
    images = make_images(judge)
    model = spt_fast.PromptedViT(
        make_vit(name), make_prompts(judge, depth), num_classes=NUM_CLASSES, pool=pool
    )
    actual = logits_and_gradients(model, images)
    expected = naive_logits_and_gradients(judge, model.prompts, model.head, images, pool)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, e) < 2e-5


@pytest.mark.parametrize("name", BFLOAT16_VITS)
@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("pool", [None, "avg_with_prompts"])
@pytest.mark.parametrize("masters", [torch.bfloat16, torch.float32])
def test_bfloat16(name, depth, pool, masters):
    """Logits within 2.5e-2 of the exact function of the same bfloat16 weights and images, prompt gradients within 4e-2;
    with the whole model in bfloat16, and with float32 prompts and head on a bfloat16 backbone.

    For scale: the plain concatenation, run in bfloat16 on these models, is 1e-2 away from float64, for some images
    1.6e-2.
    """
    backbone = make_vit(name).bfloat16()
    images = make_images(backbone).bfloat16()
    prompts = make_prompts(backbone, depth)
    if masters == torch.bfloat16:
        model = spt_fast.PromptedViT(make_vit(name), prompts, num_classes=NUM_CLASSES, pool=pool).bfloat16()
    else:
        model = spt_fast.PromptedViT(make_vit(name).bfloat16(), prompts, num_classes=NUM_CLASSES, pool=pool)
    logits, prompt_gradient, *_ = logits_and_gradients(model, images)
    expected_logits, expected_gradient, *_ = naive_logits_and_gradients(
        backbone, model.prompts, model.head, images, pool
    )
    assert logits.dtype == prompt_gradient.dtype == masters
    assert relative_error(logits, expected_logits) < 2.5e-2
    assert relative_error(prompt_gradient, expected_gradient) < 4e-2


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_without_autograd_the_logits_are_the_same(depth):
    backbone = make_vit("layer_scale")
    model = spt_fast.PromptedViT(backbone, make_prompts(backbone, depth), num_classes=NUM_CLASSES).double()
    images = make_images(backbone).double()
    expected = model(images).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(model(images).clone(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_nothing_stale_after_training_steps_and_casts(depth):
    backbone = make_vit("registers")
    images = make_images(backbone)
    model = spt_fast.PromptedViT(
        copy.deepcopy(backbone), make_prompts(backbone, depth), num_classes=NUM_CLASSES
    )
    model.eval()
    with torch.no_grad():
        model(images)
    model.double()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        assert_matches_judge(model, backbone, images, None)
        optimizer.step()
    with torch.no_grad():
        assert_equal_to_1e_10(
            model(images.double()),
            naive_forward(copy.deepcopy(backbone).double(), model.prompts, model.head, images.double()),
            "logits after two steps",
        )


def test_gradients_accumulate_over_two_backward_passes():
    backbone = make_vit()
    model = spt_fast.PromptedViT(backbone, make_prompts(backbone, "deep"), num_classes=NUM_CLASSES).double()
    images = make_images(backbone).double()
    once = [g.clone() for g in logits_and_gradients(model, images)[1:]]
    random_loss(model(images)).backward()
    for parameter, gradient in zip((model.prompts, model.head.weight, model.head.bias), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_deep_and_shallow_differ_and_pools_differ():
    backbone = make_vit("registers")
    images = make_images(backbone)
    deep = make_prompts(backbone, "deep")
    outputs = []
    for prompts in (deep, deep[:1].clone()):
        for pool in ("token", "avg", "avg_with_prompts"):
            torch.manual_seed(0)
            model = spt_fast.PromptedViT(copy.deepcopy(backbone), prompts, num_classes=NUM_CLASSES, pool=pool)
            outputs.append(model(images).detach())
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 1e-3


# --------------------------------------------------------------------------------- frozen backbone, trainable prompts


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("pool", [None, "token", "avg", "avg_with_prompts"])
def test_train_mode_equals_eval_mode_without_prompt_dropout(depth, pool):
    backbone = make_vit("drop_rates").train()
    model = spt_fast.PromptedViT(
        backbone, make_prompts(backbone, depth), num_classes=NUM_CLASSES, pool=pool
    ).double()
    images = make_images(backbone).double()
    in_eval = logits_and_gradients(model.eval(), images)
    in_train = logits_and_gradients(model.train(), images)
    assert model.training
    assert not any(m.training for m in model.modules() if isinstance(m, (VisionTransformer, Block)))
    for a, b in zip(in_eval, in_train, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("train_prompts", [True, False])
@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_only_prompts_and_head_learn(train_prompts, depth):
    backbone = make_vit("registers").requires_grad_()
    prompts = make_prompts(backbone, depth)
    model = spt_fast.PromptedViT(backbone, prompts, num_classes=NUM_CLASSES, train_prompts=train_prompts)
    learnable = {"head.weight", "head.bias"} | ({"prompts"} if train_prompts else set())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learnable
    assert isinstance(model.prompts, nn.Parameter)
    assert model.prompts.shape == prompts.shape
    assert isinstance(model.head, nn.Linear)
    assert model.head.weight.shape == (NUM_CLASSES, backbone.embed_dim)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    random_loss(model.train()(make_images(backbone))).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == learnable
    assert all(p.grad is None for p in backbone.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("pool", [None, "avg", "avg_with_prompts"])
def test_frozen_prompts_give_the_same_logits_and_head_gradients(depth, pool):
    backbone = make_vit("layer_scale")
    images = make_images(backbone)
    model = spt_fast.PromptedViT(
        copy.deepcopy(backbone),
        make_prompts(backbone, depth),
        num_classes=NUM_CLASSES,
        pool=pool,
        train_prompts=False,
    ).double()
    logits, prompt_gradient, *head_gradients = logits_and_gradients(model, images.double())
    expected_logits, _, *expected = naive_logits_and_gradients(
        backbone, model.prompts, model.head, images, pool
    )
    assert prompt_gradient is None
    assert_equal_to_1e_10(logits, expected_logits, "logits")
    for a, e in zip(head_gradients, expected, strict=True):
        assert_equal_to_1e_10(a, e, "head gradient")


def test_callers_prompts_are_copied():
    backbone = make_vit()
    prompts = make_prompts(backbone, "deep")
    before = prompts.clone()
    model = spt_fast.PromptedViT(backbone, prompts, num_classes=NUM_CLASSES)
    assert torch.equal(model.prompts, prompts)
    with torch.no_grad():
        model.prompts.add_(1)
    assert torch.equal(prompts, before)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_prompts_may_be_prototypes(depth):
    backbone = make_vit()
    images = make_images(backbone, batch=4)
    prototypes = spt_fast.build_prototypes(
        backbone, [images], num_prompts=3, depth=depth, method="random_sample", seed=1
    )
    torch.manual_seed(0)
    from_prototypes = spt_fast.PromptedViT(copy.deepcopy(backbone), prototypes, num_classes=NUM_CLASSES)
    torch.manual_seed(0)
    from_tensor = spt_fast.PromptedViT(copy.deepcopy(backbone), prototypes.values, num_classes=NUM_CLASSES)
    assert torch.equal(from_prototypes.prompts, prototypes.values)
    assert torch.equal(from_prototypes(images), from_tensor(images))


def test_backbone_from_load_backbone():
    backbone = spt_fast.load_backbone("vit_tiny_patch16_224", **SMALL)
    randomize(backbone, seed=3)
    model = spt_fast.PromptedViT(
        copy.deepcopy(backbone), make_prompts(backbone, "deep"), num_classes=NUM_CLASSES
    ).double()
    assert_matches_judge(model, backbone, make_images(backbone), None)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_state_dict_round_trip(depth):
    backbone = make_vit("registers")
    images = make_images(backbone)
    first = spt_fast.PromptedViT(
        copy.deepcopy(backbone), make_prompts(backbone, depth), num_classes=NUM_CLASSES
    )
    second = spt_fast.PromptedViT(
        copy.deepcopy(backbone), torch.zeros_like(first.prompts), num_classes=NUM_CLASSES
    )
    assert not torch.equal(first(images), second(images))
    state = {name: value.clone() for name, value in first.state_dict().items()}
    assert {"prompts", "head.weight", "head.bias"} <= state.keys()
    second.load_state_dict(state)
    assert torch.equal(first(images), second(images))


# ------------------------------------------------------------------------------------------------------ prompt dropout


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("pool", [None, "avg_with_prompts"])
def test_prompt_dropout_acts_in_training_only(depth, pool):
    backbone = make_vit("layer_scale")
    images = make_images(backbone)
    model = spt_fast.PromptedViT(
        copy.deepcopy(backbone),
        make_prompts(backbone, depth),
        num_classes=NUM_CLASSES,
        pool=pool,
        prompt_dropout=0.5,
    ).double()
    assert_matches_judge(model.eval(), backbone, images, pool)

    images, model = images.double(), model.train()
    exact = model.eval()(images)
    model.train()
    torch.manual_seed(0)
    dropped = model(images)
    dropped_again = model(images)
    torch.manual_seed(0)
    dropped_with_same_seed = model(images)
    assert (dropped - exact).abs().max() > 1e-4
    assert (dropped - dropped_again).abs().max() > 1e-4
    assert torch.equal(dropped, dropped_with_same_seed)

    random_loss(dropped).backward()
    assert model.prompts.grad.isfinite().all()
    assert (model.prompts.grad.flatten(1).abs().amax(1) > 0).all()


# ------------------------------------------------------------------------------------------------- what is refused


def tiny_swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=24,
        depths=(1, 1),
        num_heads=(1, 2),
        num_classes=0,
    )


def tiny_beit() -> nn.Module:
    return timm.create_model(
        "beit_base_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=0, patch_size=8
    )


UNSUPPORTED = {
    "swin": tiny_swin,
    "beit": tiny_beit,
    "convnet": lambda: timm.create_model("resnet10t", num_classes=0),
    "parallel_things_by_name": lambda: timm.create_model("vit_small_patch16_18x2_224", **SMALL),
    "parallel_things": lambda: timm.create_model(
        "vit_tiny_patch16_224", **SMALL, block_fn=ParallelThingsBlock
    ),
    "parallel_scaling_by_name": lambda: timm.create_model("vit_base_patch16_xp_224", **SMALL),
    "parallel_scaling": lambda: timm.create_model(
        "vit_tiny_patch16_224", **SMALL, block_fn=ParallelScalingBlock
    ),
    "not_a_vit": lambda: nn.Linear(48, 48),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("num_layers", [1, 3])
def test_model_that_cannot_be_prompted_is_refused(name, num_layers):
    model = UNSUPPORTED[name]()
    with pytest.raises(UnsupportedModelError) as error:
        spt_fast.PromptedViT(model, torch.randn(num_layers, 5, 48), num_classes=NUM_CLASSES)
    assert_one_sentence(error.value)


NOT_FINITE = torch.ones(3, 5, 48)
NOT_FINITE[2, 4, 47] = float("nan")
INFINITE = torch.ones(1, 5, 48)
INFINITE[0, 0, 0] = float("-inf")

BAD_ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "wrong width": ("prompts", {"prompts": torch.randn(3, 5, 47)}),
    "wrong number of layers": ("prompts", {"prompts": torch.randn(2, 5, 48)}),
    "more layers than blocks": ("prompts", {"prompts": torch.randn(4, 5, 48)}),
    "no layer": ("prompts", {"prompts": torch.randn(0, 5, 48)}),
    "no prompt": ("prompts", {"prompts": torch.randn(3, 0, 48)}),
    "two dimensions": ("prompts", {"prompts": torch.randn(5, 48)}),
    "four dimensions": ("prompts", {"prompts": torch.randn(1, 3, 5, 48)}),
    "integers": ("prompts", {"prompts": torch.ones(3, 5, 48, dtype=torch.int64)}),
    "not a tensor": ("prompts", {"prompts": "uniform"}),
    "nan": ("prompts", {"prompts": NOT_FINITE}),
    "inf": ("prompts", {"prompts": INFINITE}),
    "no classes": ("num_classes", {"num_classes": 0}),
    "negative classes": ("num_classes", {"num_classes": -3}),
    "unknown pool": ("pool", {"pool": "median"}),
    "empty pool": ("pool", {"pool": ""}),
    "negative dropout": ("prompt_dropout", {"prompt_dropout": -0.1}),
    "dropout above one": ("prompt_dropout", {"prompt_dropout": 1.5}),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument_is_refused_by_name(case):
    argument, overrides = BAD_ARGUMENTS[case]
    arguments = {"prompts": torch.randn(3, 5, 48), "num_classes": NUM_CLASSES, **overrides}
    with pytest.raises(InputError) as error:
        spt_fast.PromptedViT(make_vit(), **arguments)
    assert argument in str(error.value)
    assert_one_sentence(error.value)


@pytest.mark.parametrize("name", ["no_class_token", "registers_only", "map"])
def test_token_pool_needs_a_class_token(name):
    backbone = make_vit(name)
    with pytest.raises(InputError, match="pool") as error:
        spt_fast.PromptedViT(backbone, make_prompts(backbone, "deep"), num_classes=NUM_CLASSES, pool="token")
    assert_one_sentence(error.value)


def test_timm_head_without_pooling_is_refused():
    """timm's own head path would then give a class to every token."""
    backbone = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "global_pool": ""})
    prompts = make_prompts(backbone, "deep")
    with pytest.raises(InputError, match="pool") as error:
        spt_fast.PromptedViT(backbone, prompts, num_classes=NUM_CLASSES)
    assert_one_sentence(error.value)
    model = spt_fast.PromptedViT(backbone, prompts, num_classes=NUM_CLASSES, pool="token")
    assert model(make_images(backbone)).shape == (3, NUM_CLASSES)


def assert_one_sentence(error: Exception) -> None:
    message = str(error)
    assert len(message) > 20
    assert "\n" not in message
