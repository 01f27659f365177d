"""SD3 and SD3.5: mixed sequences as strips, and what a stock `StableDiffusion3Pipeline` needs for a `RaluScheduler`.

Latents stay latent pixels (B, C, H, W); half and full resolution are ordinary images to the transformer. A mixed
sequence of L tokens travels as a strip (B, C, 2, 2L), a token for each 2x2 patch: the patch convolution, the blocks and
the unpatching treat it as L tokens without knowing, and only the positions that are added are not the strip's own.
"""

import weakref
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from diffusers.models.embeddings import PatchEmbed, get_1d_sincos_pos_embed_from_grid
from torch import Tensor

from .blocks import fused, unwrapped
from .flux import decode
from .stages import pack, unpack
from .scheduler import RaluScheduler
from .stages import Layout

T5 = "text_encoder_3"


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


class LayoutHook:
    """A forward pre-hook that gives every transformer call the sample and positions of the scheduler's current layout.

    Guidance doubles the batch and skip-layer guidance does not, so positions are repeated as each call needs.
    """

    def __init__(self, scheduler: RaluScheduler, embed: PatchEmbed, token_pixels: int):
        self.scheduler, self.token_pixels = scheduler, token_pixels
        self.positions, self.stock = Positions(embed), embed.cropped_pos_embed
        self.strip: Tensor | None = None  # what is added to this call's tokens, where they are a strip
        self._of: tuple[Layout | None, Tensor | None] = None, None

    def __call__(self, module, args, kwargs):
        scheduler, self.strip = self.scheduler, None
        if not scheduler.running:
            return args, kwargs
        sample = kwargs["hidden_states"]
        if scheduler.layout is None:
            height, width = sample.shape[-2:]
            scheduler.start(sample, (height // 2, width // 2), self.token_pixels)
        layout = scheduler.layout
        if layout.mask is not None:
            if not fused(module):
                raise ValueError(
                    "SD3's stock attention takes no mask, so the pictures of a batch must have equal token counts: "
                    "with threshold= paint one at a time or enable with fused=True, or give ratio="
                )
            given = kwargs.get("joint_attention_kwargs") or {}
            kwargs["joint_attention_kwargs"] = {**given, "image_mask": layout.mask}
        kwargs["hidden_states"] = scheduler.subsample_first(sample)
        if layout.plan is not None:
            if self._of[0] is not layout:
                self._of = layout, self.positions(layout.positions, scheduler.grid)
            rows = self._of[1]
            self.strip = rows.repeat(len(sample) // len(rows), 1, 1)
        return args, kwargs

    def cropped_pos_embed(self, height: int, width: int) -> Tensor:
        """Stands in for `PatchEmbed.cropped_pos_embed`."""
        return self.stock(height, width) if self.strip is None else self.strip


class WholeDecode:
    """Stands in for `vae.decode`: an interrupted run ends in any stage, and the pipeline decodes what it has.

    The decoder alone sees those latents: nothing of the pipeline's own is called between its loop and the decoding.
    """

    def __init__(self, pipe: StableDiffusion3Pipeline, scheduler: RaluScheduler):
        self.pipe, self.scheduler, self.stock = weakref.ref(pipe), scheduler, pipe.vae.decode
        self.before = vars(pipe.vae).get("decode")

    def __call__(self, latents: Tensor, *args, **kwargs):
        if getattr(self.pipe(), "_interrupt", False) and self._are_the_runs(latents):
            latents = self.scheduler.finish(latents)
        return self.stock(latents, *args, **kwargs)

    def _are_the_runs(self, latents: Tensor) -> bool:
        """A run that returned its latents leaves the pipeline interrupted: what is decoded then may be any others."""
        layout = self.scheduler.layout
        if layout is None:
            return False
        (h, w), length = self.scheduler.grid, layout.positions.shape[1]
        tokens = {1: (h, w), 2: (1, length), 3: (2 * h, 2 * w)}[layout.stage]
        return latents.shape[-2:] == (2 * tokens[0], 2 * tokens[1])

    @staticmethod
    def take_off(vae: torch.nn.Module):
        """Remove what no bound scheduler needs: pipelines may share a VAE, and be disabled in any order."""
        while isinstance(top := vars(vae).get("decode"), WholeDecode) and not top.scheduler.bound:
            del vae.decode
            if top.before is not None:
                vae.decode = top.before


def install(pipe: StableDiffusion3Pipeline, scheduler: RaluScheduler, undo: ExitStack):
    """Put the hook, the positions and the decoder into the pipeline; `undo` takes them out again."""
    transformer, vae = unwrapped(pipe.transformer), pipe.vae
    if transformer.config.patch_size != 2:
        raise ValueError(f"RALU needs a transformer with patch_size 2, got {transformer.config.patch_size}")
    undo.callback(WholeDecode.take_off, vae)
    whole = WholeDecode(pipe, scheduler)
    scheduler.bind(lambda tokens, grid: decode(pipe, tokens, grid, whole.stock), pack=pack, unpack=unpack)
    undo.callback(scheduler.unbind)
    vae.decode = whole

    hook = LayoutHook(scheduler, transformer.pos_embed, pipe.vae_scale_factor * 2)
    transformer.pos_embed.cropped_pos_embed = hook.cropped_pos_embed
    undo.callback(delattr, transformer.pos_embed, "cropped_pos_embed")
    # On the outside: what torch.compile traces, and what offloading wraps anew on every call, lies within.
    undo.callback(pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True).remove)
