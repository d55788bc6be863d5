// Keys without a gradient: statistics and all that the gradient of a query is made of from one sweep over the keys.
//
// With weights e_j = 2^(slope (u_j - u_top)) measured from the top key so far (softmax.h), a row adds up
//
//   sum e,  sum e d,  sum e d^2,  sum e k_j,  sum e d k_j        d_j = u_j - u_top
//
// tile by tile, and all of them are rescaled when a tile moves the top. One panel of queries meets one tile of keys at
// a time: its similarities, weights and gradients stay in the first-level cache, and nothing of size rows x M exists.
// 2 U floating-point operations (U = 2 N M D), 3 U where the weights are differentiated.
#pragma once

#include "sweep.h"

namespace cacr::CACR_ISA {

// The sums of one panel of queries, contiguous. Sums over rows are float64: many tiles are added up.
template <class T>
struct FrozenState {
  static constexpr idx P = kPanel<T>;
  T* top;                        // [P] sign(slope) * u_top, -kHuge before any
  double *sum, *sum_d, *sum_dd;  // [P]
  T *mean, *spread;              // [Dp/P][P][P]: sum e k, sum e d k

  static size_t bytes(const FrozenTask<T>& t) {
    char *base = nullptr, *at = base;
    layout(t, at);
    return size_t(at - base);
  }
  static FrozenState layout(const FrozenTask<T>& t, char*& at) {
    const idx Dp = (t.problem->D + P - 1) / P * P;
    FrozenState s;
    s.top = carve<T>(at, P);
    s.sum = carve<double>(at, P), s.sum_d = carve<double>(at, P), s.sum_dd = carve<double>(at, P);
    s.mean = carve<T>(at, t.want_mean ? P * Dp : 0);
    s.spread = carve<T>(at, t.want_mean && t.want_moments ? P * Dp : 0);
    return s;
  }
};

// One tile's share of a panel's sums, and how its top has moved.
template <class T>
struct TileSums {
  static constexpr idx P = kPanel<T>;
  alignas(64) T e[P], ed[P], edd[P];
  alignas(64) T moved[P], scale[P];  // u_top before - now, and what it makes of older weights
  bool any_moved, in_range;          // in_range: no exponent of the tile leaves the range of 2^x
};

// Moves the top of a panel over keys [0, n) of a tile.
template <class T, bool kMasked>
CACR_NOINLINE void find_top(idx n, const T* S, T slope, T* top, TileSums<T>& out, const TileIds<T>& ids) {
  using V = Vec<T>;
  constexpr int W = Lanes<T>::W;
  Membership<T> member;
  if constexpr (kMasked) member = Membership<T>::make(ids, kOther);
  IntVec<T> m0, m1;
  const T sign = slope < 0 ? T(-1) : T(1);
  const V old0 = load(top), old1 = load(top + W), none = splat<T>(-kHuge<T>);
  V top0 = old0, top1 = old1, low0 = -none, low1 = -none;
  for (idx j = 0; j < n; j++) {
    V z0 = sign * load(S + 2 * W * j), z1 = sign * load(S + 2 * W * j + W), y0 = z0, y1 = z1;
    if constexpr (kMasked) {
      member.masks(j, m0, m1);
      z0 = m0 ? z0 : none, z1 = m1 ? z1 : none, y0 = m0 ? y0 : -none, y1 = m1 ? y1 : -none;
    }
    top0 = max_vec<T>(top0, z0), top1 = max_vec<T>(top1, z1);
    low0 = y0 < low0 ? y0 : low0, low1 = y1 < low1 ? y1 : low1;
  }
  store<T>(top, top0), store<T>(top + W, top1);
  const V moved0 = old0 > none ? old0 - top0 : V{}, moved1 = old1 > none ? old1 - top1 : V{};
  store<T>(out.moved, sign * moved0), store<T>(out.moved + W, sign * moved1);
  store<T>(out.scale, exp2_flushed<T>(sign * slope * moved0));
  store<T>(out.scale + W, exp2_flushed<T>(sign * slope * moved1));
  const V least0 = sign * slope * (low0 - top0), least1 = sign * slope * (low1 - top1);
  out.any_moved = false, out.in_range = true;
  for (idx l = 0; l < W; l++) {
    out.any_moved |= moved0[l] != 0 || moved1[l] != 0;
    out.in_range &= least0[l] >= kExp2Min<T> && least1[l] >= kExp2Min<T>;
  }
}

// Replaces the tile by its weights e; ED[j][:] = e d, if given.
template <class T, bool kInRange, bool kMasked, bool kMoments>
CACR_NOINLINE void weigh_tile(idx n, T* S, T* ED, T slope, const T* top, TileSums<T>& out, const TileIds<T>& ids) {
  using V = Vec<T>;
  constexpr int W = Lanes<T>::W;
  Membership<T> member;
  if constexpr (kMasked) member = Membership<T>::make(ids, kOther);
  IntVec<T> m0, m1;
  const T sign = slope < 0 ? T(-1) : T(1);
  const V u_top0 = sign * load(top), u_top1 = sign * load(top + W);
  V e0{}, e1{}, ed0{}, ed1{}, edd0{}, edd1{};
#pragma GCC unroll 2
  for (idx j = 0; j < n; j++) {
    V d0 = load(S + 2 * W * j) - u_top0, d1 = load(S + 2 * W * j + W) - u_top1, w0, w1;
    if constexpr (kMasked) {  // before the exponential: that of others may be out of its range
      member.masks(j, m0, m1);
      d0 = select<T>(m0, d0), d1 = select<T>(m1, d1);
    }
    if constexpr (kInRange)
      w0 = exp2_in_range(slope * d0), w1 = exp2_in_range(slope * d1);
    else
      w0 = exp2_flushed<T>(slope * d0), w1 = exp2_flushed<T>(slope * d1);
    if constexpr (kMasked) w0 = select<T>(m0, w0), w1 = select<T>(m1, w1);
    store<T>(S + 2 * W * j, w0), store<T>(S + 2 * W * j + W, w1);
    e0 += w0, e1 += w1;
    const V wd0 = w0 * d0, wd1 = w1 * d1;
    ed0 += wd0, ed1 += wd1;
    if constexpr (kMoments) {
      edd0 += wd0 * d0, edd1 += wd1 * d1;
      store<T>(ED + 2 * W * j, wd0), store<T>(ED + 2 * W * j + W, wd1);
    }
  }
  store<T>(out.e, e0), store<T>(out.e + W, e1), store<T>(out.ed, ed0), store<T>(out.ed + W, ed1);
  store<T>(out.edd, edd0), store<T>(out.edd + W, edd1);
}

template <class T>
struct FrozenPanel {
  idx pair, row0, rows;  // rows: those that exist
  int32_t low_id, high_id;
  T* columns;   // [D][P]
  int32_t* id;  // [P]
  FrozenState<T> state;
};

template <class T>
struct FrozenScratch {
  FrozenPanel<T>* panels;  // of the block at hand
  T *S, *ED;               // [keys][P]: similarities, then weights; weights times d
  T* bias;                 // [keys]
  T* k_panels;             // [Dp/P][keys][P]
  T* columns;              // [panels][D][P]
  int32_t* ids;            // [panels][P]
  char* states;            // [panels], where the keys are not shared out

  static size_t layout(const FrozenTask<T>& t, char* base, FrozenScratch& s) {
    constexpr idx P = kPanel<T>;
    const idx D = t.problem->D, Dp = (D + P - 1) / P * P, K = t.blocking.keys, n = t.blocking.rows / P;
    char* at = base;
    s.panels = carve<FrozenPanel<T>>(at, n);
    s.S = carve<T>(at, K * P), s.ED = carve<T>(at, t.want_moments ? K * P : 0);
    s.bias = carve<T>(at, K), s.k_panels = carve<T>(at, t.want_mean ? K * Dp : 0);
    s.columns = carve<T>(at, n * P * D), s.ids = carve<int32_t>(at, n * P);
    s.states = carve<char>(at, t.states ? 0 : n * idx(FrozenState<T>::bytes(t)));
    return size_t(at - base);
  }
};

template <class T>
struct Frozen {
  static constexpr idx P = kPanel<T>;
  const FrozenTask<T>& t;
  const Contrast<T>& p;
  FrozenScratch<T> s;
  const idx Dp, per_pair;  // panels of a pair
  const T slope;
  idx view;  // of the keys at hand

  explicit Frozen(const FrozenTask<T>& task)
      : t(task),
        p(*task.problem),
        Dp((p.D + P - 1) / P * P),
        per_pair((p.N + P - 1) / P),
        slope(T(-2 * p.tau[0] * kLog2e)) {
    FrozenScratch<T>::layout(t, static_cast<char*>(t.scratch), s);
  }

  void run() {
    const idx most = t.blocking.rows / P;
    for (idx at = t.unit0; at < t.unit1;) {  // pairs that share their keys share blocks
      view = p.k_index[at / per_pair];
      idx end = at;
      while (end < t.unit1 && p.k_index[end / per_pair] == view) end = min_of(t.unit1, (end / per_pair + 1) * per_pair);
      const idx n = end - at, blocks = (n + most - 1) / most;
      for (idx b = 0; b < blocks; b++) block(at + n * b / blocks, at + n * (b + 1) / blocks);
      at = end;
    }
  }

  // Adds up the parts of units [unit0, unit1).
  void merge() {
    for (idx unit = t.unit0; unit < t.unit1; unit++)
      finish(unit, t.states + unit * bytes(), t.units * bytes(), t.parts);
  }

 private:
  idx bytes() const { return idx(FrozenState<T>::bytes(t)); }
  const T* query_row(idx pair, idx i) const { return p.q + p.q_index[pair] * p.q_view_stride + i * p.q_row_stride; }

  void block(idx unit0, idx unit1) {
    const idx n = unit1 - unit0;
    for (idx i = 0; i < n; i++) start_panel(s.panels[i], i, unit0 + i);
    for (idx j0 = t.key0; j0 < t.key1; j0 += t.blocking.keys) {
      const idx keys = min_of(t.blocking.keys, t.key1 - j0);
      const T* k = p.k + view * p.k_view_stride + j0 * p.k_row_stride;
      pack<T>({k, p.k_row_stride, p.D, keys, 0, keys, p.inner ? T(0) : T(-0.5), s.bias,
               t.want_mean ? s.k_panels : nullptr});
      const idx ahead = min_of(t.blocking.keys, t.key1 - j0 - keys);
      for (idx i = 0; i < n; i++) {
        prefetch(k + keys * p.k_row_stride, ahead * i / n, ahead * (i + 1) / n);
        meet(s.panels[i], k, j0, keys);
      }
    }
    for (idx i = 0; i < n && !t.states; i++) finish(unit0 + i, s.states + i * bytes(), 0, 1);
  }

  void start_panel(FrozenPanel<T>& panel, idx i, idx unit) {
    panel.pair = unit / per_pair, panel.row0 = (unit - panel.pair * per_pair) * P;
    panel.rows = min_of(P, p.N - panel.row0);
    panel.columns = s.columns + i * p.D * P;
    transpose_panel(panel.rows, p.D, query_row(panel.pair, panel.row0), p.q_row_stride, panel.columns);
    panel.id = s.ids + i * P;
    for (idx l = 0; l < P && p.q_id; l++) {  // lanes without a query repeat the last one
      const int32_t id = panel.id[l] = p.q_id[panel.row0 + min_of(l, panel.rows - 1)];
      panel.low_id = l ? min_of(panel.low_id, id) : id, panel.high_id = l ? max_of(panel.high_id, id) : id;
    }
    char* at = t.states ? t.states + (t.part * t.units + unit) * bytes() : s.states + i * bytes();
    zero(at, bytes());
    panel.state = FrozenState<T>::layout(t, at);
    for (idx l = 0; l < P; l++) panel.state.top[l] = -kHuge<T>;
  }

  void prefetch(const T* k, idx from, idx to) const {  // rows of the next tile
    for (idx j = from; j < to; j++)
      for (idx d = 0; d < p.D; d += 64 / idx(sizeof(T))) __builtin_prefetch(k + j * p.k_row_stride + d, 0, 2);
  }

  // A mask is needed where a key may have the id of a query.
  bool needs_mask(const FrozenPanel<T>& panel, idx j0, idx n) const {
    if (!p.q_id) return false;
    int32_t found = 0;
    for (idx j = j0; j < j0 + n; j++) found |= (p.k_id[j] >= panel.low_id) & (p.k_id[j] <= panel.high_id);
    return found != 0;
  }

  // One panel of queries and one tile of keys.
  void meet(const FrozenPanel<T>& panel, const T* k, idx j0, idx n) {
    similarity<T>(n, p.D, k, p.k_row_stride, panel.columns, s.bias, s.S);
    const TileIds<T> ids{panel.id, p.k_id + (p.q_id ? j0 : 0), panel.row0, j0};
    TileSums<T> sums;
    const bool masked = needs_mask(panel, j0, n);
    (masked ? find_top<T, true> : find_top<T, false>)(n, s.S, slope, panel.state.top, sums, ids);
    auto f = t.want_moments ? pick<true>(masked, sums.in_range) : pick<false>(masked, sums.in_range);
    f(n, s.S, s.ED, slope, panel.state.top, sums, ids);
    add(panel.state, sums);
    for (idx f = 0; t.want_mean && f < Dp / P; f++) {
      query_gradient_panel<T>(n, s.S, s.k_panels + f * n * P, panel.state.mean + f * P * P);
      if (t.want_moments) query_gradient_panel<T>(n, s.ED, s.k_panels + f * n * P, panel.state.spread + f * P * P);
    }
  }
  template <bool kMoments>
  static auto pick(bool masked, bool in_range) {
    return in_range ? (masked ? weigh_tile<T, true, true, kMoments> : weigh_tile<T, true, false, kMoments>)
                    : (masked ? weigh_tile<T, false, true, kMoments> : weigh_tile<T, false, false, kMoments>);
  }

  // With m = old - new top, d = d_old + m for older keys: their sums move, and shrink.
  void add(const FrozenState<T>& state, const TileSums<T>& sums) const {
    if (sums.any_moved && t.want_mean) move_means(state, sums);
    for (idx l = 0; l < P; l++) {
      const double m = sums.moved[l], scale = sums.scale[l], e = state.sum[l], ed = state.sum_d[l];
      state.sum[l] = e * scale + double(sums.e[l]);
      state.sum_d[l] = (ed + m * e) * scale + double(sums.ed[l]);
      state.sum_dd[l] = (state.sum_dd[l] + m * (2 * ed + m * e)) * scale + double(sums.edd[l]);
    }
  }

  void move_means(const FrozenState<T>& state, const TileSums<T>& sums) const {
    for (idx f = 0; f < Dp; f += P)
      for (idx l = 0; l < P; l++) {
        T *mean = state.mean + (f + l) * P, *spread = state.spread + (f + l) * P;
        for (idx d = 0; t.want_moments && d < P; d++)
          spread[d] = spread[d] * sums.scale[l] + sums.moved[l] * (mean[d] * sums.scale[l]);
        for (idx d = 0; d < P; d++) mean[d] *= sums.scale[l];
      }
  }

  // ---- results -----------------------------------------------------------------------------------------------------
  struct Row {
    double sum, sum_d, sum_dd, value, lse, factor, delta;  // w = factor e, delta = sum w d
  };

  // From the states of all parts, `stride` bytes apart, in their order.
  void finish(idx unit, char* first, idx stride, idx parts) const {
    const idx pair = unit / per_pair, row0 = (unit - pair * per_pair) * P;
    for (idx l = 0; l < min_of(P, p.N - row0); l++) {
      T top = -kHuge<T>;
      for (idx i = 0; i < parts; i++) top = max_of(top, state_at(first + i * stride).top[l]);
      const Row row = finish_row(l, top, query_row(pair, row0 + l), first, stride, parts);
      const idx at = pair * p.N + row0 + l;
      t.out.value[at] = row.value, t.out.lse[at] = row.lse;
      if (t.want_moments) t.out.variance[at] = 4 * (row.factor * row.sum_dd - row.delta * row.delta);
      if (t.want_mean) finish_means(l, top, row, first, stride, parts, at * p.D);
    }
  }
  FrozenState<T> state_at(char* at) const { return FrozenState<T>::layout(t, at); }

  // Of one part: its top minus the common one in u, and the factor of its weights.
  void shift(const FrozenState<T>& part, idx l, T top, double& m, double& scale) const {
    const double sign = slope < 0 ? -1 : 1, z = part.top[l] > -kHuge<T> ? double(part.top[l]) - double(top) : 0;
    m = sign * z, scale = z == 0 ? 1 : __builtin_exp2(double(slope) * m);
  }

  Row finish_row(idx l, T top, const T* q, char* first, idx stride, idx parts) const {
    Row r{};
    for (idx i = 0; i < parts; i++) {
      const FrozenState<T> part = state_at(first + i * stride);
      double m, scale;
      shift(part, l, top, m, scale);
      const double e = part.sum[l], ed = part.sum_d[l];
      r.sum += scale * e, r.sum_d += scale * (ed + m * e);
      r.sum_dd += scale * (part.sum_dd[l] + m * (2 * ed + m * e));
    }
    const double tau = p.tau[0], sign = slope < 0 ? -1 : 1;
    const bool finite_tau = slope - slope == 0;  // NaN in 2^x comes out as 0: it shows in slope and in sum_d
    if (r.sum == 0 && r.sum_d == 0 && finite_tau) {
      r.lse = -__builtin_inf();
      return r;
    }
    const double top_cost = (p.inner ? 0 : double(dot(p.D, q))) - 2 * sign * double(top);
    r.delta = r.sum_d / r.sum;
    r.value = r.sum == 0 || !finite_tau ? __builtin_nan("") : top_cost - 2 * r.delta;
    r.lse = r.value == r.value ? kLn2 * __builtin_log2(r.sum) + tau * top_cost : r.value;
    r.factor = 1 / r.sum + 0 * r.value;
    return r;
  }

  void finish_means(idx l, T top, const Row& row, char* first, idx stride, idx parts, idx at) const {
    for (idx f = 0; f < Dp; f += P) {
      double mean[P] = {}, spread[P] = {};
      for (idx i = 0; i < parts; i++) {
        const FrozenState<T> part = state_at(first + i * stride);
        double m, scale;
        shift(part, l, top, m, scale);
        const T *a = part.mean + (f + l) * P, *b = part.spread + (f + l) * P;
        for (idx d = 0; d < P; d++) mean[d] += scale * double(a[d]);
        for (idx d = 0; t.want_moments && d < P; d++) spread[d] += scale * (double(b[d]) + m * double(a[d]));
      }
      for (idx d = 0; d < min_of(P, p.D - f); d++) {
        const double g = row.factor * mean[d];
        t.out.mean[at + f + d] = T(g);
        if (t.want_moments) t.out.spread[at + f + d] = T(-2 * (row.factor * spread[d] - row.delta * g));
      }
    }
  }
};

}  // namespace cacr::CACR_ISA
