// The way forward through a block: sums over its keys, then value and lse of its rows (csrc/common/rows.h).
#pragma once

#include "block.h"
#include "coefficients.h"

namespace cacr::CACR_ISA {

template <class T>
void start_rows(const SoftmaxRows<T>& r, idx n) {
  zero(r.sum, n), zero(r.sum_d, n);
  for (idx i = 0; i < n; i++) r.top[i] = -kHuge<T>;
}

// Adds keys of a tile to the sums of one panel.
template <class T>
void add_keys(const SweepSetup<T>& g, TileKeys keys, const T* S, int s, const SoftmaxRows<T>& rows,
              const TileIds<T>& ids, bool masked) {
  auto add = [&](auto bounded, auto mask) {
    if constexpr (mask.value)
      if (g.holes) return add_statistics<T, bounded.value, true, true>(keys, S, g.slope[s], rows, g.p.kind[s], ids);
    add_statistics<T, bounded.value, mask.value, false>(keys, S, g.slope[s], rows, g.p.kind[s], ids);
  };
  with_flags(add, g.t.bounded, masked);
}

template <class T>
void accumulate_statistics(const SweepSetup<T>& g, const Block<T>& b, const BlockScratch<T>& scratch,
                           const BlockRows<T>& rows, const T* S, Keys keys) {
  constexpr idx PW = kPanel<T>;
  for (idx i = 0; i < b.panels; i++)
    for_parts(g, b.row0 + i * PW, keys, tile_ids(g, b, scratch, i, keys.j0), scratch.lists, [&](const Part& part) {
      const T* at = S + (i * g.t.blocking.keys + part.first - keys.j0) * PW;
      const TileIds<T> ids = tile_ids(g, b, scratch, i, part.first);
      const Active active = Active::of(g, part);
      for (int x = 0; x < active.count; x++) {
        const int s = active.softmax[x];
        add_keys(g, part.keys, at, s, rows.softmax[s].from(i * PW), ids, part.masked);
      }
    });
}

// Statistics of the rows, and in one sweep with the way back also their coefficients.
template <class T>
void finish_rows(const SweepSetup<T>& g, const Block<T>& b, const T* q_norm, const BlockRows<T>& rows) {
  const Statistics& out = g.t.statistics;
  for (idx i = 0; i < b.panels * kPanel<T>; i++) {
    RowResult result[kMaxSoftmaxes] = {};
    for (int s = 0; s < g.p.softmaxes; s++) {
      const SoftmaxRows<T>& r = rows.softmax[s];
      const double top_cost = norm_of(g, s, q_norm[i]) - 2 * g.sign(s) * double(r.top[i]);
      const RowResult x = result[s] =
          finish_row(r.sum[i], r.sum_d[i], top_cost, g.p.tau[s], g.slope[s] - g.slope[s] == 0);
      r.delta[i] = T(x.delta);
      if (x.empty) r.top[i] = idle_top(g, s, q_norm[i]);
      if (i >= b.rows) continue;
      const idx at = b.row_index(g.p, s, i);
      out.value[at] = x.value, out.lse[at] = x.lse;
      if (!out.state.top) continue;
      out.state.top[at] = double(r.top[i]), out.state.delta[at] = x.delta, out.state.sum[at] = x.sum;
    }
    if (g.strip()) set_fused_coefficients(g, i, i < b.rows, result, rows);
  }
}

}  // namespace cacr::CACR_ISA
