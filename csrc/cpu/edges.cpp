#include "edges.h"

#include "dispatch.h"

namespace ralu::cpu {

void canny(Tensor image, Tensor edges, Tensor, int64_t low, int64_t high) {
  const int64_t batch = image.size(0), height = image.size(1), width = image.size(2), size = height * width;
  if (batch * size == 0) return;
  const int least = static_cast<int>(std::min(low, high)), most = static_cast<int>(std::max(low, high));
  const uint8_t* from = input<uint8_t>(image);
  uint8_t* to = output<uint8_t>(edges);
  const auto sample = [&](int64_t b) { return Image{from + b * size, to + b * size, height, width}; };
  // Rows of all images; the first two of a task are worked out by its neighbour too.
  parallel(batch * height, 32, [&](Isa, int64_t begin, int64_t end) RALU_BODY {
    for (int64_t row = begin; row < end;) {
      const int64_t b = row / height, first = row % height, count = std::min(height - first, end - row);
      classify_rows(sample(b), first, first + count, least, most);
      row += count;
    }
  });
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) connect(sample(b));
  });
}

}  // namespace ralu::cpu
