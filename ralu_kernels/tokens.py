"""Mixed-resolution token sequences: which low tokens become four high tokens, and the two moves between the stages."""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import reference
from ._backend import MAX_ELEMENTS, check, check_noise, check_values, jit, register, seed_tensor, tl, triton
from .upsample import enlarge, normals

GRANULARITIES = ("pixel", "token")
CARRY_NOISES = ("exact", "release")


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """Where every token of a batch of mixed-resolution sequences comes from.

    The samples' sequences are concatenated ("packed"). Inside a sample low tokens stand in raster order, and a promoted
    one is replaced, in place, by its four children in row-major order.

    Attributes:
        grid: (h, w), the low grid; n = h * w.
        cu_seqlens: int32 (B + 1,), first packed row of every sample; the last entry is the total.
        max_seqlen: the longest sequence.
        source: int32 (total,), index of the low token inside its sample.
        child: int32 (total,), -1 for a carried low token, else di * 2 + dj for child (di, dj).
        inverse: int32 (B, 4n), the packed row that covers each token of the high grid, in raster order over (2h, 2w):
            its own row if its parent was promoted, else its parent's row.
        positions: float32 (total, 2), (row, column) in low tokens; child (di, dj) is at its parent + (di, dj) / 2.
    """

    grid: tuple[int, int]
    cu_seqlens: Tensor
    max_seqlen: int
    source: Tensor
    child: Tensor
    inverse: Tensor
    positions: Tensor

    @property
    def batch_size(self) -> int:
        return self.inverse.shape[0]

    @property
    def lengths(self) -> Tensor:
        """int32 (B,), tokens of every sample."""
        return self.cu_seqlens.diff()

    def to(self, device: torch.device | str) -> "TokenPlan":
        values = (getattr(self, field.name) for field in fields(self))
        return TokenPlan(*(value.to(device) if isinstance(value, Tensor) else value for value in values))


@jit
def _sort_key(score):
    """uint32 in the order of the scores; -0 ties with 0, and NaN is below everything."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits ^ -0x80000000)
    return tl.where(score == score, key, 0).to(tl.uint32, bitcast=True)


# Loops over a sample are `while`: with NumPy 2.4 the interpreter of Triton <= 3.6 takes no argument as a range bound.
@jit
def _count(scores_ptr, limit, size, n, stride_b, stride_n, RANKED: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the first ``size`` scores reach ``limit``: a sort key if RANKED, else a score."""
    count = tl.zeros((BLOCK,), tl.int32)
    start = 0
    while start < size:
        i = start + tl.arange(0, BLOCK)
        place = (i // n).to(tl.int64) * stride_b + (i % n).to(tl.int64) * stride_n
        score = tl.load(scores_ptr + place, mask=i < size).to(tl.float32)
        reached = _sort_key(score) >= limit if RANKED else score >= limit
        count += (reached & (i < size)).to(tl.int32)
        start += BLOCK
    return tl.sum(count)


@jit
def _plan_kernel(
    scores_ptr, cu_seqlens_ptr, source_ptr, child_ptr, inverse_ptr, positions_ptr,
    n, width, k, threshold, stride_b, stride_n,
    RANKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    sample_ptr = scores_ptr + b.to(tl.int64) * stride_b
    if RANKED:
        before = b * k
        # The k-th highest key, bit by bit from the top: the largest value that at least k keys reach.
        kth = tl.full((), 0, tl.uint32)
        for bit in range(32):
            candidate = kth | (tl.full((), 0x80000000, tl.uint32) >> bit)
            kth = tl.where(_count(sample_ptr, candidate, n, n, stride_b, stride_n, True, BLOCK) >= k, candidate, kth)
        above = tl.where(kth == 0xFFFFFFFF, 0, _count(sample_ptr, kth + 1, n, n, stride_b, stride_n, True, BLOCK))
        ties_left = k - above
    else:
        before = _count(scores_ptr, threshold, b * n, n, stride_b, stride_n, False, BLOCK)

    # Every sample writes its start and its end, so that the last end needs no special case.
    tl.store(cu_seqlens_ptr + b, b * n + 3 * before)
    child = tl.arange(0, 4)[None, :]
    start = 0
    while start < n:
        i = start + tl.arange(0, BLOCK)
        score = tl.load(sample_ptr + i.to(tl.int64) * stride_n, mask=i < n).to(tl.float32)
        if RANKED:
            key = _sort_key(score)
            tie = ((key == kth) & (i < n)).to(tl.int32)
            promoted = (key > kth) | ((tie > 0) & (tl.cumsum(tie) <= ties_left))
            ties_left -= tl.sum(tie)
        else:
            promoted = score >= threshold
        promoted = (promoted & (i < n)).to(tl.int32)
        first = b * n + i + 3 * (before + tl.cumsum(promoted) - promoted)
        before += tl.sum(promoted)

        token, first, promoted = i[:, None], first[:, None], promoted[:, None] > 0
        y, x = token // width, token % width
        place = tl.where(promoted, child, 0)
        row = first + place
        high = (b * 4).to(tl.int64) * n + (2 * y + child // 2) * (2 * width) + 2 * x + child % 2
        tl.store(inverse_ptr + high, row, mask=token < n)
        exists = (token < n) & (promoted | (child == 0))
        tl.store(source_ptr + row, token + tl.zeros_like(child), mask=exists)
        tl.store(child_ptr + row, tl.where(promoted, child, -1), mask=exists)
        position_ptr = positions_ptr + row.to(tl.int64) * 2
        tl.store(position_ptr, y + 0.5 * (place // 2), mask=exists)
        tl.store(position_ptr + 1, x + 0.5 * (place % 2), mask=exists)
        start += BLOCK
    tl.store(cu_seqlens_ptr + b + 1, b * n + n + 3 * before)


@jit
def _element(y, x, channel, height, width, channels, PIXEL: tl.constexpr):
    """Element index of an enlarged token's channel; see reference.py."""
    if PIXEL:
        pixel_row = (channel // 4 * height + y) * 2 + channel // 2 % 2
        element = (pixel_row * width + x) * 2 + channel % 2
    else:
        element = (y * width + x) * channels + channel
    return element


@jit
def _tile(blocks, channel_blocks, n, width, inverse_ptr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """What both moves start from: a tile of low tokens (BLOCK_N, 1) by channels (1, BLOCK_C) of one sample.

    ``four`` counts the channels by fours, (1, BLOCK_C / 4).
    """
    pid = tl.program_id(0)
    b = (pid // (blocks * channel_blocks)).to(tl.int64)
    token = pid // channel_blocks % blocks * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    channel = pid % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    four = pid % channel_blocks * (BLOCK_C // 4) + tl.arange(0, BLOCK_C // 4)[None, :]
    y, x = token // width, token % width
    high = b * 4 * n + 4 * y * width + 2 * x
    first = tl.load(inverse_ptr + high, mask=token < n, other=0)
    promoted = tl.load(inverse_ptr + high + 1, mask=token < n, other=0) != first
    return b, token, channel, four, y, x, first.to(tl.int64), promoted


@jit
def _children(value, n0, n1, n2, n3, scale, noise_scale, k, PIXEL: tl.constexpr):
    """The four high tokens of a tile (BLOCK_N, BLOCK_C) of low tokens, each of the tile's shape."""
    o0, o1, o2, o3 = enlarge(value, n0, n1, n2, n3, scale, noise_scale, k)
    if PIXEL:
        # Channel (c, py, px) of the low token and child m of its value are channel (c, m) of high token (py, px).
        rows: tl.constexpr = o0.shape[0]
        columns: tl.constexpr = o0.shape[1]
        children = tl.join(tl.join(o0, o2), tl.join(o1, o3)).reshape(rows, columns // 4, 2, 2, 4)
        left, right = tl.split(children.permute(0, 1, 4, 2, 3))
        o0, o2 = tl.split(left)
        o1, o3 = tl.split(right)
        o0, o1 = o0.reshape(rows, columns), o1.reshape(rows, columns)
        o2, o3 = o2.reshape(rows, columns), o3.reshape(rows, columns)
    return o0, o1, o2, o3


@jit
def _carried_noise(seed, token, four, channels, STAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """White noise of a tile of carried tokens: four channels share a counter; see reference.py."""
    n0, n1, n2, n3 = normals(seed, token * ((channels + 3) // 4) + four, STAGE, 1)
    return tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(BLOCK_N, BLOCK_C)


@jit
def _promote_kernel(
    low_ptr, out_ptr, inverse_ptr, seed_ptr, scale, noise_scale, carry_scale, k,
    height, width, channels, stride_b, stride_n, stride_c, blocks, channel_blocks,
    STAGE: tl.constexpr, PIXEL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = height * width
    tile = _tile(blocks, channel_blocks, n, width, inverse_ptr, BLOCK_N, BLOCK_C)
    b, token, channel, four, y, x, first, promoted = tile
    mask = (token < n) & (channel < channels)
    place = b * stride_b + token.to(tl.int64) * stride_n + channel.to(tl.int64) * stride_c
    value = tl.load(low_ptr + place, mask=mask).to(tl.float32)
    out = out_ptr + first * channels + channel
    seed = tl.load(seed_ptr + b)

    if tl.max(promoted.to(tl.int32)) > 0:
        upsampled = mask & promoted
        n0, n1, n2, n3 = normals(seed, _element(y, x, channel, height, width, channels, PIXEL), STAGE, 0)
        o0, o1, o2, o3 = _children(value, n0, n1, n2, n3, scale, noise_scale, k, PIXEL)
        tl.store(out, o0, mask=upsampled)
        tl.store(out + channels, o1, mask=upsampled)
        tl.store(out + 2 * channels, o2, mask=upsampled)
        tl.store(out + 3 * channels, o3, mask=upsampled)
    if tl.min(promoted.to(tl.int32)) == 0:
        noise = _carried_noise(seed, token, four, channels, STAGE, BLOCK_N, BLOCK_C)
        tl.store(out, scale * value + carry_scale * noise, mask=mask & (promoted == 0))


@jit
def _merge_kernel(
    packed_ptr, out_ptr, inverse_ptr, seed_ptr, scale, noise_scale, carry_scale, k,
    height, width, channels, stride_n, stride_c, blocks, channel_blocks,
    STAGE: tl.constexpr, PIXEL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = height * width
    tile = _tile(blocks, channel_blocks, n, width, inverse_ptr, BLOCK_N, BLOCK_C)
    b, token, channel, four, y, x, first, promoted = tile
    mask = (token < n) & (channel < channels)
    source = packed_ptr + first * stride_n + channel.to(tl.int64) * stride_c
    out = out_ptr + (b * 4 * n + 4 * y * width + 2 * x) * channels + channel
    seed = tl.load(seed_ptr + b)

    if tl.min(promoted.to(tl.int32)) == 0:
        upsampled = mask & (promoted == 0)
        value = tl.load(source, mask=upsampled).to(tl.float32)
        n0, n1, n2, n3 = normals(seed, _element(y, x, channel, height, width, channels, PIXEL), STAGE, 0)
        o0, o1, o2, o3 = _children(value, n0, n1, n2, n3, scale, noise_scale, k, PIXEL)
        tl.store(out, o0, mask=upsampled)
        tl.store(out + channels, o1, mask=upsampled)
        tl.store(out + 2 * width * channels, o2, mask=upsampled)
        tl.store(out + (2 * width + 1) * channels, o3, mask=upsampled)
    if tl.max(promoted.to(tl.int32)) > 0:
        carried = mask & promoted
        for child in tl.static_range(4):
            value = tl.load(source + child * stride_n, mask=carried).to(tl.float32)
            right_and_down = child // 2 * 2 * width + child % 2
            high = 4 * y * width + 2 * x + right_and_down
            noise = _carried_noise(seed, high, four, channels, STAGE, BLOCK_N, BLOCK_C)
            tl.store(out + right_and_down * channels, scale * value + carry_scale * noise, mask=carried)


def _fake_plan(scores, h, w, k, threshold, total):
    b, n = scores.shape
    ints = {"dtype": torch.int32}
    return (
        scores.new_empty(b + 1, **ints),
        scores.new_empty(total, **ints),
        scores.new_empty(total, **ints),
        scores.new_empty(b, 4 * n, **ints),
        scores.new_empty(total, 2, dtype=torch.float32),
    )


def _fake_promote(low, inverse, width, total, *rest):
    return low.new_empty(total, low.shape[2])


def _fake_merge(packed, inverse, *rest):
    return packed.new_empty(*inverse.shape, packed.shape[1])


def _plan_triton(scores: Tensor, h: int, w: int, k: int, threshold: float | None, total: int):
    outputs = _fake_plan(scores, h, w, k, threshold, total)
    if scores.numel() == 0:
        outputs[0].zero_()
        return outputs
    with torch.cuda.device_of(scores):
        _plan_kernel[(scores.shape[0],)](
            scores, *outputs, h * w, w, k, threshold or 0.0, *scores.stride(),
            RANKED=threshold is None, BLOCK=512, num_warps=4,
        )  # fmt: skip
    return outputs


_TILE_BYTES = 512  # of low tokens: one warp, 16 bytes of every output row for each thread


def _launch_move(kernel, stage, x, out, inverse, height, width, scale, noise_scale, c, seed, granularity, carry_noise):
    if out.numel() == 0:
        return out
    channels = x.shape[-1]
    block_c = min(max(triton.next_power_of_2(channels), 4), 64)  # four channels share their random numbers
    block_n = max(_TILE_BYTES // x.element_size() // block_c, 1)
    blocks, channel_blocks = triton.cdiv(height * width, block_n), triton.cdiv(channels, block_c)
    carry_scale = noise_scale * reference.carry_std(c, carry_noise)
    with torch.cuda.device_of(x):
        kernel[(inverse.shape[0] * blocks * channel_blocks,)](
            x, out, inverse, seed.contiguous(), scale, noise_scale, carry_scale, reference.block_coefficient(c),
            height, width, channels, *x.stride(), blocks, channel_blocks,
            STAGE=stage, PIXEL=granularity == "pixel", BLOCK_N=block_n, BLOCK_C=block_c, num_warps=1,
        )  # fmt: skip
    return out


def _promote_triton(low: Tensor, inverse: Tensor, width: int, total: int, *rest) -> Tensor:
    out = _fake_promote(low, inverse, width, total)
    return _launch_move(_promote_kernel, reference.PROMOTE, low, out, inverse, low.shape[1] // width, width, *rest)


def _merge_triton(packed: Tensor, inverse: Tensor, width: int, *rest) -> Tensor:
    out = _fake_merge(packed, inverse)
    height = inverse.shape[1] // (4 * width)
    return _launch_move(_merge_kernel, reference.MERGE, packed, out, inverse, height, width, *rest)


def _plan_native(scores: Tensor, h: int, w: int, k: int, threshold: float | None, total: int):
    outputs = _fake_plan(scores, h, w, k, threshold, total)
    torch.ops.ralu_kernels_C.plan_tokens(scores, *outputs, w, k, threshold)
    return outputs


def _native_rules(scale, noise_scale, c, granularity, carry_noise):
    carry_scale = noise_scale * reference.carry_std(c, carry_noise)
    return scale, noise_scale, carry_scale, reference.block_coefficient(c), granularity == "pixel"


def _promote_native(low, inverse, width, total, scale, noise_scale, c, seed, granularity, carry_noise):
    out = _fake_promote(low, inverse, width, total)
    rules = _native_rules(scale, noise_scale, c, granularity, carry_noise)
    torch.ops.ralu_kernels_C.promote_tokens(low, out, inverse.contiguous(), seed.contiguous(), width, *rules)
    return out


def _merge_native(packed, inverse, width, scale, noise_scale, c, seed, granularity, carry_noise):
    out = _fake_merge(packed, inverse)
    rules = _native_rules(scale, noise_scale, c, granularity, carry_noise)
    torch.ops.ralu_kernels_C.merge_tokens(packed, out, inverse.contiguous(), seed.contiguous(), width, *rules)
    return out


_plan = register(
    "plan_tokens(Tensor scores, SymInt h, SymInt w, SymInt k, float? threshold, SymInt total, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_plan,
    native=_plan_native,
    triton=_plan_triton,
    reference=reference.plan_tokens,
)
_promote = register(
    "promote_tokens(Tensor low, Tensor inverse, SymInt width, SymInt total, float scale, float noise_scale, float c,"
    " Tensor seed, str granularity, str carry_noise, str backend) -> Tensor",
    _fake_promote,
    native=_promote_native,
    triton=_promote_triton,
    reference=reference.promote_tokens,
)
_merge = register(
    "merge_tokens(Tensor packed, Tensor inverse, SymInt width, float scale, float noise_scale, float c,"
    " Tensor seed, str granularity, str carry_noise, str backend) -> Tensor",
    _fake_merge,
    native=_merge_native,
    triton=_merge_triton,
    reference=reference.merge_tokens,
)


def plan_tokens(
    scores: Tensor,
    grid: tuple[int, int],
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    backend: str = "auto",
) -> TokenPlan:
    """Choose the low tokens that become four high tokens, and lay out the packed sequences.

    Args:
        scores: (B, n) float32, float16 or bfloat16, any strides; the higher, the sooner a token is promoted.
        grid: (h, w), the low grid, h * w = n.
        ratio: promote the k = floor(ratio * n + 1e-6) highest scores of every sample. Ties go to the lower index; NaN
            ranks last. No host synchronisation.
        threshold: promote scores >= threshold; sequence lengths then differ, and the host waits once for them.
            (Tracing this needs ``torch._dynamo.config.capture_scalar_outputs``.)
        backend: "auto", "native", "triton" or "reference".

    Raises:
        ValueError: an argument is not as described, not exactly one of ratio and threshold is given, or the backend
            cannot run here.
    """
    check_values("scores", scores, "(B, n)")
    b, n = scores.shape
    h, w = grid
    check(h > 0 and w > 0 and h * w == n, "grid", (h, w), "(h, w) with h * w = {}, the scores of one sample", n)
    check((ratio is None) != (threshold is None), "(ratio, threshold)", (ratio, threshold), "one None and one number")
    check(4 * b * n <= MAX_ELEMENTS, "the number of high tokens of the batch", 4 * b * n, "at most {}", MAX_ELEMENTS)
    if ratio is not None:
        check(0 <= ratio <= 1, "ratio", ratio, "in [0, 1]")
        k = math.floor(ratio * n + 1e-6)
        max_seqlen = n + 3 * k
        total = b * max_seqlen
    else:
        check(not math.isnan(threshold), "threshold", threshold, "a number")
        k = 0
        counts = (scores.float() >= threshold).sum(1).tolist()  # PyTorch would round the threshold to bfloat16
        max_seqlen = n + 3 * max([0, *counts])
        total = b * n + 3 * sum(counts)
    tensors = _plan(scores, h, w, k, threshold, total, backend)
    cu_seqlens, source, child, inverse, positions = tensors
    return TokenPlan((h, w), cu_seqlens, max_seqlen, source, child, inverse, positions)


def _check_move(name, x, plan, c, granularity, carry_noise):
    check(granularity in GRANULARITIES, "granularity", repr(granularity), "one of {}", GRANULARITIES)
    check(carry_noise in CARRY_NOISES, "carry_noise", repr(carry_noise), "one of {}", CARRY_NOISES)
    channels = x.shape[-1]
    if granularity == "pixel":
        check(channels % 4 == 0, f"{name}.shape[-1]", channels, 'a multiple of 4 at granularity "pixel"')
    (h, w), inverse, device = plan.grid, plan.inverse, x.device
    shape = (plan.cu_seqlens.shape[0] - 1, 4 * h * w)
    check(inverse.shape == shape, "plan.inverse.shape", inverse.shape, "(B, 4n) = {}", shape)
    check(inverse.dtype == torch.int32, "plan.inverse.dtype", inverse.dtype, "int32")
    check(inverse.device == device, "plan.inverse.device", inverse.device, "{}, {}'s", device, name)
    check_noise(c, shape[1] * channels)


def promote_tokens(
    low: Tensor,
    plan: TokenPlan,
    scale: float,
    noise_scale: float,
    c: float,
    seed: Tensor | int,
    *,
    granularity: str = "pixel",
    carry_noise: str = "exact",
    backend: str = "auto",
) -> Tensor:
    """Stage 1 to 2: enlarge the promoted low tokens, carry the others, re-noise all (supplement A.1).

    A child is ``scale * Up(low) + noise_scale * z``, z ~ N(0, I - c * Sigma) with a 4x4 block of ones in Sigma for each
    enlarged value. A carried token is ``scale * low + noise_scale * sqrt(1 - c) * eps``.

    Args:
        low: (B, n, C) float32, float16 or bfloat16, any strides.
        plan: what to promote; see `plan_tokens`.
        scale, noise_scale: a and b of supplement A.1.
        c: correlation of the noise, in [0, 1/4].
        seed: int64 (B,), the 64-bit key of each sample, on low's device; or an int, the key of every sample.
        granularity: "pixel" enlarges latent pixels: token channel = channel * 4 + py * 2 + px, and child (di, dj) takes
            inner pixel (di, dj) in all four of its own. "token" copies a token whole to its four children.
        carry_noise: "exact", or "release" for the public release's ``noise_scale * eps``, too noisy by b^2 c.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        Packed (total, C) in low's dtype; the arithmetic is float32. Forward only.

    Raises:
        ValueError: an argument is not as described, the plan is another batch's, or the backend cannot run here.
    """
    check_values("low", low, "(B, n, C)")
    shape = (plan.batch_size, plan.grid[0] * plan.grid[1])
    check(low.shape[:2] == shape, "low.shape[:2]", low.shape[:2], "{}, the plan's (B, n)", shape)
    _check_move("low", low, plan, c, granularity, carry_noise)
    seed = seed_tensor(seed, plan.batch_size, low.device)
    total, width = plan.source.shape[0], plan.grid[1]
    return _promote(low, plan.inverse, width, total, scale, noise_scale, c, seed, granularity, carry_noise, backend)


def merge_tokens(
    packed: Tensor,
    plan: TokenPlan,
    scale: float,
    noise_scale: float,
    c: float,
    seed: Tensor | int,
    *,
    granularity: str = "pixel",
    carry_noise: str = "exact",
    backend: str = "auto",
) -> Tensor:
    """Stage 2 to 3: enlarge the tokens that are still low, carry the children, re-noise all, restore raster order.

    The same law as `promote_tokens`, with the parts exchanged.

    Args:
        packed: (total, C) float32, float16 or bfloat16, any strides, laid out by ``plan``.
        plan, scale, noise_scale, c, seed, granularity, carry_noise, backend: as in `promote_tokens`.

    Returns:
        (B, 4n, C), raster order over the (2h, 2w) grid, in packed's dtype; the arithmetic is float32. Forward only.

    Raises:
        ValueError: an argument is not as described, the plan is another batch's, or the backend cannot run here.
    """
    check_values("packed", packed, "(total, C)")
    total = plan.source.shape[0]
    check(packed.shape[0] == total, "packed.shape[0]", packed.shape[0], "{}, the plan's total", total)
    _check_move("packed", packed, plan, c, granularity, carry_noise)
    seed = seed_tensor(seed, plan.batch_size, packed.device)
    return _merge(packed, plan.inverse, plan.grid[1], scale, noise_scale, c, seed, granularity, carry_noise, backend)
