// The only file that knows torch: checks what the kernels rely on, hands them pointers, registers the ops.
// Schemas, fakes and autograd formulas stand in cacr_kernels/operators/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
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

Tensor packed(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// A new contiguous CPU tensor. Not torch::stable::new_empty: that looks its operator up by name, which costs a small
// loss more than its arithmetic.
template <class T>
Tensor empty(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, shape[i]);
  const int32_t dtype = sizeof(T) == 8 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class T>
const T* data(const Tensor& x) {  // x: packed
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* out(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

double double_at(const Tensor& x, int64_t i) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double && i < x.numel(), "cacr_kernels: temperatures must be float64");
  return static_cast<const double*>(x.const_data_ptr())[i * x.stride(0)];
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cacr_cpu(const Tensor& any_views, std::optional<Tensor> numbers,
                                                    double tau_pos, double tau_neg, double alpha, double beta,
                                                    int64_t pairing, bool rbf, double rbf_scale, bool want_grad,
                                                    bool want_grad_numbers) {
  STD_TORCH_CHECK(any_views.dim() == 3, "cacr_kernels: views [V, B, D] expected");
  const Tensor views = packed(any_views);
  const auto number = [&](int64_t i, double given) { return numbers ? double_at(*numbers, i) : given; };
  return with_dtype(views, [&](auto zero) {
    using T = decltype(zero);
    const int64_t V = views.size(0), B = views.size(1), D = views.size(2);
    const cacr::CacrLoss<T> problem{data<T>(views),
                                    V,
                                    B,
                                    D,
                                    number(0, tau_pos),
                                    number(1, tau_neg),
                                    number(2, alpha),
                                    number(3, beta),
                                    static_cast<cacr::Pairing>(pairing),
                                    rbf,
                                    number(4, rbf_scale)};
    const std::vector<int64_t> grad_shape = want_grad ? std::vector<int64_t>{V, B, D} : std::vector<int64_t>{0};
    Tensor loss = empty<T>({}), parts = empty<T>({4}), grad = empty<T>(grad_shape),
           grad_numbers = numbers ? empty<double>({5}) : empty<T>({0});
    const cacr::CacrResult r =
        cacr::cacr_loss<T>(problem, want_grad ? out<T>(grad) : nullptr, want_grad_numbers && numbers, torch_threads());
    *out<T>(loss) = T(r.loss);
    T* p = out<T>(parts);
    p[0] = T(r.attraction), p[1] = T(r.repulsion), p[2] = T(r.attraction_entropy), p[3] = T(r.repulsion_entropy);
    if (numbers) {
      const double of_numbers[5] = {r.grad_tau_pos, r.grad_tau_neg, 0, 0, 0};
      std::copy(of_numbers, of_numbers + 5, out<double>(grad_numbers));
    }
    return std::make_tuple(loss, parts, grad, grad_numbers);
  });
}

// ids [n] = i % period for some period? Equal ids then lie on diagonals.
int64_t period_of(const int32_t* q, int64_t n, const int32_t* k, int64_t m) {
  if (n == 0 || m == 0) return 0;
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

// The arguments of contrast as contiguous tensors, which must outlive the problem that points into them.
struct ContrastArguments {
  Tensor q, k;
  std::optional<Tensor> q_id, k_id;
  const Tensor& tau;
  const std::vector<int64_t>&kinds, &q_index, &k_index;
  bool inner, own;

  ContrastArguments(const Tensor& q_, const std::optional<Tensor>& k_, const std::optional<Tensor>& q_id_,
                    const std::optional<Tensor>& k_id_, const Tensor& tau_, const std::vector<int64_t>& kinds_,
                    const std::vector<int64_t>& q_index_, const std::vector<int64_t>& k_index_, bool inner_)
      : q(packed(q_)),
        k(k_ ? packed(*k_) : q),
        tau(tau_),
        kinds(kinds_),
        q_index(q_index_),
        k_index(k_index_),
        inner(inner_),
        own(!k_) {
    if (q_id_) q_id = packed(*q_id_);
    if (k_id_) k_id = packed(*k_id_);
    if (!k_) k_id = q_id;
    STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && q.size(2) == k.size(2) && q.scalar_type() == k.scalar_type(),
                    "cacr_kernels: q [Vq, N, D] and k [Vk, M, D] of one dtype expected");
    STD_TORCH_CHECK(q_index.size() == k_index.size(), "cacr_kernels: q_index and k_index of one length expected");
    STD_TORCH_CHECK(!kinds.empty() && kinds.size() <= cacr::kMaxSoftmaxes, "cacr_kernels: one or two softmaxes");
    for (size_t i = 0; i < q_index.size(); i++)
      STD_TORCH_CHECK(q_index[i] >= 0 && q_index[i] < q.size(0) && k_index[i] >= 0 && k_index[i] < k.size(0),
                      "cacr_kernels: view index out of range");
    bool masked = false;
    for (int64_t kind : kinds) masked |= kind != cacr::kAll;
    STD_TORCH_CHECK(!masked || (is_id(q_id, q.size(1)) && is_id(k_id, k.size(1))),
                    "cacr_kernels: q_id [N] and k_id [M] of int32 expected");
    if (!masked) q_id.reset(), k_id.reset();
  }

  static bool is_id(const std::optional<Tensor>& id, int64_t n) {
    return id && id->scalar_type() == ScalarType::Int && id->numel() == n;
  }

  template <class T>
  cacr::Contrast<T> problem() const {
    cacr::Contrast<T> p{};
    p.q = data<T>(q), p.k = data<T>(k);
    p.q_views = q.size(0), p.N = q.size(1), p.D = q.size(2), p.k_views = k.size(0), p.M = k.size(1);
    p.q_view_stride = p.N * p.D, p.k_view_stride = p.M * p.D, p.q_row_stride = p.k_row_stride = p.D;
    p.pairs = int64_t(q_index.size()), p.q_index = q_index.data(), p.k_index = k_index.data();
    p.softmaxes = int32_t(kinds.size());
    for (size_t s = 0; s < kinds.size(); s++) p.kind[s] = int32_t(kinds[s]), p.tau[s] = double_at(tau, int64_t(s));
    if (q_id) {
      p.q_id = data<int32_t>(*q_id), p.k_id = data<int32_t>(*k_id);
      p.period = period_of(p.q_id, p.N, p.k_id, p.M);
    }
    p.inner = inner, p.own = own;
    return p;
  }
};

std::tuple<Tensor, Tensor, Tensor> contrast_cpu(const Tensor& q, std::optional<Tensor> k, std::optional<Tensor> q_id,
                                                std::optional<Tensor> k_id, const Tensor& tau,
                                                std::vector<int64_t> kinds, std::vector<int64_t> q_index,
                                                std::vector<int64_t> k_index, bool inner, bool /*detach_weights*/) {
  const ContrastArguments a(q, k, q_id, k_id, tau, kinds, q_index, k_index, inner);
  return with_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    const cacr::Contrast<T> p = a.problem<T>();
    const int64_t rows = p.softmaxes * p.pairs * p.N;
    const std::vector<int64_t> shape{p.softmaxes, p.pairs, p.N}, state{3, p.softmaxes, p.pairs, p.N};
    Tensor value = empty<double>(shape), lse = empty<double>(shape), weights = empty<double>(state);
    double* w = out<double>(weights);
    cacr::contrast_forward<T>(p, {out<double>(value), out<double>(lse), nullptr, w, w + rows, w + 2 * rows},
                              torch_threads());
    return std::make_tuple(value, lse, weights);
  });
}

std::tuple<Tensor, Tensor, Tensor> contrast_backward_cpu(
    const Tensor& q, std::optional<Tensor> k, std::optional<Tensor> q_id, std::optional<Tensor> k_id, const Tensor& tau,
    std::vector<int64_t> kinds, std::vector<int64_t> q_index, std::vector<int64_t> k_index, bool inner,
    bool detach_weights, const Tensor& any_value, const Tensor& any_weights, const Tensor& any_grad_value,
    const Tensor& any_grad_lse, bool want_q, bool want_k, bool want_tau) {
  const ContrastArguments a(q, k, q_id, k_id, tau, kinds, q_index, k_index, inner);
  const Tensor value = packed(any_value), weights = packed(any_weights), grad_value = packed(any_grad_value),
               grad_lse = packed(any_grad_lse);
  return with_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    const cacr::Contrast<T> p = a.problem<T>();
    auto shape = [](const Tensor& x, bool wanted) {
      return wanted ? std::vector<int64_t>{x.size(0), x.size(1), x.size(2)} : std::vector<int64_t>{0};
    };
    const bool own = !k;  // the queries are the keys: one gradient, the sum of both
    Tensor dq = empty<T>(shape(q, want_q)), dk = empty<T>(shape(a.k, want_k && !own));
    T* const dq_data = want_q ? out<T>(dq) : nullptr;
    Tensor dtau = empty<double>(want_tau ? std::vector<int64_t>{p.softmaxes} : std::vector<int64_t>{0});
    const double* w = data<double>(weights);
    const cacr::RowGradients rows{data<double>(value),
                                  w,
                                  w + value.numel(),
                                  w + 2 * value.numel(),
                                  data<double>(grad_value),
                                  data<double>(grad_lse),
                                  detach_weights};
    cacr::contrast_backward<T>(p, rows, dq_data,
                               own      ? dq_data
                               : want_k ? out<T>(dk)
                                        : nullptr,
                               want_tau ? out<double>(dtau) : nullptr, torch_threads());
    return std::make_tuple(dq, dk, dtau);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> detached_keys_cpu(
    const Tensor& q, const Tensor& k, std::optional<Tensor> q_id, std::optional<Tensor> k_id, const Tensor& tau,
    std::vector<int64_t> kinds, std::vector<int64_t> q_index, std::vector<int64_t> k_index, bool inner,
    bool detach_weights, bool detach_value, bool want_q, bool want_tau) {
  const ContrastArguments a(q, k, q_id, k_id, tau, kinds, q_index, k_index, inner);
  STD_TORCH_CHECK(kinds.size() == 1 && (kinds[0] == cacr::kAll || kinds[0] == cacr::kOther),
                  "cacr_kernels: one softmax over all or other keys expected");
  const bool moments = (want_q || want_tau) && !detach_weights && !detach_value;
  return with_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    const cacr::Contrast<T> p = a.problem<T>();
    const std::vector<int64_t> rows{1, p.pairs, p.N}, none{0};
    Tensor value = empty<double>(rows), lse = empty<double>(rows),
           means = empty<T>(want_q ? std::vector<int64_t>{1 + moments, p.pairs, p.N, p.D} : none),
           variance = empty<double>(moments ? rows : none);
    cacr::FrozenStatistics<T> found{out<double>(value), out<double>(lse), nullptr, nullptr, nullptr};
    if (moments) found.variance = out<double>(variance);
    if (want_q) found.mean = out<T>(means);
    if (want_q && moments) found.spread = found.mean + p.pairs * p.N * p.D;
    cacr::contrast_frozen<T>(p, found, torch_threads());
    return std::make_tuple(value, lse, means, variance);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cacr_kernels, CPU, m) {
  m.impl("cacr_cpu", TORCH_BOX(&cacr_cpu));
  m.impl("contrast_cpu", TORCH_BOX(&contrast_cpu));
  m.impl("contrast_backward_cpu", TORCH_BOX(&contrast_backward_cpu));
  m.impl("detached_keys_cpu", TORCH_BOX(&detached_keys_cpu));
}
