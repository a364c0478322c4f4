"""Exact k-means (Lloyd), in memory or over chunks that are read once per pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from spt_fast.clustering.estimator import CentroidEstimator
from spt_fast.clustering.lloyd import Clustering, Lloyd
from spt_fast.clustering.seeding import drawn_seed, sample_size, seeded_generator, starts
from spt_fast.clustering.sources import Form, Source
from spt_fast.clustering.survey import take_survey
from spt_fast.distributed import broadcast, from_rank_0, gathered_numbers
from spt_fast.errors import InputError


class KMeans(CentroidEstimator):
    """Exact Lloyd k-means (Eq. 9-10), in scikit-learn's conventions, with an optional leading layer axis.

    ``X`` is a torch tensor, numpy array or memory-map ``[T, D]`` or ``[L, T, D]`` (``L`` independent clusterings), or,
    for more tokens than memory holds, a re-iterable of such chunks: a list, or an object whose ``__iter__`` starts
    over. Chunks are read once to look them over, once per pass (and once more by a pass that has to move an empty
    cluster) and once in the end, to count; several processes read them once more, to number them. Memory does not grow
    with the number of chunks.

    When torch.distributed is initialised every process passes its own share of the tokens, which may be empty, and all
    end with the same centres: those of one process with all shares, one after the other, up to float rounding.

    Args:
        n_clusters: clusters ``K``.
        init: ``"k-means++"`` (greedy, with scikit-learn's number of trials), ``"random"`` (different tokens), both
            drawn from a uniform sample of 1,024 tokens per cluster, at most 65,536; or the initial centres ``[K, D]`` /
            ``[L, K, D]``.
        max_iter: most passes over the tokens from one start.
        tol: stop when the centres' summed squared shift is at most ``tol`` times the mean variance of a feature.
        n_init: how many starts; each layer keeps its best.
        random_state: seed of the initial centres; an int, a ``numpy.random.RandomState`` or ``None``. The same input,
            seed and device give the same centres.
        device: where to work; ``None`` works where the tokens are.
        dtype: what to read tokens as (float32, float16, bfloat16); ``None`` takes these as they come and all else as
            float32. Centres are always float32.
        verbose: 1 prints a line after each pass, as scikit-learn does.

    Attributes:
        cluster_centers_: float32 ``[K, D]`` or ``[L, K, D]``.
        counts_: int64 ``[K]`` or ``[L, K]``, tokens of each cluster (float64 with ``sample_weight``).
        labels_: int64 ``[T]`` or ``[L, T]``; only for tokens in memory, not for chunks.
        inertia_: float64, summed squared distance of tokens to their centre; ``[L]`` with layers.
        n_iter_: passes that moved the centres, of the layer that took longest.
        n_features_in_: ``D``.

    Example:
        >>> tokens = torch.cat([torch.randn(100, 4), torch.randn(50, 4) + 20])
        >>> KMeans(2, random_state=0).fit(tokens).counts_.sort().values.tolist()
        [50, 100]
        >>> KMeans(2, random_state=0).fit(tokens.split(40)).counts_.sort().values.tolist()
        [50, 100]
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: str | Tensor | np.ndarray = "k-means++",
        max_iter: int = 100,
        tol: float = 1e-4,
        n_init: int = 1,
        random_state: int | np.random.RandomState | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.random_state = random_state
        self.device = device
        self.dtype = dtype
        self.verbose = verbose

    def fit(self, X: Any, y: None = None, sample_weight: Any = None) -> KMeans:
        """Cluster ``X``.

        Args:
            X: tokens, as the class says.
            y: ignored, there by convention.
            sample_weight: how often each token of ``[T, D]`` counts, ``[T]``.

        Raises:
            InputError: fewer tokens than clusters, NaN or infinite tokens (naming the first such row), initial centres
                or weights of the wrong shape. The estimator stays as it was.

        Warns:
            sklearn.exceptions.ConvergenceWarning: ``max_iter`` passes were not enough, or there are fewer distinct
                tokens than clusters.
        """
        for _ in self.fit_passes(X, sample_weight=sample_weight):
            pass
        return self

    def fit_passes(self, X: Any, *, sample_weight: Any = None, resume: bool = False) -> Iterator[int]:
        """:meth:`fit`, one pass at a time, to save :meth:`state_dict` in between.

        Args:
            X: tokens, as for :meth:`fit`.
            sample_weight: as for :meth:`fit`.
            resume: go on from the state that :meth:`load_state_dict` brought, over the same tokens. Without a state,
                start from the beginning.

        Yields:
            How many passes have moved the centres, from all starts together.

        Example:
            >>> tokens = torch.randn(100, 4)
            >>> first, second = KMeans(3, random_state=0), KMeans(3, random_state=0)
            >>> passes = first.fit_passes(tokens)
            >>> _ = next(passes)
            >>> second.load_state_dict(first.state_dict())
            >>> for _ in second.fit_passes(tokens, resume=True): pass
            >>> torch.equal(second.cluster_centers_, KMeans(3, random_state=0).fit(tokens).cluster_centers_)
            True
        """
        self._check_parameters()
        source = self._open(X, sample_weight)
        source.weighted = bool(gathered_numbers([source.weighted]).any())
        lloyd = getattr(self, "_lloyd", None) if resume else None
        if lloyd is None:
            lloyd = self._begin(source)
        self._lloyd = lloyd
        for _ in lloyd.passes(source):
            if self.verbose:
                print(f"k-means: {lloyd.moves} passes")
            yield lloyd.moves
        del self._lloyd
        self._finish(X, source, lloyd)

    def state_dict(self) -> dict[str, Tensor]:
        """What was learned, or how far :meth:`fit_passes` has come: load it with :meth:`load_state_dict`."""
        if hasattr(self, "_lloyd"):
            return {f"lloyd.{name}": tensor for name, tensor in self._lloyd.state_dict().items()}
        if not hasattr(self, "_found"):
            return {}
        return {
            **self._found._asdict(),
            "n_iter": torch.tensor(self.n_iter_),
            "layered": torch.tensor(self._form.layered),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up :meth:`state_dict` of an estimator with the same parameters; results are handed out as tensors."""
        progress = {
            name.removeprefix("lloyd."): tensor for name, tensor in state.items() if name.startswith("lloyd.")
        }
        if progress:
            self._lloyd = Lloyd.from_state(progress, self.max_iter, self.device)
        elif state:
            if hasattr(self, "_lloyd"):
                del self._lloyd
            found = Clustering(state["centers"], state["counts"], state["inertia"])
            self._learn(found, int(state["n_iter"]))
            self._form = Form(numpy=False, layered=bool(state["layered"]))
            self.n_features_in_ = found.centers.shape[2]

    def _begin(self, source: Source) -> Lloyd:
        seed = from_rank_0(lambda: drawn_seed(self.random_state))
        # Centres that are given need no sample to be drawn from.
        drawn_from = sample_size(self.n_clusters) if isinstance(self.init, str) else 1
        survey = take_survey(source, drawn_from, seed)
        if survey.length < self.n_clusters:
            raise InputError(f"X holds {survey.length} tokens, fewer than n_clusters={self.n_clusters}")
        begun = starts(
            self.init,
            self.n_clusters,
            self.n_init,
            survey.sample,
            seeded_generator(seed),
            survey.sample_weights,
        )
        # With several devices of different makes the draws could differ in a last bit.
        broadcast([begun])
        return Lloyd(begun, self.tol * survey.mean_variance, self.max_iter)

    def _finish(self, X: Any, source: Source, lloyd: Lloyd) -> None:
        assert lloyd.best is not None
        self._learn(lloyd.best, lloyd.n_iter)
        self._remember_form(X, source)
        self._label(source)
        if not lloyd.converged:
            self._warn(f"k-means stopped after max_iter={self.max_iter} passes, before it converged")
        if (lloyd.best.counts == 0).any():
            self._warn(f"fewer distinct tokens than n_clusters={self.n_clusters}: some clusters are empty")

    def _learn(self, found: Clustering, n_iter: int) -> None:
        self._found = found
        self.n_iter_ = n_iter
        self._forget_labels()

    def _settled(self) -> Clustering:
        return self._found

    def _shape(self) -> tuple[int, int]:
        return self._found.centers.shape[0], self._found.centers.shape[2]

    @staticmethod
    def _warn(message: str) -> None:
        warnings.warn(message, ConvergenceWarning, stacklevel=5)
