// check_plan ARITHMETIC BLOCKS Q_VIEWS K_VIEWS N M D PAIRS KEYS_ARE_QUERIES WANT_Q WANT_K WANT_VARIANCE: how the work
// of one launch is split on a device that holds BLOCKS blocks, and how much memory it takes. No kernel runs.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "operators.cuh"

namespace {

using namespace cacr;

template <class Arithmetic>
void show(char** arguments) {
  PlanOf<Arithmetic> plan{{}, 1};
  auto& p = plan.p;
  auto next = [&] { return std::atoll(*arguments++); };
  const int blocks = int(next());
  p.q_views = int32_t(next()), p.k_views = int32_t(next()), p.N = next(), p.M = next(), p.D = next();
  p.pairs = int32_t(next()), p.softmaxes = 1, p.keys_are_queries = next();
  p.want_q = next(), p.want_k = next(), p.want_variance = next();
  p.phases = phase_bit(kNorms) | phase_bit(kCoefficients) | phase_bit(kGradients) | phase_bit(kSums);
  plan.split_work(blocks, Arithmetic::kGradientChunks);
  const int64_t all = plan.lay_out(nullptr);
  const Units q = p.q_units, k = p.k_units;
  p.q_units.splits = p.k_units.splits = 1;
  std::printf("{\"grid\": %d, \"splits\": %d, \"q_units\": %d, \"q_splits\": %d, \"k_units\": %d, \"k_splits\": %d, ",
              plan.grid, p.splits, q.count, q.splits, k.count, k.splits);
  std::printf("\"bytes_of_splits\": %lld}\n", static_cast<long long>(all - plan.lay_out(nullptr)));
}

}  // namespace

int main(int, char** arguments) {
  const std::string arithmetic = arguments[1];
  if (arithmetic == "bf16") show<Bf16Arithmetic>(arguments + 2);
  if (arithmetic == "tf32x3") show<Tf32Arithmetic<2>>(arguments + 2);
  if (arithmetic == "double") show<IeeeArithmetic<double>>(arguments + 2);
}
