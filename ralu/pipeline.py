"""`enable` and `disable`: RALU in and out of a diffusers pipeline, all or nothing."""

from contextlib import ExitStack

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline

from . import flux
from .schedule import Schedule
from .scheduler import RaluScheduler

_ARCHITECTURES = {FluxPipeline: flux.install}
_OPTIONS = ("preset", "ratio", "threshold", "regions", "granularity", "carry_noise", "backend")


def enable(pipe: DiffusionPipeline, preset: str | Schedule | None = None, **options) -> DiffusionPipeline:
    """Make a stock pipeline sample with RALU. Returns the same pipeline.

    pipe:    a `FluxPipeline`.
    preset:  "flux-5x", "flux-7x", "distilled-4" (`ralu.PRESETS` lists them) or a `Schedule`. Left out: what a pipeline
             saved with RALU was saved with, else "flux-5x".
    options: ratio, threshold, regions, granularity, carry_noise, backend, see `RaluScheduler`.

    The preset's steps replace `num_inference_steps` (`pipe.num_timesteps` tells how many ran). Height and width must
    divide by 32. Raises ValueError for a pipeline or scheduler that RALU cannot serve, before anything is changed.
    An enabled pipeline is enabled anew, from the stock one.
    """
    install = next((f for kind, f in _ARCHITECTURES.items() if isinstance(pipe, kind)), None)
    if install is None:
        known = ", ".join(kind.__name__ for kind in _ARCHITECTURES)
        raise ValueError(f"RALU serves {known}, got {type(pipe).__name__}")
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(f"RALU needs a FlowMatchEulerDiscreteScheduler, got {type(pipe.scheduler).__name__}")
    config = dict(pipe.scheduler.config)
    saved = {key: config[key] for key in _OPTIONS} if isinstance(pipe.scheduler, RaluScheduler) else {}
    if preset is not None:
        saved.pop("ratio", None)  # a new preset brings its own
        options["preset"] = preset
    if {"ratio", "threshold"} & options.keys():
        saved = {key: value for key, value in saved.items() if key not in ("ratio", "threshold")}
    scheduler = RaluScheduler(**_stock_arguments(config), **(saved | options))

    disable(pipe)
    stock = pipe.scheduler
    with ExitStack() as undo:
        install(pipe, scheduler, undo)
        pipe.scheduler = scheduler
        undo.callback(setattr, pipe, "scheduler", stock)
        scheduler.undo = undo.pop_all()
    return pipe


def disable(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Put a pipeline back exactly as it was before `enable`. Does nothing to a stock pipeline. Returns the pipeline."""
    scheduler = pipe.scheduler
    if not isinstance(scheduler, RaluScheduler):
        return pipe
    if scheduler.undo is not None:
        scheduler.undo.close()
        scheduler.undo = None
        scheduler.unbind()
    if pipe.scheduler is scheduler:  # loaded from disk, or a `from_pipe` copy of the enabled pipeline
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(**_stock_arguments(scheduler.config))
    return pipe


def _stock_arguments(config) -> dict:
    keys = FlowMatchEulerDiscreteScheduler._get_init_keys(FlowMatchEulerDiscreteScheduler) - {"self"}
    return {key: config[key] for key in keys if key in config}
