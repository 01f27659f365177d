"""Padded batches of token sequences without their padding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import (
    MAX_ELEMENTS,
    can_look,
    check_device,
    check_shape,
    check_tensor,
    device_of,
    integer,
    unchecked,
    wrong,
)

_INT32 = (torch.int32,)


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Which tokens of a padded batch (B, S) exist, and where they stand when the padding is dropped.

    `packed_layout` makes one. One made by hand is checked: types, shapes, dtypes and devices always, and the indices on
    a CPU. On another device looking at them would wait: there `pack_qkv` and `unpack` have NaN where a row is named
    that does not exist.

    Attributes:
        rows: int32 (total,), b * S + s of every packed token; None when nothing is padded.
        inverse: int32 (B * S,), the packed row of every token, -1 where it is padding; None when nothing is padded.
        cu_seqlens: int32 (B + 1,), first packed row of every sample; the last entry is the total.
        max_seqlen: tokens of the longest sequence, or more.
        batch: B.
        length: S.

    Raises:
        TypeError: an attribute is of another type.
        ValueError: an attribute is not as described, or does not fit the others.
    """

    rows: Tensor | None
    inverse: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    batch: int
    length: int

    def __post_init__(self) -> None:
        batch, length = integer("batch", self.batch, 0), integer("length", self.length, 0)
        if batch * length > MAX_ELEMENTS:
            raise wrong("batch * length", batch * length, f"at most {MAX_ELEMENTS}")
        check_tensor("cu_seqlens", self.cu_seqlens, "(B + 1,)", _INT32)
        check_shape("cu_seqlens", self.cu_seqlens, (batch + 1,), "(batch + 1,)")
        if integer("max_seqlen", self.max_seqlen, 0) > length:
            raise wrong("max_seqlen", self.max_seqlen, f"at most length = {length}")
        if (self.rows is None) != (self.inverse is None):
            raise wrong("(rows, inverse)", (self.rows, self.inverse), "both None or both tensors")
        tensors = {"cu_seqlens": self.cu_seqlens}
        if self.rows is not None and self.inverse is not None:
            check_tensor("rows", self.rows, "(total,)", _INT32)
            check_tensor("inverse", self.inverse, "(B * S,)", _INT32)
            check_shape("inverse", self.inverse, (batch * length,), "(batch * length,)")
            if self.rows.shape[0] > batch * length:
                raise wrong("rows.shape", self.rows.shape, f"(total,) of at most batch * length = {batch * length}")
            tensors |= {"rows": self.rows, "inverse": self.inverse}
        for name, x in tensors.items():
            check_device(name, x, self.cu_seqlens, "cu_seqlens'")
            if not x.is_contiguous():
                raise wrong(f"{name}.stride()", x.stride(), "(1,)")
        if can_look(self.cu_seqlens):
            for name, valid in self._holds().items():
                if not valid:
                    raise wrong(name, getattr(self, name), "the indices of one layout with the others")

    def _holds(self) -> dict[str, Tensor]:
        """Tell of the indices whether they are those of one layout; bool tensors ()."""
        lengths, total = self.cu_seqlens.diff(), self.total
        ends = (self.cu_seqlens[0] == 0) & (self.cu_seqlens[-1] == total) & (lengths >= 0).all()
        holds = {"cu_seqlens": ends, "max_seqlen": (lengths <= self.max_seqlen).all()}
        if self.rows is None or self.inverse is None:
            return {**holds, "cu_seqlens": ends & (lengths == self.length).all()}
        if not ends:
            return holds
        sample = torch.repeat_interleave(torch.arange(self.batch, device=lengths.device), lengths)
        inside = (self.rows >= 0) & (self.rows < self.batch * self.length)
        rows = self.rows.where(inside, 0).long()
        packed = torch.arange(total, device=lengths.device)
        back = (self.inverse[rows] == packed).all() if total else ends
        count = (self.inverse >= 0).sum() == total
        rest = (self.inverse >= -1).all()
        return {
            **holds,
            "rows": inside.all() & (rows.div(max(self.length, 1), rounding_mode="floor") == sample).all(),
            "inverse": back & count & rest,
        }

    @property
    def total(self) -> int:
        """Packed tokens."""
        return self.batch * self.length if self.rows is None else self.rows.shape[0]


def packed_layout(
    mask: Tensor | None, batch: int, length: int, device: torch.device | str, *, total: int | None = None
) -> PackedLayout:
    """Lay out a batch of ``batch`` joint sequences of ``length`` tokens without their padding.

    Args:
        mask: bool (batch, length), True for the tokens that exist, anywhere in a sequence; None: all do.
        batch, length: B and S; B * S below 2^31.
        device: where the layout is to be.
        total: tokens that exist, where it is known; the caller's promise. None: counted.

    Returns:
        The layout. With a mask and no total it waits for the device once, for the number of tokens of every sample.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is not as described.
    """
    batch, length, device = integer("batch", batch, 0), integer("length", length, 0), device_of("device", device)
    if batch * length > MAX_ELEMENTS:
        raise wrong("batch * length", batch * length, f"at most {MAX_ELEMENTS}")
    if mask is not None:
        check_tensor("mask", mask, "(B, S)", (torch.bool,))
        check_shape("mask", mask, (batch, length), "(batch, length)")
        if mask.device.type == "meta":
            raise wrong("mask.device", mask.device, "one that has values, which the sequences' lengths depend on")
        longest = length
        if total is None:
            lengths = mask.sum(1).tolist()
            total, longest = sum(lengths), max(lengths, default=0)
        elif integer("total", total, 0) > batch * length:
            raise wrong("total", total, f"at most batch * length = {batch * length}")
        if total < batch * length:
            kept = mask.to(device).flatten()
            rank = kept.cumsum(0)
            # Every token's number goes to its place; those of padding all to one place more, which is left out.
            rows = torch.empty(total + 1, dtype=torch.int32, device=device)
            token = torch.arange(batch * length, dtype=torch.int32, device=device)
            rows.scatter_(0, torch.where(kept, rank - 1, total), token)
            return unchecked(
                PackedLayout,
                rows[:total],
                torch.where(kept, rank - 1, -1).int(),
                torch.cat([rank.new_zeros(1), rank[length - 1 :: length]]).int(),
                longest,
                batch,
                length,
            )
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    return unchecked(PackedLayout, None, None, cu_seqlens, length, batch, length)
