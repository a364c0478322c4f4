// Cuts the tokens into slices, gives them to threads, and adds up what was found, always in the same order: results
// depend neither on the number of threads nor on which of them was faster.
#include "kmeans.h"

#include <algorithm>
#include <exception>
#include <vector>

#include "prepared.h"
#include "slice.h"
#include "thread_pool.h"

namespace spt_fast {
namespace {

const InstructionSet* const kInstructionSets[] = {
#if defined(__x86_64__)
    &kAvx512,
    &kAvx2,
#endif
    &kPortable,
};

// A tile is read from memory, multiplied, and read again for its distances and sums: it should stay in a core's cache.
constexpr int64_t kTileFloats = 48 << 10;
constexpr int64_t kMaxTileTokens = 128;
constexpr int64_t kBlockTokens = 4;  // a tile is a whole number of these

// A slice is what a thread takes on at once. All together, their sums must not fill the memory.
constexpr int64_t kSliceTokens = 4096;
constexpr int64_t kSliceSums = 1 << 26;  // floats

constexpr int64_t kStripe = 1024;  // features that are added up together

// One call: its layers with their centroids, its threads with their scratch, and how the tokens are cut.
class Call {
public:
    Call(const SptFastTokens& call, const InstructionSet& instructions, bool with_sums)
        : call_(call), instructions_(instructions) {
        const int64_t fitting = kTileFloats / padded_width() / kBlockTokens * kBlockTokens;
        tile_tokens_ = std::clamp(fitting, kBlockTokens, kMaxTileTokens);
        int64_t slices = call.count / kSliceTokens + 1;
        if (with_sums) slices = std::min(slices, kSliceSums / (call.layers * call.clusters * padded_width()) + 1);
        slice_tokens_ = round_up((call.count + slices - 1) / slices, tile_tokens_);
        slices_ = call.count == 0 ? 0 : (call.count + slice_tokens_ - 1) / slice_tokens_;

        const ElementType type{call.type};
        for (int64_t layer = 0; layer < call.layers; ++layer) {
            const char* first = static_cast<const char*>(call.data) + layer * call.layer_stride * element_bytes(type);
            tokens_.push_back({first, type, call.count, call.width, call.token_stride, call.feature_stride});
            centroids_.emplace_back(instructions.layout, call.clusters, call.width);
        }
        run_in_parallel(call.threads, call.layers, [&](int, int64_t layer) {
            centroids_[layer].prepare(tokens_[layer], call.centroids + layer * call.clusters * call.width,
                                      call.offsets + layer * call.width);
        });
        for (int64_t thread = 0; thread < std::min<int64_t>(call.threads, call.layers * slices_); ++thread) {
            scratch_.emplace_back(instructions.layout, tile_tokens_, call.clusters, call.width);
        }
    }

    int64_t padded_width() const { return round_up(call_.width, kWidestVector); }
    int64_t slices() const { return slices_; }  // of each layer

    // Calls work(slice, number of the slice, layer) for every slice.
    template <typename Work>
    void for_each_slice(const Work& work) const {
        run_in_parallel(static_cast<int>(scratch_.size()), call_.layers * slices_, [&](int thread, int64_t number) {
            const int64_t layer = number / slices_;
            const int64_t begin = number % slices_ * slice_tokens_;
            const int64_t end = std::min(begin + slice_tokens_, call_.count);
            const int64_t afterwards = begin + static_cast<int64_t>(scratch_.size()) * slice_tokens_;
            work(Slice{&tokens_[layer], &centroids_[layer].view(), &scratch_[thread].view(), begin, end, afterwards,
                       tile_tokens_},
                 number, layer);
        });
    }

    void step(float* sums, int64_t* counts, double* inertia) const {
        const int64_t padded = padded_width();
        const int64_t clusters = call_.clusters;
        const Buffer<float> slice_sums(call_.layers * slices_ * clusters * padded);
        std::vector<int64_t> slice_counts(call_.layers * slices_ * clusters);
        std::vector<double> slice_inertia(call_.layers * slices_);
        for_each_slice([&](const Slice& slice, int64_t number, int64_t) {
            SliceStep found{slice_sums.at(number * clusters * padded), &slice_counts[number * clusters], 0.0};
            std::fill_n(found.sums, clusters * padded, 0.0f);
            instructions_.step(slice, found);
            slice_inertia[number] = found.inertia;
        });
        run_in_parallel(static_cast<int>(scratch_.size()), call_.layers * clusters, [&](int, int64_t row) {
            const int64_t layer = row / clusters;
            const int64_t first = layer * slices_ * clusters + row % clusters;
            counts[row] = 0;
            for (int64_t s = 0; s < slices_; ++s) counts[row] += slice_counts[first + s * clusters];
            for (int64_t start = 0; start < call_.width; start += kStripe) {
                const int64_t width = std::min(kStripe, call_.width - start);
                double sum[kStripe] = {};
                for (int64_t s = 0; s < slices_; ++s) {
                    const float* part = slice_sums.at((first + s * clusters) * padded + start);
                    for (int64_t d = 0; d < width; ++d) sum[d] += part[d];
                }
                for (int64_t d = 0; d < width; ++d) sums[row * call_.width + start + d] = static_cast<float>(sum[d]);
            }
        });
        for (int64_t layer = 0; layer < call_.layers; ++layer) {
            inertia[layer] = 0;
            for (int64_t s = 0; s < slices_; ++s) inertia[layer] += slice_inertia[layer * slices_ + s];
        }
    }

    void assign(int64_t* labels, float* sq_distances) const {
        for_each_slice([&](const Slice& slice, int64_t, int64_t layer) {
            const int64_t first = layer * call_.count + slice.begin;
            instructions_.assign(slice, labels + first, sq_distances + first);
        });
    }

private:
    const SptFastTokens& call_;
    const InstructionSet& instructions_;
    int64_t tile_tokens_;
    int64_t slice_tokens_;
    int64_t slices_;
    std::vector<Tokens> tokens_;
    std::vector<PreparedCentroids> centroids_;
    std::vector<ThreadScratch> scratch_;
};

}  // namespace
}  // namespace spt_fast

using namespace spt_fast;

int32_t spt_fast_abi_version() { return 1; }

const char* spt_fast_instruction_set(int32_t index) {
    return index < static_cast<int32_t>(std::size(kInstructionSets)) ? kInstructionSets[index]->name : nullptr;
}

int32_t spt_fast_instruction_set_runs_here(int32_t index) { return kInstructionSets[index]->runs_here(); }

int32_t spt_fast_kmeans_step(const SptFastTokens* tokens, int32_t instruction_set, float* sums, int64_t* counts,
                             double* inertia) try {
    Call(*tokens, *kInstructionSets[instruction_set], true).step(sums, counts, inertia);
    return 0;
} catch (const std::exception&) {
    return 1;
}

int32_t spt_fast_kmeans_assign(const SptFastTokens* tokens, int32_t instruction_set, int64_t* labels,
                               float* sq_distances) try {
    Call(*tokens, *kInstructionSets[instruction_set], false).assign(labels, sq_distances);
    return 0;
} catch (const std::exception&) {
    return 1;
}
