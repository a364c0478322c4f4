"""build_prototypes, interrupted: what is kept, and that going on ends bit for bit where an uninterrupted run ends."""

import math
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from tiny import Interrupted, ReIterable, batches, noise
from torch import Tensor

import spt_fast.clustering.lloyd
import spt_fast.prototype_clustering
import spt_fast.prototypes_checkpoint
import spt_fast.tokens
from spt_fast import Prototypes, build_prototypes
from spt_fast.clustering import seeding
from spt_fast.errors import CheckpointError, InputError
from spt_fast.prototypes_checkpoint import Checkpoint

CLUSTERING = ["kmeans", "minibatch_kmeans"]
PASSES = "k-means passes"


@pytest.fixture
def backbone(make_backbone):
    return make_backbone()


@pytest.fixture
def job(tmp_path) -> dict[str, Any]:
    return {"num_prompts": 5, "seed": 2, "checkpoint": tmp_path / "unfinished", "checkpoint_minutes": 0}


def interrupt_at(stage: str, done: int, times: int = 1) -> Callable[[str, int, int | None], None]:
    """A progress callback that stops the build when it is told this for the ``times``-th time."""
    told = []

    def progress(at: str, number: int, total: int | None) -> None:
        if (at, number) == (stage, done):
            told.append(1)
            if len(told) == times:
                raise Interrupted

    return progress


def check_equal(one: Prototypes, other: Prototypes) -> None:
    for name in ("values", "counts", "inertia"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("images", "tokens"):
        assert one.metadata[name] == other.metadata[name]


@pytest.fixture
def count(monkeypatch) -> dict[str, int]:
    """How many batches of images were looked at, and how many passes over tokens were made, so far."""
    counted = {"batches": 0, "passes": 0}

    def counting(module: Any, name: str, what: str) -> None:
        original = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counted[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapped)

    counting(spt_fast.tokens, "layer_tokens", "batches")
    counting(spt_fast.clustering.lloyd, "step", "passes")
    return counted


@pytest.mark.parametrize("capture", ["paper", "released"])
@pytest.mark.parametrize("interrupted_at", [1, 2, 5, 9])
def test_kmeans_goes_on_after_the_last_pass_that_was_saved(
    backbone, job, count, tmp_path, interrupted_at, capture
):
    job["capture"] = capture
    whole = build_prototypes(backbone, batches(), **job)
    all_passes = count["passes"]
    assert all_passes > 10 and not job["checkpoint"].exists()
    with pytest.raises(Interrupted):
        build_prototypes(backbone, batches(), **job, progress=interrupt_at(PASSES, interrupted_at))
    # Interrupted between a pass and its being saved.
    assert job["checkpoint"].exists() == (interrupted_at > 1)
    count["passes"] = count["batches"] = 0
    resumed = build_prototypes(backbone, batches(), **job, resume=True)
    assert count["passes"] == all_passes - (interrupted_at - 1)
    assert count["batches"] == 4 * (2 if capture == "released" else 1)
    check_equal(resumed, whole)
    assert list(tmp_path.iterdir()) == []


def test_kmeans_interrupted_again_and_again(backbone, job, count):
    whole = build_prototypes(backbone, batches(), **job)
    passes = count["passes"]
    for done in range(2, 7):
        with pytest.raises(Interrupted):
            build_prototypes(backbone, batches(), **job, resume=done > 2, progress=interrupt_at(PASSES, done))
    count["passes"] = 0
    check_equal(build_prototypes(backbone, batches(), **job, resume=True), whole)
    assert count["passes"] == passes - 5


def test_passes_before_an_interruption_count_towards_max_iter(backbone, job, count):
    job["max_iter"] = 5
    with pytest.warns(ConvergenceWarning, match="max_iter=5"):
        whole = build_prototypes(backbone, batches(), **job)
    passes = count["passes"]
    with pytest.raises(Interrupted):
        build_prototypes(backbone, batches(), **job, progress=interrupt_at(PASSES, 4))
    count["passes"] = 0
    with pytest.warns(ConvergenceWarning, match="max_iter=5"):
        check_equal(build_prototypes(backbone, batches(), **job, resume=True), whole)
    assert count["passes"] == passes - 3


def test_of_several_numbers_the_finished_ones_are_not_clustered_again(backbone, job, count):
    job["num_prompts"] = [5, 9, 3]
    whole = build_prototypes(backbone, batches(), **job)
    count["passes"] = 0
    build_prototypes(backbone, batches(), **{**job, "num_prompts": [9, 3], "checkpoint": None})
    later_passes = count["passes"]
    with pytest.raises(Interrupted):  # in the second pass for 9
        build_prototypes(backbone, batches(), **job, progress=interrupt_at(PASSES, 2, times=2))
    count["passes"] = 0
    resumed = build_prototypes(backbone, batches(), **job, resume=True)
    assert count["passes"] == later_passes - 1
    for number in job["num_prompts"]:
        check_equal(resumed[number], whole[number])


@pytest.mark.parametrize("num_prompts", [5, [5, 3]])
@pytest.mark.parametrize("capture", ["paper", "released"])
def test_when_all_is_clustered_no_image_is_looked_at(backbone, job, monkeypatch, num_prompts, capture):
    job |= {"num_prompts": num_prompts, "capture": capture}
    whole = build_prototypes(backbone, batches(), **job)

    def interrupt(self: Checkpoint) -> None:
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Checkpoint, "remove", interrupt)
        build_prototypes(backbone, batches(), **job)
    source = ReIterable([])
    resumed = build_prototypes(backbone, source, **job, resume=True)
    assert source.passes == 0
    if num_prompts == 5:
        check_equal(resumed, whole)
    else:
        for number, each in resumed.items():
            check_equal(each, whole[number])


@pytest.mark.parametrize("num_prompts", [3, [3, 6]])
@pytest.mark.parametrize("processed", [1, 3, 7])
@pytest.mark.parametrize("fraction", [1.0, 0.7])
def test_a_stream_goes_on_after_the_batches_it_took_in(
    backbone, job, count, tmp_path, monkeypatch, num_prompts, processed, fraction
):
    # So that the stream starts to move its means after two batches.
    monkeypatch.setattr(seeding, "TOKENS_PER_CLUSTER", 100)
    monkeypatch.setattr(seeding, "MOST_TOKENS", 300)
    monkeypatch.setattr(spt_fast.prototype_clustering, "MICRO_CLUSTERS", 40)
    monkeypatch.setattr(spt_fast.prototype_clustering, "MICRO_CLUSTERS_PER_PROMPT", 1)
    job |= {"method": "minibatch_kmeans", "num_prompts": num_prompts, "data_fraction": fraction}
    source = batches(12, 10)
    source.insert(1, noise(0))  # an empty batch is none
    whole = build_prototypes(backbone, source, **job)
    seen = []

    def stop(stage: str, done: int, total: int | None) -> None:
        seen.append(done)
        if len(seen) > processed:
            raise Interrupted

    with pytest.raises(Interrupted):
        build_prototypes(backbone, source, **job, progress=stop)
    assert job["checkpoint"].exists()
    count["batches"] = 0
    resumed = build_prototypes(backbone, source, **job, resume=True)
    assert count["batches"] == math.ceil(12 * fraction) - processed - 1
    for one, other in zip(
        *([each] if num_prompts == 3 else each.values() for each in (resumed, whole)), strict=True
    ):
        check_equal(one, other)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_interrupted_by_its_images_goes_on(backbone, job):
    def breaking() -> Iterator[Tensor]:
        yield from batches()[:3]
        raise Interrupted

    job["method"] = "minibatch_kmeans"
    with pytest.raises(Interrupted):
        build_prototypes(backbone, breaking(), **job)
    assert job["checkpoint"].exists()
    resumed = build_prototypes(backbone, batches(), **job, resume=True)
    check_equal(resumed, build_prototypes(backbone, batches(), **job))


@pytest.mark.parametrize("method", CLUSTERING)
def test_states_are_saved_as_often_as_was_asked_for(backbone, job, monkeypatch, method):
    clock = iter(range(0, 10**6, 30))  # half a minute passes whenever anybody looks
    time = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(spt_fast.prototypes_checkpoint, "time", time)
    saves = []
    save = Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", lambda self, states: saves.append(1) or save(self, states))
    told = []
    job |= {"method": method, "checkpoint_minutes": 2}
    build_prototypes(backbone, batches(30, 2), **job, progress=lambda *event: told.append(event[0]))
    looks = told.count(PASSES if method == "kmeans" else "layer tokens")
    # Every fourth look finds two minutes gone; saving looks at the clock once more. The end of k-means is saved anyway.
    assert looks > 9 and abs(len(saves) - looks / 4) <= 1 + (method == "kmeans")
    saves.clear()
    job["checkpoint_minutes"] = 1e6
    build_prototypes(backbone, batches(), **job)
    assert len(saves) == (1 if method == "kmeans" else 0)


@pytest.mark.parametrize("method", CLUSTERING)
def test_without_resume_a_checkpoint_is_not_read(backbone, job, method):
    job["method"] = method
    job["checkpoint"].write_bytes(b"anything")
    built = build_prototypes(backbone, batches(), **job)
    check_equal(built, build_prototypes(backbone, batches(), **{**job, "checkpoint": None}))
    assert not job["checkpoint"].exists()


@pytest.mark.parametrize("method", CLUSTERING)
def test_resume_without_a_file_begins(backbone, job, method):
    job["method"] = method
    built = build_prototypes(backbone, batches(), **job, resume=True)
    check_equal(built, build_prototypes(backbone, batches(), **{**job, "checkpoint": None}))


@pytest.mark.parametrize(
    "other",
    [
        {"num_prompts": 4},
        {"num_prompts": [5]},
        {"seed": 1},
        {"method": "minibatch_kmeans"},
        {"layers": "last"},
        {"depth": "shallow"},
        {"capture": "released"},
        {"data_fraction": 0.5},
        {"max_iter": 7},
    ],
    ids=str,
)
def test_a_checkpoint_of_another_job_is_refused(backbone, job, other):
    with pytest.raises(Interrupted):
        build_prototypes(backbone, batches(), **job, progress=interrupt_at(PASSES, 3))
    kept = job["checkpoint"].read_bytes()
    ((key, value),) = other.items()
    message = rf"unfinished was begun with {key}=.* asks for {key}={re.escape(repr(value))}"
    with pytest.raises(InputError, match=message):
        build_prototypes(backbone, batches(), **{**job, **other}, resume=True)
    assert job["checkpoint"].read_bytes() == kept


def test_what_does_not_change_the_result_may_change(backbone, job, tmp_path):
    whole = build_prototypes(backbone, batches(), **job)
    with pytest.raises(Interrupted):
        build_prototypes(backbone, batches(), **job, progress=interrupt_at(PASSES, 3))
    job |= {"checkpoint_minutes": 5, "token_budget": 10**8, "token_cache": tmp_path}
    check_equal(build_prototypes(backbone, batches(), **job, resume=True), whole)


def test_a_checkpoint_of_another_backbone_or_another_kind_is_refused(make_backbone, backbone, job):
    with pytest.raises(Interrupted):
        build_prototypes(backbone, batches(), **job, progress=interrupt_at(PASSES, 3))
    with pytest.raises(InputError, match="was begun with backbone="):
        build_prototypes(make_backbone(seed=1), batches(), **job, resume=True)
    Prototypes(torch.zeros(1, 2, 3)).save(job["checkpoint"])
    with pytest.raises(CheckpointError, match="is not a checkpoint of unfinished prototypes"):
        build_prototypes(backbone, batches(), **job, resume=True)
