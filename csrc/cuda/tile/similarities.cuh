// From products q.k of a tile to u_ij = q_i.k_j - |k_j|^2 / 2, in which all softmaxes are written, and which keys of
// the tile belong to which set. With normalize q and k stand for r q and r k: products of raw rows are multiplied by
// the factors r of both, and norms are those of r q and r k.
//
// A cost is c_ij = |q_i|^2 - 2 u_ij (cacr_kernels/reference.py). Where a row and a column have equal ids, the product
// cancels if they are close; then c comes from differences, and u = -c / 2.
#pragma once

#include "../parameters.h"
#include "rows.cuh"

namespace cacr {

// What the sets of keys ask of a row: its id, and as what key it counts. A query counts as the key that it is itself.
struct RowTag {
  int32_t id;   // -1 where there is no row
  int32_t key;  // -1: none
};

// Shared memory of a unit of the gradients: what stays the same for all its tiles. Registers are needed for sums.
template <class Element, class Acc>
struct UnitBuffers {
  SharedArray<Rows<Element>, 1> rows;            // the view whose gradient is computed
  SharedArray<Acc, kTile> norm;                  // [64] |x|^2 of the rows of the unit
  SharedArray<Acc, kTile> factor;                // [64] r of the same, with normalize
  SharedArray<RowTag, kTile> tag;                // [64] of the same
  SharedArray<int32_t, 2> first_tile, end_tile;  // [2] tiles of the split, where the others are keys, and queries
  SharedArray<Acc, kMaxSoftmaxes> slope;         // [S] 0 beyond the softmaxes there are
  SharedArray<Acc, 1> scale;                     // of the coefficients
};

template <class Element, class Acc>
struct Buffers {
  Stages<Element> a;                                                   // rows of the tile
  Stages<Element> b;                                                   // its columns
  SharedArray<Acc, kTile> norm;                                        // [64] |x|^2 of the columns
  SharedArray<Acc, kTile> factor;                                      // [64] r of the columns, with normalize
  SharedArray<RowTag, kTile> tag;                                      // [64] of the columns
  SharedArray<Coefficients<Acc>, kMaxSoftmaxes * kTile> coefficients;  // [S][64] of the queries, rows or columns
  SharedArray<Acc, kTile> ratio;                                       // [64] of the same
  SharedArray<double, kThreads / 32> reduction;                        // a number per warp
  UnitBuffers<Element, Acc> unit;
};

template <class Arithmetic>
using BuffersOf = Buffers<typename Arithmetic::Element, typename Arithmetic::Acc>;

// ---- ids and norms --------------------------------------------------------------------------------------------------
template <class Params>
CACR_DEVICE bool is_masked(const Params& p) {
  return p.q_id != nullptr || p.period > 0;
}

// The id of row i of the queries or keys.
template <class Params>
CACR_DEVICE int32_t id_of(const Params& p, const int32_t* ids, int64_t i) {
  return ids ? ids[i] : p.period > 0 ? int32_t(uint32_t(i) % uint32_t(p.period)) : 0;
}

template <class Params>
CACR_DEVICE RowTag tag_of(const Params& p, bool is_query, int64_t i) {
  return {id_of(p, is_query ? p.q_id : p.k_id, i), is_query && p.q_self ? p.q_self[i] : int32_t(i)};
}

// What is known of all rows of a view.
template <class Acc>
struct Lengths {
  const Acc* norm;
  const Acc* factor;  // with normalize
};

template <class Params>
CACR_DEVICE Lengths<typename Params::Accumulator> lengths_of(const Params& p, bool are_queries, int view) {
  const int64_t at = view * (are_queries ? p.N : p.M);
  return {(are_queries ? p.q_norm : p.k_norm) + at,
          p.normalize ? (are_queries ? p.q_factor : p.k_factor) + at : nullptr};
}

// The thread's two rows of a tile, 8 rows apart.
template <class Acc>
struct ThreadRows {
  RowTag tag[2];
  Acc norm[2];
  Acc factor[2];  // with normalize
};

// Those of queries [row0, row0 + 64) of a view.
template <class Acc, class Params>
CACR_DEVICE ThreadRows<Acc> thread_queries(const Params& p, const Lengths<Acc>& lengths, int64_t row0) {
  const ThreadPosition at = ThreadPosition::of_thread();
  ThreadRows<Acc> rows;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int64_t i = row0 + at.row + 8 * h;
    rows.tag[h] = i < p.N ? tag_of(p, true, i) : RowTag{-1, -1};
    rows.norm[h] = i < p.N && !p.inner_product ? lengths.norm[i] : Acc(0);
    rows.factor[h] = i < p.N && p.normalize ? lengths.factor[i] : Acc(0);
  }
  return rows;
}

// Norms, factors and tags of the columns of a tile into shared memory, by threads 0 ... 63; lengths: of their view.
template <class Params, class Shared, class Acc>
CACR_DEVICE void stage_columns(const Params& p, Shared& shared, bool columns_are_queries, const Lengths<Acc>& lengths,
                               const TileRange& range) {
  const int column = threadIdx.x;
  if (column >= kTile) return;
  const int64_t j = range.column0 + column;
  const bool exists = column < range.columns;
  shared.norm[column] = exists && !p.inner_product ? lengths.norm[j] : Acc(0);
  if (p.normalize) shared.factor[column] = exists ? lengths.factor[j] : Acc(0);
  shared.tag[column] = exists ? tag_of(p, columns_are_queries, j) : RowTag{-1, -1};
}

// ---- sets of keys ---------------------------------------------------------------------------------------------------
// Masks of a thread's 32 elements of a tile, one bit each (bit_of).
struct Membership {
  uint32_t valid;  // the column exists
  uint32_t same;   // row and column have the same id
  uint32_t self;   // row and column are one row, or their ids differ and one of them is negative

  CACR_DEVICE uint32_t of_kind(int kind) const {
    return valid & MembershipTest<uint32_t>::of(kind).members(same, self);
  }
};

// column_tag: [64]; row: of the thread's two rows.
CACR_DEVICE Membership find_members(SharedArray<RowTag, kTile>& column_tag, const RowTag (&row)[2], bool masked,
                                    const TileRange& range) {
  const ThreadPosition at = ThreadPosition::of_thread();
  Membership found{0, 0, 0};
#pragma unroll
  for (int n = 0; n < kFragments; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int column = 8 * n + at.column + e;
      if (column < range.columns) found.valid |= 5u << bit_of(n, e);
      if (!masked) continue;
      const RowTag tag = column_tag[column];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const uint32_t bit = (h ? 4u : 1u) << bit_of(n, e);
        if (tag.id == row[h].id) found.same |= bit;
        if (tag.key == row[h].key || (tag.id != row[h].id && min(tag.id, row[h].id) < 0)) found.self |= bit;
      }
    }
  }
  return found;
}

// ---- similarities ---------------------------------------------------------------------------------------------------
// One tile, as a thread sees it.
template <class Element, class Acc>
struct Tile {
  bool rows_are_queries;        // or else the columns are
  Rows<Element> rows, columns;  // the two views
  TileRange range;
  ThreadRows<Acc> thread;
  Membership members;
};

// The thread's element of a bit, chosen among all: an index that the compiler does not know would put the tile into
// local memory.
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

// |q - k|^2 of a row and a column by differences. The query comes first, whichever it is, so that forward and backward
// find the same number.
template <class Params, class Element, class Acc>
CACR_DEVICE Acc difference_cost(const Params& p, const Tile<Element, Acc>& tile, int row, int column, Acc row_factor,
                                Acc column_factor) {
  const Element* const x = tile.rows.data + (tile.range.row0 + row) * tile.rows.D;
  const Element* const y = tile.columns.data + (tile.range.column0 + column) * tile.columns.D;
  if (!p.normalize) return squared_distance<Acc>(x, y, tile.rows.D);
  const bool in_order = tile.rows_are_queries;
  return unit_squared_distance<Acc>(in_order ? x : y, in_order ? row_factor : column_factor, in_order ? y : x,
                                    in_order ? column_factor : row_factor, tile.rows.D);
}

// u of pairs with equal ids becomes -c / 2, with c from differences where the product form cancels. shared: norms and
// factors of the columns.
template <class Params, class Element, class Shared, class Acc>
CACR_DEVICE void replace_positives(const Params& p, const Tile<Element, Acc>& tile, Shared& shared,
                                   Acc (&u)[kFragments][4]) {
  const ThreadPosition at = ThreadPosition::of_thread();
  for (uint32_t left = tile.members.same & tile.members.valid; left; left &= left - 1) {
    const int bit = __ffs(int(left)) - 1, n = bit / 4, e = bit % 4;
    const int column = 8 * n + at.column + e % 2, row = at.row + e / 2 * 8;
    if (row >= tile.range.rows) continue;
    const Acc row_norm = e / 2 ? tile.thread.norm[1] : tile.thread.norm[0], norm = shared.norm[column];
    Acc cost = (tile.rows_are_queries ? row_norm : norm) - 2 * element_at(u, bit);
    if (!p.inner_product && !(cost > (row_norm + norm) / 2))
      cost = difference_cost(p, tile, row, column, e / 2 ? tile.thread.factor[1] : tile.thread.factor[0],
                             p.normalize ? shared.factor[column] : Acc(0));
    set_element(u, bit, -cost / 2);
  }
}

// Multiplies each column of a tile by its factor.
template <class Acc>
CACR_DEVICE void scale_columns(SharedArray<Acc, kTile>& factor, Acc (&s)[kFragments][4]) {
  const int column = ThreadPosition::of_thread().column;
#pragma unroll
  for (int n = 0; n < kFragments; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] *= factor[8 * n + column + e % 2];
}

// Turns products s = q.k into u = q.k - |k|^2 / 2. shared: norms and factors of the columns.
template <class Params, class Element, class Shared, class Acc>
CACR_DEVICE void finish_similarities(const Params& p, const Tile<Element, Acc>& tile, Shared& shared,
                                     Acc (&s)[kFragments][4]) {
  const ThreadPosition at = ThreadPosition::of_thread();
  if (p.normalize) {
    scale_columns(shared.factor, s);
#pragma unroll
    for (int n = 0; n < kFragments; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] *= tile.thread.factor[e / 2];
  }
#pragma unroll
  for (int n = 0; n < kFragments; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      s[n][e] -= (tile.rows_are_queries ? shared.norm[8 * n + at.column + e % 2] : tile.thread.norm[e / 2]) / 2;
  if (p.positives) replace_positives(p, tile, shared, s);
}

}  // namespace cacr
