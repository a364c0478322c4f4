"""Everything that can iterate Lloyd's algorithm here, behind one interface: ours, and what people use instead.

All start from the same centres and do as many iterations as they are told. A library that is not installed, or has no
kernels for the device, is a peer that says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import name_of
from spt_fast.kernels import available_backends, kmeans_step

# (tokens [L, T, D], initial centres [L, K, D], iterations) -> centres [L, K, D]
Iterate = Callable[[Tensor, Tensor, int], Tensor]

# fastkmeans draws its own initial centres. With this seed they are those of `first_centers`.
SEED = 0


@dataclass
class Peer:
    """One way to iterate.

    Attributes:
        name: for tables.
        tokens: copies of the tokens in the form that it takes, to be used in turn.
        iterate: runs it; ``None`` if ``missing`` says why that cannot be.
    """

    name: str
    tokens: Sequence[Tensor] = field(default_factory=list)
    iterate: Iterate | None = None
    missing: str | None = None

    def run(self, start: Tensor, count: int, number: int = 0) -> Tensor:
        """Centres after ``count`` iterations on the copy whose turn it is in round ``number``."""
        assert self.iterate is not None, self.missing
        return self.iterate(self.tokens[number % len(self.tokens)], start, count)

    @property
    def dtype(self) -> str:
        return name_of(self.tokens[0].dtype)


def first_centers(x: Tensor, clusters: int) -> Tensor:
    """float32 ``[L, K, D]``: for every layer the same tokens, which fastkmeans would draw by itself."""
    torch.manual_seed(SEED)
    drawn = torch.randperm(x.shape[1])[:clusters]
    return x[:, drawn.to(x.device)].float()


def peers_on(copies: Sequence[Tensor]) -> Iterator[Peer]:
    """Ours first, then the others that work where the tokens ``[L, T, D]`` are."""
    device = copies[0].device
    here = our_backends(device)
    # The definition is measured where nothing else runs; elsewhere the plain loop stands for it.
    ours = [name for name in here if name != "torch"] or here
    halved = copies if device.type == "cuda" else [copy.bfloat16() for copy in copies]
    for tokens in [copies] if device.type == "cuda" else [copies, halved]:
        for backend in ours:
            name = f"spt-fast {backend}, {name_of(tokens[0].dtype)}"
            yield Peer(name, tokens, partial(lloyd, backend=backend))
    yield Peer(f"plain torch loop, {name_of(copies[0].dtype)}", copies, plain_loop)
    if device.type == "cuda":
        yield from _on_gpu(copies)
    else:
        yield optional("scikit-learn KMeans", "sklearn", copies, sklearn)
        yield optional("FAISS", "faiss", copies, faiss)
        yield optional("fastkmeans", "fastkmeans", copies, fastkmeans)


def our_backends(device: torch.device) -> list[str]:
    """Those that run on the device, the fastest first."""
    fitting = {"cpu": ("cpu", "torch"), "cuda": ("triton", "cuda", "torch")}[device.type]
    return [name for name in fitting if name in available_backends()["kmeans_step"]]


def best_backend(x: Tensor) -> str:
    return our_backends(x.device)[0]


def _on_gpu(copies: Sequence[Tensor]) -> Iterator[Peer]:
    yield optional("flash-kmeans", "flash_kmeans", copies, flash)
    yield optional("fastkmeans", "fastkmeans", copies, fastkmeans_on_gpu)
    full = [copies[0].float()] if any(map(find_spec, ("cuml", "cuvs", "faiss"))) else []
    yield optional("cuML", "cuml", full, cuml)
    yield optional("cuVS", "cuvs", full, cuvs)
    faiss_gpu = optional("FAISS, GPU", "faiss", [copy.cpu() for copy in full], partial(faiss, gpu=True))
    if faiss_gpu.missing is None:
        import faiss as library

        if not getattr(library, "get_num_gpus", int)():
            faiss_gpu = Peer("FAISS, GPU", missing="the installed FAISS is built without GPU support")
    yield faiss_gpu


def optional(name: str, module: str, tokens: Sequence[Tensor], iterate: Iterate) -> Peer:
    """A peer, if its library is installed."""
    if find_spec(module) is None:
        return Peer(name, missing=f"{module} is not installed")
    return Peer(name, tokens, iterate)


def lloyd(x: Tensor, start: Tensor, count: int, *, backend: str) -> Tensor:
    """Ours: one op, then the means."""
    centers = start
    for _ in range(count):
        step = kmeans_step(x, centers, backend=backend)
        means = step.sums / step.counts.clamp(min=1)[..., None]
        centers = torch.where(step.counts[..., None] > 0, means, centers)
    return centers


def plain_loop(x: Tensor, start: Tensor, count: int) -> Tensor:
    """What one writes in an afternoon: distances by a product, sums by index_add, in pieces that fit anywhere."""
    centers = start.clone()
    for tokens, own in zip(x, centers, strict=True):
        for _ in range(count):
            sums, counts = torch.zeros_like(own), own.new_zeros(len(own))
            norms = own.square().sum(dim=1)
            for part in tokens.split(1 << 16):
                labels = torch.addmm(norms.to(part.dtype), part, own.t().to(part.dtype), alpha=-2).argmin(
                    dim=1
                )
                sums.index_add_(0, labels, part.float())
                counts += torch.bincount(labels, minlength=len(own))
            own.copy_(torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], own))
    return centers


def sklearn(x: Tensor, start: Tensor, count: int) -> Tensor:
    from sklearn.cluster import KMeans

    def one(tokens: Any, own: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has not converged; nobody asked it to
            model = KMeans(len(own), init=own, n_init=1, max_iter=count, tol=0, copy_x=False)
            return model.fit(tokens).cluster_centers_

    return layer_by_layer(one, x, start)


def faiss(x: Tensor, start: Tensor, count: int, *, gpu: bool = False) -> Tensor:
    import faiss as library

    library.omp_set_num_threads(torch.get_num_threads())

    def one(tokens: Any, own: Any) -> Any:
        model = library.Kmeans(
            own.shape[1], len(own), niter=count, max_points_per_centroid=len(tokens), gpu=gpu
        )
        model.train(tokens, init_centroids=own)
        return model.centroids

    return layer_by_layer(one, x, start)


def fastkmeans(x: Tensor, start: Tensor, count: int) -> Tensor:
    from fastkmeans import FastKMeans

    def one(tokens: Any, own: Any) -> Any:
        model = FastKMeans(own.shape[1], len(own), niter=count, tol=-1.0, gpu=False, seed=SEED)
        model.train(tokens)
        return model.centroids

    return layer_by_layer(one, x, start)


def fastkmeans_on_gpu(x: Tensor, start: Tensor, count: int) -> Tensor:
    """Below its public method, which takes NumPy arrays and would copy all tokens to the GPU in every iteration."""
    from fastkmeans.kmeans import HAS_TRITON, _kmeans_torch_double_chunked

    # Its kernel also looks at the rest of the last block of centres, which is whatever the memory holds: labels beyond
    # the last centre then break the whole process (fastkmeans 0.5.0).
    whole_blocks = start.shape[1] % (128 if start.shape[2] <= 384 else 64) == 0
    centers = []
    for tokens, own in zip(x, start, strict=True):
        torch.manual_seed(SEED)
        found, _ = _kmeans_torch_double_chunked(
            tokens,
            tokens.square().sum(dim=1),
            k=len(own),
            device=x.device,
            dtype=x.dtype,
            max_iters=count,
            tol=-1.0,
            chunk_size_data=51_200,  # as its public method
            max_points_per_centroid=None,
            use_triton=HAS_TRITON and whole_blocks,
        )
        centers.append(found)
    return torch.stack(centers).to(x.device)


def flash(x: Tensor, start: Tensor, count: int) -> Tensor:
    from flash_kmeans import batch_kmeans_Euclid

    own = start.to(x.dtype)
    return batch_kmeans_Euclid(x, start.shape[1], max_iters=count, tol=-1.0, init_centroids=own)[1].float()


def cuml(x: Tensor, start: Tensor, count: int) -> Tensor:
    from cuml.cluster import KMeans

    centers = []
    for tokens, own in zip(x, start, strict=True):
        # A tolerance of zero is refused.
        model = KMeans(
            n_clusters=len(own), init=own, n_init=1, max_iter=count, tol=1e-30, output_type="numpy"
        )
        centers.append(torch.as_tensor(model.fit(tokens).cluster_centers_))
    return torch.stack(centers).to(x.device)


def cuvs(x: Tensor, start: Tensor, count: int) -> Tensor:
    from cuvs.cluster.kmeans import KMeansParams, fit

    centers = start.clone()
    for tokens, own in zip(x, centers, strict=True):
        params = KMeansParams(n_clusters=len(own), init_method="Array", max_iter=count, tol=1e-30, n_init=1)
        fit(params, tokens, centroids=own)
    return centers


def layer_by_layer(one: Callable[[Any, Any], Any], x: Tensor, start: Tensor) -> Tensor:
    """Centres of a library that knows NumPy and no layers."""
    pairs = zip(x.numpy(), start.cpu().numpy(), strict=True)
    return torch.stack([torch.as_tensor(one(tokens, own)) for tokens, own in pairs])
