#include <array>

#include "launch.h"
#include "tokens.cuh"

namespace ralu::cuda {

void plan_tokens(Tensor scores, Tensor cu_seqlens, Tensor source, Tensor child, Tensor inverse, Tensor positions,
                 int64_t width, int64_t count, std::optional<double> threshold) {
  for_dtype(scores, [&](auto type) {
    using T = decltype(type);
    const Plan<T> plan{input<T>(scores),
                       scores.stride(0),
                       scores.stride(1),
                       narrow(scores.size(0)),
                       narrow(scores.size(1)),
                       narrow(width),
                       narrow(count),
                       narrow(source.size(0)),
                       static_cast<float>(threshold.value_or(0.0)),
                       output<int32_t>(cu_seqlens),
                       output<int32_t>(source),
                       output<int32_t>(child),
                       output<int32_t>(inverse),
                       output<float2>(positions)};
    plan_tokens(Launch(scores), !threshold, plan);
  });
}

// packed: the mixed sequences; strides: of what is read.
static Transition transition_of(const Tensor& inverse, const Tensor& packed, std::array<int64_t, 3> strides,
                                int64_t width, uint32_t stage, double scale, double noise_scale, double kept_scale,
                                double k) {
  return {narrow(inverse.size(0)),
          narrow(inverse.size(1) / (4 * width)),
          narrow(width),
          narrow(packed.size(1)),
          narrow(packed.size(0)),
          strides[0],
          strides[1],
          strides[2],
          stage,
          static_cast<float>(scale),
          static_cast<float>(noise_scale),
          static_cast<float>(kept_scale),
          static_cast<float>(k)};
}

void upsample_selected(Tensor low, Tensor out, Tensor inverse, Tensor seed, int64_t width, double scale,
                       double noise_scale, double kept_scale, double k, bool pixel) {
  check_plan(inverse, seed, low.size(0), low.size(1), width);
  const Transition t = transition_of(inverse, out, {low.stride(0), low.stride(1), low.stride(2)}, width, TO_MIXED,
                                     scale, noise_scale, kept_scale, k);
  for_dtype(low, [&](auto type) {
    using T = decltype(type);
    upsample_selected(Launch(low), input<T>(low), output<T>(out), input<int32_t>(inverse), input<int64_t>(seed), t,
                      pixel);
  });
}

void upsample_remaining(Tensor packed, Tensor out, Tensor inverse, Tensor seed, int64_t width, double scale,
                        double noise_scale, double kept_scale, double k, bool pixel) {
  check_plan(inverse, seed, inverse.size(0), inverse.size(1) / 4, width);
  const Transition t = transition_of(inverse, packed, {0, packed.stride(0), packed.stride(1)}, width, TO_FULL, scale,
                                     noise_scale, kept_scale, k);
  for_dtype(packed, [&](auto type) {
    using T = decltype(type);
    upsample_remaining(Launch(packed), input<T>(packed), output<T>(out), input<int32_t>(inverse), input<int64_t>(seed),
                       t, pixel);
  });
}

}  // namespace ralu::cuda
