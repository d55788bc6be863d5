// The kernel: phases first ... last of those a launch asks for, with barriers of the grid between them.
//
// Launched cooperatively it runs all of them at once; where the grid cannot be resident as a whole, each phase is a
// launch of its own (launcher.cuh). Grids of any size work: every phase is a loop over its units.
#pragma once

#include "gradient.cuh"
#include "launch.cuh"
#include "loss.cuh"
#include "statistics.cuh"

namespace cacr {

template <class Element, class Acc>
struct Job {
  Parameters<Element, Acc> p;
  int32_t first, last;
};

// Gradients of shares, where there is more than one.
template <class P>
CACR_DEVICE void shares_phase(const P& p) {
  using Acc = typename P::Accumulator;
  if (p.shares == 1 || !(p.want_q || p.want_k)) return;
  const int64_t targets = gradient_targets(p);
  for (int64_t v = 0; v < targets; v++) {
    const bool is_key_view = v >= p.q_views;
    if (!(is_key_view ? p.want_k : p.want_q)) continue;
    Acc* const to = is_key_view ? p.grad_k + (v - p.q_views) * p.M * p.D : p.grad_q + v * p.N * p.D;
    add_shares(p, to, v, targets, is_key_view ? p.M : p.N, [&](int64_t row, int64_t d) {
      return p.fused.on ? pull_of_views(p, v, row, d) : Acc(0);
    });
  }
}

template <class A, class P>
CACR_DEVICE void run_phase(int phase, const P& p, Buffers<typename A::Element, typename A::Acc>& shared) {
  switch (phase) {
    case kNorms:
      norms_phase(p);
      if (p.fused.on) aligned_phase(p);
      break;
    case kStatistics:
      statistics_phase<A>(p, shared);
      break;
    case kFinish:
      finish_phase(p);
      break;
    case kPairSums:
      pair_sums_phase(p, shared.reduction);
      break;
    case kCoefficients:
      coefficients_phase<A>(p, shared.reduction);
      break;
    case kGradients:
      gradients_phase<A>(p, shared);
      break;
    case kSums:
      shares_phase(p);
      sums_phase(p, shared.reduction);
      break;
    case kTotals:
      totals_phase(p, shared.reduction);
      break;
  }
}

template <class A>
using JobOf = Job<typename A::Element, typename A::Acc>;

template <class A>
__global__ void __launch_bounds__(kThreads) run_phases(const __grid_constant__ JobOf<A> job) {
  auto& shared = shared_memory<Buffers<typename A::Element, typename A::Acc>>();
  bool begun = false;
  for (int phase = job.first; phase <= job.last; phase++) {
    if (!(job.p.phases >> phase & 1)) continue;
    if (begun) ptx::grid_sync();
    run_phase<A>(phase, job.p, shared);
    begun = true;
  }
}

}  // namespace cacr
