"""What each of two processes does for test_prototypes_processes.py.

In the stage :func:`killed` the second process kills itself in the middle of a stream. In the stage :func:`whole` each
process writes what it ended with to FOLDER/rank{0,1}.pt; the test judges.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import Interrupted, noise, tiny_backbone
from torch import Tensor

import spt_fast.prototype_clustering
from spt_fast import Prototypes, build_prototypes
from spt_fast.clustering import seeding
from spt_fast.distributed import process_group
from spt_fast.errors import InputError

IMAGES = 13  # shares of 7 and 6 images, in 4 and 3 batches
STREAM: dict[str, Any] = {"method": "minibatch_kmeans", "seed": 4}
CLI = ["--num-prompts", "3", "--batch-size", "2", "--json"]


def share(rank: int) -> list[Tensor]:
    return list(noise(IMAGES, size=16)[rank::2].split(2))


def make_streams_small() -> None:
    """So that the sample is full after the first batch, and micro-clusters are fewer than tokens."""
    seeding.TOKENS_PER_CLUSTER = 8
    seeding.MOST_TOKENS = 60
    spt_fast.prototype_clustering.MICRO_CLUSTERS = 30
    spt_fast.prototype_clustering.MICRO_CLUSTERS_PER_PROMPT = 1


def parts(built: Prototypes) -> dict[str, Any]:
    return {name: getattr(built, name) for name in ("values", "counts", "inertia", "metadata")}


def killed(folder: Path) -> None:
    rank = int(os.environ["RANK"])

    def kill(stage: str, done: int, total: int | None) -> None:
        if rank == 1 and done >= 6:
            os.kill(os.getpid(), signal.SIGKILL)

    make_streams_small()
    with process_group(torch.device("cpu")):
        build_prototypes(
            tiny_backbone(),
            share(rank),
            num_prompts=3,
            checkpoint=folder / f"stream{rank}",
            checkpoint_minutes=0,
            progress=kill,
            **STREAM,
        )


def whole(folder: Path) -> None:
    from command_line import TINY, run  # as torchrun has it: when it is imported RANK says who prints

    rank = int(os.environ["RANK"])
    results: dict[str, Any] = {}
    backbone, images = tiny_backbone(), share(rank)

    def build(name: str, images: list[Tensor] = images, **kwargs: Any) -> None:
        built = build_prototypes(backbone, images, **kwargs)
        if isinstance(built, Prototypes):
            results[name] = parts(built)
        else:
            results[name] = {number: parts(each) for number, each in built.items()}

    with process_group(torch.device("cpu")):
        build("kmeans", num_prompts=4, seed=4)
        build("kmeans, several", num_prompts=[3, 6], seed=4)
        build("kmeans, released", num_prompts=4, seed=4, capture="released")
        build("kmeans, kept differently", num_prompts=4, seed=4, token_budget=0 if rank else "auto")
        for depth in ("deep", "shallow"):
            nothing = [] if rank else images
            build(f"kmeans, {depth}, nothing in one", nothing, num_prompts=4, seed=4, depth=depth)
            build(f"stream, {depth}, nothing in one", nothing, num_prompts=3, depth=depth, **STREAM)
            nothing = images if rank else []
            build(f"stream, {depth}, nothing in the other", nothing, num_prompts=3, depth=depth, **STREAM)
        build("mmd", num_prompts=4, seed=4, method="mmd")
        build("mmd, nothing in one", [] if rank else images, num_prompts=4, seed=4, method="mmd")
        build("mean_pool", share(0), num_prompts=4, method="mean_pool")
        for name, wrong in {"too few": {"num_prompts": 1000}, "none": {"images": []}}.items():
            for method in ("kmeans", "minibatch_kmeans"):
                try:
                    build(name, **{"num_prompts": 2, **wrong}, method=method)
                except InputError as error:
                    results[f"{name}, {method}"] = str(error)

        # Interrupted together, and gone on with from what the first process has on its disk.
        path = folder / f"kmeans{rank}"

        def interrupt(stage: str, done: int, total: int | None) -> None:
            if (stage, done) == ("k-means passes", 3):
                raise Interrupted

        unfinished = {"num_prompts": 4, "seed": 4, "checkpoint": path, "checkpoint_minutes": 0}
        try:
            build("interrupted", progress=interrupt, **unfinished)
        except Interrupted:
            results["kept"] = path.exists()
        dist.barrier()
        build("kmeans, resumed", resume=True, **unfinished)

        make_streams_small()
        build("stream", num_prompts=3, **STREAM)
        build("stream, several", num_prompts=[3, 6], **STREAM)
        build("stream, resumed", num_prompts=3, checkpoint=folder / f"stream{rank}", resume=True, **STREAM)

    # The command joins and leaves the other process itself. The second one comes late.
    time.sleep(0.5 * rank)
    for method in ("kmeans", "minibatch_kmeans"):
        output = folder / f"{method}.safetensors"
        done = run(
            "prototypes", *TINY, "--data", folder / "photos", *CLI, "--method", method, "--output", output
        )
        results[f"command, {method}"] = (done.code, done.out, done.err)
    torch.save(results, folder / f"rank{rank}.pt")
