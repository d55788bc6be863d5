// The operators contrast and contrast_backward: statistics of the rows, and their gradients.
#include <optional>

#include "forward_backward.h"
#include "positives.h"
#include "sums.h"

namespace cacr {

namespace {

// The sweep over all pairs, and what positives add from differences.
template <class T>
void backward(Engine<T>& e, const BackwardRows& rows, const SweepGradients<T>& out, int64_t n) {
  const int s = out.dq || out.dk ? separate_softmax(e.p, rows) : -1;
  std::optional<PositiveGradients<T>> positives;
  // Where exponents are large the weights must be those of the forward, whose costs far apart are products.
  if (s >= 0 && e.bounded) positives.emplace(e.p, rows, s);
  if (!positives || !positives->pays()) return backward_sweep(e, rows, out, n);
  const int64_t per_softmax = e.p.pairs * e.p.N, all = e.p.softmaxes * per_softmax;
  BackwardRows others = rows;
  double *const value = e.memory.template get<double>(all), *const lse = e.memory.template get<double>(all);
  std::copy_n(rows.grad_value, all, value), std::copy_n(rows.grad_lse, all, lse);
  std::fill_n(value + s * per_softmax, per_softmax, 0), std::fill_n(lse + s * per_softmax, per_softmax, 0);
  others.grad_value = value, others.grad_lse = lse;
  const auto none = [all](const double* g) { return std::all_of(g, g + all, [](double x) { return x == 0; }); };
  if (e.bounded && !out.variance && none(value) && none(lse)) {  // bounded: nothing is NaN that has to show
    if (out.dq) std::fill_n(out.dq, e.p.q_views * e.p.N * e.p.D, T(0));
    if (out.dk && !out.shared()) std::fill_n(out.dk, e.p.k_views * e.p.M * e.p.D, T(0));
  } else {
    backward_sweep(e, others, out, n);
  }
  positives->add(e, {out.dq, out.dk, nullptr}, n);
}

}  // namespace

template <class T>
void contrast_forward(const Contrast<T>& problem, const Statistics& statistics, const Parallel& parallel) {
  Engine<T> e(problem, parallel);
  const int64_t n = e.threads();
  prepare(e, false, n);
  forward_sweep(e, statistics, n);
}

template <class T>
void contrast_backward(const Contrast<T>& problem, const BackwardRows& rows, const ContrastGradients<T>& gradients,
                       const Parallel& parallel) {
  Engine<T> e(problem, parallel);
  const int64_t n = e.threads();
  const auto [dq, dk, dtau] = gradients;
  prepare(e, dq || dtau, n);
  const int64_t per_softmax = problem.pairs * problem.N;
  const bool moments = dtau && !rows.detach_weights;
  double* variance = moments ? e.memory.template zeros<double>(problem.softmaxes * per_softmax) : nullptr;
  if (dq || dk || variance) backward(e, rows, {dq, dk, variance, false}, n);
  e.to_raw_rows(dq, dk, n);
  for (int s = 0; dtau && s < problem.softmaxes; s++) {  // dL/dtau = sum_i gF var_i + glse F_i
    const auto row = [&](int64_t i) {
      return rows.state.sum[i] == 0 ? 0 : rows.grad_value[i] * variance[i] + rows.grad_lse[i] * rows.value[i];
    };
    dtau[s] = moments ? sum_rows(s * per_softmax, (s + 1) * per_softmax, row) : 0;
  }
}

template void contrast_forward(const Contrast<float>&, const Statistics&, const Parallel&);
template void contrast_forward(const Contrast<double>&, const Statistics&, const Parallel&);
template void contrast_backward(const Contrast<float>&, const BackwardRows&, const ContrastGradients<float>&,
                                const Parallel&);
template void contrast_backward(const Contrast<double>&, const BackwardRows&, const ContrastGradients<double>&,
                                const Parallel&);

}  // namespace cacr
