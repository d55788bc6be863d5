// What the bindings for CPU and CUDA share: tensors by torch's stable ABI, and the checks that kernels rely on.
//
// Included by csrc/*/binding.cpp only; all else is free of torch. Schemas, fakes and autograd formulas stand in
// cacr_kernels/operators.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kinds.h"
#include "out_of_memory.h"

namespace cacr::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// ---- tensors --------------------------------------------------------------------------------------------------------
inline Tensor packed(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }
inline std::optional<Tensor> packed(const std::optional<Tensor>& x) {
  return x ? std::optional(packed(*x)) : std::nullopt;
}

struct Device {
  int32_t type, index;  // aoti_torch_device_type_*(), and which one of that type
};

// A new contiguous tensor. Not torch::stable::new_empty: that looks its operator up by name, which costs a small loss
// more than its arithmetic.
inline Tensor empty(const Sizes& sizes, int32_t dtype, Device device) {
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, device.type, device.index,
                               &handle) != TORCH_SUCCESS) {
    uint64_t bytes = aoti_torch_dtype_element_size(dtype);
    for (int64_t size : sizes) bytes *= uint64_t(size);
    throw OutOfMemory(bytes);
  }
  return Tensor(handle);
}

// The memory of a packed tensor.
template <class T = void>
const T* input(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T = void>
const T* input(const std::optional<Tensor>& x) {
  return x ? input<T>(*x) : nullptr;
}
template <class T = void>
T* output(const Tensor& x) {
  return x.numel() ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
}

// The sizes of the gradient of x [views, rows, D].
inline Sizes gradient_sizes(const Tensor& x, bool wanted) {
  return wanted ? Sizes{x.size(0), x.size(1), x.size(2)} : Sizes{0};
}

// ---- checks ---------------------------------------------------------------------------------------------------------
inline void check_option(int64_t value, int64_t count, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value < count, std::string("cacr_kernels: unknown ") + name);
}

inline void check_rows(const Tensor& x, const Sizes& sizes, const char* name) {
  bool right = x.scalar_type() == ScalarType::Double && x.dim() == int64_t(sizes.size());
  for (size_t i = 0; right && i < sizes.size(); i++) right = x.size(int64_t(i)) == sizes[i];
  STD_TORCH_CHECK(right,
                  std::string("cacr_kernels: ") + name + " of float64, of the shape that the forward gives, expected");
}

inline void check_views(const Tensor& x) { STD_TORCH_CHECK(x.dim() == 3, "cacr_kernels: views [V, B, D] expected"); }

inline bool is_id(const std::optional<Tensor>& id, int64_t n) {
  return id && id->scalar_type() == ScalarType::Int && id->numel() == n;
}

// ---- the arguments of contrast --------------------------------------------------------------------------------------
// As the caller gave them: the long list of the schema as one value.
struct ContrastArguments {
  const Tensor& q;                               // [q_views, N, D]
  const std::optional<Tensor>& k;                // [k_views, M, D]; none: the keys are the queries
  const std::optional<Tensor>&q_id, &k_id;       // [N], [M] of int32
  const Tensor& tau;                             // [softmaxes] of float64
  const std::vector<int64_t>& kinds;             // [softmaxes]
  const std::vector<int64_t>&q_index, &k_index;  // [pairs]
  bool inner_product;
  const std::optional<Tensor>& q_self;  // [N] of int32
};

// The tensors among them, checked and contiguous. They must outlive the problem that points into them.
struct ContrastTensors {
  Tensor q, k;
  std::optional<Tensor> q_id, k_id, q_self;  // none where every set holds all keys

  explicit ContrastTensors(const ContrastArguments& a)
      : q(packed(a.q)),
        k(a.k ? packed(*a.k) : q),
        q_id(packed(a.q_id)),
        k_id(a.k ? packed(a.k_id) : q_id),
        q_self(packed(a.q_self)) {
    STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && q.size(2) == k.size(2) && q.scalar_type() == k.scalar_type(),
                    "cacr_kernels: q [Vq, N, D] and k [Vk, M, D] of one dtype expected");
    STD_TORCH_CHECK(a.q_index.size() == a.k_index.size(), "cacr_kernels: q_index and k_index of one length expected");
    STD_TORCH_CHECK(!a.kinds.empty() && a.kinds.size() <= kMaxSoftmaxes, "cacr_kernels: one or two softmaxes");
    for (size_t i = 0; i < a.q_index.size(); i++)
      STD_TORCH_CHECK(a.q_index[i] >= 0 && a.q_index[i] < q.size(0) && a.k_index[i] >= 0 && a.k_index[i] < k.size(0),
                      "cacr_kernels: view index out of range");
    bool masked = false;
    for (int64_t kind : a.kinds) check_option(kind, kKinds, "kind of a softmax"), masked |= kind != kAll;
    STD_TORCH_CHECK(!masked || (is_id(q_id, q.size(1)) && is_id(k_id, k.size(1))),
                    "cacr_kernels: q_id [N] and k_id [M] of int32 expected");
    STD_TORCH_CHECK(!q_self || is_id(q_self, q.size(1)), "cacr_kernels: q_self [N] of int32 expected");
    if (!masked) q_id.reset(), k_id.reset(), q_self.reset();
  }

  // Fills in sizes, pairs and sets of a problem: the fields that those of both backends have in common.
  template <class Problem>
  void describe(const ContrastArguments& a, Problem& p) const {
    p.q_views = q.size(0), p.N = q.size(1), p.D = q.size(2), p.k_views = k.size(0), p.M = k.size(1);
    p.pairs = int64_t(a.q_index.size()), p.q_index = a.q_index.data(), p.k_index = a.k_index.data();
    p.q_id = input<int32_t>(q_id), p.k_id = input<int32_t>(k_id), p.q_self = input<int32_t>(q_self);
    p.softmaxes = int32_t(a.kinds.size());
    for (size_t s = 0; s < a.kinds.size(); s++) p.kind[s] = int32_t(a.kinds[s]);
    p.keys_are_queries = !a.k, p.inner_product = a.inner_product;
  }
};

}  // namespace cacr::binding
