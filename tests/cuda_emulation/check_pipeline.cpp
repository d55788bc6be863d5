// check_pipeline BUG BLOCKS D SEEDS: runs the kernel of pipeline.cuh under seeds 0 ... SEEDS - 1 and prints a line for
// each: "ok", "wrong", or the error that the emulation found.
#include <cstdio>
#include <cstdlib>

#include "pipeline.cuh"

namespace {

using cuda_emulation::Bf16;

std::vector<uint16_t> numbers(int count, uint64_t seed) {
  cuda_emulation::Random random(seed);
  std::vector<uint16_t> values(count);
  for (uint16_t& value : values) value = Bf16::from_float(static_cast<float>(random.below(257)) / 128 - 1);
  return values;
}

std::vector<double> expected(const std::vector<uint16_t>& x, const std::vector<uint16_t>& y, int rows, int D) {
  std::vector<double> out(rows);
  double total = 0;
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < pipeline::kKeys; j++) {
      double product = 0;
      for (int d = 0; d < D; d++)
        product += static_cast<double>(Bf16::to_float(x[i * D + d])) * Bf16::to_float(y[j * D + d]);
      out[i] += product * product;
      total += product * product;
    }
  for (double& value : out) value /= total;
  return out;
}

const char* outcome(int bug, int blocks, int D) {
  const int rows = blocks * pipeline::kQueries;
  const std::vector<uint16_t> x = numbers(rows * D, 1), y = numbers(pipeline::kKeys * D, 2);
  std::vector<float> total(blocks, NAN), out(rows, NAN);
  const pipeline::Problem problem{x.data(), y.data(), total.data(), out.data(), D, bug};
  const size_t shared_bytes = std::max(sizeof(pipeline::Stages), sizeof(pipeline::Sums));
  try {
    const cacr::Launch how{dim3(blocks), dim3(pipeline::kThreads), shared_bytes, nullptr};
    cacr::launch_cooperative(pipeline::run_pipeline, how, problem);
  } catch (const cuda_emulation::Error& error) {
    static char message[1000];
    std::snprintf(message, sizeof message, "%s", error.what());
    return message;
  }
  const std::vector<double> truth = expected(x, y, rows, D);
  for (int i = 0; i < rows; i++)
    if (!(std::fabs(out[i] - truth[i]) <= 1e-5 * truth[i])) return "wrong";
  return "ok";
}

}  // namespace

int main(int, char** arguments) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  for (int seed = 0; seed < std::atoi(arguments[4]); seed++) {
    cuda_emulation::options.seed = seed;
    std::puts(outcome(std::atoi(arguments[1]), std::atoi(arguments[2]), std::atoi(arguments[3])));
  }
}
