"""What `ralu.caches.toca` does in transformer blocks, stock or fused: for a call it replaces the modules in them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .hooks import Call
from .parts import WHOLE, present, replaced, rotated, streams_of, valid_tokens, watched
from .toca import ToCa

_MLPS = {"ff": "image", "ff_context": "text"}  # of a block with two streams -> whose tokens it computes
_WEIGHTS = 2**24  # of attention, that exist at one time


class Block:
    """What a block keeps from a full step on until the last step that uses it.

    kept:   outputs by the module's name: (B, n, D), or where attention has two streams a pair of them.
    tokens: by stream: "image" and "text", or "joint".
    """

    def __init__(self):
        self.kept: dict[str, Any] = {}
        self.tokens: dict[str, Tokens] = {}


class State:
    """What `ToCa` keeps in one context, see `ralu.caches.hooks`. Places are layer and stream of `ToCa.fresh_ratio`.

    text_first: whether text comes first in the joint sequence.
    """

    def __init__(self, cache: ToCa, text_first: bool):
        self.cache, self.order = cache, -1 if text_first else 1  # of image and text
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.call: Call | None = None
        self.blocks: dict[tuple[int, int], Block] = {}

    def begin(self, call: Call) -> None:
        """Look at the step."""
        assert call.progress is not None  # `Hook` sees to it
        self.full, self.keeps = self.cache.is_full(call.progress.step), self.cache.keeps(call.progress)

    def plain(self, place: tuple[int, int]) -> bool:
        """Say whether a block is computed in full and keeps nothing."""
        if self.full:
            self.blocks.pop(place, None)
        return place not in self.blocks and not self.keeps

    def run(self, place: tuple[int, int], block: Any, compute: Callable, args: tuple, kwargs: dict) -> Any:
        """Compute a block in full, keeping what later steps use, or for a few tokens."""
        state = self.blocks.pop(place, None)
        if state is None:
            state = Block()
            parts = self._keeping(place, block, state)
        else:
            parts = self._reusing(place, block, state)
        if self.keeps:
            self.blocks[place] = state
        with replaced(block, WHOLE | parts):
            return compute(*args, **kwargs)

    def _keeping(self, place: tuple[int, int], block: Any, state: Block) -> dict[str, Any]:
        """Return what stands for the modules of a block whose outputs are kept."""
        attention = block.attn

        def attend(**kwargs):
            with watched(attention) as projections:
                result = attention(**kwargs)
            state.tokens = self._tokens(attention, projections, kwargs)
            if attention.context_pre_only:  # SD3's last block has no use for its text
                del state.tokens["text"]
                result = result[0], None
            state.kept["attn"] = result
            return result

        def kept(name: str) -> Callable:
            module = getattr(block, name)

            def call(*args, **kwargs):
                state.kept[name] = module(*args, **kwargs)
                return state.kept[name]

            return call

        names = ["proj_out"] if place[1] == 1 else present(block, ("attn2", *_MLPS))
        return {"attn": attend} | {name: kept(name) for name in names}

    def _reusing(self, place: tuple[int, int], block: Any, state: Block) -> dict[str, Any]:
        """Return what stands for the modules of a block that is computed for a few tokens."""
        interval, weight, kept = self.cache.interval, self.cache.staleness, state.kept
        ratio = self.cache.fresh_ratio(*place)
        rows = {stream: tokens.choose(ratio, weight / interval) for stream, tokens in state.tokens.items()}

        def partly(name: str, rows: Rows) -> Callable:
            module = getattr(block, name)
            return lambda x: rows.put(module(rows.take(x)), kept[name])

        if place[1] == 1:
            few, mlp, out = rows["joint"], block.proj_mlp, block.proj_out
            return {
                "proj_mlp": lambda x: mlp(few.take(x)),
                "attn": lambda **_: few.take(kept["attn"]),
                "proj_out": lambda x: few.put(out(x), kept["proj_out"]),
            }
        attentions = {name: lambda name=name, **_: kept[name] for name in present(block, ("attn", "attn2"))}
        return attentions | {name: partly(name, rows[_MLPS[name]]) for name in present(block, _MLPS)}

    def _tokens(self, attention: Any, seen: dict[str, Tensor], given: dict[str, Any]) -> dict[str, "Tokens"]:
        """Score all tokens of an attention by what its projections gave and what it was called with."""
        streams = streams_of(attention, seen)[:: self.order]
        names = ["joint"] if len(streams) == 1 else ["image", "text"][:: self.order]
        valid = valid_tokens(given)
        if self.cache.score == "norm":
            keys = torch.cat([stream.raw_key for stream in streams], dim=1)
            scores = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32).mean(-1)
        else:
            query, key, *_ = (torch.cat(parts, dim=1) for parts in zip(*streams, strict=True))
            rotary = given.get("image_rotary_emb")
            scores = received(rotated(query, rotary), rotated(key, rotary), valid)
        sizes = [stream.key.shape[1] for stream in streams]
        masks = [None] * len(sizes) if valid is None else valid.split(sizes, dim=1)
        return {name: Tokens(*part) for name, *part in zip(names, scores.split(sizes, dim=1), masks, strict=True)}


# ---- the choice of tokens ----


class Rows(NamedTuple):
    """The tokens of every sample that are computed.

    places: int64 (B, k).
    chosen: bool (B, k), False for what fills up where a sample has fewer; None where none has.
    """

    places: Tensor
    chosen: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """Return the rows of x (B, n, D): (B, k, D)."""
        return x.gather(1, self.places[..., None].expand(-1, -1, x.shape[-1]))

    def put(self, new: Tensor, kept: Tensor) -> Tensor:
        """Write the rows (B, k, D) into `kept` (B, n, D), which is returned."""
        if self.chosen is not None:
            new = torch.where(self.chosen[..., None], new, self.take(kept))
        return kept.scatter_(1, self.places[..., None].expand_as(new), new)


class Tokens:
    """The tokens of a stream, their scores and how long each was left out.

    scores: float32 (B, n), at least 0. valid: bool (B, n), False where a token is padding; None where none is.
    """

    def __init__(self, scores: Tensor, valid: Tensor | None):
        if valid is not None:
            scores = scores.where(valid, 0)
        scores = F.normalize(scores)
        self.scores = scores if valid is None else scores.where(valid, -torch.inf)
        self.count = None if valid is None else valid.sum(1)
        self.age = torch.zeros_like(scores)

    def choose(self, ratio: float, weight: float) -> Rows:
        """Choose int(n · ratio) tokens of the n of each sample, those of highest score + weight · age first."""
        size = self.scores.shape[1]
        k = int(size * ratio)
        ranked = (self.scores + weight * self.age).argsort(dim=1, descending=True, stable=True)
        places, chosen = ranked[:, : max(k, 1)], None
        self.age += 1
        if self.count is not None or k == 0:  # a row that is computed for nothing spares modules empty tensors
            count = torch.full_like(places[:, 0], size) if self.count is None else self.count
            chosen = torch.arange(places.shape[1], device=places.device) < (count.double() * ratio).long()[:, None]
            self.age.scatter_(1, places, self.age.gather(1, places).where(~chosen, 0))
        else:
            self.age.scatter_(1, places, 0)
        return Rows(places, chosen)


def received(query: Tensor, key: Tensor, valid: Tensor | None = None) -> Tensor:
    """Sum over heads and queries the attention that each key receives, a few queries at a time.

    query, key: (B, L, H, D). valid: bool (B, L), False for padding, which gives and receives nothing.
    Returns float32 (B, L).
    """
    batch, length, heads, width = key.shape
    sums = torch.zeros(batch, length, dtype=torch.float32, device=key.device)
    keys = key.permute(0, 2, 3, 1)
    for start in range(0, length, step := max(1, _WEIGHTS // (batch * heads * length))):
        queries = query[:, start : start + step].transpose(1, 2) * width**-0.5
        weights = queries @ keys
        if valid is not None:
            weights = weights.masked_fill(~valid[:, None, None], -torch.inf)
        weights = weights.softmax(-1, dtype=torch.float32)
        if valid is not None:
            weights = weights * valid[:, None, start : start + step, None]
        sums += weights.sum((1, 2))
    return sums
