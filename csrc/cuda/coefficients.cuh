// The phase between forward and backward: dL/du of every row as a function of u.
#pragma once

#include "softmax.cuh"

namespace cacr {

// dL/dF and dL/dlse of one row and softmax.
struct Incoming {
  double value, lse;
};

template <class P>
CACR_DEVICE Incoming incoming_gradient(const P& p, int s, int64_t pair, int64_t row) {
  if (p.fused.on) {
    const double beta = number(p.fused.beta);
    if (!p.fused.rbf) return {-beta / (double(p.pairs) * double(p.N)), 0};
    const double log_share = p.lse[row_of(p, 1, row)] - p.lse[row_of(p, 0, row)] - p.fused.pair_log_sum[pair];
    return {0, (s ? beta : -beta) / p.pairs * exp(log_share)};  // d log sum_b exp(lse_1 - lse_0)
  }
  const int64_t at = row_of(p, s, row);
  return {p.grad_value[at], p.detach_weights ? 0 : p.grad_lse[at]};
}

// The largest |dL/du| that coefficients can give: e |d| <= 1 / (e ln 2 |slope|) whatever d is.
CACR_DEVICE double gradient_bound(const RowGradient& g, double delta, double slope) {
  const double reach = slope == 0 || g.b == 0 ? 0 : 0.5308 / fabs(slope) + fabs(delta);
  return fabs(g.a) + fabs(g.b) * reach;
}

template <class Acc, class P>
CACR_DEVICE double write_coefficients(const P& p, int64_t pair, int64_t row) {
  const int64_t rows = p.pairs * p.N;
  RowGradient g[kMaxSoftmaxes] = {};
  double known = 0, bound = 0, sum[kMaxSoftmaxes] = {};
#pragma unroll
  for (int s = 0; s < kMaxSoftmaxes; s++) {
    if (s >= p.softmaxes) continue;
    const Incoming in = incoming_gradient(p, s, pair, row);
    sum[s] = p.sum[row_of(p, s, row)];
    g[s] = row_gradient(sum[s], in.value, in.lse, p.detach_weights ? 0 : number(p.tau[s]));
    known += g[s].constant;
    bound += gradient_bound(g[s], p.delta[row_of(p, s, row)], slope_of<Acc>(p, s));
  }
  // What the two rounded coefficients would lose: c_0 w_0 + c_1 w_1 = (c_0 + c_1) w_0 + c_1 (w_1 - w_0)
  const bool cancels = p.cancelling && sum[1] != 0;
  if (cancels) g[0].a = sum[0] == 0 ? 0 : known / sum[0];
#pragma unroll
  for (int s = 0; s < kMaxSoftmaxes; s++) {
    if (s >= p.softmaxes) continue;
    const int64_t at = row_of(p, s, row);
    p.coefficients[s * rows + row] = {Acc(p.top[at]), Acc(p.delta[at]), Acc(g[s].a), Acc(g[s].b)};
  }
  p.known_sum[row] = Acc(known);
  p.ratio[row] = cancels && sum[0] != 0 ? Acc(sum[1] / sum[0]) : Acc(0);
  return bound;
}

template <class A, class P>
CACR_DEVICE void coefficients_phase(const P& p, SharedArray<double, kThreads / 32>& reduction) {
  using Acc = typename A::Acc;
  const int64_t rows = p.pairs * p.N;
  double bound = 0;
  for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < rows; row += int64_t(gridDim.x) * kThreads)
    bound = fmax(bound, write_coefficients<Acc>(p, row / p.N, row));
  if constexpr (A::kScaled) {
    bound = block_max(reduction, bound);
    if (threadIdx.x == 0) p.bounds[blockIdx.x] = float(fmin(bound, 1e38));
  }
}

// The power of two that brings the largest dL/du close to the end of the range of float16.
template <class P>
CACR_DEVICE float gradient_scale(const P& p, SharedArray<double, kThreads / 32>& reduction) {
  double bound = 0;
  for (int b = threadIdx.x; b < int(gridDim.x); b += kThreads) bound = fmax(bound, double(p.bounds[b]));
  bound = block_max(reduction, bound);
  const double exponent = bound > 0 ? fmin(fmax(13 - ceil(log2(bound)), -100.0), 100.0) : 0.0;
  return float(exp2(exponent));
}

}  // namespace cacr
