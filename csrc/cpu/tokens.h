// One token of the transitions between stages, for any instruction set.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "simd.h"

namespace ralu::cpu {

// The random counter's element of an upsampled token's channel is base[lane] + offset(y, x); see reference.py for the
// numbering. Lanes are channels, but at pixel granularity: there a group of channels is gone through by inner pixel,
// because inner pixel p of all of them makes child p.
struct Elements {
  std::vector<uint32_t> base;
  int64_t row, column;

  Elements(int64_t height, int64_t width, int64_t channels, bool pixel)
      : base((channels + 15) / 16 * 16), row(pixel ? 4 * width : width * channels), column(pixel ? 2 : channels) {
    for (int64_t first = 0; first < channels; first += RUN) {
      const int64_t count = std::min<int64_t>(RUN, channels - first);
      for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t inner = pixel ? 4 * (lane % (count / 4)) + lane / (count / 4) : lane;
        const int64_t channel = first + inner, plane = channel / 4, py = channel / 2 % 2, px = channel % 2;
        base[first + lane] = pixel ? plane * 4 * height * width + py * 2 * width + px : channel;
      }
    }
  }

  uint32_t offset(int64_t y, int64_t x) const { return static_cast<uint32_t>(y * row + x * column); }
};

struct Transition {
  float scale, noise_scale, kept_scale, k;
  uint32_t stage;
  int64_t channels, stride_c;  // of a row that is read; rows that are written are contiguous
  bool pixel;
};

// from: the low token at (y, x); to: its four children.
template <class T>
RALU_INLINE void upsample_token(Isa isa, const T* from, T* const* to, const Elements& element, int64_t y, int64_t x,
                                uint64_t key, const Transition& t) {
  for (int64_t first = 0; first < t.channels; first += RUN) {
    const int32_t count = static_cast<int32_t>(std::min<int64_t>(RUN, t.channels - first)), quarter = count / 4;
    const int32_t padded = (count + 15) & ~15;  // whole vectors
    const T* source = from + first * t.stride_c;
    float value[RUN], child[4][RUN];
    if (t.pixel) {
      for (int32_t c = 0; c < quarter; ++c)
        for (int32_t p = 0; p < 4; ++p) value[p * quarter + c] = to_float(source[(4 * c + p) * t.stride_c]);
    } else {
      for (int32_t c = 0; c < count; ++c) value[c] = to_float(source[c * t.stride_c]);
    }
    std::fill(value + count, value + padded, 0.0f);
    for (int32_t m = 0; m < 4; ++m) prefetch(to[m] + first, count);
    Run words;
    philox_run(isa, key, element.base.data() + first, element.offset(y, x), t.stage, UPSAMPLED, padded, words);
    for (int32_t j = 0; j < padded; ++j) {
      const Normals n = normals(words[j]);
      const Normals o = upsample_block(value[j], n, t.scale, t.noise_scale, t.k);
      child[0][j] = o.n0, child[1][j] = o.n1, child[2][j] = o.n2, child[3][j] = o.n3;
    }
    if (t.pixel) {
      for (int32_t p = 0; p < 4; ++p) {
        T* out = to[p] + first;
        for (int32_t c = 0; c < quarter; ++c) {
          const int32_t lane = p * quarter + c;
          out[4 * c] = from_float<T>(child[0][lane]);
          out[4 * c + 1] = from_float<T>(child[1][lane]);
          out[4 * c + 2] = from_float<T>(child[2][lane]);
          out[4 * c + 3] = from_float<T>(child[3][lane]);
        }
      }
    } else {
      for (int32_t m = 0; m < 4; ++m)
        for (int32_t c = 0; c < count; ++c) to[m][first + c] = from_float<T>(child[m][c]);
    }
  }
}

// Kept tokens, or pieces of long ones, gathered until their random numbers fill a run.
template <class T>
class Kept {
 public:
  RALU_INLINE Kept(Isa isa, const Transition& t) : isa_(isa), t_(t) {}

  // token: its place in the grid of its size.
  RALU_INLINE void add(const T* from, T* to, int64_t token, uint64_t key) {
    const int64_t fours = (t_.channels + 3) / 4;
    for (int64_t first = 0; first < fours; first += RUN) {
      const int32_t m = static_cast<int32_t>(std::min<int64_t>(RUN, fours - first));
      if (used_ + m > RUN || key != key_) finish();
      key_ = key;
      std::iota(element_ + used_, element_ + used_ + m, static_cast<uint32_t>(token * fours + first));
      const int32_t count = static_cast<int32_t>(std::min<int64_t>(4 * RUN, t_.channels - 4 * first));
      piece_[pieces_++] = {from + 4 * first * t_.stride_c, to + 4 * first, count};
      prefetch(to + 4 * first, count);
      if (t_.stride_c == 1) prefetch(from + 4 * first, count);
      used_ += m;
    }
  }

  RALU_INLINE void finish() {
    const int32_t padded = (used_ + 15) & ~15;  // whole vectors
    Run words;
    philox_run(isa_, key_, element_, 0, t_.stage, KEPT, padded, words);
    float z[4 * RUN];
    for (int32_t j = 0; j < padded; ++j) {
      const Normals n = normals(words[j]);
      z[4 * j] = n.n0, z[4 * j + 1] = n.n1, z[4 * j + 2] = n.n2, z[4 * j + 3] = n.n3;
    }
    const float* noise = z;
    for (int32_t i = 0; i < pieces_; ++i) {
      const Piece& p = piece_[i];
      for (int32_t c = 0; c < p.count; ++c)
        p.to[c] = from_float<T>(t_.scale * to_float(p.from[c * t_.stride_c]) + t_.kept_scale * noise[c]);
      noise += (p.count + 3) & ~3;
    }
    used_ = pieces_ = 0;
  }

 private:
  struct Piece {
    const T* from;
    T* to;
    int32_t count;
  };

  const Isa isa_;
  const Transition& t_;
  uint64_t key_ = 0;
  int32_t used_ = 0, pieces_ = 0;
  uint32_t element_[RUN] = {};
  Piece piece_[RUN];
};

}  // namespace ralu::cpu
