// Gradient memory of the threads of a sweep, and its sum.
#pragma once

#include <vector>

#include "engine.h"

namespace cacr {

// Of one side of the problem, queries or keys: a slice for each thread.
template <class T>
struct Slices {
  int64_t views, rows, stride;                // rows `stride` apart: D, padded
  std::vector<T*> data;                       // [threads] of [views][rows][stride]
  std::vector<std::vector<uint8_t>> touched;  // [threads][views]

  GradientSlice<T> of(int64_t thread) {
    return {data[size_t(thread)], rows * stride, stride, touched[size_t(thread)].data()};
  }
};

// Where the slices go: out [views][rows][D] = (accumulate ? out : 0) + scale * sum of the slices from `first` on.
template <class T>
struct SliceSum {
  T* out;
  bool accumulate;
  double scale = 1;
  int64_t first = 0;
  bool complete = false;  // of the queries: the sum is all that flows to unit rows, and becomes that of the raw rows
};

// n slices that nothing was written to; out: memory that the first thread may add to directly (no padding), or null.
template <class T>
Slices<T> make_slices(Engine<T>& e, int64_t views, int64_t rows, int64_t n, T* out = nullptr) {
  Slices<T> s{views, rows, e.padded(e.p.D), {}, {}};
  for (int64_t i = 0; i < n; i++) {
    const bool direct = i == 0 && out;
    s.data.push_back(direct ? out : e.memory.template get<T>(views * rows * s.stride));
    s.touched.emplace_back(views, direct);
  }
  return s;
}
template <class T>
Slices<T> make_query_slices(Engine<T>& e, int64_t n, T* out = nullptr) {
  return make_slices(e, e.p.q_views, e.p.N, n, out);
}
template <class T>
Slices<T> make_key_slices(Engine<T>& e, int64_t n) {
  return make_slices(e, e.p.k_views, e.p.M, n);
}

// Bytes of one thread. shared: queries and keys are one tensor and their gradients are wanted as one sum.
template <class T>
size_t slice_bytes(const Engine<T>& e, bool want_q, bool want_k, bool shared) {
  const int64_t rows = (want_q ? e.p.q_views * e.p.N : 0) + (want_k && !shared ? e.p.k_views * e.p.M : 0);
  return size_t(rows * e.padded(e.p.D)) * sizeof(T);
}

template <class T>
void add_slices(const Engine<T>& e, const Slices<T>& s, const SliceSum<T>& sum, int64_t n) {
  parallel_for(e.parallel, n, [&](int64_t i) {
    std::vector<const T*> sources;
    for (int64_t v = 0; v < s.views; v++) {
      sources.clear();
      for (size_t x = size_t(sum.first); x < s.data.size(); x++)
        if (s.touched[x][size_t(v)]) sources.push_back(s.data[x] + v * s.rows * s.stride);
      const int64_t row0 = share(s.rows, i, n), row1 = share(s.rows, i + 1, n);
      T* const out = sum.out + v * s.rows * e.p.D;
      if (!sum.accumulate || !sources.empty())
        e.kernels.reduce({out, e.p.D, e.p.D, row0, row1, sum.scale, sum.accumulate, sources.data(),
                          int64_t(sources.size()), s.stride});
      if (sum.complete && e.p.normalize) e.kernels.to_raw_rows(e.raw_gradient(out, v, row0, row1));
    }
  });
}

// A sweep on n threads; dq, dk: null where not wanted, the same where both are one sum.
template <class T>
void strip_with_slices(Engine<T>& e, const SweepParams<T>& t, int64_t n, Slices<T>* dq, Slices<T>* dk,
                       const ThreadScratch& scratch) {
  e.in_shares(t, n, scratch, false, [&](SweepParams<T>& mine, int64_t i) {
    if (dq) mine.dq = dq->of(i);
    if (dk) mine.dk = dk->of(i);
    e.kernels.strip(mine);
  });
}

}  // namespace cacr
