"""Prototypes by clustering: all layers of a backbone at once, from images to centres (Sec. 3.3)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spt_fast.chosen_images import ChosenImages
from spt_fast.clustering import Clustering, KMeans, MiniBatchKMeans
from spt_fast.distributed import gathered_numbers, in_step
from spt_fast.errors import InputError
from spt_fast.progress import Progress
from spt_fast.prototypes_checkpoint import Checkpoint
from spt_fast.side_stream import SideStream
from spt_fast.token_store import Budget, TokenStore
from spt_fast.tokens import Capture, stream_layer_tokens

# From so many micro-clusters prototypes for any number of prompts are derived; from more if there are many prompts.
MICRO_CLUSTERS = 2048
MICRO_CLUSTERS_PER_PROMPT = 20


@dataclass(frozen=True)
class Plan:
    """What to cluster.

    Attributes:
        backbone: the frozen ViT.
        layers: whose input tokens, in ascending order.
        num_prompts: the numbers of clusters that are wanted.
        capture: what counts as a layer's tokens.
        seed: of the estimators.
        report: called as ``report(stage, done, total)``.
    """

    backbone: VisionTransformer
    layers: list[int]
    num_prompts: list[int]
    capture: Capture
    seed: int
    report: Progress

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return next(self.backbone.parameters()).device

    @property
    def groups(self) -> list[list[int]]:
        """Layers with equally many tokens: they are clustered together, in one launch."""
        if self.capture == "released":  # its first layer, and no other, comes without class token
            split = [[layer for layer in self.layers if (layer > 0) == deep] for deep in (False, True)]
            return [group for group in split if group]
        return [self.layers]

    def tokens(self, images: Iterable[Tensor], groups: list[list[int]]) -> Iterator[list[Tensor]]:
        """Batch by batch, the tokens ``[L, t, D]`` of each group."""
        layers = [layer for group in groups for layer in group]
        captured = stream_layer_tokens(self.backbone, images, layers=layers, capture=self.capture)
        for tokens in captured:
            yield [torch.stack([tokens[layer].flatten(0, 1) for layer in group]) for group in groups]

    def no_tokens(self, group: list[int]) -> Tensor:
        """The tokens ``[L, 0, D]`` of no images."""
        first = next(self.backbone.parameters())
        return torch.empty(len(group), 0, self.backbone.embed_dim, dtype=first.dtype, device=first.device)

    @property
    def tokens_per_image(self) -> int:
        """Of the first of the layers, which has the fewest."""
        prefix = self.backbone.num_prefix_tokens if self.capture == "released" and self.layers[0] > 0 else 0
        return prefix + self.backbone.patch_embed.num_patches


@dataclass
class Outcome:
    """What clustering found, and what it looked at.

    Attributes:
        found: number of prompts -> centres ``[L, P, D]``, counts and inertia of all layers, on the CPU.
        images: how many images were used.
        tokens: how many tokens of the first of the layers.
        tokens_kept: where the tokens were kept between passes, and why; ``None`` if they were read once.
    """

    found: dict[int, Clustering]
    images: int
    tokens: int
    tokens_kept: str | None = None

    @property
    def facts(self) -> dict[str, int | str]:
        """All but the prototypes, as their record has it."""
        kept = {} if self.tokens_kept is None else {"tokens_kept": self.tokens_kept}
        return {"images": self.images, "tokens": self.tokens, **kept}


def cluster_exactly(
    plan: Plan,
    images: ChosenImages,
    store: Checkpoint,
    *,
    max_iter: int,
    budget: Budget,
    cache: str | os.PathLike[str] | None,
) -> Outcome:
    """Lloyd's algorithm over all tokens, which are kept as near as they fit.

    Raises:
        InputError: no images, fewer tokens than clusters, or images that would have to be read twice and cannot be.
    """
    found: dict[int, list[Clustering]] = {num_prompts: [] for num_prompts in plan.num_prompts}
    tokens_kept = None
    if images.read_only_once and len(plan.groups) > 1:
        raise InputError("images can be read only once, and capture='released' needs them twice")
    for index, group in enumerate(plan.groups):
        estimators = {
            num_prompts: KMeans(num_prompts, max_iter=max_iter, random_state=plan.seed, device=plan.device)
            for num_prompts in plan.num_prompts
        }
        for num_prompts, estimator in estimators.items():
            estimator.load_state_dict(store.state(_kmeans_name(num_prompts, index)))
        unfinished = {n: each for n, each in estimators.items() if not hasattr(each, "n_iter_")}
        if unfinished:
            tokens = _collected(plan, group, images, budget, cache)
            tokens_kept = f"{tokens.place}: {tokens.why}"
            check_enough(plan, images, unseen=tokens.place == "nowhere")
        for num_prompts, estimator in unfinished.items():
            _fit(plan, estimator, tokens, images, store, _kmeans_name(num_prompts, index))
        for num_prompts, estimator in estimators.items():
            found[num_prompts].append(_found(estimator))
    whole = {num_prompts: _joined(parts) for num_prompts, parts in found.items()}
    tokens_seen = int(whole[plan.num_prompts[0]].counts[0].sum())
    return Outcome(whole, store.images, tokens_seen, tokens_kept)


def cluster_in_one_pass(plan: Plan, images: ChosenImages, store: Checkpoint) -> Outcome:
    """Mini-batch k-means while the tokens pass; for several numbers of prompts, by way of micro-clusters.

    Raises:
        InputError: no images, or fewer tokens than clusters.
    """
    several = len(plan.num_prompts) > 1
    most = max(plan.num_prompts)
    clusters = max(MICRO_CLUSTERS, MICRO_CLUSTERS_PER_PROMPT * most) if several else most
    estimators = [
        MiniBatchKMeans(
            clusters,
            init="random" if several else "k-means++",
            random_state=plan.seed,
            device=plan.device,
        )
        for _ in plan.groups
    ]
    stream_once(plan, images, store, estimators)
    check_enough(plan, images)
    if several:
        parts = [estimator.micro_clusters_ for estimator in estimators]
        found = {
            n: _joined([micro.cluster(n, random_state=plan.seed) for micro in parts])
            for n in plan.num_prompts
        }
    else:
        found = {most: _joined([_found(estimator.finish()) for estimator in estimators])}
    return Outcome(found, images_of_all(images), int(found[most].counts[0].sum()))


class StreamEstimator(Protocol):
    """What learns from tokens ``[L, t, D]`` as they pass, in several processes in step."""

    def partial_fit(self, tokens: Tensor, /) -> object:
        """Take in the next tokens."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on later."""

    def load_state_dict(self, state: dict[str, Tensor], /) -> None:
        """Go on from there; from the start if it is empty."""


def stream_once(
    plan: Plan, images: ChosenImages, store: Checkpoint, estimators: Sequence[StreamEstimator]
) -> None:
    """Let the tokens of each of the plan's groups pass its estimator once, from where ``store`` says."""
    for index, estimator in enumerate(estimators):
        state = store.state(_stream_name(index))
        estimator.load_state_dict({name: tensor.to(plan.device) for name, tensor in state.items()})
    side = SideStream(plan.device)
    for tokens in in_step(side.ahead(plan.tokens(images.counted(skip=store.batches), plan.groups))):
        with side.beside(tokens or []):
            for index, estimator in enumerate(estimators):
                estimator.partial_fit(plan.no_tokens(plan.groups[index]) if tokens is None else tokens[index])
        store.batches += 1
        if store.is_due:
            side.join()
            states = {_stream_name(index): each.state_dict() for index, each in enumerate(estimators)}
            store.save(states)
    side.join()


def _collected(
    plan: Plan, group: list[int], images: ChosenImages, budget: Budget, cache: str | os.PathLike[str] | None
) -> TokenStore:
    def make() -> Iterator[Tensor]:
        batches = (tokens for (tokens,) in plan.tokens(images.counted(), [group]))
        # Also a process without images tells the others, and its own estimator, how tokens look.
        yield next(batches, plan.no_tokens(group))
        yield from batches

    return TokenStore(make, budget=budget, cache=cache, remake=not images.read_only_once)


def _fit(
    plan: Plan, estimator: KMeans, tokens: TokenStore, images: ChosenImages, store: Checkpoint, name: str
) -> None:
    for passes in estimator.fit_passes(tokens, resume=True):
        plan.report("k-means passes", passes, None)
        if store.is_due:
            store.save({name: estimator.state_dict()})
    # Counted now: of tokens that are kept nowhere, the first images may be all that had been seen before.
    store.images = images_of_all(images)
    store.save({name: estimator.state_dict()})


def check_enough(plan: Plan, images: ChosenImages, *, unseen: bool = False) -> None:
    """Raise if the images of all processes are too few; ``unseen``: there are more of them."""
    seen, more = gathered_numbers([images.images, unseen]).sum(dim=0).tolist()
    if not seen:
        raise InputError("images yields no image")
    tokens, most = seen * plan.tokens_per_image, max(plan.num_prompts)
    if tokens < most and not more:
        raise InputError(f"there are {tokens} patch tokens, fewer than num_prompts={most}; use more images")


def images_of_all(images: ChosenImages) -> int:
    """How many images have passed in all processes together."""
    return int(gathered_numbers([images.images]).sum())


def _found(estimator: KMeans | MiniBatchKMeans) -> Clustering:
    return Clustering(estimator.cluster_centers_, estimator.counts_, estimator.inertia_)


def _joined(parts: list[Clustering]) -> Clustering:
    """The clusterings of groups of layers as one of all layers, on the CPU."""
    centers, counts, inertia = (torch.cat([each.cpu() for each in same]) for same in zip(*parts, strict=True))
    return Clustering(centers, counts, inertia)


def _kmeans_name(num_prompts: int, group: int) -> str:
    return f"{num_prompts} prompts, group {group}"


def _stream_name(group: int) -> str:
    return f"stream, group {group}"
