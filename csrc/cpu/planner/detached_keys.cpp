// The operator detached_keys: queries and, where these are few, keys are shared out over the threads.
#include "detached_keys.h"

namespace cacr {

template <class T>
void detached_keys(const Contrast<T>& problem, const DetachedStatistics<T>& out, const Parallel& parallel) {
  DetachedKeysPlan<T>(problem, out, parallel, kernels<T>()).run();
}

template void detached_keys(const Contrast<float>&, const DetachedStatistics<float>&, const Parallel&);
template void detached_keys(const Contrast<double>&, const DetachedStatistics<double>&, const Parallel&);

}  // namespace cacr
