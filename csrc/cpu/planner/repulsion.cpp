// The operator repulsion: the mean of F over queries whose keys are not the queries, with its gradients
// (cacr_kernels/operators/repulsion.py). What flows into a row is known before the sweep, so one is enough.
#include "forward_backward.h"
#include "sums.h"

namespace cacr {
namespace {

template <class T>
struct RepulsionPlan {
  const Repulsion<T>& given;
  const RepulsionGradients<T>& out;
  ViewPairs pairs;
  std::vector<int32_t> ids;

  // Pooled: every view of the queries meets the rows of all views of the keys, as if they were one. The ids of queries
  // and keys then are row % M, and equal ones lie on diagonals.
  Contrast<T> contrast() {
    Contrast<T> p{};
    const bool pooled = given.pairing == Pairing::kPooled;
    p.q = given.z, p.k = given.k;
    p.N = given.B, p.M = pooled ? given.V * given.M : given.M, p.D = given.D;
    p.q_views = given.V, p.k_views = pooled ? 1 : given.V;
    p.q_view_stride = p.N * p.D, p.k_view_stride = p.M * p.D, p.q_row_stride = p.k_row_stride = p.D;
    pairs = pooled ? ViewPairs{} : view_pairs(given.V, given.pairing);
    for (int64_t v = 0; v < given.V && pooled; v++) pairs.q_index.push_back(v), pairs.k_index.push_back(0);
    p.pairs = int64_t(pairs.q_index.size()), p.q_index = pairs.q_index.data(), p.k_index = pairs.k_index.data();
    ids.resize(size_t(p.M));
    for (int64_t j = 0; j < p.M; j++) ids[size_t(j)] = int32_t(j % given.M);
    p.q_id = p.k_id = ids.data(), p.period = given.M;  // of the queries the first N
    p.softmaxes = 1, p.kind[0] = kOther, p.tau[0] = given.tau, p.normalize = given.normalize, p.bf16 = given.bf16;
    return p;
  }

  void one_sweep(Engine<T>& e, const Blocking& blocking, const Statistics& s, int64_t n) {
    SweepParams<T> t = e.params(Gradient::kMeanCost, blocking, out.dz, out.dk, s.variance);
    t.scale = mean_weight(1, e.p.pairs, e.p.N);
    t.statistics = s;
    Slices<T> q{}, k{};
    if (out.dz) q = make_query_slices(e, n);
    if (out.dk) k = make_key_slices(e, n);
    strip_with_slices(e, t, n, out.dz ? &q : nullptr, out.dk ? &k : nullptr,
                      ThreadScratch::get(e.memory, e.kernels.strip_scratch(t), n));
    if (out.dz) add_slices(e, q, {out.dz, false}, n);
    if (out.dk) add_slices(e, k, {out.dk, false}, n);
  }

  // Strips and slices beyond the workspace, or no gradient of rows: statistics first, then their backward.
  void two_sweeps(Engine<T>& e, Statistics s, int64_t n) {
    const int64_t rows = e.p.pairs * e.p.N;
    auto some = [&] { return e.memory.template get<double>(rows); };
    s.state = {some(), some(), some()};
    forward_sweep(e, s, n);
    if (!out.dz && !out.dk && !s.variance) return;
    double *const g_value = some(), *const g_lse = e.memory.template zeros<double>(rows);
    std::fill_n(g_value, rows, mean_weight(1, e.p.pairs, e.p.N));
    const BackwardRows given_rows{s.value, {s.state.top, s.state.sum, s.state.delta}, g_value, g_lse, false};
    backward_sweep(e, given_rows, {out.dz, out.dk, s.variance, false}, n);
  }

  RepulsionResult run(const Parallel& parallel) {
    Engine<T> e(contrast(), parallel);
    const int64_t n = e.threads(), rows = e.p.pairs * e.p.N;
    prepare(e, out.dz || out.want_tau, n);
    auto some = [&] { return e.memory.template get<double>(rows); };
    const Statistics s{some(), some(), out.want_tau ? some() : nullptr, {}};
    const size_t slices = size_t(n) * slice_bytes(e, out.dz, out.dk, false);
    const Blocking b = e.fitting(Gradient::kMeanCost, n, out.dz, out.dk, slices);
    if ((out.dz || out.dk) && b.rows > 0)
      one_sweep(e, b, s, n);
    else
      two_sweeps(e, s, n);
    e.to_raw_rows(out.dz, out.dk, n);
    return means(s, e.p.tau[0], rows);
  }

  // With a single key every row is empty, and its entropy, made of an lse of -inf, counts as 0; so does one that
  // rounding has made negative.
  RepulsionResult means(const Statistics& s, double tau, int64_t rows) const {
    const auto mean = [rows](auto row) { return sum_rows(0, rows, row) / double(rows); };
    RepulsionResult found{};
    found.value = mean([&](int64_t i) { return s.value[i]; });
    found.entropy = mean([&](int64_t i) { return std::max(row_entropy(s.lse[i], tau, s.value[i]), 0.0); });
    if (out.want_tau) found.grad_tau = mean([&](int64_t i) { return s.variance[i]; });
    return found;
  }
};

}  // namespace

template <class T>
RepulsionResult repulsion(const Repulsion<T>& problem, const RepulsionGradients<T>& gradients,
                          const Parallel& parallel) {
  return RepulsionPlan<T>{problem, gradients, {}, {}}.run(parallel);
}

template RepulsionResult repulsion(const Repulsion<float>&, const RepulsionGradients<float>&, const Parallel&);
template RepulsionResult repulsion(const Repulsion<double>&, const RepulsionGradients<double>&, const Parallel&);

}  // namespace cacr
