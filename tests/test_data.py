"""Readers, transforms and augmentation on small generated images."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import (
    MEAN,
    STD,
    in_memory,
    noise,
    sources,
    transform,
    truncated_jpeg,
    write_classes,
    write_image,
)
from PIL import Image
from torchvision import transforms as tv1
from torchvision.transforms import v2

from spt_fast.data import ImageDataset, load_dataset, make_loader, make_transform, read_image
from spt_fast.data.splits import stratified_split
from spt_fast.errors import InputError, MissingFileError

# ---------------------------------------------------------------- transforms


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (10, 12)])
def test_fgvc_test_transform_is_resize_256_crop_224(size):
    image = noise(3, size)
    expected = tv1.Compose(
        [
            tv1.Resize(37),
            tv1.CenterCrop(32),
            tv1.ToTensor(),
            tv1.Normalize(MEAN, STD),
        ]  # 37 = round(32 * 256 / 224)
    )(image)
    torch.testing.assert_close(transform("fgvc", train=False, size=32)(image), expected)


@pytest.mark.parametrize("train", [True, False])
def test_vtab_transform_is_a_plain_resize(train):
    image = noise(4, (40, 60))
    expected = tv1.Compose([tv1.Resize((24, 32)), tv1.ToTensor(), tv1.Normalize(MEAN, STD)])(image)
    actual = make_transform("vtab", image_size=(24, 32), mean=MEAN, std=STD, train=train)(image)
    assert type(actual) is torch.Tensor and actual.dtype == torch.float32 and actual.shape == (3, 24, 32)
    torch.testing.assert_close(actual, expected)


def test_fgvc_training_transform_is_random_resized_crop_and_flip():
    image = noise(5, (40, 60))
    reference = v2.Compose(
        [v2.RandomResizedCrop(16), v2.RandomHorizontalFlip(), tv1.ToTensor(), v2.Normalize(MEAN, STD)]
    )
    results = []
    for seed in range(4):
        torch.manual_seed(seed)
        expected = reference(image)
        torch.manual_seed(seed)
        results.append(transform("fgvc", size=16)(image))
        torch.testing.assert_close(results[-1], expected)
    assert not torch.equal(results[0], results[1])


def test_oblong_crop_never_reaches_outside_the_image():
    white = Image.new("RGB", (30, 30), "white")
    cropped = make_transform("fgvc", image_size=(16, 32), mean=(0,) * 3, std=(1,) * 3, train=False)(white)
    assert cropped.shape == (3, 16, 32) and bool((cropped == 1).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "imagenet"}, "recipe must be one of fgvc, vtab, got 'imagenet'"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": (8, 8, 8)}, "image_size"),
        ({"mean": (0.5,)}, "mean must be three numbers"),
        ({"std": (1, 1, "x")}, "std must be three numbers"),
        ({"std": (1, 1, 0)}, "std must be positive"),
    ],
)
def test_transform_refuses_bad_arguments(changes, message):
    arguments = {"recipe": "vtab", "image_size": 8, "mean": MEAN, "std": STD, "train": True} | changes
    with pytest.raises(InputError, match=message):
        make_transform(arguments.pop("recipe"), **arguments)


# ------------------------------------------------------------------ decoding


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    noise(6).convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (16, 20)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    levels = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    assert np.array_equal(
        np.asarray(read_image(tmp_path / "grey.png"))[..., 0], np.arange(256).reshape(16, 16)
    )


def test_damaged_files_are_input_errors_that_name_them(tmp_path, monkeypatch):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    png = write_image(tmp_path / "cut.png", size=(64, 64)).read_bytes()
    (tmp_path / "cut.png").write_bytes(png[:-2000])
    truncated_jpeg(tmp_path / "cut.jpg")
    for name in ["empty.jpg", "text.jpg", "cut.png", "cut.jpg"]:
        with pytest.raises(InputError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(MissingFileError, match="nowhere.jpg"):
        read_image(tmp_path / "nowhere.jpg")
    bomb = write_image(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"bomb.png.*decompression bomb"):
        read_image(bomb)


# ------------------------------------------------------------------- dataset


def test_unreadable_image_is_none_or_an_error(tmp_path):
    samples = [(truncated_jpeg(tmp_path / "cut.jpg"), 0), (write_image(tmp_path / "whole.png"), 1)]
    dataset = ImageDataset(samples, ["a", "b"])
    assert dataset[0] is None
    image, label = dataset[1]
    assert image.shape == (3, 20, 16) and label == 1 and image.min() >= 0 and image.max() <= 1
    with pytest.raises(InputError, match="cut.jpg"):
        ImageDataset(samples, ["a", "b"], strict=True)[0]


def test_augmentation_depends_on_seed_epoch_and_index_only():
    dataset = in_memory(3)
    first = dataset[1][0]
    torch.manual_seed(99)
    assert torch.equal(dataset[1][0], first) and torch.equal(dataset[-2][0], first)
    dataset.set_epoch(1)
    assert not torch.equal(dataset[1][0], first)
    dataset.set_epoch(0)
    assert torch.equal(dataset[1][0], first)
    assert not torch.equal(in_memory(3, seed=1)[1][0], first)
    same = ImageDataset([(noise(0), 0)] * 2, ["a"], transform=transform("fgvc"))
    assert not torch.equal(same[0][0], same[1][0])


def test_global_random_state_is_left_alone():
    dataset = in_memory(5)
    before = torch.get_rng_state()
    for num_workers in (0, 1):
        list(make_loader(dataset, batch_size=2, shuffle=True, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_subset_and_with_transform_leave_the_original_alone():
    dataset = in_memory(6)
    smaller = dataset.subset([4, 0])
    assert smaller.targets == [1, 0] and smaller.classes == dataset.classes and len(dataset) == 6
    plain = dataset.with_transform(None)
    assert plain[0][0].shape == (3, 20, 16) and dataset[0][0].shape == (3, 8, 8)


def test_dataset_refuses_bad_arguments():
    with pytest.raises(InputError, match="empty"):
        ImageDataset([], ["a"])
    with pytest.raises(InputError, match="label 1 .* 1 classes"):
        ImageDataset([(noise(0), 1)], ["a"])
    with pytest.raises(InputError, match="seed"):
        ImageDataset([(noise(0), 0)], ["a"], seed=-1)
    with pytest.raises(InputError, match="epoch"):
        in_memory(1).set_epoch(-1)
    with pytest.raises(InputError, match="indices"):
        in_memory(1).subset([])


# -------------------------------------------------------------------- splits


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_stratified_split_is_exact_and_keeps_every_class(counts, share, seed):
    targets = np.random.RandomState(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    held_out = int(share * (len(targets) - len(counts)))
    kept, held = stratified_split(targets.tolist(), held_out, seed=seed)
    assert sorted(kept + held) == list(range(len(targets))) and len(held) == held_out
    assert set(targets[kept].tolist()) == set(range(len(counts)))
    assert (kept, held) == stratified_split(targets.tolist(), held_out, seed=seed)


def test_stratified_split_takes_its_share_of_every_class():
    targets = np.repeat([0, 1, 2], [100, 50, 10])
    _, held = stratified_split(targets.tolist(), 16)
    assert np.bincount(targets[held]).tolist() == [10, 5, 1]


# ------------------------------------------------------------- folder layout


def test_folder_with_splits(tmp_path):
    write_classes(tmp_path / "train", {"cat": 3, "Dog": 2}, ".JPG")
    write_classes(tmp_path / "valid", {"cat": 1})
    write_classes(tmp_path / "test", {"Dog": 2, "cat": 1})
    (tmp_path / "train/cat/notes.txt").write_text("not an image, and not counted")
    (tmp_path / "train/cat/._0.jpg").write_text("left by another file system")
    (tmp_path / "train/.cache").mkdir()
    splits = {split: load_dataset(tmp_path, split) for split in ("train", "val", "trainval", "test")}
    assert all(dataset.classes == ["Dog", "cat"] for dataset in splits.values())
    assert {split: dataset.targets for split, dataset in splits.items()} == {
        "train": [0, 0, 1, 1, 1],
        "val": [1],
        "trainval": [0, 0, 1, 1, 1, 1],
        "test": [0, 0, 1],
    }
    assert splits["test"].recipe == "fgvc" and splits["test"].name == f"{tmp_path.name}/test"
    assert sources(splits["train"]) | sources(splits["val"]) == sources(splits["trainval"])


@pytest.mark.parametrize("below", ["", "train"])
def test_folder_without_val_holds_a_tenth_back(tmp_path, below):
    write_classes(tmp_path / below, {"a": 20, "b": 10, "c": 1})
    train, val, both = (load_dataset(tmp_path, split) for split in ("train", "val", "trainval"))
    assert sorted(val.targets) == [0, 0, 1] and set(train.targets) == {0, 1, 2}
    assert not sources(train) & sources(val) and sources(train) | sources(val) == sources(both)
    assert sources(load_dataset(tmp_path, "val", seed=5)) == sources(val)
    with pytest.raises(InputError, match="split 'test' is not in"):
        load_dataset(tmp_path, "test")


def test_folder_with_test_alone(tmp_path):
    write_classes(tmp_path / "test", {"a": 1, "b": 1})
    assert load_dataset(tmp_path, "test").targets == [0, 1]
    with pytest.raises(InputError, match="split 'train' is not in .* which has: test"):
        load_dataset(tmp_path, "train")


def test_folder_splits_must_agree_on_classes(tmp_path):
    write_classes(tmp_path / "train", {"a": 2, "b": 2})
    write_classes(tmp_path / "val", {"a": 1, "zebra": 1})
    with pytest.raises(InputError, match="val has classes that .*train has not: zebra"):
        load_dataset(tmp_path)


def test_folders_without_images_are_errors(tmp_path):
    with pytest.raises(InputError, match="no images .* looked for: VTAB-1k lists .* class folders"):
        load_dataset(tmp_path)
    with pytest.raises(InputError, match="no class folders"):
        load_dataset(tmp_path, layout="folder")
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="no images"):
        load_dataset(tmp_path)
    write_classes(tmp_path, {"b": 2})
    with pytest.raises(InputError, match="class folder .*a has no images"):
        load_dataset(tmp_path)
    (tmp_path / "a").rmdir()
    assert len(load_dataset(tmp_path, "trainval")) == 2
    (tmp_path / "b/1.png").unlink()
    with pytest.raises(InputError, match="one image a class"):
        load_dataset(tmp_path)


def test_two_validation_folders_are_ambiguous(tmp_path):
    for name in ("train", "val", "valid"):
        write_classes(tmp_path / name, {"a": 2})
    with pytest.raises(InputError, match="two val folders"):
        load_dataset(tmp_path)


# --------------------------------------------------------------- VTAB layout


def write_vtab(root):
    lists = {
        "train800.txt": [("images/train/0.png", 0), ("images/train/one of them.png", 4)],
        "val200.txt": [("images/train/2.png", 1)],
        "test.txt": [("images/test/0.png", 2)],
    }
    lists["train800val200.txt"] = lists["train800.txt"] + lists["val200.txt"]
    for name, rows in lists.items():
        for path, _ in rows:
            write_image(root / path)
        (root / name).write_text("".join(f"{path} {label}\n" for path, label in rows) + "\n")


def test_vtab_lists(tmp_path):
    write_vtab(tmp_path)
    targets = {split: load_dataset(tmp_path, split).targets for split in ("train", "val", "trainval", "test")}
    assert targets == {"train": [0, 4], "val": [1], "trainval": [0, 4, 1], "test": [2]}
    test = load_dataset(tmp_path, "test", transform=transform(), strict=True)
    assert test.classes == ["0", "1", "2", "3", "4"] and test.recipe == "vtab"
    assert test[0][0].shape == (3, 8, 8)


def test_vtab_paths_below_images_and_windows_line_ends(tmp_path):
    write_image(tmp_path / "images/a.png")
    (tmp_path / "train800.txt").write_bytes(b"\xef\xbb\xbfa.png\t3\r\n")
    dataset = load_dataset(tmp_path, strict=True)
    assert dataset.targets == [3] and dataset[0] is not None
    with pytest.raises(MissingFileError, match="val200.txt"):
        load_dataset(tmp_path, "val")


@pytest.mark.parametrize(
    "line", ["images/train/0.png", "images/train/0.png cat", "images/train/0.png -1", "3", "a.png 1.5"]
)
def test_vtab_malformed_line_is_named(tmp_path, line):
    write_vtab(tmp_path)
    (tmp_path / "train800.txt").write_text(f"images/train/0.png 0\n\n{line}\n")
    with pytest.raises(InputError, match=r"train800\.txt:3: expected 'path label'"):
        load_dataset(tmp_path)


def test_vtab_missing_image_and_empty_list(tmp_path):
    write_vtab(tmp_path)
    (tmp_path / "images/train/2.png").unlink()
    with pytest.raises(MissingFileError, match=r"val200.txt lists 'images/train/2.png'"):
        load_dataset(tmp_path, "val")
    (tmp_path / "test.txt").write_text("\n")
    with pytest.raises(InputError, match=r"test.txt is empty"):
        load_dataset(tmp_path, "test")


# --------------------------------------------------------------- FGVC layout


@pytest.mark.parametrize("below", ["images", "Images", "."])
def test_fgvc_lists_number_the_classes_from_zero(tmp_path, below):
    lists = {"train": {"x/a.png": 1, "b.png": "10"}, "val": {"c.png": 2}, "test": {"d.png": 10, "e.png": 1}}
    for split, rows in lists.items():
        for name in rows:
            write_image(tmp_path / below / name)
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    splits = {split: load_dataset(tmp_path, split) for split in ("train", "val", "trainval", "test")}
    assert {split: dataset.targets for split, dataset in splits.items()} == {
        "train": [0, 2],
        "val": [1],
        "trainval": [0, 2, 1],
        "test": [2, 0],
    }
    assert splits["val"].classes == ["1", "2", "10"] and splits["val"].recipe == "fgvc"
    assert splits["val"][0] is not None


def test_fgvc_class_names(tmp_path):
    for name in "ab":
        write_image(tmp_path / f"{name}.png")
    (tmp_path / "train.json").write_text('{"a.png": "wren", "b.png": "crow"}')
    dataset = load_dataset(tmp_path)
    assert dataset.classes == ["crow", "wren"] and dataset.targets == [1, 0]
    with pytest.raises(MissingFileError, match="val.json"):
        load_dataset(tmp_path, "trainval")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a.png": ', "train.json is not json"),
        ("[]", "train.json must hold a json object"),
        ("{}", "at least one image"),
        ('{"a.png": 1.5}', r"class of 'a.png' must be a number or a name, got 1.5"),
        ('{"a.png": true}', "got True"),
    ],
)
def test_fgvc_malformed_list(tmp_path, text, message):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_dataset(tmp_path)


def test_fgvc_missing_image(tmp_path):
    (tmp_path / "train.json").write_text('{"a.png": 1}')
    with pytest.raises(MissingFileError, match=r"train.json lists 'a.png'"):
        load_dataset(tmp_path)


# -------------------------------------------------------- digits and the rest


def test_digits():
    splits = {split: load_dataset("digits", split) for split in ("train", "val", "trainval", "test")}
    assert {split: len(dataset) for split, dataset in splits.items()} == {
        "train": 800,
        "val": 200,
        "trainval": 1000,
        "test": 797,
    }
    assert splits["test"].classes == [str(digit) for digit in range(10)] and splits["test"].recipe == "vtab"
    for dataset in splits.values():
        counts = np.bincount(dataset.targets, minlength=10)
        assert counts.max() - counts.min() <= 0.05 * len(dataset)
    image, label = splits["train"][0]
    assert image.shape == (3, 8, 8) and isinstance(label, int)

    # Every picture of scikit-learn is in trainval or test, with its label.
    from sklearn.datasets import load_digits

    def key(pixels, label):
        return np.rint(np.asarray(pixels, dtype=float)).astype(np.uint8).tobytes(), int(label)

    digits = load_digits()
    everything = sorted(
        key(pixels * 255 / 16, label) for pixels, label in zip(digits.images, digits.target, strict=True)
    )
    ours = [*splits["trainval"].samples, *splits["test"].samples]
    assert sorted(key(np.asarray(source)[..., 0], label) for source, label in ours) == everything
    parts = [*splits["train"].samples, *splits["val"].samples]
    assert sorted(key(np.asarray(source)[..., 1], label) for source, label in parts) == sorted(
        key(np.asarray(source)[..., 2], label) for source, label in splits["trainval"].samples
    )


def test_bad_arguments_of_load_dataset(tmp_path, monkeypatch):
    with pytest.raises(MissingFileError, match="nowhere"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(InputError, match="split must be one of train, val, trainval, test, got 'dev'"):
        load_dataset(tmp_path, "dev")
    with pytest.raises(InputError, match="layout must be one of auto, .*, got 'coco'"):
        load_dataset(tmp_path, layout="coco")
    with pytest.raises(InputError, match="is a file, expected a folder"):
        load_dataset(write_image(tmp_path / "a.png"))
    with pytest.raises(InputError, match="the word digits"):
        load_dataset(tmp_path, layout="digits")
    write_classes(tmp_path / "digits", {"a": 20})
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("digits", "trainval")) == 1000
    assert (
        len(load_dataset("./digits", "trainval"))
        == len(load_dataset("digits", "trainval", layout="folder"))
        == 20
    )


def test_lists_win_over_the_folders_beside_them(tmp_path):
    write_vtab(tmp_path)
    assert load_dataset(tmp_path).recipe == "vtab"
    with pytest.raises(MissingFileError, match="train.json"):
        load_dataset(tmp_path, layout="fgvc")
