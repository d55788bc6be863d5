// A stand-in for the CUDA execution model: csrc/cuda/platform.cuh includes it where nvcc does not compile.
#pragma once

#include "builtins.h"
