"""WebDataset shards: what is read, judged by tarfile and by webdataset itself, and what is refused."""

import gzip
import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spt_fast.data import load_dataset, make_loader, make_transform
from spt_fast.data.tar_member import TarMember
from spt_fast.errors import InputError, MissingFileError


def picture(seed, size=(6, 5)):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (*size, 3), dtype=np.uint8))


def encoded(seed, kind="PNG"):
    file = io.BytesIO()
    picture(seed).save(file, kind)
    return file.getvalue()


def write_shard(path, members, **keywords):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **keywords) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(labels, start=0):
    """The members of one image for each label."""
    members = []
    for number, label in enumerate(labels, start=start):
        members += [(f"{number:03d}.png", encoded(number)), (f"{number:03d}.cls", str(label).encode())]
    return members


def names(dataset):
    return [source.name for source, _ in dataset.samples]


def pixels(dataset):
    return [np.asarray(dataset.picture(index)) for index in range(len(dataset))]


def fitted(dataset):
    return dataset.with_transform(
        make_transform("vtab", image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, train=True)
    )


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("layout", ["auto", "webdataset"])
def test_the_samples_are_those_of_webdataset(tmp_path, layout, kind):
    wds = pytest.importorskip("webdataset")
    rng = np.random.RandomState(3)
    labels = rng.randint(0, 5, 23)
    with wds.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=7, verbose=0) as writer:
        for number, label in enumerate(labels):
            image = picture(number, rng.randint(1, 40, 2))
            sample = {"__key__": f"n{label}/{number:04d}", kind: image, "cls": int(label)}
            writer.write({**sample, "json": {"label": -7, "width": image.width}, "txt": "a picture"})
    shards = sorted(map(str, tmp_path.glob("*.tar")))
    theirs = wds.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("__key__", kind, "cls")

    ours = load_dataset(tmp_path, "trainval", layout=layout, strict=True)
    assert len(shards) == 4 and ours.shards == [7, 7, 7, 2]
    for index, (key, image, label) in enumerate(theirs):
        assert names(ours)[index] == f"{key}.{kind}"
        assert ours.targets[index] == label == labels[index]
        assert np.array_equal(pixels(ours)[index], np.asarray(image.convert("RGB")))
    assert index == len(ours) - 1


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_found_where_tarfile_finds_them(tmp_path_factory, seed, form):
    rng = np.random.RandomState(seed)
    members, expected = [], {}
    for number in range(rng.randint(1, 12)):
        long = "d" * rng.choice([1, 90, 120]) if form != tarfile.USTAR_FORMAT else "d"
        key = f"{long}/é.{rng.randint(3)}/{number}" if form == tarfile.PAX_FORMAT else f"{long}/{number}"
        label = int(rng.randint(9))
        image = encoded(seed + number, rng.choice(["PNG", "JPEG", "WEBP"]))
        extension = rng.choice(["jpg", "jpeg", "PNG", "webp", "ppm"])  # the content decides, not the name
        parts = [(f"{key}.{extension}", image)]
        if rng.rand() < 0.5:
            parts.append((f"{key}.cls", b" %d\n" % label))
        else:
            parts.append((f"{key}.json", json.dumps({rng.choice(["label", "cls"]): label}).encode()))
        parts += [(f"{key}.txt", rng.bytes(rng.randint(2000))), (f"{key}.seg.png", b"a mask")]
        members += [parts[position] for position in rng.permutation(len(parts))]
        expected[f"{key}.{extension}"] = label
    members.insert(0, ("._0.jpg", b"left by another file system"))
    members.append(("README", b""))
    if rng.rand() < 0.5:
        members = [
            members[position] for position in rng.permutation(len(members))
        ]  # parts need not be neighbours
    folder = tmp_path_factory.mktemp("shards")
    shard = write_shard(folder / "a.tar", members, format=form)

    ours = load_dataset(folder, "trainval", strict=True)
    assert dict(zip(names(ours), ours.targets, strict=True)) == expected
    assert ours.classes == [str(label) for label in range(max(ours.targets) + 1)]
    with tarfile.open(shard) as archive:
        for index, (source, _) in enumerate(ours.samples):
            content = archive.extractfile(source.name).read()
            assert source.read_bytes() == content and source.path == shard
            assert np.array_equal(
                pixels(ours)[index], np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
            )


@pytest.mark.parametrize(
    "pattern", ["{}-000{}.tar", "photos_{}_{}.tar", "{}/{}.tar", "{}/part-{}.tar", "{}{}.tar"]
)
@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_splits_by_name_or_folder(tmp_path, pattern, val):
    for number, labels in enumerate([[0, 1, 2], [2]]):
        write_shard(tmp_path / pattern.format("train", number), samples(labels, 10 * number))
    write_shard(tmp_path / pattern.format(val, 0), samples([1, 3], 20))
    write_shard(tmp_path / pattern.format("test", 0), samples([4], 30))
    splits = {split: load_dataset(tmp_path, split) for split in ("train", "val", "trainval", "test")}
    assert {split: (dataset.targets, dataset.shards) for split, dataset in splits.items()} == {
        "train": ([0, 1, 2, 2], [3, 1]),
        "val": ([1, 3], [2]),
        "trainval": ([0, 1, 2, 2, 1, 3], [3, 1, 2]),
        "test": ([4], [1]),
    }
    assert names(splits["trainval"]) == ["000.png", "001.png", "002.png", "010.png", "020.png", "021.png"]
    assert all(dataset.classes == list("01234") for dataset in splits.values())
    assert splits["val"].recipe == "fgvc" and splits["val"].name == f"{tmp_path.name}/val"


@pytest.mark.parametrize("pattern", ["{}.tar", "train-{}.tar", "train/{}.tar"])
def test_shards_without_validation_hold_a_tenth_back(tmp_path, pattern):
    labels = np.random.RandomState(0).permutation([0] * 20 + [1] * 10 + [3])
    for number, part in enumerate(np.array_split(labels, 3)):
        write_shard(tmp_path / pattern.format(number), samples(part, 100 * number))
    train, val, both = (load_dataset(tmp_path, split) for split in ("train", "val", "trainval"))
    assert sorted(val.targets) == [0, 0, 1] and set(train.targets) == {0, 1, 3}
    assert not set(names(train)) & set(names(val)) and sorted(names(train) + names(val)) == names(both)
    assert names(train) == sorted(names(train)) and both.targets == labels.tolist()
    for dataset in (train, val, both):
        shard_of = [source.path.name for source, _ in dataset.samples]
        assert dataset.shards == [shard_of.count(shard) for shard in sorted(set(shard_of))]
        assert dataset.classes == ["0", "1", "2", "3"]
    with pytest.raises(InputError, match="split 'test' is not in .* which has: train"):
        load_dataset(tmp_path, "test")


def test_class_names(tmp_path):
    write_shard(tmp_path / "train-0.tar", samples([0, 1, 1]))
    write_shard(tmp_path / "val-0.tar", samples([2]))
    (tmp_path / "classes.txt").write_bytes("\ufeffcrane\r\nAlt é\r\ncrane\r\n\r\n".encode())
    train = load_dataset(tmp_path)
    assert train.classes == ["crane", "Alt é", "crane"] and train.targets == [0, 1, 1]
    # With names, no split is looked through for the sake of another.
    (tmp_path / "val-0.tar").write_text("damaged")
    assert len(load_dataset(tmp_path)) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n", r"label 1 of train-0.tar: 001.png has no line in .*classes.txt, which has 1"),
        (b"a\n\nb\n", r"classes.txt:2 is empty, expected one class name a line"),
        (b"\n", r"classes.txt:1 is empty"),
        (b"\xff\n", r"classes.txt is not UTF-8 text"),
    ],
)
def test_bad_class_names(tmp_path, content, message):
    write_shard(tmp_path / "train-0.tar", samples([0, 1, 1]))
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_dataset(tmp_path)


def test_cls_wins_over_json_and_folders_are_no_members(tmp_path):
    members = [("a/0.json", b"{}"), ("a/0.jpg", encoded(0)), ("a/0.cls", b"1"), ("b/0.jpg", encoded(1))]
    shard = write_shard(tmp_path / "x.tar", [*members, ("b/0.json", b'{"cls": 0, "label": 2}')])
    with tarfile.open(shard, "a") as archive:
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    dataset = load_dataset(tmp_path, "trainval")
    assert names(dataset) == ["a/0.jpg", "b/0.jpg"] and dataset.targets == [1, 2]


def test_a_name_is_never_a_path(tmp_path):
    outside = tmp_path / "secret.png"
    picture(9).save(outside)
    name = os.path.relpath(outside, tmp_path / "data")
    for member in (name, str(outside)):
        write_shard(
            tmp_path / "data/a.tar", [(member, encoded(1)), (member[:-3] + "cls", b"0"), *samples([0])]
        )
        dataset = load_dataset(tmp_path / "data", "trainval")
        assert np.array_equal(pixels(dataset)[0], np.asarray(picture(1)))


def test_archives_beside_class_folders_and_pictures_beside_shards(tmp_path):
    for number in range(20):
        path = tmp_path / "photos/train/cat" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    write_shard(
        tmp_path / "photos/train.tar", [(f"cat/{number}.png", encoded(number)) for number in range(20)]
    )
    assert load_dataset(tmp_path / "photos", "trainval").classes == ["cat"]
    (tmp_path / "photos/train.tar").write_bytes(b"damaged")
    assert load_dataset(tmp_path / "photos", "trainval").classes == ["cat"]

    write_shard(tmp_path / "shards/train-0.tar", samples([0, 1]))
    (tmp_path / "shards/assets").mkdir()
    picture(0).save(tmp_path / "shards/assets/preview.png")
    assert load_dataset(tmp_path / "shards", "trainval").classes == ["0", "1"]


# ------------------------------------------------------------- images one by one


def test_unreadable_images_are_skipped_or_named(tmp_path):
    members = samples([0, 1, 2])
    members[2] = ("001.png", members[2][1][:-30])
    write_shard(tmp_path / "train-0.tar", members)
    dataset = load_dataset(tmp_path, "trainval")
    assert (
        dataset[1] is None
        and dataset[0][0].shape == (3, 6, 5)
        and dataset.describe(1) == "train-0.tar: 001.png"
    )
    for num_workers in (0, 1):
        loader = make_loader(fitted(dataset), batch_size=2, num_workers=num_workers)
        assert [labels.tolist() for _, labels in loader] == [[0], [2]]
        assert loader.skipped == ["train-0.tar: 001.png"]
    with pytest.raises(InputError, match=r"train-0.tar: '001.png' cannot be read as an image"):
        load_dataset(tmp_path, "trainval", strict=True)[1]


def test_a_shard_that_changes_after_it_was_opened(tmp_path):
    shard = write_shard(tmp_path / "train-0.tar", samples([0, 1, 2]))
    dataset = load_dataset(tmp_path, "trainval", strict=True)
    with shard.open("r+b") as file:
        file.truncate(dataset.samples[2][0].offset + 10)
    assert dataset[1][1] == 1
    with pytest.raises(InputError, match="train-0.tar ends inside '002.png', expected .* bytes"):
        dataset[2]
    shard.unlink()
    for fails in (lambda: dataset[0], dataset.samples[0][0].fingerprint):
        with pytest.raises(MissingFileError, match="train-0.tar does not exist"):
            fails()
    shard.mkdir()
    with pytest.raises(InputError, match="train-0.tar cannot be read at '000.png'"):
        dataset[0]


def test_a_shard_written_anew_is_read_anew(tmp_path):
    shard = write_shard(tmp_path / "train-0.tar", samples([0, 1, 2]))
    before = load_dataset(tmp_path, "trainval")
    old = [source.fingerprint() for source, _ in before.samples]
    assert len(set(old)) == 3 and old == [
        source.fingerprint() for source, _ in load_dataset(tmp_path, "trainval").samples
    ]
    write_shard(shard, samples([2, 1, 0]))
    os.utime(shard, ns=(1, 1))
    after = load_dataset(tmp_path, "trainval")
    assert before.targets == [0, 1, 2] and after.targets == [2, 1, 0]
    assert not set(old) & {source.fingerprint() for source, _ in after.samples}


def test_fingerprints_know_the_shard_and_the_place(tmp_path):
    for name in ("a/0", "a/1", "b/0"):
        write_shard(tmp_path / f"{name}.tar", samples([0, 1]))
        os.utime(tmp_path / f"{name}.tar", ns=(5, 7))
    first, second, third = (
        [source.fingerprint() for source, _ in load_dataset(tmp_path / folder, "trainval").samples]
        for folder in ("a", "b", "a")
    )
    assert (
        first == third and first[:2] == second and len(set(first)) == 4
    )  # a copy elsewhere is the same shard


def test_members_are_small_and_survive_pickling(tmp_path):
    write_shard(tmp_path / "train-0.tar", samples(range(100)))
    dataset = load_dataset(tmp_path, "trainval")
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 100 * 60 + 2000
    again = pickle.loads(pickled)
    assert again.samples == dataset.samples and again.shards == [100]
    assert np.array_equal(np.asarray(again.picture(7)), np.asarray(picture(7)))
    with pytest.raises(AttributeError):
        dataset.samples[0][0].offset = 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_read_every_image_once(tmp_path, num_workers):
    counts = np.random.RandomState(num_workers).randint(1, 5, 11)
    for number, count in enumerate(counts):
        write_shard(tmp_path / f"{number:02d}.tar", samples(range(count), 10 * number))
    dataset = fitted(load_dataset(tmp_path, "trainval", strict=True))
    assert dataset.shards == counts.tolist()
    seen = []
    for rank in range(2):
        share = {"batch_size": 4, "shuffle": True, "epoch": 1, "rank": rank, "world_size": 2}
        loader = make_loader(dataset, num_workers=num_workers, **share)
        seen += [image for images, _ in loader for image in images]
    dataset.set_epoch(1)
    expected = torch.stack([dataset[index][0] for index in range(len(dataset))])
    assert sorted(torch.stack(seen).flatten(1).tolist()) == sorted(expected.flatten(1).tolist())


# ------------------------------------------------------------------ what is refused


def test_every_truncation_is_noticed(tmp_path):
    whole = write_shard(tmp_path / "whole.tar", samples([0, 1, 2])).read_bytes()
    end = max(position for position, byte in enumerate(whole) if byte) + 1
    end += -end % 512
    shard = tmp_path / "train-0.tar"
    (tmp_path / "whole.tar").unlink()
    for length in [*range(0, end + 512, 128), *range(511, end, 512)]:
        for rest in (b"", bytes(2 << 20)):  # what a download that reserved its place leaves
            shard.write_bytes(whole[:length] + rest)
            with pytest.raises(InputError, match="train-0.tar") as caught:
                load_dataset(tmp_path, "trainval")
            assert "\n" not in str(caught.value)
    for length in (end + 512, end + 1024, len(whole)):
        shard.write_bytes(whole[:length])
        assert len(load_dataset(tmp_path, "trainval")) == 3
    shard.write_bytes(whole[: end + 1024] + whole)
    with pytest.raises(
        InputError, match=r"train-0.tar is truncated or damaged: expected the end .* at byte \d+ of"
    ):
        load_dataset(tmp_path, "trainval")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_else(tmp_path_factory, data):
    form = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    folder = tmp_path_factory.mktemp("shards")
    members = [(f"{'d' * 110}/{name}", content) for name, content in samples([0, 1])]
    content = bytearray(write_shard(folder / "train-0.tar", members, format=form).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 8000))] = data.draw(st.integers(0, 255))
    (folder / "train-0.tar").write_bytes(content)
    try:
        assert len(load_dataset(folder, "trainval", layout="webdataset")) <= 2
    except InputError as error:
        assert "train-0.tar" in str(error) or "train shards" in str(error)


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_a_damaged_header_is_not_the_end(tmp_path, position):
    shard = write_shard(tmp_path / "train-0.tar", samples([0, 1]))
    with tarfile.open(shard) as archive:
        offset = archive.getmembers()[position].offset
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff")
    with pytest.raises(InputError, match="train-0.tar"):
        load_dataset(tmp_path)


IMAGE = ("a/0.jpg", encoded(0))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([IMAGE], r"'a/0.jpg' has no label, expected a .cls or .json of its key"),
        ([IMAGE, ("b/0.cls", b"0")], r"'b/0.cls' has no image beside it"),
        ([("a/0.cls", b"0")], r"'a/0.cls' has no image beside it \(looked for .jpg"),
        (
            [IMAGE, ("a/0.png", b""), ("a/0.cls", b"0")],
            r"'a/0.png' is a second image of one sample, .* 'a/0.jpg'",
        ),
        ([IMAGE, ("a/0.cls", b"0"), ("a/0.cls", b"0")], r"'a/0.cls' is a second cls of one sample"),
        ([IMAGE, ("a/0.cls", b"0"), IMAGE], r"'a/0.jpg' is a second image"),
        ([IMAGE, ("a/0.cls", b"cat")], r"'a/0.cls' must hold an integer from 0 to 999999, got 'cat'"),
        ([IMAGE, ("a/0.cls", b"1.0")], r"got '1.0'"),
        ([IMAGE, ("a/0.cls", b"")], r"got ''"),
        ([IMAGE, ("a/0.cls", b"-1")], r"got '-1'"),
        ([IMAGE, ("a/0.cls", b"1000000")], r"got '1000000'"),
        ([IMAGE, ("a/0.cls", b"7" * 9999)], r"got '7{60}'"),
        ([IMAGE, ("a/0.cls", b"\xff\n")], "got '\ufffd.n'"),
        (
            [IMAGE, ("a/0.json", b"[1]")],
            r"'a/0.json' must hold a json object with an integer 'label' or 'cls'",
        ),
        ([IMAGE, ("a/0.json", b'{"label": "1"}')], r'got .{"label": "1"}.'),
        ([IMAGE, ("a/0.json", b'{"label": true}')], r"'a/0.json' must hold"),
        ([IMAGE, ("a/0.json", b'{"label": 1.0}')], r"'a/0.json' must hold"),
        ([IMAGE, ("a/0.json", b'{"width": 3}')], r"'a/0.json' must hold"),
        ([IMAGE, ("a/0.json", b"{")], r"'a/0.json' must hold"),
        ([IMAGE, ("a/0.json", b"[" * 100_000)], r"'a/0.json' must hold"),
        ([IMAGE, ("a/0.json", b"\xff\xfe{")], r"'a/0.json' must hold"),
    ],
)
def test_bad_samples_are_named(tmp_path, members, message):
    write_shard(tmp_path / "train-0.tar", [*samples([0]), *members])
    with pytest.raises(InputError, match=r"train-0.tar: .*" + message) as caught:
        load_dataset(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
def test_links_are_refused(tmp_path, kind):
    shard = write_shard(tmp_path / "train-0.tar", samples([0, 1]))
    with tarfile.open(shard, "a") as archive:
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = kind, "000.png"
        archive.addfile(link)
    with pytest.raises(InputError, match="'2.png' is a link or sparse, expected a plain file"):
        load_dataset(tmp_path)


def test_bad_folders_are_named(tmp_path):
    def refused(message, *, layout="auto", split="train"):
        with pytest.raises(InputError, match=message):
            load_dataset(tmp_path, split, layout=layout)

    refused("has no tar files, expected WebDataset shards", layout="webdataset")
    (tmp_path / "train-0.tar.gz").write_bytes(b"")
    refused("looked for: .*WebDataset shards .*not compressed")
    shard = write_shard(tmp_path / "train-0.tar", [])
    refused(r"the train shards of .* have no images \(looked for .jpg")
    write_shard(shard, [("0.npy", b"numbers"), ("0.json", b'{"label": 1}')])
    refused("have no images")
    write_shard(shard, samples([0, 1]))
    refused("one image a class")
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    refused("train-0.tar cannot be read as an uncompressed tar file")
    write_shard(shard, samples([0, 0]))
    write_shard(tmp_path / "val-train-1.tar", samples([0]))
    refused("val-train-1.tar has the names of several splits: train, val")
    (tmp_path / "val-train-1.tar").rename(tmp_path / "more.tar")
    refused("more.tar names no split, as others in")
    (tmp_path / "more.tar").unlink()
    write_shard(tmp_path / "train/0.tar", samples([0]))
    refused("two sets of train shards: .*train-0.tar and .*train/0.tar")
    (tmp_path / "train/0.tar").unlink()
    for name in ("val-0.tar", "valid-0.tar"):
        write_shard(tmp_path / name, samples([0]))
    refused("two sets of val shards")
    (tmp_path / "train-0.tar").unlink()
    (tmp_path / "valid-0.tar").unlink()
    refused("split 'train' is not in .* which has: val")
    assert len(load_dataset(tmp_path, "val")) == 1


def test_a_negative_size_ends_the_scan(tmp_path):
    # tarfile goes backwards for it, for ever in some releases.
    header = bytearray(tarfile.TarInfo("0.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"  # base 256: -512
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "train-0.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(InputError, match="train-0.tar cannot be read as an uncompressed tar file"):
        load_dataset(tmp_path)


def test_a_shard_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    write_shard(tmp_path / "train-0.tar", samples([0, 0]))

    def forbidden(path, *arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "open", forbidden)
    with pytest.raises(InputError, match="train-0.tar cannot be read as .*: .*Permission denied"):
        load_dataset(tmp_path)


def test_a_member_says_where_it_is(tmp_path):
    member = TarMember(tmp_path / "train-000003.tar", 512, 3, "n0144/12.jpg")
    assert str(member) == "train-000003.tar: n0144/12.jpg"
