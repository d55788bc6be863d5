// Attraction: each instance's views against one another, by form differences.
//
// W instances go through together, one per lane: costs [V][V][W], a softmax over u != v in the lanes, then the
// gradients row by row. O(V^2 B D) operations.
#pragma once

#include "sweep.h"

namespace cacr::CACR_ISA {

template <class T>
struct Aligned {
  static constexpr idx W = Lanes<T>::W;
  const AlignedTask<T>& t;
  T *cost, *gradient;  // [V][V][W]; dL/dc_vu

  const T* row(idx v, idx b) const { return t.z + v * t.view_stride + b * t.row_stride; }
  T* at(T* a, idx v, idx u) const { return a + (v * t.V + u) * W; }

  static size_t scratch(idx V) { return 2 * size_t(V * V * W) * sizeof(T) + 128; }

  explicit Aligned(const AlignedTask<T>& task) : t(task) {
    char* p = static_cast<char*>(t.scratch);
    cost = carve<T>(p, t.V * t.V * W);
    gradient = carve<T>(p, t.V * t.V * W);
  }

  void run() {
    for (idx b = t.b0; b < t.b1; b += W) {
      const idx n = min_of(W, t.b1 - b);
      zero(cost, t.V * t.V * W);
      for (idx l = 0; l < n; l++)
        for (idx v = 0; v < t.V; v++)
          for (idx u = 0; u < v; u++)
            at(cost, v, u)[l] = at(cost, u, v)[l] = squared_distance(t.D, row(v, b + l), row(u, b + l));
      for (idx v = 0; v < t.V; v++) weigh(v, b, n);
      if (!t.dz) continue;
      for (idx l = 0; l < n; l++)
        for (idx v = 0; v < t.V; v++) add_gradient(v, b + l, l);
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
    const V top_cost = sign * top;  // everything is measured from the largest exponent, as in softmax.h
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
      store<T>(at(gradient, v, u), scale * w * (tau * d + T(1)));
    }
    for (idx l = 0; l < n; l++) {
      const idx i = v * t.B + b + l;
      t.statistics.value[i] = double(top_cost[l]) + double(delta[l]), t.statistics.variance[i] = variance[l];
      t.statistics.lse[i] = kLn2 * __builtin_log2(double(sum[l])) + t.tau * double(top_cost[l]) + 0 * double(delta[l]);
    }
  }

  void add_gradient(idx v, idx b, idx l) {  // dz_v = sum_u 2 (g_vu + g_uv) (z_v - z_u)
    constexpr int W = Lanes<T>::W;
    const T* x = row(v, b);
    T* out = t.dz + (v * t.B + b) * t.dz_row_stride;
    bool first = true;
    for (idx u = 0; u < t.V; u++) {
      if (u == v) continue;
      const T g = 2 * (at(gradient, v, u)[l] + at(gradient, u, v)[l]);
      const T* y = row(u, b);
      idx d = 0;
      for (; d + W <= t.D; d += W) {
        Vec<T> a = g * (load(x + d) - load(y + d));
        store<T>(out + d, first ? a : load(out + d) + a);
      }
      for (; d < t.D; d++) out[d] = (first ? T(0) : out[d]) + g * (x[d] - y[d]);
      first = false;
    }
  }
};

}  // namespace cacr::CACR_ISA
