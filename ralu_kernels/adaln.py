"""Adaptive layer norm: what a transformer block does to its tokens between the matrix products, one pass each."""

import torch
from torch import Tensor

from . import reference
from ._backend import check, check_sequences, check_values, jit, register, resolve, rowwise, tl, triton


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
    if cu_seqlens_ptr is not None:
        # The packed sequence of a row: how many end at or before it.
        i = tl.arange(0, BLOCK_B)
        end = tl.load(cu_seqlens_ptr + 1 + i, mask=i < sequences - 1, other=0x7FFFFFFF)
        b = tl.sum((end <= row).to(tl.int32)).to(tl.int64)
    out = row.to(tl.int64) * width + column
    if gate_ptr is not None:
        y = tl.load(y_ptr + (row // length).to(tl.int64) * y_stride_b + s * y_stride_s + column, mask=mask, other=0.0)
        x += tl.load(gate_ptr + b * gate_stride + column, mask=mask, other=0.0).to(tl.float32) * y.to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out, rounded, mask=mask)
        x = rounded.to(tl.float32)
    if scale_ptr is not None:
        deviation = tl.where(mask, x - tl.sum(x) / width, 0.0)
        x = deviation * tl.rsqrt(tl.sum(deviation * deviation) / width + eps)
        scale = tl.load(scale_ptr + b * scale_stride + column, mask=mask).to(tl.float32)
        shift = tl.load(shift_ptr + b * shift_stride + column, mask=mask).to(tl.float32)
        tl.store(out_ptr + out, x * (1.0 + scale) + shift, mask=mask)


def _launch(x, gate, y, shift, scale, cu_seqlens, eps):
    """The sum and its modulation; without a gate the sum is None, without a scale its modulation."""
    total, out = (None if vector is None else x.new_empty(x.shape) for vector in (gate, scale))
    if x.numel() == 0:
        return total, out
    width, length = x.shape[-1], x.shape[-2]
    x, gate, y, shift, scale = (None if t is None else rowwise(t) for t in (x, gate, y, shift, scale))
    strides = [
        stride
        for t in (x, y)
        for stride in ((0, 0) if t is None else (t.stride(0) if t.dim() == 3 else 0, t.stride(-2)))
    ]
    block = triton.next_power_of_2(width)
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    with torch.cuda.device_of(x):
        _adaln_kernel[(x.numel() // width,)](
            x, gate, y, shift, scale, cu_seqlens, total, out, eps, length, width, sequences,
            *strides, *(0 if vector is None else vector.stride(0) for vector in (gate, shift, scale)),
            BLOCK_B=triton.next_power_of_2(sequences), BLOCK=block, num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
    return total, out


def _fake(x: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape)


def _modulate_triton(x, shift, scale, cu_seqlens, eps):
    return _launch(x, None, None, shift, scale, cu_seqlens, eps)[1]


def _gated_add_triton(x, gate, y, cu_seqlens):
    return _launch(x, gate, y, None, None, cu_seqlens, 0.0)[0]


register(
    "modulate(Tensor x, Tensor shift, Tensor scale, Tensor? cu_seqlens, float eps, str backend) -> Tensor",
    _fake,
    triton=_modulate_triton,
    reference=reference.modulate,
)
register(
    "gated_add(Tensor x, Tensor gate, Tensor y, Tensor? cu_seqlens, str backend) -> Tensor",
    _fake,
    triton=_gated_add_triton,
    reference=reference.gated_add,
)
register(
    "gated_add_modulate(Tensor x, Tensor gate, Tensor y, Tensor shift, Tensor scale, Tensor? cu_seqlens, float eps,"
    " str backend) -> (Tensor, Tensor)",
    lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
    triton=_launch,
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
