"""Methods that change the backbone: in which precision it learns, what of it, and that nothing else is built on it."""

import pytest
import torch
from tiny import noise, squares, tiny_backbone

import spt_fast
from spt_fast import Adapter, load_adapter, save_adapter
from spt_fast.errors import CheckpointError, InputError, UnsupportedModelError
from spt_fast.methods import build_model

LEARNING = ["full", "bitfit"]
CHANGING = [*LEARNING, "lora"]


def changing(name, backbone):
    if name == "lora":
        pytest.importorskip("peft")
    return build_model(name, backbone, num_classes=3, pool="avg")


@pytest.mark.parametrize("name", LEARNING)
def test_what_learns_of_a_bfloat16_backbone_is_float32(tmp_path, name):
    backbone = tiny_backbone().bfloat16()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    model = changing(name, backbone).eval()
    assert {value.dtype for value in model.task_state().values()} == {torch.float32}
    images = noise(4, size=16)
    assert model(images).dtype == torch.float32

    with torch.no_grad():
        for value in model.added_parameters().values():
            value.add_(1e-4 * torch.randn_like(value))
    save_adapter(tmp_path / "adapter.safetensors", model)
    for where in (backbone, tiny_backbone().bfloat16().float()):
        again = load_adapter(tmp_path / "adapter.safetensors", where)
        assert torch.equal(again(images), model(images))
    for key, value in backbone.state_dict().items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, before[key])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LEARNING)
def test_steps_that_bfloat16_would_lose_are_taken(tmp_path, name, dtype):
    model = changing(name, tiny_backbone().bfloat16())
    before = {key: value.detach().clone() for key, value in model.added_parameters().items()}
    config = spt_fast.TrainingConfig(
        epochs=1, warmup_epochs=0, batch_size=4, learning_rate=1e-5, dtype=dtype, num_workers=0
    )
    spt_fast.train(model, squares(8), output=tmp_path, config=config)
    moved = sum(int((value != before[key]).sum()) for key, value in model.added_parameters().items())
    assert moved > 0.9 * sum(value.numel() for value in before.values())
    assert model.compute_dtype == (torch.bfloat16 if dtype == "bfloat16" else None)


@pytest.mark.parametrize("name", LEARNING)
def test_what_the_pooling_does_not_read_does_not_learn(make_backbone, name):
    backbone = make_backbone("vit_base_patch16_siglip_224")
    for pool, read in (("avg", False), (None, True)):
        model = build_model(name, backbone, num_classes=3, pool=pool)
        learning = model.added_parameters()
        assert any(key.startswith("backbone.attn_pool.") for key in learning) == read
        model(noise(2)).sum().backward()
        assert not [key for key, value in learning.items() if value.grad is None]


@pytest.mark.parametrize("name", CHANGING)
def test_no_other_model_is_built_on_a_changed_backbone(tmp_path, name):
    model = changing(name, tiny_backbone())
    stored = {key: value.detach().clone() for key, value in model.task_state().items()}
    for other in ("linear", "vpt_deep", name):
        with pytest.raises(InputError, match="pass the backbone that was loaded"):
            build_model(other, model.backbone, num_classes=3, pool="avg")
    # Nothing of the model was frozen on the way.
    assert all(torch.equal(value, stored[key]) for key, value in model.task_state().items())
    assert model.task_state().keys() == stored.keys()

    save_adapter(tmp_path / "linear.safetensors", build_model("linear", tiny_backbone(), num_classes=3))
    with pytest.raises(InputError, match="cannot be used here: .*pass the backbone that was loaded"):
        load_adapter(tmp_path / "linear.safetensors", model.backbone)


@pytest.mark.parametrize("name", CHANGING)
def test_a_sound_adapter_on_8_bit_weights_is_not_called_damaged(tmp_path, name):
    backbone, file = tiny_backbone(), tmp_path / "adapter.safetensors"
    save_adapter(file, changing(name, backbone))
    backbone.spt_fast_source = {"weight_dtype": "int8"}
    with pytest.raises(
        UnsupportedModelError, match=f"of {name} cannot be used here: .*8-bit weights"
    ) as caught:
        load_adapter(file, backbone)
    assert not isinstance(caught.value, CheckpointError)


def test_a_damaged_adapter_is_called_one(tmp_path):
    backbone, file = tiny_backbone(), tmp_path / "adapter.safetensors"
    save_adapter(file, build_model("adapter", backbone, num_classes=3))
    for options in ({"bottleneck": 0}, {"bottleneck": "abc"}, {"unknown": 1}, {"bottleneck": 3}):
        adapter = Adapter.load(file)
        adapter.config["tuning"]["options"] = options
        with pytest.raises(CheckpointError, match="this is not an adapter of adapter"):
            adapter.attach(backbone)
