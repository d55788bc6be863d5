// Elementwise work on a tile of u_ij = q_i.k_j - |k_j|^2 / 2: statistics of the rows in the forward pass, dL/du in the
// backward pass. The variables d, e, slope, delta are those of csrc/common/rows.h: everything is measured from the key
// with the largest weight so far, whose exponent is exactly 0.
//
// Definitions and derivatives: cacr_kernels/reference.py.
#pragma once

#include "../../common/rows.h"
#include "similarities.cuh"

namespace cacr {

CACR_DEVICE double number(const Number& x) { return x.factor * (x.at ? *x.at + (x.also ? *x.also : 0.0) : 1.0); }

// Where row [pair][i] of a launch stands among the rows [S][all_pairs][N] of the operator.
template <class Params>
CACR_DEVICE int64_t row_of(const Params& p, int s, int64_t row) {
  return (s * p.all_pairs + p.first_pair) * p.N + row;
}

template <class Acc, class Params>
CACR_DEVICE Acc slope_of(const Params& p, int s) {
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

// Adds a thread's elements of its two rows to their states. members: mask of the elements that belong to the set.
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

// dL/du of one element, added up over the softmaxes.
template <class Acc>
struct ElementGradient {
  Acc h;      // dL/du
  Acc first;  // e of the first softmax

  // squares: sum of e (u - u_top - delta)^2, from which the variance of the costs follows.
  CACR_DEVICE void add(const Coefficients<Acc>& c, Acc ratio, Acc slope, Acc u, bool member, Acc& squares) {
    const Acc distance = u - c.u_top;
    const Acc e = member ? exp2_of(slope * distance) : Acc(0), d = member ? distance - c.delta : Acc(0);
    h += key_gradient(e, ratio * first, d, c.a, c.b);
    squares += e * d * d;
    first = e;
  }
};

}  // namespace cacr
