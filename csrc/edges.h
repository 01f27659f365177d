// Canny's edge detector as OpenCV defines it, pixel by pixel, for host and device: 3x3 Sobel, L1 gradient, no
// smoothing.
#pragma once

#include "philox.h"

namespace ralu {

constexpr uint8_t NONE = 0, WEAK = 1, STRONG = 255;  // edges until the hysteresis is through; STRONG is then final

struct Gradient {
  int x, y;
};

RALU_INLINE int absolute(int x) { return x < 0 ? -x : x; }

// Of the pixel at (y + 1, x + 1); p[row][column] are pixels.
template <class Pixels>
RALU_INLINE Gradient sobel(const Pixels& p, int y, int x) {
  const int corners = p[y + 2][x + 2] - p[y][x], others = p[y][x + 2] - p[y + 2][x];
  return {corners + others + 2 * (p[y + 1][x + 2] - p[y + 1][x]),
          corners - others + 2 * (p[y + 2][x + 1] - p[y][x + 1])};
}

RALU_INLINE int steepness_of(Gradient g) { return absolute(g.x) + absolute(g.y); }

// Whether no neighbour along the gradient is steeper than s[y][x]. Which comparisons are strict decides between equals.
template <class Steepness>
RALU_INLINE bool is_ridge(Gradient g, const Steepness& s, int y, int x) {
  constexpr int SHIFT = 15, TAN_22 = 13573;  // tan(22.5 degrees) = sqrt(2) - 1 in fixed point; tan(67.5) is 2 more
  const int m = s[y][x], across = absolute(g.x), along = absolute(g.y) << SHIFT, flat = across * TAN_22;
  if (along < flat) return m > s[y][x - 1] && m >= s[y][x + 1];
  if (along > flat + (across << (SHIFT + 1))) return m > s[y - 1][x] && m >= s[y + 1][x];
  const int side = (g.x ^ g.y) < 0 ? -1 : 1;
  return m > s[y - 1][x - side] && m > s[y + 1][x + side];
}

}  // namespace ralu
