// One source, compiled for several instruction sets, chosen at run time.
#pragma once

// -DBSGAP_PORTABLE leaves the code of processors that are no x86, which is how the tests reach it.
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__)) && !defined(BSGAP_PORTABLE)
#define BSGAP_X86_DISPATCH 1
#define BSGAP_AVX512 __attribute__((target("avx512f,avx512dq,fma,prefer-vector-width=512")))
#define BSGAP_AVX2 __attribute__((target("avx2,fma")))
#else
#define BSGAP_X86_DISPATCH 0
#endif

namespace bsgap {

enum class Isa { kGeneric, kAvx2, kAvx512 };

inline Isa instruction_set() {
#if BSGAP_X86_DISPATCH
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

inline const char* instruction_set_name() {
  const Isa isa = instruction_set();
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "generic";
}

}  // namespace bsgap

// Defines `name(parameters)` from an always-inlined `name_body(parameters)`: the body compiled once for
// each instruction set and the call sent to the one this processor has. BSGAP_PER_ISA_TEMPLATE does so for
// a template, whose parameters stand in parentheses: (class T, int kWidth).
#define BSGAP_PER_ISA(result, name, parameters, arguments) \
  BSGAP_PER_ISA_HEADED(, result, name, parameters, arguments)
#define BSGAP_PER_ISA_TEMPLATE(head, result, name, parameters, arguments) \
  BSGAP_PER_ISA_HEADED(template <BSGAP_UNWRAP head>, result, name, parameters, arguments)
#define BSGAP_UNWRAP(...) __VA_ARGS__
#if BSGAP_X86_DISPATCH
#define BSGAP_PER_ISA_HEADED(head, result, name, parameters, arguments)                      \
  head BSGAP_AVX512 inline result name##_avx512 parameters { return name##_body arguments; } \
  head BSGAP_AVX2 inline result name##_avx2 parameters { return name##_body arguments; }     \
  head inline result name##_generic parameters { return name##_body arguments; }             \
  head inline result name parameters {                                                       \
    static const Isa isa = instruction_set();                                                \
    if (isa == Isa::kAvx512) return name##_avx512 arguments;                                 \
    if (isa == Isa::kAvx2) return name##_avx2 arguments;                                     \
    return name##_generic arguments;                                                         \
  }
#else
#define BSGAP_PER_ISA_HEADED(head, result, name, parameters, arguments) \
  head inline result name parameters { return name##_body arguments; }
#endif
