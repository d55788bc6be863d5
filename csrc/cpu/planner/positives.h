// The planner of gradients from differences (kernels/positives.h): when, and in which order.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "engine.h"

namespace cacr {

// The rows of one side, sorted by their ids.
struct IdOrder {
  std::vector<int32_t> row, id;

  IdOrder(const int32_t* ids, int64_t n) : row(size_t(n)), id(size_t(n)) {
    std::iota(row.begin(), row.end(), 0);
    std::sort(row.begin(), row.end(), [&](int32_t x, int32_t y) { return ids[x] != ids[y] ? ids[x] < ids[y] : x < y; });
    for (size_t i = 0; i < row.size(); i++) id[i] = ids[row[i]];
  }
  SortedRows rows() const { return {row.data(), id.data(), int64_t(row.size())}; }
};

// How many pairs of a query and a key have the same id.
inline int64_t equal_pairs(const IdOrder& q, const IdOrder& k) {
  int64_t count = 0;
  for (auto at = q.id.begin(); at != q.id.end();) {
    const auto end = std::upper_bound(at, q.id.end(), *at);
    const auto [first, last] = std::equal_range(k.id.begin(), k.id.end(), *at);
    count += (end - at) * (last - first);
    at = end;
  }
  return count;
}

// What flows into a softmax, at most.
template <class T>
double largest_gradient(const Contrast<T>& p, const BackwardRows& rows, int s) {
  double most = 0;
  for (int64_t i = s * p.pairs * p.N; i < (s + 1) * p.pairs * p.N; i++)
    most = std::max({most, std::abs(rows.grad_value[i]), std::abs(rows.grad_lse[i] * p.tau[s])});
  return most;
}

// The softmax over positives whose gradient is to be taken from differences, or -1. Beside a repulsion of its own size
// the products lose nothing that counts; of too many pairs it would take too long.
template <class T>
int separate_softmax(const Contrast<T>& p, const BackwardRows& rows) {
  if (p.inner_product || !p.q_id) return -1;
  const int s = is_same(p.kind[0]) ? 0 : 1;
  if (s >= p.softmaxes || !is_same(p.kind[s])) return -1;
  if (p.softmaxes == 2 &&  // beside all keys, positives are measured like them (kernels/block.h)
      (!is_other(p.kind[1 - s]) || !(largest_gradient(p, rows, 1 - s) < 0.5 * largest_gradient(p, rows, s))))
    return -1;
  return s;
}

constexpr int64_t kSeparateAlways = int64_t(1) << 18;  // similarities of a small problem
constexpr int64_t kSimilaritiesPerPair = 4;            // of a large one

template <class T>
class PositiveGradients {
 public:
  PositiveGradients(const Contrast<T>& problem, const BackwardRows& rows, int softmax)
      : p_(problem), softmax_(softmax), q_(p_.q_id, p_.N), k_(p_.k_id, p_.M), rows_(size_t(p_.pairs * p_.N)) {
    const int64_t first = softmax * p_.pairs * p_.N;
    for (size_t i = 0; i < rows_.size(); i++) {
      const size_t at = size_t(first) + i;
      if (rows.state.sum[at] == 0) continue;
      const RowCoefficients c = row_coefficients(1 / rows.state.sum[at], rows.grad_value[at], rows.grad_lse[at],
                                                 p_.tau[softmax], rows.detach_weights);
      rows_[i] = {T(rows.state.top[at]), T(rows.state.delta[at]), T(c.a), T(c.b)};
    }
  }

  bool pays() const {
    const double similarities = double(p_.N) * double(p_.M);
    return similarities <= double(kSeparateAlways) ||
           double(kSimilaritiesPerPair) * double(equal_pairs(q_, k_)) <= similarities;
  }

  void add(const Engine<T>& e, const ContrastGradients<T>& out, int64_t n) const {
    PositivesParams<T> t{};
    t.problem = &p_, t.softmax = softmax_, t.rows = rows_.data(), t.q_rows = q_.rows(), t.k_rows = k_.rows();
    t.q_r = e.packed.q_r, t.k_r = e.packed.k_r, t.interrupt = e.parallel.interrupt;
    const bool together = out.dq && out.dq == out.dk && e.symmetric();
    if (out.dq) run(e, t, {true, together, out.dq, p_.N}, n);
    if (out.dk && !together) run(e, t, {false, true, out.dk, p_.M}, n);
  }

 private:
  struct Side {
    bool as_queries, as_keys;
    T* gradient;
    int64_t count;
  };

  void run(const Engine<T>& e, PositivesParams<T> t, const Side& side, int64_t n) const {
    t.as_queries = side.as_queries, t.as_keys = side.as_keys, t.gradient = side.gradient;
    parallel_for(e.parallel, n, [&](int64_t i) {
      PositivesParams<T> mine = t;
      mine.row0 = share(side.count, i, n), mine.row1 = share(side.count, i + 1, n);
      e.kernels.positives(mine);
    });
  }

  const Contrast<T>& p_;
  int softmax_;
  IdOrder q_, k_;
  std::vector<PositiveRow<T>> rows_;  // [pairs][N]
};

}  // namespace cacr
