// Between PyTorch's stable ABI and the kernels.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

#include "../ops.h"
#include "vector.cuh"

namespace ralu::cuda {

// Starts kernels on the tensor's device, in the stream that is current there.
class Launch {
 public:
  explicit Launch(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream;
    // The macro for this has another name in every release.
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                    "no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, Arguments... arguments) const {
    const cudaLaunchConfig_t config{grid, dim3(threads), 0, stream_};
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

template <class F>
void for_dtype(const Tensor& x, const F& f) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Half: return f(__half{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
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

inline uint32_t narrow(int64_t size) { return static_cast<uint32_t>(size); }

}  // namespace ralu::cuda
