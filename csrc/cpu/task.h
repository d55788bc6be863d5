// Between the planner (plan.h, compiled once) and the kernels (kernels.cpp, compiled per instruction set): plain data.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/problem.h"

namespace cacr {

// Rows of queries and keys per block. A block of queries meets all keys in tiles of `keys`.
struct Blocking {
  int64_t rows;  // multiple of the panel
  int64_t keys;
};

// Keys and norms, packed once per call. P: panel width, Dp: D rounded up to it.
template <class T>
struct Packed {
  T* q_norm;    // [q_views][N]             |q|^2, or 0 (inner)
  T* k_bias;    // [k_views][M]             -|k|^2/2, or 0 (inner)
  T* k_panels;  // [k_views][Dp/P][M][P]    null where no query gradient is wanted
};

// How the row gradients dL/dF and dL/dlse come about.
enum class Gradient : int32_t {
  kNone,         // forward only
  kGiven,        // backward only: from the arrays below
  kMeanCost,     // both in one sweep: dL/dF_i = scale (softmax 0)
  kRbfUnscaled,  // both in one sweep: dL/dlse_i = -+ scale exp(lse_1 - lse_0); the caller divides by the sum of the exp
};

struct RowGradients {   // all [softmaxes][pairs][N]
  const double* value;  // statistics of the forward sweep
  const double *top, *sum, *delta;
  const double* grad_value;
  const double* grad_lse;
  bool detach_weights;
};

// Gradient memory of one task: rows `row_stride` apart, zeroed view by view when first written.
template <class T>
struct GradientSlice {
  T* data;  // [views][rows][Dp]
  int64_t view_stride, row_stride;
  uint8_t* touched;  // [views]
};

// The share of one thread: panels [unit0, unit1) of the (pair, panel of queries) list against keys [key0, key1).
template <class T>
struct Task {
  const Contrast<T>* problem;
  Packed<T> packed;
  Blocking blocking;
  bool bounded;  // |log2(e) tau c| <= 64 for every pair and softmax
  Gradient gradient;
  double scale;
  RowGradients rows;
  Statistics statistics;  // all but variance written by forward sweeps, that by those that want the moment
  int64_t unit0, unit1, key0, key1;
  bool want_dq, want_dk, want_moment;
  GradientSlice<T> dq, dk;
  void* scratch;
  // Queries and keys are the same rows, of the same views in every pair (symmetric.h). Kernels then take three steps:
  // a forward `sweep` into the states of one thread, then `finish` over those of all; or `prepare`, then a backward
  // one.
  bool symmetric;
  T* key_moments;  // symmetric, where the moment is wanted: [softmaxes][pairs][N] of this thread, what its tiles add
  T* row_states;   // symmetric_states() of them; forward: of this thread, backward: of all
  T* const* partial_states;  // [partials], the first of them row_states
  int64_t partials;
};

// Aligned positives: instances [b0, b1) of the views.
template <class T>
struct AlignedTask {
  const T* z;  // [V][B][D], features contiguous
  int64_t view_stride, row_stride;
  int64_t V, B, D;
  double tau, scale;      // dL/dF = scale
  Statistics statistics;  // [V][B]
  T* dz;                  // [V][B][*], rows dz_row_stride apart, overwritten; null: not wanted
  int64_t dz_row_stride;
  int64_t b0, b1;
  void* scratch;
};

// Norms and panels of rows [row0, row1) of one view.
template <class T>
struct PackTask {
  const T* x;  // [rows][D]
  int64_t row_stride, D, rows, row0, row1;
  T factor;   // norm = factor |x|^2; 0 stores 0
  T* norm;    // [rows], or null
  T* panels;  // [Dp/P][rows][P], or null
};

// out[i][:] = (accumulate ? out[i][:] : 0) + scale * sum over slices, in their order; rows [row0, row1).
template <class T>
struct ReduceTask {
  T* out;
  int64_t out_stride, D, row0, row1;
  double scale;
  bool accumulate;
  const T* const* slices;  // [count], rows slice_stride apart
  int64_t count, slice_stride;
};

// Units (panels of queries, pair by pair) [unit0, unit1) against keys [key0, key1), whose gradient nobody wants.
template <class T>
struct FrozenTask {
  const Contrast<T>* problem;
  Blocking blocking;
  bool want_mean, want_moments;  // moments: variance, and with the mean also the spread
  int64_t unit0, unit1, key0, key1;
  FrozenStatistics<T> out;
  char* states;  // [parts][units] of frozen_state bytes: keys are shared out and merged later; null: all keys are here
  int64_t part, parts, units;
  void* scratch;
};

template <class T>
struct Kernels {
  int64_t panel;      // queries (and features) side by side
  int64_t tile_rows;  // of a register tile
  size_t (*sweep_scratch)(const Task<T>&);
  size_t (*aligned_scratch)(int64_t views);
  void (*pack)(const PackTask<T>&);
  void (*sweep)(const Task<T>&);
  int64_t (*symmetric_states)(const Task<T>&);  // how many T
  void (*finish)(const Task<T>&);
  void (*prepare)(const Task<T>&);
  void (*aligned)(const AlignedTask<T>&);
  void (*reduce)(const ReduceTask<T>&);
  size_t (*frozen_scratch)(const FrozenTask<T>&);
  size_t (*frozen_state)(const FrozenTask<T>&);
  void (*frozen)(const FrozenTask<T>&);
  void (*frozen_merge)(const FrozenTask<T>&);  // the parts of units [unit0, unit1)
};

}  // namespace cacr
