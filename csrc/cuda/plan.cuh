// Host side of a launch, without torch: how work is shared out, where the workspace's arrays lie, and the launch
// itself.
#pragma once

#include <algorithm>

#include "call.h"
#include "kernel.cuh"

namespace cacr {

constexpr int kMostShares = 64;  // of the keys of a query, and of what the rows of a gradient meet

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

  // Enough units for every block of the grid, so that a small problem keeps a large GPU busy. It depends on the device,
  // the shape and what is wanted alone, and so does the order of all sums.
  void share_out(int blocks, int gradient_chunks) {
    const int64_t q_tiles = tiles_of(p.N), k_tiles = tiles_of(p.M);
    const int64_t statistics_units = std::max<int64_t>(1, p.pairs * q_tiles);
    p.splits = shares_of(blocks / statistics_units, k_tiles);
    const int64_t owned = gradient_chunks * kChunk<Element>, groups = (p.D + owned - 1) / owned;
    const bool keys = p.want_k && !p.own;
    p.q_units = units_of(p.want_q || p.want_moment ? p.q_views : 0, q_tiles, p.want_q ? groups : 1);
    p.k_units = units_of(keys ? p.k_views : 0, k_tiles, groups);
    // Shares of both sides meet about as many tiles. A side of several shares has at most `blocks` units: its partial
    // gradients are no more than what the blocks of one grid hold in registers.
    const int64_t met = std::max<int64_t>(1, p.q_units.count * k_tiles + p.k_units.count * q_tiles);
    share_units(p.q_units, blocks * k_tiles / met, k_tiles);
    share_units(p.k_units, blocks * q_tiles / met, q_tiles);
    const int64_t gradient_units = int64_t(p.q_units.count) + p.k_units.count;
    grid = int(std::clamp<int64_t>(std::max(statistics_units * p.splits, gradient_units), 1, blocks));
  }
  static int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }
  static Units units_of(int64_t views, int64_t tiles, int64_t groups) {
    return {int32_t(views * tiles * groups), int32_t(tiles), int32_t(groups), 1};
  }
  // Every share has a tile: its moments are written.
  static int32_t shares_of(int64_t wanted, int64_t tiles) {
    return int32_t(std::clamp<int64_t>(wanted, 1, std::clamp<int64_t>(tiles, 1, kMostShares)));
  }
  static void share_units(Units& units, int64_t wanted, int64_t tiles) {
    units.shares = shares_of(wanted, tiles), units.count *= units.shares;
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
      p.moment = w.take<double>(p.want_moment ? all * p.q_units.shares : 0);
      p.q_partial = take_partial(w, p.want_q, p.q_units, p.q_views * p.N);
      p.k_partial = take_partial(w, p.want_k, p.k_units, p.k_views * p.M);
    }
    if (p.fused.on) lay_out_loss(w, all);
    return w.bytes();
  }

  Acc* take_partial(Workspace& w, bool wanted, const Units& units, int64_t rows) const {
    return w.take<Acc>(wanted && units.shares > 1 ? units.shares * rows * p.D : 0);
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

// Launches all phases of the plan at once or, where the grid cannot be resident, one after another: `resident` is what
// the device said of itself, of which another process or a context of less than all processors can take something.
template <class A>
cudaError_t launch_plan(const Plan<typename A::Element, typename A::Acc>& plan, bool resident, cudaStream_t stream) {
  const Launch where{dim3(plan.grid), dim3(kThreads), kSharedBytes<A>, stream};
  if (resident) {
    const cudaError_t error = launch_cooperative(run_phases<A>, where, JobOf<A>{plan.p, 0, kPhases - 1});
    if (error != cudaErrorCooperativeLaunchTooLarge) return error;
  }
  for (int phase = 0; phase < kPhases; phase++) {
    if (!plan.runs(phase)) continue;
    if (const cudaError_t error = launch(run_phases<A>, where, JobOf<A>{plan.p, phase, phase})) return error;
  }
  return cudaSuccess;
}

constexpr int kBlocksWithoutResidence = 512;  // of a grid that does not have to be resident

// Whether the current device has this kernel and can be asked about it: what a launch would need first.
template <class A>
cudaError_t probe() {
  int blocks = 0;
  return resident_blocks(run_phases<A>, kThreads, sizeof(Buffers<typename A::Element, typename A::Acc>), &blocks);
}

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
