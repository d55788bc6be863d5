// The two sweeps of a contrast problem: statistics, and the gradients of statistics known already.
#pragma once

#include "symmetric.h"

namespace cacr {

// Norms and, where a query gradient is wanted, panels of the keys.
template <class T>
void prepare(Engine<T>& e, bool key_panels, int64_t n) {
  e.allocate_packed(key_panels);
  parallel_for(e.parallel, n, [&](int64_t i) { e.pack(i, n); });
  e.find_bound();
  e.choose_products(key_panels, n);
}

template <class T>
void forward_sweep(Engine<T>& e, const Statistics& statistics, int64_t n) {
  if (symmetric_pays(e)) return symmetric_forward(e, statistics, n);
  SweepParams<T> t = e.params(Gradient::kNone, e.blocking(), false, false);
  t.statistics = statistics;
  const Fit fit = e.tile_fitting(t, n);
  t.blocking = fit.blocking;
  const auto scratch = ThreadScratch::get(e.memory, e.kernels.strip_scratch(t), fit.threads);
  strip_with_slices<T>(e, t, fit.threads, nullptr, nullptr, scratch);
}

// What a backward sweep gives; null: not wanted. dq and dk may be the same memory where queries and keys are the same
// tensor.
template <class T>
struct SweepGradients {
  T* dq;             // [q_views][N][D]
  T* dk;             // [k_views][M][D]
  double* variance;  // [softmaxes][pairs][N]
  bool accumulate;   // gradients are added to what is there

  bool shared() const { return dq && dq == dk; }
};

// Gradient memory with padded rows as the only slice of its side: `out` itself where its rows need no padding.
template <class T>
Slices<T> padded_out(Engine<T>& e, T* out, int64_t views, int64_t rows, bool accumulate) {
  const int64_t stride = e.padded(e.p.D);
  const size_t count = size_t(views * rows * stride);
  T* data = out;
  if (stride != e.p.D)
    data = e.memory.template zeros<T>(int64_t(count));
  else if (!accumulate)
    std::memset(static_cast<void*>(out), 0, count * sizeof(T));
  return {views, rows, stride, {data}, {std::vector<uint8_t>(size_t(views), 1)}};
}

// The body of a sweep by owners: which units and keys each of the threads has.
template <class T, class F>
void run_owners(Engine<T>& e, SweepParams<T> t, int64_t n, F body) {
  SweepParams<T> widest = t;
  if (t.want_dk) widest.share.key1 = (e.p.M + n - 1) / n;
  const Fit fit = e.tile_fitting(widest, n);
  t.blocking = widest.blocking = fit.blocking;
  if (t.want_dk) widest.share.key1 = (e.p.M + fit.threads - 1) / fit.threads;  // fewer threads own more keys each
  const auto scratch = ThreadScratch::get(e.memory, e.kernels.strip_scratch(widest), fit.threads);
  parallel_for(e.parallel, fit.threads, [&](int64_t i) {
    SweepParams<T> mine = t;
    mine.scratch = scratch.of(i);
    body(mine, i, fit.threads);
  });
}

// Every thread owns rows of dq (all keys), then rows of dk (all queries): no private gradient memory, similarities are
// computed once more. For many threads times many keys.
template <class T>
void backward_by_owner(Engine<T>& e, const BackwardRows& rows, const SweepGradients<T>& out, int64_t n) {
  const Contrast<T>& p = e.p;
  const int64_t panels = e.padded(p.N) / e.kernels.panel;
  Slices<T> q{}, k{};
  if (out.dq) q = padded_out(e, out.dq, p.q_views, p.N, out.accumulate);
  if (out.dk) k = out.shared() ? q : padded_out(e, out.dk, p.k_views, p.M, out.accumulate);
  if (out.dq || out.variance) {
    SweepParams<T> t = e.params(Gradient::kGiven, e.blocking(), out.dq != nullptr, false, out.variance);
    t.rows = rows;
    if (out.dq) t.dq = q.of(0);
    run_owners(e, t, n, [&](SweepParams<T>& mine, int64_t i, int64_t threads) {
      for (int64_t pair = 0; pair < p.pairs; pair++) {
        mine.share.unit0 = pair * panels + share(panels, i, threads);
        mine.share.unit1 = pair * panels + share(panels, i + 1, threads);
        e.kernels.strip(mine);
      }
    });
  }
  if (out.dk) {
    SweepParams<T> t = e.params(Gradient::kGiven, e.blocking(), false, true);
    t.rows = rows, t.dk = k.of(0);
    run_owners(e, t, n, [&](SweepParams<T>& mine, int64_t i, int64_t threads) {
      mine.share = {0, e.units(), share(p.M, i, threads), share(p.M, i + 1, threads)};
      if (mine.share.key0 < mine.share.key1) e.kernels.strip(mine);
    });
  }
  const bool padding = e.padded(p.D) != p.D;
  if (out.dq && padding) add_slices(e, q, {out.dq, out.accumulate}, n);
  if (out.dk && padding && !out.shared()) add_slices(e, k, {out.dk, out.accumulate}, n);
}

template <class T>
void backward_sweep(Engine<T>& e, const BackwardRows& rows, const SweepGradients<T>& out, int64_t n) {
  if (symmetric_pays(e)) return symmetric_backward(e, rows, out.dq, out.variance, out.accumulate, n);
  const bool want_dq = out.dq != nullptr, want_dk = out.dk != nullptr;
  const size_t bytes = size_t(n) * slice_bytes(e, want_dq, want_dk, out.shared());
  const Blocking b = e.fitting(Gradient::kGiven, n, want_dq, want_dk, bytes);
  if (b.rows == 0) return backward_by_owner(e, rows, out, n);
  SweepParams<T> t = e.params(Gradient::kGiven, b, want_dq, want_dk, out.variance);
  t.rows = rows;
  Slices<T> q{}, k{};
  if (want_dq) q = make_query_slices(e, n);
  if (want_dk && !out.shared()) k = make_key_slices(e, n);
  Slices<T>* const dk = out.shared() ? &q : want_dk ? &k : nullptr;
  const auto scratch = ThreadScratch::get(e.memory, e.kernels.strip_scratch(t), n);
  strip_with_slices(e, t, n, want_dq ? &q : nullptr, dk, scratch);
  if (want_dq) add_slices(e, q, {out.dq, out.accumulate}, n);
  if (want_dk && !out.shared()) add_slices(e, k, {out.dk, out.accumulate}, n);
}

}  // namespace cacr
