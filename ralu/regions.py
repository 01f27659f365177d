"""Which tokens go to full resolution first: scores for the low-resolution tokens.

A scorer is any callable `(x0_tokens, grid) -> scores` with x0_tokens (B, n, C), the clean latent predicted at the end
of stage 1, grid (h, w) with h·w = n, and scores (B, n): the highest go first. So scorers are combined by adding them,
each brought to a common size first:

    face = ralu.regions.mask(Image.open("face-mask.png"))

    def edges_and_face(x0, grid):
        edges = ralu.regions.gradient(x0, grid)
        return edges / edges.amax(dim=1, keepdim=True) + 0.5 * face(x0, grid)

    ralu.enable(pipe, regions=edges_and_face)

There is no scorer by attention maps, though they are popular elsewhere: fused attention, PyTorch's as well as that of
`ralu_kernels`, never has the weights in memory, and computing them beside it would cost what it saves.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

import ralu_kernels
from ralu_kernels.reference import philox

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

Scorer = Callable[[Tensor, tuple[int, int]], Tensor]


def scorer_of(regions: Any, decode: Callable | None = None) -> Scorer:
    """Return the scorer that the option `regions` means: a name, a mask in any format that `mask` takes, or a scorer.

    decode: for "canny", see `canny`. Raises ValueError for an unknown name and for "canny" without a decoder, and
    TypeError for what is none of these.
    """
    if callable(regions):
        return regions
    if isinstance(regions, str) and regions == "canny":
        if decode is None:
            raise ValueError("regions='canny' needs a decoder; pass regions='gradient' or a callable")
        return canny(decode)
    if isinstance(regions, str):
        if regions == "mask":
            raise ValueError("regions='mask' needs an inpainting pipeline: give the mask itself")
        if regions not in _NAMED:
            names = ", ".join(map(repr, ("canny", *_NAMED)))
            raise ValueError(f"regions must be {names}, an image, an array, a tensor or a callable, got {regions!r}")
        return _NAMED[regions]
    try:
        return mask(regions)
    except (TypeError, ValueError) as error:
        raise type(error)(f"regions: {error}") from None


def score(scorer: Scorer, x0: Tensor, grid: tuple[int, int], seeds: Tensor) -> Tensor:
    """Score the tokens of a clean estimate x0 (B, n, C): float32 (B, n) on its device.

    seeds: int64 (B,), for `random`. Raises ValueError where the scorer gives another number of scores.
    """
    scores = random(seeds, grid) if scorer is random else scorer(x0, grid)
    if not isinstance(scores, Tensor) or scores.shape != x0.shape[:2]:
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"the scorer must return one score a token, {tuple(x0.shape[:2])}, got {shape}")
    return scores.to(x0.device, torch.float32)


def edge_density(images: Tensor, grid: tuple[int, int], low: int = 100, high: int = 200) -> Tensor:
    """Measure the share of Canny edge pixels in each token's block of an image.

    images: (B, 3, H, W) in [-1, 1], as a VAE decodes them; H and W are multiples of the grid's h and w.
    low, high: OpenCV's hysteresis thresholds on the L1 Sobel gradient of the 8-bit luma.
    Returns float32 (B, n) in [0, 1], on the images' device; on CUDA, with the compiled extension, nothing leaves it.
    Blocks with the same number of edge pixels are told apart by their contrast, in steps smaller than one edge pixel:
    without it flat images would fill up from the top left. Raises ValueError for images that the grid does not divide.
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
    """Make the paper's scorer: decode the clean prediction, find Canny edges, count them in each token's block.

    decode: `(x0_tokens, grid) -> images (B, 3, H, W) in [-1, 1]`, usually the VAE.
    """
    return lambda x0, grid: edge_density(decode(x0, grid), grid, low, high)


def gradient(x0: Tensor, grid: tuple[int, int]) -> Tensor:
    """Score without a decoder (supplement C.1): by the steepness of the latent between neighbouring patches.

    Root mean square over the channels of the central differences of x0 (B, n, C). Returns float32 (B, n).
    """
    planes = x0.float().transpose(1, 2).unflatten(2, grid)
    padded = F.pad(planes, (1, 1, 1, 1), mode="replicate")
    dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    return (dx.square() + dy.square()).mean(dim=1).sqrt().flatten(1)


class Change:
    """Score without a decoder: by how much the clean estimate of each token changed in the stage before the selection.

    That is Σ_k mean_c (x0_k - x0_(k-1))² over the stage's steps k and a token's values c, in float32. It costs no
    call of the model, and memory for one estimate more. A run makes a scorer of its own, which sees all of its steps.
    """

    def __init__(self) -> None:
        self._before: Tensor | None = None
        self._total: Tensor | None = None

    def observe(self, x0: Tensor):
        """Add what changed since the step before. x0: the clean estimate (B, n, C) of this one, float32."""
        if self._before is not None:
            changed = (x0 - self._before).square().mean(dim=-1)
            self._total = changed if self._total is None else self._total + changed
        self._before = x0

    def __call__(self, x0: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Return the sum, float32 (B, n), and begin anew; None after fewer than two steps."""
        total, self._before, self._total = self._total, None, None
        return total


def evenly_spaced(x0: Tensor, grid: tuple[int, int]) -> Tensor:
    """Score by the place alone, for comparison: at every ratio the tokens that go first are spread evenly.

    The order of Bayer's dither matrix (1973): first one token of each 2^k x 2^k block, then the one in the block's
    middle, then those in between. Returns float32 (B, n) in (0, 1]: a threshold t selects about the share 1 - t.
    """
    rows, columns = (torch.arange(size, device=x0.device) for size in grid)
    bits = (max(grid) - 1).bit_length()
    rank = torch.zeros(grid, dtype=torch.int64, device=x0.device)
    for bit in range(bits):  # the lowest bit of a place decides first
        y, x = rows[:, None] >> bit & 1, columns >> bit & 1
        rank = 4 * rank + 2 * (y ^ x) + y
    return (1 - rank / 4**bits).flatten().expand(len(x0), -1)


def random(seeds: Tensor, grid: tuple[int, int]) -> Tensor:
    """Draw scores evenly from [0, 1), for comparison: float32 (B, n) from each sample's seed, int64 (B,).

    Philox with the counter (token, 1, 0, 0), which no noise uses: its second word is the stage that is entered, from 2
    on, or 0 where the noise of an odd grid is continued.
    """
    token = torch.arange(grid[0] * grid[1], device=seeds.device)
    return philox(seeds[:, None], token, 1, 0, 0)[0] / 2**32


def mask(image: "Image.Image | np.ndarray | Tensor") -> "Mask":
    """Make a scorer from a mask: the brighter a token's block is on average, the sooner it is upsampled.

    image: an image in any of PIL's modes, an array or a tensor, of any size: (H, W), (B, H, W) or (B, 1, H, W), with
           a mask for each image of the batch. Scores are in [0, 1] whatever the format: 8-bit values are divided by
           255 and 16-bit ones (PIL's "I" too) by 65535, colours are weighted as in luma, and an alpha channel
           multiplies. Integers that are all 0 or 1 are taken as they are, and so are bools and floats.

    Raises TypeError for what is no image, and ValueError for a mask that is empty, complex, NaN or infinite, of another
    shape, or of integers whose white is unknown.
    """
    if _is(image, "PIL.Image", "Image"):
        planes = _brightness(image)
    elif isinstance(image, Tensor) or _is(image, "numpy", "ndarray"):
        planes = _unit(image)
    else:
        raise TypeError(f"a mask must be an image, an array or a tensor, got {type(image).__name__}")
    if planes.dim() == 4 and planes.shape[1] == 1:
        planes = planes[:, 0]
    if planes.dim() not in (2, 3):
        raise ValueError(f"a mask must be of shape (H, W), (B, H, W) or (B, 1, H, W), got {tuple(planes.shape)}")
    if planes.numel() == 0:
        raise ValueError(f"a mask must not be empty, got shape {tuple(planes.shape)}")
    if not planes.isfinite().all():
        raise ValueError("a mask must be finite, got NaN or infinity")
    return Mask(planes.reshape(-1, 1, *planes.shape[-2:]))


@dataclass(frozen=True, eq=False)
class Mask:
    """The scorer that `mask` makes.

    planes: float32 (B, 1, H, W), or (1, 1, H, W) for all images of a batch.
    """

    planes: Tensor

    def __call__(self, x0: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the mean brightness of every token's block, float32 (B, n)."""
        self.check_batch(len(x0))
        return F.adaptive_avg_pool2d(self.planes.to(x0.device), grid).flatten(1).expand(len(x0), -1)

    def padded(self, grid: tuple[int, int], padded: tuple[int, int]) -> "Mask":
        """Return the mask of a padded image whose part on this grid it is of; its last row and column are repeated."""
        if grid == padded:
            return self
        rows, columns = (new - old for old, new in zip(grid, padded, strict=True))
        blocks = F.adaptive_avg_pool2d(self.planes, grid)
        return Mask(F.pad(blocks, (0, columns, 0, rows), mode="replicate"))

    def check_batch(self, batch: int):
        """Raise ValueError where there are masks for another number of images than the batch has."""
        if len(self.planes) not in (1, batch):
            raise ValueError(f"regions has masks for {len(self.planes)} images, but the batch has {batch}")


def no_mask(x0: Tensor, grid: tuple[int, int]) -> Tensor:
    """Stand for the scorer until the pipeline's mask is known."""
    raise ValueError("regions='mask' needs the mask of an inpainting pipeline, and none was given")


def _is(value, module: str, name: str) -> TypeGuard[Any]:
    """Say whether a value is of a class whose module need not be installed: then no value is."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _unit(values: "np.ndarray | Tensor", white: int | None = None) -> Tensor:
    """Scale values of any real dtype to float32 with white at 1.

    white: the value that means white; by default the dtype's largest.
    """
    if not isinstance(values, Tensor):
        if values.dtype.kind not in "biufc":
            raise TypeError(f"a mask must be an array of numbers, got {values.dtype}")
        values = torch.from_numpy(values.copy())  # images' arrays are read-only, which PyTorch warns of
    values = values.detach()
    if values.is_complex():
        raise ValueError(f"a mask must be real, got {values.dtype}")
    if values.is_floating_point() or values.dtype == torch.bool:
        return values.float()
    white = white or {torch.uint8: 255, torch.uint16: 65535}.get(values.dtype)
    wide = values.long()
    if bool(((wide == 0) | (wide == 1)).all()):
        return wide.float()
    if white is None or not 0 <= int(wide.min()) <= int(wide.max()) <= white:
        raise ValueError(
            f"a mask of {values.dtype} may hold 0 and 1 alone, got {int(wide.min())} to {int(wide.max())}: "
            "divide it by its white, to floats in [0, 1]"
        )
    return wide.float() / white


def _brightness(image: "Image.Image") -> Tensor:
    """Return an image of any mode as brightness times alpha, float32 (H, W)."""
    import numpy as np

    mode = image.mode
    if mode == "F":
        return _unit(np.asarray(image))
    if mode.startswith("I"):  # of 32 bits, but PIL reads 16-bit files into it
        return _unit(np.asarray(image).astype(np.int64), white=65535)
    if image.has_transparency_data or mode == "La":
        luma, alpha = image.convert("RGBA" if mode not in ("LA", "La") else "LA").convert("LA").split()
        return _unit(np.asarray(luma)) * _unit(np.asarray(alpha), white=255)
    return _unit(np.asarray(image.convert("L")))


# `score` gives random the seeds, and a run makes a Change of its own.
_NAMED: dict[str, Any] = {"gradient": gradient, "change": Change, "grid": evenly_spaced, "random": random}
