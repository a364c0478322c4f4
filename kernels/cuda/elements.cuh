// What the kernels need to know of the three types that tokens come in.
#ifndef SPT_FAST_ELEMENTS_CUH
#define SPT_FAST_ELEMENTS_CUH

#include "ptx.cuh"

struct Bfloat16 {
  using Storage = uint16;
  static constexpr uint32 one = 0x3f80;
  __device__ static float to_float(uint16 bits) { return float_from_bits(static_cast<uint32>(bits) << 16); }
  __device__ static uint16 from_float(float value) { return bfloat16_from_float(value); }
  __device__ static float first_of(uint32 pair) { return float_from_bits(pair << 16); }
  __device__ static float second_of(uint32 pair) { return float_from_bits(pair & 0xffff0000u); }
  __device__ static void multiply(float (&sum)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    multiply_bfloat16(sum, a, b0, b1);
  }
};

struct Float16 {
  using Storage = uint16;
  static constexpr uint32 one = 0x3c00;
  __device__ static float to_float(uint16 bits) { return float_from_float16(bits); }
  __device__ static uint16 from_float(float value) { return float16_from_float(value); }
  __device__ static float first_of(uint32 pair) { return float_from_float16(static_cast<uint16>(pair & 0xffffu)); }
  __device__ static float second_of(uint32 pair) { return float_from_float16(static_cast<uint16>(pair >> 16)); }
  __device__ static void multiply(float (&sum)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    multiply_float16(sum, a, b0, b1);
  }
};

struct Float32 {
  using Storage = float;
  __device__ static float to_float(float value) { return value; }
};

// Tokens [L, T, D] as they lie in memory; strides count elements. 64 bits: there may be more than 2^31 elements.
template <class Element>
struct Tokens {
  using Storage = typename Element::Storage;
  const Storage* data;
  int64 layer_stride;
  int64 token_stride;
  int64 feature_stride;

  __device__ const Storage* row(int64 layer, int64 token) const {
    return data + layer * layer_stride + token * token_stride;
  }
  __device__ Storage at(const Storage* row, int feature) const {
    return row[static_cast<int64>(feature) * feature_stride];
  }
};

// 16 bytes, moved as one.
struct alignas(16) Vector {
  uint32 words[4];
};
struct alignas(8) Pair {
  uint32 words[2];
};
struct alignas(8) FloatPair {
  float first, second;
};

__device__ inline bool is_aligned(const void* pointer, int bytes) {
  return (reinterpret_cast<uint64>(pointer) & static_cast<uint64>(bytes - 1)) == 0;
}

#endif  // SPT_FAST_ELEMENTS_CUH
