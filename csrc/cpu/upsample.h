// The loop of upsample_renoise over a run of elements of one sample, for any instruction set.
#pragma once

#include <algorithm>

#include "simd.h"

namespace ralu::cpu {

struct Noise {
  float scale, noise_scale, k;
  uint32_t stage;
};

struct Latent {
  int64_t height, width, stride_c, stride_h, stride_w;
};

// x, out: one sample; elements [first, first + count) of the low grid, count <= RUN.
template <class T>
RALU_INLINE void upsample_run(Isa isa, const T* x, T* out, uint64_t key, Latent latent, Noise noise, int64_t first,
                              int32_t count) {
  const int64_t width = latent.width;
  float value[RUN], child[4][RUN];
  for (int64_t i = 0; i < count;) {
    const int64_t row = (first + i) / width, column = (first + i) % width,
                  m = std::min<int64_t>(width - column, count - i);
    const T* from =
        x + row / latent.height * latent.stride_c + row % latent.height * latent.stride_h + column * latent.stride_w;
    if (latent.stride_w == 1) {
      for (int64_t j = 0; j < m; ++j) value[i + j] = to_float(from[j]);
    } else {
      for (int64_t j = 0; j < m; ++j) value[i + j] = to_float(from[j * latent.stride_w]);
    }
    prefetch(out + 4 * row * width + 2 * column, 2 * m);
    prefetch(out + (4 * row + 2) * width + 2 * column, 2 * m);
    i += m;
  }

  const int32_t padded = (count + 15) & ~15;  // whole vectors
  std::fill(value + count, value + padded, 0.0f);
  Run words;
  philox_run(isa, key, CONSECUTIVE.element, static_cast<uint32_t>(first), noise.stage, UPSAMPLED, padded, words);
  for (int32_t j = 0; j < padded; ++j) {
    const Normals n = normals(words[j]);
    const Normals o = upsample_block(value[j], n, noise.scale, noise.noise_scale, noise.k);
    child[0][j] = o.n0, child[1][j] = o.n1, child[2][j] = o.n2, child[3][j] = o.n3;
  }

  for (int64_t i = 0; i < count;) {
    const int64_t row = (first + i) / width, column = (first + i) % width,
                  m = std::min<int64_t>(width - column, count - i);
    T* top = out + 4 * row * width + 2 * column;
    T* bottom = top + 2 * width;
    for (int64_t j = 0; j < m; ++j) {
      top[2 * j] = from_float<T>(child[0][i + j]);
      top[2 * j + 1] = from_float<T>(child[1][i + j]);
    }
    for (int64_t j = 0; j < m; ++j) {
      bottom[2 * j] = from_float<T>(child[2][i + j]);
      bottom[2 * j + 1] = from_float<T>(child[3][i + j]);
    }
    i += m;
  }
}

}  // namespace ralu::cpu
