// One thread's share of a contrast problem: blocks of queries against all keys.
//
// The strip. A block of queries computes its similarities with every key once and keeps them (`rows` x M, transposed in
// panels of queries). When the last tile is in, the row statistics are complete and with them dL/dS: the block walks
// back over the strip, the tiles still in cache first, and accumulates both gradients. 3 U floating-point operations
// (U = 2 N M D), nothing recomputed but the exponentials, nothing of size N x M stored. Without gradients, and for the
// backward of statistics known already, one tile stands for the strip.
#pragma once

#include "pack.h"
#include "softmax.h"

namespace cacr::CACR_ISA {

constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

template <class T>
struct Scratch {
  T *S, *H;       // [tiles][rows/P][keys][P], one tile where nothing is kept; [rows/P][keys][P]
  T* q_columns;   // [rows/P][D][P]     queries transposed: operand of S
  T* q_panels;    // [Dp/P][rows][P]    queries by panels of features: operand of dK
  T* dq_panels;   // [Dp/P][rows][P]
  T* columns;     // [keys of the task][W]             sum_i H_ij, by lanes
  T* row_sum;     // [rows]             sum_j H_ij, added up
  T* known_sum;   // [rows]             the same, from the weights' sum of 1
  T* q_norm;      // [rows]
  T* turned;      // [rows][P]          symmetric: similarities of one panel of keys with the block
  T* moments;     // [softmaxes][keys of the task][W]  symmetric, where wanted: of the keys, by lanes
  int32_t* q_id;  // [rows]
  RowState<T> rows[kMaxSoftmaxes];

  static size_t layout(const Task<T>& t, char* base, Scratch& s) {
    const Contrast<T>& p = *t.problem;
    constexpr idx P = kPanel<T>;
    const idx R = t.blocking.rows, K = t.blocking.keys, Dp = (p.D + P - 1) / P * P;
    const bool strip = t.gradient == Gradient::kMeanCost || t.gradient == Gradient::kRbfUnscaled;
    const idx tiles = strip ? (t.key1 - t.key0 + K - 1) / K : 1;
    char* at = base;
    s.S = carve<T>(at, tiles * R * K);
    s.H = carve<T>(at, R * K);
    s.q_columns = carve<T>(at, R * p.D);
    s.q_panels = carve<T>(at, t.want_dk ? R * Dp : 0);
    s.dq_panels = carve<T>(at, t.want_dq ? R * Dp : 0);
    s.columns = carve<T>(at, t.want_dk ? (t.key1 - t.key0) * (P / 2) : 0);
    s.row_sum = carve<T>(at, R);
    s.known_sum = carve<T>(at, R);
    s.q_norm = carve<T>(at, R);
    s.turned = carve<T>(at, t.symmetric ? R * P : 0);
    s.moments = carve<T>(at, t.symmetric && t.want_moment ? p.softmaxes * (t.key1 - t.key0) * (P / 2) : 0);
    s.q_id = carve<int32_t>(at, R);
    for (RowState<T>& r : s.rows) {
      T* a = carve<T>(at, 9 * R);
      r = {a, a + R, a + 2 * R, a + 3 * R, a + 4 * R, a + 5 * R, a + 6 * R, a + 7 * R, a + 8 * R};
    }
    return size_t(at - base);
  }
};

template <class T>
struct Sweep {
  static constexpr idx P = kPanel<T>, W = Lanes<T>::W;
  const Task<T>& t;
  const Contrast<T>& p;
  Scratch<T> s;
  T slope[kMaxSoftmaxes];
  bool forward, backward, strip;
  bool diagonal;  // only keys on diagonals need a mask: members elsewhere are all keys
  // A softmax over positives: their entries of S are replaced by -c/2, c from differences where the product form
  // cancels. It then counts as one with |q|^2 = 0.
  bool positive[kMaxSoftmaxes], any_positive = false;
  idx Dp;

  // the block at hand
  idx pair, row0, rows, panels;  // rows: those that exist, panels * P >= rows

  explicit Sweep(const Task<T>& task) : t(task), p(*task.problem) {
    Scratch<T>::layout(t, static_cast<char*>(t.scratch), s);
    diagonal = p.period >= P;
    for (int i = 0; i < p.softmaxes; i++) {
      slope[i] = T(-2 * p.tau[i] * kLog2e);
      diagonal &= p.kind[i] == kOther || p.kind[i] == kAll;
      positive[i] = p.kind[i] == kSame || p.kind[i] == kSameNotSelf;
      any_positive |= positive[i];
    }
    for (int i = 0; i < p.softmaxes; i++) any_positive &= p.kind[i] != kAll;  // which reads the same entries
    for (int i = 0; i < p.softmaxes; i++) positive[i] &= any_positive;
    forward = t.gradient != Gradient::kGiven;
    backward = t.gradient != Gradient::kNone;
    strip = forward && backward;
    Dp = (p.D + P - 1) / P * P;
  }

  void run() {
    const idx per_pair = (p.N + P - 1) / P;
    for (idx at = t.unit0; at < t.unit1;) {
      pair = at / per_pair;
      const idx first = at - pair * per_pair, last = min_of(per_pair, first + t.unit1 - at), n = last - first;
      const idx blocks = (n * P + t.blocking.rows - 1) / t.blocking.rows;
      if (backward && t.want_dk) zero(s.columns, (t.key1 - t.key0) * W);
      for (idx b = 0; b < blocks; b++) {
        const idx lo = first + n * b / blocks, hi = first + n * (b + 1) / blocks;
        row0 = lo * P, panels = hi - lo, rows = min_of(p.N - row0, panels * P);
        block();
      }
      if (backward && t.want_dk && !p.inner) subtract_key_terms();
      at += n;
    }
  }

  void block() {
    pack_queries();
    const idx tiles = (t.key1 - t.key0 + t.blocking.keys - 1) / t.blocking.keys;
    if (forward) {
      start_rows();
      for (idx c = 0; c < tiles; c++) {
        compute_similarities(tile(c), tile_key(c), tile_keys(c));
        accumulate_statistics(tile(c), tile_key(c), tile_keys(c));
      }
      finish_rows();
    } else {
      given_rows();
    }
    if (!backward) return;
    if (t.want_dq) zero(s.dq_panels, panels * P * Dp);
    for (idx c = tiles - 1; c >= 0; c--) {
      if (!strip) compute_similarities(tile(c), tile_key(c), tile_keys(c));
      tile_gradients(tile(c), tile_key(c), tile_keys(c));
      if (t.want_dq) multiply_query_gradients(tile_key(c), tile_keys(c));
      if (t.want_dk) multiply_key_gradients(tile_key(c), tile_keys(c));
    }
    if (t.want_dq) add_query_gradients(cancelling() ? s.row_sum : s.known_sum);
    if (t.want_moment) write_variance();
  }

  // ---- tiles -------------------------------------------------------------------------------------------------------
  T* tile(idx c) const { return s.S + (strip ? c * t.blocking.keys * panels * P : 0); }
  idx tile_key(idx c) const { return t.key0 + c * t.blocking.keys; }
  idx tile_keys(idx c) const { return min_of(t.blocking.keys, t.key1 - tile_key(c)); }
  const T* key_row(idx j) const { return p.k + p.k_index[pair] * p.k_view_stride + j * p.k_row_stride; }

  // S: tiles of the panels, `blocking.keys` keys apart, of keys [j0, j0 + n)
  void compute_similarities(T* S, idx j0, idx n) {
    const T* bias = t.packed.k_bias + p.k_index[pair] * p.M + j0;
    for (idx i = 0; i < panels; i++)
      similarity<T>(n, p.D, key_row(j0), p.k_row_stride, s.q_columns + i * p.D * P, bias, S + i * t.blocking.keys * P);
    if (any_positive) replace_positives(S, j0, n);
  }

  void replace_positives(T* S, idx j0, idx n) {
    for (idx i = 0; i < panels; i++) {
      const Membership<T> same = Membership<T>::make({s.q_id + i * P, p.k_id + j0, row0 + i * P, j0}, kSame);
      IntVec<T> m0, m1;
      for (idx j = 0; j < n; j++) {
        same.masks(j, m0, m1);
        if (any_lane<T>(m0 | m1)) replace_positives_of(S + (i * t.blocking.keys + j) * P, i, j0 + j);
      }
    }
  }

  void replace_positives_of(T* u, idx i, idx j) {  // panel i, key j
    const T* q = p.q + p.q_index[pair] * p.q_view_stride + (row0 + i * P) * p.q_row_stride;
    const T bias = t.packed.k_bias[p.k_index[pair] * p.M + j];
    for (idx l = 0; l < min_of(P, rows - i * P); l++) {
      if (s.q_id[i * P + l] != p.k_id[j]) continue;
      const T norm = s.q_norm[i * P + l];
      T cost = norm - 2 * u[l];
      if (!p.inner && !(cost > (norm - 2 * bias) / 2)) cost = squared_distance(p.D, q + l * p.q_row_stride, key_row(j));
      u[l] = -cost / 2;
    }
  }

  double norm_of(int k, idx i) const { return positive[k] ? 0 : double(s.q_norm[i]); }

  // f(first key, count, masked) over the parts of keys [j0, j0 + n) that do and do not need a mask for the panel of
  // queries at `row`.
  template <class F>
  void for_parts(idx row, idx j0, idx n, F f) const {
    if (!p.q_id) return f(j0, n, false);
    if (!diagonal) return f(j0, n, true);
    const idx first = row % p.period, end = j0 + n;
    idx at = j0;
    for (idx m = (j0 - first - P + 1) / p.period - 1; at < end; m++) {  // diagonal m covers [lo, lo + P)
      const idx lo = m * p.period + first;
      if (lo + P <= at) continue;
      if (lo > at) f(at, min_of(lo, end) - at, false);
      at = max_of(at, min_of(lo, end));
      if (at < end) f(at, min_of(lo + P, end) - at, true);
      at = min_of(lo + P, end);
    }
  }
  TileIds<T> ids(idx i, idx j) const { return {s.q_id + i * P, p.k_id + j, row0 + i * P, j}; }

  // ---- forward -----------------------------------------------------------------------------------------------------
  void pack_queries() {
    const idx view = p.q_index[pair], Dn = p.D;
    const T* q = p.q + view * p.q_view_stride + row0 * p.q_row_stride;
    for (idx i = 0; i < panels; i++)
      transpose_panel(min_of(P, rows - i * P), Dn, q + i * P * p.q_row_stride, p.q_row_stride,
                      s.q_columns + i * Dn * P);
    if (backward && t.want_dk) pack_panels(q);
    load_norms();
    if (p.q_id)
      for (idx i = 0; i < panels * P; i++) s.q_id[i] = i < rows ? p.q_id[row0 + i] : -1;
  }

  void load_norms() {
    const T* norm = t.packed.q_norm + p.q_index[pair] * p.N + row0;
    for (idx i = 0; i < panels * P; i++) s.q_norm[i] = i < rows ? norm[i] : T(0);
  }

  void pack_panels(const T* q) {
    const idx R = panels * P;
    for (idx f = 0; f < Dp / P; f++)
      for (idx i = 0; i < R; i++) {
        T* out = s.q_panels + (f * R + i) * P;
        const idx n = i < rows ? min_of(P, p.D - f * P) : 0;
        const T* x = q + i * p.q_row_stride + f * P;
        for (idx l = 0; l < n; l++) out[l] = x[l];
        for (idx l = n; l < P; l++) out[l] = 0;
      }
  }

  void start_rows() {
    for (int k = 0; k < p.softmaxes; k++) start_rows(s.rows[k], panels * P);
  }
  static void start_rows(const RowState<T>& r, idx n) {
    zero(r.sum, n), zero(r.sum_u, n);
    for (idx i = 0; i < n; i++) r.top[i] = -kHuge<T>;
  }

  void accumulate_statistics(const T* S, idx j0, idx n) {
    for (idx i = 0; i < panels; i++)
      for_parts(row0 + i * P, j0, n, [&](idx j, idx count, bool masked) {
        const T* part = S + (i * t.blocking.keys + j - j0) * P;
        for (int k = 0; k < p.softmaxes; k++)
          pick_statistics(masked)(count, part, slope[k], s.rows[k].from(i * P), p.kind[k], ids(i, j));
      });
  }
  auto pick_statistics(bool masked) const {
    return t.bounded ? (masked ? add_statistics<T, true, true> : add_statistics<T, true, false>)
                     : (masked ? add_statistics<T, false, true> : add_statistics<T, false, false>);
  }

  void finish_rows() {
    for (idx i = 0; i < panels * P; i++) {
      double lse[kMaxSoftmaxes] = {}, factor[kMaxSoftmaxes] = {};
      for (int k = 0; k < p.softmaxes; k++) {
        RowState<T>& r = s.rows[k];
        const bool finite_tau = slope[k] - slope[k] == 0;  // NaN in 2^x comes out as 0: it shows in slope and in sum_u
        const bool empty = r.sum[i] == 0 && r.sum_u[i] == 0 && finite_tau;
        const double sum = r.sum[i], delta = empty ? 0 : double(r.sum_u[i]) / sum;
        const double top_cost = norm_of(k, i) - 2 * sign(k) * double(r.top[i]);
        double value = empty ? 0 : top_cost - 2 * delta;
        if (!empty && (sum == 0 || !finite_tau)) value = __builtin_nan("");
        lse[k] = empty ? -__builtin_inf() : kLn2 * __builtin_log2(sum) + p.tau[k] * top_cost;
        if (value != value) lse[k] = value;
        factor[k] = empty ? 0 : 1 / sum + 0 * value;
        r.delta[i] = T(delta);
        if (empty) r.top[i] = idle_top(k, i);
        if (i >= rows) continue;
        const idx at = (k * p.pairs + pair) * p.N + row0 + i;
        t.statistics.value[at] = value, t.statistics.lse[at] = lse[k];
        if (!t.statistics.top) continue;
        t.statistics.top[at] = double(r.top[i]), t.statistics.delta[at] = delta;
        t.statistics.sum[at] = empty ? 0 : sum + 0 * value;
      }
      if (strip) fused_coefficients(i, lse, factor);
    }
  }

  void fused_coefficients(idx i, const double* lse, const double* factor) {
    double g_value[kMaxSoftmaxes] = {0, 0}, g_lse[kMaxSoftmaxes] = {0, 0};
    if (i < rows && lse[0] != -__builtin_inf()) {
      if (t.gradient == Gradient::kMeanCost) {
        g_value[0] = t.scale;
      } else {
        const double f = t.scale * __builtin_exp(lse[1] - lse[0]);
        g_lse[0] = -f, g_lse[1] = f;
      }
    }
    set_coefficients(i, g_value, g_lse, factor, false);
  }

  double sign(int k) const { return slope[k] < 0 ? -1 : 1; }

  // For a row without weights: exponents in range, or flushed to 0.
  T idle_top(int k, idx i) const { return t.bounded ? T(sign(k) * norm_of(k, i) / 2) : kHuge<T>; }

  // ---- backward ----------------------------------------------------------------------------------------------------
  // dL/dc = w (g_value (1 + tau (c - F)) + g_lse tau), in terms of u: dc/du = -2, c - F = -2 (u - u_top - delta).
  // factor: w = factor e.
  // Where two softmaxes over one set nearly cancel (rbf), c_0 w_0 + c_1 w_1 = c_1 (w_1 - w_0) + (c_0 + c_1) w_0 keeps
  // what the two rounded coefficients would lose.
  void set_coefficients(idx i, const double* g_value, const double* g_lse, const double* factor, bool detach) {
    double sum = 0;
    for (int k = 0; k < p.softmaxes; k++) {
      const RowState<T>& r = s.rows[k];
      const double tau = detach ? 0 : p.tau[k], constant = -2 * (g_value[k] + (detach ? 0 : g_lse[k] * tau));
      r.a[i] = T(factor[k] * constant);
      r.b[i] = T(factor[k] * 4 * g_value[k] * tau);
      r.factor[i] = T(factor[k]), r.moment[i] = 0, r.ratio[i] = 0;
      sum += constant;
    }
    if (cancelling() && factor[1] != 0)
      s.rows[0].a[i] = T(factor[0] * sum), s.rows[1].ratio[i] = T(factor[0] / factor[1]);
    s.known_sum[i] = T(sum);
    s.row_sum[i] = 0;
  }

  void given_rows() {
    for (idx i = 0; i < panels * P; i++) {
      double g_value[kMaxSoftmaxes] = {0, 0}, g_lse[kMaxSoftmaxes] = {0, 0}, factor[kMaxSoftmaxes] = {0, 0};
      for (int k = 0; k < p.softmaxes; k++) {
        const idx at = (k * p.pairs + pair) * p.N + row0 + i;
        RowState<T>& r = s.rows[k];
        r.top[i] = idle_top(k, i), r.delta[i] = 0;
        if (i >= rows || t.rows.sum[at] == 0) continue;
        r.top[i] = T(t.rows.top[at]), r.delta[i] = T(t.rows.delta[at]);
        factor[k] = 1 / t.rows.sum[at];
        g_value[k] = t.rows.grad_value[at], g_lse[k] = t.rows.grad_lse[at];
      }
      set_coefficients(i, g_value, g_lse, factor, t.rows.detach_weights);
    }
  }

  void tile_gradients(const T* S, idx j0, idx n) {
    for (idx i = 0; i < panels; i++) {
      RowState<T> r[kMaxSoftmaxes];
      for (int k = 0; k < p.softmaxes; k++) r[k] = s.rows[k].from(i * P);
      for_parts(row0 + i * P, j0, n, [&](idx j, idx count, bool masked) {
        const idx at = (i * t.blocking.keys + j - j0) * P;
        auto f = p.softmaxes == 1 ? pick<1>(masked) : pick<2>(masked);
        T* columns = t.want_dk ? s.columns + (j - t.key0) * W : nullptr;
        f(count, S + at, s.H + at, slope, r, p.kind, ids(i, j), s.row_sum + i * P, columns);
      });
    }
  }
  template <int kSoftmaxes>
  auto pick(bool masked) const {
    return t.want_moment ? pick<kSoftmaxes, true>(masked) : pick<kSoftmaxes, false>(masked);
  }
  template <int kSoftmaxes, bool kMoment>
  auto pick(bool masked) const {
    return t.bounded ? (masked ? tile_gradient<T, kSoftmaxes, true, true, kMoment>
                               : tile_gradient<T, kSoftmaxes, true, false, kMoment>)
                     : (masked ? tile_gradient<T, kSoftmaxes, false, true, kMoment>
                               : tile_gradient<T, kSoftmaxes, false, false, kMoment>);
  }

  void write_variance() const {
    for (int k = 0; k < p.softmaxes; k++)
      for (idx i = 0; i < rows; i++)
        t.statistics.variance[(k * p.pairs + pair) * p.N + row0 + i] =
            4 * double(s.rows[k].factor[i]) * double(s.rows[k].moment[i]);
  }

  void multiply_query_gradients(idx j0, idx n) {
    const idx ldh = t.blocking.keys * P, R = panels * P;
    const T* K = t.packed.k_panels + p.k_index[pair] * p.M * Dp + j0 * P;
    for (idx f = 0; f < Dp / P; f++)
      for (idx i = 0; i < panels; i++)
        query_gradient_panel<T>(n, s.H + i * ldh, K + f * p.M * P, s.dq_panels + (f * R + i * P) * P);
  }

  void multiply_key_gradients(idx j0, idx n) {
    const idx ldh = t.blocking.keys * P, R = panels * P;
    T* out = view_of(t.dk, p.k_index[pair], p.M) + j0 * t.dk.row_stride;
    for (idx f = 0; f < Dp / P; f++)
      key_gradient_panel<T>(n, panels, s.H, ldh, s.q_panels + f * R * P, out + f * P, t.dk.row_stride);
  }

  T* view_of(const GradientSlice<T>& g, idx view, idx n) const {
    T* data = g.data + view * g.view_stride;
    if (!g.touched[view]) zero(data, n * g.row_stride), g.touched[view] = 1;
    return data;
  }

  // Two softmaxes over one set (rbf) nearly cancel: their sum must carry the rounding errors of H itself.
  bool cancelling() const { return p.softmaxes == 2 && p.kind[0] == p.kind[1]; }

  // sum: [rows], of H along the rows
  void add_query_gradients(const T* sum) {
    const idx view = p.q_index[pair], R = panels * P;
    T* out = view_of(t.dq, view, p.N) + row0 * t.dq.row_stride;
    const T* q = p.q + view * p.q_view_stride + row0 * p.q_row_stride;
    for (idx i = 0; i < rows; i++)
      for (idx f = 0; f < Dp / P; f++) {
        const T* g = s.dq_panels + (f * R + i) * P;
        const T *x = q + i * p.q_row_stride + f * P, h = p.inner ? T(0) : sum[i];
        T* o = out + i * t.dq.row_stride + f * P;
        const idx n = min_of(P, p.D - f * P);
        for (idx d = 0; d < n; d++) o[d] += g[d] - h * x[d];
      }
  }

  void subtract_key_terms() {  // dK_j -= (sum_i H_ij) k_j
    T* out = view_of(t.dk, p.k_index[pair], p.M);
    for (idx j = t.key0; j < t.key1; j++) {
      const T h = sum_lanes<T>(load(s.columns + (j - t.key0) * W)), *x = key_row(j);
      T* o = out + j * t.dk.row_stride;
      for (idx d = 0; d < p.D; d++) o[d] -= h * x[d];
    }
  }
};

}  // namespace cacr::CACR_ISA
