// Runs a kernel block by block. A block's threads are fibers, which give way only where they wait for each other: at
// block barriers, at warp-wide instructions and at mbarriers.
#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr int kStackBytes = 128 << 10;
constexpr int kGuardBytes = 4096;
constexpr unsigned char kGuard = 0xa5;
constexpr int kMostArguments = 32;

struct Copy {
  void* to;
  const void* from;
  uint32 bytes;
  uint64* barrier;  // of a bulk copy
  int64 group;      // of a copy of 16 bytes
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf resume;
  bool started, finished;
  const int64* changes;  // waits until this is no longer `seen`; null: ready
  int64 seen;
  int64 closed_groups;
  std::vector<Copy> copies;
};

struct Meeting {
  int arrived;
  int64 times;
  Work work;
  void* of_lane[32];
};

// What the eight bytes of an mbarrier hold here.
struct Barrier {
  int32_t bytes;
  unsigned char pending, arrivals, parity, ready;
};
static_assert(sizeof(Barrier) == 8);

std::vector<Fiber> fibers;
std::vector<Meeting> warps;
Meeting block;
std::vector<unsigned char> memory;
size_t shared_bytes;
std::vector<Copy> bulk_copies;
int64 barrier_events;  // copies arrived and phases ended: what a wait at an mbarrier may be for
jmp_buf scheduler;
Fiber* current;
char failure[512];
std::minstd_rand draw;
void* entry;
const int64* arguments;

[[noreturn]] void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(failure, sizeof failure, format, values);
  va_end(values);
  _longjmp(scheduler, 1);
}

unsigned char* shared_start() {
  auto address = reinterpret_cast<uintptr_t>(memory.data()) + kGuardBytes;
  return reinterpret_cast<unsigned char*>((address + 127) / 128 * 128);
}

void check_shared(const char* what, const void* address, size_t bytes, size_t alignment) {
  const auto* at = static_cast<const unsigned char*>(address);
  if (at < shared_start() || at + bytes > shared_start() + shared_bytes) fail("%s outside shared memory", what);
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) fail("%s not aligned to %zu bytes", what, alignment);
}

void wait_for_change(const int64& changes, int64 seen) {
  current->changes = &changes;
  current->seen = seen;
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

void meet(Meeting& meeting, int expected) {
  const int64 times = meeting.times;
  if (++meeting.arrived < expected) return wait_for_change(meeting.times, times);
  meeting.arrived = 0;
  ++meeting.times;
}

void end_phase_if_complete(Barrier* barrier) {
  if (barrier->pending == 0 && barrier->bytes == 0) {
    barrier->parity ^= 1;
    barrier->pending = barrier->arrivals;
    ++barrier_events;
  }
}

Barrier* checked(uint64* barrier) {
  check_shared("an mbarrier", barrier, 8, 8);
  auto* state = reinterpret_cast<Barrier*>(barrier);
  if (state->ready != 0x5a) fail("an mbarrier was used before it was initialised");
  return state;
}

void perform_bulk_copy(size_t i) {
  const Copy copy = bulk_copies[i];
  bulk_copies.erase(bulk_copies.begin() + static_cast<std::ptrdiff_t>(i));
  std::memcpy(copy.to, copy.from, copy.bytes);
  auto* barrier = reinterpret_cast<Barrier*>(copy.barrier);
  barrier->bytes -= static_cast<int32_t>(copy.bytes);
  end_phase_if_complete(barrier);
  ++barrier_events;
}

void call_kernel() {
  // Every argument is 64 bits wide and those beyond the kernel's own are ignored by it.
  const int64* a = arguments;
  using Entry = void (*)(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64,
                         int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64);
  reinterpret_cast<Entry>(entry)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12],
                                 a[13], a[14], a[15], a[16], a[17], a[18], a[19], a[20], a[21], a[22], a[23]);
  current->finished = true;
  _longjmp(scheduler, 1);
}

void resume(size_t thread) {
  current = &fibers[thread];
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  if (_setjmp(scheduler) != 0) return;
  current->changes = nullptr;
  if (current->started) _longjmp(current->resume, 1);
  current->started = true;
  setcontext(&current->start);
}

// Resumes each thread of the warp that can go on; false if none could.
bool run_warp(size_t warp, size_t& finished) {
  bool progress = false;
  const size_t first = draw() % 32;
  for (size_t i = 0; i < 32 && failure[0] == 0; ++i) {
    const size_t thread = 32 * warp + (first + i) % 32;
    const Fiber& fiber = fibers[thread];
    if (fiber.finished || (fiber.changes != nullptr && *fiber.changes == fiber.seen)) continue;
    resume(thread);
    progress = true;
    finished += fiber.finished;
  }
  return progress && failure[0] == 0;
}

void run_block(size_t threads) {
  memory.assign(shared_bytes + 2 * kGuardBytes + 128, kGuard);
  std::memset(shared_start(), 0xff, shared_bytes);  // NaN, to whoever reads before writing
  warps.assign(threads / 32, Meeting{});
  block = Meeting{};
  bulk_copies.clear();
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.started = fiber.finished = false;
    fiber.changes = nullptr;
    fiber.closed_groups = 0;
    fiber.copies.clear();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, call_kernel, 0);
  }
  size_t finished = 0;
  while (finished < threads && failure[0] == 0) {
    // Warps come in any order, and each goes either one instruction or as far as it can: far ahead of the others.
    bool progress = false;
    const size_t first = draw() % warps.size();
    for (size_t i = 0; i < warps.size() && failure[0] == 0; ++i) {
      const bool far = draw() % 2 == 0;
      while (run_warp((first + i) % warps.size(), finished)) {
        progress = true;
        if (!far) break;
      }
    }
    if (!progress && !bulk_copies.empty()) {
      perform_bulk_copy(draw() % bulk_copies.size());
    } else if (!progress) {
      snprintf(failure, sizeof failure, "deadlock: %zu of %zu threads have finished", finished, threads);
    }
  }
  if (failure[0] != 0) return;
  if (!bulk_copies.empty()) snprintf(failure, sizeof failure, "the block ended before its bulk copies");
  for (const unsigned char* at = memory.data(); at < memory.data() + memory.size(); ++at) {
    const bool inside = at >= shared_start() && at < shared_start() + shared_bytes;
    if (!inside && *at != kGuard) snprintf(failure, sizeof failure, "wrote outside shared memory");
  }
}

}  // namespace

unsigned char* shared_memory() { return shared_start(); }

void synchronize_block() { meet(block, static_cast<int>(blockDim.x)); }

void with_warp(Work work, void* mine) {
  Meeting& warp = warps[threadIdx.x / 32];
  if (warp.arrived > 0 && warp.work != work) fail("lanes of a warp are at different instructions");
  warp.work = work;
  warp.of_lane[threadIdx.x % 32] = mine;
  if (warp.arrived == 31) work(warp.of_lane);
  meet(warp, 32);
}

void barrier_init(uint64* barrier, uint32 arrivals) {
  check_shared("an mbarrier", barrier, 8, 8);
  const auto count = static_cast<unsigned char>(arrivals);
  *reinterpret_cast<Barrier*>(barrier) = {0, count, count, 0, 0x5a};
}

void barrier_arrive(uint64* barrier, uint32 bytes) {
  Barrier* state = checked(barrier);
  if (state->pending == 0) fail("more arrivals at an mbarrier than it was made for");
  state->bytes += static_cast<int32_t>(bytes);
  --state->pending;
  end_phase_if_complete(state);
}

bool barrier_try_wait(uint64* barrier, uint32 parity) {
  Barrier* state = checked(barrier);
  if (!bulk_copies.empty() && draw() % 4 == 0) perform_bulk_copy(draw() % bulk_copies.size());
  if (state->parity != (parity & 1)) return true;
  wait_for_change(barrier_events, barrier_events);
  return false;
}

void bulk_copy(void* to, const void* from, uint32 bytes, uint64* barrier) {
  checked(barrier);
  check_shared("a bulk copy", to, bytes, 16);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0) fail("a bulk copy is not of whole 16 bytes");
  bulk_copies.push_back({to, from, bytes, barrier, 0});
  if (draw() % 4 == 0) perform_bulk_copy(bulk_copies.size() - 1);
}

void copy_16_bytes(void* to, const void* from) {
  check_shared("an asynchronous copy", to, 16, 16);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("an asynchronous copy from an address not aligned");
  if (draw() % 2 == 0) {
    std::memcpy(to, from, 16);
  } else {
    current->copies.push_back({to, from, 16, nullptr, current->closed_groups});
  }
}

void close_copy_group() { ++current->closed_groups; }

void wait_for_copy_groups(int pending) {
  std::vector<Copy> later;
  for (const Copy& copy : current->copies) {
    if (copy.group < current->closed_groups - pending) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      later.push_back(copy);
    }
  }
  current->copies = later;
}

void load_matrices(uint32 (&matrices)[4], const void* row, bool transposed) {
  struct Load {
    uint32* matrices;
    const unsigned char* row;
    bool transposed;
  } mine = {matrices, static_cast<const unsigned char*>(row), transposed};
  check_shared("a row of a matrix", row, 16, 16);
  with_warp(
      [](void* const(&of_lane)[32]) {
        for (int lane = 0; lane < 32; ++lane) {
          const Load* to = static_cast<Load*>(of_lane[lane]);
          for (int matrix = 0; matrix < 4; ++matrix) {
            uint16 pair[2];
            for (int i = 0; i < 2; ++i) {
              const int row = to->transposed ? lane % 4 * 2 + i : lane / 4;
              const int column = to->transposed ? lane / 4 : lane % 4 * 2 + i;
              std::memcpy(&pair[i], static_cast<Load*>(of_lane[8 * matrix + row])->row + 2 * column, 2);
            }
            std::memcpy(&to->matrices[matrix], pair, 4);
          }
        }
      },
      &mine);
}

void multiply(float (&sum)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, float (*to_float)(uint16)) {
  struct Operands {
    float* sum;
    const uint32* a;
    uint32 b[2];
    float (*to_float)(uint16);
  } mine = {sum, a, {b0, b1}, to_float};
  with_warp(
      [](void* const(&of_lane)[32]) {
        double a[16][16], b[16][8];
        const auto to_float = static_cast<Operands*>(of_lane[0])->to_float;
        for (int lane = 0; lane < 32; ++lane) {
          const Operands* from = static_cast<Operands*>(of_lane[lane]);
          const int group = lane / 4, pair = lane % 4 * 2;
          for (int i = 0; i < 2; ++i) {
            for (int part = 0; part < 4; ++part) {
              a[group + part % 2 * 8][pair + part / 2 * 8 + i] =
                  to_float(static_cast<uint16>(from->a[part] >> (16 * i)));
            }
            for (int half = 0; half < 2; ++half) {
              b[pair + half * 8 + i][group] = to_float(static_cast<uint16>(from->b[half] >> (16 * i)));
            }
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          float* sum = static_cast<Operands*>(of_lane[lane])->sum;
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            double exact = sum[i];
            for (int k = 0; k < 16; ++k) exact += a[row][k] * b[k][column];
            // Tensor cores cut off what does not fit.
            const float rounded = static_cast<float>(exact);
            sum[i] = std::fabs(rounded) > std::fabs(exact) ? std::nextafterf(rounded, 0) : rounded;
          }
        }
      },
      &mine);
}

float float_from_bfloat16(uint16 bits) { return float_from_bits(static_cast<uint32>(bits) << 16); }

uint16 bfloat16_from_float(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32 bits = bits_of_float(value);
  return static_cast<uint16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float float_from_float16(uint16 bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa != 0 ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

uint16 float16_from_float(float value) {
  const uint16 sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (magnitude >= 65520) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | static_cast<uint16>(std::nearbyint(std::ldexp(magnitude, 24)));
  int exponent;
  const float fraction = std::frexp(magnitude, &exponent);  // in [0.5, 1)
  const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(fraction, 11)));  // in [1024, 2048]
  return sign | static_cast<uint16>((exponent + 13) * 1024 + mantissa);  // 2048 carries into the exponent
}

}  // namespace emulator

// Runs a kernel; returns what went wrong, or an empty string. `count` arguments of 64 bits.
extern "C" const char* emulate(void* kernel, const int64* values, int count, const unsigned* grid, unsigned threads,
                               uint64 shared) {
  using namespace emulator;
  static int64 padded[kMostArguments];
  failure[0] = 0;
  for (int i = 0; i < kMostArguments; ++i) padded[i] = i < count ? values[i] : 0;
  entry = kernel;
  arguments = padded;
  shared_bytes = shared;
  draw.seed(1);
  blockDim = {threads, 1, 1};
  gridDim = {grid[0], grid[1], grid[2]};
  while (fibers.size() < threads) {
    fibers.emplace_back();
    fibers.back().stack.reset(new char[kStackBytes]);
  }
  for (unsigned z = 0; z < grid[2]; ++z) {
    for (unsigned y = 0; y < grid[1]; ++y) {
      for (unsigned x = 0; x < grid[0] && failure[0] == 0; ++x) {
        blockIdx = {x, y, z};
        run_block(threads);
      }
    }
  }
  return failure;
}
