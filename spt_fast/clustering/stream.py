"""A clustering that follows a stream of tokens: running means, and a uniform sample to put them right."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.lloyd import Clustering, Lloyd, step
from spt_fast.clustering.micro_clusters import MAX_ITER, MicroClusters, stillness
from spt_fast.clustering.reservoir import Reservoir
from spt_fast.clustering.seeding import drawn, given_centers, seeded_generator, starts
from spt_fast.clustering.sources import Source, common_shape, first_unsound, refuse_unsound
from spt_fast.distributed import broadcast, gathered_numbers, transport_device, world
from spt_fast.errors import InputError
from spt_fast.kernels import kmeans_assign

# Before the stream moves them, seeds are settled on the sample: the more tokens it holds per cluster, the more passes
# over it are worth their time.
TOKENS_PER_STARTING_PASS = 100
MOST_STARTING_PASSES = 10


@dataclass
class Stream:
    """Takes in tokens batch by batch; every process ends with the same state.

    Attributes:
        n_clusters: clusters ``K``.
        init: how to seed, as for :class:`~spt_fast.clustering.KMeans`.
        init_size: tokens in the sample.
        n_init: how many seedings are compared.
        reassignment_ratio: clusters with a smaller share of the largest one's tokens are tried elsewhere in the end.
        seed: of the sample and the seeds.
        steps: batches taken in.
        last: tokens (of each layer) in the last of them.
    """

    n_clusters: int
    init: str | Tensor | np.ndarray
    init_size: int
    n_init: int
    reassignment_ratio: float
    seed: int
    steps: int = 0
    last: int = 0
    _reservoir: Reservoir = field(init=False)
    _running: Tensor | None = None
    _given: Tensor | None = None
    _mass: float = 0.0
    _settled: Clustering | None = None

    def __post_init__(self) -> None:
        self._reservoir = Reservoir(max(self.init_size, self.n_clusters), self.seed)

    @property
    def seen(self) -> int:
        """Tokens (of each layer) that have passed."""
        return self._reservoir.seen

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and features of the tokens."""
        return self._reservoir.shape

    @property
    def started(self) -> bool:
        """Whether there are running means yet; before that the sample still holds every token."""
        return self._running is not None

    def take(
        self,
        tokens: Tensor | None,
        weights: Tensor | None = None,
        *,
        again: bool = False,
        first_row: int = 0,
    ) -> Tensor | None:
        """Take in a batch; with several processes, the union of theirs.

        Args:
            tokens: ``[L, T, D]``; ``None`` if this process has nothing to add to the batch.
            weights: ``[L, T]``.
            again: these tokens have passed before, and are in the sample already or not.
            first_row: number of the first of them, for messages.

        Returns:
            Inertia per token before the step, float64 ``[L]``; ``None`` as long as there are no centres.

        Raises:
            InputError: NaN or infinite tokens, naming the first such row, in all processes; nothing was taken in.
        """
        unsound = -1 if tokens is None else first_unsound(tokens)
        unsound = unsound if unsound < 0 else unsound + first_row
        shape = (0, 0, 0) if tokens is None else tokens.shape
        reports = gathered_numbers([unsound, weights is not None, *shape])
        for rank, row in enumerate(reports[:, 0].tolist()):
            refuse_unsound(row, rank if world()[1] > 1 else None)
        layers, features = common_shape(reports[:, [2, 4]].tolist())
        if not features:
            raise InputError("X holds no tokens")
        if not self.steps:  # better now than when the sample is full
            given_centers(self.init, layers, self.n_clusters, features)
        if tokens is None:
            tokens = torch.empty(layers, 0, features, device=transport_device())
        if weights is None and (self._reservoir.weighted or reports[:, 1].any()):
            weights = tokens.new_ones(tokens.shape[:2], dtype=torch.float32)
        self.last = total = int(reports[:, 3].sum())
        self.steps += 1
        self._settled = None
        starting = not self.started and self.seen + total >= self._reservoir.capacity
        earlier = self._sample() if starting and self.seen else None
        if not again:
            self._reservoir.add_from_all(tokens, weights)
        if starting:
            self._start()
            if earlier is not None:
                self._move(earlier)
        if not self.started:
            return None
        return self._move(Source.of_chunk(tokens, weights), again=again) / max(1, total)

    def settled(self) -> Clustering:
        """The clustering that the stream amounts to; :meth:`take` is not influenced by having asked.

        Raises:
            InputError: fewer tokens than clusters.
        """
        if self._settled is None:
            if self.seen < self.n_clusters:
                raise InputError(f"X holds {self.seen} tokens, fewer than n_clusters={self.n_clusters}")
            sample = self._sample()
            begun = self._seeds()
            if self._running is not None:
                # The running means are as good as what the stream began with; the seeds know all of it.
                begun = torch.cat([self._running[None], begun])
            found = self._reassigned(Lloyd(begun, self._stillness(), MAX_ITER).fit(sample), sample)
            if self.started:
                found = found._replace(
                    counts=_scaled_up(found.counts, self._mass),
                    inertia=found.inertia * (self.seen / len(self._reservoir.positions)),
                )
            self._settled = found
        return self._settled

    def measure(self, source: Source) -> None:
        """Count the tokens of each settled cluster, and sum up their distances, where all tokens can be read again."""
        centers = self.settled().centers
        self._settled = Clustering(centers, *step(source, centers)[1:])

    def micro_clusters(self) -> MicroClusters:
        """The running means and what each was given; of a stream that fits into the sample, the tokens themselves."""
        tokens, weights = self._reservoir.tokens(), self._reservoir.weights()
        if self._running is None or self._given is None:
            alone = torch.ones_like(tokens[..., 0], dtype=torch.int64) if weights is None else weights
            return MicroClusters(
                tokens.float(), alone, torch.zeros_like(tokens[:, 0, 0], dtype=torch.float64)
            )
        inertia = step(self._sample(), self._running)[2] * (self.seen / tokens.shape[1])
        counts = self._given
        if float(counts[0].sum()) != self._mass:  # tokens have passed more than once
            counts = counts * (self._mass / counts.sum(dim=1, keepdim=True))
        return MicroClusters(self._running, counts, inertia, tokens, weights)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on later."""
        state = {f"sample.{name}": tensor for name, tensor in self._reservoir.state_dict().items()}
        state |= {"seed": torch.tensor(self.seed), "steps": torch.tensor(self.steps)}
        if self._running is not None and self._given is not None:
            state |= {"centers": self._running, "counts": self._given}
            state |= {"mass": torch.tensor(self._mass, dtype=torch.float64)}
        if self._settled is not None:
            state |= {f"settled.{name}": tensor for name, tensor in self._settled._asdict().items()}
        return {name: tensor.clone() for name, tensor in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from :meth:`state_dict` of a stream with the same parameters."""
        self.seed, self.steps = int(state["seed"]), int(state["steps"])
        self._running, self._given, self._settled = state.get("centers"), state.get("counts"), None
        self._mass = float(state.get("mass", 0))
        if "settled.centers" in state:
            self._settled = Clustering(*(state[f"settled.{name}"] for name in Clustering._fields))
        self._reservoir = Reservoir(self._reservoir.capacity, self.seed)
        prefix = "sample."
        self._reservoir.load_state_dict(
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        )

    def _sample(self) -> Source:
        return Source.of_sample(self._reservoir.tokens(), self._reservoir.weights())

    def _stillness(self) -> Tensor:
        return stillness(self._reservoir.tokens())

    def _seeds(self) -> Tensor:
        return starts(
            self.init,
            self.n_clusters,
            self.n_init,
            self._reservoir.tokens(),
            seeded_generator(self.seed),
            self._reservoir.weights(),
        )

    def _start(self) -> None:
        passes = self._reservoir.capacity // (self.n_clusters * TOKENS_PER_STARTING_PASS)
        passes = max(1, min(MOST_STARTING_PASSES, passes))
        self._running = Lloyd(self._seeds(), self._stillness(), passes).fit(self._sample()).centers
        broadcast([self._running])
        self._given = torch.zeros_like(self._running[..., 0], dtype=torch.int64)

    def _move(self, batch: Source, *, again: bool = False) -> Tensor:
        """Move the running means by a batch; returns its inertia."""
        assert self._running is not None and self._given is not None
        sums, counts, inertia = step(batch, self._running)
        self._mass += 0.0 if again else float(counts[0].sum())
        given = self._given + counts
        # In float64: over a long stream the steps get small beside the centres.
        before = self._running.double()
        gain = (sums - counts[..., None] * before) / torch.where(given > 0, given, 1)[..., None]
        self._running, self._given = (before + gain).float(), given
        return inertia

    def _reassigned(self, found: Clustering, sample: Source) -> Clustering:
        """Try the centres of very small clusters elsewhere; each layer keeps what is better."""
        small = found.counts < self.reassignment_ratio * found.counts.max(dim=1, keepdim=True).values
        if not small.any():
            return found
        ((tokens, weights),) = sample
        generator = seeded_generator(self.seed + 1)
        centers = found.centers.clone()
        sq_distances = kmeans_assign(tokens, centers)[1]
        for layer in small.any(dim=1).nonzero().flatten().tolist():
            chances = sq_distances[layer] if weights is None else sq_distances[layer] * weights[layer]
            centers[layer, small[layer]] = tokens[
                layer, drawn(chances, int(small[layer].sum()), generator)
            ].float()
        return Lloyd(torch.stack([found.centers, centers]), self._stillness(), MAX_ITER).fit(sample)


def _scaled_up(counts: Tensor, total: float) -> Tensor:
    """Counts ``[L, K]`` of a sample as those of ``total`` tokens; whole numbers stay whole, and add up."""
    shares = counts.double() * (total / counts.sum(dim=1, keepdim=True))
    if counts.is_floating_point():
        return shares
    whole = shares.floor()
    missing = total - whole.sum(dim=1, keepdim=True)
    order = (whole - shares).argsort(dim=1, stable=True)  # those that lost most get one back first
    return (whole + (order.argsort(dim=1) < missing)).long()
