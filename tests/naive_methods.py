"""A ViT written out, with the places where methods of tuning change it left open: what they are judged by.

One image after the other, one head after the other, attention as a matrix. It takes weights from a timm model but runs
nothing of it that the methods run, apart from single layers.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, SwiGLUPacked
from torch import Tensor, nn

from spt_fast.tuned_vit import TunedViT

# name: (timm name, what differs from conftest's TINY, pool)
VARIANTS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "plain": ("vit_tiny_patch16_224", {}, None),
    "average": ("vit_tiny_patch16_224", {}, "avg"),
    "no_class_token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "avg"),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}, "token"),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, None),
    "scaled_layers": ("vit_tiny_patch16_224", {"init_values": 0.1, "qkv_bias": False}, "token"),
    "norms": (
        "vit_tiny_patch16_224",
        {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
        "avg",
    ),
    "swiglu": (
        "vit_tiny_patch16_224",
        {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 2.0},
        "token",
    ),
}

if "gated" in inspect.signature(Attention).parameters:  # not in earlier releases of timm
    VARIANTS["gated"] = ("vit_tiny_patch16_224", {}, "token")


class Unchanged:
    """What a method may change, changing nothing. Tokens of an image are ``[N, D]``."""

    def layer(self, layer: nn.Module, x: Tensor, block: int, name: str) -> Tensor:
        """A layer of a block; ``name`` is norm1, qkv, proj, norm2, fc1 or fc2."""
        return layer(x)

    def attended(self, h: Tensor, block: int) -> Tensor:
        """What the attention adds to the tokens."""
        return h

    def fed_forward(self, h: Tensor, x: Tensor, block: int) -> Tensor:
        """What the MLP adds to the tokens ``x``, before the layer scale."""
        return h

    def mlp_added(self, h: Tensor, block: int) -> Tensor:
        """The same, after it."""
        return h

    def shortcut(self, x: Tensor, block: int, past: str) -> Tensor:
        """The tokens that go past the ``attention`` or the ``mlp``."""
        return x

    def patches(self, x: Tensor) -> Tensor:
        """The embedded patches, before their positions."""
        return x

    def normed(self, x: Tensor) -> Tensor:
        """What leaves the final norm."""
        return x


def naive_tokens(backbone: Any, images: Tensor, changes: Unchanged) -> Tensor:
    """``[B, N, D]`` after the last block."""
    outputs = []
    for image in images:
        patches = backbone.patch_embed.proj(image[None])[0].flatten(1).T
        tokens = backbone._pos_embed(changes.patches(patches)[None])
        x = backbone.norm_pre(tokens)[0]
        for index, block in enumerate(backbone.blocks):
            x = _naive_block(block, x, index, changes)
        outputs.append(x)
    return torch.stack(outputs)


def naive_features(backbone: Any, images: Tensor, pool: str | None, changes: Unchanged) -> Tensor:
    """``[B, D]``, what a head sees."""
    norm = backbone.fc_norm if isinstance(backbone.norm, nn.Identity) else backbone.norm
    tokens = naive_tokens(backbone, images, changes)
    if pool == "avg":
        return changes.normed(norm(tokens[:, backbone.num_prefix_tokens :].mean(dim=1)))
    normed = changes.normed(norm(tokens))
    if pool is None and hasattr(backbone, "dist_token"):
        return (normed[:, 0] + normed[:, 1]) / 2
    return normed[:, 0]


def _naive_block(block: Any, x: Tensor, index: int, changes: Unchanged) -> Tensor:
    attn, mlp = block.attn, block.mlp

    def layer(name: str, module: nn.Module, given: Tensor) -> Tensor:
        return changes.layer(module, given, index, name)

    hidden = layer("norm1", block.norm1, x)
    q, k, v = layer("qkv", attn.qkv, hidden).chunk(3, dim=-1)
    heads = []
    for q_head, k_head, v_head in zip(
        *(each.chunk(attn.num_heads, dim=-1) for each in (q, k, v)), strict=True
    ):
        scores = attn.q_norm(q_head) @ attn.k_norm(k_head).T / q_head.shape[1] ** 0.5
        heads.append(torch.softmax(scores, dim=-1) @ v_head)
    out = attn.norm(torch.cat(heads, dim=-1))
    if getattr(attn, "gate", None) is not None:
        out = out * torch.sigmoid(attn.gate(hidden))
    attended = changes.attended(block.ls1(layer("proj", attn.proj, out)), index)
    x = changes.shortcut(x, index, "attention") + attended

    hidden = layer("fc1", mlp.fc1, layer("norm2", block.norm2, x))
    if mlp.fc2.in_features < mlp.fc1.out_features:
        gate, hidden = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * hidden
    else:
        hidden = F.gelu(hidden)
    added = changes.fed_forward(layer("fc2", mlp.fc2, mlp.norm(hidden)), x, index)
    return changes.shortcut(x, index, "mlp") + changes.mlp_added(block.ls2(added), index)


def double_case(
    make_backbone: Callable[..., Any], build: Callable[..., TunedViT], variant: str
) -> tuple[TunedViT, Any, str | None, Tensor]:
    """A float64 model of a variant all of whose parameters are noise, its backbone, pool, and three images."""
    name, overrides, pool = VARIANTS[variant]
    backbone = make_backbone(name, depth=2, **overrides)
    if variant == "gated":
        for block in backbone.blocks:
            block.attn.gate = nn.Linear(backbone.embed_dim, backbone.embed_dim)
    backbone.double()
    model = build(backbone, num_classes=5, pool=pool).double().eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for value in model.task_state().values():
            value += 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    images = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    return model, backbone, pool, images


def assert_same_logits_and_gradients(
    model: TunedViT, images: Tensor, expected: Callable[[dict[str, Tensor]], Tensor]
) -> None:
    """The model's logits and gradients are those of ``expected``, a function of what it learned."""
    state = {name: value.detach().clone().requires_grad_() for name, value in model.task_state().items()}
    logits, wanted = model(images), expected(state)
    torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5), dtype=wanted.dtype)
    own = torch.autograd.grad((logits * direction).sum(), list(model.task_state().values()))
    theirs = torch.autograd.grad((wanted * direction).sum(), list(state.values()))
    for name, a, b in zip(state, own, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def learned_after_steps(
    model: TunedViT, images: Tensor, steps: int = 2
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All parameters of the model before and after a few steps of Adam."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    labels = torch.arange(len(images)) % model.head.out_features
    optimizer = torch.optim.Adam([v for v in model.parameters() if v.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()
    return before, dict(model.named_parameters())


def assert_only_the_task_moves(model: TunedViT, backbone: Any, images: Tensor) -> None:
    """All that the task stores and nothing else changes in training; the caller's own backbone stays bit for bit."""
    original = {name: value.clone() for name, value in backbone.state_dict().items()}
    before, after = learned_after_steps(model, images)
    task = model.task_state()
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (name not in task), name
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, original[name]), name
    assert not any(value.requires_grad for value in backbone.parameters())


def assert_runs_in_bfloat16_and_compiled(model: TunedViT, images: Tensor) -> None:
    """The compiled model gives the same numbers, and the one with a bfloat16 backbone nearly the same."""
    model.eval()
    with torch.no_grad():
        expected = model(images)
        # It gives up on a forward that it has compiled for many models.
        with torch._dynamo.config.patch(recompile_limit=64):
            compiled = torch.compile(model, backend="eager", fullgraph=True)(images)
        torch.testing.assert_close(compiled, expected)
        model.cast_backbone(torch.bfloat16)
        low = model(images)
    # Seven bits of mantissa through a few blocks.
    assert (low.float() - expected).abs().max() < 0.1 * expected.abs().max().clamp(min=1)
    model(images).sum().backward()
    for name, value in model.task_state().items():
        assert value.dtype == value.grad.dtype == torch.float32 and torch.isfinite(value.grad).all(), name
