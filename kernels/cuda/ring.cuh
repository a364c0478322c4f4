// A ring of token tiles in shared memory, filled ahead of their use.
#ifndef SPT_FAST_RING_CUH
#define SPT_FAST_RING_CUH

#include "elements.cuh"
#include "work.cuh"

enum CopyMode {
  kPlainCopy = 0,  // any strides and alignment: loads and stores by the threads
  kAsyncCopy = 1,  // rows of whole aligned 16 byte pieces: cp.async
  kBulkCopy = 2,   // the same rows, each copied as one by the copy engine of sm_90
};

constexpr int kRingTokens = 32;  // of one tile
constexpr int kRingThreads = 256;
constexpr int kRingWarps = kRingThreads / 32;

// Tiles numbered 0, 1, .. of one block's share; tile i lies in slot i % stages.
//
// Rows are padded_width + 8 elements apart: an odd number of 16 byte units (padded_width is a multiple of 16), so the
// eight rows of an 8 x 8 matrix lie in different banks. Padding columns are zeroed once and never written again; rows
// beyond a tile's last token keep what an earlier tile left there, or zeros: finite, so that a zero in the one-hot
// operand silences them.
template <class Element>
struct Ring {
  using Storage = typename Element::Storage;

  unsigned char* slots;  // stages x kRingTokens rows, 128 byte aligned
  uint64* barriers;      // one per slot; a phase is over when the slot's tile has arrived
  Tokens<Element> x;
  int64 tokens;  // of a layer
  int width;
  int row_bytes;
  int stages;
  int mode;

  __device__ Storage* row(int tile, int token) const {
    return reinterpret_cast<Storage*>(slots + (tile % stages * kRingTokens + token) * row_bytes);
  }

  // By all threads of the block, before anything else.
  __device__ void prepare() {
    Vector* vectors = reinterpret_cast<Vector*>(slots);
    for (int i = threadIdx.x; i < stages * kRingTokens * row_bytes / 16; i += kRingThreads) vectors[i] = Vector{};
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < stages; ++stage) barrier_init(&barriers[stage], kRingWarps);
    }
    // Every thread's zeros and the barriers must be there before a bulk copy writes or reports.
    fence_before_bulk_copies();
#endif
    synchronize_block();
  }

  // Starts the copy of a tile, by all threads; the slot's last tile must have been left by all of them, with a block
  // barrier since. Each warp copies four rows: lanes issue bulk copies one after the other.
  __device__ void fill(int tile, int64 layer, int64 first_token) {
    const int rows = least(tokens - first_token, kRingTokens);
#if __CUDA_ARCH__ >= 900
    if (mode == kBulkCopy) {
      constexpr int rows_per_warp = kRingTokens / kRingWarps;
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
      const int first_row = warp * rows_per_warp;
      const int own = rows < first_row ? 0 : least(rows - first_row, rows_per_warp);
      const uint32 bytes = width * sizeof(Storage);
      // The warp's bytes are announced before its copies can report any. A phase has kRingWarps arrivals, so it cannot
      // end while another warp's bytes are still unannounced.
      if (lane == 0) barrier_arrive_expecting(&barriers[tile % stages], own * bytes);
      synchronize_warp();
      if (lane < own) {
        // The slot was read by ordinary loads; the copy engine must not overtake them.
        fence_before_bulk_copies();
        bulk_copy(row(tile, first_row + lane), x.row(layer, first_token + first_row + lane), bytes,
                  &barriers[tile % stages]);
      }
      return;
    }
#endif
    if (mode == kAsyncCopy) {
      constexpr int elements = 16 / sizeof(Storage);
      const int pieces = width / elements;
      for (int i = threadIdx.x; i < rows * pieces; i += kRingThreads) {
        const int token = i / pieces, feature = i % pieces * elements;
        copy_16_bytes(row(tile, token) + feature, x.row(layer, first_token + token) + feature);
      }
    } else {
      for (int i = threadIdx.x; i < rows * width; i += kRingThreads) {
        const int token = i / width, feature = i % width;
        row(tile, token)[feature] = x.at(x.row(layer, first_token + token), feature);
      }
    }
  }

  // Ends one call of fill, or the lack of one near the end of the share: the waits below count groups.
  __device__ void end_fill() { close_copy_group(); }

  // Until the tile is there for all threads. `stages` - 2 fills may be outstanding behind it.
  __device__ void wait(int tile) {
#if __CUDA_ARCH__ >= 900
    if (mode == kBulkCopy) {
      // The slot's n-th use is its barrier's n-th phase, n counted from 0.
      while (!barrier_try_wait(&barriers[tile % stages], tile / stages & 1)) {
      }
      return;
    }
#endif
    wait_for_all_but(stages - 2);
    synchronize_block();
  }

 private:
  // The number of groups is an immediate operand of the instruction.
  __device__ static void wait_for_all_but(int groups) {
    if (groups >= 4) {
      wait_for_copy_groups<4>();
    } else if (groups == 3) {
      wait_for_copy_groups<3>();
    } else if (groups == 2) {
      wait_for_copy_groups<2>();
    } else if (groups == 1) {
      wait_for_copy_groups<1>();
    } else {
      wait_for_copy_groups<0>();
    }
  }
};

#endif  // SPT_FAST_RING_CUH
