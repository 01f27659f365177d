"""From the projections of a joint attention to packed queries, keys and values, and from its output back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from ._backend import MAX_ELEMENTS, check, check_alike, check_values, jit, register, resolve, tl, triton


@dataclass(frozen=True, eq=False)
class Sequences:
    """Which tokens of a padded batch (B, S) exist, and where they stand when the padding is dropped.

    Attributes:
        rows: int32 (total,), b * S + s of every packed token; None when nothing is padded.
        inverse: int32 (B * S,), the packed row of every token, -1 where it is padding; None when nothing is padded.
        cu_seqlens: int32 (B + 1,), first packed row of every sample; the last entry is the total.
        max_seqlen: the longest sequence.
        batch: B.
        length: S.
    """

    rows: Tensor | None
    inverse: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    batch: int
    length: int

    @property
    def total(self) -> int:
        return self.batch * self.length if self.rows is None else self.rows.shape[0]


class Stream(NamedTuple):
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


def pack_sequences(mask: Tensor | None, batch: int, length: int, device: torch.device | str) -> Sequences:
    """The packed layout of a batch of ``batch`` joint sequences of ``length`` tokens.

    Args:
        mask: bool (batch, length), True for the tokens that exist, anywhere in a sequence; None: all do.
        batch, length: B and S; B * S below 2^31.
        device: where the layout is to be.

    Returns:
        The layout. With a mask it waits for the device once, for the number of tokens of every sample.

    Raises:
        ValueError: an argument is not as described.
    """
    check(batch * length <= MAX_ELEMENTS, "batch * length", batch * length, f"at most {MAX_ELEMENTS}")
    if mask is not None:
        check(mask.dtype == torch.bool, "mask.dtype", mask.dtype, "bool")
        check(tuple(mask.shape) == (batch, length), "mask.shape", tuple(mask.shape), f"(B, S) = {(batch, length)}")
        lengths = mask.sum(1).tolist()
        if sum(lengths) < batch * length:
            kept = mask.to(device).flatten()
            rank = kept.cumsum(0)
            return Sequences(
                rows=kept.to(torch.uint8).argsort(descending=True, stable=True)[: sum(lengths)].int(),
                inverse=torch.where(kept, rank - 1, -1).int(),
                cu_seqlens=torch.cat([rank.new_zeros(1), rank[length - 1 :: length]]).int(),
                max_seqlen=max(lengths),
                batch=batch,
                length=length,
            )
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    return Sequences(None, None, cu_seqlens, length, batch, length)


@jit
def _project(x_ptr, weight_ptr, cos, sin, mask, column, eps, SIZE: tl.constexpr, ROTATE: tl.constexpr):
    """A tile of heads (BLOCK_H, BLOCK_D), normalised and rotated."""
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
    q_ptr, k_ptr, v_ptr, norm_q_ptr, norm_k_ptr, q_out_ptr, k_out_ptr, v_out_ptr, place, out, cos, sin, mask, column,
    eps, SIZE: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    q = _project(q_ptr + place, norm_q_ptr, cos, sin, mask, column, eps, SIZE, ROTATE)
    k = _project(k_ptr + place, norm_k_ptr, cos, sin, mask, column, eps, SIZE, ROTATE)
    v = tl.load(v_ptr + place, mask=mask)
    tl.store(q_out_ptr + out, q, mask=mask)
    tl.store(k_out_ptr + out, k, mask=mask)
    tl.store(v_out_ptr + out, v, mask=mask)


@jit
def _pack_kernel(
    q_ptr, k_ptr, v_ptr, norm_q_ptr, norm_k_ptr, q2_ptr, k2_ptr, v2_ptr, norm_q2_ptr, norm_k2_ptr,
    rows_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr, eps,
    first, length, heads, head_blocks, stride_b, stride_s, stride_b2, stride_s2,
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
    if rows_ptr is not None:
        token = tl.load(rows_ptr + row)
    b, s = (token // length).to(tl.int64), (token % length).to(tl.int64)

    cos, sin = 0.0, 0.0
    if TABLES > 0:  # one for all samples, or one for each
        table = (s if TABLES == 1 else token.to(tl.int64)) * SIZE + column
        cos = tl.load(cos_ptr + table, mask=column < SIZE, other=0.0)
        sin = tl.load(sin_ptr + table, mask=column < SIZE, other=0.0)
    if s < first:
        _pack_stream(
            q_ptr, k_ptr, v_ptr, norm_q_ptr, norm_k_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
            b * stride_b + s * stride_s + place, out, cos, sin, mask, column, eps, SIZE, TABLES > 0,
        )  # fmt: skip
    elif q2_ptr is not None:
        _pack_stream(
            q2_ptr, k2_ptr, v2_ptr, norm_q2_ptr, norm_k2_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
            b * stride_b2 + (s - first) * stride_s2 + place, out, cos, sin, mask, column, eps, SIZE, TABLES > 0,
        )  # fmt: skip


@jit
def _unpack_kernel(
    x_ptr, inverse_ptr, first_ptr, second_ptr, first, length, width, blocks, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(inverse_ptr + token)
    x = tl.load(x_ptr + row.to(tl.int64) * width + column, mask=(column < width) & (row >= 0), other=0.0)
    b, s = (token // length).to(tl.int64), token % length
    if s < first:
        tl.store(first_ptr + (b * first + s) * width + column, x, mask=column < width)
    else:
        tl.store(second_ptr + (b * (length - first) + s - first) * width + column, x, mask=column < width)


def _fake_pack(q, k, v, norm_q, norm_k, q2, k2, v2, norm_q2, norm_k2, rows, cos, sin, heads, *_):
    total = q.shape[0] * (q.shape[1] + (0 if q2 is None else q2.shape[1])) if rows is None else rows.shape[0]
    return tuple(q.new_empty(total, heads, q.shape[2] // heads) for _ in range(3))


def _fake_unpack(x: Tensor, inverse: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    batch, channels = inverse.shape[0] // (first + second), x.shape[1] * x.shape[2]
    return x.new_empty(batch, first, channels), x.new_empty(batch, second, channels)


_TILE = 1024  # values: four warps, 16 bytes of half precision for each thread


def _alike(tensors: Sequence[Tensor | None]) -> tuple[Sequence[Tensor | None], tuple[int, int]]:
    """A stream's q, k and v with the strides that all three have, copied if they differ."""
    if tensors[0] is None:
        return tensors, (0, 0)
    if len({t.stride() for t in tensors}) > 1 or tensors[0].stride(2) != 1:
        tensors = [t.contiguous() for t in tensors]
    return tensors, tensors[0].stride()[:2]


def _pack_triton(
    q, k, v, norm_q, norm_k, q2, k2, v2, norm_q2, norm_k2, rows, cos, sin, heads, eps
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _fake_pack(q, k, v, norm_q, norm_k, q2, k2, v2, norm_q2, norm_k2, rows, cos, sin, heads)
    total, _, size = outputs[0].shape
    if outputs[0].numel() == 0:
        return outputs
    first = q.shape[1]
    length = first + (0 if q2 is None else q2.shape[1])
    (qkv, strides), (qkv2, strides2) = _alike((q, k, v)), _alike((q2, k2, v2))
    norms = [None if weight is None else weight.contiguous() for weight in (norm_q, norm_k, norm_q2, norm_k2)]
    tables = [None if table is None else table.contiguous() for table in (cos, sin)]
    block_d = triton.next_power_of_2(size)
    block_h = max(min(triton.next_power_of_2(heads), _TILE // block_d), 1)
    head_blocks = triton.cdiv(heads, block_h)
    with torch.cuda.device_of(q):
        _pack_kernel[(total * head_blocks,)](
            *qkv, *norms[:2], *qkv2, *norms[2:], rows, *tables, *outputs, eps,
            first, length, heads, head_blocks, *strides, *strides2,
            SIZE=size, TABLES=0 if cos is None else cos.dim() - 1, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return outputs


def _unpack_triton(x: Tensor, inverse: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    outputs = _fake_unpack(x, inverse, first, second)
    width = x.shape[1] * x.shape[2]
    if inverse.numel() * width == 0:
        return outputs
    blocks = triton.cdiv(width, _TILE)
    with torch.cuda.device_of(x):
        _unpack_kernel[(inverse.shape[0] * blocks,)](
            x.contiguous(), inverse, *outputs, first, first + second, width, blocks, BLOCK=_TILE, num_warps=4
        )
    return outputs


register(
    "pack_qkv(Tensor q, Tensor k, Tensor v, Tensor? norm_q, Tensor? norm_k,"
    " Tensor? q2, Tensor? k2, Tensor? v2, Tensor? norm_q2, Tensor? norm_k2,"
    " Tensor? rows, Tensor? cos, Tensor? sin, SymInt heads, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_pack,
    triton=_pack_triton,
    reference=reference.pack_qkv,
)
register(
    "unpack(Tensor x, Tensor inverse, SymInt first, SymInt second, str backend) -> (Tensor, Tensor)",
    _fake_unpack,
    triton=_unpack_triton,
    reference=reference.unpack,
)

BACKENDS = ("triton", "reference")


def pack_qkv(
    streams: Sequence[Stream],
    sequences: Sequences,
    heads: int,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the joint sequences: normalised, rotated, concatenated and packed in one launch.

    Every head of q and k is ``x / sqrt(mean(x^2) + eps) * weight``, then with ``rotary`` every pair (x[2i], x[2i + 1])
    turns: ``x * cos + (-x[2i + 1], x[2i]) * sin``, as diffusers' ``apply_rotary_emb`` does for FLUX.

    Moves 6 H D values a token, and the tables. In half precision eager PyTorch moves as much for the concatenation,
    17 H D for each norm of diffusers and 26 H D for each rotation.

    Args:
        streams: one `Stream`, or two in the order of the joint sequence (FLUX: text, image; SD3: image, text), with
            lengths that add up to ``sequences.length``, all of one dtype.
        sequences: which tokens are kept, from `pack_sequences`.
        heads: H.
        rotary: (cos, sin), each float32 (S, D), or (B, S, D) with one table a sample, over the joint sequence.
        eps: added to the mean square.
        backend: "auto", "triton" or "reference".

    Returns:
        q, k and v, contiguous (total, H, D) in the streams' dtype; the arithmetic is float32. Forward only.

    Raises:
        ValueError: an argument is not as described, or the backend cannot run here.
    """
    check(len(streams) in (1, 2), "len(streams)", len(streams), "1 or 2")
    q = streams[0].q
    check_values("streams[0].q", q, "(B, S_i, H * D)")
    channels, size = q.shape[2], q.shape[2] // heads if heads > 0 else 0
    check(size > 0 and channels == heads * size and size % 2 == 0, "heads", heads, f"H of {channels} = H * D, D even")
    for i, stream in enumerate(streams):
        shape = (q.shape[0], stream.q.shape[1], channels)
        for name, x in (("q", stream.q), ("k", stream.k), ("v", stream.v)):
            name = f"streams[{i}].{name}"
            check_values(name, x, "(B, S_i, H * D)")
            check(tuple(x.shape) == shape, f"{name}.shape", tuple(x.shape), f"(B, S_i, H * D) = {shape}")
            check_alike(name, x, q, "streams[0].q's")
        for name, weight in (("norm_q", stream.norm_q), ("norm_k", stream.norm_k)):
            if weight is not None:
                name = f"streams[{i}].{name}"
                check_values(name, weight, "(D,)")
                check(weight.shape[0] == size, f"{name}.shape", tuple(weight.shape), f"(D,) = ({size},)")
                check_alike(name, weight, q, "streams[0].q's", ("device",))
    joint = (q.shape[0], sum([stream.q.shape[1] for stream in streams]))
    shape = (sequences.batch, sequences.length)
    check(joint == shape, "the streams' (B, S)", joint, f"{shape}, the sequences' batch and length")
    check_alike("sequences.cu_seqlens", sequences.cu_seqlens, q, "streams[0].q's", ("device",))
    cos, sin = (None, None) if rotary is None else rotary
    if rotary is not None:
        shapes = (joint[1], size), (*joint, size)
        check(tuple(cos.shape) in shapes, "rotary[0].shape", tuple(cos.shape), f"(S, D) or (B, S, D) of {shapes[1]}")
        check(cos.dtype == torch.float32, "rotary[0].dtype", cos.dtype, "float32")
        check_alike("rotary[0]", cos, q, "streams[0].q's", ("device",))
        check_alike("rotary[1]", sin, cos, "rotary[0]'s", ("shape", "dtype", "device"))
    second = streams[1] if len(streams) == 2 else (None,) * 5
    return torch.ops.ralu_kernels.pack_qkv(*streams[0], *second, sequences.rows, cos, sin, heads, eps, backend)


def unpack(x: Tensor, sequences: Sequences, lengths: Sequence[int], *, backend: str = "auto") -> tuple[Tensor, ...]:
    """The packed output of an attention as padded streams; padding is zero.

    Moves 2 H D values a token. Where nothing is padded it moves nothing: the streams are views of x.

    Args:
        x: (total, H, D) float32, float16 or bfloat16, laid out by ``sequences``.
        sequences: from `pack_sequences`.
        lengths: S_i of one or two streams; they add up to ``sequences.length``.
        backend: "auto", "triton" or "reference".

    Returns:
        (B, S_i, H * D) of every stream, in x's dtype. Forward only.

    Raises:
        ValueError: an argument is not as described, or the backend cannot run here.
    """
    check_values("x", x, "(total, H, D)")
    # No size is formatted by itself: that would bind torch.compile's graph to it.
    found = (x.shape[0], sequences.total)
    check(found[0] == found[1], "(x.shape[0], sequences.total)", found, "equal")
    check(len(lengths) in (1, 2), "len(lengths)", len(lengths), "1 or 2")
    check_alike("sequences.cu_seqlens", sequences.cu_seqlens, x, "x's", ("device",))
    found = (sum(lengths), sequences.length)
    check(found[0] == found[1], "(sum(lengths), sequences.length)", found, "equal")
    resolve(backend, x.device, BACKENDS)
    if sequences.inverse is None:
        return x.reshape(sequences.batch, sequences.length, x.shape[1] * x.shape[2]).split(list(lengths), dim=1)
    streams = torch.ops.ralu_kernels.unpack(x, sequences.inverse, lengths[0], sum(lengths[1:]), backend)
    return streams[: len(lengths)]
