"""What prompts have to do with patch tokens: shared information, likeness, distance, and nearest patches.

Each measure takes in the tokens ``[L, B, N, D]`` of batch after batch (``update``) and says at any time what came of it
(``compute``); :func:`analyze_prompts` runs all of them on the tokens of a data set.
"""

from spt_fast.analysis.cka import FeatureCKA, MinibatchCKA, linear_cka
from spt_fast.analysis.cluster_sizes import ClusterSizes, effective_clusters
from spt_fast.analysis.mmd import Discrepancies, MaximumMeanDiscrepancy
from spt_fast.analysis.mutual_information import MutualInformation, normalized_mutual_information
from spt_fast.analysis.nearest_patches import Nearest, NearestPatches
from spt_fast.analysis.streaming import PromptAnalysis, analyze_prompts, layer_mutual_information

__all__ = [
    "ClusterSizes",
    "Discrepancies",
    "FeatureCKA",
    "MaximumMeanDiscrepancy",
    "MinibatchCKA",
    "MutualInformation",
    "Nearest",
    "NearestPatches",
    "PromptAnalysis",
    "analyze_prompts",
    "effective_clusters",
    "layer_mutual_information",
    "linear_cka",
    "normalized_mutual_information",
]
