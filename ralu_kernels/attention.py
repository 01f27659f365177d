"""Attention over packed sequences, by the fastest implementation that is installed."""

from contextlib import nullcontext
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._backend import check, check_alike, check_sequences, check_values, register

# Module and function, the compute capabilities it is made for, its largest head; "auto" tries them in this order.
_PACKED = {
    "flash4": ("flash_attn.cute", "flash_attn_varlen_func", range(9, 13), 128),
    "flash3": ("flash_attn_interface", "flash_attn_varlen_func", range(9, 10), 256),
    "flash2": ("flash_attn", "flash_attn_varlen_func", range(8, 13), 256),
    "varlen": ("torch.nn.attention.varlen", "varlen_attn", range(8, 13), 256),
}
BACKENDS = (*_PACKED, "sdpa")
_default = "auto"


@cache
def _load(name: str):
    """The function that ``name`` stands for, or None and why it cannot be imported."""
    module, function, *_ = _PACKED[name]
    try:
        return getattr(import_module(module), function), None
    except Exception as error:  # a broken installation is an absent one; naming it tells what broke
        return None, f"{module}.{function} cannot be imported: {error}"


def _why_unsuited(name: str, q: Tensor) -> str | None:
    *_, capabilities, head = _PACKED[name]
    if q.device.type != "cuda":
        return f"it has nothing for {q.device.type}"
    if torch.cuda.get_device_capability(q.device)[0] not in capabilities:
        return f"it is for compute capabilities {capabilities[0]} to {capabilities[-1]}"
    if q.dtype == torch.float32 or q.shape[-1] % 8 or q.shape[-1] > head:
        return f"it takes float16 and bfloat16, and a D of 8, 16, ... {head}"
    return None


def _why_not(name: str, q: Tensor) -> str | None:
    return None if name == "sdpa" else _load(name)[1] or _why_unsuited(name, q)


def _is_dense(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k) -> bool:
    """No sequence is shorter than the longest. The host knows it without waiting for cu_seqlens."""
    batch = cu_seqlens_q.shape[0] - 1
    return q.shape[0] == batch * max_seqlen_q and k.shape[0] == batch * max_seqlen_k


def _pick(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, backend: str) -> str:
    name = _default if backend == "auto" else backend
    if name == "auto":
        dense = _is_dense(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
        return "sdpa" if dense else next(name for name in BACKENDS if _why_not(name, q) is None)
    if _why_not(name, q) is not None:
        states = ", ".join(f"{name!r} ({_why_not(name, q) or 'available'})" for name in BACKENDS)
        raise ValueError(f"backend must be 'auto' or one available on {q.device.type}, got {name!r}: {states}")
    return name


def _fake(q: Tensor, *_) -> Tensor:
    return q.new_empty(q.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Dense attention, all (B, S, H, D)."""
    fastest = nullcontext()
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] >= 9:
        order = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
        fastest = sdpa_kernel([*order, SDPBackend.MATH], set_priority=True)
    with fastest:
        x = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    return x.transpose(1, 2)


def _padded(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> Tensor:
    """Sequences of different lengths without waiting for the device: float32 on a GPU, which the others do not take."""

    def place(cu_seqlens, longest):
        return cu_seqlens[:-1, None] + torch.arange(longest, dtype=torch.int32, device=q.device)

    rows, keys = place(cu_seqlens_q, max_seqlen_q), place(cu_seqlens_k, max_seqlen_k)
    kept = (keys < cu_seqlens_k[1:, None])[:, None, None]
    keys = keys.clamp_max(k.shape[0] - 1)
    x = _attend(q[rows.clamp_max(q.shape[0] - 1)], k[keys], v[keys], kept)
    row = torch.arange(q.shape[0], dtype=torch.int32, device=q.device)
    sequence = torch.bucketize(row, cu_seqlens_q[1:], right=True)
    return x[sequence, row - cu_seqlens_q[sequence]]


def _sdpa(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> Tensor:
    if q.numel() == 0:
        return _fake(q)
    if _is_dense(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k):
        return _attend(*(x.unflatten(0, (cu_seqlens_q.shape[0] - 1, -1)) for x in (q, k, v))).flatten(0, 1).contiguous()
    if q.device.type != "cpu":
        return _padded(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([_attend(*(x.unsqueeze(0) for x in sequence)).squeeze(0) for sequence in sequences])


def _flash(name: str):
    def run(q, k, v, *layout):
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")  # the places differ by version
        out = _load(name)[0](q, k, v, **dict(zip(names, layout, strict=True)))
        return out[0] if isinstance(out, tuple) else out  # some versions return the logsumexp too

    return run


register(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, str backend) -> Tensor",
    _fake,
    pick=_pick,
    flash4=_flash("flash4"),
    flash3=_flash("flash3"),
    flash2=_flash("flash2"),
    varlen=lambda *args: _load("varlen")[0](*args),
    sdpa=_sdpa,
)


class attention_backend:
    """Set what "auto" means to `varlen_attention` in this process; as a context manager, until the end of the block.

    Args:
        name: "auto", "flash4", "flash3", "flash2", "varlen" or "sdpa".

    Raises:
        ValueError: there is no such backend, or it is not installed.
    """

    def __init__(self, name: str):
        global _default
        _check_name("name", name)
        why = None if name in ("auto", "sdpa") else _load(name)[1]
        check(why is None, "name", repr(name), f"installed ({why})")
        self._before, _default = _default, name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        global _default
        _default = self._before


def _check_name(argument: str, name: str) -> None:
    check(name in ("auto", *BACKENDS), argument, repr(name), f"'auto' or one of {BACKENDS}")


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
    """``softmax(q k^T / sqrt(D)) v`` of every packed sequence and head; no padding is computed.

    "auto" is dense SDPA (cuDNN first on Hopper and newer) if all sequences are of one length, else the first that can
    run of flash-attn 4, 3 and 2, ``torch.nn.attention.varlen.varlen_attn``, and SDPA, which takes sequence by sequence
    on a CPU and pads elsewhere (float32 on a GPU). Nothing waits for a GPU.

    Args:
        q: (total_q, H, D) float32, float16 or bfloat16, contiguous in D.
        k, v: (total_k, H, D), as q.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), first row of every sequence; the last entry is the total.
        max_seqlen_q, max_seqlen_k: the longest sequences.
        backend: "auto" (`attention_backend` sets what that is), "flash4", "flash3", "flash2", "varlen" or "sdpa".

    Returns:
        Contiguous (total_q, H, D) in q's dtype. Forward only.

    Raises:
        ValueError: an argument is not as described, or the backend is absent or cannot run here, with the reason.
    """
    _check_name("backend", backend)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_values(name, x, "(total, H, D)")
        check(x.stride(-1) == 1, f"{name}.stride(-1)", x.stride(-1), "1")
        check(
            x.shape[1:] == q.shape[1:], f"{name}.shape", tuple(x.shape), f"(total, H, D) with q's {tuple(q.shape[1:])}"
        )
        check_alike(name, x, q, "q's")
    check(k.shape[0] == v.shape[0], "(total_k, total_v)", (k.shape[0], v.shape[0]), "equal")
    check_sequences("cu_seqlens_q", cu_seqlens_q, q.device)
    check_sequences("cu_seqlens_k", cu_seqlens_k, q.device)
    found, expected = len(cu_seqlens_k), len(cu_seqlens_q)
    check(found == expected, "len(cu_seqlens_k)", found, f"{expected}, as cu_seqlens_q's")
    return torch.ops.ralu_kernels.varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, backend
    )
