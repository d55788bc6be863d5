// dL/du of every row of a block as a function of u: its coefficients a, b (csrc/common/rows.h), from what flows in.
#pragma once

#include "block.h"

namespace cacr::CACR_ISA {

template <class T>
double norm_of(const SweepSetup<T>& g, int s, T q_norm) {
  return g.positive[s] ? 0 : double(q_norm);
}

// The top of a row without weights: exponents in range, or flushed to 0.
template <class T>
T idle_top(const SweepSetup<T>& g, int s, T q_norm) {
  return g.t.bounded ? T(g.sign(s) * norm_of(g, s, q_norm) / 2) : kHuge<T>;
}

// What flows into one row, for each softmax; factor: w = factor e.
struct RowInput {
  double g_value[kMaxSoftmaxes], g_lse[kMaxSoftmaxes], factor[kMaxSoftmaxes];
  bool detach_weights;
};

template <class T>
void set_coefficients(const SweepSetup<T>& g, idx i, const RowInput& in, const BlockRows<T>& rows) {
  double sum = 0;
  for (int s = 0; s < g.p.softmaxes; s++) {
    const SoftmaxRows<T>& r = rows.softmax[s];
    const RowCoefficients c = row_coefficients(in.factor[s], in.g_value[s], in.g_lse[s], g.p.tau[s], in.detach_weights);
    r.a[i] = T(c.a), r.b[i] = T(c.b);
    r.factor[i] = T(in.factor[s]), r.moment[i] = 0, r.ratio[i] = 0;
    sum += c.sum;
  }
  if (g.cancelling && in.factor[1] != 0) {
    const CancellingCoefficients c = cancelling_coefficients(in.factor[0], in.factor[1], sum);
    rows.softmax[0].a[i] = T(c.first_a), rows.softmax[1].ratio[i] = T(c.ratio);
  }
  rows.known_sum[i] = T(sum);
  rows.row_sum[i] = 0;
}

// Of row i, whose statistics are complete.
template <class T>
void set_fused_coefficients(const SweepSetup<T>& g, idx i, bool exists, const RowResult* result,
                            const BlockRows<T>& rows) {
  RowInput in{};
  for (int s = 0; s < g.p.softmaxes; s++) in.factor[s] = result[s].factor;
  if (exists && result[0].lse != -__builtin_inf()) {
    if (g.t.gradient == Gradient::kMeanCost) {
      in.g_value[0] = g.t.scale;
    } else {
      const double f = g.t.scale * __builtin_exp(result[1].lse - result[0].lse);
      in.g_lse[0] = -f, in.g_lse[1] = f;
    }
  }
  set_coefficients(g, i, in, rows);
}

// Of all rows of the block, from what the forward sweep left of them and from the gradients that were given.
template <class T>
void set_given_coefficients(const SweepSetup<T>& g, const Block<T>& b, const T* q_norm, const BlockRows<T>& rows) {
  const BackwardRows& given = g.t.rows;
  for (idx i = 0; i < b.panels * kPanel<T>; i++) {
    RowInput in{};
    in.detach_weights = given.detach_weights;
    for (int s = 0; s < g.p.softmaxes; s++) {
      const idx at = b.row_index(g.p, s, i);
      const SoftmaxRows<T>& r = rows.softmax[s];
      r.top[i] = idle_top(g, s, q_norm[i]), r.delta[i] = 0;
      if (i >= b.rows || given.state.sum[at] == 0) continue;
      r.top[i] = T(given.state.top[at]), r.delta[i] = T(given.state.delta[at]);
      in.factor[s] = 1 / given.state.sum[at];
      in.g_value[s] = given.grad_value[at], in.g_lse[s] = given.grad_lse[at];
    }
    set_coefficients(g, i, in, rows);
  }
}

}  // namespace cacr::CACR_ISA
