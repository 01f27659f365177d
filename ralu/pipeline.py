"""`enable` and `disable`: RALU in and out of a diffusers pipeline, all or nothing."""

from contextlib import ExitStack

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor
from torch.nn import Module

from ralu_kernels import adaln
from ralu_kernels._backend import resolve

from . import blocks, flux, sd3
from .regions import Scorer
from .schedule import Schedule, presets
from .scheduler import RaluScheduler

_FAMILIES = {"flux": (FluxPipeline, flux), "sd3": (StableDiffusion3Pipeline, sd3)}
_OPTIONS = ("preset", "ratio", "threshold", "regions", "granularity", "carry_noise", "matching", "upsampler", "backend", "seeds")


def enable(
    pipe: DiffusionPipeline,
    preset: str | Schedule | None = None,
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    regions=None,
    granularity: str | None = None,
    carry_noise: str | None = None,
    matching: str | None = None,
    upsampler: str | None = None,
    backend: str | None = None,
    seeds=None,
    fused: bool | str = "auto",
    trim_text: bool = False,
) -> DiffusionPipeline:
    """Make a stock pipeline sample with RALU. Returns the same pipeline.

    pipe:   a `FluxPipeline` or `StableDiffusion3Pipeline`.
    preset: "flux-5x" (default) or "flux-7x" for FLUX, "sd3-2x" (default) or "sd3-3x" for SD3 and SD3.5, "distilled-4"
            for both families' four-step models, or a `Schedule`.
    fused:  run the transformer's blocks on `ralu_kernels`, see `ralu.fuse`. "auto": where Triton compiles them, on a
            GPU that the pipeline is on by now, or is offloaded from; and where the transformer is fused already.
    trim_text: compute attention without T5's padding, for prompts of different lengths and speed; needs `fused`. It
            changes the pictures: the models were trained to attend to that padding. `prompt_embeds` of your own are
            taken as they are, see `ralu.fuse`.
    others: see `RaluScheduler`, which has the defaults. What is left out (the preset too) is as it was saved in a
            pipeline that was saved enabled.

    The preset's steps replace `num_inference_steps` (`pipe.num_timesteps` tells how many ran; SD3's progress bar and
    the window of its skip-layer guidance go by the number asked for all the same). Height and width must divide by 32.
    With a threshold, SD3 paints pictures one at a time unless it is fused: its attention takes no mask. A pipeline or
    transformer that is already enabled, here or in a pipeline it is shared with, is disabled first. Raises ValueError,
    before anything is changed, for a pipeline or scheduler that RALU cannot serve and for a wrong option.
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
    if fused not in (True, False, "auto"):
        raise ValueError(f"fused must be True, False or 'auto', got {fused!r}")
    if trim_text and not fused:
        raise ValueError("trim_text=True needs fused=True or 'auto', got fused=False")
    scheduler = RaluScheduler(**_stock_arguments(config), **({"preset": fitting[0]} | options))

    disable(pipe)
    stock, transformer = pipe.scheduler, blocks.unwrapped(pipe.transformer)
    with ExitStack() as undo:
        architecture.install(pipe, scheduler, undo)
        pipe.scheduler = scheduler
        undo.callback(setattr, pipe, "scheduler", stock)
        encoder = getattr(pipe, architecture.T5)
        if trim_text and encoder is not None:  # without T5 SD3 has zeros anyway
            _zero_padding(pipe, encoder, undo)
        _fuse(pipe, fused, trim_text, undo)
        transformer.ralu_undo = undo.pop_all()
    return pipe


def _fuse(pipe: DiffusionPipeline, fused: bool | str, trim_text: bool, undo: ExitStack):
    """Fuse or unfuse the transformer; `undo` puts it back as it was."""
    asked, before = fused is True or trim_text, vars(blocks.unwrapped(pipe.transformer)).get("ralu_fusion")
    if before is not None:
        blocks.unfuse(pipe.transformer)
        undo.callback(blocks.fuse, pipe.transformer, trim_text=before.trim_text)
    if fused == "auto":
        device = pipe._execution_device
        compiled = device.type == "cuda" and resolve("auto", device, adaln.BACKENDS) == "triton"
        fused = before is not None or trim_text or compiled
    if fused:
        try:
            blocks.fuse(pipe.transformer, trim_text=trim_text)
        except ValueError:  # a forward that was replaced: no reason to refuse who did not ask
            if asked:
                raise
        undo.callback(blocks.unfuse, pipe.transformer)


def _zero_padding(pipe: DiffusionPipeline, encoder: Module, undo: ExitStack):
    """Make zeros of T5's embeddings of padding, by which a fused transformer tells it from text."""
    stock = pipe._get_t5_prompt_embeds

    def zero(module, args, output):
        output[0].masked_fill_((args[0] == module.config.pad_token_id).unsqueeze(-1), 0)

    def embed(*args, **kwargs):
        if not blocks.fused(pipe.transformer):  # the stock attention would attend to the zeros
            return stock(*args, **kwargs)
        hook = encoder.register_forward_hook(zero)  # no longer than this: pipelines may share their encoders
        try:
            return stock(*args, **kwargs)
        finally:
            hook.remove()

    pipe._get_t5_prompt_embeds = embed
    undo.callback(delattr, pipe, "_get_t5_prompt_embeds")


def family(pipe: DiffusionPipeline) -> str:
    """What `ralu.schedule.presets` takes: "flux" or "sd3". Raises ValueError for a pipeline that RALU cannot serve."""
    found = next((name for name, (kind, _) in _FAMILIES.items() if isinstance(pipe, kind)), None)
    if found is None:
        known = ", ".join(kind.__name__ for kind, _ in _FAMILIES.values())
        raise ValueError(f"RALU serves {known}, got {type(pipe).__name__}")
    return found


def disable(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Put a pipeline back exactly as it was before `enable`. Does nothing to a stock pipeline. Returns the pipeline."""
    transformer = blocks.unwrapped(pipe.transformer)
    if hasattr(transformer, "ralu_undo"):
        transformer.ralu_undo.close()
        del transformer.ralu_undo
    if isinstance(pipe.scheduler, RaluScheduler):  # loaded from disk, or a `from_pipe` copy of the enabled pipeline
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(**_stock_arguments(pipe.scheduler.config))
    return pipe


def _stock_arguments(config) -> dict:
    keys = FlowMatchEulerDiscreteScheduler._get_init_keys(FlowMatchEulerDiscreteScheduler) - {"self"}
    return {key: config[key] for key in keys if key in config}
