// Prints what the launches of the CUDA kernels ask for, and how they cut the features up: a line for each arithmetic.
#include <cstdio>

#include "plan.cuh"

using namespace cacr;

template <class A>
void print(const char* name) {
  printf("%s %zu %d %d\n", name, kSharedBytes<A>, kChunk<typename A::Element>, A::kGradientChunks);
}

int main() {
  print<Bf16Arithmetic>("bf16");
  print<F16Arithmetic>("f16");
  print<Tf32Arithmetic<1>>("tf32");
  print<Tf32Arithmetic<2>>("tf32x3");
  print<IeeeArithmetic<float>>("float");
  print<IeeeArithmetic<double>>("double");
}
