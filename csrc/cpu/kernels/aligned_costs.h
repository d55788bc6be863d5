// Costs between views of the same instances, c[v][u][b] = |q_vb - k_ub|^2 by form differences, and their gradients.
//
// What ``aligned.h`` does in one go for the loss of views, for losses that have other uses for the costs: a queue,
// momentum keys, one value per query. W instances go through together, one per lane. O(V U B D) operations.
#pragma once

#include "pack.h"

namespace cacr::CACR_ISA {

// kRaw: rows are scaled by their inverse lengths.
template <class T, bool kRaw>
struct AlignedCosts {
  static constexpr idx W = Lanes<T>::W;
  const AlignedCostParams<T>& t;

  const T* q(idx v, idx b) const { return t.q + (v * t.B + b) * t.D; }
  const T* k(idx u, idx b) const { return t.k + (u * t.B + b) * t.D; }
  RowPair<T, kRaw> rows(idx v, idx u, idx b) const {
    return {q(v, b), k(u, b), kRaw ? t.q_r[v * t.B + b] : T(1), kRaw ? t.k_r[u * t.B + b] : T(1)};
  }
  idx at(idx v, idx u, idx b) const { return (v * t.U + u) * t.B + b; }

  // ---- forward -----------------------------------------------------------------------------------------------------
  void costs() const {
    for (idx b = t.b0; b < t.b1; b += W) {
      const idx n = min_of(W, t.b1 - b);
      for (idx v = 0; v < t.V; v++)
        for (idx u = 0; u < (t.same ? v : t.U); u++) {
          const Vec<T> c = distances(v, u, b, n);
          for (idx l = 0; l < n; l++) t.cost[at(v, u, b + l)] = c[l];
          for (idx l = 0; t.same && l < n; l++) t.cost[at(u, v, b + l)] = c[l];
        }
      for (idx v = 0; t.same && v < t.V; v++)
        for (idx l = 0; l < n; l++) t.cost[at(v, v, b + l)] = 0;
    }
  }

  // |q_v - k_u|^2 of instances b, b + 1, ..., one per lane, 0 from the n-th on
  Vec<T> distances(idx v, idx u, idx b, idx n) const {
    return lane_sums<T>(n, [&](idx l) { return rows(v, u, b + l).squares(t.D); });
  }

  // ---- backward ----------------------------------------------------------------------------------------------------
  // dq_v = sum_u 2 g_vu (q_v - k_u), dk_u = sum_v -2 g_vu (q_v - k_u); the sum of both where they are the same rows.
  void gradients() const {
    const T* g = t.grad;
    for (idx b = t.b0; b < t.b1; b++) {
      for (idx v = 0; v < t.V && t.dq; v++)
        add_up(
            t.U, t.dq + (v * t.B + b) * t.D, [&](idx u) { return rows(v, u, b); },
            [&](idx u) { return t.same ? 2 * (g[at(v, u, b)] + g[at(u, v, b)]) : 2 * g[at(v, u, b)]; });
      for (idx u = 0; u < t.U && t.dk; u++)
        add_up(
            t.V, t.dk + (u * t.B + b) * t.D, [&](idx v) { return rows(v, u, b); },
            [&](idx v) { return -2 * g[at(v, u, b)]; });
    }
  }

  // out[:] = sum_i factor(i) (difference of the rows of pair i)
  template <class Rows, class Factor>
  void add_up(idx count, T* out, Rows pair, Factor factor) const {
    idx d = 0;
    for (; d + 4 * W <= t.D; d += 4 * W) add_up<4>(count, out + d, d, pair, factor);
    for (; d + W <= t.D; d += W) add_up<1>(count, out + d, d, pair, factor);
    for (; d < t.D; d++) {
      T sum = 0;
      for (idx i = 0; i < count; i++) sum += factor(i) * pair(i).one(d);
      out[d] = sum;
    }
  }
  template <int N, class Rows, class Factor>
  void add_up(idx count, T* out, idx d, Rows pair, Factor factor) const {  // features [d, d + N W)
    Vec<T> sum[N] = {};
    for (idx i = 0; i < count; i++) {
      const RowPair<T, kRaw> x = pair(i);
      const T f = factor(i);
      for (int j = 0; j < N; j++) sum[j] += f * x.at(d + j * W);
    }
    for (int j = 0; j < N; j++) store<T>(out + j * W, sum[j]);
  }
};

template <class T>
void aligned_costs(const AlignedCostParams<T>& params) {
  const auto run = [&](const auto& costs) { params.cost ? costs.costs() : costs.gradients(); };
  if (params.q_r)
    run(AlignedCosts<T, true>{params});
  else
    run(AlignedCosts<T, false>{params});
}

}  // namespace cacr::CACR_ISA
