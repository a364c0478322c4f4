"""The measures of prompts and tokens against the formulas written out in float64, whole and streamed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analysis_processes import TOKENS, in_two_processes, outcomes
from tiny import noise, stacked_tokens
from torch import Tensor

from spt_fast.analysis import (
    ClusterSizes,
    FeatureCKA,
    MaximumMeanDiscrepancy,
    MinibatchCKA,
    MutualInformation,
    NearestPatches,
    analyze_prompts,
    effective_clusters,
    layer_mutual_information,
    linear_cka,
    normalized_mutual_information,
)
from spt_fast.errors import InputError


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_nmi(prompts: Tensor, tokens: Tensor) -> float:
    """Eq. 7-8 as they stand, the whole joint distribution in memory."""
    logits = np.einsum("kd,jd->kj", prompts.double().numpy(), tokens.double().numpy())
    joint = 1 / (1 + np.exp(-logits))
    joint /= joint.sum()
    of_prompts, of_tokens = joint.sum(axis=1), joint.sum(axis=0)
    information = (joint * np.log(joint / np.outer(of_prompts, of_tokens))).sum()
    entropies = -(of_prompts * np.log(of_prompts)).sum() - (of_tokens * np.log(of_tokens)).sum()
    return float(2 * information / entropies)


# Normalised mutual information


@pytest.mark.parametrize("scale", [0.01, 0.3, 2.0])
def test_nmi_is_that_of_the_whole_joint_distribution(scale: float) -> None:
    prompts, tokens = randn(3, 7, 11, scale=scale), randn(3, 9, 13, 11, seed=1)
    information = MutualInformation(prompts)
    for batch in tokens.split([1, 5, 0, 3], dim=1):
        information.update(batch)
    streamed = information.compute()
    assert streamed.dtype == torch.float64 and streamed.shape == (3,)
    for block in range(3):
        flat = tokens[block].flatten(0, 1)
        expected = naive_nmi(prompts[block], flat)
        assert streamed[block].item() == pytest.approx(expected, rel=0, abs=1e-12)
        assert normalized_mutual_information(prompts[block], flat).item() == pytest.approx(
            expected, abs=1e-12
        )


def test_nmi_per_image_is_the_mean_of_the_images() -> None:
    prompts, tokens = randn(2, 4, 6), randn(2, 5, 10, 6, seed=1)
    information = MutualInformation(prompts, per="image")
    for batch in tokens.split([2, 3], dim=1):
        information.update(batch)
    for block, found in enumerate(information.compute().tolist()):
        expected = np.mean([naive_nmi(prompts[block], image) for image in tokens[block]])
        assert found == pytest.approx(expected, abs=1e-12)
    assert not torch.allclose(
        information.compute(), normalized_mutual_information(prompts, tokens.flatten(1, 2))
    )


def test_nmi_of_independent_prompts_and_tokens_is_zero() -> None:
    tokens = randn(40, 6, seed=1)
    same_prompts = randn(1, 6).expand(5, 6)
    assert normalized_mutual_information(same_prompts, tokens).item() == pytest.approx(0, abs=1e-12)
    assert normalized_mutual_information(tokens[:5], same_prompts).item() == pytest.approx(0, abs=1e-12)
    assert normalized_mutual_information(tokens[:1], tokens).item() == 0  # one prompt
    assert normalized_mutual_information(tokens, tokens[:1]).item() == pytest.approx(
        0, abs=1e-12
    )  # one token
    assert normalized_mutual_information(tokens[:1], tokens[:1]).item() == 0
    # sigmoid(a_k + b_j) is exp(a_k) exp(b_j) far below 0, where both are smaller than any float64.
    a, b = randn(5, scale=2.0).double() - 1500, randn(30, seed=1, scale=2.0).double()
    prompts, rank_one = torch.stack([a, torch.ones(5)], dim=1), torch.stack([torch.ones(30), b], dim=1)
    assert normalized_mutual_information(prompts, rank_one).item() == pytest.approx(0, abs=1e-10)


def test_sigmoids_below_every_number_count() -> None:
    """Shifted far down, sigmoid is exp, and the scale of exp cancels in Eq. 7; the largest one comes last."""
    logits = randn(6, 50, scale=3.0).double().sort(dim=1).values
    joint = (logits - logits.max()).exp().numpy()
    joint /= joint.sum()
    of_prompts, of_tokens = joint.sum(axis=1), joint.sum(axis=0)
    information = (joint * np.log(joint / np.outer(of_prompts, of_tokens))).sum()
    entropies = -(of_prompts * np.log(of_prompts)).sum() - (of_tokens * np.log(of_tokens)).sum()
    # Tokens that are unit vectors: the product of prompts and tokens is what stands in the prompts.
    measured = MutualInformation((logits - 2000)[None])
    for token in torch.eye(50).split(7):
        measured.update(token[None, None])
    assert measured.compute().item() == pytest.approx(2 * information / entropies, abs=1e-10)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_nmi_lies_between_0_and_1(scale: float) -> None:
    for seed in range(20):
        prompts = randn(1, 1 + seed % 4, 3, seed=seed, scale=scale)
        tokens = randn(1, 1 + seed % 7, 3, seed=100 + seed, scale=scale)
        found = normalized_mutual_information(prompts, tokens).item()
        assert 0 <= found <= 1
    one_to_one = normalized_mutual_information(200 * torch.eye(8) - 100, torch.eye(8))
    assert one_to_one.item() == pytest.approx(1, abs=1e-12)


# Centred kernel alignment


def naive_hsic(x: Tensor, y: Tensor) -> float:
    """The U-statistic by its definition: the mean over all ways to draw four different examples (Song et al. 2012)."""
    k, l = (x @ x.T).numpy(), (y @ y.T).numpy()  # noqa: E741 (the letters of the paper)
    draws = itertools.permutations(range(len(x)), 4)
    return float(np.mean([k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in draws]))


def test_minibatch_cka_is_the_u_statistic() -> None:
    x, y = randn(2, 14, 3).double(), randn(3, 14, 5, seed=1).double() + 2
    y[0, :, :3] += x[1]
    cka = MinibatchCKA()
    for rows in (slice(0, 7), slice(7, 14)):
        cka.update(x[:, rows], y[:, rows])
    found = cka.compute()
    for i, j in itertools.product(range(2), range(3)):
        both, only_x, only_y = (
            np.mean([naive_hsic(a[rows], b[rows]) for rows in (slice(0, 7), slice(7, 14))])
            for a, b in ((x[i], y[j]), (x[i], x[i]), (y[j], y[j]))
        )
        assert found[i, j].item() == pytest.approx(both / math.sqrt(only_x * only_y), abs=1e-10)


def test_without_bias_unrelated_representations_are_unlike() -> None:
    x, y = randn(1, 2000, 40), randn(1, 2000, 40, seed=1)
    cka = MinibatchCKA()
    for rows in zip(x.split(50, dim=1), y.split(50, dim=1), strict=True):
        cka.update(*rows)
    assert abs(cka.compute().item()) < 0.05 < linear_cka(x[0, :50], y[0, :50]).item()


def test_linear_cka_is_that_of_centred_gram_matrices() -> None:
    x, y = randn(12, 5).double() + 1, randn(12, 7, seed=1).double()
    centring = torch.eye(12).double() - 1 / 12
    k, l = (centring @ z @ z.T @ centring for z in (x, y))  # noqa: E741
    expected = (k * l).sum() / (k.norm() * l.norm())
    assert linear_cka(x, y).item() == pytest.approx(expected.item(), abs=1e-12)
    rotation = torch.linalg.qr(randn(5, 5, seed=2).double()).Q
    assert linear_cka(x, 3 * x @ rotation - 4).item() == pytest.approx(1, abs=1e-12)
    alike = [linear_cka(each, 3 * each).item() for each in torch.randn(50, 4, 3)]
    assert max(alike) <= 1


def test_feature_cka_is_that_of_the_whole_matrices() -> None:
    prompts, tokens = randn(2, 4, 9) + 0.5, randn(3, 6, 5, 9, seed=1) - 1
    cka = FeatureCKA(blocks=3, features=9)
    for batch in tokens.split([1, 2, 3], dim=1):
        cka.update(batch)
    found = cka.compute(prompts)
    assert found.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        expected = linear_cka(prompts[i].T, tokens[j].flatten(0, 1).T).item()
        assert found[i, j].item() == pytest.approx(expected, abs=1e-12)
    assert cka.compute(tokens.flatten(1, 2)).diagonal().tolist() == pytest.approx([1] * 3, abs=1e-12)


# Maximum mean discrepancy


def kernel(a: Tensor, b: Tensor, bandwidth: float) -> float:
    return math.exp(
        -sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)) / (2 * bandwidth**2)
    )


def mean_kernel(pairs: Any, bandwidth: float) -> float:
    return float(np.mean([kernel(a, b, bandwidth) for a, b in pairs]))


def naive_mmd(prompts: Tensor, tokens: Tensor, sample: Tensor, bandwidth: float) -> float:
    return (
        mean_kernel(itertools.combinations(prompts, 2), bandwidth)
        + mean_kernel(itertools.combinations(sample, 2), bandwidth)
        - 2 * mean_kernel(itertools.product(prompts, tokens), bandwidth)
    )


def median_distance(points: Tensor) -> float:
    return torch.nn.functional.pdist(points.double()).median().item()


def streamed_mmd(prompt_sets: list[Tensor], tokens: Tensor, **kwargs: Any) -> Any:
    mmd = MaximumMeanDiscrepancy(prompt_sets, **kwargs)
    for batch in tokens.split([3, 1, 2], dim=1):
        mmd.update(batch)
    return mmd.compute()


def test_mmd_is_exact_where_the_sample_holds_all_tokens() -> None:
    deep, shallow, tokens = randn(2, 4, 3), 1 + randn(1, 3, 3, seed=2), randn(2, 6, 5, 3, seed=1)
    found = streamed_mmd([deep, shallow], tokens)
    flat = tokens.flatten(1, 2)
    pools = [torch.cat([flat[0], deep[0], shallow[0]]), torch.cat([flat[1], deep[1]])]
    bandwidth = [median_distance(pool) for pool in pools]
    assert found.bandwidth.tolist() == pytest.approx(bandwidth, rel=1e-12)
    for prompts, values in zip((deep, shallow), found.values, strict=True):
        assert values.shape == (len(prompts),)
        for block in range(len(prompts)):
            expected = naive_mmd(prompts[block], flat[block], flat[block], bandwidth[block])
            assert values[block].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("given", [None, 1.7])
def test_beyond_the_sample_mmd_still_looks_at_every_token(given: float | None) -> None:
    prompts, tokens = randn(1, 4, 3), randn(1, 6, 5, 3, seed=1)
    bandwidth = None if given is None else torch.tensor([given])
    mmd = MaximumMeanDiscrepancy([prompts], sample_size=18, seed=3, bandwidth=bandwidth)
    for batch in tokens.split([3, 1, 2], dim=1):
        mmd.update(batch)
    found, flat = mmd.compute(), tokens[0].flatten(0, 1)
    expected = given or median_distance(torch.cat([flat[:18], prompts[0]]))
    assert found.bandwidth.item() == pytest.approx(expected, rel=1e-6)
    # The sample is any 18 tokens.
    sample = mmd._sample.tokens()[0]
    assert len(sample) == 18 and (sample[:, None] == flat).all(dim=-1).any(dim=1).all()
    expected = naive_mmd(prompts[0], flat, sample, found.bandwidth.item())
    assert found.values[0].item() == pytest.approx(expected, abs=1e-12)


def test_mmd_of_equal_points_is_zero() -> None:
    found = streamed_mmd([torch.ones(1, 3, 2)], torch.ones(1, 6, 4, 2))
    assert found.values[0].tolist() == [0] and found.bandwidth.tolist() == [1]


# Nearest patches, cluster sizes


def test_nearest_patches_are_those_of_the_whole_distance_matrix() -> None:
    prompts, tokens = randn(2, 3, 4), randn(2, 11, 6, 4, seed=1)
    nearest = NearestPatches(prompts, k=5)
    for batch in tokens.split([2, 0, 8, 1], dim=1):
        nearest.update(batch)
    found = nearest.compute()
    for block, prompt in itertools.product(range(2), range(3)):
        distances = (tokens[block].double() - prompts[block, prompt].double()).norm(dim=-1)
        best = distances.min(dim=1)
        order = best.values.argsort()[:5]
        assert found.images[block, prompt].tolist() == order.tolist()
        assert found.positions[block, prompt].tolist() == best.indices[order].tolist()
        torch.testing.assert_close(found.distances[block, prompt], best.values[order], rtol=1e-10, atol=0)
    few = NearestPatches(prompts, k=5)
    few.update(tokens[:, :2])
    assert few.compute().images.shape == (2, 3, 2)


def test_cluster_sizes_count_the_tokens_nearest_to_each_prompt() -> None:
    prompts, tokens = randn(2, 4, 3), randn(2, 6, 5, 3, seed=1)
    sizes = ClusterSizes(prompts)
    for batch in tokens.split([1, 5], dim=1):
        sizes.update(batch)
    labels = torch.cdist(tokens.flatten(1, 2).double(), prompts.double()).argmin(dim=-1)
    assert sizes.compute().tolist() == [torch.bincount(row, minlength=4).tolist() for row in labels]


def test_effective_number_of_clusters() -> None:
    counts = torch.tensor([[3, 3, 3, 3], [0, 7, 0, 0], [4, 4, 0, 0]])
    assert effective_clusters(counts).tolist() == pytest.approx([4, 1, 2])
    with pytest.raises(InputError, match="not all of them 0"):
        effective_clusters(torch.zeros(2, 3))


# All of it over images


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    return list(noise(7).split([3, 4]))


def test_one_pass_over_images_finds_what_each_measure_finds(
    make_backbone: Callable[..., Any], images: list[Tensor]
) -> None:
    backbone = make_backbone()
    deep, later, shallow = randn(3, 4, 48), randn(3, 4, 48, seed=1), randn(1, 6, 48, seed=2)
    sets = {"start": deep, "end": later, "shallow": shallow, "one": randn(3, 1, 48)}
    seen: list[tuple[str, int, int | None]] = []
    found = analyze_prompts(
        sets, backbone, images, nearest_of=["end"], k=2, progress=lambda *report: seen.append(report)
    )
    tokens = stacked_tokens(backbone, images)
    assert (found.images, found.tokens) == (7, 112) and seen[-1] == ("layer tokens", 7, None)
    paired = {name: prompts for name, prompts in sets.items() if name != "one"}
    mmd = MaximumMeanDiscrepancy(list(paired.values()))
    mmd.update(tokens[:, None])
    expected_mmd = mmd.compute()
    assert found.bandwidth is not None and found.mmd.keys() == paired.keys()
    torch.testing.assert_close(found.bandwidth, expected_mmd.bandwidth)
    for values, ours in zip(expected_mmd.values, found.mmd.values(), strict=True):
        torch.testing.assert_close(ours, values)
    for name, prompts in sets.items():
        blocks = len(prompts)
        expected = [naive_nmi(prompts[block], tokens[block]) for block in range(blocks)]
        assert found.nmi[name].tolist() == pytest.approx(expected, abs=1e-12)
        assert found.cka[name].shape == (blocks, blocks)
        last = linear_cka(prompts[-1].T, tokens[0].T).item()
        assert found.cka[name][-1, 0].item() == pytest.approx(last, abs=1e-12)
        assert found.counts[name].sum(dim=1).tolist() == [112] * blocks
    assert found.nearest["end"].images.shape == (3, 4, 2) and found.nearest.keys() == {"end"}
    alone = layer_mutual_information(sets, backbone, images)
    assert all(torch.equal(alone[name], found.nmi[name]) for name in sets)


def test_shallow_prompts_run_no_block(make_backbone: Callable[..., Any], images: list[Tensor]) -> None:
    backbone = make_backbone(depth=2)
    backbone.blocks.register_forward_hook(lambda *_: pytest.fail("a block was run"))
    for block in backbone.blocks:
        block.register_forward_hook(lambda *_: pytest.fail("a block was run"))
    found = layer_mutual_information({"shallow": randn(1, 5, 48)}, backbone, images, per="image")
    assert found["shallow"].shape == (1,)


def test_processes_find_together_what_one_finds_with_all_tokens(tmp_path: Path) -> None:
    alone = outcomes(TOKENS)
    for rank, found in enumerate(in_two_processes(tmp_path)):
        assert "bandwidth must be given" in found.pop("refused")
        assert len(found) == 2 * len(alone)
        for name, expected in alone.items():
            for way in (name, f"{name}, alone"):
                torch.testing.assert_close(found[way], expected, rtol=1e-12, atol=1e-12, msg=f"{rank}: {way}")


# Bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: MutualInformation(randn(3, 4)),
            r"prompts must be floating point \[L, P, D\], got torch.float32",
        ),
        (lambda: MutualInformation(randn(1, 0, 4)), "at least one prompt"),
        (lambda: MutualInformation(randn(1, 2, 4) / 0), "prompts hold NaN"),
        (
            lambda: MutualInformation(randn(1, 2, 4), per="batch"),
            "per must be one of dataset, image, got 'batch'",
        ),
        (lambda: MutualInformation(randn(1, 2, 4)).compute(), "none have passed"),
        (lambda: MutualInformation(randn(1, 2, 4), per="image").compute(), "none have passed"),
        (
            lambda: MutualInformation(randn(1, 2, 4)).update(randn(1, 1, 3, 5)),
            r"\[1, B, N, 4\].*\[1, 1, 3, 5\]",
        ),
        (lambda: linear_cka(randn(3, 4), randn(4, 4)), r"\[3, 4\] and \[4, 4\]"),
        (lambda: MinibatchCKA().update(randn(1, 3, 2), randn(1, 3, 2)), "at least 4 examples, got 3"),
        (lambda: MinibatchCKA().update(randn(1, 5, 2), randn(1, 4, 2)), "x and y must be"),
        (lambda: MinibatchCKA().compute(), "no batch"),
        (lambda: FeatureCKA(blocks=1, features=4).compute(randn(1, 2, 4)), "none have passed"),
        (lambda: FeatureCKA(blocks=1, features=4).compute(randn(1, 2, 5)), r"\[L, P, 4\], got \[1, 2, 5\]"),
        (lambda: MaximumMeanDiscrepancy([]), "got none"),
        (lambda: MaximumMeanDiscrepancy([randn(1, 1, 4)]), "at least 2 prompts"),
        (lambda: MaximumMeanDiscrepancy([randn(3, 2, 4), randn(2, 2, 4)]), "of one block, got"),
        (lambda: MaximumMeanDiscrepancy([randn(1, 2, 4)], sample_size=1), "sample_size"),
        (
            lambda: MaximumMeanDiscrepancy([randn(1, 2, 4)], bandwidth=torch.zeros(1)),
            "bandwidth must be 1 positive",
        ),
        (lambda: MaximumMeanDiscrepancy([randn(1, 2, 4)]).compute(), "0 have passed"),
        (lambda: NearestPatches(randn(1, 2, 4), k=0), "k must be at least 1"),
        (lambda: NearestPatches(randn(1, 2, 4)).compute(), "none have passed"),
    ],
)
def test_mistakes_are_named(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "make",
    [
        MutualInformation,
        ClusterSizes,
        NearestPatches,
        lambda prompts: MaximumMeanDiscrepancy([prompts]),
        lambda prompts: FeatureCKA(blocks=2, features=4),
    ],
)
def test_tokens_that_are_no_numbers_are_refused(make: Callable[[Tensor], Any], value: float) -> None:
    prompts, tokens = randn(2, 3, 4), randn(2, 5, 3, 4)
    prompts[:, 0, 2] = 0
    measure, fresh = make(prompts), make(prompts)
    spoilt = tokens.clone()
    spoilt[1, 3, 1, 2] = value
    with pytest.raises(InputError, match="tokens hold NaN or infinite values"):
        measure.update(spoilt)
    # It was not taken in.
    for each in (measure, fresh):
        each.update(tokens)
    found, expected = (
        each.compute(prompts) if isinstance(each, FeatureCKA) else each.compute() for each in (measure, fresh)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_prompts_of_another_backbone_are_refused(
    make_backbone: Callable[..., Any], images: list[Tensor]
) -> None:
    backbone = make_backbone()
    with pytest.raises(
        InputError, match=r"prompt_sets: mine must be \[3, P, 48\] or \[1, P, 48\], got \[2, 4, 48\]"
    ):
        layer_mutual_information({"mine": randn(2, 4, 48)}, backbone, images)
    with pytest.raises(InputError, match="prompt_sets must hold prompts"):
        layer_mutual_information({}, backbone, images)
    with pytest.raises(InputError, match="nearest_of must name some of mine, got yours"):
        analyze_prompts({"mine": randn(3, 4, 48)}, backbone, images, nearest_of=["yours"])
    with pytest.raises(InputError, match="images yields no image"):
        analyze_prompts({"mine": randn(3, 4, 48)}, backbone, [])
