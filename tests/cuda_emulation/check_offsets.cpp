// check_offsets: chunks of rows that lie beyond 2^31 elements and beyond row 2^31, where an offset of 32 bits would
// read something else. The array is address space, of which a few pages are touched.
#include <sys/mman.h>

#include <cstdio>

#include "launch.cuh"
#include "tile/rows.cuh"

namespace {

using namespace cacr;

constexpr int64_t kD = 8, kRows = (int64_t(1) << 31) + 3 * kTile - 5;  // of 16 bytes

struct Loaded {
  Stages<bf16> rows;
};
struct Job {
  Rows<bf16> from;
  int64_t row0;
  bool aligned;
  uint16_t* out;  // [64][kD]
};

__global__ void load(const Job job) {
  auto& shared = shared_memory<Loaded>();
  load_chunk(shared.rows, 1, job.from, job.row0, 0, job.aligned);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int x = threadIdx.x; x < kTile * int(kD); x += kThreads) {
    job.out[x] = shared.rows[kTile * kStride<bf16> + x / int(kD) * kStride<bf16> + x % int(kD)].bits;
  }
}

bool right(bf16* data, int64_t row0, bool aligned) {
  std::vector<uint16_t> out(kTile * kD, 1);
  launch(load, Launch{dim3(1), dim3(kThreads), sizeof(Loaded), nullptr},
         Job{{data, kRows, kD}, row0, aligned, out.data()});
  for (int64_t x = 0; x < kTile * kD; x++) {
    const int64_t row = row0 + x / kD;
    if (out[x] != (row < kRows ? data[row * kD + x % kD].bits : 0)) return false;
  }
  return true;
}

}  // namespace

int main() {
  const size_t bytes = size_t(kRows * kD) * sizeof(bf16);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return std::puts("no address space"), 1;
  bf16* const data = static_cast<bf16*>(memory);
  const int64_t places[] = {(int64_t(1) << 28) - 32, (int64_t(1) << 29) + 7, (int64_t(1) << 31) - 10, kRows - 20};
  for (const int64_t first : places) {
    for (int64_t x = first * kD; x < std::min(first + kTile, kRows) * kD; x++)
      data[x].bits = uint16_t(1 + x * 7919 % 65521);
  }
  int failures = 0;
  for (const int64_t first : places) failures += !right(data, first, true) + !right(data, first, false);
  std::printf("%d failures\n", failures);
}
