// One source, compiled for several instruction sets, chosen at run time.
//
// BSGAP_ISA=generic, avx2 or avx512 keeps from using more than that, so that one machine tests all tiles; it
// is read once.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

// -DBSGAP_PORTABLE leaves the code of processors that are no x86, which is how the tests reach it.
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__)) && !defined(BSGAP_PORTABLE)
#define BSGAP_X86_DISPATCH 1
#if defined(__clang__)  // takes the width from the vectors, and would ignore all of an attribute with this
                        // word
#define BSGAP_WIDE
#else
#define BSGAP_WIDE ",prefer-vector-width=512"
#endif
#define BSGAP_AVX512 __attribute__((target("avx512f,avx512dq,fma" BSGAP_WIDE)))
#define BSGAP_AVX2 __attribute__((target("avx2,fma")))
#else
#define BSGAP_X86_DISPATCH 0
#endif

namespace bsgap {

enum class Isa { kGeneric, kAvx2, kAvx512 };
inline constexpr const char* kIsaNames[] = {"generic", "avx2", "avx512"};

namespace detail {

inline Isa best_instruction_set() {
#if BSGAP_X86_DISPATCH
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

// The most that the environment allows; throws for a word it does not know.
inline Isa allowed_instruction_set() {
  const char* word = std::getenv("BSGAP_ISA");
  if (!word || !*word) return Isa::kAvx512;
  for (const Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512})
    if (std::string(word) == kIsaNames[static_cast<int>(isa)]) return isa;
  throw std::invalid_argument("BSGAP_ISA must be generic, avx2 or avx512, got '" + std::string(word) + "'");
}

}  // namespace detail

inline Isa instruction_set() {
  static const Isa isa = std::min(detail::allowed_instruction_set(), detail::best_instruction_set());
  return isa;
}

inline const char* instruction_set_name() { return kIsaNames[static_cast<int>(instruction_set())]; }

}  // namespace bsgap

// Defines `name(parameters)` from an always-inlined `name_body(parameters)`: the body compiled once for
// each instruction set and the call sent to the one this processor has. BSGAP_PER_ISA_TEMPLATE does so for
// a template, whose parameters stand in parentheses: (class T, int kWidth). BSGAP_PER_ISA_WIDTH does so where
// the body is a template of the bytes of a vector register: name_body<64>, <32>, <16>.
#define BSGAP_PER_ISA(result, name, parameters, arguments) \
  BSGAP_PER_ISA_HEADED(, BSGAP_ANY_WIDTH, result, name, parameters, arguments)
#define BSGAP_PER_ISA_TEMPLATE(head, result, name, parameters, arguments) \
  BSGAP_PER_ISA_HEADED(template <BSGAP_UNWRAP head>, BSGAP_ANY_WIDTH, result, name, parameters, arguments)
#define BSGAP_PER_ISA_WIDTH(result, name, parameters, arguments) \
  BSGAP_PER_ISA_HEADED(, BSGAP_OF_WIDTH, result, name, parameters, arguments)
#define BSGAP_UNWRAP(...) __VA_ARGS__
#define BSGAP_ANY_WIDTH(bytes)
#define BSGAP_OF_WIDTH(bytes) <bytes>
#if BSGAP_X86_DISPATCH
#define BSGAP_PER_ISA_HEADED(head, width, result, name, parameters, arguments)                         \
  head BSGAP_AVX512 inline result name##_avx512 parameters { return name##_body width(64) arguments; } \
  head BSGAP_AVX2 inline result name##_avx2 parameters { return name##_body width(32) arguments; }     \
  head inline result name##_generic parameters { return name##_body width(16) arguments; }             \
  head inline result name parameters {                                                                 \
    static const Isa isa = instruction_set();                                                          \
    if (isa == Isa::kAvx512) return name##_avx512 arguments;                                           \
    if (isa == Isa::kAvx2) return name##_avx2 arguments;                                               \
    return name##_generic arguments;                                                                   \
  }
#else
#define BSGAP_PER_ISA_HEADED(head, width, result, name, parameters, arguments) \
  head inline result name parameters { return name##_body width(16) arguments; }
#endif
