// What the kernels are asked to compute: plain data, known to the kernels of every backend and to their bindings.
//
// Symbols are those of cacr_kernels/reference.py: q, k queries and keys; c cost; a *softmax* is a set of keys (by kind)
// with a signed temperature tau, w_ij = softmax_j(tau c_ij); value F_i = sum_j w_ij c_ij; lse_i = log sum_j exp(tau
// c_ij).
#pragma once

#include <cstdint>

#include "kinds.h"

namespace cacr {

// `pairs` problems of one shape: problem p compares queries q[q_index[p]] with keys k[k_index[p]].
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
  int64_t period;          // > 0: ids are row % period, so that equal ids lie on diagonals; 0: anything
  int32_t softmaxes;       // 1 or 2
  int32_t kind[kMaxSoftmaxes];
  double tau[kMaxSoftmaxes];  // signed: attraction > 0, repulsion < 0
  bool own;                   // the keys are the queries, and what flows to both is one gradient
  bool inner;                 // c = -2 q.k instead of |q - k|^2
};

// Per query and softmax, all [softmaxes][pairs][N] in float64: they are O(N), and differences of them matter.
struct Statistics {
  double* value;              // F, 0 for an empty set
  double* lse;                // natural logarithm, -inf for an empty set
  double* variance;           // sum_j w (c - F)^2, where the gradient of tau is wanted
  double *top, *sum, *delta;  // the rows as the forward sweep left them (csrc/cpu/softmax.h, RowState), so that the
                              // backward gives every pair the very weight it had: an lse has been rounded
};

// What one softmax over keys without a gradient yields: `value`, `lse`, `variance` [pairs][N], and the means that its
// gradient w.r.t. a query is made of, [pairs][N][D]; null: not wanted (variance and spread: both or none).
template <class T>
struct FrozenStatistics {
  double *value, *lse, *variance;
  T* mean;    // sum_j w_j k_j
  T* spread;  // sum_j w_j (c_ij - F_i) k_j
};

}  // namespace cacr
