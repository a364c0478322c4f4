"""The paper's ablations: runs that differ in one thing, trained with several seeds, in a table and a figure."""

from __future__ import annotations

from spt_fast.ablations.definitions import ABLATIONS, Choices
from spt_fast.ablations.running import Finished, run_ablation
from spt_fast.ablations.subsets import Subset, subset
from spt_fast.ablations.variants import Ablation, Variant
from spt_fast.ablations.workplace import ModelSource, Workplace

__all__ = [
    "ABLATIONS",
    "Ablation",
    "Choices",
    "Finished",
    "ModelSource",
    "Subset",
    "Variant",
    "Workplace",
    "run_ablation",
    "subset",
]
