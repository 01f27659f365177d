# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# (The arguments of Triton's kernels have no types in Python.)
"""Which low tokens become four high tokens, and where every token of the mixed-resolution sequences stands."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import _backend, reference
from ._backend import jit, register, tl
from ._checks import (
    MAX_ELEMENTS,
    can_look,
    check_device,
    check_shape,
    check_tensor,
    check_values,
    device_of,
    finite,
    grid_sides,
    integer,
    number,
    unchecked,
    wrong,
)

_INT32 = (torch.int32,)


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """Where every token of a batch of mixed-resolution sequences comes from; `plan_tokens` makes one.

    The samples' sequences are concatenated ("packed"). Inside a sample low tokens stand in raster order, and a selected
    one is replaced, in place, by its four children in row-major order.

    A plan made by hand, or changed by ``dataclasses.replace``, is checked: types, shapes, dtypes and devices always,
    and the indices on a CPU. On another device looking at them would wait: there `upsample_selected` and
    `upsample_remaining` return NaN throughout if a plan's indices are not those of one layout. What a plan's tensors
    hold must not be changed in place; if it is, no memory outside the tensors is touched, and a CPU refuses it.

    Attributes:
        grid: (h, w), the low grid; n = h * w.
        cu_seqlens: int32 (B + 1,), first packed row of every sample; the last entry is the total.
        max_seqlen: tokens of the longest sequence, or more.
        source: int32 (total,), index of the low token inside its sample.
        child: int32 (total,), -1 for a low token that is kept, else di * 2 + dj for child (di, dj).
        inverse: int32 (B, 4n), the packed row that covers each token of the high grid, in raster order over (2h, 2w):
            its own row if its parent was selected, else its parent's row.
        positions: float32 (total, 2), (row, column) in low tokens; child (di, dj) is at its parent + (di, dj) / 2.

    Raises:
        TypeError: an attribute is of another type.
        ValueError: an attribute is not as described, or does not fit the others.
    """

    grid: tuple[int, int]
    cu_seqlens: Tensor
    max_seqlen: int
    source: Tensor
    child: Tensor
    inverse: Tensor
    positions: Tensor
    # Whether the indices are those of one layout: a bool tensor (), or None where that is known already.
    _consistent: Tensor | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        h, w = grid_sides(self.grid)
        n = h * w
        for name, shape in (("inverse", "(B, 4n)"), ("cu_seqlens", "(B + 1,)"), ("source", "(total,)")):
            check_tensor(name, getattr(self, name), shape, _INT32)
        check_tensor("child", self.child, "(total,)", _INT32)
        check_tensor("positions", self.positions, "(total, 2)", (torch.float32,))
        batch, total = self.inverse.shape[0], self.source.shape[0]
        check_shape("inverse", self.inverse, (batch, 4 * n), "(B, 4n), with grid's n,")
        check_shape("cu_seqlens", self.cu_seqlens, (batch + 1,), "(B + 1,), with inverse's B,")
        check_shape("child", self.child, (total,), "(total,), as source's,")
        check_shape("positions", self.positions, (total, 2), "(total, 2), with source's total,")
        for name in ("cu_seqlens", "source", "child", "positions"):
            check_device(name, getattr(self, name), self.inverse, "inverse's")
        longest = integer("max_seqlen", self.max_seqlen, n, 4 * n)
        if not batch * n <= total <= batch * longest or (total - batch * n) % 3:
            raise wrong(
                "source.shape", self.source.shape, f"(total,) of {batch} times {n} to max_seqlen = {longest}, by threes"
            )
        object.__setattr__(self, "grid", (h, w))
        holds = self._holds()
        if can_look(self.inverse):
            for name, valid in holds.items():
                if not valid:
                    raise wrong(name, getattr(self, name), "the indices of the layout that inverse's rows describe")
        else:
            object.__setattr__(self, "_consistent", torch.stack([*holds.values()]).all())

    def _holds(self) -> dict[str, Tensor]:
        """Tell of the indices whether they are those of one layout; bool tensors ()."""
        total, batch = self.source.shape[0], self.inverse.shape[0]
        rows = reference.children(self.inverse, self.grid[1])  # (B, n, 4)
        selected = reference.selected_of(rows)
        expected, ends = reference.layout(selected)
        high = rows.clamp(0, max(total - 1, 0)).long()
        token = torch.arange(rows.shape[1], device=rows.device)[:, None]
        child = torch.where(selected[..., None], torch.arange(4, device=rows.device), -1)
        starts = torch.cat([ends.new_zeros(1), ends[:, -1]])
        return {
            "inverse": (rows == expected).all() & (starts[-1] == total),
            "cu_seqlens": (self.cu_seqlens == starts).all() & (starts.diff() <= self.max_seqlen).all(),
            "source": (self.source[high] == token).all() if batch else starts[-1] == 0,
            "child": (self.child[high] == child).all() if batch else starts[-1] == 0,
        }

    @property
    def batch_size(self) -> int:
        """B."""
        return self.inverse.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Tokens of every sample, int32 (B,)."""
        return self.cu_seqlens.diff()

    def to(self, device: torch.device | str) -> "TokenPlan":
        """Copy the plan to a device.

        Raises:
            TypeError, ValueError: ``device`` is none.
        """
        device = device_of("device", device)
        values: list[Any] = [getattr(self, name) for name in self.__match_args__]
        values = [value.to(device) if isinstance(value, Tensor) else value for value in values]
        return unchecked(TokenPlan, *values) if self._consistent is None else TokenPlan(*values)


@jit
def _sort_key(score):
    """Return a uint32 in the order of the scores; -0 ties with 0, and NaN is below everything."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits ^ -0x80000000)
    return tl.where(score == score, key, 0).to(tl.uint32, bitcast=True)


# Loops over a sample are `while`: with NumPy 2.4 the interpreter of Triton <= 3.6 takes no argument as a range bound.
@jit
def _count(scores_ptr, limit, size, n, stride_b, stride_n, RANKED: tl.constexpr, BLOCK: tl.constexpr):
    """Count the first ``size`` scores that reach ``limit``: a sort key if RANKED, else a score."""
    count = tl.zeros((BLOCK,), tl.int32)
    start = 0
    while start < size:
        i = start + tl.arange(0, BLOCK)
        place = (i // n).to(tl.int64) * stride_b + (i % n).to(tl.int64) * stride_n
        score = tl.load(scores_ptr + place, mask=i < size).to(tl.float32)
        reached = _sort_key(score) >= limit if RANKED else score >= limit
        count += (reached & (i < size)).to(tl.int32)
        start += BLOCK
    return tl.sum(count)


@jit
def _plan_kernel(
    scores_ptr, cu_seqlens_ptr, source_ptr, child_ptr, inverse_ptr, positions_ptr,
    n, width, k, threshold, total, stride_b, stride_n,
    RANKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    counted: tl.constexpr = 4 * BLOCK  # at once: a turn of a count is short, and waits for memory
    b = tl.program_id(0)
    sample_ptr = scores_ptr + b.to(tl.int64) * stride_b
    if RANKED:
        before = b * k
        # The k-th highest key, bit by bit from the top: the largest value that at least k keys reach.
        kth = tl.full((), 0, tl.uint32)
        for bit in range(32):
            candidate = kth | (tl.full((), 0x80000000, tl.uint32) >> bit)
            kth = tl.where(_count(sample_ptr, candidate, n, n, stride_b, stride_n, True, counted) >= k, candidate, kth)
        above = tl.where(kth == 0xFFFFFFFF, 0, _count(sample_ptr, kth + 1, n, n, stride_b, stride_n, True, counted))
        ties_left = k - above
    else:
        before = _count(scores_ptr, threshold, b * n, n, stride_b, stride_n, False, counted)

    # Every sample writes its start and its end, so that the last end needs no special case.
    tl.store(cu_seqlens_ptr + b, b * n + 3 * before)
    child = tl.arange(0, 4)[None, :]
    start = 0
    while start < n:
        i = start + tl.arange(0, BLOCK)
        score = tl.load(sample_ptr + i.to(tl.int64) * stride_n, mask=i < n).to(tl.float32)
        if RANKED:
            key = _sort_key(score)
            tie = ((key == kth) & (i < n)).to(tl.int32)
            selected = (key > kth) | ((tie > 0) & (tl.cumsum(tie) <= ties_left))
            ties_left -= tl.sum(tie)
        else:
            selected = score >= threshold
        selected = (selected & (i < n)).to(tl.int32)
        first = b * n + i + 3 * (before + tl.cumsum(selected) - selected)
        before += tl.sum(selected)

        token, first, selected = i[:, None], first[:, None], selected[:, None] > 0
        y, x = token // width, token % width
        place = tl.where(selected, child, 0)
        row = first + place
        high = (b * 4).to(tl.int64) * n + (2 * y + child // 2) * (2 * width) + 2 * x + child % 2
        tl.store(inverse_ptr + high, row, mask=token < n)
        exists = (token < n) & (selected | (child == 0)) & (row < total)
        tl.store(source_ptr + row, token + tl.zeros_like(child), mask=exists)
        tl.store(child_ptr + row, tl.where(selected, child, -1), mask=exists)
        position_ptr = positions_ptr + row.to(tl.int64) * 2
        tl.store(position_ptr, y + 0.5 * (place // 2), mask=exists)
        tl.store(position_ptr + 1, x + 0.5 * (place % 2), mask=exists)
        start += BLOCK
    tl.store(cu_seqlens_ptr + b + 1, b * n + n + 3 * before)


def _fake_plan(
    scores: Tensor, h: int, w: int, k: int, threshold: float | None, total: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, n = scores.shape
    return (
        scores.new_empty(b + 1, dtype=torch.int32),
        scores.new_empty(total, dtype=torch.int32),
        scores.new_empty(total, dtype=torch.int32),
        scores.new_empty(b, 4 * n, dtype=torch.int32),
        scores.new_empty(total, 2, dtype=torch.float32),
    )


def _plan_triton(
    scores: Tensor, h: int, w: int, k: int, threshold: float | None, total: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _fake_plan(scores, h, w, k, threshold, total)
    if scores.numel() == 0:
        outputs[0].zero_()
        return outputs
    with torch.cuda.device_of(scores):
        _plan_kernel[(scores.shape[0],)](
            scores, *outputs, h * w, w, k, threshold or 0.0, total, *scores.stride(),
            RANKED=threshold is None, BLOCK=256, num_warps=4,
        )  # fmt: skip
    return outputs


def _plan_native(
    scores: Tensor, h: int, w: int, k: int, threshold: float | None, total: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _fake_plan(scores, h, w, k, threshold, total)
    _backend.native.plan_tokens(scores, *outputs, w, k, threshold)
    return outputs


_plan = register(
    "plan_tokens(Tensor scores, SymInt h, SymInt w, SymInt k, float? threshold, SymInt total, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_plan,
    native=_plan_native,
    triton=_plan_triton,
    reference=reference.plan_tokens,
)


def plan_tokens(
    scores: Tensor,
    grid: Sequence[int],
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    backend: str = "auto",
) -> TokenPlan:
    """Choose the low tokens that become four high tokens, and lay out the packed sequences.

    Args:
        scores: (B, n) float32, float16 or bfloat16, any strides; the higher, the sooner a token is selected.
        grid: (h, w), the low grid, h * w = n.
        ratio: select the k = floor(ratio * n + 1e-6) highest scores of every sample. Ties go to the lower index; NaN
            ranks last. No host synchronisation.
        threshold: select scores >= threshold, a finite number; sequence lengths then differ, and the host waits for
            them once. (Tracing this needs ``torch._dynamo.config.capture_scalar_outputs``.)
        backend: "auto", "native", "triton" or "reference".

    Returns:
        The plan, on the scores' device.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is not as described, not exactly one of ratio and threshold is given, or the backend
            cannot run here.
    """
    check_values("scores", scores, "(B, n)")
    b, n = scores.shape
    h, w = grid_sides(grid)
    if h * w != n:
        raise wrong("grid", (h, w), f"(h, w) with h * w = {n}, the scores of one sample")
    if (ratio is None) == (threshold is None):
        raise wrong("(ratio, threshold)", (ratio, threshold), "one None and one number")
    if 4 * b * n > MAX_ELEMENTS:
        raise wrong("the number of high tokens of scores", 4 * b * n, f"at most {MAX_ELEMENTS}")
    if ratio is not None:
        ratio = number("ratio", ratio)
        if not 0 <= ratio <= 1:
            raise wrong("ratio", ratio, "in [0, 1]")
        k = math.floor(ratio * n + 1e-6)
        max_seqlen = n + 3 * k
        total = b * max_seqlen
    else:
        threshold = finite("threshold", threshold)
        if scores.device.type == "meta":
            raise wrong("scores.device", scores.device, "one that has values, which the threshold's lengths depend on")
        k = 0
        counts = (scores.float() >= threshold).sum(1).tolist()  # PyTorch would round the threshold to bfloat16
        max_seqlen = n + 3 * max([0, *counts])
        total = b * n + 3 * sum(counts)
    tensors = _plan(scores, h, w, k, threshold, total, backend)
    cu_seqlens, source, child, inverse, positions = tensors
    return unchecked(TokenPlan, (h, w), cu_seqlens, max_seqlen, source, child, inverse, positions)
