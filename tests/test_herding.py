"""Herding, judged by a greedy loop over the true objective in float64, and by the exact kernel."""

from typing import Any

import pytest
import torch
from tiny import Interrupted, batches, noise, stacked_tokens
from torch import Tensor

from spt_fast import Prototypes, build_prototypes, herding
from spt_fast.errors import InputError
from spt_fast.herding import Herding, descend, herd
from spt_fast.rbf_kernel import RandomFourierFeatures, median_distance, rbf_kernel, squared_mmd

DEPTH, WIDTH, PATCHES = 3, 48, 16


@pytest.fixture(scope="module")
def backbone(make_backbone):
    return make_backbone()


def cloud(count: int, width: int = 7, seed: int = 0) -> Tensor:
    """Three clusters of unequal size, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    centers = 50 + 3 * torch.randn(3, width, generator=generator)
    home = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), count, replacement=True, generator=generator)
    return centers[home] + torch.randn(count, width, generator=generator)


# --- The kernel --------------------------------------------------------------------------------------------------


def test_the_kernel_and_the_mmd_are_what_they_are_defined_as():
    x, y = cloud(13).double(), cloud(17, seed=1).double()

    def k(a: Tensor, b: Tensor) -> float:
        return float(torch.exp(-((a - b) ** 2).sum() / (2 * 2.5**2)))

    torch.testing.assert_close(
        rbf_kernel(x, y, 2.5), torch.tensor([[k(a, b) for b in y] for a in x], dtype=torch.float64)
    )
    expected = sum(k(a, b) for a in x for b in x) / 13**2 + sum(k(a, b) for a in y for b in y) / 17**2
    expected -= 2 * sum(k(a, b) for a in x for b in y) / (13 * 17)
    assert squared_mmd(x, y, 2.5) == pytest.approx(expected, abs=1e-12)
    assert squared_mmd(x, x, 2.5) == pytest.approx(0, abs=1e-12)


def test_random_features_approximate_the_kernel_and_the_mmd():
    x, y = cloud(200), cloud(150, seed=1) + 1
    bandwidth = median_distance(x)
    phi = RandomFourierFeatures(7, 4096, seed=3)
    one, other = phi(x, bandwidth), phi(y, bandwidth)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(200), atol=1e-5, rtol=0)
    assert (one @ other.T - rbf_kernel(x.double(), y.double(), bandwidth)).abs().max() < 5 / 8192**0.5
    approximate = float((one.mean(dim=0) - other.mean(dim=0)).square().sum())
    exact = squared_mmd(x.double(), y.double(), bandwidth)
    assert exact > 0.01 and approximate == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([[1.0], [1.0], [1.0], [1.0], [5.0]], 1.6),  # most of the distances are 0: their mean
        ([[1.0], [1.0]], 1.0),
        ([[1.0]], 1.0),
    ],
)
def test_the_bandwidth_is_never_zero(tokens, expected):
    assert median_distance(torch.tensor(tokens)) == pytest.approx(expected)


# --- Herding -----------------------------------------------------------------------------------------------------


def naive_herd(features: Tensor, mean: Tensor, count: int) -> list[int]:
    """Greedy: whichever candidate, added to those picked, brings the mean of the features nearest."""
    picks: list[int] = []
    for _ in range(count):
        distances = [
            torch.inf
            if index in picks
            else float((features[[*picks, index]].mean(dim=0) - mean).square().sum())
            for index in range(len(features))
        ]
        picks.append(min(range(len(features)), key=distances.__getitem__))
    return picks


@pytest.mark.parametrize(("candidates", "count"), [(1, 1), (31, 31), (67, 13)])
def test_herding_is_greedy_on_the_distance_of_mean_embeddings(candidates, count):
    tokens = cloud(candidates).double()
    features = RandomFourierFeatures(7, 64, seed=1)(tokens, 3.0)
    mean = RandomFourierFeatures(7, 64, seed=1)(cloud(500, seed=2).double(), 3.0).mean(dim=0)
    found = herd(features, mean, count).tolist()
    assert found == naive_herd(features, mean, count)
    assert found[: count // 2] == herd(features, mean, count // 2).tolist()


def test_the_descent_follows_the_gradient_and_never_climbs():
    tokens = cloud(300).double()
    start = cloud(5, seed=4).double()
    leaf = start.clone().requires_grad_()
    objective = rbf_kernel_mean(leaf, leaf) - 2 * rbf_kernel_mean(leaf, tokens)
    (expected,) = torch.autograd.grad(objective, leaf)
    value, gradient = herding._discrepancy(start, tokens, 3.0)
    assert value == pytest.approx(objective.item())
    torch.testing.assert_close(gradient, expected)
    before = squared_mmd(start, tokens, 3.0)
    for steps in (0, 1, 2, 50):
        after = squared_mmd(descend(start, tokens, 3.0, steps), tokens, 3.0)
        assert after <= before + 1e-12
        before = after
    assert after < 0.5 * squared_mmd(start, tokens, 3.0)


def rbf_kernel_mean(x: Tensor, y: Tensor) -> Tensor:
    """Written out, as the gradient of a distance of 0 is none."""
    return torch.exp((x[:, None] - y[None]).square().sum(dim=2) / (-2 * 3.0**2)).mean()


def streamed(tokens: Tensor, size: int = 97, seed: int = 0, most: int = 11) -> Herding:
    found = Herding(most, seed)
    for batch in tokens.split(size, dim=1):
        found.partial_fit(batch)
    return found


LAYERS = torch.stack([cloud(1003), 0.1 * cloud(1003, seed=5)])


def test_the_mean_embedding_is_that_of_all_tokens(monkeypatch):
    monkeypatch.setattr(herding, "CANDIDATES", 50)
    found = streamed(LAYERS)
    assert found.tokens == 1003
    assert found.bandwidths == pytest.approx([median_distance(each[:97:2]) for each in LAYERS], rel=0.3)
    result = found.find(11)
    for layer, (values, bandwidth) in enumerate(zip(result.values, found.bandwidths, strict=True)):
        # Shifted anywhere, the features give the same distance.
        phi = RandomFourierFeatures(7, herding.FREQUENCIES, seed=0)
        own, all_of = phi(values.double(), bandwidth), phi(LAYERS[layer].double(), bandwidth)
        expected = float((own.mean(dim=0) - all_of.mean(dim=0)).square().sum())
        assert result.squared_mmd[layer] == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("count", [1, 4, 11])
def test_the_result_is_nearer_to_the_tokens_than_random_samples(monkeypatch, count):
    monkeypatch.setattr(herding, "CANDIDATES", 400)
    found = streamed(LAYERS)
    for tokens, values, bandwidth in zip(LAYERS, found.find(count).values, found.bandwidths, strict=True):
        tokens = tokens.double()
        generator = torch.Generator().manual_seed(1)
        drawn = [
            squared_mmd(tokens[torch.randperm(1003, generator=generator)[:count]], tokens, bandwidth)
            for _ in range(30)
        ]
        assert squared_mmd(values.double(), tokens, bandwidth) < min(drawn)


def test_the_seed_decides_and_a_state_can_be_gone_on_with(monkeypatch):
    monkeypatch.setattr(herding, "CANDIDATES", 50)
    whole = streamed(LAYERS)
    assert torch.equal(whole.find(11).values, streamed(LAYERS).find(11).values)
    assert not torch.equal(whole.find(11).values, streamed(LAYERS, seed=1).find(11).values)
    half = streamed(LAYERS[:, : 4 * 97])
    resumed = Herding(11, 0)
    resumed.load_state_dict({name: each.clone() for name, each in half.state_dict().items()})
    for batch in LAYERS[:, 4 * 97 :].split(97, dim=1):
        resumed.partial_fit(batch)
    assert torch.equal(resumed.find(11).values, whole.find(11).values)
    fresh = Herding(11, 0)
    fresh.load_state_dict({})
    fresh.partial_fit(LAYERS)
    assert fresh.tokens == 1003


def test_tokens_that_are_not_finite_are_refused():
    tokens = LAYERS.clone()
    tokens[1, 500, 3] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        streamed(tokens)


# --- build_prototypes --------------------------------------------------------------------------------------------


def build(backbone: Any, **kwargs: Any) -> Any:
    return build_prototypes(backbone, batches(), method="mmd", **{"num_prompts": 5, **kwargs})


def test_building_is_herding_over_all_tokens_of_all_blocks(backbone):
    built = build(backbone, seed=3)
    assert isinstance(built, Prototypes) and built.values.shape == (DEPTH, 5, WIDTH)
    assert built.values.dtype == torch.float32 and built.counts is None
    alone = Herding(5, 3)
    for batch in batches():
        alone.partial_fit(stacked_tokens(backbone, [batch]))
    assert torch.equal(built.values, alone.find(5).values)
    facts = built.metadata
    assert (facts["images"], facts["tokens"]) == (40, 40 * PATCHES)
    assert facts["bandwidths"] == alone.bandwidths and len(facts["squared_mmd"]) == DEPTH
    assert not torch.equal(built.values, build(backbone, seed=4).values)


def test_layers_depth_capture_and_several_numbers(backbone):
    several = build(backbone, num_prompts=[7, 5, 1])
    assert list(several) == [7, 5, 1]
    deep = build(backbone)
    assert torch.equal(several[5].values, deep.values)
    assert {**several[5].metadata, "seconds": 0} == {**deep.metadata, "seconds": 0}
    assert torch.equal(build(backbone, depth="shallow").values, deep.values[:1])
    last = build(backbone, layers="last").values
    assert torch.equal(last[0], deep.values[2]) and torch.equal(last[1], last[2])
    released = build(backbone, capture="released")
    assert released.values.shape == (DEPTH, 5, WIDTH) and len(released.metadata["bandwidths"]) == DEPTH


def test_an_interrupted_build_goes_on_where_it_was(backbone, tmp_path):
    def interrupt(stage: str, done: int, total: int | None) -> None:
        if done == 30:
            raise Interrupted

    kept: dict[str, Any] = {"checkpoint": tmp_path / "unfinished", "checkpoint_minutes": 0}
    with pytest.raises(Interrupted):
        build(backbone, progress=interrupt, **kept)
    resumed = build(backbone, resume=True, **kept)
    assert torch.equal(resumed.values, build(backbone).values)
    assert resumed.metadata["images"] == 40 and not list(tmp_path.iterdir())


def test_no_images_and_too_few_tokens_are_refused(backbone):
    with pytest.raises(InputError, match="images yields no image"):
        build_prototypes(backbone, [], num_prompts=2, method="mmd")
    with pytest.raises(InputError, match="there are 32 patch tokens, fewer than num_prompts=33"):
        build_prototypes(backbone, [noise(2)], num_prompts=33, method="mmd")
    every = build_prototypes(backbone, [noise(2)], num_prompts=32, method="mmd")
    assert every.values.shape == (DEPTH, 32, WIDTH)
