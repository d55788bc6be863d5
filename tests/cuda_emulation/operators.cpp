// The operators of csrc/cuda for Python: a shared library with one C function, whose "device" memory is the host's.
#include "operators.cuh"

#include <cstdlib>
#include <string>
#include <vector>

namespace {

// Workspaces live until the call is over and have their exact sizes, so that the sanitizers see who leaves them.
struct Workspaces {
  std::vector<void*> all;
  ~Workspaces() {
    for (void* p : all) std::free(p);
  }
  static void* allocate(void* context, int64_t bytes) {
    void* p = std::aligned_alloc(256, size_t((bytes + 255) / 256 * 256));
    std::memset(p, 0xFF, size_t(bytes));  // NaN
    static_cast<Workspaces*>(context)->all.push_back(p);
    return p;
  }
};

std::string message;

template <class A>
void run(const cacr::Call& call) {
  Workspaces workspaces;
  cacr::run_call<A>(call, nullptr, {Workspaces::allocate, &workspaces});
}

}  // namespace

// Null, or what went wrong. arithmetic: bf16, f16, tf32, tf32x3, float, double.
extern "C" const char* cacr_emulate(int arithmetic, const cacr::Call* call, uint64_t seed, int resident_blocks,
                                    bool nearest) {
  using cuda_emulation::Sums;
  cuda_emulation::options.sums = nearest ? Sums::kNearest : Sums::kTruncated;
  cuda_emulation::options.seed = seed;
  cuda_emulation::options.resident_blocks = resident_blocks;
  using Run = void (*)(const cacr::Call&);
  constexpr Run kRuns[] = {run<cacr::Bf16Arithmetic>,        run<cacr::F16Arithmetic>,
                           run<cacr::Tf32Arithmetic<1>>,     run<cacr::Tf32Arithmetic<2>>,
                           run<cacr::IeeeArithmetic<float>>, run<cacr::IeeeArithmetic<double>>};
  try {
    kRuns[arithmetic](*call);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

extern "C" size_t cacr_call_bytes() { return sizeof(cacr::Call); }
