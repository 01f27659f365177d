"""The stages of a run: the transitions in between, and the loop. Needs PyTorch alone. Tokens as in `ralu.layout`.

A full grid with an odd side is no low one's double: where stages are not full, the low grid is that of the full one
padded by a row or column, whose tokens start as noise of their own. What a full stage begins with is cropped, so that
its tokens and their positions are the image's.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ralu_kernels import TokenPlan, plan_tokens, upsample_remaining, upsample_renoise, upsample_selected
from ralu_kernels._backend import resolve
from ralu_kernels._checks import DTYPES, check_tensor, grid_sides

from . import interpolation, regions
from .layout import Grid, Layout, crop, pack, pad, raster, strip, subsample_first, unpack
from .options import Options, schedule_of
from .parallel import Parallel
from .schedule import SMOOTH, Schedule, Transition
from .seeds import seeds_of
from .solver import Solver, sample_squares

_RULES = "granularity", "kept_noise", "backend"  # the options that are keywords of `ralu_kernels`' transitions too


# ---- transitions ----


def widen(noise: Tensor, grid: Grid, padded: Grid, seeds: Tensor, options: Options) -> Tensor:
    """Continue noise (B, h·w, C) on a grid (h, w) by fresh noise on a larger one, (B, n, C)."""
    whole = _white(noise, padded, seeds, 0, options).to(noise.dtype).unflatten(1, padded)
    whole[:, : grid[0], : grid[1]] = noise.unflatten(1, grid)
    return whole.flatten(1, 2)


def renoise(tokens: Tensor, grid: Grid, transition: Transition, seeds: Tensor, stage: int, options: Options) -> Tensor:
    """Go from a low stage to a full one: (B, n, C) on a grid (h, w) to (B, 4n, C), all upsampled, re-noised (Eq. S10).

    stage: the number of the stage that is entered, a word of the random numbers' counter.
    """
    rules = options.chosen("granularity", "backend")
    pixels = rules["granularity"] == "pixel"
    latents = unpack(tokens, grid) if pixels else tokens.transpose(1, 2).unflatten(2, grid)
    scale, noise_scale, c = transition.scale, transition.noise_scale, transition.c
    latents = upsample_renoise(latents, scale, noise_scale, c, seeds, stage=stage, backend=rules["backend"])
    return pack(latents) if pixels else latents.flatten(2).transpose(1, 2)


def select(tokens: Tensor, plan: TokenPlan, transition: Transition, seeds: Tensor, options: Options) -> Tensor:
    """Go from a low stage to a mixed one: (B, n, C) to packed (total, C), the selected upsampled, all re-noised."""
    if transition.interpolation in SMOOTH:
        return interpolation.select(tokens, plan, transition, seeds, options)
    noise = transition.scale, transition.noise_scale, transition.c, seeds
    return upsample_selected(tokens, plan, *noise, **options.chosen(*_RULES))


def complete(packed: Tensor, plan: TokenPlan, transition: Transition, seeds: Tensor, options: Options) -> Tensor:
    """Go from a mixed stage to a full one: packed (total, C) to (B, 4n, C), the rest upsampled, all re-noised."""
    if transition.interpolation in SMOOTH:
        return interpolation.complete(packed, plan, transition, seeds, options)
    noise = transition.scale, transition.noise_scale, transition.c, seeds
    return upsample_remaining(packed, plan, *noise, **options.chosen(*_RULES))


def resample(resized: Tensor, grid: Grid, transition: Transition, seeds: Tensor, stage: int, options: Options):
    """Go between whole stages: add fresh noise to the clean estimate (B, n, C), resized to the grid that is entered.

    The noise is white: it depends on the seed, the stage that is entered and the place.
    """
    return transition.scale * resized + transition.noise_scale * _white(resized, grid, seeds, stage, options)


def _white(like: Tensor, grid: Grid, seeds: Tensor, stage: int, options: Options) -> Tensor:
    """Draw standard normal tokens for a grid, float32 (B, n, C) with the batch and channels of `like`."""
    none = like.new_zeros(len(like), like.shape[2] // 4, *grid, dtype=torch.float32)
    return pack(upsample_renoise(none, 0.0, 1.0, 0.0, seeds, stage=stage, **options.chosen("backend")))


# ---- the loop ----


def _same(sample: Tensor, *_) -> Tensor:
    return sample


class Run:
    """One pass through a schedule: at which step it is, and the layout that the model sees there.

    scorer:       `(x0, grid) -> scores`, see `ralu.regions`.
    options:      of these the threshold, the seeds, the solver and how transitions treat tokens.
    resize:       `(x0, grid, target) -> x0` by way of the image, which the upsampler "pixels" needs, see
                  `ralu.interpolation.through_pixels`. Without it such a schedule is a ValueError.
    pack, unpack: where a model's samples are no tokens (B, L, C): `pack(sample)` gives them and
                  `unpack(tokens, (rows, columns))` undoes it. A mixed sequence is one row. The methods below take and
                  give samples as the model's.
    normalised:   (deviation, mean), (C,) each, where every channel of a token is normalised apart: copies of a latent
                  pixel, which come to other channels, are made of `x · deviation + mean` and normalised anew. The
                  noise in a sample, which is white under the normalisation, is copied as it is.
    parallel:     the processes that split the model's sequences, where they are more than one.
    """

    def __init__(
        self,
        schedule: Schedule,
        scorer: Callable,
        options: Options,
        resize: Callable[[Tensor, Grid, Grid], Tensor] | None = None,
        *,
        pack: Callable[[Tensor], Tensor] = _same,
        unpack: Callable[[Tensor, Grid], Tensor] = _same,
        normalised: tuple[Tensor, Tensor] | None = None,
        parallel: Parallel | None = None,
    ):
        interpolation.check_resize(schedule, resize)
        self.schedule, self.options = schedule, options
        self.resize: Any = resize
        self.normalised, self.parallel = normalised, parallel
        self.scorer: Callable = scorer() if scorer is regions.Change else scorer  # it remembers the steps of this run
        self.pack, self.unpack = pack, unpack
        self.solver = Solver(options.chosen("solver")["solver"], self._squares)
        self.steps = [  # (stage, sigma, next sigma)
            (stage, *levels)
            for stage in range(1, 1 + len(schedule.stages))
            for levels in pairwise(schedule.sigmas(stage))
        ]
        self._selecting = {k for k, transition in enumerate(schedule.transitions, 1) if transition.kind == "select"}
        self.index = 0
        self.layout: Any = None  # a Layout from `start` on
        self.full_grid: Grid = (0, 0)
        self.padded_grid: Grid = (0, 0)  # with sides that the low grid's are half of
        self.conditions = 0
        self._seeds: Any = None  # a tensor from the first step on

    @property
    def sigmas(self) -> Tensor:
        """The noise level of every step, float32 as diffusers has it."""
        return torch.tensor([sigma for _, sigma, _ in self.steps], dtype=torch.float32)

    @property
    def over(self) -> bool:
        """Whether all steps were made."""
        return self.index == len(self.steps)

    @property
    def grid(self) -> Grid:
        """The low grid (h, w)."""
        return self.padded_grid[0] // 2, self.padded_grid[1] // 2

    def start(self, noise: Tensor, grid: Grid, images: int | None = None, conditions: int = 0):
        """Begin the first stage.

        noise:      (B, N, C), the model's first input, in raster order of the full grid (rows, columns) = grid. B may
                    be more than the first step's: guidance doubles batches.
        images:     how many images these are, B unless guidance doubles them.
        conditions: how many tokens of condition images the model sees behind these, see `ralu.layout.Layout`.
        Raises ValueError for noise that does not fit or differs between processes, and for masks or seeds of another
        number of images.
        """
        noise, images = self.pack(noise), images or len(noise)
        if noise.shape[2] % 4:
            raise ValueError(f"noise must have 4 values for each latent channel in a token, got {noise.shape[2]}")
        if noise.shape[1] != (tokens := grid[0] * grid[1]):
            raise ValueError(f"noise has {noise.shape[1]} tokens, but the grid {grid[0]}x{grid[1]} has {tokens}")
        resolve(self.options.chosen("backend")["backend"], noise.device)
        given = self.options.seeds
        if given is not None and not isinstance(given, int) and len(given) != images:
            raise ValueError(f"seeds must be one number, or one for each of the {images} images, got {len(given)}")
        if self.parallel is not None:
            self.parallel.check_same(seeds_of(noise))
        halved = any(stage.resolution != "full" for stage in self.schedule.stages)
        self.full_grid, self.conditions = grid, conditions
        self.padded_grid = (grid[0] + grid[0] % 2, grid[1] + grid[1] % 2) if halved else grid
        if isinstance(self.scorer, regions.Mask):
            self.scorer.check_batch(images)
            self.scorer = self.scorer.padded(grid, self.padded_grid)
        self.layout = self._whole(1, len(noise), noise.device)

    def first(self, sample: Tensor) -> Tensor:
        """Bring the first step's sample to the first stage's resolution. Other steps' samples pass unchanged."""
        if self.index or self.schedule.stages[0].resolution != "low":
            return sample
        tokens = self.pack(sample)
        if tokens.shape[1] != self.full_grid[0] * self.full_grid[1]:
            return sample
        if self.padded_grid != self.full_grid:
            tokens = widen(tokens, self.full_grid, self.padded_grid, self._first_seeds(tokens), self.options)
        return self.unpack(subsample_first(tokens, self.grid), self.grid)

    def step(self, sample: Tensor, velocity: Tensor) -> tuple[Tensor, bool]:
        """Make one step of the solver, and at a stage's end the transition.

        sample: (B, L, C), in the very first step the full-size noise. velocity: the model's output for it.
        Returns the next sample in float32, at a stage's end with the next stage's tokens, and whether the stage ended.
        Raises ValueError for a velocity of another shape or of no real numbers.
        """
        stage, sigma, following = self.steps[self.index]
        if self._seeds is None:
            self._seeds = self._first_seeds(self.pack(sample))
        x = self.first(sample)
        if velocity.shape != x.shape or not velocity.is_floating_point():
            raise ValueError(
                f"the velocity must be real and of shape {tuple(x.shape)}, as the tokens it is for, "
                f"got {tuple(velocity.shape)} in {velocity.dtype}"
            )
        x, v = x.float(), velocity.float()
        if stage in self._selecting and isinstance(self.scorer, regions.Change):
            self.scorer.observe(self.pack(x - sigma * v))
        advanced = x + (following - sigma) * self.solver(x, v, sigma, following)
        self.index += 1
        if ended := not self.over and self.steps[self.index][0] != stage:
            self.solver.restart()
            advanced = self._enter(stage + 1, advanced, x - sigma * v)
        return advanced, ended

    def _squares(self, x: Tensor) -> Tensor:
        """Return the sum of squares of each sample (B, ...), in which padding does not count: (B, 1, ...)."""
        mask = self.layout.mask
        if mask is not None:
            x = self.unpack(self.pack(x).masked_fill(~mask[..., None], 0), (1, mask.shape[1]))
        return sample_squares(x)

    def _enter(self, stage: int, sample: Tensor, x0: Tensor) -> Tensor:
        """Make the sample that a stage begins with of the previous stage's last one and its clean estimate."""
        transition, before = self.schedule.transitions[stage - 2], self.layout
        tokens, x0 = self.pack(sample), self.pack(x0)
        if transition.kind == "select":
            self.layout = self._selected(stage, x0)
            plan = self.layout.plan
            packed = self._moved(select, tokens, x0, plan, transition, self.options)
            packed = self._by_pixels(packed, x0, transition, plan)
            return self.unpack(pad(packed, plan), (1, plan.max_seqlen))
        self.layout = self._whole(stage, len(sample), sample.device)
        if transition.kind == "resample":
            grids = self._grid_of(before), self._grid_of(self.layout)
            if before.resolution == "full" and self.padded_grid != self.full_grid:
                deviation, mean = self._normalisation(x0)
                x0 = interpolation.extended(x0 * deviation + mean, self.full_grid, self.padded_grid)
                x0 = (x0 - mean) / deviation
            if transition.interpolation == "pixels":
                x0 = self.resize(x0, *grids)
            else:
                deviation, mean = self._normalisation(x0)
                x0 = interpolation.resized(x0 * deviation + mean, *grids, transition.interpolation)
                x0 = (x0 - mean) / deviation
            tokens = resample(x0, grids[1], transition, self._seeds, stage, self.options)
        elif transition.kind == "complete":
            tokens, x0 = strip(tokens, before.plan), strip(x0, before.plan)
            tokens = self._moved(complete, tokens, x0, before.plan, transition, self.options)
            tokens = self._by_pixels(tokens, x0, transition, before.plan, before.x0)
        else:
            tokens = self._moved(renoise, tokens, x0, self.grid, transition, stage, self.options)
            tokens = self._by_pixels(tokens, x0, transition)
        if self.layout.resolution == "full":
            return self.unpack(crop(tokens, self.padded_grid, self.full_grid), self.full_grid)
        return self.unpack(tokens, self.grid)

    def _selected(self, stage: int, x0: Tensor) -> Layout:
        """Choose a mixed stage's tokens by a clean estimate (B, n, C)."""
        plan, scores = self._plan(regions.score(self.scorer, x0, self.grid, self._seeds))
        return Layout(stage, "mixed", pad(plan.positions, plan), plan, scores, x0, self.conditions)

    def _plan(self, scores: Tensor) -> tuple[TokenPlan, Tensor]:
        """Select tokens by their scores (B, n), which are returned as they are in all processes."""
        threshold, backend = self.options.threshold, self.options.chosen("backend")
        chosen: dict[str, Any] = {"ratio": self.schedule.ratio} if threshold is None else {"threshold": threshold}
        if self.parallel is None:
            return plan_tokens(scores, self.grid, **chosen, **backend), scores
        scores, tokens = self.parallel.first(scores), scores.shape[1]
        count = (plan_tokens(scores, self.grid, **chosen, **backend).max_seqlen - tokens) // 3
        ratio = self.parallel.selected(count, tokens, self.conditions) / tokens
        return plan_tokens(scores, self.grid, ratio=ratio, **backend), scores

    def _moved(self, move: Callable, tokens: Tensor, x0: Tensor, where: Any, transition: Transition, *rest) -> Tensor:
        """Make a transition, where the clean estimate in the tokens is copied as `normalised` says."""
        moved = move(tokens, where, transition, self._seeds, *rest)
        if self.normalised is None or transition.interpolation == "pixels":  # whose correction is to plain copies
            return moved
        plain = replace(transition, scale=1.0, noise_scale=0.0)
        deviation, mean = self._normalisation(moved)
        unchanged, copied = (move(x, where, plain, self._seeds, *rest) for x in (x0, x0 * deviation + mean))
        clean = self.schedule.ends[self.layout.stage - 2]  # the estimate's share in the tokens
        return moved + transition.scale * clean * ((copied - mean) / deviation - unchanged)

    def _normalisation(self, like: Tensor) -> Any:
        """Return the deviations and the means of tokens' channels, on their device."""
        return (1.0, 0.0) if self.normalised is None else [x.to(like.device) for x in self.normalised]

    def _by_pixels(self, tokens: Tensor, x0: Tensor, transition: Transition, plan: Any = None, selected: Any = None):
        """Correct upsampled tokens where the transition says so.

        x0: the clean estimate; a mixed stage's is packed, and `selected` is what stands for the tokens selected in it.
        """
        if transition.interpolation != "pixels":
            return tokens
        if transition.kind == "complete":
            x0 = interpolation.low_estimate(x0, plan, selected)
        change = interpolation.correction(x0, self.grid, transition, self.options, self.resize)
        return interpolation.corrected(tokens, change, transition, plan)

    def full_resolution(self, sample: Tensor) -> Tensor:
        """Upsample a sample of any stage to full resolution without noise: for previews and interrupted runs."""
        layout = self.layout
        if layout is None or layout.resolution == "full":
            return sample
        plain = Transition("complete", 0.0, scale=1.0, noise_scale=0.0)
        seeds = torch.zeros(len(sample), dtype=torch.int64, device=sample.device)
        tokens = self.pack(self.first(sample))
        deviation, mean = self._normalisation(tokens)
        tokens = tokens * deviation + mean
        if layout.plan is None:
            full = renoise(tokens, self.grid, plain, seeds, layout.stage + 1, self.options)
        else:
            full = complete(strip(tokens, layout.plan), layout.plan, plain, seeds, self.options)
        return self.unpack(crop((full - mean) / deviation, self.padded_grid, self.full_grid), self.full_grid)

    def _whole(self, stage: int, batch: int, device: torch.device) -> Layout:
        resolution = self.schedule.stages[stage - 1].resolution
        grid = self.grid if resolution == "low" else self.full_grid
        return Layout(stage, resolution, raster(grid, batch, device), conditions=self.conditions)

    def _grid_of(self, layout: Layout) -> Grid:
        """Return the grid that a whole stage's estimate is resized from or to."""
        return self.grid if layout.resolution == "low" else self.padded_grid

    def _first_seeds(self, noise: Tensor) -> Tensor:
        given = self.options.seeds
        if given is None:
            return seeds_of(noise)
        numbers = torch.tensor([given] if isinstance(given, int) else given, dtype=torch.int64, device=noise.device)
        return numbers.repeat(len(noise) // len(numbers))  # guidance doubles the images


@torch.no_grad()
def sample(
    velocity: Callable[[Tensor, float, Layout], Tensor],
    noise: Tensor,
    grid: Grid,
    preset: str | Schedule = "flux-5x",
    *,
    decode: Callable[[Tensor, Grid], Tensor] | None = None,
    encode: Callable[[Tensor], Tensor] | None = None,
    **options,
) -> Tensor:
    """Sample any flow-matching transformer with RALU, without a diffusers pipeline.

    velocity: `(x (B, L, C), sigma, layout) -> (B, L, C)`, d x / d sigma at noise level sigma, for tokens at
              `layout.positions`; where `layout.mask` is not None, attention must skip its False tokens.
    noise:    (B, N, C) standard normal tokens in raster order of the full grid; it seeds the later stages' noise too.
    grid:     (rows, columns) of the full grid.
    preset:   a name of `ralu.presets`, or a `Schedule`.
    decode:   `(x0_tokens, grid) -> images (B, 3, H, W) in [-1, 1]`, needed for regions="canny".
    encode:   `images -> tokens` of a grid that many times smaller, needed beside `decode` for upsampler="pixels".
    options:  `Options`; regions defaults to "canny" with a decoder and "gradient" without.

    Returns the clean tokens, (B, N, C), in the dtype of the last velocity. Raises TypeError or ValueError, which name
    the argument, before the model is called; for a velocity that does not fit its tokens, at the first call.
    """
    check_tensor("noise", noise, "(B, N, C)", (*DTYPES, torch.float64))
    grid, chosen = grid_sides(grid), Options(**options)
    default = "gradient" if decode is None else "canny"
    scorer = regions.scorer_of(default if chosen.regions is None else chosen.regions, decode)
    resize = partial(interpolation.through_pixels, decode=decode, encode=encode) if decode and encode else None
    run = Run(schedule_of(preset, chosen), scorer, chosen, resize)
    run.start(noise, grid)
    x = noise
    for sigma in run.sigmas.tolist():
        v = velocity(run.first(x), sigma, run.layout)
        x, _ = run.step(x, v)
        x = x.to(v.dtype)
    return x
