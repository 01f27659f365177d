// CUDA and PyTorch's stable ABI, as far as csrc/cuda needs them, for a machine without a GPU. A block's threads are
// fibers that take turns at barriers; blocks run on several threads of the host, so that their races are real.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

// ---- the language ----

#undef __device__
#undef __forceinline__
#undef __global__
#undef __launch_bounds__
#undef __shared__
#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __shared__ static thread_local

using std::max;
using std::min;

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 gridDim;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  uint32_t thread;

  static constexpr size_t STACK = 1 << 16;
};

class Block {
 public:
  // One warp goes ahead as far as it can before the next one starts, so that forgotten barriers show.
  void run(const std::function<void()>& kernel, uint32_t threads) {
    kernel_ = &kernel, used_ = 0;
    std::vector<std::vector<Fiber*>> warps((threads + 31) / 32);
    for (uint32_t warp = 0; warp < warps.size(); ++warp) {
      started_ = 32 * warp, end_ = min(threads, started_ + 32);
      while (started_ < end_) resume(fresh());
      finish(warps[warp]);
    }
    for (bool waiting = true; waiting;) {
      waiting = false;
      for (auto& warp : warps) {
        for (Fiber* fiber : std::exchange(warp, {})) resume(*fiber);
        finish(warp);
        waiting |= !warp.empty();
      }
    }
  }

  void wait_for_block() { wait(at_block_); }
  void wait_for_warp() { wait(at_warp_); }

  uint32_t exchanged[1024];
  std::minstd_rand random;

 private:
  Fiber& fresh() {
    if (used_ == fibers_.size()) fibers_.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers_[used_++];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::STACK;
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(+[](Block* self) { self->run_threads(); }), 1, this);
    return fiber;
  }

  // A fiber runs one thread after the other until one of them has to wait.
  void run_threads() {
    for (Fiber& self = *current_; started_ < end_;) {
      threadIdx.x = self.thread = started_++;
      (*kernel_)();
    }
  }

  void finish(std::vector<Fiber*>& warp) {
    while (!at_warp_.empty())
      for (Fiber* fiber : std::exchange(at_warp_, {})) resume(*fiber);
    warp = std::exchange(at_block_, {});
  }

  void resume(Fiber& fiber) {
    current_ = &fiber;
    swapcontext(&scheduler_, &fiber.context);
  }

  void wait(std::vector<Fiber*>& others) {
    Fiber& self = *current_;
    others.push_back(&self);
    swapcontext(&self.context, &scheduler_);
    threadIdx.x = self.thread;
  }

  const std::function<void()>* kernel_;
  size_t used_;
  uint32_t started_, end_;
  ucontext_t scheduler_;
  Fiber* current_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> at_warp_, at_block_;
};

inline thread_local Block block;

inline void __syncthreads() { block.wait_for_block(); }

template <class F>
uint32_t of_warp(uint32_t value, const F& f) {
  block.exchanged[threadIdx.x] = value;
  block.wait_for_warp();
  const uint32_t result = f(block.exchanged + threadIdx.x / 32 * 32);
  block.wait_for_warp();
  return result;
}

inline uint32_t __shfl_sync(uint32_t, uint32_t value, uint32_t lane) {
  return of_warp(value, [&](const uint32_t* values) { return values[lane]; });
}

inline uint32_t __shfl_down_sync(uint32_t, uint32_t value, uint32_t step) {
  const uint32_t lane = threadIdx.x % 32 + step;
  return of_warp(value, [&](const uint32_t* values) { return lane < 32 ? values[lane] : value; });
}

inline uint32_t __ballot_sync(uint32_t, bool value) {
  return of_warp(value, [](const uint32_t* values) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= values[lane] << lane;
    return bits;
  });
}

inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }

inline uint32_t atomicAdd(uint32_t* to, uint32_t value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }

// After a random delay, in which other threads of the warp may change what led here.
inline int32_t atomicMin(int32_t* to, int32_t value) {
  for (auto delay = block.random() % 4; delay > 0; --delay) block.wait_for_warp();
  int32_t before = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(to, &before, min(before, value), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

// The fast functions, wrong by as much as the CUDA C++ Programming Guide and the PTX ISA allow, now up, now down.
inline float wrong_by(float error, float x) { return __builtin_parity(std::bit_cast<uint32_t>(x)) ? error : -error; }

inline float __sinf(float x) {
  if (std::abs(x) > 3.1415928f) std::abort();  // there is no bound
  return std::sin(static_cast<double>(x)) + wrong_by(0x1p-21f * 0.7526f, x);  // 2^-21.41
}

inline float __cosf(float x) {
  if (std::abs(x) > 3.1415928f) std::abort();
  return std::cos(static_cast<double>(x)) + wrong_by(0x1p-21f * 0.8766f, x);  // 2^-21.19
}

namespace ralu::cuda {
inline float fast_sqrt(float x) { return std::sqrt(static_cast<double>(x)) * (1.0 + wrong_by(0x1p-23f, x)); }
}  // namespace ralu::cuda

template <class T>
void __stcg(T* to, T value) {
  *to = value;
}

template <class... Parameters, class... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  const dim3 grid = config->gridDim;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::atomic<uint64_t> next{0};
  const auto work = [&] {
    gridDim = grid;
    for (uint64_t i; (i = next++) < blocks;) {
      blockIdx.x = i % grid.x, blockIdx.y = i / grid.x % grid.y, blockIdx.z = i / grid.x / grid.y;
      block.run([&] { kernel(arguments...); }, config->blockDim.x);
    }
  };
  std::vector<std::thread> workers;
  for (uint64_t i = 0; i < min<uint64_t>(blocks, 4); ++i) workers.emplace_back(work);
  for (std::thread& worker : workers) worker.join();
  return 0;
}

// ---- PyTorch ----

namespace torch::headeronly {
enum class ScalarType { Float, Half, BFloat16, Other };
}

namespace torch::stable {

struct Tensor {
  void* data;
  int64_t sizes[4], strides[4];
  int32_t dtype;

  int64_t size(int dim) const { return sizes[dim]; }
  int64_t stride(int dim) const { return strides[dim]; }
  const void* const_data_ptr() const { return data; }
  void* mutable_data_ptr() const { return data; }
  torch::headeronly::ScalarType scalar_type() const { return static_cast<torch::headeronly::ScalarType>(dtype); }
  int get_device_index() const { return 0; }
};

namespace accelerator {
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
}  // namespace accelerator

}  // namespace torch::stable

constexpr int AOTI_TORCH_SUCCESS = 0;

inline int aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}

#define STABLE_TORCH_ERROR_CODE_CHECK(call) static_cast<void>(call)
#define STD_CUDA_CHECK(call) static_cast<void>(call)
#define STD_TORCH_CHECK(condition, message) \
  if (!(condition)) std::abort()
