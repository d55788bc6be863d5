// 2^x of csrc/cpu/kernels/vec.h against the C library in long double, over its range: the largest relative errors in
// units of eps, float32 and float64, and what the flushed one gives at the edges. Compiled by
// tests/cpu/test_cpu_kernels.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "../../csrc/cpu/kernels/vec.h"

using namespace cacr::CACR_ISA;

template <class T>
T in_range(T x) {
  return exp2_in_range(splat<T>(x))[0];
}

template <class T>
T flushed(T x) {
  return exp2_flushed<T>(splat<T>(x))[0];
}

template <class T>
double largest_error(T low, T high, int count) {
  double worst = 0;
  for (int i = 0; i <= count; i++) {
    const T x = T(low + (high - low) * (double(i) / count));
    const long double right = exp2l((long double)x);
    worst = std::max(worst, double(fabsl((long double)in_range(x) - right) / right));
  }
  return worst / std::numeric_limits<T>::epsilon();
}

int main() {
  const double wide32 = largest_error<float>(-126, 127, 400000), near32 = largest_error<float>(-2, 2, 400000);
  const double wide64 = largest_error<double>(-1022, 1023, 400000), near64 = largest_error<double>(-2, 2, 400000);
  std::printf("%.3f %.3f\n", std::max(wide32, near32), std::max(wide64, near64));
  std::printf("%g %g %g %g\n", flushed(-126.5f), flushed(-3e38f), flushed(-1022.5), flushed(0.0));
}
