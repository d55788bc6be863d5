// Compares the kernels of one instruction set with those of another on a small problem: every kernel, masks, tails.
#pragma once

#include "detached_keys.h"
#include "forward_backward.h"
#include "positives.h"

namespace cacr {

namespace self_check {

template <class T>
struct Result {
  std::vector<double> value, lse, variance;
  std::vector<T> gradient;
};

// One problem for a kernel to solve.
struct Case {
  int64_t n, d;  // rows and features
  double tau;
  int variant;  // the kind of the keys, or what else the kernel is told
  bool flag, sorted, normalize, bf16;
};

// Two views of n rows with d features, the first the queries, the second the keys; ids sorted or periodic.
template <class T>
struct Problem {
  std::vector<T> z;
  std::vector<int32_t> id;
  int64_t q_index[1] = {0}, k_index[1] = {1};
  Contrast<T> p{};

  Problem(const Case& c, int kind) : z(size_t(2 * c.n * c.d)), id(static_cast<size_t>(c.n)) {
    const int64_t n = c.n, d = c.d;
    uint32_t state = 12345;  // a fixed sequence, no library's generator
    for (T& x : z)
      state = state * 1664525u + 1013904223u,
      x = T(int32_t(state >> 8) - (1 << 23)) / T(1 << 23) / T(std::sqrt(double(d)));
    if (c.normalize)  // no short rows: their gradients would be large, and of one feature nothing but rounding errors
      for (T& x : z) x += (x < 0 ? T(-1) : T(1)) / T(std::sqrt(double(d)));
    for (T& x : z)
      if (c.bf16) x = T(int32_t(x * 64)) / 64;  // what bfloat16 can hold
    for (int64_t i = 0; i < n; i++) id[size_t(i)] = int32_t(c.sorted ? 3 * i / n : i % 5);
    p.q = p.k = z.data(), p.q_view_stride = p.k_view_stride = n * d, p.q_row_stride = p.k_row_stride = d;
    p.q_views = p.k_views = 2, p.N = p.M = n, p.D = d, p.pairs = 1, p.q_index = q_index, p.k_index = k_index;
    p.q_id = p.k_id = id.data(), p.period = c.sorted ? 0 : 5, p.softmaxes = 1, p.kind[0] = kind, p.tau[0] = c.tau;
    p.normalize = c.normalize, p.bf16 = c.bf16;
  }
};

// Statistics and gradients of one strip sweep; both gradients in one tensor. flag: bounded.
template <class T>
Result<T> strip(const Kernels<T>& kernels, const Case& c) {
  const Parallel serial{1, nullptr};
  const int64_t n = c.n;
  const Problem<T> problem(c, c.variant);
  const Contrast<T>& p = problem.p;
  Engine<T> e(p, serial, kernels);
  e.allocate_packed(true);
  e.pack(0, 1);
  e.choose_products(true, 1);
  e.bounded = c.flag;
  const Blocking b = e.blocking_of(e.blocking().rows, std::max<int64_t>(1, n / 2 - 1));
  Result<T> r;
  const size_t rows = static_cast<size_t>(n);
  r.value.resize(rows), r.lse.resize(rows), r.variance.resize(rows), r.gradient.resize(problem.z.size());
  SweepParams<T> t = e.params(Gradient::kMeanCost, b, true, true, r.variance.data());
  t.scale = 1.0 / double(n);
  t.statistics = {r.value.data(), r.lse.data(), r.variance.data(), {}};
  Slices<T> slices = make_query_slices(e, 1);
  strip_with_slices(e, t, 1, &slices, &slices, ThreadScratch::get(e.memory, kernels.strip_scratch(t), 1));
  add_slices(e, slices, {r.gradient.data(), false, 1, 0, true}, 1);
  return r;
}

// Statistics and means of a sweep over keys without a gradient. flag: with moments.
template <class T>
Result<T> detached_keys(const Kernels<T>& kernels, const Case& c) {
  const Parallel serial{1, nullptr};
  const int64_t n = c.n, d = c.d;
  const bool moments = c.flag;
  Problem<T> problem(c, c.variant);
  if (c.variant == kAll) problem.p.q_id = problem.p.k_id = nullptr;
  const size_t rows = static_cast<size_t>(n), count = rows * size_t(d);
  Result<T> r;
  r.value.resize(rows), r.lse.resize(rows), r.variance.resize(rows), r.gradient.resize(2 * count);
  T* mean = r.gradient.data();
  DetachedKeysPlan<T> plan(
      problem.p,
      {r.value.data(), r.lse.data(), moments ? r.variance.data() : nullptr, mean, moments ? mean + count : nullptr},
      serial, kernels);
  plan.params.blocking.keys = plan.keys(std::max<int64_t>(1, n / 2 - 1));
  plan.run(2, c.sorted ? 2 : 1);  // keys in two parts, or queries
  return r;
}

// Statistics and gradient of symmetric sweeps, in two shares: one softmax over others, or a second one beside it, whose
// kind is the variant. flag: bounded.
template <class T>
Result<T> symmetric(const Kernels<T>& kernels, const Case& c) {
  const Parallel serial{1, nullptr};
  const int64_t n = c.n;
  Problem<T> problem(c, kOther);
  problem.k_index[0] = 0, problem.p.keys_are_queries = true;
  problem.p.softmaxes = c.variant < 0 ? 1 : 2, problem.p.kind[1] = c.variant, problem.p.tau[1] = -c.tau;
  Engine<T> e(problem.p, serial, kernels);
  e.allocate_packed(true);
  e.pack(0, 1);
  e.choose_products(true, 1);
  e.bounded = c.flag;
  Result<T> r;
  const int64_t rows = problem.p.softmaxes * n;
  r.value.resize(size_t(rows)), r.lse.resize(size_t(rows)), r.variance.resize(size_t(rows)),
      r.gradient.resize(problem.z.size());
  double* state = e.memory.template get<double>(5 * rows);
  const Statistics s{r.value.data(), r.lse.data(), nullptr, {state, state + rows, state + 2 * rows}};
  symmetric_forward(e, s, 2);
  for (int64_t i = 0; i < rows; i++) state[3 * rows + i] = 1.0 / double(n), state[4 * rows + i] = 0.5 / double(n);
  const BackwardRows g{s.value, {state, state + rows, state + 2 * rows}, state + 3 * rows, state + 4 * rows, false};
  symmetric_backward(e, g, r.gradient.data(), r.variance.data(), false, 2);
  e.to_raw_rows(r.gradient.data(), nullptr, 2);
  return r;
}

// What positives give to queries that are keys, and to queries and keys of two views. flag: together.
template <class T>
Result<T> positives(const Kernels<T>& kernels, const Case& c) {
  const Parallel serial{1, nullptr};
  const int64_t n = c.n;
  Problem<T> problem(c, c.variant);
  if (c.flag) problem.k_index[0] = 0, problem.p.keys_are_queries = true;
  Engine<T> e(problem.p, serial, kernels);
  e.allocate_packed(false);
  e.pack(0, 1);
  Result<T> r;
  std::vector<double> state(size_t(n), 0.0), sum(size_t(n), 2.0), delta(size_t(n), -0.1), g(size_t(n), 1 / double(n));
  r.gradient.resize(2 * problem.z.size());
  T* const dq = r.gradient.data();
  const BackwardRows rows{nullptr, {state.data(), sum.data(), delta.data()}, g.data(), g.data(), false};
  const ContrastGradients<T> out{dq, c.flag ? dq : dq + problem.z.size(), nullptr};
  PositiveGradients<T>(problem.p, rows, 0).add(e, out, 2);
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

// What is tried in all combinations, each with ids in both orders and `flag` off and on.
struct Cases {
  std::vector<double> taus;
  std::vector<int> variants;
  bool tolerance_grows_with_tau;  // as the rounding errors of the exponents do
  double gradient_scale;
};

template <class T, class Run>
bool agree(const Kernels<T>& kernels, const Kernels<T>& trusted, const Cases& cases, Case c, Run run) {
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;
  for (double tau : cases.taus)
    for (int variant : cases.variants)
      for (int layout = 0; layout < 8; layout++) {  // sorted ids: sets without a member in the first tile
        c.tau = tau, c.variant = variant, c.flag = layout & 1, c.sorted = layout & 2, c.normalize = layout & 4;
        const double allowed = tolerance * (cases.tolerance_grows_with_tau ? std::max(1.0, std::abs(tau)) : 1);
        const double of_gradients = c.bf16 ? 0x1p-7 : allowed;  // whose coefficients are rounded
        const double costs = c.normalize ? 1 : 0;               // of unit rows: they may be 0 but for rounding
        const Result<T> a = run(kernels, c), b = run(trusted, c);
        if (!close(a.value, b.value, allowed, costs) || !close(a.lse, b.lse, c.bf16 ? allowed : tolerance, costs) ||
            !close(a.variance, b.variance, allowed, 1) ||
            !close(a.gradient, b.gradient, of_gradients, cases.gradient_scale))
          return false;
      }
  return true;
}

// The aligned kernel: some views of n instances.
template <class T>
std::vector<double> aligned(const Kernels<T>& kernels, int64_t views, int64_t n, int64_t d, bool normalize) {
  const size_t rows = static_cast<size_t>(views * n);
  std::vector<T> z(rows * size_t(d)), dz(z.size()), r(rows);
  std::vector<double> statistics(3 * rows);
  for (size_t i = 0; i < z.size(); i++) z[i] = T(double((i * 7919) % 1013) / 1013 - 0.5);
  std::vector<char> scratch(kernels.aligned_scratch(views) + 64);
  AlignedParams<T> t{};
  t.z = z.data(), t.view_stride = n * d, t.row_stride = d, t.V = views, t.B = n, t.D = d, t.tau = 1.5, t.scale = 1;
  double* s = statistics.data();
  t.statistics = {s, s + rows, s + 2 * rows, {}};
  t.dz = dz.data(), t.dz_row_stride = d, t.b1 = n;
  t.scratch = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
  if (normalize) {
    PackParams<T> lengths{};
    lengths.x = z.data(), lengths.row_stride = lengths.D = d, lengths.rows = lengths.row1 = views * n;
    lengths.r = r.data();
    kernels.pack(lengths);
    t.r = r.data();
  }
  kernels.aligned(t);
  statistics.insert(statistics.end(), dz.begin(), dz.end());
  return statistics;
}

template <class T>
std::vector<double> all_aligned(const Kernels<T>& kernels, int64_t n, int64_t d) {
  std::vector<double> all;
  for (int64_t views : {2, 3})
    for (bool normalize : {false, true}) {
      const std::vector<double> some = aligned(kernels, views, n, d, normalize);
      all.insert(all.end(), some.begin(), some.end());
    }
  return all;
}

}  // namespace self_check

// Do two sets of kernels agree on n rows with d features?
template <class T>
bool self_check_passes(const Kernels<T>& kernels, const Kernels<T>& trusted, int64_t n, int64_t d) {
  using namespace self_check;
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;
  const Case c{n, d, 0, 0, false, false, false, false}, half{n, d, 0, 0, false, false, false, true};
  const Cases strips{{-1, 2}, {kAll, kOther, kSameNotSelf}, false, 1.0 / double(n)};
  const Cases detached{{-1, 2, -200}, {kAll, kOther}, true, 1};  // -200 takes exponents out of the range of 2^x
  const Cases same{{-1, 2}, {kSame, kSameNotSelf}, false, 1.0 / double(n)};
  const Cases symmetries{{-1, 2}, {-1, kOther, kSameNotSelf}, false, 1.0 / double(n)};
  return agree(kernels, trusted, strips, c, strip<T>) &&
         agree(kernels, trusted, detached, c, self_check::detached_keys<T>) &&
         agree(kernels, trusted, symmetries, c, symmetric<T>) &&
         agree(kernels, trusted, same, c, self_check::positives<T>) &&
         (!kernels.pack_bf16 ||
          (agree(kernels, trusted, strips, half, strip<T>) && agree(kernels, trusted, symmetries, half, symmetric<T>) &&
           agree(kernels, trusted, detached, half, self_check::detached_keys<T>))) &&
         close(all_aligned(kernels, n, d), all_aligned(trusted, n, d), tolerance);
}

}  // namespace cacr
