"""What the judges of prompt methods are made of: a block of a ViT written out, its head, and how models are compared.

A judge is a function of a float64 backbone, the method's parameters by name and images. Nothing here or in the judges
knows how the package computes them.
"""

from collections.abc import Callable
from typing import Any

import torch
from judged_vits import (
    NUM_CLASSES,
    assert_equal_to_1e_10,
    judge_vit,
    make_images,
    make_vit,
    random_loss,
    relative_error,
    seed_for,
)
from torch import Tensor, nn

from benchmarks.naive_vpt import final_norm
from spt_fast import load_adapter, save_adapter
from spt_fast.methods import build_model
from spt_fast.tuned_vit import TunedViT

# Returns what leaves the last block: prefix and patch tokens, and prompts.
Judge = Callable[[Any, dict[str, Tensor], Tensor], tuple[Tensor, Tensor]]

# (ViT, pooling)
CASES = [
    ("plain", None),
    ("plain", "avg_with_prompts"),
    ("registers", "token"),
    ("deit_distilled", None),
    ("layer_scale", "avg"),
    ("qk_norm", "token"),
    ("scale_norms", "avg_with_prompts"),
    ("no_qkv_bias", None),
    ("no_class_token", "avg_with_prompts"),
    ("avg_fc_norm", None),
    ("non_square", "avg"),
]


def naive_sequence(backbone: Any, images: Tensor) -> Tensor:
    """What enters the first block, ``[B, N, D]``."""
    tokens = backbone._pos_embed(backbone.patch_embed(images))
    return backbone.norm_pre(backbone.patch_drop(tokens))


def naive_block(
    block: Any, x: Tensor, *, more: tuple[Tensor, Tensor] | None = None, temperature: Tensor | float = 1.0
) -> Tensor:
    """A block on the sequence ``[B, N, D]``, with ``more`` keys and values ``[H, R, d]`` and its scores divided."""
    attn = block.attn
    batch, _, width = x.shape
    size = width // attn.num_heads
    heads = []
    for head in range(attn.num_heads):
        at = slice(head * size, (head + 1) * size)
        query, key, value = (part[..., at] for part in attn.qkv(block.norm1(x)).split(width, dim=-1))
        query, key = attn.q_norm(query), attn.k_norm(key)
        if more is not None:
            key = torch.cat([key, torch.stack([more[0][head]] * batch)], dim=1)
            value = torch.cat([value, torch.stack([more[1][head]] * batch)], dim=1)
        scores = query @ key.transpose(1, 2) / (size**0.5 * temperature)
        weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
        heads.append(weights @ value)
    x = x + block.ls1(attn.proj(attn.norm(torch.cat(heads, dim=-1))))
    return x + block.ls2(block.mlp(block.norm2(x)))


def naive_logits(
    backbone: Any, head: tuple[Tensor, Tensor], tokens: Tensor, prompts: Tensor, pool: str | None
) -> Tensor:
    """From what leaves the last block, prefix and patch tokens ``[B, N, D]`` and prompts, to logits."""
    prefix = backbone.num_prefix_tokens
    if pool is None:
        features = backbone.forward_head(backbone.norm(tokens), pre_logits=True)
    elif pool == "token":
        features = final_norm(backbone)(tokens[:, 0])
    elif pool == "avg":
        features = final_norm(backbone)(tokens[:, prefix:].mean(dim=1))
    else:
        others = torch.cat([tokens[:, int(backbone.has_class_token) :], prompts], dim=1)
        features = final_norm(backbone)(others.mean(dim=1))
    return features @ head[0].T + head[1]


def make_prompts(backbone: Any, rows: int, num_prompts: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed_for(rows, num_prompts))
    return torch.randn(rows, num_prompts, backbone.embed_dim, generator=generator)


def randomise(model: TunedViT, scale: float = 0.5) -> None:
    """Move all that learns beside ``prompts`` by noise: a start at zero hides mistakes."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in model.task_state().items():
            if value.requires_grad and name != "prompts":
                value += scale * torch.randn(value.shape, generator=generator).to(value)


def assert_matches(model: TunedViT, vit: str, judge: Judge, pool: str | None) -> None:
    """Logits, and the gradient of everything that learns."""
    model = model.double().eval()
    images = make_images(model.backbone).double()
    state = {name: value.detach().clone() for name, value in model.task_state().items()}
    learning = {name: value for name, value in model.task_state().items() if value.requires_grad}
    for name in learning:
        state[name].requires_grad_()
    tokens, prompts = judge(judge_vit(vit), state, images)
    head = state["head.weight"], state["head.bias"]
    expected = naive_logits(judge_vit(vit), head, tokens, prompts, pool)
    actual = model(images)
    assert_equal_to_1e_10(actual.detach(), expected.detach(), "logits")
    gradients = torch.autograd.grad(random_loss(expected), [state[name] for name in learning])
    random_loss(actual).backward()
    for (name, value), gradient in zip(learning.items(), gradients, strict=True):
        assert value.grad is not None, name
        assert_equal_to_1e_10(value.grad, gradient, f"gradient of {name}")


def assert_moves_what_it_adds(model: TunedViT, backbone: nn.Module, still: tuple[str, ...] = ()) -> None:
    """Two steps move all that learns, and neither ``still`` nor the caller's own backbone."""
    frozen = {name: value.clone() for name, value in backbone.state_dict().items()}
    before = {name: value.detach().clone() for name, value in model.task_state().items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        random_loss(model.train()(make_images(backbone))).backward()
        optimizer.step()
    for name, value in model.task_state().items():
        assert torch.equal(value, before[name]) == (name in still), name
    assert all(torch.equal(value, frozen[name]) for name, value in backbone.state_dict().items())
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {*before} - {*still}


def assert_round_trip(model: TunedViT, folder: Any) -> None:
    """An adapter of it makes the same model."""
    path = folder / "adapter.safetensors"
    save_adapter(path, model.eval())
    again = load_adapter(path, model.backbone)
    assert type(again) is type(model) and again.options == model.options
    assert all(torch.equal(value, model.task_state()[name]) for name, value in again.task_state().items())
    images = make_images(model.backbone)
    assert torch.equal(again(images), model(images))


def assert_low_precision_and_compiled(method: str, prompts: Tensor | None) -> None:
    """bfloat16 is close to float32, and the model is one graph that computes the same."""
    backbone = make_vit("registers")
    start: dict[str, Any] = {"num_prompts": 5} if prompts is None else {"prompts": prompts}
    model = build_model(method, backbone, num_classes=NUM_CLASSES, **start)
    randomise(model, 0.1)
    model.eval()
    images = make_images(backbone)
    plain = model(images)
    # It gives up on a forward that it has compiled for many models.
    with torch._dynamo.config.patch(recompile_limit=64):
        compiled = torch.compile(model, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
    low = model.cast_backbone(torch.bfloat16)(images.bfloat16())
    assert low.dtype == torch.float32 and relative_error(low, plain.double()) < 0.05
    assert all(value.dtype == torch.float32 for value in model.task_state().values())
