"""The attributes that `enable` sets in a pipeline. They are found by their type, and copied and pickled with it."""

import inspect
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from types import FrameType
from typing import Any
from weakref import WeakSet

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import StateManager, _set_cache_context
from torch import Tensor, nn

from .blocks import named_arguments, unwrapped
from .caches import CACHES, Cache, Progress
from .caches.hooks import Call
from .conditions import resampled_channels
from .families import Family
from .layout import Layout
from .scheduler import RaluScheduler


def calling_pipeline() -> Any:
    """Find the innermost pipeline that is being called, on the stack; None where there is none.

    `from_pipe` shares schedulers, transformers and VAEs between pipelines, and their calls do not say which one calls.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_varnames[:1] == ("self",):
            owner = frame.f_locals["self"]
            if isinstance(owner, DiffusionPipeline):
                return owner
        frame = frame.f_back
    return None


def stateful(transformer: nn.Module) -> Iterator[tuple[HookRegistry, list[StateManager]]]:
    """List the registries of diffusers' hooks on a model's modules that keep something from call to call."""
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and (managers := managers_of(registry)):
            yield registry, managers


def managers_of(registry: HookRegistry) -> list[StateManager]:
    """List what the hooks of one module keep from call to call."""
    hooks = registry.hooks.values()
    return [value for hook in hooks for value in vars(hook).values() if isinstance(value, StateManager)]


def reset_caches(transformer: nn.Module):
    """Forget what diffusers' caches hold of earlier tokens, and keep their contexts, which SD3's caller sets once."""
    for registry, managers in stateful(transformer):
        contexts = [manager._context for manager in managers]
        registry.reset_stateful_hooks(recurse=False)
        for manager, context in zip(managers, contexts, strict=True):
            manager.set_context(context)


def hooks_changed(transformer: nn.Module):
    """Let diffusers look anew for hooks on a model's modules, of which it keeps a list."""
    HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()


class StandIn:
    """An attribute that replaces a method of one object until `remove`. Subclasses define which, and what it does."""

    name: str

    def __init__(self, owner):
        self.owner, self.before = owner, vars(owner).get(self.name)
        setattr(owner, self.name, self)

    @classmethod
    def put_into(cls, owner):
        """Replace the owner's method, unless it is already, wrapped by somebody else or not."""
        if not any(isinstance(value, cls) for value in vars(owner).values()):
            cls(owner)

    @property
    def stock(self):
        """The method as it was before."""
        if self.before is not None:
            return self.before
        return inspect.getattr_static(type(self.owner), self.name).__get__(self.owner)

    def remove(self):
        """Put back what was there before."""
        delattr(self.owner, self.name)
        if self.before is not None:
            setattr(self.owner, self.name, self.before)


def remove_stand_ins(owner):
    """Remove all of an object's stand-ins."""
    for value in list(vars(owner).values()):
        if isinstance(value, StandIn):
            value.remove()


class Unpacking(StandIn):
    """Bring the latents of an interrupted run, in any stage, to full resolution before they are decoded."""

    name = "_unpack_latents"

    def __call__(self, latents: Tensor, *size, **named):
        """Unpack latents (B, L, C), brought to full resolution where an interrupted run left them."""
        pipe = self.owner
        layout: Any = getattr(pipe.scheduler, "layout", None)
        # Pipelines that have a timestep set it to None after the loop, so no callback's call is taken for their own.
        ended = layout is not None and calling_pipeline() is pipe and getattr(pipe, "current_timestep", None) is None
        if ended and pipe.interrupt and latents.shape[:2] == layout.positions.shape[:2]:
            latents = pipe.scheduler.full_resolution(latents)
        return self.stock(latents, *size, **named)


class Strength(StandIn):
    """Take an image-to-image pipeline's strength for a noise level, whatever the number of steps that are made."""

    name = "get_timesteps"

    def __call__(self, num_inference_steps: int, strength: float, *args, **kwargs):
        """Return the timesteps to make and their number (stock signature), and tell the scheduler where it begins."""
        scheduler = self.owner.scheduler
        if not isinstance(scheduler, RaluScheduler):
            return self.stock(num_inference_steps, strength, *args, **kwargs)
        if not scheduler.running:  # SD3's pipelines count the steps asked for, and not those of "stock-STEPS"
            return self.stock(len(scheduler.timesteps), strength, *args, **kwargs)
        timesteps = scheduler.begin_at(strength)
        return timesteps, len(timesteps)


class Masking(StandIn):
    """Keep what an inpainting pipeline repaints until its run begins: it may prepare that before the timesteps."""

    name = "prepare_mask_latents"
    painted: Tensor | None = None

    def __call__(self, *args, **kwargs):
        """Prepare a mask in pixels, (B, 1, H, W), or with FLUX.1's controls an image (stock signature)."""
        given = inspect.signature(self.stock).bind(*args, **kwargs).arguments
        if "mask" in given:
            self.painted = given["mask"]
        else:
            size = {"height": given["height"], "width": given["width"]}
            self.painted = self.owner.mask_processor.preprocess(given["mask_image"], **size)
        return self.stock(*args, **kwargs)

    @staticmethod
    def taken_from(pipe: Any) -> Tensor | None:
        """Return what this call of a pipeline repaints, (B, 1, H, W), 1 where it paints. The next has a mask anew."""
        masking = vars(pipe).get(Masking.name)
        if not isinstance(masking, Masking):
            return None
        painted, masking.painted = masking.painted, None
        return painted


class WholeDecode(StandIn):
    """Bring the latents of an interrupted run, which may end in any stage, to full resolution before they are decoded.

    The decoder alone sees those latents: nothing of the pipeline's own is called between its loop and the decoding. A
    preview in a callback is of the whole image already, and what the caller decodes afterwards is the caller's.
    """

    name = "decode"

    def __call__(self, latents: Tensor, *args, **kwargs):
        """Decode latents (B, C, h, w), brought to full resolution where an interrupted run left them."""
        pipe = calling_pipeline()
        scheduler: Any = getattr(pipe, "scheduler", None)
        layout = getattr(scheduler, "layout", None)
        if layout is not None and pipe.interrupt and latents.shape[-2:] == _size(layout, scheduler.grid):
            latents = scheduler.full_resolution(latents)
        return self.stock(latents, *args, **kwargs)


def _size(layout: Layout, grid: tuple[int, int]) -> tuple[int, int] | None:
    """Return the height and width of the latents (B, C, H, W) that hold a layout's tokens; None where it is full."""
    (h, w), length = grid, layout.positions.shape[1]
    return {"low": (2 * h, 2 * w), "mixed": (2, 2 * length)}.get(layout.resolution)


class LayoutHook:
    """A forward pre-hook that gives a transformer's calls the sample and positions of the scheduler's current layout.

    It holds what `disable` needs besides: the stock scheduler, the pipelines that have run with this one, the cache,
    and how the transformer was fused.
    """

    def __init__(self, pipe: DiffusionPipeline, scheduler: RaluScheduler, family: Family):
        self.scheduler, self.stock, self.family = scheduler, pipe.scheduler, family
        self.cache: Cache | None = None
        self.called: tuple[Progress | None, int] = None, 0  # where the last call was, and which of its step's
        self.copied = False
        self.pipes = WeakSet([pipe])
        self.parameters = named_arguments(pipe.transformer)
        self.fused = False
        self.fused_before: dict[str, Any] | None = None
        self._embedding(pipe.transformer).__class__ = family.embedding[1]
        # On the outside: what torch.compile traces, and what offloading wraps anew on every call, lies within.
        self.handle = pipe.transformer.register_forward_pre_hook(self, with_kwargs=True)

    @staticmethod
    def find(transformer: nn.Module) -> "LayoutHook | None":
        """Return the hook of an enabled transformer."""
        hooks = [*transformer._forward_pre_hooks.values(), *unwrapped(transformer)._forward_pre_hooks.values()]
        return next((hook for hook in hooks if isinstance(hook, LayoutHook)), None)

    def remove(self, transformer: nn.Module):
        """Take the hook off, and what it changed in the position embedding."""
        self.handle.remove()
        self.family.clear_layout(transformer)
        self._embedding(transformer).__class__ = self.family.embedding[0]

    def _embedding(self, transformer: nn.Module) -> Any:
        return getattr(unwrapped(transformer), self.family.embedding_name)

    def __reduce_ex__(self, protocol):
        """Make it ready to be pickled. Raises TypeError with a cache: how diffusers puts hooks on cannot be pickled."""
        if self.cache is not None:
            raise TypeError(
                "a pipeline with a cache cannot be pickled or saved by torch.save: call ralu.disable(pipe) before it, "
                "and ralu.enable after it is loaded. copy.deepcopy and save_pretrained work"
            )
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__setstate__(deepcopy(self.__getstate__(), memo))
        return twin

    def __getstate__(self):
        return self.__dict__ | {"pipes": None, "copied": True}  # the copy has been in no pipeline yet

    def __setstate__(self, state):
        self.__dict__ = state | {"pipes": WeakSet()}

    def renew_cache(self, transformer: nn.Module):
        """Put a copy's cache on anew: diffusers' hooks, copied, still call the original's."""
        if self.copied and self.cache is not None:
            self.cache.remove(transformer)
            self.cache.apply(transformer)
            hooks_changed(transformer)
        self.copied = False

    @torch.compiler.disable  # the hook is within what `transformer.compile()` compiles
    def __call__(self, module, args, kwargs):
        """Begin the run at its first call, and set sample, positions and masks of the current layout."""
        scheduler = self.scheduler
        pipe = calling_pipeline() if scheduler.running or self.cache is not None else None
        if self.cache is not None:
            self._set_context(unwrapped(module), pipe, dict(zip(self.parameters, args, strict=False)) | kwargs)
        if not scheduler.running or (pipe is not None and pipe.scheduler is not scheduler):
            self.family.clear_layout(module)  # a call that is none of RALU's
            return args, kwargs
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        if scheduler.layout is None:
            self.start(pipe, given)
        self.family.set_sample(given, self._laid_out(module, self.family.sample_of(given)))
        self.family.set_layout(module, given, scheduler.layout, scheduler.grid)
        return (), given

    def _laid_out(self, module: nn.Module, sample: Tensor) -> Tensor:
        """Bring a call's sample to the layout's tokens, and channels behind its own. Tokens behind it stay."""
        scheduler = self.scheduler
        layout: Any = scheduler.layout
        if count := layout.conditions:
            return torch.cat([scheduler.subsample_first(sample[:, :-count]), sample[:, -count:]], dim=1)
        own = self.family.own_channels(unwrapped(module))
        if own is None or sample.shape[2] == own:
            return scheduler.subsample_first(sample)
        beside = resampled_channels(sample[..., own:], own, layout, scheduler.grid, scheduler.full_grid)
        return torch.cat([scheduler.subsample_first(sample[..., :own]), beside], dim=2)

    def start(self, pipe: Any, given: dict):
        """Begin a run at its first call, with these arguments. Raises ValueError for one that cannot be served."""
        sample, count = self.family.sample_of(given), self.family.condition_tokens(given)
        if count:
            sample = sample[:, :-count]
        grid, images = self.family.grid_of(given), self.images_of(pipe, given)
        if pipe is not None:
            self.scheduler.repaint(Masking.taken_from(pipe))
        self.scheduler.start(sample, grid, images, count)
        if (parallel := self.scheduler.parallel) is not None:
            schedule: Any = self.scheduler.schedule
            parallel.check(schedule, grid, count, given["encoder_hidden_states"].shape[1], images)

    def images_of(self, pipe: Any, given: dict) -> int:
        """Count the images of a call, which guidance may double."""
        doubled = self.family.batched_guidance and pipe is not None and pipe.do_classifier_free_guidance
        return len(self.family.sample_of(given)) // (2 if doubled and given.get("skip_layers") is None else 1)

    def _set_context(self, transformer: Any, pipe: Any, given: dict):
        """Tell the cache's hooks of a call."""
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        before = next((m._context for r in registry._get_child_registries() for m in managers_of(r)), None)
        skipped = given.get("skip_layers")
        ours, layout = pipe is None or pipe.scheduler is self.scheduler, self.scheduler.layout
        progress = self.scheduler.progress if ours else None
        if progress is not None and progress.run_step == 0:
            self._check_conditions(given)
        # Many pipelines set no context. Calls for other layers have a history of their own, and so have the second ones
        # of a step, and those that guidance, which Z-Image may stop on the way, does not double any more.
        where, count = self.called
        self.called = progress, count + 1 if progress == where else 0
        if skipped is not None:
            name = "some layers"
        elif before is None or isinstance(before, Call):
            name = f"all layers, {len(self.family.sample_of(given))} rows, call {self.called[1]}"
        else:
            name = before.name
        call = Call(
            name,
            progress=progress,
            images=self.images_of(pipe, given),
            mask=None if layout is None else layout.mask_with_conditions,
            skipped=tuple(skipped or ()),
        )
        _set_cache_context(transformer, call)

    def _check_conditions(self, given: dict):
        """Raise ValueError for a call with tokens of condition images that the cache does not serve."""
        cache: Any = type(self.cache)
        if not cache.takes_conditions and self.family.condition_tokens(given):
            fitting = ", ".join(name for name, kind in CACHES.items() if kind.takes_conditions)
            raise ValueError(
                f"cache must be None or one of {fitting} where an image is a condition, got {cache.__name__}"
            )


def decode_latents(pipe: DiffusionPipeline, latents: Tensor, decode: Callable | None = None) -> Tensor:
    """Decode latents (B, C, H, W) of a VAE with one scale and shift. decode: stands for the VAE's own."""
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return (decode or pipe.vae.decode)(latents.to(pipe.vae.dtype), return_dict=False)[0]


def encode_images(pipe: DiffusionPipeline, images: Tensor) -> Tensor:
    """Encode images (B, 3, H, W) in [-1, 1] by a VAE with one scale and shift, to the means of its latents."""
    encoded = pipe.vae.encode(images.to(pipe.vae.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
