// From a tensor of PyTorch's to a C++ type and its memory.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include "ops.h"

namespace ralu {

// f(number of the tensor's type): each side has its own types of half precision.
template <class Half, class BFloat16, class F>
void for_dtype(const Tensor& x, const F& f) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: STD_TORCH_CHECK(false, "the dtype must be float32, float16 or bfloat16");
  }
}

// What the transitions index by: the shape of inverse, int32 (B, 4n), and the keys. Its rows are checked elsewhere.
inline void check_plan(const Tensor& inverse, const Tensor& seed, int64_t batch, int64_t n, int64_t width) {
  const bool fits = inverse.size(0) == batch && inverse.size(1) == 4 * n && seed.size(0) == batch;
  STD_TORCH_CHECK(width > 0 && n % width == 0 && fits, "the plan does not fit the tokens");
}

template <class T>
const T* input(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* output(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

}  // namespace ralu
