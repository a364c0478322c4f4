// The sums of the clusters from known labels, where they do not fit in one block's registers; and the last addition of
// all blocks' partial results.
#ifndef SPT_FAST_ACCUMULATE_CUH
#define SPT_FAST_ACCUMULATE_CUH

#include "fused.cuh"

constexpr int kAccumulateThreads = 64;
constexpr int kAccumulateFeatures = 2 * kAccumulateThreads;
constexpr int kAccumulateTokens = 64;  // of one tile
constexpr int kTokensAhead = 16;       // loads in flight per thread

// Grid (shares, slices of features, slices of clusters). A thread owns two features of its block's clusters and adds
// up the tokens in their order, so no two threads meet at a sum. labels and sq_distances [L, T] are assign's.
// Shared memory: sums [clusters_per_slice, kAccumulateFeatures], counts [clusters_per_slice] and a double per warp.
template <class Element>
__device__ void accumulate(Tokens<Element> x, int64 layers, int64 tokens, int width, int clusters,
                           int clusters_per_slice, const int64* labels, const float* sq_distances,
                           const Partials& partials) {
  float* sums = reinterpret_cast<float*>(block_shared_memory());
  int* counts = reinterpret_cast<int*>(sums + clusters_per_slice * kAccumulateFeatures);
  double* scratch = reinterpret_cast<double*>(counts + (clusters_per_slice + 1) / 2 * 2);
  const int first_cluster = static_cast<int>(blockIdx.z) * clusters_per_slice;
  const int own_clusters = least(clusters - first_cluster, clusters_per_slice);
  const int feature = static_cast<int>(blockIdx.y) * kAccumulateFeatures + 2 * static_cast<int>(threadIdx.x);
  const bool has_first = feature < width, has_second = feature + 1 < width;
  const bool counting = blockIdx.y == 0;

  const Work work(layers, tokens, kAccumulateTokens, gridDim.x);
  const int64 share = blockIdx.x;
  int64 tile = work.first_tile(share);
  const int64 end = work.first_tile(share + 1);
  while (tile < end) {
    const TilePosition position(work, tile);
    const int64 layer = position.layer, slot = share + layer;
    const int64 layer_end = (layer + 1) * work.tiles_per_layer;
    const int64 last = (end < layer_end ? end : layer_end) - layer * work.tiles_per_layer;
    const int64 first_token = position.tile_of_layer * kAccumulateTokens;
    const int64 end_token = last * kAccumulateTokens < tokens ? last * kAccumulateTokens : tokens;
    tile = layer * work.tiles_per_layer + last;

    synchronize_block();  // the last layer's sums and counts have been read
    for (int i = threadIdx.x; i < own_clusters * kAccumulateFeatures; i += kAccumulateThreads) sums[i] = 0;
    for (int k = threadIdx.x; k < own_clusters; k += kAccumulateThreads) counts[k] = 0;
    synchronize_block();

    for (int64 ahead = first_token; ahead < end_token; ahead += kTokensAhead) {
      const int rows = least(end_token - ahead, kTokensAhead);
      int own[kTokensAhead];  // the token's cluster in this slice, else -1
      FloatPair entries[kTokensAhead];
#pragma unroll
      for (int t = 0; t < kTokensAhead; ++t) {
        const int64 cluster = t < rows ? labels[layer * tokens + ahead + t] - first_cluster : -1;
        own[t] = cluster >= 0 && cluster < own_clusters ? static_cast<int>(cluster) : -1;
        entries[t] = {};
        if (own[t] >= 0) {
          const typename Element::Storage* row = x.row(layer, ahead + t);
          if (has_first) entries[t].first = Element::to_float(x.at(row, feature));
          if (has_second) entries[t].second = Element::to_float(x.at(row, feature + 1));
        }
      }
#pragma unroll
      for (int t = 0; t < kTokensAhead; ++t) {
        if (own[t] >= 0) {
          FloatPair* sum = reinterpret_cast<FloatPair*>(sums + own[t] * kAccumulateFeatures) + threadIdx.x;
          const FloatPair before = *sum;
          *sum = {before.first + entries[t].first, before.second + entries[t].second};
        }
      }
    }
    for (int k = 0; k < own_clusters; ++k) {
      const FloatPair sum = reinterpret_cast<const FloatPair*>(sums + k * kAccumulateFeatures)[threadIdx.x];
      float* to = partials.sums + (slot * clusters + first_cluster + k) * width + feature;
      if (has_first) to[0] = sum.first;
      if (has_second) to[1] = sum.second;
    }

    if (counting) {
      double inertia = 0;
      for (int64 token = first_token + threadIdx.x; token < end_token; token += kAccumulateThreads) {
        const int64 cluster = labels[layer * tokens + token] - first_cluster;
        if (cluster >= 0 && cluster < own_clusters) add_to_counter(&counts[cluster], 1);
        inertia += sq_distances[layer * tokens + token];
      }
      inertia = block_sum(inertia, scratch);  // its barriers also end the counting
      if (threadIdx.x == 0 && blockIdx.z == 0) partials.inertia[slot] = inertia;
      for (int k = threadIdx.x; k < own_clusters; k += kAccumulateThreads) {
        partials.counts[slot * clusters + first_cluster + k] = counts[k];
      }
    }
  }
}

constexpr int kReduceThreads = 256;

// Grid (any, L): adds up every layer's slots in their order. sums float32 [L, K, D], counts int64 [L, K], inertia
// float64 [L].
__device__ inline void reduce_partials(const Partials& partials, int64 layers, int64 tokens, int64 tokens_per_tile,
                                       int64 shares, int width, int clusters, float* sums, int64* counts,
                                       double* inertia) {
  const Work work(layers, tokens, tokens_per_tile, shares);
  const int64 layer = blockIdx.y;
  const int64 first = work.first_slot(layer), last = work.last_slot(layer);
  const int64 entries = static_cast<int64>(clusters) * width;
  const int64 thread = static_cast<int64>(blockIdx.x) * kReduceThreads + threadIdx.x;
  const int64 threads = static_cast<int64>(gridDim.x) * kReduceThreads;
  for (int64 i = thread; i < entries; i += threads) {
    double sum = 0;
    for (int64 slot = first; slot <= last; ++slot) sum += partials.sums[slot * entries + i];
    sums[layer * entries + i] = static_cast<float>(sum);
  }
  for (int64 k = thread; k < clusters; k += threads) {
    int64 count = 0;
    for (int64 slot = first; slot <= last; ++slot) count += partials.counts[slot * clusters + k];
    counts[layer * clusters + k] = count;
  }
  if (thread == 0) {
    double sum = 0;
    for (int64 slot = first; slot <= last; ++slot) sum += partials.inertia[slot];
    inertia[layer] = sum;
  }
}

#endif  // SPT_FAST_ACCUMULATE_CUH
