// Compares two builds of csrc/cpu/kernels/kernels.cpp (namespaces CANDIDATE and portable) over many shapes; prints the
// failures. Compiled by tests/cpu/test_cpu_kernels.py, for one with wide vectors lowered to the instructions at hand.
#include <cstdio>
#include <cstring>
#include <iterator>

#include "../../csrc/cpu/planner/amx.h"
#include "../../csrc/cpu/planner/self_check.h"

#ifndef FLOAT64_OF  // which a candidate for bfloat16 does not have
#define FLOAT64_OF CANDIDATE
#endif

namespace cacr {
#define DECLARE(isa)                           \
  namespace isa {                              \
  extern const Kernels<float> kernels_float;   \
  extern const Kernels<double> kernels_double; \
  }
DECLARE(CANDIDATE)
DECLARE(FLOAT64_OF)
DECLARE(portable)
template <>
const Kernels<float>& kernels<float>() {
  return CANDIDATE::kernels_float;
}
template <>
const Kernels<double>& kernels<double>() {
  return FLOAT64_OF::kernels_double;
}
}  // namespace cacr

// With an argument, fewer of the shapes: of "few" every size of each axis with some of the other's.
int main(int argc, char** argv) {
  constexpr int kRows[] = {1, 2, 5, 6, 13, 31, 37, 64, 101, 193, 300};
  constexpr int kFeatures[] = {1, 3, 8, 16, 17, 19, 32, 33, 64, 100, 128, 256};
  const size_t every = argc < 2 ? 1 : std::strcmp(argv[1], "few") == 0 ? 6 : 13;
  cacr::may_use_amx();  // the candidate may need it
  int failures = 0, checks = 0;
  for (size_t i = 0; i < std::size(kRows); i++)
    for (size_t j = 0; j < std::size(kFeatures); j++) {
      if ((i + j) % every != 0) continue;
      const int n = kRows[i], d = kFeatures[j];
      const bool f32 = cacr::self_check_passes(cacr::CANDIDATE::kernels_float, cacr::portable::kernels_float, n, d);
      const bool f64 = cacr::self_check_passes(cacr::FLOAT64_OF::kernels_double, cacr::portable::kernels_double, n, d);
      if (!f32 || !f64)
        std::printf("n=%d d=%d float32 %s float64 %s\n", n, d, f32 ? "ok" : "FAIL", f64 ? "ok" : "FAIL");
      failures += !f32 + !f64, checks += 2;
    }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
