// The general op: statistics, and their backward.
#include "sweeps.h"

namespace cacr {

template <class T>
void contrast_forward(const Contrast<T>& problem, const Statistics<T>& statistics, const Parallel& parallel) {
  Engine<T> e(problem, parallel);
  const int64_t n = e.threads();
  e.allocate_packed(false);
  parallel_for(parallel, n, [&](int64_t i) { e.pack(i, n); });
  e.find_bound();
  forward_sweep(e, statistics, n);
}

template <class T>
void contrast_backward(const Contrast<T>& problem, const RowGradients<T>& rows, T* dq, T* dk, T* variance,
                       const Parallel& parallel) {
  Engine<T> e(problem, parallel);
  const int64_t n = e.threads();
  e.allocate_packed(dq != nullptr);
  parallel_for(parallel, n, [&](int64_t i) { e.pack(i, n); });
  e.find_bound();
  backward_sweep(e, rows, dq, dk, variance, false, n);
}

template void contrast_forward(const Contrast<float>&, const Statistics<float>&, const Parallel&);
template void contrast_forward(const Contrast<double>&, const Statistics<double>&, const Parallel&);
template void contrast_backward(const Contrast<float>&, const RowGradients<float>&, float*, float*, float*,
                                const Parallel&);
template void contrast_backward(const Contrast<double>&, const RowGradients<double>&, double*, double*, double*,
                                const Parallel&);

}  // namespace cacr
