// Phases of the way forward: norms, sums over keys, and what every row gets from them.
#pragma once

#include "softmax.cuh"

namespace cacr {

// ---- norms: one warp per row ----------------------------------------------------------------------------------------
template <class Acc, class Element>
CACR_DEVICE void norms_of(const Element* x, int64_t rows, int64_t D, Acc* norm) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t(gridDim.x) * (kThreads / 32);
  for (int64_t i = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; i < rows; i += warps) {
    Acc sum = 0;
    for (int64_t d = lane; d < D; d += 32) {
      const Acc value = widen(x[i * D + d]);
      sum += value * value;
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(kFullWarp, sum, other);
    if (lane == 0) norm[i] = sum;
  }
}

template <class P>
CACR_DEVICE void norms_phase(const P& p) {
  if (p.inner) return;
  norms_of(p.q, p.q_views * p.N, p.D, p.q_norm);
  if (!p.own) norms_of(p.k, p.k_views * p.M, p.D, p.k_norm);
}

// ---- statistics: a unit is a block of queries against the keys of one split -----------------------------------------
template <class A, class P>
struct StatisticsUnit {
  using Element = typename A::Element;
  using Acc = typename A::Acc;
  const P& p;
  Buffers<Element, Acc>& shared;
  Rows<Element> queries, keys;
  Where w;
  const Acc *q_norm, *k_norm;
  int tile0, tile1, chunks, pair, split;

  CACR_DEVICE StatisticsUnit(const P& p_, Buffers<Element, Acc>& buffers, int unit) : p(p_), shared(buffers) {
    const int blocks = int((p.N + kTile - 1) / kTile);
    const int tiles = int((p.M + kTile - 1) / kTile);
    split = unit % p.splits;
    w.row0 = int64_t(unit / p.splits % blocks) * kTile;
    pair = unit / p.splits / blocks;
    w.rows = int(min(int64_t(kTile), p.N - w.row0));
    queries = {p.q + p.q_index[pair] * p.N * p.D, p.N, p.D};
    keys = {p.k + p.k_index[pair] * p.M * p.D, p.M, p.D};
    q_norm = p.q_norm + p.q_index[pair] * p.N;
    k_norm = p.k_norm + p.k_index[pair] * p.M;
    tile0 = share_of(tiles, split, p.splits), tile1 = share_of(tiles, split + 1, p.splits);
    chunks = int((p.D + kChunk<Element> - 1) / kChunk<Element>);
  }

  CACR_DEVICE void load(int tile, int chunk, int stage) {
    if (tile < tile1) {
      const int64_t d0 = int64_t(chunk) * kChunk<Element>;
      load_chunk(shared.a, stage, queries, w.row0, d0, p.aligned);
      load_chunk(shared.b, stage, keys, int64_t(tile) * kTile, d0, p.aligned);
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
    const RowFacts<Acc> facts = row_facts<P, Acc>(p, true, q_norm, w.row0, p.N);
    constexpr int kStage = kTile * kStride<Element>;
    const int warp_rows = int(threadIdx.x / 32) * 16 * kStride<Element>;
    int stage = 0;
    load(tile0, 0, 0);
    for (int tile = tile0; tile < tile1; tile++) {
      w.column0 = int64_t(tile) * kTile, w.columns = int(min(int64_t(kTile), p.M - w.column0));
      Acc u[kFragments][4] = {};
      for (int c = 0; c < chunks; c++) {
        ptx::cp_async_wait<0>();
        __syncthreads();  // this stage is there, the other one has been read
        if (c == 0) stage_columns(p, shared, false, k_norm, w);
        load(c + 1 < chunks ? tile : tile + 1, c + 1 < chunks ? c + 1 : 0, stage ^ 1);
        A::product(u, shared.a, stage * kStage + warp_rows, shared.b, stage * kStage);
        stage ^= 1;
      }
      __syncthreads();  // the columns are there
      const Elements elements = find_elements(shared.id, w.columns, is_masked(p), facts.id, w.shift());
      finish_similarities(p, shared, true, u, facts, queries, keys, w, elements);
#pragma unroll
      for (int s = 0; s < kMaxSoftmaxes; s++)
        if (s < p.softmaxes) add_statistics(rows[s], u, elements.of_kind(p.kind[s]), slope[s]);
    }
#pragma unroll
    for (int s = 0; s < kMaxSoftmaxes; s++)
      if (s < p.softmaxes) write(s, rows[s], slope[s]);
  }

  // Merges the four threads of a row.
  CACR_DEVICE void write(int s, const RowState<Acc> (&rows)[2], Acc slope) {
    const Place at = Place::of_thread();
    const int64_t count = int64_t(p.softmaxes) * p.pairs * p.N;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      Acc top = rows[h].top;
#pragma unroll
      for (int other = 1; other < 4; other *= 2) top = fmax(top, __shfl_xor_sync(kFullWarp, top, other));
      RowState<Acc> row = rows[h];
      row.raise(top, slope);
      double sum = row.sum.value(), sum_u = row.sum_u.value();
#pragma unroll
      for (int other = 1; other < 4; other *= 2) {
        sum += __shfl_xor_sync(kFullWarp, sum, other);
        sum_u += __shfl_xor_sync(kFullWarp, sum_u, other);
      }
      const int64_t i = w.row0 + at.row + 8 * h;
      if (at.column != 0 || i >= p.N) continue;
      double* to = p.partial + split * 3 * count + (int64_t(s) * p.pairs + pair) * p.N + i;
      to[0] = double(top), to[count] = sum, to[2 * count] = sum_u;
    }
  }
};

template <class A, class P>
CACR_DEVICE void statistics_phase(const P& p, Buffers<typename A::Element, typename A::Acc>& shared) {
  const int units = p.pairs * int((p.N + kTile - 1) / kTile) * p.splits;
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) StatisticsUnit<A, P>(p, shared, unit).run();
}

// ---- finish: a thread per row ---------------------------------------------------------------------------------------
// One row of one softmax from the sums of all splits.
template <class P>
CACR_DEVICE RowResult merge_splits(const P& p, int s, int64_t row, double norm) {
  const int64_t count = int64_t(p.softmaxes) * p.pairs * p.N, at = s * int64_t(p.pairs) * p.N + row;
  const double tau = number(p.tau[s]), slope = slope_of<typename P::Accumulator>(p, s), sign = slope < 0 ? -1 : 1;
  double top = -double(INFINITY), sum = 0, sum_u = 0;
#pragma unroll 1
  for (int split = 0; split < p.splits; split++) top = fmax(top, p.partial[split * 3 * count + at]);
#pragma unroll 1
  for (int split = 0; split < p.splits; split++) {
    const double* from = p.partial + split * 3 * count + at;
    const double moved = from[0] > -double(INFINITY) ? sign * (from[0] - top) : 0, factor = exp2(slope * moved);
    sum += from[count] * factor, sum_u += (from[2 * count] + from[count] * moved) * factor;
  }
  return finish_row(sign * top, sum, sum_u, tau, p.positive[s] ? 0 : norm);
}

template <class P>
CACR_DEVICE void finish_phase(const P& p) {
  const int64_t rows = p.pairs * p.N;
  for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < rows; row += int64_t(gridDim.x) * kThreads) {
    const int64_t pair = row / p.N, i = row % p.N;
    const double norm = p.inner ? 0.0 : double(p.q_norm[p.q_index[pair] * p.N + i]);
#pragma unroll 1
    for (int s = 0; s < p.softmaxes; s++) {
      const RowResult r = merge_splits(p, s, row, norm);
      const int64_t at = row_of(p, s, row);
      p.value[at] = r.value, p.lse[at] = r.lse;
      p.top[at] = r.u_top, p.sum[at] = r.sum, p.delta[at] = r.delta;
    }
  }
}

}  // namespace cacr
