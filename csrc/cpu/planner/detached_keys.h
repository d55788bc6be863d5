// The planner of sweeps over keys without a gradient (kernels/detached_keys.h).
#pragma once

#include <algorithm>
#include <cmath>

#include "isa.h"
#include "memory.h"
#include "threads.h"

namespace cacr {

template <class T>
struct DetachedKeysPlan {
  const Contrast<T>& p;
  const Parallel& parallel;
  const Kernels<T>& kernels;
  Workspace memory;
  DetachedKeysParams<T> params{};

  DetachedKeysPlan(const Contrast<T>& problem, const DetachedStatistics<T>& out, const Parallel& par,
                   const Kernels<T>& k)
      : p(problem), parallel(par), kernels(k) {
    params.problem = &p, params.out = out, params.want_mean = out.mean, params.want_moments = out.variance;
    params.interrupt = parallel.interrupt, params.bf16 = p.bf16 && kernels.pack_bf16;
    params.units = p.pairs * ((p.N + k.panel - 1) / k.panel), params.blocking = blocking();
  }

  // Measured (D 64 to 2048, 512 KiB of second-level cache): the more queries share a packed tile the better, up to 256;
  // tiles of 144 keys as long as one does not outgrow the cache.
  Blocking blocking() const {
    const int64_t row = (p.D + kernels.panel - 1) / kernels.panel * kernels.panel * int64_t(sizeof(T));
    return {std::min<int64_t>(params.units, 256 / kernels.panel) * kernels.panel,
            keys(std::min(std::clamp<int64_t>((576 << 10) / row, 8, 144), std::max<int64_t>(1, p.M)))};
  }
  int64_t keys(int64_t n) const { return params.bf16 ? (n + 31) / 32 * 32 : n; }

  // Threads worth their start: a share of at least about 20 us.
  int64_t threads() const {
    const double products = 1 + params.want_mean + (params.want_mean && params.want_moments);
    const double work = 2 * products * double(p.pairs) * double(p.N) * double(p.M) * double(p.D + 16);
    return std::max<int64_t>(1, std::min<double>(double(parallel.threads), work / 2e6));
  }

  // Parts of the keys: the least work for the busiest of n threads, in units of one panel against one tile. Packing a
  // tile costs about 0.4 of that, merging one state 0.05. Every part has eight tiles, and the states have to fit.
  int64_t key_parts(int64_t n) const {
    const int64_t tiles = (p.M + params.blocking.keys - 1) / params.blocking.keys;
    const double states = double(params.units) * double(kernels.detached_keys_state(params));
    const int64_t most = params.blocking.rows / kernels.panel;
    int64_t best = 1;
    double least = INFINITY;
    for (int64_t parts = 1; parts <= n; parts++) {
      if (parts > 1 && (tiles / parts < 8 || states * double(parts) > double(kWorkspaceBytes / 4))) break;
      const int64_t rows = std::min(params.units, n / parts), panels = (params.units + rows - 1) / rows;
      const double packing = 0.4 * double((panels + most - 1) / most);
      const double merging = parts > 1 ? 0.05 * double(params.units * parts) / double(n) : 0;
      const double load = double((tiles + parts - 1) / parts) * (double(panels) + packing) + merging;
      if (load < least) least = load, best = parts;
    }
    return best;
  }

  // Makes blocks small enough for the scratch memory of n threads; the threads for which that is possible.
  int64_t fit(int64_t n) {
    const size_t room = kWorkspaceBytes / 4 * 3;
    while (params.blocking.rows > kernels.panel && size_t(n) * kernels.detached_keys_scratch(params) > room)
      params.blocking.rows -= kernels.panel;
    return std::max<int64_t>(1, std::min<int64_t>(n, int64_t(room / kernels.detached_keys_scratch(params))));
  }

  void run() {
    if (params.units == 0) return;
    const int64_t n = fit(threads());
    run(n, key_parts(n));
  }

  void run(int64_t n, int64_t parts) {
    params.parts = parts;
    const int64_t rows = std::min(params.units, n / params.parts);
    if (params.parts > 1) {
      const int64_t states = params.parts * params.units;
      params.states = memory.template get<char>(states * int64_t(kernels.detached_keys_state(params)));
    }
    const auto scratch = ThreadScratch::get(memory, kernels.detached_keys_scratch(params), rows * params.parts);
    parallel_for(parallel, rows * params.parts, [&](int64_t i) {
      DetachedKeysParams<T> mine = params;
      mine.part = i % params.parts;
      mine.share.unit0 = share(params.units, i / params.parts, rows),
      mine.share.unit1 = share(params.units, i / params.parts + 1, rows);
      mine.share.key0 = share(p.M, mine.part, params.parts), mine.share.key1 = share(p.M, mine.part + 1, params.parts);
      mine.scratch = scratch.of(i);
      kernels.detached_keys(mine);
    });
    if (params.parts > 1) merge(std::min(n, params.units));
  }

  void merge(int64_t n) {
    parallel_for(parallel, n, [&](int64_t i) {
      DetachedKeysParams<T> mine = params;
      mine.share.unit0 = share(params.units, i, n), mine.share.unit1 = share(params.units, i + 1, n);
      kernels.detached_keys_merge(mine);
    });
  }
};

}  // namespace cacr
