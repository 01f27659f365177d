"""Blocks of which a cache computes parts: others stand for their modules for a call, and attention is looked into."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from diffusers.hooks.hooks import StateManager
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from .hooks import Call, Hook, put_on

WHOLE = {"_chunk_size": None}  # where diffusers would call a block's MLPs for a part of the tokens


class State(Protocol):
    """What a cache keeps in one context, and what it does in blocks. It begins as `reset` leaves it."""

    call: Call | None

    def reset(self) -> None:
        """Forget everything."""

    def begin(self, call: Call) -> None:
        """Prepare for the blocks of a new call."""

    def plain(self, place: Any) -> bool:
        """Say whether a block is to be computed as if there were no cache."""

    def run(self, place: Any, block: Any, compute: Callable, args: tuple, kwargs: dict) -> Any:
        """Return a block's output; `compute(*args, **kwargs)` is its own."""


class BlockHook(Hook):
    """Let the state of their context run a block's calls. Plain ones run as compiled, the others uncompiled."""

    @partial(torch.compiler.disable, recursive=False)
    def new_forward(self, module, *args, **kwargs):
        """Call the block, or let the state do it."""
        compute, call = self.fn_ref.original_forward, self.state_manager._context
        if not isinstance(call, Call) or call.progress is None or self._plain(call):
            return compute(*args, **kwargs)
        return self._run(module, compute, args, kwargs)

    @torch.compiler.disable
    def _plain(self, call: Call) -> bool:
        state = self.state_manager.get_state()
        if state.call is not call:
            state.call = call
            state.begin(call)
        return state.plain(self.place)

    @torch.compiler.disable
    def _run(self, module, compute, args, kwargs):
        return self.state_manager.get_state().run(self.place, module, compute, args, kwargs)


def apply_block_hooks(blocks: Mapping[Any, Any], state: Callable[..., State], *arguments: Any) -> None:
    """Put hooks on blocks, by places that `state` knows; in each context they share one `state(*arguments)`."""
    manager = StateManager(state, arguments)
    for place, block in blocks.items():
        put_on(block, BlockHook(place, manager))


# ---- modules that stand for others ----


def present(module: Any, names: Iterable[str]) -> list[str]:
    """List those of the names under which a module has something."""
    return [name for name in names if getattr(module, name, None) is not None]


@contextmanager
def replaced(module: nn.Module, parts: dict[str, Any]) -> Iterator[None]:
    """Let others stand for a module's attributes: what an object holds itself comes before its submodules."""
    own = vars(module)
    before = {name: own[name] for name in parts if name in own}
    own.update(parts)
    try:
        yield
    finally:
        for name in parts:
            del own[name]
        own.update(before)


# ---- attention ----

# A stream's projections, the same in one (`fuse_qkv_projections`), and the norms of queries and keys.
_STREAMS = (
    (("to_q", "to_k", "to_v"), "to_qkv", ("norm_q", "norm_k")),
    (("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv", ("norm_added_q", "norm_added_k")),
)


class Stream(NamedTuple):
    """A stream's queries, keys and values, (B, n, H, D) each; keys also as they are before their norm."""

    query: Tensor
    key: Tensor
    value: Tensor
    raw_key: Tensor


@contextmanager
def watched(attention: Any) -> Iterator[dict[str, Tensor]]:
    """Collect what an attention's projections give, by their names, while it is called."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable:
        module = getattr(attention, name)

        def call(x: Tensor) -> Tensor:
            seen[name] = module(x)
            return seen[name]

        return call

    names = [name for apart, together, _ in _STREAMS for name in (*apart, together)]
    with replaced(attention, {name: watch(name) for name in present(attention, names)}):
        yield seen


def project(attention: Any, *inputs: Tensor) -> dict[str, Tensor]:
    """Compute an attention's projections of the image's stream and, where there is one, the text's, (B, n, D) each."""
    seen: dict[str, Tensor] = {}
    for x, (apart, together, _) in zip(inputs, _STREAMS, strict=False):
        names = (together,) if attention.fused_projections else apart
        seen |= {name: getattr(attention, name)(x) for name in names}
    return seen


def streams_of(attention: Any, seen: dict[str, Tensor]) -> list[Stream]:
    """Make the streams, of the image and, where it is apart, of the text, of what the projections gave."""
    streams = []
    for apart, together, norms in _STREAMS:
        if together in seen or apart[0] in seen:
            parts = seen[together].chunk(3, dim=-1) if together in seen else [seen[name] for name in apart]
            q, k, v = (part.unflatten(-1, (attention.heads, -1)) for part in parts)
            norm_q, norm_k = (getattr(attention, name) for name in norms)
            streams.append(Stream(q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v, k))
    return streams


def valid_tokens(given: dict[str, Any]) -> Tensor | None:
    """Return which tokens of the joint sequence are no padding, bool (B, L), by an attention's arguments; None: all."""
    layout, mask = given.get("sequences"), given.get("attention_mask")
    if layout is None:
        return mask if mask is not None and mask.ndim == 2 else None  # no padding is told by others
    return None if layout.inverse is None else layout.inverse.view(layout.batch, layout.length) >= 0


def rotated(x: Tensor, rotary: Any) -> Tensor:
    """Turn queries or keys (B, L, H, D) by FLUX's rotary table; without one, (SD3) return them."""
    return x if rotary is None else apply_rotary_emb(x, rotary, sequence_dim=1)
