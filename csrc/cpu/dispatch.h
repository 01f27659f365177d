// From a tensor's dtype to a C++ type, and the loops' share of PyTorch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "../ops.h"
#include "simd.h"

namespace ralu::cpu {

template <class F>
void for_dtype(const Tensor& x, const F& f) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: STD_TORCH_CHECK(false, "the dtype must be float32, float16 or bfloat16");
  }
}

template <class T>
const T* input(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* output(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
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
