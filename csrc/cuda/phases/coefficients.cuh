// The phase between forward and backward: dL/du of every row as a function of u, given dL/dF and dL/dlse.
// Derivatives: cacr_kernels/reference.py.
#pragma once

#include "../../common/pairs.h"
#include "../grid.cuh"
#include "../tile/softmax.cuh"

namespace cacr {

// dL/dF and dL/dlse of one row and softmax.
struct Incoming {
  double value, lse;
};

template <class Params>
CACR_DEVICE Incoming incoming_gradient(const Params& p, int s, int64_t pair, int64_t row) {
  if (p.fused.on) {
    const double beta = number(p.fused.beta);
    if (!p.fused.rbf) return {mean_weight(-beta, p.pairs, p.N), 0};
    // Of log sum_b exp(lse_1 - lse_0); log_weight: of this row in that sum.
    const double log_weight = p.lse[row_of(p, 1, row)] - p.lse[row_of(p, 0, row)] - p.fused.pair_log_sum[pair];
    return {0, (s ? beta : -beta) / p.pairs * exp(log_weight)};
  }
  const int64_t at = row_of(p, s, row);
  return {p.grad_value[at], p.grad_lse[at]};
}

// A bound of |dL/du| over all u: e |d| <= 1 / (e ln 2 |slope|) whatever d is.
CACR_DEVICE double gradient_bound(const RowCoefficients& g, double delta, double slope) {
  const double reach = slope == 0 || g.b == 0 ? 0 : 0.5308 / fabs(slope) + fabs(delta);
  return fabs(g.a) + fabs(g.b) * reach;
}

// Writes the coefficients of one row of a pair and gives a bound of its |dL/du|.
template <class Acc, class Params>
CACR_DEVICE double write_coefficients(const Params& p, int64_t pair, int64_t row) {
  const int64_t rows = p.pairs * p.N;
  RowCoefficients g[kMaxSoftmaxes] = {};
  double gradient_sum = 0, bound = 0, sum[kMaxSoftmaxes] = {};
#pragma unroll
  for (int s = 0; s < kMaxSoftmaxes; s++) {
    if (s >= p.softmaxes) continue;
    const Incoming in = incoming_gradient(p, s, pair, row);
    sum[s] = p.sum[row_of(p, s, row)];
    const Normaliser normaliser(1, sum[s]);
    if (sum[s] != 0) g[s] = row_coefficients(normaliser, in.value, in.lse, number(p.tau[s]), p.detach_weights);
    gradient_sum += g[s].sum;
    bound += gradient_bound(g[s], p.delta[row_of(p, s, row)], slope_of<Acc>(p, s));
  }
  const bool cancels = p.cancelling && sum[1] != 0;
  CancellingCoefficients both{0, 0};
  if (cancels && sum[0] != 0) both = cancelling_coefficients({1, sum[0]}, {1, sum[1]}, gradient_sum);
  if (cancels) g[0].a = both.first_a;
#pragma unroll
  for (int s = 0; s < kMaxSoftmaxes; s++) {
    if (s >= p.softmaxes) continue;
    const int64_t at = row_of(p, s, row);
    p.coefficients[s * rows + row] = {Acc(p.top[at]), Acc(p.delta[at]), Acc(g[s].a), Acc(g[s].b)};
  }
  p.gradient_sum[row] = Acc(gradient_sum);
  p.ratio[row] = Acc(both.ratio);
  return bound;
}

// Where the largest numbers of each kind stand in p.bounds.
enum Bound : int { kOfGradients, kOfQueries, kOfKeys };

// The largest of a block's threads.
template <class Params>
CACR_DEVICE void write_bound(const Params& p, Reduction& reduction, Bound kind, double bound) {
  bound = block_max(reduction, bound);
  if (threadIdx.x == 0) p.bounds[int(kind * gridDim.x + blockIdx.x)] = float(fmin(bound, 1e38));
}

// The largest of all blocks.
template <class Params>
CACR_DEVICE double read_bound(const Params& p, Reduction& reduction, Bound kind) {
  const float* const bounds = p.bounds + kind * int(gridDim.x);
  double bound = 0;
  for (int b = threadIdx.x; b < int(gridDim.x); b += kThreads) bound = fmax(bound, double(bounds[b]));
  return block_max(reduction, bound);
}

// Of the rows of this thread.
template <class Acc>
CACR_DEVICE double largest_factor(const Acc* factor, int64_t rows) {
  double largest = 0;
  const GridStride threads = GridStride::of_thread();
  for (int64_t i = threads.first; i < rows; i += threads.step) largest = fmax(largest, double(factor[i]));
  return largest;
}

template <class Arithmetic>
CACR_DEVICE void coefficients_phase(const ParametersOf<Arithmetic>& p, Reduction& reduction) {
  double bound = 0;
  const GridStride threads = GridStride::of_thread();
  for (int64_t row = threads.first; row < p.pairs * p.N; row += threads.step)
    bound = fmax(bound, write_coefficients<typename Arithmetic::Acc>(p, row / p.N, row));
  if constexpr (Arithmetic::kScaled) {
    write_bound(p, reduction, kOfGradients, bound);
    if (!p.normalize) return;
    write_bound(p, reduction, kOfQueries, largest_factor(p.q_factor, p.q_views * p.N));
    write_bound(p, reduction, kOfKeys, largest_factor(p.k_factor, p.k_views * p.M));
  }
}

// The power of two that brings what multiplies the rows on the other side close to the end of the range of float16: the
// largest dL/du, with normalize times the largest of their factors.
template <class Params>
CACR_DEVICE float gradient_scale(const Params& p, Reduction& reduction, bool others_are_queries) {
  double bound = read_bound(p, reduction, kOfGradients);
  if (p.normalize) {
    const double factor = read_bound(p, reduction, others_are_queries ? kOfQueries : kOfKeys);
    if (factor > 0) bound *= factor;  // or all rows are zeros
  }
  const double exponent = bound > 0 ? fmin(fmax(13 - ceil(log2(bound)), -100.0), 100.0) : 0.0;
  return float(exp2(exponent));
}

}  // namespace cacr
