"""Eager PyTorch: the specification every other backend is tested against, and the default where there is no GPU.

RALU supplement A.1. With ``Up`` the nearest-neighbour 2x enlargement and Sigma the covariance of ``Up`` of white noise
(4x4 blocks of ones, one for each enlarged value), the state that enters the next stage is

    scale * Up(x) + noise_scale * z,    z ~ N(0, I - c * Sigma),  0 <= c <= 1/4.

With J the 4x4 matrix of ones, (I - k J)^2 = I - c J for k = (1 - sqrt(1 - 4c)) / 4, so z = eps - k * (sum of the four
eps of the block). For a value that is carried over unchanged Sigma = I, so z ~ N(0, (1 - c) I).

Randomness is a function of the sample's 64-bit seed and of the place alone. Philox-4x32-10 has the seed as its key and
(element, stage, kind, 0) as its counter, and makes four normals of it. All are used, one for each value that is made:

UPSAMPLED: element indexes the low grid, and the four normals are the four children in row-major order. Latents, and
    tokens at pixel granularity, count elements as (channel, row, column) of the latent; tokens at token granularity
    count them as (token, channel).
CARRIED: channel j of token t, of C channels, has normal j % 4 of element t * ceil(C / 4) + j // 4, at either
    granularity. t is the token's place in raster order over its own grid: the low grid on the way to stage 2, the high
    grid on the way to stage 3. (If 4 does not divide C, the last normals of a token's last element go unused.)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

UPSAMPLED, CARRIED = 0, 1
PROMOTE, MERGE = 2, 3  # the stage that the operation leads to

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


# ---- random numbers ----


def _multiply(a, b: int):
    """High and low words of a 32x32-bit product. b >= 2^31 is taken as b - 2^32, so that int64 cannot overflow."""
    product = a * (b - 2**32)
    return ((product >> 32) + a) & _MASK, product & _MASK


def philox(seed, c0, c1, c2, c3):
    """Philox-4x32-10 of Salmon et al. (SC 2011): four 32-bit words for each counter, as int64 in [0, 2^32).

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
    """32-bit words to float32 in [0, 1], by the rule of ``triton.language.uint_to_uniform_float``."""
    return torch.minimum(word, _MASK - word).to(torch.float32) * 4.6566127342e-10


def _box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2.0 * torch.log(u1.clamp_min(1e-7)))
    angle = 6.283185307179586 * u2
    return radius * torch.cos(angle), radius * torch.sin(angle)


def randn4x(seed, c0, c1=0, c2=0, c3=0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four float32 standard normals for each counter: ``triton.language.randn4x(seed, c1 * 2**32 + c0)``."""
    u0, u1, u2, u3 = map(_uniform, philox(seed, c0, c1, c2, c3))
    return *_box_muller(u0, u1), *_box_muller(u2, u3)


def block_coefficient(c: float) -> float:
    """k = (1 - sqrt(1 - 4c)) / 4, written so that a small c does not cancel."""
    return c / (1 + math.sqrt(1 - 4 * c))


def carry_std(c: float, carry_noise: str) -> float:
    """Standard deviation of a carried value's noise: sqrt(1 - c), or the public release's 1."""
    return math.sqrt(1 - c) if carry_noise == "exact" else 1.0


def _block_noise(seed: Tensor, element: Tensor, stage: int, c: float) -> Tensor:
    """z of every enlarged element: (B, *element.shape, 4)."""
    eps = torch.stack(randn4x(seed.view(-1, *[1] * element.dim()), element, stage, UPSAMPLED), dim=-1)
    return eps - block_coefficient(c) * eps.sum(dim=-1, keepdim=True)


def _carried_noise(seed: Tensor, tokens: int, channels: int, stage: int) -> Tensor:
    """White noise for the carried tokens of a grid: (B, tokens, channels)."""
    element = torch.arange(tokens * -(-channels // 4), device=seed.device).view(tokens, -(-channels // 4))
    eps = torch.stack(randn4x(seed.view(-1, 1, 1), element, stage, CARRIED), dim=-1)
    return eps.flatten(2)[..., :channels]


# ---- latents ----


def upsample_renoise(x: Tensor, scale: float, noise_scale: float, c: float, seed: Tensor, stage: int) -> Tensor:
    b, channels, h, w = x.shape
    element = torch.arange(channels * h * w, device=x.device).view(channels, h, w)
    out = scale * x.float().unsqueeze(-1) + noise_scale * _block_noise(seed, element, stage, c)  # (B, C, H, W, 4)
    out = out.unflatten(-1, (2, 2)).transpose(3, 4).reshape(b, channels, 2 * h, 2 * w)
    return out.to(x.dtype)


# ---- tokens ----


def _children(high: Tensor, width: int) -> Tensor:
    """(B, 4n, ...) in raster order over the high grid -> (B, n, 4, ...), the four children of every low token."""
    b, high_tokens, *rest = high.shape
    height = high_tokens // (4 * width)
    return high.reshape(b, height, 2, width, 2, *rest).transpose(2, 3).reshape(b, height * width, 4, *rest)


def _raster(children: Tensor, width: int) -> Tensor:
    """The inverse of ``_children``."""
    b, n, _, *rest = children.shape
    return children.reshape(b, n // width, width, 2, 2, *rest).transpose(2, 3).reshape(b, 4 * n, *rest)


def _elements(height: int, width: int, channels: int, granularity: str, device) -> Tensor:
    """Element index of every value of a token grid that is enlarged, (height * width, channels)."""
    if granularity == "token":
        return torch.arange(height * width * channels, device=device).view(height * width, channels)
    pixels = torch.arange(height * width * channels, device=device).view(channels // 4, height, 2, width, 2)
    return pixels.permute(1, 3, 0, 2, 4).reshape(height * width, channels)


def _upsample_tokens(low: Tensor, z: Tensor, scale: float, noise_scale: float, granularity: str) -> Tensor:
    """low (B, n, C) and its block noise z (B, n, C, 4) -> children (B, n, 4, C)."""
    out = scale * low.unsqueeze(-1) + noise_scale * z
    if granularity == "token":
        return out.transpose(2, 3)
    # Low channel (c, py, px) becomes the whole 2x2 patch, channels (c, 0..3), of child (py, px).
    return out.unflatten(2, (low.shape[2] // 4, 4)).transpose(2, 3).flatten(3)


def plan_tokens(scores: Tensor, h: int, w: int, k: int, threshold: float | None, total: int):
    b, n = scores.shape
    if threshold is None:
        bits = torch.where(scores == 0, 0.0, scores.float()).view(torch.int32)  # -0.0 ties with 0.0
        key = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(scores.isnan(), -(2**31))
        first = key.argsort(dim=1, descending=True, stable=True)[:, :k]
        promoted = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, first, True)
    else:
        promoted = scores.float() >= threshold
    rows = torch.where(promoted, 4, 1)
    end = rows.flatten().cumsum(0)
    start = (end - rows.flatten()).view(b, n)

    token = torch.arange(b * n, device=scores.device).repeat_interleave(rows.flatten(), output_size=total)
    source = token % n
    place = torch.arange(total, device=scores.device) - start.flatten()[token]
    child = torch.where(promoted.flatten()[token], place, -1)
    cu_seqlens = torch.cat([end.new_zeros(1), end[n - 1 :: n]])
    inverse = start.unsqueeze(-1) + torch.where(promoted.unsqueeze(-1), torch.arange(4, device=scores.device), 0)
    positions = torch.stack([source // w + child.clamp_min(0) // 2 * 0.5, source % w + child.clamp_min(0) % 2 * 0.5], 1)
    return cu_seqlens.int(), source.int(), child.int(), _raster(inverse, w).int(), positions


def promote_tokens(
    low: Tensor, inverse: Tensor, width: int, total: int, scale: float, noise_scale: float, c: float, seed: Tensor,
    granularity: str, carry_noise: str,
) -> Tensor:  # fmt: skip
    n, channels = low.shape[1:]
    element = _elements(n // width, width, channels, granularity, low.device)
    rows = _children(inverse, width)
    x = low.float()
    upsampled = _upsample_tokens(x, _block_noise(seed, element, PROMOTE, c), scale, noise_scale, granularity)
    carried = scale * x + noise_scale * carry_std(c, carry_noise) * _carried_noise(seed, n, channels, PROMOTE)
    promoted = rows[..., 1] != rows[..., 0]
    values = torch.where(promoted[..., None, None], upsampled, carried.unsqueeze(2)).to(low.dtype)
    out = low.new_empty(total, channels)
    out[rows.flatten()] = values.flatten(0, 2)  # a carried row is written four times, with the same value
    return out


def merge_tokens(
    packed: Tensor, inverse: Tensor, width: int, scale: float, noise_scale: float, c: float, seed: Tensor,
    granularity: str, carry_noise: str,
) -> Tensor:  # fmt: skip
    channels = packed.shape[1]
    height = inverse.shape[1] // (4 * width)
    rows = _children(inverse, width)
    x = packed.float()[rows]  # (B, n, 4, C)
    element = _elements(height, width, channels, granularity, packed.device)
    upsampled = _upsample_tokens(x[:, :, 0], _block_noise(seed, element, MERGE, c), scale, noise_scale, granularity)
    eps = _children(_carried_noise(seed, inverse.shape[1], channels, MERGE), width)
    carried = scale * x + noise_scale * carry_std(c, carry_noise) * eps
    promoted = rows[..., 1] != rows[..., 0]
    return _raster(torch.where(promoted[..., None, None], carried, upsampled), width).to(packed.dtype)


# ---- inside the blocks ----


def _rows(vector: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B, D), a vector for each sample or packed sequence -> float32 that broadcasts against x."""
    if cu_seqlens is None:
        return vector.float().unsqueeze(1)
    row = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    return vector.float()[torch.bucketize(row, cu_seqlens[1:], right=True)]


def modulate(x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None, eps: float) -> Tensor:
    shift, scale = _rows(shift, x, cu_seqlens), _rows(scale, x, cu_seqlens)
    return (F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype).contiguous()


def gated_add(x: Tensor, gate: Tensor, y: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return (x.float() + _rows(gate, x, cu_seqlens) * y.float()).to(x.dtype).contiguous()


def gated_add_modulate(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    x = gated_add(x, gate, y, cu_seqlens)
    return x, modulate(x, shift, scale, cu_seqlens, eps)


def concat_gelu(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, F.gelu(y.float(), approximate="tanh").to(x.dtype)], dim=-1)


def _heads(x: Tensor, weight: Tensor | None, heads: int, eps: float) -> Tensor:
    """(B, S, H * D) -> float32 (B, S, H, D), every head under its RMS norm."""
    x = x.float().unflatten(2, (heads, x.shape[2] // heads))
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return x * cos.unsqueeze(-2) + torch.stack([-odd, even], dim=-1).flatten(-2) * sin.unsqueeze(-2)


def pack_qkv(
    q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor | None, norm_k: Tensor | None,
    q2: Tensor | None, k2: Tensor | None, v2: Tensor | None, norm_q2: Tensor | None, norm_k2: Tensor | None,
    rows: Tensor | None, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def pack(first, second, weight, weight2, turn):
        streams = [_heads(first, weight, heads, eps)]
        if second is not None:
            streams.append(_heads(second, weight2, heads, eps))
        x = torch.cat(streams, dim=1)
        x = (_rotate(x, cos, sin) if turn else x).flatten(0, 1).to(q.dtype)
        return x if rows is None else x[rows]

    rotary = cos is not None
    return pack(q, q2, norm_q, norm_q2, rotary), pack(k, k2, norm_k, norm_k2, rotary), pack(v, v2, None, None, False)


def unpack(x: Tensor, inverse: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    zero_last = F.pad(x.flatten(1), (0, 0, 0, 1))  # the row that -1 finds
    out = zero_last[inverse].view(-1, first + second, zero_last.shape[1])
    return out[:, :first].contiguous(), out[:, first:].contiguous()
