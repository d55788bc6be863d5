// Chooses the instruction set once, at first use.
#include "isa.h"

#include <string>

#include "amx.h"
#include "self_check.h"
#ifdef __x86_64__
#include <cpuid.h>
#endif

#define CACR_DECLARE(isa)                      \
  namespace isa {                              \
  extern const Kernels<float> kernels_float;   \
  extern const Kernels<double> kernels_double; \
  }

namespace cacr {

CACR_DECLARE(portable)
#ifdef CACR_HAVE_AVX2
CACR_DECLARE(avx2)
#endif
#ifdef CACR_HAVE_AVX512
CACR_DECLARE(avx512)
#endif
#ifdef CACR_HAVE_AVX512_BF16
CACR_DECLARE(avx512_bf16)
#endif
#ifdef CACR_HAVE_AMX
CACR_DECLARE(amx)
#endif

namespace {

#ifdef __x86_64__
// The compiler's own test for it is unknown to clang before 19.
[[maybe_unused]] bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

[[maybe_unused]] bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Asked of the processor: compilers do not agree on the name of its feature.
[[maybe_unused]] bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}
#endif

struct Isa {
  const char* name;
  const Kernels<float>* f32;
  const Kernels<double>* f64;
  bool (*supported)();
  bool checked;        // must agree with the portable kernels before it is used
  bool (*worth_it)();  // null: always; else it is used if asked for, too
};

// The best first.
const Isa kIsas[] = {
#ifdef CACR_HAVE_AMX
    {"amx", &amx::kernels_float, &avx512::kernels_double, [] { return has_avx512() && may_use_amx(); }, true, nullptr},
#endif
#ifdef CACR_HAVE_AVX512_BF16
    // Intel's processors make half as many products of bfloat16 with it as of float32 without.
    {"avx512_bf16", &avx512_bf16::kernels_float, &avx512::kernels_double, has_avx512_bf16, true,
     [] { return bool(__builtin_cpu_is("amd")); }},
#endif
#ifdef CACR_HAVE_AVX512
    {"avx512", &avx512::kernels_float, &avx512::kernels_double, has_avx512, true, nullptr},
#endif
#ifdef CACR_HAVE_AVX2
    {"avx2", &avx2::kernels_float, &avx2::kernels_double,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }, false, nullptr},
#endif
    {"portable", &portable::kernels_float, &portable::kernels_double, [] { return true; }, false, nullptr},
};

void append(std::string& names, const char* name) {
  if (!names.empty()) names += ',';
  names += name;
}

bool works(const Isa& isa) {
  return !isa.checked || (self_check_passes(*isa.f32, portable::kernels_float, 37, 19) &&
                          self_check_passes(*isa.f64, portable::kernels_double, 37, 19));
}

struct Choice {
  const Isa* isa = nullptr;
  std::string error, failed;

  Choice() {
    const char* asked = std::getenv("CACR_CPU_ISA");
    if (asked && *asked) {
      error = std::string("CACR_CPU_ISA=") + asked + " names no compiled instruction set (" + cacr_cpu_compiled_isas() +
              ")";
      for (const Isa& i : kIsas) {
        if (std::string(i.name) != asked) continue;
        if (!i.supported())
          error = std::string("CACR_CPU_ISA=") + asked + ": this processor does not have it";
        else if (!works(i))
          error = std::string("CACR_CPU_ISA=") + asked + ": its kernels disagree with the portable ones here";
        else
          error.clear(), isa = &i;
      }
    }
    for (const Isa& i : kIsas) {
      if (isa || !i.supported() || (i.worth_it && !i.worth_it())) continue;
      if (works(i))
        isa = &i;
      else
        append(failed, i.name);
    }
  }
};

const Choice& choice() {
  static const Choice c;
  return c;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return *choice().isa->f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return *choice().isa->f64;
}

}  // namespace cacr

#define CACR_EXPORT extern "C" __attribute__((visibility("default")))

CACR_EXPORT const char* cacr_cpu_compiled_isas() {
  static const std::string names = [] {
    std::string s;
    for (const cacr::Isa& i : cacr::kIsas) cacr::append(s, i.name);
    return s;
  }();
  return names.c_str();
}
CACR_EXPORT const char* cacr_cpu_active_isa() { return cacr::choice().isa->name; }
CACR_EXPORT const char* cacr_cpu_failed_isas() { return cacr::choice().failed.c_str(); }
CACR_EXPORT const char* cacr_cpu_isa_error() { return cacr::choice().error.c_str(); }
