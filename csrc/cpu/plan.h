// The planner: splits a problem into tasks for threads, fixed by shape and thread count, and adds up what they return.
// Torch-free, compiled once with baseline flags.
#pragma once

#include <cstdint>

#include "../common/problem.h"
#include "task.h"

namespace cacr {

// body(arg, i) for i in [0, n), in any order, on up to `threads` threads; may run them one after the other.
struct Parallel {
  int64_t threads;
  void (*run)(int64_t n, void (*body)(void* arg, int64_t i), void* arg);
};

enum class Pairing : int32_t { kUnordered, kOrdered, kPooled };

// cacr_loss over views z [V][B][D] (contiguous), with its gradients in one go.
template <class T>
struct CacrLoss {
  const T* z;
  int64_t V, B, D;
  double tau_pos, tau_neg, alpha, beta;
  Pairing pairing;
  bool rbf;
  double rbf_scale;
};

struct CacrResult {
  double loss, attraction, repulsion, attraction_entropy, repulsion_entropy;
  double grad_tau_pos, grad_tau_neg;
};

// dz [V][B][D] is overwritten; null: not wanted. grad_tau_*: 0 unless wanted.
template <class T>
CacrResult cacr_loss(const CacrLoss<T>& loss, T* dz, bool want_grad_tau, const Parallel& parallel);

// statistics [softmaxes][pairs][N]: value and lse
template <class T>
void contrast_forward(const Contrast<T>& problem, const Statistics& statistics, const Parallel& parallel);

// dq [q_views][N][D], dk [k_views][M][D] and dtau [softmaxes] are overwritten; null: not wanted.
template <class T>
void contrast_backward(const Contrast<T>& problem, const RowGradients& rows, T* dq, T* dk, double* dtau,
                       const Parallel& parallel);

// One softmax over all or other keys, which carry no gradient: one sweep over the similarities for statistics and
// gradients alike.
template <class T>
void contrast_frozen(const Contrast<T>& problem, const FrozenStatistics<T>& out, const Parallel& parallel);

// Bytes that one call may use beside packed copies of its inputs and outputs, whatever M and the number of threads.
constexpr size_t kWorkspaceBytes = size_t(224) << 20;

}  // namespace cacr
