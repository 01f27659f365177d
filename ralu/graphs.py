"""CUDA graphs of a transformer's calls: the host launches a whole step at once, however many kernels it has."""

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ralu_kernels import PackedLayout

from .blocks import logger, named_arguments, unwrapped
from .families import Family
from .patch import LayoutHook, StandIn

DEVICES = ("cuda",)
MOST = 8  # kinds of calls that are kept: a method's stages, with and without guidance


class Unfit(Exception):  # noqa: N818, an ordinary answer
    """Why a call cannot be captured."""


def check_graphs(pipe: DiffusionPipeline, family: Family, cached: bool, threshold: float | None):
    """Raise ValueError for a pipeline whose transformer's calls cannot be captured."""
    model, device, name = pipe.transformer, pipe._execution_device, family.transformer.__name__
    compiled = unwrapped(model) is not model or model._compiled_call_impl is not None
    reasons = {
        f"whether a {name} waits for the device is not known": not family.fused_blocks,
        f"the pipeline is on {device}": device.type not in DEVICES,
        "torch.compile(mode='reduce-overhead') captures graphs of its own": compiled,
        "the transformer is split over processes": getattr(model, "_parallel_config", None) is not None,
        "a cache chooses at every step what is computed": cached,
        "by threshold every image has other numbers of tokens, so give ratio": threshold is not None,
    }
    why = next((why for why, holds in reasons.items() if holds), None)
    if why is None and getattr(LayoutHook.find(model), "cache", None) is None:  # one of ours is taken off before
        why = obstacle(model)
    if why:
        raise ValueError(f"graphs must be False here: {why}")


def obstacle(model: nn.Module) -> str | None:
    """Say what in a model's modules could change its calls behind a graph's back; None if nothing could."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return "LoRA adapters are switched and scaled in Python, so fuse and unload them"
    for name, module in model.named_modules():
        registry = vars(module).get("_diffusers_hook")
        hooked = name and (module._forward_hooks or module._forward_pre_hooks)  # the model's own are outside
        if hooked or "_hf_hook" in vars(module) or (registry is not None and registry.hooks):
            return f"there are hooks on the transformer's {name or 'forward'}, as caches and offloading have"
    return None


class Graphs(StandIn):
    """A transformer's forward that is captured once for each kind of call, such as a stage of a method, and replayed.

    Of a kind are calls with tensors alike in shape, strides, dtype and device, and all other arguments equal. The first
    runs as usual, and so compiles and loads what it needs; the second is captured. From then on its tensors are copied
    into those of the capture, and the result out of it. Before each replay all modules, their hooks and their weights
    are compared, by identity and address: when any was replaced or moved all is captured anew, and what is changed in
    place a graph sees by itself. With LoRA, hooks, gradients, autocast, or sequences of different lengths a call runs
    as usual, which is said once.
    """

    name = "forward"

    def __init__(self, owner: nn.Module):
        super().__init__(owner)
        self.parameters = named_arguments(owner)
        self.modules: list[nn.Module] = []
        self.seen: list[Any] | None = None  # of the modules, when an obstacle was last looked for
        self.calls: dict[Hashable, Call | None] = {}
        self.pool: Any = None
        self.stream: Any = None  # of all captures, on the model's device, which need not be the current one

    def __getstate__(self):
        # A copy has other weights, and may go to another device.
        return vars(self) | {"modules": [], "seen": None, "calls": {}, "pool": None, "stream": None}

    def __call__(self, *args, **kwargs):
        """Compute what the stock forward does (stock signature)."""
        if torch.compiler.is_compiling():
            return self.stock(*args, **kwargs)
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        named = given.pop("return_dict", True)
        try:
            sample = self._replayed(given)
        except Unfit as why:
            logger.warning_once(f"RALU does not capture a call of the transformer: {why}")
            sample = self.stock(**given, return_dict=False)[0]
        return Transformer2DModelOutput(sample=sample) if named else (sample,)

    def _look(self) -> list[Any]:
        """List what a replay goes by. PyTorch's own lists take three times as long."""
        seen: list[Any] = []
        for module in self.modules:
            own = vars(module)
            for x in (*own["_parameters"].values(), *own["_buffers"].values()):
                if x is not None:
                    seen += id(x), x.data_ptr()
            seen += map(id, own["_modules"].values())
            if module is not self.owner:  # whose own hooks are outside
                seen += len(own["_forward_hooks"]), len(own["_forward_pre_hooks"])
            registry = own.get("_diffusers_hook")
            seen += "_hf_hook" in own, registry is not None and len(registry.hooks)
        return seen

    def _replayed(self, given: dict[str, Any]) -> Tensor:
        model = self.owner
        if torch.is_grad_enabled() or torch.is_autocast_enabled(model.device.type):
            raise Unfit("gradients or autocast are on")
        if self.seen is None or self.seen != self._look():
            if why := obstacle(model):
                raise Unfit(why)
            self.modules, self.calls, self.pool, self.stream = list(model.modules()), {}, None, None
            self.seen = self._look()
        # SD3's call of a mixed stage has an argument more: the embedded positions, see `StripPatchEmbed`.
        arguments = given, vars(model.pos_embed).get("strip")
        tensors: list[Tensor] = []
        # What is made in inference mode cannot be written to outside.
        kind = _kind(arguments, tensors), vars(model).get("ralu_fusion"), torch.is_inference_mode_enabled()
        if kind not in self.calls:
            if len(self.calls) == MOST:
                del self.calls[next(iter(self.calls))]
            self.calls[kind] = None
            return self.stock(**given, return_dict=False)[0]
        if (call := self.calls[kind]) is None:
            try:
                call = self.calls[kind] = Call(self, arguments, tensors)
            except RuntimeError as error:  # something waits for the device, and would again
                self.remove()
                raise Unfit(f"capturing failed: {error}") from error
        return call(tensors)


class Call:
    """One kind of call, captured."""

    def __init__(self, graphs: Graphs, arguments: tuple[dict[str, Any], Tensor | None], tensors: list[Tensor]):
        self.inputs, self.graph = [x.clone() for x in tensors], torch.cuda.CUDAGraph()
        self.given, strip = _with(arguments, iter(self.inputs))  # kept: the graph reads the layouts among them, too
        if strip is not None:
            graphs.owner.pos_embed.strip = strip
        if graphs.stream is None:
            graphs.stream = torch.cuda.Stream(graphs.owner.device)
        # PyTorch's own stream is the first captures' device's, and it stays the current one where a capture fails.
        with torch.cuda.stream(graphs.stream), torch.cuda.graph(self.graph, pool=graphs.pool, stream=graphs.stream):
            self.sample = graphs.stock(**self.given, return_dict=False)[0]
        graphs.pool = self.graph.pool()

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        """Return the sample (B, ...) for these tensors among the arguments."""
        for held, x in zip(self.inputs, tensors, strict=True):
            held.copy_(x)
        self.graph.replay()
        return self.sample.clone()


def _kind(value: Any, tensors: list[Tensor]) -> Hashable:
    """Describe an argument, and list its tensors. Raises Unfit for what may change unseen."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, dict):
        return tuple((name, _kind(each, tensors)) for name, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(_kind(each, tensors) for each in value)
    if isinstance(value, PackedLayout) and value.rows is None:
        return value.batch, value.length
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    raise Unfit("its sequences differ in length" if isinstance(value, PackedLayout) else f"it is given {value!r}")


def _with(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Put other tensors into an argument, in the order that `_kind` lists them."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {name: _with(each, tensors) for name, each in value.items()}
    return type(value)(_with(each, tensors) for each in value) if isinstance(value, list | tuple) else value
