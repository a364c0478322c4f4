"""One pass of k-means on every backend that runs here, and the estimators around it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Measure
from spt_fast.clustering import KMeans, MiniBatchKMeans
from spt_fast.devices import choose_device
from spt_fast.kernels import available_backends, kmeans_assign, kmeans_step

# A GPU is given more of everything, so that it is not the launch of a kernel that is measured.
GPU = choose_device().type == "cuda"
MANY = 16 if GPU else 1
FITTING = ("triton", "cuda", "torch") if GPU else ("cpu", "torch")
# Layers, tokens, width, clusters: ViT-B's tokens, many clusters, all blocks of a ViT-S at once.
SHAPES = {
    "10000x768 K=20": ((MANY * 10_000, 768), 20),
    "4000x384 K=100": ((MANY * 4_000, 384), 100),
    "12x800x384 K=20": ((12, MANY * 800, 384), 20),
}
shapes = pytest.mark.parametrize("shape", list(SHAPES))


def backends(operation: str) -> pytest.MarkDecorator:
    runnable = [name for name in available_backends()[operation] if name in FITTING]
    return pytest.mark.parametrize("backend", runnable)


def tokens_and_centroids(
    shape: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    size, clusters = SHAPES[shape]
    return torch.randn(size, device=device).to(dtype), torch.randn(
        *size[:-2], clusters, size[-1], device=device
    )


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@backends("kmeans_step")
def test_kmeans_step(
    measure: Measure, device: torch.device, backend: str, dtype: torch.dtype, shape: str
) -> None:
    tokens, centroids = tokens_and_centroids(shape, device, dtype)
    measure(lambda: kmeans_step(tokens, centroids, backend=backend))


@backends("kmeans_assign")
def test_kmeans_assign(measure: Measure, device: torch.device, backend: str) -> None:
    tokens, centroids = tokens_and_centroids("10000x768 K=20", device)
    measure(lambda: kmeans_assign(tokens, centroids, backend=backend))


@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # it is not meant to converge
def test_kmeans_fit(measure: Measure, device: torch.device, init: str) -> None:
    tokens, _ = tokens_and_centroids("12x800x384 K=20", device)
    measure(lambda: KMeans(20, init=init, max_iter=4, tol=0, random_state=0).fit(tokens))


def test_minibatch_partial_fit(measure: Measure, device: torch.device) -> None:
    tokens, _ = tokens_and_centroids("10000x768 K=20", device)
    chunks = itertools.cycle(tokens.chunk(4))
    stream = MiniBatchKMeans(256, init="random", random_state=0)
    for _ in range(8):  # until the centres exist and every batch moves them
        stream.partial_fit(next(chunks))
    measure(lambda: stream.partial_fit(next(chunks)))
