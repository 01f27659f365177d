#include "upsample.h"

#include "dispatch.h"

namespace ralu::cpu {

void upsample_renoise(Tensor x, Tensor out, Tensor seed, double scale, double noise_scale, double k, int64_t stage) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3), size = channels * height * width;
  const Latent latent{height, width, x.stride(1), x.stride(2), x.stride(3)};
  const Noise noise{static_cast<float>(scale), static_cast<float>(noise_scale), static_cast<float>(k),
                    static_cast<uint32_t>(stage)};
  const int64_t runs = (size + RUN - 1) / RUN, stride_b = x.stride(0);
  const int64_t* keys = input<int64_t>(seed);
  for_dtype(x, [&](auto type) {
    using T = decltype(type);
    const T* from = input<T>(x);
    T* to = output<T>(out);
    parallel(x.size(0) * runs, 16, [&](Isa isa, int64_t begin, int64_t end) RALU_BODY {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / runs, first = i % runs * RUN;
        upsample_run(isa, from + b * stride_b, to + 4 * b * size, static_cast<uint64_t>(keys[b]), latent, noise, first,
                     std::min<int64_t>(RUN, size - first));
      }
    });
  });
}

}  // namespace ralu::cpu
