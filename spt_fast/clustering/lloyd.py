"""Lloyd's algorithm, pass by pass, over a source of tokens shared by all processes (Eq. 9-10)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spt_fast.clustering.sources import Source
from spt_fast.distributed import all_reduced, gathered_rows
from spt_fast.kernels import kmeans_assign, kmeans_step

# Rows whose one-hot product is formed at once when tokens have weights.
WEIGHTED_ROWS = 8192


def step(
    source: Source, centers: Tensor, layers: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over all tokens of all processes.

    Args:
        source: the tokens of this process.
        centers: float32 ``[L, K, D]``.
        layers: which layers to look at; ``None`` is all. The others' results are zero.

    Returns:
        ``sums`` float64 ``[L, K, D]``, ``counts`` ``[L, K]`` (int64, or float64 if tokens have weights) and ``inertia``
        float64 ``[L]``.
    """
    sums = torch.zeros_like(centers, dtype=torch.float64)
    counts = torch.zeros_like(centers[..., 0], dtype=torch.float64)
    inertia = torch.zeros_like(sums[:, 0, 0])
    for tokens, weights in source:
        if layers is None or len(layers) == len(centers):
            found = step_of_chunk(tokens, centers, weights)
            sums, counts, inertia = sums + found[0], counts + found[1], inertia + found[2]
            continue
        for layer in layers:
            own = slice(layer, layer + 1)
            found = step_of_chunk(tokens[own], centers[own], None if weights is None else weights[own])
            sums[own] += found[0]
            counts[own] += found[1]
            inertia[own] += found[2]
    if not source.replicated:
        sums, counts, inertia = all_reduced(sums), all_reduced(counts), all_reduced(inertia)
    # float64 counts whole tokens exactly up to 2^53.
    return sums, counts if source.weighted else counts.long(), inertia


def step_of_chunk(tokens: Tensor, centers: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``kmeans_step``, also for tokens ``[L, T, D]`` that count ``weights`` ``[L, T]`` times."""
    if weights is None:
        return kmeans_step(tokens, centers)
    labels, sq_distances = kmeans_assign(tokens, centers)
    sums = torch.zeros_like(centers, dtype=torch.float64)
    counts = torch.zeros_like(centers[..., 0], dtype=torch.float64)
    clusters = torch.arange(centers.shape[1], device=tokens.device)
    for layer in range(len(tokens)):
        # A one-hot product: unlike scattered additions it repeats bit for bit on a GPU.
        for rows in torch.arange(tokens.shape[1], device=tokens.device).split(WEIGHTED_ROWS):
            share = (labels[layer, rows, None] == clusters) * weights[layer, rows, None].double()
            sums[layer] += share.T @ tokens[layer, rows].double()
            counts[layer] += share.sum(dim=0)
    return sums, counts, (sq_distances.double() * weights).sum(dim=1)


def means(sums: Tensor, counts: Tensor, fallback: Tensor) -> Tensor:
    """The mean of each cluster, float32 ``[L, K, D]``; of empty ones, ``fallback``."""
    occupied = counts[..., None] > 0
    return torch.where(occupied, sums / torch.where(occupied, counts[..., None], 1), fallback).float()


class Clustering(NamedTuple):
    """What a run ends with.

    Attributes:
        centers: float32 ``[L, K, D]``.
        counts: tokens of each cluster ``[L, K]``.
        inertia: float64 ``[L]``.
    """

    centers: Tensor
    counts: Tensor
    inertia: Tensor


class Lloyd:
    """Lloyd's algorithm from one or several starts; the best result of each layer is kept.

    Args:
        starts: centres to start from, ``[R, L, K, D]``.
        threshold: ``[L]``; a layer is done when the squared shift of its centres in a pass is at most this.
        max_iter: most passes from one start.

    Attributes:
        best: the best clustering so far, once a start has been followed to its end.
        converged: whether all layers of all starts came to rest within ``max_iter`` passes.
        moves: passes that moved centres, from all starts.
    """

    def __init__(self, starts: Tensor, threshold: Tensor, max_iter: int) -> None:
        self._starts = starts
        self._threshold = threshold.to(starts.device)
        self._max_iter = max_iter
        self._run = 0
        self._best_iter = torch.zeros(starts.shape[1], dtype=torch.int64)
        self.best: Clustering | None = None
        self.converged = True
        self.moves = 0
        self._begin()

    def passes(self, source: Source) -> Iterator[None]:
        """Go on to the end, stopping after each pass: what :meth:`state_dict` says there can be gone on from."""
        while self._run < len(self._starts):
            while self._active.any() and int(self._iterations.max()) < self._max_iter:
                self._move(source)
                yield
            self.converged &= not bool(self._active.any())
            self._keep(source)
            self._run += 1
            if self._run < len(self._starts):
                self._begin()
            yield

    def fit(self, source: Source) -> Clustering:
        """All passes at once."""
        for _ in self.passes(source):
            pass
        assert self.best is not None
        return self.best

    @property
    def n_iter(self) -> int:
        """Passes that moved the centres from their best start, of the layer that took longest."""
        return int(self._best_iter.max())

    def state_dict(self) -> dict[str, Tensor]:
        """How far the passes have come."""
        state = {
            "starts": self._starts,
            "threshold": self._threshold,
            "run": torch.tensor(self._run),
            "converged": torch.tensor(self.converged),
            "moves": torch.tensor(self.moves),
            "centers": self._centers,
            "active": self._active,
            "iterations": self._iterations,
            "best_iterations": self._best_iter,
        }
        best = {} if self.best is None else {f"best.{k}": v for k, v in self.best._asdict().items()}
        return {name: tensor.clone() for name, tensor in (state | best).items()}

    @classmethod
    def from_state(
        cls, state: dict[str, Tensor], max_iter: int, device: torch.device | str | None = None
    ) -> Lloyd:
        """Take up what :meth:`state_dict` kept."""
        state = {name: tensor.to(device) for name, tensor in state.items()}
        lloyd = cls(state["starts"], state["threshold"], max_iter)
        lloyd._run, lloyd.moves = int(state["run"]), int(state["moves"])
        lloyd.converged = bool(state["converged"])
        lloyd._centers, lloyd._active = state["centers"].clone(), state["active"].cpu().clone()
        lloyd._iterations = state["iterations"].cpu().clone()
        lloyd._best_iter = state["best_iterations"].cpu().clone()
        if "best.centers" in state:
            lloyd.best = Clustering(state["best.centers"], state["best.counts"], state["best.inertia"])
        return lloyd

    def _begin(self) -> None:
        self._centers = self._starts[self._run].clone()
        self._active = torch.ones(len(self._centers), dtype=torch.bool)
        self._iterations = torch.zeros(len(self._centers), dtype=torch.int64)

    def _move(self, source: Source) -> None:
        layers = self._active.nonzero().flatten().tolist()
        sums, counts, _ = step(source, self._centers, layers)
        moved = means(sums, counts, self._centers)
        vacant = [layer for layer in layers if (counts[layer] == 0).any()]
        if vacant:
            far = farthest(
                source, self._centers, {layer: int((counts[layer] == 0).sum()) for layer in vacant}
            )
            for layer in vacant:
                moved[layer] = relocate_empty(far[layer], moved[layer], counts[layer])
        self.moves += 1
        shift = (moved - self._centers).double().square().sum(dim=(1, 2))
        still = (shift > self._threshold).cpu()
        for layer in layers:
            self._centers[layer] = moved[layer]
            self._iterations[layer] += 1
            self._active[layer] = still[layer]

    def _keep(self, source: Source) -> None:
        """Look once more, at where the tokens are in the end; keep the layers that have become better."""
        _, counts, inertia = step(source, self._centers)
        found = Clustering(self._centers, counts, inertia)
        if self.best is None:
            self.best, self._best_iter = found, self._iterations
            return
        better = inertia < self.best.inertia
        self.best = Clustering(
            torch.where(better[:, None, None], found.centers, self.best.centers),
            torch.where(better[:, None], found.counts, self.best.counts),
            torch.where(better, found.inertia, self.best.inertia),
        )
        self._best_iter = torch.where(better.cpu(), self._iterations, self._best_iter)


def relocate_empty(far: Tensor, moved: Tensor, counts: Tensor) -> Tensor:
    """Move each empty cluster of a layer to one of the tokens farthest from their centre, and take that token out of
    its old cluster, as scikit-learn does.

    Args:
        far: these tokens, as :func:`farthest` returns them.
        moved: ``[K, D]``, the centres after the pass.
        counts: ``[K]``.

    Returns:
        ``moved`` with other positions for empty clusters and for those that gave up a token.
    """
    empty = (counts == 0).nonzero().flatten()
    moved, remaining = moved.clone(), counts.double().clone()
    for cluster, candidate in zip(empty.tolist(), far, strict=False):
        sq_distance, weight, donor, token = candidate[0], candidate[1], int(candidate[2]), candidate[3:]
        if sq_distance == 0 or remaining[donor] <= weight:
            continue
        remaining[donor] -= weight
        moved[donor] += ((moved[donor] - token) * (weight / remaining[donor])).float()
        moved[cluster] = token.float()
    return moved


def farthest(source: Source, centers: Tensor, wanted: dict[int, int]) -> dict[int, Tensor]:
    """The tokens of all processes that are farthest from their centre.

    Args:
        source: the tokens of this process.
        centers: ``[L, K, D]``.
        wanted: layer -> how many of its tokens.

    Returns:
        Layer -> rows of squared distance, weight, label and token (float64 ``[<= wanted, 3 + D]``), the farthest first.
    """
    columns = 3 + centers.shape[2]
    found = {layer: torch.empty(0, columns, dtype=torch.float64, device=centers.device) for layer in wanted}
    for tokens, weights in source:
        for layer, count in wanted.items():
            labels, sq_distances = kmeans_assign(tokens[layer], centers[layer])
            own = torch.ones_like(sq_distances) if weights is None else weights[layer]
            # A token that counts for nothing is no place for a centre.
            far = _first(sq_distances.masked_fill(own == 0, 0), count)
            facts = torch.stack([sq_distances[far].double(), own[far].double(), labels[far].double()], dim=1)
            rows = torch.cat([found[layer], torch.cat([facts, tokens[layer, far].double()], dim=1)])
            found[layer] = rows[_first(rows[:, 0], count)]
    if not source.replicated:
        for layer, count in wanted.items():
            rows = torch.cat(gathered_rows(found[layer]))
            found[layer] = rows[_first(rows[:, 0], count)]
    return found


def _first(values: Tensor, count: int) -> Tensor:
    # topk alone leaves open which of several equals it returns.
    if len(values) > 4096:
        least = values.topk(min(count, len(values))).values[-1:]
        candidates = (values >= least).nonzero().flatten()
    else:
        candidates = torch.arange(len(values), device=values.device)
    order = values[candidates].argsort(descending=True, stable=True)
    return candidates[order[:count]]
