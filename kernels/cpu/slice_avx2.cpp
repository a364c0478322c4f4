// The algorithm in AVX2 with FMA and F16C.
#include "slice.h"

#if defined(__x86_64__)

#include <immintrin.h>

namespace spt_fast {
namespace {

struct Vector {
    static constexpr int kLanes = 8;
    static constexpr int kGroupsPerPanel = 3;  // as the registers allow
    static constexpr bool kAddsWhileMultiplying = false;
    __m256 value;

    static Vector zero() { return {_mm256_setzero_ps()}; }
    static Vector load(const float* from) { return {_mm256_loadu_ps(from)}; }
    static Vector load_float16(const uint16_t* from) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
    }
    static Vector load_bfloat16(const uint16_t* from) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
    }
    static Vector repeat_four(const float* from) {
        return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(from))};
    }
    static Vector multiply_add(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.value, b.value, c.value)}; }
    void store(float* to) const { _mm256_storeu_ps(to, value); }
    Vector operator+(Vector other) const { return {_mm256_add_ps(value, other.value)}; }
    Vector operator-(Vector other) const { return {_mm256_sub_ps(value, other.value)}; }

    static Vector sum_quarters(Vector a, Vector b, Vector c, Vector d) {
        const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a.value, b.value), _mm256_unpackhi_ps(a.value, b.value));
        const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c.value, d.value), _mm256_unpackhi_ps(c.value, d.value));
        return {_mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee))};
    }
};

struct Index {
    __m256i value;

    static Index group(int32_t first) {
        return {_mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1))};
    }
    static Index load(const int32_t* from) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))}; }
    void store(int32_t* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }
};

inline void take_smaller(Vector score, Index candidate, Vector& best, Index& index) {
    const __m256 smaller = _mm256_cmp_ps(score.value, best.value, _CMP_LT_OQ);
    best.value = _mm256_blendv_ps(best.value, score.value, smaller);
    index.value = _mm256_blendv_epi8(index.value, candidate.value, _mm256_castps_si256(smaller));
}

bool runs_here() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace
}  // namespace spt_fast

#include "slice.inl"

namespace spt_fast {
const InstructionSet kAvx2{"avx2", runs_here, {kLanes, kGroupsPerPanel}, step, assign};
}  // namespace spt_fast

#endif
