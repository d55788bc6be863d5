// The kernels of primitives.cuh for test_primitives.py.
#include "primitives.cuh"

#include <cstdio>
#include <cstring>

namespace {

struct Entry {
  const char* name;
  void (*kernel)(primitives::Words);
};
#define ENTRY(name) {#name, primitives::name}
constexpr Entry kEntries[] = {
    ENTRY(ldmatrix_x4), ENTRY(ldmatrix_x4_trans), ENTRY(mma_bf16),   ENTRY(mma_f16),
    ENTRY(mma_tf32),    ENTRY(cp_async_16),       ENTRY(arithmetic), ENTRY(shuffles),
};

}  // namespace

// Runs kernel `name` with one warp; what went wrong is left in `message`, which is empty otherwise.
extern "C" void run(const char* name, const uint32_t* in, uint32_t* out, uint64_t seed, bool nearest, char* message,
                    size_t size) {
  using cuda_emulation::Sums;
  cuda_emulation::options.sums = nearest ? Sums::kNearest : Sums::kTruncated;
  message[0] = '\0';
  cuda_emulation::options.seed = seed;
  try {
    for (const Entry& entry : kEntries)
      if (std::strcmp(entry.name, name) == 0)
        cacr::launch(entry.kernel, {1, 32, sizeof(primitives::Tile), nullptr}, primitives::Words{in, out});
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
  }
}
