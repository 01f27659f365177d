#include "upsample.cuh"

#include "launch.h"

namespace ralu::cuda {

void upsample_renoise(Tensor x, Tensor out, Tensor seed, double scale, double noise_scale, double k, int64_t stage) {
  const Latent latent{
      narrow(x.size(0)), narrow(x.size(2)), narrow(x.size(3)), narrow(x.size(1) * x.size(2) * x.size(3)),
      x.stride(0),       x.stride(1),       x.stride(2),       x.stride(3)};
  const Noise noise{static_cast<float>(scale), static_cast<float>(noise_scale), static_cast<float>(k), narrow(stage)};
  for_dtype(x, [&](auto type) {
    using T = decltype(type);
    upsample(Launch(x), input<T>(x), output<T>(out), input<int64_t>(seed), latent, noise);
  });
}

}  // namespace ralu::cuda
