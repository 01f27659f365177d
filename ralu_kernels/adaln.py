"""Adaptive layer norm: what a transformer block does to its tokens between the matrix products, one pass each."""

import torch
from torch import Tensor

from . import reference
from ._backend import check, check_sequences, check_values, register, resolve


def _fake(x: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape)


def _fake_both(x: Tensor, *_) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


register(
    "modulate(Tensor x, Tensor shift, Tensor scale, Tensor? cu_seqlens, float eps, str backend) -> Tensor",
    _fake,
    reference=reference.modulate,
)
register(
    "gated_add(Tensor x, Tensor gate, Tensor y, Tensor? cu_seqlens, str backend) -> Tensor",
    _fake,
    reference=reference.gated_add,
)
register(
    "gated_add_modulate(Tensor x, Tensor gate, Tensor y, Tensor shift, Tensor scale, Tensor? cu_seqlens, float eps,"
    " str backend) -> (Tensor, Tensor)",
    _fake_both,
    reference=reference.gated_add_modulate,
)

BACKENDS = ("triton", "reference")


def _check(x: Tensor, cu_seqlens: Tensor | None, backend: str, y: Tensor | None = None, **vectors: Tensor) -> None:
    check_values("x", x, "(B, S, D)" if cu_seqlens is None else "(total, D)")
    resolve(backend, x.device, BACKENDS)
    if y is not None:
        check_values("y", y, "(B, S, D)" if cu_seqlens is None else "(total, D)")
        found = tuple(y.shape), y.dtype, y.device
        check(found == (tuple(x.shape), x.dtype, x.device), "y", found, f"like x, {tuple(x.shape)}, {x.dtype}")
    if cu_seqlens is not None:
        check_sequences("cu_seqlens", cu_seqlens, x.device)
    shape = (x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, x.shape[-1])
    for name, vector in vectors.items():
        check_values(name, vector, "(B, D)")
        check(tuple(vector.shape) == shape, f"{name}.shape", tuple(vector.shape), f"(B, D) = {shape}")
        check(vector.device == x.device, f"{name}.device", vector.device, f"{x.device}, x's device")


def modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """``LayerNorm(x) * (1 + scale) + shift``, the norm over D, without weights of its own (AdaLN, arXiv 2212.09748).

    Reads x once and writes once: 2 S D values a sample, and the two vectors. Eager PyTorch reads and writes after the
    norm, the product and the sum: 6 S D.

    Args:
        x: (B, S, D) float32, float16 or bfloat16, any strides; with ``cu_seqlens`` packed sequences (total, D).
        shift, scale: (B, D), one row for each sample or packed sequence; any of the three dtypes.
        cu_seqlens: int32 (B + 1,), the first row of every packed sequence; the last entry is the total.
        eps: added to the variance.
        backend: "auto", "triton" or "reference".

    Returns:
        Contiguous, in x's shape and dtype; the arithmetic is float32. Forward only.

    Raises:
        ValueError: an argument is not as described, or the backend cannot run here.
    """
    _check(x, cu_seqlens, backend, shift=shift, scale=scale)
    return torch.ops.ralu_kernels.modulate(x, shift, scale, cu_seqlens, eps, backend)


def gated_add(x: Tensor, gate: Tensor, y: Tensor, *, cu_seqlens: Tensor | None = None, backend: str = "auto") -> Tensor:
    """``x + gate * y``: a residual connection whose branch y has a gate for each sample.

    Moves 3 S D values a sample; eager PyTorch, which stores the product, 5 S D.

    Args:
        x, y: (B, S, D) float32, float16 or bfloat16, both alike, any strides; or packed (total, D), as in `modulate`.
        gate: (B, D), as ``shift`` in `modulate`.
        cu_seqlens, backend: as in `modulate`.

    Returns:
        Contiguous, in x's shape and dtype; the arithmetic is float32. Forward only.

    Raises:
        ValueError: an argument is not as described, or the backend cannot run here.
    """
    _check(x, cu_seqlens, backend, y, gate=gate)
    return torch.ops.ralu_kernels.gated_add(x, gate, y, cu_seqlens, backend)


def gated_add_modulate(
    x: Tensor,
    gate: Tensor,
    y: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``x + gate * y``, and `modulate` of that: what a block does between its attention and its MLP.

    Moves 4 S D values a sample; eager PyTorch 11 S D. The norm sees the sum as it is stored, rounded to x's dtype.

    Args:
        x, gate, y: as in `gated_add`.
        shift, scale, cu_seqlens, eps, backend: as in `modulate`.

    Returns:
        The sum and its modulation, contiguous, in x's shape and dtype; the arithmetic is float32. Forward only.

    Raises:
        ValueError: an argument is not as described, or the backend cannot run here.
    """
    _check(x, cu_seqlens, backend, y, gate=gate, shift=shift, scale=scale)
    return torch.ops.ralu_kernels.gated_add_modulate(x, gate, y, shift, scale, cu_seqlens, eps, backend)
