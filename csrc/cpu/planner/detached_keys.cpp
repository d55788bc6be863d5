// The operators detached_keys and detached_keys_backward. In the forward queries and, where these are few, keys are
// shared out over the threads; the backward is elementwise.
#include "detached_keys.h"

#include "sums.h"

namespace cacr {
namespace {

// dL/dq_i = 2 (a (q_i - sum_j w_ij k_j) - b sum_j w_ij (c_ij - F_i) k_j)   (cacr_kernels/operators/detached_keys.py)
template <class T>
struct DetachedGradient {
  const Contrast<T>& p;
  const DetachedBackward<T>& rows;
  T *dq, *r;  // r: [q_views][N] inverse lengths of raw rows, else null

  bool has_keys(int64_t i) const { return rows.found.lse[i] != -INFINITY; }  // also where it is NaN

  // Adds what pair `pair` gives to row i of its queries.
  void add(int64_t pair, int64_t i) const {
    const int64_t at = pair * p.N + i, view = p.q_index[pair];
    const double g_value = has_keys(at) ? rows.grad_value[at] : 0, g_lse = has_keys(at) ? rows.grad_lse[at] : 0;
    const double through_lse = g_lse * p.tau[0];
    const T a = T(2 * (rows.detach_weights ? g_value : rows.detach_value ? through_lse : g_value + through_lse));
    const T b = T(2 * g_value * p.tau[0]), scale = r ? r[view * p.N + i] : T(1);
    const T *const q = p.q + view * p.q_view_stride + i * p.q_row_stride, *const mean = rows.found.mean + at * p.D;
    const T* const spread = rows.found.spread ? rows.found.spread + at * p.D : nullptr;
    T* const out = dq + (view * p.N + i) * p.D;
    if (p.inner_product)
      for (int64_t d = 0; d < p.D; d++) out[d] -= a * mean[d];
    else
      for (int64_t d = 0; d < p.D; d++) out[d] += a * (scale * q[d] - mean[d]);
    if (spread)
      for (int64_t d = 0; d < p.D; d++) out[d] -= b * spread[d];
  }

  // Rows [row0, row1) of all views.
  void run(const Kernels<T>& kernels, int64_t row0, int64_t row1) const {
    for (int64_t v = 0; v < p.q_views; v++) {
      std::fill(dq + (v * p.N + row0) * p.D, dq + (v * p.N + row1) * p.D, T(0));
      PackParams<T> t{};
      t.x = p.q + v * p.q_view_stride, t.row_stride = p.q_row_stride, t.D = p.D, t.rows = p.N;
      t.row0 = row0, t.row1 = row1, t.r = r ? r + v * p.N : nullptr;
      if (r) kernels.pack(t);
    }
    for (int64_t pair = 0; pair < p.pairs; pair++)
      for (int64_t i = row0; i < row1; i++) add(pair, i);
    for (int64_t v = 0; r && v < p.q_views; v++)
      kernels.to_raw_rows(
          {p.q + v * p.q_view_stride, r + v * p.N, p.q_row_stride, p.D, row0, row1, dq + v * p.N * p.D});
  }

  double of_tau() const {  // dL/dtau = sum_i gF var_i + glse F_i
    return sum_rows(0, p.pairs * p.N, [&](int64_t i) {
      if (!has_keys(i)) return 0.0;
      const double of_lse = rows.grad_lse[i] * rows.found.value[i];
      return rows.detach_value ? of_lse : of_lse + rows.grad_value[i] * rows.found.variance[i];
    });
  }
};

}  // namespace

template <class T>
void detached_keys(const Contrast<T>& problem, const DetachedStatistics<T>& out, const Parallel& parallel) {
  DetachedKeysPlan<T>(problem, out, parallel, kernels<T>()).run();
}

template <class T>
void detached_keys_backward(const Contrast<T>& p, const DetachedBackward<T>& rows, T* dq, double* dtau,
                            const Parallel& parallel) {
  Workspace memory;
  const DetachedGradient<T> gradient{p, rows, dq, dq && p.normalize ? memory.get<T>(p.q_views * p.N) : nullptr};
  if (dtau) *dtau = rows.detach_weights ? 0 : gradient.of_tau();
  if (!dq) return;
  const double work = double(p.pairs * p.N) * double(p.D);  // a thread is worth its start from about 20 us on
  const int64_t n = std::max<int64_t>(1, std::min<double>({double(parallel.threads), work / 1e5, double(p.N)}));
  parallel_for(parallel, n, [&](int64_t i) { gradient.run(kernels<T>(), share(p.N, i, n), share(p.N, i + 1, n)); });
}

template void detached_keys(const Contrast<float>&, const DetachedStatistics<float>&, const Parallel&);
template void detached_keys(const Contrast<double>&, const DetachedStatistics<double>&, const Parallel&);
template void detached_keys_backward(const Contrast<float>&, const DetachedBackward<float>&, float*, double*,
                                     const Parallel&);
template void detached_keys_backward(const Contrast<double>&, const DetachedBackward<double>&, double*, double*,
                                     const Parallel&);

}  // namespace cacr
