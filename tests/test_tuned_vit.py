"""What all methods of tuning share: dense features, what a task stores, rates of what was added, own backbones."""

import copy

import pytest
import torch
from judged_vits import make_vit
from tiny import squares, tiny_backbone, tiny_model
from torch import nn

import spt_fast
from spt_fast.backbones import backbone_identity
from spt_fast.errors import InputError
from spt_fast.methods import build_model
from spt_fast.methods.own_backbone import own_backbone
from spt_fast.optimizer import PromptAdamW


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("name", ["plain", "registers", "avg_fc_norm", "non_square", "dynamic_img_size"])
def test_dense_features_are_the_normed_patch_tokens_in_their_places(name: str, deep: bool) -> None:
    torch.manual_seed(1)
    backbone = make_vit(name).double()
    height, width = (24, 40) if name == "non_square" else (32, 48) if name == "dynamic_img_size" else (32, 32)
    prompts = torch.randn(len(backbone.blocks) if deep else 1, 3, backbone.embed_dim, dtype=torch.float64)
    model = spt_fast.PromptedViT(backbone, prompts, num_classes=2).double().eval()
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    grid = model.forward_features(images, patch_grid=True)

    # Naively: prompts concatenated, every block whole.
    x = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(images)))
    tokens = x.shape[1]
    for index, block in enumerate(backbone.blocks):
        if deep or index == 0:
            x = torch.cat([x[:, :tokens], prompts[index].expand(2, -1, -1)], dim=1)
        x = block(x)
    norm = backbone.fc_norm if isinstance(backbone.norm, nn.Identity) else backbone.norm
    assert grid.shape == (2, backbone.embed_dim, height // 8, width // 8)
    for row in range(height // 8):
        for column in range(width // 8):
            token = x[:, backbone.num_prefix_tokens + row * (width // 8) + column]
            torch.testing.assert_close(grid[:, :, row, column], norm(token), rtol=1e-9, atol=1e-9)


def test_dense_features_do_not_depend_on_the_pooling() -> None:
    images = torch.randn(2, 3, 16, 16)
    grids = [
        tiny_model(pool=pool).eval().forward_features(images, patch_grid=True)
        for pool in ("token", "avg", "avg_with_prompts")
    ]
    for other in grids[1:]:
        torch.testing.assert_close(grids[0], other)


def test_a_task_state_fits_its_own_model_alone() -> None:
    model, other = tiny_model(0), tiny_model(1)
    other.load_task_state(model.task_state())
    for name, value in model.task_state().items():
        assert torch.equal(other.task_state()[name], value)
    state = dict(model.task_state())
    with pytest.raises(InputError, match=r"prompts is missing"):
        other.load_task_state({name: value for name, value in state.items() if name != "prompts"})
    with pytest.raises(InputError, match=r"gate has no place"):
        other.load_task_state({**state, "gate": torch.zeros(1)})
    with pytest.raises(InputError, match=r"prompts is \[2, 4, 32\] instead of \[2, 3, 32\]"):
        other.load_task_state({**state, "prompts": torch.zeros(2, 4, 32)})


def test_what_was_added_has_rates_of_its_own_and_vectors_do_not_decay() -> None:
    torch.manual_seed(0)
    start = {"matrix": torch.randn(3, 4), "vector": torch.randn(5), "scaled": torch.randn(2, 2)}
    gradients = {name: torch.randn(value.shape) for name, value in start.items()}
    head = nn.Linear(4, 2)
    added = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    scales = {"matrix": 1.0, "vector": 1.0, "scaled": 0.25}
    others = [(added[name], scales[name]) for name in added]
    optimizer = PromptAdamW(None, head, lr=0.1, weight_decay=0.5, head_weight_decay=0.0, others=others)
    for name, parameter in added.items():
        parameter.grad = gradients[name].clone()
    optimizer.step()
    for name, parameter in added.items():
        plain = nn.Parameter(start[name].clone())
        decay = 0.0 if name == "vector" else 0.5
        adamw = torch.optim.AdamW([plain], lr=0.1 * scales[name], weight_decay=decay)
        plain.grad = gradients[name].clone()
        adamw.step()
        assert torch.equal(parameter, plain)


def test_a_backbone_of_ones_own_shares_what_stays_frozen() -> None:
    backbone = tiny_backbone()
    own = own_backbone(backbone, lambda name: name.endswith("qkv.bias"))
    assert backbone_identity(own) == backbone_identity(backbone)
    before = dict(backbone.named_parameters())
    for name, value in own.named_parameters():
        assert value.requires_grad == name.endswith("qkv.bias") == (value is not before[name])
    with torch.no_grad():
        own.blocks[0].attn.qkv.bias.add_(1)  # type: ignore[union-attr]
    assert backbone_identity(own) == backbone_identity(backbone)  # the task changed it, not the backbone
    assert not any(value.requires_grad for value in backbone.parameters())


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_weights_that_learn_keep_their_precision_under_bfloat16(method: str) -> None:
    backbone = tiny_backbone()
    before = copy.deepcopy(backbone.state_dict())
    model = build_model(method, backbone, num_classes=3, pool="avg")
    plain = build_model(method, backbone, num_classes=3, pool="avg")
    plain.load_task_state(model.task_state())
    model.cast_backbone(torch.bfloat16)
    images = torch.randn(4, 3, 16, 16)
    logits = model(images)
    assert all(value.dtype == torch.float32 for value in model.parameters())
    assert not torch.equal(logits, plain(images))  # it did compute in bfloat16
    torch.testing.assert_close(logits, plain(images), rtol=0.1, atol=0.05)
    logits.square().sum().backward()
    assert all(value.grad is not None for value in model.added_parameters().values() if value.requires_grad)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])


def test_snapshots_are_the_start_and_every_second_epoch(tmp_path) -> None:
    config = spt_fast.TrainingConfig(
        epochs=3, warmup_epochs=0, batch_size=4, snapshot_interval=2, num_workers=0, dtype="float32"
    )
    model = tiny_model()
    start = model.prompts.detach().clone()
    spt_fast.train(model, squares(8), output=tmp_path, config=config)
    kept = sorted(path.name for path in (tmp_path / "snapshots").iterdir())
    assert kept == ["epoch-0000.safetensors", "epoch-0002.safetensors"]
    first, later = (spt_fast.Adapter.load(tmp_path / "snapshots" / name).prompts for name in kept)
    last = spt_fast.Adapter.load(tmp_path / "last.safetensors").prompts
    assert torch.equal(first, start) and not torch.equal(later, start) and not torch.equal(later, last)
    with pytest.raises(InputError, match="snapshot_interval must be at least 1, got 0"):
        spt_fast.TrainingConfig(snapshot_interval=0)


def test_pooling_over_prompts_needs_prompts() -> None:
    with pytest.raises(InputError, match="needs prompts, and linear has none"):
        build_model("linear", tiny_backbone(), num_classes=2, pool="avg_with_prompts")
