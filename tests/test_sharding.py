"""A backbone in shards on two processes is the backbone: same training, same prototypes, half the weights in each."""

from pathlib import Path
from typing import Any

import pytest
import torch
import two_sharded_processes
from forked_processes import run_together
from tiny import tiny_backbone
from training_cases import assert_same

from spt_fast import Adapter


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("sharded")
    run_together(two_sharded_processes.main, folder, 2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)], folder


def test_each_process_keeps_half_of_the_blocks(ranks: Any) -> None:
    for rank in ranks[0]:
        whole, shard = rank["numbers"]
        assert whole == sum(parameter.numel() for parameter in tiny_backbone().blocks.parameters())
        assert shard == rank["numbers_after"] == whole / 2


@pytest.mark.parametrize("run", ["", "_checkpointed"])
def test_training_is_that_on_a_whole_backbone(ranks: Any, run: str) -> None:
    for rank in ranks[0]:
        (ours, losses), (expected, expected_losses) = rank[f"sharded{run}"], rank[f"whole{run}"]
        assert_same(ours, expected)
        assert losses == expected_losses
    assert_same(ranks[0][0][f"sharded{run}"][0], ranks[0][1][f"sharded{run}"][0])


def test_prototypes_are_those_of_a_whole_backbone(ranks: Any) -> None:
    for rank in ranks[0]:
        assert torch.equal(rank["sharded_prototypes"], rank["whole_prototypes"])


def test_adapters_belong_to_the_whole_backbone(ranks: Any) -> None:
    assert all(rank["identities"] for rank in ranks[0])
    Adapter.load(ranks[1] / "sharded" / "last.safetensors").attach(tiny_backbone())


def test_what_cannot_be_is_said(ranks: Any) -> None:
    for rank in ranks[0]:
        assert "there is no group" in rank["without_group"]
        assert "sharded already" in rank["twice"]
        assert "torch.float32 and cannot become torch.bfloat16" in rank["cast"]
