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
constexpr int kOthers = 4;

template <class T, bool kRaw>
struct FewPositives {
  RowPair<T, kRaw> rows[kOthers];  // y and x
  T h[kOthers];                    // dL/du, 0 where there is none

  // -|x - y|^2 / 2
  void similarities(idx D, T* u) const {
    constexpr int W = Lanes<T>::W;
    Vec<T> s[kOthers] = {};
    idx d = 0;
    for (; d + W <= D; d += W)
      for (int r = 0; r < kOthers; r++) {
        const Vec<T> v = rows[r].at(d);
        s[r] += v * v;
      }
    for (int r = 0; r < kOthers; r++) {
      u[r] = sum_lanes<T>(s[r]);
      for (idx e = d; e < D; e++) u[r] += rows[r].one(e) * rows[r].one(e);
      u[r] *= T(-0.5);
    }
  }

  void add_differences(idx D, T* out) const {
    constexpr int W = Lanes<T>::W;
    idx d = 0;
    for (; d + W <= D; d += W) {
      Vec<T> sum = load(out + d);
      for (int r = 0; r < kOthers; r++) sum += h[r] * rows[r].at(d);
      store<T>(out + d, sum);
    }
    for (; d < D; d++)
      for (int r = 0; r < kOthers; r++) out[d] += h[r] * rows[r].one(d);
  }
};

// h[r] += dL/du[r] of the queries rows[r]; count of them, the others get none.
template <class T>
void add_gradients(T slope, int count, const T* u, const PositiveRow<T>* const* rows, T* h) {
  constexpr int W = Lanes<T>::W, n = kOthers, all = n > W ? n : W;
  const T sign = slope < 0 ? T(-1) : T(1);
  T d[all] = {}, e[all];
  for (int r = 0; r < count; r++) d[r] = u[r] - sign * rows[r]->top;
  for (int l = 0; l < all; l += W) store<T>(e + l, exp2_flushed<T>(slope * load(d + l)));
  for (int r = 0; r < count; r++) h[r] += key_gradient(e[r], T(d[r] - rows[r]->delta), rows[r]->a, rows[r]->b);
}

// What row x gets of `count` others in one pair of views.
template <class T, bool kRaw>
void meet_positives(const PositivesParams<T>& t, idx pair, idx x, const int32_t* others, int count) {
  const Contrast<T>& p = *t.problem;
  const T *q = p.q + p.q_index[pair] * p.q_view_stride, *k = p.k + p.k_index[pair] * p.k_view_stride;
  const T *q_r = kRaw ? t.q_r + p.q_index[pair] * p.N : nullptr, *k_r = kRaw ? t.k_r + p.k_index[pair] * p.M : nullptr;
  const idx q_stride = p.q_row_stride, k_stride = p.k_row_stride;
  const PositiveRow<T>* const rows = t.rows + pair * p.N;
  const PositiveRow<T>*of_x[kOthers], *of_others[kOthers];
  FewPositives<T, kRaw> few{};
  for (int r = 0; r < kOthers; r++) {
    const idx y = others[min_of(r, count - 1)], query = t.as_queries ? x : y, key = t.as_queries ? y : x;
    const T *a = q + query * q_stride, *b = k + key * k_stride, a_r = factor_of(q_r, query), b_r = factor_of(k_r, key);
    few.rows[r] = t.as_queries ? RowPair<T, kRaw>{b, a, b_r, a_r} : RowPair<T, kRaw>{a, b, a_r, b_r};
    of_x[r] = rows + (t.as_queries ? x : 0), of_others[r] = rows + (t.as_keys ? y : 0);
  }
  T u[kOthers];
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
    int32_t few[kOthers];
    int count = 0;
    const auto meet = [&] {
      for (idx pair = 0; pair < p.pairs && count; pair++)
        (p.normalize ? meet_positives<T, true> : meet_positives<T, false>)(t, pair, x, few, count);
      count = 0;
    };
    for (idx o = first; o < theirs.count && theirs.id[o] == mine.id[at]; o++) {
      const idx query = t.as_queries ? x : theirs.row[o], key = t.as_queries ? theirs.row[o] : x;
      if (p.kind[t.softmax] == kSameNotSelf && (p.q_self ? p.q_self[query] : query) == key) continue;
      few[count++] = theirs.row[o];
      if (count == kOthers) meet();
    }
    meet();
  }
}

}  // namespace cacr::CACR_ISA
