// Queries and keys are the same rows: every similarity serves both, once per sweep.
//
// A block of rows meets the keys from its own first row on. The square on the diagonal is treated as any other tile;
// one right of it also serves its keys as queries: on the way forward it is turned, so that keys stand in the lanes,
// and added to their statistics; on the way back H_ij + H_ji multiplies both sides. Two sweeps of U/2 for the
// similarities and U for both gradients: 2 U in all, where the strip needs 3 U.
//
// Similarities have the same bits both times, u_ji derived from u_ij or not: at large temperatures and norms a weight
// that differs by the rounding of its exponent is not the one the row was normalised with.
#pragma once

#include "backward.h"
#include "forward.h"

namespace cacr::CACR_ISA {

// Every row of every pair, `per_pair` rows a pair: views of SymmetricParams::row_states, [softmaxes][arrays][count],
// and behind them on the way back [count] of the known sums.
template <class T>
struct SymmetricRows {
  static constexpr int kForward = 3;  // arrays: top, sum, sum_d
  idx per_pair, count;
  SoftmaxRows<T> softmax[kMaxSoftmaxes];
  T* known_sum;  // null on the way forward

  static idx arrays(const SweepSetup<T>& g) { return g.backward ? SoftmaxRows<T>::kArrays : kForward; }

  static SymmetricRows of(const SweepSetup<T>& g, T* memory) {
    SymmetricRows r{};
    r.per_pair = padded<T>(g.p.N), r.count = g.p.pairs * r.per_pair;
    for (int s = 0; s < g.p.softmaxes; s++)  // on the way forward the other arrays are not used
      r.softmax[s] = g.backward ? SoftmaxRows<T>::of(memory + s * arrays(g) * r.count, r.count)
                                : forward_rows(memory + s * arrays(g) * r.count, r.count);
    if (g.backward) r.known_sum = memory + g.p.softmaxes * arrays(g) * r.count;
    return r;
  }
  static SoftmaxRows<T> forward_rows(T* x, idx count) { return {x, x + count, x + 2 * count, x, x, x, x, x, x}; }

  static idx size(const SweepSetup<T>& g) {
    return (g.p.softmaxes * arrays(g) + g.backward) * g.p.pairs * padded<T>(g.p.N);
  }

  SoftmaxRows<T> at(int s, idx pair, idx row) const { return softmax[s].from(pair * per_pair + row); }
};

template <class T>
struct SymmetricScratch {
  BlockScratch<T> block;
  T* turned;   // [rows][PW] similarities of one panel of keys with the block
  T* moments;  // [softmaxes][N][W] where wanted: of the keys, by lanes

  static SymmetricScratch layout(const SweepParams<T>& t, char*& at) {
    SymmetricScratch s;
    s.block = BlockScratch<T>::layout(t, at);
    s.turned = carve<T>(at, t.blocking.rows * kPanel<T>);
    const idx keys = t.share.key1 - t.share.key0;
    s.moments = carve<T>(at, t.want_moment ? t.problem->softmaxes * keys * Lanes<T>::W : 0);
    return s;
  }
};

// All that one sweep works with.
template <class T>
struct SymmetricSweep {
  const SymmetricParams<T>& params;
  SweepSetup<T> g;
  SymmetricScratch<T> s;
  SymmetricRows<T> all;

  static SymmetricSweep of(const SymmetricParams<T>& params) {
    const SweepSetup<T> g(params.sweep);
    char* at = static_cast<char*>(params.sweep.scratch);
    return {params, g, SymmetricScratch<T>::layout(params.sweep, at), SymmetricRows<T>::of(g, params.row_states)};
  }

  // The rows of a block among all. On the way forward delta is of no use after the block.
  BlockRows<T> rows(const Block<T>& b) const {
    BlockRows<T> r = s.block.rows;
    for (int k = 0; k < g.p.softmaxes; k++) {
      T* const delta = r.softmax[k].delta;
      r.softmax[k] = all.at(k, b.pair, b.row0);
      if (!g.backward) r.softmax[k].delta = delta;
    }
    if (g.backward) r.known_sum = all.known_sum + b.pair * all.per_pair + b.row0;
    return r;
  }
};

// f(block, it is the first of its pair in the share, it is the last) over the blocks of the share
template <class T, class F>
void for_blocks(const SweepSetup<T>& g, F f) {
  constexpr idx PW = kPanel<T>;
  const idx per_pair = padded<T>(g.p.N) / PW, most = g.t.blocking.rows / PW;
  for (idx at = g.t.share.unit0; at < g.t.share.unit1;) {
    Block<T> b{at / per_pair, 0, 0, 0};
    const idx first = at - b.pair * per_pair, last = min_of(per_pair, first + g.t.share.unit1 - at);
    for (idx lo = first; lo < last; lo += most) {
      b.row0 = lo * PW, b.panels = min_of(most, last - lo), b.rows = min_of(g.p.N - b.row0, b.panels * PW);
      f(b, lo == first, lo + most >= last);
    }
    at += last - first;
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------
// turned[i][l] = u_(j+l)i = u_i(j+l) + |k_(j+l)|^2/2 - |q_i|^2/2 (shift), a square of W x W at a time. S: of key j, and
// of n from there on.
template <class T>
void turn(const SymmetricSweep<T>& w, const Block<T>& b, const T* S, idx j, idx n, bool shift) {
  constexpr idx PW = kPanel<T>, W = Lanes<T>::W;
  const T* bias = b.k_bias(w.g);
  T key_bias[PW] = {};
  for (idx l = 0; shift && l < n; l++) key_bias[l] = bias[j + l];
  for (idx i = 0; i < b.panels; i++) {
    const T* in = S + i * w.g.t.blocking.keys * PW;
    T *out = w.s.turned + i * PW * PW, row_bias[PW] = {};
    for (idx l = 0; shift && l < b.rows_of_panel(i); l++) row_bias[l] = bias[b.row0 + i * PW + l];
    for (idx x0 = 0; x0 < PW; x0 += W)
      for (idx y0 = 0; y0 < PW; y0 += W) {
        Vec<T> r[W];
#pragma GCC unroll 16
        for (idx x = 0; x < W; x++) r[x] = x0 + x < n ? load(in + (x0 + x) * PW + y0) : Vec<T>{};
        transpose_lanes<T>(r);
        const Vec<T> other = load(key_bias + x0);
#pragma GCC unroll 16
        for (idx y = 0; y < W; y++) store<T>(out + (y0 + y) * PW + x0, r[y] + (row_bias[y0 + y] - other));
      }
  }
}

// Statistics of PW rows from j on, of which n exist, as queries of the block's rows. S: their first entry.
template <class T>
void accumulate_keys(const SymmetricSweep<T>& w, const Block<T>& b, const T* S, idx j, idx n) {
  constexpr idx PW = kPanel<T>;
  const SweepSetup<T>& g = w.g;
  int32_t id[PW] = {};
  for (idx l = 0; g.p.q_id && l < n; l++) id[l] = g.p.q_id[j + l];
  const auto ids = [&](idx i) { return TileIds<T>{id, g.p.q_id ? g.p.q_id + i : nullptr, j, i, nullptr}; };
  int turned = -1;  // for which softmax
  for (int s = 0; s < g.p.softmaxes; s++)
    for_parts(g, j, {b.row0, b.rows}, ids(b.row0), w.s.block.lists, [&](const Part& part) {
      if (!part.masked && is_same(g.p.kind[s])) return;
      if (turned < 0 || g.positive[s] != g.positive[turned]) turn(w, b, S, j, n, !g.positive[s]);
      turned = s;
      add_keys(g, part.keys, w.s.turned + (part.first - b.row0) * PW, s, w.all.at(s, b.pair, j), ids(part.first),
               part.masked);
    });
}

// Adds up what two threads found about n rows.
template <class T>
void merge_rows(T slope, idx n, const SoftmaxRows<T>& into, const SoftmaxRows<T>& from) {
  for (idx i = 0; i < n; i += kPanel<T>) {
    const Panel<T> top0 = load_panel(into.top + i), top1 = load_panel(from.top + i), top = max_vec(top0, top1);
    const MovedTop<T> m0 = move_top(slope, top0, top), m1 = move_top(slope, top1, top);
    const Panel<T> sum0 = load_panel(into.sum + i), sum1 = load_panel(from.sum + i);
    store_panel(into.top + i, top), store_panel(into.sum + i, sum0 * m0.scale + sum1 * m1.scale);
    Panel<T> sum_d = load_panel(into.sum_d + i) * m0.scale;
    sum_d += sum0 * m0.scale * m0.moved;
    const Panel<T> other = load_panel(from.sum_d + i) * m1.scale;
    sum_d = sum_d + other + sum1 * m1.scale * m1.moved;
    store_panel(into.sum_d + i, sum_d);
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------
// The square on the diagonal. The sums of its rows are known, unless two softmaxes nearly cancel.
template <class T>
void square_gradients(const SymmetricSweep<T>& w, const Block<T>& b, BlockRows<T> rows, Keys keys) {
  if (!w.g.cancelling && !w.g.bf16) rows.row_sum = w.s.turned;  // of no use
  tile_gradients(w.g, b, w.s.block, rows, w.s.block.S, keys);
}

// A tile right of the square.
template <class T>
void symmetric_gradients(const SymmetricSweep<T>& w, const Block<T>& b, const BlockRows<T>& rows, Keys keys) {
  constexpr idx PW = kPanel<T>, W = Lanes<T>::W;
  const SweepSetup<T>& g = w.g;
  const T* bias = b.k_bias(g);
  for (idx i = 0; i < b.panels; i++) {
    T q_bias[PW] = {};
    for (idx l = 0; l < b.rows_of_panel(i); l++) q_bias[l] = bias[b.row0 + i * PW + l];
    SymmetricTile<T> tile{};
    tile.q_bias = q_bias, tile.total = g.cancelling, tile.moment_stride = g.p.N * W;
    alignas(64) T unused[PW] = {};
    for_parts(g, b.row0 + i * PW, keys, tile_ids(g, b, w.s.block, i, keys.j0), w.s.block.lists, [&](const Part& part) {
      const idx j = part.first, at = (i * g.t.blocking.keys + j - keys.j0) * PW;
      const Active active = Active::of(g, part);
      if (active.count == 0) return no_gradient(part.keys, w.s.block.H + at);
      tile.tile = gradient_tile(g, rows, i, active);
      if (g.bf16) tile.tile.row_sum = unused;
      tile.tile.keys = part.keys, tile.tile.S = w.s.block.S + at, tile.tile.H = w.s.block.H + at;
      tile.tile.ids = tile_ids(g, b, w.s.block, i, j), tile.tile.columns = g.bf16 ? nullptr : w.s.block.columns + j * W;
      for (int x = 0; x < active.count; x++) {
        tile.keys[x] = w.all.at(active.softmax[x], b.pair, j);
        tile.shifted[x] = !g.positive[active.softmax[x]];
      }
      tile.k_bias = bias + j, tile.key_moments = w.s.moments + active.softmax[0] * tile.moment_stride + j * W;
      with_gradient_flags(g, active, part.masked, [&](auto two, auto bounded, auto mask, auto moment) {
        if constexpr (mask.value)
          if (g.holes) return tile_gradient_symmetric<T, 1 + two.value, bounded.value, true, moment.value, true>(tile);
        tile_gradient_symmetric<T, 1 + two.value, bounded.value, mask.value, moment.value, false>(tile);
      });
    });
  }
}

// What the pair's rows and keys add to sum e (d - delta)^2, without the factor of the weights
template <class T>
void add_moments(const SymmetricSweep<T>& w, idx pair) {
  constexpr idx W = Lanes<T>::W;
  const Contrast<T>& p = w.g.p;
  for (int s = 0; s < p.softmaxes; s++)
    for (idx j = 0; j < p.N; j++)
      w.params.key_moments[(s * p.pairs + pair) * p.N + j] += sum_lanes<T>(load(w.s.moments + (s * p.N + j) * W));
}

// ---- one block ------------------------------------------------------------------------------------------------------
template <class T>
void meet_forward(const SymmetricSweep<T>& w, const Block<T>& b, const BlockRows<T>& rows, Keys keys, bool diagonal) {
  T* const S = w.s.block.S;
  compute_similarities(w.g, b, w.s.block, S, keys);
  accumulate_statistics(w.g, b, w.s.block, rows, S, keys);
  for (idx j = 0; j < keys.n && !diagonal; j += kPanel<T>)
    accumulate_keys(w, b, S + j * kPanel<T>, keys.j0 + j, min_of<idx>(kPanel<T>, keys.n - j));
}

template <class T>
void meet_backward(const SymmetricSweep<T>& w, const Block<T>& b, const BlockRows<T>& rows, Keys keys, bool diagonal) {
  compute_similarities(w.g, b, w.s.block, w.s.block.S, keys);
  diagonal ? square_gradients(w, b, rows, keys) : symmetric_gradients(w, b, rows, keys);
  if constexpr (kBf16Tiles<T>)
    if (w.g.bf16) round_block(w.g, b, w.s.block, rows, keys);
  multiply_query_gradients(w.g, b, w.s.block, keys);
  multiply_key_gradients(w.g, b, w.s.block, keys);
}

template <class T>
void symmetric_block(const SymmetricSweep<T>& w, const Block<T>& b) {
  const SweepSetup<T>& g = w.g;
  const idx PW = kPanel<T>, square = min_of(b.panels * PW, g.p.N - b.row0), K = g.t.blocking.keys;
  auto meet = g.backward ? meet_backward<T> : meet_forward<T>;
  pack_queries(g, b, w.s.block);
  const BlockRows<T> rows = w.rows(b);
  if (g.backward) zero(w.s.block.dq_panels, b.panels * PW * g.Dp), zero(rows.row_sum, b.panels * PW);
  meet(w, b, rows, {b.row0, square}, true);
  for (idx j = b.row0 + square; j < g.p.N; j += K) {
    if (g.t.interrupt()) return;
    meet(w, b, rows, {j, min_of(K, g.p.N - j)}, false);
  }
  if (!g.backward) return;
  if (!g.cancelling && !g.bf16)
    for (idx i = 0; i < b.panels * PW; i++) rows.row_sum[i] += rows.known_sum[i];
  add_query_gradients(g, b, w.s.block, rows.row_sum);
  if (g.t.want_moment) write_variance(g, b, rows);  // of what the rows met as queries so far
}

// ---- the kernels ----------------------------------------------------------------------------------------------------
template <class T>
size_t symmetric_scratch(const SymmetricParams<T>& params) {
  return bytes_of([&](char*& at) { SymmetricScratch<T>::layout(params.sweep, at); });
}

template <class T>
int64_t symmetric_states(const SymmetricParams<T>& params) {
  return SymmetricRows<T>::size(SweepSetup<T>(params.sweep));
}

template <class T>
void symmetric_sweep(const SymmetricParams<T>& params) {
  constexpr idx W = Lanes<T>::W;
  const auto w = SymmetricSweep<T>::of(params);
  const SweepSetup<T>& g = w.g;
  if (!g.backward)
    for (int s = 0; s < g.p.softmaxes; s++) start_rows(w.all.softmax[s], w.all.count);
  for_blocks(g, [&](const Block<T>& b, bool first_of_pair, bool last_of_pair) {
    if (g.backward && first_of_pair) zero(w.s.block.columns, g.p.N * W);
    if (g.t.want_moment && first_of_pair) zero(w.s.moments, g.p.softmaxes * g.p.N * W);
    if (g.t.interrupt()) return;
    symmetric_block(w, b);
    if (g.backward && last_of_pair && !g.p.inner_product) subtract_key_terms(g, b, w.s.block.columns);
    if (g.t.want_moment && last_of_pair) add_moments(w, b.pair);
  });
}

// Adds up what `partials` threads found about the rows and writes their statistics.
template <class T>
void symmetric_finish(const SymmetricParams<T>& params) {
  const auto w = SymmetricSweep<T>::of(params);
  for_blocks(w.g, [&](const Block<T>& b, bool, bool) {
    const BlockRows<T> rows = w.rows(b);
    for (idx x = 1; x < params.partials; x++) {
      const auto other = SymmetricRows<T>::of(w.g, params.partial_states[x]);
      for (int s = 0; s < w.g.p.softmaxes; s++)
        merge_rows(w.g.slope[s], b.panels * kPanel<T>, rows.softmax[s], other.at(s, b.pair, b.row0));
    }
    load_norms(w.g, b, w.s.block);
    finish_rows(w.g, b, w.s.block.q_norm, rows);
  });
}

// Fills in the coefficients of the rows for the way back.
template <class T>
void symmetric_prepare(const SymmetricParams<T>& params) {
  const auto w = SymmetricSweep<T>::of(params);
  for_blocks(w.g, [&](const Block<T>& b, bool, bool) {
    load_norms(w.g, b, w.s.block);
    set_given_coefficients(w.g, b, w.s.block.q_norm, w.rows(b));
  });
}

}  // namespace cacr::CACR_ISA
