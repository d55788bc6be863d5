// Queries and keys are the same rows: every similarity serves both, once per sweep.
//
// A block of rows meets the keys from its own first row on. The square on the diagonal is treated as any other tile;
// one right of it also serves its keys as queries: on the way forward it is turned, so that keys stand in the lanes,
// and added to their statistics; on the way back H_ij + H_ji multiplies both sides. Two sweeps of U/2 for the
// similarities and U for both gradients: 2 U in all, where the strip needs 3 U.
//
// Similarities have the same bits both times, u_ji derived from u_ij or not: at large temperatures and norms a weight
// that differs by the rounding of its exponent is not the one the row was normalised with.
#pragma once

#include "sweep.h"

namespace cacr::CACR_ISA {

// Views of the memory behind Task::row_states, [softmaxes][fields][row_count].
template <class T>
struct SymmetricRows {
  static constexpr int kForward = 3, kBackward = 9;

  static RowState<T> forward(T* base, int softmax, idx count) {
    T* x = base + idx(softmax) * kForward * count;
    return {x, x + count, x + 2 * count, x, x, x, x, x, x};  // the others are not used
  }
  static RowState<T> backward(T* base, int softmax, idx count) {
    T* x = base + idx(softmax) * kBackward * count;
    return {x,
            x + count,
            x + 2 * count,
            x + 3 * count,
            x + 4 * count,
            x + 5 * count,
            x + 6 * count,
            x + 7 * count,
            x + 8 * count};
  }
  static T* known_sum(T* base, int softmaxes, idx count) { return base + idx(softmaxes) * kBackward * count; }
};

template <class T>
struct SymmetricSweep : Sweep<T> {
  using Base = Sweep<T>;
  using Rows = SymmetricRows<T>;
  using Base::backward, Base::P, Base::p, Base::pair, Base::panels, Base::positive, Base::row0, Base::rows, Base::s,
      Base::slope, Base::t, Base::W;

  RowState<T> all[kMaxSoftmaxes];  // every row of every pair, `padded` rows a pair
  idx padded, count;

  explicit SymmetricSweep(const Task<T>& task) : Base(task) {
    padded = (p.N + P - 1) / P * P;
    count = p.pairs * padded;
    for (int k = 0; k < p.softmaxes; k++)
      all[k] = backward ? Rows::backward(t.row_states, k, count) : Rows::forward(t.row_states, k, count);
  }

  static idx states(const Task<T>& task) {
    const Contrast<T>& p = *task.problem;
    const idx count = p.pairs * ((p.N + P - 1) / P * P);
    return task.gradient == Gradient::kNone ? p.softmaxes * Rows::kForward * count
                                            : (p.softmaxes * Rows::kBackward + 1) * count;
  }

  // ---- the three phases --------------------------------------------------------------------------------------------
  void run() {
    if (!backward)
      for (int k = 0; k < p.softmaxes; k++) Base::start_rows(all[k], count);
    for_blocks([&](bool first_of_pair, bool last_of_pair) {
      if (backward && first_of_pair) zero(s.columns, p.N * W);
      if (t.want_moment && first_of_pair) zero(s.moments, p.softmaxes * p.N * W);
      block();
      if (backward && last_of_pair && !p.inner) Base::subtract_key_terms();
      if (t.want_moment && last_of_pair) add_moments();
    });
  }

  // Adds up what `partials` threads found about the rows and writes their statistics.
  void finish() {
    for_blocks([&](bool, bool) {
      select_rows();
      for (int k = 0; k < p.softmaxes; k++)
        for (idx x = 1; x < t.partials; x++)
          merge(k, s.rows[k], Rows::forward(t.partial_states[x], k, count).from(pair * padded + row0));
      Base::load_norms();
      Base::finish_rows();
    });
  }

  // Fills the coefficients of the rows for the way back.
  void prepare() {
    for_blocks([&](bool, bool) {
      select_rows();
      Base::load_norms();
      Base::given_rows();
    });
  }

  // ---- blocks ------------------------------------------------------------------------------------------------------
  template <class F>
  void for_blocks(F f) {
    const idx per_pair = padded / P, most = t.blocking.rows / P;
    for (idx at = t.unit0; at < t.unit1;) {
      pair = at / per_pair;
      const idx first = at - pair * per_pair, last = min_of(per_pair, first + t.unit1 - at);
      for (idx lo = first; lo < last; lo += most) {
        row0 = lo * P, panels = min_of(most, last - lo), rows = min_of(p.N - row0, panels * P);
        f(lo == first, lo + most >= last);
      }
      at += last - first;
    }
  }

  void select_rows() {  // s.rows: those of the block
    const idx at = pair * padded + row0;
    for (int k = 0; k < p.softmaxes; k++) {
      const RowState<T> own = s.rows[k];
      s.rows[k] = all[k].from(at);
      if (!backward) s.rows[k].delta = own.delta;  // of no use after the block
    }
    if (backward) s.known_sum = Rows::known_sum(t.row_states, p.softmaxes, count) + at;
  }

  void block() {
    Base::pack_queries();
    select_rows();
    if (backward) zero(s.dq_panels, panels * P * Base::Dp), zero(s.row_sum, panels * P);
    const idx square = min_of(panels * P, p.N - row0);
    meet(row0, square, true);
    for (idx j = row0 + square; j < p.N; j += t.blocking.keys) meet(j, min_of(t.blocking.keys, p.N - j), false);
    if (!backward) return;
    if (!Base::cancelling())
      for (idx i = 0; i < panels * P; i++) s.row_sum[i] += s.known_sum[i];
    Base::add_query_gradients(s.row_sum);
    if (t.want_moment) Base::write_variance();  // of what the rows met as queries so far
  }

  void meet(idx j0, idx n, bool on_diagonal) {  // keys [j0, j0 + n)
    Base::compute_similarities(s.S, j0, n);
    if (backward) {
      on_diagonal ? square_gradients(j0, n) : gradients(j0, n);
      Base::multiply_query_gradients(j0, n);
      Base::multiply_key_gradients(j0, n);
    } else {
      Base::accumulate_statistics(s.S, j0, n);
      for (idx j = 0; j < n && !on_diagonal; j += P) accumulate_keys(j0 + j, min_of<idx>(P, n - j), s.S + j * P);
    }
  }

  // ---- forward -----------------------------------------------------------------------------------------------------
  // Statistics of P rows from j on, of which n exist, as queries of the block's rows. S: their first entry.
  void accumulate_keys(idx j, idx n, const T* S) {
    int32_t id[P] = {};
    for (idx l = 0; p.q_id && l < n; l++) id[l] = p.q_id[j + l];
    for (int k = 0; k < p.softmaxes; k++) {
      if (k == 0 || positive[k] != positive[k - 1]) turn(j, n, S, !positive[k]);
      Base::for_parts(j, row0, rows, [&](idx i, idx m, bool masked) {
        Base::pick_statistics(masked)(m, s.turned + (i - row0) * P, slope[k], all[k].from(pair * padded + j), p.kind[k],
                                      {id, p.q_id ? p.q_id + i : nullptr, j, i});
      });
    }
  }

  // turned[i][l] = u_(j+l)i = u_i(j+l) + |k_(j+l)|^2/2 - |q_i|^2/2 (shift), a square of W x W at a time
  void turn(idx j, idx n, const T* S, bool shift) {
    T key_bias[P] = {};
    for (idx l = 0; shift && l < n; l++) key_bias[l] = bias(j + l);
    for (idx i = 0; i < panels; i++) {
      const T* in = S + i * t.blocking.keys * P;
      T *out = s.turned + i * P * P, own[P] = {};
      for (idx l = 0; shift && l < min_of<idx>(P, rows - i * P); l++) own[l] = bias(row0 + i * P + l);
      for (idx a = 0; a < P; a += W)
        for (idx b = 0; b < P; b += W) {
          Vec<T> r[W];
#pragma GCC unroll 16
          for (idx x = 0; x < W; x++) r[x] = a + x < n ? load(in + (a + x) * P + b) : Vec<T>{};
          transpose_lanes<T>(r);
          const Vec<T> other = load(key_bias + a);
#pragma GCC unroll 16
          for (idx x = 0; x < W; x++) store<T>(out + (b + x) * P + a, r[x] + (own[b + x] - other));
        }
    }
  }

  T bias(idx i) const { return t.packed.k_bias[p.k_index[pair] * p.M + i]; }  // -|k|^2/2

  void merge(int k, const RowState<T>& into, const RowState<T>& from) const {
    const T sign = slope[k] < 0 ? T(-1) : T(1);
    for (idx i = 0; i < panels * P; i += W) {
      const Vec<T> top0 = load(into.top + i), top1 = load(from.top + i), none = splat<T>(-kHuge<T>);
      const Vec<T> top = max_vec<T>(top0, top1);
      const Vec<T> moved0 = top0 > none ? top0 - top : Vec<T>{}, moved1 = top1 > none ? top1 - top : Vec<T>{};
      const Vec<T> scale0 = exp2_flushed<T>(sign * slope[k] * moved0),
                   scale1 = exp2_flushed<T>(sign * slope[k] * moved1);
      const Vec<T> sum0 = load(into.sum + i), sum1 = load(from.sum + i);
      store<T>(into.top + i, top), store<T>(into.sum + i, sum0 * scale0 + sum1 * scale1);
      store<T>(into.sum_u + i, load(into.sum_u + i) * scale0 + sum0 * scale0 * (sign * moved0) +
                                   load(from.sum_u + i) * scale1 + sum1 * scale1 * (sign * moved1));
    }
  }

  // ---- backward ----------------------------------------------------------------------------------------------------
  void square_gradients(idx j0, idx n) {
    T* const sums = s.row_sum;
    if (!Base::cancelling()) s.row_sum = s.turned;  // these are known
    Base::tile_gradients(s.S, j0, n);
    s.row_sum = sums;
  }

  // What the pair's rows and keys add to sum e (u - u_top - delta)^2, without the factor of the weights
  void add_moments() const {
    for (int k = 0; k < p.softmaxes; k++)
      for (idx j = 0; j < p.N; j++)
        t.key_moments[(k * p.pairs + pair) * p.N + j] += sum_lanes<T>(load(s.moments + (k * p.N + j) * W));
  }

  void gradients(idx j0, idx n) {
    bool shifted[kMaxSoftmaxes];
    for (int k = 0; k < p.softmaxes; k++) shifted[k] = !positive[k];
    for (idx i = 0; i < panels; i++) {
      RowState<T> r[kMaxSoftmaxes];
      T q_bias[P] = {};
      for (idx l = 0; l < min_of<idx>(P, rows - i * P); l++) q_bias[l] = bias(row0 + i * P + l);
      for (int k = 0; k < p.softmaxes; k++) r[k] = s.rows[k].from(i * P);
      Base::for_parts(row0 + i * P, j0, n, [&](idx j, idx m, bool masked) {
        const idx at = (i * t.blocking.keys + j - j0) * P;
        RowState<T> keys[kMaxSoftmaxes];
        for (int k = 0; k < p.softmaxes; k++) keys[k] = all[k].from(pair * padded + j);
        auto f = p.softmaxes == 1 ? pick_symmetric<1>(masked) : pick_symmetric<2>(masked);
        f(m, s.S + at, s.H + at, slope, r, keys, shifted, q_bias, t.packed.k_bias + p.k_index[pair] * p.M + j, p.kind,
          Base::ids(i, j), min_of<idx>(P, rows - i * P), Base::cancelling(), s.row_sum + i * P, s.columns + j * W,
          s.moments + j * W, p.N * W);
      });
    }
  }
  template <int kSoftmaxes>
  auto pick_symmetric(bool masked) const {
    return t.want_moment ? pick_symmetric<kSoftmaxes, true>(masked) : pick_symmetric<kSoftmaxes, false>(masked);
  }
  template <int kSoftmaxes, bool kMoment>
  auto pick_symmetric(bool masked) const {
    return t.bounded ? (masked ? tile_gradient_symmetric<T, kSoftmaxes, true, true, kMoment>
                               : tile_gradient_symmetric<T, kSoftmaxes, true, false, kMoment>)
                     : (masked ? tile_gradient_symmetric<T, kSoftmaxes, false, true, kMoment>
                               : tile_gradient_symmetric<T, kSoftmaxes, false, false, kMoment>);
  }
};

}  // namespace cacr::CACR_ISA
