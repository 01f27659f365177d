// Several elements at a time, and the shape of a launch. Nothing here or in the kernels needs PyTorch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "../philox.h"

namespace ralu::cuda {

template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T value[N];
};

// In as few instructions as there are: nvcc would take the assignment of a Vector apart.
template <class T, int N>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& vector) {
  constexpr int BYTES = sizeof(vector) < 16 ? sizeof(vector) : 16;
  using Word = std::conditional_t<BYTES == 2, unsigned short, unsigned int>;
  using Words = std::conditional_t<BYTES == 16, uint4, std::conditional_t<BYTES == 8, uint2, Word>>;
  static_assert(sizeof(Words) == BYTES && sizeof(vector) % BYTES == 0);
#pragma unroll
  for (int i = 0; i < N; i += BYTES / sizeof(T)) {
    Words words;
    memcpy(&words, vector.value + i, BYTES);
    __stcg(reinterpret_cast<Words*>(to + i), words);
  }
}

// A number as a type, to choose a template instance.
template <int N>
using Count = std::integral_constant<int, N>;

// N elements that are `stride` apart; `whole`: they are an aligned vector.
template <int N, class T>
RALU_INLINE void load(const T* from, int64_t stride, bool whole, float (&value)[N]) {
  if (whole) {
    const auto vector = *reinterpret_cast<const Vector<T, N>*>(from);
    for (int i = 0; i < N; ++i) value[i] = static_cast<float>(vector.value[i]);
  } else {
    for (int i = 0; i < N; ++i) value[i] = static_cast<float>(from[i * stride]);
  }
}

// Whether all rows at multiples of these strides from `base` are made of aligned vectors of N elements.
template <int N, class T>
bool whole_vectors(const T* base, int64_t inner_stride, std::initializer_list<int64_t> strides) {
  return inner_stride == 1 && reinterpret_cast<uintptr_t>(base) % sizeof(Vector<T, N>) == 0 &&
         std::all_of(strides.begin(), strides.end(), [](int64_t stride) { return stride % N == 0; });
}

// Enough blocks for `count` threads of each sample. A grid's second and third side end at 65535.
inline dim3 grid_of(int64_t count, int threads, int64_t batch) {
  const int64_t blocks = (count + threads - 1) / threads, rows = std::min<int64_t>(batch, 65535);
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(rows),
              static_cast<unsigned>((batch + rows - 1) / rows));
}

// A block's sample, which is one past the end for the few blocks that are too many.
__device__ __forceinline__ uint32_t sample_of_block() { return blockIdx.z * gridDim.y + blockIdx.y; }

}  // namespace ralu::cuda
