"""VAPT against the equations of its paper, written out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from judged_vits import NUM_CLASSES, make_images, make_vit, random_loss
from naive_prompts import (
    CASES,
    assert_low_precision_and_compiled,
    assert_matches,
    assert_moves_what_it_adds,
    assert_round_trip,
    make_prompts,
    naive_block,
    naive_sequence,
    randomise,
)
from torch import Tensor

from spt_fast.errors import InputError
from spt_fast.methods import build_model
from spt_fast.methods.vapt import VaptViT


def judge(backbone: Any, state: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Convolution and aggregation one position and one prompt after the other."""
    tokens, prefix = naive_sequence(backbone, images), backbone.num_prefix_tokens
    height, width = backbone.patch_embed.grid_size
    prompts = tokens[:, :0]
    for index, block in enumerate(backbone.blocks):
        own = {
            name.split(".", 2)[2]: value
            for name, value in state.items()
            if name.startswith(f"token_projectors.{index}.")
        }
        patches = tokens[:, prefix:]
        centred = patches - patches.mean(dim=-1, keepdim=True)
        normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        grid = (normed * own["norm.weight"] + own["norm.bias"]).unflatten(1, (height, width))
        size = own["kernel"].shape[-1]
        aggregated = []
        for weights, bias in zip(own["aggregation"][:, 0], own["bias"], strict=True):
            total = bias
            for top in range(height - size + 1):
                for left in range(width - size + 1):
                    window = grid[:, top : top + size, left : left + size]
                    convolved = (window * own["kernel"][0, 0, :, :, None]).sum(dim=(1, 2))
                    total = total + weights[top, left] * convolved
            aggregated.append(total)
        prompts = torch.stack(aggregated, dim=1)
        hidden = (prompts @ state["down.weight"].T).clamp(min=0)
        prompts = prompts + hidden @ state["up.weight"].T
        if "prompts" in state:
            prompts = prompts + state["prompts"][index]
        sequence = torch.cat([tokens[:, :prefix], prompts, tokens[:, prefix:]], dim=1)
        sequence = naive_block(block, sequence)
        outputs = sequence[:, prefix : prefix + prompts.shape[1]]
        tokens = torch.cat([sequence[:, :prefix], sequence[:, prefix + prompts.shape[1] :]], dim=1)
    return tokens, outputs


def adaptive(
    vit: str = "plain", *, bias: bool = False, noise: bool = False, pool: Any = None, **options: Any
) -> VaptViT:
    backbone = make_vit(vit)
    start = {"prompts": make_prompts(backbone, len(backbone.blocks))} if bias else {"num_prompts": 5}
    model = build_model("vapt", backbone, num_classes=NUM_CLASSES, pool=pool, **start, **options)
    assert isinstance(model, VaptViT)
    if noise:
        randomise(model)
    return model


@pytest.mark.parametrize(("vit", "pool"), CASES)
def test_logits_and_gradients_are_those_of_the_equations(vit: str, pool: Any) -> None:
    model = adaptive(
        vit,
        bias=vit in ("registers", "no_class_token"),
        noise=True,
        pool=pool,
        kernel_size=2,
        checkpoint_blocks=pool == "token",
    )
    assert_matches(model, vit, judge, pool)


@pytest.mark.parametrize("kernel_size", [1, 3, 4])
def test_kernels_of_other_sizes(kernel_size: int) -> None:
    model = adaptive("depth_1", bias=True, noise=True, pool="avg", kernel_size=kernel_size, hidden_dim=3)
    assert_matches(model, "depth_1", judge, "avg")


def test_it_starts_from_its_bias_alone() -> None:
    """The aggregation begins at zero: all images have the prompts of the bias, or zeros."""
    images = make_images(make_vit())
    x = adaptive().embed(images)
    with_bias = adaptive(bias=True).eval()
    for index in range(3):
        assert not adaptive().block_prompts(index, x).any()
        expected = with_bias.prompts[index].expand(3, -1, -1)
        assert torch.equal(with_bias.block_prompts(index, x), expected)


def test_dropout_leaves_out_whole_channels_of_an_image_in_training_alone() -> None:
    model = adaptive(channel_dropout=0.5, noise=True)
    with torch.no_grad():
        model.up.weight.zero_()
        for project in model.token_projectors:
            project.bias.zero_()
    x = model.embed(make_images(model.backbone))
    whole = model.eval().block_prompts(0, x)
    torch.manual_seed(0)
    kept = model.train().block_prompts(0, x) != 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept)) and not torch.equal(kept[0], kept[1])
    torch.testing.assert_close(
        model.train().block_prompts(0, x).ne(0).float().mean().item(), 0.5, atol=0.2, rtol=0
    )
    assert (whole != 0).all()


@pytest.mark.parametrize("bias", [False, True])
def test_what_it_adds_moves_and_nothing_else(bias: bool) -> None:
    model = adaptive("registers", bias=bias, channel_dropout=0.0, noise=True)
    assert_moves_what_it_adds(model, model.backbone)


def test_from_its_start_all_of_it_moves_in_a_few_steps() -> None:
    """At zero only the aggregation has a gradient; what lies before it follows."""
    model = adaptive(channel_dropout=0.0)
    before = {name: value.detach().clone() for name, value in model.task_state().items()}
    optimizer = torch.optim.AdamW(model.added_parameters().values(), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        random_loss(model(make_images(model.backbone))).backward()
        optimizer.step()
    for name, value in model.added_parameters().items():
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("bias", [False, True])
def test_an_adapter_gives_the_same_model(tmp_path: Path, bias: bool) -> None:
    assert_round_trip(adaptive("layer_scale", bias=bias, hidden_dim=3, kernel_size=2, noise=True), tmp_path)


def test_bfloat16_and_compiled() -> None:
    backbone = make_vit("registers")
    assert_low_precision_and_compiled("vapt", make_prompts(backbone, len(backbone.blocks)))
    assert_low_precision_and_compiled("vapt", None)


def test_number_of_parameters() -> None:
    model = adaptive("non_square")
    depth, width, grid, num_prompts, kernel, hidden = 3, 48, (3, 5), 5, 3, 8
    positions = (grid[0] - kernel + 1) * (grid[1] - kernel + 1)
    expected = depth * (2 * width + kernel**2 + num_prompts * (positions + 1)) + 2 * width * hidden
    assert sum(value.numel() for value in model.added_parameters().values()) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either prompts or num_prompts"),
        ({"num_prompts": 5, "prompts": torch.ones(3, 5, 48)}, "either prompts or num_prompts"),
        ({"prompts": torch.ones(1, 5, 48)}, r"deep prompts \[3, P, 48\], got \[1, 5, 48\]"),
        ({"num_prompts": 0}, "num_prompts must be a whole number of at least 1, got 0"),
        ({"num_prompts": 5, "kernel_size": 5}, "kernel_size must be from 1 to 4"),
        ({"num_prompts": 5, "hidden_dim": 0}, "hidden_dim must be a whole number of at least 1"),
        ({"num_prompts": 5, "channel_dropout": 1.0}, "channel_dropout must be a number in"),
        ({"num_prompts": 2.5}, "num_prompts must be a whole number"),
        ({"num_prompts": 5, "kernel_size": 2.5}, "kernel_size must be a whole number"),
        ({"num_prompts": 5, "kernel_size": "abc"}, "kernel_size must be a whole number"),
        ({"num_prompts": 5, "hidden_dim": 2.5}, "hidden_dim must be a whole number"),
        ({"num_prompts": 5, "channel_dropout": "abc"}, "channel_dropout must be a number in"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VaptViT(make_vit(), num_classes=2, **arguments)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match="images of 4 x 4 patches and got images of 6 x 6"):
        adaptive("dynamic_img_size")(torch.randn(1, 3, 48, 48))


@pytest.mark.parametrize(("own", "height", "width"), [((32, 32), 16, 64), ((32, 64), 64, 32)])
def test_as_many_patches_in_another_shape_are_refused(
    make_backbone: Any, own: tuple[int, int], height: int, width: int
) -> None:
    backbone = make_backbone(dynamic_img_size=True, img_size=own, depth=1)
    model = VaptViT(backbone, num_prompts=2, num_classes=2).eval()
    assert model(torch.randn(1, 3, *own)).shape == (1, 2)
    words = rf"{own[0] // 8} x {own[1] // 8} patches and got images of {height // 8} x {width // 8}$"
    with pytest.raises(InputError, match=words):
        model(torch.randn(1, 3, height, width))
