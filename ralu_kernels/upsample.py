# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# (The arguments of Triton's kernels have no types in Python.)
"""2x nearest-neighbour upsampling of a latent with block-correlated noise, one pass (RALU supplement A.1)."""

import math
from typing import Any

import torch
from torch import Tensor

from . import _backend, reference
from ._backend import jit, register, tl, triton
from ._checks import check_values, correlation, finite, integer, seed_tensor


@jit
def _box_muller(word1, word2):
    """Make two normals of two random words, as tl.pair_uniform_to_normal does.

    tl.cos and tl.sin can reduce huge angles too, which needs local memory. Below 2 pi the three constants
    of Cody and Waite are exact, and the polynomials are those of Cephes.
    """
    u1 = tl.maximum(1.0e-7, tl.uint_to_uniform_float(word1))
    angle = 6.283185307179586 * tl.uint_to_uniform_float(word2)
    quadrant = (angle * 0.6366197723675814 + 0.5).to(tl.int32)
    q = quadrant.to(tl.float32)
    a = ((angle - q * 1.5703125) - q * 4.837512969970703e-4) - q * 7.549789948768648e-8
    a2 = a * a
    sine = ((-1.9515295891e-4 * a2 + 8.3321608736e-3) * a2 - 1.6666654611e-1) * a2 * a + a
    cosine = ((2.443315711809948e-5 * a2 - 1.388731625493765e-3) * a2 + 4.166664568298827e-2) * a2 * a2 - 0.5 * a2 + 1.0
    swap = quadrant % 2 != 0
    radius = tl.sqrt(-2.0 * tl.log(u1))
    n1 = radius * tl.where(swap, sine, cosine)
    n2 = radius * tl.where(swap, cosine, sine)
    return tl.where((quadrant + 1) // 2 % 2 != 0, -n1, n1), tl.where(quadrant // 2 % 2 != 0, -n2, n2)


@jit
def normals(seed, element, stage, kind):
    """Make four normals of the counter (element, stage, kind, 0); see reference.py."""
    word0, word1, word2, word3 = tl.philox(seed, element, stage, kind, 0)
    n0, n1 = _box_muller(word0, word1)
    n2, n3 = _box_muller(word2, word3)
    return n0, n1, n2, n3


@jit
def upsample_block(x, n0, n1, n2, n3, scale, noise_scale, k):
    """Return the four children of x: scale * x + noise_scale * (n_i - k * sum of the n)."""
    shared = k * (n0 + n1 + n2 + n3)
    n0, n1, n2, n3 = n0 - shared, n1 - shared, n2 - shared, n3 - shared
    x = scale * x
    return x + noise_scale * n0, x + noise_scale * n1, x + noise_scale * n2, x + noise_scale * n3


@jit
def _upsample_kernel(
    x_ptr, out_ptr, seed_ptr, scale, noise_scale, k, stage,
    channels, height, width_units, stride_b, stride_c, stride_h, stride_w, blocks,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # As a product the width is known to divide by ALIGN, which is what lets rows be stored in vectors.
    width = width_units * ALIGN
    size = channels * height * width
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    seed = tl.load(seed_ptr + b)

    element = block * BLOCK + tl.arange(0, BLOCK)
    column, row, channel = element % width, element // width % height, element // (width * height)
    place = channel.to(tl.int64) * stride_c + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    x = tl.load(x_ptr + b * stride_b + place, mask=element < size).to(tl.float32)
    n0, n1, n2, n3 = normals(seed, element, stage, 0)
    o0, o1, o2, o3 = upsample_block(x, n0, n1, n2, n3, scale, noise_scale, k)

    pair = block * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    top = out_ptr + b * 4 * size + pair // (2 * width) * (4 * width) + pair % (2 * width)
    tl.store(top, tl.interleave(o0, o1), mask=pair < 2 * size)
    tl.store(top + 2 * width, tl.interleave(o2, o3), mask=pair < 2 * size)


def _fake(x: Tensor, *_: Any) -> Tensor:
    b, channels, h, w = x.shape
    return x.new_empty(b, channels, 2 * h, 2 * w)


_TILE_BYTES = 1024  # of latent: 128 threads, 16 bytes of each output row for each thread


def _upsample_triton(x: Tensor, scale: float, noise_scale: float, c: float, seed: Tensor, stage: int) -> Tensor:
    b, channels, h, w = x.shape
    out = _fake(x)
    if out.numel() == 0:
        return out
    align = math.gcd(w, 8)
    block = _TILE_BYTES // x.element_size()
    blocks = triton.cdiv(channels * h * w, block)
    with torch.cuda.device_of(x):
        _upsample_kernel[(b * blocks,)](
            x, out, seed.contiguous(), scale, noise_scale, reference.block_coefficient(c), stage,
            channels, h, w // align, *x.stride(), blocks, ALIGN=align, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def _upsample_native(x: Tensor, scale: float, noise_scale: float, c: float, seed: Tensor, stage: int) -> Tensor:
    out = _fake(x)
    k = reference.block_coefficient(c)
    _backend.native.upsample_renoise(x, out, seed.contiguous(), scale, noise_scale, k, stage)
    return out


_upsample = register(
    "upsample_renoise(Tensor x, float scale, float noise_scale, float c, Tensor seed, int stage, str backend)"
    " -> Tensor",
    _fake,
    native=_upsample_native,
    triton=_upsample_triton,
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
    """Upsample a latent and re-noise it: ``scale * Up(x) + noise_scale * z`` with z ~ N(0, I - c * Sigma).

    This is how the next stage is entered (RALU, supplement A.1). Up is nearest-neighbour 2x; Sigma has a 4x4 block of
    ones for every 2x2 block of the output. z = eps - k * (sum of the block's four eps), k = (1 - sqrt(1 - 4c)) / 4. The
    noise depends on ``seed``, ``stage`` and the place inside the sample alone, and equals that of `upsample_selected`
    and `upsample_remaining` at pixel granularity.

    Args:
        x: (B, C, H, W) float32, float16 or bfloat16, any strides.
        scale, noise_scale: a and b of supplement A.1.
        c: correlation of the noise, in [0, 1/4].
        seed: int64 (B,), the 64-bit key of each sample, on x's device; or an int, the key of every sample.
        stage: the stage that is entered, a non-negative int; a word of the random counter, 2 or 3 in RALU.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        Contiguous (B, C, 2H, 2W) in x's dtype; the arithmetic is float32. Forward only.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is not as described, or the backend cannot run here.
    """
    check_values("x", x, "(B, C, H, W)")
    batch, channels, height, width = x.shape
    scale, noise_scale = finite("scale", scale), finite("noise_scale", noise_scale)
    c = correlation(c, 4 * channels * height * width)
    stage = integer("stage", stage, 0)
    seed = seed_tensor(seed, batch, x)
    return _upsample(x, scale, noise_scale, c, seed, stage, backend)
