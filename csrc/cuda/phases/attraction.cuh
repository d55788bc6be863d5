// The attraction of the fused loss: every view of an instance is a query, the other views of that instance its keys.
// Costs are sums of squared differences. A warp per instance, in the phase that finishes rows: norms and factors are
// known there.
//
// Definitions and derivatives: cacr_kernels/reference.py.
#pragma once

#include "../../common/pairs.h"
#include "../grid.cuh"
#include "../tile/softmax.cuh"

namespace cacr {

// Feature d of z_v - z_u of instance b, of unit rows with normalize.
template <class Params>
CACR_DEVICE typename Params::Accumulator view_difference(const Params& p, int64_t v, int64_t u, int64_t b, int64_t d) {
  using Acc = typename Params::Accumulator;
  const int64_t x = v * p.fused.batch + b, y = u * p.fused.batch + b;
  const Acc x_d = widen(p.q[x * p.D + d]), y_d = widen(p.q[y * p.D + d]);
  return p.normalize ? unit_difference(x_d, p.q_factor[x], y_d, p.q_factor[y]) : x_d - y_d;
}

// c_vu of instance b for all pairs of views, by all lanes. cost: [V][V], the diagonal is not written.
template <class Params, class Acc>
CACR_DEVICE void attraction_costs(const Params& p, int64_t b, Acc* cost) {
  const int64_t V = p.fused.views;
  const int lane = threadIdx.x % 32;
  for (int64_t v = 0; v < V; v++) {
    for (int64_t u = 0; u < v; u++) {
      Acc sum = 0;
      for (int64_t d = lane; d < p.D; d += 32) {
        const Acc difference = view_difference(p, v, u, b, d);
        sum += difference * difference;
      }
      sum = warp_sum(sum);
      if (lane == 0) cost[v * V + u] = cost[u * V + v] = sum;
    }
  }
}

// The softmax of view v over the others; dL/dc_vu = w_vu (1 + tau (c_vu - F)) alpha / (V B) goes to `grad_cost`.
// cost, grad_cost: [V] of view v.
template <class Params, class Acc>
CACR_DEVICE void attraction_row(const Params& p, int64_t b, int64_t v, const Acc* cost, Acc* grad_cost) {
  const int64_t V = p.fused.views, B = p.fused.batch, row = v * B + b;
  const double tau = number(p.fused.tau_pos);
  double top = -double(INFINITY), sum = 0, sum_c = 0, variance = 0;
#pragma unroll 1
  for (int64_t u = 0; u < V; u++)
    if (u != v) top = fmax(top, tau * cost[u]);
#pragma unroll 1
  for (int64_t u = 0; u < V; u++) {
    const double e = u == v ? 0 : exp(tau * cost[u] - top);
    sum += e, sum_c += u == v ? 0 : e * cost[u];
  }
  const double value = sum_c / sum, scale = mean_weight(number(p.fused.alpha), V, B);
#pragma unroll 1
  for (int64_t u = 0; u < V; u++) {
    const double w = u == v ? 0 : exp(tau * cost[u] - top) / sum, centred = u == v ? 0 : cost[u] - value;
    variance += w * centred * centred;
    grad_cost[u] = Acc(cost_gradient(scale, w, tau, centred));
  }
  p.fused.row_value[row] = value, p.fused.row_variance[row] = variance;
  p.fused.row_entropy[row] = log(sum) + top - tau * value;
}

template <class Params>
CACR_DEVICE void attraction_phase(const Params& p) {
  using Acc = typename Params::Accumulator;
  const int64_t V = p.fused.views;
  const int lane = threadIdx.x % 32;
  const GridStride warps = GridStride::of_warp();
  for (int64_t b = warps.first; b < p.fused.batch; b += warps.step) {
    Acc* const cost = static_cast<Acc*>(p.fused.cost) + b * V * V;
    Acc* const weight = static_cast<Acc*>(p.fused.attraction_weight) + b * V * V;
    attraction_costs(p, b, cost);
    __syncwarp();
    for (int64_t v = lane; v < V; v += 32) attraction_row(p, b, v, cost + v * V, weight + v * V);
    __syncwarp();
    // c_vu counts in the rows of v and of u: dL/dz_v = sum_u 2 (dL/dc_vu + dL/dc_uv) (z_v - z_u)
    for (int64_t v = lane; v < V; v += 32)
      for (int64_t u = 0; u < v; u++)
        weight[v * V + u] = weight[u * V + v] = 2 * (weight[v * V + u] + weight[u * V + v]);
  }
}

// sum_u a_vu (z_v - z_u) of feature d of instance b, added to the gradient of view v in the phase of the sums.
template <class Params>
CACR_DEVICE typename Params::Accumulator attraction_gradient(const Params& p, int64_t v, int64_t b, int64_t d) {
  using Acc = typename Params::Accumulator;
  const int64_t V = p.fused.views;
  const Acc* weight = static_cast<const Acc*>(p.fused.attraction_weight) + (b * V + v) * V;
  Acc sum = 0;
#pragma unroll 1
  for (int64_t u = 0; u < V; u++) sum += weight[u] * view_difference(p, v, u, b, d);
  return sum;
}

}  // namespace cacr
