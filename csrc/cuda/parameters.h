// What a launch is asked to compute: one plain struct for every phase of every operator.
//
// Symbols are those of cacr_kernels/reference.py. S softmaxes, P pairs of this launch; indices: s softmax, p pair, i
// query, j key, v view, d feature. All arrays are contiguous.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/kinds.h"

namespace cacr {

constexpr int kMaxPairs = 64;  // of one launch; more go into the next one

// Of one query and softmax: dL/du_j = e_j (a + b (u_j - u_top - delta)), see csrc/common/rows.h.
template <class Acc>
struct alignas(4 * sizeof(Acc)) Coefficients {
  Acc u_top, delta, a, b;
};

// A launch runs some of the phases, in this order, with barriers of the grid between them.
enum Phase : int {
  kNorms = 0,         // |q|^2 and |k|^2, and the factors that make unit rows
  kStatistics = 1,    // sums over the keys of a split
  kFinish = 2,        // value and lse of every row, from the sums of all splits, and the attraction of the fused loss
  kPairSums = 3,      // fused rbf: sums over the batch whose log the loss takes
  kCoefficients = 4,  // dL/du as a function of u, for every row
  kGradients = 5,     // gradients of queries and keys, variances of costs
  kSums = 6,          // sums of each block over its rows; gradients of all splits added up
  kTotals = 7,        // the scalars
  kPhases = 8
};

// A number that may stand on the device: factor (*at + *also), without `also` factor *at, without `at` factor.
struct Number {
  const double *at, *also;
  double factor;
};

// cacr_loss in one launch. V views, B instances; scalars and costs are of the type of gradients.
struct FusedLoss {
  bool on, rbf;
  int64_t views, batch;  // V, B
  Number tau_pos, alpha, beta;
  void* loss;               // []
  void* parts;              // [4] attraction, repulsion and their entropies
  double* grad_numbers;     // [5] by tau_pos and tau_neg, then zeros; or null
  double* row_value;        // [V][B] attraction: F
  double* row_variance;     // [V][B]             sum_u w (c - F)^2
  double* row_entropy;      // [V][B]             lse - tau F
  void* cost;               // [B][V][V]          c_vu
  void* attraction_weight;  // [B][V][V]          a_vu, with dL/dz_v = sum_u a_vu (z_v - z_u)
  double* pair_log_sum;     // [P] rbf: log sum_b exp(lse_1 - lse_0)
  double* pair_sums;        // [P][2] rbf: dL/dtau up to factors, sum of the entropies
};

// How the gradients of one side, queries or keys, are cut up (plan.cuh). A unit is a block of 64 rows of a view, one
// group of features, and one split of the rows on the other side.
struct Units {
  int32_t count;  // of all views; 0 where nothing of this side is wanted
  int32_t blocks, groups, splits;
};

template <class Element, class Acc>
struct Parameters {
  using Accumulator = Acc;

  // ---- the problem
  const Element* q;  // [q_views][N][D]
  const Element* k;  // [k_views][M][D]
  int64_t N, M, D;
  int32_t q_views, k_views, pairs, softmaxes;
  int64_t all_pairs, first_pair;                   // of the operator, of this launch
  int32_t q_index[kMaxPairs], k_index[kMaxPairs];  // [P] views of each pair
  const int32_t* q_id;                             // [N] or null
  const int32_t* k_id;                             // [M] or null
  const int32_t* q_self;                           // [N] the key that is the query itself; null: key i
  int32_t period;               // without q_id: the id of a row is row % period; 0: nothing is masked
  int32_t kind[kMaxSoftmaxes];  // [S]
  Number tau[kMaxSoftmaxes];    // [S] signed
  bool keys_are_queries;        // and what flows to both is one gradient
  bool inner_product;           // c = -2 q.k
  bool normalize;               // every row counts as r x, r = 1 / max(|x|, 1e-12)
  bool detach_weights;
  bool positives;                // costs of equal ids are taken from differences where the product cancels
  bool positive[kMaxSoftmaxes];  // [S] a softmax over those: its u is -c / 2
  bool cancelling;               // two softmaxes over one set: a_0 w_0 + a_1 w_1 = (a_0 + a_1) w_0 + a_1 (w_1 - w_0)
  bool aligned_16;               // rows begin at multiples of 16 bytes
  bool want_q, want_k, want_variance;
  bool accumulate;   // gradients are added to what is there
  bool to_raw_rows;  // and, complete with this launch, become those of x where they were those of r x

  // ---- workspace
  uint32_t phases;                  // bit mask
  int32_t splits;                   // of the keys, in the statistics
  Units q_units, k_units;           // of the gradients; keys that are the queries have no units of their own
  Acc* q_norm;                      // [q_views][N] |r x|^2 with normalize
  Acc* k_norm;                      // [k_views][M], q_norm where the keys are the queries
  Acc* q_factor;                    // [q_views][N] r with normalize, else null; 0 for a row of zeros
  Acc* k_factor;                    // [k_views][M], q_factor where the keys are the queries
  double* split_sums;               // [splits][3][S][P][N] top, sum e, sum e (u - u_top); see tile/softmax.cuh
  Coefficients<Acc>* coefficients;  // [S][P][N]
  Acc* ratio;                       // [P][N] where two softmaxes cancel: a of the second one multiplies e_1 - ratio e_0
  Acc* gradient_sum;                // [P][N] sum_j dL/du_ij
  float* bounds;                    // [3][grid] where coefficients are scaled: a bound of |dL/du| over the rows of a
                                    // block, and the largest factors of queries and of keys
  double* split_variance;           // [q_units.splits][S][P][N] sum_j w (c - F)^2
  Acc* split_grad_q;                // [q_units.splits][q_views][N][D] where there are several splits
  Acc* split_grad_k;                // [k_units.splits][k_views][M][D] where there are several splits
  double* block_scalars;            // [grid][kScalars] sums over the rows of each block

  // ---- rows [S][all_pairs][N]: forward writes, backward reads
  double *value, *lse;
  double *top, *sum, *delta;  // the state of a row: u_top, sum_j e_j and delta of csrc/common/rows.h
  const double *grad_value, *grad_lse;

  // ---- gradients, float for half types
  Acc* grad_q;       // [q_views][N][D]; of both, where the keys are the queries
  Acc* grad_k;       // [k_views][M][D]
  double* grad_tau;  // [S]

  FusedLoss fused;
};

template <class Arithmetic>
using ParametersOf = Parameters<typename Arithmetic::Element, typename Arithmetic::Acc>;

constexpr int kScalars = 6;

}  // namespace cacr
