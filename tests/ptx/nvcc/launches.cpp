// The host side of csrc/cuda, up to its launches: those are handed to Python, which interprets what nvcc compiled.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "operators.cuh"

namespace {

// Both are called with what they are about and return null, or a message if something went wrong.
using OnLaunch = int (*)(const void* job, size_t bytes, int blocks, int threads, bool cooperative);
using OnWorkspace = void (*)(void* memory, size_t bytes);

OnLaunch on_launch;
OnWorkspace on_workspace;

struct Workspaces {
  std::vector<void*> all;
  ~Workspaces() {
    for (void* p : all) std::free(p);
  }
  static void* allocate(void* context, int64_t bytes) {
    void* p = std::aligned_alloc(256, size_t((bytes + 255) / 256 * 256));
    std::memset(p, 0xFF, size_t(bytes));  // NaN
    static_cast<Workspaces*>(context)->all.push_back(p);
    on_workspace(p, size_t(bytes));
    return p;
  }
};

template <class A, class Plan>
cudaError_t hand_over(const Plan& plan, bool resident) {
  auto run = [&](int first, int last) {
    const cacr::JobOf<A> job{plan.p, first, last};
    return static_cast<cudaError_t>(on_launch(&job, sizeof job, plan.grid, cacr::kThreads, resident));
  };
  if (resident) return run(0, cacr::kPhases - 1);
  for (int phase = 0; phase < cacr::kPhases; phase++) {
    if (!plan.runs(phase)) continue;
    if (const cudaError_t error = run(phase, phase)) return error;
  }
  return cudaSuccess;
}

}  // namespace

#define ARITHMETIC(A)                                                                                           \
  template <>                                                                                                   \
  cudaError_t cacr::launch_plan<cacr::A>(const Plan<cacr::A::Element, cacr::A::Acc>& plan, bool resident,       \
                                         cudaStream_t) {                                                        \
    return hand_over<cacr::A>(plan, resident);                                                                  \
  }                                                                                                             \
  extern "C" int run_##A(const cacr::Call* call, OnLaunch launch, OnWorkspace workspace, int resident_blocks) { \
    cuda_emulation::options.resident_blocks = resident_blocks;                                                  \
    on_launch = launch, on_workspace = workspace;                                                               \
    Workspaces workspaces;                                                                                      \
    return cacr::run_call<cacr::A>(*call, nullptr, {Workspaces::allocate, &workspaces});                        \
  }

namespace cacr {
using Tf32 = Tf32Arithmetic<1>;
using Tf32x3 = Tf32Arithmetic<2>;
using Float = IeeeArithmetic<float>;
using Double = IeeeArithmetic<double>;
}  // namespace cacr

ARITHMETIC(Bf16Arithmetic)
ARITHMETIC(F16Arithmetic)
ARITHMETIC(Tf32)
ARITHMETIC(Tf32x3)
ARITHMETIC(Float)
ARITHMETIC(Double)
