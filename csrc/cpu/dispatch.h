// The number types of the loops, and their share of PyTorch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../dispatch.h"
#include "simd.h"

namespace ralu::cpu {

template <class F>
void for_dtype(const Tensor& x, const F& f) {
  ralu::for_dtype<Half, BFloat16>(x, f);
}

// body(isa, begin, end), marked RALU_BODY, on the threads of PyTorch, which are one inside a DataLoader's worker. A task has
// at least `grain` of the `count` pieces.
template <class F>
void parallel(int64_t count, int64_t grain, const F& body) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    vectorized([&](Isa isa) RALU_BODY { body(isa, begin, end); });
  });
}

}  // namespace ralu::cpu
