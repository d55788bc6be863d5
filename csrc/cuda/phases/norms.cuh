// The phase of the norms: |q_i|^2 and |k_j|^2, a warp per row.
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

template <class Params>
CACR_DEVICE void norms_phase(const Params& p) {
  if (p.inner_product) return;
  write_norms(p.q, p.q_views * p.N, p.D, p.q_norm);
  if (!p.keys_are_queries) write_norms(p.k, p.k_views * p.M, p.D, p.k_norm);
}

}  // namespace cacr
