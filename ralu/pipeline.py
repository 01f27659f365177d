"""`enable` and `disable`: RALU in and out of a diffusers pipeline, all or nothing."""

from contextlib import ExitStack

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor

from . import flux, sd3
from .regions import Scorer
from .schedule import Schedule, presets
from .scheduler import RaluScheduler

_FAMILIES = {"flux": (FluxPipeline, flux), "sd3": (StableDiffusion3Pipeline, sd3)}
_OPTIONS = ("preset", "ratio", "threshold", "regions", "granularity", "carry_noise", "matching", "upsampler", "backend")


def enable(
    pipe: DiffusionPipeline,
    preset: str | Schedule | None = None,
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    regions: str | Image.Image | Tensor | Scorer | None = None,
    granularity: str | None = None,
    carry_noise: str | None = None,
    matching: str | None = None,
    upsampler: str | None = None,
    backend: str | None = None,
) -> DiffusionPipeline:
    """Make a stock pipeline sample with RALU. Returns the same pipeline.

    pipe:   a `FluxPipeline` or `StableDiffusion3Pipeline`.
    preset: "flux-5x" (default) or "flux-7x" for FLUX, "sd3-2x" (default) or "sd3-3x" for SD3 and SD3.5, "distilled-4"
            for both families' four-step models, or a `Schedule`.
    others: see `RaluScheduler`, which has the defaults. What is left out (the preset too) is as it was saved in a
            pipeline that was saved enabled.

    The preset's steps replace `num_inference_steps` (`pipe.num_timesteps` tells how many ran; SD3's progress bar and
    the window of its skip-layer guidance go by the number asked for all the same). Height and width must divide by 32.
    With a threshold, SD3 paints pictures one at a time: its attention takes no mask. A pipeline or transformer that is
    already enabled, here or in a pipeline it is shared with, is disabled first. Raises ValueError, before anything is
    changed, for a pipeline or scheduler that RALU cannot serve and for a wrong option.
    """
    given = locals()
    kind, architecture = _FAMILIES[family(pipe)]
    fitting = presets(family(pipe))
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(f"RALU needs a FlowMatchEulerDiscreteScheduler, got {type(pipe.scheduler).__name__}")
    options = {key: given[key] for key in _OPTIONS if given[key] is not None}
    if isinstance(preset, str) and preset not in fitting:
        raise ValueError(f"{kind.__name__}'s preset must be one of {', '.join(fitting)} or a Schedule, got {preset!r}")
    config = dict(pipe.scheduler.config)
    if isinstance(pipe.scheduler, RaluScheduler) and not pipe.scheduler.bound:
        saved = {key: config[key] for key in _OPTIONS}
        if {"preset", "ratio", "threshold"} & options.keys():
            saved |= {"ratio": None, "threshold": None}
        options = saved | options
        if options["regions"] is None:
            raise ValueError("this pipeline was saved with a scorer or mask of your own: pass it again as regions=")
    scheduler = RaluScheduler(**_stock_arguments(config), **({"preset": fitting[0]} | options))

    disable(pipe)
    stock = pipe.scheduler
    with ExitStack() as undo:
        architecture.install(pipe, scheduler, undo)
        pipe.scheduler = scheduler
        undo.callback(setattr, pipe, "scheduler", stock)
        flux.unwrapped(pipe.transformer).ralu_undo = undo.pop_all()
    return pipe


def family(pipe: DiffusionPipeline) -> str:
    """What `ralu.schedule.presets` takes: "flux" or "sd3". Raises ValueError for a pipeline that RALU cannot serve."""
    found = next((name for name, (kind, _) in _FAMILIES.items() if isinstance(pipe, kind)), None)
    if found is None:
        known = ", ".join(kind.__name__ for kind, _ in _FAMILIES.values())
        raise ValueError(f"RALU serves {known}, got {type(pipe).__name__}")
    return found


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
