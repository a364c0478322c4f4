"""Readers, transforms, augmentation and loader on small generated images."""

import io
import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as tv1
from torchvision.transforms import v2

from spt_fast.data import ImageDataset, load_dataset, make_loader, make_transform, read_image
from spt_fast.data.loader import WINDOW_SHARDS, EpochBatches, batches_per_epoch
from spt_fast.data.splits import stratified_split
from spt_fast.errors import InputError, MissingFileError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(seed, size=(20, 16)):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (*size, 3), dtype=np.uint8))


def write_image(path, seed=0, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed, size).save(path)
    return path


def write_classes(root, counts, suffix=".png"):
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            write_image(root / name / f"{number}{suffix}", seed=100 * label + number)


def transform(recipe="vtab", train=True, size=8):
    return make_transform(recipe, image_size=size, mean=MEAN, std=STD, train=train)


def in_memory(count, **kwargs):
    samples = [(noise(seed), seed % 3) for seed in range(count)]
    return ImageDataset(samples, ["a", "b", "c"], transform=transform("fgvc"), **kwargs)


def truncated_jpeg(path):
    data = io.BytesIO()
    noise(1, (64, 64)).save(data, "JPEG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    return path


def sources(dataset):
    return {str(source) for source, _ in dataset.samples}


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


# -------------------------------------------------------------------- loader


def test_batches_are_the_same_with_any_number_of_workers():
    dataset = in_memory(11)
    loader = make_loader(dataset, batch_size=4, shuffle=True, seed=3, epoch=2)
    once, again = list(loader), list(loader)
    in_workers = list(make_loader(dataset, batch_size=4, shuffle=True, seed=3, epoch=2, num_workers=2))
    assert [images.shape[0] for images, _ in once] == [4, 4, 3] and len(loader) == 3
    assert once[0][0].dtype == torch.float32 and once[0][1].dtype == torch.int64
    for other in (again, in_workers):
        for (images, labels), (other_images, other_labels) in zip(once, other, strict=True):
            assert torch.equal(images, other_images) and torch.equal(labels, other_labels)
    assert dataset.epoch == 0


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_start_batch_gives_what_was_left(start):
    arguments = {"batch_size": 4, "shuffle": True, "epoch": 1}
    whole = list(make_loader(in_memory(10), **arguments))
    rest = list(make_loader(in_memory(10), **arguments, start_batch=start))
    assert len(rest) == 3 - start
    for (images, labels), (rest_images, rest_labels) in zip(whole[start:], rest, strict=True):
        assert torch.equal(images, rest_images) and torch.equal(labels, rest_labels)


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        return EpochBatches(
            50, batch_size=50, shuffle=True, seed=seed, epoch=epoch, rank=0, world_size=1, drop_last=False
        ).batches[0]

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(sorted(one) == list(range(50)) for one in orders)
    assert len({tuple(one) for one in orders}) == 9 and order(1, 2) == orders[5]


def batches_of_ranks(length, world_size, *, shards=None, seed=1, epoch=2, drop_last=False, **order):
    """The batches of every rank."""
    order |= {"seed": seed, "epoch": epoch, "drop_last": drop_last, "shards": shards}
    return [
        EpochBatches(length, rank=rank, world_size=world_size, **order).batches for rank in range(world_size)
    ]


ORDERS = given(
    length=st.integers(1, 40),
    world_size=st.integers(1, 7),
    batch_size=st.integers(1, 9),
    shuffle=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@ORDERS
def test_ranks_share_the_images(length, world_size, batch_size, shuffle):
    shares = batches_of_ranks(length, world_size, batch_size=batch_size, shuffle=shuffle)
    seen = [index for batches in shares for batch in batches for index in batch]
    assert sorted(seen) == list(range(length))
    assert all(len(batch) == batch_size for batches in shares for batch in batches[:-1])
    if shuffle:
        assert {len(batches) for batches in shares} == {-(-length // (batch_size * world_size))}
    else:
        assert all(batch for batches in shares for batch in batches)


@settings(max_examples=60, deadline=None)
@ORDERS
def test_ranks_together_take_the_batches_of_one_process(length, world_size, batch_size, shuffle):
    shares = batches_of_ranks(length, world_size, batch_size=batch_size, shuffle=shuffle)
    (alone,) = batches_of_ranks(length, 1, batch_size=batch_size * world_size, shuffle=shuffle)
    together = [sorted(itertools.chain(*batches)) for batches in itertools.zip_longest(*shares, fillvalue=[])]
    assert together == [sorted(batch) for batch in alone]


@settings(max_examples=60, deadline=None)
@ORDERS
def test_drop_last_keeps_the_full_batches(length, world_size, batch_size, shuffle):
    whole = batches_of_ranks(length, world_size, batch_size=batch_size, shuffle=shuffle)
    dropped = batches_of_ranks(length, world_size, batch_size=batch_size, shuffle=shuffle, drop_last=True)
    full = [[batch for batch in batches if len(batch) == batch_size] for batches in whole]
    if shuffle:  # every rank has as many
        full = [batches[: min(map(len, full))] for batches in full]
    assert dropped == full


def test_a_rank_without_images_yields_empty_batches():
    for num_workers in (0, 2):
        loader = make_loader(
            in_memory(3), batch_size=1, shuffle=True, rank=1, world_size=2, num_workers=num_workers
        )
        (_, label), (images, labels) = loader
        assert len(label) == 1 and images.shape == (0, 3, 8, 8) and images.dtype == torch.float32
        assert labels.shape == (0,) and labels.dtype == torch.int64


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 30), world_size=st.integers(1, 5), batch_size=st.integers(1, 9), data=st.data())
def test_batches_per_epoch_is_what_every_loader_has(length, world_size, batch_size, data):
    dataset = images_of_one_kind(length)
    if length >= world_size and data.draw(st.booleans()):
        dataset.shards = data.draw(cut_into_shards(length, world_size))
    for epoch in range(3):
        for rank in range(world_size):
            share = {"rank": rank, "world_size": world_size, "batch_size": batch_size}
            loader = make_loader(dataset, shuffle=True, epoch=epoch, **share)
            assert len(loader) == batches_per_epoch(dataset, batch_size=batch_size, world_size=world_size)


def images_of_one_kind(length):
    return ImageDataset([(noise(0, (2, 2)), 0)] * length, ["a"], transform=transform())


# -------------------------------------------------------------------- shards


@st.composite
def cut_into_shards(draw, length, least):
    """The sizes of ``least`` or more shards, of ``length`` images together."""
    cuts = draw(st.sets(st.integers(1, length - 1), min_size=least - 1)) if length > 1 else set()
    ends = [*sorted(cuts), length]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


SHARDED = given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=60),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 9),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)


@settings(max_examples=100, deadline=None)
@SHARDED
def test_ranks_share_the_shards(sizes, world_size, batch_size, shuffle, epoch):
    world_size = min(world_size, len(sizes))
    order = {"batch_size": batch_size, "shuffle": shuffle, "epoch": epoch}
    shares = batches_of_ranks(sum(sizes), world_size, shards=sizes, **order)
    seen = [list(itertools.chain(*batches)) for batches in shares]
    assert sorted(itertools.chain(*seen)) == list(range(sum(sizes)))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    owners = [set(shard_of[images].tolist()) for images in seen]
    assert sum(map(len, owners)) == len(sizes)  # no shard is read by two ranks
    assert max(map(len, owners)) - min(map(len, owners)) <= 1
    if shuffle:
        # As many batches as the largest share needs, all full but for the end.
        (count,) = {len(batches) for batches in shares}
        assert count == max(-(-len(images) // batch_size) for images in seen)
        assert max(map(len, seen)) - min(map(len, seen)) <= max(sizes)
        for batches, images in zip(shares, seen, strict=True):
            assert [len(batch) for batch in batches] == [
                min(max(0, len(images) - start), batch_size)
                for start in range(0, count * batch_size, batch_size)
            ]
    else:
        assert seen == [np.flatnonzero(shard_of % world_size == rank).tolist() for rank in range(world_size)]
        assert all(batch for batches in shares for batch in batches)
    assert shares == batches_of_ranks(sum(sizes), world_size, shards=sizes, **order)


@settings(max_examples=60, deadline=None)
@SHARDED
def test_only_a_window_of_shards_is_read_at_a_time(sizes, world_size, batch_size, shuffle, epoch):
    world_size = min(world_size, len(sizes))
    order = {"batch_size": batch_size, "shuffle": shuffle, "epoch": epoch}
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    for batches in batches_of_ranks(sum(sizes), world_size, shards=sizes, **order):
        walk = shard_of[list(itertools.chain(*batches))].tolist()
        # Cut the walk where every shard that was begun is read to its end: no piece has more shards than a window.
        open_shards, pieces, left = set(), [set()], dict(enumerate(sizes))
        for shard in walk:
            pieces[-1].add(shard)
            open_shards.add(shard)
            left[shard] -= 1
            open_shards -= {shard} if not left[shard] else set()
            if not open_shards:
                pieces.append(set())
        assert not open_shards and all(len(piece) <= (WINDOW_SHARDS if shuffle else 1) for piece in pieces)


def test_shards_are_mixed_within_a_window_and_anew_in_each_epoch():
    sizes = [5] * 40
    walks = {}
    for seed in range(2):
        for epoch in range(2):
            order = {"batch_size": 10, "shuffle": True, "seed": seed, "epoch": epoch, "shards": sizes}
            walks[seed, epoch] = [
                np.array(list(itertools.chain(*batches))) for batches in batches_of_ranks(200, 2, **order)
            ]
    for mine, other in walks.values():
        window = set((mine[:40] // 5).tolist())
        assert len(window) == 8 and len(set((mine[:8] // 5).tolist())) > 2  # not one shard after the other
        assert not window & set((other // 5).tolist())
    assert len({tuple(mine.tolist()) for mine, _ in walks.values()}) == 4
    assert len({frozenset((mine // 5).tolist()) for mine, _ in walks.values()}) == 4  # dealt anew
    # Each rank in each epoch has a permutation of its own.
    assert len({tuple((walk[:40] % 5).tolist()) for ranks in walks.values() for walk in ranks}) == 8


def test_the_largest_share_is_not_always_the_same_rank():
    longest = set()
    for epoch in range(20):
        order = {"batch_size": 1, "shuffle": True, "epoch": epoch}
        shares = batches_of_ranks(9, 3, shards=[5, 3, 1], **order)
        longest.add(max(range(3), key=lambda rank: sum(map(len, shares[rank]))))
    assert longest == {0, 1, 2}


@pytest.mark.parametrize("drop_last", [False, True])
def test_shards_of_different_sizes_leave_empty_or_no_batches(drop_last):
    batches = batches_of_ranks(13, 2, shards=[10, 3], batch_size=2, shuffle=True, drop_last=drop_last)
    short, long = sorted(batches, key=lambda batches: sum(map(len, batches)))
    assert [len(batch) for batch in long] == ([2] if drop_last else [2] * 5)
    assert [len(batch) for batch in short] == ([2] if drop_last else [2, 1, 0, 0, 0])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_start_batch_gives_what_was_left_of_shards(num_workers, start):
    dataset = in_memory(14, shards=[3, 5, 2, 4])
    share = {"batch_size": 2, "shuffle": True, "seed": 3, "epoch": 1, "rank": 1, "world_size": 2}
    whole = list(make_loader(dataset, **share))
    rest = list(make_loader(dataset, start_batch=start, num_workers=num_workers, **share))
    assert len(whole) == 4 and len(rest) == 4 - start
    for (images, labels), (rest_images, rest_labels) in zip(whole[start:], rest, strict=True):
        assert torch.equal(images, rest_images) and torch.equal(labels, rest_labels)


def test_subset_keeps_shards_where_the_order_allows_it():
    dataset = in_memory(12, shards=[4, 3, 5])
    assert dataset.subset([0, 1, 1, 3, 7, 11]).shards == [4, 2]
    assert dataset.subset(range(4, 8)).shards == [3, 1]
    assert dataset.subset([1, 0]).shards is None and dataset.subset([-1, 0]).shards is None
    assert dataset.shards == [4, 3, 5] and in_memory(3).subset([0]).shards is None


@pytest.mark.parametrize("shards", [[4, 0, 1], [4], [], [3, 3]])
def test_shards_must_be_of_the_samples(shards):
    with pytest.raises(InputError, match=r"shards of .* 1 or more samples each and 5 together, got"):
        in_memory(5, shards=shards)


def test_more_ranks_than_shards_is_an_error():
    dataset = in_memory(5, shards=[2, 3])
    message = "world_size must be at most the number of shards, which is 2 in images, got 3"
    with pytest.raises(InputError, match=message):
        make_loader(dataset, shuffle=True, world_size=3)
    with pytest.raises(InputError, match=message):
        batches_per_epoch(dataset, batch_size=1, world_size=3)


def test_evaluation_shares_images_where_shards_do_not_suffice():
    dataset = in_memory(5, shards=[2, 3])
    shares = [make_loader(dataset, world_size=3, rank=rank).batch_sampler.batches for rank in range(3)]
    assert shares == [[[0, 3]], [[1, 4]], [[2]]]


@pytest.mark.parametrize("bad", ["batch_size", "world_size"])
def test_batches_per_epoch_refuses_bad_arguments(bad):
    with pytest.raises(InputError, match=f"{bad} must be 1 or more, got 0"):
        batches_per_epoch(in_memory(2), **{"batch_size": 1, "world_size": 1, bad: 0})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_files_are_dropped_and_counted(tmp_path, num_workers):
    samples = [(write_image(tmp_path / f"{number}.png", number), number) for number in range(7)]
    for number in (1, 2, 3, 6):
        truncated_jpeg(samples[number][0])
    dataset = ImageDataset(samples, list("abcdefg"), transform=transform("fgvc"))
    loader = make_loader(dataset, batch_size=2, num_workers=num_workers)
    for _ in range(2):
        batches = list(loader)
        assert [labels.tolist() for _, labels in batches] == [[0], [], [4, 5], []]
        assert [tuple(images.shape) for images, _ in batches] == [(n, 3, 8, 8) for n in (1, 0, 2, 0)]
        assert loader.skipped == [str(samples[number][0]) for number in (1, 2, 3, 6)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_strict_loader_names_the_file_in_one_line(tmp_path, num_workers):
    samples = [(write_image(tmp_path / "whole.png"), 0), (truncated_jpeg(tmp_path / "cut.jpg"), 0)]
    dataset = ImageDataset(samples, ["a"], transform=transform(), strict=True)
    with pytest.raises(InputError) as caught:
        list(make_loader(dataset, batch_size=1, num_workers=num_workers))
    assert "cut.jpg" in str(caught.value) and "\n" not in str(caught.value)


def test_dataset_survives_pickling():
    dataset = pickle.loads(pickle.dumps(in_memory(2)))
    assert torch.equal(dataset[1][0], in_memory(2)[1][0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"seed": -1}, "seed"),
        ({"epoch": -1}, "epoch"),
        ({"num_workers": -1}, "num_workers"),
        ({"world_size": 0}, "world_size"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"start_batch": 4, "batch_size": 2}, "start_batch"),
        ({"drop_last": True}, "drop_last"),
    ],
)
def test_loader_refuses_bad_arguments(changes, message):
    with pytest.raises(InputError, match=message):
        make_loader(in_memory(5), **changes)


def test_loader_needs_a_transform():
    with pytest.raises(InputError, match="transform"):
        make_loader(in_memory(2).with_transform(None))


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
