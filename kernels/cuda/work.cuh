// How tokens are dealt out: a fixed share for every block, so that a run repeats bit for bit.
#ifndef SPT_FAST_WORK_CUH
#define SPT_FAST_WORK_CUH

#include "ptx.cuh"

// The tiles of all layers in one line, cut into `shares` runs whose lengths differ by one at most. A run may cross
// layers; what it finds in a layer goes into a slot of its own. From one (share, layer) to the next along the line the
// share, the layer or both grow, so `share + layer` never repeats and shares + layers - 1 slots are enough.
struct Work {
  int64 tiles_per_layer;
  int64 tiles;
  int64 shares;

  __device__ Work(int64 layers, int64 tokens, int64 tokens_per_tile, int64 shares)
      : tiles_per_layer((tokens + tokens_per_tile - 1) / tokens_per_tile),
        tiles(layers * tiles_per_layer),
        shares(shares) {}

  __device__ int64 first_tile(int64 share) const { return share * tiles / shares; }
  __device__ int64 share_of(int64 tile) const { return ((tile + 1) * shares - 1) / tiles; }
  __device__ int64 first_slot(int64 layer) const { return share_of(layer * tiles_per_layer) + layer; }
  __device__ int64 last_slot(int64 layer) const { return share_of((layer + 1) * tiles_per_layer - 1) + layer; }
};

// A tile's layer and its place in it, moved on by one without a 64-bit division.
struct TilePosition {
  int64 layer;
  int64 tile_of_layer;

  __device__ TilePosition(const Work& work, int64 tile)
      : layer(tile / work.tiles_per_layer), tile_of_layer(tile % work.tiles_per_layer) {}

  __device__ void advance(const Work& work) {
    if (++tile_of_layer == work.tiles_per_layer) {
      tile_of_layer = 0;
      ++layer;
    }
  }
};

__device__ inline int least(int64 a, int64 b) { return static_cast<int>(a < b ? a : b); }

#endif  // SPT_FAST_WORK_CUH
