"""Many small clusters in place of all tokens: from them any number of clusters is derived without another pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spt_fast.clustering.lloyd import Clustering, Lloyd, step
from spt_fast.clustering.seeding import drawn_seed, seeded_generator, starts
from spt_fast.clustering.sources import Source
from spt_fast.clustering.survey import Moments
from spt_fast.errors import InputError

TOL = 1e-4
MAX_ITER = 100
# The borders between clusters are put right within a few passes over the sample; the rest changes next to nothing.
REFINING_PASSES = 20


@dataclass
class MicroClusters:
    """Tokens summed up as ``m`` weighted points per layer, with a uniform sample of them if there is one.

    A clustering of the weighted points is nearly one of the tokens, except that a micro-cluster cannot be cut in two;
    a few passes over the sample then put the borders right.

    Attributes:
        centers: float32 ``[L, m, D]``.
        weights: ``[L, m]``, how many tokens each stands for.
        inertia: float64 ``[L]``, summed squared distance of tokens to their micro-cluster.
        sample: tokens ``[L, n, D]``, every token of the stream being as likely among them as any other, or ``None``.
        sample_weights: how much the tokens of the sample count, ``[L, n]``; ``None`` counts all alike.

    Example:
        >>> import torch
        >>> from spt_fast.clustering import MiniBatchKMeans
        >>> tokens = torch.cat([torch.randn(900, 4), torch.randn(300, 4) + 20])
        >>> micro = MiniBatchKMeans(50, random_state=0).fit(tokens).micro_clusters_
        >>> micro.cluster(2, random_state=0).counts.sort().values.tolist()
        [[300, 900]]
    """

    centers: Tensor
    weights: Tensor
    inertia: Tensor
    sample: Tensor | None = None
    sample_weights: Tensor | None = None

    def cluster(self, n_clusters: int, *, n_init: int = 3, random_state: int | None = None) -> Clustering:
        """Weighted Lloyd over the micro-clusters, then Lloyd over the sample from there.

        Args:
            n_clusters: ``K``; the fewer micro-clusters per cluster, the coarser the result.
            n_init: starts of the weighted Lloyd; the best is kept.
            random_state: seed of the starts.

        Returns:
            ``centers`` float32 ``[L, K, D]``, ``counts`` ``[L, K]`` (of tokens, each counted with its micro-cluster)
            and ``inertia`` float64 ``[L]`` (scaled up from the sample; without one, that of the tokens if each goes
            where its micro-cluster goes).

        Raises:
            InputError: ``n_clusters`` is less than 1 or more than there are micro-clusters.
        """
        occupied = int((self.weights > 0).sum(dim=1).min())
        if not 1 <= n_clusters <= occupied:
            raise InputError(
                f"n_clusters must be in 1 .. {occupied}, the number of micro-clusters, got {n_clusters}"
            )
        # Tokens of a short stream stand for themselves: without weights a pass is much faster.
        alone = bool((self.weights == 1).all())
        micro = Source.of_sample(self.centers, None if alone else self.weights.double())
        generator = seeded_generator(drawn_seed(random_state))
        begun = starts("k-means++", n_clusters, n_init, self.centers, generator, self.weights)
        centers = Lloyd(begun, stillness(self.centers), MAX_ITER).fit(micro).centers
        if self.sample is None:
            _, counts, between = step(micro, centers)
            return Clustering(centers, counts.to(self.weights.dtype), self.inertia + between)
        sample = Source.of_sample(self.sample, self.sample_weights)
        refined = Lloyd(centers[None], stillness(self.sample), REFINING_PASSES).fit(sample)
        _, counts, _ = step(micro, refined.centers)
        scale = self.weights.sum(dim=1) / refined.counts.sum(dim=1)
        return Clustering(refined.centers, counts.to(self.weights.dtype), refined.inertia * scale)


def stillness(points: Tensor) -> Tensor:
    """The squared shift ``[L]`` under which the centres of points ``[L, n, D]`` are taken to be at rest."""
    moments = Moments()
    moments.add(points)
    return TOL * moments.mean_variance()
