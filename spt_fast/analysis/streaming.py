"""All measures of several sets of prompts from one pass over the images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spt_fast.analysis.checks import checked_prompts
from spt_fast.analysis.cka import FeatureCKA
from spt_fast.analysis.cluster_sizes import ClusterSizes
from spt_fast.analysis.mmd import MaximumMeanDiscrepancy
from spt_fast.analysis.mutual_information import MutualInformation, Per
from spt_fast.analysis.nearest_patches import Nearest, NearestPatches
from spt_fast.backbones import check_backbone
from spt_fast.chosen_images import ChosenImages
from spt_fast.errors import InputError
from spt_fast.progress import Progress
from spt_fast.tokens import stream_layer_tokens

Images = Iterable[Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PromptAnalysis:
    """What :func:`analyze_prompts` found; all tensors are on the CPU.

    Attributes:
        nmi: by set of prompts, float64 ``[L]``: normalised mutual information (Eq. 8) of the prompts and the tokens
            that enter the same block.
        cka: by set, float64 ``[L, L]``: linear CKA over features of the prompts of each block (rows) and the tokens of
            each block (columns).
        mmd: by set, float64 ``[L]``: squared maximum mean discrepancy; a set with one prompt has none.
        bandwidth: float64 ``[L]``: of the kernel of ``mmd``; None if no set has any.
        counts: by set, int64 ``[L, P]``: the tokens nearest to each prompt.
        nearest: by set, the patches nearest to each prompt, for the sets that were asked for.
        images: how many were looked at.
        tokens: how many of each block.
    """

    nmi: dict[str, Tensor]
    cka: dict[str, Tensor]
    mmd: dict[str, Tensor]
    bandwidth: Tensor | None
    counts: dict[str, Tensor]
    nearest: dict[str, Nearest]
    images: int
    tokens: int


def analyze_prompts(
    prompt_sets: Mapping[str, Tensor],
    backbone: VisionTransformer,
    images: Images,
    *,
    per: Per = "dataset",
    sample_size: int = 1024,
    nearest_of: Iterable[str] = (),
    k: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> PromptAnalysis:
    """Compare prompts with the tokens that enter the same blocks, all sets of prompts in one pass over the images.

    The tokens are those of the backbone without prompts, the same for all sets. Shallow prompts ``[1, P, D]`` are
    compared with the first block's tokens, and where all sets are shallow, no block is run.

    Args:
        prompt_sets: by name, each ``[L, P, D]`` or ``[1, P, D]``; for example of all snapshots of a run.
        backbone: the frozen ViT they belong to, on the device to work on.
        images: ``[B, 3, H, W]`` tensors or ``(images, labels)`` pairs, for example a DataLoader. The bandwidth of the
            MMD is chosen from the first of them: let the order be random.
        per: which tokens make up one joint distribution, see :class:`MutualInformation`.
        sample_size: of the MMD, see :class:`MaximumMeanDiscrepancy`.
        nearest_of: names of the sets whose nearest patches are wanted.
        k: patches for each prompt.
        seed: of the sample.
        progress: called as ``progress("layer tokens", images, total)``.

    Returns:
        :class:`PromptAnalysis`.

    Raises:
        InputError: no prompts or no images, prompts that do not fit the backbone, an unknown name, or an argument out
            of range.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> found = analyze_prompts({"start": torch.randn(2, 5, 192)}, backbone, [torch.randn(4, 3, 32, 32)])
        >>> found.nmi["start"].shape, found.cka["start"].shape, found.counts["start"].sum(dim=1).tolist()
        (torch.Size([2]), torch.Size([2, 2]), [64, 64])
    """
    blocks = _checked_blocks(prompt_sets, backbone)
    unknown = sorted(set(nearest_of) - set(prompt_sets))
    if unknown:
        raise InputError(f"nearest_of must name some of {', '.join(prompt_sets)}, got {', '.join(unknown)}")
    chosen = ChosenImages(images, 1.0, seed, progress or (lambda stage, done, total: None))
    information = {name: MutualInformation(prompts, per=per) for name, prompts in prompt_sets.items()}
    sizes = {name: ClusterSizes(prompts) for name, prompts in prompt_sets.items()}
    nearest = {name: NearestPatches(prompt_sets[name], k=k) for name in nearest_of}
    cka = FeatureCKA(blocks=blocks, features=backbone.embed_dim)
    # Of one prompt there are no pairs.
    paired = {name: prompts for name, prompts in prompt_sets.items() if prompts.shape[1] > 1}
    if paired:
        mmd = MaximumMeanDiscrepancy(list(paired.values()), sample_size=sample_size, seed=seed)
        mmd_blocks = mmd.blocks

    tokens_seen = 0
    for tokens in _token_batches(backbone, chosen.counted(), blocks):
        exact = tokens.double()
        for measure in information.values():
            measure.update(exact[: len(measure.prompts)])
        for patches in nearest.values():
            patches.update(exact[: len(patches.prompts)])
        for size in sizes.values():
            size.update(tokens[: len(size.prompts)])
        cka.update(exact)
        if paired:
            mmd.update(exact[:mmd_blocks])
        tokens_seen += tokens.shape[1] * tokens.shape[2]
    discrepancies = mmd.compute() if paired else None
    return PromptAnalysis(
        nmi={name: each.compute() for name, each in information.items()},
        cka={name: cka.compute(prompts)[:, : len(prompts)] for name, prompts in prompt_sets.items()},
        mmd={} if discrepancies is None else dict(zip(paired, discrepancies.values, strict=True)),
        bandwidth=None if discrepancies is None else discrepancies.bandwidth,
        counts={name: each.compute() for name, each in sizes.items()},
        nearest={name: each.compute() for name, each in nearest.items()},
        images=chosen.images,
        tokens=tokens_seen,
    )


def layer_mutual_information(
    prompt_sets: Mapping[str, Tensor], backbone: VisionTransformer, images: Images, *, per: Per = "dataset"
) -> dict[str, Tensor]:
    """Eq. 8 alone, block by block, for several sets of prompts in one pass over the images (Fig. 2).

    Args:
        prompt_sets: by name, each ``[L, P, D]``, or ``[1, P, D]``, which is compared with the first block's tokens.
        backbone: the frozen ViT they belong to.
        images: ``[B, 3, H, W]`` tensors or ``(images, labels)`` pairs.
        per: which tokens make up one joint distribution, see :class:`MutualInformation`.

    Returns:
        By name float64 ``[L]`` or ``[1]`` on the CPU.

    Raises:
        InputError: as :func:`analyze_prompts`.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> sets = {"epoch 0": torch.randn(2, 5, 192), "epoch 1": torch.randn(2, 5, 192)}
        >>> found = layer_mutual_information(sets, backbone, [torch.randn(4, 3, 32, 32)])
        >>> {name: tuple(values.shape) for name, values in found.items()}
        {'epoch 0': (2,), 'epoch 1': (2,)}
    """
    blocks = _checked_blocks(prompt_sets, backbone)
    information = {name: MutualInformation(prompts, per=per) for name, prompts in prompt_sets.items()}
    for tokens in _token_batches(backbone, images, blocks):
        exact = tokens.double()
        for each in information.values():
            each.update(exact[: len(each.prompts)])
    return {name: each.compute() for name, each in information.items()}


def _checked_blocks(prompt_sets: Mapping[str, Tensor], backbone: VisionTransformer) -> int:
    """The number of blocks whose tokens are wanted."""
    depth, width = len(check_backbone(backbone).blocks), backbone.embed_dim
    if not prompt_sets:
        raise InputError("prompt_sets must hold prompts, got none")
    for name, prompts in prompt_sets.items():
        shape = checked_prompts(prompts).shape
        if shape[0] not in (1, depth) or shape[2] != width:
            raise InputError(
                f"prompt_sets: {name} must be [{depth}, P, {width}] or [1, P, {width}], got {list(shape)}"
            )
    return max(map(len, prompt_sets.values()))


def _token_batches(backbone: VisionTransformer, images: Images, blocks: int) -> Iterator[Tensor]:
    """``[L, B, N, D]`` of batch after batch, for the first ``blocks`` blocks."""
    tokens = None
    for tokens in stream_layer_tokens(backbone, images, layers=range(blocks)):
        yield torch.stack([tokens[block] for block in range(blocks)])
    if tokens is None:
        raise InputError("images yields no image")
