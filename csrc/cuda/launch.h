// Between PyTorch's stable ABI and the kernels.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../dispatch.h"
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
  ralu::for_dtype<__half, __nv_bfloat16>(x, f);
}

inline uint32_t narrow(int64_t size) { return static_cast<uint32_t>(size); }

}  // namespace ralu::cuda
