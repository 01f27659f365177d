"""From the projections of a joint attention to packed queries, keys and values, and from its output back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from ._backend import MAX_ELEMENTS, check, check_values, register, resolve


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


def _fake_pack(q, k, v, norm_q, norm_k, q2, k2, v2, norm_q2, norm_k2, rows, cos, sin, heads, *_):
    total = q.shape[0] * (q.shape[1] + (0 if q2 is None else q2.shape[1])) if rows is None else rows.shape[0]
    return tuple(q.new_empty(total, heads, q.shape[2] // heads) for _ in range(3))


def _fake_unpack(x: Tensor, inverse: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    batch, channels = inverse.shape[0] // (first + second), x.shape[1] * x.shape[2]
    return x.new_empty(batch, first, channels), x.new_empty(batch, second, channels)


register(
    "pack_qkv(Tensor q, Tensor k, Tensor v, Tensor? norm_q, Tensor? norm_k,"
    " Tensor? q2, Tensor? k2, Tensor? v2, Tensor? norm_q2, Tensor? norm_k2,"
    " Tensor? rows, Tensor? cos, Tensor? sin, SymInt heads, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_pack,
    reference=reference.pack_qkv,
)
register(
    "unpack(Tensor x, Tensor inverse, SymInt first, SymInt second, str backend) -> (Tensor, Tensor)",
    _fake_unpack,
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

    Moves 6 H D values a token, and the tables.

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
    resolve(backend, q.device, BACKENDS)
    for index, stream in enumerate(streams):
        for name, x in zip("qkv", stream[:3], strict=True):
            name = f"streams[{index}].{name}"
            check_values(name, x, "(B, S, H * D)")
            check(x.shape[1] == stream.q.shape[1], f"{name}.shape[1]", x.shape[1], f"{stream.q.shape[1]}, as q's")
            found, expected = ((t.shape[0], t.shape[2], t.dtype, t.device) for t in (x, q))
            check(found == expected, f"{name} (B, H * D, dtype, device)", found, f"{expected}, as the first q's")
        for name, weight in zip(("norm_q", "norm_k"), stream[3:], strict=True):
            if weight is not None:
                check_values(f"streams[{index}].{name}", weight, "(D,)")
                shape = (q.shape[2] // heads,)
                check(tuple(weight.shape) == shape, f"streams[{index}].{name}.shape", tuple(weight.shape), str(shape))
    check(
        heads > 0 and q.shape[2] % (2 * heads) == 0, "heads", heads, f"such that {q.shape[2]} is H heads of even size D"
    )
    shape, lengths = (sequences.batch, sequences.length), [stream.q.shape[1] for stream in streams]
    found = (q.shape[0], sum(lengths))
    check(found == shape, "(B, S) of streams", found, f"{shape}, sequences' batch and length")
    cos, sin = rotary or (None, None)
    if rotary is not None:
        tables = (sequences.length, q.shape[2] // heads)
        for name, table in (("cos", cos), ("sin", sin)):
            check(tuple(table.shape) in (tables, (q.shape[0], *tables)), f"rotary {name}.shape", tuple(table.shape),
                  f"{tables} or {(q.shape[0], *tables)}")  # fmt: skip
            check(table.dtype == torch.float32, f"rotary {name}.dtype", table.dtype, "float32")
            check(table.device == q.device, f"rotary {name}.device", table.device, str(q.device))
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
    check(x.shape[0] == sequences.total, "x.shape[0]", x.shape[0], f"{sequences.total}, the sequences' total")
    check(len(lengths) in (1, 2), "len(lengths)", len(lengths), "1 or 2")
    check(sum(lengths) == sequences.length, "sum(lengths)", sum(lengths), f"{sequences.length}, the sequences' length")
    resolve(backend, x.device, BACKENDS)
    if sequences.inverse is None:
        return x.reshape(sequences.batch, sequences.length, -1).split(list(lengths), dim=1)
    streams = torch.ops.ralu_kernels.unpack(x, sequences.inverse, lengths[0], sum(lengths[1:]), backend)
    return streams[: len(lengths)]
