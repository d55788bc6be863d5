// Sizes of a tile, and which thread holds which of its elements.
//
// A block of 128 threads works on a tile of 64 rows and 64 columns; warp w holds rows 16 w ... 16 w + 15. With
// group = lane / 4 and quad = lane % 4, a thread holds s[n][e], n < 8:
//
//   e = 0, 1   row group,     column 8 n + 2 quad + e
//   e = 2, 3   row group + 8, column 8 n + 2 quad + e - 2
//
// That is how mma.sync leaves its results. All arithmetics keep to it, so that the elementwise work between two
// products is written once.
#pragma once

#include "../shared_memory.cuh"

namespace cacr {

constexpr int kTile = 64;
constexpr int kThreads = 128;
constexpr int kChunkBytes = 128;                // of a row, per pipeline stage
constexpr int kStrideBytes = kChunkBytes + 16;  // of a row in shared memory: ldmatrix then meets every bank once
constexpr int kFragments = kTile / 8;           // of 8 columns
constexpr unsigned kFullWarp = 0xffffffffu;     // mask of all lanes

template <class Element>
constexpr int kChunk = kChunkBytes / int(sizeof(Element));  // features of a chunk
template <class Element>
constexpr int kStride = kStrideBytes / int(sizeof(Element));
template <class Element>
using Stages = SharedArray<Element, 2 * kTile * kStride<Element>>;  // [2][64][kStride], double buffer

// The first row and column of the thread: it holds rows row and row + 8, columns 8 n + column and 8 n + column + 1.
struct ThreadPosition {
  int row, column;
  static CACR_DEVICE ThreadPosition of_thread() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return {warp * 16 + lane / 4, lane % 4 * 2};
  }
};

// The bit of element s[n][e] in a mask of a thread's 32 elements.
CACR_DEVICE int bit_of(int n, int e) { return 4 * n + e; }

// Where split i of n begins, when `things` are dealt out as evenly as possible.
CACR_DEVICE int split_begin(int things, int i, int n) { return things / n * i + min(things % n, i); }

}  // namespace cacr
