// Matrix products of one tile (layout.cuh), for each kind of arithmetic:
//
//   product     s += a b^T       a, b: 64 rows of one chunk of features
//   accumulate  g += h b         h: a tile of coefficients, b: 64 rows of one chunk; g: 64 rows of one chunk
//
// An arithmetic names its types, `Element` of the rows and `Acc` of sums and gradients, and its constants:
//
//   kGradientChunks  chunks of a gradient that one block holds in registers
//   kChunkFragments  fragments of 8 features in a chunk
//   kScaled          whether coefficients have to be brought into the range of the element type
//   kCompensated     whether sums over tiles are compensated (numbers.cuh)
//
// h keeps the accuracy of float32 where the inputs are half types: it is split into pieces whose sum it is.
//
// Tensor cores truncate their sums (Fasi et al. 2021): in a chain of mma the error grows with its length, always
// towards zero. So a chain begins with zeros and is short, and its result is added by ordinary instructions, which
// round to nearest (Ootomo, Yokota 2022). A chain covers 16 or 8 features, or as many rows, small pieces first; in
// gradients of half types, which will be rounded to those, the four groups of 16 rows of a tile. TF32 products have
// larger errors themselves: there a chain goes on through all features or through a tile. `accumulate` adds one sum per
// tile of 64 rows to g.
#pragma once

#include "layout.cuh"
#include "numbers.cuh"

namespace cacr {

// ---- half types: m16n8k16 -------------------------------------------------------------------------------------------
CACR_DEVICE void mma(bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx::mma_bf16(d, a, b0, b1);
}
CACR_DEVICE void mma(f16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx::mma_f16(d, a, b0, b1);
}
CACR_DEVICE uint32_t pack(bf16, float low, float high) { return ptx::pack_bf16(low, high); }
CACR_DEVICE uint32_t pack(f16, float low, float high) { return ptx::pack_f16(low, high); }

template <class Half, int kPieces, bool kIsScaled>
struct HalfArithmetic {
  using Element = Half;
  using Acc = float;
  static constexpr int kGradientChunks = 1;
  static constexpr int kChunkFragments = kChunk<Half> / 8;
  static constexpr bool kScaled = kIsScaled;
  static constexpr bool kCompensated = false;  // a gradient will be rounded to the element type
  static constexpr int S = kStride<Half>;

  static CACR_DEVICE void product(float (&s)[kFragments][4], Stages<Half>& a, int a0, Stages<Half>& b, int b0) {
    const int lane = threadIdx.x % 32;
    a0 += lane % 16 * S + lane / 16 * 8;
    b0 += (lane % 8 + lane / 16 * 8) * S + lane / 8 % 2 * 8;
#pragma unroll 2  // with all four k-steps sm_120 spills
    for (int k = 0; k < kChunk<Half>; k += 16) {
      uint32_t x[4], y[4];
      ptx::ldmatrix_x4(x, ptx::shared_address(&a[a0 + k]));
#pragma unroll
      for (int n = 0; n < kFragments; n += 2) {
        float sum[2][4] = {};
        ptx::ldmatrix_x4(y, ptx::shared_address(&b[b0 + n * 8 * S + k]));
        mma(Half{}, sum[0], x, y[0], y[1]);
        mma(Half{}, sum[1], x, y[2], y[3]);
        add(s[n], sum[0]), add(s[n + 1], sum[1]);
      }
    }
  }

  // Rounds 4 x 2 coefficients to the element type, into `piece`, and subtracts the rounded values from them.
  static CACR_DEVICE void take_piece(uint32_t (&piece)[4], float (&rest)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      piece[i] = pack(Half{}, rest[2 * i], rest[2 * i + 1]);
      rest[2 * i] -= widen(Half{uint16_t(piece[i])});
      rest[2 * i + 1] -= widen(Half{uint16_t(piece[i] >> 16)});
    }
  }

  template <class Total>
  static CACR_DEVICE void accumulate(Total (&g)[kChunkFragments][4], const float (&h)[kFragments][4], Stages<Half>& b,
                                     int b0) {
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
    for (int n = 0; n < kChunkFragments; n += 2) {
      float of_tile[2][4] = {};
#pragma unroll
      for (int k = 0; k < kTile / 16; k++) {
        uint32_t y[4];
        ptx::ldmatrix_x4_trans(y, ptx::shared_address(&b[b0 + k * 16 * S + n * 8]));
#pragma unroll
        for (int i = kPieces - 1; i >= 0; i--) {  // the small ones first
          mma(Half{}, of_tile[0], pieces[k][i], y[0], y[1]);
          mma(Half{}, of_tile[1], pieces[k][i], y[2], y[3]);
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
  static constexpr int kChunkFragments = kChunk<float> / 8;
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

  // d += a b. The product of the two second pieces is left out: it lies below the accuracy of the others.
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

  // A product adds up 8 rows of b, in any order: a thread takes rows 2 quad and 2 quad + 1, whose coefficients it has.
  template <class Total>
  static CACR_DEVICE void accumulate(Total (&g)[kChunkFragments][4], const float (&h)[kFragments][4], Stages<float>& b,
                                     int b0) {
    const int lane = threadIdx.x % 32;
    b0 += lane % 4 * 2 * S + lane / 4;
    constexpr int kTogether =
        kPieces == 2 ? kChunkFragments / 2 : kChunkFragments;  // sums of all columns do not fit the registers
#pragma unroll
    for (int first = 0; first < kChunkFragments; first += kTogether) {
      float of_tile[kTogether][4] = {};
#pragma unroll
      for (int k = 0; k < kFragments; k++) {  // 8 rows of b
        ptx::keep_reads_below();
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
// The lanes of a row or column read the same operand at once. 18 reads of 16 bytes, of n numbers each, feed 32 n
// multiplications.
template <class T>
struct IeeeArithmetic {
  using Element = T;
  using Acc = T;
  static constexpr int kGradientChunks = sizeof(T) == 8 ? 1 : 2;  // two of double do not fit the registers
  static constexpr int kChunkFragments = kChunk<T> / 8;
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
  static CACR_DEVICE void accumulate(Total (&g)[kChunkFragments][4], const T (&h)[kFragments][4], Stages<T>& b,
                                     int b0) {
    const int lane = threadIdx.x % 32;
    b0 += lane % 4 * 2;
    T of_tile[kChunkFragments][4] = {};
#pragma unroll
    for (int k = 0; k < kFragments; k++) {
#pragma unroll 1
      for (int quad = 0; quad < 4; quad++) {  // the lane of each four that holds the columns of h
#pragma unroll
        for (int column = 0; column < 2; column++) {
          const T low = __shfl_sync(kFullWarp, h[k][column], quad, 4);
          const T high = __shfl_sync(kFullWarp, h[k][2 + column], quad, 4);
#pragma unroll
          for (int n = 0; n < kChunkFragments; n++) {
            const Two y = read<Two>(b, b0 + (8 * k + 2 * quad + column) * S + 8 * n);
#pragma unroll
            for (int e = 0; e < 2; e++) of_tile[n][e] += low * y.x[e], of_tile[n][2 + e] += high * y.x[e];
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kChunkFragments; n++) add(g[n], of_tile[n]);
  }
};

}  // namespace cacr
