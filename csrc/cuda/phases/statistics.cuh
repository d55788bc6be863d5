// The phases of the statistics: sums over the keys of a split, then value and lse of every row from the sums of all
// splits. Definitions: cacr_kernels/reference.py, "Merge".
#pragma once

#include "../grid.cuh"
#include "../tile/arithmetic.cuh"
#include "../tile/softmax.cuh"

namespace cacr {

// ---- statistics: a unit is a block of 64 queries of a pair against the keys of one split ----------------------------
template <class Arithmetic>
struct StatisticsUnit {
  using Element = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  const ParametersOf<Arithmetic>& p;
  BuffersOf<Arithmetic>& shared;
  Rows<Element> queries, keys;
  TileRange range;
  int first_tile, end_tile, chunks, pair, split;  // tiles of keys

  CACR_DEVICE StatisticsUnit(const ParametersOf<Arithmetic>& p_, BuffersOf<Arithmetic>& buffers, int unit)
      : p(p_), shared(buffers) {
    const int blocks = int((p.N + kTile - 1) / kTile);
    const int tiles = int((p.M + kTile - 1) / kTile);
    split = unit % p.splits;
    range.row0 = int64_t(unit / p.splits % blocks) * kTile;
    pair = unit / p.splits / blocks;
    range.rows = int(min(int64_t(kTile), p.N - range.row0));
    queries = {p.q + p.q_index[pair] * p.N * p.D, p.N, p.D};
    keys = {p.k + p.k_index[pair] * p.M * p.D, p.M, p.D};
    first_tile = split_begin(tiles, split, p.splits), end_tile = split_begin(tiles, split + 1, p.splits);
    chunks = int((p.D + kChunk<Element> - 1) / kChunk<Element>);
  }

  CACR_DEVICE void load(int tile, int chunk, int stage) {
    if (tile < end_tile) {
      const int64_t d0 = int64_t(chunk) * kChunk<Element>;
      load_chunk(shared.a, stage, queries, range.row0, d0, p.aligned_16);
      load_chunk(shared.b, stage, keys, int64_t(tile) * kTile, d0, p.aligned_16);
    }
    ptx::cp_async_commit();
  }

  CACR_DEVICE void run() {
    RowState<Acc> rows[kMaxSoftmaxes][2];
    Acc slope[kMaxSoftmaxes];
#pragma unroll
    for (int s = 0; s < kMaxSoftmaxes; s++) {
      rows[s][0] = rows[s][1] = RowState<Acc>::empty();
      slope[s] = s < p.softmaxes ? slope_of<Acc>(p, s) : Acc(0);
    }
    const ThreadRows<Acc> thread = thread_queries<Acc>(p, lengths_of(p, true, p.q_index[pair]), range.row0);
    constexpr int kStage = kTile * kStride<Element>;
    const int warp_rows = int(threadIdx.x / 32) * 16 * kStride<Element>;
    int stage = 0;
    load(first_tile, 0, 0);
    for (int tile = first_tile; tile < end_tile; tile++) {
      range.column0 = int64_t(tile) * kTile, range.columns = int(min(int64_t(kTile), p.M - range.column0));
      Acc u[kFragments][4] = {};
      for (int c = 0; c < chunks; c++) {
        ptx::cp_async_wait<0>();
        __syncthreads();  // this stage is there, the other one has been read
        if (c == 0) stage_columns(p, shared, false, lengths_of(p, false, p.k_index[pair]), range);
        load(c + 1 < chunks ? tile : tile + 1, c + 1 < chunks ? c + 1 : 0, stage ^ 1);
        Arithmetic::product(u, shared.a, stage * kStage + warp_rows, shared.b, stage * kStage);
        stage ^= 1;
      }
      __syncthreads();  // the columns are there
      const Membership members = find_members(shared.tag, thread.tag, is_masked(p), range);
      const Tile<Element, Acc> seen{true, queries, keys, range, thread, members};
      finish_similarities(p, seen, shared, u);
#pragma unroll
      for (int s = 0; s < kMaxSoftmaxes; s++)
        if (s < p.softmaxes) add_statistics(rows[s], u, members.of_kind(p.kind[s]), slope[s]);
    }
#pragma unroll
    for (int s = 0; s < kMaxSoftmaxes; s++)
      if (s < p.softmaxes) write(s, rows[s], slope[s]);
  }

  // Merges the four threads of each row.
  CACR_DEVICE void write(int s, const RowState<Acc> (&rows)[2], Acc slope) {
    const ThreadPosition at = ThreadPosition::of_thread();
    const int64_t count = int64_t(p.softmaxes) * p.pairs * p.N;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const Acc top = quad_max(rows[h].top);
      RowState<Acc> row = rows[h];
      row.raise(top, slope);
      const double sum = quad_sum(row.sum.value()), sum_u = quad_sum(row.sum_u.value());
      const int64_t i = range.row0 + at.row + 8 * h;
      if (at.column != 0 || i >= p.N) continue;
      double* to = p.split_sums + split * 3 * count + (int64_t(s) * p.pairs + pair) * p.N + i;
      to[0] = double(top), to[count] = sum, to[2 * count] = sum_u;
    }
  }
};

template <class Arithmetic>
CACR_DEVICE void statistics_phase(const ParametersOf<Arithmetic>& p, BuffersOf<Arithmetic>& shared) {
  const int units = p.pairs * int((p.N + kTile - 1) / kTile) * p.splits;
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) StatisticsUnit<Arithmetic>(p, shared, unit).run();
}

// ---- finish: a thread per row ---------------------------------------------------------------------------------------
// Finishes one row of one softmax from the sums of all splits. norm: |q|^2 of the row.
template <class Params>
CACR_DEVICE void finish_softmax(const Params& p, int s, int64_t row, double norm) {
  const int64_t count = int64_t(p.softmaxes) * p.pairs * p.N, at = s * int64_t(p.pairs) * p.N + row;
  const double tau = number(p.tau[s]), slope = slope_of<typename Params::Accumulator>(p, s), sign = slope < 0 ? -1 : 1;
  double top = -double(INFINITY), sum = 0, sum_u = 0;
#pragma unroll 1
  for (int split = 0; split < p.splits; split++) top = fmax(top, p.split_sums[split * 3 * count + at]);
#pragma unroll 1
  for (int split = 0; split < p.splits; split++) {
    const double* from = p.split_sums + split * 3 * count + at;
    const double moved = from[0] > -double(INFINITY) ? sign * (from[0] - top) : 0, factor = exp2(slope * moved);
    sum += from[count] * factor, sum_u += (from[2 * count] + from[count] * moved) * factor;
  }
  const double u_top = sign * top, top_cost = (p.positive[s] ? 0 : norm) - 2 * u_top;  // of positives u is -c / 2
  const RowResult r = finish_row(sum, sum_u, top_cost, tau, tau - tau == 0);
  const int64_t to = row_of(p, s, row);
  p.value[to] = r.value, p.lse[to] = r.lse;
  p.top[to] = r.empty ? 0 : u_top, p.sum[to] = r.sum, p.delta[to] = r.delta;
}

template <class Params>
CACR_DEVICE void finish_phase(const Params& p) {
  const GridStride threads = GridStride::of_thread();
  for (int64_t row = threads.first; row < p.pairs * p.N; row += threads.step) {
    const int64_t pair = row / p.N, i = row % p.N;
    const double norm = p.inner_product ? 0.0 : double(p.q_norm[p.q_index[pair] * p.N + i]);
#pragma unroll 1
    for (int s = 0; s < p.softmaxes; s++) finish_softmax(p, s, row, norm);
  }
}

}  // namespace cacr
