// The kernels of kmeans_step and kmeans_assign as the host sees them: extern "C", every argument 64 bits wide.
//
// Read in this order: work.cuh (who does what), prepare.cuh (the arithmetic), ring.cuh and fused.cuh (one pass over
// half-precision tokens), assign.cuh and accumulate.cuh (float32 tokens, many or wide centroids). kmeans_cuda.py
// chooses between them and knows their launch sizes and shared memory.
//
// A macro below makes one kernel: FUSED_STEP(Bfloat16, 6, 3, false) is fused_step_Bfloat16_6_3_false. Without
// SPT_FAST_KERNEL all listed ones are made (the cubins of CMake); with it just that one (NVRTC, at first use).

#include "accumulate.cuh"
#include "assign.cuh"
#include "fused.cuh"

// The registers that a thread may use follow from how many blocks a multiprocessor should hold at once.
#define KERNEL(threads, blocks_at_once) extern "C" __global__ void __launch_bounds__(threads, blocks_at_once)

// [L, T, D] with strides in elements; the same letters in all kernels.
#define TOKENS(Element) \
  const Element::Storage *x, int64 layer_stride, int64 token_stride, int64 feature_stride, int64 layers, int64 tokens, \
      int64 width
#define TOKEN_VIEW {x, layer_stride, token_stride, feature_stride}
#define PREPARED void *high, void *low, float *constant, float *factor, float *offset
#define PARTIALS float *partial_sums, int *partial_counts, double *partial_inertia

// Grid [L x padded_clusters], 64 bytes of shared memory.
#define PREPARE(Element)                                                                                          \
  KERNEL(kPrepareThreads, 4)                                                                                      \
  prepare_##Element(const float* centroids, const float* middle, int64 clusters, int64 width,                     \
                    int64 padded_clusters, int64 padded_width, PREPARED) {                                        \
    prepare_centroids<Element>(centroids, middle, static_cast<int>(clusters), static_cast<int>(width),            \
                               static_cast<int>(padded_clusters), static_cast<int>(padded_width),                 \
                               {high, low, constant, factor, offset});                                            \
  }

// Grid [shares].
#define FUSED_STEP(Element, feature_tiles, cluster_tiles, low_in_shared)                                          \
  KERNEL(kRingThreads, 1)                                                                                         \
  fused_step_##Element##_##feature_tiles##_##cluster_tiles##_##low_in_shared(                                     \
      TOKENS(Element), const float* centroids, int64 clusters, PREPARED, PARTIALS, int64 stages, int64 mode) {    \
    fused_step<Element, feature_tiles, cluster_tiles, low_in_shared>(                                             \
        TOKEN_VIEW, layers, tokens, static_cast<int>(width), static_cast<int>(clusters), centroids,               \
        {high, low, constant, factor, offset}, {partial_sums, partial_counts, partial_inertia},                   \
        static_cast<int>(stages), static_cast<int>(mode));                                                        \
  }

// Grid [any].
#define ASSIGN(Element, cluster_tiles)                                                                            \
  KERNEL(kAssignThreads, 2)                                                                                       \
  assign_##Element##_##cluster_tiles(TOKENS(Element), const float* centroids, int64 clusters, PREPARED,           \
                                     int64 padded_clusters, int64 padded_width, int64* labels,                    \
                                     float* sq_distances, int64 whole_vectors) {                                  \
    assign<Element, cluster_tiles>(TOKEN_VIEW, layers, tokens, static_cast<int>(width),                           \
                                   static_cast<int>(clusters), centroids, {high, low, constant, factor, offset},  \
                                   static_cast<int>(padded_clusters), static_cast<int>(padded_width), labels,     \
                                   sq_distances, whole_vectors != 0);                                             \
  }

// Grid [shares, slices of features, slices of clusters].
#define ACCUMULATE(Element)                                                                                       \
  KERNEL(kAccumulateThreads, 4)                                                                                   \
  accumulate_##Element(TOKENS(Element), int64 clusters, int64 clusters_per_slice, const int64* labels,            \
                       const float* sq_distances, PARTIALS) {                                                     \
    accumulate<Element>(TOKEN_VIEW, layers, tokens, static_cast<int>(width), static_cast<int>(clusters),          \
                        static_cast<int>(clusters_per_slice), labels, sq_distances,                               \
                        {partial_sums, partial_counts, partial_inertia});                                         \
  }

// Grid [any, L].
#define REDUCE(name)                                                                                              \
  KERNEL(kReduceThreads, 2)                                                                                       \
  reduce_##name(PARTIALS, int64 layers, int64 tokens, int64 tokens_per_tile, int64 shares, int64 width,           \
                int64 clusters, float* sums, int64* counts, double* inertia) {                                    \
    reduce_partials({partial_sums, partial_counts, partial_inertia}, layers, tokens, tokens_per_tile, shares,     \
                    static_cast<int>(width), static_cast<int>(clusters), sums, counts, inertia);                  \
  }

#ifdef SPT_FAST_KERNEL
SPT_FAST_KERNEL
#else

// One tile of features is 8 x 16 = 128 of them, one of clusters 8. What fits in 255 registers without spilling.
#define FUSED_STEPS(Element)         \
  FUSED_STEP(Element, 2, 3, false)   \
  FUSED_STEP(Element, 2, 8, false)   \
  FUSED_STEP(Element, 3, 3, false)   \
  FUSED_STEP(Element, 3, 6, false)   \
  FUSED_STEP(Element, 6, 3, false)   \
  FUSED_STEP(Element, 8, 3, true)
FUSED_STEPS(Bfloat16)
FUSED_STEPS(Float16)

ASSIGN(Bfloat16, 4)
ASSIGN(Bfloat16, 8)
ASSIGN(Bfloat16, 12)
ASSIGN(Float16, 4)
ASSIGN(Float16, 8)
ASSIGN(Float16, 12)
ASSIGN(Float32, 4)
PREPARE(Bfloat16)
PREPARE(Float16)
PREPARE(Float32)
ACCUMULATE(Bfloat16)
ACCUMULATE(Float16)
ACCUMULATE(Float32)
REDUCE(partials)

#endif
