"""Which tokens go to full resolution first: scores for the low-resolution tokens, from edges.

A scorer is any callable `(x0_tokens, grid) -> scores` with x0_tokens (B, n, C), the clean latent predicted at the end
of stage 1, grid (h, w) with h·w = n, and scores (B, n): the highest go first.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import ralu_kernels
from ralu_kernels.reference import philox

Scorer = Callable[[Tensor, tuple[int, int]], Tensor]


def edge_density(images: Tensor, grid: tuple[int, int], low: int = 100, high: int = 200) -> Tensor:
    """Share of Canny edge pixels in each token's block of an image.

    images: (B, 3, H, W) in [-1, 1], as a VAE decodes them; H and W are multiples of the grid's h and w.
    low, high: OpenCV's hysteresis thresholds on the L1 Sobel gradient of the 8-bit luma.
    Returns float32 (B, n) in [0, 1], on the images' device; on CUDA, with the compiled extension, nothing leaves it.
    Blocks with the same number of edge pixels are told apart by their contrast, in steps smaller than one edge pixel:
    without it flat pictures would fill up from the top left.
    """
    (h, w), (height, width) = grid, images.shape[-2:]
    if height % h or width % w:
        raise ValueError(f"images of {height}x{width} cannot be cut into a grid of {h}x{w} blocks")
    red, green, blue = (images.float() * 0.5 + 0.5).unbind(1)
    luma = (0.299 * red + 0.587 * green + 0.114 * blue).clamp(0, 1)
    block = height // h, width // w
    edges = ralu_kernels.edge_density((luma * 255).round().to(torch.uint8), block, low, high)
    contrast = luma.unflatten(2, (w, block[1])).unflatten(1, (h, block[0])).std((2, 4), correction=0)  # at most 1/2
    return (edges + contrast / (block[0] * block[1])).flatten(1)


def canny(decode: Callable[[Tensor, tuple[int, int]], Tensor], low: int = 100, high: int = 200) -> Scorer:
    """The paper's scorer: decode the clean prediction, find Canny edges, count them in each token's block.

    decode: `(x0_tokens, grid) -> images (B, 3, H, W) in [-1, 1]`, usually the VAE.
    """
    return lambda x0, grid: edge_density(decode(x0, grid), grid, low, high)


def gradient(x0: Tensor, grid: tuple[int, int]) -> Tensor:
    """The scorer without a decoder (supplement C.1): steepness of the latent between neighbouring patches.

    Root mean square over the channels of the central differences of x0 (B, n, C). Returns float32 (B, n).
    """
    planes = x0.float().transpose(1, 2).unflatten(2, grid)
    padded = F.pad(planes, (1, 1, 1, 1), mode="replicate")
    dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    return (dx.square() + dy.square()).mean(dim=1).sqrt().flatten(1)


def random(seeds: Tensor, grid: tuple[int, int]) -> Tensor:
    """Scores without meaning, even in [0, 1], for comparison: float32 (B, n) from each sample's seed, int64 (B,).

    Philox with the counter (token, 1, 0, 0), which no noise uses: its second word is the stage, 2 or 3.
    """
    token = torch.arange(grid[0] * grid[1], device=seeds.device)
    return philox(seeds[:, None], token, 1, 0, 0)[0] / 2**32


def mask(picture: Image.Image | Tensor) -> Scorer:
    """A scorer from a mask of your own: the brighter a token's block is on average, the sooner it goes.

    picture: an image of any size, or a tensor (H, W) or (B, H, W) with a mask for each picture of the batch.
    """
    if isinstance(picture, Image.Image):
        picture = torch.from_numpy(np.asarray(picture.convert("L"), dtype=np.float32) / 255)
    if picture.dim() not in (2, 3):
        raise ValueError(f"a mask must be of shape (H, W) or (B, H, W), got {tuple(picture.shape)}")
    planes = picture.float().reshape(-1, 1, *picture.shape[-2:])

    def scorer(x0: Tensor, grid: tuple[int, int]) -> Tensor:
        scores = F.adaptive_avg_pool2d(planes.to(x0.device), grid).flatten(1)
        return scores.expand(len(x0), -1)

    def check_batch(batch: int):
        if len(planes) not in (1, batch):
            raise ValueError(f"regions has masks for {len(planes)} images, but the batch has {batch}")

    scorer.check_batch = check_batch
    return scorer
