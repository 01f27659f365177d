"""2x nearest-neighbour enlargement of a latent with block-correlated noise, one pass (RALU supplement A.1)."""

import torch
from torch import Tensor

from . import reference
from ._backend import check, check_noise, check_values, register, seed_tensor


def _fake(x, scale, noise_scale, c, seed, stage):
    b, channels, h, w = x.shape
    return x.new_empty(b, channels, 2 * h, 2 * w)


register(
    "upsample_renoise(Tensor x, float scale, float noise_scale, float c, Tensor seed, int stage, str backend)"
    " -> Tensor",
    _fake,
    reference=reference.upsample_renoise,
)


def upsample_renoise(
    x: Tensor,
    scale: float,
    noise_scale: float,
    c: float,
    seed: Tensor | int,
    *,
    stage: int = 2,
    backend: str = "auto",
) -> Tensor:
    """``scale * Up(x) + noise_scale * z`` with z ~ N(0, I - c * Sigma): enter the next stage (supplement A.1).

    Up is nearest-neighbour 2x; Sigma has a 4x4 block of ones for every 2x2 block of the output. z = eps - k * (sum of
    the block's four eps), k = (1 - sqrt(1 - 4c)) / 4. The noise depends on ``seed``, ``stage`` and the place inside the
    sample alone, and equals that of `promote_tokens` and `merge_tokens` at pixel granularity.

    Args:
        x: (B, C, H, W) float32, float16 or bfloat16, any strides.
        scale, noise_scale: a and b of supplement A.1.
        c: correlation of the noise, in [0, 1/4].
        seed: int64 (B,), the 64-bit key of each sample, on x's device; or an int, the key of every sample.
        stage: the stage that is entered, a non-negative int; a word of the random counter, 2 or 3 in RALU.
        backend: "auto", "triton" or "reference".

    Returns:
        Contiguous (B, C, 2H, 2W) in x's dtype; the arithmetic is float32. Forward only.

    Raises:
        ValueError: an argument is not as described, or the backend cannot run here.
    """
    check_values("x", x, "(B, C, H, W)")
    check_noise(backend, x.device, c, 4 * x.shape[1] * x.shape[2] * x.shape[3])
    check(0 <= stage < 2**31, "stage", stage, "in [0, 2^31)")
    seed = seed_tensor(seed, x.shape[0], x.device)
    return torch.ops.ralu_kernels.upsample_renoise(x, scale, noise_scale, c, seed, stage, backend)
