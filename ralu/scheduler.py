"""The three stages, as a diffusers scheduler whose `step` hands back another number of tokens at a stage's end.

`RaluScheduler` lives inside an unmodified pipeline (see `ralu.enable`); `sample` is the same loop for everybody else.
"""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from numbers import Real

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers import SchedulerMixin as SchedulerMixin  # see ralu/__init__.py
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from ralu_kernels import TokenPlan, merge_tokens, plan_tokens, promote_tokens
from ralu_kernels._backend import _ABSENT, resolve
from ralu_kernels.tokens import CARRY_NOISES, GRANULARITIES

from . import regions as region_scorers
from . import upsampling
from .schedule import MATCHINGS, Schedule, preset
from .upsampling import UPSAMPLERS

logger = logging.get_logger("diffusers.ralu")  # diffusers' own verbosity rules
REGIONS = ("canny", "gradient", "random")


@dataclass(frozen=True)
class Layout:
    """The token sequence that the model sees now.

    stage:     1, 2 or 3.
    positions: float32 (B, L, 2), (row, column) of every token: whole numbers on the low grid in stage 1, the children
               of a promoted token at its own position + {0, 1/2} in stage 2, whole numbers on the high grid in stage 3.
    mask:      bool (B, L), False for padding; None when every sample has L tokens.
    plan:      stage 2's TokenPlan, else None.
    """

    stage: int
    positions: Tensor
    mask: Tensor | None = None
    plan: TokenPlan | None = None


def raster(grid: tuple[int, int], batch: int, device: torch.device) -> Tensor:
    """Whole positions of a grid in raster order, float32 (batch, h·w, 2)."""
    rows, columns = (torch.arange(size, dtype=torch.float32, device=device) for size in grid)
    return torch.cartesian_prod(rows, columns).view(1, -1, 2).expand(batch, -1, -1)


def seeds_of(noise: Tensor) -> Tensor:
    """A 64-bit seed for each sample, a hash of its starting noise (B, ...): int64 (B,).

    Diffusers gives a scheduler's `step` no generator, and a sample's noise says all that its generator would. Integer
    arithmetic alone, so the seed does not depend on the batch or the device.
    """
    bits = noise.detach().float().flatten(1).contiguous().view(torch.int32).long()
    mixed = (bits + torch.arange(1, bits.shape[1] + 1, device=bits.device) * -0x61C8864680B583EB) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 29)) * -0x6B2FB644ECCEEE15
    return (mixed ^ (mixed >> 32)).sum(dim=1)


class RaluScheduler(FlowMatchEulerDiscreteScheduler):
    """Region-adaptive latent upsampling as a drop-in for `FlowMatchEulerDiscreteScheduler`.

    Its own steps rule: `num_inference_steps` cannot be told from a pipeline's default, so `set_timesteps` always makes
    the preset's. Fewer than 3 asked for means the stock schedule at full resolution.

    preset:      a name of `ralu.schedule`, a `Schedule`, or the dict that a saved one is.
    ratio:       share of tokens to upsample early; None for the preset's.
    threshold:   upsample early what scores at least this much instead; counts then differ between images.
    regions:     "canny" (VAE preview and Canny edges), "gradient" (latent differences), "random" (for comparison), a
                 mask (an image, or a tensor (H, W) or (B, H, W)) or a scorer, see `ralu.regions`.
    granularity: "pixel" upsamples latent pixels; "token" copies whole packed tokens, as the paper's release does.
    carry_noise: "exact" gives carried tokens the flow's variance; "release" gives them plain noise (too much by b²·c).
    matching:    between stages "covariance" (the paper's), "snr" or "off", see `ralu.schedule.transition`;
                 None for the preset's.
    upsampler:   "nearest" (the paper's); with matching="snr" also "bilinear", "bicubic", "lanczos", `ralu.upsampling`.
    backend:     which `ralu_kernels` backend runs.
    stock:       the arguments of `FlowMatchEulerDiscreteScheduler`.
    """

    def __init__(
        self,
        preset: str | dict | Schedule = "flux-5x",
        ratio: float | None = None,
        threshold: float | None = None,
        regions: str | Image.Image | Tensor | region_scorers.Scorer | None = "canny",
        granularity: str = "pixel",
        carry_noise: str = "exact",
        matching: str | None = None,
        upsampler: str = "nearest",
        backend: str = "auto",
        **stock,
    ):
        super().__init__(**stock)
        if not isinstance(preset, str | dict | Schedule):
            raise TypeError(f"preset must be a name, a Schedule or a saved one's dict, got {preset!r}")
        _check_choice("granularity", granularity, GRANULARITIES)
        _check_choice("carry_noise", carry_noise, CARRY_NOISES)
        _check_choice("matching", matching, (*MATCHINGS, None))
        _check_choice("upsampler", upsampler, UPSAMPLERS)
        _check_choice("backend", backend, ("auto", *_ABSENT))
        _check_number("ratio", ratio, 0, 1)
        given = regions
        if isinstance(regions, Image.Image | Tensor):
            regions = region_scorers.mask(regions)
        if not callable(regions) and not (regions is None or (isinstance(regions, str) and regions in REGIONS)):
            names = ", ".join(map(repr, REGIONS))
            wrong = ValueError if isinstance(regions, str) else TypeError
            raise wrong(f"regions must be {names}, an image, a tensor or a callable, got {regions!r}")
        # What a latent's gradient or a scorer of one's own reaches is unknown, but no score is a million.
        shares = regions in ("canny", "random") or isinstance(given, Image.Image | Tensor)
        _check_number("threshold", threshold, *((0, 1) if shares else (-1e6, 1e6)))
        if ratio is not None and threshold is not None:
            raise ValueError(f"give ratio or threshold, not both: got ratio={ratio}, threshold={threshold}")
        bent = [key for key in _BENDING if self.config.get(key)]
        if bent:
            raise ValueError(f"the stock scheduler's {', '.join(bent)} would distort RALU's schedule; it must be off")
        self.schedule = _schedule(preset, self.config, ratio=ratio, matching=matching)
        if upsampler != "nearest" and self.schedule.matching != "snr":
            raise ValueError(f"upsampler={upsampler!r} needs matching='snr', got {self.schedule.matching!r}")
        self.register_to_config(
            preset=asdict(preset) if isinstance(preset, Schedule) else preset,
            ratio=ratio, threshold=threshold, granularity=granularity, carry_noise=carry_noise, matching=matching,
            upsampler=upsampler, backend=backend, regions=None if callable(regions) else regions,
        )  # fmt: skip
        self.scorer = regions if callable(regions) else None
        self.bound = False
        self.run_begins: Callable[[RaluScheduler], None] | None = None  # a function of a module, which can be pickled
        self._run = self.layout = None

    @staticmethod
    def _get_init_keys(input_class):
        keys = set(inspect.signature(input_class.__init__).parameters) - {"stock"}
        parent = FlowMatchEulerDiscreteScheduler.__init__
        return keys | set(inspect.signature(parent).parameters) if issubclass(input_class, RaluScheduler) else keys

    def bind(
        self,
        decode: Callable | None = None,
        stage_changed: Callable[[], None] = lambda: None,
        pack: Callable[[Tensor], Tensor] = lambda sample: sample,
        unpack: Callable[[Tensor, tuple[int, int]], Tensor] = lambda tokens, grid: tokens,
    ):
        """Make ready to run.

        decode:        for "canny", see `ralu.regions.canny`.
        stage_changed: called between stages.
        pack, unpack:  where a model's samples are no tokens (B, L, C): `pack(sample)` gives them, in raster order and
                       with channel c·4 + 2·row + column for latent channel c, and `unpack(tokens, (rows, columns))`
                       undoes it. A mixed sequence is one row. The methods below take and give samples as the model's.
        """
        if self.config.regions is not None:
            if self.config.regions == "canny" and decode is None:
                raise ValueError("regions='canny' needs a decoder; pass regions='gradient' or a callable")
            named = {
                "canny": region_scorers.canny(decode),
                "gradient": region_scorers.gradient,
                "random": lambda x0, grid: region_scorers.random(self._seeds, grid),
            }
            self.scorer = named[self.config.regions]
        self._stage_changed, self._pack, self._unpack = stage_changed, pack, unpack
        self.bound = True

    def unbind(self):
        self.bound = False
        self._run = self.layout = None

    def __getstate__(self):
        """Copies are not bound: a scheduler that is copied or pickled must not take the model along."""
        scorer = self.scorer if self.config.regions is None else None
        loose = {"scorer": scorer, "bound": False, "_run": None, "layout": None}
        return self.__dict__ | loose | dict.fromkeys(("_stage_changed", "_pack", "_unpack"))

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        """Stock signature. Custom `sigmas` or `timesteps` are refused: they have no meaning across stages."""
        if self.run_begins is not None:
            self.run_begins(self)
        if not self.bound:
            raise RuntimeError(
                "this pipeline has RALU's scheduler, but its transformer is a stock one, as after loading: call "
                "ralu.enable(pipe) before using it, or ralu.disable(pipe) for the stock schedule"
            )
        given = sigmas if sigmas is not None else timesteps
        asked = num_inference_steps or (sum(self.schedule.steps) if given is None else len(given))
        self._run = self.layout = None
        self._stage_changed()  # a run that failed may have left its caches behind
        if asked < 3:
            logger.warning_once(f"RALU needs at least 3 steps; {asked} steps run the stock schedule at full resolution")
            return super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        if timesteps is not None or (sigmas is not None and not np.allclose(sigmas, np.linspace(1, 1 / asked, asked))):
            raise ValueError("RALU runs its preset's own schedule; custom sigmas or timesteps do not fit in")
        run = []  # (stage, sigma, next sigma), a row a step
        for stage in (1, 2, 3):
            levels = self.schedule.sigmas(stage)
            run += [(stage, *pair) for pair in pairwise(levels)]
        self._run = run
        self.num_inference_steps = len(run)
        self.sigmas = torch.tensor([sigma for _, sigma, _ in run] + [0.0], dtype=torch.float32, device=device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self._step_index = self._begin_index = None

    def set_begin_index(self, begin_index=0):
        if begin_index and self._run is not None:
            raise ValueError(f"RALU starts from pure noise, but the pipeline asks to start at step {begin_index}")
        super().set_begin_index(begin_index)

    @property
    def running(self) -> bool:
        """Whether the current run has stages (and not the stock schedule)."""
        return self._run is not None

    def start(self, noise: Tensor, grid: tuple[int, int], token_pixels: int | None = None, images: int | None = None):
        """Begin stage 1.

        noise:        (B, 4n, C), the model's first input, in raster order of the high grid (2h, 2w) = grid. B may be
                      more than the first step's: guidance doubles batches.
        token_pixels: side of a token in the picture, for errors that speak of pixels.
        images:       how many images these are, B unless guidance doubles them.
        """
        if grid[0] % 2 or grid[1] % 2:
            if token_pixels is None:
                raise ValueError(f"RALU halves the token grid, but {grid[0]}x{grid[1]} tokens are odd in number")
            unit = 2 * token_pixels
            nearest = " or ".join("x".join(str(unit * max(1, (size + up) // 2)) for size in grid) for up in (0, 1))
            raise ValueError(
                f"RALU needs a height and width that divide by {unit}, got {grid[0] * token_pixels}x"
                f"{grid[1] * token_pixels} (height x width); the nearest sizes are {nearest}"
            )
        noise = self._pack(noise)
        if noise.shape[1] != grid[0] * grid[1]:
            tokens = grid[0] * grid[1]
            raise ValueError(f"noise has {noise.shape[1]} tokens, but the grid {grid[0]}x{grid[1]} has {tokens}")
        resolve(self.config.backend, noise.device)
        if hasattr(self.scorer, "check_batch"):  # a mask's
            self.scorer.check_batch(images or len(noise))
        self.grid = grid[0] // 2, grid[1] // 2
        self.layout = Layout(1, raster(self.grid, len(noise), noise.device))

    def low_noise(self, sample: Tensor) -> Tensor:
        """The first step's sample at half resolution: the full-size noise (B, 4n, C), subsampled to (B, n, C).

        Nearest neighbour, so that a seed fixes the picture's composition at every size. Other samples pass unchanged.
        """
        if self.layout.stage != 1:
            return sample
        (h, w), tokens = self.grid, self._pack(sample)
        if tokens.shape[1] != 4 * h * w:
            return sample
        tokens = tokens.unflatten(1, (h, 2, w, 2))
        if self.config.granularity == "token":
            return self._unpack(tokens[:, :, 0, :, 0].flatten(1, 2), self.grid)
        corner = tokens[..., ::4]  # each token's first inner pixel: (B, h, 2, w, 2, C/4)
        return self._unpack(corner.permute(0, 1, 3, 5, 2, 4).reshape(len(sample), h * w, -1), self.grid)

    def step(self, model_output, timestep, sample, *args, return_dict: bool = True, **kwargs):
        """One Euler step (stock signature). At a stage's end the result has the next stage's token count.

        model_output: (B, L, C) velocity; sample: (B, L, C), in the very first step the full-size noise, whose values
        seed the later stages' noise. Where `pack` is bound both are what it takes.
        """
        if not self.running:
            return super().step(model_output, timestep, sample, *args, return_dict=return_dict, **kwargs)
        if self.layout is None:
            raise RuntimeError("the model was not called through ralu.enable or ralu.sample before this step")
        index = self._step_index or 0
        stage, sigma, following = self._run[index]
        if index == 0:
            self._seeds = seeds_of(self._pack(sample))
        x, v = self.low_noise(sample).float(), model_output.float()
        advanced = x + (following - sigma) * v
        self._step_index = index + 1
        if index + 1 == len(self._run):
            self._run = self.layout = None
        elif self._run[index + 1][0] != stage:
            advanced = self._mix(advanced, x - sigma * v) if stage == 1 else self._merge(advanced)
            self._stage_changed()
        advanced = advanced.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=advanced) if return_dict else (advanced,)

    def _mix(self, low: Tensor, x0: Tensor) -> Tensor:
        """Stage 1 to 2: upsample the chosen regions, re-noise everything."""
        low, x0 = self._pack(low), self._pack(x0)
        scores = self.scorer(x0, self.grid)
        if scores.shape != low.shape[:2]:
            expected, got = tuple(low.shape[:2]), tuple(scores.shape)
            raise ValueError(f"the scorer must return one score a token, {expected}, got {got}")
        backend, threshold = self.config.backend, self.config.threshold
        choice = {"ratio": self.schedule.ratio} if threshold is None else {"threshold": threshold}
        plan = plan_tokens(scores.to(low.device, torch.float32), self.grid, **choice, backend=backend)
        packed = self._move(promote_tokens, upsampling.promote, low, plan, 0)
        batch, length = len(low), plan.max_seqlen
        if packed.shape[0] == batch * length:
            self.layout = Layout(2, plan.positions.view(batch, length, 2), plan=plan)
            return self._unpack(packed.view(batch, length, -1), (1, length))
        column = torch.arange(length, device=low.device)
        mask = column < plan.cu_seqlens.diff()[:, None]
        rows = torch.where(mask, plan.cu_seqlens[:-1, None] + column, plan.cu_seqlens[:-1, None])  # any row pads
        self.layout = Layout(2, plan.positions[rows], mask, plan)
        return self._unpack(packed[rows], (1, length))

    def _merge(self, mixed: Tensor) -> Tensor:
        """Stage 2 to 3: upsample the rest, re-noise everything, raster order."""
        plan, mask, mixed, grid = self.layout.plan, self.layout.mask, self._pack(mixed), self._high_grid
        packed = mixed.flatten(0, 1) if mask is None else mixed[mask]
        self.layout = Layout(3, raster(grid, len(mixed), mixed.device))
        return self._unpack(self._move(merge_tokens, upsampling.merge, packed, plan, 1), grid)

    def _move(self, fused: Callable, interpolated: Callable, tokens: Tensor, plan: TokenPlan, k: int) -> Tensor:
        move, kind = self.schedule.transitions[k], self.config.upsampler
        if kind == "nearest":
            return fused(tokens, plan, move.scale, move.noise_scale, move.c, self._seeds, **self._rules)
        return interpolated(tokens, plan, move, self._seeds, kind, self.config.granularity, self.config.backend)

    @property
    def _high_grid(self) -> tuple[int, int]:
        return 2 * self.grid[0], 2 * self.grid[1]

    @property
    def _rules(self):
        return {key: self.config[key] for key in ("granularity", "carry_noise", "backend")}

    def full_resolution(self, sample: Tensor) -> Tensor:
        """A sample of any stage at full resolution, (B, 4n, C), without noise: for previews and interrupted runs."""
        if self.layout is None or self.layout.stage == 3:
            return sample
        sample, plan, mask = self._pack(self.low_noise(sample)), self.layout.plan, self.layout.mask
        if plan is None:
            plan = plan_tokens(sample.new_zeros(sample.shape[:2], dtype=torch.float32), self.grid, ratio=0.0)
        packed = sample.flatten(0, 1) if mask is None else sample[mask]
        return self._unpack(merge_tokens(packed, plan, 1.0, 0.0, 0.0, 0, **self._rules), self._high_grid)


RaluScheduler.__module__ = "ralu"  # what diffusers writes into model_index.json, to import it from there

# Stock options that change the noise levels after shifting, or add noise of their own.
_BENDING = (
    "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas",
    "stochastic_sampling", "use_flow_sigmas",
)  # fmt: skip


def _check_choice(name: str, value, allowed: tuple):
    if not (value is None or isinstance(value, str)):
        raise TypeError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def _check_number(name: str, value, least: float, most: float):
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in [{least:g}, {most:g}], got {value!r}")
    if not least <= value <= most:  # which NaN fails
        raise ValueError(f"{name} must lie in [{least:g}, {most:g}], got {value!r}")


def _schedule(chosen: str | dict | Schedule, config, **changes) -> Schedule:
    if isinstance(chosen, str):
        # FLUX.1-dev shifts by resolution, and the paper's tables are for what it reaches at 1024 px: 3.
        schedule = preset(chosen, shift=3.0 if config.use_dynamic_shifting else config.shift)
    else:
        schedule = Schedule(**chosen) if isinstance(chosen, dict) else chosen
    return replace(schedule, **{key: value for key, value in changes.items() if value is not None})


@torch.no_grad()
def sample(
    velocity: Callable[[Tensor, float, Layout], Tensor],
    noise: Tensor,
    grid: tuple[int, int],
    preset: str | Schedule = "flux-5x",
    *,
    decode: Callable[[Tensor, tuple[int, int]], Tensor] | None = None,
    **options,
) -> Tensor:
    """Sample any flow-matching transformer with RALU, without a diffusers pipeline.

    velocity: `(x (B, L, C), sigma, layout) -> (B, L, C)`, d x / d sigma at noise level sigma, for tokens at
              `layout.positions`; where `layout.mask` is not None, attention must skip its False tokens.
    noise:    (B, 4n, C) standard normal tokens in raster order of the high grid; it seeds the later stages' noise too.
    grid:     (2h, 2w), the high grid, both even.
    decode:   `(x0_tokens, grid) -> images (B, 3, H, W) in [-1, 1]`, needed for regions="canny".
    options:  `RaluScheduler`'s; regions defaults to "canny" with a decoder and "gradient" without.

    Returns the clean tokens, (B, 4n, C), in the dtype of the last velocity. Raises ValueError for an odd grid, noise
    that does not fit it, or wrong options.
    """
    options.setdefault("regions", "gradient" if decode is None else "canny")
    scheduler = RaluScheduler(preset, **options)
    scheduler.bind(decode)
    scheduler.set_timesteps()
    scheduler.start(noise, grid)
    x = noise
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        v = velocity(scheduler.low_noise(x), sigma, scheduler.layout)
        x = scheduler.step(v, t, x, return_dict=False)[0]
    return x
