// The general op: statistics, and their backward.
#include "sweeps.h"

namespace cacr {

template <class T>
void contrast_forward(const Contrast<T>& problem, const Statistics& statistics, const Parallel& parallel) {
  Engine<T> e(problem, parallel);
  const int64_t n = e.threads();
  e.allocate_packed(false);
  parallel_for(parallel, n, [&](int64_t i) { e.pack(i, n); });
  e.find_bound();
  forward_sweep(e, statistics, n);
}

template <class T>
void contrast_backward(const Contrast<T>& problem, const RowGradients& rows, T* dq, T* dk, double* dtau,
                       const Parallel& parallel) {
  Engine<T> e(problem, parallel);
  const int64_t n = e.threads();
  e.allocate_packed(dq || dtau);
  parallel_for(parallel, n, [&](int64_t i) { e.pack(i, n); });
  e.find_bound();
  const int64_t per_softmax = problem.pairs * problem.N;
  const bool moments = dtau && !rows.detach_weights;
  double* variance = moments ? e.memory.template zeros<double>(problem.softmaxes * per_softmax) : nullptr;
  if (dq || dk || variance) backward_sweep(e, rows, dq, dk, variance, false, n);
  for (int s = 0; dtau && s < problem.softmaxes; s++) {  // dL/dtau = sum_i gF var_i + glse F_i
    dtau[s] = 0;
    for (int64_t i = s * per_softmax; moments && i < (s + 1) * per_softmax; i++)
      if (rows.sum[i] != 0) dtau[s] += rows.grad_value[i] * variance[i] + rows.grad_lse[i] * rows.value[i];
  }
}

template void contrast_forward(const Contrast<float>&, const Statistics&, const Parallel&);
template void contrast_forward(const Contrast<double>&, const Statistics&, const Parallel&);
template void contrast_backward(const Contrast<float>&, const RowGradients&, float*, float*, double*, const Parallel&);
template void contrast_backward(const Contrast<double>&, const RowGradients&, double*, double*, double*,
                                const Parallel&);

}  // namespace cacr
