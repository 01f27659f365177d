"""`ralu.stages` as a diffusers scheduler, whose `step` hands back another number of tokens at a stage's end.

`RaluScheduler` lives inside an unmodified pipeline, see `ralu.enable`.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers import SchedulerMixin as SchedulerMixin  # see ralu/__init__.py
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils import logging
from torch import Tensor

from .caches import Progress
from .image import ImageRun
from .interpolation import check_resize
from .layout import Layout
from .options import Options, schedule_of
from .parallel import Parallel
from .presets import known_shift
from .regions import no_mask, scorer_of
from .schedule import Schedule, own_shift
from .solver import Solver

logger = logging.get_logger("diffusers.ralu")  # diffusers' own verbosity rules

# Stock options that change the noise levels after shifting, or add noise of their own.
_DISTORTING = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas",
    "stochastic_sampling", "use_flow_sigmas",
)  # fmt: skip
OPTIONS = tuple(field.name for field in fields(Options))


class RaluScheduler(FlowMatchEulerDiscreteScheduler):
    """Region-adaptive latent upsampling as a drop-in for `FlowMatchEulerDiscreteScheduler`.

    The preset's number of steps is always made: `num_inference_steps` cannot be told from a pipeline's default. Fewer
    than 3 asked for means the stock schedule at full resolution.

    preset:   a name of `ralu.presets`, a `Schedule`, or the dict that a saved one is. "stock-STEPS" is the stock
              schedule with that many steps, and "stock" with as many as are asked for.
    the rest: as `ralu.Options` describes it, and the arguments of `FlowMatchEulerDiscreteScheduler`. `shift_terminal`,
              by which Qwen-Image's stock run of 50 steps is changed by 0.02 at most, is for stock schedules alone.

    Raises TypeError or ValueError for what is not as described, and for a stock option that would distort the schedule.
    """

    def __init__(
        self,
        preset: str | dict | Schedule = "flux-5x",
        ratio: float | None = None,
        threshold: float | None = None,
        regions: Any = "canny",
        granularity: str | None = None,
        kept_noise: str | None = None,
        matching: str | None = None,
        upsampler: str | None = None,
        solver: str | None = None,
        spacing: str | None = None,
        backend: str | None = None,
        seeds: Any = None,
        **stock,
    ):
        super().__init__(**stock)
        options = Options(
            ratio, threshold, regions, granularity, kept_noise, matching, upsampler, solver, spacing, backend, seeds
        )
        if distorting := ", ".join(key for key in _DISTORTING if self.config.get(key)):
            raise ValueError(f"the stock scheduler's {distorting} must be off: it would distort RALU's schedule")
        self.schedule = (
            None if preset == "stock" else schedule_of(preset, options, own_shift(self.config, known_shift(preset)))
        )
        self.is_stock = isinstance(preset, str) and preset.startswith("stock")
        self.has_regions = self.schedule is not None and bool(self.schedule.mixed)
        # Only a name can be saved: None is for a mask or a scorer.
        name = regions if isinstance(regions, str) else None
        self.scorer = None if regions is None or name else scorer_of(regions)
        self.register_to_config(
            preset=preset.to_dict() if isinstance(preset, Schedule) else preset,
            **{option: getattr(options, option) for option in OPTIONS} | {"regions": name},
        )
        self.options = options
        self.run_begins: Callable[[RaluScheduler], None] | None = None  # a function of a module, which can be pickled
        self.unbind()

    @staticmethod
    def _get_init_keys(input_class):
        keys = set(inspect.signature(input_class.__init__).parameters) - {"stock"}
        parent = FlowMatchEulerDiscreteScheduler.__init__
        return keys | set(inspect.signature(parent).parameters) if issubclass(input_class, RaluScheduler) else keys

    def bind(
        self,
        decode: Callable | None = None,
        stage_begins: Callable[[int, int], None] = lambda stage, steps: None,
        pack: Callable[[Tensor], Tensor] = lambda sample: sample,
        unpack: Callable[[Tensor, tuple[int, int]], Tensor] = lambda tokens, grid: tokens,
        velocity: Callable[[Tensor], Tensor] = lambda velocity: velocity,
        resize: Callable | None = None,
        normalised: tuple[Tensor, Tensor] | None = None,
        parallel: Parallel | None = None,
        whole: bool = False,
    ):
        """Make ready to run. A second call replaces the first.

        decode:       for "canny", see `ralu.regions.canny`.
        stage_begins: called before each stage's first transformer call, with the stage's number and its steps.
        pack, unpack: where a model's samples are no tokens, see `ralu.stages.Run`. The methods below take and give
                      samples as the model's.
        velocity:     makes that of a step of what the model gave for it, of the same shape.
        resize:       for upsampler="pixels", see `ralu.stages.Run`.
        normalised:   how the channels of tokens are normalised, see `ralu.stages.Run`.
        parallel:     the processes that split the model's sequences.
        whole:        hand out and take samples at full size in every step, see `ralu.image.ImageRun`.
        Raises ValueError for regions="canny" without a decoder, and upsampler="pixels" without `resize`.
        """
        regions = self.config.regions if self.has_regions else "gradient"
        if regions is None and self.scorer is None:
            raise ValueError(
                "regions must be given: this scheduler was saved with a mask or scorer, which is not saved"
            )
        if self.schedule is not None and not self.is_stock:
            check_resize(self.schedule, resize)
        scorer = self.scorer
        if scorer is None:
            scorer = no_mask if regions == "mask" else scorer_of(regions, decode)
        self._bound_scorer, self._resize = scorer, resize
        self._stage_begins, self._velocity = stage_begins, velocity
        self._samples = {
            "pack": pack, "unpack": unpack, "normalised": normalised, "parallel": parallel, "whole": whole
        }  # fmt: skip

    def unbind(self):
        """Forget the model."""
        self._bound_scorer = self._stage_begins = self._samples = None
        self._velocity = self._resize = self._run = self._solver = self._stock_steps = None

    @property
    def bound(self) -> bool:
        """Whether it is ready to run."""
        return self._bound_scorer is not None

    def __getstate__(self):
        """Leave the model out: a scheduler that is copied or pickled must not take it along."""
        loose = ("_bound_scorer", "_stage_begins", "_samples", "_velocity", "_resize", "_run", "_solver")
        return self.__dict__ | dict.fromkeys(loose)

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        """Set the preset's noise levels (stock signature).

        Raises RuntimeError before `bind`, and ValueError for custom `sigmas` or `timesteps`, which mean nothing across
        stages.
        """
        if self.run_begins is not None:
            self.run_begins(self)
        if not self.bound:
            raise RuntimeError(
                "this pipeline has RALU's scheduler, but its transformer is a stock one, as after loading: call "
                "ralu.enable(pipe) before using it, or ralu.disable(pipe) for the stock schedule"
            )
        self._run = self._solver = None
        if self.is_stock:
            if self.schedule is not None:
                num_inference_steps = sum(self.schedule.steps)
                sigmas = None if sigmas is None else _trailing(num_inference_steps)
            if self.options.spacing == "trailing" and sigmas is None and timesteps is None:
                sigmas = _trailing(num_inference_steps)
            if self.options.solver not in (None, "euler"):  # which the stock step is
                self._solver = Solver(self.options.solver)
            super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
            self._stage_begins(1, len(self.timesteps))
            return
        given = sigmas if sigmas is not None else timesteps
        asked = num_inference_steps or (sum(self.schedule.steps) if given is None else len(given))
        self._stage_begins(1, self.schedule.steps[0])  # a run that failed may have left its caches behind
        if asked < 3:
            logger.warning_once(f"RALU needs at least 3 steps; {asked} steps run the stock schedule at full resolution")
            super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
            return
        if timesteps is not None or (sigmas is not None and not np.allclose(sigmas, _trailing(asked))):
            raise ValueError("RALU runs its preset's own schedule; custom sigmas or timesteps do not fit in")
        run = ImageRun(self.schedule, self._bound_scorer, self.options, self._resize, **self._samples)
        self._run = run
        self._stock_steps = {"num_inference_steps": asked, "sigmas": sigmas, "mu": mu}
        self.num_inference_steps = len(run.steps)
        self.sigmas = torch.cat([run.sigmas, torch.zeros(1)]).to(device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self._step_index = self._begin_index = None

    def set_begin_index(self, begin_index=0):
        """Set the first step (stock signature).

        Raises ValueError where that is a later one, and regions="change" has too few steps left to go by.
        """
        super().set_begin_index(begin_index)
        if begin_index and self._run is not None:
            if self._run.begun != begin_index:
                self._run.begin(begin_index)
            stage = self._run.steps[begin_index][0]
            self._stage_begins(stage, self._run.made[stage - 1])
        elif begin_index and self.bound:
            self._stage_begins(1, len(self.timesteps) - begin_index)

    def begin_at(self, strength: float) -> Tensor:
        """Begin where the stock run of the steps asked for begins with this strength, and return the timesteps left.

        That is a noise level, and the last step that holds it is made from there on, see `ImageRun.begin_at`.
        Raises ValueError for a strength in [0, 1] that leaves none of the steps asked for, and as `set_begin_index`.
        """
        if self._run is None:
            raise RuntimeError("begin_at is for a run with stages: call set_timesteps first")
        steps = self._stock_steps["num_inference_steps"]
        skipped = int(max(steps - min(steps * strength, steps), 0))  # as diffusers rounds
        if skipped == steps:
            raise ValueError(f"strength must leave one of the {steps} steps asked for at least, got {strength}")
        if skipped:
            stock = FlowMatchEulerDiscreteScheduler(**stock_arguments(self.config))
            stock.set_timesteps(**self._stock_steps)
            first = self._run.begin_at(float(stock.sigmas[skipped]))
            self.sigmas[first] = self._run.steps[first][1]
            self.timesteps[first] = self.sigmas[first] * self.config.num_train_timesteps
            self.set_begin_index(first)
        return self.timesteps[self._run.begun :]

    def repaint(self, mask: Tensor | None):
        """Select what is repainted, where regions="mask". mask: (B, 1, H, W), 1 where an inpainting pipeline paints."""
        if self._bound_scorer is no_mask:
            self._run.painted = mask

    def scale_noise(self, sample, timestep, noise):
        """Mix a clean image with noise at the next step's noise level (stock signature), see `ImageRun.noised`."""
        if self._run is None:
            return super().scale_noise(sample, timestep, noise)
        return self._run.noised(sample, noise)

    @property
    def running(self) -> bool:
        """Whether a run with stages (and not the stock schedule) is going on."""
        return self._run is not None

    @property
    def parallel(self) -> Parallel | None:
        """The processes that split the sequences of the current run's model."""
        return self._run.parallel

    @property
    def progress(self) -> Progress | None:
        """Where the run is, with stages or without; None before and after."""
        run, begun = self._run, self.begin_index or 0
        if run is not None:
            return Progress.at(run.index - run.begun, run.made, run.schedule.mixed)
        step = begun if self.step_index is None else self.step_index
        return Progress.at(step - begun, (len(self.timesteps) - begun,))

    @property
    def layout(self) -> Layout | None:
        """The tokens that the model sees now; None before a run's first transformer call and after its end."""
        return None if self._run is None else self._run.layout

    @property
    def grid(self) -> tuple[int, int]:
        """The current run's low grid (h, w)."""
        return self._run.grid

    @property
    def full_grid(self) -> tuple[int, int]:
        """The current run's full grid (rows, columns)."""
        return self._run.full_grid

    def start(self, noise: Tensor, grid: tuple[int, int], images: int | None = None, conditions: int = 0):
        """Begin the first stage, see `ralu.stages.Run.start`. noise: the sample of the model's first call."""
        self._run.start(noise, grid, images, conditions)

    def subsample_first(self, sample: Tensor) -> Tensor:
        """Bring a full-size sample to the stage's tokens: the first step's, and where `whole` is bound, every step's.

        Other samples pass unchanged.
        """
        return sample if self._run is None else self._run.first(sample)

    def step(self, model_output, timestep, sample, *args, return_dict: bool = True, **kwargs):
        """Make one step of the solver (stock signature). At a stage's end the result has the next stage's token count.

        model_output: (B, L, C) velocity; sample: (B, L, C), in the very first step the full-size noise, whose signs
        seed the later stages' noise. Where `pack` is bound both are what it takes. Raises RuntimeError where the model
        was not called through `ralu.enable` or `ralu.sample` before, and ValueError for a velocity that does not fit.
        """
        run = self._run
        if run is not None and run.conditions:
            # Pipelines cut off what is behind the image's tokens, in the first step as if these were of full size.
            model_output = model_output[:, : run.layout.positions.shape[1]]
        if self.bound:
            model_output = self._velocity(model_output)
        if run is None:
            return self._stock_step(model_output, timestep, sample, *args, return_dict=return_dict, **kwargs)
        if run.layout is None:
            raise RuntimeError("the model was not called through ralu.enable or ralu.sample before this step")
        advanced, ended = run.step(sample, model_output)
        self._step_index = run.index
        if ended:
            stage = run.steps[run.index][0]
            self._stage_begins(stage, run.made[stage - 1])
        if run.over:
            self._run = None
        return _stepped(advanced.to(model_output.dtype), return_dict)

    def _stock_step(self, model_output, timestep, sample, *args, return_dict: bool, **kwargs):
        if self._solver is None:
            return super().step(model_output, timestep, sample, *args, return_dict=return_dict, **kwargs)
        if self.step_index is None:
            self._init_step_index(timestep)
        levels = self.sigmas[self.step_index : self.step_index + 2]
        velocity = self._solver(sample.float(), model_output.float(), *levels)
        advanced = super().step(velocity, timestep, sample, *args, return_dict=False, **kwargs)[0]
        return _stepped(advanced.to(model_output.dtype), return_dict)

    def full_resolution(self, sample: Tensor) -> Tensor:
        """Upsample a sample of any stage to full resolution without noise: for previews and interrupted runs."""
        return sample if self._run is None else self._run.full_resolution(sample)


def stock_arguments(config) -> dict:
    """Pick the arguments of the stock scheduler out of a configuration."""
    keys = FlowMatchEulerDiscreteScheduler._get_init_keys(FlowMatchEulerDiscreteScheduler) - {"self"}
    return {key: config[key] for key in keys if key in config}


def _trailing(steps: int) -> np.ndarray:
    """List the noise levels 1, ..., 1/steps."""
    return np.linspace(1, 1 / steps, steps)


def _stepped(sample: Tensor, return_dict: bool):
    return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=sample) if return_dict else (sample,)


RaluScheduler.__module__ = "ralu"  # what diffusers writes into model_index.json, to import it from there
