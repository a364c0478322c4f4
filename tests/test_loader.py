"""Which images come when: order, ranks, shards, resuming, and what cannot be read."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import (
    in_memory,
    noise,
    transform,
    truncated_jpeg,
    write_image,
)

from spt_fast.data import ImageDataset, make_loader
from spt_fast.data.loader import WINDOW_SHARDS, EpochBatches, batches_per_epoch
from spt_fast.errors import InputError

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
