// csrc/cpu/kernels/tile_bf16.h as a function, compiled with the instructions of a processor and without.
#include "../../csrc/cpu/kernels/tile_bf16.h"

namespace cacr::CACR_ISA {

// C (+)= sum_s A_s B_s: C is given where `add`, else it starts at zero; the columns of A_s and the rows of B_s are
// 32 on from those of the step before.
void multiply(bool add, idx steps, const Bf16* A, idx lda, const Bf16* B, float* C, idx ldc) {
  const TileConfig config;
  multiply_tiles(add, {steps, A, kTile, lda, B, kTile * kTile}, C, ldc);
}

}  // namespace cacr::CACR_ISA
