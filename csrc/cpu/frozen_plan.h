// The planner of sweeps over keys without a gradient (frozen.h).
#pragma once

#include "engine.h"

namespace cacr {

template <class T>
struct FrozenPlan {
  const Contrast<T>& p;
  const Parallel& parallel;
  const Kernels<T>& kernels;
  Workspace memory;
  FrozenTask<T> task{};

  FrozenPlan(const Contrast<T>& problem, const FrozenStatistics<T>& out, const Parallel& par, const Kernels<T>& k)
      : p(problem), parallel(par), kernels(k) {
    task.problem = &p, task.out = out, task.want_mean = out.mean, task.want_moments = out.variance;
    task.units = p.pairs * ((p.N + k.panel - 1) / k.panel), task.blocking = blocking();
  }

  // Measured (D 64 to 2048, 512 KiB of second-level cache): the more queries share a packed tile the better, up to 256;
  // tiles of 144 keys as long as one does not outgrow the cache.
  Blocking blocking() const {
    const int64_t row = (p.D + kernels.panel - 1) / kernels.panel * kernels.panel * int64_t(sizeof(T));
    return {std::min<int64_t>(task.units, 256 / kernels.panel) * kernels.panel,
            std::min(std::clamp<int64_t>((576 << 10) / row, 8, 144), std::max<int64_t>(1, p.M))};
  }

  // Threads worth their start: a share of at least about 20 us.
  int64_t threads() const {
    const double products = 1 + task.want_mean + (task.want_mean && task.want_moments);
    const double work = 2 * products * double(p.pairs) * double(p.N) * double(p.M) * double(p.D + 16);
    return std::max<int64_t>(1, std::min<double>(double(parallel.threads), work / 2e6));
  }

  // Parts of the keys: the least work for the busiest of n threads, in units of one panel against one tile. Packing a
  // tile costs about 0.4 of that, merging one state 0.05. Every part has eight tiles, and the states have to fit.
  int64_t key_parts(int64_t n) const {
    const int64_t tiles = (p.M + task.blocking.keys - 1) / task.blocking.keys;
    const double states = double(task.units) * double(kernels.frozen_state(task));
    const int64_t most = task.blocking.rows / kernels.panel;
    int64_t best = 1;
    double least = INFINITY;
    for (int64_t parts = 1; parts <= n; parts++) {
      if (parts > 1 && (tiles / parts < 8 || states * double(parts) > double(kWorkspaceBytes / 4))) break;
      const int64_t rows = std::min(task.units, n / parts), panels = (task.units + rows - 1) / rows;
      const double packing = 0.4 * double((panels + most - 1) / most);
      const double merging = parts > 1 ? 0.05 * double(task.units * parts) / double(n) : 0;
      const double load = double((tiles + parts - 1) / parts) * (double(panels) + packing) + merging;
      if (load < least) least = load, best = parts;
    }
    return best;
  }

  // Makes blocks small enough for the scratch memory of n threads; the threads for which that is possible.
  int64_t fit(int64_t n) {
    const size_t room = kWorkspaceBytes / 4 * 3;
    while (task.blocking.rows > kernels.panel && size_t(n) * kernels.frozen_scratch(task) > room)
      task.blocking.rows -= kernels.panel;
    return std::max<int64_t>(1, std::min<int64_t>(n, int64_t(room / kernels.frozen_scratch(task))));
  }

  void run() {
    if (task.units == 0) return;
    const int64_t n = fit(threads());
    run(n, key_parts(n));
  }

  void run(int64_t n, int64_t parts) {
    task.parts = parts;
    const int64_t rows = std::min(task.units, n / task.parts);
    if (task.parts > 1) {
      const int64_t states = task.parts * task.units;
      task.states = memory.template get<char>(states * int64_t(kernels.frozen_state(task)));
    }
    const size_t scratch = kernels.frozen_scratch(task);
    char* base = memory.template get<char>(int64_t(scratch) * rows * task.parts);
    parallel_for(parallel, rows * task.parts, [&](int64_t i) {
      FrozenTask<T> mine = task;
      mine.part = i % task.parts;
      mine.unit0 = share(task.units, i / task.parts, rows), mine.unit1 = share(task.units, i / task.parts + 1, rows);
      mine.key0 = share(p.M, mine.part, task.parts), mine.key1 = share(p.M, mine.part + 1, task.parts);
      mine.scratch = base + size_t(i) * scratch;
      kernels.frozen(mine);
    });
    if (task.parts > 1) merge(std::min(n, task.units));
  }

  void merge(int64_t n) {
    parallel_for(parallel, n, [&](int64_t i) {
      FrozenTask<T> mine = task;
      mine.unit0 = share(task.units, i, n), mine.unit1 = share(task.units, i + 1, n);
      kernels.frozen_merge(mine);
    });
  }
};

}  // namespace cacr
