# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# (The arguments of Triton's kernels have no types in Python.)
"""2x nearest-neighbour upsampling of a latent with block-correlated noise, one pass (RALU supplement A.1)."""

import math
from typing import Any

import torch
from torch import Tensor

from . import _backend, reference
from ._backend import INTERPRET, jit, register, tl, triton
from ._checks import check_values, correlation, finite, integer, seed_tensor

if INTERPRET:

    @jit
    def _sine_cosine(angle):
        return tl.sin(angle), tl.cos(angle)

else:

    @jit
    def _sine_cosine(angle):
        """Return sine and cosine of an angle in [-pi, pi] as a GPU approximates them, wrong by at most 2^-21."""
        return (
            tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1),
            tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1),
        )


@jit
def _fold(word):
    """Return a random word as an integer in [0, 2^31), by the rule of tl.uint_to_uniform_float."""
    x = word.to(tl.int32, bitcast=True)
    return x ^ (x >> 31)


@jit
def _minus_two_log(word):
    """Return -2 ln(u) of the uniform number of a word, at least 1e-7; see csrc/philox.h for the polynomial."""
    u = tl.maximum((_fold(word).to(tl.float32) * 4.6566127342e-10).to(tl.int32, bitcast=True), 0x33D6BF95)
    bits = u - 0x3F3504F3
    e = (bits >> 23).to(tl.float32)
    m = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    m2 = m * m
    even = ((-1.7344367504e-1 * m2 - 2.9955989122e-1) * m2 - 3.9909750223e-1) * m2 - 6.6668331623e-1
    odd = (2.8758016229e-1 * m2 + 3.3128851652e-1) * m2 + 5.0003397465e-1
    return ((odd * m + even) * m + 1.0) * m2 - (2.0 * m + 1.3862943611 * e)


@jit
def _sine(r):
    """Return the sine of r * 2 pi / 2^31, |r| <= 2^29."""
    x = r.to(tl.float32) * 2.9258361585343194e-9
    x2 = x * x
    return ((((2.6000548e-6 * x2 - 1.9806615e-4) * x2 + 8.333017e-3) * x2 - 1.6666657e-1) * x2) * x + x


@jit
def _box_muller(word1, word2, HALF: tl.constexpr = False):
    """Make two normals of two random words, as tl.pair_uniform_to_normal does; HALF: as exact as 16 bits can show.

    tl.cos and tl.sin can reduce huge angles too, which needs local memory. Here the angle stays an integer until it is
    folded into a half turn, and at HALF it is turned by half a circle, and with it the pair.
    """
    radius = tl.sqrt(_minus_two_log(word1))
    angle = _fold(word2)
    if HALF:
        sine, cosine = _sine_cosine((angle - 0x40000000).to(tl.float32) * 2.9258361585343194e-9)
        n1, n2 = -radius * cosine, -radius * sine
    else:
        c, s = 0x20000000 - angle, 0x40000000 - angle
        n1 = radius * _sine(tl.maximum(c, -0x40000000 - c))
        n2 = radius * _sine(tl.maximum(tl.minimum(s, 0x40000000 - s), -0x40000000 - s))
    return n1, n2


@jit
def _philox(seed, c0, c1, c2):
    """Return the four words of tl.philox for the counter (c0, c1, c2, 0).

    A round's two products are of 64 bits: one instruction each, where tl.philox multiplies twice for their halves.
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = b.to(tl.uint32), a.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@jit
def normals(seed, element, stage, kind, HALF: tl.constexpr = False):
    """Make four normals of the counter (element, stage, kind, 0); see reference.py."""
    element = element.to(tl.uint32)
    zero = tl.zeros_like(element)
    word0, word1, word2, word3 = _philox(
        seed, element, zero + tl.cast(stage, tl.uint32), zero + tl.cast(kind, tl.uint32)
    )
    n0, n1 = _box_muller(word0, word1, HALF)
    n2, n3 = _box_muller(word2, word3, HALF)
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
    n0, n1, n2, n3 = normals(seed, element, stage, 0, out_ptr.dtype.element_ty.primitive_bitwidth == 16)
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
