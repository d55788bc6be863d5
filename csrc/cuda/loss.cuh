// Phases of the fused loss: attraction by form differences, and sums over rows. Derivatives: cacr_kernels/reference.py.
#pragma once

#include "softmax.cuh"

namespace cacr {

// ---- attraction: one warp per instance ------------------------------------------------------------------------------
// c_vu for u < v, each by all lanes.
template <class P, class Acc>
CACR_DEVICE void aligned_costs(const P& p, int64_t b, Acc* cost) {
  const int64_t V = p.fused.views, B = p.fused.batch;
  const int lane = threadIdx.x % 32;
  for (int64_t v = 0; v < V; v++) {
    for (int64_t u = 0; u < v; u++) {
      Acc sum = 0;
      for (int64_t d = lane; d < p.D; d += 32) {
        const Acc x = Acc(widen(p.q[(v * B + b) * p.D + d])) - Acc(widen(p.q[(u * B + b) * p.D + d]));
        sum += x * x;
      }
#pragma unroll
      for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(kFullWarp, sum, other);
      if (lane == 0) cost[v * V + u] = cost[u * V + v] = sum;
    }
  }
}

// The softmax of view v over the others; w_vu (1 + tau (c - F)) alpha / (V B) goes to `pull`.
template <class P, class Acc>
CACR_DEVICE void aligned_row(const P& p, int64_t b, int64_t v, const Acc* cost, Acc* pull) {
  const int64_t V = p.fused.views, B = p.fused.batch, row = v * B + b;
  const double tau = number(p.fused.tau_pos);
  double top = -double(INFINITY), sum = 0, sum_c = 0, variance = 0;
#pragma unroll 1
  for (int64_t u = 0; u < V; u++)
    if (u != v) top = fmax(top, tau * cost[u]);
#pragma unroll 1
  for (int64_t u = 0; u < V; u++) {
    const double e = u == v ? 0 : exp(tau * cost[u] - top);
    sum += e, sum_c += u == v ? 0 : e * cost[u];
  }
  const double value = sum_c / sum, scale = number(p.fused.alpha) / (double(V) * double(B));
#pragma unroll 1
  for (int64_t u = 0; u < V; u++) {
    const double w = u == v ? 0 : exp(tau * cost[u] - top) / sum, centred = u == v ? 0 : cost[u] - value;
    variance += w * centred * centred;
    pull[u] = Acc(scale * w * (1 + tau * centred));
  }
  p.fused.row_value[row] = value, p.fused.row_variance[row] = variance;
  p.fused.row_entropy[row] = log(sum) + top - tau * value;
}

template <class P>
CACR_DEVICE void aligned_phase(const P& p) {
  using Acc = typename P::Accumulator;
  const int64_t V = p.fused.views, warps = int64_t(gridDim.x) * (kThreads / 32);
  const int lane = threadIdx.x % 32;
  for (int64_t b = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; b < p.fused.batch; b += warps) {
    Acc* const cost = static_cast<Acc*>(p.fused.cost) + b * V * V;
    Acc* const pull = static_cast<Acc*>(p.fused.pull) + b * V * V;
    aligned_costs(p, b, cost);
    __syncwarp();
    for (int64_t v = lane; v < V; v += 32) aligned_row(p, b, v, cost + v * V, pull + v * V);
    __syncwarp();
    // c_vu counts in the rows of v and of u: dL/dz_v = sum_u 2 (dL/dc_vu + dL/dc_uv) (z_v - z_u)
    for (int64_t v = lane; v < V; v += 32)
      for (int64_t u = 0; u < v; u++) pull[v * V + u] = pull[u * V + v] = 2 * (pull[v * V + u] + pull[u * V + v]);
  }
}

// ---- rbf: log mean_b F_b with log F_b = lse_1 - lse_0; one block per pair -------------------------------------------
template <class P>
CACR_DEVICE void pair_sums_phase(const P& p, SharedArray<double, kThreads / 32>& reduction) {
  const int64_t rows = p.pairs * p.N;
  for (int64_t pair = blockIdx.x; pair < p.pairs; pair += gridDim.x) {
    const int64_t first = pair * p.N;
    double top = -double(INFINITY), sum = 0, d_tau = 0, entropy = 0;
#pragma unroll 1
    for (int64_t i = first + threadIdx.x; i < first + p.N; i += kThreads) top = fmax(top, p.lse[rows + i] - p.lse[i]);
    top = block_max(reduction, top);
#pragma unroll 1
    for (int64_t i = first + threadIdx.x; i < first + p.N; i += kThreads) {
      const double f = exp(p.lse[rows + i] - p.lse[i] - top);
      sum += f, d_tau += f * (p.value[i] - p.value[rows + i]);
      entropy += p.lse[i] - number(p.tau[0]) * p.value[i];
    }
    sum = block_sum(reduction, sum), d_tau = block_sum(reduction, d_tau), entropy = block_sum(reduction, entropy);
    if (threadIdx.x != 0) continue;
    p.fused.pair_log_sum[pair] = top + log(sum);
    p.fused.pair_sums[2 * pair] = d_tau / sum, p.fused.pair_sums[2 * pair + 1] = entropy;
  }
}

// ---- sums: every block adds up its share of the rows, then the first block those of all -----------------------------
enum Scalar : int { kAttraction, kAttractionTau, kAttractionEntropy, kRepulsion, kRepulsionTau, kRepulsionEntropy };

// Variance of the costs of a row; 0 for an empty one, which no sweep has written.
template <class P>
CACR_DEVICE double variance_of(const P& p, int s, int64_t row) {
  const int64_t rows = p.pairs * p.N;
  double variance = 0;
  if (p.sum[row_of(p, s, row)] != 0)
#pragma unroll 1
    for (int share = 0; share < p.q_units.shares; share++)
      variance += p.moment[(int64_t(share) * p.softmaxes + s) * rows + row];
  return variance;
}

template <class P>
CACR_DEVICE void add_fused_rows(const P& p, int64_t first, int64_t step, double (&x)[kScalars]) {
#pragma unroll 1
  for (int64_t i = first; i < p.fused.views * p.fused.batch; i += step) {
    x[kAttraction] += p.fused.row_value[i], x[kAttractionTau] += p.fused.row_variance[i];
    x[kAttractionEntropy] += p.fused.row_entropy[i];
  }
  if (p.fused.rbf) {
#pragma unroll 1
    for (int64_t i = first; i < p.pairs; i += step) {
      x[kRepulsion] += p.fused.pair_log_sum[i] - log(double(p.N));
      x[kRepulsionTau] += p.fused.pair_sums[2 * i], x[kRepulsionEntropy] += p.fused.pair_sums[2 * i + 1];
    }
    return;
  }
#pragma unroll 1
  for (int64_t i = first; i < p.pairs * p.N; i += step) {
    x[kRepulsion] += p.value[i], x[kRepulsionEntropy] += p.lse[i] - number(p.tau[0]) * p.value[i];
    if (p.want_moment) x[kRepulsionTau] += variance_of(p, 0, i);
  }
}

// dL/dtau of softmax s: sum_i dL/dF var_i + dL/dlse F_i.
template <class P>
CACR_DEVICE void add_moments(const P& p, int64_t first, int64_t step, double (&x)[kScalars]) {
  const int64_t rows = p.pairs * p.N;
#pragma unroll
  for (int s = 0; s < kMaxSoftmaxes; s++)
#pragma unroll 1
    for (int64_t i = first; s < p.softmaxes && i < rows; i += step) {
      const int64_t at = row_of(p, s, i);
      if (p.sum[at] != 0) x[s] += p.grad_value[at] * variance_of(p, s, i) + p.grad_lse[at] * p.value[at];
    }
}

// Attraction: sum_u pull_vu (z_v - z_u) of one feature of instance b.
template <class P>
CACR_DEVICE typename P::Accumulator pull_of_views(const P& p, int64_t v, int64_t b, int64_t d) {
  using Acc = typename P::Accumulator;
  const int64_t V = p.fused.views, B = p.fused.batch;
  const Acc* pull = static_cast<const Acc*>(p.fused.pull) + (b * V + v) * V;
  const Acc own = widen(p.q[(v * B + b) * p.D + d]);
  Acc sum = 0;
#pragma unroll 1
  for (int64_t u = 0; u < V; u++) sum += pull[u] * (own - Acc(widen(p.q[(u * B + b) * p.D + d])));
  return sum;
}

// Completes the gradients of all rows of one side, a warp per row: all shares in their order, and the attraction.
template <class P>
CACR_DEVICE void complete_gradients(const P& p, typename P::Accumulator* gradient,
                                    const typename P::Accumulator* partial, int shares, int64_t rows) {
  using Acc = typename P::Accumulator;
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t(gridDim.x) * (kThreads / 32);
#pragma unroll 1
  for (int64_t i = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; i < rows; i += warps) {
    const int64_t v = p.fused.on ? i / p.fused.batch : 0, b = i - v * p.fused.batch;
#pragma unroll 1
    for (int64_t d = lane; d < p.D; d += 32) {
      Acc* const to = gradient + i * p.D + d;
      Acc sum = p.accumulate || shares == 1 ? *to : Acc(0);
#pragma unroll 1
      for (int share = 0; shares > 1 && share < shares; share++) sum += partial[(share * rows + i) * p.D + d];
      *to = p.fused.on ? sum + pull_of_views(p, v, b, d) : sum;
    }
  }
}

template <class P>
CACR_DEVICE void sums_phase(const P& p, SharedArray<double, kThreads / 32>& reduction) {
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
  double x[kScalars] = {};
  if (p.fused.on)
    add_fused_rows(p, first, step, x);
  else if (p.grad_tau && !p.detach_weights)
    add_moments(p, first, step, x);
#pragma unroll
  for (int i = 0; i < kScalars; i++) {
    const double sum = block_sum(reduction, x[i]);
    if (threadIdx.x == 0) p.scalars[blockIdx.x * kScalars + i] = sum;
  }
}

template <class P>
CACR_DEVICE void write_fused(const P& p, const double (&x)[kScalars]) {
  using Acc = typename P::Accumulator;
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

template <class P>
CACR_DEVICE void totals_phase(const P& p, SharedArray<double, kThreads / 32>& reduction) {
  if (blockIdx.x != 0) return;
  double x[kScalars];
#pragma unroll
  for (int i = 0; i < kScalars; i++) {
    double sum = 0;
#pragma unroll 1
    for (int b = threadIdx.x; b < int(gridDim.x); b += kThreads) sum += p.scalars[b * kScalars + i];
    x[i] = block_sum(reduction, sum);
  }
  if (threadIdx.x != 0) return;
  if (p.fused.on) return write_fused(p, x);
#pragma unroll
  for (int s = 0; s < kMaxSoftmaxes; s++)
    if (s < p.softmaxes) p.grad_tau[s] = p.accumulate ? p.grad_tau[s] + x[s] : x[s];
}

}  // namespace cacr
