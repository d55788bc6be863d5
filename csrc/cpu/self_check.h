// Compares the kernels of one instruction set with those of another on a small problem: every kernel, masks, tails.
#pragma once

#include "frozen_plan.h"
#include "sweeps.h"

namespace cacr {

namespace self_check {

template <class T>
struct Result {
  std::vector<double> value, lse, variance;
  std::vector<T> gradient;
};

// Two views of n rows with d features, the first the queries, the second the keys; ids sorted or periodic.
template <class T>
struct Problem {
  std::vector<T> z;
  std::vector<int32_t> id;
  int64_t q_index[1] = {0}, k_index[1] = {1};
  Contrast<T> p{};

  Problem(int64_t n, int64_t d, double tau, int kind, bool sorted) : z(size_t(2 * n * d)), id(static_cast<size_t>(n)) {
    uint32_t state = 12345;  // a fixed sequence, no library's generator
    for (T& x : z)
      state = state * 1664525u + 1013904223u,
      x = T(int32_t(state >> 8) - (1 << 23)) / T(1 << 23) / T(std::sqrt(double(d)));
    for (int64_t i = 0; i < n; i++) id[size_t(i)] = int32_t(sorted ? 3 * i / n : i % 5);
    p.q = p.k = z.data(), p.q_view_stride = p.k_view_stride = n * d, p.q_row_stride = p.k_row_stride = d;
    p.q_views = p.k_views = 2, p.N = p.M = n, p.D = d, p.pairs = 1, p.q_index = q_index, p.k_index = k_index;
    p.q_id = p.k_id = id.data(), p.period = sorted ? 0 : 5, p.softmaxes = 1, p.kind[0] = kind, p.tau[0] = tau;
  }
};

// Statistics and gradients of one strip sweep; both gradients in one tensor.
template <class T>
Result<T> sweep(const Kernels<T>& kernels, int64_t n, int64_t d, double tau, int kind, bool bounded, bool sorted) {
  const Parallel serial{1, nullptr};
  const Problem<T> problem(n, d, tau, kind, sorted);
  const Contrast<T>& p = problem.p;
  Engine<T> e(p, serial, kernels);
  e.allocate_packed(true);
  e.pack(0, 1);
  e.bounded = bounded;
  Blocking b = e.blocking();
  b.keys = std::max<int64_t>(1, n / 2 - 1);
  Result<T> r;
  const size_t rows = static_cast<size_t>(n);
  r.value.resize(rows), r.lse.resize(rows), r.variance.resize(rows), r.gradient.resize(problem.z.size());
  Task<T> t = e.task(Gradient::kMeanCost, b, true, true, r.variance.data());
  t.scale = 1.0 / double(n);
  t.statistics = {r.value.data(), r.lse.data(), r.variance.data(), nullptr, nullptr, nullptr};
  auto slices = e.make_slices(1, true, true, true);
  e.sweep_with_slices(t, 1, slices, e.sweep_scratch(t, 1));
  e.add_slices(slices.q, slices.q_touched, 0, 2, n, r.gradient.data(), d, 1, false, 1);
  return r;
}

// Statistics and means of a sweep over keys without a gradient.
template <class T>
Result<T> frozen(const Kernels<T>& kernels, int64_t n, int64_t d, double tau, int kind, bool moments, bool sorted) {
  const Parallel serial{1, nullptr};
  Problem<T> problem(n, d, tau, kind, sorted);
  if (kind == kAll) problem.p.q_id = problem.p.k_id = nullptr;
  const size_t rows = static_cast<size_t>(n), count = rows * size_t(d);
  Result<T> r;
  r.value.resize(rows), r.lse.resize(rows), r.variance.resize(rows), r.gradient.resize(2 * count);
  T* mean = r.gradient.data();
  FrozenPlan<T> plan(
      problem.p,
      {r.value.data(), r.lse.data(), moments ? r.variance.data() : nullptr, mean, moments ? mean + count : nullptr},
      serial, kernels);
  plan.task.blocking.keys = std::max<int64_t>(1, n / 2 - 1);
  plan.run(2, sorted ? 2 : 1);  // keys in two parts, or queries
  return r;
}

// Statistics and gradient of symmetric sweeps, in two shares: one softmax over others, or a second one beside it.
template <class T>
Result<T> symmetric(const Kernels<T>& kernels, int64_t n, int64_t d, double tau, int second, bool bounded,
                    bool sorted) {
  const Parallel serial{1, nullptr};
  Problem<T> problem(n, d, tau, kOther, sorted);
  problem.k_index[0] = 0, problem.p.own = true;
  problem.p.softmaxes = second < 0 ? 1 : 2, problem.p.kind[1] = second, problem.p.tau[1] = -tau;
  Engine<T> e(problem.p, serial, kernels);
  e.allocate_packed(true);
  e.pack(0, 1);
  e.bounded = bounded;
  Result<T> r;
  const int64_t rows = problem.p.softmaxes * n;
  r.value.resize(size_t(rows)), r.lse.resize(size_t(rows)), r.variance.resize(size_t(rows)),
      r.gradient.resize(problem.z.size());
  double* state = e.memory.template get<double>(5 * rows);
  const Statistics s{r.value.data(), r.lse.data(), nullptr, state, state + rows, state + 2 * rows};
  symmetric_forward(e, s, 2);
  for (int64_t i = 0; i < rows; i++) state[3 * rows + i] = 1.0 / double(n), state[4 * rows + i] = 0.5 / double(n);
  const RowGradients g{s.value, s.top, s.sum, s.delta, state + 3 * rows, state + 4 * rows, false};
  symmetric_backward(e, g, r.gradient.data(), r.variance.data(), false, 2);
  return r;
}

template <class T>
bool close(const std::vector<T>& a, const std::vector<T>& b, double tolerance, double scale = 0) {
  for (T x : b)
    if (std::isfinite(x)) scale = std::max(scale, std::abs(double(x)));
  for (size_t i = 0; i < a.size(); i++)
    if (a[i] != b[i] && !(std::abs(double(a[i]) - double(b[i])) <= tolerance * scale)) return false;
  return true;
}

template <class T>
bool agree(const Kernels<T>& kernels, const Kernels<T>& trusted, int64_t n, int64_t d) {
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;
  for (double tau : {-1.0, 2.0})
    for (int kind : {int(kAll), int(kOther), int(kSameNotSelf)})
      for (int layout = 0; layout < 4; layout++) {  // sorted ids: sets without a member in the first tile
        const bool bounded = layout & 1, sorted = layout & 2;
        const Result<T> a = sweep(kernels, n, d, tau, kind, bounded, sorted),
                        b = sweep(trusted, n, d, tau, kind, bounded, sorted);
        if (!close(a.value, b.value, tolerance) || !close(a.lse, b.lse, tolerance) ||
            !close(a.variance, b.variance, tolerance, 1) || !close(a.gradient, b.gradient, tolerance, 1.0 / double(n)))
          return false;
      }
  return true;
}

template <class T>
bool frozen_agree(const Kernels<T>& kernels, const Kernels<T>& trusted, int64_t n, int64_t d) {
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;
  for (double tau : {-1.0, 2.0, -200.0})  // the last takes exponents out of the range of 2^x
    for (int kind : {int(kAll), int(kOther)})
      for (int layout = 0; layout < 4; layout++) {
        const bool moments = layout & 1, sorted = layout & 2;
        const double allowed = tolerance * std::max(1.0, std::abs(tau));  // of the exponents
        const Result<T> a = frozen(kernels, n, d, tau, kind, moments, sorted),
                        b = frozen(trusted, n, d, tau, kind, moments, sorted);
        if (!close(a.value, b.value, allowed) || !close(a.lse, b.lse, tolerance) ||
            !close(a.variance, b.variance, allowed, 1) || !close(a.gradient, b.gradient, allowed, 1))
          return false;
      }
  return true;
}

template <class T>
bool symmetric_agree(const Kernels<T>& kernels, const Kernels<T>& trusted, int64_t n, int64_t d) {
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;
  for (double tau : {-1.0, 2.0})
    for (int second : {-1, int(kOther), int(kSameNotSelf)})
      for (int layout = 0; layout < 4; layout++) {
        const bool bounded = layout & 1, sorted = layout & 2;
        const Result<T> a = symmetric(kernels, n, d, tau, second, bounded, sorted),
                        b = symmetric(trusted, n, d, tau, second, bounded, sorted);
        if (!close(a.value, b.value, tolerance) || !close(a.lse, b.lse, tolerance) ||
            !close(a.variance, b.variance, tolerance, 1) || !close(a.gradient, b.gradient, tolerance, 1.0 / double(n)))
          return false;
      }
  return true;
}

// The aligned kernel: three views, n instances.
template <class T>
std::vector<double> aligned(const Kernels<T>& kernels, int64_t n, int64_t d) {
  const size_t rows = static_cast<size_t>(3 * n);
  std::vector<T> z(rows * size_t(d)), dz(z.size());
  std::vector<double> statistics(3 * rows);
  for (size_t i = 0; i < z.size(); i++) z[i] = T(double((i * 7919) % 1013) / 1013 - 0.5);
  std::vector<char> scratch(kernels.aligned_scratch(3) + 64);
  AlignedTask<T> t{};
  t.z = z.data(), t.view_stride = n * d, t.row_stride = d, t.V = 3, t.B = n, t.D = d, t.tau = 1.5, t.scale = 1;
  double* s = statistics.data();
  t.statistics = {s, s + rows, s + 2 * rows, nullptr, nullptr, nullptr};
  t.dz = dz.data(), t.dz_row_stride = d, t.b1 = n;
  t.scratch = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
  kernels.aligned(t);
  statistics.insert(statistics.end(), dz.begin(), dz.end());
  return statistics;
}

}  // namespace self_check

// Do two sets of kernels agree on n rows with d features?
template <class T>
bool self_check_passes(const Kernels<T>& kernels, const Kernels<T>& trusted, int64_t n, int64_t d) {
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;
  return self_check::agree(kernels, trusted, n, d) && self_check::frozen_agree(kernels, trusted, n, d) &&
         self_check::symmetric_agree(kernels, trusted, n, d) &&
         self_check::close(self_check::aligned(kernels, n, d), self_check::aligned(trusted, n, d), tolerance);
}

}  // namespace cacr
