"""What the estimators share: scikit-learn's conventions for parameters, inputs and results."""

from __future__ import annotations

import numbers
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils import check_array
from sklearn.utils.validation import validate_data
from torch import Tensor

from spt_fast.clustering.lloyd import Clustering, step
from spt_fast.clustering.micro_clusters import MicroClusters
from spt_fast.clustering.sources import Form, Source, open_source
from spt_fast.distributed import world
from spt_fast.errors import InputError
from spt_fast.kernels import kmeans_assign


class CentroidEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """Clusters are their centres: everything that follows from ``cluster_centers_``.

    Results come back as the tokens came: numpy for numpy, torch for torch, without the layer axis for ``[T, D]``.
    """

    n_clusters: int
    init: Any
    n_init: int
    device: torch.device | str | None
    dtype: torch.dtype | None
    n_features_in_: int
    _form: Form

    @property
    def cluster_centers_(self) -> Any:
        """float32 ``[K, D]`` or ``[L, K, D]``."""
        return self._fitted_form().returned(self._settled().centers)

    @property
    def counts_(self) -> Any:
        """Tokens of each cluster, ``[K]`` or ``[L, K]``: int64, or float64 sums of ``sample_weight``."""
        return self._fitted_form().returned(self._settled().counts)

    @property
    def inertia_(self) -> Any:
        """Summed squared distance of tokens to their centre, float64: a number, or ``[L]``."""
        return self._fitted_form().returned(self._settled().inertia)

    @property
    def micro_clusters_(self) -> MicroClusters:
        """The clusters as weighted points, to be clustered further (see :class:`MicroClusters`)."""
        self._fitted_form()
        return MicroClusters(*self._settled())

    def predict(self, X: Any) -> Any:
        """Index of the nearest centre of every token: int64 ``[T]`` or ``[L, T]``; for chunks, of all in a row."""
        source = self._read(X)
        labels = self._labels_of(source)
        return source.form.returned(labels)

    def fit_predict(self, X: Any, y: None = None, sample_weight: Any = None) -> Any:
        """:meth:`fit`, then :meth:`predict` on the same tokens."""
        return self.fit(X, sample_weight=sample_weight).predict(X)

    def transform(self, X: Any) -> Any:
        """Distance of every token to every centre: ``[T, K]`` or ``[L, T, K]``, float32 (float64 for such an array)."""
        source, centers = self._read(X), self._settled().centers
        distances = [
            torch.cdist(
                tokens.float(), centers.to(tokens.device), compute_mode="donot_use_mm_for_euclid_dist"
            )
            for tokens, _ in source
        ]
        if not distances:
            distances = [torch.empty(len(centers), 0, centers.shape[1])]
        wanted = np.dtype(np.float64) if source.form.dtype == np.float64 else None
        return source.form.returned(torch.cat(distances, dim=1), wanted)

    def score(self, X: Any, y: None = None, sample_weight: Any = None) -> Any:
        """Minus the inertia of ``X``, a number or float64 ``[L]``: the larger the better."""
        source = self._read(X, sample_weight)
        inertia = step(source, self._settled().centers)[2]
        return source.form.returned(-inertia) if source.form.layered else -float(inertia)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_form")

    @property
    def _n_features_out(self) -> int:
        return self.n_clusters

    def _fitted_form(self) -> Form:
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(
                f"This {type(self).__name__} instance is not fitted yet. Call 'fit' with appropriate arguments before "
                "using this estimator."
            )
        return self._form

    def _settled(self) -> Clustering:
        """What was learned, with the layer axis."""
        raise NotImplementedError

    def _shape(self) -> tuple[int, int]:
        """Layers and features of the tokens that were seen."""
        raise NotImplementedError

    def _open(self, X: Any, sample_weight: Any = None, *, fitted: bool = False) -> Source:
        """``X`` as a source; if ``fitted``, of the width (and layers) that the estimator knows."""
        if _is_table(X):
            # scikit-learn's look at what is, or could be, a table: its conversions, its messages, its feature names.
            table = check_array(
                X,
                dtype="numeric",
                ensure_all_finite=False,
                ensure_min_samples=0 if fitted or world()[1] > 1 else 1,
                estimator=self,
                input_name="X",
            )
            if fitted:
                validate_data(self, X, reset=False, skip_check_array=True)
            # A memory-map stays one: if it has to be converted, that is done piece by piece.
            X = X if isinstance(X, np.memmap) else table
        source = open_source(X, sample_weight, device=self.device, dtype=self.dtype)
        source.expected = self._shape() if fitted else None
        return source

    def _read(self, X: Any, sample_weight: Any = None) -> Source:
        """Sound tokens of the kind that was fitted, as a source."""
        self._fitted_form()
        source = self._open(X, sample_weight, fitted=True)
        source.sound = True
        return source

    def _remember_form(self, X: Any, source: Source) -> None:
        # A process without tokens does not know of the layers of others from its own.
        self._form = replace(source.form, layered=source.form.layered or self._shape()[0] > 1)
        if _is_table(X):
            validate_data(self, X, skip_check_array=True)
        else:
            self.n_features_in_ = self._shape()[1]
            if hasattr(self, "feature_names_in_"):
                del self.feature_names_in_

    def _label(self, source: Source) -> None:
        """Keep one label per token, if tokens are in memory anyway."""
        if source.in_memory:
            self.labels_ = self._form.returned(self._labels_of(source))

    def _forget_labels(self) -> None:
        if hasattr(self, "labels_"):
            del self.labels_

    def _labels_of(self, source: Source) -> Tensor:
        centers = self._settled().centers
        labels = [kmeans_assign(tokens, centers.to(tokens.device))[0] for tokens, _ in source]
        return torch.cat(labels, dim=1) if labels else torch.empty(len(centers), 0, dtype=torch.int64)

    def _check_parameters(self) -> None:
        for name in ("n_clusters", "n_init", "max_iter"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise InputError(f"{name} must be at least 1, got {value!r}")


def _is_table(X: Any) -> bool:
    """Whether ``X`` is for scikit-learn to look at: all but tensors, arrays with layers, and chunks."""
    if isinstance(X, Tensor) or not hasattr(X, "__iter__"):
        return not isinstance(X, Tensor)
    if hasattr(X, "__array__") or hasattr(X, "toarray"):
        return getattr(X, "ndim", 2) != 3
    if isinstance(X, (list, tuple)):
        return not (X and isinstance(X[0], (Tensor, np.ndarray)) and X[0].ndim >= 2)
    return isinstance(X, (str, bytes, dict, set))
