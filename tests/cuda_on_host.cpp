// The operations of csrc/cuda with arguments that ctypes can pass.
#include "ops.h"

using Tensor = const torch::stable::Tensor&;

extern "C" {

void upsample_renoise(Tensor x, Tensor out, Tensor seed, double scale, double noise_scale, double k, int64_t stage) {
  ralu::cuda::upsample_renoise(x, out, seed, scale, noise_scale, k, stage);
}

void plan_tokens(Tensor scores, Tensor cu_seqlens, Tensor source, Tensor child, Tensor inverse, Tensor positions,
                 int64_t width, int64_t count, const double* threshold) {
  ralu::cuda::plan_tokens(scores, cu_seqlens, source, child, inverse, positions, width, count,
                          threshold ? std::optional(*threshold) : std::nullopt);
}

void upsample_selected(Tensor low, Tensor out, Tensor inverse, Tensor seed, int64_t width, double scale,
                    double noise_scale, double kept_scale, double k, bool pixel) {
  ralu::cuda::upsample_selected(low, out, inverse, seed, width, scale, noise_scale, kept_scale, k, pixel);
}

void upsample_remaining(Tensor packed, Tensor out, Tensor inverse, Tensor seed, int64_t width, double scale,
                  double noise_scale, double kept_scale, double k, bool pixel) {
  ralu::cuda::upsample_remaining(packed, out, inverse, seed, width, scale, noise_scale, kept_scale, k, pixel);
}

void canny(Tensor image, Tensor edges, Tensor parent, int64_t low, int64_t high) {
  ralu::cuda::canny(image, edges, parent, low, high);
}
}
