"""load_backbone on checkpoints of every released layout, made on the fly, and on files that must be refused."""

import argparse
import inspect
import json
import pickle
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from spt_fast import load_backbone
from spt_fast.backbones import backbone_identity, bundled_backbones, check_backbone, source_of
from spt_fast.errors import CheckpointError, InputError, MissingFileError, UnsupportedModelError

VIT = "vit_tiny_patch16_224"
DISTILLED = "deit_tiny_distilled_patch16_224"
TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def weights(name: str = VIT, seed: int = 0, **overrides: Any) -> dict[str, torch.Tensor]:
    """A state dict full of noise."""
    model = timm.create_model(name, **{"num_classes": 0, **TINY, **overrides})
    generator = torch.Generator().manual_seed(seed)
    return {k: 0.1 * torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}


def load(path: Path | str, name: str = VIT, **overrides: Any) -> nn.Module:
    return load_backbone(name, checkpoint=path, **{**TINY, **overrides})


def assert_holds(backbone: nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = backbone.state_dict()
    assert own.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(own[key], value), key


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


# --- The bundled weights -----------------------------------------------------------------------------------------


def test_the_bundled_weights_are_those_in_the_file(bundled_backbone):
    stored = load_file(str(files("spt_fast") / "assets" / "vit_tiny_mae_cifar10.safetensors"))
    own = bundled_backbone.state_dict()
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert own.keys() == stored.keys()
    for key, value in own.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[key].float()), key


def test_a_backbone_is_frozen_in_eval_mode_and_has_no_classifier(bundled_backbone):
    assert not any(module.training for module in bundled_backbone.modules())
    assert not any(parameter.requires_grad for parameter in bundled_backbone.parameters())
    assert bundled_backbone.num_classes == 0
    assert isinstance(bundled_backbone.head, nn.Identity)
    unchecked = load_backbone(VIT, **TINY)
    assert not unchecked.training and not any(p.requires_grad for p in unchecked.parameters())


def test_the_bundled_weights_want_imagenet_statistics(bundled_backbone):
    assert tuple(bundled_backbone.pretrained_cfg["mean"]) == IMAGENET_DEFAULT_MEAN
    assert tuple(bundled_backbone.pretrained_cfg["std"]) == IMAGENET_DEFAULT_STD


def test_every_bundled_name_is_found_and_others_are_refused():
    assert "vit_tiny_mae_cifar10" in bundled_backbones()
    with pytest.raises(MissingFileError, match="bundled:nothing.*bundles.*vit_tiny_mae_cifar10"):
        load("bundled:nothing")


# --- Layouts -----------------------------------------------------------------------------------------------------


def test_flat_safetensors(tmp_path):
    state = weights()
    save_file(state, tmp_path / "w.safetensors")
    backbone = load(tmp_path / "w.safetensors")
    assert_holds(backbone, state)
    # timm's own statistics of this model, which are not ImageNet's: a flat file does not say where it is from.
    assert tuple(backbone.pretrained_cfg["mean"]) == tuple(timm.get_pretrained_cfg(VIT).mean) == (0.5,) * 3
    assert tuple(backbone.pretrained_cfg["std"]) == tuple(timm.get_pretrained_cfg(VIT).std)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_flat_pth(tmp_path, suffix):
    state = weights()
    backbone = load(saved(tmp_path / f"w{suffix}", state))
    assert_holds(backbone, state)
    assert tuple(backbone.pretrained_cfg["mean"]) == (0.5,) * 3


def test_lower_precision_weights_become_float32(tmp_path):
    state = {key: value.bfloat16() for key, value in weights().items()}
    assert_holds(load(saved(tmp_path / "w.pth", state)), {k: v.float() for k, v in state.items()})


def mae(with_decoder: bool) -> dict[str, Any]:
    model = weights()
    if with_decoder:
        model = {
            **model,
            "mask_token": torch.randn(1, 1, 16),
            "decoder_pos_embed": torch.randn(1, 17, 16),
            "decoder_embed.weight": torch.randn(16, 48),
            "decoder_blocks.0.norm1.weight": torch.randn(16),
            "decoder_pred.bias": torch.randn(192),
        }
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    return {
        "model": model,
        "optimizer": optimizer,
        "epoch": 799,
        "args": argparse.Namespace(blr=1.5e-4, mask_ratio=0.75, data_path="somewhere"),
    }


def moco_v3() -> dict[str, Any]:
    encoder = weights()
    mlp = {f"head.{i}.weight": torch.randn(4, 4) for i in (0, 3)} | {
        "head.1.num_batches_tracked": torch.tensor(3)
    }
    momentum = weights(seed=9)
    state = {f"module.base_encoder.{k}": v for k, v in (encoder | mlp).items()}
    state |= {f"module.momentum_encoder.{k}": v for k, v in (momentum | mlp).items()}
    state |= {f"module.predictor.{k}": v for k, v in mlp.items()}
    return {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": []},
    }


def moco_v3_linear_probe() -> dict[str, Any]:
    state = {f"module.{k}": v for k, v in weights(num_classes=1000).items()}
    return {"epoch": 90, "arch": "vit_base", "state_dict": state, "best_acc1": torch.tensor(76.7)}


RELEASED = {
    "mae": lambda: mae(with_decoder=False),
    "mae_with_decoder": lambda: mae(with_decoder=True),
    "moco_v3": moco_v3,
    "moco_v3_linear_probe": moco_v3_linear_probe,
    "deit": lambda: {"model": weights(num_classes=1000)},
}


@pytest.mark.parametrize("layout", RELEASED)
def test_released_layouts(tmp_path, layout):
    backbone = load(saved(tmp_path / "checkpoint.pth.tar", RELEASED[layout]()))
    expected = weights(num_classes=1000 if layout in ("deit", "moco_v3_linear_probe") else 0)
    assert_holds(backbone, {k: v for k, v in expected.items() if not k.startswith("head")})
    assert tuple(backbone.pretrained_cfg["mean"]) == IMAGENET_DEFAULT_MEAN
    assert tuple(backbone.pretrained_cfg["std"]) == IMAGENET_DEFAULT_STD


def test_deit_with_a_distillation_token(tmp_path):
    state = weights(DISTILLED, num_classes=1000)
    assert {"dist_token", "head.weight", "head_dist.weight"} <= state.keys()
    backbone = load(saved(tmp_path / "deit.pth", {"model": state}), DISTILLED)
    assert backbone.num_prefix_tokens == 2
    assert_holds(backbone, {k: v for k, v in state.items() if not k.startswith("head")})


def test_the_classifier_loads_where_it_fits_and_is_ignored_where_it_does_not(tmp_path):
    state = weights(num_classes=10)
    path = saved(tmp_path / "w.pth", state)
    assert_holds(load(path, num_classes=10), state)
    other_size = load(path, num_classes=7)
    assert other_size.head.weight.shape == (7, 48)
    assert torch.equal(other_size.blocks[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"])
    assert load(saved(tmp_path / "headless.pth", weights()), num_classes=10).head.weight.shape == (10, 48)


def test_the_final_norm_is_fc_norm_for_average_pooling(tmp_path):
    state = weights()
    backbone = load(saved(tmp_path / "mae.pth", {"model": state}), global_pool="avg")
    assert isinstance(backbone.norm, nn.Identity)
    assert torch.equal(backbone.fc_norm.weight, state["norm.weight"])
    assert torch.equal(backbone.fc_norm.bias, state["norm.bias"])


@pytest.mark.parametrize("name", [VIT, DISTILLED])
def test_position_embedding_is_resized_as_timm_does(tmp_path, name):
    state = weights(name)
    prefix = 1 if name == VIT else 2
    backbone = load(saved(tmp_path / "w.pth", state), name, img_size=48)
    expected = resample_abs_pos_embed(state["pos_embed"], new_size=[6, 6], num_prefix_tokens=prefix)
    assert backbone.pos_embed.shape == (1, 36 + prefix, 48)
    assert torch.equal(backbone.pos_embed[:, :prefix], state["pos_embed"][:, :prefix])
    torch.testing.assert_close(backbone.pos_embed, expected)


def test_patch_embedding_is_resized_as_timm_does(tmp_path):
    state = weights()
    backbone = load(saved(tmp_path / "w.pth", state), img_size=16, patch_size=4)
    torch.testing.assert_close(
        backbone.patch_embed.proj.weight, resample_patch_embed(state["patch_embed.proj.weight"], [4, 4])
    )


def test_a_loaded_backbone_computes_what_the_saved_model_did(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(VIT, num_classes=5, **TINY).eval()
    path = saved(tmp_path / "w.pth", model.state_dict())
    with torch.no_grad():
        assert torch.equal(load(path, num_classes=5)(IMAGES), model(IMAGES))


# --- Refused -----------------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(tmp_path):
    state = weights()
    del state["blocks.1.attn.qkv.weight"]
    with pytest.raises(
        CheckpointError, match=r"w\.pth.*blocks\.1\.attn\.qkv\.weight is missing from the file"
    ):
        load(saved(tmp_path / "w.pth", state))


def test_an_extra_tensor_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="blocks.2.gate has no place in the model"):
        load(saved(tmp_path / "w.pth", {**weights(), "blocks.2.gate": torch.ones(3)}))


def test_a_deeper_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="blocks.2.*has no place in the model.*and 9 more"):
        load(saved(tmp_path / "w.pth", weights(depth=3)))


def test_another_width_is_refused_with_both_shapes(tmp_path):
    with pytest.raises(CheckpointError, match=r"\[1, 1, 48\] in the file and \[1, 1, 96\] in the model"):
        load(saved(tmp_path / "w.pth", weights()), embed_dim=96)


def test_a_distillation_token_does_not_vanish(tmp_path):
    with pytest.raises(CheckpointError, match="dist_token has no place in the model|pos_embed is"):
        load(saved(tmp_path / "w.pth", weights(DISTILLED)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_unsound_weights_are_named(tmp_path, value):
    state = weights()
    state["blocks.1.mlp.fc1.weight"][3, 5] = value
    with pytest.raises(CheckpointError, match="NaN or infinite weights in blocks.1.mlp.fc1.weight"):
        load(saved(tmp_path / "w.pth", state))


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_files_are_refused(tmp_path, suffix, keep):
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(weights(), path)
    else:
        save_file(weights(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=f"w{suffix} cannot be read"):
        load(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_never_raise_anything_else(tmp_path, kind):
    content = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(content, path)
    else:
        torch.save({"model": content}, path, _use_new_zipfile_serialization=kind == "zip")
    whole, dice = path.read_bytes(), random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):  # also where it can still be read: these are no weights of a ViT
            load(path)


class TouchesAFile:
    """Unpickled carelessly, it creates the file it names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "writer", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))]
)
@pytest.mark.parametrize("place", ["alone", "beside the weights"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, writer, place):
    touched = tmp_path / "touched"
    bomb = TouchesAFile(touched)
    path = tmp_path / "w.pth"
    writer(bomb if place == "alone" else {"model": weights(), "args": bomb}, path)
    with pytest.raises(CheckpointError, match="w.pth cannot be read"):
        load(path)
    assert not touched.exists()
    pickle.loads(pickle.dumps(bomb))  # the trap works
    assert touched.exists()


@pytest.mark.parametrize(
    "content",
    [
        {},
        [1, 2],
        {"model": {}},
        {"state_dict": {"a": 1}},
        {"model": nn.Linear(2, 2).state_dict(), "state_dict": 3},
        torch.ones(3),
        {"weights": {"cls_token": torch.ones(1)}},
    ],
)
def test_files_without_a_dictionary_of_fitting_tensors_are_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match="holds no dictionary of tensors|does not fit this model"):
        load(saved(tmp_path / "w.pth", content))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [json.dumps({"cls_token": [1, 2]}).encode(), b"# a text\n", bytes(range(256))]
)
def test_other_kinds_of_files_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"w{suffix} cannot be read"):
        load(path)


def test_a_missing_path_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(MissingFileError, match="does not exist or is not a file"):
            load(path)


def test_an_unknown_name_gets_a_suggestion():
    message = "'vit_tini_patch16_224' is not a timm model; did you mean vit_tiny_patch16_224"
    with pytest.raises(InputError, match=message):
        load_backbone("vit_tini_patch16_224")
    for name in ("", "zzzzzzzzzz", None, 3):
        with pytest.raises(InputError, match="is not a timm model; timm.list_models"):
            load_backbone(name)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="could not build 'vit_tiny_patch16_224.nonsense'"):
        load_backbone("vit_tiny_patch16_224.nonsense", **TINY)


@pytest.mark.parametrize(
    "wrong",
    [
        {"nonsense": 3},
        {"embed_dim": 50},
        {"num_heads": 0},
        {"patch_size": 0},
        {"depth": -1},
        {"img_size": "big"},
        {"norm_layer": "nonsense"},
        {"global_pool": "nonsense"},
    ],
    ids=str,
)
def test_arguments_that_timm_refuses(wrong):
    with pytest.raises(InputError, match=f"timm could not build '{VIT}' with .*{next(iter(wrong))}"):
        load_backbone(VIT, **{**TINY, **wrong})


def test_checkpoint_and_pretrained_exclude_each_other(tmp_path):
    with pytest.raises(InputError, match="checkpoint and pretrained=True"):
        load_backbone(VIT, checkpoint=tmp_path / "w.pth", pretrained=True)


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 1)},
            "SwinTransformer",
        ),
        ("eva02_tiny_patch14_224", {"depth": 1}, "Eva cannot be prompted"),
        ("vit_base_patch16_18x2_224", TINY, "block 0 is a ParallelThingsBlock"),
        ("vit_tiny_patch16_224", {**TINY, "attn_layer": "diff"}, "block 0 uses DiffAttention"),
        ("resnet18", {}, "ResNet cannot be prompted"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_cannot_be_prompted(name, kwargs, reason):
    if "attn_layer" in kwargs and "attn_layer" not in inspect.signature(VisionTransformer).parameters:
        pytest.skip("this timm has no other attention")
    with pytest.raises(UnsupportedModelError, match=reason):
        load_backbone(name, **kwargs)
    with pytest.raises(UnsupportedModelError, match="Linear cannot be prompted"):
        check_backbone(nn.Linear(2, 2))


# --- Identity and source -----------------------------------------------------------------------------------------


def test_identity_survives_casts(make_backbone):
    identity = backbone_identity(make_backbone())
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert backbone_identity(make_backbone().to(dtype)) == identity
    assert json.loads(json.dumps(identity)) == identity


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"img_size": 40}, {"depth": 2}, {"embed_dim": 51}, {"num_heads": 4}, {"reg_tokens": 2}],
    ids=str,
)
def test_identity_differs_between_backbones(make_backbone, other):
    assert backbone_identity(make_backbone(**other)) != backbone_identity(make_backbone())


def test_identity_sees_every_weight_but_the_classifier(make_backbone):
    plain = backbone_identity(make_backbone())
    assert backbone_identity(make_backbone(num_classes=11)) == plain
    for name, parameter in make_backbone().named_parameters():
        changed = make_backbone()
        changed.get_parameter(name).mul_(1.5)
        assert backbone_identity(changed) != plain, (name, tuple(parameter.shape))


def test_source_is_how_to_load_the_backbone_again(tmp_path, make_backbone):
    path = saved(tmp_path / "w.pth", weights())
    source = json.loads(json.dumps(source_of(load(path))))
    again = load_backbone(
        source["name"],
        checkpoint=source["checkpoint"],
        pretrained=source["pretrained"],
        **source["timm_kwargs"],
    )
    assert_holds(again, weights())
    elsewhere = source_of(make_backbone())
    assert elsewhere["name"] == VIT and elsewhere["timm_kwargs"] is None
    unwritable = source_of(load_backbone(VIT, **TINY, norm_layer=nn.LayerNorm))
    assert unwritable["timm_kwargs"] is None and json.dumps(unwritable)
