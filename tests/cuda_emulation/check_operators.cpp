// check_operators ARITHMETIC SEEDS BLOCKS [LEFT_OUT]: runs the operators of csrc/cuda on small problems with tails in
// all directions, under schedules 0 ... SEEDS - 1, in grids of at most BLOCKS blocks; with 0 every phase is a launch of
// its own. Whatever the schedule, the results are the same to the last bit, and all of them are written. Values are
// compared with float64 elsewhere: this is for sanitizers.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "operators.cuh"

namespace {

using namespace cacr;
using cuda_emulation::Random;

// Memory of its exact size until it is asked for again, NaN until written.
struct Memory {
  std::vector<char> array;

  static void* allocate(void* memory, int64_t bytes) {
    auto& array = static_cast<Memory*>(memory)->array;
    array = std::vector<char>(bytes, '\xff');
    return array.data();
  }
};

template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return {cuda_emulation::Bf16::from_float(x)};
  else if constexpr (std::is_same_v<T, f16>)
    return {cuda_emulation::F16::from_float(x)};
  else
    return T(x);
}

template <class T>
std::vector<T> numbers(int64_t count, Random& random, float scale) {
  std::vector<T> values;
  for (int64_t i = 0; i < count; i++) values.push_back(from_float<T>(scale * (float(random.below(2001)) / 1000 - 1)));
  return values;
}

// A problem, with everything that the operators write.
struct Shape {
  const char* name;
  int64_t N, M, D, q_views, k_views;
  std::vector<int64_t> q_index, k_index;
  std::vector<int> kinds;
  bool keys_are_queries, inner_product;
  bool given_self = false, normalize = false;
};

using Pairs = std::vector<int64_t>;

const Shape kShapes[] = {
    {"keys of their own", 70, 83, 37, 2, 1, {0, 1, 0}, {0, 0, 0}, {kSame, kOther}, false, false},
    {"an odd number of steps", 33, 29, 24, 2, 1, {0, 1}, {0, 0}, {kSame, kOther}, false, false},
    {"one softmax, inner", 3, 131, 8, 1, 2, {0, 0}, {1, 0}, {kAll}, false, true},
    {"queries among themselves", 67, 67, 72, 1, 1, {0}, {0}, {kSameNotSelf, kOther}, true, false},
    {"given selves", 67, 70, 72, 1, 1, {0}, {0}, {kSameNotSelf, kOtherNotSelf}, false, false, true},
    {"two softmaxes that cancel", 65, 65, 16, 2, 2, {0}, {1}, {kOther, kOther}, true, false},
    {"more pairs than a launch takes", 3, 5, 8, 2, 1, Pairs(65, 1), Pairs(65, 0), {kAll}, false, false},
    {"raw rows", 35, 67, 37, 2, 1, {0, 1}, {0, 0}, {kSame, kOther}, false, false, false, true},
    {"raw queries among themselves", 35, 35, 24, 1, 1, {0}, {0}, {kSameNotSelf, kOther}, true, false, false, true},
};

struct Results {
  std::vector<double> value, lse, row_state, grad_tau;
  std::vector<char> grad_q, grad_k;

  bool operator==(const Results& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0);
    };
    return same(value, other.value) && same(lse, other.lse) && same(row_state, other.row_state) &&
           same(grad_tau, other.grad_tau) && same(grad_q, other.grad_q) && same(grad_k, other.grad_k);
  }
  template <class Acc>
  bool written() const {
    const auto all = [](const auto* begin, const auto* end) {
      return std::all_of(begin, end, [](auto x) { return x == x; });
    };
    const auto acc = [](const std::vector<char>& bytes) { return reinterpret_cast<const Acc*>(bytes.data()); };
    return all(value.data(), value.data() + value.size()) && all(lse.data(), lse.data() + lse.size()) &&
           all(grad_tau.data(), grad_tau.data() + grad_tau.size()) &&
           all(acc(grad_q), acc(grad_q) + grad_q.size() / sizeof(Acc)) &&
           all(acc(grad_k), acc(grad_k) + grad_k.size() / sizeof(Acc));
  }
};

template <class A>
void run(const Call& call) {
  Memory memory;
  run_call<A>(call, nullptr, {Memory::allocate, &memory});
}

// Forward and backward of `contrast`.
template <class A>
Results contrast(const Shape& shape) {
  using Element = typename A::Element;
  using Acc = typename A::Acc;
  Random random(3);
  const float scale = 1 / std::sqrt(float(shape.D));
  const auto q = numbers<Element>(shape.q_views * shape.N * shape.D, random, scale);
  const auto k = shape.keys_are_queries ? q : numbers<Element>(shape.k_views * shape.M * shape.D, random, scale);
  std::vector<int32_t> q_id, k_id, q_self;
  for (int64_t i = 0; i < shape.N; i++) q_id.push_back(int32_t(random.below(9)));
  for (int64_t j = 0; j < shape.M; j++) k_id.push_back(shape.keys_are_queries ? q_id[j] : int32_t(random.below(9)));
  for (int64_t i = 0; shape.given_self && i < shape.N; i++) q_self.push_back(int32_t(random.below(int(shape.M))) - 1);
  const std::vector<double> tau = {1.5, -2.5};
  const size_t S = shape.kinds.size(), rows = S * shape.q_index.size() * shape.N;
  const auto grad_value = numbers<double>(int64_t(rows), random, 1),
             grad_lse = numbers<double>(int64_t(rows), random, 1);
  Results r{std::vector<double>(rows, NAN),
            std::vector<double>(rows, NAN),
            std::vector<double>(3 * rows, NAN),
            std::vector<double>(S, NAN),
            std::vector<char>(q.size() * sizeof(Acc), '\xff'),
            std::vector<char>(shape.keys_are_queries ? 0 : k.size() * sizeof(Acc), '\xff')};
  const bool masked = shape.kinds[0] != kAll;
  Call c{};
  c.q = q.data(), c.k = shape.keys_are_queries ? q.data() : k.data();
  c.q_views = shape.q_views, c.k_views = shape.k_views, c.N = shape.N, c.M = shape.M, c.D = shape.D;
  c.pairs = int64_t(shape.q_index.size()), c.q_index = shape.q_index.data(), c.k_index = shape.k_index.data();
  c.q_id = masked ? q_id.data() : nullptr, c.k_id = masked ? k_id.data() : nullptr;
  c.q_self = shape.given_self ? q_self.data() : nullptr;
  c.tau = tau.data(), c.softmaxes = int32_t(S);
  for (size_t s = 0; s < S; s++) c.kind[s] = shape.kinds[s];
  c.keys_are_queries = shape.keys_are_queries, c.inner_product = shape.inner_product;
  c.normalize = shape.normalize;
  c.value = r.value.data(), c.lse = r.lse.data(), c.row_state = r.row_state.data();
  c.operation = Operation::kForward;
  run<A>(c);
  c.operation = Operation::kBackward;
  c.grad_value = grad_value.data(), c.grad_lse = grad_lse.data();
  c.grad_q = r.grad_q.data(), c.grad_k = shape.keys_are_queries ? nullptr : r.grad_k.data(),
  c.grad_tau = r.grad_tau.data();
  run<A>(c);
  return r;
}

struct LossShape {
  const char* name;
  int64_t V, B, D;
  Pairing pairing;
  bool rbf, on_device, normalize = false;
};

const LossShape kLosses[] = {
    {"loss, unordered", 3, 37, 41, Pairing::kUnordered, false, true},
    {"loss, ordered, rbf", 2, 67, 24, Pairing::kOrdered, true, true},
    {"loss, pooled", 3, 23, 8, Pairing::kPooled, false, false},
    {"loss, one instance", 2, 1, 5, Pairing::kUnordered, false, true},
    {"loss of raw rows", 3, 19, 41, Pairing::kUnordered, false, true, true},
};

template <class A>
Results loss(const LossShape& shape) {
  using Acc = typename A::Acc;
  Random random(4);
  const auto z = numbers<typename A::Element>(shape.V * shape.B * shape.D, random, 1 / std::sqrt(float(shape.D)));
  const std::vector<double> given = {1.5, 0.75, 1.25, 0.5, 2.0};
  Results r{{}, {}, {}, std::vector<double>(5, NAN), std::vector<char>(z.size() * sizeof(Acc), '\xff'), {}};
  r.grad_k.assign(5 * sizeof(Acc), '\xff');  // loss and parts
  Call c{};
  c.operation = Operation::kLoss;
  c.q = z.data(), c.q_views = shape.V, c.N = shape.B, c.D = shape.D, c.pairing = shape.pairing, c.rbf = shape.rbf;
  c.normalize = shape.normalize;
  c.numbers = shape.on_device ? given.data() : nullptr;
  std::copy(given.begin(), given.end(), c.given);
  c.grad_q = r.grad_q.data(), c.grad_numbers = r.grad_tau.data();
  c.loss = r.grad_k.data(), c.parts = r.grad_k.data() + sizeof(Acc);
  run<A>(c);
  return r;
}

int failures = 0;

struct Request {
  int seeds, blocks;
  std::string arithmetic;
};

template <class A, class Shape, class Run>
void check(const Request& request, const Shape& shape, Run run_once) {
  Results first;
  for (int seed = 0; seed < request.seeds; seed++) {
    cuda_emulation::options.seed = seed;
    std::string problem;
    try {
      const Results now = run_once(shape);
      if (seed == 0) first = now;
      if (!(now == first)) problem = "depends on the schedule";
      if (!now.template written<typename A::Acc>()) problem = "not all results are numbers";
    } catch (const std::exception& error) {
      problem = error.what();
    }
    if (problem.empty()) continue;
    failures++;
    std::printf("%s, %s, seed %d: %s\n", request.arithmetic.c_str(), shape.name, seed, problem.c_str());
    return;
  }
}

enum Arithmetic { kBf16, kF16, kTf32, kTf32x3, kFloat, kDouble, kEveryOne };
#ifndef ONLY  // the one that is compiled
#define ONLY kEveryOne
#endif

template <Arithmetic which, class A>
void check_all(const Request& request, const char* arithmetic) {
  if constexpr (which == ONLY || ONLY == kEveryOne) {
    if (request.arithmetic != arithmetic) return;
    for (const Shape& shape : kShapes) check<A>(request, shape, contrast<A>);
    for (const LossShape& shape : kLosses) check<A>(request, shape, loss<A>);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const Request request{std::atoi(arguments[2]), std::atoi(arguments[3]), arguments[1]};
  cuda_emulation::options.resident_blocks = request.blocks;
  if (count > 4) cuda_emulation::options.left_out = arguments[4];
  check_all<kBf16, Bf16Arithmetic>(request, "bf16");
  check_all<kF16, F16Arithmetic>(request, "f16");
  check_all<kTf32, Tf32Arithmetic<1>>(request, "tf32");
  check_all<kTf32x3, Tf32Arithmetic<2>>(request, "tf32x3");
  check_all<kFloat, IeeeArithmetic<float>>(request, "float");
  check_all<kDouble, IeeeArithmetic<double>>(request, "double");
  std::printf("%d failures\n", failures);
}
