"""SD3 and SD3.5: mixed sequences as strips, and what a stock `StableDiffusion3Pipeline` needs for a `RaluScheduler`.

Latents stay latent pixels (B, C, H, W); half and full resolution are ordinary images to the transformer. A mixed
sequence of L tokens travels as a strip (B, C, 2, 2L), a token for each 2x2 patch: the patch convolution, the blocks and
the unpatching treat it as L tokens without knowing, and only the positions that are added are not the strip's own.
"""

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from diffusers.models.embeddings import PatchEmbed, get_1d_sincos_pos_embed_from_grid
from torch import Tensor

from .blocks import fused, unwrapped
from .flux import decode, unpack
from .patch import LayoutHook, StandIn, calling_pipeline, reset_caches
from .scheduler import Layout, RaluScheduler

T5 = "text_encoder_3"


def pack(latents: Tensor) -> Tensor:
    """Latent pixels (B, C, 2h, 2w), a strip's too, to tokens (B, h·w, 4C) in raster order."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


class Positions:
    """The position embedding at any place on and between the tokens of a `PatchEmbed`'s stored grid.

    The formula that diffusers makes the stored buffer with, evaluated in between. A checkpoint may come with another
    buffer, since it is saved with the weights: then between the stored places the embedding is interpolated.
    """

    def __init__(self, embed: PatchEmbed):
        self.embed, self.size = embed, embed.pos_embed_max_size
        self.analytic = embed.pos_embed.is_meta or self._deviation() < 0.01  # rounding to bfloat16 makes 2e-3

    def __call__(self, positions: Tensor, grid: tuple[int, int]) -> Tensor:
        """positions: (B, L, 2), (row, column) on a grid (h, w) that is the middle of the stored one -> (B, L, D)."""
        rows, columns = (positions[..., k] + (self.size - grid[k]) // 2 for k in (0, 1))
        return (self.formula if self.analytic else self.interpolated)(rows, columns).to(self.embed.pos_embed.dtype)

    def formula(self, rows: Tensor, columns: Tensor) -> Tensor:
        """rows, columns: (B, L) on the stored grid -> float32 (B, L, D). Columns fill the first half of D."""
        return torch.cat([self._axis(columns), self._axis(rows)], dim=-1)

    def interpolated(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Bilinear. rows, columns: (B, L) on the stored grid -> float32 (B, L, D)."""
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
        """Of the stored buffer from the formula, whose halves are the same for all rows, and for all columns."""
        columns, rows = self.embed.pos_embed.view(self.size, self.size, -1).chunk(2, dim=-1)
        axis = self._axis(torch.arange(self.size, device=rows.device))
        return max(float((part - axis).abs().max()) for part in (columns, rows.transpose(0, 1)))


class StripPatchEmbed(PatchEmbed):
    """A `PatchEmbed` that adds the positions it is given, (B, L, D), to a strip."""

    strip: Tensor | None = None

    def cropped_pos_embed(self, height: int, width: int) -> Tensor:
        return super().cropped_pos_embed(height, width) if self.strip is None else self.strip


class Hook(LayoutHook):
    """Guidance doubles the batch and skip-layer guidance does not, so positions are repeated as each call needs."""

    stock_class, own_class = PatchEmbed, StripPatchEmbed

    def __init__(self, pipe: StableDiffusion3Pipeline, scheduler: RaluScheduler):
        super().__init__(pipe, scheduler)
        self.positions = Positions(unwrapped(pipe.transformer).pos_embed)
        self._of: tuple[Layout | None, Tensor | None] = None, None

    @classmethod
    def check(cls, transformer):
        super().check(transformer)
        if (size := unwrapped(transformer).config.patch_size) != 2:
            raise ValueError(f"pipe.transformer must have patch_size 2, got {size}")

    def remove(self, transformer):
        vars(unwrapped(transformer).pos_embed).pop("strip", None)
        super().remove(transformer)

    def pass_on(self, module, args, kwargs):
        unwrapped(module).pos_embed.strip = None
        return args, kwargs

    def lay_out(self, module, given, pipe):
        scheduler, sample, strip = self.scheduler, given["hidden_states"], None
        if scheduler.layout is None:
            height, width = sample.shape[-2:]
            guided = pipe is not None and pipe.do_classifier_free_guidance
            images = len(sample) // (2 if guided else 1)
            scheduler.start(sample, (height // 2, width // 2), self.token_pixels, images)
        layout = scheduler.layout
        if layout.mask is not None:
            if not fused(module):
                raise ValueError(
                    "SD3's stock attention takes no mask, so the pictures of a batch must have equal token counts: "
                    "with threshold= paint one at a time or enable with fused=True, or give ratio="
                )
            joint = given.get("joint_attention_kwargs") or {}
            given["joint_attention_kwargs"] = {**joint, "image_mask": layout.mask}
        given["hidden_states"] = scheduler.low_noise(sample)
        if layout.stage == 2:
            if self._of[0] is not layout:
                self._of = layout, self.positions(layout.positions, scheduler.grid)
            rows = self._of[1]
            strip = rows.repeat(len(sample) // len(rows), 1, 1)
        unwrapped(module).pos_embed.strip = strip
        return given


class WholeDecode(StandIn):
    """An interrupted run ends in any stage, and the pipeline decodes what it has.

    The decoder alone sees those latents: nothing of the pipeline's own is called between its loop and the decoding. A
    preview in a callback is of the whole picture already, and what the caller decodes afterwards is the caller's.
    """

    name = "decode"

    def __call__(self, latents: Tensor, *args, **kwargs):
        pipe = calling_pipeline()
        scheduler = getattr(pipe, "scheduler", None)
        layout = getattr(scheduler, "layout", None)
        if layout is not None and pipe.interrupt and latents.shape[-2:] == _size(layout, scheduler.grid):
            latents = scheduler.full_resolution(latents)
        return self.stock(latents, *args, **kwargs)


def _size(layout: Layout, grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the latents (B, C, H, W) that a layout's tokens are."""
    (h, w), length = grid, layout.positions.shape[1]
    return {1: (2 * h, 2 * w), 2: (2, 2 * length), 3: (4 * h, 4 * w)}[layout.stage]


def bind(pipe: StableDiffusion3Pipeline, scheduler: RaluScheduler):
    """Make the scheduler this pipeline's, and the pipeline ready for interruptions."""
    decoder = None
    if pipe.vae is not None:
        WholeDecode.put_into(pipe.vae)
        # An interruption from another thread does not touch the preview.
        whole = vars(pipe.vae)["decode"]
        stock = whole.stock if isinstance(whole, WholeDecode) else whole
        decoder = lambda tokens, grid: decode(pipe, tokens, grid, stock)  # noqa: E731
    scheduler.bind(decoder, lambda: reset_caches(unwrapped(pipe.transformer)), pack, unpack)
