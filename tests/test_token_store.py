"""Where tokens are kept between the passes of k-means, and that it makes no difference to the prototypes."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Interrupted, ReIterable, batches, stacked_tokens
from torch import Tensor

import spt_fast.devices
import spt_fast.token_store
from spt_fast import Prototypes, build_prototypes
from spt_fast.clustering import KMeans
from spt_fast.devices import free_memory
from spt_fast.errors import InputError
from spt_fast.side_stream import SideStream
from spt_fast.token_store import TokenStore

BATCH = 2 * 5 * 3 * 4  # bytes of one of the store's batches


def token_batches(count: int = 12) -> list[Tensor]:
    return list(torch.randn(count, 2, 5, 3, generator=torch.Generator().manual_seed(0)))


def store_of(made: list[Tensor], **kwargs: Any) -> tuple[TokenStore, list[int]]:
    """A store, and a list that grows by one entry whenever the tokens are made."""
    begun: list[int] = []

    def make() -> Iterator[Tensor]:
        begun.append(1)
        yield from made

    return TokenStore(make, **kwargs), begun


def whole(chunks: TokenStore) -> Tensor:
    return torch.cat(list(chunks), dim=1)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches to a chunk."""
    monkeypatch.setitem(spt_fast.token_store.CHUNK_BYTES, "cpu", 2 * BATCH)


@pytest.fixture
def backbone(make_backbone: Callable[..., Any]) -> Any:
    return make_backbone()


# --- The store -------------------------------------------------------------------------------------------------------


def test_tokens_that_fit_are_kept_as_they_are(small_chunks: None) -> None:
    made = token_batches(11)
    store, begun = store_of(made, budget=11 * BATCH)
    for _ in range(3):
        assert [chunk.shape[1] for chunk in store] == [10, 10, 10, 10, 10, 5]
        assert torch.equal(whole(store), torch.cat(made, dim=1))
    assert begun == [1] and store.place == "device memory"
    assert store.why == "they take 1.29 KiB, and 1.29 KiB may be used"


def test_a_batch_larger_than_a_chunk_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(spt_fast.token_store.CHUNK_BYTES, "cpu", 1)
    store, _ = store_of(token_batches(3))
    assert [chunk.shape for chunk in store] == [(2, 5, 3)] * 3


@pytest.mark.parametrize("budget", [0, 1, 5 * BATCH, 12 * BATCH - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tokens_that_do_not_fit_go_to_disk_in_bfloat16(
    small_chunks: None, tmp_path: Path, budget: int, dtype: torch.dtype
) -> None:
    made = [batch.to(dtype) for batch in token_batches()]
    cache = tmp_path / "new" / "cache"
    store, begun = store_of(made, budget=budget * dtype.itemsize // 4, cache=cache, remake=False)
    assert store.place == "disk" and str(cache) in store.why and "more than the" in store.why
    for _ in range(3):
        read = whole(store)
        assert read.dtype == torch.bfloat16
        assert torch.equal(read, torch.cat(made, dim=1).bfloat16())
    assert begun == [1]
    assert list(cache.iterdir()) == []  # the file never had a name


def test_many_chunks_on_disk_hold_no_file_open_each(small_chunks: None, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    made = token_batches() * 100
    store, _ = store_of(made, budget=0, cache=tmp_path)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert torch.equal(whole(store), torch.cat(made, dim=1).bfloat16())
    del store
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_an_error_on_the_way_leaves_no_file(small_chunks: None, tmp_path: Path) -> None:
    def breaking() -> Iterator[Tensor]:
        yield from token_batches()
        assert list(tmp_path.iterdir()) == []
        raise Interrupted

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Interrupted):
        TokenStore(breaking, budget=3 * BATCH, cache=tmp_path)
    gc.collect()
    assert list(tmp_path.iterdir()) == [] and len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("budget", [0, 5 * BATCH, 12 * BATCH - 1])
def test_without_a_cache_tokens_are_made_again_at_every_pass(small_chunks: None, budget: int) -> None:
    made = token_batches()
    store, begun = store_of(made, budget=budget)
    assert store.place == "nowhere" and store.why.endswith("and no cache on disk was named")
    assert begun == [1]
    for passes in range(3):
        assert [chunk.shape[1] for chunk in store] == [10] * 6
        assert torch.equal(whole(store), torch.cat(made, dim=1))
        assert len(begun) == 1 + 2 * (passes + 1)


def test_what_can_be_read_only_once_has_to_fit_somewhere(small_chunks: None, tmp_path: Path) -> None:
    made = token_batches()
    message = "can be read only once.*more than the 600 bytes that may be used of device memory.*token_cache"
    with pytest.raises(InputError, match=message):
        store_of(made, budget=600, remake=False)
    for allowed in ({"budget": 12 * BATCH}, {"budget": 0, "cache": tmp_path}):
        store, _ = store_of(made, remake=False, **allowed)
        assert torch.equal(whole(store).bfloat16(), torch.cat(made, dim=1).bfloat16())


@pytest.mark.parametrize(("free", "place"), [(24 * BATCH, "device memory"), (24 * BATCH - 2, "nowhere")])
def test_auto_is_half_of_what_is_free(
    small_chunks: None, monkeypatch: pytest.MonkeyPatch, free: int, place: str
) -> None:
    monkeypatch.setattr(spt_fast.token_store, "free_memory", lambda device: free)
    store, _ = store_of(token_batches())
    assert store.place == place and "1.4" in store.why  # KiB
    assert whole(store).shape == (2, 60, 3)


def test_no_tokens_at_all() -> None:
    store, _ = store_of([], budget=0)
    assert list(store) == [] and store.place == "device memory"


# --- Free memory -----------------------------------------------------------------------------------------------------


def control_group(folder: Path, **contents: str) -> Path:
    for name, content in contents.items():
        (folder / name.replace("_", ".", 1)).write_text(content)
    return folder


def test_free_memory_is_less_than_there_is() -> None:
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 10 << 20 < free_memory(torch.device("cpu")) < there


@pytest.mark.parametrize(
    ("contents", "free"),
    [
        (
            {"memory_max": "5000000\n", "memory_current": "2000000\n", "memory_stat": "anon 2000000\n"},
            3_000_000,
        ),
        # What only keeps files at hand is given up when somebody needs it.
        (
            {
                "memory_max": "5000000\n",
                "memory_current": "4500000\n",
                "memory_stat": "anon 500000\ninactive_file 1000000\nactive_file 3000000\nslab 7\n",
            },
            4_500_000,
        ),
        ({"memory_max": "5000000\n", "memory_current": "6000000\n", "memory_stat": "anon 6000000\n"}, 0),
    ],
    ids=["limit", "cached files", "beyond the limit"],
)
def test_free_memory_respects_a_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: dict[str, str], free: int
) -> None:
    monkeypatch.setattr(spt_fast.devices, "CONTROL_GROUP", control_group(tmp_path, **contents))
    assert free_memory(torch.device("cpu")) == free


@pytest.mark.parametrize(
    "contents",
    [{}, {"memory_max": "max\n", "memory_current": "5\n", "memory_stat": "anon 5\n"}],
    ids=["none", "no limit"],
)
def test_a_control_group_without_a_limit_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: dict[str, str]
) -> None:
    monkeypatch.setattr(spt_fast.devices, "CONTROL_GROUP", control_group(tmp_path, **contents))
    assert free_memory(torch.device("cpu")) > 10 << 20


# --- Prototypes, wherever their tokens are ---------------------------------------------------------------------------


def check_equal(one: Prototypes, other: Prototypes) -> None:
    for name in ("values", "counts", "inertia"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.fixture
def a_chunk_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(spt_fast.token_store.CHUNK_BYTES, "cpu", 1)


@pytest.mark.parametrize("capture", ["paper", "released"])
def test_tokens_that_are_kept_nowhere_give_the_same_prototypes(
    backbone: Any, a_chunk_a_batch: None, capture: Any
) -> None:
    job: dict[str, Any] = {"num_prompts": [3, 200], "seed": 1, "capture": capture}
    kept = build_prototypes(backbone, batches(), token_budget=10**9, **job)
    source = ReIterable(batches())
    again = build_prototypes(backbone, source, token_budget=0, **job)
    for number, each in again.items():
        check_equal(each, kept[number])
        assert each.metadata["images"] == 40 and each.metadata["tokens"] == 640
        assert each.metadata["tokens_kept"] == (
            "nowhere: they take more than the 0 bytes that may be used of device memory, and no cache on disk was named"
        )
        assert kept[number].metadata["tokens_kept"].startswith("device memory: they take ")
        assert kept[number].metadata["tokens_kept"].endswith(" and 954 MiB may be used")
    assert source.passes > 4


@pytest.mark.parametrize(
    "budget", [0, 100_000]
)  # all of them on disk; the first ones in memory until the others come
def test_tokens_on_disk_are_clustered_as_bfloat16(
    backbone: Any, a_chunk_a_batch: None, tmp_path: Path, budget: int
) -> None:
    seen = []

    def look(stage: str, done: int, total: int | None) -> None:
        seen.append(list(tmp_path.iterdir()))

    job: dict[str, Any] = {"num_prompts": 5, "seed": 1}
    built = build_prototypes(
        backbone, iter(batches()), token_budget=budget, token_cache=tmp_path, progress=look, **job
    )
    tokens = stacked_tokens(backbone, batches()).bfloat16()
    expected = KMeans(5, max_iter=300, random_state=1).fit(list(tokens.split(10 * 16, dim=1)))
    assert torch.equal(built.values, expected.cluster_centers_)
    assert torch.equal(built.counts, expected.counts_) and torch.equal(built.inertia, expected.inertia_)
    in_memory = build_prototypes(backbone, batches(), **job)
    assert not torch.equal(built.values, in_memory.values)
    torch.testing.assert_close(built.inertia, in_memory.inertia, rtol=5e-3, atol=0)
    kept = built.metadata["tokens_kept"]
    assert kept.startswith("disk: they take more than the ") and f"{tmp_path} was named as a cache" in kept
    assert built.metadata["images"] == 40
    assert len(seen) > 4 and not any(seen) and list(tmp_path.iterdir()) == []


def test_a_backbone_in_bfloat16_loses_nothing_on_disk(
    make_backbone: Callable[..., Any], a_chunk_a_batch: None, tmp_path: Path
) -> None:
    backbone = make_backbone().bfloat16()
    kept = build_prototypes(backbone, batches(), num_prompts=4)
    check_equal(
        build_prototypes(backbone, batches(), num_prompts=4, token_budget=0, token_cache=tmp_path), kept
    )


@pytest.mark.parametrize("stage", ["layer tokens", "k-means passes"])
@pytest.mark.parametrize("cached", [False, True])
def test_an_interrupted_build_leaves_no_tokens_and_goes_on(
    backbone: Any, a_chunk_a_batch: None, tmp_path: Path, stage: str, cached: bool
) -> None:
    cache, checkpoint = tmp_path / "cache", tmp_path / "unfinished"
    job: dict[str, Any] = {"num_prompts": 5, "checkpoint_minutes": 0, "token_budget": 0}
    job |= {"token_cache": cache} if cached else {}
    straight = build_prototypes(backbone, batches(), **job)

    def stop(at: str, done: int, total: int | None) -> None:
        if at == stage and done == (30 if stage == "layer tokens" else 3):
            raise Interrupted

    with pytest.raises(Interrupted):
        build_prototypes(backbone, batches(), checkpoint=checkpoint, progress=stop, **job)
    gc.collect()
    assert not cached or list(cache.iterdir()) == []
    assert checkpoint.exists() == (stage == "k-means passes")
    check_equal(build_prototypes(backbone, batches(), checkpoint=checkpoint, resume=True, **job), straight)
    assert not checkpoint.exists()


def test_a_checkpoint_goes_on_wherever_tokens_are_kept(
    backbone: Any, a_chunk_a_batch: None, tmp_path: Path
) -> None:
    """The next machine may have less memory free."""
    job: dict[str, Any] = {"num_prompts": 5, "checkpoint_minutes": 0}

    def stop(at: str, done: int, total: int | None) -> None:
        if (at, done) == ("k-means passes", 3):
            raise Interrupted

    with pytest.raises(Interrupted):
        build_prototypes(backbone, batches(), checkpoint=tmp_path / "unfinished", progress=stop, **job)
    resumed = build_prototypes(
        backbone, batches(), checkpoint=tmp_path / "unfinished", resume=True, token_budget=0, **job
    )
    check_equal(resumed, build_prototypes(backbone, batches(), **job))


def test_images_that_can_be_read_only_once(backbone: Any, a_chunk_a_batch: None, tmp_path: Path) -> None:
    expected = build_prototypes(backbone, batches(), num_prompts=3)
    check_equal(build_prototypes(backbone, iter(batches()), num_prompts=3), expected)
    with pytest.raises(InputError, match="images can be read only once.*more than the 1.95 KiB"):
        build_prototypes(backbone, iter(batches()), num_prompts=3, token_budget=2000)
    with pytest.raises(
        InputError, match="images can be read only once, and capture='released' needs them twice"
    ):
        build_prototypes(backbone, iter(batches()), num_prompts=3, capture="released")
    # A single group of layers is read once, whatever it is captured from.
    build_prototypes(backbone, iter(batches()), num_prompts=3, capture="released", layers="last")


def test_a_loader_is_not_begun_without_need(backbone: Any) -> None:
    """Beginning is dear where it starts processes."""
    for method in ("kmeans", "minibatch_kmeans"):
        source = ReIterable(batches())
        build_prototypes(backbone, source, num_prompts=3, method=method)  # type: ignore[arg-type]
        assert source.passes == 1


# --- Beside the forward pass -----------------------------------------------------------------------------------------


def test_on_a_cpu_nothing_is_made_ahead_of_its_time() -> None:
    order: list[str] = []

    def made() -> Iterator[list[Tensor]]:
        for index in range(3):
            order.append(f"made {index}")
            yield [torch.tensor(index)]

    side = SideStream(torch.device("cpu"))
    for batch in side.ahead(made()):
        with side.beside(batch):
            order.append(f"used {int(batch[0])}")
    side.join()
    assert order == ["made 0", "used 0", "made 1", "used 1", "made 2", "used 2"]
    assert list(side.ahead([])) == []
