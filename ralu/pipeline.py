"""`enable` and `disable`: RALU in and out of a diffusers pipeline, all or nothing."""

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor
from torch.nn import Module

from ralu_kernels import adaln
from ralu_kernels._backend import resolve

from . import blocks, flux, sd3
from .patch import LayoutHook, StandIn, calling_pipeline, remove_stand_ins, reset_caches
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
        raise ValueError(
            f"pipe.scheduler must be a FlowMatchEulerDiscreteScheduler, got {type(pipe.scheduler).__name__}"
        )
    if not isinstance(fused, bool | str):
        raise TypeError(f"fused must be True, False or 'auto', got {fused!r}")
    if isinstance(fused, str) and fused != "auto":
        raise ValueError(f"fused must be True, False or 'auto', got {fused!r}")
    blocks.check_trim_text(trim_text)
    if trim_text and not fused:
        raise ValueError("trim_text=True needs fused=True or 'auto', got fused=False")
    options = {key: given[key] for key in _OPTIONS if given[key] is not None}
    if not isinstance(preset, str | Schedule | None):
        raise TypeError(f"preset must be one of {', '.join(fitting)} or a Schedule, got {preset!r}")
    if isinstance(preset, str) and preset not in fitting:
        raise ValueError(f"{kind.__name__}'s preset must be one of {', '.join(fitting)} or a Schedule, got {preset!r}")
    _check(pipe)
    config = dict(pipe.scheduler.config)
    if isinstance(pipe.scheduler, RaluScheduler) and LayoutHook.find(pipe.transformer) is None:
        saved = {key: config[key] for key in _OPTIONS}
        if {"preset", "ratio", "threshold"} & options.keys():
            saved |= {"ratio": None, "threshold": None}
        options = saved | options
        if options["regions"] is None:
            raise ValueError("this pipeline was saved with a scorer or mask of your own: pass it again as regions=")
    scheduler = RaluScheduler(**_stock_arguments(config), **({"preset": fitting[0]} | options))
    if scheduler.config.regions == "canny" and pipe.vae is None:
        raise ValueError("regions='canny' needs a VAE, and pipe.vae is None: regions='gradient' does without")
    scheduler.run_begins = _run_begins

    disable(pipe)
    try:
        hook = architecture.Hook(pipe, scheduler)
        architecture.bind(pipe, scheduler)
        if trim_text:
            PaddingOfZeros.put_into(pipe)
        _fuse(pipe, hook, fused, trim_text)
    except BaseException:
        disable(pipe)
        raise
    pipe.scheduler = scheduler
    return pipe


def _check(pipe: DiffusionPipeline):
    """Raise ValueError for a transformer that cannot be given other tokens at every stage."""
    transformer = pipe.transformer
    if transformer is None:
        raise ValueError("pipe.transformer must be a model, got None")
    _FAMILIES[family(pipe)][1].Hook.check(transformer)
    parallel = getattr(blocks.unwrapped(transformer), "_parallel_config", None)
    if parallel is not None and parallel.context_parallel_config is not None:
        raise ValueError(
            "pipe.transformer must not be context-parallel: RALU's positions are of each image, and are not split. "
            "Load the transformer without enable_parallelism"
        )


def _run_begins(scheduler: RaluScheduler):
    """Bind a scheduler to the pipeline that calls it, which may be a copy of the one that was enabled."""
    pipe = calling_pipeline()
    if getattr(pipe, "scheduler", None) is not scheduler:
        return
    served = tuple(kind for kind, _ in _FAMILIES.values())
    if not isinstance(pipe, served):
        raise ValueError(
            f"{type(pipe).__name__} has the scheduler of a pipeline that RALU is enabled for, and RALU serves "
            f"{' and '.join(kind.__name__ for kind in served)} alone: call ralu.disable(pipe) first, or give this one "
            "a scheduler of its own, scheduler=FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)"
        )
    hook = LayoutHook.find(pipe.transformer)
    if hook is None or hook.scheduler is not scheduler:
        scheduler.unbind()
        return
    _check(pipe)
    _FAMILIES[family(pipe)][1].bind(pipe, scheduler)
    hook.pipes.add(pipe)


def _fuse(pipe: DiffusionPipeline, hook: LayoutHook, fused: bool | str, trim_text: bool):
    """Fuse or unfuse the transformer, and note in the hook how it was."""
    asked, before = fused is True or trim_text, vars(blocks.unwrapped(pipe.transformer)).get("ralu_fusion")
    if before is not None:
        blocks.unfuse(pipe.transformer)
        hook.fused_before = {"trim_text": before.trim_text}
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
        hook.fused = True


class PaddingOfZeros(StandIn):
    """Make zeros of T5's embeddings of padding, by which a fused transformer tells it from text."""

    name = "_get_t5_prompt_embeds"

    def __call__(self, *args, **kwargs):
        pipe = self.owner
        encoder = getattr(pipe, _FAMILIES[family(pipe)][1].T5)
        # Without T5 SD3 has zeros anyway; the stock attention would attend to the zeros.
        if encoder is None or not blocks.fused(pipe.transformer):
            return self.stock(*args, **kwargs)
        hook = encoder.register_forward_hook(_zero_padding)  # no longer than this: pipelines may share their encoders
        try:
            return self.stock(*args, **kwargs)
        finally:
            hook.remove()


def _zero_padding(encoder: Module, args, output):
    output[0].masked_fill_((args[0] == encoder.config.pad_token_id).unsqueeze(-1), 0)


def family(pipe: DiffusionPipeline) -> str:
    """What `ralu.schedule.presets` takes: "flux" or "sd3". Raises ValueError for a pipeline that RALU cannot serve."""
    found = next((name for name, (kind, _) in _FAMILIES.items() if isinstance(pipe, kind)), None)
    if found is None:
        known = " or ".join(kind.__name__ for kind, _ in _FAMILIES.values())
        wrong = ValueError if isinstance(pipe, DiffusionPipeline) else TypeError
        raise wrong(f"pipe must be a {known}, got {type(pipe).__name__}")
    return found


def disable(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Put a pipeline back exactly as it was before `enable`. Does nothing to a stock pipeline. Returns the pipeline.

    Pipelines that share its transformer (`from_pipe`) are disabled with it; a copy (`copy.deepcopy`) is not. A
    scheduler that was put in since stays. Raises TypeError for what is no pipeline.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"pipe must be a DiffusionPipeline, got {type(pipe).__name__}")
    transformer, hook = getattr(pipe, "transformer", None), None
    if isinstance(transformer, Module):
        hook = LayoutHook.find(transformer)
    if hook is not None:
        hook.remove(transformer)
        hook.scheduler.unbind()
        reset_caches(blocks.unwrapped(transformer))
        if hook.fused:
            blocks.unfuse(transformer)
        if hook.fused_before is not None:
            blocks.fuse(transformer, **hook.fused_before)
    for each in {pipe, *(hook.pipes if hook else ())}:
        remove_stand_ins(each)
        if getattr(each, "vae", None) is not None:
            remove_stand_ins(each.vae)
        scheduler = getattr(each, "scheduler", None)
        if hook is not None and scheduler is hook.scheduler:
            each.scheduler = hook.stock
        elif isinstance(scheduler, RaluScheduler):  # loaded from disk, or a copy of one that was disabled
            each.scheduler = FlowMatchEulerDiscreteScheduler(**_stock_arguments(scheduler.config))
    return pipe


def _stock_arguments(config) -> dict:
    keys = FlowMatchEulerDiscreteScheduler._get_init_keys(FlowMatchEulerDiscreteScheduler) - {"self"}
    return {key: config[key] for key in keys if key in config}
