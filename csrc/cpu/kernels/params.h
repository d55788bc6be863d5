// The parameters of the kernels, one struct for each, and the table of the kernels of one instruction set.
//
// Between the planner (csrc/cpu/planner, compiled once), which fills these in, and the kernels (csrc/cpu/kernels,
// compiled once per instruction set): plain data. Symbols as in csrc/cpu/api.h; PW is the panel width of the
// instruction set (Kernels::panel), Dp is D rounded up to it, W is PW / 2.
#pragma once

#include "../api.h"

namespace cacr {

// Rows of queries and keys per block. A block of queries meets all keys in tiles of `keys`.
struct Blocking {
  int64_t rows;  // multiple of the panel
  int64_t keys;
};

// Panels of queries [unit0, unit1), counted pair by pair, against keys [key0, key1): the share of one thread.
struct Share {
  int64_t unit0, unit1, key0, key1;
};

// Keys rounded to bfloat16 as the operands of tile_bf16.h, not scaled. Of view v: from v * view_rows on; rows that do
// not exist are 0.
struct Bf16Keys {
  uint16_t* rows;     // [k_views][view_rows][row_stride]
  uint16_t* columns;  // [k_views][view_rows/32][D rounded up to 32][32]
  int64_t view_rows, row_stride;
};

// Keys and norms, packed once per call.
template <class T>
struct Packed {
  T* q_norm;      // [q_views][N]             |q|^2, or 0 (inner product)
  T* k_bias;      // [k_views][M]             -|k|^2/2, or 0 (inner product)
  T* k_panels;    // [k_views][Dp/PW][M][PW]    null where no query gradient is wanted
  T *q_r, *k_r;   // [q_views][N], [k_views][M] inverse lengths of raw rows, one array where the keys are the queries;
                  // null: rows are taken as they are. Norms, biases and panels are those of unit rows.
  Bf16Keys keys;  // for products of bfloat16
};

// How the row gradients dL/dF and dL/dlse come about.
enum class Gradient : int32_t {
  kNone,         // forward only
  kGiven,        // backward only: from SweepParams::rows
  kMeanCost,     // both in one sweep: dL/dF_i = scale (softmax 0)
  kRbfUnscaled,  // both in one sweep: dL/dlse_i = -+ scale exp(lse_1 - lse_0); the caller divides by the sum of the exp
};

// Gradient memory of one task: rows `row_stride` apart, zeroed view by view when first written.
template <class T>
struct GradientSlice {
  T* data;  // [views][rows][Dp]
  int64_t view_stride, row_stride;
  uint8_t* touched;  // [views]
};

// A sweep over queries and keys: statistics, gradients, or both.
template <class T>
struct SweepParams {
  const Contrast<T>* problem;
  Packed<T> packed;
  Blocking blocking;
  bool bounded;  // |log2(e) tau c| <= 64 for every pair and softmax
  bool bf16;     // products of bfloat16: blocking.keys is a multiple of 32, and share.key0 where dq is wanted
  Gradient gradient;
  double scale;
  BackwardRows rows;
  Statistics statistics;  // all but variance written by forward sweeps, that by those that want the moment
  Share share;
  bool want_dq, want_dk, want_moment;
  GradientSlice<T> dq, dk;
  void* scratch;
  Interrupt interrupt;  // asked before every tile
};

// A sweep where queries and keys are the same rows, of the same views in every pair. It takes three steps: a forward
// `sweep` into the states of one thread, then `finish` over those of all; or `prepare`, then a backward `sweep`.
template <class T>
struct SymmetricParams {
  SweepParams<T> sweep;
  T* key_moments;            // [softmaxes][pairs][N] what the tiles of this thread add; null: not wanted
  T* row_states;             // [symmetric_states()] forward: of this thread, backward: of all
  T* const* partial_states;  // [partials] the first of them row_states
  int64_t partials;
};

// Aligned positives: instances [b0, b1) of the views.
template <class T>
struct AlignedParams {
  const T* z;  // [V][B][D], features contiguous
  const T* r;  // [V][B] inverse lengths of raw rows, dz is then that of unit rows; null: rows are taken as they are
  int64_t view_stride, row_stride;
  int64_t V, B, D;
  double tau, scale;      // dL/dF = scale
  Statistics statistics;  // [V][B]
  T* dz;                  // [V][B][*], rows dz_row_stride apart, overwritten; null: not wanted
  int64_t dz_row_stride;
  int64_t b0, b1;
  void* scratch;
};

// Costs between views of instances [b0, b1), or their gradients.
template <class T>
struct AlignedCostParams {
  const T *q, *k;      // [V][B][D], [U][B][D]
  const T *q_r, *k_r;  // [V][B], [U][B] inverse lengths of raw rows; null: rows are taken as they are
  int64_t V, U, B, D;
  bool same;      // k is q
  T* cost;        // [V][U][B]; null: the gradients are wanted
  const T* grad;  // [V][U][B] of the costs
  T *dq, *dk;     // [V][B][D], [U][B][D] of unit rows where the rows are raw; null: not wanted
  int64_t b0, b1;
};

// Norms and panels of rows [row0, row1) of one view, as queries and as keys. Null: not wanted.
template <class T>
struct PackParams {
  const T* x;  // [rows][D]
  int64_t row_stride, D, rows, row0, row1;
  bool inner_product;
  T* r;       // [rows] overwritten; where it is wanted, all else is that of unit rows
  T* q_norm;  // [rows]
  T* k_bias;  // [rows]
  T* panels;  // [Dp/PW][rows][PW]
};

// Keys [row0, row1) of one view, for which memory is there: row0 is a multiple of 32, row1, too, and the rows from
// `count` on are 0.
struct Bf16PackParams {
  const float* x;  // [count][D]
  int64_t row_stride, D, count, row0, row1;
  uint16_t *rows, *columns;  // of the view
  int64_t out_stride;        // of rows
};

// Gradients of unit rows, which become those of the raw rows [row0, row1).
template <class T>
struct RawGradientParams {
  const T *x, *r;  // [rows][D], [rows]
  int64_t row_stride, D, row0, row1;
  T* gradient;  // [rows][D]
};

// out[i][:] = (accumulate ? out[i][:] : 0) + scale * sum over slices, in their order; rows [row0, row1).
template <class T>
struct ReduceParams {
  T* out;  // [rows][D]
  int64_t out_stride, D, row0, row1;
  double scale;
  bool accumulate;
  const T* const* slices;  // [count], rows slice_stride apart
  int64_t count, slice_stride;
};

// One softmax over keys whose gradient nobody wants.
template <class T>
struct DetachedKeysParams {
  const Contrast<T>* problem;
  Blocking blocking;
  bool bf16;  // products of bfloat16, where rows are in their range: blocking.keys is a multiple of 32
  bool want_mean, want_moments;  // moments: variance, and with the mean also the spread
  Share share;
  DetachedStatistics<T> out;
  char* states;  // [parts][units] of detached_keys_state bytes: keys are shared out and merged later; null: all keys
                 // are here
  int64_t part, parts, units;
  void* scratch;
  Interrupt interrupt;  // asked before every tile
};

// Rows of one side in the order of their ids.
struct SortedRows {
  const int32_t *row, *id;  // [count]
  int64_t count;
};

// What a query makes of its positives (csrc/common/rows.h); an empty row has a = b = 0.
template <class T>
struct PositiveRow {
  T top, delta, a, b;  // top: sign(slope) u_top
};

// The gradient of one softmax over positives, added to what is there. Rows [row0, row1) of q_rows are queries, and keys
// too where both flags are set; those of k_rows are keys.
template <class T>
struct PositivesParams {
  const Contrast<T>* problem;
  int32_t softmax;
  const PositiveRow<T>* rows;  // [pairs][N]
  const T *q_r, *k_r;          // as in Packed
  SortedRows q_rows, k_rows;
  bool as_queries, as_keys;
  int64_t row0, row1;
  T* gradient;  // [views][N or M][D]
  Interrupt interrupt;
};

template <class T>
struct Kernels {
  int64_t panel;      // queries (and features) side by side
  int64_t tile_rows;  // of a register tile
  void (*pack)(const PackParams<T>&);
  void (*reduce)(const ReduceParams<T>&);
  void (*to_raw_rows)(const RawGradientParams<T>&);
  void (*pack_bf16)(const Bf16PackParams&);  // null: no products of bfloat16

  size_t (*strip_scratch)(const SweepParams<T>&);
  void (*strip)(const SweepParams<T>&);

  size_t (*symmetric_scratch)(const SymmetricParams<T>&);
  int64_t (*symmetric_states)(const SymmetricParams<T>&);  // how many T
  void (*symmetric_sweep)(const SymmetricParams<T>&);
  void (*symmetric_finish)(const SymmetricParams<T>&);
  void (*symmetric_prepare)(const SymmetricParams<T>&);

  size_t (*aligned_scratch)(int64_t views);
  void (*aligned)(const AlignedParams<T>&);
  void (*aligned_costs)(const AlignedCostParams<T>&);
  void (*positives)(const PositivesParams<T>&);

  size_t (*detached_keys_scratch)(const DetachedKeysParams<T>&);
  size_t (*detached_keys_state)(const DetachedKeysParams<T>&);
  void (*detached_keys)(const DetachedKeysParams<T>&);
  void (*detached_keys_merge)(const DetachedKeysParams<T>&);  // the parts of the units of the share
};

}  // namespace cacr
