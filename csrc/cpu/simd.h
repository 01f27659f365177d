// SIMD by the compiler: the same portable loop is compiled for several instruction sets, and the widest that the machine
// has is picked at run time. They agree to rounding: only some have fused multiply-adds.
// One loop is written by hand, Philox: compilers spend half their instructions on the halves of its 64-bit products.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "../philox.h"

namespace ralu::cpu {

#if defined(__x86_64__) && defined(__GNUC__)

#define RALU_BODY __attribute__((always_inline))

enum class Isa { portable, avx2, avx512 };

inline Isa best_isa() {
  static const Isa best = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                              ? Isa::avx512
                          : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2
                                                                                            : Isa::portable;
  return best;
}

template <class F>
void run_portable(const F& f) {
  f(Isa::portable);
}

template <class F>
__attribute__((target("avx2,fma"))) void run_avx2(const F& f) {
  f(Isa::avx2);
}

template <class F>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void run_avx512(const F& f) {
  f(Isa::avx512);
}

// Runs f(isa), a lambda marked RALU_BODY whose callees are all RALU_INLINE, compiled for `isa`.
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
void vectorized(const F& f, Isa isa = Isa::portable) {
  f(isa);
}

#endif

// ---- random words ----

constexpr int32_t RUN = 256;  // values at a time: what is kept between loops stays in the first-level cache

struct Consecutive {
  uint32_t element[RUN];

  constexpr Consecutive() : element{} {
    for (int32_t i = 0; i < RUN; ++i) element[i] = i;
  }
};

inline constexpr Consecutive CONSECUTIVE;

struct Run {
  uint32_t w0[RUN], w1[RUN], w2[RUN], w3[RUN];
  float radius0[RUN], radius1[RUN];

  RALU_INLINE Polar operator[](int32_t i) const { return {radius0[i], radius1[i], w1[i], w3[i]}; }
};

inline void philox_portable(uint64_t key, const uint32_t* element, uint32_t offset, uint32_t stage, uint32_t kind,
                            int32_t count, Run& words) {
  for (int32_t i = 0; i < count; ++i) {
    const Words w = philox(key, element[i] + offset, stage, kind);
    words.w0[i] = w.w0, words.w1[i] = w.w1, words.w2[i] = w.w2, words.w3[i] = w.w3;
  }
}

#if defined(__x86_64__) && defined(__GNUC__)

// Two counters share a 64-bit lane: the one with an even index is worked on in place, the odd one shifted down. Only the
// low halves are multiplied, so what gathers in the high halves is of no account until the end. Unrolled, the compiler
// sees that half of the first two rounds is the same for all counters.
#define RALU_PHILOX(NAME, TARGET, BYTES, MULTIPLY)                                                             \
  inline __attribute__((target(TARGET))) void NAME(uint64_t key, const uint32_t* element, uint32_t offset,     \
                                                   uint32_t stage, uint32_t kind, int32_t count, Run& words) { \
    typedef uint64_t V __attribute__((vector_size(BYTES)));                                                    \
    typedef uint32_t V32 __attribute__((vector_size(BYTES), aligned(4), may_alias));                           \
    const V a = V{} + 0xD2511F53u, b = V{} + 0xCD9E8D57u;                                                      \
    const uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);                     \
    for (int32_t i = 0; i < count; i += BYTES / 4) {                                                           \
      const V pair = (V)(*(const V32*)(element + i) + offset);                                                 \
      V c[2][4] = {{pair, V{} + stage, V{} + kind, V{}}, {pair >> 32, V{} + stage, V{} + kind, V{}}};          \
      _Pragma("GCC unroll 10") for (uint32_t round = 0; round < 10; ++round) {                                 \
        for (auto& x : c) {                                                                                    \
          const V pa = (V)MULTIPLY(a, x[0]), pb = (V)MULTIPLY(b, x[2]);                                        \
          x[0] = (pb >> 32) ^ x[1] ^ (k0 + round * 0x9E3779B9u), x[1] = pb;                                    \
          x[2] = (pa >> 32) ^ x[3] ^ (k1 + round * 0xBB67AE85u), x[3] = pa;                                    \
        }                                                                                                      \
      }                                                                                                        \
      uint32_t* out[4] = {words.w0, words.w1, words.w2, words.w3};                                             \
      for (int w = 0; w < 4; ++w) *(V32*)(out[w] + i) = (V32)((c[0][w] & 0xFFFFFFFFu) | (c[1][w] << 32));      \
    }                                                                                                          \
  }
#define RALU_MULTIPLY_256(x, y) _mm256_mul_epu32((__m256i)(x), (__m256i)(y))
#define RALU_MULTIPLY_512(x, y) _mm512_mul_epu32((__m512i)(x), (__m512i)(y))
RALU_PHILOX(philox_avx2, "avx2", 32, RALU_MULTIPLY_256)
RALU_PHILOX(philox_avx512, "avx512f", 64, RALU_MULTIPLY_512)

#endif

inline void philox_words(Isa isa, uint64_t key, const uint32_t* element, uint32_t offset, uint32_t stage, uint32_t kind,
                         int32_t count, Run& words) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa == Isa::avx512) return philox_avx512(key, element, offset, stage, kind, count, words);
  if (isa == Isa::avx2) return philox_avx2(key, element, offset, stage, kind, count, words);
#endif
  philox_portable(key, element, offset, stage, kind, count, words);
}

// The words of the counters (element[i] + offset, stage, kind, 0), and the radii, of which a loop of their own has more
// under way at once than one that goes on to the normals. count is a multiple of 16 and at most RUN.
RALU_INLINE void philox_run(Isa isa, uint64_t key, const uint32_t* element, uint32_t offset, uint32_t stage,
                            uint32_t kind, int32_t count, Run& words) {
  philox_words(isa, key, element, offset, stage, kind, count, words);
  for (int32_t i = 0; i < count; ++i) {
    words.radius0[i] = radius(words.w0[i]);
    words.radius1[i] = radius(words.w2[i]);
  }
}

// Asks for a row that is written only after its random numbers are made.
template <class T>
RALU_INLINE void prefetch(const T* row, int64_t count) {
#ifdef __GNUC__
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(row + i, 1);
#endif
}

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
