// The order in which low tokens are selected, for host and device.
#pragma once

#include "philox.h"

namespace ralu {

// In the order of the scores; -0 ties with 0, and NaN is below everything.
RALU_INLINE uint32_t sort_key(float score) {
  if (score != score) return 0;
  const uint32_t bits = score == 0.0f ? 0 : bits_of(score);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

}  // namespace ralu
