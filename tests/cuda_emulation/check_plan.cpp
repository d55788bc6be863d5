// check_plan ARITHMETIC BLOCKS Q_VIEWS K_VIEWS N M D PAIRS OWN WANT_Q WANT_K WANT_MOMENT: how the work of one launch is
// shared out on a device that holds BLOCKS blocks, and how much memory it takes. No kernel runs.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "operators.cuh"

namespace {

using namespace cacr;

template <class A>
void show(char** arguments) {
  using Acc = typename A::Acc;
  Plan<typename A::Element, Acc> plan{{}, 1};
  auto& p = plan.p;
  auto next = [&] { return std::atoll(*arguments++); };
  const int blocks = int(next());
  p.q_views = int32_t(next()), p.k_views = int32_t(next()), p.N = next(), p.M = next(), p.D = next();
  p.pairs = int32_t(next()), p.softmaxes = 1, p.own = next();
  p.want_q = next(), p.want_k = next(), p.want_moment = next();
  p.phases = phase_bit(kNorms) | phase_bit(kCoefficients) | phase_bit(kGradients) | phase_bit(kSums);
  plan.share_out(blocks, A::kGradientChunks);
  const int64_t all = plan.lay_out(nullptr);
  const Units q = p.q_units, k = p.k_units;
  p.q_units.shares = p.k_units.shares = 1;
  std::printf("{\"grid\": %d, \"splits\": %d, \"q_units\": %d, \"q_shares\": %d, \"k_units\": %d, \"k_shares\": %d, ",
              plan.grid, p.splits, q.count, q.shares, k.count, k.shares);
  std::printf("\"bytes_of_shares\": %lld}\n", static_cast<long long>(all - plan.lay_out(nullptr)));
}

}  // namespace

int main(int, char** arguments) {
  const std::string arithmetic = arguments[1];
  if (arithmetic == "bf16") show<Bf16Arithmetic>(arguments + 2);
  if (arithmetic == "tf32x3") show<Tf32Arithmetic<2>>(arguments + 2);
  if (arithmetic == "double") show<IeeeArithmetic<double>>(arguments + 2);
}
