// 2x upsampling of a latent with block-correlated noise.
#pragma once

#include "normals.cuh"
#include "vector.cuh"

namespace ralu::cuda {

constexpr int UPSAMPLE_THREADS = 128;

struct Latent {
  uint32_t batch, height, width, size;  // size: elements of one sample
  int64_t stride_b, stride_c, stride_h, stride_w;
};

struct Noise {
  float scale, noise_scale, k;
  uint32_t stage;
};

// A thread upsamples V neighbours of one row.
template <class T, int V>
__global__ void __launch_bounds__(UPSAMPLE_THREADS)
    upsample_kernel(const T* __restrict__ x, T* __restrict__ out, const int64_t* __restrict__ seed, Latent latent,
                    Noise noise, bool whole) {
  const uint32_t first = (blockIdx.x * UPSAMPLE_THREADS + threadIdx.x) * V, b = sample_of_block();
  if (first >= latent.size || b >= latent.batch) return;
  const uint32_t row = first / latent.width, column = first % latent.width;
  const uint32_t channel = row / latent.height, y = row % latent.height;
  x += b * latent.stride_b + channel * latent.stride_c + y * latent.stride_h + column * latent.stride_w;
  out += 4 * static_cast<int64_t>(latent.size) * b + 4 * latent.width * row + 2 * column;
  float value[V];
  load(x, latent.stride_w, whole, value);
  Vector<T, 2 * V> top, bottom;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const Normals n = normals_for<T>(static_cast<uint64_t>(seed[b]), first + i, noise.stage, UPSAMPLED);
    const Normals o = upsample_block(value[i], n, noise.scale, noise.noise_scale, noise.k);
    top.value[2 * i] = static_cast<T>(o.n0), top.value[2 * i + 1] = static_cast<T>(o.n1);
    bottom.value[2 * i] = static_cast<T>(o.n2), bottom.value[2 * i + 1] = static_cast<T>(o.n3);
  }
  store(out, top);
  store(out + 2 * latent.width, bottom);
}

template <class T, class Launch>
void upsample(const Launch& launch, const T* x, T* out, const int64_t* seed, const Latent& latent, const Noise& noise) {
  if (latent.batch == 0 || latent.size == 0) return;
  const auto run = [&](auto v) {
    constexpr int V = v;
    const bool whole = whole_vectors<V>(x, latent.stride_w, {latent.stride_b, latent.stride_c, latent.stride_h});
    launch(upsample_kernel<T, V>, grid_of(latent.size / V, UPSAMPLE_THREADS, latent.batch), UPSAMPLE_THREADS, x, out,
           seed, latent, noise, whole);
  };
  constexpr int WIDE = 8 / sizeof(T);  // 16 bytes of each output row
  latent.width % WIDE == 0 ? run(Count<WIDE>{}) : run(Count<1>{});
}

}  // namespace ralu::cuda
