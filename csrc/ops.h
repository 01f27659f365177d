// The compiled operations. Python allocates what they fill and has checked shapes, dtypes and devices; what the
// arguments mean is told by ralu_kernels/upsample.py, plan.py, tokens.py and edges.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace ralu {

using torch::stable::Tensor;

// x (B, C, H, W), out (B, C, 2H, 2W) contiguous, of one dtype; seed int64 (B,) contiguous.
using UpsampleRenoise = void(Tensor x, Tensor out, Tensor seed, double scale, double noise_scale, double k,
                             int64_t stage);

// scores (B, n) -> the tensors of a TokenPlan. Without a threshold the `count` highest scores of a sample are selected.
using PlanTokens = void(Tensor scores, Tensor cu_seqlens, Tensor source, Tensor child, Tensor inverse, Tensor positions,
                        int64_t width, int64_t count, std::optional<double> threshold);

// low (B, n, C) -> out (total, C) contiguous, of one dtype; inverse int32 (B, 4n) contiguous; seed as above.
using UpsampleSelected = void(Tensor low, Tensor out, Tensor inverse, Tensor seed, int64_t width, double scale,
                              double noise_scale, double kept_scale, double k, bool pixel);

// packed (total, C) -> out (B, 4n, C) contiguous; the rest as above.
using UpsampleRemaining = void(Tensor packed, Tensor out, Tensor inverse, Tensor seed, int64_t width, double scale,
                               double noise_scale, double kept_scale, double k, bool pixel);

// image uint8 (B, H, W) -> edges uint8 (B, H, W), 0 or 255; parent is scratch: on CUDA int32 (B, H, W), on a CPU empty.
// All contiguous.
using Canny = void(Tensor image, Tensor edges, Tensor parent, int64_t low, int64_t high);

namespace cpu {
UpsampleRenoise upsample_renoise;
PlanTokens plan_tokens;
UpsampleSelected upsample_selected;
UpsampleRemaining upsample_remaining;
Canny canny;
}  // namespace cpu

namespace cuda {
UpsampleRenoise upsample_renoise;
PlanTokens plan_tokens;
UpsampleSelected upsample_selected;
UpsampleRemaining upsample_remaining;
Canny canny;
}  // namespace cuda

constexpr uint32_t TO_MIXED = 2, TO_FULL = 3;  // the stage that a transition leads to, a word of the random counter

}  // namespace ralu
