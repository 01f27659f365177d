"""Attention over packed sequences, by the best implementation that is installed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import check, check_sequences, check_values, register


def _fake(q: Tensor, *_) -> Tensor:
    return q.new_empty(q.shape)


def _sdpa(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    out = q.new_empty(q.shape)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(ends_q) - 1):
        rows, keys = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
        x = F.scaled_dot_product_attention(*(x.transpose(0, 1).unsqueeze(0) for x in (q[rows], k[keys], v[keys])))
        out[rows] = x[0].transpose(0, 1)
    return out


def _pick(backend, *_):
    return "sdpa"


register(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, str backend) -> Tensor",
    _fake,
    pick=_pick,
    sdpa=_sdpa,
)

BACKENDS = ("flash4", "flash3", "flash2", "varlen", "sdpa")
_default = "auto"


class attention_backend:
    """What "auto" means to `varlen_attention` in this process from now on, or, as a context manager, inside.

    Raises:
        ValueError: the backend is unknown or absent.
    """

    def __init__(self, name: str):
        global _default
        check(name == "auto" or name in BACKENDS, "name", repr(name), f"'auto' or one of {BACKENDS}")
        self._before, _default = _default, name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        global _default
        _default = self._before


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    backend: str = "auto",
) -> Tensor:
    check_values("q", q, "(total_q, H, D)")
    check_sequences("cu_seqlens_q", cu_seqlens_q, q.device)
    backend = _default if backend == "auto" else backend
    return torch.ops.ralu_kernels.varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, backend
    )
