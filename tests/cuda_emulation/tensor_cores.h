// ldmatrix and mma: fragments are gathered from the 32 lanes of a warp, and results handed out, as the PTX ISA says.
#pragma once

#include <algorithm>
#include <cmath>

#include "barriers.h"

namespace cuda_emulation {

// ---- formats --------------------------------------------------------------------------------------------------------
inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

struct Bf16 {
  static float to_float(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }
  static uint16_t from_float(float x) {
    const uint32_t bits = bits_of_float(x);
    if (std::isnan(x)) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
  }
};

struct F16 {
  static float to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float x = exponent == 31  ? (fraction == 0 ? INFINITY : NAN)
              : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return bits >> 15 ? -x : x;
  }
  static uint16_t from_float(float x) {
    const uint16_t sign = static_cast<uint16_t>(bits_of_float(x) >> 16 & 0x8000);
    if (std::isnan(x)) return 0x7fff;
    const float magnitude = std::fabs(x);
    if (magnitude >= 65520.0f) return sign | 0x7c00;  // rounds beyond the largest number
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    if (magnitude < 0x1p-14f) exponent = -13;                                  // the spacing stays 2^-24
    const float units = std::nearbyint(std::ldexp(magnitude, 11 - exponent));  // exact but for this rounding
    // 2^10 units are one step of the exponent, so a carry into it comes out right.
    return static_cast<uint16_t>(sign | ((exponent + 13) * 1024 + static_cast<int>(units)));
  }
};

inline float tf32_to_float(uint32_t bits) { return float_of_bits(bits & 0xffffe000u); }

inline uint32_t to_tf32(float x) {
  const uint32_t bits = bits_of_float(x);
  return std::isfinite(x) ? (bits + 0x1000u) & 0xffffe000u : bits;
}

inline float exp2_approx(float x) {
  const auto flush = [](float y) { return std::fabs(y) < 0x1p-126f ? std::copysign(0.0f, y) : y; };
  return flush(std::exp2(flush(x)));
}

// ---- ldmatrix -------------------------------------------------------------------------------------------------------
// The lane that names a row reads it, before the lanes meet: the sanitizers hold that lane responsible.
template <int kMatrices, bool kTransposed>
void ldmatrix(const char* operation, uint32_t (&r)[kMatrices], const char* row, const Site& site) {
  struct Argument {
    uint16_t row[8];
    uint32_t* r;
  } argument{{}, r};
  pause_point();
  if (current->lane < 8 * kMatrices) {
    check_shared(operation, site, row, 16);
    sanitizers::note_read(row, 16);
    std::memcpy(argument.row, row, 16);
  }
  meet(0xffffffffu, {operation, site}, argument, [](Argument* const* lanes) {
    for (int lane = 0; lane < 32; lane++) {
      const int group = lane / 4, quad = lane % 4;
      for (int i = 0; i < kMatrices; i++) {
        const auto element = [&](int y, int x) { return lanes[8 * i + y]->row[x]; };
        const uint16_t low = kTransposed ? element(2 * quad, group) : element(group, 2 * quad);
        const uint16_t high = kTransposed ? element(2 * quad + 1, group) : element(group, 2 * quad + 1);
        lanes[lane]->r[i] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

// ---- mma ------------------------------------------------------------------------------------------------------------
// d += a b. Sums are either exact to double precision and rounded once (Sums::kNearest), or what is known of the
// hardware (Sums::kTruncated, the default; M. Fasi, N. Higham, M. Mikaitis, S. Pranesh, "Numerical behavior of NVIDIA
// tensor cores", PeerJ Comput. Sci. 7:e330, 2021): products are exact; a group of them and d are aligned to the
// largest, cut off below its 24 bits and one more, and added; the sum is cut off to 24 bits. A group is 8 products of
// half types or 4 of TF32, as on the A100; later devices have longer ones and keep more bits. It is a model of the size
// and the sign of the errors: no device is copied to the last bit.
inline float truncated(double x) {
  const float nearest = static_cast<float>(x);
  if (std::isinf(nearest) || !(std::fabs(static_cast<double>(nearest)) > std::fabs(x))) return nearest;
  return std::nextafterf(nearest, 0.0f);
}

// The power of two that is not larger: x is a normal number.
inline double power_below(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof x);
  bits &= 0x7ff0000000000000u;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <int kGroup>
float truncated_sum(float d, const double (&products)[kGroup]) {
  double largest = std::fabs(static_cast<double>(d)), sum = d;
  for (double x : products) largest = std::max(largest, std::fabs(x)), sum += x;
  if (largest == 0 || !std::isfinite(sum)) return static_cast<float>(sum);
  const double unit = power_below(largest) * 0x1p-24, per_unit = 1 / unit;  // the last bit that is kept
  int32_t units = static_cast<int32_t>(d * per_unit);
  for (double x : products) units += static_cast<int32_t>(x * per_unit);
  return truncated(units * unit);
}

template <int kRows, int kDepth>
struct Product {
  static constexpr int kGroup = kDepth / 2;
  float a[kRows][kDepth], b[kDepth][8];
  double d[kRows][8];

  void multiply() {
    for (int i = 0; i < kRows; i++)
      for (int k = 0; k < kDepth; k++)
        for (int j = 0; j < 8; j++) d[i][j] += static_cast<double>(a[i][k]) * static_cast<double>(b[k][j]);
  }

  void multiply_truncating() {
    for (int i = 0; i < kRows; i++)
      for (int j = 0; j < 8; j++) {
        float sum = static_cast<float>(d[i][j]);
        for (int k0 = 0; k0 < kDepth; k0 += kGroup) {
          double products[kGroup];
          for (int k = 0; k < kGroup; k++)
            products[k] = static_cast<double>(a[i][k0 + k]) * static_cast<double>(b[k0 + k][j]);
          sum = truncated_sum(sum, products);
        }
        d[i][j] = sum;
      }
  }
};

template <class D>
struct MmaArgument {
  D* d;
  const uint32_t* a;
  uint32_t b[2];
};

// The accumulator fragment of m16n8: element i of `lane` is d[row][column].
struct Place {
  int row, column;
};
inline Place accumulator_place(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

template <class P>
void multiply_fragments(P& product, MmaArgument<float>* const* lanes) {
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const Place at = accumulator_place(lane, i);
      product.d[at.row][at.column] = lanes[lane]->d[i];
    }
  options.sums == Sums::kTruncated ? product.multiply_truncating() : product.multiply();
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const Place at = accumulator_place(lane, i);
      lanes[lane]->d[i] = static_cast<float>(product.d[at.row][at.column]);
    }
}

template <class Format>
void mma_m16n8k16(const char* operation, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  const Site& site) {
  MmaArgument<float> argument{d, a, {b0, b1}};
  meet(0xffffffffu, {operation, site}, argument, [](MmaArgument<float>* const* lanes) {
    Product<16, 16> product;
    for (int lane = 0; lane < 32; lane++) {
      const int group = lane / 4, quad = lane % 4;
      for (int half = 0; half < 2; half++) {
        const auto part = [&](uint32_t x) { return Format::to_float(static_cast<uint16_t>(x >> (16 * half))); };
        for (int i = 0; i < 4; i++) product.a[group + i % 2 * 8][2 * quad + i / 2 * 8 + half] = part(lanes[lane]->a[i]);
        for (int i = 0; i < 2; i++) product.b[2 * quad + 8 * i + half][group] = part(lanes[lane]->b[i]);
      }
    }
    multiply_fragments(product, lanes);
  });
}

inline void mma_m16n8k8_tf32(const char* operation, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             const Site& site) {
  MmaArgument<float> argument{d, a, {b0, b1}};
  meet(0xffffffffu, {operation, site}, argument, [](MmaArgument<float>* const* lanes) {
    Product<16, 8> product;
    for (int lane = 0; lane < 32; lane++) {
      const int group = lane / 4, quad = lane % 4;
      for (int i = 0; i < 4; i++) product.a[group + i % 2 * 8][quad + i / 2 * 4] = tf32_to_float(lanes[lane]->a[i]);
      for (int i = 0; i < 2; i++) product.b[quad + 4 * i][group] = tf32_to_float(lanes[lane]->b[i]);
    }
    multiply_fragments(product, lanes);
  });
}

}  // namespace cuda_emulation
