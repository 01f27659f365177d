#include "tokens.h"

#include <numeric>
#include <stdexcept>
#include <string>

#include "../sort_key.h"
#include "dispatch.h"

namespace ralu::cpu {

// ---- the plan ----

static void select_highest(const std::vector<float>& scores, int64_t count, uint8_t* selected) {
  std::vector<uint32_t> key(scores.size());
  std::transform(scores.begin(), scores.end(), key.begin(), sort_key);
  if (count == 0) return;
  std::vector<uint32_t> order = key;
  std::nth_element(order.begin(), order.begin() + (count - 1), order.end(), std::greater<>());
  const uint32_t last = order[count - 1];
  int64_t ties = count - std::count_if(key.begin(), key.end(), [&](uint32_t x) { return x > last; });
  for (size_t i = 0; i < key.size(); ++i) selected[i] = key[i] > last || (key[i] == last && ties-- > 0);
}

void plan_tokens(Tensor scores, Tensor cu_seqlens, Tensor source, Tensor child, Tensor inverse, Tensor positions,
                 int64_t width, int64_t count, std::optional<double> threshold) {
  const int64_t batch = scores.size(0), n = scores.size(1), stride_b = scores.stride(0), stride_n = scores.stride(1);
  std::vector<uint8_t> selected(batch * n);
  for_dtype(scores, [&](auto type) {
    const auto* from = input<decltype(type)>(scores);
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> sample(n);
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t i = 0; i < n; ++i) sample[i] = to_float(from[b * stride_b + i * stride_n]);
        uint8_t* chosen = selected.data() + b * n;
        if (threshold) {
          const float least = static_cast<float>(*threshold);
          for (int64_t i = 0; i < n; ++i) chosen[i] = sample[i] >= least;
        } else {
          select_highest(sample, count, chosen);
        }
      }
    });
  });

  int32_t* start = output<int32_t>(cu_seqlens);
  start[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const uint8_t* chosen = selected.data() + b * n;
    start[b + 1] = start[b] + static_cast<int32_t>(n + 3 * std::accumulate(chosen, chosen + n, int64_t{0}));
  }
  STD_TORCH_CHECK(start[batch] == source.size(0), "the plan has ", start[batch], " rows, but the outputs have ",
                  source.size(0));

  int32_t *source_row = output<int32_t>(source), *child_row = output<int32_t>(child);
  int32_t* covered_by = output<int32_t>(inverse);
  float* position = output<float>(positions);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int64_t row = start[b];
      for (int64_t i = 0; i < n; ++i) {
        const int64_t y = i / width, x = i % width;
        const bool split = selected[b * n + i];
        int32_t* high = covered_by + 4 * (b * n + y * width) + 2 * x;
        for (int64_t m = 0; m < 4; ++m) high[m / 2 * 2 * width + m % 2] = static_cast<int32_t>(row + (split ? m : 0));
        for (int64_t m = 0; m < (split ? 4 : 1); ++m, ++row) {
          source_row[row] = static_cast<int32_t>(i);
          child_row[row] = split ? static_cast<int32_t>(m) : -1;
          position[2 * row] = static_cast<float>(y) + 0.5f * static_cast<float>(m / 2);
          position[2 * row + 1] = static_cast<float>(x) + 0.5f * static_cast<float>(m % 2);
        }
      }
    }
  });
}

// ---- the transitions ----

// What is indexed by must be the rows of one layout, each once, in the order of the low tokens. (CUDA kernels only stay
// inside the tensors: looking would wait.)
static void check_rows(const Tensor& inverse, int64_t width, int64_t total) {
  const int32_t* row = input<int32_t>(inverse);
  const int64_t batch = inverse.size(0), n = inverse.size(1) / 4;
  int32_t next = 0;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t y = 0, i = 0; y < n / width; ++y) {
      const int32_t *upper = row + 4 * (b * n + y * width), *lower = upper + 2 * width;
      for (int64_t x = 0; x < width; ++x, ++i) {
        const int32_t named[4] = {upper[2 * x], upper[2 * x + 1], lower[2 * x], lower[2 * x + 1]};
        const int32_t step = named[1] != named[0];
        for (int32_t m = 0; m < 4; ++m) {
          if (named[m] != next + m * step)  // in Python a ValueError
            throw std::invalid_argument("plan.inverse must be row " + std::to_string(next + m * step) +
                                        " for low token " + std::to_string(i) + " of sample " + std::to_string(b) +
                                        ", got " + std::to_string(named[m]));
        }
        next += 1 + 3 * step;
      }
    }
  }
  if (next != total)
    throw std::invalid_argument("plan.inverse must be rows [0, " + std::to_string(total) + "), got [0, " +
                                std::to_string(next) + ")");
}

// A low token of a plan.
struct LowToken {
  int64_t sample, y, x, index, corner;  // corner: the first of its children on the high grid, through all samples
  int64_t row[4];                       // the packed rows of its children, which are one row if it was kept
  bool selected;
};

// body(token), marked RALU_BODY, for the low tokens [begin, end) of a batch's, n in a sample.
template <class F>
RALU_INLINE void for_low_tokens(int64_t begin, int64_t end, const int32_t* inverse, int64_t n, int64_t width,
                                const F& body) {
  LowToken token{begin / n, begin % n / width, begin % width, begin % n};  // then counted: a division takes its time
  for (int64_t i = begin; i < end; ++i) {
    token.corner = 4 * i - 2 * token.x;
    const int32_t* high = inverse + token.corner;
    for (int64_t m = 0; m < 4; ++m) token.row[m] = high[m / 2 * 2 * width + m % 2];
    token.selected = token.row[1] != token.row[0];
    body(token);
    ++token.index;
    if (++token.x == width) token.x = 0, ++token.y;
    if (token.index == n) token.index = token.y = 0, ++token.sample;
  }
}

static Transition transition_of(int64_t channels, int64_t stride_c, uint32_t stage, double scale, double noise_scale,
                                double kept_scale, double k, bool pixel) {
  return {static_cast<float>(scale),
          static_cast<float>(noise_scale),
          static_cast<float>(kept_scale),
          static_cast<float>(k),
          stage,
          channels,
          stride_c,
          pixel};
}

constexpr int64_t GRAIN = 32;  // low tokens

void upsample_selected(Tensor low, Tensor out, Tensor inverse, Tensor seed, int64_t width, double scale,
                       double noise_scale, double kept_scale, double k, bool pixel) {
  check_plan(inverse, seed, low.size(0), low.size(1), width);
  check_rows(inverse, width, out.size(0));
  const int64_t n = low.size(1), channels = low.size(2), stride_b = low.stride(0), stride_n = low.stride(1);
  const Transition t = transition_of(channels, low.stride(2), TO_MIXED, scale, noise_scale, kept_scale, k, pixel);
  const Elements element(n / width, width, channels, pixel);
  const int64_t* keys = input<int64_t>(seed);
  const int32_t* covered_by = input<int32_t>(inverse);
  for_dtype(low, [&](auto type) {
    using T = decltype(type);
    const T* from = input<T>(low);
    T* to = output<T>(out);
    parallel(low.size(0) * n, GRAIN, [&](Isa isa, int64_t begin, int64_t end) RALU_BODY {
      Kept<T> kept(isa, t);
      for_low_tokens(begin, end, covered_by, n, width, [&](const LowToken& token) RALU_BODY {
        const T* value = from + token.sample * stride_b + token.index * stride_n;
        const uint64_t key = static_cast<uint64_t>(keys[token.sample]);
        T* first = to + token.row[0] * channels;
        if (token.selected) {
          T* const children[4] = {first, to + token.row[1] * channels, to + token.row[2] * channels,
                                  to + token.row[3] * channels};
          upsample_token(isa, value, children, element, token.y, token.x, key, t);
        } else {
          kept.add(value, first, token.index, key);
        }
      });
      kept.finish();
    });
  });
}

void upsample_remaining(Tensor packed, Tensor out, Tensor inverse, Tensor seed, int64_t width, double scale,
                        double noise_scale, double kept_scale, double k, bool pixel) {
  check_plan(inverse, seed, inverse.size(0), inverse.size(1) / 4, width);
  check_rows(inverse, width, packed.size(0));
  const int64_t n = inverse.size(1) / 4, height = n / width, channels = packed.size(1), stride_n = packed.stride(0);
  const Transition t = transition_of(channels, packed.stride(1), TO_FULL, scale, noise_scale, kept_scale, k, pixel);
  const Elements element(height, width, channels, pixel);
  const int64_t* keys = input<int64_t>(seed);
  const int32_t* covered_by = input<int32_t>(inverse);
  for_dtype(packed, [&](auto type) {
    using T = decltype(type);
    const T* from = input<T>(packed);
    T* to = output<T>(out);
    parallel(inverse.size(0) * n, GRAIN, [&](Isa isa, int64_t begin, int64_t end) RALU_BODY {
      Kept<T> kept(isa, t);
      for_low_tokens(begin, end, covered_by, n, width, [&](const LowToken& token) RALU_BODY {
        const uint64_t key = static_cast<uint64_t>(keys[token.sample]);
        const int64_t place[4] = {0, 1, 2 * width, 2 * width + 1};
        T* first = to + token.corner * channels;
        if (token.selected) {
          for (int64_t m = 0; m < 4; ++m)
            kept.add(from + token.row[m] * stride_n, first + place[m] * channels,
                     token.corner - 4 * n * token.sample + place[m], key);
        } else {
          T* const children[4] = {first, first + channels, first + place[2] * channels, first + place[3] * channels};
          upsample_token(isa, from + token.row[0] * stride_n, children, element, token.y, token.x, key, t);
        }
      });
      kept.finish();
    });
  });
}

}  // namespace ralu::cpu
