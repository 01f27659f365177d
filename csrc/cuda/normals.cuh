// The random numbers of philox.h, as exact as a type of values can show.
#pragma once

#include "../philox.h"

namespace ralu::cuda {

#ifdef __CUDACC__  // tests on a host have another one, which is wrong by as much as this may be
// sqrt(x) within 2^-23 of itself.
__device__ __forceinline__ float fast_sqrt(float x) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}
#endif

// Box-Muller of two random words for values of type T. Half precision rounds at 2^-12 of a value or more, where the
// GPU's own sine and cosine, wrong by 2^-21, do. They are at their best between -pi and pi: the angle is turned by half
// a circle, and with it the pair.
template <class T>
__device__ __forceinline__ void box_muller(uint32_t word1, uint32_t word2, float& n1, float& n2) {
  if constexpr (sizeof(T) == sizeof(float)) {
    turn(radius(word1), word2, n1, n2);
  } else {
    const float opposite = -fast_sqrt(squared_radius(word1));
    const float angle = static_cast<float>(fold(word2) - (1 << 30)) * 2.9258361585343194e-9f;
    n1 = opposite * __cosf(angle), n2 = opposite * __sinf(angle);
  }
}

// Four normals of the counter (element, stage, kind, 0) for values of type T.
template <class T>
__device__ __forceinline__ Normals normals_for(uint64_t key, uint32_t element, uint32_t stage, uint32_t kind) {
  const Words w = philox(key, element, stage, kind);
  Normals n;  // pair after pair: by way of Polar nvcc needs more registers
  box_muller<T>(w.w0, w.w1, n.n0, n.n1);
  box_muller<T>(w.w2, w.w3, n.n2, n.n3);
  return n;
}

}  // namespace ralu::cuda
