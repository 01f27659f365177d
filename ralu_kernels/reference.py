"""Eager PyTorch: the specification every other backend is tested against, and the default where none can run.

RALU supplement A.1. With ``Up`` nearest-neighbour 2x upsampling and Sigma the covariance of ``Up`` of white noise
(4x4 blocks of ones, one for each upsampled value), the state that enters the next stage is

    scale * Up(x) + noise_scale * z,    z ~ N(0, I - c * Sigma),  0 <= c <= 1/4.

With J the 4x4 matrix of ones, (I - k J)^2 = I - c J for k = (1 - sqrt(1 - 4c)) / 4, so z = eps - k * (sum of the four
eps of the block). For a value that is kept Sigma = I, so z ~ N(0, (1 - c) I).

Randomness is a function of the sample's 64-bit seed and of the place alone. Philox-4x32-10 has the seed as its key and
(element, stage, kind, 0) as its counter, and makes four normals of it. All are used, one for each value that is made:

UPSAMPLED: element indexes the low grid, and the four normals are the four children in row-major order. Latents, and
    tokens at pixel granularity, count elements as (channel, row, column) of the latent; tokens at token granularity
    count them as (token, channel).
KEPT: channel j of token t, of C channels, has normal j % 4 of element t * ceil(C / 4) + j // 4, at either
    granularity. t is the token's place in raster order over the grid of its size: the low grid on the way to stage 2,
    the high grid on the way to stage 3. (If 4 does not divide C, the last normals of a token's last element go unused.)
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

UPSAMPLED, KEPT = 0, 1
TO_MIXED, TO_FULL = 2, 3  # the stage that the operation leads to

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


# ---- random numbers ----


def _multiply(a: Any, b: int) -> tuple[Any, Any]:
    """Return the high and low words of a 32x32-bit product.

    b >= 2^31 is taken as b - 2^32, so that int64 cannot overflow.
    """
    product = a * (b - 2**32)
    return ((product >> 32) + a) & _MASK, product & _MASK


def philox(seed: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple[Any, Any, Any, Any]:
    """Make four 32-bit words of each counter by Philox-4x32-10 (Salmon et al., SC 2011), as int64 in [0, 2^32).

    ``seed`` is the 64-bit key (low word first); ``c0`` to ``c3`` are the 32-bit counter words. All are ints or int64
    tensors that broadcast against each other.
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        (hi_a, lo_a), (hi_b, lo_b) = _multiply(c0, _ROUND_A), _multiply(c2, _ROUND_B)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def _uniform(word: Tensor) -> Tensor:
    """Map 32-bit words to float32 in [0, 1], by the rule of ``triton.language.uint_to_uniform_float``."""
    return torch.minimum(word, _MASK - word).to(torch.float32) * 4.6566127342e-10


def _box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2.0 * torch.log(u1.clamp_min(1e-7)))
    angle = 6.283185307179586 * u2
    return radius * torch.cos(angle), radius * torch.sin(angle)


def randn4x(seed: Any, c0: Any, c1: Any = 0, c2: Any = 0, c3: Any = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make four float32 standard normals of each counter: ``triton.language.randn4x(seed, c1 * 2**32 + c0)``."""
    u0, u1, u2, u3 = map(_uniform, philox(seed, c0, c1, c2, c3))
    return *_box_muller(u0, u1), *_box_muller(u2, u3)


def block_coefficient(c: float) -> float:
    """Return k = (1 - sqrt(1 - 4c)) / 4, written so that a small c does not cancel."""
    return c / (1 + math.sqrt(1 - 4 * c))


def kept_std(c: float, kept_noise: str) -> float:
    """Return the standard deviation of a kept value's noise: sqrt(1 - c), or the public release's 1."""
    return math.sqrt(1 - c) if kept_noise == "exact" else 1.0


def _block_noise(seed: Tensor, element: Tensor, stage: int, c: float) -> Tensor:
    """Return z of every upsampled element: (B, *element.shape, 4)."""
    eps = torch.stack(randn4x(seed.view(-1, *[1] * element.dim()), element, stage, UPSAMPLED), dim=-1)
    return eps - block_coefficient(c) * eps.sum(dim=-1, keepdim=True)


def _kept_noise(seed: Tensor, tokens: int, channels: int, stage: int) -> Tensor:
    """Return white noise for the kept tokens of a grid: (B, tokens, channels)."""
    element = torch.arange(tokens * -(-channels // 4), device=seed.device).view(tokens, -(-channels // 4))
    eps = torch.stack(randn4x(seed.view(-1, 1, 1), element, stage, KEPT), dim=-1)
    return eps.flatten(2)[..., :channels]


# ---- latents ----


def upsample_renoise(x: Tensor, scale: float, noise_scale: float, c: float, seed: Tensor, stage: int) -> Tensor:
    """Return `ralu_kernels.upsample_renoise` of a latent (B, C, H, W), (B, C, 2H, 2W)."""
    b, channels, h, w = x.shape
    element = torch.arange(channels * h * w, device=x.device).view(channels, h, w)
    noise = noise_scale * _block_noise(seed, element, stage, c)  # (B, C, H, W, 4)
    out: Tensor = scale * x.float().unsqueeze(-1) + noise
    out = out.unflatten(-1, (2, 2)).transpose(3, 4).reshape(b, channels, 2 * h, 2 * w)
    return out.to(x.dtype)


# ---- tokens ----


def _on_host(x: Tensor) -> bool:
    """Tell whether indices can be looked at without waiting."""
    return x.device.type == "cpu"


def children(high: Tensor, width: int) -> Tensor:
    """Return (B, 4n, ...) in raster order over the high grid as (B, n, 4, ...), the children of every low token."""
    b, high_tokens, *rest = high.shape
    height = high_tokens // (4 * width)
    return high.reshape(b, height, 2, width, 2, *rest).transpose(2, 3).reshape(b, height * width, 4, *rest)


def _raster(low: Tensor, width: int) -> Tensor:
    """Undo `children`."""
    b, n, _, *rest = low.shape
    return low.reshape(b, n // width, width, 2, 2, *rest).transpose(2, 3).reshape(b, 4 * n, *rest)


def layout(selected: Tensor) -> tuple[Tensor, Tensor]:
    """Lay out packed rows: four for every low token that is selected, bool (B, n), and one for the others.

    Returns the row of each child, (B, n, 4), and the end of every token's rows, (B, n).
    """
    count = torch.where(selected, 4, 1)
    ends = count.flatten().cumsum(0).view(selected.shape)
    place = torch.where(selected.unsqueeze(-1), torch.arange(4, device=selected.device), 0)
    return (ends - count).unsqueeze(-1) + place, ends


def selected_of(rows: Tensor) -> Tensor:
    """Tell which low tokens are selected, bool (B, n), by the rows of their children, (B, n, 4)."""
    return rows[..., 1] != rows[..., 0]


def check_rows(inverse: Tensor, width: int, total: int) -> None:
    """Raise ValueError for too few rows and, on a CPU, where looking does not wait, for rows of no one layout."""
    if total < inverse.numel() // 4:
        raise ValueError(f"plan.inverse must be rows [0, {total}), got {inverse.numel() // 4} low tokens")
    if not _on_host(inverse) or inverse.numel() == 0:
        return
    rows = children(inverse, width)
    expected, ends = layout(selected_of(rows))
    if not torch.equal(rows.long(), expected):
        b, token, child = (rows != expected).nonzero()[0].tolist()
        given, row = rows[b, token, child].item(), expected[b, token, child].item()
        raise ValueError(f"plan.inverse must be row {row} for low token {token} of sample {b}, got {given}")
    if ends[-1, -1] != total:
        raise ValueError(f"plan.inverse must be rows [0, {total}), got [0, {ends[-1, -1]})")


def _elements(height: int, width: int, channels: int, granularity: str, device: torch.device) -> Tensor:
    """Return the element index of every value of a token grid that is upsampled, (height * width, channels)."""
    if granularity == "token":
        return torch.arange(height * width * channels, device=device).view(height * width, channels)
    pixels = torch.arange(height * width * channels, device=device).view(channels // 4, height, 2, width, 2)
    return pixels.permute(1, 3, 0, 2, 4).reshape(height * width, channels)


def _upsample_tokens(low: Tensor, z: Tensor, scale: float, noise_scale: float, granularity: str) -> Tensor:
    """Return the children (B, n, 4, C) of low (B, n, C), with its block noise z (B, n, C, 4)."""
    out: Tensor = scale * low.unsqueeze(-1) + noise_scale * z
    if granularity == "token":
        return out.transpose(2, 3)
    # Low channel (c, py, px) becomes the whole 2x2 patch, channels (c, 0..3), of child (py, px).
    out = out.unflatten(2, (low.shape[2] // 4, 4)).transpose(2, 3)
    return out.flatten(3)


def plan_tokens(
    scores: Tensor, h: int, w: int, k: int, threshold: float | None, total: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return cu_seqlens, source, child, inverse and positions of `ralu_kernels.TokenPlan`."""
    b, n = scores.shape
    if threshold is None:
        bits = torch.where(scores == 0, 0.0, scores.float()).view(torch.int32)  # -0.0 ties with 0.0
        key = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(scores.isnan(), -(2**31))
        first = key.argsort(dim=1, descending=True, stable=True)[:, :k]
        selected = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, first, True)
    else:
        selected = scores.float() >= threshold
    rows, ends = layout(selected)
    count = torch.where(selected, 4, 1).flatten()
    token = torch.arange(b * n, device=scores.device).repeat_interleave(count, output_size=total)
    source = token % n
    place = torch.arange(total, device=scores.device) - rows[..., 0].flatten()[token]
    child = torch.where(selected.flatten()[token], place, -1)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends[:, -1]])
    positions = torch.stack([source // w + child.clamp_min(0) // 2 * 0.5, source % w + child.clamp_min(0) % 2 * 0.5], 1)
    return cu_seqlens.int(), source.int(), child.int(), _raster(rows, w).int(), positions


def _existing_rows(inverse: Tensor, width: int, total: int) -> Tensor:
    """Return the packed rows of the low tokens' children, (B, n, 4), with ``total`` for a row that is not there."""
    check_rows(inverse, width, total)
    rows = children(inverse, width)
    return torch.where((rows >= 0) & (rows < total), rows, total)


def upsample_selected(
    low: Tensor, inverse: Tensor, cu_seqlens: Tensor, source: Tensor, child: Tensor, width: int, longest: int,
    scale: float, noise_scale: float, c: float, seed: Tensor, granularity: str, kept_noise: str,
) -> Tensor:  # fmt: skip
    """Return `ralu_kernels.upsample_selected` of low tokens (B, n, C), packed (total, C): ``inverse`` tells all."""
    (n, channels), total = low.shape[1:], source.shape[0]
    element = _elements(n // width, width, channels, granularity, low.device)
    rows = _existing_rows(inverse, width, total)
    x = low.float()
    upsampled = _upsample_tokens(x, _block_noise(seed, element, TO_MIXED, c), scale, noise_scale, granularity)
    kept = scale * x + noise_scale * kept_std(c, kept_noise) * _kept_noise(seed, n, channels, TO_MIXED)
    selected = selected_of(rows)
    values = torch.where(selected[..., None, None], upsampled, kept.unsqueeze(2)).to(low.dtype)
    out = low.new_empty(total + 1, channels)
    out[rows.flatten()] = values.flatten(0, 2)  # a kept row is written four times, with the same value
    return out[:total]


def upsample_remaining(
    packed: Tensor, inverse: Tensor, width: int, scale: float, noise_scale: float, c: float, seed: Tensor,
    granularity: str, kept_noise: str,
) -> Tensor:  # fmt: skip
    """Return `ralu_kernels.upsample_remaining` of packed tokens (total, C) in raster order, (B, 4n, C)."""
    channels = packed.shape[1]
    height = inverse.shape[1] // (4 * width)
    rows = _existing_rows(inverse, width, packed.shape[0])
    x = F.pad(packed.float(), (0, 0, 0, 1), value=math.nan)[rows]  # (B, n, 4, C)
    element = _elements(height, width, channels, granularity, packed.device)
    upsampled = _upsample_tokens(x[:, :, 0], _block_noise(seed, element, TO_FULL, c), scale, noise_scale, granularity)
    eps = children(_kept_noise(seed, inverse.shape[1], channels, TO_FULL), width)
    kept = scale * x + noise_scale * kept_std(c, kept_noise) * eps
    selected = selected_of(rows)
    return _raster(torch.where(selected[..., None, None], kept, upsampled), width).to(packed.dtype)


# ---- images ----


def _sobel(image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 3x3 Sobel derivatives of images (B, H, W) along x and y, int32; borders are replicated."""
    x = F.pad(image.float(), (1, 1, 1, 1), mode="replicate").int()
    down = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    right = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    return down[..., 2:] - down[..., :-2], right[:, 2:] - right[:, :-2]


def _neighbours(x: Tensor, value: int) -> dict[tuple[int, int], Tensor]:
    """Return what stands beside each place of x (B, H, W), by (rows down, columns right); ``value`` beyond borders."""
    h, w = x.shape[1:]
    padded = F.pad(x, (1, 1, 1, 1), value=value)
    return {(i, j): padded[:, 1 + i : 1 + i + h, 1 + j : 1 + j + w] for i in (-1, 0, 1) for j in (-1, 0, 1)}


def _components(candidate: Tensor) -> Tensor:
    """Label the 8-connected components of True places, (B, H, W): for each in order its component's first index."""
    count = int(candidate.sum())
    index = torch.full(candidate.shape, count, device=candidate.device)
    index[candidate] = torch.arange(count, device=candidate.device)
    beside = torch.stack([x[candidate] for x in _neighbours(index, count).values()], 1)  # (count, 9), itself included
    label = torch.arange(count + 1, device=candidate.device)  # the last stands for what is none
    while True:
        least = label[beside].amin(1)
        linked = label.scatter_reduce(0, label[:count], least, "amin")  # roots follow their members
        linked = linked[linked]
        if torch.equal(linked, label):
            return label[:count]
        label = linked


def canny(image: Tensor, low: int, high: int) -> Tensor:
    """Return `ralu_kernels.canny` of images uint8 (B, H, W)."""
    if image.numel() == 0:
        return torch.empty_like(image, memory_format=torch.contiguous_format)
    low, high = min(low, high), max(low, high)
    dx, dy = _sobel(image)
    steepness = dx.abs() + dy.abs()
    beside = _neighbours(steepness, 0)
    across, along = dx.abs().long(), dy.abs().long() << 15
    flat = across * 13573  # tan(22.5 degrees) = sqrt(2) - 1 in OpenCV's fixed point; tan(67.5) is 2 more
    falling = (dx ^ dy) >= 0
    horizontal = (steepness > beside[0, -1]) & (steepness >= beside[0, 1])
    vertical = (steepness > beside[-1, 0]) & (steepness >= beside[1, 0])
    diagonal = torch.where(
        falling,
        (steepness > beside[-1, -1]) & (steepness > beside[1, 1]),
        (steepness > beside[-1, 1]) & (steepness > beside[1, -1]),
    )
    steep = along > flat + (across << 16)
    ridge = torch.where(along < flat, horizontal, torch.where(steep, vertical, diagonal))
    candidate = ridge & (steepness > low)
    label = _components(candidate)
    strong = label[steepness[candidate] > high]
    reached = torch.zeros(len(label), dtype=torch.bool, device=image.device).index_fill_(0, strong, True)
    edges = torch.zeros(image.shape, dtype=torch.uint8, device=image.device)
    edges[candidate] = reached[label].to(torch.uint8) * 255
    return edges


# ---- inside the blocks ----


def _rows(vector: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return (B, D), a vector for each sample or packed sequence, as float32 that broadcasts against x."""
    if cu_seqlens is None:
        return vector.float().unsqueeze(1)
    row = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    sequence = torch.bucketize(row, cu_seqlens[1:], right=True).clamp_max(max(vector.shape[0] - 1, 0))
    return vector.float()[sequence]


def modulate(x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None, eps: float) -> Tensor:
    """Return `ralu_kernels.modulate` of x and the vectors."""
    shift, scale = _rows(shift, x, cu_seqlens), _rows(scale, x, cu_seqlens)
    return (F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype).contiguous()


def gated_add(x: Tensor, gate: Tensor, y: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return `ralu_kernels.gated_add` of x, the gate and the branch y."""
    return (x.float() + _rows(gate, x, cu_seqlens) * y.float()).to(x.dtype).contiguous()


def gated_add_modulate(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `ralu_kernels.gated_add_modulate` of x, the gate, the branch y and the vectors."""
    x = gated_add(x, gate, y, cu_seqlens)
    return x, modulate(x, shift, scale, cu_seqlens, eps)


def concat_gelu(x: Tensor, y: Tensor) -> Tensor:
    """Return `ralu_kernels.concat_gelu` of x (B, S, D) and y (B, S, M)."""
    return torch.cat([x, F.gelu(y.float(), approximate="tanh").to(x.dtype)], dim=-1)


def _heads(x: Tensor, weight: Tensor | None, heads: int, eps: float) -> Tensor:
    """Return (B, S, H * D) as float32 (B, S, H, D), every head under its RMS norm."""
    x = x.float().unflatten(2, (heads, x.shape[2] // heads))
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return x * cos.unsqueeze(-2) + torch.stack([-odd, even], dim=-1).flatten(-2) * sin.unsqueeze(-2)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Return rows of x, and NaN for those that do not exist."""
    if _on_host(x):
        return x[rows]
    exists = (rows >= 0) & (rows < x.shape[0])
    return torch.where(exists.view(-1, *[1] * (x.dim() - 1)), x[rows.where(exists, 0)], math.nan)


def pack_qkv(
    q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor | None, norm_k: Tensor | None,
    q2: Tensor | None, k2: Tensor | None, v2: Tensor | None, norm_q2: Tensor | None, norm_k2: Tensor | None,
    rows: Tensor | None, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return `ralu_kernels.pack_qkv` of the streams (q, k, v) and (q2, k2, v2), packed (total, H, D) each."""

    def pack(x: Tensor, x2: Tensor | None, weight: Tensor | None, weight2: Tensor | None, rotate: bool) -> Tensor:
        streams = [_heads(x, weight, heads, eps)]
        if x2 is not None:
            streams.append(_heads(x2, weight2, heads, eps))
        x = torch.cat(streams, dim=1)
        if rotate and cos is not None and sin is not None:
            x = _rotate(x, cos, sin)
        x = x.flatten(0, 1).to(q.dtype)
        return x if rows is None else _take(x, rows)

    return pack(q, q2, norm_q, norm_q2, True), pack(k, k2, norm_k, norm_k2, True), pack(v, v2, None, None, False)


def unpack(x: Tensor, inverse: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    """Return `ralu_kernels.unpack` of x (total, H, D) as streams of ``first`` and ``second`` tokens."""
    total = x.shape[0]
    zero_last = F.pad(x.flatten(1), (0, 0, 0, 1))  # the row that -1 finds
    if not _on_host(x):
        inverse = inverse.where(inverse < total, -2).where(inverse != -1, total)
    out = _take(zero_last, inverse).view(-1, first + second, zero_last.shape[1])
    return out[:, :first].contiguous(), out[:, first:].contiguous()
