// What the processor can do at most: fused multiply-adds on accumulators that never leave their registers, on all
// threads at once. peak.py compiles this on the machine that it measures, for exactly that machine.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Independent chains have to cover latency times units: 4 x 2 on x86-64, 4 x 4 on the widest ARM cores. Together with
// the factor and the term they have to fit into the registers: 16, or 32 with AVX-512 and NEON.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kChains = 24;
#else
constexpr int kChains = 12;
#endif

constexpr int kStepsPerTurn = 4;  // so that the loop's own instructions cost nothing

volatile double factor_source = 0.5, term_source = 1.0;  // x = x / 2 + 1 tends to 2: neither overflow nor denormals
std::atomic<double> sink;

template <class T>
void multiply_add(long turns) {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  const Vector factor = Vector{} + static_cast<T>(factor_source), term = Vector{} + static_cast<T>(term_source);
  Vector x[kChains];
  for (int i = 0; i < kChains; ++i) x[i] = Vector{} + static_cast<T>(i);
  for (long turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 4
    for (int step = 0; step < kStepsPerTurn; ++step) {
#pragma GCC unroll 24
      for (int i = 0; i < kChains; ++i) x[i] = x[i] * factor + term;
    }
  }
  Vector sum = x[0];
  for (int i = 1; i < kChains; ++i) sum += x[i];
  sink.store(static_cast<double>(sum[0]), std::memory_order_relaxed);
}

template <class T>
double gflops(int threads, long turns) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int> waiting{threads};
  std::vector<Clock::time_point> begin(threads), end(threads);
  auto work = [&](int thread) {
    multiply_add<T>(turns / 8);  // the clock rate that wide registers are run at takes a moment to settle
    waiting.fetch_sub(1);
    while (waiting.load() > 0) std::this_thread::yield();
    begin[thread] = Clock::now();
    multiply_add<T>(turns);
    end[thread] = Clock::now();
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
  const std::chrono::duration<double> seconds =
      *std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end());
  const double lanes = kVectorBytes / sizeof(T);
  return 2.0 * lanes * kChains * kStepsPerTurn * static_cast<double>(turns) * threads / seconds.count() / 1e9;
}

}  // namespace

extern "C" double fma_peak_float32(int threads, long turns) { return gflops<float>(threads, turns); }
extern "C" double fma_peak_float64(int threads, long turns) { return gflops<double>(threads, turns); }
extern "C" int fma_peak_vector_bytes() { return kVectorBytes; }
