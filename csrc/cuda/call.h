// An operator call as its caller describes it, whatever the types are: what the binding and the emulation of the tests
// fill in. The operators and their symbols are those of cacr_kernels/reference.py.
#pragma once

#include <cstdint>

#include "../common/kinds.h"
#include "../common/pairs.h"

namespace cacr {

enum class Operation : int32_t { kForward = 0, kBackward = 1, kLoss = 2, kProbe = 3 };

// Device memory until `allocate` is called again or the operator returns, in the order of the stream; null where there
// is none.
struct Allocator {
  void* (*allocate)(void* context, int64_t bytes);
  void* context;
};

// Element and gradient types are those of the arithmetic (tile/arithmetic.cuh). All arrays but the indices are on the
// device and contiguous; null where an operation does not have or want them.
struct Call {
  Operation operation;  // kProbe needs nothing else, and launches nothing
  const void* q;        // [q_views][N][D]
  const void* k;        // [k_views][M][D]
  int64_t q_views, k_views, N, M, D;
  int64_t pairs;
  const int64_t* q_index;  // [pairs] on the host
  const int64_t* k_index;  // [pairs] on the host
  const int32_t* q_id;     // [N]
  const int32_t* k_id;     // [M]
  const int32_t* q_self;   // [N] the key that is the query itself, -1: none; null: key i
  const double* tau;       // [softmaxes] signed
  int32_t softmaxes, kind[kMaxSoftmaxes];
  bool keys_are_queries, inner_product, detach_weights;
  bool normalize;  // every row counts as r x, r = 1 / max(|x|, 1e-12)

  // forward writes, backward reads
  double* value;      // [softmaxes][pairs][N]
  double* lse;        // [softmaxes][pairs][N]
  double* row_state;  // [3][softmaxes][pairs][N] u_top, sum, delta of csrc/common/rows.h

  const double* grad_value;  // [softmaxes][pairs][N]
  const double* grad_lse;    // [softmaxes][pairs][N]
  void* grad_q;              // [q_views][N][D], of both if the keys are the queries; for kLoss of the views
  void* grad_k;              // [k_views][M][D]
  double* grad_tau;          // [softmaxes]

  // kLoss: q are the views [V][B][D]; numbers: tau_pos, tau_neg, alpha, beta, rbf_scale
  Pairing pairing;
  bool rbf;
  const double* numbers;  // [5] on the device, or null: then `given`
  double given[5];
  void* loss;            // []
  void* parts;           // [4] attraction, repulsion and their entropies
  double* grad_numbers;  // [5]
};

}  // namespace cacr
