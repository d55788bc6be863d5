// The operators of csrc/cuda for Python: a shared library with one C function, whose "device" memory is the host's.
#include "operators.cuh"

#include <cstdlib>
#include <string>
#include <vector>

namespace {

// A workspace lives until the next one is asked for or the call is over.
struct Workspace {
  void* memory = nullptr;
  ~Workspace() { std::free(memory); }
  static void* allocate(void* context, int64_t bytes) {
    void*& memory = static_cast<Workspace*>(context)->memory;
    std::free(memory);
    memory = std::aligned_alloc(256, size_t((bytes + 255) / 256 * 256));
    std::memset(memory, 0xFF, size_t(bytes));  // NaN
    return memory;
  }
};

std::string message;

template <class A>
void run(const cacr::Call& call) {
  Workspace workspace;
  if (cacr::run_call<A>(call, nullptr, {Workspace::allocate, &workspace}))
    throw cuda_emulation::Error("a launch was refused");
}

}  // namespace

// Null, or what went wrong. arithmetic: bf16, f16, tf32, tf32x3, float, double.
extern "C" const char* cacr_emulate(int arithmetic, const cacr::Call* call, uint64_t seed, int resident_blocks,
                                    int room, bool nearest) {
  using cuda_emulation::Sums;
  cuda_emulation::options.sums = nearest ? Sums::kNearest : Sums::kTruncated;
  cuda_emulation::options.seed = seed;
  cuda_emulation::options.resident_blocks = resident_blocks;
  cuda_emulation::options.room = room;
  using Run = void (*)(const cacr::Call&);
  constexpr Run kRuns[] = {nullptr,        nullptr,
                           nullptr,     nullptr,
                           nullptr, run<cacr::IeeeArithmetic<double>>};
  try {
    kRuns[arithmetic](*call);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

// Features of a row whose gradient one block adds up.
extern "C" int cacr_owned_features(int arithmetic) {
  constexpr auto owned = []<class A>() { return A::kGradientChunks * cacr::kChunk<typename A::Element>; };
  using namespace cacr;
  constexpr int kOwned[] = {
      owned.template operator()<Bf16Arithmetic>(),        owned.template operator()<F16Arithmetic>(),
      owned.template operator()<Tf32Arithmetic<1>>(),     owned.template operator()<Tf32Arithmetic<2>>(),
      owned.template operator()<IeeeArithmetic<float>>(), owned.template operator()<IeeeArithmetic<double>>()};
  return kOwned[arithmetic];
}

extern "C" size_t cacr_call_bytes() { return sizeof(cacr::Call); }
