// What is worked out once per call: the centroids in the layout the products want, and the buffers of a thread.
#pragma once

#include <memory>
#include <new>

#include "slice.h"

namespace spt_fast {

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Uninitialised memory that begins on a cache line.
template <typename Value>
class Buffer {
public:
    explicit Buffer(int64_t count)
        : values_(static_cast<Value*>(::operator new(count * sizeof(Value), std::align_val_t{64}))) {}
    Value* get() const { return values_.get(); }
    Value* at(int64_t index) const { return values_.get() + index; }

private:
    struct Free {
        void operator()(Value* values) const { ::operator delete(values, std::align_val_t{64}); }
    };
    std::unique_ptr<Value, Free> values_;
};

// The centroids of one layer.
class PreparedCentroids {
public:
    // `centroids` [count, width] and `offset` [width], a point amid the tokens.
    PreparedCentroids(const CentroidLayout& layout, int64_t count, int64_t width);
    void prepare(const Tokens& tokens, const float* centroids, const float* offset);
    const Centroids& view() const { return view_; }

private:
    void copy_rows(const float* centroids);
    void pack();
    void set_bias();

    CentroidLayout layout_;
    int64_t count_;
    int64_t width_;
    int64_t padded_;
    int64_t groups_;
    Buffer<float> offset_;
    Buffer<float> rows_;
    Buffer<float> packed_;
    Buffer<float> bias_;
    Centroids view_{};
};

// The buffers of one thread.
class ThreadScratch {
public:
    ThreadScratch(const CentroidLayout& layout, int64_t tile_tokens, int64_t clusters, int64_t width);
    const Scratch& view() const { return view_; }

private:
    Buffer<float> floats_;
    Buffer<int32_t> integers_;
    Scratch view_{};
};

}  // namespace spt_fast
