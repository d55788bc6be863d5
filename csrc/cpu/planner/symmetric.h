// The planner of sweeps where queries and keys are the same rows (kernels/symmetric.h).
#pragma once

#include "slices.h"

namespace cacr {

// Rows below which the symmetric sweeps do not pay (see benchmarks/NOTES.md).
constexpr int64_t kSymmetricRows = 192;

template <class T>
SymmetricParams<T> symmetric_params(const Engine<T>& e, Gradient gradient, double* variance = nullptr) {
  const bool backward = gradient != Gradient::kNone;
  SymmetricParams<T> t{};
  t.sweep = e.params(gradient, e.symmetric_blocking(), backward, backward, variance);
  return t;
}

// Threads, no more than n, whose memory fits the workspace in both sweeps; 0: not even that of one.
template <class T>
int64_t symmetric_threads(const Engine<T>& e, int64_t n) {
  double some = 0;  // not null: as if the moments were wanted, so that no sweep decides unlike another
  const SymmetricParams<T> forward = symmetric_params(e, Gradient::kNone),
                           backward = symmetric_params(e, Gradient::kGiven, &some);
  const size_t moments = size_t(e.p.softmaxes * e.p.pairs * e.p.N) * sizeof(T);
  const size_t shared = size_t(e.kernels.symmetric_states(backward)) * sizeof(T);
  const size_t there = size_t(e.kernels.symmetric_states(forward)) * sizeof(T) + e.kernels.symmetric_scratch(forward);
  const size_t back = e.kernels.symmetric_scratch(backward) + slice_bytes(e, true, true, true) + moments;
  if (shared >= kWorkspaceBytes) return 0;
  return std::min<int64_t>(n, int64_t((kWorkspaceBytes - shared) / std::max(there, back)));
}

// The same answer for the forward and the backward of one problem, whatever the threads and the wanted gradients: a row
// must get the similarities it was normalised with.
template <class T>
bool symmetric_pays(const Engine<T>& e) {
  return e.p.N >= kSymmetricRows && e.symmetric() && symmetric_threads(e, 1) == 1;
}

// f(params of the share, i) for all n shares
template <class T, class F>
void in_symmetric_shares(const Engine<T>& e, const SymmetricParams<T>& t, int64_t n, const ThreadScratch& scratch,
                         bool triangular, F f) {
  e.in_shares(t.sweep, n, scratch, triangular, [&](const SweepParams<T>& share, int64_t i) {
    SymmetricParams<T> mine = t;
    mine.sweep = share;
    f(mine, i);
  });
}

// Every similarity once, for both of its rows.
template <class T>
void symmetric_forward(Engine<T>& e, const Statistics& statistics, int64_t threads) {
  const int64_t n = symmetric_threads(e, threads);
  SymmetricParams<T> t = symmetric_params(e, Gradient::kNone);
  t.sweep.statistics = statistics;
  Workspace memory;  // given back before a backward sweep needs its own
  std::vector<T*> partial;
  for (int64_t i = 0; i < n; i++) partial.push_back(memory.get<T>(e.kernels.symmetric_states(t)));
  const auto scratch = ThreadScratch::get(memory, e.kernels.symmetric_scratch(t), n);
  in_symmetric_shares(e, t, n, scratch, true, [&](SymmetricParams<T>& mine, int64_t i) {
    mine.row_states = partial[size_t(i)];
    e.kernels.symmetric_sweep(mine);
  });
  t.row_states = partial[0], t.partial_states = partial.data(), t.partials = n;
  in_symmetric_shares(e, t, n, scratch, false,
                      [&](SymmetricParams<T>& mine, int64_t) { e.kernels.symmetric_finish(mine); });
}

// dz (+)= what the rows get as queries and as keys; variance [softmaxes][pairs][N], or null: not wanted
template <class T>
void symmetric_backward(Engine<T>& e, const BackwardRows& rows, T* dz, double* variance, bool accumulate,
                        int64_t threads) {
  const int64_t n = symmetric_threads(e, threads), moments = variance ? e.p.softmaxes * e.p.pairs * e.p.N : 0;
  SymmetricParams<T> t = symmetric_params(e, Gradient::kGiven, variance);
  t.sweep.rows = rows;
  t.row_states = e.memory.template get<T>(e.kernels.symmetric_states(t));
  const auto scratch = ThreadScratch::get(e.memory, e.kernels.symmetric_scratch(t), n);
  in_symmetric_shares(e, t, n, scratch, false,
                      [&](SymmetricParams<T>& mine, int64_t) { e.kernels.symmetric_prepare(mine); });
  Slices<T> slices = make_query_slices(e, n);
  T* key_moments = e.memory.template zeros<T>(moments * n);
  in_symmetric_shares(e, t, n, scratch, true, [&](SymmetricParams<T>& mine, int64_t i) {
    mine.key_moments = moments ? key_moments + i * moments : nullptr;
    mine.sweep.dq = mine.sweep.dk = slices.of(i);
    e.kernels.symmetric_sweep(mine);
  });
  if (dz) add_slices(e, slices, {dz, accumulate}, n);
  for (int64_t i = 0; i < moments; i++)  // as queries, and as keys of other rows' tiles, in the order of the threads
    for (int64_t x = 0; x < n; x++)
      if (rows.state.sum[i] != 0) variance[i] += 4 / rows.state.sum[i] * double(key_moments[x * moments + i]);
}

}  // namespace cacr
