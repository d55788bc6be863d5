// The CPU operators: what they are asked to compute, and what comes out. Plain structs, free of torch.
//
// Symbols are those of cacr_kernels/reference.py: q, k queries and keys; c cost; a *softmax* is a set of keys (by kind)
// with a signed temperature tau, w_ij = softmax_j(tau c_ij); value F_i = sum_j w_ij c_ij; lse_i = log sum_j exp(tau
// c_ij).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/interrupt.h"
#include "../common/kinds.h"
#include "../common/pairs.h"

namespace cacr {

// body(arg, i) for i in [0, n), in any order, on up to `threads` threads; may run them one after the other.
struct Parallel {
  int64_t threads;
  void (*run)(int64_t n, void (*body)(void* arg, int64_t i), void* arg);
  Interrupt interrupt{};
};

// ---- what is given --------------------------------------------------------------------------------------------------
// `pairs` pairs of views of one shape: pair p compares queries q[q_index[p]] with keys k[k_index[p]].
template <class T>
struct Contrast {
  const T* q;                           // [q_views][N][D], features contiguous
  const T* k;                           // [k_views][M][D], features contiguous
  int64_t q_view_stride, q_row_stride;  // in elements
  int64_t k_view_stride, k_row_stride;
  int64_t q_views, k_views;
  int64_t N, M, D;
  int64_t pairs;
  const int64_t* q_index;  // [pairs]
  const int64_t* k_index;  // [pairs]
  const int32_t* q_id;     // [N] or null (all kinds are kAll)
  const int32_t* k_id;     // [M] or null
  const int32_t* q_self;   // [N] the key that is the query itself, -1: none; null: key i
  int64_t period;          // > 0: ids are row % period, so that equal ids lie on diagonals; 0: anything
  int32_t softmaxes;       // 1 or 2
  int32_t kind[kMaxSoftmaxes];
  double tau[kMaxSoftmaxes];  // signed: attraction > 0, repulsion < 0
  bool keys_are_queries;      // what flows to both is one gradient
  bool inner_product;         // c = -2 q.k instead of |q - k|^2
  bool normalize;             // every row counts as r x, r = 1 / max(|x|, 1e-12)
  bool bf16;                  // products may be those of rows and coefficients rounded to bfloat16
};

// The rows as the forward sweep left them, [softmaxes][pairs][N]: an lse has been rounded, and the backward gives every
// pair the very weight it had (csrc/common/rows.h).
template <class Number>
struct RowState {
  Number* top;    // sign(slope) u_top
  Number* sum;    // sum_j e_j
  Number* delta;  // sum_j w_j d_j
};

// What flows back into the rows of `contrast`, with what its forward made of them.
struct BackwardRows {
  const double* value;  // [softmaxes][pairs][N]
  RowState<const double> state;
  const double* grad_value;  // [softmaxes][pairs][N]
  const double* grad_lse;    // [softmaxes][pairs][N]
  bool detach_weights;
};

// cacr_loss over views z.
template <class T>
struct CacrLoss {
  const T* z;  // [V][B][D], contiguous
  int64_t V, B, D;
  double tau_pos, tau_neg, alpha, beta;
  Pairing pairing;
  bool rbf;
  double rbf_scale;
  bool normalize, bf16;  // as in Contrast
};

// The repulsion of queries from the other instances among keys that are not the queries, those of all processes: row i
// of a view of the queries is row i of that view of the keys.
template <class T>
struct Repulsion {
  const T* z;  // [V][B][D], contiguous
  const T* k;  // [V][M][D], contiguous
  int64_t V, B, M, D;
  double tau;  // signed
  Pairing pairing;
  bool normalize, bf16;  // as in Contrast
};

// Costs c[v][u][b] = |q[v][b] - k[u][b]|^2 between views of the same instances.
template <class T>
struct Aligned {
  const T* q;  // [V][B][D], contiguous
  const T* k;  // [U][B][D], contiguous
  int64_t V, U, B, D;
  bool same;       // the keys are the queries
  bool normalize;  // as in Contrast
};

// ---- what comes out -------------------------------------------------------------------------------------------------
// Per query and softmax, all in float64: they are O(N), and differences of them matter.
struct Statistics {
  double* value;           // [softmaxes][pairs][N] F, 0 for an empty set
  double* lse;             // [softmaxes][pairs][N] natural logarithm, -inf for an empty set
  double* variance;        // [softmaxes][pairs][N] sum_j w (c - F)^2, where the gradient of tau is wanted
  RowState<double> state;  // null: not wanted
};

// What one softmax over keys without a gradient yields, and the means that its gradient w.r.t. a query is made of.
// Null: not wanted (variance and spread: both or none).
template <class Number, class T>
struct DetachedRows {
  Number* value;     // [pairs][N]
  Number* lse;       // [pairs][N]
  Number* variance;  // [pairs][N]
  T* mean;           // [pairs][N][D] sum_j w_j k_j
  T* spread;         // [pairs][N][D] sum_j w_j (c_ij - F_i) k_j
};
template <class T>
using DetachedStatistics = DetachedRows<double, T>;

// What flows back into the rows of `detached_keys`, [pairs][N], with what its forward found.
template <class T>
struct DetachedBackward {
  DetachedRows<const double, const T> found;
  const double *grad_value, *grad_lse;
  bool detach_weights, detach_value;  // the value, or the lse, is all that carries a gradient; else both
};

// The gradients of `contrast`, overwritten; null: not wanted. dq and dk are the same memory, with the sum of both,
// where the keys are the queries.
template <class T>
struct ContrastGradients {
  T* dq;         // [q_views][N][D]
  T* dk;         // [k_views][M][D]
  double* dtau;  // [softmaxes]
};

struct CacrResult {
  double loss, attraction, repulsion, attraction_entropy, repulsion_entropy;
  double grad_tau_pos, grad_tau_neg;  // 0 unless wanted
};

// Means over the queries of all pairs of views, of the entropy over those that have a key.
struct RepulsionResult {
  double value, entropy;
  double grad_tau;  // of the value; 0 unless wanted
};

// Gradients of the value, overwritten; null: not wanted.
template <class T>
struct RepulsionGradients {
  T* dz;  // [V][B][D] as queries
  T* dk;  // [V][M][D]
  bool want_tau;
};

// ---- the operators --------------------------------------------------------------------------------------------------
// The loss with its gradients in one go. dz [V][B][D] is overwritten; null: not wanted.
template <class T>
CacrResult cacr_loss(const CacrLoss<T>& loss, T* dz, bool want_grad_tau, const Parallel& parallel);

// The mean F of the queries with its gradients in one go.
template <class T>
RepulsionResult repulsion(const Repulsion<T>& problem, const RepulsionGradients<T>& gradients,
                          const Parallel& parallel);

// cost [V][U][B]
template <class T>
void aligned_forward(const Aligned<T>& problem, T* cost, const Parallel& parallel);

// From what flows into the costs, grad [V][U][B]: dq [V][B][D] and dk [U][B][D], overwritten; null: not wanted. Where
// the keys are the queries dq is the sum of both.
template <class T>
void aligned_backward(const Aligned<T>& problem, const T* grad, T* dq, T* dk, const Parallel& parallel);

template <class T>
void contrast_forward(const Contrast<T>& problem, const Statistics& statistics, const Parallel& parallel);

template <class T>
void contrast_backward(const Contrast<T>& problem, const BackwardRows& rows, const ContrastGradients<T>& gradients,
                       const Parallel& parallel);

// One softmax over all or other keys, which carry no gradient: one sweep over the similarities for statistics and
// gradients alike.
template <class T>
void detached_keys(const Contrast<T>& problem, const DetachedStatistics<T>& out, const Parallel& parallel);

// Its gradients: dq [q_views][N][D] is overwritten, null: not wanted; dtau [1] likewise.
template <class T>
void detached_keys_backward(const Contrast<T>& problem, const DetachedBackward<T>& rows, T* dq, double* dtau,
                            const Parallel& parallel);

// Bytes that one call may use beside packed copies of its inputs and outputs, whatever M and the number of threads.
// Tests compile with fewer, so that small problems come to the bound.
#ifndef CACR_WORKSPACE_BYTES
#define CACR_WORKSPACE_BYTES (size_t(224) << 20)
#endif
constexpr size_t kWorkspaceBytes = CACR_WORKSPACE_BYTES;

}  // namespace cacr
