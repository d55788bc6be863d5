// One thread's share of a contrast problem: blocks of queries against all keys.
//
// The strip. A block of queries computes its similarities with every key once and keeps them (`rows` x M, transposed in
// panels of queries). When the last tile is in, the row statistics are complete and with them dL/dS: the block walks
// back over the strip, the tiles still in cache first, and accumulates both gradients. 3 U floating-point operations
// (U = 2 N M D), nothing recomputed but the exponentials, nothing of size N x M stored. Without gradients, and for the
// backward of statistics known already, one tile stands for the strip.
#pragma once

#include "backward.h"
#include "forward.h"

namespace cacr::CACR_ISA {

template <class T>
size_t strip_scratch(const SweepParams<T>& t) {
  return bytes_of([&](char*& at) { BlockScratch<T>::layout(t, at); });
}

template <class T>
void strip_block(const SweepSetup<T>& g, const Block<T>& b, const BlockScratch<T>& s) {
  const SweepParams<T>& t = g.t;
  const idx K = t.blocking.keys;
  auto keys = [&](idx c) { return Keys{t.share.key0 + c * K, min_of(K, t.share.key1 - t.share.key0 - c * K)}; };
  auto tile = [&](idx c) { return s.S + (g.strip() ? c * K * b.panels * kPanel<T> : 0); };

  pack_queries(g, b, s);
  if (g.forward) {
    for (int k = 0; k < g.p.softmaxes; k++) start_rows(s.rows.softmax[k], b.panels * kPanel<T>);
    for (idx c = 0; c < g.tile_count(); c++) {
      if (t.interrupt()) return;
      compute_similarities(g, b, s, tile(c), keys(c));
      accumulate_statistics(g, b, s, s.rows, tile(c), keys(c));
    }
    finish_rows(g, b, s.q_norm, s.rows);
  } else {
    set_given_coefficients(g, b, s.q_norm, s.rows);
  }
  if (!g.backward) return;
  if (t.want_dq) zero(s.dq_panels, b.panels * kPanel<T> * g.Dp);
  for (idx c = g.tile_count() - 1; c >= 0; c--) {
    if (t.interrupt()) return;
    if (!g.strip()) compute_similarities(g, b, s, tile(c), keys(c));
    tile_gradients(g, b, s, s.rows, tile(c), keys(c));
    if constexpr (kBf16Tiles<T>)
      if (g.bf16) round_block(g, b, s, s.rows, keys(c));
    if (t.want_dq) multiply_query_gradients(g, b, s, keys(c));
    if (t.want_dk) multiply_key_gradients(g, b, s, keys(c));
  }
  if (t.want_dq) add_query_gradients(g, b, s, g.cancelling || g.bf16 ? s.rows.row_sum : s.rows.known_sum);
  if (t.want_moment) write_variance(g, b, s.rows);
}

template <class T>
void strip(const SweepParams<T>& t) {
  constexpr idx PW = kPanel<T>, W = Lanes<T>::W;
  const SweepSetup<T> g(t);
  char* at = static_cast<char*>(t.scratch);
  const BlockScratch<T> s = BlockScratch<T>::layout(t, at);
  const idx per_pair = padded<T>(g.p.N) / PW;
  const bool key_gradients = g.backward && t.want_dk;
  for (idx unit = t.share.unit0; unit < t.share.unit1;) {
    Block<T> b{unit / per_pair, 0, 0, 0};
    const idx first = unit - b.pair * per_pair, last = min_of(per_pair, first + t.share.unit1 - unit), n = last - first;
    const idx blocks = (n * PW + t.blocking.rows - 1) / t.blocking.rows;
    if (key_gradients) zero(s.columns, (t.share.key1 - t.share.key0) * W);
    for (idx i = 0; i < blocks; i++) {
      const idx lo = first + n * i / blocks, hi = first + n * (i + 1) / blocks;
      b.row0 = lo * PW, b.panels = hi - lo, b.rows = min_of(g.p.N - b.row0, b.panels * PW);
      strip_block(g, b, s);
      if (t.interrupt()) return;
    }
    if (key_gradients && !g.p.inner_product) subtract_key_terms(g, b, s.columns);
    unit += n;
  }
}

}  // namespace cacr::CACR_ISA
