// The phase of the norms: |q_i|^2 and |k_j|^2, and the factors that make unit rows, a warp per row.
#pragma once

#include "../grid.cuh"
#include "../tile/softmax.cuh"

namespace cacr {

// x: [rows][D], norm: [rows]
template <class Acc, class Element>
CACR_DEVICE void write_norms(const Element* x, int64_t rows, int64_t D, Acc* norm) {
  const int lane = threadIdx.x % 32;
  const GridStride warps = GridStride::of_warp();
  for (int64_t i = warps.first; i < rows; i += warps.step) {
    Acc sum = 0;
    for (int64_t d = lane; d < D; d += 32) {
      const Acc value = widen(x[i * D + d]);
      sum += value * value;
    }
    sum = warp_sum(sum);
    if (lane == 0) norm[i] = sum;
  }
}

// r and |r x|^2 of raw rows. Lengths are float64, so that r is rounded once: of nearly equal rows its error counts as a
// distance. A row of zeros has the factor 0, so that nothing large meets it.
template <class Acc, class Element>
CACR_DEVICE void write_units(const Element* x, int64_t rows, int64_t D, Acc* norm, Acc* factor) {
  const int lane = threadIdx.x % 32;
  const GridStride warps = GridStride::of_warp();
  for (int64_t i = warps.first; i < rows; i += warps.step) {
    double sum = 0;
    for (int64_t d = lane; d < D; d += 32) {
      const double value = widen(x[i * D + d]);
      sum += value * value;
    }
    const double length = sqrt(warp_sum(sum));
    if (lane != 0) continue;
    const Acc r = length == 0 ? Acc(0) : inverse_length<Acc>(length);
    factor[i] = r, norm[i] = Acc(length * r * (length * r));
  }
}

template <class Params>
CACR_DEVICE void norms_phase(const Params& p) {
  if (p.normalize) {
    write_units(p.q, p.q_views * p.N, p.D, p.q_norm, p.q_factor);
    if (!p.keys_are_queries) write_units(p.k, p.k_views * p.M, p.D, p.k_norm, p.k_factor);
    return;
  }
  if (p.inner_product) return;
  write_norms(p.q, p.q_views * p.N, p.D, p.q_norm);
  if (!p.keys_are_queries) write_norms(p.k, p.k_views * p.M, p.D, p.k_norm);
}

}  // namespace cacr
