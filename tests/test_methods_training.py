"""Every method of tuning learns to read digits, and is the same after its adapter was written and read."""

import pytest
import torch

from spt_fast import Adapter, TrainingConfig, build_prototypes, load_adapter, load_backbone, train
from spt_fast.backbones import image_settings
from spt_fast.data import ImageDataset, load_dataset, make_loader, make_transform
from spt_fast.errors import InputError, UnsupportedModelError
from spt_fast.methods import METHODS, build_model, find_method, model_class

CLASSES = ["0", "1", "2"]


@pytest.fixture(scope="module")
def backbone():
    """The first blocks of the bundled backbone, with few and large patches."""
    model = load_backbone(
        "vit_tiny_patch16_224", checkpoint="bundled:vit_tiny_mae_cifar10", img_size=32, patch_size=8
    )
    model.blocks = model.blocks[:3]
    return model


@pytest.fixture(scope="module")
def digits(backbone):
    """Images of three digits, to learn from and to look at."""
    transform = make_transform("vtab", train=False, **image_settings(backbone))

    def some(split, count):
        samples = [pair for pair in load_dataset("digits", split).samples if pair[1] < len(CLASSES)]
        return ImageDataset(samples[:count], CLASSES, transform=transform, name="digits")

    return some("train", 72), some("val", 48)


@pytest.mark.parametrize("name", METHODS)
def test_learns_and_is_stored(tmp_path, backbone, digits, name):
    if name == "lora":
        pytest.importorskip("peft")
    method = find_method(name)
    prompts = {}
    if method.init == "kmeans":
        loader = make_loader(digits[0], batch_size=24, num_workers=0)
        prompts["prompts"] = build_prototypes(backbone, loader, num_prompts=4, depth=method.depth)
    elif method.depth is not None:
        prompts["num_prompts"] = 4
    original = {key: value.clone() for key, value in backbone.state_dict().items()}
    torch.manual_seed(0)
    model = build_model(name, backbone, num_classes=len(CLASSES), pool="avg", **prompts)
    config = TrainingConfig(
        epochs=3,
        warmup_epochs=1,
        batch_size=8,
        learning_rate=method.learning_rate,
        dtype="float32",
        num_workers=0,
        val_interval=3,
    )
    result = train(model, *digits, output=tmp_path / "run", config=config)
    assert result.metrics[-1]["val_accuracy"] > 0.6, result.metrics
    assert all(torch.equal(value, original[key]) for key, value in backbone.state_dict().items())

    file = tmp_path / "run" / "last.safetensors"
    assert Adapter.load(file).method == model.name
    loaded = load_adapter(file, backbone)
    assert (type(loaded), loaded.options, loaded.classes) == (type(model), model.options, CLASSES)
    for key, value in model.task_state().items():
        assert torch.equal(loaded.task_state()[key], value), key
    images = torch.stack([digits[1][index][0] for index in range(8)])
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("prefix", {}, "method must be one of spt_shallow, .* got 'prefix'"),
        (
            "adapter",
            {"rank": 4},
            "rank is no option of adapter; it has bottleneck, placement, checkpoint_blocks",
        ),
        ("linear", {"prompts": torch.zeros(1, 4, 192)}, "prompts was given and linear has no prompts"),
        ("ssf", {"num_prompts": 4}, "num_prompts was given and ssf has no prompts"),
        ("spt_deep", {}, "spt_deep starts from prototypes: pass prompts=build_prototypes"),
        ("vpt_deep", {"num_prompts": 0}, "num_prompts must be a whole number of at least 1, got 0"),
        (
            "vpt_deep",
            {"prompts": torch.zeros(3, 4, 192), "num_prompts": 4},
            "prompts and num_prompts were given",
        ),
        (
            "vpt_deep",
            {"prompts": torch.zeros(1, 4, 192)},
            r"vpt_deep takes prompts \[3, P, D\] .* got \[1, 4, 192\]",
        ),
        ("snf", {"pool": "avg_with_prompts"}, "needs prompts, and snf has none"),
        ("linear", {"num_classes": 0}, "num_classes must be a whole number of at least 1, got 0"),
        ("vpt_deep", {"num_prompts": "5"}, "num_prompts must be a whole number of at least 1, got '5'"),
        ("vpt_deep", {"num_prompts": 2.5}, "num_prompts must be a whole number of at least 1, got 2.5"),
        ("vapt", {"num_prompts": True}, "num_prompts must be a whole number of at least 1, got True"),
        ("vapt", {"rank": 4}, "it has kernel_size, hidden_dim, channel_dropout, checkpoint_blocks"),
        ("linear", {"checkpoint_blocks": "yes"}, "checkpoint_blocks must be True or False, got 'yes'"),
        (["lora"], {}, r"method must be one of spt_shallow, .* got \['lora'\]"),
        (None, {}, "method must be one of spt_shallow, .* got None"),
    ],
)
def test_errors_of_build_model(backbone, name, arguments, message):
    with pytest.raises(InputError, match=message):
        build_model(name, backbone, **{"num_classes": 3, "pool": "avg", **arguments})


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_vision_transformer_is_refused(name):
    with pytest.raises(UnsupportedModelError, match="Linear cannot be prompted"):
        build_model(name, torch.nn.Linear(3, 3), num_classes=3)


def test_names():
    assert {model_class(method.model.name) for method in METHODS.values()} == {
        method.model for method in METHODS.values()
    }
    with pytest.raises(InputError, match="there is no method 'prefix' here; there are prompted, "):
        model_class("prefix")
