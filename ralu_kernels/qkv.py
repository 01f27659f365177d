# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# (The arguments of Triton's kernels have no types in Python.)
"""From the projections of a joint attention to packed queries, keys and values, and from its output back."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._backend import jit, launch, new_like, next_power_of_2, register, resolve, tl
from ._checks import (
    DTYPES,
    check_alike,
    check_device,
    check_shape,
    check_type,
    check_values,
    finite,
    fits,
    integer,
    members,
    wrong,
    wrong_type,
)
from .layout import PackedLayout


class QKV(NamedTuple):
    """The projections of one of the two streams of a joint attention, text or image.

    Attributes:
        q, k, v: (B, S_i, H * D) float32, float16 or bfloat16, any strides.
        norm_q, norm_k: (D,), weights of the RMS norm over every head of q and k; None: no norm.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    norm_q: Tensor | None = None
    norm_k: Tensor | None = None


@jit
def _norm_and_rotate(x_ptr, weight_ptr, cos, sin, mask, column, eps, SIZE: tl.constexpr, ROTATE: tl.constexpr):
    """Normalise and rotate a tile of heads (BLOCK_H, BLOCK_D)."""
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < SIZE).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)[:, None] * weight
    if ROTATE:
        rows: tl.constexpr = x.shape[0]
        columns: tl.constexpr = x.shape[1]
        even, odd = tl.split(x.reshape(rows, columns // 2, 2))
        x = x * cos + tl.join(-odd, even).reshape(rows, columns) * sin
    return x


@jit
def _pack_stream(
    q_ptr, k_ptr, v_ptr, norm_q_ptr, norm_k_ptr, q_out_ptr, k_out_ptr, v_out_ptr, place, out, cos, sin, mask, exists,
    column, eps, SIZE: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    q = _norm_and_rotate(q_ptr + place, norm_q_ptr, cos, sin, mask, column, eps, SIZE, ROTATE)
    k = _norm_and_rotate(k_ptr + place, norm_k_ptr, cos, sin, mask, column, eps, SIZE, ROTATE)
    v = tl.load(v_ptr + place, mask=mask & exists, other=float("nan"))
    tl.store(q_out_ptr + out, tl.where(exists, q, float("nan")), mask=mask)
    tl.store(k_out_ptr + out, tl.where(exists, k, float("nan")), mask=mask)
    tl.store(v_out_ptr + out, v, mask=mask)


@jit
def _pack_kernel(
    q_ptr, k_ptr, v_ptr, norm_q_ptr, norm_k_ptr, q2_ptr, k2_ptr, v2_ptr, norm_q2_ptr, norm_k2_ptr,
    rows_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr, eps,
    tokens, first, length, heads, head_blocks, stride_b, stride_s, stride_b2, stride_s2,
    SIZE: tl.constexpr, TABLES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // head_blocks
    head = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    # Broadcast, so that every thread loads its part of weights and tables in vectors, and not through shared memory.
    column = tl.broadcast_to(tl.arange(0, BLOCK_D)[None, :], (BLOCK_H, BLOCK_D))
    mask = (head < heads) & (column < SIZE)
    place = head * SIZE + column
    out = row.to(tl.int64) * heads * SIZE + place
    token = row
    exists = row >= 0
    if rows_ptr is not None:
        token = tl.load(rows_ptr + row)
        exists = (token >= 0) & (token < tokens)
        token = tl.where(exists, token, 0)
    b, s = (token // length).to(tl.int64), (token % length).to(tl.int64)

    cos, sin = 0.0, 0.0
    if TABLES > 0:  # one for all samples, or one for each
        table = (s if TABLES == 1 else token.to(tl.int64)) * SIZE + column
        cos = tl.load(cos_ptr + table, mask=column < SIZE, other=0.0)
        sin = tl.load(sin_ptr + table, mask=column < SIZE, other=0.0)
    if s < first:
        _pack_stream(
            q_ptr, k_ptr, v_ptr, norm_q_ptr, norm_k_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
            b * stride_b + s * stride_s + place, out, cos, sin, mask, exists, column, eps, SIZE, TABLES > 0,
        )  # fmt: skip
    elif q2_ptr is not None:
        _pack_stream(
            q2_ptr, k2_ptr, v2_ptr, norm_q2_ptr, norm_k2_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
            b * stride_b2 + (s - first) * stride_s2 + place, out, cos, sin, mask, exists, column, eps, SIZE, TABLES > 0,
        )  # fmt: skip


@jit
def _unpack_kernel(
    x_ptr, inverse_ptr, first_ptr, second_ptr, total, first, length, width, blocks, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(inverse_ptr + token)
    exists = (row >= 0) & (row < total)
    other = tl.where(row == -1, 0.0, float("nan"))  # padding, and no row at all
    x = tl.load(x_ptr + row.to(tl.int64) * width + column, mask=(column < width) & exists, other=other)
    b, s = (token // length).to(tl.int64), token % length
    if s < first:
        tl.store(first_ptr + (b * first + s) * width + column, x, mask=column < width)
    else:
        tl.store(second_ptr + (b * (length - first) + s - first) * width + column, x, mask=column < width)


def _fake_pack(
    q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor | None, norm_k: Tensor | None,
    q2: Tensor | None, k2: Tensor | None, v2: Tensor | None, norm_q2: Tensor | None, norm_k2: Tensor | None,
    rows: Tensor | None, cos: Tensor | None, sin: Tensor | None, heads: int, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    total = q.shape[0] * (q.shape[1] + (0 if q2 is None else q2.shape[1])) if rows is None else rows.shape[0]
    first = torch.empty((total, heads, q.shape[2] // heads), dtype=q.dtype, device=q.device)
    return first, new_like(first), new_like(first)


def _fake_unpack(x: Tensor, inverse: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    batch, channels = inverse.shape[0] // (first + second), x.shape[1] * x.shape[2]
    return x.new_empty(batch, first, channels), x.new_empty(batch, second, channels)


_TILE = 1024  # values: four warps, 16 bytes of half precision for each thread


def _alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, ...]]:
    """Return a stream's q, k and v with the strides that all three have, copied if they differ."""
    strides = q.stride()
    if not strides == k.stride() == v.stride() or strides[2] != 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return (q, k, v), q.stride()[:2]


@cache
def _tile(heads: int, size: int) -> tuple[int, int]:
    block_d = next_power_of_2(size)
    return max(min(next_power_of_2(heads), _TILE // block_d), 1), block_d


def _pack_triton(
    q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor | None, norm_k: Tensor | None,
    q2: Tensor | None, k2: Tensor | None, v2: Tensor | None, norm_q2: Tensor | None, norm_k2: Tensor | None,
    rows: Tensor | None, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _fake_pack(q, k, v, norm_q, norm_k, q2, k2, v2, norm_q2, norm_k2, rows, cos, sin, heads)
    total, _, size = outputs[0].shape
    if outputs[0].numel() == 0:
        return outputs
    first = q.shape[1]
    length = first + (0 if q2 is None else q2.shape[1])
    qkv, strides = _alike(q, k, v)
    qkv2: tuple[Tensor | None, ...] = (None, None, None)
    strides2: tuple[int, ...] = (0, 0)
    if q2 is not None and k2 is not None and v2 is not None:
        qkv2, strides2 = _alike(q2, k2, v2)
    norms = [None if weight is None else weight.contiguous() for weight in (norm_q, norm_k, norm_q2, norm_k2)]
    tables = [None if table is None else table.contiguous() for table in (cos, sin)]
    block_h, block_d = _tile(heads, size)
    head_blocks = -(-heads // block_h)
    launch(
        _pack_kernel, (total * head_blocks, 1, 1), (*qkv, *norms[:2], *qkv2, *norms[2:], rows, *tables), outputs,
        (float(eps), q.shape[0] * length, first, length, heads, head_blocks, *strides, *strides2),
        (size, 0 if cos is None else cos.dim() - 1, block_h, block_d), num_warps=4,
    )  # fmt: skip
    return outputs


def _unpack_triton(x: Tensor, inverse: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    outputs = _fake_unpack(x, inverse, first, second)
    width = x.shape[1] * x.shape[2]
    if inverse.numel() * width == 0:
        return outputs
    blocks = -(-width // _TILE)
    numbers = x.shape[0], first, first + second, width, blocks
    grid = inverse.shape[0] * blocks, 1, 1
    launch(_unpack_kernel, grid, (x.contiguous(), inverse), outputs, numbers, (_TILE,), num_warps=4)
    return outputs


_pack = register(
    "pack_qkv(Tensor q, Tensor k, Tensor v, Tensor? norm_q, Tensor? norm_k,"
    " Tensor? q2, Tensor? k2, Tensor? v2, Tensor? norm_q2, Tensor? norm_k2,"
    " Tensor? rows, Tensor? cos, Tensor? sin, SymInt heads, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_pack,
    triton=_pack_triton,
    reference=reference.pack_qkv,
)
_unpack = register(
    "unpack(Tensor x, Tensor inverse, SymInt first, SymInt second, str backend) -> (Tensor, Tensor)",
    _fake_unpack,
    triton=_unpack_triton,
    reference=reference.unpack,
)

BACKENDS = ("triton", "reference")


_NAMES = tuple(tuple(f"streams[{i}].{name}" for name in QKV._fields) for i in range(2))


def _check_layout(layout: Any, x: Tensor, whose: str) -> None:
    check_type("layout", layout, PackedLayout, "a PackedLayout")
    check_device("layout.cu_seqlens", layout.cu_seqlens, x, whose)


def pack_qkv(
    streams: Sequence[QKV],
    layout: PackedLayout,
    heads: int,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, rotate, concatenate and pack queries, keys and values of the joint sequences, in one launch.

    Every head of q and k is ``x / sqrt(mean(x^2) + eps) * weight``, then with ``rotary`` every pair (x[2i], x[2i + 1])
    turns: ``x * cos + (-x[2i + 1], x[2i]) * sin``, as diffusers' ``apply_rotary_emb`` does for FLUX (RoPE, arXiv
    2104.09864; RMS norm, arXiv 1910.07467).

    Moves 6 H D values a token, and the tables. In half precision eager PyTorch moves as much for the concatenation,
    17 H D for each norm of diffusers and 26 H D for each rotation.

    Args:
        streams: one `QKV`, or two in the order of the joint sequence (FLUX: text, image; SD3: image, text), with
            lengths that add up to ``layout.length``, all of one dtype.
        layout: which tokens are kept, from `packed_layout`.
        heads: H.
        rotary: (cos, sin), each float32 (S, D), or (B, S, D) with one table a sample, over the joint sequence.
        eps: added to the mean square, at least 0.
        backend: "auto", "triton" or "reference".

    Returns:
        q, k and v, contiguous (total, H, D) in the streams' dtype; the arithmetic is float32. Forward only.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is not as described, or the backend cannot run here.
    """
    if not isinstance(streams, (tuple, list)) or isinstance(streams, QKV):
        raise wrong_type("streams", streams, "a list of one or two QKVs")
    if len(streams) not in (1, 2):
        raise wrong("len(streams)", len(streams), "1 or 2")
    for names, stream in zip(_NAMES, streams, strict=False):
        if not isinstance(stream, QKV):
            raise wrong_type(names[0].partition(".")[0], stream, "a QKV")
    q = streams[0].q
    check_values("streams[0].q", q, "(B, S_i, H * D)")
    heads = integer("heads", heads, 1)
    batch, length, channels = q.shape[0], 0, q.shape[2]
    size = channels // heads
    if size == 0 or channels != heads * size or size % 2:
        raise wrong("heads", heads, f"H of {channels} = H * D, D even")
    dtypes, device = (q.dtype,), q.device
    for names, stream in zip(_NAMES, streams, strict=False):
        for name, x in zip(names, stream[:3], strict=False):
            if not fits(x, (batch, stream.q.shape[1], channels), dtypes, device):
                check_values(name, x, "(B, S_i, H * D)")
                check_shape(name, x, (batch, stream.q.shape[1], channels), "(B, S_i, H * D)")
                check_alike(name, x, q, "streams[0].q's")
        for name, weight in zip(names[3:], stream[3:], strict=True):
            if weight is not None and not fits(weight, (size,), DTYPES, device):
                check_values(name, weight, "(D,)")
                check_shape(name, weight, (size,), "(D,)")
                check_device(name, weight, q, "streams[0].q's")
        length += stream.q.shape[1]
    _check_layout(layout, q, "streams[0].q's")
    if batch != layout.batch or length != layout.length:
        raise wrong("the streams' (B, S)", (batch, length), f"{(layout.batch, layout.length)}, the layout's")
    cos, sin = (None, None)
    if rotary is not None:
        cos, sin = members("rotary", rotary, 2, "(cos, sin)")
        check_values("rotary[0]", cos, "(B, S, D)" if isinstance(cos, Tensor) and cos.dim() == 3 else "(S, D)")
        if cos.shape not in ((length, size), (batch, length, size)):
            raise wrong("rotary[0].shape", cos.shape, f"(S, D) or (B, S, D) of {(batch, length, size)}")
        if cos.dtype != torch.float32:
            raise wrong("rotary[0].dtype", cos.dtype, "float32")
        check_device("rotary[0]", cos, q, "streams[0].q's")
        check_type("rotary[1]", sin, Tensor, "a torch.Tensor")
        if sin.shape != cos.shape:
            raise wrong("rotary[1].shape", sin.shape, f"{tuple(cos.shape)}, as rotary[0]'s")
        check_values("rotary[1]", sin, "(B, S, D)" if sin.dim() == 3 else "(S, D)")
        check_alike("rotary[1]", sin, cos, "rotary[0]'s")
    second = streams[1] if len(streams) == 2 else (None,) * 5
    return _pack(*streams[0], *second, layout.rows, cos, sin, heads, finite("eps", eps, 0), backend)


def unpack(x: Tensor, layout: PackedLayout, lengths: Sequence[int], *, backend: str = "auto") -> tuple[Tensor, ...]:
    """Take the packed output of an attention apart into padded streams; padding is zero.

    Moves 2 H D values a token. Where nothing is padded it moves nothing: the streams are views of x.

    Args:
        x: (total, H, D) float32, float16 or bfloat16, laid out by ``layout``.
        layout: from `packed_layout`.
        lengths: S_i of one or two streams; they add up to ``layout.length``.
        backend: "auto", "triton" or "reference".

    Returns:
        (B, S_i, H * D) of every stream, in x's dtype. Forward only.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is not as described, or the backend cannot run here.
    """
    check_values("x", x, "(total, H, D)")
    _check_layout(layout, x, "x's")
    if (total := x.shape[0]) != layout.total:
        raise wrong("x.shape[0]", total, f"{layout.total}, the layout's total")
    if not isinstance(lengths, (tuple, list)):
        raise wrong_type("lengths", lengths, "a list of one or two ints")
    if len(lengths) not in (1, 2):
        raise wrong("len(lengths)", len(lengths), "1 or 2")
    parts = [integer("lengths", part, 0) for part in lengths]
    if sum(parts) != layout.length:
        raise wrong("sum(lengths)", sum(parts), f"{layout.length}, the layout's length")
    resolve(backend, x.device, BACKENDS)
    return _streams(x, layout, parts, backend)


def _streams(x: Tensor, layout: PackedLayout, parts: list[int], backend: str) -> tuple[Tensor, ...]:
    if layout.inverse is None:
        padded = x.reshape(layout.batch, layout.length, x.shape[1] * x.shape[2])
        whole: tuple[Tensor, ...] = padded.split_with_sizes(parts, dim=1)
        return whole
    return _unpack(x, layout.inverse, parts[0], sum(parts[1:]), backend)[: len(parts)]
