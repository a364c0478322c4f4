"""Runs that prune prompts and runs that do not, in one folder, from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import squares, tiny_backbone, tiny_model

from spt_fast import TrainingConfig, train
from spt_fast.errors import InputError
from spt_fast.methods.e2vpt import E2VPTViT
from spt_fast.pruned_training import train_pruned

CONFIG = TrainingConfig(epochs=1, warmup_epochs=0, batch_size=4, dtype="float32", num_workers=0)


def once(folder: Path, **kwargs: Any) -> None:
    train(tiny_model(), squares(6), output=folder, config=CONFIG, **kwargs)


def pruned(folder: Path, tokens: float = 0.5, **kwargs: Any) -> None:
    model = E2VPTViT(tiny_backbone(), torch.randn(2, 4, 32), num_classes=3, pool="avg", num_segments=4)
    train_pruned(model, squares(6), output=folder, tokens=tokens, segments=0.0, config=CONFIG, **kwargs)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


OF_ONE = {"checkpoint.pt", "config.json", "last.safetensors", "metrics.csv", "summary.json", "tensorboard"}
OF_PRUNED = {"pruning.json", "rewound", "start.safetensors", "trained"}


@pytest.mark.parametrize(
    ("first", "then", "left"),
    [(once, pruned, OF_PRUNED), (pruned, once, OF_ONE), (pruned, pruned, OF_PRUNED)],
)
def test_one_kind_replaces_the_other_only_where_asked(tmp_path: Path, first, then, left: set[str]) -> None:
    first(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="already holds a run"):
        then(tmp_path)
    if first is not then:
        with pytest.raises(InputError, match="prunes? prompts and this call does"):
            then(tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    then(tmp_path, overwrite=True)
    assert names(tmp_path) == left


def test_a_share_that_prunes_nothing_is_told(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="0.1 of 4 tokens is less than one: none is pruned"):
        pruned(tmp_path, tokens=0.1)
