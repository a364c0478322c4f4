// A whole Lloyd step in one pass over half-precision tokens: each is read from memory once.
//
// One block per multiprocessor walks its share of the tiles (work.cuh); a ring (ring.cuh) keeps copies of the next
// tiles in flight. The features are dealt out to the eight warps, kFeatureTiles x 16 neighbours each, for both products:
//   1. x . c: a warp multiplies its features of all tokens and all centroids; the partial dot products go to shared
//      memory, with the partial |x - m|^2;                                                       -- barrier --
//   2. eight threads per token add the eight partials, find the nearest centroid and publish the label;  -- barrier --
//   3. sums: a warp adds x^T one_hot for its features to sums that stay in registers over all tiles.
// So a warp's slice of the centroids and of the sums never leaves its registers, and two barriers per tile are enough:
// what one step of a tile reads was written before the last barrier, and is next written after the following one.
#ifndef SPT_FAST_FUSED_CUH
#define SPT_FAST_FUSED_CUH

#include "prepare.cuh"
#include "ring.cuh"

// Tensor cores cut off where float32 addition rounds, so a long sum drifts: after this many tiles it is moved out of
// the registers into the block's partial sums, by a rounded addition.
constexpr int kTilesBetweenFlushes = 64;

// Below this ratio of the squared distance to |x - m|^2, the difference of large terms is replaced by a direct sum.
constexpr float kCancels = 1e-3f;

// What the blocks find, one slot per (share, layer), see Work.
struct Partials {
  float* sums;      // [slots, K, D]
  int* counts;      // [slots, K]
  double* inertia;  // [slots]
};

template <class Element, int kFeatureTiles, int kClusterTiles, bool kLowInShared>
struct FusedStep {
  using Storage = typename Element::Storage;
  static constexpr int kClusters = 8 * kClusterTiles;  // padded K
  static constexpr int kWidth = 16 * kFeatureTiles * kRingWarps;  // padded D
  // Floats between the dot products of two tokens: 8 or 24 more than a multiple of 32, so that the four rows written
  // (as pairs) or read together lie in different banks.
  static constexpr int kDotStride = 8 * (kClusterTiles | 1);

  // Shared memory, in this order. The plan in kmeans_cuda.py counts the same bytes.
  Ring<Element> ring;
  Pair* low;         // [warps, kFeatureTiles, kClusterTiles, 32 lanes] second terms, if kLowInShared
  float* dots;       // [warps, kRingTokens, kDotStride]
  float* norms;      // [warps, kRingTokens] partial |x - m|^2
  float* offset;     // [kWidth] m
  float* constant;   // [kClusters]
  float* factor;     // [kClusters]
  int* labels;       // [kRingTokens], -1 beyond the last token
  int* counts;       // [kClusters]
  double* scratch;   // [warps]

  // Registers.
  uint32 high_terms[kFeatureTiles][kClusterTiles][2];
  uint32 low_terms[kLowInShared ? 1 : kFeatureTiles][kLowInShared ? 1 : kClusterTiles][2];
  float sums[kFeatureTiles][kClusterTiles][4];
  double inertia;
  bool flushed;  // the slot holds sums already

  int warp, lane, group, pair;  // group = lane / 4 and pair = 2 (lane % 4) place the lane in a fragment

  __device__ FusedStep(Tokens<Element> x, int64 tokens, int width, int stages, int mode) {
    unsigned char* next = block_shared_memory();
    auto take = [&next](int64 bytes) {
      unsigned char* taken = next;
      next += bytes;
      return taken;
    };
    const int row_bytes = (kWidth + 8) * sizeof(Storage);
    unsigned char* slots = take(static_cast<int64>(stages) * kRingTokens * row_bytes);
    uint64* barriers = reinterpret_cast<uint64*>(take(16 * ((stages + 1) / 2)));
    ring = {slots, barriers, x, tokens, width, row_bytes, stages, mode};
    low = reinterpret_cast<Pair*>(take(kLowInShared ? kRingWarps * kFeatureTiles * kClusterTiles * 32 * 8 : 0));
    dots = reinterpret_cast<float*>(take(kRingWarps * kRingTokens * kDotStride * 4));
    norms = reinterpret_cast<float*>(take(kRingWarps * kRingTokens * 4));
    offset = reinterpret_cast<float*>(take(kWidth * 4));
    constant = reinterpret_cast<float*>(take(kClusters * 4));
    factor = reinterpret_cast<float*>(take(kClusters * 4));
    labels = reinterpret_cast<int*>(take(kRingTokens * 4));
    counts = reinterpret_cast<int*>(take(kClusters * 4));
    scratch = reinterpret_cast<double*>(take(kRingWarps * 8));
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    group = lane / 4;
    pair = lane % 4 * 2;
  }

  // Takes up a layer: its centroids into registers, empty sums. The block has left the last layer when it returns.
  __device__ void begin_layer(const PreparedCentroids& prepared, int64 layer) {
    synchronize_block();
    const int64 centroid_elements = static_cast<int64>(kClusters) * kWidth;
    const Storage* high = static_cast<const Storage*>(prepared.high) + layer * centroid_elements;
    const Storage* lower = static_cast<const Storage*>(prepared.low) + layer * centroid_elements;
#pragma unroll
    for (int f = 0; f < kFeatureTiles; ++f) {
#pragma unroll
      for (int c = 0; c < kClusterTiles; ++c) {
        const int at = (8 * c + group) * kWidth + 16 * (warp * kFeatureTiles + f) + pair;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          high_terms[f][c][half] = *reinterpret_cast<const uint32*>(high + at + 8 * half);
          const uint32 term = *reinterpret_cast<const uint32*>(lower + at + 8 * half);
          if constexpr (kLowInShared) {
            low[((warp * kFeatureTiles + f) * kClusterTiles + c) * 32 + lane].words[half] = term;
          } else {
            low_terms[f][c][half] = term;
          }
        }
      }
    }
    for (int d = threadIdx.x; d < kWidth; d += kRingThreads) offset[d] = prepared.offset[layer * kWidth + d];
    for (int k = threadIdx.x; k < kClusters; k += kRingThreads) {
      constant[k] = prepared.constant[layer * kClusters + k];
      factor[k] = prepared.factor[layer * kClusters + k];
      counts[k] = 0;
    }
    clear_sums();
    inertia = 0;
    flushed = false;
    synchronize_block();
  }

  __device__ void clear_sums() {
#pragma unroll
    for (int f = 0; f < kFeatureTiles; ++f) {
#pragma unroll
      for (int c = 0; c < kClusterTiles; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[f][c][i] = 0;
      }
    }
  }

  // Step 1: this warp's features of x . c and |x - m|^2, for 16 tokens at a time.
  __device__ void multiply(int tile) {
    const int first_feature = 16 * kFeatureTiles * warp;
#pragma unroll
    for (int block = 0; block < kRingTokens / 16; ++block) {
      float dot[kClusterTiles][4] = {};
      float norm[2] = {};  // of tokens `group` and `group + 8`
      const Storage* row = ring.row(tile, 16 * block + lane % 16) + first_feature + lane / 16 * 8;
#pragma unroll
      for (int f = 0; f < kFeatureTiles; ++f) {
        uint32 x[4];
        load_matrices(x, row + 16 * f);
#pragma unroll
        for (int c = 0; c < kClusterTiles; ++c) Element::multiply(dot[c], x, high_terms[f][c][0], high_terms[f][c][1]);
#pragma unroll
        for (int c = 0; c < kClusterTiles; ++c) {
          if constexpr (kLowInShared) {
            const Pair term = low[((warp * kFeatureTiles + f) * kClusterTiles + c) * 32 + lane];
            Element::multiply(dot[c], x, term.words[0], term.words[1]);
          } else {
            Element::multiply(dot[c], x, low_terms[f][c][0], low_terms[f][c][1]);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const FloatPair m =
              *reinterpret_cast<const FloatPair*>(offset + first_feature + 16 * f + 8 * (i / 2) + pair);
          const float first = Element::first_of(x[i]) - m.first;
          const float second = Element::second_of(x[i]) - m.second;
          norm[i % 2] = fmaf(first, first, fmaf(second, second, norm[i % 2]));
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = warp * kRingTokens + 16 * block + group + 8 * half;
#pragma unroll
        for (int c = 0; c < kClusterTiles; ++c) {
          *reinterpret_cast<FloatPair*>(dots + token * kDotStride + 8 * c + pair) = {dot[c][2 * half],
                                                                                   dot[c][2 * half + 1]};
        }
        norm[half] += shuffle_xor(norm[half], 1);
        norm[half] += shuffle_xor(norm[half], 2);
        if (pair == 0) norms[token] = norm[half];
      }
    }
  }

  // Step 2: thread 8 t + j looks at centroids j, j + 8, .. of token t. `centroids` are the layer's [K, D].
  __device__ void choose(int tile, int rows, const float* centroids) {
    const int token = threadIdx.x / 8, part = threadIdx.x % 8;
    float nearest = float_from_bits(0x7f800000u);
    int label = 0;  // where every score is infinite or NaN, too
#pragma unroll
    for (int c = 0; c < kClusterTiles; ++c) {
      const int cluster = 8 * c + part;
      float dot = 0;
#pragma unroll
      for (int w = 0; w < kRingWarps; ++w) dot += dots[(w * kRingTokens + token) * kDotStride + cluster];
      const float score = fmaf(factor[cluster], dot, constant[cluster]);
      if (score < nearest) {
        nearest = score;
        label = cluster;
      }
    }
    float norm = norms[part * kRingTokens + token];  // the partial of warp `part`: as many warps as threads per token
#pragma unroll
    for (int mask = 1; mask < 8; mask *= 2) {
      const float other = shuffle_xor(nearest, mask);
      const int other_label = shuffle_xor(label, mask);
      if (other < nearest || (other == nearest && other_label < label)) {
        nearest = other;
        label = other_label;
      }
      norm += shuffle_xor(norm, mask);
    }
    const bool real = token < rows;
    float sq_distance = norm + nearest;
    const bool direct = real && !(sq_distance >= kCancels * norm);
    if (any_in_warp(direct)) {
      float sum = 0;
      if (direct) {
        const Storage* row = ring.row(tile, token);
        const float* centroid = centroids + static_cast<int64>(label) * ring.width;
        for (int d = part; d < ring.width; d += 8) {
          const float difference = Element::to_float(row[d]) - centroid[d];
          sum = fmaf(difference, difference, sum);
        }
      }
#pragma unroll
      for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
      if (direct) sq_distance = sum;
    }
    if (part == 0) {
      labels[token] = real ? label : -1;
      if (real) {
        inertia += sq_distance;
        add_to_counter(&counts[label], 1);
      }
    }
  }

  // Step 3: x^T one_hot. The one-hot operand needs no memory: a lane's entries follow from the labels of eight tokens.
  __device__ void accumulate(int tile) {
    const int first_feature = 16 * kFeatureTiles * warp;
#pragma unroll
    for (int block = 0; block < kRingTokens / 16; ++block) {
      uint32 one_hot[kClusterTiles][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Pair of = *reinterpret_cast<const Pair*>(labels + 16 * block + 8 * half + pair);
#pragma unroll
        for (int c = 0; c < kClusterTiles; ++c) {
          const uint32 cluster = 8 * c + group;
          one_hot[c][half] =
              (of.words[0] == cluster ? Element::one : 0) | (of.words[1] == cluster ? Element::one << 16 : 0);
        }
      }
      const Storage* row =
          ring.row(tile, 16 * block + lane / 16 * 8 + lane % 8) + first_feature + lane / 8 % 2 * 8;
#pragma unroll
      for (int f = 0; f < kFeatureTiles; ++f) {
        uint32 x[4];
        load_matrices_transposed(x, row + 16 * f);
#pragma unroll
        for (int c = 0; c < kClusterTiles; ++c) Element::multiply(sums[f][c], x, one_hot[c][0], one_hot[c][1]);
      }
    }
  }

  // Adds the registers' sums to the slot's [K, D] and clears them. Each entry has one owner: a plain addition.
  __device__ void flush_sums(float* slot, int clusters) {
#pragma unroll
    for (int f = 0; f < kFeatureTiles; ++f) {
      auto entry = [&](int c, int i, bool& inside) {
        const int feature = 16 * (kFeatureTiles * warp + f) + group + i / 2 * 8;
        const int cluster = 8 * c + pair + i % 2;
        inside = feature < ring.width && cluster < clusters;
        return slot + cluster * ring.width + feature;
      };
      // All reads before the first write: the compiler cannot know that they never meet, and would wait for each.
      bool inside;
#pragma unroll
      for (int c = 0; c < kClusterTiles; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* from = entry(c, i, inside);
          sums[f][c][i] += flushed && inside ? *from : 0;
        }
      }
#pragma unroll
      for (int c = 0; c < kClusterTiles; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float* to = entry(c, i, inside);
          if (inside) *to = sums[f][c][i];
        }
      }
    }
    clear_sums();
    flushed = true;
  }

  // After the last flush of a layer.
  __device__ void end_layer(const Partials& partials, int64 slot, int clusters) {
    const double sum = block_sum(inertia, scratch);  // its barriers also end all counting
    if (threadIdx.x == 0) partials.inertia[slot] = sum;
    for (int k = threadIdx.x; k < clusters; k += kRingThreads) partials.counts[slot * clusters + k] = counts[k];
  }
};

// Grid: `shares` blocks of kRingThreads, each with at least one tile. centroids [L, K, D] contiguous float32.
template <class Element, int kFeatureTiles, int kClusterTiles, bool kLowInShared>
__device__ void fused_step(Tokens<Element> x, int64 layers, int64 tokens, int width, int clusters,
                           const float* centroids, const PreparedCentroids& prepared, const Partials& partials,
                           int stages, int mode) {
  FusedStep<Element, kFeatureTiles, kClusterTiles, kLowInShared> step(x, tokens, width, stages, mode);
  const Work work(layers, tokens, kRingTokens, gridDim.x);
  const int64 share = blockIdx.x;
  const int64 first = work.first_tile(share);
  const int tiles = static_cast<int>(work.first_tile(share + 1) - first);
  TilePosition reading(work, first), filling = reading;
  int filled = 0;
  auto fill_next = [&] {
    if (filled < tiles) {
      step.ring.fill(filled, filling.layer, filling.tile_of_layer * kRingTokens);
      filling.advance(work);
      ++filled;
    }
    step.ring.end_fill();
  };

  step.ring.prepare();
  for (int stage = 0; stage < stages - 1; ++stage) fill_next();
  int64 layer = -1;
  for (int tile = 0; tile < tiles; ++tile) {
    if (layer != reading.layer) {
      layer = reading.layer;
      step.begin_layer(prepared, layer);
    }
    step.ring.wait(tile);
    step.multiply(tile);
    synchronize_block();  // the dot products are there, and everyone has left the last tile: its slot is free
    fill_next();
    step.choose(tile, least(tokens - reading.tile_of_layer * kRingTokens, kRingTokens),
                centroids + layer * clusters * width);
    synchronize_block();  // the labels are there
    step.accumulate(tile);

    reading.advance(work);
    const bool layer_ends = tile + 1 == tiles || reading.layer != layer;
    const int64 slot = share + layer;
    if (layer_ends || (tile + 1) % kTilesBetweenFlushes == 0) {
      step.flush_sums(partials.sums + slot * clusters * width, clusters);
    }
    if (layer_ends) step.end_layer(partials, slot, clusters);
  }
}

#endif  // SPT_FAST_FUSED_CUH
