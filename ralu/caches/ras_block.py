"""What `ralu.caches.ras` does in transformer blocks, stock or fused, and which tokens it drops."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from torch import Tensor

from ..families.flux import PerSample
from .hooks import Call, ends, streams
from .parts import WHOLE, present, project, replaced, rotated, streams_of, valid_tokens, watched
from .ras import RAS

logger = logging.get_logger("diffusers.ralu")  # diffusers' own verbosity rules


class Choice:
    """The tokens that are dropped in a step, the same ones in all its calls."""

    def __init__(self, cache: RAS):
        self.cache = cache
        self.reset()

    def reset(self) -> None:
        """Drop none, and forget how often each was."""
        self.active: Tensor | None = None  # int64 (I, A) of I images
        self.velocity: Tensor | None = None  # (I, L, C) of the step before
        self.counts: Tensor | None = None  # float32 (I, L), steps in which each was dropped

    def step(self, velocity: Tensor, sparse: bool, following: bool) -> Tensor:
        """Fill in the velocity (I, L, C) of a step after guidance, and choose for the next one where that is sparse."""
        if sparse and self.active is not None and self.velocity is not None:
            velocity = self.velocity.scatter(1, _wide(self.active, velocity), take(velocity, self.active))
        self.active = self._chosen(velocity) if following else None
        self.velocity = velocity if following else None
        return velocity

    def _chosen(self, velocity: Tensor) -> Tensor:
        by_channel = velocity.float().unflatten(-1, (-1, 4))  # (I, L, channels, pixels)
        spread = by_channel.std(2) if self.cache.metric == "std" else torch.linalg.vector_norm(by_channel, dim=2)
        metric = spread.mean(-1)
        if self.counts is None:
            self.counts = torch.zeros_like(metric)
        order = (metric * torch.exp(self.cache.starvation * self.counts)).argsort(dim=1, stable=True)
        low, high = self.cache.dropped(order.shape[1])
        last = order.shape[1] - high
        self.counts += 1
        active = order[:, low:last].sort(dim=1).values
        self.counts.scatter_add_(1, active, -torch.ones_like(active, dtype=torch.float32))
        return active


class State:
    """What `RAS` keeps in one context, see `ralu.caches.parts`. Places are the blocks' indices.

    text_first: whether text comes first in the joint sequence.
    count:      of blocks.
    choice:     that of all contexts.
    """

    def __init__(self, cache: RAS, text_first: bool, count: int, choice: Choice):
        self.cache, self.text_first, self.count, self.choice = cache, text_first, count, choice
        self.call: Call | None = None
        self.kept: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}  # keys and values (B, L, H, D) by attention

    def reset(self) -> None:
        """Forget everything, the choice too."""
        self.call, self.kept = None, {}
        self.choice.reset()

    def begin(self, call: Call) -> None:
        """Look at the step."""
        assert call.progress is not None  # `BlockHook` sees to it
        if call.progress.mixed:
            logger.warning_once("RAS computes all tokens of a mixed stage, whose tokens are of two sizes")
        # A context whose first call this is has no keys yet.
        self.sparse = self.cache.is_sparse(call.progress) and self.choice.active is not None and bool(self.kept)
        self.keeps = self.cache.keeps(call.progress)
        self.ends = ends(range(self.count), call)
        self.rotary: Any = None  # the rows of the joint sequence that is computed

    def plain(self, place: int) -> bool:
        """Say whether a block is computed for all tokens and keeps nothing."""
        return not (self.sparse or self.keeps)

    def run(self, place: int, block: Any, compute: Callable, args: tuple, kwargs: dict) -> Any:
        """Compute a block for all tokens, keeping keys and values, or for those that are not dropped."""
        hidden, encoder, _ = streams(args, kwargs)
        names = present(block, ("attn", "attn2"))
        if not self.sparse:
            self.kept[place] = {}
            parts = {name: self._keeping(getattr(block, name), place, name, encoder.shape[1]) for name in names}
            with replaced(block, WHOLE | parts):
                return compute(*args, **kwargs)
        kept = self.kept[place] if self.keeps else self.kept.pop(place)
        active = self._rows(hidden)
        if place == self.ends[0]:
            self.length = hidden.shape[1]
            hidden = take(hidden, active)
            args, kwargs = (hidden, *args[1:]) if args else args, kwargs if args else kwargs | {"hidden_states": hidden}
        parts = {name: self._attending(getattr(block, name), kept[name], active, encoder.shape[1]) for name in names}
        with replaced(block, WHOLE | parts):
            text, image = compute(*args, **kwargs)
        if place == self.ends[1]:
            whole = image.new_zeros(len(image), self.length, image.shape[-1])
            image = whole.scatter_(1, _wide(active, image), image)
        return text, image

    def _rows(self, hidden: Tensor) -> Tensor:
        active = self.choice.active
        assert active is not None
        return active.repeat(len(hidden) // len(active), 1)

    def _keeping(self, attention: Any, place: int, name: str, text: int) -> Callable:
        """Return an attention that keeps keys and values of the image."""

        def attend(**kwargs):
            with watched(attention) as seen:
                result = attention(**kwargs)
            image, first = streams_of(attention, seen)[0], text if attention.pre_only else 0
            key, value = image.key[:, first:], image.value[:, first:]
            if (rotary := kwargs.get("image_rotary_emb")) is not None:
                key = rotated(key, [PerSample(table[:, text:]) for table in _tables(rotary)])
            self.kept[place][name] = key.contiguous().clone(), value.contiguous().clone()
            return result

        return attend

    def _attending(self, attention: Any, kept: tuple[Tensor, Tensor], active: Tensor, text: int) -> Callable:
        """Return an attention whose queries are of text and active tokens, and whose keys are of all."""

        def attend(hidden_states, encoder_hidden_states=None, image_rotary_emb=None, **given):
            inputs = [x for x in (hidden_states, encoder_hidden_states) if x is not None]
            parts = streams_of(attention, project(attention, *inputs))
            order = -1 if self.text_first else 1
            query, key, value, _ = (torch.cat(part, dim=1) for part in zip(*parts[::order], strict=True))
            if image_rotary_emb is not None:
                query, key = (rotated(x, self._rotary_rows(image_rotary_emb, active, text)) for x in (query, key))
            joint = attention.pre_only or encoder_hidden_states is not None
            sizes = [active.shape[1], text if joint else 0][::order]
            for new, old in ((key, kept[0]), (value, kept[1])):
                image = new.split(sizes, dim=1)[::order][0]
                old.scatter_(1, active[..., None, None].expand_as(image), image)
            whole = [
                torch.cat([old, new.split(sizes, dim=1)[::order][1]][::order], dim=1)
                for new, old in ((key, kept[0]), (value, kept[1]))
            ]
            mask = valid_tokens(given)
            mask = None if mask is None else mask[:, None, None]
            output = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, *whole)), attn_mask=mask)
            output = output.transpose(1, 2).flatten(2)
            if attention.pre_only:
                return output
            image, words = output.split(sizes, dim=1)[::order]
            image = attention.to_out[1](attention.to_out[0](image))
            if not joint:
                return image
            return image, words if attention.context_pre_only else attention.to_add_out(words)

        return attend

    def _rotary_rows(self, rotary: Any, active: Tensor, text: int) -> Any:
        """Take text and active rows out of a rotary table, once in a call."""
        if self.rotary is None:
            words = torch.arange(text, device=active.device).expand(len(active), -1)
            rows = torch.cat([words, text + active], dim=1)
            self.rotary = [PerSample(take(table.expand(len(rows), -1, -1), rows)) for table in _tables(rotary)]
        return self.rotary


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Take rows, int64 (B, k), out of (B, n, D): (B, k, D)."""
    return x.gather(1, _wide(rows, x))


def _wide(rows: Tensor, x: Tensor) -> Tensor:
    return rows[..., None].expand(-1, -1, x.shape[-1])


def _tables(rotary: Any) -> list[Tensor]:
    """Return cosines and sines with a dimension for the batch, (1 or B, L, D) each."""
    return [table.table if isinstance(table, PerSample) else table.unsqueeze(0) for table in rotary]
