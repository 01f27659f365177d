"""ControlNets, which are called before the transformer and see the same tokens, with their condition resampled."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .blocks import named_arguments
from .conditions import resampled_channels
from .families import Family
from .patch import LayoutHook, calling_pipeline
from .scheduler import RaluScheduler


def controlnets(pipe: DiffusionPipeline) -> list[Any]:
    """List a pipeline's ControlNets, of which it may have none, one, or several in one module, each once."""
    controlnet = getattr(pipe, "controlnet", None)
    return [] if controlnet is None else list(dict.fromkeys(getattr(controlnet, "nets", [controlnet])))


def check_controlnets(pipe: DiffusionPipeline, family: Family):
    """Raise ValueError for ControlNets that cannot be given other tokens at every stage."""
    for net in controlnets(pipe):
        if type(net.pos_embed) not in family.embedding:
            expected, kind = family.embedding[0].__name__, type(net.pos_embed).__name__
            raise ValueError(f"pipe.controlnet's pos_embed must be a {expected}, got {kind}")
        if getattr(net, "input_hint_block", None) is not None:
            raise ValueError(
                "pipe.controlnet must take latents: one with an input_hint_block (X-Labs) takes the image itself, "
                "which RALU does not resample; use a ControlNet without one, or ralu.disable(pipe)"
            )


class ControlNetHook:
    """A forward pre-hook that gives a ControlNet's calls what `LayoutHook` gives the transformer's, and a condition.

    It knows of no run: the pipeline that calls has it. So pipelines may share a ControlNet.
    """

    def __init__(self, controlnet: nn.Module, nets: list[Any], family: Family):
        self.nets, self.family = nets, family
        self.parameters = named_arguments(controlnet)
        self.handle = controlnet.register_forward_pre_hook(self, with_kwargs=True)

    @staticmethod
    def put_onto(pipe: Any, family: Family):
        """Put it onto a pipeline's ControlNet, unless it is there, and change the position embeddings."""
        nets = controlnets(pipe)
        for net in nets:
            net.pos_embed.__class__ = family.embedding[1]
        if nets and not list(ControlNetHook._of(pipe.controlnet)):
            ControlNetHook(pipe.controlnet, nets, family)

    @staticmethod
    def remove_from(pipe: Any):
        """Take it off a pipeline's ControlNet, if there is one, and what it changed in the position embeddings."""
        if controlnets(pipe):
            for hook in list(ControlNetHook._of(pipe.controlnet)):
                hook.handle.remove()
                for net in hook.nets:
                    hook.family.clear_layout(net)
                    net.pos_embed.__class__ = hook.family.embedding[0]

    @staticmethod
    def _of(controlnet: nn.Module):
        return (hook for hook in controlnet._forward_pre_hooks.values() if isinstance(hook, ControlNetHook))

    @torch.compiler.disable  # the hook is within what `controlnet.compile()` compiles
    def __call__(self, module, args, kwargs):
        """Begin the run at its first call, and set sample, positions and condition of the current layout."""
        pipe, family = calling_pipeline(), self.family
        hook = None if pipe is None else LayoutHook.find(pipe.transformer)
        if hook is None or pipe.scheduler is not hook.scheduler or not hook.scheduler.running:
            for net in self.nets:
                family.clear_layout(net)
            return args, kwargs
        if pipe.controlnet is not module:  # but one of several, and the hook of all has been here
            return args, kwargs
        given, scheduler = dict(zip(self.parameters, args, strict=False)) | kwargs, hook.scheduler
        if scheduler.layout is None:
            hook.start(pipe, given)
            if scheduler.has_regions and scheduler.options.threshold is not None and hook.images_of(pipe, given) > 1:
                raise ValueError(
                    "a ControlNet's attention takes no mask, so the images of a batch must have equal token counts: "
                    "with threshold= generate one at a time, or give ratio="
                )
        layout, grid = scheduler.layout, scheduler.grid
        family.set_sample(given, scheduler.subsample_first(family.sample_of(given)))
        own = family.pack(family.sample_of(given)).shape[2]
        condition = given["controlnet_cond"]
        given["controlnet_cond"] = (
            [self._laid_out(each, own, scheduler) for each in condition]
            if isinstance(condition, list)
            else self._laid_out(condition, own, scheduler)
        )
        for net in self.nets:
            changed = dict(given)  # positions are in the arguments, for all nets the same, or in each net
            family.set_layout(net, changed, layout, grid)
        return (), changed

    def _laid_out(self, condition: Tensor, own: int, scheduler: RaluScheduler) -> Tensor:
        """Bring a condition at full resolution to that of every token. Both are the family's samples.

        own: how many channels a token of the sample has. Behind as many the condition may have a mask's, as SD3's
             inpainting ControlNets have, a value for each latent pixel.
        """
        layout: Any = scheduler.layout
        grid = scheduler.grid
        if layout.resolution == "full":
            return condition
        tokens = resampled_channels(self.family.pack(condition), own, layout, grid, scheduler.full_grid)
        return self.family.unpack(tokens, grid if layout.plan is None else (1, tokens.shape[1]))
