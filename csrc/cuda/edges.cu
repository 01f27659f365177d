#include "edges.cuh"

#include "launch.h"

namespace ralu::cuda {

void canny(Tensor image, Tensor edges, Tensor parent, int64_t low, int64_t high) {
  const ImageBatch images{narrow(image.size(0)), narrow(image.size(1)), narrow(image.size(2))};
  canny(Launch(image), input<uint8_t>(image), output<uint8_t>(edges), output<int32_t>(parent), images,
        static_cast<int>(low), static_cast<int>(high));
}

}  // namespace ralu::cuda
