"""What the model sees: tokens and where they lie, whole or of two resolutions. Needs PyTorch alone.

Tokens are packed as FLUX packs them: (B, n, C) in raster order, and channel c·4 + 2·row + column of a token is pixel
(row, column) of its 2x2 latent pixels in latent channel c.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ralu_kernels import TokenPlan

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Layout:
    """The tokens that the model sees now.

    stage:      the stage's number, from 1.
    resolution: "low", "mixed" or "full".
    positions:  float32 (B, L, 2), (row, column) of every token: whole numbers on the low grid in a low stage, the
                children of a selected token at its own position + {0, 1/2} in a mixed one, whole numbers on the full
                grid in a full one. The low grid of an odd full one reaches half a token beyond it.
    plan:       a mixed stage's TokenPlan, else None.
    scores:     float32 (B, n), what the plan was made from, else None.
    x0:         float32 (B, n, C), the clean estimate that was scored, else None.
    conditions: how many tokens of condition images stand behind these in the model, at positions of their own and the
                same in all stages; they are in no sample of a run.
    """

    stage: int
    resolution: str
    positions: Tensor
    plan: TokenPlan | None = None
    scores: Tensor | None = None
    x0: Tensor | None = None
    conditions: int = 0

    @cached_property
    def mask(self) -> Tensor | None:
        """Which tokens are no padding, bool (B, L); None where none is."""
        rows = None if self.plan is None else _rows(self.plan)
        return None if rows is None else rows[1]

    @cached_property
    def mask_with_conditions(self) -> Tensor | None:
        """`mask`, and condition images behind it: bool (B, L + conditions)."""
        return None if self.mask is None else F.pad(self.mask, (0, self.conditions), value=True)

    @property
    def total(self) -> int:
        """Tokens of all samples together, with conditions and without padding."""
        batch, length = self.positions.shape[:2]
        return batch * self.conditions + (batch * length if self.plan is None else self.plan.source.shape[0])


def _rows(plan: TokenPlan) -> tuple[Tensor, Tensor] | None:
    """Return every token's packed row and which are no padding, (B, L) each; None where all samples have L tokens."""
    if plan.source.shape[0] == plan.batch_size * plan.max_seqlen:
        return None
    column = torch.arange(plan.max_seqlen, device=plan.source.device)
    kept, first = column < plan.lengths[:, None], plan.cu_seqlens[:-1, None]
    return torch.where(kept, first + column, first), kept  # any row pads


def pad(packed: Tensor, plan: TokenPlan) -> Tensor:
    """Spread a mixed stage's packed rows (total, ...) over samples, (B, L, ...); what pads has no meaning."""
    rows = _rows(plan)
    return packed.unflatten(0, (plan.batch_size, plan.max_seqlen)) if rows is None else packed[rows[0]]


def strip(padded: Tensor, plan: TokenPlan) -> Tensor:
    """Undo `pad`: (B, L, ...) to (total, ...)."""
    total, rows = plan.source.shape[0], padded.flatten(0, 1)
    if total == len(rows):
        return rows
    sample = torch.repeat_interleave(plan.lengths, output_size=total)
    gap = plan.max_seqlen * torch.arange(plan.batch_size, device=rows.device) - plan.cu_seqlens[:-1]
    return rows[torch.arange(total, device=rows.device) + gap[sample]]


def raster(grid: Grid, batch: int, device: torch.device) -> Tensor:
    """List the whole positions of a grid in raster order, float32 (batch, h·w, 2)."""
    rows, columns = (torch.arange(size, dtype=torch.float32, device=device) for size in grid)
    return torch.cartesian_prod(rows, columns).view(1, -1, 2).expand(batch, -1, -1)


def crop(tokens: Tensor, grid: Grid, target: Grid) -> Tensor:
    """Leave of tokens (B, h·w, C) in raster order on a grid (h, w) those on a target that is no larger."""
    if grid == target:
        return tokens
    return tokens.unflatten(1, grid)[:, : target[0], : target[1]].flatten(1, 2)


def pack(latents: Tensor) -> Tensor:
    """Pack latent pixels (B, C, 2h, 2w) to tokens (B, h·w, 4C) in raster order."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, grid: Grid) -> Tensor:
    """Unpack tokens (B, h·w, 4C) in raster order to latent pixels (B, C, 2h, 2w)."""
    # Contiguous, as latents are at the start: other strides would cost compiled models another graph.
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), 2).contiguous()


def subsample_first(noise: Tensor, grid: Grid) -> Tensor:
    """Take a low stage's noise out of the full-size noise: (B, 4n, C) to (B, n, C), grid (h, w) with h·w = n.

    Latent pixels by nearest neighbour, so that a seed fixes the image's composition at every size.
    """
    (h, w), (batch, _, channels) = grid, noise.shape
    corner = noise.unflatten(1, (h, 2, w, 2))[..., ::4]  # each token's first inner pixel: (B, h, 2, w, 2, C/4)
    return corner.permute(0, 1, 3, 5, 2, 4).reshape(batch, h * w, channels)


def _enlarged(low: Tensor, grid: Grid) -> Tensor:
    """Copy every latent pixel of low tokens to 2x2, which `subsample_first` undoes: (B, n, C) to (B, 4n, C)."""
    return pack(unpack(low, grid).repeat_interleave(2, 2).repeat_interleave(2, 3))


def selected(plan: TokenPlan) -> Tensor:
    """Tell which high tokens had a selected parent: bool (B, 4n) in raster order."""
    return plan.child[plan.inverse.long()] >= 0


def _chosen(plan: TokenPlan | None, high: Tensor, low: Tensor) -> Tensor:
    return low if plan is None else torch.where(selected(plan)[..., None], high, low)


def coarsened(high: Tensor, low: Tensor, layout: Layout, grid: Grid) -> Tensor:
    """Show an image as a low or mixed layout does, at full size: what it has no high tokens for is of the low image.

    high, low: the image's tokens, (B, 4n, C) and (B, n, C) in raster order. grid: the low one. Returns (B, 4n, C).
    """
    return _chosen(layout.plan, high, _enlarged(low, grid))


def gather(tokens: Tensor, layout: Layout, grid: Grid) -> Tensor:
    """Take a low or mixed layout's tokens out of full-size ones in raster order: (B, 4n, C) to (B, L, C).

    grid: the low one. Of what is low one latent pixel of each 2x2 is taken, which keeps noise as it is. Guidance may
    double the batch.
    """
    low, plan = subsample_first(tokens, grid), layout.plan
    if plan is None:
        return low
    if len(tokens) > plan.batch_size:
        return torch.cat([gather(half, layout, grid) for half in tokens.split(plan.batch_size)])
    copied = low.unflatten(1, grid).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    packed = tokens.new_empty(plan.source.shape[0], tokens.shape[2])
    packed[plan.inverse.long().flatten()] = _chosen(plan, tokens, copied).flatten(0, 1)  # a kept row four times
    return pad(packed, plan)


def spread(tokens: Tensor, layout: Layout, grid: Grid) -> Tensor:
    """Undo `gather`: (B, L, C) to (B, 4n, C), every latent pixel of a low token copied to 2x2."""
    plan = layout.plan
    if plan is None:
        return _enlarged(tokens, grid)
    covered = strip(tokens, plan)[plan.inverse.long()]
    low = covered.unflatten(1, (grid[0], 2, grid[1], 2))[:, :, 0, :, 0].flatten(1, 2)
    return _chosen(plan, covered, _enlarged(low, grid))
