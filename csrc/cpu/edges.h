// Canny's edge detector on rows of an image, for any instruction set.
#pragma once

#include <algorithm>
#include <vector>

#include "../edges.h"
#include "simd.h"

namespace ralu::cpu {

struct Image {
  const uint8_t* pixels;
  uint8_t* edges;
  int64_t height, width;
};

// The gradients of one row, and their steepness with a zero at either end.
struct GradientRow {
  std::vector<int16_t> x, y, steepness;

  explicit GradientRow(int64_t width) : x(width), y(width), steepness(width + 2) {}
};

// A row outside the image is flat.
RALU_INLINE void fill_row(const Image& image, int64_t y, GradientRow& row) {
  const int64_t width = image.width;
  if (y < 0 || y >= image.height) {
    std::fill(row.steepness.begin(), row.steepness.end(), 0);
    return;
  }
  const uint8_t* lines[3];  // the borders are replicated
  for (int64_t i = 0; i < 3; ++i) lines[i] = image.pixels + std::clamp<int64_t>(y + i - 1, 0, image.height - 1) * width;
  // Bytes may alias anything, which would keep the loop from being vectorised.
  int16_t* __restrict__ gx = row.x.data();
  int16_t* __restrict__ gy = row.y.data();
  int16_t* __restrict__ steepness = row.steepness.data() + 1;
  const auto store = [&](int64_t x, Gradient g) {
    gx[x] = static_cast<int16_t>(g.x), gy[x] = static_cast<int16_t>(g.y);
    steepness[x] = static_cast<int16_t>(steepness_of(g));
  };
  const uint8_t* __restrict__ above = lines[0];
  const uint8_t* __restrict__ here = lines[1];
  const uint8_t* __restrict__ below = lines[2];
  for (int64_t x = 1; x < width - 1; ++x) {
    const uint8_t* around[3] = {above + x - 1, here + x - 1, below + x - 1};
    store(x, sobel(around, 0, 0));
  }
  for (const int64_t x : {int64_t{0}, width - 1}) {
    const int64_t left = std::max<int64_t>(x - 1, 0), right = std::min(x + 1, width - 1);
    const uint8_t around[3][3] = {{above[left], above[x], above[right]},
                                  {here[left], here[x], here[right]},
                                  {below[left], below[x], below[right]}};
    store(x, sobel(around, 0, 0));
  }
}

// The class of the pixels of rows [begin, end).
RALU_INLINE void classify_rows(const Image& image, int64_t begin, int64_t end, int low, int high) {
  const int64_t width = image.width;
  GradientRow rows[3] = {GradientRow(width), GradientRow(width), GradientRow(width)};
  fill_row(image, begin - 1, rows[(begin + 2) % 3]);
  fill_row(image, begin, rows[begin % 3]);
  for (int64_t y = begin; y < end; ++y) {
    const GradientRow& row = rows[y % 3];
    fill_row(image, y + 1, rows[(y + 1) % 3]);
    const int16_t* steepness[3] = {rows[(y + 2) % 3].steepness.data(), row.steepness.data(),
                                   rows[(y + 1) % 3].steepness.data()};
    const int16_t *gx = row.x.data(), *gy = row.y.data(), *here = steepness[1] + 1;
    uint8_t* __restrict__ edges = image.edges + y * width;
    memset(edges, NONE, width);
    for (int64_t x = 0; x < width; ++x) {
      if (here[x] > low && is_ridge({gx[x], gy[x]}, steepness, 1, static_cast<int>(x + 1)))
        edges[x] = here[x] > high ? STRONG : WEAK;
    }
  }
}

// Hysteresis: what is connected to a strong pixel is strong, the other weak pixels are none.
inline void connect(const Image& image) {
  const int64_t height = image.height, width = image.width, size = height * width;
  uint8_t *edges = image.edges, *end = edges + size;
  std::vector<int64_t> open;
  for (uint8_t* p = edges; (p = static_cast<uint8_t*>(memchr(p, STRONG, end - p))); ++p) {
    open.push_back(p - edges);
    while (!open.empty()) {
      const int64_t place = open.back(), y = place / width, x = place % width;
      open.pop_back();
      for (int64_t v = std::max<int64_t>(y - 1, 0); v <= std::min(y + 1, height - 1); ++v) {
        for (int64_t u = std::max<int64_t>(x - 1, 0); u <= std::min(x + 1, width - 1); ++u) {
          if (edges[v * width + u] != WEAK) continue;
          edges[v * width + u] = STRONG;
          open.push_back(v * width + u);
        }
      }
    }
  }
  for (int64_t i = 0; i < size; ++i) edges[i] = edges[i] == STRONG ? STRONG : NONE;
}

}  // namespace ralu::cpu
