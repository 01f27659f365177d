"""FLUX: per-sample positions in a batch, and what a stock `FluxPipeline` needs to take a `RaluScheduler`."""

from collections.abc import Callable
from contextlib import ExitStack

import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor

from .blocks import fused, unwrapped
from .scheduler import RaluScheduler
from .stages import unpack

T5 = "text_encoder_2"


class PerSample:
    """A rotary table with one set of rows a sample, (B, S, D), where `apply_rotary_emb` expects one for all, (S, D)."""

    def __init__(self, table: Tensor):
        self.table = table

    def __getitem__(self, index):  # diffusers asks for [None, :, None, :]
        return self.table.unsqueeze(2)

    def to(self, *args, **kwargs):
        return PerSample(self.table.to(*args, **kwargs))


class BatchedPosEmbed(FluxPosEmbed):
    """`FluxPosEmbed` that also takes per-sample ids of shape (S, 1, B, 3)."""

    def forward(self, ids: Tensor):
        if ids.ndim == 2:
            return super().forward(ids)
        length, _, batch, axes = ids.shape
        tables = super().forward(ids.reshape(length * batch, axes))
        return tuple(PerSample(table.view(length, batch, -1).transpose(0, 1).contiguous()) for table in tables)


class LayoutHook:
    """A forward pre-hook that gives every transformer call the positions of the scheduler's current layout."""

    def __init__(self, scheduler: RaluScheduler, token_pixels: int):
        self.scheduler = scheduler
        self.token_pixels = token_pixels

    def __call__(self, module, args, kwargs):
        scheduler = self.scheduler
        if not scheduler.running:
            return args, kwargs
        sample, text_ids = kwargs["hidden_states"], kwargs["txt_ids"]
        if scheduler.layout is None:
            # Counted and not read off the last id: bfloat16 ids are inexact from 257 on.
            columns = int((kwargs["img_ids"][:, 1] == 0).sum())
            scheduler.start(sample, (len(kwargs["img_ids"]) // columns, columns), self.token_pixels)
        layout = scheduler.layout
        kwargs["hidden_states"] = scheduler.subsample_first(sample)
        batch = layout.positions.shape[0]
        ids = F.pad(layout.positions, (1, 0))  # axis 0 is unused by text-to-image
        kwargs["img_ids"] = ids.transpose(0, 1).unsqueeze(1)  # (L, 1, B, 3)
        kwargs["txt_ids"] = text_ids[:, None, None].expand(-1, 1, batch, -1).to(ids.dtype)
        if layout.mask is not None:
            if fused(module):
                mask = {"image_mask": layout.mask}
            else:
                mask = {"attention_mask": F.pad(layout.mask, (len(text_ids), 0), value=True)}  # over [text, image]
            kwargs["joint_attention_kwargs"] = {**(kwargs.get("joint_attention_kwargs") or {}), **mask}
        return args, kwargs


def decode(pipe: DiffusionPipeline, tokens: Tensor, grid: tuple[int, int], decoder: Callable | None = None) -> Tensor:
    """Latents as tokens (B, h·w, C), FLUX's or SD3's, to images (B, 3, H, W) in [-1, 1]; the decoder is the VAE's."""
    latents = unpack(tokens, grid) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return (decoder or pipe.vae.decode)(latents.to(pipe.vae.dtype), return_dict=False)[0]


def install(pipe: FluxPipeline, scheduler: RaluScheduler, undo: ExitStack):
    """Put the hook and the position embedding into the pipeline; `undo` takes them out again."""
    transformer = unwrapped(pipe.transformer)
    scheduler.bind(lambda tokens, grid: decode(pipe, tokens, grid), transformer._reset_stateful_cache)
    undo.callback(scheduler.unbind)
    undo.callback(transformer._reset_stateful_cache)

    stock = transformer.pos_embed
    transformer.pos_embed = BatchedPosEmbed(stock.theta, stock.axes_dim)
    undo.callback(setattr, transformer, "pos_embed", stock)

    # On the outside: what torch.compile traces, and what offloading wraps anew on every call, lies within.
    hook = LayoutHook(scheduler, pipe.vae_scale_factor * 2)
    undo.callback(pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True).remove)

    # An interrupted run ends in any stage, and the pipeline decodes what it has.
    unpack = pipe._unpack_latents
    pipe._unpack_latents = lambda latents, *size: unpack(scheduler.finish(latents), *size)
    undo.callback(delattr, pipe, "_unpack_latents")
