"""Clustering by several processes equals clustering by one: 1, 2 and 3 of them, with unequal shares."""

import warnings
from pathlib import Path
from typing import Any

import clustering_processes
import pytest
import torch
from clustering_processes import SHARES, TOKENS, outcomes
from forked_processes import run_together
from torch import Tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes have written."""
    folder = tmp_path_factory.mktemp("processes")
    run_together(clustering_processes.main, folder, 3)
    return folder


@pytest.fixture(scope="module", params=SHARES, ids=lambda shares: f"{len(shares)} processes")
def run(request: Any, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What each process found, and what one process finds with all tokens."""
    shares = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = outcomes(shares, None)
    found = [
        torch.load(folder / f"{len(shares)}_{rank}.pt", weights_only=False) for rank in range(len(shares))
    ]
    return found, alone


def clusterings(results: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    return {name: found for name, found in results.items() if isinstance(found, dict) and name != "refused"}


def test_every_process_ends_with_the_same(run):
    first, *others = run[0]
    for other in others:
        assert clusterings(other).keys() == clusterings(first).keys()
        for name, found in clusterings(first).items():
            for what, value in found.items():
                theirs = clusterings(other)[name][what]
                assert value.dtype == theirs.dtype and torch.equal(value, theirs), (name, what)


def test_together_they_find_what_one_finds_alone(run):
    (first, *_), alone = run
    for name, expected in clusterings(alone).items():
        for what, value in expected.items():
            found = clusterings(first)[name][what]
            assert found.shape == value.shape and found.dtype == value.dtype, (name, what)
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4, msg=f"{name}: {what}")
    assert first["score"] == pytest.approx(alone["score"], rel=1e-5)
    for name in ("mini-batches", "mini-batches of chunks"):
        assert first[f"{name}, steps"] == alone[f"{name}, steps"]
    assert torch.equal(first["resumed"]["cluster_centers_"], first["not interrupted"]["cluster_centers_"])


def test_samples_and_labels_are_those_of_one_process(run):
    ranks, alone = run
    for name in ("stream", "weighted stream"):
        for rank in ranks:
            assert torch.equal(rank[f"{name}, sample"], alone[f"{name}, sample"])
    assert torch.equal(torch.cat([rank["labels"] for rank in ranks]), alone["labels"])


def test_what_one_process_cannot_take_is_refused_by_all(run):
    ranks, _ = run
    where = f" of process {len(ranks) - 1}" if len(ranks) > 1 else ""
    for rank in ranks:
        refused = rank["refused"]
        for name in ("in memory", "chunks", "mini-batches", "stream"):
            assert refused[name] == f"X holds NaN or infinite values, first in row 5{where}", name
        assert refused["too few"] == f"X holds {TOKENS} tokens, fewer than n_clusters={TOKENS + 1}"
        assert refused["no tokens"] == "X yields no tokens"
        assert refused["no batch"] == "X holds no tokens"
        if len(ranks) > 1:
            for name in ("features", "features of a batch"):
                assert "X differs between processes in its number of layers or features" in refused[name]
        assert rank["kept"]


def test_without_a_seed_the_processes_agree_on_one(run):
    ranks, _ = run
    for name in ("no seed", "stream without seed"):
        assert ranks[0][name]["counts_"].sum() == TOKENS
