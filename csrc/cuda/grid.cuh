// Which thread or warp of the grid takes which row, and sums over the threads of a quad, a warp or a block in a fixed
// order.
#pragma once

#include "tile/layout.cuh"

namespace cacr {

// Rows first, first + step, ... go to this thread, or to this warp.
struct GridStride {
  int64_t first, step;

  static CACR_DEVICE GridStride of_thread() {
    return {int64_t(blockIdx.x) * kThreads + threadIdx.x, int64_t(gridDim.x) * kThreads};
  }
  static CACR_DEVICE GridStride of_warp() {
    return {int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32, int64_t(gridDim.x) * (kThreads / 32)};
  }
};

// Over the four threads that hold a row of a tile; every one of them gets the result.
template <class T>
CACR_DEVICE T quad_sum(T x) {
#pragma unroll
  for (int other = 1; other < 4; other *= 2) x += __shfl_xor_sync(kFullWarp, x, other);
  return x;
}
template <class T>
CACR_DEVICE T quad_max(T x) {
#pragma unroll
  for (int other = 1; other < 4; other *= 2) x = fmax(x, __shfl_xor_sync(kFullWarp, x, other));
  return x;
}

// Over the 32 lanes; every lane gets the result.
template <class T>
CACR_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(kFullWarp, x, other);
  return x;
}
CACR_DEVICE double warp_max(double x) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x = fmax(x, __shfl_xor_sync(kFullWarp, x, other));
  return x;
}

using Reduction = SharedArray<double, kThreads / 32>;  // one number per warp

// Over all threads of the block; every thread gets the result. The caller may write `shared` after a barrier only.
CACR_DEVICE double block_sum(Reduction& shared, double x) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kThreads / 32; w++) sum += shared[w];
  return sum;
}

// The largest number; fmax ignores NaN.
CACR_DEVICE double block_max(Reduction& shared, double x) {
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double top = shared[0];
  for (int w = 1; w < kThreads / 32; w++) top = fmax(top, shared[w]);
  return top;
}

}  // namespace cacr
