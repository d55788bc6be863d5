// The only file that knows torch: checks what the kernels rely on, hands them device pointers, registers the operators.
//
// The operators are those of cacr_kernels/operators with one more argument, the kind of products of float32. They have
// a namespace of their own, cacr_kernels_cuda; cacr_kernels/backends/cuda.py calls them. What they compute:
// cacr_kernels/reference.py.
#include "../common/binding.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "instances/instances.h"
#include "parameters.h"

namespace {

using namespace cacr::binding;

// What gradients and scalars are made of: double for double, else float.
int32_t gradient_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// A new contiguous tensor on the device of `like`.
Tensor empty_on(const Tensor& like, const Sizes& sizes, int32_t dtype) {
  return empty(sizes, dtype, {aoti_torch_device_type_cuda(), like.get_device_index()});
}
Tensor empty_rows(const Tensor& like, const Sizes& sizes) { return empty_on(like, sizes, aoti_torch_dtype_float64()); }

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

// Asks libtorch_cuda, which cannot be linked with where torch is a CPU build. A process with a CUDA tensor has loaded
// it.
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

// Runs on the current stream of the tensor's device. A workspace is handed back before the next one is taken, in the
// order of the stream, so that many launches need no more memory than one. The CUDA runtime linked into this library is
// told of the device, too.
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
                                    m.last = empty_on(m.like, {bytes}, aoti_torch_dtype_uint8());
                                    return output(*m.last);
                                  },
                                  &memory};
  const cudaError_t error = arithmetic(like, float_products)(call, current_stream(device), allocator);
  STD_TORCH_CHECK(error == cudaSuccess,
                  std::string("cacr_kernels: the CUDA kernels cannot be launched: ") + cudaGetErrorString(error));
}

// ---- checks and calls -----------------------------------------------------------------------------------------------
// The last of all checks, so that the others can be tested where there is no GPU.
void check_devices(const Tensor& first, const std::vector<std::optional<Tensor>>& others) {
  STD_TORCH_CHECK(first.is_cuda(), "cacr_kernels: CUDA tensors expected");
  for (const std::optional<Tensor>& x : others)
    STD_TORCH_CHECK(!x || (x->is_cuda() && x->get_device_index() == first.get_device_index()),
                    "cacr_kernels: all tensors on one device expected");
}

void check_products(int64_t float_products) { check_option(float_products, 3, "products of float32"); }

// The tensors of contrast, and the call that points into them.
struct ContrastCall {
  ContrastTensors tensors;
  Tensor tau;
  cacr::Call call{};

  ContrastCall(const ContrastArguments& a, bool detach_weights, bool normalize) : tensors(a), tau(packed(a.tau)) {
    STD_TORCH_CHECK(tau.scalar_type() == ScalarType::Double && tau.numel() == int64_t(a.kinds.size()),
                    "cacr_kernels: tau [softmaxes] of float64 expected");
    STD_TORCH_CHECK(tensors.q.size(0) <= INT32_MAX && tensors.k.size(0) <= INT32_MAX,
                    "cacr_kernels: at most 2147483647 views");
    tensors.describe(a, call);
    call.q = input(tensors.q), call.k = input(tensors.k), call.tau = input<double>(tau);
    call.detach_weights = detach_weights, call.normalize = normalize;
  }
};

// ---- the operators --------------------------------------------------------------------------------------------------
std::tuple<Tensor, Tensor, Tensor> contrast(const Tensor& q, std::optional<Tensor> k, std::optional<Tensor> q_id,
                                            std::optional<Tensor> k_id, const Tensor& tau, std::vector<int64_t> kinds,
                                            std::vector<int64_t> q_index, std::vector<int64_t> k_index,
                                            bool inner_product, bool detach_weights, std::optional<Tensor> q_self,
                                            bool normalize, int64_t float_products) {
  ContrastCall given({q, k, q_id, k_id, tau, kinds, q_index, k_index, inner_product, q_self}, detach_weights,
                     normalize);
  check_products(float_products);
  check_devices(q, {k, given.tensors.q_id, given.tensors.k_id, given.tensors.q_self, tau});
  cacr::Call& call = given.call;
  const Sizes rows{call.softmaxes, call.pairs, call.N};
  const Tensor value = empty_rows(q, rows), lse = empty_rows(q, rows);
  const Tensor row_state = empty_rows(q, {3, call.softmaxes, call.pairs, call.N});
  call.operation = cacr::Operation::kForward;
  call.value = output<double>(value), call.lse = output<double>(lse), call.row_state = output<double>(row_state);
  if (value.numel()) run(given.tensors.q, float_products, call);
  return {value, lse, row_state};
}

std::tuple<Tensor, Tensor, Tensor> contrast_backward(
    const Tensor& q, std::optional<Tensor> k, std::optional<Tensor> q_id, std::optional<Tensor> k_id, const Tensor& tau,
    std::vector<int64_t> kinds, std::vector<int64_t> q_index, std::vector<int64_t> k_index, bool inner_product,
    bool detach_weights, std::optional<Tensor> q_self, bool normalize, const Tensor& any_value,
    const Tensor& any_row_state, const Tensor& any_grad_value, const Tensor& any_grad_lse, bool want_q, bool want_k,
    bool want_tau, int64_t float_products) {
  ContrastCall given({q, k, q_id, k_id, tau, kinds, q_index, k_index, inner_product, q_self}, detach_weights,
                     normalize);
  const ContrastTensors& t = given.tensors;
  cacr::Call& call = given.call;
  const Sizes rows{call.softmaxes, call.pairs, call.N};
  check_rows(any_value, rows, "value");
  check_rows(any_row_state, {3, call.softmaxes, call.pairs, call.N}, "row_state");
  check_rows(any_grad_value, rows, "grad_value");
  check_rows(any_grad_lse, rows, "grad_lse");
  check_products(float_products);
  check_devices(q, {k, t.q_id, t.k_id, t.q_self, tau, any_value, any_row_state, any_grad_value, any_grad_lse});
  const Tensor value = packed(any_value), row_state = packed(any_row_state), grad_value = packed(any_grad_value),
               grad_lse = packed(any_grad_lse);
  const Tensor dq = empty_on(q, gradient_sizes(t.q, want_q), gradient_dtype(q)),
               dk = empty_on(q, gradient_sizes(t.k, want_k && k), gradient_dtype(q)),
               dtau = empty_rows(q, {want_tau ? call.softmaxes : 0});
  call.operation = cacr::Operation::kBackward;
  call.value = const_cast<double*>(input<double>(value));
  call.row_state = const_cast<double*>(input<double>(row_state));
  call.grad_value = input<double>(grad_value), call.grad_lse = input<double>(grad_lse);
  call.grad_q = output(dq), call.grad_k = output(dk), call.grad_tau = output<double>(dtau);
  if (dq.numel() || dk.numel() || dtau.numel()) run(t.q, float_products, call);
  return {dq, dk, dtau};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cacr_loss(const Tensor& any_views, std::optional<Tensor> any_numbers,
                                                     double tau_pos, double tau_neg, double alpha, double beta,
                                                     int64_t pairing, bool rbf, double rbf_scale, bool normalize,
                                                     bool want_grad, bool want_grad_numbers, int64_t float_products) {
  check_views(any_views);
  const Tensor views = packed(any_views);
  const std::optional<Tensor> numbers = packed(any_numbers);
  STD_TORCH_CHECK(!numbers || (numbers->scalar_type() == ScalarType::Double && numbers->numel() == 5),
                  "cacr_kernels: numbers [5] of float64 expected");
  STD_TORCH_CHECK(views.numel() > 0, "cacr_kernels: views without an empty dimension expected");
  check_option(pairing, cacr::kPairings, "pairing");
  check_products(float_products);
  cacr::Call call{};
  call.pairing = cacr::Pairing(pairing);
  STD_TORCH_CHECK(cacr::count_view_pairs(views.size(0), call.pairing) <= cacr::kMaxPairs,
                  "cacr_kernels: too many views for the fused loss");
  check_devices(views, {numbers});
  call.operation = cacr::Operation::kLoss;
  call.q = input(views), call.q_views = views.size(0), call.N = views.size(1), call.D = views.size(2);
  call.rbf = rbf, call.normalize = normalize, call.numbers = input<double>(numbers);
  const double given[5] = {tau_pos, tau_neg, alpha, beta, rbf_scale};
  std::copy_n(given, 5, call.given);
  const int32_t dtype = gradient_dtype(views);
  const Tensor loss = empty_on(views, {}, dtype), parts = empty_on(views, {4}, dtype),
               grad = empty_on(views, gradient_sizes(views, want_grad), dtype),
               grad_numbers = numbers ? empty_rows(views, {5}) : empty_on(views, {0}, dtype);
  call.loss = output(loss), call.parts = output(parts), call.grad_q = output(grad);
  if (numbers && want_grad_numbers) call.grad_numbers = output<double>(grad_numbers);
  run(views, float_products, call);
  if (numbers && !want_grad_numbers) torch::stable::fill_(grad_numbers, 0.0);
  return {loss, parts, grad, grad_numbers};
}

}  // namespace

// "", or why the kernels cannot run on a device: no code for its processors, a driver that is too old, no such device.
// It changes the current device; the caller restores it.
extern "C" __attribute__((visibility("default"))) const char* cacr_cuda_error(int device) {
  cudaError_t error = cudaSetDevice(device);
  cacr::Call probe{};
  probe.operation = cacr::Operation::kProbe;
  for (cacr::Run* run :
       {cacr::run_bf16, cacr::run_f16, cacr::run_tf32, cacr::run_tf32x3, cacr::run_float, cacr::run_double})
    if (error == cudaSuccess) error = run(probe, nullptr, {});
  cudaGetLastError();  // clears the error, which has been told
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

STABLE_TORCH_LIBRARY_IMPL(cacr_kernels_cuda, CUDA, m) {
  m.impl("contrast", TORCH_BOX(&contrast));
  m.impl("contrast_backward", TORCH_BOX(&contrast_backward));
  m.impl("cacr", TORCH_BOX(&cacr_loss));
}
