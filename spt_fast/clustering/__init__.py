"""K-means with scikit-learn's conventions and an optional leading layer axis, on :mod:`spt_fast.kernels`."""

from spt_fast.clustering.kmeans import KMeans
from spt_fast.clustering.lloyd import Clustering
from spt_fast.clustering.micro_clusters import MicroClusters
from spt_fast.clustering.minibatch import MiniBatchKMeans
from spt_fast.clustering.seeding import plus_plus, seeded_generator

__all__ = [
    "Clustering",
    "KMeans",
    "MicroClusters",
    "MiniBatchKMeans",
    "plus_plus",
    "seeded_generator",
]
