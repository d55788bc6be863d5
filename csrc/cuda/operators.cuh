// The operators as plans: which phases run, and which launch computes which pairs. What they compute:
// cacr_kernels/reference.py.
#pragma once

#include "call.h"
#include "plan.cuh"

namespace cacr {

constexpr uint32_t phase_bit(Phase phase) { return 1u << phase; }

// Fills in what follows from the kinds, and from where the rows lie.
template <class Params>
void derive(Params& p) {
  bool any_positive = false, all = false;
  for (int s = 0; s < p.softmaxes; s++) {
    p.positive[s] = is_same(p.kind[s]);
    any_positive |= p.positive[s], all |= p.kind[s] == kAll;
  }
  p.positives = any_positive && !all;  // a softmax over all keys reads the same entries of a tile
  for (int s = 0; s < p.softmaxes; s++) p.positive[s] &= p.positives;
  p.cancelling = p.softmaxes == 2 && p.kind[0] == p.kind[1];
  auto at_16 = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  p.aligned_16 = p.D * int64_t(sizeof(*p.q)) % 16 == 0 && at_16(p.q) && at_16(p.k);
}

// q_index, k_index: of all pairs of the operator.
template <class Params>
void set_pairs(Params& p, const int64_t* q_index, const int64_t* k_index, int64_t first, int64_t count) {
  p.first_pair = first, p.pairs = int32_t(count);
  for (int64_t i = 0; i < count; i++) {
    p.q_index[i] = int32_t(q_index[first + i]), p.k_index[i] = int32_t(k_index[first + i]);
  }
}

// What forward and backward of contrast have in common.
template <class Params>
Params contrast_parameters(const Call& c) {
  Params p{};
  p.q = static_cast<decltype(p.q)>(c.q), p.k = static_cast<decltype(p.k)>(c.k);
  p.N = c.N, p.M = c.M, p.D = c.D;
  p.q_views = int32_t(c.q_views), p.k_views = int32_t(c.k_views), p.all_pairs = c.pairs;
  p.softmaxes = c.softmaxes, p.q_id = c.q_id, p.k_id = c.k_id, p.q_self = c.q_self;
  for (int s = 0; s < c.softmaxes; s++) p.kind[s] = c.kind[s], p.tau[s] = {c.tau + s, nullptr, 1};
  p.keys_are_queries = c.keys_are_queries, p.inner_product = c.inner_product, p.detach_weights = c.detach_weights;
  p.normalize = c.normalize;
  const int64_t rows = c.softmaxes * c.pairs * c.N;
  p.value = c.value, p.lse = c.lse;
  p.top = c.row_state, p.sum = c.row_state + rows, p.delta = c.row_state + 2 * rows;
  return p;
}

// contrast and its backward, kMaxPairs pairs in a launch.
template <class Arithmetic>
cudaError_t run_contrast(const Call& c, cudaStream_t stream, const Allocator& memory) {
  using Acc = typename Arithmetic::Acc;
  PlanOf<Arithmetic> plan{contrast_parameters<ParametersOf<Arithmetic>>(c), 1};
  ParametersOf<Arithmetic>& p = plan.p;
  if (c.operation == Operation::kForward) {
    p.phases = phase_bit(kNorms) | phase_bit(kStatistics) | phase_bit(kFinish);
  } else {
    p.phases = phase_bit(kNorms) | phase_bit(kCoefficients) | phase_bit(kGradients) | phase_bit(kSums);
    p.grad_value = c.grad_value, p.grad_lse = c.grad_lse;
    p.grad_q = static_cast<Acc*>(c.grad_q), p.grad_k = static_cast<Acc*>(c.grad_k), p.grad_tau = c.grad_tau;
    p.want_q = c.grad_q, p.want_k = c.grad_k, p.want_variance = c.grad_tau && !c.detach_weights;
    if (c.grad_tau) p.phases |= phase_bit(kTotals);
  }
  derive(p);
  for (int64_t first = 0; first == 0 || first < c.pairs; first += kMaxPairs) {
    set_pairs(p, c.q_index, c.k_index, first, std::min<int64_t>(kMaxPairs, c.pairs - first));
    p.accumulate = first > 0, p.to_raw_rows = c.normalize && first + kMaxPairs >= c.pairs;
    if (const cudaError_t error = run_plan<Arithmetic>(plan, stream, memory)) return error;
  }
  return cudaSuccess;
}

// Numbers of the fused loss, from the device or as given.
inline void set_numbers(const Call& c, Number (&tau)[kMaxSoftmaxes], FusedLoss& f) {
  auto number = [&](int i) {
    return c.numbers ? Number{c.numbers + i, nullptr, 1} : Number{nullptr, nullptr, c.given[i]};
  };
  f.tau_pos = number(0), f.alpha = number(2), f.beta = number(3);
  tau[0] = number(1), tau[0].factor *= -1;
  tau[1] = c.numbers ? Number{c.numbers + 1, c.numbers + 4, -1} : Number{nullptr, nullptr, -c.given[1] - c.given[4]};
}

// cacr: the loss and its gradients, at most kMaxPairs pairs.
template <class Arithmetic>
cudaError_t run_loss(const Call& c, cudaStream_t stream, const Allocator& memory) {
  const int64_t V = c.q_views, B = c.N;
  const bool pooled = c.pairing == Pairing::kPooled;
  PlanOf<Arithmetic> plan{{}, 1};
  ParametersOf<Arithmetic>& p = plan.p;
  p.q = p.k = static_cast<decltype(p.q)>(c.q), p.D = c.D;
  p.q_views = p.k_views = pooled ? 1 : int32_t(V), p.N = p.M = pooled ? V * B : B;
  const ViewPairs pairs = view_pairs(V, c.pairing);
  const int64_t count = B > 1 ? int64_t(pairs.q_index.size()) : 0;  // one instance has no negatives
  set_pairs(p, pairs.q_index.data(), pairs.k_index.data(), 0, count);
  p.all_pairs = p.pairs, p.period = int32_t(B), p.keys_are_queries = true;
  p.normalize = p.to_raw_rows = c.normalize;
  p.softmaxes = c.rbf ? 2 : 1, p.kind[0] = p.kind[1] = kOther;
  set_numbers(c, p.tau, p.fused);
  p.fused.on = true, p.fused.rbf = c.rbf, p.fused.views = V, p.fused.batch = B;
  p.fused.loss = c.loss, p.fused.parts = c.parts, p.fused.grad_numbers = c.grad_numbers;
  p.grad_q = static_cast<decltype(p.grad_q)>(c.grad_q);
  p.want_q = c.grad_q, p.want_variance = c.grad_numbers && !c.rbf;
  p.phases = phase_bit(kNorms) | phase_bit(kStatistics) | phase_bit(kFinish) | phase_bit(kSums) | phase_bit(kTotals);
  if (c.rbf) p.phases |= phase_bit(kPairSums);
  if (p.want_q || p.want_variance) p.phases |= phase_bit(kCoefficients) | phase_bit(kGradients);
  derive(p);
  return run_plan<Arithmetic>(plan, stream, memory);
}

template <class Arithmetic>
cudaError_t run_call(const Call& c, cudaStream_t stream, const Allocator& memory) {
  if (c.operation == Operation::kProbe) {
    int blocks = 0;
    return count_resident_blocks<Arithmetic>(&blocks);
  }
  return c.operation == Operation::kLoss ? run_loss<Arithmetic>(c, stream, memory)
                                         : run_contrast<Arithmetic>(c, stream, memory);
}

}  // namespace cacr
