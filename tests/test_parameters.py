"""docs/parameters.md: how many parameters each method trains on ViT-B/16, beside what the paper says."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import timm
import torch

import spt_fast.methods.own_backbone
from spt_fast.dataset_facts import dataset_facts
from spt_fast.methods import METHODS, build_model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "parameters.md"
# In millions, from Table 3 and Table S4 of the paper: FGVC and VTAB-1k.
PAPER = {
    "full": (85.98, 85.84),
    "linear": (0.18, 0.04),
    "bitfit": (0.28, 0.14),
    "adapter": (0.41, 0.27),
    "lora": (None, 0.32),
    "ssf": (0.39, 0.24),
    "snf": (0.25, 0.29),
    "moment_probing": (1.20, None),
    "vpt_shallow": (0.25, 0.11),
    "vpt_deep": (0.85, 0.64),
    "e2vpt": (0.56, 0.31),
    "spt_shallow": (0.25, 0.11),
    "spt_deep": (0.36, 0.22),
}
# Where the page says why ours differ.
EXPLAINED = {"lora", "vpt_deep", "e2vpt", "snf", "moment_probing"}


def trained(name: str, num_classes: int) -> int:
    """Parameters that require a gradient; nothing is stored, only shapes are made."""
    method = METHODS[name]
    with torch.device("meta"):
        backbone = timm.create_model("vit_base_patch16_224", num_classes=0)
        start: dict[str, Any] = {}
        if method.init is None and method.depth is not None:
            start = {"num_prompts": method.num_prompts}
        elif method.depth is not None:
            rows = 12 if method.depth == "deep" else 1
            start = {"prompts": torch.zeros(rows, method.num_prompts, 768, device="cpu")}
        model = build_model(name, backbone, num_classes=num_classes, **start)
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


def average(name: str, benchmark: str) -> float:
    """Millions of parameters, the head included, on average over the tasks of a benchmark."""
    tasks = [facts.num_classes for facts in dataset_facts().values() if facts.benchmark == benchmark]
    one, two = trained(name, 1), trained(name, 2)  # every class adds as many
    return mean(one + (classes - 1) * (two - one) for classes in tasks) / 1e6


@pytest.fixture(autouse=True)
def no_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights without values have none."""
    monkeypatch.setattr(spt_fast.methods.own_backbone, "backbone_identity", lambda backbone: {})


def test_the_table_is_what_the_models_have() -> None:
    table = "| method | without the head | FGVC | Table 3 | VTAB-1k | Table S4 |\n|---|---|---|---|---|---|\n"
    head = 768 + 1
    for name in METHODS:
        fgvc, vtab = PAPER.get(name, (None, None))
        cells = [
            f"`{name}`",
            f"{trained(name, 1) - head:,}",
            f"{average(name, 'FGVC'):.2f} M",
            "–" if fgvc is None else f"{fgvc:.2f} M",
            f"{average(name, 'VTAB-1k'):.2f} M",
            "–" if vtab is None else f"{vtab:.2f} M",
        ]
        table += f"| {' | '.join(cells)} |\n"
    assert f"\n\n{table}\n" in PAGE.read_text(encoding="utf-8"), table


@pytest.mark.parametrize("name", sorted(PAPER.keys() - EXPLAINED))
def test_counts_are_the_papers(name: str) -> None:
    """To the last digit that the paper prints, or one more or less of it: class counts are averages."""
    for benchmark, wanted in zip(("FGVC", "VTAB-1k"), PAPER[name], strict=True):
        if wanted is not None:
            assert abs(average(name, benchmark) - wanted) < 0.011, benchmark
