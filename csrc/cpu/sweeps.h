// The two general sweeps of the planner: statistics, and gradients of statistics known already.
#pragma once

#include "engine.h"

namespace cacr {

// Rows below which the symmetric sweeps do not pay (see benchmarks/NOTES.md).
constexpr int64_t kSymmetricRows = 192;

template <class T>
Task<T> symmetric_task(const Engine<T>& e, Gradient gradient, double* variance = nullptr) {
  const bool backward = gradient != Gradient::kNone;
  Task<T> t = e.task(gradient, e.symmetric_blocking(), backward, backward, variance);
  t.symmetric = true;
  return t;
}

// Threads, no more than n, whose memory fits the workspace in both sweeps; 0: not even that of one.
template <class T>
int64_t symmetric_threads(const Engine<T>& e, int64_t n) {
  double some = 0;  // not null: as if the moments were wanted, so that no sweep decides unlike another
  const Task<T> forward = symmetric_task(e, Gradient::kNone), backward = symmetric_task(e, Gradient::kGiven, &some);
  const size_t moments = size_t(e.p.softmaxes * e.p.pairs * e.p.N) * sizeof(T);
  const size_t shared = size_t(e.kernels.symmetric_states(backward)) * sizeof(T);
  const size_t there = size_t(e.kernels.symmetric_states(forward)) * sizeof(T) + e.kernels.sweep_scratch(forward);
  const size_t back = e.kernels.sweep_scratch(backward) + e.slice_bytes(true, true, true) + moments;
  if (shared >= kWorkspaceBytes) return 0;
  return std::min<int64_t>(n, int64_t((kWorkspaceBytes - shared) / std::max(there, back)));
}

// The same answer for the forward and the backward of one problem, whatever the threads and the wanted gradients: a row
// must get the similarities it was normalised with.
template <class T>
bool symmetric_pays(const Engine<T>& e) {
  return e.p.N >= kSymmetricRows && e.symmetric() && symmetric_threads(e, 1) == 1;
}

// Every similarity once, for both of its rows.
template <class T>
void symmetric_forward(Engine<T>& e, const Statistics& statistics, int64_t threads) {
  const int64_t n = symmetric_threads(e, threads);
  Task<T> t = symmetric_task(e, Gradient::kNone);
  t.statistics = statistics;
  Workspace memory;  // given back before a backward sweep needs its own
  std::vector<T*> partial;
  for (int64_t i = 0; i < n; i++) partial.push_back(memory.get<T>(e.kernels.symmetric_states(t)));
  char* scratch = memory.get<char>(int64_t(e.kernels.sweep_scratch(t)) * n);
  e.in_shares(t, n, scratch, true, [&](Task<T>& mine, int64_t i) {
    mine.row_states = partial[size_t(i)];
    e.kernels.sweep(mine);
  });
  t.row_states = partial[0], t.partial_states = partial.data(), t.partials = n;
  e.in_shares(t, n, scratch, false, [&](Task<T>& mine, int64_t) { e.kernels.finish(mine); });
}

// dz (+)= what the rows get as queries and as keys; variance [softmaxes][pairs][N], or null: not wanted
template <class T>
void symmetric_backward(Engine<T>& e, const RowGradients& rows, T* dz, double* variance, bool accumulate,
                        int64_t threads) {
  const int64_t n = symmetric_threads(e, threads), moments = variance ? e.p.softmaxes * e.p.pairs * e.p.N : 0;
  Task<T> t = symmetric_task(e, Gradient::kGiven, variance);
  t.rows = rows;
  t.row_states = e.memory.template get<T>(e.kernels.symmetric_states(t));
  char* scratch = e.sweep_scratch(t, n);
  e.in_shares(t, n, scratch, false, [&](Task<T>& mine, int64_t) { e.kernels.prepare(mine); });
  auto s = e.make_slices(n, true, true, true);
  T* key_moments = e.memory.template zeros<T>(moments * n);
  e.sweep_with_slices(t, n, s, scratch, moments ? key_moments : nullptr, moments);
  if (dz) e.add_slices(s.q, s.q_touched, 0, e.p.q_views, e.p.N, dz, e.p.D, 1, accumulate, n);
  for (int64_t i = 0; i < moments; i++)  // as queries, and as keys of other rows' tiles, in the order of the threads
    for (int64_t x = 0; x < n; x++)
      if (rows.sum[i] != 0) variance[i] += 4 / rows.sum[i] * double(key_moments[x * moments + i]);
}

template <class T>
void forward_sweep(Engine<T>& e, const Statistics& statistics, int64_t n) {
  if (symmetric_pays(e)) return symmetric_forward(e, statistics, n);
  Task<T> t = e.task(Gradient::kNone, e.blocking(), false, false);
  t.statistics = statistics;
  t.blocking = e.tile_fitting(t, n);
  e.sweep(t, n);
}

// Gradient memory with padded rows: `out` itself where its rows need no padding.
template <class T>
struct PaddedOut {
  T* data;
  bool own;
};
template <class T>
PaddedOut<T> padded_out(Engine<T>& e, T* out, int64_t rows, bool accumulate) {
  const int64_t stride = e.padded(e.p.D);
  if (stride != e.p.D) return {e.memory.template zeros<T>(rows * stride), true};
  if (!accumulate) std::memset(static_cast<void*>(out), 0, size_t(rows * stride) * sizeof(T));
  return {out, false};
}

// Every thread owns rows of dq (all keys), then rows of dk (all queries): no private gradient memory, similarities are
// computed once more. For many threads times many keys.
template <class T>
void backward_by_owner(Engine<T>& e, const RowGradients& rows, T* dq, T* dk, double* variance, bool accumulate,
                       int64_t n) {
  const Contrast<T>& p = e.p;
  const int64_t stride = e.padded(p.D), panels = (p.N + e.kernels.panel - 1) / e.kernels.panel;
  const bool shared = dq && dq == dk;
  PaddedOut<T> q{}, k{};
  if (dq) q = padded_out(e, dq, p.q_views * p.N, accumulate);
  if (dk) k = shared ? q : padded_out(e, dk, p.k_views * p.M, accumulate);
  std::vector<uint8_t> q_touched(size_t(p.q_views), 1), k_touched(size_t(p.k_views), 1);
  auto run = [&](Task<T> t, auto body) {
    t.rows = rows;
    int64_t threads = n;
    Task<T> widest = t;
    if (t.want_dk) widest.key1 = (p.M + n - 1) / n;
    t.blocking = e.tile_fitting(widest, threads);
    if (t.want_dk) widest.key1 = (p.M + threads - 1) / threads;  // fewer threads own more keys each
    widest.blocking = t.blocking;
    const size_t scratch = e.kernels.sweep_scratch(widest);
    char* base = e.memory.template get<char>(int64_t(scratch) * threads);
    t.dq = {q.data, p.N * stride, stride, q_touched.data()};
    t.dk = {k.data, p.M * stride, stride, k_touched.data()};
    parallel_for(e.parallel, threads, [&](int64_t i) {
      Task<T> mine = t;
      mine.scratch = base + size_t(i) * scratch;
      body(mine, i, threads);
    });
  };
  if (dq || variance)
    run(e.task(Gradient::kGiven, e.blocking(), dq != nullptr, false, variance), [&](Task<T>& t, int64_t i,
                                                                                    int64_t threads) {
      for (int64_t pair = 0; pair < p.pairs; pair++) {
        t.unit0 = pair * panels + share(panels, i, threads), t.unit1 = pair * panels + share(panels, i + 1, threads);
        e.kernels.sweep(t);
      }
    });
  if (dk)
    run(e.task(Gradient::kGiven, e.blocking(), false, true), [&](Task<T>& t, int64_t i, int64_t threads) {
      t.unit0 = 0, t.unit1 = e.units();
      t.key0 = share(p.M, i, threads), t.key1 = share(p.M, i + 1, threads);
      if (t.key0 < t.key1) e.kernels.sweep(t);
    });
  const std::vector<std::vector<uint8_t>> touched_q{q_touched}, touched_k{k_touched};
  if (dq && q.own) e.add_slices({q.data}, touched_q, 0, p.q_views, p.N, dq, p.D, 1, accumulate, n);
  if (dk && k.own && !shared) e.add_slices({k.data}, touched_k, 0, p.k_views, p.M, dk, p.D, 1, accumulate, n);
}

// dq and dk may be the same memory where queries and keys are the same tensor.
template <class T>
void backward_sweep(Engine<T>& e, const RowGradients& rows, T* dq, T* dk, double* variance, bool accumulate,
                    int64_t n) {
  const Contrast<T>& p = e.p;
  const bool shared = dq && dq == dk;
  if (symmetric_pays(e)) return symmetric_backward(e, rows, dq, variance, accumulate, n);
  const size_t slice_bytes = size_t(n) * e.slice_bytes(dq != nullptr, dk != nullptr, shared);
  const Blocking b = e.fitting(Gradient::kGiven, n, dq != nullptr, dk != nullptr, slice_bytes);
  if (b.rows == 0) return backward_by_owner(e, rows, dq, dk, variance, accumulate, n);
  Task<T> t = e.task(Gradient::kGiven, b, dq != nullptr, dk != nullptr, variance);
  t.rows = rows;
  auto s = e.make_slices(n, dq != nullptr, dk != nullptr, shared);
  e.sweep_with_slices(t, n, s, e.sweep_scratch(t, n));
  if (dq) e.add_slices(s.q, s.q_touched, 0, p.q_views, p.N, dq, p.D, 1, accumulate, n);
  if (dk && !shared) e.add_slices(s.k, s.k_touched, 0, p.k_views, p.M, dk, p.D, 1, accumulate, n);
}

}  // namespace cacr
