"""Segmentation: the model against one patch at a time, masks from files, and the mean intersection over union."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import noise, tiny_backbone, tiny_model
from torch.nn import functional as F
from torch.utils.data import DataLoader

from spt_fast import build_prototypes, load_adapter, save_adapter
from spt_fast.backbones import image_settings
from spt_fast.data import MaskFolder, MaskTransform
from spt_fast.errors import InputError, MissingFileError
from spt_fast.mean_iou import MeanIoU
from spt_fast.optimizer import PromptAdamW
from spt_fast.segmentation import SegmentationViT

CLASSES = ["sky", "tree", "water"]
HALVES = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


# --- The model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [True, False])
def test_every_pixel_has_the_interpolated_answers_of_the_patches(deep):
    model = tiny_model(deep=deep, num_classes=5).double()
    images = noise(3, size=16).double()
    found = SegmentationViT(model)(images)
    assert found.shape == (3, 5, 16, 16)
    with torch.no_grad():
        features = model.forward_features(images, patch_grid=True)
        answers = torch.zeros(3, 5, 4, 4).double()
        for row in range(4):
            for column in range(4):
                answers[:, :, row, column] = (
                    features[:, :, row, column] @ model.head.weight.T + model.head.bias
                )
    # A pixel lies between the middles of patches, which are 4 pixels apart, the first at 1.5.
    for y, x in ((0, 0), (1, 9), (7, 3), (15, 12)):
        rows, columns = (min(max((pixel - 1.5) / 4, 0), 3) for pixel in (y, x))
        top, left = int(rows), int(columns)
        down, right = rows - top, columns - left
        bottom, beside = min(top + 1, 3), min(left + 1, 3)
        expected = (1 - down) * ((1 - right) * answers[:, :, top, left] + right * answers[:, :, top, beside])
        expected += down * ((1 - right) * answers[:, :, bottom, left] + right * answers[:, :, bottom, beside])
        torch.testing.assert_close(found[:, :, y, x], expected)


def test_prompts_and_head_learn_and_nothing_else():
    segmenter = SegmentationViT(tiny_model(), num_classes=2)
    model: Any = segmenter.model
    assert segmenter.head.weight.shape == (2, 32) and model.head is segmenter.head
    learning = {name for name, parameter in segmenter.named_parameters() if parameter.requires_grad}
    assert learning == {"model.prompts", "model.head.weight", "model.head.bias"}
    frozen = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    images = noise(6, size=16)
    # Of each patch, whether it is more red than not.
    masks = (F.avg_pool2d(images[:, 0], 4) > 0).long().repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    masks[:, :, 0] = 255
    optimizer = PromptAdamW(model.prompts, model.head, lr=0.05, weight_decay=0.0, head_weight_decay=0.0)
    before = model.prompts.detach().clone()
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(segmenter.train()(images), masks, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert not torch.equal(model.prompts, before) and not model.backbone.training
    assert all(torch.equal(value, frozen[name]) for name, value in model.backbone.state_dict().items())


def test_an_adapter_keeps_the_task(tmp_path):
    segmenter = SegmentationViT(tiny_model(), num_classes=4).eval()
    save_adapter(tmp_path / "shapes.safetensors", segmenter.model)
    again = SegmentationViT(load_adapter(tmp_path / "shapes.safetensors", tiny_backbone())).eval()
    images = noise(2, size=16)
    assert torch.equal(again(images), segmenter(images))


def test_a_half_precision_backbone_answers_in_the_precision_of_the_head():
    model = tiny_model().cast_backbone(torch.bfloat16)
    logits = SegmentationViT(model)(noise(2, size=16))
    assert logits.dtype == torch.float32 and logits.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, True, "3"])
def test_a_number_of_classes_that_is_none_is_refused(num_classes):
    with pytest.raises(InputError, match="num_classes must be a whole number of at least 1"):
        SegmentationViT(tiny_model(), num_classes)
    with pytest.raises(InputError, match="model must be a TunedViT such as PromptedViT, got Linear"):
        SegmentationViT(torch.nn.Linear(2, 2), 3)


# --- The measure -------------------------------------------------------------------------------------------------


def naive_iou(predicted: np.ndarray, masks: np.ndarray, classes: int) -> list[float]:
    found = []
    for each in range(classes):
        a = {i for i in np.ndindex(masks.shape) if predicted[i] == each and masks[i] != 255}
        b = {i for i in np.ndindex(masks.shape) if masks[i] == each}
        found.append(len(a & b) / len(a | b) if a | b else math.nan)
    return found


def test_streamed_batches_give_what_sets_of_pixels_give():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 4, (7, 9, 5), generator=generator)  # of 6 classes, two never occur
    predicted = torch.where(torch.rand(7, 9, 5, generator=generator) < 0.6, masks, masks.flip(0))
    masks[torch.rand(7, 9, 5, generator=generator) < 0.2] = 255
    measure = MeanIoU(6)
    for start, end in ((0, 3), (3, 3), (3, 7)):
        measure.update(predicted[start:end], masks[start:end])
    expected = naive_iou(predicted.numpy(), masks.numpy(), 6)
    assert measure.per_class == pytest.approx(expected, nan_ok=True) and math.isnan(measure.per_class[5])
    assert measure.mean == pytest.approx(np.nanmean(expected)) and measure.mean < 1
    counted = masks != 255
    assert measure.accuracy == pytest.approx((predicted == masks)[counted].double().mean().item())
    assert measure.confusion.sum() == counted.sum()


def test_what_cannot_be_counted_is_refused():
    measure = MeanIoU(3)
    with pytest.raises(InputError, match="no pixel was counted"):
        _ = measure.mean
    measure.update(torch.zeros(2, 2).long(), torch.full((2, 2), 255))
    with pytest.raises(InputError, match="no pixel was counted"):
        _ = measure.accuracy
    with pytest.raises(InputError, match=r"one shape, got \[2, 2\] and \[2, 3\]"):
        measure.update(torch.zeros(2, 2).long(), torch.zeros(2, 3).long())
    with pytest.raises(InputError, match="masks must hold class ids from 0 to 2, got 0 to 3"):
        measure.update(torch.zeros(2).long(), torch.tensor([0, 3]))
    with pytest.raises(InputError, match="predicted must hold class ids from 0 to 2, got -1 to 0"):
        measure.update(torch.tensor([0, -1]), torch.zeros(2).long())


# --- The files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path) -> Path:
    """Pictures of 12 x 10 pixels: 0 is a JPEG file, 1 and 2 are PNG files; the mask of 2 has a palette."""
    generator = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for index, suffix in enumerate(("jpg", "png", "png")):
        pixels = generator.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.{suffix}")
        ids = generator.integers(0, 3, (10, 12), dtype=np.uint8)
        ids[0, 0] = 255
        mask = Image.fromarray(ids)
        if index == 2:
            mask = mask.convert("P")
            mask.putpalette(generator.integers(0, 256, 768, dtype=np.uint8).tobytes())
        mask.save(tmp_path / "masks" / f"{index}.png")
    (tmp_path / "images" / ".hidden.png").write_bytes(b"")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path


def folder(root: Path, **settings: Any) -> MaskFolder:
    return MaskFolder(
        root, CLASSES, transform=MaskTransform(**{"image_size": (10, 12), **HALVES, **settings})
    )


def test_files_become_images_and_ids(root):
    data = folder(root)
    assert len(data) == 3 and [image.name for image, _ in data.samples] == ["0.jpg", "1.png", "2.png"]
    for index in range(3):
        image, mask = data[index]
        path, mask_path = data.samples[index]
        pixels = torch.from_numpy(np.array(Image.open(path))).movedim(2, 0)
        torch.testing.assert_close(image, pixels / 127.5 - 1)
        assert mask.dtype == torch.int64
        assert torch.equal(mask, torch.from_numpy(np.array(Image.open(mask_path))).long())
        assert mask[0, 0] == 255 and set(mask.unique().tolist()) == {0, 1, 2, 255}


def test_image_and_mask_are_resized_together_without_new_ids(root):
    image, mask = folder(root, image_size=(15, 30))[1]
    assert image.shape == (3, 15, 30) and mask.shape == (15, 30)
    ids = np.array(Image.open(root / "masks" / "1.png"))
    nearest = [
        [ids[int((y + 0.5) * 10 / 15), int((x + 0.5) * 12 / 30)] for x in range(30)] for y in range(15)
    ]
    assert torch.equal(mask, torch.tensor(np.array(nearest)).long())
    smooth = Image.open(root / "images" / "1.png").resize((30, 15), Image.Resampling.BICUBIC)
    torch.testing.assert_close(image, torch.from_numpy(np.array(smooth)).movedim(2, 0) / 127.5 - 1)


def test_batches_serve_prototypes_and_segmentation(root):
    backbone = tiny_backbone()
    batches = DataLoader(MaskFolder(root, CLASSES, transform=MaskTransform(**image_settings(backbone))), 2)
    assert build_prototypes(backbone, batches, num_prompts=3, method="mean_pool").values.shape == (2, 3, 32)
    measure = MeanIoU(3)
    for images, masks in batches:
        assert masks.shape[1:] == (16, 16)
        measure.update(SegmentationViT(tiny_model())(images).argmax(dim=1), masks)
    assert 0 <= measure.mean < 1


def save_mask(path: Path, ids: Any) -> None:
    Image.fromarray(np.asarray(ids)).save(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: (root / "masks" / "1.png").unlink(),
            "images/1.png has no mask: .*masks/1.png does not",
        ),
        (lambda root: (root / "images").rename(root / "pictures"), "images does not exist"),
        (lambda root: (root / "masks").rename(root / "ids"), "masks does not exist; expected"),
        (lambda root: Image.new("RGB", (4, 4)).save(root / "images" / "1.jpg"), "would have one mask"),
        (
            lambda root: save_mask(root / "masks" / "1.png", np.zeros((12, 10), np.uint8)),
            "masks/1.png is 10x12 pixels and image .*images/1.png is 12x10",
        ),
        (
            lambda root: save_mask(root / "masks" / "1.png", np.full((10, 12), 7, np.uint8)),
            "masks/1.png holds the id 7; expected 0 to 2, one for each of the 3 classes, or 255",
        ),
        (
            lambda root: save_mask(root / "masks" / "1.png", np.zeros((10, 12, 3), np.uint8)),
            "masks/1.png has 3 channels; expected one",
        ),
        (
            lambda root: (root / "masks" / "1.png").write_bytes(b"no"),
            "masks/1.png cannot be read as an image",
        ),
        (
            lambda root: (root / "images" / "1.png").write_bytes(b"no"),
            "images/1.png cannot be read as an image",
        ),
    ],
)
def test_files_that_do_not_fit_are_named(root, spoil, message):
    spoil(root)
    with pytest.raises((InputError, MissingFileError), match=message):
        _ = folder(root)[1]


def test_no_images_and_too_many_classes_are_refused(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="images has no images"):
        folder(tmp_path)
    transform = MaskTransform(image_size=8, **HALVES)
    for count in (0, 256):
        with pytest.raises(InputError, match=f"classes must be 1 to 255 names, got {count}"):
            MaskFolder(tmp_path, [str(index) for index in range(count)], transform=transform)
    with pytest.raises(InputError, match="std must be positive"):
        MaskTransform(image_size=8, mean=(0.5,) * 3, std=(0, 1, 1))
