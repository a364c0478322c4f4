"""Prototypes by herding: all layers of a backbone at once, from images to vectors, in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, cat

from spt_fast.chosen_images import ChosenImages
from spt_fast.herding import Herding
from spt_fast.prototype_clustering import Plan, check_enough, images_of_all, stream_once
from spt_fast.prototypes_checkpoint import Checkpoint


def herd_in_one_pass(
    plan: Plan, images: ChosenImages, store: Checkpoint
) -> tuple[dict[int, Tensor], dict[str, Any], dict[int, dict[str, Any]]]:
    """Herding while the tokens pass; every number of prompts from the same pass.

    Returns:
        Number of prompts -> prototypes ``[L, P, D]`` on the CPU; what the pass has seen; number of prompts -> what is
        known of its prototypes.

    Raises:
        InputError: no images, fewer tokens than prompts, or tokens that are not finite.
    """
    herds = [Herding(max(plan.num_prompts), plan.seed) for _ in plan.groups]
    stream_once(plan, images, store, herds)
    check_enough(plan, images)
    found: dict[int, Tensor] = {}
    of_each: dict[int, dict[str, Any]] = {}
    for number in plan.num_prompts:
        parts = [herd.find(number) for herd in herds]
        found[number] = cat([part.values for part in parts])
        of_each[number] = {
            "squared_mmd": [each for part in parts for each in part.squared_mmd],
            "descended": [each for part in parts for each in part.descended],
        }
    seen = {
        "images": images_of_all(images),
        "tokens": herds[0].tokens,
        "bandwidths": [each for herd in herds for each in herd.bandwidths],
    }
    return found, seen, of_each
