// Random numbers for host and device: Philox-4x32-10 and Box-Muller, the stream of triton.language.randn4x.
//
// Branch-free float32 arithmetic that compilers turn into SIMD. Logarithm, sine and cosine are the polynomials of Cephes:
// the same code on every side, no table and, on a GPU, no local memory for the reduction of huge angles.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define RALU_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define RALU_INLINE __forceinline
#else
#define RALU_INLINE inline __attribute__((always_inline))
#endif

namespace ralu {

// What a counter's third word says: the element is enlarged (its four normals are its children), or carried over.
constexpr uint32_t UPSAMPLED = 0, CARRIED = 1;

struct Words {
  uint32_t w0, w1, w2, w3;
};

struct Normals {
  float n0, n1, n2, n3;
};

RALU_INLINE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

RALU_INLINE Words philox_round(Words c, uint32_t k0, uint32_t k1) {
  constexpr uint32_t A = 0xD2511F53, B = 0xCD9E8D57;
  return {multiply_high(B, c.w2) ^ c.w1 ^ k0, B * c.w2, multiply_high(A, c.w0) ^ c.w3 ^ k1, A * c.w0};
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

// [0, 1], by the rule of triton.language.uint_to_uniform_float.
RALU_INLINE float uniform(uint32_t word) {
  const int32_t x = static_cast<int32_t>(word);
  return static_cast<float>(x ^ (x >> 31)) * 4.6566127342e-10f;
}

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

// Natural logarithm of a normal positive number.
RALU_INLINE float logarithm(float x) {
  const int32_t bits = bits_of(x) - 0x3F3504F3;  // sqrt(1/2): the mantissa below is in [sqrt(1/2), sqrt(2))
  const float e = static_cast<float>(bits >> 23);
  const float m = float_of((bits & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
  const float m2 = m * m;
  float y = 7.0376836292e-2f;
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * m2 - 2.12194440e-4f * e - 0.5f * m2;
  return m + y + 0.693359375f * e;
}

RALU_INLINE void box_muller(uint32_t word1, uint32_t word2, float& n1, float& n2) {
  const float u = uniform(word1);
  const float radius = sqrtf(-2.0f * logarithm(u < 1.0e-7f ? 1.0e-7f : u));
  const float angle = 6.283185307179586f * uniform(word2);
  // Below 2 pi the three constants of Cody and Waite are exact.
  const int32_t quadrant = static_cast<int32_t>(angle * 0.6366197723675814f + 0.5f);
  const float q = static_cast<float>(quadrant);
  const float a = ((angle - q * 1.5703125f) - q * 4.837512969970703e-4f) - q * 7.549789948768648e-8f;
  const float a2 = a * a;
  const float s = ((-1.9515295891e-4f * a2 + 8.3321608736e-3f) * a2 - 1.6666654611e-1f) * a2 * a + a;
  const float c = ((2.443315711809948e-5f * a2 - 1.388731625493765e-3f) * a2 + 4.166664568298827e-2f) * a2 * a2 -
                  0.5f * a2 + 1.0f;
  const bool swap = quadrant & 1;
  const int32_t cosine = bits_of(swap ? s : c) ^ (((quadrant + 1) & 2) << 30);
  const int32_t sine = bits_of(swap ? c : s) ^ ((quadrant & 2) << 30);
  n1 = radius * float_of(cosine);
  n2 = radius * float_of(sine);
}

RALU_INLINE Normals normals(Words w) {
  Normals n;
  box_muller(w.w0, w.w1, n.n0, n.n1);
  box_muller(w.w2, w.w3, n.n2, n.n3);
  return n;
}

// The first of them alone.
RALU_INLINE float normal(Words w) {
  float n0, unused;
  box_muller(w.w0, w.w1, n0, unused);
  return n0;
}

// Four normals of the counter (element, stage, kind, 0).
RALU_INLINE Normals normals(uint64_t key, uint32_t element, uint32_t stage, uint32_t kind) {
  return normals(philox(key, element, stage, kind));
}

RALU_INLINE float normal(uint64_t key, uint32_t element, uint32_t stage, uint32_t kind) {
  return normal(philox(key, element, stage, kind));
}

// The four children of x: scale * x + noise_scale * (n_i - k * sum of the n), RALU supplement A.1.
RALU_INLINE Normals enlarge(float x, Normals n, float scale, float noise_scale, float k) {
  const float shared = k * (n.n0 + n.n1 + n.n2 + n.n3);
  x = scale * x;
  return {x + noise_scale * (n.n0 - shared), x + noise_scale * (n.n1 - shared), x + noise_scale * (n.n2 - shared),
          x + noise_scale * (n.n3 - shared)};
}

}  // namespace ralu
