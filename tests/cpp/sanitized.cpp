// A part of check_kernels.cpp that is quick under the sanitizers.
#define main check_every_shape
#include "check_kernels.cpp"
#undef main

int main() {
  using namespace cacr;
  int failures = 0;
  for (int n : {1, 5, 37})
    for (int d : {1, 17, 64})
      failures += !self_check_passes(CANDIDATE::kernels_float, portable::kernels_float, n, d) +
                  !self_check_passes(CANDIDATE::kernels_double, portable::kernels_double, n, d);
  for (int n : {193, 200})  // more than one block of rows: the symmetric sweeps have tiles off the diagonal
    failures += !self_check_passes(CANDIDATE::kernels_float, portable::kernels_float, n, 17);
  std::printf("20 checks, %d failures\n", failures);
  return failures != 0;
}
