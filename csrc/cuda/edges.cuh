// Canny's edge detector on tiles of an image. Hysteresis labels the connected components of candidate pixels by
// union-find, so that no host has to wait and ask whether it has converged.
#pragma once

#include "../edges.h"
#include "vector.cuh"

namespace ralu::cuda {

constexpr int CANNY_THREADS = 256, TILE_W = 32, TILE_H = 8;

struct ImageBatch {
  uint32_t batch, height, width;

  RALU_INLINE uint32_t size() const { return height * width; }
  RALU_INLINE int64_t start(uint32_t b) const { return static_cast<int64_t>(b) * height * width; }
};

using PixelTile = uint8_t[TILE_H + 4][TILE_W + 4];
using SteepnessTile = int16_t[TILE_H + 2][TILE_W + 2];

// The class of every pixel; candidates become components of their own.
__global__ void __launch_bounds__(CANNY_THREADS)
    classify_kernel(const uint8_t* __restrict__ image, uint8_t* __restrict__ edges, int32_t* __restrict__ parent,
                    ImageBatch images, int low, int high) {
  __shared__ PixelTile pixel;
  __shared__ SteepnessTile steepness;
  const uint32_t tiles = (images.width + TILE_W - 1) / TILE_W;
  const uint32_t top = blockIdx.x / tiles * TILE_H, left = blockIdx.x % tiles * TILE_W;
  const uint32_t y = threadIdx.x / TILE_W, x = threadIdx.x % TILE_W, b = sample_of_block();
  if (b >= images.batch) return;
  const int64_t start = images.start(b);
  for (uint32_t i = threadIdx.x; i < (TILE_H + 4) * (TILE_W + 4); i += CANNY_THREADS) {
    const uint32_t row = i / (TILE_W + 4), column = i % (TILE_W + 4);
    const uint32_t from_y = min(max(top + row, 2u) - 2, images.height - 1);
    const uint32_t from_x = min(max(left + column, 2u) - 2, images.width - 1);
    pixel[row][column] = image[start + from_y * images.width + from_x];
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < (TILE_H + 2) * (TILE_W + 2); i += CANNY_THREADS) {
    const uint32_t row = i / (TILE_W + 2), column = i % (TILE_W + 2);
    // Unsigned: what is above or left of the image is far below or right of it.
    const bool inside = top + row - 1 < images.height && left + column - 1 < images.width;
    const Gradient g = sobel(pixel, row, column);
    steepness[row][column] = inside ? steepness_of(g) : 0;
  }
  __syncthreads();
  if (top + y < images.height && left + x < images.width) {
    const uint32_t place = (top + y) * images.width + left + x;
    const int m = steepness[y + 1][x + 1];
    const bool candidate = m > low && is_ridge(sobel(pixel, y + 1, x + 1), steepness, y + 1, x + 1);
    edges[start + place] = candidate ? (m > high ? STRONG : WEAK) : NONE;
    if (candidate) parent[start + place] = place;
  }
}

// The component's root. Halves the path on the way: a lost race leaves a longer path within the same component.
__device__ __forceinline__ int32_t find(volatile int32_t* parent, int32_t p) {
  for (int32_t q = parent[p]; q != p; q = parent[p]) {
    const int32_t next = parent[q];
    if (next != q) parent[p] = next;
    p = next;
  }
  return p;
}

// Roots are their component's first pixel. Whoever links a root that was linked in the meantime goes on from there.
__device__ __forceinline__ void unite(int32_t* parent, int32_t p, int32_t q) {
  while ((p = find(parent, p)) != (q = find(parent, q))) {
    const int32_t later = max(p, q), earlier = min(p, q), before = atomicMin(&parent[later], earlier);
    if (before == later) return;
    p = before, q = earlier;
  }
}

// Neighbours are linked through their common ones where these are candidates too.
__global__ void __launch_bounds__(CANNY_THREADS)
    link_kernel(const uint8_t* __restrict__ edges, int32_t* parent, ImageBatch images) {
  const uint32_t p = blockIdx.x * CANNY_THREADS + threadIdx.x, width = images.width, x = p % width;
  const uint32_t b = sample_of_block();
  if (p >= images.size() || b >= images.batch || !edges[images.start(b) + p]) return;
  const uint8_t* candidate = edges + images.start(b);
  int32_t* components = parent + images.start(b);
  if (p >= width && candidate[p - width]) {
    unite(components, p, p - width);
    return;
  }
  if (x > 0 && candidate[p - 1]) {
    unite(components, p, p - 1);
  } else if (x > 0 && p >= width && candidate[p - width - 1]) {
    unite(components, p, p - width - 1);
  }
  if (x + 1 < width && p >= width && candidate[p - width + 1]) unite(components, p, p - width + 1);
}

// A strong pixel makes its component's root strong.
__global__ void __launch_bounds__(CANNY_THREADS) flag_kernel(uint8_t* edges, int32_t* parent, ImageBatch images) {
  const uint32_t p = blockIdx.x * CANNY_THREADS + threadIdx.x, b = sample_of_block();
  if (p >= images.size() || b >= images.batch) return;
  const int64_t start = images.start(b);
  if (edges[start + p] == STRONG) edges[start + find(parent + start, p)] = STRONG;
}

// Weak pixels become what their root is.
__global__ void __launch_bounds__(CANNY_THREADS) resolve_kernel(uint8_t* edges, int32_t* parent, ImageBatch images) {
  const uint32_t p = blockIdx.x * CANNY_THREADS + threadIdx.x, b = sample_of_block();
  if (p >= images.size() || b >= images.batch) return;
  const int64_t start = images.start(b);
  if (edges[start + p] == WEAK) edges[start + p] = edges[start + find(parent + start, p)] == STRONG ? STRONG : NONE;
}

template <class Launch>
void canny(const Launch& launch, const uint8_t* image, uint8_t* edges, int32_t* parent, const ImageBatch& images,
           int low, int high) {
  if (images.batch == 0 || images.size() == 0) return;
  const auto tiles = [](uint32_t size, int tile) { return (static_cast<int64_t>(size) + tile - 1) / tile; };
  const int64_t blocks = tiles(images.height, TILE_H) * tiles(images.width, TILE_W);
  const dim3 pixels = grid_of(images.size(), CANNY_THREADS, images.batch);
  launch(classify_kernel, grid_of(blocks, 1, images.batch), CANNY_THREADS, image, edges, parent, images,
         std::min(low, high), std::max(low, high));
  launch(link_kernel, pixels, CANNY_THREADS, edges, parent, images);
  launch(flag_kernel, pixels, CANNY_THREADS, edges, parent, images);
  launch(resolve_kernel, pixels, CANNY_THREADS, edges, parent, images);
}

}  // namespace ralu::cuda
