// The machine instructions that CUDA C++ has no word for, each behind a small function.
// No library header is included, so that NVRTC compiles this without include paths of its own.
#ifndef SPT_FAST_PTX_CUH
#define SPT_FAST_PTX_CUH

using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using int64 = long long;

// The block's dynamic shared memory. 128 bytes: what bulk copies like best, and all its other users need less.
__device__ inline unsigned char* block_shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  return dynamic_shared;
}

__device__ inline uint32 shared_address(const void* pointer) {
  return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

// ---- mbarrier: counts arrivals and, of bulk copies, bytes -------------------------------------------------------

#if __CUDA_ARCH__ >= 900

__device__ inline void barrier_init(uint64* barrier, uint32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Arrives, and makes the phase wait for `bytes` more bytes of bulk copies.
__device__ inline void barrier_arrive_expecting(uint64* barrier, uint32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// True once the phase of this parity (0 for the first, then alternating) is over. May sleep a while before saying no.
__device__ inline bool barrier_try_wait(uint64* barrier, uint32 parity) {
  uint32 over;
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
      "selp.b32 %0, 1, 0, over;\n"
      "}"
      : "=r"(over)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return over != 0;
}

// Reads one contiguous run of global memory into this block's shared memory and reports its bytes to the barrier.
// Both addresses and the size are multiples of 16.
__device__ inline void bulk_copy(void* to_shared, const void* from_global, uint32 bytes, uint64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to_shared)),
      "l"(__cvta_generic_to_global(from_global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Orders this thread's ordinary accesses to shared memory (and those it has synchronised with) before the bulk copies
// it issues next: these go through another path to memory, which does not see ordinary order by itself.
__device__ inline void fence_before_bulk_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#endif

// ---- asynchronous copies of 16 bytes by each thread --------------------------------------------------------------

__device__ inline void copy_16_bytes(void* to_shared, const void* from_global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to_shared)),
               "l"(__cvta_generic_to_global(from_global))
               : "memory");
}

// Closes the group of the thread's copies since the last call; groups finish in order.
__device__ inline void close_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of the thread's closed groups are unfinished; other threads need a barrier besides.
template <int pending>
__device__ inline void wait_for_copy_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- the warp ----------------------------------------------------------------------------------------------------

__device__ inline float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
__device__ inline int shuffle_xor(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
__device__ inline double shuffle_xor(double value, int mask) {
  const int low = __shfl_xor_sync(0xffffffffu, __double2loint(value), mask);
  const int high = __shfl_xor_sync(0xffffffffu, __double2hiint(value), mask);
  return __hiloint2double(high, low);
}
__device__ inline int shuffle_from(int value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
__device__ inline bool any_in_warp(bool condition) { return __any_sync(0xffffffffu, condition) != 0; }
__device__ inline void synchronize_warp() { __syncwarp(); }
__device__ inline void synchronize_block() { __syncthreads(); }

// Adds to a counter in shared memory; whole numbers, so the order of the adds does not show.
__device__ inline void add_to_counter(int* counter, int amount) { atomicAdd(counter, amount); }

// ---- matrix fragments of 8 x 8 16-bit elements -------------------------------------------------------------------

// Lane 8 i + r passes the address of row r (16 bytes, aligned) of matrix i. Lane l gets of each matrix the elements
// 2 (l % 4) and the next of row l / 4; of its transpose with load_matrices_transposed.
__device__ inline void load_matrices(uint32 (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32 (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum [16, 8] += a [16, 16] b [16, 8] on the tensor cores. With g = lane / 4 and q = 2 (lane % 4), a lane holds
//   a: rows g, g + 8 (fast), columns q, q + 8 (slow), two neighbours each;  b: rows q, q + 8, two each, of column g;
//   sum: columns q and q + 1 of row g, then of row g + 8.
__device__ inline void multiply_bfloat16(float (&sum)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply_float16(float (&sum)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- numbers -----------------------------------------------------------------------------------------------------

__device__ inline uint16 bfloat16_from_float(float value) {
  uint16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ inline uint16 float16_from_float(float value) {
  uint16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ inline float float_from_float16(uint16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ inline float float_from_bits(uint32 bits) { return __uint_as_float(bits); }
__device__ inline uint32 bits_of_float(float value) { return __float_as_uint(value); }

#endif  // SPT_FAST_PTX_CUH
