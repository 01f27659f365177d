"""SD3 and SD3.5: mixed sequences as strips of latent pixels, and how its blocks run on `ralu_kernels`.

Latents stay latent pixels (B, C, H, W); half and full resolution are ordinary images to the transformer. A mixed
sequence of L tokens travels as a strip (B, C, 2, 2L), a token for each 2x2 patch: the patch convolution, the blocks and
the unpatching treat it as L tokens without knowing, and only the positions that are added are not the strip's own.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention import JointTransformerBlock, _chunked_feed_forward
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.embeddings import PatchEmbed, get_1d_sincos_pos_embed_from_grid
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from ..blocks import Processor, feed_forward, is_fused, operations, unwrapped, vectors
from ..layout import Layout, pack, unpack
from ..patch import WholeDecode, decode_latents, encode_images
from . import Family, FusedBlock
from ._published import CLIP_G, CLIP_L, KL_VAE, T5_XXL


class Positions:
    """The position embedding at any place on and between the tokens of a `PatchEmbed`'s stored grid.

    The formula that diffusers makes the stored buffer with, evaluated in between. A checkpoint may come with another
    buffer, since it is saved with the weights: then between the stored places the embedding is interpolated.
    """

    def __init__(self, embed: PatchEmbed):
        self.embed, self.size = embed, embed.pos_embed_max_size
        self.analytic = embed.pos_embed.is_meta or self._deviation() < 0.01  # rounding to bfloat16 makes 2e-3

    def __call__(self, positions: Tensor, grid: tuple[int, int]) -> Tensor:
        """Embed positions (B, L, 2), (row, column) on a grid (h, w) in the middle of the stored one: (B, L, D)."""
        rows, columns = (positions[..., k] + (self.size - grid[k]) // 2 for k in (0, 1))
        return (self.formula if self.analytic else self.interpolated)(rows, columns).to(self.embed.pos_embed.dtype)

    def formula(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Embed rows and columns, (B, L) each, by the formula: float32 (B, L, D). Columns fill the first half of D."""
        return torch.cat([self._axis(columns), self._axis(rows)], dim=-1)

    def interpolated(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Embed rows and columns, (B, L) each, by bilinear interpolation of the stored grid: float32 (B, L, D)."""
        stored = self.embed.pos_embed.to(rows.device).view(self.size, self.size, -1)
        return sum(
            (wy * wx).unsqueeze(-1) * stored[y, x].float()
            for y, wy in self._neighbours(rows)
            for x, wx in self._neighbours(columns)
        )

    def _axis(self, places: Tensor) -> Tensor:
        embed = self.embed
        scaled = places.float() / (self.size / embed.base_size) / embed.interpolation_scale
        width = embed.pos_embed.shape[-1] // 2
        return get_1d_sincos_pos_embed_from_grid(width, scaled).float().view(*places.shape, width)

    def _neighbours(self, places: Tensor):
        first = places.floor().long()
        return (first, first + 1 - places), ((first + 1).clamp(max=self.size - 1), places - first)

    def _deviation(self) -> float:
        """Return the stored buffer's largest deviation from the formula, whose halves depend on one axis each."""
        columns, rows = self.embed.pos_embed.view(self.size, self.size, -1).chunk(2, dim=-1)
        axis = self._axis(torch.arange(self.size, device=rows.device))
        return max(float((part - axis).abs().max()) for part in (columns, rows.transpose(0, 1)))


class StripPatchEmbed(PatchEmbed):
    """A `PatchEmbed` that adds the positions it is given, (B, L, D), to a strip."""

    strip: Tensor | None = None
    positions: Positions | None = None
    laid_out: tuple[Any, Any] = None, None  # the last layout, and its positions' embedding (B, L, D)

    def cropped_pos_embed(self, height: int, width: int) -> Tensor:
        """Crop as stock does, or return what `set_strip` was given."""
        return super().cropped_pos_embed(height, width) if self.strip is None else self.strip

    def set_strip(self, layout: Layout, grid: tuple[int, int], batch: int) -> None:
        """Make the next call a strip's. Guidance doubles the batch, skip-layer guidance does not."""
        if self.positions is None:
            self.positions = Positions(self)
        if self.laid_out[0] is not layout:
            self.laid_out = layout, self.positions(layout.positions, grid)
        rows = self.laid_out[1]
        self.strip = rows.repeat(batch // len(rows), 1, 1)

    def clear(self) -> None:
        """Remove every attribute that the stock class lacks."""
        for name in ("strip", "positions", "laid_out"):
            self.__dict__.pop(name, None)


# ---- blocks: the stock forward with the same parameters and results ----


class SD3Processor(Processor):
    """Image before text in the joint sequence."""

    text_first = False


def _sd3_joint(block, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
    given, ops = dict(joint_attention_kwargs or {}), operations(block)
    image_sequences = given.pop("image_sequences", None)
    shift, scale, gate, *image = vectors(block.norm1, temb, 9 if block.use_dual_attention else 6)
    if block.context_pre_only:
        text_scale, text_shift = vectors(block.norm1_context, temb, 2)
    else:
        text_shift, text_scale, text_gate, *text = vectors(block.norm1_context, temb, 6)
    attention, text_attention = block.attn(
        hidden_states=ops.modulate(hidden_states, shift, scale),
        encoder_hidden_states=ops.modulate(encoder_hidden_states, text_shift, text_scale),
        **given,
    )
    if block.use_dual_attention:
        *image, shift, scale, gate2 = image
        attention2 = block.attn2(
            hidden_states=ops.modulate(hidden_states, shift, scale), **given | {"sequences": image_sequences}
        )
        hidden_states, gate, attention = ops.gated_add(hidden_states, gate, attention), gate2, attention2
    ff, ff_context = (_chunked(block, ff) for ff in (block.ff, block.ff_context))
    hidden_states = feed_forward(ops, hidden_states, gate, attention, *image, ff)
    if block.context_pre_only:
        return None, hidden_states
    return feed_forward(ops, encoder_hidden_states, text_gate, text_attention, *text, ff_context), hidden_states


def _chunked(block, ff):
    if block._chunk_size is None:
        return ff
    return lambda x: _chunked_feed_forward(ff, x, block._chunk_dim, block._chunk_size)


_CONFIG = {
    "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip


class SD3(Family):
    """SD3 and SD3.5: samples are latent pixels, and positions are added to the image's tokens alone."""

    name = "sd3"
    transformer = SD3Transformer2DModel
    embedding = (PatchEmbed, StripPatchEmbed)
    fused_blocks: ClassVar = {JointTransformerBlock: FusedBlock(_sd3_joint, SD3Processor)}
    stock_processors = (JointAttnProcessor2_0, FusedJointAttnProcessor2_0)
    text_first = False
    image_alone = True
    t5 = "text_encoder_3"
    joins_clip = True
    text_tokens = 256
    published: ClassVar = {
        "sd3-medium": _CONFIG,
        "sd3.5-medium": _CONFIG | {
            "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)),
        },
        "sd3.5-large": _CONFIG | {
            "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm",
        },
    }  # fmt: skip
    vae = KL_VAE
    encoders: ClassVar = {
        "text_encoder": (CLIPTextModelWithProjection, CLIP_L | {"projection_dim": 768}),
        "text_encoder_2": (CLIPTextModelWithProjection, CLIP_G),
        "text_encoder_3": (T5EncoderModel, T5_XXL),
    }
    takes_mask = False
    guided = True
    batched_guidance = True

    def check(self, transformer: SD3Transformer2DModel) -> None:
        """Raise ValueError for patches of another size than 2x2, and for mask and image in further channels."""
        if (size := transformer.config.patch_size) != 2:
            raise ValueError(f"pipe.transformer must have patch_size 2, got {size}")
        given, made = transformer.config.in_channels, transformer.config.out_channels
        if given != made:
            raise ValueError(f"pipe.transformer must have as many in_channels as the {made} out_channels, got {given}")

    def pack(self, sample: Tensor) -> Tensor:
        """Pack latent pixels (B, C, 2h, 2w), a strip's too, to tokens (B, h·w, 4C)."""
        return pack(sample)

    def unpack(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Undo `pack`; a mixed sequence is one row."""
        return unpack(tokens, grid)

    def grid_of(self, arguments: dict) -> tuple[int, int]:
        """Read the full grid off the latents: a token is two latent pixels wide and high."""
        height, width = arguments["hidden_states"].shape[-2:]
        return height // 2, width // 2

    def set_layout(self, module: Any, arguments: dict, layout: Layout, grid: tuple[int, int]) -> None:
        """Give a strip the positions of its tokens. Raises ValueError for unequal counts where attention is stock."""
        if layout.mask is not None:
            if not is_fused(module):
                raise ValueError(
                    "SD3's stock attention takes no mask, so the images of a batch must have equal token counts: with "
                    "threshold= generate one at a time or enable with fused=True, or give ratio="
                )
            joint = arguments.get("joint_attention_kwargs") or {}
            padding = {"image_mask": layout.mask, "image_total": layout.total}
            arguments["joint_attention_kwargs"] = {**joint, **padding}
        embed = unwrapped(module).pos_embed
        if layout.plan is None:
            embed.strip = None
        else:
            embed.set_strip(layout, grid, len(arguments["hidden_states"]))

    def clear_layout(self, module: Any) -> None:
        """Let the next call be of a whole image."""
        unwrapped(module).pos_embed.clear()

    def image_tokens(self, module: Any, arguments: dict) -> int:
        """Count the patches."""
        height, width = arguments["hidden_states"].shape[-2:]
        return height * width // module.config.patch_size**2

    def decode(self, pipe: StableDiffusion3Pipeline, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Decode tokens (B, h·w, 64) to images (B, 3, H, W) in [-1, 1]; an interruption does not touch them."""
        decode = vars(pipe.vae).get("decode")
        return decode_latents(pipe, unpack(tokens, grid), decode.stock if isinstance(decode, WholeDecode) else None)

    def encode(self, pipe: StableDiffusion3Pipeline, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) to tokens (B, h·w, 64)."""
        return pack(encode_images(pipe, images))

    def patch(self, pipe: StableDiffusion3Pipeline) -> None:
        """Make the pipeline ready for interruptions."""
        if pipe.vae is not None:
            WholeDecode.put_into(pipe.vae)

    def flop(self, config: Mapping[str, Any], tokens: int, text_tokens: int) -> int:
        """Count the floating-point operations of a call for one image, as `ralu.estimate` does, by formula."""
        width = config["num_attention_heads"] * config["attention_head_dim"]
        layers, dual, both = config["num_layers"], len(config["dual_attention_layers"]), tokens + text_tokens
        blocks = layers * (12 * both * width**2 + 2 * both**2 * width) - 9 * text_tokens * width**2  # the last: no text
        second = dual * (4 * tokens * width**2 + 2 * tokens**2 * width)
        modulations = (2 * 6 * layers - 4 + 3 * dual + 2) * width**2
        vectors = (256 + config["pooled_projection_dim"]) * width + 2 * width**2
        pixels = (config["in_channels"] + config["out_channels"]) * config["patch_size"] ** 2
        embedded = (pixels * tokens + config["joint_attention_dim"] * text_tokens) * width
        return 2 * (blocks + second + modulations + vectors + embedded)

    def dummy_call(self, module: Any, dtype: torch.dtype, batch: int, tokens: int, text_tokens: int) -> None:
        """Call the model with empty tensors, the image a strip: one token a patch, and positions of its own."""
        new, config = partial(torch.empty, dtype=dtype), module.config
        module.pos_embed.cropped_pos_embed = lambda height, width: new(1, tokens, module.inner_dim)
        module(
            hidden_states=new(batch, config.in_channels, config.patch_size, config.patch_size * tokens),
            encoder_hidden_states=new(batch, text_tokens, config.joint_attention_dim),
            pooled_projections=new(batch, config.pooled_projection_dim),
            timestep=new(batch),
        )


FAMILY = SD3()
