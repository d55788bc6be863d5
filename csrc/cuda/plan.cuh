// Host side of a launch, without torch: how the work is split among blocks, where the arrays of the workspace lie, and
// the launch itself.
#pragma once

#include <algorithm>

#include "call.h"
#include "kernel.cuh"

namespace cacr {

constexpr int kMaxSplits = 64;  // of the keys of a query, and of the rows on the other side of a gradient

// Places arrays one behind another; without memory it only adds up their bytes.
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

  // Makes enough units for every block of the grid, so that a small problem keeps a large GPU busy. The result depends
  // on the device, the shape and what is wanted alone, and so does the order of all sums.
  void split_work(int blocks, int gradient_chunks) {
    const int64_t q_tiles = tiles_of(p.N), k_tiles = tiles_of(p.M);
    const int64_t statistics_units = std::max<int64_t>(1, p.pairs * q_tiles);
    p.splits = splits_of(blocks / statistics_units, k_tiles);
    const int64_t owned = gradient_chunks * kChunk<Element>, groups = (p.D + owned - 1) / owned;
    const bool keys = p.want_k && !p.keys_are_queries;
    p.q_units = units_of(p.want_q || p.want_variance ? p.q_views : 0, q_tiles, p.want_q ? groups : 1);
    p.k_units = units_of(keys ? p.k_views : 0, k_tiles, groups);
    // Splits of both sides take about as many tiles. A side of several splits has at most `blocks` units, so that its
    // split gradients are no more than what the blocks of one grid hold in registers.
    const int64_t tiles = std::max<int64_t>(1, p.q_units.count * k_tiles + p.k_units.count * q_tiles);
    split_units(p.q_units, blocks * k_tiles / tiles, k_tiles);
    split_units(p.k_units, blocks * q_tiles / tiles, q_tiles);
    const int64_t gradient_units = int64_t(p.q_units.count) + p.k_units.count;
    grid = int(std::clamp<int64_t>(std::max(statistics_units * p.splits, gradient_units), 1, blocks));
  }
  static int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }
  static Units units_of(int64_t views, int64_t tiles, int64_t groups) {
    return {int32_t(views * tiles * groups), int32_t(tiles), int32_t(groups), 1};
  }
  // At most as many as there are tiles: every split writes its variances.
  static int32_t splits_of(int64_t wanted, int64_t tiles) {
    return int32_t(std::clamp<int64_t>(wanted, 1, std::clamp<int64_t>(tiles, 1, kMaxSplits)));
  }
  static void split_units(Units& units, int64_t wanted, int64_t tiles) {
    units.splits = splits_of(wanted, tiles), units.count *= units.splits;
  }

  // Sets the pointers into the workspace and gives its bytes; with null it only counts them.
  int64_t lay_out(void* memory) {
    Workspace w(memory);
    const int64_t rows = p.pairs * p.N, all = rows * p.softmaxes;
    p.q_norm = w.take<Acc>(p.q_views * p.N);
    p.k_norm = p.keys_are_queries ? p.q_norm : w.take<Acc>(p.k_views * p.M);
    if (p.normalize) {
      p.q_factor = w.take<Acc>(p.q_views * p.N);
      p.k_factor = p.keys_are_queries ? p.q_factor : w.take<Acc>(p.k_views * p.M);
    }
    if (runs(kStatistics)) p.split_sums = w.take<double>(3 * all * p.splits);
    p.block_scalars = w.take<double>(int64_t(grid) * kScalars);
    if (runs(kGradients)) {
      p.coefficients = w.take<Coefficients<Acc>>(all);
      p.ratio = w.take<Acc>(rows);
      p.gradient_sum = w.take<Acc>(rows);
      p.bounds = w.take<float>(3 * int64_t(grid));
      p.split_variance = w.take<double>(p.want_variance ? all * p.q_units.splits : 0);
      p.split_grad_q = take_split_gradient(w, p.want_q, p.q_units, p.q_views * p.N);
      p.split_grad_k = take_split_gradient(w, p.want_k, p.k_units, p.k_views * p.M);
    }
    if (p.fused.on) lay_out_loss(w, all);
    return w.bytes();
  }

  Acc* take_split_gradient(Workspace& w, bool wanted, const Units& units, int64_t rows) const {
    return w.take<Acc>(wanted && units.splits > 1 ? units.splits * rows * p.D : 0);
  }

  void lay_out_loss(Workspace& w, int64_t all) {
    FusedLoss& f = p.fused;
    p.value = w.take<double>(all), p.lse = w.take<double>(all);
    p.top = w.take<double>(all), p.sum = w.take<double>(all), p.delta = w.take<double>(all);
    f.row_value = w.take<double>(f.views * f.batch);
    f.row_variance = w.take<double>(f.views * f.batch);
    f.row_entropy = w.take<double>(f.views * f.batch);
    f.cost = w.take<Acc>(f.batch * f.views * f.views);
    f.attraction_weight = w.take<Acc>(f.batch * f.views * f.views);
    f.pair_log_sum = w.take<double>(p.pairs);
    f.pair_sums = w.take<double>(2 * p.pairs);
  }
};

template <class Arithmetic>
using PlanOf = Plan<typename Arithmetic::Element, typename Arithmetic::Acc>;

// Bytes of dynamic shared memory of a block.
template <class Arithmetic>
constexpr size_t kSharedBytes = sizeof(BuffersOf<Arithmetic>);

// Launches all phases of the plan at once or, where the grid cannot be resident as a whole, one after another.
// `resident` is what the device has said; another process, or a context of some of its processors, may leave less room.
template <class Arithmetic>
cudaError_t launch_plan(const PlanOf<Arithmetic>& plan, bool resident, cudaStream_t stream) {
  const auto kernel = run_phases<Arithmetic>;
  const Launch where{dim3(plan.grid), dim3(kThreads), kSharedBytes<Arithmetic>, stream};
  if (resident) {
    const cudaError_t error = launch_cooperative(kernel, where, JobOf<Arithmetic>{plan.p, 0, kPhases - 1});
    if (error != cudaErrorCooperativeLaunchTooLarge) return error;
  }
  for (int phase = 0; phase < kPhases; phase++) {
    if (!plan.runs(phase)) continue;
    if (const cudaError_t error = launch(kernel, where, JobOf<Arithmetic>{plan.p, phase, phase})) return error;
  }
  return cudaSuccess;
}

constexpr int kBlocksWithoutResidence = 512;  // of a grid whose blocks do not wait for each other

// How many blocks the current device holds at once; an error where it has no code for the kernel.
template <class Arithmetic>
cudaError_t count_resident_blocks(int* blocks) {
  return resident_blocks(run_phases<Arithmetic>, kThreads, kSharedBytes<Arithmetic>, blocks);
}

// Splits the work, allocates the workspace and launches.
template <class Arithmetic>
cudaError_t run_plan(PlanOf<Arithmetic>& plan, cudaStream_t stream, const Allocator& memory) {
  int blocks = 0;
  if (const cudaError_t error = count_resident_blocks<Arithmetic>(&blocks)) return error;
  const bool resident = blocks > 0;
  plan.split_work(resident ? blocks : kBlocksWithoutResidence, Arithmetic::kGradientChunks);
  plan.lay_out(memory.allocate(memory.context, plan.lay_out(nullptr)));
  return launch_plan<Arithmetic>(plan, resident, stream);
}

}  // namespace cacr
