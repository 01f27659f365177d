"""Canny edges of a batch of images, and how many of them each block of an image has."""

import math

import torch
from torch import Tensor

from ._backend import MAX_ELEMENTS, check, register

_STEEPEST = 2040  # of the L1 gradient of 8 bits: no pixel exceeds it


def _reference(image: Tensor, low: int, high: int) -> Tensor:
    import cv2

    if image.numel() == 0:
        return _fake(image, low, high)
    edges = [torch.from_numpy(cv2.Canny(picture.numpy(), low, high)) for picture in image.cpu().contiguous()]
    return torch.stack(edges).to(image.device)


def _native(image: Tensor, low: int, high: int) -> Tensor:
    if image.device.type == "cpu":
        return _reference(image, low, high)
    edges, parent = _fake(image, low, high), image.new_empty(image.shape, dtype=torch.int32)
    torch.ops.ralu_kernels_C.canny(image.contiguous(), edges, parent, low, high)
    return edges


def _fake(image, low, high):
    return image.new_empty(image.shape)


register(
    "canny(Tensor image, SymInt low, SymInt high, str backend) -> Tensor",
    _fake,
    native=_native,
    reference=_reference,
)


def _threshold(name: str, value: float) -> int:
    check(0 <= value < math.inf, name, value, "a finite number, at least 0")
    return min(math.floor(value), _STEEPEST)


def canny(image: Tensor, low: float = 100, high: float = 200, *, backend: str = "auto") -> Tensor:
    """Canny's edge detector (1986) as ``cv2.Canny(image, low, high)`` defines it, pixel for pixel, for each image.

    3x3 Sobel derivatives with replicated borders, L1 gradient, no smoothing. An edge pixel is steeper than its two
    neighbours along the gradient, and than ``high``; or than ``low``, and connected to such a pixel.

    Args:
        image: uint8 (B, H, W), any strides. On CUDA nothing is copied to the host, which does not wait either; on other
            devices OpenCV does the work.
        low, high: thresholds of |dx| + |dy|, at least 0, rounded down and exchanged if low > high, as OpenCV does.
        backend: "auto", "native" or "reference" (OpenCV, whatever the device).

    Returns:
        Contiguous uint8 (B, H, W), 255 at edges and 0 elsewhere.

    Raises:
        ValueError: an argument is not as described, an image has 2^31 pixels or more, or the backend cannot run here.
    """
    check(image.dim() == 3, "image", image.shape, "of shape (B, H, W)")
    check(image.dtype == torch.uint8, "image.dtype", image.dtype, "uint8")
    pixels = image.shape[1] * image.shape[2]
    check(pixels <= MAX_ELEMENTS, "the number of pixels of one image", pixels, "at most {}", MAX_ELEMENTS)
    low, high = _threshold("low", low), _threshold("high", high)
    return torch.ops.ralu_kernels.canny(image, low, high, backend)


def edge_density(
    image: Tensor, block: int | tuple[int, int], low: float = 100, high: float = 200, *, backend: str = "auto"
) -> Tensor:
    """Share of edge pixels in each block of an image: RALU's score for what to enlarge first.

    Args:
        image: uint8 (B, H, W), any strides.
        block: (height, width) of a block, or the side of a square one; they divide (H, W).
        low, high, backend: as in `canny`.

    Returns:
        float32 (B, H / block height, W / block width) in [0, 1].

    Raises:
        ValueError: an argument is not as described; see `canny`.
    """
    edges = canny(image, low, high, backend=backend)
    y, x = (block, block) if isinstance(block, int) else block
    height, width = image.shape[1:]
    check(y > 0 and x > 0 and height % y == 0 and width % x == 0, "block", block, "divisors of {}", (height, width))
    return (edges > 0).unflatten(2, (width // x, x)).unflatten(1, (height // y, y)).float().mean((2, 4))
