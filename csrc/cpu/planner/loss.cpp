// The operator cacr: the loss with its gradients (cacr_kernels/reference.py, cacr). Attraction by form differences,
// repulsion in one sweep over the strip, or in two.
#include "forward_backward.h"
#include "sums.h"

namespace cacr {
namespace {

template <class T>
struct LossPlan {
  const CacrLoss<T>& loss;
  T* dz;
  bool want_tau;
  const Parallel& parallel;
  Workspace memory;
  ViewPairs pairs;
  std::vector<int32_t> ids;
  CacrResult result{};

  LossPlan(const CacrLoss<T>& l, T* grad, bool tau, const Parallel& par)
      : loss(l), dz(grad), want_tau(tau), parallel(par) {}

  // ---- attraction --------------------------------------------------------------------------------------------------
  AlignedParams<T> aligned_params(const Kernels<T>& kernels, int64_t n, const Statistics& out) {
    AlignedParams<T> t{};
    t.z = loss.z, t.view_stride = loss.B * loss.D, t.row_stride = loss.D;
    t.V = loss.V, t.B = loss.B, t.D = loss.D;
    t.tau = loss.tau_pos, t.scale = mean_weight(loss.alpha, loss.V, loss.B);
    t.statistics = out, t.dz = dz, t.dz_row_stride = loss.D;
    t.scratch = memory.get<char>(int64_t(kernels.aligned_scratch(loss.V)) * aligned_threads(kernels, n));
    return t;
  }

  // Costs of V^2 pairs of views: of many views only some threads' fit the workspace.
  int64_t aligned_threads(const Kernels<T>& kernels, int64_t n) const {
    return std::max<int64_t>(1, std::min<int64_t>(n, int64_t(kWorkspaceBytes / kernels.aligned_scratch(loss.V))));
  }

  void run_aligned(const Kernels<T>& kernels, AlignedParams<T> t, int64_t i, int64_t n) {
    t.b0 = share(loss.B, i, n), t.b1 = share(loss.B, i + 1, n);
    t.scratch = static_cast<char*>(t.scratch) + size_t(i) * kernels.aligned_scratch(loss.V);
    kernels.aligned(t);
  }

  void sum_attraction(const Statistics& s) {
    const int64_t rows = loss.V * loss.B;
    result.attraction = loss.alpha * sum_of(s.value, rows) / double(rows);
    if (want_tau) result.grad_tau_pos = loss.alpha * sum_of(s.variance, rows) / double(rows);
    result.attraction_entropy = sum_of_entropies(s, rows, loss.tau_pos) / double(rows);
  }

  static double sum_of(const double* x, int64_t n) {
    return sum_rows(0, n, [&](int64_t i) { return x[i]; });
  }
  static double sum_of_entropies(const Statistics& s, int64_t n, double tau) {
    return sum_rows(0, n, [&](int64_t i) { return row_entropy(s.lse[i], tau, s.value[i]); });
  }

  // ---- repulsion ---------------------------------------------------------------------------------------------------
  Contrast<T> repulsion_problem() {
    Contrast<T> p{};
    const int64_t V = loss.V, B = loss.B;
    const bool pooled = loss.pairing == Pairing::kPooled;
    pairs = view_pairs(V, loss.pairing);
    p.N = p.M = pooled ? V * B : B;
    p.D = loss.D, p.q_views = p.k_views = pooled ? 1 : V;
    p.q = p.k = loss.z;
    p.q_view_stride = p.k_view_stride = p.N * loss.D, p.q_row_stride = p.k_row_stride = loss.D;
    p.pairs = int64_t(pairs.q_index.size()), p.q_index = pairs.q_index.data(), p.k_index = pairs.k_index.data();
    ids.resize(size_t(p.N));
    for (int64_t i = 0; i < p.N; i++) ids[size_t(i)] = int32_t(i % B);
    p.q_id = p.k_id = ids.data(), p.period = B;
    p.keys_are_queries = true, p.normalize = loss.normalize, p.bf16 = loss.bf16, p.softmaxes = loss.rbf ? 2 : 1;
    p.kind[0] = p.kind[1] = kOther;
    p.tau[0] = -loss.tau_neg, p.tau[1] = -(loss.tau_neg + loss.rbf_scale);
    return p;
  }

  // -beta mean_pairs mean_b F and its derivatives from statistics [1][pairs][N]
  void sum_mean_cost(const Contrast<T>& p, const Statistics& s) {
    const int64_t rows = p.pairs * p.N;
    result.repulsion = -loss.beta * sum_of(s.value, rows) / double(rows);
    if (want_tau) result.grad_tau_neg = loss.beta * sum_of(s.variance, rows) / double(rows);
    result.repulsion_entropy = sum_of_entropies(s, rows, p.tau[0]) / double(rows);
  }

  // One pair under rbf, statistics [2][N]: log mean_b F with log F_b = lse_1 - lse_0. Returns log sum_b F_b.
  double sum_rbf_pair(const Contrast<T>& p, const Statistics& s, double* row_weight) {
    double top = -INFINITY;
    for (int64_t i = 0; i < p.N; i++) {
      row_weight[i] = rbf_log_value(s.lse[i], s.lse[p.N + i]);
      top = std::max(top, row_weight[i]);
      if (std::isnan(row_weight[i])) top = NAN, i = p.N;
    }
    for (int64_t i = 0; i < p.N; i++) row_weight[i] = std::exp(row_weight[i] - top);
    const double sum = sum_of(row_weight, p.N), entropy = sum_of_entropies(s, p.N, -loss.tau_neg);
    const double d_tau =
        sum_rows(0, p.N, [&](int64_t i) { return row_weight[i] * rbf_tau_derivative(s.value[i], s.value[p.N + i]); });
    const double log_sum = top + std::log(sum), pair_count = double(pairs.q_index.size());
    for (int64_t i = 0; i < p.N; i++) row_weight[i] /= sum;
    result.repulsion += loss.beta * (log_sum - std::log(double(p.N))) / pair_count;
    result.grad_tau_neg += loss.beta * d_tau / sum / pair_count;
    result.repulsion_entropy += entropy / double(p.N) / pair_count;
    return log_sum;
  }

  Statistics statistics(Workspace& ws, int64_t rows) {
    auto some = [&] { return ws.get<double>(rows); };
    return {some(), some(), some(), {some(), some(), some()}};
  }

  // Symmetric or unbounded rbf, or strips and slices beyond the workspace: statistics first, then their backward.
  void two_sweeps(Engine<T>& e, int64_t n) {
    const Contrast<T>& p = e.p;
    const int64_t rows = p.pairs * p.N, all = rows * p.softmaxes;
    Statistics s = statistics(e.memory, all);
    forward_sweep(e, s, n);
    double *g_value = e.memory.template zeros<double>(all), *g_lse = e.memory.template zeros<double>(all);
    if (!loss.rbf) {
      std::fill(g_value, g_value + rows, mean_weight(-loss.beta, p.pairs, p.N));
    } else {
      std::vector<double> weight(size_t(p.N));
      Statistics one = statistics(e.memory, 2 * p.N);
      for (int64_t pair = 0; pair < p.pairs; pair++) {
        for (int k = 0; k < 2; k++) {
          const int64_t from = k * rows + pair * p.N;
          std::copy_n(s.value + from, p.N, one.value + k * p.N), std::copy_n(s.lse + from, p.N, one.lse + k * p.N);
        }
        sum_rbf_pair(p, one, weight.data());
        for (int64_t i = 0; i < p.N; i++) {
          const double g = loss.beta / double(p.pairs) * weight[size_t(i)];
          g_lse[pair * p.N + i] = -g, g_lse[rows + pair * p.N + i] = g;
        }
      }
    }
    double* variance = want_tau && !loss.rbf ? s.variance : nullptr;
    if (dz || variance)
      backward_sweep(e, {s.value, {s.state.top, s.state.sum, s.state.delta}, g_value, g_lse, false},
                     {dz, dz, variance, true}, n);
    if (!loss.rbf) sum_mean_cost(p, s);
  }

  void one_sweep(Engine<T>& e, const Blocking& blocking, int64_t n) {
    const Contrast<T>& p = e.p;
    const int64_t rows = p.pairs * p.N;
    auto some = [&] { return e.memory.template get<double>(rows); };
    const Statistics s{some(), some(), want_tau ? some() : nullptr, {}};
    SweepParams<T> t = e.params(Gradient::kMeanCost, blocking, true, true, want_tau ? s.variance : nullptr);
    t.scale = mean_weight(-loss.beta, p.pairs, p.N);
    t.statistics = s;
    const bool direct = e.padded(p.D) == p.D;
    Slices<T> slices = make_query_slices(e, n, direct ? dz : nullptr);
    strip_with_slices(e, t, n, &slices, &slices, ThreadScratch::get(e.memory, e.kernels.strip_scratch(t), n));
    add_slices(e, slices, {dz, true, 1, direct, true}, n);
    sum_mean_cost(p, t.statistics);
  }

  // rbf: the log stands outside the batch mean, so each pair's gradient is scaled when its sum is known.
  void one_sweep_rbf(Engine<T>& e, const Blocking& blocking, int64_t n) {
    const Contrast<T> all = e.p;
    SweepParams<T> t = e.params(Gradient::kRbfUnscaled, blocking, true, true);
    t.scale = loss.beta / double(all.pairs);
    t.statistics = statistics(e.memory, 2 * all.N);
    std::vector<double> weight(size_t(all.N));
    Slices<T> slices = make_query_slices(e, n);
    const auto scratch = ThreadScratch::get(e.memory, e.kernels.strip_scratch(t), n);
    for (int64_t pair = 0; pair < all.pairs; pair++) {
      e.p.pairs = 1, e.p.q_index = all.q_index + pair, e.p.k_index = all.k_index + pair;
      for (auto& touched : slices.touched) std::fill(touched.begin(), touched.end(), uint8_t(0));
      strip_with_slices(e, t, n, &slices, &slices, scratch);
      const double log_sum = sum_rbf_pair(e.p, t.statistics, weight.data());
      add_slices(e, slices, {dz, true, std::exp(-log_sum)}, n);
    }
    e.p = all;
  }

  CacrResult run() {
    Engine<T> e(repulsion_problem(), parallel);
    const bool repels = loss.B > 1;
    bool complete = false;  // dz is the gradient of the raw rows
    const int64_t n = e.threads();
    const Statistics positive = statistics(memory, loss.V * loss.B);
    AlignedParams<T> aligned = aligned_params(e.kernels, n, positive);
    const bool packs = repels || loss.normalize;
    if (packs) e.allocate_packed(repels && (dz || want_tau));
    aligned.r = e.packed.q_r;
    const int64_t some = aligned_threads(e.kernels, n);
    parallel_for(parallel, n, [&](int64_t i) {  // a thread has the same instances of all views in both
      if (packs) e.pack(i, n, e.p.N / loss.B);
      if (some == n) run_aligned(e.kernels, aligned, i, n);
    });
    if (some != n) parallel_for(parallel, some, [&](int64_t i) { run_aligned(e.kernels, aligned, i, some); });
    sum_attraction(positive);
    if (repels) {
      e.find_bound();
      e.choose_products(dz || want_tau, n);
      const Gradient fused = loss.rbf ? Gradient::kRbfUnscaled : Gradient::kMeanCost;
      const Blocking b = e.fitting(fused, n, true, true, size_t(n) * slice_bytes(e, true, true, true));
      const bool symmetric = symmetric_pays(e);  // 2 U instead of 3 U
      const bool one = dz && !symmetric && b.rows > 0 && (!loss.rbf || (e.bounded && loss.rbf_scale >= 0));
      if (one && !loss.rbf) {
        one_sweep(e, b, n);
        complete = true;
      } else {
        one ? one_sweep_rbf(e, b, n) : two_sweeps(e, n);
      }
    }
    if (!complete) e.to_raw_rows(dz, dz, n);
    result.loss = result.attraction + result.repulsion;
    return result;
  }
};

}  // namespace

template <class T>
CacrResult cacr_loss(const CacrLoss<T>& loss, T* dz, bool want_grad_tau, const Parallel& parallel) {
  return LossPlan<T>(loss, dz, want_grad_tau, parallel).run();
}

template CacrResult cacr_loss(const CacrLoss<float>&, float*, bool, const Parallel&);
template CacrResult cacr_loss(const CacrLoss<double>&, double*, bool, const Parallel&);

}  // namespace cacr
