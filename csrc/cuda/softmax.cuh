// Elementwise work on a tile of u_ij = q_i.k_j - |k_j|^2 / 2: statistics of the rows on the way forward, dL/du on the
// way back. As in csrc/cpu/softmax.h everything is measured from the key with the largest weight so far, whose exponent
// is exactly 0: log2(e) tau c = slope u + constant, e = 2^(slope (u - u_top)), slope = -2 log2(e) tau.
#pragma once

#include "tile.cuh"

namespace cacr {

constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

CACR_DEVICE double number(const Number& x) { return x.factor * (x.at ? *x.at + (x.also ? *x.also : 0.0) : 1.0); }

// Where row [pair][i] of a launch stands among those of the operator.
template <class P>
CACR_DEVICE int64_t row_of(const P& p, int s, int64_t row) {
  return (s * p.all_pairs + p.first_pair) * p.N + row;
}

template <class Acc, class P>
CACR_DEVICE Acc slope_of(const P& p, int s) {
  return Acc(-2 * kLog2e * number(p.tau[s]));
}

// One row, as far as a thread has seen it.
template <class Acc>
struct RowState {
  Acc top;         // sign(slope) u of the key with the largest exponent, -inf before any
  Sum<Acc> sum;    // sum e
  Sum<Acc> sum_u;  // sum e (u - u_top)

  static CACR_DEVICE RowState empty() { return {-Acc(INFINITY), {0, 0}, {0, 0}}; }

  // Moves the top to `now`, at least what it was.
  CACR_DEVICE void raise(Acc now, Acc slope) {
    if (!(now > top)) return;
    if (top > -Acc(INFINITY)) {
      const Acc sign = slope < 0 ? Acc(-1) : Acc(1), moved = sign * (top - now), factor = exp2_of(slope * moved);
      sum.scale(factor), sum_u.scale(factor);
      sum_u.add(sum.high * moved), sum_u.low += sum.low * moved;
    }
    top = now;
  }
};

// Adds a thread's elements of rows h = 0, 1 to their states.
template <class Acc>
CACR_DEVICE void add_statistics(RowState<Acc> (&rows)[2], const Acc (&u)[kFragments][4], uint32_t members, Acc slope) {
  const Acc sign = slope < 0 ? Acc(-1) : Acc(1);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    Acc top = rows[h].top;
#pragma unroll
    for (int n = 0; n < kFragments; n++)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; e++)
        if (members >> bit_of(n, e) & 1) top = fmax(top, sign * u[n][e]);
    rows[h].raise(top, slope);
    const Acc u_top = sign * top;
    Acc sum = 0, sum_u = 0;
#pragma unroll
    for (int n = 0; n < kFragments; n++) {
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; e++) {
        const bool member = members >> bit_of(n, e) & 1;
        const Acc d = member ? u[n][e] - u_top : Acc(0), w = member ? exp2_of(slope * d) : Acc(0);
        sum += w, sum_u += w * d;
      }
    }
    rows[h].sum.add(sum), rows[h].sum_u.add(sum_u);
  }
}

// dL/du of one element over all softmaxes, added up.
template <class Acc>
struct ElementGradient {
  Acc h, first;  // dL/du; the e of the first softmax

  CACR_DEVICE void add(const Coefficients<Acc>& c, Acc ratio, Acc slope, Acc u, bool member, Acc& moment) {
    const Acc distance = u - c.u_top;
    const Acc e = member ? exp2_of(slope * distance) : Acc(0), d = member ? distance - c.delta : Acc(0);
    h += c.a * (e - ratio * first) + c.b * (e * d);
    moment += e * d * d;
    first = e;
  }
};

// A row's sums over all keys, and what follows from them.
struct RowResult {
  double value, lse, u_top, sum, delta;
};

// norm: |q|^2, or 0 where u is -c / 2. Empty sets give 0 and -inf; what is not finite shows.
CACR_DEVICE RowResult finish_row(double u_top, double sum, double sum_u, double tau, double norm) {
  const bool finite_tau = tau - tau == 0;
  const bool empty = sum == 0 && sum_u == 0 && finite_tau;
  if (empty) return {0, -double(INFINITY), 0, 0, 0};
  const double delta = sum_u / sum, top_cost = norm - 2 * u_top;
  double value = top_cost - 2 * delta;
  if (sum == 0 || !finite_tau) value = double(NAN);
  const double lse = value != value ? value : kLn2 * log2(sum) + tau * top_cost;
  return {value, lse, u_top, sum + 0 * value, delta};
}

// a, b of a row from the gradients of its value and lse: dL/dc = w (g_value (1 + tau (c - F)) + g_lse tau), dc/du = -2.
struct RowGradient {
  double a, b, constant;  // constant: sum_j dL/du_ij
};

CACR_DEVICE RowGradient row_gradient(double sum, double g_value, double g_lse, double tau) {
  if (sum == 0) return {0, 0, 0};
  const double constant = -2 * (g_value + g_lse * tau);
  return {constant / sum, 4 * g_value * tau / sum, constant};
}

// ---- reductions -----------------------------------------------------------------------------------------------------
CACR_DEVICE double warp_sum(double x) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(kFullWarp, x, other);
  return x;
}

// Of all threads, in a fixed order; every thread gets it. The caller does not write `shared` before a barrier.
CACR_DEVICE double block_sum(SharedArray<double, kThreads / 32>& shared, double x) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kThreads / 32; w++) sum += shared[w];
  return sum;
}

// The largest; NaN does not count.
CACR_DEVICE double block_max(SharedArray<double, kThreads / 32>& shared, double x) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x = fmax(x, __shfl_xor_sync(kFullWarp, x, other));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double top = shared[0];
  for (int w = 1; w < kThreads / 32; w++) top = fmax(top, shared[w]);
  return top;
}

}  // namespace cacr
