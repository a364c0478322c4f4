// The algorithm in AVX-512, foundation instructions only. bfloat16 tokens are widened to float32 and not multiplied by
// VDPBF16PS: on the one processor this was measured on (Xeon, Emerald Rapids) it starts every 2.1 cycles and two FMAs
// start every cycle, so that it does half the products in the same time, and centroids would need two terms as well.
#include "slice.h"

#if defined(__x86_64__)

#include <immintrin.h>

namespace spt_fast {
namespace {

struct Vector {
    static constexpr int kLanes = 16;
    static constexpr int kGroupsPerPanel = 5;  // as the registers allow
    static constexpr bool kAddsWhileMultiplying = true;
    __m512 value;

    static Vector zero() { return {_mm512_setzero_ps()}; }
    static Vector load(const float* from) { return {_mm512_loadu_ps(from)}; }
    static Vector load_float16(const uint16_t* from) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
    }
    static Vector load_bfloat16(const uint16_t* from) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
    }
    static Vector repeat_four(const float* from) { return {_mm512_broadcast_f32x4(_mm_loadu_ps(from))}; }
    static Vector multiply_add(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.value, b.value, c.value)}; }
    void store(float* to) const { _mm512_storeu_ps(to, value); }
    Vector operator+(Vector other) const { return {_mm512_add_ps(value, other.value)}; }
    Vector operator-(Vector other) const { return {_mm512_sub_ps(value, other.value)}; }

    static Vector sum_quarters(Vector a, Vector b, Vector c, Vector d) {
        const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.value, b.value), _mm512_unpackhi_ps(a.value, b.value));
        const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.value, d.value), _mm512_unpackhi_ps(c.value, d.value));
        return {_mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee))};
    }
};

struct Index {
    __m512i value;

    static Index group(int32_t first) {
        const __m512i place = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        return {_mm512_add_epi32(_mm512_set1_epi32(first), place)};
    }
    static Index load(const int32_t* from) { return {_mm512_loadu_si512(from)}; }
    void store(int32_t* to) const { _mm512_storeu_si512(to, value); }
};

inline void take_smaller(Vector score, Index candidate, Vector& best, Index& index) {
    const __mmask16 smaller = _mm512_cmp_ps_mask(score.value, best.value, _CMP_LT_OQ);
    best.value = _mm512_mask_mov_ps(best.value, smaller, score.value);
    index.value = _mm512_mask_mov_epi32(index.value, smaller, candidate.value);
}

bool runs_here() { return __builtin_cpu_supports("avx512f"); }

}  // namespace
}  // namespace spt_fast

#include "slice.inl"

namespace spt_fast {
const InstructionSet kAvx512{"avx512", runs_here, {kLanes, kGroupsPerPanel}, step, assign};
}  // namespace spt_fast

#endif
