"""Clustering beside the forward pass on a GPU, and tokens kept farther and farther from it: the same prototypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import spt_fast.prototype_clustering
import spt_fast.token_store
from spt_fast import Prototypes, build_prototypes
from spt_fast.clustering import seeding
from spt_fast.devices import free_memory
from spt_fast.side_stream import SideStream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STREAM: dict[str, Any] = {"method": "minibatch_kmeans", "num_prompts": 6, "seed": 1}


@pytest.fixture
def backbone(make_backbone: Callable[..., VisionTransformer]) -> VisionTransformer:
    return make_backbone(embed_dim=192, img_size=64).cuda()


@pytest.fixture(autouse=True)
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The running means begin to move after a few batches."""
    monkeypatch.setattr(seeding, "MOST_TOKENS", 2048)
    monkeypatch.setattr(spt_fast.prototype_clustering, "MICRO_CLUSTERS", 128)


def images(batches: int = 12) -> list[Tensor]:
    return list(torch.randn(batches * 8, 3, 64, 64, generator=torch.Generator().manual_seed(0)).split(8))


def check_equal(one: Prototypes, other: Prototypes) -> None:
    for name in ("values", "counts", "inertia"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_work_beside_the_forward_pass_sees_what_was_made_for_it() -> None:
    side = SideStream(torch.device("cuda"))
    size, count = 1 << 22, 20
    sums: list[Tensor] = []

    def made() -> Iterator[list[Tensor]]:
        for index in range(count):
            torch.cuda._sleep(2_000_000)  # about a millisecond
            # Its memory is what an earlier batch had, if that was let go of.
            yield [torch.full((size,), float(index), device="cuda")]

    for batch in side.ahead(made()):
        with side.beside(batch):
            torch.cuda._sleep(5_000_000)
            sums.append(batch[0].sum(dtype=torch.float64))
        del batch
    side.join()
    assert torch.stack(sums).tolist() == [float(index * size) for index in range(count)]


def test_the_next_batch_is_made_before_the_last_is_used() -> None:
    order: list[str] = []

    def made() -> Iterator[list[Tensor]]:
        for index in range(3):
            order.append(f"made {index}")
            yield [torch.tensor(index, device="cuda")]

    side = SideStream(torch.device("cuda"))
    for batch in side.ahead(made()):
        with side.beside(batch):
            order.append(f"used {int(batch[0])}")
    assert order == ["made 0", "made 1", "used 0", "made 2", "used 1", "used 2"]
    assert list(side.ahead([])) == []


@pytest.mark.parametrize("num_prompts", [6, [3, 6]])
@pytest.mark.parametrize("saving", [False, True])
def test_overlap_changes_no_bit_of_a_stream(
    backbone: VisionTransformer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    num_prompts: Any,
    saving: bool,
) -> None:
    job = {**STREAM, "num_prompts": num_prompts}
    beside = {"checkpoint": tmp_path / "unfinished", "checkpoint_minutes": 0} if saving else {}
    overlapped = build_prototypes(backbone, images(), **job, **beside)
    monkeypatch.setattr(
        spt_fast.prototype_clustering, "SideStream", lambda device: SideStream(torch.device("cpu"))
    )
    in_turn = build_prototypes(backbone, images(), **job)
    if num_prompts == 6:
        check_equal(overlapped, in_turn)
    else:
        for number in num_prompts:
            check_equal(overlapped[number], in_turn[number])


def test_a_stream_interrupted_on_a_gpu_goes_on(backbone: VisionTransformer, tmp_path: Path) -> None:
    def breaking() -> Iterator[Tensor]:
        yield from images()[:7]
        raise KeyboardInterrupt

    job = {**STREAM, "checkpoint": tmp_path / "unfinished", "checkpoint_minutes": 0}
    with pytest.raises(KeyboardInterrupt):
        build_prototypes(backbone, breaking(), **job)
    check_equal(
        build_prototypes(backbone, images(), **job, resume=True), build_prototypes(backbone, images(), **job)
    )


@pytest.mark.parametrize("method", ["kmeans", "minibatch_kmeans"])
def test_a_gpu_finds_what_a_cpu_finds(backbone: VisionTransformer, method: str) -> None:
    job = {**STREAM, "method": method}
    on_gpu = build_prototypes(backbone, images(), **job)
    on_cpu = build_prototypes(backbone.cpu(), images(), **job)
    assert on_gpu.values.device.type == "cpu"
    # A token between two centres may go elsewhere, and move them all a little.
    torch.testing.assert_close(on_gpu.inertia, on_cpu.inertia, rtol=1e-2, atol=0)
    assert torch.equal(on_gpu.counts.sum(dim=1), on_cpu.counts.sum(dim=1))
    assert on_gpu.metadata["images"] == on_cpu.metadata["images"] == 96


def test_tokens_farther_from_the_gpu_give_the_same_prototypes(
    backbone: VisionTransformer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(spt_fast.token_store.CHUNK_BYTES, "cuda", 1 << 20)
    job: dict[str, Any] = {"num_prompts": 6, "seed": 1}
    near = build_prototypes(backbone, images(), **job)
    assert near.metadata["tokens_kept"].startswith("device memory: ")
    host = build_prototypes(backbone, images(), **job, token_budget=2 << 20)
    assert host.metadata["tokens_kept"].startswith("host memory: they take more than the 2 MiB")
    check_equal(host, near)

    monkeypatch.setattr(spt_fast.token_store, "free_memory", lambda device: 4 << 20)
    nowhere = build_prototypes(backbone, images(), **job, token_budget=0)
    assert nowhere.metadata["tokens_kept"].startswith("nowhere: they take more than the 2 MiB")
    check_equal(nowhere, near)
    disk = build_prototypes(backbone, images(), **job, token_budget=0, token_cache=tmp_path)
    assert disk.metadata["tokens_kept"].startswith("disk: ")
    torch.testing.assert_close(disk.inertia, near.inertia, rtol=1e-2, atol=0)
    assert list(tmp_path.iterdir()) == []


def test_free_memory_of_a_gpu() -> None:
    device = torch.device("cuda")
    before = free_memory(device)
    assert 0 < before < torch.cuda.get_device_properties(device).total_memory
    held = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    assert free_memory(device) < before
    del held
