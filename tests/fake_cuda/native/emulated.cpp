// The kernels of csrc/cuda in the emulation, launched on the streams of the fake CUDA. library.cpp calls it: the names
// of CUDA's own headers and those of the emulation do not go together.
#include <cstdio>

#include "operators.cuh"

extern "C" int fake_submit_work(void* stream, int device, std::function<std::string()>* work);
extern "C" const char* fake_complaint(int device, uintptr_t address, size_t bytes);
extern "C" int fake_on_device(uintptr_t address);
extern "C" int cacr_fake_current_device();

namespace {

// What is wrong with the addresses among the parameters of a launch.
std::string check_addresses(int device, const std::string& parameters) {
  for (size_t at = 0; at + sizeof(uintptr_t) <= parameters.size(); at += alignof(uintptr_t)) {
    uintptr_t address;
    std::memcpy(&address, parameters.data() + at, sizeof address);
    if (fake_on_device(address) < 0) continue;
    if (const char* wrong = fake_complaint(device, address, 0))
      return "a CUDA kernel is given " + std::string(wrong) + ", in byte " + std::to_string(at) + " of its parameters";
  }
  return "";
}

int launch_on_stream(void* stream, const void* parameters, size_t bytes, std::function<void()> kernel) {
  const int device = cacr_fake_current_device();
  const std::string kept(static_cast<const char*>(parameters), bytes);
  std::function<std::string()> work = [device, kept, kernel = std::move(kernel)]() -> std::string {
    if (std::string wrong = check_addresses(device, kept); !wrong.empty()) return wrong;
    try {
      kernel();
    } catch (const std::exception& error) {
      return std::string("a CUDA kernel: ") + error.what();
    }
    return "";
  };
  return fake_submit_work(stream, device, &work);
}

template <class A>
int run(const cacr::Call& call, void* stream, const cacr::Allocator& memory) {
  return int(cacr::run_call<A>(call, stream, memory));
}

}  // namespace

// arithmetic: bf16, f16, tf32, tf32x3, float, double.
extern "C" int cacr_emulate(int arithmetic, const cacr::Call* call, void* stream, const cacr::Allocator* memory) {
  cuda_emulation::submit = launch_on_stream;
  using Run = int (*)(const cacr::Call&, void*, const cacr::Allocator&);
  constexpr Run kRuns[] = {run<cacr::Bf16Arithmetic>,        run<cacr::F16Arithmetic>,
                           run<cacr::Tf32Arithmetic<1>>,     run<cacr::Tf32Arithmetic<2>>,
                           run<cacr::IeeeArithmetic<float>>, run<cacr::IeeeArithmetic<double>>};
  return kRuns[arithmetic](*call, stream, *memory);
}
