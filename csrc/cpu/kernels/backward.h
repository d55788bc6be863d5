// The way back through a block: dL/dS of its tiles, and both gradients as products with them.
#pragma once

#include "block.h"

namespace cacr::CACR_ISA {

// What the functions of a tile are given of panel i.
template <class T>
GradientTile<T> gradient_tile(const SweepSetup<T>& g, const BlockRows<T>& rows, idx i, const Active& active) {
  GradientTile<T> tile{};
  for (int x = 0; x < active.count; x++) {
    const int s = active.softmax[x];
    tile.slope[x] = g.slope[s], tile.kind[x] = g.p.kind[s];
    tile.rows[x] = rows.softmax[s].from(i * kPanel<T>);
  }
  tile.row_sum = rows.row_sum + i * kPanel<T>;
  return tile;
}

// f with what the tile functions are compiled for: two softmaxes, bounded, masked, with moments.
template <class T, class F>
void with_gradient_flags(const SweepSetup<T>& g, const Active& active, bool masked, F f) {
  with_flags(f, active.count == 2, g.t.bounded, masked, g.t.want_moment);
}

// Keys of a tile that are in no set.
template <class T>
void no_gradient(TileKeys keys, T* H) {
  for (idx x = 0; x < keys.n; x++) store_panel(H + kPanel<T> * keys[x], Panel<T>{});
}

// H, the sums of its rows and, where dK is wanted, of its columns. Not those, if H is to be rounded.
template <class T>
void tile_gradients(const SweepSetup<T>& g, const Block<T>& b, const BlockScratch<T>& s, const BlockRows<T>& rows,
                    const T* S, Keys keys) {
  constexpr idx PW = kPanel<T>, W = Lanes<T>::W;
  for (idx i = 0; i < b.panels; i++) {
    alignas(64) T unused[PW] = {};
    for_parts(g, b.row0 + i * PW, keys, tile_ids(g, b, s, i, keys.j0), s.lists, [&](const Part& part) {
      const idx j = part.first, at = (i * g.t.blocking.keys + j - keys.j0) * PW;
      const Active active = Active::of(g, part);
      if (active.count == 0) return no_gradient(part.keys, s.H + at);
      GradientTile<T> tile = gradient_tile(g, rows, i, active);
      if (g.bf16) tile.row_sum = unused;
      tile.keys = part.keys, tile.S = S + at, tile.H = s.H + at, tile.ids = tile_ids(g, b, s, i, j);
      tile.columns = g.t.want_dk && !g.bf16 ? s.columns + (j - g.t.share.key0) * W : nullptr;
      with_gradient_flags(g, active, part.masked, [&](auto two, auto bounded, auto mask, auto moment) {
        if constexpr (mask.value)
          if (g.holes) return tile_gradient<T, 1 + two.value, bounded.value, true, moment.value, true>(tile);
        tile_gradient<T, 1 + two.value, bounded.value, mask.value, moment.value, false>(tile);
      });
    });
  }
}

// The coefficients of bfloat16 products, with the sums of rows and columns.
template <class T>
void round_block(const SweepSetup<T>& g, const Block<T>& b, const BlockScratch<T>& s, const BlockRows<T>& rows,
                 Keys keys) {
  constexpr idx W = Lanes<T>::W;
  const T* k_r = b.k_r(g);
  for (idx i = 0; i < b.panels; i++) {
    const idx at = i * g.t.blocking.keys * kTile;
    const RoundedCoefficients<T> t{s.H + at,
                                   s.bf16.q_r + i * kTile,
                                   k_r ? k_r + keys.j0 : nullptr,
                                   s.bf16.h_rows + at,
                                   s.bf16.h_pairs + at,
                                   rows.row_sum + i * kTile,
                                   g.t.want_dk ? s.columns + (keys.j0 - g.t.share.key0) * W : nullptr};
    round_coefficients(keys.n, t);
  }
}

template <class T>
void write_variance(const SweepSetup<T>& g, const Block<T>& b, const BlockRows<T>& rows) {
  for (int s = 0; s < g.p.softmaxes; s++)
    for (idx i = 0; i < b.rows; i++)
      g.t.statistics.variance[b.row_index(g.p, s, i)] =
          4 * double(rows.softmax[s].factor[i]) * double(rows.softmax[s].moment[i]);
}

template <class T>
void multiply_query_gradients(const SweepSetup<T>& g, const Block<T>& b, const BlockScratch<T>& s, Keys keys) {
  constexpr idx PW = kPanel<T>;
  const idx ldh = g.t.blocking.keys * PW, R = b.panels * PW;
  if constexpr (kBf16Tiles<T>)
    if (g.bf16) {
      const Bf16Keys& packed = g.t.packed.keys;
      const Bf16* K = packed.columns + (g.p.k_index[b.pair] * packed.view_rows + keys.j0) * g.Dp;
      const TileConfig config;
      for (idx i = 0; i < b.panels; i++)
        query_gradient_tiles(keys.n, g.Dp, s.bf16.h_pairs + i * ldh, K, s.dq_panels + i * kTile * g.Dp);
      return;
    }
  const T* K = g.t.packed.k_panels + g.p.k_index[b.pair] * g.p.M * g.Dp + keys.j0 * PW;
  for (idx f = 0; f < g.Dp / PW; f++)
    for (idx i = 0; i < b.panels; i++)
      query_gradient_panel<T>(keys.n, s.H + i * ldh, K + f * g.p.M * PW, s.dq_panels + (f * R + i * PW) * PW);
}

// The memory of one view, zeroed when it is first written.
template <class T>
T* view_of(const GradientSlice<T>& g, idx view, idx rows) {
  T* data = g.data + view * g.view_stride;
  if (!g.touched[view]) zero(data, rows * g.row_stride), g.touched[view] = 1;
  return data;
}

template <class T>
void multiply_key_gradients(const SweepSetup<T>& g, const Block<T>& b, const BlockScratch<T>& s, Keys keys) {
  constexpr idx PW = kPanel<T>;
  const idx ldh = g.t.blocking.keys * PW, R = b.panels * PW, stride = g.t.dk.row_stride;
  T* out = view_of(g.t.dk, g.p.k_index[b.pair], g.p.M) + keys.j0 * stride;
  if constexpr (kBf16Tiles<T>)
    if (g.bf16) {
      const TileConfig config;
      return key_gradient_tiles(keys.n, b.panels, g.Dp, s.bf16.h_rows, ldh, s.bf16.query_pairs, out, stride);
    }
  for (idx f = 0; f < g.Dp / PW; f++)
    key_gradient_panel<T>(keys.n, b.panels, s.H, ldh, s.q_panels + f * R * PW, out + f * PW, stride);
}

// dQ_i += (H K)_i - (sum_j H_ij) q_i.   sum: [rows], of H along the rows
template <class T>
void add_query_gradients(const SweepSetup<T>& g, const Block<T>& b, const BlockScratch<T>& s, const T* sum) {
  constexpr idx PW = kPanel<T>;
  const Contrast<T>& p = g.p;
  const idx R = b.panels * PW, stride = g.t.dq.row_stride;
  T* out = view_of(g.t.dq, p.q_index[b.pair], p.N) + b.row0 * stride;
  if constexpr (kBf16Tiles<T>)
    if (g.bf16) turn_query_gradients(b.panels, g.Dp, s.dq_panels);
  const T *q = b.q(p), *r = b.q_r(g);
  for (idx i = 0; i < b.rows; i++)
    for (idx f = 0; f < g.Dp / PW; f++) {
      const T* product = s.dq_panels + (g.bf16 ? (i / PW * g.Dp + f * PW + i % PW) * PW : (f * R + i) * PW);
      const T *x = q + i * p.q_row_stride + f * PW, h = p.inner_product ? T(0) : sum[i] * factor_of(r, i);
      T* o = out + i * stride + f * PW;
      const idx n = min_of(PW, p.D - f * PW);
      for (idx d = 0; d < n; d++) o[d] += product[d] - h * x[d];
    }
}

// dK_j -= (sum_i H_ij) k_j, when all queries of the pair have been met.
template <class T>
void subtract_key_terms(const SweepSetup<T>& g, const Block<T>& b, const T* columns) {
  T* out = view_of(g.t.dk, g.p.k_index[b.pair], g.p.M);
  const T* r = b.k_r(g);
  for (idx j = g.t.share.key0; j < g.t.share.key1; j++) {
    const T *sums = columns + (j - g.t.share.key0) * Lanes<T>::W, *x = b.k(g.p, j);
    const T h = sum_lanes<T>(load(sums)) * factor_of(r, j);
    T* o = out + j * g.t.dk.row_stride;
    for (idx d = 0; d < g.p.D; d++) o[d] -= h * x[d];
  }
}

}  // namespace cacr::CACR_ISA
