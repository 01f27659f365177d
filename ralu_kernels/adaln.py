# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# (The arguments of Triton's kernels have no types in Python.)
"""Adaptive layer norm: what a transformer block does to its tokens between the matrix products, one pass each."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backend import jit, launch, new_like, next_power_of_2, register, rowwise, tl
from ._checks import (
    DTYPES,
    check_alike,
    check_device,
    check_sequences,
    check_shape,
    check_values,
    finite,
    fits,
    wrong,
)


@jit
def _adaln_kernel(
    x_ptr, gate_ptr, y_ptr, shift_ptr, scale_ptr, cu_seqlens_ptr, sum_ptr, out_ptr, eps,
    length, width, sequences, x_stride_b, x_stride_s, y_stride_b, y_stride_s, gate_stride, shift_stride, scale_stride,
    BLOCK_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    b, s = (row // length).to(tl.int64), (row % length).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    x = tl.load(x_ptr + b * x_stride_b + s * x_stride_s + column, mask=mask, other=0.0).to(tl.float32)
    y = 0.0
    if gate_ptr is not None:
        y = tl.load(y_ptr + b * y_stride_b + s * y_stride_s + column, mask=mask, other=0.0).to(tl.float32)
    if cu_seqlens_ptr is not None:
        # The packed sequence of a row: how many end at or before it.
        i = tl.arange(0, BLOCK_B)
        end = tl.load(cu_seqlens_ptr + 1 + i, mask=i < sequences - 1, other=0x7FFFFFFF)
        b = tl.sum((end <= row).to(tl.int32)).to(tl.int64)
    out = row.to(tl.int64) * width + column
    scale, shift = 0.0, 0.0
    if scale_ptr is not None:  # before the sums, which no load behind them overtakes
        scale = tl.load(scale_ptr + b * scale_stride + column, mask=mask).to(tl.float32)
        shift = tl.load(shift_ptr + b * shift_stride + column, mask=mask).to(tl.float32)
    if gate_ptr is not None:
        x += tl.load(gate_ptr + b * gate_stride + column, mask=mask, other=0.0).to(tl.float32) * y
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out, rounded, mask=mask)
        x = rounded.to(tl.float32)
    if scale_ptr is not None:
        deviation = tl.where(mask, x - tl.sum(x) / width, 0.0)
        x = deviation * tl.rsqrt(tl.sum(deviation * deviation) / width + eps)
        tl.store(out_ptr + out, x * (1.0 + scale) + shift, mask=mask)


def _launch(
    x: Tensor, gate: Tensor | None, y: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    cu_seqlens: Tensor | None, eps: float,
) -> tuple[Any, Any]:  # fmt: skip
    """Return the sum and its modulation; without a gate the sum is None, without a scale its modulation."""
    total, out = (None if gate is None else new_like(x)), (None if scale is None else new_like(x))
    if x.numel() == 0:
        return total, out
    *_, length, width = x.shape
    given: list[Tensor | None] = []
    strides: list[tuple[int, int]] = []  # from sample to sample, and from row to row
    for t in (x, gate, y, shift, scale):
        if t is None:
            strides.append((0, 0))
        else:
            t = rowwise(t)
            *outer, each, _ = t.stride()
            strides.append((outer[0] if outer else 0, each))
        given.append(t)
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    vectors = strides[1][1], strides[3][1], strides[4][1]
    launch(
        _adaln_kernel, (x.numel() // width, 1, 1), (*given, cu_seqlens), (total, out),
        (float(eps), length, width, sequences, *strides[0], *strides[2], *vectors),
        *_shape(width, sequences),
    )  # fmt: skip
    return total, out


@cache
def _shape(width: int, sequences: int) -> tuple[tuple[int, int], int]:
    """Return the blocks (BLOCK_B, BLOCK) of a launch and its warps."""
    block = next_power_of_2(width)
    return (next_power_of_2(sequences), block), min(max(block // 512, 1), 16)


@jit
def _concat_gelu_kernel(
    x_ptr, y_ptr, out_ptr, length, x_width, width, x_stride_b, x_stride_s, y_stride_b, y_stride_s, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, s = row // length, row % length
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    of_x = column < x_width
    x = tl.load(x_ptr + b * x_stride_b + s * x_stride_s + column, mask=of_x, other=0.0).to(tl.float32)
    of_y = (column >= x_width) & (column < width)
    y = tl.load(y_ptr + b * y_stride_b + s * y_stride_s + column - x_width, mask=of_y, other=0.0).to(tl.float32)
    y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))  # 1 + tanh(z) = 2 sigmoid(2 z)
    tl.store(out_ptr + row * width + column, tl.where(of_x, x, y), mask=column < width)


def _fake_concat(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty((*x.shape[:2], x.shape[2] + y.shape[2]), dtype=x.dtype, device=x.device)


def _concat_gelu_triton(x: Tensor, y: Tensor) -> Tensor:
    out = _fake_concat(x, y)
    if out.numel() == 0:
        return out
    x, y = rowwise(x), rowwise(y)
    batch, length, width = out.shape
    block = min(next_power_of_2(width), 1024)
    numbers = length, x.shape[2], width, *x.stride()[:2], *y.stride()[:2]
    launch(_concat_gelu_kernel, (batch * length, -(-width // block), 1), (x, y), (out,), numbers, (block,), num_warps=4)
    return out


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_both(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _modulate_triton(x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None, eps: float) -> Tensor:
    out: Tensor = _launch(x, None, None, shift, scale, cu_seqlens, eps)[1]
    return out


def _gated_add_triton(x: Tensor, gate: Tensor, y: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    total: Tensor = _launch(x, gate, y, None, None, cu_seqlens, 0.0)[0]
    return total


_modulate = register(
    "modulate(Tensor x, Tensor shift, Tensor scale, Tensor? cu_seqlens, float eps, str backend) -> Tensor",
    _fake,
    triton=_modulate_triton,
    reference=reference.modulate,
)
_gated_add = register(
    "gated_add(Tensor x, Tensor gate, Tensor y, Tensor? cu_seqlens, str backend) -> Tensor",
    _fake,
    triton=_gated_add_triton,
    reference=reference.gated_add,
)
_gated_add_modulate = register(
    "gated_add_modulate(Tensor x, Tensor gate, Tensor y, Tensor shift, Tensor scale, Tensor? cu_seqlens, float eps,"
    " str backend) -> (Tensor, Tensor)",
    _fake_both,
    triton=_launch,
    reference=reference.gated_add_modulate,
)
_concat_gelu = register(
    "concat_gelu(Tensor x, Tensor y, str backend) -> Tensor",
    _fake_concat,
    triton=_concat_gelu_triton,
    reference=reference.concat_gelu,
)

BACKENDS = ("triton", "reference")


def _check(x: Tensor, cu_seqlens: Tensor | None, *branches: Tensor, **vectors: Tensor) -> None:
    meaning = "(B, S, D)" if cu_seqlens is None else "(total, D)"
    check_values("x", x, meaning)
    for y in branches:
        if fits(y, x.shape, (x.dtype,), x.device):
            continue
        check_values("y", y, meaning)
        if y.shape != x.shape:
            raise wrong("y.shape", y.shape, f"{tuple(x.shape)}, as x's")
        check_alike("y", y, x, "x's")
    batch, width = x.shape[0], x.shape[-1]
    if cu_seqlens is not None:
        check_sequences("cu_seqlens", cu_seqlens, x.shape[0], x, "x's")
        batch = cu_seqlens.shape[0] - 1
    for name, vector in vectors.items():
        if fits(vector, (batch, width), DTYPES, x.device):
            continue
        check_values(name, vector, "(B, D)")
        check_shape(name, vector, (batch, width), "(B, D)")
        check_device(name, vector, x, "x's")


def modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Modulate a norm: ``LayerNorm(x) * (1 + scale) + shift``, over D, without weights (AdaLN, arXiv 2212.09748).

    Reads x once and writes once: 2 S D values a sample, and the two vectors. Eager PyTorch reads and writes after the
    norm, the product and the sum: 6 S D.

    Args:
        x: (B, S, D) float32, float16 or bfloat16, any strides; with ``cu_seqlens`` packed sequences (total, D).
        shift, scale: (B, D), one row for each sample or packed sequence; any of the three dtypes.
        cu_seqlens: int32 (B + 1,), the first row of every packed sequence; the last entry is the total.
        eps: added to the variance, at least 0.
        backend: "auto", "triton" or "reference".

    Returns:
        Contiguous, in x's shape and dtype; the arithmetic is float32. Forward only.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is not as described, or the backend cannot run here.
    """
    _check(x, cu_seqlens, shift=shift, scale=scale)
    return _modulate(x, shift, scale, cu_seqlens, finite("eps", eps, 0), backend)


def gated_add(x: Tensor, gate: Tensor, y: Tensor, *, cu_seqlens: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Add a gated branch: ``x + gate * y``, a residual connection with a gate for each sample.

    Moves 3 S D values a sample; eager PyTorch, which stores the product, 5 S D.

    Args:
        x, y: (B, S, D) float32, float16 or bfloat16, both alike, any strides; or packed (total, D), as in `modulate`.
        gate: (B, D), as ``shift`` in `modulate`.
        cu_seqlens, backend: as in `modulate`.

    Returns:
        Contiguous, in x's shape and dtype; the arithmetic is float32. Forward only.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is not as described, or the backend cannot run here.
    """
    _check(x, cu_seqlens, y, gate=gate)
    return _gated_add(x, gate, y, cu_seqlens, backend)


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
    """Compute ``x + gate * y`` and `modulate` of it: what a block does between its attention and its MLP.

    Moves 4 S D values a sample; eager PyTorch 11 S D. The norm sees the sum as it is stored, rounded to x's dtype.

    Args:
        x, gate, y: as in `gated_add`.
        shift, scale, cu_seqlens, eps, backend: as in `modulate`.

    Returns:
        The sum and its modulation, contiguous, in x's shape and dtype; the arithmetic is float32. Forward only.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is not as described, or the backend cannot run here.
    """
    _check(x, cu_seqlens, y, gate=gate, shift=shift, scale=scale)
    return _gated_add_modulate(x, gate, y, shift, scale, cu_seqlens, finite("eps", eps, 0), backend)


def concat_gelu(x: Tensor, y: Tensor, *, backend: str = "auto") -> Tensor:
    """Concatenate x and an activated y: ``cat([x, gelu(y)], dim=-1)``, GELU in its tanh form.

    It is what FLUX's single blocks project, attention beside the MLP.

    Moves 2 S (D + M) values a sample; eager PyTorch, which stores the activation, 2 S (D + 2 M).

    Args:
        x: (B, S, D) float32, float16 or bfloat16, any strides.
        y: (B, S, M) in x's dtype, any strides.
        backend: as in `modulate`.

    Returns:
        Contiguous (B, S, D + M) in x's dtype; the arithmetic is float32. Forward only.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is not as described, or the backend cannot run here.
    """
    check_values("x", x, "(B, S, D)")
    check_values("y", y, "(B, S, M)")
    if y.shape[:2] != x.shape[:2]:
        raise wrong("y.shape", y.shape, f"(B, S, M) with x's (B, S) of {tuple(x.shape)}")
    check_alike("y", y, x, "x's")
    return _concat_gelu(x, y, backend)
