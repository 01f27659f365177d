"""What `enable` puts into a pipeline: attributes, found by their type, that copy and pickle with what they are in."""

import inspect
import sys
from weakref import WeakSet

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.hooks import StateManager
from torch import Tensor, nn

from .blocks import named_arguments, unwrapped
from .scheduler import RaluScheduler


def calling_pipeline() -> DiffusionPipeline | None:
    """The pipeline that is being called, the innermost one.

    `from_pipe` shares schedulers, transformers and VAEs between pipelines, and nobody tells them whose call it is.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_varnames[:1] == ("self",):
            owner = frame.f_locals["self"]
            if isinstance(owner, DiffusionPipeline):
                return owner
        frame = frame.f_back
    return None


def reset_caches(transformer: nn.Module):
    """Forget what diffusers' caches hold of earlier tokens, and keep their contexts, which SD3's caller sets once."""
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is None:
            continue
        managers = [x for hook in registry.hooks.values() for x in vars(hook).values() if isinstance(x, StateManager)]
        contexts = [manager._context for manager in managers]
        registry.reset_stateful_hooks(recurse=False)
        for manager, context in zip(managers, contexts, strict=True):
            manager.set_context(context)


class StandIn:
    """A method of one object, replaced by an attribute until `remove`. Subclasses say which and what it does."""

    name: str

    def __init__(self, owner):
        self.owner, self.before = owner, vars(owner).get(self.name)
        setattr(owner, self.name, self)

    @classmethod
    def put_into(cls, owner):
        """Once is enough, though somebody may have wrapped it since."""
        if not any(isinstance(value, cls) for value in vars(owner).values()):
            cls(owner)

    @property
    def stock(self):
        """The method as it was before."""
        if self.before is not None:
            return self.before
        return inspect.getattr_static(type(self.owner), self.name).__get__(self.owner)

    def remove(self):
        delattr(self.owner, self.name)
        if self.before is not None:
            setattr(self.owner, self.name, self.before)


def remove_stand_ins(owner):
    for value in list(vars(owner).values()):
        if isinstance(value, StandIn):
            value.remove()


class LayoutHook:
    """A forward pre-hook that gives a transformer's calls the sample and positions of the scheduler's current layout.

    It knows what `disable` needs besides: the stock scheduler, the pipelines that have run with this one, and
    how the transformer was fused.
    """

    part: str  # the transformer's position embedding, which becomes another class while this hook is there
    stock_class: type
    own_class: type

    def __init__(self, pipe: DiffusionPipeline, scheduler: RaluScheduler):
        self.scheduler, self.stock = scheduler, pipe.scheduler
        self.pipes = WeakSet([pipe])
        self.token_pixels = pipe.vae_scale_factor * 2
        self.parameters = named_arguments(pipe.transformer)
        self.fused, self.fused_before = False, None
        self._embedding(pipe.transformer).__class__ = self.own_class
        # On the outside: what torch.compile traces, and what offloading wraps anew on every call, lies within.
        self.handle = pipe.transformer.register_forward_pre_hook(self, with_kwargs=True)

    @classmethod
    def check(cls, transformer: nn.Module):
        kind = type(cls._embedding(transformer))
        if kind not in (cls.stock_class, cls.own_class):
            raise ValueError(f"pipe.transformer.pos_embed must be a {cls.stock_class.__name__}, got {kind.__name__}")

    @staticmethod
    def _embedding(transformer: nn.Module) -> nn.Module:
        return unwrapped(transformer).pos_embed

    @staticmethod
    def find(transformer: nn.Module) -> "LayoutHook | None":
        hooks = [*transformer._forward_pre_hooks.values(), *unwrapped(transformer)._forward_pre_hooks.values()]
        return next((hook for hook in hooks if isinstance(hook, LayoutHook)), None)

    def remove(self, transformer: nn.Module):
        self.handle.remove()
        self._embedding(transformer).__class__ = self.stock_class

    def __getstate__(self):
        return self.__dict__ | {"pipes": None}  # the copy has been in no pipeline yet

    def __setstate__(self, state):
        self.__dict__ = state | {"pipes": WeakSet()}

    @torch.compiler.disable  # the hook is within what `transformer.compile()` compiles
    def __call__(self, module, args, kwargs):
        pipe = calling_pipeline() if self.scheduler.running else None
        if not self.scheduler.running or (pipe is not None and pipe.scheduler is not self.scheduler):
            return self.pass_on(module, args, kwargs)
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        return (), self.lay_out(module, given, pipe)

    def pass_on(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A call that is none of RALU's."""
        return args, kwargs

    def lay_out(self, module: nn.Module, given: dict[str, Tensor], pipe: DiffusionPipeline | None) -> dict[str, Tensor]:
        """The arguments of a call, by name -> what the model is to get."""
        raise NotImplementedError
