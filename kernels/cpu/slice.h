// A slice of tokens and what one thread finds in it: the boundary between the general code (kmeans.cpp) and the same
// algorithm compiled once for each instruction set (slice_*.cpp).
#pragma once

#include <cstdint>

#include "elements.h"

namespace spt_fast {

// The layer of tokens that a slice is cut from. Strides count elements.
struct Tokens {
    const char* data;
    ElementType type;
    int64_t count;
    int64_t width;
    int64_t token_stride;
    int64_t feature_stride;
};

// Everything about one layer's centroids that is worked out once.
struct Centroids {
    int64_t count;         // K
    int64_t padded_width;  // D rounded up to a multiple of kWidestVector
    const float* rows;     // [K, padded_width]: the centroids, zero beyond D
    const float* packed;   // -2 (centroid - offset) in the order of CentroidLayout
    const float* bias;     // |centroid - offset|^2
    const float* offset;   // [padded_width], to be taken from tokens before products; null if it would be zero
};

// A tile's tokens as float32 rows, and what is found out about them.
struct TileScratch {
    float* rows;     // [tokens, padded_width]: the tokens
    float* shifted;  // [tokens, padded_width]: the same less the offset
    int32_t* label;  // [tokens]
    float* score;    // [tokens]: |token - centroid|^2 less |token|^2, both less the offset
    float* norm;     // [tokens, lanes]: parts of |token|^2, less the offset
};

// Buffers that belong to one thread.
struct Scratch {
    TileScratch tiles[2];  // the one that is multiplied and the one before
    float* products;       // [tokens / 4, groups_per_panel, lanes]: of tokens and centroids
    float* best_score;     // [tokens / 4, lanes]: the least score so far of each token in each place of a group
    int32_t* best_index;   // [tokens / 4, lanes]: the centroids they belong to
    float* recent_sums;    // [K, padded_width]: sums of the last few tokens of each cluster; zero between slices
    int32_t* recent;       // [K]: how many those are
};

// Outputs of kmeans_step for one slice; all zero at the start.
struct SliceStep {
    float* sums;  // [K, padded_width]
    int64_t* counts;
    double inertia;
};

struct Slice {
    const Tokens* tokens;
    const Centroids* centroids;
    const Scratch* scratch;
    int64_t begin;
    int64_t end;
    int64_t afterwards;  // the token that this thread probably goes on with
    int64_t tile_tokens;
};

// How centroids lie in `packed` and `bias`. A vector of `lanes` floats holds four features of lanes / 4 centroids (a
// group). The groups are cut into panels of about the same size, whose products stay in registers together:
//   packed [panel][step of four features][group of the panel][centroid of the group][feature of the step]
//   bias   [group][centroid of the group][4 equal values, one for each of four tokens]
struct CentroidLayout {
    int lanes;
    int groups_per_panel;
};

// Rows are padded to whole vectors of this many floats, so that no instruction set needs a loop for the rest.
constexpr int64_t kWidestVector = 16;

// One implementation of the algorithm.
struct InstructionSet {
    const char* name;
    bool (*runs_here)();
    CentroidLayout layout;
    void (*step)(const Slice&, SliceStep&);
    // labels and sq_distances are those of the slice's first token onwards.
    void (*assign)(const Slice&, int64_t* labels, float* sq_distances);
};

extern const InstructionSet kPortable;
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;

}  // namespace spt_fast
