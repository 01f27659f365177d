"""`enable` and `disable`: RALU in and out of a diffusers pipeline, all or nothing."""

from contextlib import ExitStack

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline

from . import flux
from .regions import Scorer
from .schedule import Schedule
from .scheduler import RaluScheduler

_ARCHITECTURES = {FluxPipeline: flux.install}
_OPTIONS = ("preset", "ratio", "threshold", "regions", "granularity", "carry_noise", "backend")


def enable(
    pipe: DiffusionPipeline,
    preset: str | Schedule | None = None,
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    regions: str | Scorer | None = None,
    granularity: str | None = None,
    carry_noise: str | None = None,
    backend: str | None = None,
) -> DiffusionPipeline:
    """Make a stock pipeline sample with RALU. Returns the same pipeline.

    pipe:   a `FluxPipeline`.
    preset: "flux-5x", "flux-7x", "distilled-4" or a `Schedule`.
    others: see `RaluScheduler`, which has the defaults. What is left out (the preset too) is as it was saved in a
            pipeline that was saved enabled.

    The preset's steps replace `num_inference_steps` (`pipe.num_timesteps` tells how many ran). Height and width must
    divide by 32. A pipeline or transformer that is already enabled, here or in a pipeline it is shared with, is
    disabled first. Raises ValueError, before anything is changed, for a pipeline or scheduler that RALU cannot serve
    and for a wrong option.
    """
    given = locals()
    install = next((f for kind, f in _ARCHITECTURES.items() if isinstance(pipe, kind)), None)
    if install is None:
        known = ", ".join(kind.__name__ for kind in _ARCHITECTURES)
        raise ValueError(f"RALU serves {known}, got {type(pipe).__name__}")
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(f"RALU needs a FlowMatchEulerDiscreteScheduler, got {type(pipe.scheduler).__name__}")
    options = {key: given[key] for key in _OPTIONS if given[key] is not None}
    config = dict(pipe.scheduler.config)
    if isinstance(pipe.scheduler, RaluScheduler) and not pipe.scheduler.bound:
        saved = {key: config[key] for key in _OPTIONS}
        if {"preset", "ratio", "threshold"} & options.keys():
            saved |= {"ratio": None, "threshold": None}
        options = saved | options
        if options["regions"] is None:
            raise ValueError("this pipeline was saved with a scorer of your own: pass it again as regions=")
    scheduler = RaluScheduler(**_stock_arguments(config), **options)

    disable(pipe)
    stock = pipe.scheduler
    with ExitStack() as undo:
        install(pipe, scheduler, undo)
        pipe.scheduler = scheduler
        undo.callback(setattr, pipe, "scheduler", stock)
        flux.unwrapped(pipe.transformer).ralu_undo = undo.pop_all()
    return pipe


def disable(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Put a pipeline back exactly as it was before `enable`. Does nothing to a stock pipeline. Returns the pipeline."""
    transformer = flux.unwrapped(pipe.transformer)
    if hasattr(transformer, "ralu_undo"):
        transformer.ralu_undo.close()
        del transformer.ralu_undo
    if isinstance(pipe.scheduler, RaluScheduler):  # loaded from disk, or a `from_pipe` copy of the enabled pipeline
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(**_stock_arguments(pipe.scheduler.config))
    return pipe


def _stock_arguments(config) -> dict:
    keys = FlowMatchEulerDiscreteScheduler._get_init_keys(FlowMatchEulerDiscreteScheduler) - {"self"}
    return {key: config[key] for key in keys if key in config}
