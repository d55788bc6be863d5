// The operators as plans: which phases, and which launch computes which pairs.
#pragma once

#include <vector>

#include "call.h"
#include "plan.cuh"

namespace cacr {

constexpr uint32_t phase_bit(Phase phase) { return 1u << phase; }

// Fills in what follows from the kinds, and from where the rows lie.
template <class P>
void describe(P& p) {
  bool any_positive = false, all = false;
  for (int s = 0; s < p.softmaxes; s++) {
    p.positive[s] = p.kind[s] == kSame || p.kind[s] == kSameNotSelf;
    any_positive |= p.positive[s], all |= p.kind[s] == kAll;
  }
  p.positives = any_positive && !all;  // a softmax over all keys reads the same entries
  for (int s = 0; s < p.softmaxes; s++) p.positive[s] &= p.positives;
  p.cancelling = p.softmaxes == 2 && p.kind[0] == p.kind[1];
  auto at_16 = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  p.aligned = p.D * int64_t(sizeof(*p.q)) % 16 == 0 && at_16(p.q) && at_16(p.k);
}

template <class P>
void set_pairs(P& p, const int64_t* q_index, const int64_t* k_index, int64_t first, int64_t count) {
  p.first_pair = first, p.pairs = int32_t(count);
  for (int64_t i = 0; i < count; i++) {
    p.q_index[i] = int32_t(q_index[first + i]), p.k_index[i] = int32_t(k_index[first + i]);
  }
}

// What forward and backward have in common.
template <class P>
P problem_of(const Call& c) {
  P p{};
  p.q = static_cast<decltype(p.q)>(c.q), p.k = static_cast<decltype(p.k)>(c.k);
  p.N = c.N, p.M = c.M, p.D = c.D;
  p.q_views = int32_t(c.q_views), p.k_views = int32_t(c.k_views), p.all_pairs = c.pairs;
  p.softmaxes = c.softmaxes, p.q_id = c.q_id, p.k_id = c.k_id;
  for (int s = 0; s < c.softmaxes; s++) p.kind[s] = c.kind[s], p.tau[s] = {c.tau + s, nullptr, 1};
  p.own = c.own, p.inner = c.inner, p.detach_weights = c.detach_weights;
  const int64_t rows = c.softmaxes * c.pairs * c.N;
  p.value = c.value, p.lse = c.lse, p.top = c.weights, p.sum = c.weights + rows, p.delta = c.weights + 2 * rows;
  return p;
}

// Forward and backward, kMaxPairs pairs in a launch.
template <class A>
cudaError_t run_contrast(const Call& c, cudaStream_t stream, const Allocator& memory) {
  using Acc = typename A::Acc;
  using P = Parameters<typename A::Element, Acc>;
  Plan<typename A::Element, Acc> plan{problem_of<P>(c), 1};
  P& p = plan.p;
  if (c.operation == Operation::kForward) {
    p.phases = phase_bit(kNorms) | phase_bit(kStatistics) | phase_bit(kFinish);
  } else {
    p.phases = phase_bit(kNorms) | phase_bit(kCoefficients) | phase_bit(kGradients) | phase_bit(kSums);
    p.grad_value = c.grad_value, p.grad_lse = c.grad_lse;
    p.grad_q = static_cast<Acc*>(c.grad_q), p.grad_k = static_cast<Acc*>(c.grad_k), p.grad_tau = c.grad_tau;
    p.want_q = c.grad_q, p.want_k = c.grad_k, p.want_moment = c.grad_tau && !c.detach_weights;
    if (c.grad_tau) p.phases |= phase_bit(kTotals);
  }
  describe(p);
  for (int64_t first = 0; first == 0 || first < c.pairs; first += kMaxPairs) {
    set_pairs(p, c.q_index, c.k_index, first, std::min<int64_t>(kMaxPairs, c.pairs - first));
    p.accumulate = first > 0;
    if (const cudaError_t error = run_plan<A>(plan, stream, memory)) return error;
  }
  return cudaSuccess;
}

// Pairs (x, y) of views whose rows are queries and negatives.
inline void view_pairs(int64_t views, int32_t pairing, std::vector<int64_t>& x, std::vector<int64_t>& y) {
  for (int64_t i = 0; i < views; i++)
    for (int64_t j = pairing == 1 ? 0 : i + 1; j < views; j++)
      if (i != j) x.push_back(i), y.push_back(j);
}

// cacr_loss: at most kMaxPairs pairs.
template <class A>
cudaError_t run_loss(const Call& c, cudaStream_t stream, const Allocator& memory) {
  using Acc = typename A::Acc;
  using P = Parameters<typename A::Element, Acc>;
  const int64_t V = c.q_views, B = c.N;
  const bool pooled = c.pairing == 2;
  Plan<typename A::Element, Acc> plan{{}, 1};
  P& p = plan.p;
  p.q = p.k = static_cast<decltype(p.q)>(c.q), p.D = c.D;
  p.q_views = p.k_views = pooled ? 1 : int32_t(V), p.N = p.M = pooled ? V * B : B;
  std::vector<int64_t> x, y;
  pooled ? (x = {0}, y = {0}, void()) : view_pairs(V, c.pairing, x, y);
  set_pairs(p, x.data(), y.data(), 0, B > 1 ? int64_t(x.size()) : 0);  // one instance has no negatives
  p.all_pairs = p.pairs, p.period = int32_t(B), p.own = true;
  p.softmaxes = c.rbf ? 2 : 1, p.kind[0] = p.kind[1] = kOther;
  auto from = [&](int i) {
    return c.numbers ? Number{c.numbers + i, nullptr, 1} : Number{nullptr, nullptr, c.given[i]};
  };
  p.fused.tau_pos = from(0), p.fused.alpha = from(2), p.fused.beta = from(3);
  p.tau[0] = from(1), p.tau[0].factor *= -1;
  p.tau[1] = c.numbers ? Number{c.numbers + 1, c.numbers + 4, -1} : Number{nullptr, nullptr, -c.given[1] - c.given[4]};
  p.fused.on = true, p.fused.rbf = c.rbf, p.fused.views = V, p.fused.batch = B;
  p.fused.loss = c.loss, p.fused.parts = c.parts, p.fused.grad_numbers = c.grad_numbers;
  p.grad_q = static_cast<Acc*>(c.grad_q), p.want_q = c.grad_q, p.want_moment = c.grad_numbers && !c.rbf;
  p.phases = phase_bit(kNorms) | phase_bit(kStatistics) | phase_bit(kFinish) | phase_bit(kSums) | phase_bit(kTotals);
  if (c.rbf) p.phases |= phase_bit(kPairSums);
  if (p.want_q || p.want_moment) p.phases |= phase_bit(kCoefficients) | phase_bit(kGradients);
  describe(p);
  return run_plan<A>(plan, stream, memory);
}

template <class A>
cudaError_t run_call(const Call& c, cudaStream_t stream, const Allocator& memory) {
  if (c.operation == Operation::kProbe) return probe<A>();
  return c.operation == Operation::kLoss ? run_loss<A>(c, stream, memory) : run_contrast<A>(c, stream, memory);
}

}  // namespace cacr
