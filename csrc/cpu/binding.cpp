// The CPU operators for torch: checks what the kernels rely on, hands them pointers, registers the operators. The only
// file of csrc/cpu that knows torch; what it shares with CUDA is in csrc/common/binding.h.
#include "../common/binding.h"

#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>

#include "api.h"

namespace {

using namespace cacr::binding;

// ---- Ctrl-C ---------------------------------------------------------------------------------------------------------
// Functions of Python, by their names there. Nothing is linked against Python: cacr_kernels/backends/library.py hands
// them over.
struct Python {
  int (*PyGILState_Ensure)();
  void (*PyGILState_Release)(int);
  int (*PyErr_CheckSignals)();
  void (*PyErr_Fetch)(void**, void**, void**);
  void (*PyErr_Restore)(void*, void*, void*);
  int (*Py_AddPendingCall)(int (*)(void*), void*);
} python{};

using Raised = std::array<void*, 3>;  // type, value, traceback

int raise_again(void* arg) {
  const std::unique_ptr<Raised> raised(static_cast<Raised*>(arg));
  python.PyErr_Restore((*raised)[0], (*raised)[1], (*raised)[2]);
  return -1;
}

// Runs Python's signal handlers in the thread that called the operator, every now and then. What one of them raises
// (KeyboardInterrupt) stops the kernels, and is raised again when the operator has returned to Python: the unfinished
// results reach nobody.
class SignalCheck {
 public:
  cacr::Interrupt interrupt() { return {python.PyErr_CheckSignals ? asked : nullptr, this}; }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr auto kPeriod = std::chrono::milliseconds(100);  // waiting for Python's lock may take 5 ms

  static bool asked(void* state) {
    SignalCheck& check = *static_cast<SignalCheck*>(state);
    if (check.stop_.load(std::memory_order_relaxed)) return true;
    if (std::this_thread::get_id() != check.caller_ || Clock::now() < check.next_) return false;
    const bool stop = handler_raised();
    check.stop_.store(stop, std::memory_order_relaxed);
    check.next_ = Clock::now() + kPeriod;
    return stop;
  }

  static bool handler_raised() {
    const int lock = python.PyGILState_Ensure();
    const bool raised = python.PyErr_CheckSignals() != 0;
    if (raised) {
      auto* const exception = new Raised{};
      python.PyErr_Fetch(&(*exception)[0], &(*exception)[1], &(*exception)[2]);
      python.Py_AddPendingCall(raise_again, exception);
    }
    python.PyGILState_Release(lock);
    return raised;
  }

  const std::thread::id caller_ = std::this_thread::get_id();
  Clock::time_point next_ = Clock::now() + kPeriod;
  std::atomic<bool> stop_{false};
};

// ---- what the operators share ---------------------------------------------------------------------------------------
cacr::Parallel torch_threads(SignalCheck& signals) {
  return {int64_t(torch::stable::get_num_threads()),
          [](int64_t n, void (*body)(void*, int64_t), void* arg) {
            torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; i++) body(arg, i);
            });
          },
          signals.interrupt()};
}

// Calls f(T{}) with the arithmetic's type.
template <class F>
auto with_dtype(const Tensor& x, F f) {
  if (x.scalar_type() == ScalarType::Double) return f(double{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "cacr_kernels: float32 or float64 expected");
  return f(float{});
}

template <class T>
Tensor empty_cpu(const Sizes& sizes) {
  const int32_t dtype = sizeof(T) == 8 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  return empty(sizes, dtype, {aoti_torch_device_type_cpu(), 0});
}

double double_at(const Tensor& x, int64_t i) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double && i < x.numel(), "cacr_kernels: temperatures must be float64");
  return input<double>(x)[i * x.stride(0)];
}

// Every operator exists twice, as <name>_cpu and as <name>_cpu_bf16, where products may be those of bfloat16 (kBf16).

// ---- cacr -----------------------------------------------------------------------------------------------------------
template <bool kBf16>
std::tuple<Tensor, Tensor, Tensor, Tensor> cacr_cpu(const Tensor& any_views, std::optional<Tensor> numbers,
                                                    double tau_pos, double tau_neg, double alpha, double beta,
                                                    int64_t pairing, bool rbf, double rbf_scale, bool normalize,
                                                    bool want_grad, bool want_grad_numbers) {
  check_views(any_views);
  const Tensor views = packed(any_views);
  const auto number = [&](int64_t i, double given) { return numbers ? double_at(*numbers, i) : given; };
  return with_dtype(views, [&](auto zero) {
    using T = decltype(zero);
    cacr::CacrLoss<T> problem{};
    problem.z = input<T>(views), problem.V = views.size(0), problem.B = views.size(1), problem.D = views.size(2);
    problem.tau_pos = number(0, tau_pos), problem.tau_neg = number(1, tau_neg);
    problem.alpha = number(2, alpha), problem.beta = number(3, beta);
    problem.pairing = static_cast<cacr::Pairing>(pairing), problem.rbf = rbf, problem.rbf_scale = number(4, rbf_scale);
    problem.normalize = normalize, problem.bf16 = kBf16;
    Tensor loss = empty_cpu<T>({}), parts = empty_cpu<T>({4}), grad = empty_cpu<T>(gradient_sizes(views, want_grad)),
           grad_numbers = numbers ? empty_cpu<double>({5}) : empty_cpu<T>({0});
    SignalCheck signals;
    const cacr::CacrResult r = cacr::cacr_loss<T>(problem, want_grad ? output<T>(grad) : nullptr,
                                                  want_grad_numbers && numbers, torch_threads(signals));
    *output<T>(loss) = T(r.loss);
    T* p = output<T>(parts);
    p[0] = T(r.attraction), p[1] = T(r.repulsion), p[2] = T(r.attraction_entropy), p[3] = T(r.repulsion_entropy);
    if (numbers) {
      const double of_numbers[5] = {r.grad_tau_pos, r.grad_tau_neg, 0, 0, 0};
      std::copy(of_numbers, of_numbers + 5, output<double>(grad_numbers));
    }
    return std::make_tuple(loss, parts, grad, grad_numbers);
  });
}

// ---- aligned --------------------------------------------------------------------------------------------------------
// The problem points into the tensors, which are contiguous.
template <class T>
cacr::Aligned<T> aligned_problem(const Tensor& q, const std::optional<Tensor>& k, bool normalize) {
  const Tensor& keys = k ? *k : q;
  return {input<T>(q), input<T>(keys), q.size(0), keys.size(0), q.size(1), q.size(2), !k, normalize};
}

void check_aligned(const Tensor& q, const std::optional<Tensor>& k) {
  check_views(q);
  STD_TORCH_CHECK(!k || (k->dim() == 3 && k->scalar_type() == q.scalar_type() && k->size(1) == q.size(1) &&
                         k->size(2) == q.size(2)),
                  "cacr_kernels: q [V, B, D] and k [U, B, D] of one dtype expected");
}

Tensor aligned_cpu(const Tensor& any_q, std::optional<Tensor> any_k, bool normalize) {
  check_aligned(any_q, any_k);
  const Tensor q = packed(any_q);
  const std::optional<Tensor> k = packed(any_k);
  return with_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    const cacr::Aligned<T> problem = aligned_problem<T>(q, k, normalize);
    Tensor cost = empty_cpu<T>({problem.V, problem.U, problem.B});
    SignalCheck signals;
    cacr::aligned_forward<T>(problem, output<T>(cost), torch_threads(signals));
    return cost;
  });
}

std::tuple<Tensor, Tensor> aligned_backward_cpu(const Tensor& any_q, std::optional<Tensor> any_k,
                                                const Tensor& any_grad, bool normalize, bool want_q, bool want_k) {
  check_aligned(any_q, any_k);
  const Tensor q = packed(any_q), grad = packed(any_grad);
  const std::optional<Tensor> k = packed(any_k);
  return with_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    const cacr::Aligned<T> problem = aligned_problem<T>(q, k, normalize);
    STD_TORCH_CHECK(grad.scalar_type() == q.scalar_type() && grad.dim() == 3 && grad.size(0) == problem.V &&
                        grad.size(1) == problem.U && grad.size(2) == problem.B,
                    "cacr_kernels: gradients [V, U, B] of the costs, in their dtype, expected");
    Tensor dq = empty_cpu<T>(gradient_sizes(q, want_q)), dk = empty_cpu<T>(gradient_sizes(k ? *k : q, want_k && k));
    SignalCheck signals;
    cacr::aligned_backward<T>(problem, input<T>(grad), want_q ? output<T>(dq) : nullptr,
                              want_k && k ? output<T>(dk) : nullptr, torch_threads(signals));
    return std::make_tuple(dq, dk);
  });
}

// ---- repulsion ------------------------------------------------------------------------------------------------------
template <bool kBf16>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> repulsion_cpu(const Tensor& any_views, const Tensor& any_keys,
                                                                 const Tensor& tau, int64_t pairing, bool normalize,
                                                                 bool want_views, bool want_keys, bool want_tau) {
  check_views(any_views), check_views(any_keys);
  const Tensor views = packed(any_views), keys = packed(any_keys);
  STD_TORCH_CHECK(views.scalar_type() == keys.scalar_type() && views.size(0) == keys.size(0) &&
                      views.size(1) <= keys.size(1) && views.size(2) == keys.size(2),
                  "cacr_kernels: keys [V, M, D] of the dtype of the views [V, B, D], M >= B, expected");
  check_option(pairing, cacr::kPairings, "pairing");
  return with_dtype(views, [&](auto zero) {
    using T = decltype(zero);
    cacr::Repulsion<T> problem{};
    problem.z = input<T>(views), problem.k = input<T>(keys);
    problem.V = views.size(0), problem.B = views.size(1), problem.M = keys.size(1), problem.D = views.size(2);
    problem.tau = double_at(tau, 0), problem.pairing = static_cast<cacr::Pairing>(pairing);
    problem.normalize = normalize, problem.bf16 = kBf16;
    Tensor value = empty_cpu<double>({}), entropy = empty_cpu<double>({}),
           grad_views = empty_cpu<T>(gradient_sizes(views, want_views)),
           grad_keys = empty_cpu<T>(gradient_sizes(keys, want_keys)), grad_tau = empty_cpu<double>({want_tau ? 1 : 0});
    const cacr::RepulsionGradients<T> gradients{want_views ? output<T>(grad_views) : nullptr,
                                                want_keys ? output<T>(grad_keys) : nullptr, want_tau};
    SignalCheck signals;
    const cacr::RepulsionResult r = cacr::repulsion<T>(problem, gradients, torch_threads(signals));
    *output<double>(value) = r.value, *output<double>(entropy) = r.entropy;
    if (want_tau) *output<double>(grad_tau) = r.grad_tau;
    return std::make_tuple(value, entropy, grad_views, grad_keys, grad_tau);
  });
}

// ---- contrast -------------------------------------------------------------------------------------------------------
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

// The problem points into the tensors and the lists.
template <class T>
cacr::Contrast<T> contrast_problem(const ContrastArguments& a, const ContrastTensors& tensors, bool normalize,
                                   bool bf16) {
  cacr::Contrast<T> p{};
  tensors.describe(a, p);
  p.normalize = normalize, p.bf16 = bf16;
  p.q = input<T>(tensors.q), p.k = input<T>(tensors.k);
  p.q_view_stride = p.N * p.D, p.k_view_stride = p.M * p.D, p.q_row_stride = p.k_row_stride = p.D;
  for (int32_t s = 0; s < p.softmaxes; s++) p.tau[s] = double_at(a.tau, s);
  if (p.q_id) p.period = period_of(p.q_id, p.N, p.k_id, p.M);
  return p;
}

// row_state: [3][softmaxes][pairs][N]
template <class Number>
cacr::RowState<Number> row_state_of(Number* row_state, int64_t rows) {
  return {row_state, row_state + rows, row_state + 2 * rows};
}

template <bool kBf16>
std::tuple<Tensor, Tensor, Tensor> contrast_cpu(const Tensor& q, std::optional<Tensor> k, std::optional<Tensor> q_id,
                                                std::optional<Tensor> k_id, const Tensor& tau,
                                                std::vector<int64_t> kinds, std::vector<int64_t> q_index,
                                                std::vector<int64_t> k_index, bool inner_product,
                                                bool /*detach_weights*/, std::optional<Tensor> q_self, bool normalize) {
  const ContrastArguments a{q, k, q_id, k_id, tau, kinds, q_index, k_index, inner_product, q_self};
  const ContrastTensors tensors(a);
  return with_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    const cacr::Contrast<T> p = contrast_problem<T>(a, tensors, normalize, kBf16);
    const Sizes rows{p.softmaxes, p.pairs, p.N};
    Tensor value = empty_cpu<double>(rows), lse = empty_cpu<double>(rows),
           row_state = empty_cpu<double>({3, p.softmaxes, p.pairs, p.N});
    const cacr::Statistics out{output<double>(value), output<double>(lse), nullptr,
                               row_state_of(output<double>(row_state), value.numel())};
    SignalCheck signals;
    cacr::contrast_forward<T>(p, out, torch_threads(signals));
    return std::make_tuple(value, lse, row_state);
  });
}

template <bool kBf16>
std::tuple<Tensor, Tensor, Tensor> contrast_backward_cpu(
    const Tensor& q, std::optional<Tensor> k, std::optional<Tensor> q_id, std::optional<Tensor> k_id, const Tensor& tau,
    std::vector<int64_t> kinds, std::vector<int64_t> q_index, std::vector<int64_t> k_index, bool inner_product,
    bool detach_weights, std::optional<Tensor> q_self, bool normalize, const Tensor& any_value,
    const Tensor& any_row_state, const Tensor& any_grad_value, const Tensor& any_grad_lse, bool want_q, bool want_k,
    bool want_tau) {
  const ContrastArguments a{q, k, q_id, k_id, tau, kinds, q_index, k_index, inner_product, q_self};
  const ContrastTensors tensors(a);
  const Tensor value = packed(any_value), row_state = packed(any_row_state), grad_value = packed(any_grad_value),
               grad_lse = packed(any_grad_lse);
  return with_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    const cacr::Contrast<T> p = contrast_problem<T>(a, tensors, normalize, kBf16);
    const bool want_own_k = want_k && k;  // where the keys are the queries, one gradient is the sum of both
    Tensor dq = empty_cpu<T>(gradient_sizes(q, want_q)), dk = empty_cpu<T>(gradient_sizes(tensors.k, want_own_k)),
           dtau = empty_cpu<double>({want_tau ? p.softmaxes : 0});
    const cacr::BackwardRows rows{input<double>(value), row_state_of(input<double>(row_state), value.numel()),
                                  input<double>(grad_value), input<double>(grad_lse), detach_weights};
    cacr::ContrastGradients<T> out{};
    out.dq = want_q ? output<T>(dq) : nullptr;
    out.dk = want_own_k ? output<T>(dk) : k ? nullptr : out.dq;
    out.dtau = want_tau ? output<double>(dtau) : nullptr;
    SignalCheck signals;
    cacr::contrast_backward<T>(p, rows, out, torch_threads(signals));
    return std::make_tuple(dq, dk, dtau);
  });
}

// ---- detached_keys --------------------------------------------------------------------------------------------------
template <bool kBf16>
std::tuple<Tensor, Tensor, Tensor, Tensor> detached_keys_cpu(const Tensor& q, const Tensor& k,
                                                             std::optional<Tensor> q_id, std::optional<Tensor> k_id,
                                                             const Tensor& tau, std::vector<int64_t> kinds,
                                                             std::vector<int64_t> q_index, std::vector<int64_t> k_index,
                                                             bool inner_product, bool detach_weights, bool detach_value,
                                                             bool normalize, bool want_q, bool want_tau) {
  const std::optional<Tensor> keys(k), q_self;
  const ContrastArguments a{q, keys, q_id, k_id, tau, kinds, q_index, k_index, inner_product, q_self};
  const ContrastTensors tensors(a);
  STD_TORCH_CHECK(kinds.size() == 1 && (kinds[0] == cacr::kAll || kinds[0] == cacr::kOther),
                  "cacr_kernels: one softmax over all or other keys expected");
  const bool moments = (want_q || want_tau) && !detach_weights && !detach_value;
  return with_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    const cacr::Contrast<T> p = contrast_problem<T>(a, tensors, normalize, kBf16);
    const Sizes rows{1, p.pairs, p.N}, none{0};
    Tensor value = empty_cpu<double>(rows), lse = empty_cpu<double>(rows),
           means = empty_cpu<T>(want_q ? Sizes{1 + moments, p.pairs, p.N, p.D} : none),
           variance = empty_cpu<double>(moments ? rows : none);
    cacr::DetachedStatistics<T> found{output<double>(value), output<double>(lse), nullptr, nullptr, nullptr};
    if (moments) found.variance = output<double>(variance);
    if (want_q) found.mean = output<T>(means);
    if (want_q && moments) found.spread = found.mean + p.pairs * p.N * p.D;
    SignalCheck signals;
    cacr::detached_keys<T>(p, found, torch_threads(signals));
    return std::make_tuple(value, lse, means, variance);
  });
}

// One implementation for all backends whose tensors are here.
std::tuple<Tensor, Tensor> detached_keys_backward(const Tensor& q, const Tensor& k, std::optional<Tensor> q_id,
                                                  std::optional<Tensor> k_id, const Tensor& tau,
                                                  std::vector<int64_t> kinds, std::vector<int64_t> q_index,
                                                  std::vector<int64_t> k_index, bool inner_product, bool detach_weights,
                                                  bool detach_value, bool normalize, const Tensor& any_value,
                                                  const Tensor& any_lse, const Tensor& any_means,
                                                  const Tensor& any_variance, const Tensor& any_grad_value,
                                                  const Tensor& any_grad_lse, bool want_q, bool want_tau) {
  const std::optional<Tensor> keys(k), q_self;
  const ContrastArguments a{q, keys, q_id, k_id, tau, kinds, q_index, k_index, inner_product, q_self};
  const ContrastTensors tensors(a);
  const Tensor value = packed(any_value), lse = packed(any_lse), means = packed(any_means),
               variance = packed(any_variance), grad_value = packed(any_grad_value), grad_lse = packed(any_grad_lse);
  return with_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    const cacr::Contrast<T> p = contrast_problem<T>(a, tensors, normalize, false);
    Tensor dq = empty_cpu<T>(gradient_sizes(q, want_q)), dtau = empty_cpu<double>({want_tau ? 1 : 0});
    const int64_t rows = p.pairs * p.N;
    const bool moments = (want_q || want_tau) && !detach_weights && !detach_value;
    for (const Tensor& x : {value, lse, grad_value, grad_lse})
      STD_TORCH_CHECK(x.numel() == rows && x.scalar_type() == ScalarType::Double,
                      "cacr_kernels: [1, P, N] of float64 expected");
    STD_TORCH_CHECK(means.scalar_type() == q.scalar_type() && variance.scalar_type() == ScalarType::Double,
                    "cacr_kernels: means of the dtype of q and a variance of float64 expected");
    STD_TORCH_CHECK(means.numel() == (want_q ? (1 + moments) * rows * p.D : means.numel()) &&
                        variance.numel() == (moments ? rows : variance.numel()),
                    "cacr_kernels: means [1 or 2, P, N, D] and a variance [1, P, N] expected");
    cacr::DetachedBackward<T> given{};
    given.found.value = input<double>(value), given.found.lse = input<double>(lse);
    given.grad_value = input<double>(grad_value), given.grad_lse = input<double>(grad_lse);
    given.detach_weights = detach_weights, given.detach_value = detach_value;
    if (moments) given.found.variance = input<double>(variance);
    if (want_q) given.found.mean = input<T>(means);
    if (want_q && moments) given.found.spread = given.found.mean + rows * p.D;
    SignalCheck signals;
    cacr::detached_keys_backward<T>(p, given, want_q ? output<T>(dq) : nullptr,
                                    want_tau ? output<double>(dtau) : nullptr, torch_threads(signals));
    return std::make_tuple(dq, dtau);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cacr_kernels, CPU, m) {
  m.impl("aligned_cpu", TORCH_BOX(&aligned_cpu));
  m.impl("aligned_cpu_bf16", TORCH_BOX(&aligned_cpu));  // differences, no products
  m.impl("aligned_backward_cpu", TORCH_BOX(&aligned_backward_cpu));
  m.impl("aligned_backward_cpu_bf16", TORCH_BOX(&aligned_backward_cpu));
  m.impl("cacr_cpu", TORCH_BOX(&cacr_cpu<false>));
  m.impl("cacr_cpu_bf16", TORCH_BOX(&cacr_cpu<true>));
  m.impl("repulsion_cpu", TORCH_BOX(&repulsion_cpu<false>));
  m.impl("repulsion_cpu_bf16", TORCH_BOX(&repulsion_cpu<true>));
  m.impl("contrast_cpu", TORCH_BOX(&contrast_cpu<false>));
  m.impl("contrast_cpu_bf16", TORCH_BOX(&contrast_cpu<true>));
  m.impl("contrast_backward_cpu", TORCH_BOX(&contrast_backward_cpu<false>));
  m.impl("contrast_backward_cpu_bf16", TORCH_BOX(&contrast_backward_cpu<true>));
  m.impl("detached_keys_cpu", TORCH_BOX(&detached_keys_cpu<false>));
  m.impl("detached_keys_cpu_bf16", TORCH_BOX(&detached_keys_cpu<true>));
  m.impl("detached_keys_backward", TORCH_BOX(&detached_keys_backward));
}

// functions: the members of Python, in their order.
extern "C" __attribute__((visibility("default"))) void cacr_cpu_use_python(void* const* functions) {
  static_assert(sizeof(Python) == 6 * sizeof(void*));
  std::memcpy(&python, functions, sizeof(Python));
}
