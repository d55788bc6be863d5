// Attraction: each instance's views against one another, by form differences.
//
// The formulas are those of cacr_kernels/reference.py (attraction_statistics). W instances go through together, one per
// lane: costs [V][V][W], a softmax over u != v in the lanes, then the gradients row by row. O(V^2 B D) operations.
#pragma once

#include "pack.h"
#include "tiles.h"

namespace cacr::CACR_ISA {

// kRaw: rows are scaled by their inverse lengths.
template <class T, bool kRaw>
struct Aligned {
  static constexpr idx W = Lanes<T>::W;
  const AlignedParams<T>& t;
  T* cost;      // [V][V][W]
  T* gradient;  // [V][V][W] dL/dc_vu

  const T* row(idx v, idx b) const { return t.z + v * t.view_stride + b * t.row_stride; }
  RowPair<T, kRaw> rows(idx v, idx u, idx b) const {
    return {row(v, b), row(u, b), kRaw ? t.r[v * t.B + b] : T(1), kRaw ? t.r[u * t.B + b] : T(1)};
  }
  T* at(T* a, idx v, idx u) const { return a + (v * t.V + u) * W; }

  explicit Aligned(const AlignedParams<T>& params) : t(params) {
    char* p = static_cast<char*>(t.scratch);
    cost = carve<T>(p, t.V * t.V * W);
    gradient = carve<T>(p, t.V * t.V * W);
  }

  void run() {
    for (idx b = t.b0; b < t.b1; b += W) {
      const idx n = min_of(W, t.b1 - b);
      for (idx v = 0; v < t.V; v++)
        for (idx u = 0; u < v; u++) {
          const Vec<T> c = distances(v, u, b, n);
          store<T>(at(cost, v, u), c), store<T>(at(cost, u, v), c);
        }
      for (idx v = 0; v < t.V; v++) weigh(v, b, n);
      if (!t.dz) continue;
      combine();
      for (idx l = 0; l < n; l++) {
        if (t.V == 2) write_two(b + l, at(gradient, 0, 1)[l]);
        for (idx v = 0; v < t.V && t.V > 2; v++) add_gradient(v, b + l, l);
      }
    }
  }

  // softmax_{u != v}(tau c_vu) and dL/dc_vu = scale w (1 + tau (c - F))
  void weigh(idx v, idx b, idx n) {
    using V = Vec<T>;
    const T slope = T(t.tau * kLog2e), tau = T(t.tau), scale = T(t.scale);
    V top = splat<T>(-kHuge<T>), sum{}, sum_d{}, variance{};
    const T sign = slope < 0 ? T(-1) : T(1);
    for (idx u = 0; u < t.V; u++)
      if (u != v) top = max_vec<T>(top, sign * load(at(cost, v, u)));
    const V top_cost = sign * top;  // everything is measured from the largest exponent, as in tiles.h
    for (idx u = 0; u < t.V; u++) {
      if (u == v) continue;
      V d = load(at(cost, v, u)) - top_cost, e = exp2_flushed<T>(slope * d);
      store<T>(at(gradient, v, u), e);
      sum += e, sum_d += e * d;
    }
    const V delta = sum_d / sum + T(0) * tau, inverse = splat<T>(1) / sum;
    for (idx u = 0; u < t.V; u++) {
      if (u == v) continue;
      V d = load(at(cost, v, u)) - top_cost - delta, w = load(at(gradient, v, u)) * inverse;
      variance += w * d * d;
      store<T>(at(gradient, v, u), cost_gradient(scale, w, tau, d));
    }
    for (idx l = 0; l < n; l++) {
      const idx i = v * t.B + b + l;
      t.statistics.value[i] = double(top_cost[l]) + double(delta[l]), t.statistics.variance[i] = variance[l];
      t.statistics.lse[i] = row_lse<LseOrder::kSumFirst>(t.statistics.value[i], sum[l], t.tau, top_cost[l]);
    }
  }

  // |z_v - z_u|^2 of instances b, b + 1, ..., one per lane, 0 from the n-th on
  Vec<T> distances(idx v, idx u, idx b, idx n) const {
    return lane_sums<T>(n, [&](idx l) { return rows(v, u, b + l).squares(t.D); });
  }

  // The coefficients of z_v - z_u: 2 (g_vu + g_uv)
  void combine() const {
    for (idx v = 0; v < t.V; v++)
      for (idx u = 0; u < v; u++) {
        const Vec<T> g = T(2) * (load(at(gradient, v, u)) + load(at(gradient, u, v)));
        store<T>(at(gradient, v, u), g), store<T>(at(gradient, u, v), g);
      }
  }

  // Of two views: z_0 - z_1 serves both, g times.
  void write_two(idx b, T g) const {
    const RowPair<T, kRaw> z = rows(0, 1, b);
    T *const first = t.dz + b * t.dz_row_stride, *const second = first + t.B * t.dz_row_stride;
    idx d = 0;
    for (; d + W <= t.D; d += W) {
      const Vec<T> difference = z.at(d);
      store<T>(first + d, Vec<T>{} + g * difference), store<T>(second + d, Vec<T>{} + -g * difference);
    }
    for (; d < t.D; d++) {
      const T difference = z.one(d);
      first[d] = T(0) + g * difference, second[d] = T(0) + -g * difference;
    }
  }

  void add_gradient(idx v, idx b, idx l) {  // dz_v = sum_u 2 (g_vu + g_uv) (z_v - z_u)
    idx d = 0;
    for (; d + 4 * W <= t.D; d += 4 * W) add_gradient<4>(v, b, l, d);
    for (; d + W <= t.D; d += W) add_gradient<1>(v, b, l, d);
    for (; d < t.D; d++) {
      T sum = 0;
      for (idx u = 0; u < t.V; u++)
        if (u != v) sum += at(gradient, v, u)[l] * rows(v, u, b).one(d);
      t.dz[(v * t.B + b) * t.dz_row_stride + d] = sum;
    }
  }
  template <int N>
  void add_gradient(idx v, idx b, idx l, idx d) {  // features [d, d + N W)
    const T* g = at(gradient, v, 0) + l;
    Vec<T> sum[N] = {};
    for (idx u = 0; u < t.V; u++, g += W) {
      if (u == v) continue;
      const RowPair<T, kRaw> z = rows(v, u, b);
      for (int i = 0; i < N; i++) sum[i] += *g * z.at(d + i * W);
    }
    T* out = t.dz + (v * t.B + b) * t.dz_row_stride + d;
    for (int i = 0; i < N; i++) store<T>(out + i * W, sum[i]);
  }
};

template <class T>
size_t aligned_scratch(idx V) {
  return 2 * size_t(V * V * Lanes<T>::W) * sizeof(T) + 128;
}

template <class T>
void aligned(const AlignedParams<T>& params) {
  params.r ? Aligned<T, true>(params).run() : Aligned<T, false>(params).run();
}

}  // namespace cacr::CACR_ISA
