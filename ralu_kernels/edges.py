"""Canny edges of a batch of images, and how many of them each block of an image has."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _backend, reference
from ._backend import register
from ._checks import MAX_ELEMENTS, check_tensor, integer, members, number, wrong

_STEEPEST = 2040  # of the L1 gradient of 8 bits: no pixel exceeds it


def _fake(image: Tensor, low: int, high: int) -> Tensor:
    return image.new_empty(image.shape)


def _native(image: Tensor, low: int, high: int) -> Tensor:
    edges = _fake(image, low, high)
    scratch = image.new_empty(image.shape if image.device.type == "cuda" else 0, dtype=torch.int32)
    _backend.native.canny(image.contiguous(), edges, scratch, low, high)
    return edges


_canny = register(
    "canny(Tensor image, SymInt low, SymInt high, str backend) -> Tensor",
    _fake,
    native=_native,
    reference=reference.canny,
)


def _threshold(name: str, value: float) -> int:
    value = number(name, value)
    if not 0 <= value < math.inf:
        raise wrong(name, value, "a finite number, at least 0")
    return min(math.floor(value), _STEEPEST)


def canny(image: Tensor, low: float = 100, high: float = 200, *, backend: str = "auto") -> Tensor:
    """Find the edges of each image as ``cv2.Canny(image, low, high)`` does, pixel for pixel (Canny, 1986).

    3x3 Sobel derivatives with replicated borders, L1 gradient, no smoothing. An edge pixel is steeper than its two
    neighbours along the gradient, and than ``high``; or than ``low``, and connected to such a pixel.

    Args:
        image: uint8 (B, H, W), any strides. On CUDA nothing is copied to the host, which does not wait either.
        low, high: thresholds of |dx| + |dy|, at least 0, rounded down and exchanged if low > high, as OpenCV does.
        backend: "auto", "native" or "reference".

    Returns:
        Contiguous uint8 (B, H, W), 255 at edges and 0 elsewhere.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is not as described, an image has 2^31 pixels or more, or the backend cannot run here.
    """
    check_tensor("image", image, "(B, H, W)", (torch.uint8,))
    pixels = image.shape[1] * image.shape[2]
    if pixels > MAX_ELEMENTS:
        raise wrong("the number of pixels of one image", pixels, f"at most {MAX_ELEMENTS}")
    return _canny(image, _threshold("low", low), _threshold("high", high), backend)


def edge_density(
    image: Tensor, block: int | Sequence[int], low: float = 100, high: float = 200, *, backend: str = "auto"
) -> Tensor:
    """Measure the share of edge pixels in each block of an image: RALU's score for what to upsample first.

    Args:
        image: uint8 (B, H, W), any strides.
        block: (height, width) of a block in pixels, or the side of a square one; they divide (H, W).
        low, high, backend: as in `canny`.

    Returns:
        float32 (B, H / block height, W / block width) in [0, 1].

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is not as described; see `canny`.
    """
    check_tensor("image", image, "(B, H, W)", (torch.uint8,))
    height, width = image.shape[1:]
    sides = (
        members("block", block, 2, "an int or (height, width)") if isinstance(block, (tuple, list)) else (block,) * 2
    )
    y, x = (integer("block", side, 1) for side in sides)
    if height % y or width % x:
        raise wrong("block", block, f"divisors of {(height, width)}")
    edges = canny(image, low, high, backend=backend)
    blocks: Tensor = (edges > 0).unflatten(2, (width // x, x)).unflatten(1, (height // y, y))
    return blocks.float().mean((2, 4))
