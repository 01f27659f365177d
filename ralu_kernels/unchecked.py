"""The operations inside a transformer's blocks, as the package has them, without the checks of their arguments.

A step of FLUX.1-dev calls them 400 times with the same few shapes, and checking takes the host as long as launching.
They are for who has made a call with the same shapes and devices before, with the checks: what is wrong here reads and
writes other memory. Packed sequences come from `packed_layout`; nothing here has other defaults than there.
"""

from collections.abc import Sequence

from torch import Tensor

from . import adaln, attention, qkv
from .layout import PackedLayout
from .qkv import QKV

_NOTHING = (None,) * len(QKV._fields)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Modulate x (B, S, D) as `ralu_kernels.modulate` does."""
    return adaln._modulate(x, shift, scale, None, 1e-6, "auto")


def gated_add(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Add y (B, S, D) to x as `ralu_kernels.gated_add` does."""
    return adaln._gated_add(x, gate, y, None, "auto")


def gated_add_modulate(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Do both as `ralu_kernels.gated_add_modulate` does."""
    return adaln._gated_add_modulate(x, gate, y, shift, scale, None, 1e-6, "auto")


def concat_gelu(x: Tensor, y: Tensor) -> Tensor:
    """Concatenate x (B, S, D) and y (B, S, M) as `ralu_kernels.concat_gelu` does."""
    return adaln._concat_gelu(x, y, "auto")


def pack_qkv(
    streams: Sequence[QKV], layout: PackedLayout, heads: int, *, rotary: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pack queries, keys and values as `ralu_kernels.pack_qkv` does."""
    second = streams[1] if len(streams) == 2 else _NOTHING
    cos, sin = rotary or (None, None)
    return qkv._pack(*streams[0], *second, layout.rows, cos, sin, heads, 1e-6, "auto")


def unpack(x: Tensor, layout: PackedLayout, lengths: list[int]) -> tuple[Tensor, ...]:
    """Take x (total, H, D) apart as `ralu_kernels.unpack` does."""
    return qkv._streams(x, layout, lengths, "auto")


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> Tensor:
    """Attend as `ralu_kernels.varlen_attention` does."""
    return attention._attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, "auto")
