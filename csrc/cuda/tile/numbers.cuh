// The types of elements, and sums of many terms.
#pragma once

#include "../ptx.cuh"

namespace cacr {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

CACR_DEVICE float widen(bf16 x) { return ptx::bf16_to_float(x.bits); }
CACR_DEVICE float widen(f16 x) { return ptx::f16_to_float(x.bits); }
CACR_DEVICE float widen(float x) { return x; }
CACR_DEVICE double widen(double x) { return x; }

CACR_DEVICE float exp2_of(float x) { return ptx::exp2_approx(x); }
CACR_DEVICE double exp2_of(double x) { return exp2(x); }

// x y + z, rounded once.
CACR_DEVICE float fused(float x, float y, float z) { return __fmaf_rn(x, y, z); }
CACR_DEVICE double fused(double x, double y, double z) { return fma(x, y, z); }

// A compensated sum: `low` adds up what rounding has taken from `high` (Knuth's two-sum).
template <class Acc>
struct Sum {
  Acc high, low;

  CACR_DEVICE void add(Acc x) {
    const Acc total = high + x, part = total - high;
    low += (high - (total - part)) + (x - part);
    high = total;
  }
  CACR_DEVICE void add(const Sum& x) { add(x.high), low += x.low; }
  CACR_DEVICE void scale(Acc factor) { high *= factor, low *= factor; }
  CACR_DEVICE Acc rounded() const {
    const Acc sum = high + low;
    return sum == sum ? sum : high;
  }
  CACR_DEVICE double value() const {
    const double sum = double(high) + double(low);
    return sum == sum ? sum : double(high);  // with an infinite `high`, `low` is not a number
  }
};

// An ordinary sum with the same interface.
template <class Acc>
struct PlainSum {
  Acc high;

  CACR_DEVICE void add(Acc x) { high += x; }
  CACR_DEVICE void add(const PlainSum& x) { high += x.high; }
  CACR_DEVICE Acc rounded() const { return high; }
  CACR_DEVICE double value() const { return high; }
};

template <class Total, class Acc>
CACR_DEVICE void add(Total (&to)[4], const Acc (&x)[4]) {
#pragma unroll
  for (int e = 0; e < 4; e++) to[e].add(x[e]);
}
CACR_DEVICE void add(float (&to)[4], const float (&x)[4]) {
#pragma unroll
  for (int e = 0; e < 4; e++) to[e] += x[e];
}

}  // namespace cacr
