// Lets a C++ compiler take kernels/cuda/kmeans.cu as it is: included before it, this stands in for CUDA's language
// extensions and for ptx.cuh, whose include guard it takes. One thread of the machine plays all threads of a block
// (emulator.cpp); copies come early or late and threads in any order, drawn from a fixed seed.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define SPT_FAST_PTX_CUH

#define __global__
#define __device__
#define __launch_bounds__(threads, blocks)
#define __CUDA_ARCH__ 900

using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using int64 = long long;

struct Index {
  unsigned x, y, z;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

unsigned char* shared_memory();
void synchronize_block();

// Called by all 32 lanes of a warp: once all are there, `work` runs once with what each has passed.
using Work = void (*)(void* const (&of_lane)[32]);
void with_warp(Work work, void* mine);

void barrier_init(uint64* barrier, uint32 arrivals);
void barrier_arrive(uint64* barrier, uint32 bytes);
bool barrier_try_wait(uint64* barrier, uint32 parity);
void bulk_copy(void* to, const void* from, uint32 bytes, uint64* barrier);
void copy_16_bytes(void* to, const void* from);
void close_copy_group();
void wait_for_copy_groups(int pending);
void load_matrices(uint32 (&matrices)[4], const void* row, bool transposed);
void multiply(float (&sum)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, float (*to_float)(uint16));
uint16 bfloat16_from_float(float value);
uint16 float16_from_float(float value);
float float_from_bfloat16(uint16 bits);
float float_from_float16(uint16 bits);

template <class Value>
struct Shuffle {
  Value passed, received;
  int lane;  // to receive from
};

template <class Value>
Value shuffle(Value value, int lane) {
  Shuffle<Value> mine = {value, {}, lane};
  with_warp(
      [](void* const(&of_lane)[32]) {
        for (void* each : of_lane) {
          auto* to = static_cast<Shuffle<Value>*>(each);
          to->received = static_cast<Shuffle<Value>*>(of_lane[to->lane])->passed;
        }
      },
      &mine);
  return mine.received;
}

}  // namespace emulator

inline unsigned char* block_shared_memory() { return emulator::shared_memory(); }

inline void barrier_init(uint64* barrier, uint32 arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void barrier_arrive_expecting(uint64* barrier, uint32 bytes) { emulator::barrier_arrive(barrier, bytes); }
inline bool barrier_try_wait(uint64* barrier, uint32 parity) { return emulator::barrier_try_wait(barrier, parity); }
inline void bulk_copy(void* to, const void* from, uint32 bytes, uint64* barrier) {
  emulator::bulk_copy(to, from, bytes, barrier);
}
inline void fence_before_bulk_copies() {}  // one path to memory here: what this fence is for cannot be shown

inline void copy_16_bytes(void* to, const void* from) { emulator::copy_16_bytes(to, from); }
inline void close_copy_group() { emulator::close_copy_group(); }
template <int pending>
void wait_for_copy_groups() {
  emulator::wait_for_copy_groups(pending);
}

template <class Value>
Value shuffle_xor(Value value, int mask) {
  return emulator::shuffle(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
inline int shuffle_from(int value, int lane) { return emulator::shuffle(value, lane); }
inline bool any_in_warp(bool condition) {
  int any = condition;
  for (int mask = 1; mask < 32; mask *= 2) any |= shuffle_xor(any, mask);
  return any != 0;
}
inline void synchronize_warp() { emulator::shuffle(0, 0); }
inline void synchronize_block() { emulator::synchronize_block(); }
inline void add_to_counter(int* counter, int amount) { *counter += amount; }

inline void load_matrices(uint32 (&matrices)[4], const void* row) { emulator::load_matrices(matrices, row, false); }
inline void load_matrices_transposed(uint32 (&matrices)[4], const void* row) {
  emulator::load_matrices(matrices, row, true);
}
inline void multiply_bfloat16(float (&sum)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  emulator::multiply(sum, a, b0, b1, emulator::float_from_bfloat16);
}
inline void multiply_float16(float (&sum)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  emulator::multiply(sum, a, b0, b1, emulator::float_from_float16);
}

inline uint16 bfloat16_from_float(float value) { return emulator::bfloat16_from_float(value); }
inline uint16 float16_from_float(float value) { return emulator::float16_from_float(value); }
inline float float_from_float16(uint16 bits) { return emulator::float_from_float16(bits); }
inline float float_from_bits(uint32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32 bits_of_float(float value) {
  uint32 bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
