// Tiles of rows on their way to shared memory, and what belongs to their rows and columns.
#pragma once

#include "arithmetic.cuh"
#include "parameters.h"

namespace cacr {

// Where share i of n things begins.
CACR_DEVICE int share_of(int things, int i, int n) { return things / n * i + min(things % n, i); }

// Rows [0, rows) of one view.
template <class Element>
struct Rows {
  const Element* data;
  int64_t rows, D;
};

// What a unit of the gradients knows all along: the registers are needed for sums.
template <class Element, class Acc>
struct UnitFacts {
  SharedArray<Rows<Element>, 1> own;      // rows of the target
  SharedArray<Acc, kTile> norm;           // |a|^2 of those of the unit
  SharedArray<int32_t, kTile> id;         // their ids
  SharedArray<int32_t, 2> tile0, tile1;   // of the share, where the others are keys, and where they are queries
  SharedArray<Acc, kMaxSoftmaxes> slope;  // 0 beyond the softmaxes there are
  SharedArray<Acc, 1> scale;              // of the coefficients
};

template <class Element, class Acc>
struct Buffers {
  Stages<Element> a;                                                   // rows of the block
  Stages<Element> b;                                                   // rows that it meets
  SharedArray<Acc, kTile> norm;                                        // |b|^2 of a tile
  SharedArray<int32_t, kTile> id;                                      // ids of its rows
  SharedArray<Coefficients<Acc>, kMaxSoftmaxes * kTile> coefficients;  // [softmax][64] of queries, rows or columns
  SharedArray<Acc, kTile> ratio;                                       // of the same
  SharedArray<double, kThreads / 32> reduction;
  UnitFacts<Element, Acc> unit;
};

// Thread's place in a tile: it owns rows row and row + 8, and columns 8 n + column and the next.
struct Place {
  int row, column;
  static CACR_DEVICE Place of_thread() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return {warp * 16 + lane / 4, lane % 4 * 2};
  }
};

// Starts copying features [d0, d0 + kChunk) of rows [row0, row0 + 64) into one stage; outside there are zeros. Rows
// that do not begin at multiples of 16 bytes take the way through registers.
template <class Element>
CACR_DEVICE void load_chunk(Stages<Element>& stages, int stage, const Rows<Element>& from, int64_t row0, int64_t d0,
                            bool aligned) {
  constexpr int kVector = 16 / int(sizeof(Element)), kVectors = kChunk<Element> / kVector;
  const int base = stage * kTile * kStride<Element>;
  if (aligned) {
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

// Which of a thread's 32 elements of a tile belong to what: bit 4 n + e.
struct Elements {
  uint32_t valid, same, self;  // the column exists; ids are equal; it is one and the same row

  CACR_DEVICE uint32_t of_kind(int kind) const {
    if (kind == kAll) return valid;
    if (kind == kOther) return valid & ~same;
    return valid & same & (kind == kSameNotSelf ? ~self : ~0u);
  }
};

CACR_DEVICE int bit_of(int n, int e) { return 4 * n + e; }

// ids: of the thread's two rows. shift: rows and columns with row + shift == column are the same.
CACR_DEVICE Elements find_elements(SharedArray<int32_t, kTile>& column_id, int columns, bool masked,
                                   const int32_t (&ids)[2], int shift) {
  const Place at = Place::of_thread();
  Elements found{0, 0, 0};
#pragma unroll
  for (int n = 0; n < kFragments; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int column = 8 * n + at.column + e;
      if (column < columns) found.valid |= 5u << bit_of(n, e);
      if (!masked) continue;
      const int32_t id = column_id[column];
      if (id == ids[0]) found.same |= 1u << bit_of(n, e);
      if (id == ids[1]) found.same |= 4u << bit_of(n, e);
      if (column == at.row + shift) found.self |= 1u << bit_of(n, e);
      if (column == at.row + 8 + shift) found.self |= 4u << bit_of(n, e);
    }
  }
  return found;
}

template <class Parameters>
CACR_DEVICE bool is_masked(const Parameters& p) {
  return p.q_id != nullptr || p.period > 0;
}

// id of row i among the queries or keys
template <class Parameters>
CACR_DEVICE int32_t id_of(const Parameters& p, const int32_t* ids, int64_t i) {
  return ids ? ids[i] : p.period > 0 ? int32_t(uint32_t(i) % uint32_t(p.period)) : 0;
}

// Rows and columns of one tile.
struct Where {
  int64_t row0, column0;
  int rows, columns;  // that exist
  CACR_DEVICE int shift() const {
    const int64_t shift = row0 - column0;
    return shift > -kTile && shift < kTile ? int(shift) : 2 * kTile;
  }
};

// What the thread knows of its two rows in a sweep.
template <class Acc>
struct RowFacts {
  int32_t id[2];
  Acc norm[2];
};

template <class P, class Acc>
CACR_DEVICE RowFacts<Acc> row_facts(const P& p, bool rows_are_queries, const Acc* norm, int64_t row0, int64_t rows) {
  const Place at = Place::of_thread();
  RowFacts<Acc> facts;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int64_t i = row0 + at.row + 8 * h;
    facts.id[h] = i < rows ? id_of(p, rows_are_queries ? p.q_id : p.k_id, i) : -1;
    facts.norm[h] = i < rows && !p.inner ? norm[i] : Acc(0);
  }
  return facts;
}

// Norms and ids of columns [0, w.columns) of a tile, by threads 0 ... 63.
template <class P, class B, class Acc>
CACR_DEVICE void stage_columns(const P& p, B& shared, bool columns_are_queries, const Acc* norm, const Where& w) {
  const int column = threadIdx.x;
  if (column >= kTile) return;
  const int64_t j = w.column0 + column;
  const bool exists = column < w.columns;
  shared.norm[column] = exists && !p.inner ? norm[j] : Acc(0);
  shared.id[column] = exists ? id_of(p, columns_are_queries ? p.q_id : p.k_id, j) : -1;
}

// The thread's element of a bit, by a choice among all: an index that is not known to the compiler would put the tile
// into local memory.
template <class Acc>
CACR_DEVICE Acc element_at(const Acc (&s)[kFragments][4], int bit) {
  Acc found = 0;
#pragma unroll
  for (int n = 0; n < kFragments; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) found = bit == bit_of(n, e) ? s[n][e] : found;
  return found;
}
template <class Acc>
CACR_DEVICE void set_element(Acc (&s)[kFragments][4], int bit, Acc value) {
#pragma unroll
  for (int n = 0; n < kFragments; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = bit == bit_of(n, e) ? value : s[n][e];
}

// Positives: u becomes -c / 2, with c from differences where the product form cancels.
template <class P, class B, class Acc, class Element>
CACR_DEVICE void replace_positives(const P& p, B& shared, bool rows_are_queries, Acc (&u)[kFragments][4],
                                   const RowFacts<Acc>& facts, const Rows<Element>& rows, const Rows<Element>& columns,
                                   const Where& w, uint32_t positives) {
  const Place at = Place::of_thread();
  for (; positives; positives &= positives - 1) {
    const int bit = __ffs(int(positives)) - 1, n = bit / 4, e = bit % 4;
    const int column = 8 * n + at.column + e % 2, row = at.row + e / 2 * 8;
    if (row >= w.rows) continue;
    const Acc row_norm = e / 2 ? facts.norm[1] : facts.norm[0], column_norm = shared.norm[column];
    Acc cost = (rows_are_queries ? row_norm : column_norm) - 2 * element_at(u, bit);
    if (!p.inner && !(cost > (row_norm + column_norm) / 2))
      cost = squared_distance<Acc>(rows.data + (w.row0 + row) * rows.D, columns.data + (w.column0 + column) * columns.D,
                                   rows.D);
    set_element(u, bit, -cost / 2);
  }
}

// Turns similarities q.k into u = q.k - |k|^2 / 2.
template <class P, class B, class Acc, class Element>
CACR_DEVICE void finish_similarities(const P& p, B& shared, bool rows_are_queries, Acc (&s)[kFragments][4],
                                     const RowFacts<Acc>& facts, const Rows<Element>& rows,
                                     const Rows<Element>& columns, const Where& w, const Elements& elements) {
  const Place at = Place::of_thread();
#pragma unroll
  for (int n = 0; n < kFragments; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      s[n][e] -= (rows_are_queries ? shared.norm[8 * n + at.column + e % 2] : facts.norm[e / 2]) / 2;
  if (p.positives)
    replace_positives(p, shared, rows_are_queries, s, facts, rows, columns, w, elements.same & elements.valid);
}

}  // namespace cacr
