// What the library offers, in plain C so that ctypes can call it (kmeans_cpu.py).
#pragma once

#include <cstdint>

#define SPT_FAST_EXPORT __attribute__((visibility("default")))

extern "C" {

// Counts the changes of everything below; a library of another version is not called.
SPT_FAST_EXPORT int32_t spt_fast_abi_version();

// Names of the instruction sets the library was built for, best first, one per index; null past the last.
SPT_FAST_EXPORT const char* spt_fast_instruction_set(int32_t index);

// Does the processor have that instruction set?
SPT_FAST_EXPORT int32_t spt_fast_instruction_set_runs_here(int32_t index);

struct SptFastTokens {
    const void* data;
    int32_t type;          // 0 float32, 1 float16, 2 bfloat16
    int32_t threads;       // to use at most
    int64_t layers;        // L
    int64_t count;         // T
    int64_t width;         // D
    int64_t layer_stride;  // strides in elements
    int64_t token_stride;
    int64_t feature_stride;
    int64_t clusters;        // K
    const float* centroids;  // [L, K, D]
    const float* offsets;    // [L, D]: a point amid the tokens
};

// Both return 0, or 1 when there is not enough memory.
SPT_FAST_EXPORT int32_t spt_fast_kmeans_step(const SptFastTokens* tokens, int32_t instruction_set,
                             float* sums,       // [L, K, D]
                             int64_t* counts,   // [L, K]
                             double* inertia);  // [L]
SPT_FAST_EXPORT int32_t spt_fast_kmeans_assign(const SptFastTokens* tokens, int32_t instruction_set,
                               int64_t* labels,       // [L, T]
                               float* sq_distances);  // [L, T]
}
