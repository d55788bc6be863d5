// Vectors of float or double for one instruction set, on GCC/Clang vector extensions; and panels, two of them.
//
// The including source is compiled once per instruction set with CACR_ISA (a name) and CACR_VECTOR_BYTES set; all code
// lives in namespace cacr::CACR_ISA, so that no function compiled for a newer processor can be linked in place of one
// for an older. For the same reason nothing here instantiates templates of the standard library.
#pragma once

#include <cstdint>
#if defined(__FMA__)
#include <immintrin.h>
#endif

#if !defined(CACR_ISA) || !defined(CACR_VECTOR_BYTES)
#error "compile with -DCACR_ISA=<name> -DCACR_VECTOR_BYTES=<16|32|64>"
#endif

#define CACR_INLINE static inline __attribute__((always_inline))
#define CACR_NOINLINE __attribute__((noinline))

namespace cacr::CACR_ISA {

using idx = int64_t;

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int W = CACR_VECTOR_BYTES / 4;
  typedef float V __attribute__((vector_size(CACR_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(CACR_VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(CACR_VECTOR_BYTES)));
  typedef float U __attribute__((vector_size(CACR_VECTOR_BYTES), aligned(4), may_alias));
  using Int = int32_t;
};

template <>
struct Lanes<double> {
  static constexpr int W = CACR_VECTOR_BYTES / 8;
  typedef double V __attribute__((vector_size(CACR_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(CACR_VECTOR_BYTES)));
  typedef uint64_t Bits __attribute__((vector_size(CACR_VECTOR_BYTES)));
  typedef double U __attribute__((vector_size(CACR_VECTOR_BYTES), aligned(8), may_alias));
  using Int = int64_t;
};

template <class T>
using Vec = typename Lanes<T>::V;
template <class T>
using IntVec = typename Lanes<T>::I;

// A panel is two vectors wide: queries of a similarity tile, or features of a gradient tile, stand side by side in it.
template <class T>
inline constexpr idx kPanel = 2 * Lanes<T>::W;

// n rounded up to whole panels.
template <class T>
CACR_INLINE idx padded(idx n) {
  return (n + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
}

// Rows of a register tile: two accumulators each, beside two operands and one broadcast.
#if CACR_VECTOR_BYTES == 64
inline constexpr int kTileRows = 14;
#else
inline constexpr int kTileRows = 6;
#endif

template <class T>
CACR_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::U*>(p);
}
template <class T>
CACR_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Lanes<T>::U*>(p) = v;
}
template <class T>
CACR_INLINE Vec<T> splat(T x) {
  return Vec<T>{} + x;
}
template <class T>
CACR_INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
CACR_INLINE T max_of(T a, T b) {
  return a > b ? a : b;
}
// NaN in `b` is dropped, NaN in `a` stays.
template <class T>
CACR_INLINE Vec<T> max_vec(Vec<T> a, Vec<T> b) {
  return b > a ? b : a;
}
template <class T>
CACR_INLINE Vec<T> select(IntVec<T> mask, Vec<T> a) {  // a where the mask is set, else 0
  return reinterpret_cast<Vec<T>>(reinterpret_cast<IntVec<T>>(a) & mask);
}
template <class T>
CACR_INLINE bool any_lane(IntVec<T> mask) {
  typedef int64_t Words __attribute__((vector_size(CACR_VECTOR_BYTES)));
  const Words words = reinterpret_cast<Words>(mask);
  int64_t any = 0;
  for (int i = 0; i < CACR_VECTOR_BYTES / 8; i++) any |= words[i];
  return any != 0;
}
template <class T>
CACR_INLINE T sum_lanes(Vec<T> v) {  // in a fixed order
  T s[Lanes<T>::W];
  store<T>(s, v);
  for (int n = Lanes<T>::W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) s[i] += s[i + n];
  return s[0];
}

// a b + c, rounded once. Where the processor has no such instruction, by the library of C.
CACR_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
CACR_INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
#if defined(__AVX512F__) && CACR_VECTOR_BYTES == 64
CACR_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
CACR_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__FMA__) && CACR_VECTOR_BYTES == 32
CACR_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
CACR_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fmadd_pd(a, b, c); }
#else
template <class V>
CACR_INLINE V fused(V a, V b, V c) {
  for (idx l = 0; l < idx(sizeof(V) / sizeof(a[0])); l++) c[l] = fused(a[l], b[l], c[l]);
  return c;
}
#endif

// ---- panels ---------------------------------------------------------------------------------------------------------
template <class T>
struct Panel {
  Vec<T> v[2];
};
template <class T>
struct PanelMask {
  IntVec<T> v[2];
};

template <class T>
CACR_INLINE Panel<T> load_panel(const T* p) {
  return {{load(p), load(p + Lanes<T>::W)}};
}
template <class T>
CACR_INLINE void store_panel(T* p, Panel<T> x) {
  store<T>(p, x.v[0]), store<T>(p + Lanes<T>::W, x.v[1]);
}
template <class T>
CACR_INLINE Panel<T> splat_panel(T x) {
  return {{splat<T>(x), splat<T>(x)}};
}

// The compiler evaluates the operands of these in any order, and fuses the product that it meets first with a sum: in a
// sum of two products the first one is named.
#define CACR_PANEL_OPERATOR(op)                              \
  template <class T>                                         \
  CACR_INLINE Panel<T> operator op(Panel<T> a, Panel<T> b) { \
    return {{a.v[0] op b.v[0], a.v[1] op b.v[1]}};           \
  }                                                          \
  template <class T>                                         \
  CACR_INLINE Panel<T> operator op(T a, Panel<T> b) {        \
    return {{a op b.v[0], a op b.v[1]}};                     \
  }                                                          \
  template <class T>                                         \
  CACR_INLINE Panel<T> operator op(Panel<T> a, T b) {        \
    return {{a.v[0] op b, a.v[1] op b}};                     \
  }
CACR_PANEL_OPERATOR(+)
CACR_PANEL_OPERATOR(-)
CACR_PANEL_OPERATOR(*)
#undef CACR_PANEL_OPERATOR

template <class T>
CACR_INLINE Panel<T> operator-(Panel<T> a) {
  return {{-a.v[0], -a.v[1]}};
}
template <class T>
CACR_INLINE Panel<T>& operator+=(Panel<T>& a, Panel<T> b) {
  return a = a + b;
}
template <class T>
CACR_INLINE Panel<T>& operator-=(Panel<T>& a, Panel<T> b) {
  return a = a - b;
}
template <class T>
CACR_INLINE PanelMask<T> operator>(Panel<T> a, Panel<T> b) {
  return {{a.v[0] > b.v[0], a.v[1] > b.v[1]}};
}
// NaN in `b` is dropped, NaN in `a` stays.
template <class T>
CACR_INLINE Panel<T> max_vec(Panel<T> a, Panel<T> b) {
  return {{max_vec<T>(a.v[0], b.v[0]), max_vec<T>(a.v[1], b.v[1])}};
}
template <class T>
CACR_INLINE Panel<T> min_vec(Panel<T> a, Panel<T> b) {
  return {{b.v[0] < a.v[0] ? b.v[0] : a.v[0], b.v[1] < a.v[1] ? b.v[1] : a.v[1]}};
}
template <class T>
CACR_INLINE Panel<T> choose(PanelMask<T> mask, Panel<T> a, Panel<T> b) {  // a where the mask is set, else b
  return {{mask.v[0] ? a.v[0] : b.v[0], mask.v[1] ? a.v[1] : b.v[1]}};
}
template <class T>
CACR_INLINE Panel<T> select(PanelMask<T> mask, Panel<T> a) {  // a where the mask is set, else 0
  return {{select<T>(mask.v[0], a.v[0]), select<T>(mask.v[1], a.v[1])}};
}
template <class T>
CACR_INLINE PanelMask<T> without(PanelMask<T> mask, PanelMask<T> others) {
  return {{mask.v[0] & ~others.v[0], mask.v[1] & ~others.v[1]}};
}
template <class T>
CACR_INLINE bool any_lane(PanelMask<T> mask) {
  return any_lane<T>(mask.v[0] | mask.v[1]);
}

// r[i][l] <-> r[l][i]: a square of W x W in registers, whose off-diagonal blocks of kBlock x kBlock are exchanged, and
// so on for the next power of two. (A template: the shuffles need constants.)
template <class T, int kBlock = 1>
CACR_INLINE void transpose_lanes(Vec<T> (&r)[Lanes<T>::W]) {
  constexpr int W = Lanes<T>::W;
  if constexpr (kBlock < W) {
    IntVec<T> low{}, high{};
#pragma GCC unroll 16
    for (int l = 0; l < W; l++) {
      low[l] = l & kBlock ? W + l - kBlock : l;
      high[l] = l & kBlock ? W + l : l + kBlock;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
      if (i & kBlock) continue;
      const Vec<T> a = r[i], b = r[i + kBlock];
#if defined(__clang__)
      for (int l = 0; l < W; l++) {
        r[i][l] = l & kBlock ? b[l - kBlock] : a[l];
        r[i + kBlock][l] = l & kBlock ? b[l] : a[l + kBlock];
      }
#else
      r[i] = __builtin_shuffle(a, b, low), r[i + kBlock] = __builtin_shuffle(a, b, high);
#endif
    }
    transpose_lanes<T, 2 * kBlock>(r);
  }
}

// 2^x for x in [-126, 127] (float, relative error < 1e-7 = 0.9 eps) or [-1022, 1023] (double, < 3e-16 = 1.4 eps).
// Polynomials: minimax of the relative error on [-1/2, 1/2] (Remez exchange, degree 6 and 11).
CACR_INLINE Vec<float> exp2_in_range(Vec<float> x) {
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  Vec<float> r = x + magic;
  Vec<float> f = x - (r - magic);
  Vec<float> p = 1.5345827381500010473e-4f * f + 1.3399930789647324068e-3f;
  p = p * f + 9.6184888978529993091e-3f;
  p = p * f + 5.5503287785143436811e-2f;
  p = p * f + 2.4022646891194166815e-1f;
  p = p * f + 6.9314720573633318805e-1f;
  p = p * f + 1.0000000005541032446f;
  using Bits = Lanes<float>::Bits;  // unsigned: of a key that is masked later the exponent may overflow
  return reinterpret_cast<Vec<float>>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(r) << 23));
}
CACR_INLINE Vec<double> exp2_in_range(Vec<double> x) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  Vec<double> r = x + magic;
  Vec<double> f = x - (r - magic);
  Vec<double> p = 4.4352866745874167032e-10 * f + 7.0741052512368323548e-9;
  p = p * f + 1.0178197993382467131e-7;
  p = p * f + 1.3215433091851149785e-6;
  p = p * f + 1.5252733490062370866e-5;
  p = p * f + 1.5403530462509966101e-4;
  p = p * f + 1.333355814678983701e-3;
  p = p * f + 9.6181291075883388805e-3;
  p = p * f + 5.5504108664819921999e-2;
  p = p * f + 2.4022650695910156194e-1;
  p = p * f + 6.9314718055994533045e-1;
  p = p * f + 0.9999999999999999971;
  using Bits = Lanes<double>::Bits;  // unsigned: of a key that is masked later the exponent may overflow
  return reinterpret_cast<Vec<double>>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(r) << 52));
}

template <class T>
inline constexpr T kHuge = sizeof(T) == 4 ? T(3e38) : T(1e308);

template <class T>
inline constexpr T kExp2Min = sizeof(T) == 4 ? T(-126) : T(-1022);

// 2^x for any x <= 0: below the range it is exactly 0. NaN may come out as any number: callers keep the NaN elsewhere.
template <class T>
CACR_INLINE Vec<T> exp2_flushed(Vec<T> x) {
  IntVec<T> in_range = x >= kExp2Min<T>;
  return select<T>(in_range, exp2_in_range(max_vec<T>(splat<T>(kExp2Min<T>), x)));
}

// The weights of a softmax: 2^x, where kBounded says that no x leaves the range.
template <bool kBounded, class T>
CACR_INLINE Panel<T> exp2_panel(Panel<T> x) {
  if constexpr (kBounded)
    return {{exp2_in_range(x.v[0]), exp2_in_range(x.v[1])}};
  else
    return {{exp2_flushed<T>(x.v[0]), exp2_flushed<T>(x.v[1])}};
}

// ---- choice of an instance -----------------------------------------------------------------------------------------
// The runtime flags as constants that choose among instances of a template: f(Flag<...>{}, ...).
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};
template <class F>
auto with_flags(F f) {
  return f();
}
template <class F, class... Rest>
auto with_flags(F f, bool first, Rest... rest) {
  return first ? with_flags([&](auto... flags) { return f(Flag<true>{}, flags...); }, rest...)
               : with_flags([&](auto... flags) { return f(Flag<false>{}, flags...); }, rest...);
}

}  // namespace cacr::CACR_ISA
