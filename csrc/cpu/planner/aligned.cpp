// The operators aligned and aligned_backward: costs between views of the same instances, and their gradients
// (cacr_kernels/operators/aligned.py).
#include <algorithm>

#include "isa.h"
#include "memory.h"
#include "threads.h"

namespace cacr {
namespace {

// The costs, or from `grad` the gradients: dq [V][B][D] and dk [U][B][D], each if wanted.
template <class T>
struct AlignedPlan {
  const Aligned<T>& given;
  AlignedCostParams<T> params;
  Workspace memory{};

  // Threads worth their start: a share of at least about 20 us.
  int64_t threads(const Parallel& parallel) const {
    const double work = 6.0 * double(given.V) * double(given.U) * double(given.B) * double(given.D);
    return std::max<int64_t>(1, std::min<double>({double(parallel.threads), work / 1e6, double(given.B)}));
  }

  void run(const Parallel& parallel) {
    const Kernels<T>& kernels = cacr::kernels<T>();
    T *q_r = nullptr, *k_r = nullptr;
    if (given.normalize) {
      q_r = memory.get<T>(given.V * given.B);
      k_r = given.same ? q_r : memory.get<T>(given.U * given.B);
      params.q_r = q_r, params.k_r = k_r;
    }
    const int64_t n = threads(parallel);
    parallel_for(parallel, n, [&](int64_t i) {
      AlignedCostParams<T> mine = params;
      mine.b0 = share(given.B, i, n), mine.b1 = share(given.B, i + 1, n);
      each_view(q_r, given.V, given.q, [&](const T* x, T* r, int64_t) { measure(kernels, mine, x, r); });
      if (!given.same)
        each_view(k_r, given.U, given.k, [&](const T* x, T* r, int64_t) { measure(kernels, mine, x, r); });
      kernels.aligned_costs(mine);
      const auto to_raw = [&](T* gradient) {
        return [&, gradient](const T* x, T* r, int64_t v) {
          kernels.to_raw_rows({x, r, given.D, given.D, mine.b0, mine.b1, gradient + v * given.B * given.D});
        };
      };
      if (params.dq) each_view(q_r, given.V, given.q, to_raw(params.dq));
      if (params.dk) each_view(k_r, given.U, given.k, to_raw(params.dk));
    });
  }

  // f(rows of a view, their inverse lengths, the view) where rows are raw
  template <class F>
  void each_view(T* r, int64_t views, const T* x, F f) const {
    for (int64_t v = 0; r && v < views; v++) f(x + v * given.B * given.D, r + v * given.B, v);
  }

  void measure(const Kernels<T>& kernels, const AlignedCostParams<T>& mine, const T* x, T* r) const {
    PackParams<T> t{};
    t.x = x, t.row_stride = t.D = given.D, t.rows = given.B, t.row0 = mine.b0, t.row1 = mine.b1, t.r = r;
    kernels.pack(t);
  }
};

template <class T>
AlignedCostParams<T> params_of(const Aligned<T>& x) {
  AlignedCostParams<T> t{};
  t.q = x.q, t.k = x.k, t.V = x.V, t.U = x.U, t.B = x.B, t.D = x.D, t.same = x.same;
  return t;
}

}  // namespace

template <class T>
void aligned_forward(const Aligned<T>& problem, T* cost, const Parallel& parallel) {
  AlignedPlan<T> plan{problem, params_of(problem)};
  plan.params.cost = cost;
  plan.run(parallel);
}

template <class T>
void aligned_backward(const Aligned<T>& problem, const T* grad, T* dq, T* dk, const Parallel& parallel) {
  AlignedPlan<T> plan{problem, params_of(problem)};
  plan.params.grad = grad, plan.params.dq = dq, plan.params.dk = dk;
  plan.run(parallel);
}

template void aligned_forward(const Aligned<float>&, float*, const Parallel&);
template void aligned_forward(const Aligned<double>&, double*, const Parallel&);
template void aligned_backward(const Aligned<float>&, const float*, float*, float*, const Parallel&);
template void aligned_backward(const Aligned<double>&, const double*, double*, double*, const Parallel&);

}  // namespace cacr
