"""FLUX: per-sample positions in a batch, and what a stock `FluxPipeline` needs to take a `RaluScheduler`."""

from collections.abc import Callable

import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor

from .blocks import fused, unwrapped
from .patch import LayoutHook, StandIn, calling_pipeline, reset_caches
from .scheduler import RaluScheduler

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


class Hook(LayoutHook):
    stock_class, own_class = FluxPosEmbed, BatchedPosEmbed

    def lay_out(self, module, given, pipe):
        scheduler, sample, text_ids = self.scheduler, given["hidden_states"], given["txt_ids"]
        if scheduler.layout is None:
            # Counted and not read off the last id: bfloat16 ids are inexact from 257 on.
            columns = int((given["img_ids"][:, 1] == 0).sum())
            scheduler.start(sample, (len(given["img_ids"]) // columns, columns), self.token_pixels)
        layout = scheduler.layout
        given["hidden_states"] = scheduler.low_noise(sample)
        batch = layout.positions.shape[0]
        ids = F.pad(layout.positions, (1, 0))  # axis 0 is unused by text-to-image
        given["img_ids"] = ids.transpose(0, 1).unsqueeze(1)  # (L, 1, B, 3)
        given["txt_ids"] = text_ids[:, None, None].expand(-1, 1, batch, -1).to(ids.dtype)
        if layout.mask is not None:
            if fused(module):
                mask = {"image_mask": layout.mask}
            else:
                mask = {"attention_mask": F.pad(layout.mask, (len(text_ids), 0), value=True)}  # over [text, image]
            given["joint_attention_kwargs"] = {**(given.get("joint_attention_kwargs") or {}), **mask}
        return given


class Unpacking(StandIn):
    """An interrupted run ends in any stage, and the pipeline decodes what it has; callbacks unpack what they like."""

    name = "_unpack_latents"

    def __call__(self, latents: Tensor, *size, **named):
        pipe = self.owner
        layout = getattr(pipe.scheduler, "layout", None)
        # The pipeline sets its timestep to None after its loop, so no callback's call is taken for its own.
        ended = layout is not None and calling_pipeline() is pipe and pipe.current_timestep is None
        if ended and latents.shape[:2] == layout.positions.shape[:2]:
            latents = pipe.scheduler.full_resolution(latents)
        return self.stock(latents, *size, **named)


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, h·w, 4C) in raster order to latent pixels (B, C, 2h, 2w)."""
    # Contiguous, as latents are at the start: other strides would cost compiled models another graph.
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), 2).contiguous()


def decode(pipe: DiffusionPipeline, tokens: Tensor, grid: tuple[int, int], decoder: Callable | None = None) -> Tensor:
    """Latents as tokens (B, h·w, C), FLUX's or SD3's, to images (B, 3, H, W) in [-1, 1]; the decoder is the VAE's."""
    latents = unpack(tokens, grid) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return (decoder or pipe.vae.decode)(latents.to(pipe.vae.dtype), return_dict=False)[0]


def bind(pipe: FluxPipeline, scheduler: RaluScheduler):
    """Make the scheduler this pipeline's, and the pipeline ready for interruptions."""
    Unpacking.put_into(pipe)
    decoder = None if pipe.vae is None else lambda tokens, grid: decode(pipe, tokens, grid)
    scheduler.bind(decoder, lambda: reset_caches(unwrapped(pipe.transformer)))
