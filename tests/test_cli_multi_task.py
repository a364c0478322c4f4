"""`spt-fast predict` with several adapters: each answers as it does alone, in one batch, under a name of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import COLOURS, Done, check_refused, make_photos, run
from timm.models.vision_transformer import VisionTransformer

from spt_fast import MultiTaskViT, PromptedViT, load_adapter, load_backbone, save_adapter
from spt_fast.backbones import image_settings
from spt_fast.cli import commands
from spt_fast.data import make_transform, read_image

BUNDLED: dict[str, Any] = {"checkpoint": "bundled:vit_tiny_mae_cifar10", "img_size": 32, "patch_size": 4}


@pytest.fixture(scope="module")
def backbone() -> VisionTransformer:
    return load_backbone("vit_tiny_patch16_224", **BUNDLED)


def write_adapter(
    path: Path,
    backbone: VisionTransformer,
    classes: list[str],
    *,
    num_layers: int = 12,
    num_prompts: int = 3,
    pool: Any = "avg",
    **images: Any,
) -> Path:
    """A random task; ``images`` is what it says of its images."""
    generator = torch.Generator().manual_seed(len(classes))
    prompts = torch.randn(num_layers, num_prompts, backbone.embed_dim, generator=generator)
    model = PromptedViT(backbone, prompts, num_classes=len(classes), pool=pool)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=generator))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(path, model, classes=classes, metadata={"images": {**image_settings(backbone), **images}})
    return path


@pytest.fixture(scope="module")
def adapters(backbone: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three tasks that differ in everything; two of them have the same file name."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(root / "birds" / "best.safetensors", backbone, ["wren", "jay", "owl", "kite"]),
        write_adapter(
            root / "cars.safetensors", backbone, ["van", "bus"], num_layers=1, num_prompts=5, recipe="fgvc"
        ),
        write_adapter(
            root / "dogs" / "best.safetensors",
            backbone,
            ["pug", "boxer", "borzoi"],
            pool="avg_with_prompts",
            recipe="vtab",
            mean=[0.2, 0.3, 0.4],
        ),
    ]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = make_photos(tmp_path_factory.mktemp("data") / "photos", {"test": 1})
    return [root / "test" / colour / "0.png" for colour in COLOURS]


def predict(adapters: list[Path], *arguments: object) -> Done:
    return run(
        "predict", *(word for each in adapters for word in ("--adapter", each)), *arguments, "--device", "cpu"
    )


def expected_probabilities(
    adapter: Path, picture: Path, backbone: VisionTransformer, **settings: Any
) -> dict[str, float]:
    """By the adapter alone."""
    transform = make_transform(train=False, **{"recipe": "vtab", **image_settings(backbone), **settings})
    model = load_adapter(adapter, backbone)
    with torch.no_grad():
        row = model(transform(read_image(picture))[None])[0].softmax(dim=0)
    return dict(zip(model.classes or [], row.tolist(), strict=True))


SETTINGS: list[dict[str, Any]] = [{}, {"recipe": "fgvc"}, {"mean": (0.2, 0.3, 0.4)}]


@pytest.mark.parametrize("at_once", [64, 6, 1], ids="{} rows at once".format)
def test_each_adapter_answers_as_alone(
    adapters: list[Path],
    pictures: list[Path],
    backbone: VisionTransformer,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commands, "PREDICTED_AT_ONCE", at_once)
    sizes = []
    original = MultiTaskViT.forward

    def spy(self: MultiTaskViT, images: torch.Tensor, tasks: list[str]) -> torch.Tensor:
        sizes.append(len(images))
        return original(self, images, tasks)

    monkeypatch.setattr(MultiTaskViT, "forward", spy)
    done = predict(adapters, *pictures, "--top", 9, "--json")
    assert done.code == 0, done.err
    # Whole images, at least one, with all tasks in one batch.
    assert sizes == {64: [9], 6: [6, 3], 1: [3, 3, 3]}[at_once]
    names = [str(adapters[0]), "cars", str(adapters[2])]
    assert [(entry["image"], entry["task"]) for entry in done.json] == [
        (str(picture), name) for picture in pictures for name in names
    ]
    answers = iter(done.json)
    found_in_all = []
    for picture in pictures:
        for adapter, settings in zip(adapters, SETTINGS, strict=True):
            predictions = next(answers)["predictions"]
            probabilities = [prediction["probability"] for prediction in predictions]
            assert probabilities == sorted(probabilities, reverse=True)
            found = {prediction["class"]: prediction["probability"] for prediction in predictions}
            assert found == pytest.approx(
                expected_probabilities(adapter, picture, backbone, **settings), abs=1e-5
            )
            found_in_all.append(found)
    assert found_in_all[1] != pytest.approx(found_in_all[4], abs=1e-3)  # pictures differ
    # The settings of its images matter to the third adapter, so that the right ones were used above.
    plain = expected_probabilities(adapters[2], pictures[0], backbone)
    assert plain != pytest.approx(found_in_all[2], abs=1e-3)


def test_the_table_names_image_and_task_once(
    adapters: list[Path], pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures[0].parent)  # so that the names fit into the table's first column
    done = predict(adapters[:2], pictures[0].name, pictures[0].name, "--top", 2)
    assert done.code == 0, done.err
    header, *rows = [line for line in done.out.splitlines() if line.strip(" ━─┏┓┡┩└┘┳╇┴┼╋")]
    assert header.replace("┃", " ").split() == ["image", "task", "class", "probability"]
    cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
    assert [bool(row[0]) for row in cells] == [True, False, False, False] * 2
    assert [row[1] for row in cells] == ["best", "", "cars", ""] * 2
    assert all(row[2] and row[3].endswith("%") for row in cells)
    assert {row[2] for row in cells[2:4]} == {"van", "bus"}


def test_one_adapter_has_no_task(adapters: list[Path], pictures: list[Path]) -> None:
    done = predict(adapters[1:2], pictures[0], "--json")
    assert done.code == 0 and [set(entry) for entry in done.json] == [{"image", "predictions"}]
    done = predict(adapters[1:2], pictures[0])
    assert done.code == 0, done.err
    (header,) = (line for line in done.out.splitlines() if "probability" in line)
    assert header.replace("┃", " ").split() == ["image", "class", "probability"]


def test_what_cannot_be_asked_together(
    adapters: list[Path], pictures: list[Path], backbone: VisionTransformer, tmp_path: Path
) -> None:
    other = load_backbone("vit_tiny_patch16_224", **BUNDLED)
    with torch.no_grad():
        other.blocks[3].mlp.fc1.bias.add_(1)
    elsewhere = write_adapter(tmp_path / "elsewhere.safetensors", other, ["a", "b"])
    check_refused(
        predict([adapters[1], elsewhere], pictures[0]), "task 'elsewhere'", "another backbone", "weights"
    )
    check_refused(predict([adapters[1]] * 2, pictures[0]), f"--adapter {adapters[1]} was given 2 times")
    check_refused(predict([adapters[0], tmp_path / "none"], pictures[0]), "none does not exist")
    check_refused(predict([adapters[0], pictures[0]], pictures[0]), "is not an adapter")

    flexible = load_backbone("vit_tiny_patch16_224", **BUNDLED, dynamic_img_size=True)
    small = write_adapter(tmp_path / "small.safetensors", flexible, ["a", "b"])
    large = write_adapter(tmp_path / "large.safetensors", flexible, ["a", "b"], image_size=[32, 48])
    check_refused(predict([small, large], pictures[0]), "different sizes", "small 32x32", "large 32x48")
    assert predict([large], pictures[0]).code == 0
