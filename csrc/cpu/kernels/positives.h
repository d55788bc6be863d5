// The gradient of a softmax over positives, pair by pair from differences.
//
// The products of backward.h, sum_j h_ij k_j - (sum_j h_ij) q_i, lose what queries and keys have in common. Among
// positives that may be nearly everything, and where no repulsion stands beside it the loss shows. Here a row adds up
// h_ij (k_j - q_i), four of the others at a time.
#pragma once

#include "pack.h"
#include "tiles.h"

namespace cacr::CACR_ISA {

// Row x of one pair of views against `kOthers` rows y of the other side.
template <class T>
struct FewPositives {
  static constexpr int kOthers = 4;
  const T* x;
  const T* others[kOthers];
  T h[kOthers];  // dL/du, 0 where there is none

  // -|x - y|^2 / 2
  void similarities(idx D, T* u) const {
    constexpr int W = Lanes<T>::W;
    Vec<T> s[kOthers] = {};
    idx d = 0;
    for (; d + W <= D; d += W)
      for (int r = 0; r < kOthers; r++) {
        const Vec<T> v = load(others[r] + d) - load(x + d);
        s[r] += v * v;
      }
    for (int r = 0; r < kOthers; r++) {
      u[r] = sum_lanes<T>(s[r]);
      for (idx e = d; e < D; e++) u[r] += (others[r][e] - x[e]) * (others[r][e] - x[e]);
      u[r] *= T(-0.5);
    }
  }

  void add_differences(idx D, T* out) const {
    constexpr int W = Lanes<T>::W;
    idx d = 0;
    for (; d + W <= D; d += W) {
      Vec<T> sum = load(out + d);
      for (int r = 0; r < kOthers; r++) sum += h[r] * (load(others[r] + d) - load(x + d));
      store<T>(out + d, sum);
    }
    for (; d < D; d++)
      for (int r = 0; r < kOthers; r++) out[d] += h[r] * (others[r][d] - x[d]);
  }
};

// h[r] += dL/du[r] of the queries rows[r]; count of them, the others get none.
template <class T>
void add_gradients(T slope, int count, const T* u, const PositiveRow<T>* const* rows, T* h) {
  constexpr int W = Lanes<T>::W, n = FewPositives<T>::kOthers, all = n > W ? n : W;
  const T sign = slope < 0 ? T(-1) : T(1);
  T d[all] = {}, e[all];
  for (int r = 0; r < count; r++) d[r] = u[r] - sign * rows[r]->top;
  for (int l = 0; l < all; l += W) store<T>(e + l, exp2_flushed<T>(slope * load(d + l)));
  for (int r = 0; r < count; r++) h[r] += key_gradient(e[r], T(d[r] - rows[r]->delta), rows[r]->a, rows[r]->b);
}

// What row x gets of `count` others in one pair of views.
template <class T>
void meet_positives(const PositivesParams<T>& t, idx pair, idx x, const int32_t* others, int count) {
  const Contrast<T>& p = *t.problem;
  const T* q = p.q + p.q_index[pair] * p.q_view_stride;
  const T* k = p.k + p.k_index[pair] * p.k_view_stride;
  const idx q_stride = p.q_row_stride, k_stride = p.k_row_stride;
  const PositiveRow<T>* const rows = t.rows + pair * p.N;
  const PositiveRow<T>*of_x[4], *of_others[4];
  FewPositives<T> few{t.as_queries ? q + x * q_stride : k + x * k_stride, {}, {}};
  for (int r = 0; r < few.kOthers; r++) {
    const idx y = others[min_of(r, count - 1)];
    few.others[r] = t.as_queries ? k + y * k_stride : q + y * q_stride;
    of_x[r] = rows + (t.as_queries ? x : 0), of_others[r] = rows + (t.as_keys ? y : 0);
  }
  T u[few.kOthers];
  few.similarities(p.D, u);
  const T slope = T(-2 * p.tau[t.softmax] * kLog2e);
  if (t.as_queries) add_gradients(slope, count, u, of_x, few.h);
  if (t.as_keys) add_gradients(slope, count, u, of_others, few.h);
  const idx view = t.as_queries ? p.q_index[pair] : p.k_index[pair], side = t.as_queries ? p.N : p.M;
  few.add_differences(p.D, t.gradient + (view * side + x) * p.D);
}

// Positives of the rows [row0, row1) of one side, in the order of their ids.
template <class T>
void positives(const PositivesParams<T>& t) {
  const Contrast<T>& p = *t.problem;
  const SortedRows &mine = t.as_queries ? t.q_rows : t.k_rows, &theirs = t.as_queries ? t.k_rows : t.q_rows;
  idx first = 0;
  for (idx at = t.row0; at < t.row1; at++) {
    if (t.interrupt()) return;
    while (first < theirs.count && theirs.id[first] < mine.id[at]) first++;
    const idx x = mine.row[at];
    int32_t few[FewPositives<T>::kOthers];
    int count = 0;
    const auto meet = [&] {
      for (idx pair = 0; pair < p.pairs && count; pair++) meet_positives(t, pair, x, few, count);
      count = 0;
    };
    for (idx o = first; o < theirs.count && theirs.id[o] == mine.id[at]; o++) {
      if (p.kind[t.softmax] == kSameNotSelf && theirs.row[o] == x) continue;
      few[count++] = theirs.row[o];
      if (count == FewPositives<T>::kOthers) meet();
    }
    meet();
  }
}

}  // namespace cacr::CACR_ISA
