// The kernel: phases first ... last of those a launch asks for, with barriers of the grid between them.
//
// Launched cooperatively it runs all of them at once; where the grid cannot be resident as a whole there is nothing to
// wait in, and each phase is a launch of its own (plan.cuh): 3 of contrast, 4 or 5 of its backward, up to 8 of the
// fused loss. Grids of any size work: every phase is a loop over its units.
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

// What the units of the gradients have left: shares to be added up, the attraction.
template <class P>
CACR_DEVICE void complete_phase(const P& p) {
  if (p.want_q && (p.q_units.shares > 1 || p.fused.on))
    complete_gradients(p, p.grad_q, p.q_partial, p.q_units.shares, p.q_views * p.N);
  if (p.want_k && p.k_units.shares > 1) complete_gradients(p, p.grad_k, p.k_partial, p.k_units.shares, p.k_views * p.M);
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
      complete_phase(p);
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
