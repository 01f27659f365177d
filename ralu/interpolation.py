"""Upsampling other than by nearest neighbour, and resizing.

Of the image ("pixels", not in the paper): what nearest neighbour makes of the clean estimate x0 is replaced by the
latents of the decoded, enlarged image. A transition upsamples x = e·x0 + (1-e)·noise by a with a·e = s; adding

    s·(encode(enlarge(decode(x0))) - Up(x0))

moves the mean and leaves the noise, and so its matching, as it is. Nearest neighbour supposes that a latent at half
resolution stands for four alike at full resolution, which holds as far as latents are local averages.

Of latents (ablations, supplement C, Table S5):

Smoother upsamplers' noise would need a dense covariance, so the SNR alone is matched. Interpolation U gives pixel i of
Up(x) the noise variance (1-e)²·v_i, v = diag(U Uᵀ), and the flow at the start s has (1-s)². With the signal right,
a·e = s, white noise of variance

    b_i² = (1-s)² - a²·(1-e)²·v_i = (1-s)² - (a-s)²·v_i

makes up the rest, pixel by pixel: v = 1 for nearest neighbour and for kept tokens, less in between two pixels.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ralu_kernels import TokenPlan, upsample_remaining, upsample_selected

from .layout import pack, selected, unpack
from .options import Options
from .schedule import Schedule, Transition


@lru_cache
def weights(kind: str, size: int, target: int) -> Tensor:
    """Compute U along one axis, float32 (target, size), as Pillow does (bicubic with a = -1/2, three-lobed Lanczos).

    Raises ImportError without Pillow.
    """
    try:
        import numpy as np
        from PIL import Image
    except ImportError as error:
        raise ImportError(f'interpolation {kind!r} needs Pillow: pip install "ralu[pipelines]"') from error

    rows = Image.fromarray(np.eye(size, dtype=np.float32)).resize((size, target), Image.Resampling[kind.upper()])
    return torch.from_numpy(np.array(rows))


def resized(tokens: Tensor, grid: tuple[int, int], target: tuple[int, int], kind: str) -> Tensor:
    """Resize the latent pixels of tokens (B, h·w, C) from a grid (h, w) to another: float32 (B, n, C).

    kind: one of `ralu.schedule.SMOOTH`, or "nearest".
    """
    planes = _planes(tokens.float(), grid, "pixel")
    rows, columns = (weights(kind, 2 * old, 2 * new).to(tokens.device) for old, new in zip(grid, target, strict=True))
    return _tokens(rows @ planes @ columns.T, "pixel")


def extended(tokens: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Repeat the last latent pixels of tokens (B, h·w, C) on a grid (h, w) as far as a larger one's end: (B, n, C)."""
    rows, columns = (2 * (new - old) for old, new in zip(grid, target, strict=True))
    return _tokens(F.pad(_planes(tokens, grid, "pixel"), (0, columns, 0, rows), mode="replicate"), "pixel")


def _planes(tokens: Tensor, grid: tuple[int, int], granularity: str) -> Tensor:
    """View tokens (B, h·w, C) as images: of latent pixels (B, C/4, 2h, 2w), or of whole tokens (B, C, h, w)."""
    planes = tokens.transpose(1, 2).unflatten(2, grid)
    return F.pixel_shuffle(planes, 2) if granularity == "pixel" else planes


def _tokens(planes: Tensor, granularity: str) -> Tensor:
    """Undo `_planes`."""
    return (F.pixel_unshuffle(planes, 2) if granularity == "pixel" else planes).flatten(2).transpose(1, 2)


def upsampled(low: Tensor, grid: tuple[int, int], kind: str, granularity: str) -> tuple[Tensor, Tensor]:
    """Interpolate tokens (B, n, C) to Up(low), float32 (B, 4n, C) in raster order, and its v, (1, 4n, C or 1)."""
    planes = _planes(low.float(), grid, granularity)
    rows, columns = (weights(kind, size, 2 * size).to(low.device) for size in planes.shape[2:])
    v = torch.outer(rows.square().sum(1), columns.square().sum(1))[None, None]
    if granularity == "pixel":
        v = v.expand(1, low.shape[2] // 4, -1, -1)
    return _tokens(rows @ planes @ columns.T, granularity), _tokens(v, granularity)


def _renoise(x: Tensor, v: Tensor | float, transition: Transition, white: Tensor) -> Tensor:
    variance = (1 - transition.start) ** 2 - (transition.scale - transition.start) ** 2 * v
    return transition.scale * x + variance**0.5 * white


def averaged(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Halve the latent pixels of tokens (B, 4n, C) in raster order by the mean of each 2x2: float32 (B, n, C).

    grid: the low one.
    """
    return pack(F.avg_pool2d(unpack(tokens.float(), (2 * grid[0], 2 * grid[1])), 2))


def through_pixels(tokens: Tensor, grid: tuple[int, int], target: tuple[int, int], decode: Callable, encode: Callable):
    """Resize tokens (B, h·w, C) from a grid (h, w) to another by way of the image, bicubic: float32 (B, n, C).

    decode: `(tokens, grid) -> images (B, 3, H, W) in [-1, 1]`. encode: images to tokens of their own grid.
    """
    images = decode(tokens, grid).float()
    size = [side * new // old for side, old, new in zip(images.shape[2:], grid, target, strict=True)]
    enlarged = F.interpolate(images, size=size, mode="bicubic", antialias=True)
    return encode(enlarged.clamp(-1, 1)).float()


def check_resize(schedule: Schedule, resize: Callable | None):
    """Raise ValueError for a schedule that goes by way of the image where nothing decodes and encodes it."""
    if resize is None and any(transition.interpolation == "pixels" for transition in schedule.transitions):
        raise ValueError("upsampler='pixels' needs an autoencoder: a pipeline with a VAE, or decode and encode")


def correction(x0: Tensor, grid: tuple[int, int], transition: Transition, options: Options, resize: Callable) -> Tensor:
    """Compute what "pixels" adds to the upsampled tokens of clean low ones (B, n, C): float32 (B, 4n, C), raster."""
    granularity = options.chosen("granularity")["granularity"]
    planes = _planes(x0.float(), grid, granularity)
    nearest = _tokens(planes.repeat_interleave(2, -2).repeat_interleave(2, -1), granularity)
    return transition.start * (resize(x0, grid, (2 * grid[0], 2 * grid[1])) - nearest)


def corrected(tokens: Tensor, change: Tensor, transition: Transition, plan: Any = None) -> Tensor:
    """Add a correction (B, 4n, C) to what a transition has upsampled; after "select" in place.

    tokens: packed (total, C) after "select", the plan's; else raster (B, 4n, C). plan: a TokenPlan, where one is left
            or entered.
    """
    if transition.kind == "select":
        change = change.masked_fill(~selected(plan)[..., None], 0)  # a kept token's row is named four times
        return tokens.index_add_(0, plan.inverse.flatten(), change.flatten(0, 1).to(tokens.dtype))
    if transition.kind == "complete":
        change = change.masked_fill(selected(plan)[..., None], 0)
    return tokens + change.to(tokens.dtype)


def low_estimate(packed: Tensor, plan: TokenPlan, before: Tensor) -> Tensor:
    """Make the clean estimate on the low grid, (B, n, C), of a mixed stage's packed one (total, C).

    before: the one that the selection was made from, (B, n, C), which goes on standing for the selected tokens.
    """
    h, w = plan.grid
    first = slice(None), slice(None), 0, slice(None), 0
    covered = packed[plan.inverse.long()].unflatten(1, (h, 2, w, 2))[first].flatten(1, 2)
    chosen = selected(plan).unflatten(1, (h, 2, w, 2))[first].flatten(1, 2)
    return torch.where(chosen[..., None], before.to(covered.dtype), covered)


def select(low: Tensor, plan: TokenPlan, transition: Transition, seeds: Tensor, options: Options) -> Tensor:
    """Upsample the selected of low (B, n, C) to packed (total, C): `ralu_kernels.upsample_selected`, interpolating."""
    high, v = upsampled(low, plan.grid, transition.interpolation, *options.chosen("granularity").values())
    whole = torch.arange(low.shape[1], device=low.device).view(plan.grid)
    parent = whole.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()  # of every high token, in raster order
    children = selected(plan)[..., None]
    white = _white(upsample_selected, low, plan, seeds, options)[plan.inverse.long()]
    kept = _renoise(low[:, parent].float(), 1.0, transition, white)
    x = torch.where(children, _renoise(high, v, transition, white), kept)
    packed = low.new_empty(plan.source.shape[0], low.shape[2])
    packed[plan.inverse.long().flatten()] = x.flatten(0, 1).to(low.dtype)  # a kept row four times, the same
    return packed


def complete(packed: Tensor, plan: TokenPlan, transition: Transition, seeds: Tensor, options: Options) -> Tensor:
    """Upsample the rest of packed (total, C) to raster (B, 4n, C): `ralu_kernels.upsample_remaining`, interpolating.

    Where a low token's neighbour is selected, one pixel of each 2x2 of the neighbour's stands for it: their mean would
    have less noise.
    """
    granularity = options.chosen("granularity")["granularity"]
    (h, w), covered = plan.grid, packed[plan.inverse.long()].float()
    children = selected(plan)[..., None]
    corner = _planes(covered, (2 * h, 2 * w), granularity)[..., ::2, ::2]
    first = slice(None), slice(None), 0, slice(None), 0
    kept, low = children.unflatten(1, (h, 2, w, 2))[first], covered.unflatten(1, (h, 2, w, 2))[first]
    low = torch.where(kept.flatten(1, 2), _tokens(corner, granularity), low.flatten(1, 2))
    high, v = upsampled(low, plan.grid, transition.interpolation, granularity)
    white = _white(upsample_remaining, packed, plan, seeds, options)
    x = torch.where(children, _renoise(covered, 1.0, transition, white), _renoise(high, v, transition, white))
    return x.to(packed.dtype)


def _white(fused: Callable, tokens: Tensor, plan: TokenPlan, seeds: Tensor, options: Options) -> Tensor:
    """Draw standard normals from the fused operation's own random numbers: its noise without c and without x."""
    zeros = torch.zeros_like(tokens, dtype=torch.float32)
    return fused(zeros, plan, 0.0, 1.0, 0.0, seeds, **options.chosen("granularity", "backend"))
