"""A uniform sample of a stream whose length nobody knows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spt_fast.distributed import gathered_numbers, gathered_rows, world

PIECE = 1 << 20


class Reservoir:
    """Keeps ``capacity`` tokens of a stream, every token seen so far being as likely to be among them as any other.

    Each position in the stream has a random number of its own, made from the seed and the position alone; the tokens
    with the smallest numbers stay. So what is kept depends on the seed and the order of the tokens, not on how they
    were cut into batches or spread over processes.

    Args:
        capacity: most tokens to keep.
        seed: which sample.

    Attributes:
        seen: tokens that have passed.
        positions: int64 ``[n]``, where in the stream the kept tokens stood.

    Example:
        >>> reservoir = Reservoir(3, seed=0)
        >>> for batch in torch.arange(100.0).reshape(1, 100, 1).split(7, dim=1):
        ...     reservoir.add(batch)
        >>> reservoir.seen, reservoir.tokens().shape
        (100, torch.Size([1, 3, 1]))
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.seen = 0
        self.positions = torch.empty(0, dtype=torch.int64)
        self._seed = seed
        self._numbers = np.empty(0, dtype=np.uint64)
        self._tokens: Tensor | None = None
        self._weights: Tensor | None = None

    def add(self, tokens: Tensor, weights: Tensor | None = None) -> None:
        """Let the next tokens of the stream pass.

        Args:
            tokens: ``[L, T, D]``; the same positions are kept in all layers.
            weights: ``[L, T]``, kept beside the tokens; tokens that come without count 1 beside those that come with.
        """
        # In pieces: a random number takes several times its eight bytes while it is made.
        for start in range(0, max(1, tokens.shape[1]), PIECE):
            rows = self.chosen(min(PIECE, tokens.shape[1] - start), self.seen)
            self.insert(*_picked(tokens, weights, start + rows), rows + self.seen)
            self.seen += min(PIECE, tokens.shape[1] - start)

    def add_from_all(self, tokens: Tensor, weights: Tensor | None = None) -> None:
        """:meth:`add` for several processes with the same reservoir: their tokens pass one process after the other, and
        afterwards the reservoirs are the same again."""
        lengths = gathered_numbers([tokens.shape[1]])[:, 0]
        start = self.seen + int(lengths[: world()[0]].sum())
        rows = self.chosen(tokens.shape[1], start)
        self._insert_from_all(*_picked(tokens, weights, rows), rows + start)
        self.seen += int(lengths.sum())

    @property
    def weighted(self) -> bool:
        """Whether tokens have weights."""
        return self._weights is not None

    def united(self, layers: int, features: int, weighted: bool) -> Reservoir:
        """What a single reservoir would hold that had seen the tokens of all processes; the same in every process.

        Args:
            layers: ``L``.
            features: ``D``.
            weighted: whether tokens have weights; a process that has seen no tokens knows none of these.
        """
        union = Reservoir(self.capacity, self._seed)
        tokens = torch.empty(layers, 0, features) if self._tokens is None else self._tokens
        weights = tokens.new_empty(layers, 0, dtype=torch.float32) if weighted else None
        union._insert_from_all(tokens, weights if self._weights is None else self._weights, self.positions)
        return union

    def _insert_from_all(self, tokens: Tensor, weights: Tensor | None, positions: Tensor) -> None:
        # In float32: a process without tokens does not know in which precision the others have theirs.
        rows = torch.cat(gathered_rows(tokens.float().transpose(0, 1).contiguous())).transpose(0, 1)
        heavy = None if weights is None else torch.cat(gathered_rows(weights.T.contiguous())).T
        self.insert(rows, heavy, torch.cat(gathered_rows(positions)))

    def chosen(self, length: int, start: int) -> Tensor:
        """Which of the ``length`` tokens from position ``start`` on would be kept, for all that is known by now."""
        numbers = _numbers(self._seed, np.arange(start, start + length, dtype=np.uint64))
        rows = np.arange(length)
        if len(self._numbers) == self.capacity:
            rows = np.flatnonzero(numbers < self._numbers.max())
        if len(rows) > self.capacity:
            smallest = np.argpartition(numbers[rows], self.capacity - 1)[: self.capacity]
            rows = np.sort(rows[smallest])
        return torch.from_numpy(rows)

    def insert(self, tokens: Tensor, weights: Tensor | None, positions: Tensor) -> None:
        """Put tokens ``[L, m, D]`` in that :meth:`chosen` had named, and let go of as many as are too many."""
        numbers = np.concatenate([self._numbers, _numbers(self._seed, positions.numpy().astype(np.uint64))])
        held = len(self._numbers)
        keep = np.ones(len(numbers), dtype=bool)
        if len(numbers) > self.capacity:
            keep[:] = False
            keep[np.argpartition(numbers, self.capacity - 1)[: self.capacity]] = True
        incoming = np.flatnonzero(keep[held:])
        free = np.concatenate([np.flatnonzero(~keep[:held]), np.arange(held, held + len(incoming))])[
            : len(incoming)
        ]
        size = held + len(incoming) - int((~keep[:held]).sum())
        self._numbers = np.concatenate([self._numbers, np.empty(size - held, dtype=np.uint64)])
        self._numbers[free] = numbers[held + incoming]
        self.positions = _with(self.positions[None], positions[None], free, incoming, size)[0]
        if self._tokens is None:
            self._tokens = tokens[:, :0]
        self._tokens = _with(self._tokens, tokens, free, incoming, size)
        if weights is None and self._weights is None:
            return
        if weights is None:
            weights = tokens.new_ones(tokens.shape[:2], dtype=torch.float32)
        if self._weights is None:
            self._weights = weights.new_ones(tokens.shape[0], held)
        self._weights = _with(self._weights, weights, free, incoming, size)

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and features of the tokens; ``(0, 0)`` before the first."""
        return (0, 0) if self._tokens is None else (self._tokens.shape[0], self._tokens.shape[2])

    def tokens(self) -> Tensor:
        """What is kept, ``[L, n, D]``, in the order of the stream."""
        if self._tokens is None:
            raise ValueError("no token has passed yet")
        return self._tokens.index_select(1, self._order().to(self._tokens.device))

    def weights(self) -> Tensor | None:
        """The weights ``[L, n]`` of :meth:`tokens`, if there are any."""
        if self._weights is None:
            return None
        return self._weights.index_select(1, self._order().to(self._weights.device))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on later."""
        state = {"seen": torch.tensor(self.seen), "positions": self.positions.sort().values}
        if self._tokens is not None:
            state["tokens"] = self.tokens()
        weights = self.weights()
        return state if weights is None else {**state, "weights": weights}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from :meth:`state_dict` of a reservoir with the same capacity and seed."""
        self.seen = int(state["seen"])
        self.positions = state["positions"].cpu().clone()
        self._numbers = _numbers(self._seed, self.positions.numpy().astype(np.uint64))
        self._tokens = state["tokens"].clone() if "tokens" in state else None
        self._weights = state["weights"].clone() if "weights" in state else None

    def _order(self) -> Tensor:
        return self.positions.argsort()


def _picked(tokens: Tensor, weights: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    picked = rows.to(tokens.device)
    return tokens.index_select(1, picked), None if weights is None else weights.index_select(1, picked)


def _with(kept: Tensor, new: Tensor, slots: np.ndarray, chosen: np.ndarray, size: int) -> Tensor:
    """``kept`` ``[L, n, ..]`` with the ``chosen`` of ``new`` ``[L, m, ..]`` in ``slots``, grown to ``size``."""
    if kept.shape[1] < size:
        grown = kept.new_empty(kept.shape[0], size, *kept.shape[2:])
        grown[:, : kept.shape[1]] = kept
        kept = grown
    if len(chosen):
        kept[:, torch.from_numpy(slots).to(kept.device)] = new[:, torch.from_numpy(chosen).to(new.device)]
    return kept


def _numbers(seed: int, positions: np.ndarray) -> np.ndarray:
    """A random number in ``0 .. 2^64 - 1`` for each position: the mixing steps of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        state = positions * np.uint64(0x9E3779B97F4A7C15) + _mixed(np.array([seed % 2**64], dtype=np.uint64))
        return _mixed(state)


def _mixed(state: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))
