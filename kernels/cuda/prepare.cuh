// Centroids made ready for the dot products, once per call.
#ifndef SPT_FAST_PREPARE_CUH
#define SPT_FAST_PREPARE_CUH

#include "elements.cuh"

// Centroid k is measured from the offset m in the middle of the tokens and scaled by a power of two s_k, so that its
// largest entry lies near 2^11 (float16 has a narrow range): c' = (c_k - m) / s_k = high + low + a tiny rest. Then
//   |x - c_k|^2 = |x - m|^2 + constant_k + factor_k (x . (high + low)),   factor_k = -2 s_k.
// The constant takes m's product with high + low, not with c': what the two terms miss then costs (x - m) . rest only,
// however far from zero the tokens lie.
// float32 tokens have m subtracted when they are read: one term is enough and the constant is |c_k - m|^2.
struct PreparedCentroids {
  void* high;       // Element [L, padded K, padded D], zero where padded
  void* low;        // the same; null for float32
  float* constant;  // [L, padded K], infinite where padded: never the nearest
  float* factor;    // [L, padded K]
  float* offset;    // [L, padded D]
};

constexpr int kPrepareThreads = 128;

// Sum over the block in a fixed order; all threads get it. `scratch` holds one double per warp.
__device__ inline double block_sum(double value, double* scratch) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  synchronize_block();  // whoever still reads the last sum
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  synchronize_block();
  double sum = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) sum += scratch[warp];
  return sum;
}

__device__ inline float block_maximum(float value, double* scratch) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  synchronize_block();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  synchronize_block();
  float maximum = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) {
    const float other = static_cast<float>(scratch[warp]);
    maximum = other > maximum ? other : maximum;
  }
  return maximum;
}

// The power of two next below a positive normal number; 1 for what has none (zero, infinite, NaN).
__device__ inline float power_of_two_below(float value) {
  const uint32 exponent = bits_of_float(value) & 0x7f800000u;
  return exponent == 0 || exponent == 0x7f800000u ? 1.0f : float_from_bits(exponent);
}

// One high term and what it leaves to the low one; a float32 needs none.
template <class Element>
struct Split {
  typename Element::Storage high, low;
  double kept;
  __device__ explicit Split(float value)
      : high(Element::from_float(value)),
        low(Element::from_float(value - Element::to_float(high))),
        kept(static_cast<double>(Element::to_float(high)) + Element::to_float(low)) {}
};

template <>
struct Split<Float32> {
  float high, low;
  double kept;
  __device__ explicit Split(float value) : high(value), low(0), kept(value) {}
};

// Grid: L x padded K blocks of kPrepareThreads. centroids [L, K, D] and middle [L, D] are contiguous float32.
template <class Element>
__device__ void prepare_centroids(const float* centroids, const float* middle, int clusters, int width,
                                  int padded_clusters, int padded_width, PreparedCentroids out) {
  using Storage = typename Element::Storage;
  constexpr bool two_terms = sizeof(Storage) == 2;
  double* scratch = reinterpret_cast<double*>(block_shared_memory());
  const int64 layer = blockIdx.x / padded_clusters;
  const int cluster = static_cast<int>(blockIdx.x % padded_clusters);
  const bool padding = cluster >= clusters;
  const float* centroid = centroids + (layer * clusters + (padding ? 0 : cluster)) * width;
  middle += layer * width;

  float largest = 0;
  for (int d = threadIdx.x; d < width && !padding; d += kPrepareThreads) {
    const float entry = fabsf(centroid[d] - middle[d]);
    largest = entry > largest ? entry : largest;
  }
  float scale = 1;
  if constexpr (two_terms) scale = power_of_two_below(block_maximum(largest, scratch)) * 0x1p-10f;
  if (!(scale > 0x1p-120f)) scale = 1;  // its inverse must be finite; entries this small are as good as none

  const float inverse = 1 / scale;
  const int64 row = static_cast<int64>(blockIdx.x) * padded_width;
  double constant = 0;
  for (int d = threadIdx.x; d < padded_width; d += kPrepareThreads) {
    const bool inside = d < width && !padding;
    const float shifted = inside ? centroid[d] - middle[d] : 0;
    const Split<Element> split(shifted * inverse);
    static_cast<Storage*>(out.high)[row + d] = split.high;
    if constexpr (two_terms) static_cast<Storage*>(out.low)[row + d] = split.low;
    constant += static_cast<double>(shifted) * shifted;
    if (two_terms && inside) constant += 2.0 * middle[d] * (split.kept * scale);
    if (cluster == 0) out.offset[layer * padded_width + d] = d < width ? middle[d] : 0;
  }
  constant = block_sum(constant, scratch);
  if (threadIdx.x == 0) {
    out.constant[blockIdx.x] = padding ? float_from_bits(0x7f800000u) : static_cast<float>(constant);
    out.factor[blockIdx.x] = -2 * scale;
  }
}

#endif  // SPT_FAST_PREPARE_CUH
