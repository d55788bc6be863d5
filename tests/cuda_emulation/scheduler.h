// Which thread runs next: a policy per launch, drawn from the seed. Races show under some orders only, so there are
// orderly policies, uniformly random ones, and ones that starve some warps or blocks for as long as others can run.
#pragma once

#include "model.h"

namespace cuda_emulation {

class Scheduler {
 public:
  explicit Scheduler(uint64_t seed) : random(seed) {
    if (seed == 0) return;
    constexpr Pick kPicks[] = {Pick::kUniform, Pick::kPriority, Pick::kPriority, Pick::kPriority, Pick::kUniform};
    constexpr uint32_t kPauses[] = {0, 4, 32, 256};
    if (seed == 1) {
      warps_ = lanes_ = Pick::kLast;
      return;
    }
    warps_ = kPicks[random.below(5)];
    lanes_ = static_cast<Pick>(random.below(3));
    priorities_change_ = random.below(2) == 1;
    whole_blocks_ = random.below(3) == 0;
    mean_pause_ = kPauses[random.below(4)];
    rewind();
  }

  // Priorities of the warps of a block that starts.
  void enlist(Block& block) {
    const uint32_t priority = random.below(kPriorities);
    for (Warp& warp : block.warps) {
      warp.priority = whole_blocks_ ? priority : random.below(kPriorities);
      warps.push_back(&warp);
    }
  }
  void dismiss(const Block& block) {
    std::erase_if(warps, [&](const Warp* warp) { return warp->block == &block; });
  }

  // The next thread, no longer marked as ready; null if none is.
  Thread* next() {
    Warp* warp = pick_warp();
    if (warp == nullptr) return nullptr;
    if (priorities_change_ && random.below(256) == 0) warp->priority = random.below(kPriorities);
    const int lane = pick_lane(warp->ready);
    warp->ready &= ~(1u << lane);
    return warp->lane[lane];
  }

  // Whether a thread that could go on has to give way here.
  bool pauses_here() {
    if (mean_pause_ == 0 || --until_pause_ != 0) return false;
    rewind();
    return true;
  }

  Random random;
  std::vector<Warp*> warps;  // of the resident blocks

 private:
  enum class Pick { kFirst, kLast, kUniform, kPriority };
  static constexpr uint32_t kPriorities = 1 << 20;

  void rewind() { until_pause_ = mean_pause_ == 0 ? 0 : 1 + random.below(2 * mean_pause_); }

  Warp* pick_warp() {
    Warp* chosen = nullptr;
    uint32_t candidates = 0;
    for (Warp* warp : warps) {
      if (warp->ready == 0) continue;
      if (warps_ == Pick::kFirst) return warp;
      const bool better = warps_ == Pick::kUniform    ? random.below(++candidates) == 0
                          : warps_ == Pick::kPriority ? chosen == nullptr || warp->priority > chosen->priority
                                                      : true;
      if (better) chosen = warp;
    }
    return chosen;
  }

  int pick_lane(uint32_t ready) {
    if (lanes_ == Pick::kFirst) return __builtin_ctz(ready);
    if (lanes_ == Pick::kLast) return 31 - __builtin_clz(ready);
    for (uint32_t skip = random.below(__builtin_popcount(ready)); skip > 0; skip--) ready &= ready - 1;
    return __builtin_ctz(ready);
  }

  Pick warps_ = Pick::kFirst, lanes_ = Pick::kFirst;
  bool priorities_change_ = false;
  bool whole_blocks_ = false;  // the warps of a block have one priority
  uint32_t mean_pause_ = 0;    // points between two involuntary pauses, 0: none
  uint32_t until_pause_ = 0;
};

}  // namespace cuda_emulation
