"""Adapters: what comes back from a file is the model that went in, and nothing else is taken for one."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import learned, tiny_backbone, tiny_model

import spt_fast.tensor_files
from spt_fast import Adapter, PromptedViT, Prototypes, __version__, load_adapter, load_backbone, save_adapter
from spt_fast.errors import AdapterMismatchError, CheckpointError, InputError, MissingFileError

BUNDLED: dict[str, Any] = {"checkpoint": "bundled:vit_tiny_mae_cifar10", "img_size": 32, "patch_size": 4}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An adapter of the tiny backbone."""
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, tiny_model())
    return path


@pytest.mark.parametrize("pool", [None, "token", "avg", "avg_with_prompts"])
@pytest.mark.parametrize("deep", [True, False])
def test_round_trip_gives_the_same_logits(deep: bool, pool: Any, tmp_path: Path) -> None:
    model = tiny_model(deep=deep, pool=pool, prompt_dropout=0.5).eval()
    torch.nn.init.normal_(model.head.bias)
    save_adapter(tmp_path / "adapter.safetensors", model, classes=["a", "b", "c"])
    again = load_adapter(tmp_path / "adapter.safetensors", tiny_backbone())
    images = torch.randn(5, 3, 16, 16)
    assert torch.equal(again(images), model(images))
    assert again.classes == ["a", "b", "c"]
    assert (again.pool, again.deep, again.training) == (pool, deep, False)
    assert again.prompts.requires_grad and again.head.weight.requires_grad


def test_classes_are_numbered_by_default(file: Path) -> None:
    assert load_adapter(file, tiny_backbone()).classes == ["0", "1", "2"]


def test_names_of_classes_may_be_anything(tmp_path: Path) -> None:
    names = ["Märzveilchen", "猫", 'quote " and \\ \n']
    save_adapter(tmp_path / "adapter.safetensors", tiny_model(), classes=names)
    assert load_adapter(tmp_path / "adapter.safetensors", tiny_backbone()).classes == names


@pytest.mark.parametrize("classes", [["a", "b"], ["a", "b", "c", "d"], []])
def test_wrong_number_of_classes_is_refused(classes: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"classes must name the 3 outputs of the head, got {len(classes)}"):
        save_adapter(tmp_path / "adapter.safetensors", tiny_model(), classes=classes)
    assert not list(tmp_path.iterdir())


def test_file_holds_prompts_and_head_alone(file: Path) -> None:
    tensors = load_file(file)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "prompts": (2, 3, 32),
        "head.weight": (3, 32),
        "head.bias": (3,),
    }
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert file.stat().st_size < 4 * sum(value.numel() for value in tensors.values()) + 2000


def test_adapter_of_a_real_model_is_a_few_hundred_kilobytes(tmp_path: Path) -> None:
    backbone = load_backbone("vit_tiny_patch16_224", **BUNDLED)
    model = PromptedViT(backbone, torch.randn(12, 20, 192), num_classes=100, pool="avg").eval()
    save_adapter(tmp_path / "adapter.safetensors", model)
    assert (tmp_path / "adapter.safetensors").stat().st_size < 400_000

    rebuilt = load_adapter(tmp_path / "adapter.safetensors")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(rebuilt(images), model(images))
    assert rebuilt.backbone is not backbone
    assert rebuilt.backbone.pretrained_cfg["mean"] == backbone.pretrained_cfg["mean"]


def test_rebuilds_the_backbone_from_a_file_of_weights(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {
        "img_size": (16, 24),
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
    }
    weights = tmp_path / "backbone.safetensors"
    save_file(tiny_backbone(img_size=(16, 24)).state_dict(), weights)
    backbone = load_backbone("vit_tiny_patch16_224", checkpoint=weights, **kwargs)
    model = tiny_model(backbone=backbone).eval()
    save_adapter(tmp_path / "adapter.safetensors", model)
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(load_adapter(tmp_path / "adapter.safetensors")(images), model(images))

    # The file is no longer there, or another one is.
    save_file(tiny_backbone(seed=1, img_size=(16, 24)).state_dict(), weights)
    with pytest.raises(AdapterMismatchError, match="weights"):
        load_adapter(tmp_path / "adapter.safetensors")
    weights.unlink()
    with pytest.raises(MissingFileError, match="backbone.safetensors does not exist"):
        load_adapter(tmp_path / "adapter.safetensors")


def test_backbone_from_timm_has_to_be_passed(tmp_path: Path) -> None:
    def from_timm() -> Any:
        torch.manual_seed(0)
        return timm.create_model(
            "vit_tiny_patch16_224",
            img_size=16,
            patch_size=4,
            embed_dim=32,
            depth=2,
            num_heads=2,
            num_classes=0,
        )

    model = tiny_model(backbone=from_timm()).eval()
    save_adapter(tmp_path / "adapter.safetensors", model)
    with pytest.raises(
        InputError, match="vit_tiny_patch16_224.* was not made by load_backbone .*pass the backbone"
    ):
        load_adapter(tmp_path / "adapter.safetensors")
    images = torch.randn(2, 3, 16, 16)
    again = load_adapter(tmp_path / "adapter.safetensors", from_timm())
    assert torch.equal(again(images), model(images))


def test_arguments_that_json_cannot_hold_need_the_backbone(tmp_path: Path) -> None:
    backbone = tiny_backbone(norm_layer=torch.nn.LayerNorm)
    save_adapter(tmp_path / "adapter.safetensors", tiny_model(backbone=backbone))
    with pytest.raises(InputError, match="pass the backbone"):
        load_adapter(tmp_path / "adapter.safetensors")
    assert load_adapter(tmp_path / "adapter.safetensors", backbone).head.out_features == 3


def test_backbone_in_bfloat16_is_the_same_backbone(file: Path, tmp_path: Path) -> None:
    assert load_adapter(file, tiny_backbone().bfloat16())(torch.randn(1, 3, 16, 16)).shape == (1, 3)
    # The other way round: saved by a model whose backbone was cast for training.
    model = tiny_model().cast_backbone(torch.bfloat16)
    save_adapter(tmp_path / "cast.safetensors", model)
    again = load_adapter(tmp_path / "cast.safetensors", tiny_backbone())
    for name, value in learned(model).items():
        assert torch.equal(learned(again)[name], value)


def test_whole_model_in_bfloat16_is_saved_as_float32(tmp_path: Path) -> None:
    model = tiny_model().bfloat16()
    save_adapter(tmp_path / "adapter.safetensors", model)
    adapter = Adapter.load(tmp_path / "adapter.safetensors")
    assert adapter.prompts.dtype == adapter.head_weight.dtype == torch.float32
    assert torch.equal(adapter.prompts, model.prompts.float())


@pytest.mark.parametrize(
    "difference, seed, kwargs",
    [
        ("weights", 1, {}),
        ("depth 3 instead of 2", 0, {"depth": 3}),
        ("embed_dim 64 instead of 32", 0, {"embed_dim": 64}),
        ("num_heads 4 instead of 2", 0, {"num_heads": 4}),
        (r"img_size \[32, 32\] instead of \[16, 16\]", 0, {"img_size": 32}),
        (r"patch_size \[8, 8\] instead of \[4, 4\]", 0, {"patch_size": 8}),
        ("num_prefix_tokens 3 instead of 1", 0, {"reg_tokens": 2}),
    ],
)
def test_wrong_backbone_is_refused_by_its_difference(
    difference: str, seed: int, kwargs: dict[str, Any], file: Path
) -> None:
    with pytest.raises(AdapterMismatchError, match=f"another backbone: this one has .*{difference}"):
        load_adapter(file, tiny_backbone(seed, **kwargs))


def test_one_changed_layer_is_another_backbone(file: Path) -> None:
    """Fine-tuned a little: nothing but the weights tells."""
    backbone = tiny_backbone()
    with torch.no_grad():
        backbone.blocks[1].mlp.fc2.bias.mul_(1.02)
    with pytest.raises(AdapterMismatchError, match=r"this one has weights \w{16} instead of \w{16}$"):
        load_adapter(file, backbone)


def test_another_head_of_timm_is_no_other_backbone(file: Path) -> None:
    assert load_adapter(file, tiny_backbone(num_classes=7)).head.out_features == 3


def test_metadata_is_kept_and_cannot_hide_what_is_needed(tmp_path: Path) -> None:
    metadata = {
        "training": {"epochs": 3, "ema_decay": None},
        "images": {"mean": [0.5, 0.5, 0.5]},
        "pool": "nonsense",
        "note": "é",
    }
    save_adapter(tmp_path / "adapter.safetensors", tiny_model(), metadata=metadata)
    config = Adapter.load(tmp_path / "adapter.safetensors").config
    assert {key: config[key] for key in ("training", "images", "note")} == {
        key: metadata[key] for key in ("training", "images", "note")
    }
    assert (config["pool"], config["version"]) == ("avg", __version__)
    assert config["backbone"]["source"]["name"] == "vit_tiny_patch16_224"
    assert config["backbone"]["source"]["timm_kwargs"]["depth"] == 2


def test_record_can_be_read_without_this_package(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["json"])["classes"] == ["0", "1", "2"]


def test_loading_does_not_share_the_backbones_gradients_or_mode(file: Path) -> None:
    backbone = tiny_backbone().train().requires_grad_(True)
    model = load_adapter(file, backbone)
    assert not model.backbone.training
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "prompts",
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize("kind", ["prototypes", "weights", "random", "empty", "truncated", "text"])
def test_other_files_are_refused(kind: str, file: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.safetensors"
    if kind == "prototypes":
        Prototypes(torch.randn(2, 3, 32)).save(path)
    elif kind == "weights":
        save_file({"prompts": torch.randn(2, 3, 32)}, path)
    else:
        whole = file.read_bytes()
        noise = torch.randint(0, 256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        content = {
            "random": noise.numpy().tobytes(),
            "empty": b"",
            "truncated": whole[:-100],
            "text": b"no" * 99,
        }
        path.write_bytes(content[kind])
    with pytest.raises(CheckpointError, match=rf"{kind}\.safetensors is not an adapter"):
        load_adapter(path, tiny_backbone())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="nowhere.safetensors does not exist .* expected an adapter"):
        load_adapter(tmp_path / "nowhere.safetensors", tiny_backbone())
    with pytest.raises(MissingFileError, match="is not a file; expected an adapter"):
        load_adapter(tmp_path, tiny_backbone())


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_interrupted_save_leaves_the_old_adapter(
    error: type[BaseException], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(before[: len(before) // 2])
        raise error

    monkeypatch.setattr(spt_fast.tensor_files, "save_file", half)
    with pytest.raises(error):
        save_adapter(file, tiny_model(seed=1))
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_saving_again_replaces(file: Path) -> None:
    model = tiny_model(seed=1)
    save_adapter(str(file), model)
    assert torch.equal(Adapter.load(str(file)).prompts, model.prompts)
