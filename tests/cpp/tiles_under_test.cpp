// csrc/cpu/kernels/tile_bf16.h as a function, compiled once with tile instructions and once without.
#include "../../csrc/cpu/kernels/tile_bf16.h"

namespace cacr::CACR_ISA {

// C (+)= A B. C is given where `add`, else it starts at zero.
void multiply(bool add, const Bf16* A, idx lda, const Bf16* B, float* C, idx ldc) {
  const TileConfig config;
  TileProduct product;
  add ? product.load(C, ldc) : product.zero();
  product.add(A, lda, B);
  product.store(C, ldc);
}

}  // namespace cacr::CACR_ISA
