// Building blocks of the planner: memory, norms and panels, one sweep over all threads, slices and their sum.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.h"
#include "plan.h"

namespace cacr {

// Aligned memory that lives as long as one call, cut from chunks: a small problem allocates once.
class Workspace {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (std::max<size_t>(1, size_t(count) * sizeof(T)) + 63) / 64 * 64;
    if (bytes > kChunk / 4 && bytes > left_) return static_cast<T*>(chunk(bytes));
    if (bytes > left_) at_ = static_cast<char*>(chunk(kChunk)), left_ = kChunk;
    char* p = at_;
    at_ += bytes, left_ -= bytes;
    return reinterpret_cast<T*>(p);
  }
  template <class T>
  T* zeros(int64_t count) {
    T* p = get<T>(count);
    std::memset(static_cast<void*>(p), 0, size_t(count) * sizeof(T));
    return p;
  }

 private:
  static constexpr size_t kChunk = size_t(96) << 10;

  void* chunk(size_t bytes) {
    void* p = std::aligned_alloc(64, bytes);
    if (!p) throw std::bad_alloc();
    chunks_.emplace_back(p);
    return p;
  }

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::vector<std::unique_ptr<void, Free>> chunks_;
  char* at_ = nullptr;
  size_t left_ = 0;
};

template <class F>
void parallel_for(const Parallel& parallel, int64_t n, F f) {
  if (n == 1 || parallel.threads == 1) {
    for (int64_t i = 0; i < n; i++) f(i);
    return;
  }
  parallel.run(n, [](void* arg, int64_t i) { (*static_cast<F*>(arg))(i); }, &f);
}

inline int64_t share(int64_t n, int64_t i, int64_t parts) { return n * i / parts; }

template <class T>
struct Engine {
  const Kernels<T>& kernels;
  const Parallel& parallel;
  Contrast<T> p;
  Packed<T> packed{};
  Workspace memory;
  bool bounded = false;

  Engine(const Contrast<T>& problem, const Parallel& par, const Kernels<T>& k = cacr::kernels<T>())
      : kernels(k), parallel(par), p(problem) {}

  int64_t padded(int64_t d) const { return (d + kernels.panel - 1) / kernels.panel * kernels.panel; }
  int64_t units() const { return p.pairs * ((p.N + kernels.panel - 1) / kernels.panel); }

  // Are queries and keys the same rows, of the same views in every pair?
  bool symmetric() const { return p.own && std::equal(p.q_index, p.q_index + p.pairs, p.k_index); }

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

  void allocate_packed(bool key_panels) {
    packed.q_norm = memory.get<T>(p.q_views * p.N);
    packed.k_bias = memory.get<T>(p.k_views * p.M);
    packed.k_panels = key_panels ? memory.get<T>(p.k_views * p.M * padded(p.D)) : nullptr;
  }

  // Norms and panels of the i-th of n shares of the rows.
  void pack(int64_t i, int64_t n) const {
    for (int64_t v = 0; v < p.q_views; v++)
      kernels.pack({p.q + v * p.q_view_stride, p.q_row_stride, p.D, p.N, share(p.N, i, n), share(p.N, i + 1, n),
                    p.inner ? T(0) : T(1), packed.q_norm + v * p.N, nullptr});
    for (int64_t v = 0; v < p.k_views; v++) {
      const bool used = std::find(p.k_index, p.k_index + p.pairs, v) != p.k_index + p.pairs;
      T* panels = packed.k_panels && used ? packed.k_panels + v * p.M * padded(p.D) : nullptr;
      kernels.pack({p.k + v * p.k_view_stride, p.k_row_stride, p.D, p.M, share(p.M, i, n), share(p.M, i + 1, n),
                    p.inner ? T(0) : T(-0.5), packed.k_bias + v * p.M, panels});
    }
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
    if (!p.inner) {
      scan(packed.q_norm, p.q_views * p.N, 1, q);
      scan(packed.k_bias, p.k_views * p.M, -2, k);
    }
    for (int s = 0; s < p.softmaxes; s++) tau = std::max(tau, std::abs(p.tau[s]));
    const double c = std::sqrt(q) + std::sqrt(k);
    bounded = !p.inner && finite && tau * c * c * 1.4426950408889634 <= 64;
  }

  Task<T> task(Gradient gradient, const Blocking& blocking, bool want_dq, bool want_dk,
               double* variance = nullptr) const {
    Task<T> t{};
    t.problem = &p, t.packed = packed, t.blocking = blocking, t.bounded = bounded, t.gradient = gradient;
    t.key1 = p.M, t.want_dq = want_dq, t.want_dk = want_dk;
    t.want_moment = variance != nullptr, t.statistics.variance = variance;
    return t;
  }

  // ---- slices: private gradient memory of each thread ----------------------------------------------------------
  struct Slices {
    std::vector<T*> q, k;
    std::vector<std::vector<uint8_t>> q_touched, k_touched;
  };

  // shared: queries and keys are one tensor and their gradients are wanted as one sum.
  // out: gradient memory that the first thread may add to directly (shared slices without padding), or null.
  Slices make_slices(int64_t n, bool want_q, bool want_k, bool shared, T* out = nullptr) {
    Slices s;
    for (int64_t i = 0; i < n; i++) {
      const bool direct = i == 0 && out;
      s.q.push_back(direct ? out : want_q ? memory.get<T>(p.q_views * p.N * padded(p.D)) : nullptr);
      s.k.push_back(shared ? s.q.back() : want_k ? memory.get<T>(p.k_views * p.M * padded(p.D)) : nullptr);
      s.q_touched.emplace_back(p.q_views, direct);
      s.k_touched.emplace_back(p.k_views, direct);
    }
    return s;
  }
  size_t slice_bytes(bool want_q, bool want_k, bool shared) const {
    const int64_t rows = (want_q ? p.q_views * p.N : 0) + (want_k && !shared ? p.k_views * p.M : 0);
    return size_t(rows * padded(p.D)) * sizeof(T);
  }

  void sweep(const Task<T>& t, int64_t n) {  // forward: no gradient memory
    char* base = sweep_scratch(t, n);
    in_shares(t, n, base, false, [&](Task<T>& mine, int64_t) { kernels.sweep(mine); });
  }

  // f(task of the share, i) for all n shares of the units
  template <class F>
  void in_shares(const Task<T>& t, int64_t n, char* base, bool triangular, F f) {
    const size_t scratch = kernels.sweep_scratch(t);
    parallel_for(parallel, n, [&](int64_t i) {
      Task<T> mine = t;
      mine.unit0 = first_unit(i, n, triangular), mine.unit1 = first_unit(i + 1, n, triangular);
      mine.scratch = base + size_t(i) * scratch;
      f(mine, i);
    });
  }

  char* sweep_scratch(const Task<T>& t, int64_t n) { return memory.get<char>(int64_t(kernels.sweep_scratch(t)) * n); }

  // key_moments: [n][moments], or null
  void sweep_with_slices(const Task<T>& t, int64_t n, Slices& s, char* base, T* key_moments = nullptr,
                         int64_t moments = 0) {
    const int64_t stride = padded(p.D);
    const bool shared = s.q[0] == s.k[0];
    in_shares(t, n, base, t.symmetric, [&](Task<T>& mine, int64_t i) {
      mine.key_moments = key_moments ? key_moments + i * moments : nullptr;
      mine.dq = {s.q[i], p.N * stride, stride, s.q_touched[i].data()};
      mine.dk = {s.k[i], p.M * stride, stride, shared ? s.q_touched[i].data() : s.k_touched[i].data()};
      kernels.sweep(mine);
    });
  }

  // out [views][rows], rows `out_stride` apart, = (accumulate ? out : 0) + scale * sum of the slices from `first` on.
  void add_slices(const std::vector<T*>& data, const std::vector<std::vector<uint8_t>>& touched, int64_t first,
                  int64_t views, int64_t rows, T* out, int64_t out_stride, double scale, bool accumulate, int64_t n) {
    const int64_t stride = padded(p.D);
    parallel_for(parallel, n, [&](int64_t i) {
      std::vector<const T*> sources;
      for (int64_t v = 0; v < views; v++) {
        sources.clear();
        for (size_t s = size_t(first); s < data.size(); s++)
          if (touched[s][size_t(v)]) sources.push_back(data[s] + v * rows * stride);
        if (accumulate && sources.empty()) continue;
        kernels.reduce({out + v * rows * out_stride, out_stride, p.D, share(rows, i, n), share(rows, i + 1, n), scale,
                        accumulate, sources.data(), int64_t(sources.size()), stride});
      }
    });
  }

  // ---- blocking --------------------------------------------------------------------------------------------------
  // Every block reads all keys and reads and writes their gradients: where those are in no private cache, large blocks
  // do so less often. Else small ones keep more of the strip there. Measured (benchmarks/NOTES.md) in float32.
  Blocking blocking() const {
    const bool large = sizeof(T) == 4 && p.M * padded(p.D) >= kLargeKeys;
    return large ? blocking_of(192, 216) : blocking_of(96, 144);
  }
  static constexpr int64_t kLargeKeys = int64_t(1) << 19;

  Blocking blocking_of(int64_t rows, int64_t keys) const {
    const int64_t most = std::max<int64_t>(kernels.panel, (p.N + kernels.panel - 1) / kernels.panel * kernels.panel);
    rows = std::max<int64_t>(kernels.panel, rows / kernels.panel * kernels.panel);
    return {std::min(rows, most), std::min<int64_t>(keys, std::max<int64_t>(p.M, 1))};
  }

  // For the symmetric sweeps, where a square of the block is a tile, half of it for nothing, and tiles are turned panel
  // by panel.
  Blocking symmetric_blocking() const {
    Blocking b = blocking_of(96, 144);
    b.keys = std::max(b.rows, (b.keys + kernels.panel - 1) / kernels.panel * kernels.panel);
    return b;
  }

  // Largest block of rows (or 0) with which `n` strips and `slices` slices stay within the workspace.
  Blocking fitting(Gradient gradient, int64_t n, bool want_dq, bool want_dk, size_t slices) const {
    Blocking b = blocking();
    for (; b.rows >= kernels.panel; b.rows -= kernels.panel)
      if (size_t(n) * kernels.sweep_scratch(task(gradient, b, want_dq, want_dk)) + slices <= kWorkspaceBytes) return b;
    return {0, 0};
  }

  // Blocking for a sweep that keeps one tile, and in n the threads (no more than given) whose tiles fit the workspace.
  Blocking tile_fitting(Task<T> t, int64_t& n) const {
    t.blocking = blocking();
    while (t.blocking.rows > kernels.panel && size_t(n) * kernels.sweep_scratch(t) > kWorkspaceBytes)
      t.blocking.rows -= kernels.panel;
    n = std::max<int64_t>(1, std::min<int64_t>(n, int64_t(kWorkspaceBytes / kernels.sweep_scratch(t))));
    return t.blocking;
  }
};

}  // namespace cacr
