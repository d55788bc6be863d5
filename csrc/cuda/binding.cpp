// The only file that knows torch: checks what the kernels rely on, hands them device pointers, registers the operators.
// They are those of cacr_kernels/operators/ops.py with one more argument, the kind of products of float32
// (cacr_kernels/backends/cuda.py).
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "instances.h"
#include "parameters.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor packed(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

std::optional<Tensor> packed(const std::optional<Tensor>& x) { return x ? std::optional(packed(*x)) : std::nullopt; }

// What gradients and scalars are made of: double for double, else float.
int32_t gradient_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// A new contiguous tensor on the device of `like`.
Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, int32_t dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, shape[i]);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cuda(), like.get_device_index(), &handle));
  return Tensor(handle);
}
Tensor empty_rows(const Tensor& like, const std::vector<int64_t>& shape) {
  return empty(like, shape, aoti_torch_dtype_float64());
}

template <class T = void>
const T* in(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T = void>
const T* in(const std::optional<Tensor>& x) {
  return x ? in<T>(*x) : nullptr;
}
template <class T = void>
T* out(const Tensor& x) {
  return x.numel() ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
}

cacr::Run* arithmetic(const Tensor& x, int64_t float_products) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return cacr::run_double;
    case ScalarType::BFloat16:
      return cacr::run_bf16;
    case ScalarType::Half:
      return cacr::run_f16;
    default:
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "cacr_kernels: floating point tensors expected");
  }
  return float_products == 0 ? cacr::run_float : float_products == 1 ? cacr::run_tf32 : cacr::run_tf32x3;
}

// Of libtorch_cuda, which is not there to be linked with where torch is a CPU build; whoever has a CUDA tensor has it.
cudaStream_t current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get != nullptr, "cacr_kernels: libtorch_cuda.so does not tell the current stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Runs on the current stream of the tensor's device, and hands every workspace back in its order before it takes the
// next one: pairs of many launches need no more than those of one. The runtime in this library learns of the device,
// too.
void run(const Tensor& like, int64_t float_products, const cacr::Call& call) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  STD_TORCH_CHECK(cudaSetDevice(device) == cudaSuccess, "cacr_kernels: the device cannot be used");
  struct Memory {
    const Tensor& like;
    std::optional<Tensor> last;
  } memory{like, {}};
  const cacr::Allocator allocator{[](void* context, int64_t bytes) -> void* {
                                    Memory& m = *static_cast<Memory*>(context);
                                    m.last.reset();
                                    m.last = empty(m.like, {bytes}, aoti_torch_dtype_uint8());
                                    return out<>(*m.last);
                                  },
                                  &memory};
  const cudaError_t error = arithmetic(like, float_products)(call, current_stream(device), allocator);
  STD_TORCH_CHECK(error == cudaSuccess,
                  std::string("cacr_kernels: the CUDA kernels cannot be launched: ") + cudaGetErrorString(error));
}

// ---- what the kernels trust in --------------------------------------------------------------------------------------
bool is_id(const std::optional<Tensor>& id, int64_t n) {
  return id && id->scalar_type() == ScalarType::Int && id->numel() == n;
}

void check_rows(const Tensor& x, const std::vector<int64_t>& shape, const char* name) {
  bool right = x.scalar_type() == ScalarType::Double && x.dim() == int64_t(shape.size());
  for (size_t i = 0; right && i < shape.size(); i++) right = x.size(int64_t(i)) == shape[i];
  STD_TORCH_CHECK(right,
                  std::string("cacr_kernels: ") + name + " of float64, of the shape that the forward gives, expected");
}

void check_option(int64_t value, int64_t count, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value < count, std::string("cacr_kernels: unknown ") + name);
}

// The last of all checks, so that the others can be tested where there is no GPU.
void check_devices(const Tensor& first, const std::vector<std::optional<Tensor>>& others) {
  STD_TORCH_CHECK(first.is_cuda(), "cacr_kernels: CUDA tensors expected");
  for (const std::optional<Tensor>& x : others)
    STD_TORCH_CHECK(!x || (x->is_cuda() && x->get_device_index() == first.get_device_index()),
                    "cacr_kernels: all tensors on one device expected");
}

// The arguments of contrast as contiguous tensors, which must outlive the call that points into them.
struct ContrastArguments {
  Tensor q, k, tau;
  std::optional<Tensor> q_id, k_id;
  cacr::Call call{};

  ContrastArguments(const Tensor& q_, const std::optional<Tensor>& k_, const std::optional<Tensor>& q_id_,
                    const std::optional<Tensor>& k_id_, const Tensor& tau_, const std::vector<int64_t>& kinds,
                    const std::vector<int64_t>& q_index, const std::vector<int64_t>& k_index, bool inner, bool detach)
      : q(packed(q_)),
        k(k_ ? packed(*k_) : q),
        tau(packed(tau_)),
        q_id(packed(q_id_)),
        k_id(k_ ? packed(k_id_) : q_id) {
    STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && q.size(2) == k.size(2) && q.scalar_type() == k.scalar_type(),
                    "cacr_kernels: q [Vq, N, D] and k [Vk, M, D] of one dtype expected");
    STD_TORCH_CHECK(q_index.size() == k_index.size(), "cacr_kernels: q_index and k_index of one length expected");
    STD_TORCH_CHECK(!kinds.empty() && kinds.size() <= cacr::kMaxSoftmaxes, "cacr_kernels: one or two softmaxes");
    STD_TORCH_CHECK(tau.scalar_type() == ScalarType::Double && tau.numel() == int64_t(kinds.size()),
                    "cacr_kernels: tau [softmaxes] of float64 expected");
    STD_TORCH_CHECK(q.size(0) <= INT32_MAX && k.size(0) <= INT32_MAX, "cacr_kernels: at most 2147483647 views");
    for (size_t i = 0; i < q_index.size(); i++)
      STD_TORCH_CHECK(q_index[i] >= 0 && q_index[i] < q.size(0) && k_index[i] >= 0 && k_index[i] < k.size(0),
                      "cacr_kernels: view index out of range");
    bool masked = false;
    for (int64_t kind : kinds)
      check_option(kind, cacr::kSameNotSelf + 1, "kind of a softmax"), masked |= kind != cacr::kAll;
    STD_TORCH_CHECK(!masked || (is_id(q_id, q.size(1)) && is_id(k_id, k.size(1))),
                    "cacr_kernels: q_id [N] and k_id [M] of int32 expected");
    if (!masked) q_id.reset(), k_id.reset();
    call.q = in(q), call.k = in(k);
    call.q_views = q.size(0), call.N = q.size(1), call.D = q.size(2), call.k_views = k.size(0), call.M = k.size(1);
    call.pairs = int64_t(q_index.size()), call.q_index = q_index.data(), call.k_index = k_index.data();
    call.q_id = in<int32_t>(q_id), call.k_id = in<int32_t>(k_id), call.tau = in<double>(tau);
    call.softmaxes = int32_t(kinds.size());
    for (size_t s = 0; s < kinds.size(); s++) call.kind[s] = int32_t(kinds[s]);
    call.own = !k_, call.inner = inner, call.detach_weights = detach;
  }
};

std::tuple<Tensor, Tensor, Tensor> contrast(const Tensor& q, std::optional<Tensor> k, std::optional<Tensor> q_id,
                                            std::optional<Tensor> k_id, const Tensor& tau, std::vector<int64_t> kinds,
                                            std::vector<int64_t> q_index, std::vector<int64_t> k_index, bool inner,
                                            bool detach_weights, int64_t float_products) {
  ContrastArguments a(q, k, q_id, k_id, tau, kinds, q_index, k_index, inner, detach_weights);
  check_option(float_products, 3, "products of float32");
  check_devices(q, {k, a.q_id, a.k_id, tau});
  const int64_t S = int64_t(kinds.size()), P = a.call.pairs, N = a.call.N;
  const Tensor value = empty_rows(q, {S, P, N}), lse = empty_rows(q, {S, P, N}), weights = empty_rows(q, {3, S, P, N});
  a.call.operation = cacr::Operation::kForward;
  a.call.value = out<double>(value), a.call.lse = out<double>(lse), a.call.weights = out<double>(weights);
  if (value.numel()) run(a.q, float_products, a.call);
  return {value, lse, weights};
}

std::tuple<Tensor, Tensor, Tensor> contrast_backward(
    const Tensor& q, std::optional<Tensor> k, std::optional<Tensor> q_id, std::optional<Tensor> k_id, const Tensor& tau,
    std::vector<int64_t> kinds, std::vector<int64_t> q_index, std::vector<int64_t> k_index, bool inner,
    bool detach_weights, const Tensor& any_value, const Tensor& any_weights, const Tensor& any_grad_value,
    const Tensor& any_grad_lse, bool want_q, bool want_k, bool want_tau, int64_t float_products) {
  ContrastArguments a(q, k, q_id, k_id, tau, kinds, q_index, k_index, inner, detach_weights);
  const int64_t S = int64_t(kinds.size());
  check_rows(any_value, {S, a.call.pairs, a.call.N}, "value");
  check_rows(any_weights, {3, S, a.call.pairs, a.call.N}, "weights");
  check_rows(any_grad_value, {S, a.call.pairs, a.call.N}, "grad_value");
  check_rows(any_grad_lse, {S, a.call.pairs, a.call.N}, "grad_lse");
  check_option(float_products, 3, "products of float32");
  check_devices(q, {k, a.q_id, a.k_id, tau, any_value, any_weights, any_grad_value, any_grad_lse});
  const Tensor value = packed(any_value), weights = packed(any_weights), grad_value = packed(any_grad_value),
               grad_lse = packed(any_grad_lse);
  auto gradient = [](const Tensor& x, bool wanted) {
    return empty(x, wanted ? std::vector<int64_t>{x.size(0), x.size(1), x.size(2)} : std::vector<int64_t>{0},
                 gradient_dtype(x));
  };
  const Tensor dq = gradient(a.q, want_q), dk = gradient(a.k, want_k && k), dtau = empty_rows(q, {want_tau ? S : 0});
  cacr::Call& call = a.call;
  call.operation = cacr::Operation::kBackward;
  call.value = const_cast<double*>(in<double>(value)), call.weights = const_cast<double*>(in<double>(weights));
  call.grad_value = in<double>(grad_value), call.grad_lse = in<double>(grad_lse);
  call.grad_q = out<>(dq), call.grad_k = out<>(dk), call.grad_tau = out<double>(dtau);
  if (dq.numel() || dk.numel() || dtau.numel()) run(a.q, float_products, call);
  return {dq, dk, dtau};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cacr_loss(const Tensor& any_views, std::optional<Tensor> any_numbers,
                                                     double tau_pos, double tau_neg, double alpha, double beta,
                                                     int64_t pairing, bool rbf, double rbf_scale, bool want_grad,
                                                     bool want_grad_numbers, int64_t float_products) {
  STD_TORCH_CHECK(any_views.dim() == 3, "cacr_kernels: views [V, B, D] expected");
  const Tensor views = packed(any_views);
  const std::optional<Tensor> numbers = packed(any_numbers);
  STD_TORCH_CHECK(!numbers || (numbers->scalar_type() == ScalarType::Double && numbers->numel() == 5),
                  "cacr_kernels: numbers [5] of float64 expected");
  STD_TORCH_CHECK(views.numel() > 0, "cacr_kernels: views without an empty dimension expected");
  check_option(pairing, 3, "pairing");
  check_option(float_products, 3, "products of float32");
  const int64_t V = views.size(0);
  const int64_t pairs = pairing == 2 ? 1 : pairing == 1 ? V * (V - 1) : V * (V - 1) / 2;
  STD_TORCH_CHECK(pairs <= cacr::kMaxPairs, "cacr_kernels: too many views for the fused loss");
  check_devices(views, {numbers});
  cacr::Call call{};
  call.operation = cacr::Operation::kLoss;
  call.q = in(views), call.q_views = views.size(0), call.N = views.size(1), call.D = views.size(2);
  call.pairing = int32_t(pairing), call.rbf = rbf, call.numbers = in<double>(numbers);
  const double given[5] = {tau_pos, tau_neg, alpha, beta, rbf_scale};
  std::copy_n(given, 5, call.given);
  const int32_t dtype = gradient_dtype(views);
  const std::vector<int64_t> shape{views.size(0), views.size(1), views.size(2)}, none{0};
  const Tensor loss = empty(views, {}, dtype), parts = empty(views, {4}, dtype),
               grad = empty(views, want_grad ? shape : none, dtype),
               grad_numbers = numbers ? empty_rows(views, {5}) : empty(views, none, dtype);
  call.loss = out<>(loss), call.parts = out<>(parts), call.grad_q = out<>(grad);
  if (numbers && want_grad_numbers) call.grad_numbers = out<double>(grad_numbers);
  run(views, float_products, call);
  if (numbers && !want_grad_numbers) torch::stable::fill_(grad_numbers, 0.0);
  return {loss, parts, grad, grad_numbers};
}

}  // namespace

// "", or why the kernels cannot run on a device: no image for its processors, a driver that is too old, no such device.
// The caller sees to it that the device is current before and after.
extern "C" __attribute__((visibility("default"))) const char* cacr_cuda_error(int device) {
  cudaError_t error = cudaSetDevice(device);
  cacr::Call probe{};
  probe.operation = cacr::Operation::kProbe;
  for (cacr::Run* run :
       {cacr::run_bf16, cacr::run_f16, cacr::run_tf32, cacr::run_tf32x3, cacr::run_float, cacr::run_double})
    if (error == cudaSuccess) error = run(probe, nullptr, {});
  cudaGetLastError();  // asked and answered
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

STABLE_TORCH_LIBRARY_IMPL(cacr_kernels, CUDA, m) {
  m.impl("cuda_contrast", TORCH_BOX(&contrast));
  m.impl("cuda_contrast_backward", TORCH_BOX(&contrast_backward));
  m.impl("cuda_cacr", TORCH_BOX(&cacr_loss));
}
