// The kernel: phases first ... last of those a launch asks for, with barriers of the grid between them.
//
// Launched cooperatively it runs all of them at once; where the grid cannot be resident as a whole, no barrier can be
// waited in, and each phase is a launch of its own (plan.cuh): 3 of contrast, 4 or 5 of its backward, up to 8 of the
// fused loss. Grids of any size work: every phase is a loop over its units.
#pragma once

#include "launch.cuh"
#include "phases/gradients.cuh"
#include "phases/norms.cuh"
#include "phases/statistics.cuh"
#include "phases/sums.cuh"

namespace cacr {

template <class Element, class Acc>
struct Job {
  Parameters<Element, Acc> p;
  int32_t first, last;
};

template <class Arithmetic>
using JobOf = Job<typename Arithmetic::Element, typename Arithmetic::Acc>;

template <class Arithmetic>
CACR_DEVICE void run_phase(int phase, const ParametersOf<Arithmetic>& p, BuffersOf<Arithmetic>& shared) {
  switch (phase) {
    case kNorms:
      norms_phase(p);
      break;
    case kStatistics:
      statistics_phase<Arithmetic>(p, shared);
      break;
    case kFinish:
      finish_phase(p);
      if (p.fused.on) attraction_phase(p);
      break;
    case kPairSums:
      pair_sums_phase(p, shared.reduction);
      break;
    case kCoefficients:
      coefficients_phase<Arithmetic>(p, shared.reduction);
      break;
    case kGradients:
      gradients_phase<Arithmetic>(p, shared);
      break;
    case kSums:
      sums_phase(p, shared.reduction);
      break;
    case kTotals:
      totals_phase(p, shared.reduction);
      break;
  }
}

// The barrier of the grid between two phases. In float64 it is a function of its own: what it computes beforehand would
// take registers from the phases, which spilled on sm_100.
inline __device__ __noinline__ void grid_sync_apart() { ptx::grid_sync(); }
template <class Acc>
CACR_DEVICE void sync_phases() {
  if constexpr (sizeof(Acc) == sizeof(double))
    grid_sync_apart();
  else
    ptx::grid_sync();
}

template <class Arithmetic>
__global__ void __launch_bounds__(kThreads) run_phases(const __grid_constant__ JobOf<Arithmetic> job) {
  auto& shared = shared_memory<BuffersOf<Arithmetic>>();
  // One register for the phases that are left: the phases themselves need all others.
  uint32_t left = job.p.phases >> job.first << job.first & ((2u << job.last) - 1);
  while (left) {
    run_phase<Arithmetic>(__ffs(int(left)) - 1, job.p, shared);
    left &= left - 1;
    if (left) sync_phases<typename Arithmetic::Acc>();
  }
}

}  // namespace cacr
