"""The moves between stages with smoother upsamplers than the paper's nearest neighbour (supplement C, Table S5).

Their noise would need a dense covariance, so the SNR alone is matched. Interpolation U gives pixel i of Up(x) the noise
variance (1-e)²·v_i, v = diag(U Uᵀ), and the flow at the start s has (1-s)². With the signal right, a·e = s, white noise
of variance

    b_i² = (1-s)² - a²·(1-e)²·v_i = (1-s)² - (a-s)²·v_i

makes up the rest, pixel by pixel: v = 1 for nearest neighbour and for carried tokens, less in between two pixels.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ralu_kernels import TokenPlan, merge_tokens, promote_tokens

from .schedule import Transition

UPSAMPLERS = ("nearest", "bilinear", "bicubic", "lanczos")


@lru_cache
def weights(kind: str, size: int) -> Tensor:
    """U along one axis, float32 (2·size, size), as Pillow interpolates (bicubic with a = -1/2, three-lobed Lanczos)."""
    rows = Image.fromarray(np.eye(size, dtype=np.float32)).resize((size, 2 * size), Image.Resampling[kind.upper()])
    return torch.from_numpy(np.array(rows))


def _planes(tokens: Tensor, grid: tuple[int, int], granularity: str) -> Tensor:
    """Tokens (B, h·w, C) as images: of latent pixels (B, C/4, 2h, 2w), or of whole tokens (B, C, h, w)."""
    planes = tokens.transpose(1, 2).unflatten(2, grid)
    return F.pixel_shuffle(planes, 2) if granularity == "pixel" else planes


def _tokens(planes: Tensor, granularity: str) -> Tensor:
    """The inverse of `_planes`."""
    return (F.pixel_unshuffle(planes, 2) if granularity == "pixel" else planes).flatten(2).transpose(1, 2)


def enlarge(low: Tensor, grid: tuple[int, int], kind: str, granularity: str) -> tuple[Tensor, Tensor]:
    """Up(low) of tokens (B, n, C), float32 (B, 4n, C) in raster order, and its v, (1, 4n, C or 1)."""
    planes = _planes(low.float(), grid, granularity)
    rows, columns = (weights(kind, size).to(low.device) for size in planes.shape[2:])
    v = torch.outer(rows.square().sum(1), columns.square().sum(1))[None, None]
    if granularity == "pixel":
        v = v.expand(1, low.shape[2] // 4, -1, -1)
    return _tokens(rows @ planes @ columns.T, granularity), _tokens(v, granularity)


def _renoise(x: Tensor, v: Tensor | float, move: Transition, white: Tensor) -> Tensor:
    variance = (1 - move.start) ** 2 - (move.scale - move.start) ** 2 * v
    return move.scale * x + variance**0.5 * white


def _promoted(plan: TokenPlan) -> Tensor:
    """Which high tokens had a promoted parent, bool (B, 4n) in raster order."""
    return plan.child[plan.inverse.long()] >= 0


def promote(
    low: Tensor, plan: TokenPlan, move: Transition, seed: Tensor, kind: str, granularity: str, backend: str = "auto"
) -> Tensor:
    """Stage 1 to 2, as `ralu_kernels.promote_tokens` with another upsampler: low (B, n, C) to packed (total, C)."""
    high, v = enlarge(low, plan.grid, kind, granularity)
    whole = torch.arange(low.shape[1], device=low.device).view(plan.grid)
    parent = whole.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()  # of every high token, in raster order
    children = _promoted(plan)[..., None]
    white = _white(promote_tokens, low, plan, seed, granularity, backend)[plan.inverse.long()]
    x = torch.where(children, _renoise(high, v, move, white), _renoise(low[:, parent].float(), 1.0, move, white))
    packed = low.new_empty(plan.source.shape[0], low.shape[2])
    packed[plan.inverse.long().flatten()] = x.flatten(0, 1).to(low.dtype)  # a carried row four times, the same
    return packed


def merge(
    packed: Tensor, plan: TokenPlan, move: Transition, seed: Tensor, kind: str, granularity: str, backend: str = "auto"
) -> Tensor:
    """Stage 2 to 3, as `ralu_kernels.merge_tokens` with another upsampler: packed (total, C) to raster (B, 4n, C).

    Where a low token's neighbour is promoted, one pixel of each 2x2 of the neighbour's stands for it: their mean would
    have less noise.
    """
    (h, w), covered = plan.grid, packed[plan.inverse.long()].float()
    children = _promoted(plan)[..., None]
    corner = _planes(covered, (2 * h, 2 * w), granularity)[..., ::2, ::2]
    first = slice(None), slice(None), 0, slice(None), 0
    kept, low = children.unflatten(1, (h, 2, w, 2))[first], covered.unflatten(1, (h, 2, w, 2))[first]
    low = torch.where(kept.flatten(1, 2), _tokens(corner, granularity), low.flatten(1, 2))
    high, v = enlarge(low, plan.grid, kind, granularity)
    white = _white(merge_tokens, packed, plan, seed, granularity, backend)
    return torch.where(children, _renoise(covered, 1.0, move, white), _renoise(high, v, move, white)).to(packed.dtype)


def _white(fused, tokens: Tensor, plan: TokenPlan, seed: Tensor, granularity: str, backend: str) -> Tensor:
    """Standard normals from the same random numbers as the fused operation's: its noise without c and without x."""
    zeros = torch.zeros_like(tokens, dtype=torch.float32)
    return fused(zeros, plan, 0.0, 1.0, 0.0, seed, granularity=granularity, backend=backend)
