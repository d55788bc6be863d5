// Host side of a launch, without torch: how work is shared out, where the workspace's arrays lie, and the launch
// itself.
#pragma once

#include <algorithm>

#include "call.h"
#include "kernel.cuh"

namespace cacr {

constexpr int64_t kPartialGradientBytes = int64_t(64) << 20;  // at most, for the shares of gradients

// Puts arrays one behind another; without memory it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : base_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    const int64_t at = used_;
    used_ = (used_ + count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  int64_t bytes() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <class Element, class Acc>
struct Plan {
  Parameters<Element, Acc> p;
  int grid;

  bool runs(int phase) const { return p.phases >> phase & 1; }
  int64_t row_blocks() const { return (p.N + kTile - 1) / kTile; }
  int64_t targets() const { return p.q_views + (p.own ? 0 : p.k_views); }
  int64_t target_rows() const { return std::max(p.N, p.own ? int64_t(0) : p.M); }

  // Enough units for every block of the grid, so that a small problem keeps a large GPU busy. It depends on the device
  // and the shape alone, and so does the order of all sums.
  void share_out(int blocks, int gradient_chunks) {
    const int64_t tiles = (p.M + kTile - 1) / kTile, other = (p.N + kTile - 1) / kTile;
    const int64_t statistics_units = std::max<int64_t>(1, p.pairs * row_blocks());
    p.splits = int32_t(std::clamp<int64_t>(blocks / statistics_units, 1, std::clamp<int64_t>(tiles, 1, 64)));
    const int64_t chunks = (p.D + kChunk<Element> - 1) / kChunk<Element>;
    const int64_t groups = (chunks + gradient_chunks - 1) / gradient_chunks;
    const int64_t blocks_of_target = (target_rows() + kTile - 1) / kTile;
    const int64_t gradient_units = std::max<int64_t>(1, targets() * blocks_of_target * groups);
    const int64_t bytes = std::max<int64_t>(1, targets() * target_rows() * p.D * int64_t(sizeof(Acc)));
    const int64_t most = std::min({std::max<int64_t>(1, std::min(tiles, other)), int64_t(32),
                                   std::max<int64_t>(1, kPartialGradientBytes / bytes)});
    p.shares = int32_t(std::clamp<int64_t>(blocks / gradient_units, 1, most));
    const int64_t most_units = std::max(statistics_units * p.splits, gradient_units * p.shares);
    grid = int(std::clamp<int64_t>(most_units, 1, blocks));
  }

  // Pointers into the workspace; called with null first for its size.
  int64_t lay_out(void* memory) {
    Workspace w(memory);
    const int64_t rows = p.pairs * p.N, all = rows * p.softmaxes;
    p.q_norm = w.take<Acc>(p.q_views * p.N);
    p.k_norm = p.own ? p.q_norm : w.take<Acc>(p.k_views * p.M);
    if (runs(kStatistics)) p.partial = w.take<double>(3 * all * p.splits);
    p.scalars = w.take<double>(int64_t(grid) * kScalars);
    if (runs(kGradients)) {
      p.coefficients = w.take<Coefficients<Acc>>(all);
      p.ratio = w.take<Acc>(rows);
      p.known_sum = w.take<Acc>(rows);
      p.bounds = w.take<float>(grid);
      p.moment = w.take<double>(p.want_moment ? all * p.shares : 0);
      p.partial_gradient = w.take<Acc>(p.shares > 1 ? p.shares * targets() * target_rows() * p.D : 0);
    }
    if (p.fused.on) lay_out_loss(w, all);
    return w.bytes();
  }

  void lay_out_loss(Workspace& w, int64_t all) {
    FusedLoss& f = p.fused;
    p.value = w.take<double>(all), p.lse = w.take<double>(all);
    p.top = w.take<double>(all), p.sum = w.take<double>(all), p.delta = w.take<double>(all);
    f.row_value = w.take<double>(f.views * f.batch);
    f.row_variance = w.take<double>(f.views * f.batch);
    f.row_entropy = w.take<double>(f.views * f.batch);
    f.cost = w.take<Acc>(f.batch * f.views * f.views);
    f.pull = w.take<Acc>(f.batch * f.views * f.views);
    f.pair_log_sum = w.take<double>(p.pairs);
    f.pair_sums = w.take<double>(2 * p.pairs);
  }
};

// Dynamic shared memory of a block.
template <class A>
constexpr size_t kSharedBytes = sizeof(Buffers<typename A::Element, typename A::Acc>);

// Launches all phases of the plan at once or, if `resident` says the grid cannot be, one after another.
template <class A>
cudaError_t launch_plan(const Plan<typename A::Element, typename A::Acc>& plan, bool resident, cudaStream_t stream) {
  const Launch where{dim3(plan.grid), dim3(kThreads), kSharedBytes<A>, stream};
  if (resident) return launch_cooperative(run_phases<A>, where, JobOf<A>{plan.p, 0, kPhases - 1});
  for (int phase = 0; phase < kPhases; phase++) {
    if (!plan.runs(phase)) continue;
    if (const cudaError_t error = launch(run_phases<A>, where, JobOf<A>{plan.p, phase, phase})) return error;
  }
  return cudaSuccess;
}

constexpr int kBlocksWithoutResidence = 512;  // of a grid that does not have to be resident

// Shares out, allocates, launches.
template <class A>
cudaError_t run_plan(Plan<typename A::Element, typename A::Acc>& plan, cudaStream_t stream, const Allocator& memory) {
  int blocks = 0;
  if (const cudaError_t error = resident_blocks(run_phases<A>, kThreads, kSharedBytes<A>, &blocks)) return error;
  const bool resident = blocks > 0;
  plan.share_out(resident ? blocks : kBlocksWithoutResidence, A::kGradientChunks);
  plan.lay_out(memory.allocate(memory.context, plan.lay_out(nullptr)));
  return launch_plan<A>(plan, resident, stream);
}

}  // namespace cacr
