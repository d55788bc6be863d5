// Elementwise work of detached_keys.h on a tile: its top, and the weights of its keys.
#pragma once

#include "tiles.h"

namespace cacr::CACR_ISA {

// One tile's share of a panel's sums, and how its top has moved.
template <class T>
struct TileSums {
  static constexpr idx PW = kPanel<T>;
  alignas(64) T e[PW], ed[PW], edd[PW];
  alignas(64) T used[PW], used_d[PW];  // e and ed as they multiply keys: rounded in products of bfloat16
  alignas(64) T moved[PW], scale[PW];  // u_top before - now, and what it makes of older weights
  bool any_moved, in_range;            // in_range: no exponent of the tile leaves the range of 2^x
};

// Moves the top of a panel over keys [0, n) of a tile.
template <class T, bool kMasked>
CACR_NOINLINE void find_top(idx n, const T* S, T slope, T* top, TileSums<T>& out, const TileIds<T>& ids) {
  constexpr idx PW = kPanel<T>;
  Membership<T> member;
  if constexpr (kMasked) member = Membership<T>::make(ids, kOther);
  const T sign = slope < 0 ? T(-1) : T(1);
  const Panel<T> before = load_panel(top), none = splat_panel(-kHuge<T>);
  Panel<T> now = before, low = -none;
  for (idx j = 0; j < n; j++) {
    const Panel<T> z = sign * load_panel(S + PW * j);
    if constexpr (kMasked) {
      const PanelMask<T> mask = member.of_key(j);
      now = max_vec(now, choose(mask, z, none)), low = min_vec(low, choose(mask, z, -none));
    } else {
      now = max_vec(now, z), low = min_vec(low, z);
    }
  }
  store_panel(top, now);
  const MovedTop<T> m = move_top(slope, before, now);
  store_panel(out.moved, m.moved), store_panel(out.scale, m.scale);
  const Panel<T> least = sign * slope * (low - now);
  out.any_moved = false, out.in_range = true;
  for (const int h : {0, 1})
    for (int l = 0; l < Lanes<T>::W; l++) {
      out.any_moved |= m.moved.v[h][l] != 0;
      out.in_range &= least.v[h][l] >= kExp2Min<T>;
    }
}

// Replaces the tile by its weights e; ED[j][:] = e d, if given.
template <class T, bool kInRange, bool kMasked, bool kMoments>
CACR_NOINLINE void weigh_tile(idx n, T* S, T* ED, T slope, const T* top, TileSums<T>& out, const TileIds<T>& ids) {
  constexpr idx PW = kPanel<T>;
  Membership<T> member;
  if constexpr (kMasked) member = Membership<T>::make(ids, kOther);
  const T sign = slope < 0 ? T(-1) : T(1);
  const Panel<T> u_top = sign * load_panel(top);
  Panel<T> e{}, ed{}, edd{};
#pragma GCC unroll 2
  for (idx j = 0; j < n; j++) {
    Panel<T> d = load_panel(S + PW * j) - u_top;
    PanelMask<T> mask;
    if constexpr (kMasked) {  // before the exponential: that of others may be out of its range
      mask = member.of_key(j);
      d = select(mask, d);
    }
    Panel<T> w = exp2_panel<kInRange>(slope * d);
    if constexpr (kMasked) w = select(mask, w);
    store_panel(S + PW * j, w);
    e += w;
    const Panel<T> wd = w * d;
    ed += wd;
    if constexpr (kMoments) {
      edd += wd * d;
      store_panel(ED + PW * j, wd);
    }
  }
  store_panel(out.e, e), store_panel(out.ed, ed), store_panel(out.edd, edd);
}

}  // namespace cacr::CACR_ISA
