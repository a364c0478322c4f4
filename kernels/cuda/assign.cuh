// The nearest centroid of every token and how far it is, for any number and width of centroids.
//
// A tiled matrix product with an arg-min instead of an output: a block takes 128 tokens, 16 per warp, and goes through
// all centroids, kClusterTiles x 8 at a time, in chunks of features of 128 bytes. The distance to the chosen centroid
// is then summed from the differences themselves; that reads the tokens again, mostly from the L2 cache.
#ifndef SPT_FAST_ASSIGN_CUH
#define SPT_FAST_ASSIGN_CUH

#include "prepare.cuh"
#include "work.cuh"

constexpr int kAssignThreads = 256;
constexpr int kAssignTokens = 128;
constexpr int kAssignRowBytes = 128 + 16;  // nine units of 16 bytes: eight rows lie in different banks

// One chunk of features of the block's tokens, zero beyond the last token and feature. From float32 the offset is
// subtracted on the way: measured from it, tokens and centroids lose nothing to a distance that they share.
template <class Element>
__device__ void load_token_chunk(unsigned char* to, const Tokens<Element>& x, int64 layer, int64 first_token, int rows,
                                 int first_feature, int width, const float* offset, bool whole_vectors) {
  using Storage = typename Element::Storage;
  constexpr int vector = 16 / sizeof(Storage);
  for (int i = threadIdx.x; i < kAssignTokens * 8; i += kAssignThreads) {
    const int token = i / 8, feature = first_feature + i % 8 * vector;
    union {
      Vector whole;
      Storage elements[vector];
    } loaded = {};
    if (token < rows) {
      const Storage* row = x.row(layer, first_token + token);
      if (whole_vectors && feature < width) {
        loaded.whole = *reinterpret_cast<const Vector*>(row + feature);
      } else {
#pragma unroll
        for (int j = 0; j < vector; ++j) {
          if (feature + j < width) loaded.elements[j] = x.at(row, feature + j);
        }
      }
      if constexpr (sizeof(Storage) == 4) {
#pragma unroll
        for (int j = 0; j < vector; ++j) loaded.elements[j] -= offset[feature + j];
      }
    }
    *reinterpret_cast<Vector*>(to + token * kAssignRowBytes + i % 8 * 16) = loaded.whole;
  }
}

// The same features of `rows` prepared centroids, which are padded: no bounds.
template <class Storage>
__device__ void load_centroid_chunk(unsigned char* to, const Storage* from, int rows, int padded_width) {
  constexpr int vector = 16 / sizeof(Storage);
  for (int i = threadIdx.x; i < rows * 8; i += kAssignThreads) {
    *reinterpret_cast<Vector*>(to + i / 8 * kAssignRowBytes + i % 8 * 16) =
        *reinterpret_cast<const Vector*>(from + static_cast<int64>(i / 8) * padded_width + i % 8 * vector);
  }
}

// A warp's dot products of 16 tokens with kClusterTiles x 8 centroids: those of half-precision tokens ..
template <class Element, int kClusterTiles>
struct WarpProduct {
  static constexpr int kRows = 2;     // tokens that a lane keeps dot products of
  static constexpr int kColumns = 2 * kClusterTiles;
  static constexpr int kLanesPerRow = 4;
  float dot[kClusterTiles][4];

  __device__ static int row(int lane, int r) { return lane / 4 + 8 * r; }
  __device__ static int column(int lane, int c) { return 8 * (c / 2) + lane % 4 * 2 + c % 2; }
  __device__ float at(int r, int c) const { return dot[c / 2][2 * r + c % 2]; }

  __device__ void clear() {
#pragma unroll
    for (int c = 0; c < kClusterTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dot[c][i] = 0;
    }
  }

  // tokens: the warp's 16 rows; high, low: the centroids'.
  __device__ void add(const unsigned char* tokens, const unsigned char* high, const unsigned char* low, int lane) {
#pragma unroll 1  // more at once would cost registers and gain nothing: each step has kClusterTiles independent sums
    for (int step = 0; step < 4; ++step) {
      uint32 x[4];
      load_matrices(x, tokens + lane % 16 * kAssignRowBytes + 32 * step + lane / 16 * 16);
      // Two tiles of centroids in one load: features 0-7 and 8-15 of the first tile, then of the second.
      const int at = (lane / 16 * 8 + lane % 8) * kAssignRowBytes + 32 * step + lane / 8 % 2 * 16;
#pragma unroll
      for (int c = 0; c < kClusterTiles; c += 2) {
        uint32 terms[4];
        load_matrices(terms, high + 8 * c * kAssignRowBytes + at);
        Element::multiply(dot[c], x, terms[0], terms[1]);
        Element::multiply(dot[c + 1], x, terms[2], terms[3]);
        load_matrices(terms, low + 8 * c * kAssignRowBytes + at);
        Element::multiply(dot[c], x, terms[0], terms[1]);
        Element::multiply(dot[c + 1], x, terms[2], terms[3]);
      }
    }
  }
};

// .. and of float32 ones, in float32 arithmetic: a lane takes tokens r, r + 4, .. and centroids c, c + 8, ..
template <int kClusterTiles>
struct WarpProduct<Float32, kClusterTiles> {
  static constexpr int kRows = 4;
  static constexpr int kColumns = kClusterTiles;
  static constexpr int kLanesPerRow = 8;
  float dot[kRows][kColumns];

  __device__ static int row(int lane, int r) { return lane / 8 + 4 * r; }
  __device__ static int column(int lane, int c) { return lane % 8 + 8 * c; }
  __device__ float at(int r, int c) const { return dot[r][c]; }

  __device__ void clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) dot[r][c] = 0;
    }
  }

  __device__ void add(const unsigned char* tokens, const unsigned char* centroids, const unsigned char*, int lane) {
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      float x[kRows][4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Vector loaded = *reinterpret_cast<const Vector*>(tokens + row(lane, r) * kAssignRowBytes + 16 * step);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[r][j] = float_from_bits(loaded.words[j]);
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const Vector loaded =
            *reinterpret_cast<const Vector*>(centroids + column(lane, c) * kAssignRowBytes + 16 * step);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float entry = float_from_bits(loaded.words[j]);
#pragma unroll
          for (int r = 0; r < kRows; ++r) dot[r][c] = fmaf(x[r][j], entry, dot[r][c]);
        }
      }
    }
  }
};

// Grid: any number of blocks of kAssignThreads; tiles go round. labels int64 and sq_distances float32 [L, T].
// centroids [L, K, D] contiguous float32; `prepared` padded to kClusterTiles x 8 and to the features of 128 bytes.
template <class Element, int kClusterTiles>
__device__ void assign(Tokens<Element> x, int64 layers, int64 tokens, int width, int clusters, const float* centroids,
                       const PreparedCentroids& prepared, int padded_clusters, int padded_width, int64* labels,
                       float* sq_distances, bool whole_vectors) {
  using Storage = typename Element::Storage;
  using Product = WarpProduct<Element, kClusterTiles>;
  constexpr int chunk = 128 / sizeof(Storage);
  constexpr int centroids_at_once = 8 * kClusterTiles;
  unsigned char* token_chunk = block_shared_memory();
  unsigned char* high_chunk = token_chunk + kAssignTokens * kAssignRowBytes;
  unsigned char* low_chunk = high_chunk + centroids_at_once * kAssignRowBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  const Work work(layers, tokens, kAssignTokens, 1);
  for (int64 tile = blockIdx.x; tile < work.tiles; tile += gridDim.x) {
    const TilePosition position(work, tile);
    const int64 layer = position.layer, first_token = position.tile_of_layer * kAssignTokens;
    const int rows = least(tokens - first_token, kAssignTokens);
    const float* offset = prepared.offset + layer * padded_width;
    float nearest[Product::kRows];
    int label[Product::kRows];  // 0 where every score is infinite or NaN
#pragma unroll
    for (int r = 0; r < Product::kRows; ++r) {
      nearest[r] = float_from_bits(0x7f800000u);
      label[r] = 0;
    }
    for (int first = 0; first < padded_clusters; first += centroids_at_once) {
      const int64 first_row = layer * padded_clusters + first;
      Product product;
      product.clear();
      for (int feature = 0; feature < padded_width; feature += chunk) {
        const int64 from = first_row * padded_width + feature;
        synchronize_block();  // the last chunks are no longer in use
        load_token_chunk(token_chunk, x, layer, first_token, rows, feature, width, offset, whole_vectors);
        load_centroid_chunk(high_chunk, static_cast<const Storage*>(prepared.high) + from, centroids_at_once,
                            padded_width);
        if constexpr (sizeof(Storage) == 2) {
          load_centroid_chunk(low_chunk, static_cast<const Storage*>(prepared.low) + from, centroids_at_once,
                              padded_width);
        }
        synchronize_block();
        product.add(token_chunk + warp * 16 * kAssignRowBytes, high_chunk, low_chunk, lane);
      }
#pragma unroll
      for (int c = 0; c < Product::kColumns; ++c) {
        const int cluster = first + Product::column(lane, c);
        const float constant = prepared.constant[layer * padded_clusters + cluster];
        const float factor = prepared.factor[layer * padded_clusters + cluster];
#pragma unroll
        for (int r = 0; r < Product::kRows; ++r) {
          const float score = fmaf(factor, product.at(r, c), constant);
          if (score < nearest[r]) {  // a lane's columns rise: the lowest index of equals stays
            nearest[r] = score;
            label[r] = cluster;
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < Product::kRows; ++r) {
#pragma unroll
      for (int mask = 1; mask < Product::kLanesPerRow; mask *= 2) {
        const float other = shuffle_xor(nearest[r], mask);
        const int other_label = shuffle_xor(label[r], mask);
        if (other < nearest[r] || (other == nearest[r] && other_label < label[r])) {
          nearest[r] = other;
          label[r] = other_label;
        }
      }
#pragma unroll
      for (int sharing = 0; sharing < 32 / Product::kLanesPerRow; ++sharing) {
        const int row = 16 * warp + Product::row(sharing * Product::kLanesPerRow, r);
        const int chosen = shuffle_from(label[r], sharing * Product::kLanesPerRow);
        if (row < rows) {  // the same for the whole warp
          const Storage* entries = x.row(layer, first_token + row);
          const float* centroid = centroids + (layer * clusters + chosen) * width;
          float sum = 0;
          for (int d = lane; d < width; d += 32) {
            const float difference = Element::to_float(x.at(entries, d)) - centroid[d];
            sum = fmaf(difference, difference, sum);
          }
#pragma unroll
          for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
          if (lane == 0) {
            labels[layer * tokens + first_token + row] = chosen;
            sq_distances[layer * tokens + first_token + row] = sum;
          }
        }
      }
    }
  }
}

#endif  // SPT_FAST_ASSIGN_CUH
