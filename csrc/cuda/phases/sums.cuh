// The phases that add up over rows: the log-mean of the rbf repulsion, the scalars of the losses, the temperatures'
// gradients, and the gradients of all splits. Definitions and derivatives: cacr_kernels/reference.py.
#pragma once

#include "attraction.cuh"

namespace cacr {

// ---- rbf: log mean_b F_b with log F_b = lse_1 - lse_0; a block per pair ---------------------------------------------
template <class Params>
CACR_DEVICE void pair_sums_phase(const Params& p, Reduction& reduction) {
  const int64_t rows = p.pairs * p.N;
  for (int64_t pair = blockIdx.x; pair < p.pairs; pair += gridDim.x) {
    const int64_t first = pair * p.N;
    double top = -double(INFINITY), sum = 0, d_tau = 0, entropy = 0;
#pragma unroll 1
    for (int64_t i = first + threadIdx.x; i < first + p.N; i += kThreads)
      top = fmax(top, rbf_log_value(p.lse[i], p.lse[rows + i]));
    top = block_max(reduction, top);
#pragma unroll 1
    for (int64_t i = first + threadIdx.x; i < first + p.N; i += kThreads) {
      const double f = exp(rbf_log_value(p.lse[i], p.lse[rows + i]) - top);
      sum += f, d_tau += f * rbf_tau_derivative(p.value[i], p.value[rows + i]);
      entropy += row_entropy(p.lse[i], number(p.tau[0]), p.value[i]);
    }
    sum = block_sum(reduction, sum), d_tau = block_sum(reduction, d_tau), entropy = block_sum(reduction, entropy);
    if (threadIdx.x != 0) continue;
    p.fused.pair_log_sum[pair] = top + log(sum);
    p.fused.pair_sums[2 * pair] = d_tau / sum, p.fused.pair_sums[2 * pair + 1] = entropy;
  }
}

// ---- sums: every block adds up its rows -----------------------------------------------------------------------------

// The scalars of the fused loss; for contrast scalar s is the gradient of tau[s].
enum Scalar : int { kAttraction, kAttractionTau, kAttractionEntropy, kRepulsion, kRepulsionTau, kRepulsionEntropy };

// Variance of the costs of a row, over all splits; an empty row has none written and gives 0.
template <class Params>
CACR_DEVICE double variance_of(const Params& p, int s, int64_t row) {
  const int64_t rows = p.pairs * p.N;
  double variance = 0;
  if (p.sum[row_of(p, s, row)] != 0)
#pragma unroll 1
    for (int split = 0; split < p.q_units.splits; split++)
      variance += p.split_variance[(int64_t(split) * p.softmaxes + s) * rows + row];
  return variance;
}

template <class Params>
CACR_DEVICE void add_fused_rows(const Params& p, double (&x)[kScalars]) {
  const GridStride threads = GridStride::of_thread();
#pragma unroll 1
  for (int64_t i = threads.first; i < p.fused.views * p.fused.batch; i += threads.step) {
    x[kAttraction] += p.fused.row_value[i], x[kAttractionTau] += p.fused.row_variance[i];
    x[kAttractionEntropy] += p.fused.row_entropy[i];
  }
  if (p.fused.rbf) {
#pragma unroll 1
    for (int64_t i = threads.first; i < p.pairs; i += threads.step) {
      x[kRepulsion] += p.fused.pair_log_sum[i] - log(double(p.N));
      x[kRepulsionTau] += p.fused.pair_sums[2 * i], x[kRepulsionEntropy] += p.fused.pair_sums[2 * i + 1];
    }
    return;
  }
#pragma unroll 1
  for (int64_t i = threads.first; i < p.pairs * p.N; i += threads.step) {
    x[kRepulsion] += p.value[i], x[kRepulsionEntropy] += row_entropy(p.lse[i], number(p.tau[0]), p.value[i]);
    if (p.want_variance) x[kRepulsionTau] += variance_of(p, 0, i);
  }
}

// dL/dtau of softmax s: sum_i dL/dF_i variance_i + dL/dlse_i F_i.
template <class Params>
CACR_DEVICE void add_grad_tau(const Params& p, double (&x)[kScalars]) {
  const int64_t rows = p.pairs * p.N;
  const GridStride threads = GridStride::of_thread();
#pragma unroll
  for (int s = 0; s < kMaxSoftmaxes; s++)
#pragma unroll 1
    for (int64_t i = threads.first; s < p.softmaxes && i < rows; i += threads.step) {
      const int64_t at = row_of(p, s, i);
      if (p.sum[at] != 0) x[s] += p.grad_value[at] * variance_of(p, s, i) + p.grad_lse[at] * p.value[at];
    }
}

// The rows of all views of one side, and their gradients.
template <class Element, class Acc>
struct Side {
  const Element* x;           // [rows][D]
  const Acc *norm, *factor;   // [rows], with normalize
  Acc* gradient;              // [rows][D]
  const Acc* split_gradient;  // [splits][rows][D], unused with one split
  int splits;
  int64_t rows;

  // Turns the gradient g of r x in row i into that of x, r (g - (g.r x) r x), by the lanes that have written it. along:
  // this lane's share of g.r x. A row shorter than those that become unit vectors has none.
  CACR_DEVICE void to_raw_row(int64_t i, int64_t D, Acc along) const {
    const bool has_none = is_short(factor[i]) || norm[i] == 0;
    const Acc r = factor[i], part = warp_sum(along);
#pragma unroll 1
    for (int64_t d = threadIdx.x % 32; d < D; d += 32) {
      Acc* const to = gradient + i * D + d;
      *to = has_none ? Acc(0) : r * (*to - part * (r * Acc(widen(x[i * D + d]))));
    }
  }
};

// Completes the gradients of all rows of one side, a warp per row: adds up all splits in their order, and the
// attraction; with normalize they become those of raw rows.
template <class Params, class Element, class Acc>
CACR_DEVICE void complete_side(const Params& p, const Side<Element, Acc>& side) {
  const int lane = threadIdx.x % 32;
  const GridStride warps = GridStride::of_warp();
#pragma unroll 1
  for (int64_t i = warps.first; i < side.rows; i += warps.step) {
    const int64_t v = p.fused.on ? i / p.fused.batch : 0, b = i - v * p.fused.batch;
    Acc along = 0;
#pragma unroll 1
    for (int64_t d = lane; d < p.D; d += 32) {
      Acc* const to = side.gradient + i * p.D + d;
      Acc sum = p.accumulate || side.splits == 1 ? *to : Acc(0);
#pragma unroll 1
      for (int split = 0; side.splits > 1 && split < side.splits; split++)
        sum += side.split_gradient[(split * side.rows + i) * p.D + d];
      if (p.fused.on) sum += attraction_gradient(p, v, b, d);
      *to = sum;
      if (p.to_raw_rows) along += sum * (side.factor[i] * Acc(widen(side.x[i * p.D + d])));
    }
    if (p.to_raw_rows) side.to_raw_row(i, p.D, along);
  }
}

template <class Params>
CACR_DEVICE void complete_gradients(const Params& p) {
  const Side queries{p.q, p.q_norm, p.q_factor, p.grad_q, p.split_grad_q, p.q_units.splits, p.q_views * p.N};
  if (p.want_q && (queries.splits > 1 || p.fused.on || p.to_raw_rows)) complete_side(p, queries);
  const Side keys{p.k, p.k_norm, p.k_factor, p.grad_k, p.split_grad_k, p.k_units.splits, p.k_views * p.M};
  if (p.want_k && (keys.splits > 1 || p.to_raw_rows)) complete_side(p, keys);
}

template <class Params>
CACR_DEVICE void sums_phase(const Params& p, Reduction& reduction) {
  complete_gradients(p);
  double x[kScalars] = {};
  if (p.fused.on)
    add_fused_rows(p, x);
  else if (p.grad_tau && !p.detach_weights)
    add_grad_tau(p, x);
#pragma unroll
  for (int i = 0; i < kScalars; i++) {
    const double sum = block_sum(reduction, x[i]);
    if (threadIdx.x == 0) p.block_scalars[blockIdx.x * kScalars + i] = sum;
  }
}

// ---- totals: the first block adds up those of all
// --------------------------------------------------------------------
template <class Params>
CACR_DEVICE void write_fused(const Params& p, const double (&x)[kScalars]) {
  using Acc = typename Params::Accumulator;
  const FusedLoss& f = p.fused;
  const double rows = double(f.views) * double(f.batch), pair_rows = double(p.pairs) * double(p.N);
  const double alpha = number(f.alpha), beta = number(f.beta), attraction = alpha * x[kAttraction] / rows;
  double repulsion = 0, entropy = 0, tau_neg = 0;
  if (p.pairs > 0) {
    repulsion = f.rbf ? beta * x[kRepulsion] / p.pairs : -beta * x[kRepulsion] / pair_rows;
    entropy = x[kRepulsionEntropy] / pair_rows;
    tau_neg = f.rbf ? beta * x[kRepulsionTau] / p.pairs : beta * x[kRepulsionTau] / pair_rows;
  }
  *static_cast<Acc*>(f.loss) = Acc(attraction + repulsion);
  Acc* const parts = static_cast<Acc*>(f.parts);
  parts[0] = Acc(attraction), parts[1] = Acc(repulsion);
  parts[2] = Acc(x[kAttractionEntropy] / rows), parts[3] = Acc(entropy);
  if (!f.grad_numbers) return;
  f.grad_numbers[0] = alpha * x[kAttractionTau] / rows, f.grad_numbers[1] = tau_neg;
  for (int i = 2; i < 5; i++) f.grad_numbers[i] = 0;
}

template <class Params>
CACR_DEVICE void totals_phase(const Params& p, Reduction& reduction) {
  if (blockIdx.x != 0) return;
  double x[kScalars];
#pragma unroll
  for (int i = 0; i < kScalars; i++) {
    double sum = 0;
#pragma unroll 1
    for (int b = threadIdx.x; b < int(gridDim.x); b += kThreads) sum += p.block_scalars[b * kScalars + i];
    x[i] = block_sum(reduction, sum);
  }
  if (threadIdx.x != 0) return;
  if (p.fused.on) return write_fused(p, x);
#pragma unroll
  for (int s = 0; s < kMaxSoftmaxes; s++)
    if (s < p.softmaxes) p.grad_tau[s] = p.accumulate ? p.grad_tau[s] + x[s] : x[s];
}

}  // namespace cacr
