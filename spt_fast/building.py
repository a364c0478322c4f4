"""build_prototypes: from images to prototypes, block by block."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spt_fast._version import __version__
from spt_fast.arguments import check_whole_number
from spt_fast.backbones import backbone_identity, check_backbone, source_of
from spt_fast.chosen_images import ChosenImages
from spt_fast.clustering import Clustering, seeded_generator
from spt_fast.distributed import world
from spt_fast.errors import InputError
from spt_fast.progress import Progress
from spt_fast.prototype_clustering import Plan, cluster_exactly, cluster_in_one_pass
from spt_fast.prototype_herding import herd_in_one_pass
from spt_fast.prototypes import Prototypes
from spt_fast.prototypes_checkpoint import Checkpoint
from spt_fast.sampling import max_pool, mean_pool, random_sample, uniform
from spt_fast.token_store import Budget
from spt_fast.tokens import Capture, layer_tokens
from spt_fast.vipamin import vipamin_starts

Method = Literal[
    "kmeans", "minibatch_kmeans", "mean_pool", "max_pool", "random_sample", "uniform", "vipamin", "mmd"
]
CLUSTERING_METHODS = ("kmeans", "minibatch_kmeans")
# What looks at all tokens, so that processes share the images out; the other methods look at one batch.
WHOLE_DATA_METHODS = (*CLUSTERING_METHODS, "mmd")
Depth = Literal["deep", "shallow"]
Layers = Literal["same", "first", "last"]


def build_prototypes(
    backbone: VisionTransformer,
    images: Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    num_prompts: int | Sequence[int] = 20,
    depth: Depth = "deep",
    method: Method = "kmeans",
    layers: Layers = "same",
    data_fraction: float = 1.0,
    capture: Capture = "paper",
    seed: int = 0,
    max_iter: int = 300,
    vipamin_neighbors: int | None = None,
    vipamin_lambda: float = 0.1,
    token_budget: Budget = "auto",
    token_cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_minutes: float = 1.0,
    resume: bool = False,
) -> Any:
    """Build the vectors that prompts start from out of the target data's own layer tokens.

    When torch.distributed is initialised, ``"mmd"`` and the methods that cluster take what each process passes as its
    share of the images, and every process returns the same prototypes; the other methods look at one batch, and want
    the same images in every process.

    Args:
        backbone: the frozen timm ViT, on the device to work on.
        images: any re-iterable of ``[B, 3, H, W]`` tensors or ``(images, labels)`` pairs, for example a DataLoader. The
            methods that look at one random batch want a shuffled one.
        num_prompts: prototypes per block, ``P``; or several numbers, to build prototypes for each of them from one pass
            over the images.
        depth: ``"deep"``: prototypes for every block; ``"shallow"``: for the first block only.
        method: ``"kmeans"``: exact Lloyd over all tokens to convergence (Eq. 9-10). ``"minibatch_kmeans"``: one pass,
            no token is kept beyond a sample of bounded size; several ``num_prompts`` are derived from 2,048 or more
            micro-clusters. ``"mean_pool"``, ``"max_pool"``, ``"random_sample"``: of one random batch (Sec. 3.4).
            ``"uniform"``: VPT's random start; looks at no image. ``"vipamin"``: means of the tokens that random prompts
            would attend to, turned a little to where the block's attention does not reach; of one random batch
            (:mod:`spt_fast.vipamin`). ``"mmd"``: vectors of the least maximum mean discrepancy to all tokens, in one
            pass (:mod:`spt_fast.herding`).
        layers: whose tokens a block's prototypes come from: ``"same"``: those that enter this block (Table S2 c);
            ``"first"`` / ``"last"``: those that enter the first / last block, for all blocks (Table S2 b).
        data_fraction: the share of the images to use, spread evenly over them from a random offset.
        capture: what counts as a layer's tokens, see :func:`spt_fast.tokens.layer_tokens`.
        seed: everything random follows from it.
        max_iter: most Lloyd passes of ``"kmeans"``.
        vipamin_neighbors: of how many positions a prompt of ``"vipamin"`` is the mean; ``None``: 32, or all patches of
            an image if it has fewer.
        vipamin_lambda: the share of the orthogonal part in ``"vipamin"``, from 0 to 1.
        token_budget: bytes of tokens that ``"kmeans"`` may keep in the memory of the backbone's device; ``"auto"`` is
            half of what is free. Beyond it they go to host memory (from a GPU), then to ``token_cache``, and without
            one the backbone runs again at every pass. ``metadata["tokens_kept"]`` says what came of it and why.
        token_cache: a folder for a memory-map of the tokens, in bfloat16, if they do not fit into memory.
        progress: called as ``progress(stage, done, total)`` during long work.
        checkpoint: a file that keeps the state of the clustering, or of ``"mmd"``, so that it can be taken up after an
            interruption; removed at the end.
        checkpoint_minutes: how long to wait between two saves.
        resume: go on from ``checkpoint`` if it exists.

    Returns:
        :class:`Prototypes` with ``values`` ``[L, P, D]`` (deep) or ``[1, P, D]`` (shallow) on the CPU; for several
        ``num_prompts`` a dictionary of them by number.

    Raises:
        UnsupportedModelError: the backbone cannot be prompted.
        InputError: an unknown choice, ``num_prompts < 1``, fewer tokens than prompts, no images, images with NaN or of
            the wrong size, images that can be read only once and do not fit into memory, or a ``checkpoint`` of another
            job.

    Warns:
        sklearn.exceptions.ConvergenceWarning: Lloyd was still moving after ``max_iter`` passes.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> prototypes = build_prototypes(backbone, [torch.randn(8, 3, 32, 32)], num_prompts=5)
        >>> prototypes.values.shape, prototypes.counts.sum(dim=1).tolist()
        (torch.Size([2, 5, 192]), [128, 128])
    """
    blocks = len(check_backbone(backbone).blocks)
    # A str is a sequence too, but of nothing that could be a number of prompts.
    numbers = [num_prompts] if isinstance(num_prompts, (int, float, str)) else list(num_prompts)
    _check_choices(numbers, depth, method, layers, data_fraction, capture, token_budget, checkpoint_minutes)
    _check_vipamin(method, capture, vipamin_neighbors, vipamin_lambda)
    started = time.perf_counter()
    report = progress or (lambda stage, done, total: None)
    rows = blocks if depth == "deep" else 1
    wanted = {"same": list(range(rows)), "first": [0], "last": [blocks - 1]}[layers]
    job = {
        "method": method,
        "num_prompts": num_prompts if isinstance(num_prompts, int) else numbers,
        "depth": depth,
        "layers": layers,
        "data_fraction": data_fraction,
        "capture": capture,
        "seed": seed,
        "max_iter": max_iter if method == "kmeans" else None,
        "backbone": {**source_of(backbone), "identity": backbone_identity(backbone)},
    }
    if method == "vipamin":
        job |= {"vipamin_neighbors": vipamin_neighbors, "vipamin_lambda": vipamin_lambda}
    plan = Plan(backbone, wanted, numbers, capture, seed, report)
    source = ChosenImages(images, data_fraction, seed, report)
    found: Mapping[int, Clustering | Tensor]
    seen: dict[str, Any] = {}
    of_each: dict[int, dict[str, Any]] = {}
    if method == "uniform":
        if layers != "same":
            raise InputError(
                f"layers={layers!r} means nothing for method='uniform', which looks at no tokens"
            )
        found = {n: uniform(backbone, rows, n, seeded_generator(seed)) for n in numbers}
    elif method == "vipamin":
        found, seen = _by_vipamin(plan, source, vipamin_neighbors, vipamin_lambda)
    elif method not in WHOLE_DATA_METHODS:
        found, seen = _of_one_batch(plan, source, method)
    else:
        # A stream can only be gone on with by as many processes: each skips the batches that it took in before.
        shares = {} if method == "kmeans" else {"processes": world()[1]}
        store = Checkpoint(checkpoint, {**job, **shares}, resume, checkpoint_minutes)
        if method == "mmd":
            found, seen, of_each = herd_in_one_pass(plan, source, store)
        else:
            if method == "kmeans":
                outcome = cluster_exactly(
                    plan, source, store, max_iter=max_iter, budget=token_budget, cache=token_cache
                )
            else:
                outcome = cluster_in_one_pass(plan, source, store)
            found, seen = outcome.found, outcome.facts
        store.remove()
    seen["seconds"] = time.perf_counter() - started
    built = {
        n: _as_prototypes(
            found[n], rows, {**job, "num_prompts": n, **seen, **of_each.get(n, {}), "version": __version__}
        )
        for n in numbers
    }
    return built[num_prompts] if isinstance(num_prompts, int) else built


def _as_prototypes(found: Clustering | Tensor, rows: int, metadata: dict[str, Any]) -> Prototypes:
    """Prototypes for all ``rows`` blocks, also where they share the tokens of one."""
    if isinstance(found, Tensor):
        return Prototypes(found.repeat(rows // len(found), 1, 1).cpu(), metadata)
    repeat = rows // len(found.centers)
    return Prototypes(
        found.centers.repeat(repeat, 1, 1),
        metadata,
        found.counts.long().repeat(repeat, 1),
        found.inertia.repeat(repeat),
    )


def _by_vipamin(
    plan: Plan, source: ChosenImages, neighbors: int | None, weight: float
) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """The starts of :mod:`spt_fast.vipamin` from one random batch, and what there is to know about them."""
    generator = seeded_generator(plan.seed)
    batch = source.random_batch(generator)
    drawn = generator.get_state()
    prompts = []
    for num_prompts in plan.num_prompts:
        generator.set_state(drawn)  # as if it were the only number
        prompts.append(uniform(plan.backbone, len(plan.layers), num_prompts, generator).to(plan.device))
    starts, facts = vipamin_starts(
        plan.backbone, batch, prompts, layers=plan.layers, neighbors=neighbors, weight=weight
    )
    return dict(zip(plan.num_prompts, starts, strict=True)), {"images": source.images, **facts}


def _of_one_batch(plan: Plan, source: ChosenImages, method: str) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Pooled or drawn tokens of one random batch, and how many there were."""
    generator = seeded_generator(plan.seed)
    batch = source.random_batch(generator)
    captured = layer_tokens(plan.backbone, batch, layers=plan.layers, capture=plan.capture)
    drawn = generator.get_state()
    found: dict[int, Tensor] = {}
    for num_prompts in plan.num_prompts:
        generator.set_state(drawn)  # as if it were the only number
        values = []
        for layer in plan.layers:
            tokens = captured[layer].flatten(0, 1)
            if len(tokens) < num_prompts:
                raise InputError(
                    f"there are {len(tokens)} patch tokens, fewer than num_prompts={num_prompts}; use more images"
                )
            if method == "random_sample":
                values.append(random_sample(tokens, num_prompts, generator))
            else:
                values.append((mean_pool if method == "mean_pool" else max_pool)(tokens, num_prompts))
        found[num_prompts] = torch.stack(values)
    return found, {"images": source.images, "tokens": len(tokens)}


def _check_choices(
    num_prompts: list[int],
    depth: str,
    method: str,
    layers: str,
    data_fraction: float,
    capture: str,
    token_budget: Budget,
    checkpoint_minutes: float,
) -> None:
    if not num_prompts:
        raise InputError("num_prompts must be a number or several, got none")
    for number in num_prompts:
        check_whole_number("num_prompts", number)
    for name, value, choices in (
        ("method", method, Method),
        ("depth", depth, Depth),
        ("layers", layers, Layers),
        ("capture", capture, Capture),
    ):
        if value not in get_args(choices):
            raise InputError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
    if not 0 < data_fraction <= 1:
        raise InputError(f"data_fraction must be in (0, 1], got {data_fraction!r}")
    whole = isinstance(token_budget, int) and not isinstance(token_budget, bool) and token_budget >= 0
    if token_budget != "auto" and not whole:
        raise InputError(f"token_budget must be 'auto' or a number of bytes, got {token_budget!r}")
    if not checkpoint_minutes >= 0:
        raise InputError(f"checkpoint_minutes must be at least 0, got {checkpoint_minutes!r}")


def _check_vipamin(method: str, capture: str, neighbors: int | None, weight: float) -> None:
    if neighbors is not None:
        check_whole_number("vipamin_neighbors", neighbors)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
        raise InputError(f"vipamin_lambda must be from 0 to 1, got {weight!r}")
    if method == "vipamin" and capture != "paper":
        raise InputError(
            f"method='vipamin' looks at what enters the blocks, capture='paper', got capture={capture!r}"
        )
