"""Attention over packed sequences, by the fastest implementation that is installed."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from ._backend import register
from ._checks import check_alike, check_sequences, check_values, finite, fits, integer, wrong, wrong_type

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
def _load(name: str) -> tuple[Callable[..., Any] | None, str | None]:
    """Return the function that ``name`` stands for, or None and why it cannot be imported."""
    module, function, *_ = _PACKED[name]
    try:
        return getattr(import_module(module), function), None
    except Exception as error:  # a broken installation is an absent one; naming it tells what broke
        return None, f"{module}.{function} cannot be imported: {error}"


def _why_unsuited(name: str, q: Tensor) -> str | None:
    *_, capabilities, head = _PACKED[name]
    if q.device.type != "cuda":
        return f"it has nothing for {q.device.type}"
    if _capability(q.device)[0] not in capabilities:
        return f"it is for compute capabilities {capabilities[0]} to {capabilities[-1]}"
    if q.dtype == torch.float32 or q.shape[-1] % 8 or q.shape[-1] > head:
        return f"it takes float16 and bfloat16, and a D of 8, 16, ... {head}"
    return None


def _why_not(name: str, q: Tensor) -> str | None:
    return None if name == "sdpa" else _load(name)[1] or _why_unsuited(name, q)


def _is_dense(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> bool:
    """Tell whether no sequence is shorter than the longest. The host knows it without waiting for cu_seqlens."""
    batch = cu_seqlens_q.shape[0] - 1
    return q.shape[0] == batch * max_seqlen_q and k.shape[0] == batch * max_seqlen_k


def _pick(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float | None, backend: str,
) -> str:  # fmt: skip
    name = _default if backend == "auto" else backend
    if name == "auto":
        dense = _is_dense(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
        return "sdpa" if dense else next(name for name in BACKENDS if _why_not(name, q) is None)
    if _why_not(name, q) is not None:
        states = ", ".join(f"{name!r} ({_why_not(name, q) or 'available'})" for name in BACKENDS)
        raise ValueError(f"backend must be 'auto' or one available on {q.device.type}, got {name!r}: {states}")
    return name


def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def _priority(capability: tuple[int, int], usual: tuple[int, ...]) -> list[int]:
    """Return the order in which dense attention's implementations are tried: cuDNN's first on Hopper and newer."""
    if capability[0] < 9:
        return [*usual]
    first = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    return list(dict.fromkeys([*(backend.value for backend in first), *usual]))


def _by_head(x: Tensor, batch: int) -> Tensor:
    """View rows (B * S, H, D) as (B, H, S, D), in half of the host's time for `view` and `transpose`."""
    total, heads, size = x.shape
    row, head, column = x.stride()
    length = total // batch
    return x.as_strided((batch, heads, length, size), (length * row, head, row, column))


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None = None) -> Tensor:
    """Attend densely, all (B, H, S, D), to (B, S, H, D)."""
    # What `sdpa_kernel(..., set_priority=True)` does; that takes the host longer than all else of a call.
    before = torch._C._get_sdp_priority_order()
    torch._C._set_sdp_priority_order(_priority(_capability(q.device), tuple(before)))
    try:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    finally:
        torch._C._set_sdp_priority_order(before)
    return x.transpose(1, 2)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attend without waiting for the device where lengths differ: float32 on a GPU, which the others do not take."""

    def place(cu_seqlens: Tensor, longest: int) -> Tensor:
        return cu_seqlens[:-1, None] + torch.arange(longest, dtype=torch.int32, device=q.device)

    total = q.shape[0]
    rows, keys = place(cu_seqlens_q, max_seqlen_q), place(cu_seqlens_k, max_seqlen_k)
    kept = (keys < cu_seqlens_k[1:, None])[:, None, None]
    keys = keys.clamp_max(k.shape[0] - 1)
    q, k, v = q[rows.clamp_max(total - 1)], k[keys], v[keys]
    x = _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale, kept)
    row = torch.arange(total, dtype=torch.int32, device=q.device)
    sequence = torch.bucketize(row, cu_seqlens_q[1:], right=True)
    return x[sequence, row - cu_seqlens_q[sequence]]


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float | None = None,
) -> Tensor:  # fmt: skip
    if q.numel() == 0 or k.shape[0] == 0:
        return q.new_zeros(q.shape)
    if _is_dense(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k):
        batch = cu_seqlens_q.shape[0] - 1
        q, k, v = _by_head(q, batch), _by_head(k, batch), _by_head(v, batch)
        return _attend(q, k, v, softmax_scale).flatten(0, 1).contiguous()
    if q.device.type != "cpu":
        return _padded(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat(
        [_attend(_by_head(q, 1), _by_head(k, 1), _by_head(v, 1), softmax_scale)[0] for q, k, v in sequences]
    )


def _packed(name: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        *layout, scale = rest
        function: Any = _load(name)[0]
        if name == "varlen":
            if scale is None:
                out = function(q, k, v, *layout)
            elif "scale" in signature(function).parameters:
                out = function(q, k, v, *layout, scale=scale)
            else:  # PyTorch 2.10's scales by 1 / sqrt(D), and takes no other
                out = function(q * (scale * q.shape[-1] ** 0.5), k, v, *layout)
        else:
            names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")  # the places differ by version
            chosen = {} if scale is None else {"softmax_scale": scale}
            out = function(q, k, v, **dict(zip(names, layout, strict=True)), **chosen)
        result: Tensor = out[0] if isinstance(out, tuple) else out  # some versions return the logsumexp too
        return result

    return run


_attention = register(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, float? softmax_scale, str backend) -> Tensor",
    _fake,
    pick=_pick,
    sdpa=_sdpa,
    **{name: _packed(name) for name in _PACKED},
)


class attention_backend:  # noqa: N801 (a context manager, named as torch.no_grad is)
    """Set what "auto" means to `varlen_attention` in this process; as a context manager, until the end of the block.

    Args:
        name: "auto", "flash4", "flash3", "flash2", "varlen" or "sdpa".

    Raises:
        TypeError: ``name`` is no string.
        ValueError: there is no such backend, or it is not installed.
    """

    def __init__(self, name: str) -> None:
        global _default
        _check_name("name", name)
        why = None if name in ("auto", "sdpa") else _load(name)[1]
        if why is not None:
            raise wrong("name", name, f"installed ({why})")
        self._name, self._before = name, [_default]  # what the blocks that are open, or to be opened, end with
        self._open = 0
        _default = name

    def __enter__(self) -> "attention_backend":
        global _default
        if self._open == len(self._before):
            self._before.append(_default)
        self._open += 1
        _default = self._name
        return self

    def __exit__(self, *_: object) -> None:
        global _default
        self._open -= 1
        _default = self._before.pop()


def _check_name(argument: str, name: Any) -> None:
    if not isinstance(name, str):
        raise wrong_type(argument, name, f"'auto' or one of {BACKENDS}")
    if name != "auto" and name not in BACKENDS:
        raise wrong(argument, name, f"'auto' or one of {BACKENDS}")


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend within every packed sequence and head: ``softmax(softmax_scale * q k^T) v``, without padding.

    "auto" is dense SDPA (cuDNN first on Hopper and newer) if all sequences are of one length, else the first that can
    run of flash-attn 4, 3 and 2, ``torch.nn.attention.varlen.varlen_attn``, and SDPA, which takes sequence by sequence
    on a CPU and pads elsewhere (float32 on a GPU). Nothing waits for a GPU.

    Args:
        q: (total_q, H, D) float32, float16 or bfloat16, contiguous in D.
        k, v: (total_k, H, D), as q.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), first row of every sequence; the last entry is the total. On another
            device than a CPU this is the caller's promise: looking would wait.
        max_seqlen_q, max_seqlen_k: tokens of the longest sequences; more only costs time.
        softmax_scale: what the products of q and k are multiplied by; None: 1 / sqrt(D).
        backend: "auto" (`attention_backend` sets what that is), "flash4", "flash3", "flash2", "varlen" or "sdpa".

    Returns:
        Contiguous (total_q, H, D) in q's dtype; zero where a sequence has queries and no keys. Forward only.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is not as described, or the backend is absent or cannot run here, with the reason.
    """
    _check_name("backend", backend)
    check_values("q", q, "(total, H, D)")
    for name, x in (("q", q), ("k", k), ("v", v)):
        like_q = fits(x, q.shape, (q.dtype,), q.device)
        if not like_q:
            check_values(name, x, "(total, H, D)")
        if x.stride(-1) != 1:
            raise wrong(f"{name}.stride(-1)", x.stride(-1), "1")
        if like_q:
            continue
        if x.shape[1:] != q.shape[1:]:
            raise wrong(f"{name}.shape", x.shape, f"(total, H, D) with q's {tuple(q.shape[1:])}")
        check_alike(name, x, q, "q's")
    total_q, total_k = q.shape[0], k.shape[0]
    if v.shape[0] != total_k:
        raise wrong("v.shape[0]", v.shape[0], f"{total_k}, as k's")
    longest_q, longest_k = integer("max_seqlen_q", max_seqlen_q, 0), integer("max_seqlen_k", max_seqlen_k, 0)
    check_sequences("cu_seqlens_q", cu_seqlens_q, total_q, q, "q's", longest_q)
    if cu_seqlens_k is not cu_seqlens_q or total_k != total_q or longest_k != longest_q:
        check_sequences("cu_seqlens_k", cu_seqlens_k, total_k, q, "k's", longest_k)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            raise wrong("len(cu_seqlens_k)", cu_seqlens_k.shape[0], f"{cu_seqlens_q.shape[0]}, as cu_seqlens_q's")
    if softmax_scale is not None:
        softmax_scale = finite("softmax_scale", softmax_scale)
    return _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, softmax_scale, backend)
