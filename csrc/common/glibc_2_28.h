// Included before every source: what a newer Linux compiles loads with glibc 2.28 and the libstdc++ of GCC 8 (RHEL 8,
// the manylinux_2_28 tag of wheels). setup.py gives a wheel that tag if the libraries ask for nothing newer.
#pragma once

#if defined(__linux__) && defined(__has_include)
#if __has_include(<features.h>)
#include <features.h>
#endif
#endif

#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))
#include <new>

// Streams and strings are compiled here and not taken from a newer libstdc++. Its first header, which <new> includes,
// says otherwise.
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0

// glibc 2.29 gave these functions new names for a change in errno, which nobody here reads.
#if defined(__x86_64__)
#define CACR_OLD_NAME(function) __asm__(".symver " #function ", " #function "@GLIBC_2.2.5")
#else
#define CACR_OLD_NAME(function) __asm__(".symver " #function ", " #function "@GLIBC_2.17")
#endif
CACR_OLD_NAME(exp);
CACR_OLD_NAME(exp2);
CACR_OLD_NAME(log);
CACR_OLD_NAME(log2);
CACR_OLD_NAME(pow);
#undef CACR_OLD_NAME

// glibc 2.32 says with this variable whether a process has one thread; 0: it may have more.
extern "C" __attribute__((weak, visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

// GCC 11 moved this out of its headers.
namespace std {
__attribute__((weak, visibility("hidden"), noreturn)) void __throw_bad_array_new_length();
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
#endif
