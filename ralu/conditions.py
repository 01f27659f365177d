"""Conditions at full size, laid out as a run's samples are. Needs PyTorch alone."""

from collections.abc import Callable
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from .interpolation import averaged, extended
from .layout import Grid, Layout, coarsened, gather, pack, unpack


def resampled(
    tokens: Tensor,
    layout: Layout,
    grid: Grid,
    full_grid: Grid,
    halved: Callable[[Tensor, Grid], Tensor] = averaged,
) -> Tensor:
    """Bring a condition's tokens (B, N, C) in raster order of the full grid to a layout's: (B, L, C).

    Of a token of the low grid each latent pixel is the mean of the four that it covers.

    grid:   the low grid (h, w), whose end may lie beyond the full one's: there the last latent pixels are repeated.
    halved: `(tokens (B, 4n, C), grid) -> (B, n, C)`, to make low tokens otherwise.
    The batch is the layout's, or a multiple where guidance repeats it.
    """
    if layout.resolution == "full":
        return tokens
    high = extended(tokens, full_grid, (2 * grid[0], 2 * grid[1]))
    low, plan = halved(high, grid).to(high.dtype), layout.plan
    if plan is None:
        return low
    parts = zip(high.split(plan.batch_size), low.split(plan.batch_size), strict=True)
    return torch.cat([gather(coarsened(*part, layout, grid), layout, grid) for part in parts])


def halved_mask(tokens: Tensor, grid: Grid) -> Tensor:
    """Halve a mask of pixels, s x s of which are a latent pixel's channels: (B, 4n, 4·s²) to (B, n, 4·s²).

    FLUX.1 Fill knows masks of 0 and 1 alone, at the resolution of its tokens: diffusers rounds every mask at a half
    before it packs 8 x 8 pixels into channels. So a low token gets what a mask of half the size would give it, the mean
    of each 2x2 pixels rounded likewise. The mean of 2x2 latent pixels, channel by channel, would lay pixels over others
    that lie 8 apart. grid: the low one.
    """
    side = isqrt(tokens.shape[2] // 4)
    pixels = F.pixel_shuffle(unpack(tokens, (2 * grid[0], 2 * grid[1])), side)
    rounded = (F.avg_pool2d(pixels.float(), 2) >= 0.5).to(tokens.dtype)
    return pack(F.pixel_unshuffle(rounded, side))


def resampled_channels(channels: Tensor, image: int, layout: Layout, grid: Grid, full_grid: Grid) -> Tensor:
    """Bring channels behind a sample's, (B, N, K), to a layout's tokens: (B, L, K).

    image: how many are latent pixels. What is behind them is a mask, see `halved_mask`. The rest as in `resampled`.
    """
    latents = resampled(channels[..., :image], layout, grid, full_grid)
    if channels.shape[2] == image:
        return latents
    return torch.cat([latents, resampled(channels[..., image:], layout, grid, full_grid, halved_mask)], dim=-1)
