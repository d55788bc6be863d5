// The phase of the gradients. A unit owns 64 rows of a view and some chunks of their features. It goes through all rows
// that these are paired with, as queries and as keys, and writes its sums once. Units share nothing, so the result does
// not depend on their order. Per tile: similarities anew, dL/du, then g += dL/du times the other rows.
//
// Derivatives: cacr_kernels/reference.py; dL/du from the coefficients of phases/coefficients.cuh.
#pragma once

#include <type_traits>

#include "../tile/arithmetic.cuh"
#include "coefficients.cuh"

namespace cacr {

// Where a unit is. Entry 2 p is pair p with the unit's rows as its queries, entry 2 p + 1 with them as its keys; of an
// entry, tiles of the other rows; of a tile, steps: a chunk each, first for the similarities, then for the gradient.
struct Cursor {
  int entry, tile, step;
};

template <class Arithmetic>
struct GradientUnit {
  using Element = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  using Total = std::conditional_t<Arithmetic::kCompensated, Sum<Acc>, PlainSum<Acc>>;  // a sum over tiles
  using Gradient = Total[Arithmetic::kGradientChunks][Arithmetic::kChunkFragments][4];
  static constexpr int kStage = kTile * kStride<Element>;
  const ParametersOf<Arithmetic>& p;
  BuffersOf<Arithmetic>& shared;
  TileRange range;
  int view, split, splits;
  int chunks;         // of a row
  int chunk0, owned;  // first chunk and number of chunks of the gradient that the unit computes
  int steps;          // of a tile
  bool is_key_view;   // a view of separate keys

  CACR_DEVICE GradientUnit(const ParametersOf<Arithmetic>& p_, BuffersOf<Arithmetic>& buffers, int unit)
      : p(p_), shared(buffers) {
    chunks = int((p.D + kChunk<Element> - 1) / kChunk<Element>);
    is_key_view = unit >= p.q_units.count;
    if (is_key_view) unit -= p.q_units.count;
    const int groups = is_key_view ? p.k_units.groups : p.q_units.groups;
    const int blocks = is_key_view ? p.k_units.blocks : p.q_units.blocks;
    splits = is_key_view ? p.k_units.splits : p.q_units.splits;
    split = unit % splits, unit /= splits;
    chunk0 = unit % groups * Arithmetic::kGradientChunks, unit /= groups;
    range.row0 = int64_t(unit % blocks) * kTile, view = unit / blocks;
    range.rows = int(min(int64_t(kTile), view_rows().rows - range.row0));
    owned = is_wanted() ? min(Arithmetic::kGradientChunks, chunks - chunk0) : 0;
    steps = chunks + owned;
  }

  CACR_DEVICE bool is_wanted() const { return is_key_view ? p.want_k : p.want_q; }
  CACR_DEVICE bool has_variance() const { return p.want_variance && !is_key_view && chunk0 == 0; }
  CACR_DEVICE Rows<Element> view_rows() const {
    if (is_key_view) return {p.k + view * p.M * p.D, p.M, p.D};
    return {p.q + view * p.N * p.D, p.N, p.D};
  }

  // ---- what the unit goes through -----------------------------------------------------------------------------------
  // Whether the unit has anything to compute in an entry.
  CACR_DEVICE bool meets(int entry) const {
    const int pair = entry / 2;
    if (entry % 2 == 0) return !is_key_view && p.q_index[pair] == view && (owned > 0 || has_variance());
    return (p.keys_are_queries || is_key_view) && p.k_index[pair] == view && owned > 0;
  }
  CACR_DEVICE Rows<Element> others(int entry) const {
    const int pair = entry / 2;
    if (entry % 2 == 0) return {p.k + p.k_index[pair] * p.M * p.D, p.M, p.D};
    return {p.q + p.q_index[pair] * p.N * p.D, p.N, p.D};
  }
  CACR_DEVICE Lengths<Acc> lengths_of_others(int entry) const {
    const int pair = entry / 2;
    return lengths_of(p, entry % 2 == 1, entry % 2 == 0 ? p.k_index[pair] : p.q_index[pair]);
  }
  // The first entry from `entry` on that has tiles; 2 * pairs: none.
  CACR_DEVICE int next_entry(int entry) const {
    while (entry < 2 * p.pairs && !(meets(entry) && first_tile(entry) < end_tile(entry))) entry++;
    return entry;
  }
  CACR_DEVICE int first_tile(int entry) const { return shared.unit.first_tile[entry % 2]; }
  CACR_DEVICE int end_tile(int entry) const { return shared.unit.end_tile[entry % 2]; }
  CACR_DEVICE Cursor start(int from_entry) const {
    const int entry = next_entry(from_entry);
    return {entry, first_tile(entry), 0};
  }
  CACR_DEVICE void advance(Cursor& c) const {
    if (++c.step < steps) return;
    c.step = 0;
    if (++c.tile < end_tile(c.entry)) return;
    c = start(c.entry + 1);
  }

  // Steps 0 ... chunks - 1 of a tile multiply rows with rows, the others need chunks of the other rows alone.
  CACR_DEVICE void load(const Cursor& c, int stage) {
    if (c.entry < 2 * p.pairs) {
      const bool similarity = c.step < chunks;
      const int64_t d0 = int64_t(similarity ? c.step : chunk0 + c.step - chunks) * kChunk<Element>;
      if (similarity) load_chunk(shared.a, stage, rows(), range.row0, d0, p.aligned_16);
      load_chunk(shared.b, stage, others(c.entry), int64_t(c.tile) * kTile, d0, p.aligned_16);
    }
    ptx::cp_async_commit();
  }

  // Waits for the stage that `ahead` has started and starts the next one; `stage` becomes the one to read.
  CACR_DEVICE void step(Cursor& ahead, int& stage) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is there, the other one has been read
    stage ^= 1;
    advance(ahead);
    load(ahead, stage ^ 1);
  }

  // ---- shared memory of the unit ------------------------------------------------------------------------------------
  CACR_DEVICE void stage_unit(float scale) {
    const int x = threadIdx.x;
    const Lengths<Acc> lengths = lengths_of(p, !is_key_view, view);
    if (x < kTile) {
      const bool exists = x < range.rows;
      shared.unit.norm[x] = exists && !p.inner_product ? lengths.norm[range.row0 + x] : Acc(0);
      shared.unit.factor[x] = exists && p.normalize ? lengths.factor[range.row0 + x] : Acc(0);
      shared.unit.tag[x] = exists ? tag_of(p, !is_key_view, range.row0 + x) : RowTag{-1, -1};
    }
    if (x < kMaxSoftmaxes) shared.unit.slope[x] = x < p.softmaxes ? slope_of<Acc>(p, x) : Acc(0);
    if (x < 2) {
      const int tiles = int(((x == 0 ? p.M : p.N) + kTile - 1) / kTile);
      shared.unit.first_tile[x] = split_begin(tiles, split, splits);
      shared.unit.end_tile[x] = split_begin(tiles, split + 1, splits);
    }
    if (x == 0) shared.unit.scale[0] = scale, shared.unit.rows[0] = view_rows();
  }
  CACR_DEVICE Rows<Element> rows() const { return shared.unit.rows[0]; }
  CACR_DEVICE ThreadRows<Acc> thread_rows() const {
    const int row = ThreadPosition::of_thread().row;
    return {{shared.unit.tag[row], shared.unit.tag[row + 8]},
            {shared.unit.norm[row], shared.unit.norm[row + 8]},
            {shared.unit.factor[row], shared.unit.factor[row + 8]}};
  }

  // Coefficients of 64 queries of a pair from `first` on, of which `count` exist.
  CACR_DEVICE void stage_coefficients(int pair, int64_t first, int count) {
    const int64_t pair_rows = p.pairs * p.N;
    for (int x = threadIdx.x; x < p.softmaxes * kTile; x += kThreads) {
      const int64_t at = x / kTile * pair_rows + pair * p.N + first + x % kTile;
      shared.coefficients[x] = x % kTile < count ? p.coefficients[at] : Coefficients<Acc>{0, 0, 0, 0};
    }
    if (threadIdx.x < kTile)
      shared.ratio[threadIdx.x] = int(threadIdx.x) < count ? p.ratio[pair * p.N + first + threadIdx.x] : Acc(0);
  }

  // ---- one tile -----------------------------------------------------------------------------------------------------
  // u becomes dL/du. row_sum: its sum over each of the thread's rows; squares: of each softmax and row, see
  // ElementGradient.
  template <bool kAreQueries>
  CACR_DEVICE void differentiate(Acc (&u)[kFragments][4], const Membership& members, Total (&row_sum)[2],
                                 Total (&squares)[kMaxSoftmaxes][2]) {
    const ThreadPosition at = ThreadPosition::of_thread();
    const uint32_t of_softmax[kMaxSoftmaxes] = {members.of_kind(p.kind[0]), members.of_kind(p.kind[1])};
    Acc sum[2] = {}, of_tile[kMaxSoftmaxes][2] = {};
#pragma unroll
    for (int n = 0; n < kFragments; n++) {
      ptx::keep_reads_below();  // coefficients of all columns do not fit the registers
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int query = kAreQueries ? at.row + e / 2 * 8 : at.column + 8 * n + e % 2;
        ElementGradient<Acc> gradient{0, 0};
        gradient.add(shared.coefficients[query], 0, shared.unit.slope[0], u[n][e], of_softmax[0] >> bit_of(n, e) & 1,
                     of_tile[0][e / 2]);
        if (p.softmaxes == 2)
          gradient.add(shared.coefficients[kTile + query], shared.ratio[query], shared.unit.slope[1], u[n][e],
                       of_softmax[1] >> bit_of(n, e) & 1, of_tile[1][e / 2]);
        sum[e / 2] += gradient.h;
        u[n][e] = Arithmetic::kScaled ? gradient.h * shared.unit.scale[0] : gradient.h;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      row_sum[h].add(sum[h]);
#pragma unroll
      for (int s = 0; s < kMaxSoftmaxes; s++) squares[s][h].add(of_tile[s][h]);
    }
  }

  // All tiles of one entry. g: the gradient; row_sum: of dL/du, over all entries.
  CACR_DEVICE void meet(int entry, Cursor& ahead, int& stage, Gradient& g, Total (&row_sum)[2]) {
    const bool are_queries = entry % 2 == 0;
    const ThreadPosition at = ThreadPosition::of_thread();
    const int warp_rows = int(threadIdx.x / 32) * 16 * kStride<Element>;
    Total squares[kMaxSoftmaxes][2] = {}, sums[2] = {};
    const Rows<Element> columns = others(entry);
    for (int tile = first_tile(entry); tile < end_tile(entry); tile++) {
      range.column0 = int64_t(tile) * kTile, range.columns = int(min(int64_t(kTile), columns.rows - range.column0));
      Acc u[kFragments][4] = {};
      for (int c = 0; c < chunks; c++) {
        step(ahead, stage);
        if (c == 0) {
          stage_columns(p, shared, !are_queries, lengths_of_others(entry), range);
          are_queries ? stage_coefficients(entry / 2, range.row0, range.rows)
                      : stage_coefficients(entry / 2, range.column0, range.columns);
        }
        Arithmetic::product(u, shared.a, stage * kStage + warp_rows, shared.b, stage * kStage);
      }
      __syncthreads();  // the columns are there
      const ThreadRows<Acc> thread = thread_rows();
      const Membership members = find_members(shared.tag, thread.tag, is_masked(p), range);
      const Tile<Element, Acc> seen{are_queries, rows(), columns, range, thread, members};
      finish_similarities(p, seen, shared, u);
      are_queries ? differentiate<true>(u, members, sums, squares) : differentiate<false>(u, members, sums, squares);
      if (p.normalize) scale_columns(shared.factor, u);  // to multiply raw rows
#pragma unroll
      for (int c = 0; c < Arithmetic::kGradientChunks; c++) {
        if (c >= owned) continue;
        step(ahead, stage);
        Arithmetic::accumulate(g[c], u, shared.b, stage * kStage);
      }
    }
    if (are_queries && has_variance()) write_variance(entry / 2, squares);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int64_t i = range.row0 + at.row + 8 * h;
      if (are_queries && !p.cancelling) {  // known to the last digit, because the weights of a query add up to 1
        sums[h] = {};
        if (at.column == 0 && split == 0 && i < rows().rows) sums[h].add(p.gradient_sum[entry / 2 * p.N + i]);
      }
      row_sum[h].add(sums[h]);
    }
  }

  CACR_DEVICE void run(float scale) {
    if (range.rows <= 0) return;
    Gradient g = {};
    Total row_sum[2] = {};
    __syncthreads();  // the unit before has read its last stage and its shared memory
    stage_unit(scale);
    __syncthreads();  // what was staged is there
    int stage = 1;
    Cursor ahead = start(0);
    load(ahead, 0);
    for (int entry = next_entry(0); entry < 2 * p.pairs; entry = next_entry(entry + 1))
      meet(entry, ahead, stage, g, row_sum);
    if (owned > 0) write(g, row_sum);
  }

  // ---- results ------------------------------------------------------------------------------------------------------
  CACR_DEVICE void write_variance(int pair, const Total (&squares)[kMaxSoftmaxes][2]) {
    const ThreadPosition at = ThreadPosition::of_thread();
    const int64_t pair_rows = p.pairs * p.N;
#pragma unroll
    for (int s = 0; s < kMaxSoftmaxes; s++) {
      if (s >= p.softmaxes) continue;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const double sum = quad_sum(squares[s][h].value());
        const int64_t i = range.row0 + at.row + 8 * h, row = pair * p.N + i;
        if (at.column != 0 || i >= p.N) continue;
        const double total = p.sum[row_of(p, s, row)];  // c - F = -2 (u - u_top - delta)
        p.split_variance[(int64_t(split) * p.softmaxes + s) * pair_rows + row] = total == 0 ? 0 : 4 * sum / total;
      }
    }
  }

  CACR_DEVICE void write(const Gradient& g, const Total (&row_sums)[2]) {
    const ThreadPosition at = ThreadPosition::of_thread();
    const Acc back = Arithmetic::kScaled ? Acc(1) / shared.unit.scale[0] : Acc(1);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      Acc row_sum = quad_sum(row_sums[h].rounded());
      if (p.inner_product) row_sum = 0;
      if (p.normalize) row_sum *= shared.unit.factor[at.row + 8 * h];
      const int64_t row = range.row0 + at.row + 8 * h, d0 = int64_t(chunk0) * kChunk<Element> + at.column;
      if (row >= rows().rows) continue;
      const Element* const x = rows().data + row * p.D + d0;
      Acc* const to = gradient_row(row) + d0;
      const bool adds = p.accumulate && splits == 1;
#pragma unroll
      for (int c = 0; c < Arithmetic::kGradientChunks; c++)
#pragma unroll
        for (int n = 0; n < Arithmetic::kChunkFragments; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int d = c * kChunk<Element> + 8 * n + e;
            if (c >= owned || d0 + d >= p.D) continue;
            const Acc gradient = g[c][n][2 * h + e].rounded() * back - row_sum * Acc(widen(x[d]));
            to[d] = adds ? to[d] + gradient : gradient;
          }
    }
  }

  // Where the gradient of a row goes; several splits are added up later (sums.cuh).
  CACR_DEVICE Acc* gradient_row(int64_t row) const {
    Acc* const all = is_key_view ? splits > 1 ? p.split_grad_k : p.grad_k : splits > 1 ? p.split_grad_q : p.grad_q;
    const int64_t views = int64_t(split) * (is_key_view ? p.k_views : p.q_views) + view;
    return all + (views * rows().rows + row) * p.D;
  }
};

template <class Arithmetic>
CACR_DEVICE void gradients_phase(const ParametersOf<Arithmetic>& p, BuffersOf<Arithmetic>& shared) {
  // Of the units of queries, whose coefficients multiply keys, and of keys.
  const float scale[2] = {
      Arithmetic::kScaled ? gradient_scale(p, shared.reduction, false) : 1.0f,
      Arithmetic::kScaled && p.k_units.count > 0 ? gradient_scale(p, shared.reduction, true) : 1.0f};
  const int units = p.q_units.count + p.k_units.count;
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x)
    GradientUnit<Arithmetic>(p, shared, unit).run(unit < p.q_units.count ? scale[0] : scale[1]);
}

}  // namespace cacr
