"""Many small ViTs whose weights are all random, and how a prompted model of one is compared with the judge `naive_vpt`.

Fresh timm weights hide mistakes (zero biases, unit norms, a class token of 1e-6), so `randomize` fills every parameter
with noise; `test_random_weights_make_every_parameter_matter` holds it to that.
"""

import copy
import functools
import zlib
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import RmsNorm, SwiGLUPacked
from torch import Tensor, nn

from benchmarks.naive_vpt import naive_forward

NUM_CLASSES = 7
SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 0,
}

# name: (timm name, what differs from SMALL)
VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "own_classifier": ("vit_tiny_patch16_224", {"num_classes": 11}),
    "depth_1": ("vit_tiny_patch16_224", {"depth": 1}),
    "depth_1_qk_norm": ("vit_tiny_patch16_224", {"depth": 1, "qk_norm": True}),
    "depth_2_wide_mlp": ("vit_tiny_patch16_224", {"depth": 2, "mlp_ratio": 6.5}),
    "layer_scale": ("vit_tiny_patch16_224", {"init_values": 1e-5}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "qk_rms_norm": ("vit_tiny_patch16_224", {"qk_norm": True, "norm_layer": RmsNorm}),
    "scale_norms": ("vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "no_qkv_bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "no_proj_bias": ("vit_tiny_patch16_224", {"proj_bias": False}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "registers_no_embed_class": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
    "registers_only": ("vit_tiny_patch16_224", {"reg_tokens": 2, "class_token": False, "global_pool": "avg"}),
    "no_class_token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "avg_fc_norm": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "avg_norm_before_pool": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    "avg_with_prefix": (
        "vit_tiny_patch16_224",
        {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 1},
    ),
    "token_fc_norm": ("vit_tiny_patch16_224", {"fc_norm": True}),
    "no_final_norm": ("vit_tiny_patch16_224", {"final_norm": False}),
    "max": ("vit_tiny_patch16_224", {"global_pool": "max"}),
    "avgmax": ("vit_tiny_patch16_224", {"global_pool": "avgmax"}),
    "map": ("vit_base_patch16_siglip_224", {}),
    "map_class_token": ("vit_tiny_patch16_224", {"global_pool": "map"}),
    "clip_pre_norm": ("vit_base_patch16_clip_quickgelu_224", {}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dinov2_registers_swiglu": ("vit_giant_patch14_reg4_dinov2", {"mlp_ratio": 2.66667}),
    "swiglu": ("vit_tiny_patch16_224", {"mlp_layer": SwiGLUPacked}),
    "head_width_40": ("vit_tiny_patch16_224", {"embed_dim": 80, "num_heads": 2}),
    "head_width_80": ("vit_tiny_patch16_224", {"embed_dim": 160, "num_heads": 2, "depth": 2}),
    "head_width_17": ("vit_tiny_patch16_224", {"embed_dim": 51}),
    "one_head": ("vit_tiny_patch16_224", {"num_heads": 1}),
    "non_square": ("vit_tiny_patch16_224", {"img_size": (24, 40)}),
    "non_square_patch": ("vit_tiny_patch16_224", {"patch_size": (16, 8)}),
    # Without a class token: early releases of timm drop it together with the position embedding.
    "pos_embed_none": (
        "vit_tiny_patch16_224",
        {"pos_embed": "none", "class_token": False, "global_pool": "avg"},
    ),
    "dynamic_img_size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "drop_rates": (
        "vit_tiny_patch16_224",
        {
            "init_values": 0.1,
            "drop_rate": 0.4,
            "pos_drop_rate": 0.4,
            "patch_drop_rate": 0.4,
            "proj_drop_rate": 0.4,
            "attn_drop_rate": 0.4,
            "drop_path_rate": 0.4,
        },
    ),
}

BFLOAT16_VITS = [
    "plain",
    "layer_scale",
    "qk_norm",
    "scale_norms",
    "registers",
    "no_class_token",
    "avg_fc_norm",
    "map",
    "clip_pre_norm",
    "deit_distilled",
    "dinov2_registers_swiglu",
    "head_width_80",
]

CASES = [
    (name, depth, pool)
    for name, (_, overrides) in VITS.items()
    for depth in ("deep", "shallow")
    for pool in (None, "token", "avg", "avg_with_prompts")
    if pool != "token" or (overrides.get("class_token", True) and name != "map")
]


def seed_for(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def randomize(backbone: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter with noise of a size that keeps activations near 1 and attention far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_token = name.endswith(("cls_token", "reg_token", "dist_token", "pos_embed", "latent"))
            if is_token:
                parameter.copy_(noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise * 1.3 / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1 + 0.3 * noise)  # affine of a norm, or a LayerScale
    return backbone


@functools.cache
def _vit(name: str) -> nn.Module:
    timm_name, overrides = VITS[name]
    backbone = timm.create_model(timm_name, **{**SMALL, **overrides})
    return randomize(backbone, seed_for(name)).eval().requires_grad_(False)


def make_vit(name: str = "plain") -> nn.Module:
    """A copy of its own of the named ViT: frozen, eval mode, float32, the same random weights every time."""
    return copy.deepcopy(_vit(name))


@functools.cache
def judge_vit(name: str) -> nn.Module:
    """The same ViT in float64, for the judge only: no other code ever sees this object."""
    return make_vit(name).double()


def make_prompts(backbone: nn.Module, depth: str, num_prompts: int = 5) -> Tensor:
    num_layers = len(backbone.blocks) if depth == "deep" else 1
    generator = torch.Generator().manual_seed(seed_for(depth, num_prompts, backbone.embed_dim))
    return 1.5 * torch.randn(num_layers, num_prompts, backbone.embed_dim, generator=generator)


def make_images(backbone: nn.Module, batch: int = 3) -> Tensor:
    height, width = backbone.patch_embed.img_size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))


def naive_logits_and_gradients(
    backbone: nn.Module, prompts: Tensor, head: nn.Linear, images: Tensor, pool: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits and the gradients of prompts, head weight and head bias, all in the float64 of the judge."""
    if next(backbone.parameters()).dtype != torch.float64:
        backbone = copy.deepcopy(backbone).double()
    prompts = prompts.detach().double().requires_grad_()
    head = copy.deepcopy(head).double().requires_grad_()
    logits = naive_forward(backbone, prompts, head, images.double(), pool=pool)
    gradients = torch.autograd.grad(random_loss(logits), [prompts, head.weight, head.bias])
    return logits.detach(), *gradients


def random_loss(logits: Tensor) -> Tensor:
    """Cross-entropy plus a random cotangent: every logit of every image has a gradient of its own."""
    generator = torch.Generator().manual_seed(len(logits))
    cotangent = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype)
    labels = torch.randint(logits.shape[1], logits.shape[:1], generator=generator)
    return F.cross_entropy(logits, labels) + (cotangent * logits).sum()


def logits_and_gradients(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    model.zero_grad(set_to_none=True)
    logits = model(images)
    random_loss(logits).backward()
    return logits.detach(), model.prompts.grad, model.head.weight.grad, model.head.bias.grad


def assert_equal_to_1e_10(actual: Tensor, expected: Tensor, what: str) -> None:
    """Within 1e-10 absolutely, and within 1e-10 of the largest entry."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype == torch.float64, what
    largest = expected.abs().max().item()
    assert largest > 1e-3, f"{what}: the judge's values are all near zero, the comparison would prove nothing"
    error = (actual - expected).abs().max().item()
    assert error <= 1e-10 * min(1.0, largest), f"{what}: error {error:.2e}, largest entry {largest:.2e}"


def assert_matches_judge(model: nn.Module, backbone: nn.Module, images: Tensor, pool: str | None) -> None:
    """A float64 model and the judge agree in logits and in the gradients of prompts, head weight and head bias."""
    actual = logits_and_gradients(model, images.double())
    expected = naive_logits_and_gradients(backbone, model.prompts, model.head, images, pool)
    for what, a, e in zip(
        ("logits", "prompts.grad", "head.weight.grad", "head.bias.grad"), actual, expected, strict=True
    ):
        assert_equal_to_1e_10(a, e, what)
    for index, block_gradient in enumerate(expected[1]):
        assert_equal_to_1e_10(actual[1][index], block_gradient, f"prompts.grad[{index}]")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()
