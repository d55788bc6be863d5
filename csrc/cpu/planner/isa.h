// Instruction sets: which were compiled, which one runs.
#pragma once

#include "../kernels/params.h"

namespace cacr {

template <class T>
const Kernels<T>& kernels();  // of the active instruction set

}  // namespace cacr

// Strings live as long as the library.
extern "C" {
const char* cacr_cpu_compiled_isas();  // comma separated, the best first
const char* cacr_cpu_failed_isas();    // comma separated: this processor has them, but they did not pass their check
const char* cacr_cpu_active_isa();  // chosen at first use: the best that this processor has and that passes its check
const char*
cacr_cpu_isa_error();  // empty, or why the one asked for by the environment variable CACR_CPU_ISA is not used
}
