// Random numbers for host and device: Philox-4x32-10 and Box-Muller, the stream of triton.language.randn4x.
//
// Branch-free float32 arithmetic that compilers turn into SIMD, the same code on every side: no table and, on a GPU, no
// local memory for the reduction of huge angles.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define RALU_INLINE __host__ __device__ __forceinline__
#else
#define RALU_INLINE inline __attribute__((always_inline))
#endif

namespace ralu {

// What a counter's third word says: its four normals are the children of an element, or of four kept channels.
constexpr uint32_t UPSAMPLED = 0, KEPT = 1;

struct Words {
  uint32_t w0, w1, w2, w3;
};

// Box-Muller halfway: the radii and, still as words, the angles of two pairs of normals.
struct Polar {
  float radius0, radius1;
  uint32_t angle0, angle1;
};

struct Normals {
  float n0, n1, n2, n3;
};

RALU_INLINE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

RALU_INLINE Words philox_round(Words c, uint32_t k0, uint32_t k1) {
  constexpr uint32_t A = 0xD2511F53, B = 0xCD9E8D57;
#ifdef __CUDA_ARCH__
  // nvcc makes one instruction of each of these, and does not see that two products below are the halves of one.
  const uint64_t a = static_cast<uint64_t>(A) * c.w0, b = static_cast<uint64_t>(B) * c.w2;
  return {static_cast<uint32_t>(b >> 32) ^ c.w1 ^ k0, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.w3 ^ k1, static_cast<uint32_t>(a)};
#else
  return {multiply_high(B, c.w2) ^ c.w1 ^ k0, B * c.w2, multiply_high(A, c.w0) ^ c.w3 ^ k1, A * c.w0};
#endif
}

// Philox-4x32-10 (Salmon et al., SC 2011) of the counter (c0, c1, c2, 0); the key's low word comes first.
RALU_INLINE Words philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2) {
  constexpr uint32_t A = 0x9E3779B9, B = 0xBB67AE85;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  Words c{c0, c1, c2, 0};
  // Written out: a loop that is unrolled late keeps the caller's loop from being vectorised.
  c = philox_round(c, k0, k1);
  c = philox_round(c, k0 + 1 * A, k1 + 1 * B);
  c = philox_round(c, k0 + 2 * A, k1 + 2 * B);
  c = philox_round(c, k0 + 3 * A, k1 + 3 * B);
  c = philox_round(c, k0 + 4 * A, k1 + 4 * B);
  c = philox_round(c, k0 + 5 * A, k1 + 5 * B);
  c = philox_round(c, k0 + 6 * A, k1 + 6 * B);
  c = philox_round(c, k0 + 7 * A, k1 + 7 * B);
  c = philox_round(c, k0 + 8 * A, k1 + 8 * B);
  return philox_round(c, k0 + 9 * A, k1 + 9 * B);
}

RALU_INLINE int32_t fold(uint32_t word) {
  const int32_t x = static_cast<int32_t>(word);
  return x ^ (x >> 31);
}

// [0, 1], by the rule of triton.language.uint_to_uniform_float.
RALU_INLINE float uniform(uint32_t word) { return static_cast<float>(fold(word)) * 4.6566127342e-10f; }

RALU_INLINE float float_of(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

RALU_INLINE int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof x);
  return bits;
}

// -2 ln(x) of a normal positive number, a polynomial of x - 1 between sqrt(1/2) and sqrt(2), exact to 2e-8 there.
RALU_INLINE float minus_two_log(float x) {
  const int32_t bits = bits_of(x) - 0x3F3504F3;  // sqrt(1/2)
  const float e = static_cast<float>(bits >> 23);
  const float m = float_of((bits & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
  const float m2 = m * m;
  // Even and odd powers apart: two chains of half the length.
  float even = -1.7344367504e-1f, odd = 2.8758016229e-1f;
  even = even * m2 - 2.9955989122e-1f;
  odd = odd * m2 + 3.3128851652e-1f;
  even = even * m2 - 3.9909750223e-1f;
  odd = odd * m2 + 5.0003397465e-1f;
  even = even * m2 - 6.6668331623e-1f;
  return ((odd * m + even) * m + 1.0f) * m2 - (2.0f * m + 1.3862943611f * e);
}

// Sine of r * 2 pi / 2^31, |r| <= 2^29: an odd polynomial on [-pi/2, pi/2], exact to 1e-7.
RALU_INLINE float sine(int32_t r) {
  const float x = static_cast<float>(r) * 2.9258361585343194e-9f, x2 = x * x;
  return ((((2.6000548e-6f * x2 - 1.9806615e-4f) * x2 + 8.333017e-3f) * x2 - 1.6666657e-1f) * x2) * x + x;
}

// Box-Muller: the square of the distance from the origin of a pair of normals, and the distance.
RALU_INLINE float squared_radius(uint32_t word) {
  constexpr int32_t LEAST = 0x33D6BF95;  // 1e-7. As an integer: of a choice of floats compilers make two logarithms
  const int32_t u = bits_of(uniform(word));
  return minus_two_log(float_of(u > LEAST ? u : LEAST));
}

RALU_INLINE float radius(uint32_t word) { return sqrtf(squared_radius(word)); }

// The pair. The angle stays an integer, a fraction of 2^31, until it is folded into a half turn: exact, where the
// reduction of a float angle costs twice the operations.
RALU_INLINE void turn(float radius, uint32_t word, float& n1, float& n2) {
  constexpr int32_t QUARTER = 1 << 29, HALF = 1 << 30;
  const int32_t angle = fold(word), c = QUARTER - angle, s = HALF - angle;
  const int32_t s2 = s < HALF - s ? s : HALF - s;
  n1 = radius * sine(c > -HALF - c ? c : -HALF - c);
  n2 = radius * sine(s2 > -HALF - s ? s2 : -HALF - s);
}

RALU_INLINE Normals normals(Polar p) {
  Normals n;
  turn(p.radius0, p.angle0, n.n0, n.n1);
  turn(p.radius1, p.angle1, n.n2, n.n3);
  return n;
}

// Four normals of the counter (element, stage, kind, 0).
RALU_INLINE Normals normals(uint64_t key, uint32_t element, uint32_t stage, uint32_t kind) {
  const Words w = philox(key, element, stage, kind);
  Normals n;  // pair after pair: by way of Polar nvcc needs more registers
  turn(radius(w.w0), w.w1, n.n0, n.n1);
  turn(radius(w.w2), w.w3, n.n2, n.n3);
  return n;
}

// The four children of x: scale * x + noise_scale * (n_i - k * sum of the n), RALU supplement A.1.
RALU_INLINE Normals upsample_block(float x, Normals n, float scale, float noise_scale, float k) {
  const float shared = k * (n.n0 + n.n1 + n.n2 + n.n3);
  x = scale * x;
  return {x + noise_scale * (n.n0 - shared), x + noise_scale * (n.n1 - shared), x + noise_scale * (n.n2 - shared),
          x + noise_scale * (n.n3 - shared)};
}

}  // namespace ralu
