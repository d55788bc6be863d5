// Products of bfloat16 tiles (namespace CANDIDATE) against a table of what the instructions are defined to give (AMX,
// or AVX512-BF16 with CACR_BF16_PAIRS), and against random matrices of small integers; with OTHER also bit for bit
// against another build, on any numbers. Prints the failures. Compiled by tests/cpu/test_bf16.py.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/planner/amx.h"

namespace cacr {
namespace CANDIDATE {
void multiply(bool add, int64_t steps, const uint16_t* A, int64_t lda, const uint16_t* B, float* C, int64_t ldc);
}
#ifdef OTHER
namespace OTHER {
void multiply(bool add, int64_t steps, const uint16_t* A, int64_t lda, const uint16_t* B, float* C, int64_t ldc);
}
#endif
}  // namespace cacr

namespace {

constexpr int kTile = 32;

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
float number(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// c + sum_k a b of one entry: terms of the sum, all others are 0.
struct Row {
  const char* name;
  float c, by_amx, by_pairs;
  struct {
    int k;
    float a, b;
  } terms[4];
};

constexpr float kInfinity = __builtin_inff(), kNan = __builtin_nanf("");
const Row kTable[] = {
    {"one product", 0, 6, 6, {{0, 2, 3}}},
    {"an odd one, the last", 0, -6, -6, {{31, 2, -3}}},
    {"added to C", 10, 16, 16, {{7, 2, 3}}},
    {"several", 1, 1 + 6 + 20 + 42, 1 + 6 + 20 + 42, {{0, 2, 3}, {1, 4, 5}, {16, 6, 7}}},
    {"products are exact", 0, 0x1.fc02p-1f * 2, 0x1.fc02p-1f * 2, {{3, 0x1.fep0f, 0x1.fep-1f}}},
    {"even and odd terms apart", 0, 1, 0, {{0, 0x1p12f, 0x1p12f}, {1, 1, 1}, {2, -0x1p12f, 0x1p12f}}},
    {"in the order of k", 0, 0, 0, {{0, 0x1p12f, 0x1p12f}, {2, 1, 1}, {4, -0x1p12f, 0x1p12f}}},
    {"terms first, then C", 0x1p24f, 0x1p24f + 2, 0x1p24f, {{0, 1, 1}, {2, 1, 1}}},
    {"the odd one of a pair first", 0x1p24f, 1, 0, {{0, -0x1p12f, 0x1p12f}, {1, 1, 1}}},
    {"to the even one, down", 0x1p24f, 0x1p24f, 0x1p24f, {{0, 1, 1}}},
    {"to the even one, up", 0x1p24f + 2, 0x1p24f + 4, 0x1p24f + 4, {{0, 1, 1}}},
    {"a subnormal factor is 0", 0, 0, 0, {{0, 0x1p-127f, 0x1p120f}}},
    {"the smallest normal one is not", 0, 0x1p-6f, 0x1p-6f, {{0, 0x1p-126f, 0x1p120f}}},
    {"a subnormal product is 0", 0, 0, 0, {{0, 0x1p-70f, 0x1p-60f}}},
    {"so it adds nothing up", 0, 0, 0, {{0, 0x1p-64f, 0x1p-63f}, {2, 0x1p-64f, 0x1p-63f}}},
    {"a subnormal C is 0", 0x1p-127f, 0, 0, {}},
    {"a subnormal sum is 0", -0x1p-126f, 0, 0, {{0, 0x1.8p-63f, 0x1p-63f}}},
    {"overflow", 0, kInfinity, kInfinity, {{0, 0x1p100f, 0x1p100f}}},
    {"infinity", 1, -kInfinity, -kInfinity, {{5, kInfinity, -2}}},
    {"infinity times 0", 0, kNan, kNan, {{4, kInfinity, 0}}},
    {"infinities of both signs", 0, kNan, kNan, {{4, kInfinity, 1}, {5, kInfinity, -1}}},
    {"NaN of C", kNan, kNan, kNan, {{0, 1, 1}}},
};

// One entry at a time, with others around it.
int check_table() {
  int failures = 0;
  for (const Row& row : kTable)
    for (const int at : {0, 15, 16, 31}) {
      uint16_t A[kTile * kTile] = {}, B[kTile * kTile] = {};
      float C[kTile * kTile] = {};
      const int i = at, j = 31 - at / 2;
      for (const auto& t : row.terms) {
        if (t.a == 0 && t.b == 0) continue;
        A[i * kTile + t.k] = uint16_t(bits_of(t.a) >> 16);
        B[(t.k / 2 * kTile + j) * 2 + t.k % 2] = uint16_t(bits_of(t.b) >> 16);
      }
      C[i * kTile + j] = row.c;
      cacr::CANDIDATE::multiply(true, 1, A, kTile, B, C, kTile);
#ifdef CACR_BF16_PAIRS
      const float expected = row.by_pairs;
#else
      const float expected = row.by_amx;
#endif
      const float found = C[i * kTile + j];
      if (found == expected || (found != found && expected != expected)) continue;
      std::printf("%s, entry %d %d: %a, expected %a\n", row.name, i, j, double(found), double(expected));
      failures++;
    }
  return failures;
}

struct Random {
  uint32_t state = 1;
  uint32_t operator()() { return state = state * 1664525u + 1013904223u; }
};

// Small integers, whose sums are exact in any order; three steps, rows with gaps, which stay as they are.
int check_places() {
  constexpr int kSteps = 3, kDepth = kSteps * kTile, kRow = kDepth + 8, kOut = 48;
  Random random;
  std::vector<uint16_t> A(kTile * kRow), B(kDepth * kTile);
  std::vector<float> C(kTile * kOut);
  const auto small = [&] { return float(int(random() >> 28) - 8); };
  int failures = 0;
  for (const bool add : {false, true}) {
    for (uint16_t& x : A) x = uint16_t(bits_of(small()) >> 16);
    for (uint16_t& x : B) x = uint16_t(bits_of(small()) >> 16);
    for (float& x : C) x = small();
    const std::vector<float> before = C;
    cacr::CANDIDATE::multiply(add, kSteps, A.data(), kRow, B.data(), C.data(), kOut);
    for (int i = 0; i < kTile; i++)
      for (int j = 0; j < kOut; j++) {
        float sum = add || j >= kTile ? before[size_t(i * kOut + j)] : 0;
        for (int k = 0; k < kDepth && j < kTile; k++)
          sum += number(uint32_t(A[size_t(i * kRow + k)]) << 16) *
                 number(uint32_t(B[size_t((k / 2 * kTile + j) * 2 + k % 2)]) << 16);
        if (sum == C[size_t(i * kOut + j)]) continue;
        std::printf("entry %d %d of a product%s: %g, expected %g\n", i, j, add ? " that is added" : "",
                    double(C[size_t(i * kOut + j)]), double(sum));
        failures++;
      }
  }
  return failures;
}

#ifdef OTHER
bool same(float a, float b) { return (a != a && b != b) || bits_of(a) == bits_of(b); }

// Numbers of all magnitudes, and of magnitudes whose products and sums are subnormal.
int check_bits() {
  Random random;
  int failures = 0;
  for (int round = 0; round < 400; round++) {
    uint16_t A[kTile * kTile], B[kTile * kTile];
    float C[kTile * kTile], D[kTile * kTile];
    const auto any = [&] {
      const uint32_t least[] = {0, 110, 54, 127}, range[] = {256, 35, 20, 1};
      const uint32_t exponent = least[round % 4] + (random() >> 8) % range[round % 4];
      return (random() & 0x807fffff) | exponent << 23;
    };
    for (uint16_t& x : A) x = uint16_t(any() >> 16);
    for (uint16_t& x : B) x = uint16_t(any() >> 16);
    for (float& x : C) x = number(any());
    std::memcpy(D, C, sizeof(C));
    cacr::CANDIDATE::multiply(true, 1, A, kTile, B, C, kTile);
    cacr::OTHER::multiply(true, 1, A, kTile, B, D, kTile);
    for (int i = 0; i < kTile * kTile; i++) failures += !same(C[i], D[i]);
  }
  if (failures) std::printf("%d entries differ in their bits\n", failures);
  return failures;
}
#endif

}  // namespace

int main() {
  cacr::may_use_amx();  // the candidate may need it
  int failures = check_table() + check_places();
#ifdef OTHER
  failures += check_bits();
#endif
  std::printf("%d failures\n", failures);
  return failures != 0;
}
