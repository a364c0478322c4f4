"""The benchmarks of prompt attention, of a training step and of many tasks, at sizes that take seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks import attention, multi_task, train_step

TINY = "vit_tiny_patch16_224"


def results(app: Any, folder: Path, *arguments: str) -> dict[str, Any]:
    file = folder / "results.json"
    done = CliRunner().invoke(app, [*arguments, "--rounds", "1", "--output", str(file)])
    assert done.exit_code == 0, done.output + repr(done.exception)
    record = json.loads(file.read_text())
    assert {"device", "threads", "versions", "commit", "date"} <= set(record["machine"])
    return record


def test_train_step(tmp_path: Path) -> None:
    arguments = ("--model", TINY, "--batch-size", "1", "--num-prompts", "3")
    record = results(train_step.app, tmp_path, *arguments)
    assert [row["peer"] for row in record["rows"]] == ["spt-fast", "naive VPT", "no prompts"]
    for row in record["rows"]:
        assert len(row["ms"]) == 1 and row["ms"][0] > 0
        assert row["share_of_matmul_peak"] == pytest.approx(row["tflops"] / record["matmul_peak_tflops"])


def test_attention(tmp_path: Path) -> None:
    record = results(attention.app, tmp_path, "--batch-size", "1", "--num-prompts", "2")
    assert [row["peer"] for row in record["rows"]] == ["spt-fast torch", "concatenate + torch's choice"]
    assert all(row["ms"][0] > 0 and row["forward_ms"][0] > 0 for row in record["rows"])


def test_multi_task(tmp_path: Path) -> None:
    arguments = ("--model", TINY, "--batch-size", "3", "--tasks", "2", "--num-prompts", "2")
    record = results(multi_task.app, tmp_path, *arguments)
    assert [row["peer"] for row in record["rows"]] == [
        "mixed tasks, one batch",
        "one task, one batch",
        "task by task",
    ]


def test_a_peer_that_computes_something_else_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    real = train_step.naive_forward
    monkeypatch.setattr(train_step, "naive_forward", lambda *args: 2 * real(*args))
    arguments = ["--model", TINY, "--batch-size", "1", "--num-prompts", "3", "--rounds", "1"]
    done = CliRunner().invoke(train_step.app, arguments)
    assert "computes something else" in str(done.exception)


def test_useful_arithmetic_is_that_of_the_function() -> None:
    """Without prompts and with all tokens read, it is what torch counts for the plain ViT, forward and backward."""
    backbone = timm.create_model(TINY, num_classes=0, global_pool="avg", class_token=False, depth=3)
    backbone = backbone.eval().requires_grad_(False)
    images = torch.randn(2, 3, 224, 224)
    with FlopCounterMode(display=False) as forward:
        backbone(images)
    tokens = backbone.patch_embed(images).requires_grad_()
    with FlopCounterMode(display=False) as backward:
        backbone.blocks(tokens).sum().backward()
    first_projection = (
        2 * tokens.numel() * 3 * backbone.embed_dim
    )  # its gradient goes nowhere in a prompted ViT
    # torch counts the attention's backward pass with the scores computed again: 5 products instead of 4
    rescored = 2 * 3 * 2 * 196**2 * backbone.embed_dim
    patches = 2 * 2 * 196 * backbone.patch_embed.proj.weight.numel()
    expected = patches + backward.get_total_flops() - first_projection - rescored
    assert forward.get_total_flops() < expected
    assert train_step.step_flops(backbone, batch=2, prompts=0) == expected
