#include "prepared.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

namespace spt_fast {
namespace {

int64_t groups_of(int64_t centroids, const CentroidLayout& layout) {
    return round_up(centroids, layout.lanes / 4) / (layout.lanes / 4);
}

double square_distance(const Tokens& tokens, int64_t token, const float* point) {
    double sum = 0;
    for (int64_t d = 0; d < tokens.width; ++d) {
        const int64_t at = token * tokens.token_stride + d * tokens.feature_stride;
        const double difference = double(load_element(tokens.data, tokens.type, at)) - point[d];
        sum += difference * difference;
    }
    return sum;
}

// Products with the tokens as they are lose digits when the tokens' common part is far larger than their differences.
// A few of them tell; the median does, because one that lies far away must not hide what the others have in common.
bool offset_matters(const Tokens& tokens, const float* offset) {
    if (tokens.count == 0) return false;
    constexpr double kHarmless = 4;  // in squares: the offset is less than twice as long as the differences
    std::array<double, 16> spreads{};
    auto last = spreads.begin();
    for (int64_t t = 0; t < tokens.count; t += tokens.count / 16 + 1) *last++ = square_distance(tokens, t, offset);
    const auto median = spreads.begin() + (last - spreads.begin()) / 2;
    std::nth_element(spreads.begin(), median, last);
    double square = 0;
    for (int64_t d = 0; d < tokens.width; ++d) square += double(offset[d]) * offset[d];
    return square > kHarmless * *median;
}

}  // namespace

PreparedCentroids::PreparedCentroids(const CentroidLayout& layout, int64_t count, int64_t width)
    : layout_(layout),
      count_(count),
      width_(width),
      padded_(round_up(width, kWidestVector)),
      groups_(groups_of(count, layout)),
      offset_(padded_),
      rows_(count * padded_),
      packed_(groups_ * (layout.lanes / 4) * padded_),
      bias_(groups_ * layout.lanes) {}

void PreparedCentroids::prepare(const Tokens& tokens, const float* centroids, const float* offset) {
    const bool shifts = offset_matters(tokens, offset);
    std::fill_n(offset_.get(), padded_, 0.0f);
    if (shifts) std::copy_n(offset, width_, offset_.get());
    copy_rows(centroids);
    pack();
    set_bias();
    view_ = {count_, padded_, rows_.get(), packed_.get(), bias_.get(), shifts ? offset_.get() : nullptr};
}

void PreparedCentroids::copy_rows(const float* centroids) {
    for (int64_t k = 0; k < count_; ++k) {
        float* end = std::copy_n(centroids + k * width_, width_, rows_.at(k * padded_));
        std::fill(end, rows_.at((k + 1) * padded_), 0.0f);
    }
}

void PreparedCentroids::pack() {
    const int64_t panels = round_up(groups_, layout_.groups_per_panel) / layout_.groups_per_panel;
    float* out = packed_.get();
    for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t first = groups_ * panel / panels * (layout_.lanes / 4);
        const int64_t last = groups_ * (panel + 1) / panels * (layout_.lanes / 4);
        for (int64_t start = 0; start < padded_; start += 4) {
            for (int64_t k = first; k < last; ++k) {
                for (int64_t d = start; d < start + 4; ++d) {
                    *out++ = k < count_ ? -2 * (*rows_.at(k * padded_ + d) - *offset_.at(d)) : 0.0f;
                }
            }
        }
    }
}

void PreparedCentroids::set_bias() {
    for (int64_t k = 0; k < groups_ * (layout_.lanes / 4); ++k) {
        double bias = HUGE_VAL;  // no token is nearest to a centroid that only fills up its group
        if (k < count_) {
            bias = 0;
            for (int64_t d = 0; d < width_; ++d) {
                const double difference = *rows_.at(k * padded_ + d) - *offset_.at(d);
                bias += difference * difference;
            }
        }
        std::fill_n(bias_.at(4 * k), 4, static_cast<float>(bias));
    }
}

ThreadScratch::ThreadScratch(const CentroidLayout& layout, int64_t tile_tokens, int64_t clusters, int64_t width)
    : floats_(tile_tokens * (4 * round_up(width, kWidestVector) + 2 * layout.lanes + 2) +
              tile_tokens / 4 * (layout.groups_per_panel + 1) * layout.lanes +
              clusters * round_up(width, kWidestVector)),
      integers_(tile_tokens * 2 + tile_tokens / 4 * layout.lanes + clusters) {
    const int64_t padded = round_up(width, kWidestVector);
    float* floats = floats_.get();
    const auto take_floats = [&](int64_t count) { return std::exchange(floats, floats + count); };
    int32_t* integers = integers_.get();
    const auto take_integers = [&](int64_t count) { return std::exchange(integers, integers + count); };
    view_.products = take_floats(tile_tokens / 4 * layout.groups_per_panel * layout.lanes);
    view_.best_score = take_floats(tile_tokens / 4 * layout.lanes);
    view_.best_index = take_integers(tile_tokens / 4 * layout.lanes);
    view_.recent_sums = take_floats(clusters * padded);
    for (TileScratch& tile : view_.tiles) {
        tile.rows = take_floats(tile_tokens * padded);
        tile.shifted = take_floats(tile_tokens * padded);
        tile.norm = take_floats(tile_tokens * layout.lanes);
    }
    for (TileScratch& tile : view_.tiles) {
        tile.score = take_floats(tile_tokens);
        tile.label = take_integers(tile_tokens);
    }
    view_.recent = take_integers(clusters);
    std::fill_n(view_.recent_sums, clusters * padded, 0.0f);
    std::fill_n(view_.recent, clusters, 0);
}

}  // namespace spt_fast
