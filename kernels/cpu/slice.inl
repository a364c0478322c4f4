// The algorithm for one slice of tokens, written for a `Vector` that the including file defines. Nothing here may come
// from the standard library: an inline function of it, compiled for this file's instruction set, could be the copy
// that the linker keeps for all files. For the same reason everything is in an unnamed namespace.
//
// A Vector holds kLanes floats as kLanes / 4 quarters of four. One step of the product takes four features of a token,
// repeated in every quarter, times four features of as many centroids, so that four tokens and some groups of centroids
// need few registers and no shuffles until the end.
//
// Multiplying keeps the arithmetic units busy and the memory idle; adding up tokens does the opposite. So while a tile
// is multiplied, the tile before, whose labels are known by then, is added up, and what comes next is fetched.

namespace spt_fast {
namespace {

constexpr int kLanes = Vector::kLanes;
constexpr int kGroup = kLanes / 4;  // centroids in a vector
constexpr int kGroupsPerPanel = Vector::kGroupsPerPanel;
constexpr int kBlock = 4;  // tokens that are multiplied together

// Features that are worked on together: few enough that what is needed of a panel and of the sums of a few dozen
// clusters stays in the first-level cache, enough that starting and stopping costs little.
constexpr int64_t kSlabWidth = 192;

// Memory is read so many blocks before they are multiplied.
constexpr int64_t kBlocksAhead = 3;

// So many tokens of a cluster, and at most a tile more, are added up in one go: a short float32 sum loses few digits.
constexpr int32_t kRecentTokens = 128;

// Below this part of |token|^2 a squared distance is formed again from the differences: too much has cancelled out.
constexpr float kCancelled = 0.01f;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// --- Tiles -----------------------------------------------------------------------------------------------------------

// Some tokens as float32 rows.
struct Tile {
    int64_t first;  // token
    int64_t count;
    const float* rows;
    int64_t stride;
    const float* shifted;  // less the offset
    int64_t shifted_stride;
    const TileScratch* found;
};

inline const char* token_at(const Tokens& tokens, int64_t index) {
    return tokens.data + index * tokens.token_stride * element_bytes(tokens.type);
}

// Can rows be used where they lie?
inline bool usable_in_place(const Tokens& tokens) {
    return tokens.type == ElementType::float32 && tokens.feature_stride == 1 && tokens.width % kWidestVector == 0;
}

// Features start .. start + width - 1 of a token, zero beyond the last.
inline void copy_as_float(const Tokens& tokens, int64_t index, int64_t start, int64_t width, float* out) {
    const char* token = token_at(tokens, index);
    const int64_t real = smaller(width, tokens.width - start);
    int64_t d = 0;
    if (tokens.feature_stride == 1) {
        const int64_t whole = real - real % kLanes;
        const float* floats = reinterpret_cast<const float*>(token) + start;
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(token) + start;
        switch (tokens.type) {
            case ElementType::float32:
                for (; d < whole; d += kLanes) Vector::load(floats + d).store(out + d);
                break;
            case ElementType::float16:
                for (; d < whole; d += kLanes) Vector::load_float16(halves + d).store(out + d);
                break;
            case ElementType::bfloat16:
                for (; d < whole; d += kLanes) Vector::load_bfloat16(halves + d).store(out + d);
                break;
        }
    }
    for (; d < real; ++d) out[d] = load_element(token, tokens.type, (start + d) * tokens.feature_stride);
    for (; d < width; ++d) out[d] = 0;
}

// A tile's place; what is not used where it lies is filled in slab by slab by read().
inline Tile tile_at(const Slice& slice, int64_t first, const TileScratch& scratch) {
    const int64_t padded = slice.centroids->padded_width;
    Tile tile{first, smaller(slice.tile_tokens, slice.end - first), scratch.rows, padded, scratch.shifted, padded,
              &scratch};
    if (usable_in_place(*slice.tokens)) {
        tile.rows = reinterpret_cast<const float*>(token_at(*slice.tokens, first));
        tile.stride = slice.tokens->token_stride;
    }
    if (slice.centroids->offset == nullptr) {
        tile.shifted = tile.rows;
        tile.shifted_stride = tile.stride;
    }
    return tile;
}

inline void read(const Slice& slice, const Tile& tile, int64_t row, int64_t start, int64_t width) {
    const int64_t padded = slice.centroids->padded_width;
    if (!usable_in_place(*slice.tokens)) {
        copy_as_float(*slice.tokens, tile.first + row, start, width, tile.found->rows + row * padded + start);
    }
    if (const float* offset = slice.centroids->offset) {
        const float* features = tile.rows + row * tile.stride;
        for (int64_t d = start; d < start + width; d += kLanes) {
            const Vector difference = Vector::load(features + d) - Vector::load(offset + d);
            difference.store(tile.found->shifted + row * padded + d);
        }
    }
}

// --- What is done while a block is multiplied ------------------------------------------------------------------------

// A companion looks at a slab of four tokens: begin(t) is called for each, then next() for every kWidestVector
// features, then end().
struct NoCompanion {
    void begin(int) {}
    void next() {}
    void end() {}
};

// Fetches tokens that will be multiplied later.
struct Fetching {
    const Slice& slice;
    int64_t first;  // token
    int64_t start;  // feature
    int64_t bytes;  // of kWidestVector features
    const char* next_bytes = nullptr;

    Fetching(const Slice& slice, int64_t first, int64_t start)
        : slice(slice), first(first), start(start), bytes(kWidestVector * element_bytes(slice.tokens->type)) {}

    void begin(int t) {
        const int64_t token = smaller(first + t, slice.tokens->count - 1);
        next_bytes = token_at(*slice.tokens, token) + start * element_bytes(slice.tokens->type);
    }
    void next() {
        __builtin_prefetch(next_bytes, 0, 2);
        next_bytes += bytes;
    }
    void end() {}
};

// Adds the tokens of a block of an earlier tile to their clusters' recent sums, and up to their norms.
struct Adding {
    const Slice& slice;
    const Tile& tile;
    int64_t block;
    int64_t start;  // feature

    const float* row;
    const float* shifted;
    float* sum;
    float* norm_lanes;
    Vector norm;

    Adding(const Slice& slice, const Tile& tile, int64_t block, int64_t start)
        : slice(slice), tile(tile), block(block), start(start) {}

    void begin(int t) {
        const int64_t token = block * kBlock + t;
        row = tile.rows + token * tile.stride + start;
        shifted = tile.shifted + token * tile.shifted_stride + start;
        sum = slice.scratch->recent_sums + tile.found->label[token] * slice.centroids->padded_width + start;
        norm_lanes = tile.found->norm + token * kLanes;
        norm = start == 0 ? Vector::zero() : Vector::load(norm_lanes);
    }
    void next() {
#pragma GCC unroll 4
        for (int d = 0; d < kWidestVector; d += kLanes) {
            const Vector features = Vector::load(shifted + d);
            norm = Vector::multiply_add(features, features, norm);
            (Vector::load(sum + d) + Vector::load(row + d)).store(sum + d);
        }
        row += kWidestVector;
        shifted += kWidestVector;
        sum += kWidestVector;
    }
    void end() { norm.store(norm_lanes); }
};

struct FetchingAndAdding {
    Fetching fetching;
    Adding adding;

    void begin(int t) {
        fetching.begin(t);
        adding.begin(t);
    }
    void next() {
        fetching.next();
        adding.next();
    }
    void end() { adding.end(); }
};

// --- Products and labels ---------------------------------------------------------------------------------------------

// Adds to `products` [kGroups] (or sets them, if `fresh`) the products of four tokens and a panel of kGroups groups
// over `width` features, a multiple of kWidestVector. Lane 4 i + t is about token t and the centroid at place i of its
// group.
template <int kGroups, typename Companion>
__attribute__((noinline)) void multiply(const float* const token[kBlock], const float* packed, int64_t width,
                                        bool fresh, float* products, const Companion& its_companion) {
    Companion companion = its_companion;  // a copy that can be kept in registers
    Vector partial[kBlock][kGroups];
#pragma GCC unroll 4
    for (int t = 0; t < kBlock; ++t) {
#pragma GCC unroll 8
        for (int g = 0; g < kGroups; ++g) partial[t][g] = Vector::zero();
    }
    const float* token0 = token[0];
    const float* token1 = token[1];
    const float* token2 = token[2];
    const float* token3 = token[3];
    // A block has as many steps of four features as a companion has whole vectors: four times width / kWidestVector.
    static_assert(kWidestVector == kBlock * 4);
    for (int turn = 0; turn < kBlock; ++turn) {
        companion.begin(turn);
        for (int64_t step = 0; step < width / kWidestVector; ++step) {
            companion.next();
            Vector centroid[kGroups];
#pragma GCC unroll 8
            for (int g = 0; g < kGroups; ++g) centroid[g] = Vector::load(packed + g * kLanes);
            packed += kGroups * kLanes;
            const float* features[kBlock] = {token0, token1, token2, token3};
#pragma GCC unroll 4
            for (int t = 0; t < kBlock; ++t) {
                const Vector repeated = Vector::repeat_four(features[t]);
#pragma GCC unroll 8
                for (int g = 0; g < kGroups; ++g) {
                    partial[t][g] = Vector::multiply_add(repeated, centroid[g], partial[t][g]);
                }
            }
            token0 += 4;
            token1 += 4;
            token2 += 4;
            token3 += 4;
        }
        companion.end();
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
        const Vector product = Vector::sum_quarters(partial[0][g], partial[1][g], partial[2][g], partial[3][g]);
        (fresh ? product : product + Vector::load(products + g * kLanes)).store(products + g * kLanes);
    }
}

// The same for a number of groups that is known only now.
template <int kGroups = kGroupsPerPanel, typename Companion>
inline void multiply(int64_t groups, const float* const token[kBlock], const float* packed, int64_t width, bool fresh,
                     float* products, const Companion& companion) {
    if constexpr (kGroups > 1) {
        if (groups < kGroups) {
            return multiply<kGroups - 1>(groups, token, packed, width, fresh, products, companion);
        }
    }
    multiply<kGroups>(token, packed, width, fresh, products, companion);
}

// Compares a panel's products with the best so far.
inline void keep_best(const float* products, int64_t groups, int64_t first_group, const float* bias, float* best_score,
                      int32_t* best_index) {
    Vector best = Vector::load(best_score);
    Index index = Index::load(best_index);
    for (int64_t g = 0; g < groups; ++g) {
        const Vector score = Vector::load(products + g * kLanes) + Vector::load(bias + (first_group + g) * kLanes);
        take_smaller(score, Index::group(static_cast<int32_t>((first_group + g) * kGroup)), best, index);
    }
    best.store(best_score);
    index.store(best_index);
}

// Of the centroids that lead in their places, the nearest, and of equally near ones the first.
inline void settle(const float* best_score, const int32_t* best_index, float* score, int32_t* label) {
    float least[kBlock] = {best_score[0], best_score[1], best_score[2], best_score[3]};
    int32_t first[kBlock] = {best_index[0], best_index[1], best_index[2], best_index[3]};
    for (int i = 1; i < kGroup; ++i) {
        for (int t = 0; t < kBlock; ++t) {
            const float other = best_score[4 * i + t];
            const int32_t other_index = best_index[4 * i + t];
            const bool better = (other < least[t]) | ((other == least[t]) & (other_index < first[t]));
            least[t] = better ? other : least[t];
            first[t] = better ? other_index : first[t];
        }
    }
    for (int t = 0; t < kBlock; ++t) {
        score[t] = least[t];
        label[t] = first[t];
    }
}

inline int64_t blocks_of(const Tile& tile) { return (tile.count + kBlock - 1) / kBlock; }

// The nearest centroid of each token of the tile and its score. `companion_of(block, start of the slab)` goes along
// with the first panel.
template <typename CompanionOf>
void find_labels(const Slice& slice, const Tile& tile, CompanionOf companion_of) {
    const Centroids& centroids = *slice.centroids;
    const Scratch& scratch = *slice.scratch;
    const int64_t all_groups = (centroids.count + kGroup - 1) / kGroup;
    const int64_t panels = (all_groups + kGroupsPerPanel - 1) / kGroupsPerPanel;
    for (int64_t i = 0; i < blocks_of(tile) * kLanes; ++i) {
        scratch.best_score[i] = __builtin_inff();
        scratch.best_index[i] = 0;
    }
    const float* packed = centroids.packed;
    for (int64_t panel = 0, first_group = 0; panel < panels; ++panel) {
        const int64_t groups = all_groups * (panel + 1) / panels - first_group;
        for (int64_t start = 0; start < centroids.padded_width; start += kSlabWidth) {
            const int64_t width = smaller(kSlabWidth, centroids.padded_width - start);
            for (int64_t block = 0; block < blocks_of(tile); ++block) {
                const float* token[kBlock];
                for (int t = 0; t < kBlock; ++t) {
                    const int64_t row = smaller(block * kBlock + t, tile.count - 1);
                    if (panel == 0) read(slice, tile, row, start, width);
                    token[t] = tile.shifted + row * tile.shifted_stride + start;
                }
                float* products = scratch.products + block * (kGroupsPerPanel * kLanes);
                if (panel == 0) {
                    multiply(groups, token, packed, width, start == 0, products, companion_of(block, start));
                } else {
                    multiply(groups, token, packed, width, start == 0, products, NoCompanion{});
                }
                if (start + width == centroids.padded_width) {
                    keep_best(products, groups, first_group, centroids.bias, scratch.best_score + block * kLanes,
                              scratch.best_index + block * kLanes);
                }
            }
            packed += groups * kGroup * width;
        }
        first_group += groups;
    }
    for (int64_t block = 0; block < blocks_of(tile); ++block) {
        settle(scratch.best_score + block * kLanes, scratch.best_index + block * kLanes,
               tile.found->score + block * kBlock, tile.found->label + block * kBlock);
    }
}

// Fetches what will be multiplied a little later.
inline Fetching fetching_ahead(const Slice& slice, const Tile& tile, int64_t block, int64_t start) {
    block += kBlocksAhead;
    if (block < blocks_of(tile)) return Fetching(slice, tile.first + block * kBlock, start);
    block -= blocks_of(tile);
    start += kSlabWidth;
    if (start < slice.centroids->padded_width) return Fetching(slice, tile.first + block * kBlock, start);
    const int64_t next = tile.first + tile.count;
    return Fetching(slice, (next < slice.end ? next : slice.afterwards) + block * kBlock, 0);
}

// --- Distances and sums ----------------------------------------------------------------------------------------------

inline float total(Vector vector) {
    float lanes[kLanes];
    vector.store(lanes);
    float sum[4] = {lanes[0], lanes[1], lanes[2], lanes[3]};
    for (int lane = 4; lane < kLanes; ++lane) sum[lane % 4] += lanes[lane];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The squared distance of a tile's token to its centroid, from the differences themselves.
inline float square_distance(const Slice& slice, const Tile& tile, int64_t t) {
    const Centroids& centroids = *slice.centroids;
    const float* row = tile.rows + t * tile.stride;
    const float* centroid = centroids.rows + tile.found->label[t] * centroids.padded_width;
    Vector sum = Vector::zero();
    for (int64_t d = 0; d < centroids.padded_width; d += kLanes) {
        const Vector difference = Vector::load(row + d) - Vector::load(centroid + d);
        sum = Vector::multiply_add(difference, difference, sum);
    }
    return total(sum);
}

// Moves a cluster's recent sum to the slice's.
inline void put_away(const Slice& slice, SliceStep& found, int64_t cluster) {
    const Scratch& scratch = *slice.scratch;
    const int64_t padded = slice.centroids->padded_width;
    float* recent = scratch.recent_sums + cluster * padded;
    float* sum = found.sums + cluster * padded;
    for (int64_t d = 0; d < padded; d += kLanes) {
        (Vector::load(sum + d) + Vector::load(recent + d)).store(sum + d);
        Vector::zero().store(recent + d);
    }
    found.counts[cluster] += scratch.recent[cluster];
    scratch.recent[cluster] = 0;
}

// Adds up the blocks of a tile from `first_block` on, and finishes what concerns the whole tile.
void finish_tile(const Slice& slice, const Tile& tile, int64_t first_block, SliceStep& found) {
    const Scratch& scratch = *slice.scratch;
    const int64_t padded = slice.centroids->padded_width;
    for (int64_t start = 0; start < padded; start += kSlabWidth) {
        const int64_t width = smaller(kSlabWidth, padded - start);
        for (int64_t block = first_block; block < blocks_of(tile); ++block) {
            Adding adding(slice, tile, block, start);
            for (int t = 0; t < smaller(kBlock, tile.count - block * kBlock); ++t) {
                adding.begin(t);
                for (int64_t d = 0; d < width; d += kWidestVector) adding.next();
                adding.end();
            }
        }
    }
    for (int64_t t = 0; t < tile.count; ++t) {
        const float norm = total(Vector::load(tile.found->norm + t * kLanes));
        const float expanded = norm + tile.found->score[t];
        found.inertia += expanded > kCancelled * norm ? expanded : square_distance(slice, tile, t);
        ++scratch.recent[tile.found->label[t]];
    }
    for (int64_t t = 0; t < tile.count; ++t) {
        const int32_t label = tile.found->label[t];
        if (scratch.recent[label] >= kRecentTokens) put_away(slice, found, label);
    }
}

// --- The two operations ----------------------------------------------------------------------------------------------

void step(const Slice& slice, SliceStep& found) {
    const Scratch& scratch = *slice.scratch;
    Tile previous{};
    int which = 0;
    for (int64_t first = slice.begin; first < slice.end; first += slice.tile_tokens) {
        const Tile tile = tile_at(slice, first, scratch.tiles[which]);
        which = 1 - which;
        if (previous.count == 0 || !Vector::kAddsWhileMultiplying) {
            find_labels(slice, tile, [&](int64_t block, int64_t start) {
                return fetching_ahead(slice, tile, block, start);
            });
        } else {
            // All tiles but the last have the same number of tokens, a whole number of blocks.
            find_labels(slice, tile, [&](int64_t block, int64_t start) {
                return FetchingAndAdding{fetching_ahead(slice, tile, block, start),
                                         Adding(slice, previous, block, start)};
            });
        }
        const int64_t blocks_added = Vector::kAddsWhileMultiplying ? blocks_of(tile) : 0;
        if (previous.count > 0) finish_tile(slice, previous, blocks_added, found);
        previous = tile;
    }
    finish_tile(slice, previous, 0, found);
    for (int64_t cluster = 0; cluster < slice.centroids->count; ++cluster) {
        if (scratch.recent[cluster] > 0) put_away(slice, found, cluster);
    }
}

void assign(const Slice& slice, int64_t* labels, float* sq_distances) {
    for (int64_t first = slice.begin; first < slice.end; first += slice.tile_tokens) {
        const Tile tile = tile_at(slice, first, slice.scratch->tiles[0]);
        find_labels(slice, tile, [&](int64_t block, int64_t start) {
            return fetching_ahead(slice, tile, block, start);
        });
        for (int64_t t = 0; t < tile.count; ++t) {
            *labels++ = tile.found->label[t];
            *sq_distances++ = square_distance(slice, tile, t);
        }
    }
}

}  // namespace
}  // namespace spt_fast
