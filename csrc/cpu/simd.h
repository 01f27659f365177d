// SIMD by the compiler: the same portable loop is compiled for several instruction sets, and the widest that the machine
// has is picked at run time. The build turns contraction into fused multiply-adds off, so that all give the same bits.
#pragma once

#include "../philox.h"

namespace ralu::cpu {

#if defined(__x86_64__) && defined(__GNUC__)

#define RALU_BODY __attribute__((always_inline))

enum class Isa { portable, avx2, avx512 };

inline Isa best_isa() {
  static const Isa best = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                              ? Isa::avx512
                          : __builtin_cpu_supports("avx2") ? Isa::avx2
                                                           : Isa::portable;
  return best;
}

template <class F>
void run_portable(const F& f) {
  f();
}

template <class F>
__attribute__((target("avx2"))) void run_avx2(const F& f) {
  f();
}

template <class F>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void run_avx512(const F& f) {
  f();
}

// Runs f(), a lambda marked RALU_BODY whose callees are all RALU_INLINE, compiled for `isa`.
template <class F>
void vectorized(const F& f, Isa isa = best_isa()) {
  switch (isa) {
    case Isa::avx512: return run_avx512(f);
    case Isa::avx2: return run_avx2(f);
    default: return run_portable(f);
  }
}

#else  // one instruction set: on ARM NEON is always there

#define RALU_BODY

enum class Isa { portable };

inline Isa best_isa() { return Isa::portable; }

template <class F>
void vectorized(const F& f, Isa = Isa::portable) {
  f();
}

#endif

// ---- element types, as bits: conversions that vectorise and round to the nearest even ----

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

RALU_INLINE float to_float(float x) { return x; }

RALU_INLINE float to_float(BFloat16 x) { return float_of(static_cast<int32_t>(static_cast<uint32_t>(x.bits) << 16)); }

RALU_INLINE float to_float(Half x) {
  const uint32_t magnitude = x.bits & 0x7FFFu, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  // Shifted, the exponent is 112 too small; the product also makes subnormals normal. Infinity and NaN keep theirs.
  const uint32_t scaled = bits_of(float_of(magnitude << 13) * 5.192296858534828e33f);  // 2^112
  const uint32_t special = (magnitude << 13) | 0x7F800000u;
  return float_of(sign | (magnitude >= 0x7C00u ? special : scaled));
}

template <class T>
RALU_INLINE T from_float(float x);

template <>
RALU_INLINE float from_float<float>(float x) {
  return x;
}

template <>
RALU_INLINE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return {static_cast<uint16_t>((nan ? bits | 0x00400000u : rounded) >> 16)};
}

template <>
RALU_INLINE Half from_float<Half>(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu, sign = (bits >> 16) & 0x8000u;
  // Normal: drop 13 bits of the mantissa, and 112 of the exponent. Subnormal: let an addition do the shift.
  const uint32_t normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return {static_cast<uint16_t>(sign | (magnitude >= 0x477FF000u ? special : finite))};
}

}  // namespace ralu::cpu
