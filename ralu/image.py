"""Runs that are given an image, to begin with at a lower noise level or to keep outside a mask. Needs PyTorch alone."""

from typing import Any

from torch import Tensor

from . import interpolation
from .layout import Grid, coarsened, crop, gather, pack, spread, unpack
from .regions import Change, Mask
from .schedule import shifted
from .stages import Run, widen


class ImageRun(Run):
    """A `Run` that may begin at a later step than the first, from an image and noise.

    whole: take and give samples at full size in every step, for who blends them with others of that size: of a low
           token one latent pixel of each 2x2 counts, and is copied to all four. Where the grid is padded, what pads
           is kept here from step to step.
    """

    def __init__(self, *args, whole: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.whole = whole
        self.begun = 0  # the first step that is made
        self.painted: Any = None  # (B, 1, H, W), 1 where tokens are to be selected; in turn where there are more images
        self._given: Any = None  # clean latents and noise, until they are made the first sample
        self._opening: Any = None  # the first sample, where it was made of them
        self._lowered: Any = None, None  # clean latents, and their low tokens
        self._padded: Any = None  # with `whole`, the last sample on the padded grid

    @property
    def made(self) -> list[int]:
        """How many steps of each stage are made."""
        stages = [stage for stage, _, _ in self.steps[self.begun :]]
        return [stages.count(stage) for stage in range(1, 1 + len(self.schedule.stages))]

    def begin(self, index: int, level: float | None = None):
        """Leave out the steps before this one.

        level: the noise level at which it begins, if not the step's own.
        Raises ValueError where a scorer has too few steps left to go by.
        """
        stage, sigma, following = self.steps[index]
        self.index = self.begun = index
        self.steps[index] = stage, sigma if level is None else level, following
        for before in self._selecting if isinstance(self.scorer, Change) else ():
            if stage <= before + 1:
                self.options.check_steps(self.made[before - 1], f"a run from step {index} on")

    def begin_at(self, level: float) -> int:
        """Begin at a noise level in (0, 1] at full resolution, in the last step that holds it.

        The mean of 2x2 latent pixels has half their noise: level / 2 beside 1 - level of the image, which is the level
        `shifted(level, 1/2)` at half resolution. Where noise is matched, no later step has more noise than this.
        Returns the step's index. Raises ValueError as `begin` does.
        """
        low = [stage.resolution == "low" for stage in self.schedule.stages]
        levels = [shifted(level, 0.5) if low[stage - 1] else level for stage, _, _ in self.steps]
        held = (k for k, (_, sigma, _) in enumerate(self.steps) if sigma > levels[k] - 1e-6)  # float32's rounding
        index = max(held)
        if levels[index] > self.steps[index][2]:
            self.begin(index, levels[index])
        else:  # between two stages whose noise is not matched
            index += 1
            self.begin(index)
        return index

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Mix an image with noise at the next step's noise level, at full size: (1 - sigma)·clean + sigma·noise.

        clean, noise: latent pixels (B, C, H, W), as of a film's one picture (B, 1, C, H, W), or tokens (B, N, C) in
                      raster order; what is returned is like them.
        Before `start`, a run that begins at a later step is made to begin with the two. From then on the image is
        shown as the layout has it: where tokens are low, by the mean of each 2x2 latent pixels, or with the upsampler
        "pixels" by way of the image.
        """
        sigma = self.steps[self.index][1]
        if self.layout is None:
            self._given = (clean, noise) if sigma < 1 else None
        elif self.layout.resolution != "full":
            shown = crop(self._shown(clean), self.padded_grid, self.full_grid).to(clean.dtype)
            clean = shown if clean.dim() == 3 else unpack(shown, self.full_grid).view_as(clean)
        return sigma * noise + (1 - sigma) * clean

    def start(self, noise: Tensor, grid: Grid, images: int | None = None, conditions: int = 0):
        """Begin the stage of the first step that is made, see `Run.start`.

        Raises ValueError, besides, where that is a later step, not at full resolution, and `noised` was not called.
        """
        images = images or len(noise)
        if self.painted is not None:
            self.scorer = Mask(self.painted.float().repeat(images // len(self.painted), 1, 1, 1))
        super().start(noise, grid, images, conditions)
        stage, sigma, _ = self.steps[self.begun]
        if sigma == 1:
            return
        self.layout = self._whole(stage, images, noise.device)
        if self._given is None:
            if self.layout.resolution != "full":
                raise ValueError("to begin at a later step RALU needs image and noise apart: latents must be None")
            return
        clean, noise = self._given
        self._seeds, self._given = self._first_seeds(_tokens(noise)), None
        if self.layout.resolution == "mixed":
            self.layout = self._selected(stage, self._low(clean))
        if self.layout.resolution != "full":
            noise = self._widened(_tokens(noise))
            self._opening = self._laid_out((sigma * noise + (1 - sigma) * self._shown(clean)).to(noise.dtype))

    def first(self, sample: Tensor) -> Tensor:
        """Bring the first step's sample to its stage's tokens, and with `whole` every step's. Others pass unchanged."""
        if self.index == self.begun and self._opening is not None:
            return self._opening.repeat(len(sample) // len(self._opening), *[1] * (sample.dim() - 1))
        if self.whole and self.layout.resolution != "full":
            return self._laid_out(self._widened(self.pack(sample)))
        return super().first(sample)

    def step(self, sample: Tensor, velocity: Tensor) -> tuple[Tensor, bool]:
        """Make one step of the solver, and at a stage's end the transition, see `Run.step`."""
        advanced, ended = super().step(sample, velocity)
        if self.whole and self.layout.resolution != "full":
            self._padded = spread(self.pack(advanced), self.layout, self.grid)
            advanced = self.unpack(crop(self._padded, self.padded_grid, self.full_grid), self.full_grid)
        return advanced, ended

    def _widened(self, tokens: Tensor) -> Tensor:
        """Put full-size tokens (B, N, C) on the padded grid, beside noise or what was there after the step before."""
        if self.padded_grid == self.full_grid:
            return tokens
        if self._padded is None:
            return widen(tokens, self.full_grid, self.padded_grid, self._first_seeds(tokens), self.options)
        (rows, columns), repeats = self.full_grid, len(tokens) // len(self._padded)
        whole = self._padded.to(tokens.dtype).repeat(repeats, 1, 1).unflatten(1, self.padded_grid)
        whole[:, :rows, :columns] = tokens.unflatten(1, self.full_grid)
        return whole.flatten(1, 2)

    def _extended(self, clean: Tensor) -> Tensor:
        """Return an image's tokens on the padded grid, where its last latent pixels are repeated."""
        tokens = _tokens(clean)
        if self.padded_grid == self.full_grid:
            return tokens
        deviation, mean = self._normalisation(tokens)
        return (interpolation.extended(tokens * deviation + mean, self.full_grid, self.padded_grid) - mean) / deviation

    def _shown(self, clean: Tensor) -> Tensor:
        """Show an image as the layout has it, on the padded grid: (B, 4n, C)."""
        return coarsened(self._extended(clean), self._low(clean), self.layout, self.grid)

    def _laid_out(self, tokens: Tensor) -> Tensor:
        """Make a sample of the layout's of tokens on the padded grid, (B, 4n, C)."""
        tokens = gather(tokens, self.layout, self.grid)
        return self.unpack(tokens, self.grid if self.layout.plan is None else (1, tokens.shape[1]))

    def _low(self, clean: Tensor) -> Tensor:
        """Return the low tokens of a clean image, (B, n, C)."""
        if self._lowered[0] is not clean:
            tokens = self._extended(clean)
            if any(transition.interpolation == "pixels" for transition in self.schedule.transitions):
                low = self.resize(tokens, self.padded_grid, self.grid)
            else:
                deviation, mean = self._normalisation(tokens)
                low = (interpolation.averaged(tokens * deviation + mean, self.grid) - mean) / deviation
            self._lowered = clean, low
        return self._lowered[1]


def _tokens(latents: Tensor) -> Tensor:
    """Pack latent pixels (B, C, H, W), or with one more axis of one; tokens stay as they are."""
    return latents if latents.dim() == 3 else pack(latents.flatten(1, -3))
