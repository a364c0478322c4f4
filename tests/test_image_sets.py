"""The images of the benchmarks that train: three disjoint sets, and errors for data that cannot give them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.image_sets import image_sets, training_and_test
from spt_fast import load_backbone
from spt_fast.backbones import image_settings
from spt_fast.data import make_transform
from spt_fast.errors import InputError


def test_image_sets_are_disjoint_and_balanced(tmp_path: Path) -> None:
    for split, count in (("pool", 10), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                colour = (index * 20, label * 200, 100 if split == "test" else 0)
                Image.new("RGB", (32, 32), colour).save(tmp_path / split / name / f"{index}.png")
    backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1)
    sets = image_sets(str(tmp_path / "pool"), str(tmp_path / "test"), backbone, 4, 3)
    training, validation, test = sets
    assert [sorted(part.targets) for part in sets] == [[0] * 4 + [1] * 4, [0] * 3 + [1] * 3, [0, 0, 1, 1]]
    pixels = [{part.samples[i][0].tobytes() for i in range(len(part))} for part in sets]
    assert len(set.union(*pixels)) == sum(len(part) for part in sets)
    plain = make_transform("vtab", train=False, **image_settings(backbone))
    assert (training[0][0] == plain(training.samples[0][0])).all()
    training, test = training_and_test(str(tmp_path / "pool"), str(tmp_path / "test"), backbone, 3)
    assert sorted(training.targets) == [0] * 3 + [1] * 3 and sorted(test.targets) == [0, 0, 1, 1]
    (tmp_path / "pool").rename(tmp_path / "train")
    training, test = training_and_test(str(tmp_path), None, backbone, 2)  # a tenth of train is kept aside
    assert sorted(training.targets) == [0, 0, 1, 1] and set(test.targets) == {0, 1}
    (tmp_path / "train").rename(tmp_path / "pool")
    with pytest.raises(InputError, match="has 10 images of cat, expected at least 12"):
        image_sets(str(tmp_path / "pool"), str(tmp_path / "test"), backbone, 8, 4)
    with pytest.raises(InputError, match="--test-data is needed"):
        image_sets(str(tmp_path / "pool"), None, backbone, 4, 3)
