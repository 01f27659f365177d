// The plan of a mixed-resolution sequence, and the two transitions between the stages.
#pragma once

#include "../sort_key.h"
#include "normals.cuh"
#include "vector.cuh"

namespace ralu::cuda {

// ---- the plan: one block for each sample, and one that only says where the last one ends ----

constexpr int PLAN_THREADS = 1024;
constexpr uint32_t WARP = 0xFFFFFFFF;

template <class T>
struct Plan {
  const T* scores;
  int64_t stride_b, stride_n;
  uint32_t batch, n, width, count, total;  // count: selected in each sample; total: rows that the outputs have
  float threshold;
  int32_t *cu_seqlens, *source, *child, *inverse;
  float2* positions;
};

// Sum over this lane and those after it.
__device__ __forceinline__ uint32_t sum_from_here(uint32_t value, uint32_t lane) {
  for (uint32_t step = 1; step < 32; step *= 2) {
    const uint32_t further = __shfl_down_sync(WARP, value, step);
    if (lane + step < 32) value += further;
  }
  return value;
}

// The `count`-th highest key, 8 bits at a time from the top. `count` becomes its rank among the keys equal to it.
template <class T>
__device__ uint32_t select(const T* scores, int64_t stride, uint32_t n, uint32_t& count) {
  __shared__ uint32_t histogram[256];
  const uint32_t thread = threadIdx.x, lane = thread % 32;
  uint32_t kth = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (thread < 256) histogram[thread] = 0;
    __syncthreads();
    for (uint32_t i = thread; i < n; i += PLAN_THREADS) {
      const uint32_t key = sort_key(static_cast<float>(scores[i * stride]));
      if ((key ^ kth) >> shift < 256) atomicAdd(&histogram[key >> shift & 255], 1u);
    }
    __syncthreads();
    // Every warp for itself: a lane has eight digits.
    uint32_t keys = 0;
    for (int i = 0; i < 8; ++i) keys += histogram[8 * lane + i];
    const uint32_t reached = sum_from_here(keys, lane);
    const uint32_t finder = 31 - __clz(__ballot_sync(WARP, reached >= count));
    uint32_t digit = 8 * finder + 7,
             left = count - (__shfl_sync(WARP, reached, finder) - __shfl_sync(WARP, keys, finder));
    while (histogram[digit] < left) left -= histogram[digit--];
    kth |= digit << shift;
    count = left;
    __syncthreads();
  }
  return kth;
}

// Scores of all samples before this block's that reach the threshold.
template <class T>
__device__ uint32_t selected_before(const Plan<T>& plan) {
  __shared__ uint32_t total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  uint32_t count = 0;
  for (uint32_t b = 0; b < blockIdx.x; ++b)
    for (uint32_t i = threadIdx.x; i < plan.n; i += PLAN_THREADS)
      count += static_cast<float>(plan.scores[b * plan.stride_b + i * plan.stride_n]) >= plan.threshold;
  atomicAdd(&total, count);
  __syncthreads();
  return total;
}

template <class T, bool RANKED>
__global__ void __launch_bounds__(PLAN_THREADS, 1) plan_kernel(Plan<T> plan) {
  __shared__ uint32_t totals[2][32];
  const uint32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32, b = blockIdx.x, n = plan.n;
  uint32_t before = RANKED ? b * plan.count : selected_before(plan);
  if (thread == 0) plan.cu_seqlens[b] = b * n + 3 * before;
  if (b == plan.batch) return;

  const T* scores = plan.scores + b * plan.stride_b;
  uint32_t ties_wanted = RANKED ? plan.count : 0, kth = 0xFFFFFFFF;  // no score's key
  if (RANKED && plan.count > 0) kth = select(scores, plan.stride_n, n, ties_wanted);
  uint32_t ties_before = 0;
  for (uint32_t start = 0; start < n; start += PLAN_THREADS) {
    const uint32_t token = start + thread;
    bool above = false, tie = false;
    if (token < n) {
      const float score = static_cast<float>(scores[token * plan.stride_n]);
      above = RANKED ? sort_key(score) > kth : score >= plan.threshold;
      tie = RANKED && sort_key(score) == kth;
    }
    // Tokens above the limit and ties are counted together, 16 bits each. The two buffers save a barrier.
    const uint32_t lower = (1u << lane) - 1, aboves = __ballot_sync(WARP, above), ties = __ballot_sync(WARP, tie);
    uint32_t* total = totals[start / PLAN_THREADS % 2];
    if (lane == 0) total[warp] = __popc(aboves) | __popc(ties) << 16;
    __syncthreads();
    const uint32_t from_here = sum_from_here(total[lane], lane), all = __shfl_sync(WARP, from_here, 0);
    const uint32_t earlier = all - __shfl_sync(WARP, from_here, warp);
    const uint32_t tie_rank = ties_before + (earlier >> 16) + __popc(ties & lower);
    const bool selected = above || (tie && tie_rank < ties_wanted);
    if (token < n) {
      const uint32_t earlier_selected =
          before + (earlier & 0xFFFF) + __popc(aboves & lower) + min(tie_rank, ties_wanted);
      const uint32_t row = b * n + token + 3 * earlier_selected;
      const uint32_t y = token / plan.width, x = token % plan.width;
      int32_t* corner = plan.inverse + 4 * (static_cast<int64_t>(b) * n + y * plan.width) + 2 * x;
      for (uint32_t m = 0; m < 4; ++m) {
        const uint32_t place = selected ? m : 0;
        corner[m / 2 * 2 * plan.width + m % 2] = row + place;
        if (place == m && row + m < plan.total) {
          plan.source[row + m] = token;
          plan.child[row + m] = selected ? static_cast<int32_t>(m) : -1;
          plan.positions[row + m] = {y + 0.5f * (m / 2), x + 0.5f * (m % 2)};
        }
      }
    }
    before += all & 0xFFFF;
    ties_before += all >> 16;
  }
}

template <class T, class Launch>
void plan_tokens(const Launch& launch, bool ranked, const Plan<T>& plan) {
  launch(ranked ? plan_kernel<T, true> : plan_kernel<T, false>, dim3(plan.batch + 1), PLAN_THREADS, plan);
}

// ---- the transitions ----

constexpr int TOKEN_THREADS = 128;

struct Transition {
  uint32_t batch, height, width, channels, total;  // the low grid; packed rows
  int64_t stride_b, stride_n, stride_c;            // of what is read
  uint32_t stage;
  float scale, noise_scale, kept_scale, k;
};

// What is made of a row that is not there.
template <class T, int V>
RALU_INLINE Vector<T, V> missing() {
  Vector<T, V> vector;
  for (int i = 0; i < V; ++i) vector.value[i] = static_cast<T>(NAN);
  return vector;
}

// ---- at pixel granularity: a thread has V channels of an output row ----

// Whether it is upsampled or kept, a row takes one counter for four channels. So no warp has to do both one after the
// other, as the threads of low tokens would have to.
template <class T, int V>
__device__ __forceinline__ Vector<T, V> row_of_pixels(const float (&value)[V], bool upsampled, uint32_t y, uint32_t x,
                                                      uint32_t m, uint32_t token, uint32_t channel, uint64_t key,
                                                      const Transition& t) {
  // Elements of the random counter, numbered as in reference.py; token: the row's place in the grid of its size.
  const uint32_t plane = 4 * t.height * t.width, pixel = (2 * y + m / 2) * 2 * t.width + 2 * x + m % 2;
  const uint32_t element = upsampled ? channel / 4 * plane + pixel : (token * t.channels + channel) / 4;
  const uint32_t step = upsampled ? plane : 1, kind = upsampled ? UPSAMPLED : KEPT;
  const float k = upsampled ? t.k : 0.0f, noise_scale = upsampled ? t.noise_scale : t.kept_scale;
  Vector<T, V> row;
#pragma unroll
  for (int c = 0; c < V; c += 4) {
    const Normals n = normals_for<T>(key, element + c / 4 * step, t.stage, kind);
    const float shared = k * (n.n0 + n.n1 + n.n2 + n.n3);
    // Channel (c, inner pixel m) of the low token becomes channels (c, 0..3) of child m.
    const float one = m & 2 ? (m & 1 ? value[c + 3] : value[c + 2]) : (m & 1 ? value[c + 1] : value[c]);
    const auto noised = [&](float v, float z) {
      return static_cast<T>(t.scale * (upsampled ? one : v) + noise_scale * (z - shared));
    };
    row.value[c] = noised(value[c], n.n0), row.value[c + 1] = noised(value[c + 1], n.n1);
    row.value[c + 2] = noised(value[c + 2], n.n2), row.value[c + 3] = noised(value[c + 3], n.n3);
  }
  return row;
}

constexpr uint32_t TILE_TOKENS = 16;  // of a line of the low grid, whose rows are looked for together

// A tile's rows, four a token at most, follow each other from its first token's on. Rows that are not there are not
// written.
template <class T, int V>
__global__ void __launch_bounds__(TOKEN_THREADS)
    upsample_selected_pixels_kernel(const T* __restrict__ low, T* __restrict__ out,
                                    const int32_t* __restrict__ inverse, const int64_t* __restrict__ seed,
                                    Transition t, bool whole) {
  const uint32_t groups = t.channels / V, i = blockIdx.x * TOKEN_THREADS + threadIdx.x, b = sample_of_block();
  const uint32_t place = i / groups, channel = i % groups * V;
  const uint32_t tiles = (t.width + TILE_TOKENS - 1) / TILE_TOKENS, tile = place / (4 * TILE_TOKENS);  // one for a warp
  const uint32_t y = tile / tiles, begin = tile % tiles * TILE_TOKENS;
  if (y >= t.height || b >= t.batch) return;
  // Every lane looks at a token, and asks the others for the last one that starts at or before its own row.
  const uint32_t last = min(t.width - begin, TILE_TOKENS) - 1;
  const int32_t* line = inverse + 4 * t.width * (static_cast<int64_t>(b) * t.height + y);
  const int32_t* corner = line + 2 * (begin + min(threadIdx.x % TILE_TOKENS, last));
  const uint32_t start = corner[0], is_selected = corner[1] != corner[0];
  const uint32_t row = __shfl_sync(WARP, start, 0) + place % (4 * TILE_TOKENS);
  uint32_t found = 0;
#pragma unroll
  for (uint32_t step = TILE_TOKENS / 2; step > 0; step /= 2) {
    const uint32_t next = min(found + step, last);
    if (__shfl_sync(WARP, start, next) <= row) found = next;
  }
  const bool selected = __shfl_sync(WARP, is_selected, found);
  const uint32_t m = row - __shfl_sync(WARP, start, found), x = begin + found, token = y * t.width + x;
  if (m >= (selected ? 4 : 1) || row >= t.total) return;
  float value[V];
  load(low + b * t.stride_b + token * t.stride_n + channel * t.stride_c, t.stride_c, whole, value);
  store(out + static_cast<int64_t>(row) * t.channels + channel,
        row_of_pixels<T>(value, selected, y, x, m, token, channel, static_cast<uint64_t>(seed[b]), t));
}

// Rows that are not there read as NaN.
template <class T, int V>
__global__ void __launch_bounds__(TOKEN_THREADS)
    upsample_remaining_pixels_kernel(const T* __restrict__ packed, T* __restrict__ out,
                                     const int32_t* __restrict__ inverse, const int64_t* __restrict__ seed,
                                     Transition t, bool whole) {
  const uint32_t groups = t.channels / V, i = blockIdx.x * TOKEN_THREADS + threadIdx.x, b = sample_of_block();
  const uint32_t token = i / groups, channel = i % groups * V, line = 2 * t.width, n = 2 * t.height * line;
  if (token >= n || b >= t.batch) return;
  const uint32_t Y = token / line, X = token % line, y = Y / 2, x = X / 2;
  const int32_t* of_sample = inverse + static_cast<int64_t>(b) * n;
  const int32_t* corner = of_sample + 2 * (y * line + x);
  const uint32_t row = of_sample[token];
  Vector<T, V> result = missing<T, V>();
  if (row < t.total) {
    float value[V];
    load(packed + row * t.stride_n + channel * t.stride_c, t.stride_c, whole, value);
    result = row_of_pixels<T>(value, corner[1] == corner[0], y, x, Y % 2 * 2 + X % 2, token, channel,
                              static_cast<uint64_t>(seed[b]), t);
  }
  store(out + (static_cast<int64_t>(b) * n + token) * t.channels + channel, result);
}

// ---- at token granularity: a thread has a low token's, or its four children's, V channels ----

// Rows that a plan names and that are not there are not written, and read as NaN.

// write(m, child m) for the four children of a low token. The children of a value share a counter.
template <class T, int V, class Write>
__device__ __forceinline__ void upsample_token(const float (&value)[V], uint32_t token, uint32_t channel, uint64_t key,
                                               const Transition& t, const Write& write) {
  Vector<T, V> child[4];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const Normals n = normals_for<T>(key, token * t.channels + channel + i, t.stage, UPSAMPLED);
    const Normals o = upsample_block(value[i], n, t.scale, t.noise_scale, t.k);
    child[0].value[i] = static_cast<T>(o.n0), child[1].value[i] = static_cast<T>(o.n1);
    child[2].value[i] = static_cast<T>(o.n2), child[3].value[i] = static_cast<T>(o.n3);
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) write(m, child[m]);
}

// token: its place in the grid of its size. Four channels share a counter.
template <class T, int V>
__device__ __forceinline__ Vector<T, V> keep_token(const float (&value)[V], uint32_t token, uint32_t channel,
                                                   uint64_t key, const Transition& t) {
  const uint32_t element = token * ((t.channels + 3) / 4) + channel / 4;
  const auto keep = [&](int i, float z) { return static_cast<T>(t.scale * value[i] + t.kept_scale * z); };
  Vector<T, V> kept;
  if constexpr (V % 4 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      const Normals n = normals_for<T>(key, element + i / 4, t.stage, KEPT);
      kept.value[i] = keep(i, n.n0), kept.value[i + 1] = keep(i + 1, n.n1);
      kept.value[i + 2] = keep(i + 2, n.n2), kept.value[i + 3] = keep(i + 3, n.n3);
    }
  } else {
    static_assert(V == 1);
    const Words w = philox(key, element, t.stage, KEPT);
    const bool later = channel / 2 % 2;
    float even, odd;
    box_muller<T>(later ? w.w2 : w.w0, later ? w.w3 : w.w1, even, odd);
    kept.value[0] = keep(0, channel % 2 ? odd : even);
  }
  return kept;
}

template <class T, int V>
__global__ void __launch_bounds__(TOKEN_THREADS)
    upsample_selected_kernel(const T* __restrict__ low, T* __restrict__ out, const int32_t* __restrict__ inverse,
                             const int64_t* __restrict__ seed, Transition t, bool whole) {
  const uint32_t groups = t.channels / V, i = blockIdx.x * TOKEN_THREADS + threadIdx.x, b = sample_of_block();
  const uint32_t token = i / groups, channel = i % groups * V, y = token / t.width, x = token % t.width;
  const uint32_t n = t.height * t.width;
  if (token >= n || b >= t.batch) return;
  const int32_t* corner = inverse + 4 * (static_cast<int64_t>(b) * n + y * t.width) + 2 * x;
  float value[V];
  load(low + b * t.stride_b + token * t.stride_n + channel * t.stride_c, t.stride_c, whole, value);
  const uint64_t key = static_cast<uint64_t>(seed[b]);
  const auto write = [&](uint32_t m, const Vector<T, V>& vector) {
    const uint32_t row = corner[m / 2 * 2 * t.width + m % 2];
    if (row < t.total) store(out + static_cast<int64_t>(row) * t.channels + channel, vector);
  };
  if (corner[1] != corner[0]) {
    upsample_token<T>(value, token, channel, key, t, write);
  } else {
    write(0, keep_token<T>(value, token, channel, key, t));
  }
}

template <class T, int V>
__global__ void __launch_bounds__(TOKEN_THREADS)
    upsample_remaining_kernel(const T* __restrict__ packed, T* __restrict__ out, const int32_t* __restrict__ inverse,
                              const int64_t* __restrict__ seed, Transition t, bool whole) {
  const uint32_t groups = t.channels / V, i = blockIdx.x * TOKEN_THREADS + threadIdx.x, b = sample_of_block();
  const uint32_t token = i / groups, channel = i % groups * V, y = token / t.width, x = token % t.width;
  const uint32_t n = t.height * t.width;
  if (token >= n || b >= t.batch) return;
  const int64_t first = 4 * (static_cast<int64_t>(b) * n + y * t.width) + 2 * x;
  const int32_t* corner = inverse + first;
  const uint64_t key = static_cast<uint64_t>(seed[b]);
  const auto read = [&](uint32_t row, float (&value)[V]) {
    const bool exists = row < t.total;
    if (exists) load(packed + row * t.stride_n + channel * t.stride_c, t.stride_c, whole, value);
    return exists;
  };
  const auto write = [&](uint32_t m, const Vector<T, V>& vector) {
    store(out + (first + m / 2 * 2 * t.width + m % 2) * t.channels + channel, vector);
  };
  float value[V];
  if (corner[1] == corner[0]) {
    if (read(corner[0], value)) {
      upsample_token<T>(value, token, channel, key, t, write);
    } else {
      for (uint32_t m = 0; m < 4; ++m) write(m, missing<T, V>());
    }
  } else {
#pragma unroll 1
    for (uint32_t m = 0; m < 4; ++m) {
      const uint32_t place = m / 2 * 2 * t.width + m % 2;
      const bool exists = read(corner[place], value);
      write(m, exists ? keep_token<T>(value, 4 * y * t.width + 2 * x + place, channel, key, t) : missing<T, V>());
    }
  }
}

// run(V, grid, whole) with enough threads for `rows` of each sample: V is WIDE where the channels allow it, else LEAST;
// whole is whether all that is read are aligned vectors of V.
template <int WIDE, int LEAST, class T, class F>
void for_channels(const Transition& t, const T* from, int64_t rows, const F& run) {
  if (rows * t.channels * t.batch == 0) return;
  const auto run_at = [&](auto v) {
    const bool whole = whole_vectors<v>(from, t.stride_c, {t.stride_b, t.stride_n});
    run(v, grid_of(rows * (t.channels / v), TOKEN_THREADS, t.batch), whole);
  };
  t.channels % WIDE == 0 ? run_at(Count<WIDE>{}) : run_at(Count<LEAST>{});
}

template <class T, class Launch>
void upsample_selected(const Launch& launch, const T* low, T* out, const int32_t* inverse, const int64_t* seed,
                       const Transition& t, bool pixel) {
  const int64_t tiles = t.height * ((static_cast<int64_t>(t.width) + TILE_TOKENS - 1) / TILE_TOKENS);
  const auto run = [&](auto kernel, dim3 grid, bool whole) {
    launch(kernel, grid, TOKEN_THREADS, low, out, inverse, seed, t, whole);
  };
  if (pixel) {
    for_channels<32 / sizeof(T), 4>(t, low, 4 * TILE_TOKENS * tiles, [&](auto v, dim3 grid, bool whole) {
      run(upsample_selected_pixels_kernel<T, v>, grid, whole);
    });
  } else {
    for_channels<16 / sizeof(T), 1>(t, low, static_cast<int64_t>(t.height) * t.width, [&](auto v, dim3 grid, bool whole) { run(upsample_selected_kernel<T, v>, grid, whole); });
  }
}

template <class T, class Launch>
void upsample_remaining(const Launch& launch, const T* packed, T* out, const int32_t* inverse, const int64_t* seed,
                        const Transition& t, bool pixel) {
  const int64_t n = static_cast<int64_t>(t.height) * t.width;
  const auto run = [&](auto kernel, dim3 grid, bool whole) {
    launch(kernel, grid, TOKEN_THREADS, packed, out, inverse, seed, t, whole);
  };
  if (pixel) {
    for_channels<32 / sizeof(T), 4>(t, packed, 4 * n, [&](auto v, dim3 grid, bool whole) {
      run(upsample_remaining_pixels_kernel<T, v>, grid, whole);
    });
  } else {
    for_channels<16 / sizeof(T), 1>(t, packed, n, [&](auto v, dim3 grid, bool whole) {
      run(upsample_remaining_kernel<T, v>, grid, whole);
    });
  }
}

}  // namespace ralu::cuda
