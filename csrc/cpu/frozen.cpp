// Keys without a gradient: queries and, where these are few, keys are shared out over the threads.
#include "frozen_plan.h"

namespace cacr {

template <class T>
void contrast_frozen(const Contrast<T>& problem, const FrozenStatistics<T>& out, const Parallel& parallel) {
  FrozenPlan<T>(problem, out, parallel, kernels<T>()).run();
}

template void contrast_frozen(const Contrast<float>&, const FrozenStatistics<float>&, const Parallel&);
template void contrast_frozen(const Contrast<double>&, const FrozenStatistics<double>&, const Parallel&);

}  // namespace cacr
