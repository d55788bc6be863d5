// A small kernel with everything that the real ones have, and a choice of things that may be wrong with it.
//
// r_i = sum_j (x_i . y_j)^2 for queries x and 16 keys y, and out_i = r_i / sum_i r_i. A block of two warps has 32
// queries. Features come in steps of 16 through two stages of cp.async; totals of the blocks meet at a grid barrier.
#pragma once

#include "launch.cuh"
#include "ptx.cuh"
#include "shared_memory.cuh"

namespace pipeline {

using namespace cacr;

enum Bug : int {
  kNone,
  kMissingBarrier,          // between the arrival of a stage and its use
  kMissingTrailingBarrier,  // between the use of a stage and the next copy into it
  kWaitCount,               // one copy more may be under way than the code needs
  kSharedIndex,             // beyond the last row of a buffer
  kSharedAddress,           // the same through an address given to ldmatrix
  kSharedPointer,           // the same through a pointer
  kGlobalIndex,             // beyond the last row of the queries
  kSwappedRegister,         // two registers of a fragment
  kMissingWarpSync,         // between lanes that write and lanes that read shared memory
  kMissingGridBarrier,      // between totals of the blocks and their sum
  kUnwritten,               // reads what nobody has written
  kStaleLayout,             // keeps using buffers whose place another struct has taken
  kBugs,
};

constexpr int kQueries = 32, kKeys = 16, kStep = 16, kStride = 24, kThreads = 64;

struct Problem {
  const uint16_t* x;  // [blocks][32][D] bf16
  const uint16_t* y;  // [16][D] bf16
  float* total;       // [blocks]
  float* out;         // [blocks][32]
  int D;              // a multiple of 16
  int bug;
};

struct Stages {
  SharedArray<uint16_t, 2 * kQueries * kStride> x;
  SharedArray<uint16_t, 2 * kKeys * kStride> y;
};
struct Sums {
  SharedArray<float, kQueries> row;
  SharedArray<float, 1> block;
};

// Rows of 16 features into stage `stage` of a buffer.
template <class Buffer>
CACR_DEVICE void copy_rows(Buffer& to, int stage, int rows, const uint16_t* from, int D) {
  for (int i = threadIdx.x; i < 2 * rows; i += kThreads)
    ptx::cp_async_16(ptx::shared_address(&to[(stage * rows + i / 2) * kStride + i % 2 * 8]),
                     from + static_cast<int64_t>(i / 2) * D + i % 2 * 8);
}

CACR_DEVICE void copy_step(Stages& shared, const Problem& p, int step) {
  const int shift = p.bug == kGlobalIndex && step == p.D / kStep - 1 ? 8 : 0;
  copy_rows(shared.x, step % 2, kQueries,
            p.x + static_cast<int64_t>(blockIdx.x) * kQueries * p.D + step * kStep + shift, p.D);
  copy_rows(shared.y, step % 2, kKeys, p.y + step * kStep, p.D);
}

CACR_DEVICE void multiply_step(Stages& shared, const Problem& p, int stage, float (&d)[2][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int x_row = stage * kQueries + warp * 16 + lane % 16 + (p.bug == kSharedIndex ? 2 * kQueries - 16 : 0);
  const int y_row = stage * kKeys + lane % 8 + lane / 16 * 8;
  const int beyond = p.bug == kSharedAddress ? (2 * kQueries - 15) * kStride * 2 : 0;
  uint32_t a[4], b[4];
  ptx::ldmatrix_x4(a, ptx::shared_address(&shared.x[x_row * kStride + lane / 16 * 8]) + beyond);
  ptx::ldmatrix_x4(b, ptx::shared_address(&shared.y[y_row * kStride + lane / 8 % 2 * 8]));
  const bool swap = p.bug == kSwappedRegister;
  const uint32_t operand[4] = {a[0], a[swap ? 2 : 1], a[swap ? 1 : 2], a[3]};
  for (int n = 0; n < 2; n++) ptx::mma_bf16(d[n], operand, b[2 * n], b[2 * n + 1]);
}

// The products of the block's queries with the keys, in the accumulators of their warp.
CACR_DEVICE void multiply(const Problem& p, float (&d)[2][4]) {
  Stages& shared = shared_memory<Stages>();
  const int steps = p.D / kStep;
  copy_step(shared, p, 0);
  ptx::cp_async_commit();
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) copy_step(shared, p, step + 1);
    ptx::cp_async_commit();
    if (p.bug == kWaitCount)
      ptx::cp_async_wait<2>();
    else
      ptx::cp_async_wait<1>();
    if (p.bug != kMissingBarrier) __syncthreads();
    multiply_step(shared, p, step % 2, d);
    if (p.bug != kMissingTrailingBarrier) __syncthreads();
  }
  if (p.bug == kSharedPointer && threadIdx.x == 0) *(&shared.y[2 * kKeys * kStride - 1] + 1) = 7;
  ptx::cp_async_wait<0>();
  __syncthreads();
}

// Row sums of d^2 into shared memory, and one row of the warp to each of 16 lanes.
CACR_DEVICE float row_sum(Sums& shared, const Problem& p, const float (&d)[2][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int half = 0; half < 2; half++) {
    float sum = 0;
    for (int n = 0; n < 2; n++)
      for (int i = 0; i < 2; i++) sum += d[n][2 * half + i] * d[n][2 * half + i];
    for (int other = 1; other < 4; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (lane % 4 == 0) shared.row[warp * 16 + lane / 4 + 8 * half] = sum;
  }
  if (p.bug != kMissingWarpSync) __syncwarp();
  return shared.row[warp * 16 + lane % 16];
}

extern "C" __global__ void __launch_bounds__(kThreads) run_pipeline(const __grid_constant__ Problem p) {
  float d[2][4] = {};
  multiply(p, d);
  Sums& shared = shared_memory<Sums>();
  const float mine = row_sum(shared, p, d);
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = p.bug == kUnwritten ? shared.block[0] : 0;
    for (int i = 0; i < kQueries; i++) sum += shared.row[i];
    p.total[blockIdx.x] = sum;
  }
  if (p.bug == kStaleLayout && threadIdx.x == 40) shared_memory<Stages>();
  __syncthreads();
  if (p.bug != kMissingGridBarrier) ptx::grid_sync();
  float total = 0;
  for (unsigned b = 0; b < gridDim.x; b++) total += p.total[b];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane < 16) p.out[blockIdx.x * kQueries + warp * 16 + lane] = mine / total;
}

}  // namespace pipeline
