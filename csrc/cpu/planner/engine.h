// What every sweep of a contrast problem needs: packed operands, shares of the threads, sizes of blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../../common/rows.h"
#include "isa.h"
#include "memory.h"
#include "threads.h"

namespace cacr {

// How many threads, and the blocks whose memory fits the workspace with that many.
struct Fit {
  Blocking blocking;
  int64_t threads;
};

template <class T>
struct Engine {
  const Kernels<T>& kernels;
  const Parallel& parallel;
  Contrast<T> p;
  Packed<T> packed{};
  Workspace memory;
  bool bounded = false;
  bool bf16 = false;  // products are those of bfloat16 (products_bf16.h)

  Engine(const Contrast<T>& problem, const Parallel& par, const Kernels<T>& k = cacr::kernels<T>())
      : kernels(k), parallel(par), p(problem) {}

  int64_t padded(int64_t d) const { return (d + kernels.panel - 1) / kernels.panel * kernels.panel; }
  int64_t units() const { return p.pairs * ((p.N + kernels.panel - 1) / kernels.panel); }

  // Are queries and keys the same rows, of the same views in every pair, and each row itself?
  bool symmetric() const {
    return p.keys_are_queries && !p.q_self && std::equal(p.q_index, p.q_index + p.pairs, p.k_index);
  }

  // First unit of the i-th of n shares. Symmetric: of equal areas, as the panels of a pair meet fewer and fewer keys,
  // and in whole blocks, so that the same squares lie on the diagonal for any number of threads (symmetric.h says why).
  int64_t first_unit(int64_t i, int64_t n, bool triangular) const {
    if (!triangular) return share(units(), i, n);
    const int64_t panels = (p.N + kernels.panel - 1) / kernels.panel;
    const double area = double(panels) * double(panels + 1) / 2,
                 target = area * double(p.pairs) * double(i) / double(n);
    const int64_t pair = std::min(p.pairs, int64_t(target / area));
    int64_t panel = 0;
    for (double left = target - area * double(pair); pair < p.pairs && left >= double(panels - panel) / 2; panel++)
      left -= double(panels - panel);
    const int64_t block = symmetric_blocking().rows / kernels.panel;
    return i == n ? units() : std::min(units(), pair * panels + panel / block * block);
  }

  // Threads worth their start: a share of at least about 20 us.
  int64_t threads() const {
    const double work = 6.0 * double(p.pairs) * double(p.N) * double(p.M) * double(p.D + 16);
    return std::max<int64_t>(1, std::min<double>({double(parallel.threads), work / 2e6, double(units())}));
  }

  // Where products may be of bfloat16, choose_products packs the keys.
  void allocate_packed(bool key_panels) {
    key_panels &= !may_use_bf16();
    packed.q_norm = memory.get<T>(p.q_views * p.N);
    packed.k_bias = memory.get<T>(p.k_views * p.M);
    packed.k_panels = key_panels ? memory.get<T>(p.k_views * p.M * padded(p.D)) : nullptr;
    if (!p.normalize) return;
    packed.q_r = memory.get<T>(p.q_views * p.N);
    packed.k_r = p.keys_are_queries ? packed.q_r : memory.get<T>(p.k_views * p.M);
  }

  // Norms and panels of the i-th of n shares of the rows; of each of `groups` groups of them, one after the other.
  void pack(int64_t i, int64_t n, int64_t groups = 1) const {
    for (int64_t v = 0; v < p.q_views; v++) {
      PackParams<T> t{};
      t.x = p.q + v * p.q_view_stride, t.row_stride = p.q_row_stride, t.rows = p.N;
      t.r = packed.q_r ? packed.q_r + v * p.N : nullptr, t.q_norm = packed.q_norm + v * p.N;
      if (p.keys_are_queries) t.k_bias = packed.k_bias + v * p.M, t.panels = key_panels(v);
      pack(t, i, n, groups);
    }
    for (int64_t v = 0; v < p.k_views && !p.keys_are_queries; v++) {
      PackParams<T> t{};
      t.x = p.k + v * p.k_view_stride, t.row_stride = p.k_row_stride, t.rows = p.M;
      t.r = packed.k_r ? packed.k_r + v * p.M : nullptr, t.k_bias = packed.k_bias + v * p.M, t.panels = key_panels(v);
      pack(t, i, n, groups);
    }
  }
  void pack(PackParams<T> t, int64_t i, int64_t n, int64_t groups) const {
    t.D = p.D, t.inner_product = p.inner_product;
    const int64_t rows = t.rows / groups;
    for (int64_t g = 0; g < groups; g++) {
      t.row0 = g * rows + share(rows, i, n), t.row1 = g * rows + share(rows, i + 1, n);
      kernels.pack(t);
    }
  }
  T* key_panels(int64_t v) const {
    const bool used = std::find(p.k_index, p.k_index + p.pairs, v) != p.k_index + p.pairs;
    return packed.k_panels && used ? packed.k_panels + v * p.M * padded(p.D) : nullptr;
  }

  // Rows [row0, row1) of one view of the queries, or of the keys, with their gradient.
  RawGradientParams<T> raw_gradient(T* gradient, int64_t view, int64_t row0, int64_t row1, bool keys = false) const {
    if (keys) return {p.k + view * p.k_view_stride, packed.k_r + view * p.M, p.k_row_stride, p.D, row0, row1, gradient};
    return {p.q + view * p.q_view_stride, packed.q_r + view * p.N, p.q_row_stride, p.D, row0, row1, gradient};
  }

  // Gradients of unit rows become those of the raw rows; dq and dk: null where not wanted, or one and the same.
  void to_raw_rows(T* dq, T* dk, int64_t n) const {
    if (!p.normalize) return;
    const auto side = [&](T* gradient, int64_t views, int64_t rows, bool keys) {
      parallel_for(parallel, n, [&](int64_t i) {
        for (int64_t v = 0; v < views; v++)
          kernels.to_raw_rows(
              raw_gradient(gradient + v * rows * p.D, v, share(rows, i, n), share(rows, i + 1, n), keys));
      });
    };
    if (dq) side(dq, p.q_views, p.N, false);
    if (dk && dk != dq) side(dk, p.k_views, p.M, true);
  }

  // |log2(e) tau c| <= 64 for every pair? c <= (|q| + |k|)^2. False for NaN and infinity.
  void find_bound() {
    double q = 0, k = 0, tau = 0;
    bool finite = true;
    auto scan = [&](const T* norm, int64_t n, double factor, double& top) {
      T most = 0;
      for (int64_t i = 0; i < n; i++) {
        const T x = norm[i] * T(factor);
        finite &= x <= T(1e30);
        most = std::max(most, x);
      }
      top = double(most);
    };
    if (!p.inner_product) {
      scan(packed.q_norm, p.q_views * p.N, 1, q);
      scan(packed.k_bias, p.k_views * p.M, -2, k);
    }
    for (int s = 0; s < p.softmaxes; s++) tau = std::max(tau, std::abs(p.tau[s]));
    const double c = std::sqrt(q) + std::sqrt(k);
    bounded = !p.inner_product && finite && tau * c * c * kLog2e <= 64;
  }

  // ---- products of bfloat16 ----------------------------------------------------------------------------------------
  bool may_use_bf16() const { return p.bf16 && kernels.pack_bf16; }

  // Their instructions take subnormal numbers for 0: is that nothing, beside the costs? False for NaN and infinity.
  bool in_bf16_range() const {
    bool in_range = true;
    const auto scan = [&](const T* x, int64_t n, T factor, T least, bool zeros) {
      for (int64_t i = 0; i < n; i++)
        in_range &= (factor * x[i] >= least && factor * x[i] <= T(0x1p80)) || (zeros && x[i] == 0);
    };
    if (p.normalize) {
      scan(packed.q_r, p.q_views * p.N, 1, T(0x1p-50), false);
      scan(packed.k_r, p.k_views * p.M, 1, T(0x1p-50), false);
    } else {
      scan(packed.q_norm, p.q_views * p.N, 1, T(0x1p-80), true);
      scan(packed.k_bias, p.k_views * p.M, -2, T(0x1p-80), true);
    }
    return in_range;
  }

  // When the norms are known. key_panels: as for allocate_packed.
  void choose_products(bool key_panels, int64_t n) {
    if (!may_use_bf16()) return;
    if constexpr (sizeof(T) == 4) bf16 = in_bf16_range();
    if (bf16) return pack_bf16(key_panels, n);
    p.bf16 = false;
    packed.k_panels = key_panels ? memory.get<T>(p.k_views * p.M * padded(p.D)) : nullptr;
    if (key_panels) parallel_for(parallel, n, [&](int64_t i) { pack(i, n); });
  }

  void pack_bf16(bool columns, int64_t n) {
    const int64_t width = (p.D + 31) / 32 * 32, rows = (p.M + 31) / 32 * 32 + 32;
    // Rows a multiple of 1 KiB apart would share few lines of the first-level cache.
    Bf16Keys& keys = packed.keys;
    keys.view_rows = rows, keys.row_stride = width % 512 ? width : width + 32;
    keys.rows = memory.get<uint16_t>(p.k_views * rows * keys.row_stride);
    keys.columns = columns ? memory.get<uint16_t>(p.k_views * rows * width) : nullptr;
    parallel_for(parallel, n, [&](int64_t i) {
      for (int64_t v = 0; v < p.k_views; v++) {
        if (std::find(p.k_index, p.k_index + p.pairs, v) == p.k_index + p.pairs) continue;
        Bf16PackParams t{};
        if constexpr (sizeof(T) == 4) t.x = p.k + v * p.k_view_stride;
        t.row_stride = p.k_row_stride, t.D = p.D, t.count = p.M;
        t.row0 = share(rows / 32, i, n) * 32, t.row1 = share(rows / 32, i + 1, n) * 32;
        t.rows = keys.rows + v * rows * keys.row_stride, t.out_stride = keys.row_stride;
        t.columns = columns ? keys.columns + v * rows * width : nullptr;
        kernels.pack_bf16(t);
      }
    });
  }

  // Of all keys; variance: null where the moment is not wanted.
  SweepParams<T> params(Gradient gradient, const Blocking& blocking, bool want_dq, bool want_dk,
                        double* variance = nullptr) const {
    SweepParams<T> t{};
    t.problem = &p, t.packed = packed, t.blocking = blocking, t.bounded = bounded, t.gradient = gradient;
    t.interrupt = parallel.interrupt, t.bf16 = bf16;
    t.share.key1 = p.M, t.want_dq = want_dq, t.want_dk = want_dk;
    t.want_moment = variance != nullptr, t.statistics.variance = variance;
    return t;
  }

  // f(params of the share, i) for all n shares of the units
  template <class F>
  void in_shares(const SweepParams<T>& t, int64_t n, const ThreadScratch& scratch, bool triangular, F f) const {
    parallel_for(parallel, n, [&](int64_t i) {
      SweepParams<T> mine = t;
      mine.share.unit0 = first_unit(i, n, triangular), mine.share.unit1 = first_unit(i + 1, n, triangular);
      mine.scratch = scratch.of(i);
      f(mine, i);
    });
  }

  // ---- blocking --------------------------------------------------------------------------------------------------
  // Every block reads all keys and reads and writes their gradients: where those are in no private cache, large blocks
  // do so less often. Else small ones keep more of the strip there. Measured (benchmarks/NOTES.md) in float32.
  Blocking blocking() const {
    if (bf16) return blocking_of(kBf16Rows, kBf16Keys);
    const int64_t from = kernels.panel < 32 ? kLargeKeys : kLargeKeys / 2;  // the wider the vectors, the sooner
    const bool large = sizeof(T) == 4 && p.M * padded(p.D) >= from;
    return large ? blocking_of(192, 216) : blocking_of(96, 144);
  }
  static constexpr int64_t kLargeKeys = int64_t(1) << 19, kBf16Rows = 192, kBf16Keys = 256;

  Blocking blocking_of(int64_t rows, int64_t keys) const {
    const int64_t most = std::max<int64_t>(kernels.panel, (p.N + kernels.panel - 1) / kernels.panel * kernels.panel);
    rows = std::max<int64_t>(kernels.panel, rows / kernels.panel * kernels.panel);
    keys = std::min<int64_t>(keys, std::max<int64_t>(p.M, 1));
    return {std::min(rows, most), bf16 ? (keys + 31) / 32 * 32 : keys};
  }

  // For the symmetric sweeps, where a square of the block is a tile, half of it for nothing, and tiles are turned panel
  // by panel.
  Blocking symmetric_blocking() const {
    Blocking b = blocking_of(96, 144);
    b.keys = std::max(b.rows, (b.keys + kernels.panel - 1) / kernels.panel * kernels.panel);
    return b;
  }

  // Largest block of rows (or 0) with which `n` strips and `slices` bytes of slices stay within the workspace.
  Blocking fitting(Gradient gradient, int64_t n, bool want_dq, bool want_dk, size_t slices) const {
    Blocking b = blocking();
    for (; b.rows >= kernels.panel; b.rows -= kernels.panel)
      if (size_t(n) * kernels.strip_scratch(params(gradient, b, want_dq, want_dk)) + slices <= kWorkspaceBytes)
        return b;
    return {0, 0};
  }

  // For a sweep that keeps one tile, on n threads or as many as fit.
  Fit tile_fitting(SweepParams<T> t, int64_t n) const {
    t.blocking = blocking();
    while (t.blocking.rows > kernels.panel && size_t(n) * kernels.strip_scratch(t) > kWorkspaceBytes)
      t.blocking.rows -= kernels.panel;
    const int64_t fit = std::min<int64_t>(n, int64_t(kWorkspaceBytes / kernels.strip_scratch(t)));
    return {t.blocking, std::max<int64_t>(1, fit)};
  }
};

}  // namespace cacr
