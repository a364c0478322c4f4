// The algorithm in the compiler's own vectors of four: runs on every processor.
#include "slice.h"

namespace spt_fast {
namespace {

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourIntegers __attribute__((vector_size(16)));

template <typename Value, typename Element>
Value unaligned_load(const Element* from) {
    Value value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

struct Vector {
    static constexpr int kLanes = 4;
    static constexpr int kGroupsPerPanel = 3;  // as the registers allow
    static constexpr bool kAddsWhileMultiplying = false;
    Four value;

    static Vector zero() { return {Four{0, 0, 0, 0}}; }
    static Vector load(const float* from) { return {unaligned_load<Four>(from)}; }
    static Vector load_float16(const uint16_t* from) {
        return {Four{half_to_float(from[0]), half_to_float(from[1]), half_to_float(from[2]), half_to_float(from[3])}};
    }
    static Vector load_bfloat16(const uint16_t* from) {
        const FourIntegers wide = {from[0] << 16, from[1] << 16, from[2] << 16, from[3] << 16};
        Four value;
        __builtin_memcpy(&value, &wide, sizeof value);
        return {value};
    }
    static Vector repeat_four(const float* from) { return load(from); }
    static Vector multiply_add(Vector a, Vector b, Vector c) { return {a.value * b.value + c.value}; }
    void store(float* to) const { __builtin_memcpy(to, &value, sizeof value); }
    Vector operator+(Vector other) const { return {value + other.value}; }
    Vector operator-(Vector other) const { return {value - other.value}; }

    static Vector sum_quarters(Vector a, Vector b, Vector c, Vector d) {
        const Four p = a.value, q = b.value, r = c.value, s = d.value;
        const Four even = {p[0] + p[2], q[0] + q[2], r[0] + r[2], s[0] + s[2]};
        const Four odd = {p[1] + p[3], q[1] + q[3], r[1] + r[3], s[1] + s[3]};
        return {even + odd};
    }
};

struct Index {
    FourIntegers value;

    static Index group(int32_t first) { return {FourIntegers{first, first, first, first}}; }
    static Index load(const int32_t* from) { return {unaligned_load<FourIntegers>(from)}; }
    void store(int32_t* to) const { __builtin_memcpy(to, &value, sizeof value); }
};

inline void take_smaller(Vector score, Index candidate, Vector& best, Index& index) {
    const FourIntegers smaller = score.value < best.value;
    best.value = smaller ? score.value : best.value;
    index.value = smaller ? candidate.value : index.value;
}

bool runs_here() { return true; }

}  // namespace
}  // namespace spt_fast

#include "slice.inl"

namespace spt_fast {
const InstructionSet kPortable{"portable", runs_here, {kLanes, kGroupsPerPanel}, step, assign};
}  // namespace spt_fast
