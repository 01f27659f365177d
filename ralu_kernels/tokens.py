# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# (The arguments of Triton's kernels have no types in Python.)
"""The two transitions between the stages that mixed-resolution sequences make (RALU, supplement A.1)."""

from typing import Any

import torch
from torch import Tensor

from . import _backend, reference
from ._backend import jit, register, tl, triton
from ._checks import (
    check_choice,
    check_device,
    check_type,
    check_values,
    correlation,
    finite,
    seed_tensor,
    wrong,
)
from .plan import TokenPlan
from .upsample import normals, upsample_block

GRANULARITIES = ("pixel", "token")
KEPT_NOISES = ("exact", "release")


@jit
def _tile(blocks, channel_blocks, n, width, total, inverse_ptr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Find a program's tile of low tokens (BLOCK_N, 1) by channels (1, BLOCK_C) of one sample.

    ``four`` counts the channels by fours, (1, BLOCK_C / 4). ``exists``: all of a token's rows
    are among the ``total``; if not, ``first`` is 0.
    """
    pid = tl.program_id(0)
    b = (pid // (blocks * channel_blocks)).to(tl.int64)
    token = pid // channel_blocks % blocks * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    channel = pid % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    four = pid % channel_blocks * (BLOCK_C // 4) + tl.arange(0, BLOCK_C // 4)[None, :]
    y, x = token // width, token % width
    high = b * 4 * n + 4 * y * width + 2 * x
    first = tl.load(inverse_ptr + high, mask=token < n, other=0)
    selected = tl.load(inverse_ptr + high + 1, mask=token < n, other=0) != first
    exists = (first >= 0) & (first < total - tl.where(selected, 3, 0))
    first = tl.where(exists, first, 0).to(tl.int64)
    return b, token, channel, four, y, x, first, selected, exists


@jit
def _row_of_pixels(
    value, upsampled, y, x, child, token, four, seed, scale, noise_scale, kept_scale, k, height, width, channels,
    STAGE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Upsample or keep a tile of output rows (BLOCK_N, BLOCK_C) at pixel granularity.

    Either takes a counter for four channels, so no program does both works. ``token`` is the row's place in the grid of
    its size; channel (c, inner pixel) of a low token becomes channels (c, 0..3) of the child at that inner pixel.
    """
    rows: tl.constexpr = value.shape[0]
    columns: tl.constexpr = value.shape[1]
    even, odd = tl.split(value.reshape(rows, columns // 4, 2, 2))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    one = tl.where(child < 2, tl.where(child == 0, v0, v1), tl.where(child == 2, v2, v3))
    pixel = (2 * y + child // 2) * 2 * width + 2 * x + child % 2
    element = tl.where(upsampled, four * (4 * height * width) + pixel, token * (channels // 4) + four)
    n0, n1, n2, n3 = normals(seed, element, STAGE, tl.where(upsampled, 0, 1), HALF)
    shared = tl.where(upsampled, k, 0.0) * (n0 + n1 + n2 + n3)
    noise_scale = tl.where(upsampled, noise_scale, kept_scale)
    o0 = scale * tl.where(upsampled, one, v0) + noise_scale * (n0 - shared)
    o1 = scale * tl.where(upsampled, one, v1) + noise_scale * (n1 - shared)
    o2 = scale * tl.where(upsampled, one, v2) + noise_scale * (n2 - shared)
    o3 = scale * tl.where(upsampled, one, v3) + noise_scale * (n3 - shared)
    return tl.join(tl.join(o0, o2), tl.join(o1, o3)).reshape(rows, columns)


@jit
def _upsample_selected_pixels_kernel(
    low_ptr, out_ptr, inverse_ptr, seed_ptr, scale, noise_scale, kept_scale, k,
    height, width, channels, total, stride_b, stride_n, stride_c, blocks, channel_blocks,
    cu_seqlens_ptr, source_ptr, child_ptr, STAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = pid // (blocks * channel_blocks)
    channel = pid % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    four = pid % channel_blocks * (BLOCK_C // 4) + tl.arange(0, BLOCK_C // 4)[None, :]
    first, end = tl.load(cu_seqlens_ptr + b), tl.minimum(tl.load(cu_seqlens_ptr + b + 1), total)
    row = first + pid // channel_blocks % blocks * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    mask = (row >= 0) & (row < end)
    token = tl.load(source_ptr + row, mask=mask, other=-1)
    child = tl.load(child_ptr + row, mask=mask, other=-1)
    exists = (token >= 0) & (token < height * width)
    place = b.to(tl.int64) * stride_b + token.to(tl.int64) * stride_n + channel.to(tl.int64) * stride_c
    value = tl.load(low_ptr + place, mask=exists & (channel < channels), other=float("nan")).to(tl.float32)
    out = _row_of_pixels(
        value, child >= 0, token // width, token % width, child, token, four, tl.load(seed_ptr + b), scale, noise_scale,
        kept_scale, k, height, width, channels, STAGE, out_ptr.dtype.element_ty.primitive_bitwidth == 16,
    )  # fmt: skip
    tl.store(out_ptr + row.to(tl.int64) * channels + channel, out, mask=mask & (channel < channels))


@jit
def _upsample_remaining_pixels_kernel(
    packed_ptr, out_ptr, inverse_ptr, seed_ptr, scale, noise_scale, kept_scale, k,
    height, width, channels, total, stride_n, stride_c, blocks, channel_blocks,
    STAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    high, pid = 4 * height * width, tl.program_id(0)
    b = (pid // (blocks * channel_blocks)).to(tl.int64)
    token = pid // channel_blocks % blocks * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    channel = pid % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    four = pid % channel_blocks * (BLOCK_C // 4) + tl.arange(0, BLOCK_C // 4)[None, :]
    y, x = token // (2 * width), token % (2 * width)
    sample_ptr = inverse_ptr + b * high
    corner = y // 2 * 4 * width + x // 2 * 2
    row = tl.load(sample_ptr + token, mask=token < high, other=-1)
    first = tl.load(sample_ptr + corner, mask=token < high, other=0)
    upsampled = tl.load(sample_ptr + corner + 1, mask=token < high, other=0) == first
    exists = (row >= 0) & (row < total)
    mask = (token < high) & (channel < channels)
    source = row.to(tl.int64) * stride_n + channel.to(tl.int64) * stride_c
    value = tl.load(packed_ptr + source, mask=mask & exists, other=float("nan")).to(tl.float32)
    out = _row_of_pixels(
        value, upsampled, y // 2, x // 2, y % 2 * 2 + x % 2, token, four, tl.load(seed_ptr + b), scale, noise_scale,
        kept_scale, k, height, width, channels, STAGE, out_ptr.dtype.element_ty.primitive_bitwidth == 16,
    )  # fmt: skip
    tl.store(out_ptr + (b * high + token) * channels + channel, out, mask=mask)


@jit
def _kept_noise(
    seed, token, four, channels, STAGE: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Return white noise for a tile of kept tokens: four channels share a counter; see reference.py."""
    n0, n1, n2, n3 = normals(seed, token * ((channels + 3) // 4) + four, STAGE, 1, HALF)
    return tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(BLOCK_N, BLOCK_C)


@jit
def _upsample_selected_kernel(
    low_ptr, out_ptr, inverse_ptr, seed_ptr, scale, noise_scale, kept_scale, k,
    height, width, channels, total, stride_b, stride_n, stride_c, blocks, channel_blocks,
    STAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth == 16
    n = height * width
    tile = _tile(blocks, channel_blocks, n, width, total, inverse_ptr, BLOCK_N, BLOCK_C)
    b, token, channel, four, y, x, first, selected, exists = tile
    mask = (token < n) & (channel < channels)
    place = b * stride_b + token.to(tl.int64) * stride_n + channel.to(tl.int64) * stride_c
    value = tl.load(low_ptr + place, mask=mask).to(tl.float32)
    out = out_ptr + first * channels + channel
    seed = tl.load(seed_ptr + b)
    mask &= exists

    if tl.max(selected.to(tl.int32)) > 0:
        upsampled = mask & selected
        n0, n1, n2, n3 = normals(seed, (y * width + x) * channels + channel, STAGE, 0, half)
        o0, o1, o2, o3 = upsample_block(value, n0, n1, n2, n3, scale, noise_scale, k)
        tl.store(out, o0, mask=upsampled)
        tl.store(out + channels, o1, mask=upsampled)
        tl.store(out + 2 * channels, o2, mask=upsampled)
        tl.store(out + 3 * channels, o3, mask=upsampled)
    if tl.min(selected.to(tl.int32)) == 0:
        noise = _kept_noise(seed, token, four, channels, STAGE, half, BLOCK_N, BLOCK_C)
        tl.store(out, scale * value + kept_scale * noise, mask=mask & (selected == 0))


@jit
def _upsample_remaining_kernel(
    packed_ptr, out_ptr, inverse_ptr, seed_ptr, scale, noise_scale, kept_scale, k,
    height, width, channels, total, stride_n, stride_c, blocks, channel_blocks,
    STAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth == 16
    n = height * width
    tile = _tile(blocks, channel_blocks, n, width, total, inverse_ptr, BLOCK_N, BLOCK_C)
    b, token, channel, four, y, x, first, selected, exists = tile
    mask = (token < n) & (channel < channels)
    source = packed_ptr + first * stride_n + channel.to(tl.int64) * stride_c
    out = out_ptr + (b * 4 * n + 4 * y * width + 2 * x) * channels + channel
    seed = tl.load(seed_ptr + b)

    if tl.min(selected.to(tl.int32)) == 0:
        upsampled = mask & (selected == 0)
        value = tl.load(source, mask=upsampled & exists, other=float("nan")).to(tl.float32)
        n0, n1, n2, n3 = normals(seed, (y * width + x) * channels + channel, STAGE, 0, half)
        o0, o1, o2, o3 = upsample_block(value, n0, n1, n2, n3, scale, noise_scale, k)
        tl.store(out, o0, mask=upsampled)
        tl.store(out + channels, o1, mask=upsampled)
        tl.store(out + 2 * width * channels, o2, mask=upsampled)
        tl.store(out + (2 * width + 1) * channels, o3, mask=upsampled)
    if tl.max(selected.to(tl.int32)) > 0:
        kept = mask & selected
        for child in tl.static_range(4):
            value = tl.load(source + child * stride_n, mask=kept & exists, other=float("nan")).to(tl.float32)
            right_and_down = child // 2 * 2 * width + child % 2
            high = 4 * y * width + 2 * x + right_and_down
            noise = _kept_noise(seed, high, four, channels, STAGE, half, BLOCK_N, BLOCK_C)
            tl.store(out + right_and_down * channels, scale * value + kept_scale * noise, mask=kept)


def _fake_selected(low: Tensor, inverse: Tensor, cu_seqlens: Tensor, source: Tensor, *_: Any) -> Tensor:
    return low.new_empty(source.shape[0], low.shape[2])


def _fake_remaining(packed: Tensor, inverse: Tensor, *_: Any) -> Tensor:
    return packed.new_empty(*inverse.shape, packed.shape[1])


_TILE_BYTES = 512  # of tokens: one warp, 16 bytes of every output row for each thread


def _launch(
    kernel: Any, stage: int, x: Tensor, out: Tensor, inverse: Tensor, width: int, total: int, scale: float,
    noise_scale: float, c: float, seed: Tensor, kept_noise: str, pixel_rows: int = 0,
    pixel_plan: tuple[Tensor, ...] = (),
) -> Tensor:  # fmt: skip
    """Launch a kernel whose programs have low tokens, or at pixel granularity ``pixel_rows`` rows of every sample."""
    reference.check_rows(inverse, width, total)
    if out.numel() == 0:
        return out
    channels, n = x.shape[-1], inverse.shape[1] // 4
    block_c = min(max(triton.next_power_of_2(channels), 4), 64)  # four channels share their random numbers
    block_n = max(_TILE_BYTES // x.element_size() // block_c, 1)
    block_n *= 2 if pixel_rows else 1  # for what it costs a thread to find its place
    blocks, channel_blocks = triton.cdiv(pixel_rows or n, block_n), triton.cdiv(channels, block_c)
    kept_scale = noise_scale * reference.kept_std(c, kept_noise)
    with torch.cuda.device_of(x):
        kernel[(inverse.shape[0] * blocks * channel_blocks,)](
            x, out, inverse.contiguous(), seed.contiguous(), scale, noise_scale, kept_scale,
            reference.block_coefficient(c), n // width, width, channels, total, *x.stride(), blocks, channel_blocks,
            *(x.contiguous() for x in pixel_plan), STAGE=stage, BLOCK_N=block_n, BLOCK_C=block_c, num_warps=1,
        )  # fmt: skip
    return out


def _selected_triton(
    low: Tensor, inverse: Tensor, cu_seqlens: Tensor, source: Tensor, child: Tensor, width: int, longest: int,
    scale: float, noise_scale: float, c: float, seed: Tensor, granularity: str, kept_noise: str,
) -> Tensor:  # fmt: skip
    out = _fake_selected(low, inverse, cu_seqlens, source)
    common = (reference.TO_MIXED, low, out, inverse, width, source.shape[0], scale, noise_scale, c, seed, kept_noise)
    if granularity == "token":
        return _launch(_upsample_selected_kernel, *common)
    return _launch(_upsample_selected_pixels_kernel, *common, longest, (cu_seqlens, source, child))


def _remaining_triton(
    packed: Tensor, inverse: Tensor, width: int, scale: float, noise_scale: float, c: float, seed: Tensor,
    granularity: str, kept_noise: str,
) -> Tensor:  # fmt: skip
    out = _fake_remaining(packed, inverse)
    common = (reference.TO_FULL, packed, out, inverse, width, packed.shape[0], scale, noise_scale, c, seed, kept_noise)
    if granularity == "token":
        return _launch(_upsample_remaining_kernel, *common)
    return _launch(_upsample_remaining_pixels_kernel, *common, inverse.shape[1])


def _native(
    name: str, x: Tensor, out: Tensor, inverse: Tensor, width: int, scale: float, noise_scale: float, c: float,
    seed: Tensor, granularity: str, kept_noise: str,
) -> Tensor:  # fmt: skip
    noise = scale, noise_scale, noise_scale * reference.kept_std(c, kept_noise), reference.block_coefficient(c)
    operation = getattr(_backend.native, name)
    operation(x, out, inverse.contiguous(), seed.contiguous(), width, *noise, granularity == "pixel")
    return out


def _selected_native(low: Tensor, inverse: Tensor, *rest: Any) -> Tensor:
    _, _, _, width, _, *noise = rest  # inverse alone tells where everything goes
    return _native("upsample_selected", low, _fake_selected(low, inverse, *rest), inverse, width, *noise)


def _remaining_native(packed: Tensor, inverse: Tensor, width: int, *rest: Any) -> Tensor:
    return _native("upsample_remaining", packed, _fake_remaining(packed, inverse), inverse, width, *rest)


_selected = register(
    "upsample_selected(Tensor low, Tensor inverse, Tensor cu_seqlens, Tensor source, Tensor child, SymInt width,"
    " SymInt longest, float scale, float noise_scale, float c, Tensor seed, str granularity, str kept_noise,"
    " str backend) -> Tensor",
    _fake_selected,
    native=_selected_native,
    triton=_selected_triton,
    reference=reference.upsample_selected,
)
_remaining = register(
    "upsample_remaining(Tensor packed, Tensor inverse, SymInt width, float scale, float noise_scale, float c,"
    " Tensor seed, str granularity, str kept_noise, str backend) -> Tensor",
    _fake_remaining,
    native=_remaining_native,
    triton=_remaining_triton,
    reference=reference.upsample_remaining,
)


def _rules(
    name: str, x: Tensor, plan: TokenPlan, scale: Any, noise_scale: Any, c: Any, seed: Any, granularity: Any,
    kept_noise: Any,
) -> tuple[float, float, float, Tensor, str, str]:  # fmt: skip
    """Return the arguments that both transitions have, checked; ``name`` is that of x."""
    check_device("plan.inverse", plan.inverse, x, f"{name}'s")
    check_choice("granularity", granularity, GRANULARITIES)
    check_choice("kept_noise", kept_noise, KEPT_NOISES)
    channels, (batch, high) = x.shape[-1], plan.inverse.shape
    if granularity == "pixel" and channels % 4:
        raise wrong(f"{name}.shape[-1]", channels, 'a multiple of 4 at granularity "pixel"')
    scale, noise_scale = finite("scale", scale), finite("noise_scale", noise_scale)
    return scale, noise_scale, correlation(c, high * channels), seed_tensor(seed, batch, x), granularity, kept_noise


def _proven(out: Tensor, plan: TokenPlan) -> Tensor:
    """Return out, or NaN where the plan was made by hand and does not hold, which no host could wait for."""
    return out if plan._consistent is None else torch.where(plan._consistent, out, float("nan"))


def upsample_selected(
    low: Tensor,
    plan: TokenPlan,
    scale: float,
    noise_scale: float,
    c: float,
    seed: Tensor | int,
    *,
    granularity: str = "pixel",
    kept_noise: str = "exact",
    backend: str = "auto",
) -> Tensor:
    """Upsample the selected low tokens, keep the others and re-noise all: low to mixed resolution (supplement A.1).

    A child is ``scale * Up(low) + noise_scale * z``, z ~ N(0, I - c * Sigma) with a 4x4 block of ones in Sigma for each
    upsampled value. A token that is kept is ``scale * low + noise_scale * sqrt(1 - c) * eps``, eps ~ N(0, I).

    Args:
        low: (B, n, C) float32, float16 or bfloat16, any strides.
        plan: what to select; see `plan_tokens`.
        scale, noise_scale: a and b of supplement A.1.
        c: correlation of the noise, in [0, 1/4].
        seed: int64 (B,), the 64-bit key of each sample, on low's device; or an int, the key of every sample.
        granularity: "pixel" upsamples latent pixels: token channel = channel * 4 + py * 2 + px, child (di, dj) takes
            inner pixel (di, dj) in all four of its own. "token" copies a token whole to its four children.
        kept_noise: "exact", or "release" for the public release's ``noise_scale * eps``, too noisy by
            ``noise_scale^2 * c``.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        Packed (total, C) in low's dtype; the arithmetic is float32. Forward only. Every row is written: see `TokenPlan`
        for plans made by hand.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is not as described, the plan is another batch's, or the backend cannot run here.
    """
    check_values("low", low, "(B, n, C)")
    check_type("plan", plan, TokenPlan, "a TokenPlan")
    h, w = plan.grid
    batch, n = plan.batch_size, h * w
    if low.shape[0] != batch or low.shape[1] != n:
        raise wrong("low.shape[:2]", low.shape[:2], f"({batch}, {n}), the plan's (B, n)")
    rules = _rules("low", low, plan, scale, noise_scale, c, seed, granularity, kept_noise)
    where = (plan.inverse, plan.cu_seqlens, plan.source, plan.child)
    return _proven(_selected(low, *where, w, plan.max_seqlen, *rules, backend), plan)


def upsample_remaining(
    packed: Tensor,
    plan: TokenPlan,
    scale: float,
    noise_scale: float,
    c: float,
    seed: Tensor | int,
    *,
    granularity: str = "pixel",
    kept_noise: str = "exact",
    backend: str = "auto",
) -> Tensor:
    """Upsample the tokens that are still low, keep the children and re-noise all: mixed to full resolution.

    The same law as that of `upsample_selected` (supplement A.1), with the parts exchanged, in raster order again.

    Args:
        packed: (total, C) float32, float16 or bfloat16, any strides, laid out by ``plan``.
        plan, scale, noise_scale, c, seed, granularity, kept_noise, backend: as in `upsample_selected`.

    Returns:
        (B, 4n, C), raster order over the (2h, 2w) grid, in packed's dtype; the arithmetic is float32. Forward only.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is not as described, the plan is another batch's, or the backend cannot run here.
    """
    check_values("packed", packed, "(total, C)")
    check_type("plan", plan, TokenPlan, "a TokenPlan")
    total = plan.source.shape[0]
    if packed.shape[0] != total:
        raise wrong("packed.shape[0]", packed.shape[0], f"{total}, the plan's total")
    rules = _rules("packed", packed, plan, scale, noise_scale, c, seed, granularity, kept_noise)
    return _proven(_remaining(packed, plan.inverse, plan.grid[1], *rules, backend), plan)
