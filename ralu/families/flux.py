"""FLUX.1: per-sample positions in a batch, and how its blocks run on `ralu_kernels`."""

from collections.abc import Mapping
from functools import partial
from math import isqrt
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from ..blocks import Processor, clipped, feed_forward, is_fused, operations, unwrapped, vectors
from ..layout import Layout, pack, unpack
from ..parallel import context_of
from ..patch import Unpacking, decode_latents, encode_images
from . import Family, FusedBlock
from ._published import CLIP_L, KL_VAE, T5_XXL


class PerSample:
    """A rotary table with one set of rows a sample, (B, S, D), where `apply_rotary_emb` expects one for all, (S, D)."""

    def __init__(self, table: Tensor):
        self.table = table

    def __getitem__(self, index):  # diffusers asks for [None, :, None, :]
        return self.table.unsqueeze(2)

    def to(self, *args, **kwargs):
        """Return the table on another device or in another dtype."""
        return PerSample(self.table.to(*args, **kwargs))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Join tables, as FLUX.2 does the text's and the image's along the dimension where others have their rows."""
        if func is not torch.cat:
            return NotImplemented
        return cls(torch.cat([each.table for each in args[0]], dim=1))


class PerSampleIds(nn.Module):
    """Make a position embedding also take per-sample ids, of shape (S, 1, B, axes)."""

    def forward(self, ids: Tensor):
        """Make cosines and sines, (S, D) of ids (S, axes) and `PerSample` of (B, S, D) of ids (S, 1, B, axes)."""
        if ids.ndim == 2:
            return super().forward(ids)
        length, _, batch, axes = ids.shape
        tables = super().forward(ids.reshape(length * batch, axes))
        return tuple(PerSample(table.view(length, batch, -1).transpose(0, 1).contiguous()) for table in tables)


class BatchedPosEmbed(PerSampleIds, FluxPosEmbed):
    """`FluxPosEmbed` that also takes per-sample ids of shape (S, 1, B, 3)."""


# ---- blocks: the stock forwards with the same parameters and results ----


def _flux_double(
    block, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
):  # fmt: skip
    ops = operations(block)
    shift, scale, *image = vectors(block.norm1, temb, 6)
    text_shift, text_scale, *text = vectors(block.norm1_context, temb, 6)
    attention, text_attention = block.attn(
        hidden_states=ops.modulate(hidden_states, shift, scale),
        encoder_hidden_states=ops.modulate(encoder_hidden_states, text_shift, text_scale),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    gate, *rest = image
    hidden_states = feed_forward(ops, hidden_states, gate, attention, *rest, block.ff)
    gate, *rest = text
    text = feed_forward(ops, encoder_hidden_states, gate, text_attention, *rest, block.ff_context)
    return clipped(text), hidden_states


def _flux_single(
    block, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
):  # fmt: skip
    ops = operations(block)
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = vectors(block.norm, temb, 3)
    normed = ops.modulate(x, shift, scale)
    mlp = block.proj_mlp(normed)
    attention = block.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    x = clipped(ops.gated_add(x, gate, block.proj_out(ops.concat_gelu(attention, mlp))))
    return x.split_with_sizes([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)


class Flux(Family):
    """FLUX.1: tokens travel as tokens, and text and image have rotary positions."""

    name = "flux"
    transformer = FluxTransformer2DModel
    embedding = (FluxPosEmbed, BatchedPosEmbed)
    fused_blocks: ClassVar = {
        FluxTransformerBlock: FusedBlock(_flux_double, Processor),
        FluxSingleTransformerBlock: FusedBlock(_flux_single, Processor),
    }
    stock_processors = (FluxAttnProcessor,)
    text_first = True
    image_alone = False
    t5 = "text_encoder_2"
    joins_clip = False
    text_tokens = 512
    published: ClassVar = {"flux-dev": {"guidance_embeds": True}, "flux-schnell": {}}
    vae = KL_VAE
    encoders: ClassVar = {"text_encoder": (CLIPTextModel, CLIP_L), "text_encoder_2": (T5EncoderModel, T5_XXL)}
    takes_mask = True
    guided = False
    batched_guidance = False
    context_parallel = True

    def check(self, transformer: FluxTransformer2DModel) -> None:
        """Raise ValueError for channels behind the sample's that are neither latents nor latents and a mask."""
        own, given = self.own_channels(transformer), transformer.config.in_channels
        mask = given - 2 * own
        if given != own and (mask < 0 or mask != 4 * isqrt(mask // 4) ** 2):
            raise ValueError(
                f"pipe.transformer.config.in_channels must be {own}, {2 * own} with a control image, or with a masked "
                f"image and a mask of s x s pixels {2 * own} + 4·s², got {given}"
            )

    def own_channels(self, transformer: FluxTransformer2DModel) -> int:
        """Count what the model makes."""
        return transformer.out_channels

    def condition_tokens(self, arguments: dict) -> int:
        """Count Kontext's, whose axis 0 is not the image's."""
        return int(arguments["img_ids"][:, 0].count_nonzero())

    def grid_of(self, arguments: dict) -> tuple[int, int]:
        """Count rows and columns, and not read them off the last id: bfloat16 ids are inexact from 257 on."""
        ids = arguments["img_ids"]
        ids = ids[ids[:, 0] == 0]
        columns = int((ids[:, 1] == 0).sum())
        return len(ids) // columns, columns

    def set_layout(self, module: Any, arguments: dict, layout: Layout, grid: tuple[int, int]) -> None:
        """Give the call ids of its own for every sample, float32 (L, 1, B, 3); text and conditions keep theirs."""
        text_ids, batch = arguments["txt_ids"], layout.positions.shape[0]
        ids = F.pad(layout.positions, (1, 0))  # axis 0 tells condition images apart
        if layout.conditions:
            own = arguments["img_ids"][-layout.conditions :].to(ids.dtype)
            ids = torch.cat([ids, own.expand(batch, -1, -1)], dim=1)
        if context_of(unwrapped(module)) is not None:  # which splits ids of one image, the same for all
            arguments["img_ids"], arguments["txt_ids"] = ids[0], text_ids.to(ids.dtype)
            return
        arguments["img_ids"] = ids.transpose(0, 1).unsqueeze(1)
        arguments["txt_ids"] = text_ids[:, None, None].expand(-1, 1, batch, -1).to(ids.dtype)
        if (image := layout.mask_with_conditions) is not None:
            if is_fused(module):
                mask = {"image_mask": image, "image_total": layout.total}
            else:
                mask = {"attention_mask": F.pad(image, (len(text_ids), 0), value=True)}  # over [text, image]
            arguments["joint_attention_kwargs"] = {**(arguments.get("joint_attention_kwargs") or {}), **mask}

    def trim_text(self, arguments: dict, length: int) -> None:
        """Leave out text tokens, and their ids."""
        super().trim_text(arguments, length)
        arguments["txt_ids"] = arguments["txt_ids"][:length]

    def decode(self, pipe: FluxPipeline, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Decode tokens (B, h·w, 64) to images (B, 3, H, W) in [-1, 1]."""
        return decode_latents(pipe, unpack(tokens, grid))

    def encode(self, pipe: FluxPipeline, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) to tokens (B, h·w, 64)."""
        return pack(encode_images(pipe, images))

    def patch(self, pipe: FluxPipeline) -> None:
        """Make the pipeline ready for interruptions."""
        Unpacking.put_into(pipe)

    def flop(self, config: Mapping[str, Any], tokens: int, text_tokens: int) -> int:
        """Count the floating-point operations of a call for one image, as `ralu.estimate` does, by formula."""
        width = config["num_attention_heads"] * config["attention_head_dim"]
        double, single, both = config["num_layers"], config["num_single_layers"], tokens + text_tokens
        blocks = (double + single) * (12 * both * width**2 + 2 * both**2 * width)
        modulations = (2 * 6 * double + 3 * single + 2) * width**2
        conditions = (1 + config["guidance_embeds"]) * 256 + config["pooled_projection_dim"]
        vectors = conditions * width + (2 + config["guidance_embeds"]) * width**2
        inputs = config["in_channels"] * tokens + config["joint_attention_dim"] * text_tokens
        outputs = (config["out_channels"] or config["in_channels"]) * tokens
        return 2 * (blocks + modulations + vectors + (inputs + outputs) * width)

    def dummy_call(self, module: Any, dtype: torch.dtype, batch: int, tokens: int, text_tokens: int) -> None:
        """Call the model with empty tensors."""
        new, config = partial(torch.empty, dtype=dtype), module.config
        module(
            hidden_states=new(batch, tokens, config.in_channels),
            encoder_hidden_states=new(batch, text_tokens, config.joint_attention_dim),
            pooled_projections=new(batch, config.pooled_projection_dim),
            timestep=new(batch),
            guidance=new(batch) if config.guidance_embeds else None,
            img_ids=new(tokens, 3),
            txt_ids=new(text_tokens, 3),
        )


FAMILY = Flux()
