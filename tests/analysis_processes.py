"""The measures in two processes that share the tokens out; forks, which start at once and need no gradient."""

import multiprocessing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spt_fast.analysis import ClusterSizes, FeatureCKA, MaximumMeanDiscrepancy, MutualInformation
from spt_fast.errors import InputError

PROMPTS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 7, 4, 6, generator=torch.Generator().manual_seed(1))
BANDWIDTH = torch.tensor([1.5, 2.5])
SHARES = [slice(0, 2), slice(2, 7)]


def outcomes(tokens: Tensor) -> dict[str, Tensor]:
    """What all measures find, image by image."""
    measures: dict[str, Any] = {
        "nmi": MutualInformation(PROMPTS),
        "nmi per image": MutualInformation(PROMPTS, per="image"),
        "sizes": ClusterSizes(PROMPTS),
        "mmd": MaximumMeanDiscrepancy([PROMPTS], bandwidth=BANDWIDTH, sample_size=100),
    }
    cka = FeatureCKA(blocks=2, features=6)
    for image in tokens.split(1, dim=1):
        for measure in (*measures.values(), cka):
            measure.update(image)
    for measure in measures.values():
        measure.compute()  # which changes nothing
    found = {name: measure.compute() for name, measure in measures.items()}
    return {**found, "mmd": found["mmd"].values[0], "cka": cka.compute(PROMPTS)}


def in_two_processes(folder: Path) -> list[dict[str, Any]]:
    """What each process finds with its share of the tokens, and where one of them has all and the other none."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_work, args=(folder, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def _work(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found: dict[str, Any] = dict(outcomes(TOKENS[:, SHARES[rank]]))
    found |= {f"{name}, alone": each for name, each in outcomes(TOKENS[:, : 7 * rank]).items()}
    try:
        MaximumMeanDiscrepancy([PROMPTS])
    except InputError as error:
        found["refused"] = str(error)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
