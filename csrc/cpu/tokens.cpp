#include "tokens.h"

#include <numeric>

#include "dispatch.h"

namespace ralu::cpu {

// ---- the plan ----

// In the order of the scores; -0 ties with 0, and NaN is below everything.
static uint32_t sort_key(float score) {
  if (score != score) return 0;
  const uint32_t bits = bits_of(score == 0.0f ? 0.0f : score);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static void promote_highest(const std::vector<float>& scores, int64_t count, uint8_t* promoted) {
  std::vector<uint32_t> key(scores.size());
  std::transform(scores.begin(), scores.end(), key.begin(), sort_key);
  if (count == 0) return;
  std::vector<uint32_t> order = key;
  std::nth_element(order.begin(), order.begin() + (count - 1), order.end(), std::greater<>());
  const uint32_t last = order[count - 1];
  int64_t ties = count - std::count_if(key.begin(), key.end(), [&](uint32_t x) { return x > last; });
  for (size_t i = 0; i < key.size(); ++i) promoted[i] = key[i] > last || (key[i] == last && ties-- > 0);
}

void plan_tokens(Tensor scores, Tensor cu_seqlens, Tensor source, Tensor child, Tensor inverse, Tensor positions,
                 int64_t width, int64_t count, std::optional<double> threshold) {
  const int64_t batch = scores.size(0), n = scores.size(1), stride_b = scores.stride(0), stride_n = scores.stride(1);
  std::vector<uint8_t> promoted(batch * n);
  for_dtype(scores, [&](auto type) {
    const auto* from = input<decltype(type)>(scores);
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> sample(n);
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t i = 0; i < n; ++i) sample[i] = to_float(from[b * stride_b + i * stride_n]);
        uint8_t* chosen = promoted.data() + b * n;
        if (threshold) {
          const float least = static_cast<float>(*threshold);
          for (int64_t i = 0; i < n; ++i) chosen[i] = sample[i] >= least;
        } else {
          promote_highest(sample, count, chosen);
        }
      }
    });
  });

  int32_t* start = output<int32_t>(cu_seqlens);
  start[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const uint8_t* chosen = promoted.data() + b * n;
    start[b + 1] = start[b] + static_cast<int32_t>(n + 3 * std::accumulate(chosen, chosen + n, int64_t{0}));
  }
  STD_TORCH_CHECK(start[batch] == source.size(0), "the plan has ", start[batch], " rows, but room for ",
                  source.size(0));

  int32_t *source_row = output<int32_t>(source), *child_row = output<int32_t>(child);
  int32_t* covered_by = output<int32_t>(inverse);
  float* position = output<float>(positions);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int64_t row = start[b];
      for (int64_t i = 0; i < n; ++i) {
        const int64_t y = i / width, x = i % width;
        const bool split = promoted[b * n + i];
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

// ---- the moves ----

// The packed rows of a low token's four children, which are one row if it was carried.
struct Rows {
  int64_t row[4];
  bool promoted;

  // corner: the place of the first child in `inverse`.
  RALU_INLINE Rows(const int32_t* corner, int64_t width)
      : row{corner[0], corner[1], corner[2 * width], corner[2 * width + 1]}, promoted(row[1] != row[0]) {}
};

static Move move_of(int64_t channels, int64_t stride_c, uint32_t stage, double scale, double noise_scale,
                    double carry_scale, double k, bool pixel) {
  return {static_cast<float>(scale), static_cast<float>(noise_scale), static_cast<float>(carry_scale),
          static_cast<float>(k),     stage,                           channels,
          stride_c,                  pixel};
}

constexpr int64_t GRAIN = 32;  // low tokens

void promote_tokens(Tensor low, Tensor out, Tensor inverse, Tensor seed, int64_t width, double scale,
                    double noise_scale, double carry_scale, double k, bool pixel) {
  const int64_t n = low.size(1), channels = low.size(2), stride_b = low.stride(0), stride_n = low.stride(1);
  const Move move = move_of(channels, low.stride(2), PROMOTE, scale, noise_scale, carry_scale, k, pixel);
  const Elements element(n / width, width, channels, pixel);
  const int64_t* keys = input<int64_t>(seed);
  const int32_t* covered_by = input<int32_t>(inverse);
  for_dtype(low, [&](auto type) {
    using T = decltype(type);
    const T* from = input<T>(low);
    T* to = output<T>(out);
    parallel(low.size(0) * n, GRAIN, [&](Isa isa, int64_t begin, int64_t end) RALU_BODY {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / n, token = i % n, y = token / width, x = token % width;
        const int64_t corner = 4 * (b * n + y * width) + 2 * x;
        const Rows rows(covered_by + corner, width);
        const T* value = from + b * stride_b + token * stride_n;
        const uint64_t key = static_cast<uint64_t>(keys[b]);
        if (rows.promoted) {
          T* const children[4] = {to + rows.row[0] * channels, to + rows.row[1] * channels,
                                  to + rows.row[2] * channels, to + rows.row[3] * channels};
          enlarge_token(isa, value, children, element.base.data(), element.offset(y, x), key, move);
        } else {
          carry_token(isa, value, to + rows.row[0] * channels, token, key, move);
        }
      }
    });
  });
}

void merge_tokens(Tensor packed, Tensor out, Tensor inverse, Tensor seed, int64_t width, double scale,
                  double noise_scale, double carry_scale, double k, bool pixel) {
  const int64_t n = inverse.size(1) / 4, height = n / width, channels = packed.size(1), stride_n = packed.stride(0);
  const Move move = move_of(channels, packed.stride(1), MERGE, scale, noise_scale, carry_scale, k, pixel);
  const Elements element(height, width, channels, pixel);
  const int64_t* keys = input<int64_t>(seed);
  const int32_t* covered_by = input<int32_t>(inverse);
  for_dtype(packed, [&](auto type) {
    using T = decltype(type);
    const T* from = input<T>(packed);
    T* to = output<T>(out);
    parallel(inverse.size(0) * n, GRAIN, [&](Isa isa, int64_t begin, int64_t end) RALU_BODY {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / n, token = i % n, y = token / width, x = token % width;
        const int64_t corner = 4 * (b * n + y * width) + 2 * x;
        const Rows rows(covered_by + corner, width);
        const uint64_t key = static_cast<uint64_t>(keys[b]);
        T* first = to + corner * channels;
        T* const children[4] = {first, first + channels, first + 2 * width * channels,
                                first + (2 * width + 1) * channels};
        if (rows.promoted) {
          for (int64_t m = 0; m < 4; ++m)
            carry_token(isa, from + rows.row[m] * stride_n, children[m],
                        (2 * y + m / 2) * 2 * width + 2 * x + m % 2, key, move);
        } else {
          enlarge_token(isa, from + rows.row[0] * stride_n, children, element.base.data(), element.offset(y, x), key,
                        move);
        }
      }
    });
  });
}

}  // namespace ralu::cpu
