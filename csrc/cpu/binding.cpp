// The only file that knows torch: checks what the kernels rely on, hands them pointers, registers the ops.
// Schemas, fakes and autograd formulas stand in cacr_kernels/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "plan.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cacr::Parallel torch_threads() {
  return {int64_t(torch::stable::get_num_threads()), [](int64_t n, void (*body)(void*, int64_t), void* arg) {
            torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; i++) body(arg, i);
            });
          }};
}

// Calls f(T{}) with the arithmetic's type.
template <class F>
auto with_dtype(const Tensor& x, F f) {
  if (x.scalar_type() == ScalarType::Double) return f(double{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "cacr_kernels: float32 or float64 expected");
  return f(float{});
}

template <class T>
const T* data(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), "cacr_kernels: contiguous tensor expected");
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* out(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

double tau_at(const Tensor& tau, int64_t i) {
  STD_TORCH_CHECK(tau.scalar_type() == ScalarType::Double && i < tau.numel(), "cacr_kernels: tau must be float64");
  return data<double>(tau)[i];
}

std::tuple<Tensor, Tensor, Tensor> cacr_cpu(const Tensor& views, const Tensor& tau, double alpha, double beta,
                                            int64_t pairing, bool rbf, double rbf_scale, bool want_grad,
                                            bool want_grad_tau) {
  return with_dtype(views, [&](auto zero) {
    using T = decltype(zero);
    STD_TORCH_CHECK(views.dim() == 3, "cacr_kernels: views [V, B, D] expected");
    const auto size = views.sizes();
    const cacr::CacrLoss<T> loss{data<T>(views), size[0],        size[1], size[2],  tau_at(tau, 0),
                                 tau_at(tau, 1), alpha,          beta,    static_cast<cacr::Pairing>(pairing),
                                 rbf,            rbf_scale};
    Tensor parts = torch::stable::new_empty(views, {5}), grad_tau = torch::stable::new_empty(tau, {2});
    Tensor grad = want_grad ? torch::stable::empty_like(views) : torch::stable::new_empty(views, {0});
    const cacr::CacrResult r = cacr::cacr_loss<T>(loss, want_grad ? out<T>(grad) : nullptr, want_grad_tau, torch_threads());
    T* p = out<T>(parts);
    p[0] = T(r.loss), p[1] = T(r.attraction), p[2] = T(r.repulsion);
    p[3] = T(r.attraction_entropy), p[4] = T(r.repulsion_entropy);
    out<double>(grad_tau)[0] = r.grad_tau_pos, out<double>(grad_tau)[1] = r.grad_tau_neg;
    return std::make_tuple(parts, grad, grad_tau);
  });
}

// ids [n] = i % period for some period? Equal ids then lie on diagonals.
int64_t period_of(const int32_t* q, int64_t n, const int32_t* k, int64_t m) {
  int64_t period = m;
  for (int64_t j = 1; j < m; j++)
    if (k[j] == 0) {
      period = j;
      break;
    }
  period = std::max(period, n < m ? int64_t(1) : period);
  for (int64_t i = 0; i < n; i++)
    if (q[i] != i % period) return 0;
  for (int64_t j = 0; j < m; j++)
    if (k[j] != j % period) return 0;
  return period;
}

template <class T>
cacr::Contrast<T> contrast_problem(const Tensor& q, const Tensor& k, const std::optional<Tensor>& q_id,
                                   const std::optional<Tensor>& k_id, const Tensor& tau,
                                   const std::vector<int64_t>& kinds, const std::vector<int64_t>& q_index,
                                   const std::vector<int64_t>& k_index, bool inner) {
  cacr::Contrast<T> p{};
  const auto qs = q.sizes(), ks = k.sizes();
  STD_TORCH_CHECK(qs.size() == 3 && ks.size() == 3 && qs[2] == ks[2], "cacr_kernels: q [P, N, D] and k [P, M, D]");
  STD_TORCH_CHECK(q_index.size() == k_index.size(), "cacr_kernels: q_index and k_index of one length");
  STD_TORCH_CHECK(!kinds.empty() && kinds.size() <= cacr::kMaxSoftmaxes, "cacr_kernels: one or two softmaxes");
  for (size_t i = 0; i < q_index.size(); i++)
    STD_TORCH_CHECK(q_index[i] >= 0 && q_index[i] < qs[0] && k_index[i] >= 0 && k_index[i] < ks[0],
                    "cacr_kernels: view index out of range");
  p.q = data<T>(q), p.k = data<T>(k);
  p.q_views = qs[0], p.N = qs[1], p.D = qs[2], p.k_views = ks[0], p.M = ks[1];
  p.q_view_stride = p.N * p.D, p.k_view_stride = p.M * p.D, p.q_row_stride = p.k_row_stride = p.D;
  p.pairs = int64_t(q_index.size()), p.q_index = q_index.data(), p.k_index = k_index.data();
  p.softmaxes = int32_t(kinds.size());
  bool masked = false;
  for (size_t s = 0; s < kinds.size(); s++) {
    p.kind[s] = int32_t(kinds[s]), p.tau[s] = tau_at(tau, int64_t(s));
    masked |= kinds[s] != cacr::kAll;
  }
  if (masked) {
    STD_TORCH_CHECK(q_id && k_id && q_id->scalar_type() == ScalarType::Int && k_id->scalar_type() == ScalarType::Int &&
                        q_id->numel() == p.N && k_id->numel() == p.M,
                    "cacr_kernels: q_id [N] and k_id [M] of int32 expected");
    p.q_id = data<int32_t>(*q_id), p.k_id = data<int32_t>(*k_id);
    p.period = period_of(p.q_id, p.N, p.k_id, p.M);
  }
  p.inner = inner;
  return p;
}

std::tuple<Tensor, Tensor> contrast_cpu(const Tensor& q, const Tensor& k, std::optional<Tensor> q_id,
                                                std::optional<Tensor> k_id, const Tensor& tau,
                                                std::vector<int64_t> kinds, std::vector<int64_t> q_index,
                                                std::vector<int64_t> k_index, bool inner) {
  return with_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    const auto p = contrast_problem<T>(q, k, q_id, k_id, tau, kinds, q_index, k_index, inner);
    const std::vector<int64_t> shape{p.softmaxes, p.pairs, p.N};
    Tensor value = torch::stable::new_empty(q, shape), lse = torch::stable::new_empty(q, shape);
    cacr::contrast_forward<T>(p, {out<T>(value), out<T>(lse), nullptr}, torch_threads());
    return std::make_tuple(value, lse);
  });
}

std::tuple<Tensor, Tensor, Tensor> contrast_backward_cpu(const Tensor& q, const Tensor& k, std::optional<Tensor> q_id,
                                                 std::optional<Tensor> k_id, const Tensor& tau,
                                                 std::vector<int64_t> kinds, std::vector<int64_t> q_index,
                                                 std::vector<int64_t> k_index, bool inner, bool detach_weights,
                                                 const Tensor& value, const Tensor& lse, const Tensor& grad_value,
                                                 const Tensor& grad_lse, bool want_dq, bool want_dk, bool want_variance) {
  return with_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    const auto p = contrast_problem<T>(q, k, q_id, k_id, tau, kinds, q_index, k_index, inner);
    Tensor dq = want_dq ? torch::stable::empty_like(q) : torch::stable::new_empty(q, {0});
    Tensor dk = want_dk ? torch::stable::empty_like(k) : torch::stable::new_empty(k, {0});
    Tensor variance = want_variance ? torch::stable::empty_like(value) : torch::stable::new_empty(value, {0});
    cacr::contrast_backward<T>(
        p, {data<T>(value), data<T>(lse), data<T>(grad_value), data<T>(grad_lse), detach_weights},
        want_dq ? out<T>(dq) : nullptr, want_dk ? out<T>(dk) : nullptr, want_variance ? out<T>(variance) : nullptr,
        torch_threads());
    return std::make_tuple(dq, dk, variance);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cacr_kernels, CPU, m) {
  m.impl("cacr_cpu", TORCH_BOX(&cacr_cpu));
  m.impl("contrast_cpu", TORCH_BOX(&contrast_cpu));
  m.impl("contrast_backward_cpu", TORCH_BOX(&contrast_backward_cpu));
}
