"""Hooks on a transformer's blocks, and what they are told of a call: for the caches that leave out whole blocks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, Protocol

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import CacheContext, StateManager
from torch import Tensor, nn

from .base import Progress

_NAME = "ralu_cache"
_STREAMS = ("hidden_states", "encoder_hidden_states", "temb")


@dataclass(frozen=True, eq=False)
class Call(CacheContext):
    """A call of a transformer: `ralu.enable` makes it the context of the state managers of all hooks.

    Contexts of different names have states of their own: "cond" and "uncond" in FLUX, all layers and "some layers"
    (skip-layer guidance) in SD3.

    progress: None for a call that is of no run: then everything is to be computed, and nothing to be kept.
    images:   I, in the run. Row r of a batch is of image r % I: guidance may double the batch.
    mask:     bool (I, L), which of the images' tokens, and of those of condition images behind them, are no padding;
              None where none is.
    skipped:  indices of the blocks that skip-layer guidance leaves out of this call.
    """

    progress: Progress | None = None
    images: int = 1
    mask: Tensor | None = None
    skipped: tuple[int, ...] = ()


class State(Protocol):
    """What a cache keeps in one context, and what the hooked modules do. It begins as `reset` leaves it."""

    call: Call | None

    def reset(self) -> None:
        """Forget everything."""

    def begin(self, call: Call) -> None:
        """Prepare for the modules of a new call."""

    def enter(self, place: Any, module: Any, args: tuple, kwargs: dict) -> tuple[Any, tuple, dict]:
        """Return a module's output, None where it is to be computed, and the arguments to do so with.

        place: of the module, as in `apply_hooks`.
        """

    def leave(self, place: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        """Return what is to be passed on for an output that was computed with these arguments."""


class Hook(ModelHook):
    """Hand a module's calls to the state of their context."""

    _is_stateful = True

    def __init__(self, place: Any, manager: StateManager):
        super().__init__()
        self.place, self.state_manager = place, manager
        self.forward: Any = None  # the module's, with this hook as the outermost

    # Its own frame is not traced, and neither is the state, which changes from step to step: modules that are compiled
    # still are.
    @partial(torch.compiler.disable, recursive=False)
    def new_forward(self, module, *args, **kwargs):
        """Call the module, or not."""
        compute, call = self.fn_ref.original_forward, self.state_manager._context
        if not isinstance(call, Call) or call.progress is None:
            return compute(*args, **kwargs)
        state, output, args, kwargs = self._enter(call, module, args, kwargs)
        return self._leave(state, args, kwargs, compute(*args, **kwargs)) if output is None else output

    @torch.compiler.disable
    def _enter(self, call, module, args, kwargs):
        state = self.state_manager.get_state()
        if state.call is not call:
            state.call = call
            state.begin(call)
        return state, *state.enter(self.place, module, args, kwargs)

    @torch.compiler.disable
    def _leave(self, state, args, kwargs, output):
        return state.leave(self.place, args, kwargs, output)

    def reset_state(self, module):
        """Forget the states of all contexts."""
        self.state_manager.reset()
        return module


def apply_hooks(modules: Mapping[Any, Any], state: Callable[..., State], *arguments: Any) -> None:
    """Put hooks on modules, by places that `state` knows; in each context they share one `state(*arguments)`."""
    manager = StateManager(state, arguments)
    for place, module in modules.items():
        put_on(module, Hook(place, manager))


def put_on(module: nn.Module, hook: Hook) -> None:
    """Put a hook on a module."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _NAME)
    hook.forward = vars(module)["forward"]


def hooks_of(transformer: nn.Module) -> Iterator[tuple[HookRegistry, Hook]]:
    """List what `apply_hooks` registered, and where."""
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and (hook := registry.get_hook(_NAME)) is not None:
            yield registry, hook


def remove_hooks(transformer: nn.Module) -> None:
    """Undo `apply_hooks`. A forward that others, as offloading does, have wrapped or replaced since stays theirs."""
    for registry, hook in list(hooks_of(transformer)):
        module, outermost = registry._module_ref, registry._hook_order[-1] == _NAME
        forward = vars(module)["forward"]
        registry.remove_hook(_NAME, recurse=False)
        if outermost and forward is not hook.forward:
            hook.fn_ref.forward = hook.fn_ref.original_forward
            module.forward = forward
        if vars(module).get("forward") == MethodType(type(module).forward, module):
            del module.forward


# ---- blocks; all but FLUX.2's single ones take the streams of image and text, and return (text, image) ----


def named_blocks(transformer: Any) -> dict[str, Any]:
    """List a transformer's blocks by name, in the order in which they run."""
    parts = ("transformer_blocks", "single_transformer_blocks")
    return {f"{part}.{i}": block for part in parts for i, block in enumerate(getattr(transformer, part, ()))}


def check_norms(transformer: Any) -> None:
    """Raise ValueError where the weights of blocks' norms are on another device while their block is not called."""
    for name, block in named_blocks(transformer).items():
        registry = getattr(block, "_diffusers_hook", None)
        if registry is not None and registry.get_hook("group_offloading") is not None:
            raise ValueError(
                f"cache needs norms of {name}, which is offloaded as a whole: offload the transformer with "
                "offload_type='leaf_level', or after ralu.enable"
            )


def reused(block: Any) -> list[str]:
    """Name what a block is made of beside norms and modulation; its outputs are all that `modulated` needs."""
    names = ("proj_out",) if hasattr(block, "proj_out") else ("attn", "attn2", "ff", "ff_context", "img_mlp", "txt_mlp")
    return [name for name in names if getattr(block, name, None) is not None]


def modulated(block: Any, args: tuple, kwargs: dict, outputs: Callable[[str], Sequence[Tensor]]) -> Any:
    """Return what a block makes of the outputs of what is `reused` in it, under the modulation of this step.

    args, kwargs: what it is called with. outputs: by the name of a module, of attention in the order of its results.
    """
    from ..blocks import clipped, vectors

    if "temb_mod" in kwargs:  # FLUX.2's single blocks, which have text and image in one stream
        gate = kwargs["temb_mod"].chunk(3, dim=1)[2].unsqueeze(1)
        return clipped(torch.addcmul(kwargs["hidden_states"], gate, outputs("attn")[0]))
    hidden, encoder, temb = streams(args, kwargs)
    if hasattr(block, "proj_out"):
        gate = vectors(block.norm, temb, 3)[2].unsqueeze(1)
        text, image = outputs("proj_out")[0].split([encoder.shape[1], hidden.shape[1]], dim=1)
        return clipped(torch.addcmul(encoder, gate, text)), clipped(torch.addcmul(hidden, gate, image))
    attention, second = outputs("attn"), getattr(block, "attn2", None) is not None
    qwen = hasattr(block, "img_mod")
    mlp, context_mlp = ("img_mlp", "txt_mlp") if qwen else ("ff", "ff_context")
    if "temb_mod_img" in kwargs:  # FLUX.2's, whose modulation all blocks share
        gates, context_gates = (kwargs[name].chunk(6, dim=1) for name in ("temb_mod_img", "temb_mod_txt"))
    elif qwen:
        gates, context_gates = (mod(temb).chunk(6, dim=1) for mod in (block.img_mod, block.txt_mod))
    else:
        gates = vectors(block.norm1, temb, 9 if second else 6)
        context_gates = () if getattr(block, "context_pre_only", False) else vectors(block.norm1_context, temb, 6)
    image = [(gates[2], attention[0]), *([(gates[8], outputs("attn2")[0])] if second else [])]
    for gate, output in (*image, (gates[5], outputs(mlp)[0])):
        hidden = torch.addcmul(hidden, gate.unsqueeze(1), output)
    for output in attention[2:]:  # an IP-adapter's, which has no gate
        hidden = hidden + output
    if not context_gates:
        return None, hidden
    for gate, output in ((context_gates[2], attention[1]), (context_gates[5], outputs(context_mlp)[0])):
        encoder = torch.addcmul(encoder, gate.unsqueeze(1), output)
    return clipped(encoder), clipped(hidden) if qwen else hidden


def modulation_alone(transformer: Any) -> dict[str, float]:
    """Return the shares of a step, see `Cache.shares`, that computes in blocks only what `modulated` does."""
    shares: dict[str, float] = {}
    for name, block in named_blocks(transformer).items():
        parts = ["norm", "norm1", "img_mod", "txt_mod"]
        parts += [] if getattr(block, "context_pre_only", False) else ["norm1_context"]
        shares |= {name: 0.0} | {f"{name}.{part}": 1.0 for part in parts}
    return shares


def streams(args: tuple, kwargs: dict) -> list[Any]:
    """Return what a block is given: the image's stream (B, L, D), the text's (B, T, D), and (B, D) of the time.

    FLUX.2's blocks are given no time but what modulates them: None.
    """
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(_STREAMS)]


def ends(blocks: Iterable[int], call: Call) -> tuple[int, int]:
    """Return the first and the last of these blocks, by index, that a call runs; (-1, -1) where it runs none."""
    run = [index for index in blocks if index not in call.skipped]
    return (run[0], run[-1]) if run else (-1, -1)
