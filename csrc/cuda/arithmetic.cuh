// Matrix products of one tile, for each kind of arithmetic, all with the same owner of every element:
//
// A tile has 64 rows and 64 columns; warp w owns rows 16 w ... 16 w + 15. With group = lane / 4 and quad = lane % 4, a
// thread holds s[n][e]: e = 0, 1: (row group, column 8 n + 2 quad + e), e = 2, 3: (row group + 8, the same columns).
// That is how mma.sync leaves its results, and the elementwise work between two products is written once for all.
//
//   product     s += a b^T       a, b: 64 rows of one chunk of features
//   accumulate  g += h b         h: a tile of coefficients, b: 64 rows of one chunk; g: 64 rows of one chunk
//
// h keeps the accuracy of float32 where the inputs are half types: it is split into pieces whose sum it is.
//
// Tensor cores truncate their sums (Fasi et al. 2021): in a chain of mma the error grows with its length, always
// towards zero. So a chain begins with zeros and is short, and what it gives is added by ordinary instructions, which
// round to nearest (Ootomo, Yokota 2022). It is one product of 16 or 8 features, or of as many rows, with its small
// pieces first; in gradients of half types, which will be rounded to those, the four of a tile. Only TF32 products, far
// more wrong themselves, go on through all features or through a tile. `accumulate` adds one sum per tile of 64 rows to
// g.
#pragma once

#include "ptx.cuh"
#include "shared.cuh"

namespace cacr {

constexpr int kTile = 64;
constexpr int kThreads = 128;
constexpr int kChunkBytes = 128;                // of a row, per pipeline stage
constexpr int kStrideBytes = kChunkBytes + 16;  // of a row in shared memory: ldmatrix then meets every bank once
constexpr int kFragments = kTile / 8;           // of 8 columns
constexpr unsigned kFullWarp = 0xffffffffu;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

CACR_DEVICE float widen(bf16 x) { return ptx::bf16_to_float(x.bits); }
CACR_DEVICE float widen(f16 x) { return ptx::f16_to_float(x.bits); }
CACR_DEVICE float widen(float x) { return x; }
CACR_DEVICE double widen(double x) { return x; }

CACR_DEVICE float exp2_of(float x) { return ptx::exp2_approx(x); }
CACR_DEVICE double exp2_of(double x) { return exp2(x); }

template <class Element>
constexpr int kChunk = kChunkBytes / int(sizeof(Element));  // features of a chunk
template <class Element>
constexpr int kStride = kStrideBytes / int(sizeof(Element));
template <class Element>
using Stages = SharedArray<Element, 2 * kTile * kStride<Element>>;  // [2][64][kStride], double buffer

// ---- sums -----------------------------------------------------------------------------------------------------------
// A sum of many terms with what rounding has taken from it.
template <class Acc>
struct Sum {
  Acc high, low;

  CACR_DEVICE void add(Acc x) {
    const Acc total = high + x, part = total - high;
    low += (high - (total - part)) + (x - part);
    high = total;
  }
  CACR_DEVICE void add(const Sum& x) { add(x.high), low += x.low; }
  CACR_DEVICE void scale(Acc factor) { high *= factor, low *= factor; }
  CACR_DEVICE Acc rounded() const {
    const Acc sum = high + low;
    return sum == sum ? sum : high;
  }
  CACR_DEVICE double value() const {
    const double sum = double(high) + double(low);
    return sum == sum ? sum : double(high);  // infinite: `low` is not a number
  }
};

// The same without.
template <class Acc>
struct PlainSum {
  Acc high;

  CACR_DEVICE void add(Acc x) { high += x; }
  CACR_DEVICE void add(const PlainSum& x) { high += x.high; }
  CACR_DEVICE Acc rounded() const { return high; }
  CACR_DEVICE double value() const { return high; }
};

template <class Total, class Acc>
CACR_DEVICE void add(Total (&to)[4], const Acc (&x)[4]) {
#pragma unroll
  for (int e = 0; e < 4; e++) to[e].add(x[e]);
}
CACR_DEVICE void add(float (&to)[4], const float (&x)[4]) {
#pragma unroll
  for (int e = 0; e < 4; e++) to[e] += x[e];
}

// ---- half types: m16n8k16 -------------------------------------------------------------------------------------------
CACR_DEVICE void mma(bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx::mma_bf16(d, a, b0, b1);
}
CACR_DEVICE void mma(f16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx::mma_f16(d, a, b0, b1);
}
CACR_DEVICE uint32_t pack(bf16, float low, float high) { return ptx::pack_bf16(low, high); }
CACR_DEVICE uint32_t pack(f16, float low, float high) { return ptx::pack_f16(low, high); }

template <class E, int kPieces, bool kIsScaled>
struct HalfArithmetic {
  using Element = E;
  using Acc = float;
  static constexpr int kGradientChunks = 1;       // chunks of a gradient that one block owns
  static constexpr int kColumns = kChunk<E> / 8;  // fragments of a chunk
  static constexpr bool kScaled = kIsScaled;      // coefficients have to be brought into the range of the type
  static constexpr bool kCompensated = false;     // the sum over tiles; a gradient will be rounded to the type
  static constexpr int S = kStride<E>;

  static CACR_DEVICE void product(float (&s)[kFragments][4], Stages<E>& a, int a0, Stages<E>& b, int b0) {
    const int lane = threadIdx.x % 32;
    a0 += lane % 16 * S + lane / 16 * 8;
    b0 += (lane % 8 + lane / 16 * 8) * S + lane / 8 % 2 * 8;
#pragma unroll 2  // with all four k-steps sm_120 spills
    for (int k = 0; k < kChunk<E>; k += 16) {
      uint32_t x[4], y[4];
      ptx::ldmatrix_x4(x, ptx::shared_address(&a[a0 + k]));
#pragma unroll
      for (int n = 0; n < kFragments; n += 2) {
        float sum[2][4] = {};
        ptx::ldmatrix_x4(y, ptx::shared_address(&b[b0 + n * 8 * S + k]));
        mma(E{}, sum[0], x, y[0], y[1]);
        mma(E{}, sum[1], x, y[2], y[3]);
        add(s[n], sum[0]), add(s[n + 1], sum[1]);
      }
    }
  }

  // Takes the next piece of 4 x 2 coefficients off them.
  static CACR_DEVICE void take_piece(uint32_t (&piece)[4], float (&rest)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      piece[i] = pack(E{}, rest[2 * i], rest[2 * i + 1]);
      rest[2 * i] -= widen(E{uint16_t(piece[i])});
      rest[2 * i + 1] -= widen(E{uint16_t(piece[i] >> 16)});
    }
  }

  template <class Total>
  static CACR_DEVICE void accumulate(Total (&g)[kColumns][4], const float (&h)[kFragments][4], Stages<E>& b, int b0) {
    const int lane = threadIdx.x % 32;
    b0 += (lane % 8 + lane / 8 % 2 * 8) * S + lane / 16 * 8;
    uint32_t pieces[kTile / 16][kPieces][4];
#pragma unroll
    for (int k = 0; k < kTile / 16; k++) {  // 16 rows of b
      float rest[8] = {h[2 * k][0],     h[2 * k][1],     h[2 * k][2],     h[2 * k][3],
                       h[2 * k + 1][0], h[2 * k + 1][1], h[2 * k + 1][2], h[2 * k + 1][3]};
#pragma unroll
      for (int i = 0; i < kPieces; i++) take_piece(pieces[k][i], rest);
    }
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      float of_tile[2][4] = {};
#pragma unroll
      for (int k = 0; k < kTile / 16; k++) {
        uint32_t y[4];
        ptx::ldmatrix_x4_trans(y, ptx::shared_address(&b[b0 + k * 16 * S + n * 8]));
#pragma unroll
        for (int i = kPieces - 1; i >= 0; i--) {  // the small ones first
          mma(E{}, of_tile[0], pieces[k][i], y[0], y[1]);
          mma(E{}, of_tile[1], pieces[k][i], y[2], y[3]);
        }
      }
      add(g[n], of_tile[0]), add(g[n + 1], of_tile[1]);
    }
  }
};

using Bf16Arithmetic = HalfArithmetic<bf16, 3, false>;
using F16Arithmetic = HalfArithmetic<f16, 2, true>;

// ---- float on the tensor cores: m16n8k8, rounded to TF32 (kPieces 1) or as sums of two such numbers (2) -------------
template <int kPieces>
struct Tf32Arithmetic {
  using Element = float;
  using Acc = float;
  static constexpr int kGradientChunks = kPieces == 2 ? 1 : 2;  // what fits the registers
  static constexpr int kColumns = kChunk<float> / 8;
  static constexpr bool kScaled = false;
  static constexpr bool kCompensated = kPieces == 2;
  static constexpr int S = kStride<float>;

  template <int kCount>
  static CACR_DEVICE void split(uint32_t (&pieces)[kPieces][kCount], const uint32_t (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const float value = __uint_as_float(x[i]);
      pieces[0][i] = ptx::to_tf32(value);
      if constexpr (kPieces == 2) pieces[1][i] = ptx::to_tf32(value - __uint_as_float(pieces[0][i]));
    }
  }

  // d += a b without the product of both second pieces.
  static CACR_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[kPieces][4], const uint32_t (&b)[kPieces][2]) {
    if constexpr (kPieces == 2) {
      float sum[4] = {};
      ptx::mma_tf32(sum, a[1], b[0][0], b[0][1]);
      ptx::mma_tf32(sum, a[0], b[1][0], b[1][1]);
      ptx::mma_tf32(sum, a[0], b[0][0], b[0][1]);
      add(d, sum);
    } else {
      ptx::mma_tf32(d, a[0], b[0][0], b[0][1]);
    }
  }

  static CACR_DEVICE void product(float (&s)[kFragments][4], Stages<float>& a, int a0, Stages<float>& b, int b0) {
    const int lane = threadIdx.x % 32;
    a0 += lane % 16 * S + lane / 16 * 4;
    b0 += (lane % 8 + lane / 16 * 8) * S + lane / 8 % 2 * 4;
#pragma unroll(kPieces == 2 ? 1 : 4)
    for (int k = 0; k < kChunk<float>; k += 8) {
      uint32_t x[4], y[4], a_pieces[kPieces][4], b_pieces[kPieces][2];
      ptx::ldmatrix_x4(x, ptx::shared_address(&a[a0 + k]));
      split(a_pieces, x);
#pragma unroll
      for (int n = 0; n < kFragments; n += 2) {
        ptx::ldmatrix_x4(y, ptx::shared_address(&b[b0 + n * 8 * S + k]));
        split(b_pieces, {y[0], y[1]});
        multiply(s[n], a_pieces, b_pieces);
        split(b_pieces, {y[2], y[3]});
        multiply(s[n + 1], a_pieces, b_pieces);
      }
    }
  }

  // The order of the 8 rows of b in a product is free: those of columns 2 quad and 2 quad + 1 of h, which a thread has.
  template <class Total>
  static CACR_DEVICE void accumulate(Total (&g)[kColumns][4], const float (&h)[kFragments][4], Stages<float>& b,
                                     int b0) {
    const int lane = threadIdx.x % 32;
    b0 += lane % 4 * 2 * S + lane / 4;
    constexpr int kTogether = kPieces == 2 ? kColumns / 2 : kColumns;  // sums of all columns do not fit the registers
#pragma unroll
    for (int first = 0; first < kColumns; first += kTogether) {
      float of_tile[kTogether][4] = {};
#pragma unroll
      for (int k = 0; k < kFragments; k++) {  // 8 rows of b
        ptx::read_no_further();
        uint32_t a_pieces[kPieces][4], b_pieces[kPieces][2];
        split(a_pieces,
              {__float_as_uint(h[k][0]), __float_as_uint(h[k][2]), __float_as_uint(h[k][1]), __float_as_uint(h[k][3])});
#pragma unroll
        for (int n = 0; n < kTogether; n++) {
          const int at = b0 + k * 8 * S + (first + n) * 8;
          split(b_pieces, {__float_as_uint(b[at]), __float_as_uint(b[at + S])});
          multiply(of_tile[n], a_pieces, b_pieces);
        }
      }
#pragma unroll
      for (int n = 0; n < kTogether; n++) add(g[first + n], of_tile[n]);
    }
  }
};

// ---- IEEE float and double on the ordinary units --------------------------------------------------------------------
// Operands that the lanes of a row or column share are read once for all of them, so that 18 reads of 16 bytes feed 32
// times as many multiplications as a read holds numbers.
template <class T>
struct IeeeArithmetic {
  using Element = T;
  using Acc = T;
  static constexpr int kGradientChunks = sizeof(T) == 8 ? 1 : 2;  // two of double do not fit the registers
  static constexpr int kColumns = kChunk<T> / 8;
  static constexpr bool kScaled = false;
  static constexpr bool kCompensated = sizeof(T) == 4;
  static constexpr int S = kStride<T>, kVector = 16 / int(sizeof(T));

  struct alignas(16) Vector {
    T x[kVector];
  };
  struct alignas(2 * sizeof(T)) Two {
    T x[2];
  };

  template <class V>
  static CACR_DEVICE V read(Stages<T>& from, int at) {
    return *reinterpret_cast<const V*>(&from[at]);
  }

  static CACR_DEVICE void product(T (&s)[kFragments][4], Stages<T>& a, int a0, Stages<T>& b, int b0) {
    const int lane = threadIdx.x % 32;
    a0 += lane / 4 * S;
    b0 += lane % 4 * 2 * S;
#pragma unroll 1
    for (int k = 0; k < kChunk<T>; k += kVector) {
      const Vector low = read<Vector>(a, a0 + k), high = read<Vector>(a, a0 + 8 * S + k);
#pragma unroll
      for (int n = 0; n < kFragments; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const Vector y = read<Vector>(b, b0 + (8 * n + e) * S + k);
#pragma unroll
          for (int i = 0; i < kVector; i++) {
            s[n][e] += low.x[i] * y.x[i];
            s[n][2 + e] += high.x[i] * y.x[i];
          }
        }
      }
    }
  }

  template <class Total>
  static CACR_DEVICE void accumulate(Total (&g)[kColumns][4], const T (&h)[kFragments][4], Stages<T>& b, int b0) {
    const int lane = threadIdx.x % 32;
    b0 += lane % 4 * 2;
    T of_tile[kColumns][4] = {};
#pragma unroll
    for (int k = 0; k < kFragments; k++) {
#pragma unroll 1
      for (int quad = 0; quad < 4; quad++) {  // which lane of each four has the columns of h that are multiplied
#pragma unroll
        for (int column = 0; column < 2; column++) {
          const T low = __shfl_sync(kFullWarp, h[k][column], quad, 4);
          const T high = __shfl_sync(kFullWarp, h[k][2 + column], quad, 4);
#pragma unroll
          for (int n = 0; n < kColumns; n++) {
            const Two y = read<Two>(b, b0 + (8 * k + 2 * quad + column) * S + 8 * n);
#pragma unroll
            for (int e = 0; e < 2; e++) of_tile[n][e] += low * y.x[e], of_tile[n][2 + e] += high * y.x[e];
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns; n++) add(g[n], of_tile[n]);
  }
};

}  // namespace cacr
