// Rows of a view on their way from global to shared memory.
#pragma once

#include "layout.cuh"
#include "numbers.cuh"

namespace cacr {

// All rows of one view.
template <class Element>
struct Rows {
  const Element* data;  // [rows][D]
  int64_t rows, D;
};

// Which rows and columns a tile covers: [row0, row0 + rows) and [column0, column0 + columns), at most 64 of each.
struct TileRange {
  int64_t row0, column0;
  int rows, columns;
};

// Starts to copy features [d0, d0 + kChunk) of rows [row0, row0 + 64) into one stage; outside the view there are zeros.
// aligned_16: rows begin at multiples of 16 bytes; others go through registers.
template <class Element>
CACR_DEVICE void load_chunk(Stages<Element>& stages, int stage, const Rows<Element>& from, int64_t row0, int64_t d0,
                            bool aligned_16) {
  constexpr int kVector = 16 / int(sizeof(Element)), kVectors = kChunk<Element> / kVector;
  const int base = stage * kTile * kStride<Element>;
  if (aligned_16) {
#pragma unroll
    for (int x = threadIdx.x; x < kTile * kVectors; x += kThreads) {
      const int r = x / kVectors, d = x % kVectors * kVector;
      const bool inside = row0 + r < from.rows && d0 + d < from.D;
      const Element* source = from.data + (inside ? (row0 + r) * from.D + d0 + d : 0);
      ptx::cp_async_16(ptx::shared_address(&stages[base + r * kStride<Element> + d]), source, inside ? 16 : 0);
    }
    return;
  }
#pragma unroll 1
  for (int x = threadIdx.x; x < kTile * kChunk<Element>; x += kThreads) {
    const int r = x / kChunk<Element>, d = x % kChunk<Element>;
    const bool inside = row0 + r < from.rows && d0 + d < from.D;
    stages[base + r * kStride<Element> + d] = inside ? from.data[(row0 + r) * from.D + d0 + d] : Element{};
  }
}

// |a - b|^2 from the differences of the features.
template <class Acc, class Element>
CACR_DEVICE Acc squared_distance(const Element* a, const Element* b, int64_t D) {
  Acc sum = 0;
#pragma unroll 1
  for (int64_t d = 0; d < D; d++) {
    const Acc difference = widen(a[d]) - widen(b[d]);
    sum += difference * difference;
  }
  return sum;
}

// r_x x - r_y y by Kahan, right to the precision of a near difference: what rounds the product cancels. Exchanged it is
// rounded otherwise: whoever needs the same number twice keeps the order.
template <class Acc>
CACR_DEVICE Acc unit_difference(Acc x, Acc r_x, Acc y, Acc r_y) {
  const Acc product = r_y * y;
  return fused(r_x, x, -product) + fused(-r_y, y, product);
}

// |r_x x - r_y y|^2
template <class Acc, class Element>
CACR_DEVICE Acc unit_squared_distance(const Element* x, Acc r_x, const Element* y, Acc r_y, int64_t D) {
  Acc sum = 0;
#pragma unroll 1
  for (int64_t d = 0; d < D; d++) {
    const Acc difference = unit_difference<Acc>(widen(x[d]), r_x, widen(y[d]), r_y);
    sum += difference * difference;
  }
  return sum;
}

}  // namespace cacr
