"""Mini-batch k-means: a stream of tokens, each seen once, in memory that does not grow with its length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.estimator import CentroidEstimator
from spt_fast.clustering.lloyd import Clustering
from spt_fast.clustering.micro_clusters import MicroClusters
from spt_fast.clustering.seeding import drawn_seed, sample_size
from spt_fast.clustering.sources import Form, Source
from spt_fast.clustering.stream import Stream
from spt_fast.distributed import from_rank_0, in_step
from spt_fast.errors import InputError

# The share by which the smoothed inertia must fall to count as improved: less would follow the rounding of sums.
IMPROVEMENT = 1e-4


class MiniBatchKMeans(CentroidEstimator):
    """K-means over a stream (Sculley 2010), in scikit-learn's conventions, with an optional leading layer axis.

    Beside the stream a uniform sample of all tokens so far is kept. Centres are seeded from it once it is full; each
    further batch moves every centre to the running mean of all tokens it was ever given. What is reported are these
    centres, or new seeds if they turn out better, after they came to rest under Lloyd's algorithm on the sample:
    running means lag behind the borders that moved under way, and follow the order of the stream; the sample does
    neither. A stream that fits into the sample as a whole is clustered exactly.

    The order of the tokens decides which of them are sampled, and what the running means start from. How they are cut
    into batches decides only when these means move.

    When torch.distributed is initialised, each batch is the union of what the processes pass to the same call of
    :meth:`partial_fit` (possibly nothing), and all end with the same centres: those of one process that is given the
    unions, up to float rounding.

    Args:
        n_clusters: clusters ``K``.
        init: ``"k-means++"``, ``"random"`` or the initial centres, as for :class:`KMeans`.
        max_iter: most passes of :meth:`fit` over the tokens.
        batch_size: tokens per step of :meth:`fit`.
        max_no_improvement: :meth:`fit` stops after this many batches in a row that did not lower the smoothed inertia
            by 0.01 % (the first pass is always completed); ``None`` never does.
        init_size: tokens in the sample; ``None`` is 1,024 per cluster, at most 65,536.
        n_init: how many seedings; the one with the lowest inertia on the sample is taken.
        reassignment_ratio: clusters with less than this share of the largest one's tokens are, in the end, tried
            elsewhere; they stay there if that lowers the inertia of the sample.
        random_state: seed of the sample and the seeds; an int, a ``numpy.random.RandomState`` or ``None``.
        device: where to work; ``None`` works where the tokens are.
        dtype: what to read tokens as; ``None`` as for :class:`KMeans`.
        verbose: 1 prints a line after each pass of :meth:`fit`.

    Attributes:
        cluster_centers_: float32 ``[K, D]`` or ``[L, K, D]``.
        counts_: int64 ``[K]`` or ``[L, K]``, tokens of each cluster (float64 with ``sample_weight``); after
            :meth:`partial_fit`, scaled up from the sample.
        labels_: int64 ``[T]`` or ``[L, T]``, of :meth:`fit` with tokens in memory.
        inertia_: float64, summed squared distance of tokens to their centre, ``[L]`` with layers; after
            :meth:`partial_fit`, scaled up from the sample.
        n_steps_: batches taken in.
        n_iter_: passes over the tokens that :meth:`fit` began.
        n_features_in_: ``D``.

    Example:
        >>> stream = MiniBatchKMeans(2, random_state=0)
        >>> for _ in range(10):
        ...     _ = stream.partial_fit(torch.cat([torch.randn(300, 4), torch.randn(300, 4) + 20]))
        >>> stream.counts_.sum().item(), stream.n_steps_
        (6000, 10)
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: str | Tensor | np.ndarray = "k-means++",
        max_iter: int = 100,
        batch_size: int = 65536,
        max_no_improvement: int | None = 10,
        init_size: int | None = None,
        n_init: int = 1,
        reassignment_ratio: float = 0.01,
        random_state: int | np.random.RandomState | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.max_no_improvement = max_no_improvement
        self.init_size = init_size
        self.n_init = n_init
        self.reassignment_ratio = reassignment_ratio
        self.random_state = random_state
        self.device = device
        self.dtype = dtype
        self.verbose = verbose

    def fit(self, X: Any, y: None = None, sample_weight: Any = None) -> MiniBatchKMeans:
        """Start over, and pass over ``X`` until that no longer pays.

        Args:
            X: tokens, as for :class:`KMeans`. What can be read only once goes to :meth:`partial_fit`.
            y: ignored, there by convention.
            sample_weight: how often each token of ``[T, D]`` counts, ``[T]``.

        Raises:
            InputError: fewer tokens than clusters, NaN or infinite tokens (naming the first such row). The
                estimator stays as it was.
        """
        self._check_parameters()
        source = self._open(X, sample_weight)
        stream = self._new_stream(self._shared_seed())
        patience = _Patience(self.max_no_improvement)
        n_iter = 0
        while n_iter < self.max_iter and not patience.exhausted:
            passed = 0
            for batch in in_step(_batches(source, self.batch_size)):
                inertia = stream.take(*(batch or (None,)), again=n_iter > 0, first_row=passed)
                passed += 0 if batch is None else batch[0].shape[1]
                if inertia is not None:
                    patience.watch(inertia, stream.last / stream.seen)
                if n_iter and patience.exhausted:
                    break
            n_iter += 1
            if self.verbose:
                print(f"mini-batch k-means: {n_iter} passes, {stream.steps} steps")
            if not stream.started:  # the sample holds all tokens: nothing is left to approach
                break
        stream.measure(source)
        self._learn(stream, X, source)
        self.n_iter_ = n_iter
        self._label(source)
        return self

    def partial_fit(self, X: Any, y: None = None, sample_weight: Any = None) -> MiniBatchKMeans:
        """Take in the next batch of a stream.

        Args:
            X: ``[T, D]`` or ``[L, T, D]``. With several processes, ``None`` if this one has nothing to add to the batch
                of the others.
            y: ignored, there by convention.
            sample_weight: how often each token of ``[T, D]`` counts, ``[T]``.

        Raises:
            InputError: tokens of another shape than before, or with NaN or infinite values (naming the first such row);
                the estimator stays as it was.
        """
        self._check_parameters()
        begun = hasattr(self, "_stream")
        stream = self._stream if begun else self._new_stream(self._shared_seed())
        if X is None:
            stream.take(None)
            self._follow(stream)
            if not begun:
                self._form = Form(numpy=False, layered=stream.shape[0] > 1)
                self.n_features_in_ = stream.shape[1]
            return self
        # One batch is one step, also when it comes as a memory-map.
        source = self._open(np.asarray(X) if isinstance(X, np.memmap) else X, sample_weight, fitted=begun)
        if not source.in_memory:
            raise InputError(
                "X must be one batch [T, D] or [L, T, D], got chunks: pass them one by one, or to fit"
            )
        ((tokens, weights),) = source
        stream.take(tokens, weights)
        self._learn(stream, X, source)
        return self

    def finish(self) -> MiniBatchKMeans:
        """Settle the centres now, and not when they are first asked for.

        Raises:
            InputError: fewer tokens than clusters so far.
        """
        if not hasattr(self, "_stream"):
            raise InputError(f"X holds 0 tokens, fewer than n_clusters={self.n_clusters}")
        self._stream.settled()
        return self

    @property
    def micro_clusters_(self) -> MicroClusters:
        """The running means as weighted points, with the sample (see :class:`MicroClusters`)."""
        if not hasattr(self, "_stream"):  # tokens fewer than n_clusters are micro-clusters themselves
            self._fitted_form()
        return self._stream.micro_clusters()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on later: load it with :meth:`load_state_dict`."""
        if not hasattr(self, "_stream"):
            return {}
        return self._stream.state_dict() | {"layered": torch.tensor(self._form.layered)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up :meth:`state_dict` of an estimator with the same parameters; results are handed out as tensors."""
        if state:
            stream = self._new_stream(int(state["seed"]))
            stream.load_state_dict(state)
            self._follow(stream)
            self._form = Form(numpy=False, layered=bool(state["layered"]))
            self.n_features_in_ = state["sample.tokens"].shape[2]

    def _settled(self) -> Clustering:
        return self._stream.settled()

    def _shape(self) -> tuple[int, int]:
        return self._stream.shape

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_stream") and self._stream.seen >= self.n_clusters

    def _shared_seed(self) -> int:
        return from_rank_0(lambda: drawn_seed(self.random_state))

    def _new_stream(self, seed: int) -> Stream:
        return Stream(
            n_clusters=self.n_clusters,
            init=self.init,
            init_size=self.init_size or sample_size(self.n_clusters),
            n_init=self.n_init,
            reassignment_ratio=self.reassignment_ratio,
            seed=seed,
        )

    def _learn(self, stream: Stream, X: Any, source: Source) -> None:
        self._follow(stream)
        self._remember_form(X, source)

    def _follow(self, stream: Stream) -> None:
        self._stream, self.n_steps_ = stream, stream.steps
        self._forget_labels()

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {self.batch_size!r}")
        if self.init_size is not None and self.init_size < self.n_clusters:
            raise InputError(
                f"init_size must be at least n_clusters={self.n_clusters}, got {self.init_size!r}"
            )


class _Patience:
    """Ends a fit whose smoothed inertia no longer falls, as scikit-learn does."""

    def __init__(self, max_no_improvement: int | None) -> None:
        self._most = max_no_improvement
        self._smoothed: Tensor | None = None
        self._best: Tensor | None = None
        self._waited = 0

    @property
    def exhausted(self) -> bool:
        return self._most is not None and self._waited >= self._most

    def watch(self, inertia: Tensor, share: float) -> None:
        """Look at a batch's inertia per token ``[L]``; ``share`` is its part of all tokens."""
        weight = min(1.0, 2 * share)
        smoothed = inertia if self._smoothed is None else self._smoothed * (1 - weight) + inertia * weight
        improved = self._best is None or bool((smoothed < (1 - IMPROVEMENT) * self._best).any())
        if improved:
            self._best = smoothed if self._best is None else torch.minimum(self._best, smoothed)
        self._smoothed = smoothed
        self._waited = 0 if improved else self._waited + 1


def _batches(source: Source, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for tokens, weights in source:
        for start in range(0, tokens.shape[1], size):
            rows = slice(start, start + size)
            yield tokens[:, rows], None if weights is None else weights[:, rows]
