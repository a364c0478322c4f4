// The types that tokens may have, one value at a time. Everything is static: each file keeps its own copy, compiled for
// its own instruction set.
#pragma once

#include <cstdint>

namespace spt_fast {

// Agrees with ELEMENT_TYPES in kmeans_cpu.py.
enum class ElementType : int32_t { float32 = 0, float16 = 1, bfloat16 = 2 };

static inline int64_t element_bytes(ElementType type) { return type == ElementType::float32 ? 4 : 2; }

static inline float float_from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float half_to_float(uint16_t half) {
    const uint32_t rest = half & 0x7fffu;
    const bool is_normal = rest >= 0x0400u;
    const bool is_finite = rest < 0x7c00u;
    // The biases of the exponents differ by 112.
    const float magnitude = !is_normal  ? static_cast<float>(rest) * 0x1p-24f
                            : is_finite ? float_from_bits((rest << 13) + (112u << 23))
                                        : float_from_bits((rest << 13) | 0x7f800000u);
    return (half & 0x8000u) != 0 ? -magnitude : magnitude;
}

static inline float load_element(const char* row, ElementType type, int64_t at) {
    if (type == ElementType::float32) {
        return reinterpret_cast<const float*>(row)[at];
    }
    const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[at];
    return type == ElementType::float16 ? half_to_float(bits) : float_from_bits(static_cast<uint32_t>(bits) << 16);
}

}  // namespace spt_fast
