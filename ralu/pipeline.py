"""`enable` and `disable`: RALU in and out of a diffusers pipeline, all or nothing."""

from contextlib import contextmanager
from functools import partial
from typing import Any

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch.nn import Module

from ralu_kernels import adaln
from ralu_kernels._backend import resolve

from . import blocks
from .budget import check_speedup, schedule_for, speedup_of
from .caches import CACHES, Cache
from .controlnet import ControlNetHook, check_controlnets, controlnets
from .families import Family, family_of, served
from .graphs import Graphs, check_graphs
from .interpolation import through_pixels
from .method import Method
from .options import Options
from .parallel import Parallel, context_of
from .patch import (
    LayoutHook,
    Masking,
    StandIn,
    Strength,
    calling_pipeline,
    hooks_changed,
    remove_stand_ins,
    reset_caches,
    stateful,
)
from .schedule import Schedule
from .scheduler import OPTIONS, RaluScheduler, stock_arguments


def enable(
    pipe: DiffusionPipeline,
    preset: str | Method | Schedule | None = None,
    *,
    speedup: float | None = None,
    cache: str | Cache | None = None,
    fused: bool | str = "auto",
    trim_text: bool = False,
    graphs: bool = False,
    **options: Any,
) -> DiffusionPipeline:
    """Make a stock pipeline sample with RALU. Returns the same pipeline.

    pipe:    a pipeline of `ralu.families`: `FluxPipeline` and its Img2Img, Inpaint, Fill, Kontext, KontextInpaint,
             Control and ControlNet pipelines (the last two with Img2Img and Inpaint), `StableDiffusion3Pipeline` and
             its Img2Img, Inpaint, ControlNet and ControlNetInpainting, `QwenImagePipeline` and `ZImagePipeline` and
             their Img2Img and Inpaint, `Flux2Pipeline`, `Flux2KleinPipeline`.
    preset:  "flux-5x" (default) or "flux-7x" for FLUX.1-dev, "sd3-2x" (default) or "sd3-3x" for SD3 and SD3.5,
             "distilled-4" for the four-step models (default for FLUX.1-schnell; SD3.5-large-turbo cannot be told from
             its configuration), other families' as the README has them, "bottleneck-..." and "speed-..." for methods
             that RALU is compared with, see `ralu.preset`, "stock-STEPS" for no stages, a `Schedule`, or a whole
             method, see `ralu.method`: "flux-5x(ratio=0.3)+taylorseer(interval=3)".
    speedup: instead of a preset, how many times less work than in a stock run the transformer shall do, from 1.5 to 12.
             It chooses steps, ends and ratio by `ralu.schedule_for`, for the pipeline's default size whatever is
             generated; for another give what that returns. "speedup-6" as a preset is the same.
    cache:   a cache of `ralu.caches` that is combined with it, or its name, "taylorseer(interval=3)".
    fused:   run the transformer's blocks on `ralu_kernels`, see `ralu.fuse`. "auto": where Triton compiles them, on a
             GPU that the pipeline is on by now, or is offloaded from; and where the transformer is fused already.
    trim_text: compute attention without T5's padding, for prompts of different lengths and speed; needs `fused`. It
             changes the images: the models were trained to attend to that padding. `prompt_embeds` of your own are
             taken as they are, see `ralu.fuse`.
    graphs:  on a GPU capture the transformer's calls as CUDA graphs, one for each stage, where launching is what takes
             the time, see `ralu.graphs.Graphs`. FLUX.1 and SD3, fused or not; without caches, offloading, threshold,
             LoRA and torch.compile.
    options: of `ralu.Options`: ratio, threshold, regions, granularity, kept_noise, matching, upsampler, solver,
             spacing, backend, seeds. What is left out (the preset too) is as it was saved in a pipeline that was saved
             enabled.

    Image-to-image begins at the noise level at which the stock run of the steps asked for begins with this strength, in
    the last stage that holds it, so that no more noise is added later; what is left of the preset is made. Half the
    resolution begins at the level that the mean of 2x2 latent pixels has. Such a run takes no `latents`, unless it
    begins at full resolution. regions="mask" selects what an inpainting pipeline repaints.
    The preset's steps replace `num_inference_steps` (`pipe.num_timesteps` tells how many ran; SD3's progress bar and
    the window of its skip-layer guidance go by the number asked for all the same).
    With a threshold, SD3 generates images one at a time unless it is fused, and Qwen-Image and Z-Image do so always:
    their attention takes no mask. ControlNets refuse a batch with one. Blocks are fused in FLUX.1 and SD3 alone. Images
    that are tokens (Kontext) do not go with ToCa and RAS, and ControlNets with no cache and no `trim_text`. The
    transformer of FLUX.1 may be split over processes, by `enable_parallelism` before this: one image at a time, with no
    cache, ControlNet or fused blocks. A pipeline or transformer that is already enabled, here or in a pipeline it is
    shared with, is disabled first. Raises ValueError or TypeError, before anything is changed, for a pipeline or
    scheduler that RALU cannot serve and for a wrong option.
    """
    family = family_of(pipe)
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        kind = type(pipe.scheduler).__name__
        raise ValueError(f"pipe.scheduler must be a FlowMatchEulerDiscreteScheduler, got {kind}")
    if not isinstance(fused, bool | str):
        raise TypeError(f"fused must be True, False or 'auto', got {fused!r}")
    if isinstance(fused, str) and fused != "auto":
        raise ValueError(f"fused must be True, False or 'auto', got {fused!r}")
    if not isinstance(graphs, bool):
        raise TypeError(f"graphs must be True or False, got {graphs!r}")
    blocks.check_trim_text(trim_text)
    if trim_text and not fused:
        raise ValueError("trim_text=True needs fused=True or 'auto', got fused=False")
    check(pipe, family)
    if trim_text and controlnets(pipe):
        raise ValueError("trim_text must be False with a ControlNet, which attends to all of the text")
    if fused is True or trim_text:
        blocks.check_fusible(family)
    if speedup is not None:
        if preset is not None:
            raise ValueError(f"give preset or speedup, not both: got preset={preset!r}, speedup={speedup!r}")
        preset = f"speedup-{check_speedup(speedup)}"
    if not isinstance(preset, str | Method | Schedule | None):
        raise TypeError(f"preset must be one of {', '.join(family.entry.presets)} or a Schedule, got {preset!r}")
    if isinstance(preset, str):
        with _argument("preset"):
            preset = Method.parse(preset)
    if isinstance(preset, Method):
        preset, options, cache = _combined(preset, options, cache)
    if isinstance(cache, str):
        with _argument("cache"):
            cache = Method.parse(f"stock+{cache}").cache
    cache = _checked_cache(pipe, family, cache)
    if isinstance(preset, str) and not preset.startswith(("stock", "speedup")) and preset not in family.entry.presets:
        fitting = ", ".join(family.entry.presets)
        raise ValueError(f"{type(pipe).__name__}'s preset must be one of {fitting} or a Schedule, got {preset!r}")
    scheduler = _scheduler(pipe, family, preset, options)
    if graphs:
        check_graphs(pipe, family, cache is not None, scheduler.config.threshold)

    disable(pipe)
    hook = LayoutHook(pipe, scheduler, family)
    try:
        bind(pipe, scheduler, hook)
        if trim_text:
            PaddingOfZeros.put_into(pipe)
        _fuse(pipe, hook, fused, trim_text)
        if cache is not None:
            hook.cache = cache  # first, so that what fails halfway is taken off
            cache.apply(blocks.unwrapped(pipe.transformer))
            hooks_changed(blocks.unwrapped(pipe.transformer))
        if graphs:
            Graphs.put_into(pipe.transformer)
    except BaseException:
        disable(pipe)
        raise
    pipe.scheduler = scheduler
    return pipe


@contextmanager
def _argument(name: str):
    """Name the argument in the errors of its value."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _combined(method: Method, options: dict, cache) -> tuple[str, dict, Any]:
    """Merge a method's options and cache with keywords. Raises ValueError for what is given twice."""
    given = method.options.given()
    if twice := given.keys() & options.keys():
        raise ValueError(f"{', '.join(sorted(twice))} given twice: in {str(method)!r} and as a keyword")
    if method.cache is not None and cache is not None:
        raise ValueError(f"cache given twice: in {str(method)!r} and as a keyword")
    return method.spatial, given | options, method.cache or cache


def _checked_cache(pipe: DiffusionPipeline, family: Family, cache) -> Cache | None:
    if cache is None:
        return None
    if type(cache) not in CACHES.values():
        raise TypeError(f"cache must be one of {', '.join(CACHES)}, or an instance of its class, got {cache!r}")
    if family.name not in cache.families:
        served = ", ".join(cache.families)
        raise ValueError(f"cache {type(cache).__name__} serves {served}, and the pipeline's family is {family.name}")
    hook = LayoutHook.find(pipe.transformer)
    ours = hook is not None and hook.cache is not None
    if not ours and any(stateful(blocks.unwrapped(pipe.transformer))):
        raise ValueError("cache must be None: the transformer has a cache of diffusers, disable_cache() takes it off")
    cache.check(blocks.unwrapped(pipe.transformer))
    check_alone(pipe, cache)
    return cache


def _scheduler(pipe: DiffusionPipeline, family: Family, preset: str | Schedule | None, options: dict) -> RaluScheduler:
    options = Options(**options).given()  # a wrong one is told by its own name
    config = dict(pipe.scheduler.config)
    if isinstance(pipe.scheduler, RaluScheduler) and LayoutHook.find(pipe.transformer) is None:
        saved = {key: config[key] for key in ("preset", *OPTIONS)}
        if preset is not None or {"ratio", "threshold"} & options.keys():
            saved |= {"ratio": None, "threshold": None}
        if options.get("regions", saved["regions"]) is None:
            raise ValueError("this pipeline was saved with a scorer or mask of your own: pass it again as regions=")
        preset, options = preset if preset is not None else saved.pop("preset"), saved | options
        options.pop("preset", None)
    if preset is None:
        preset = family.entry.fitting_presets(config | {"is_distilled": pipe.config.get("is_distilled")})[0]
    if isinstance(preset, str) and (speedup := speedup_of(preset)) is not None:
        if odd := [name for name in ("ratio", "threshold") if options.get(name) is not None]:
            raise ValueError(f"a speedup chooses its own ratio, so {odd[0]} must be None, got {options[odd[0]]}")
        matched = {name: options.pop(name) for name in ("matching", "upsampler") if options.get(name) is not None}
        preset = schedule_for(speedup, pipe, **matched)
    scheduler = RaluScheduler(preset, **stock_arguments(config), **options)
    check_regions(pipe, scheduler)
    scheduler.run_begins = run_begins
    return scheduler


def check_regions(pipe: DiffusionPipeline, scheduler: RaluScheduler):
    """Raise ValueError for regions that the pipeline has nothing to choose by."""
    if not scheduler.has_regions:
        return
    if scheduler.config.regions == "canny" and pipe.vae is None:
        raise ValueError("regions='canny' needs a VAE, and pipe.vae is None: regions='gradient' does without")
    if scheduler.config.regions == "mask" and not hasattr(pipe, Masking.name):
        kind = type(pipe).__name__
        raise ValueError(f"regions='mask' needs an inpainting pipeline, got {kind}: give the mask itself as regions=")


def check(pipe: DiffusionPipeline, family: Family):
    """Raise ValueError for a transformer or a ControlNet that cannot be given other tokens at every stage."""
    transformer = pipe.transformer
    if transformer is None:
        raise ValueError("pipe.transformer must be a model, got None")
    model = blocks.unwrapped(transformer)
    if (kind := type(getattr(model, family.embedding_name))) not in family.embedding:
        expected, name = family.embedding[0].__name__, f"pipe.transformer.{family.embedding_name}"
        raise ValueError(f"{name} must be a {expected}, got {kind.__name__}")
    family.check(model)
    check_controlnets(pipe, family)
    if (parallel := context_of(model)) is not None:
        if not family.context_parallel or controlnets(pipe):
            reason = "RALU splits the sequences of FLUX.1 alone, without a ControlNet"
        elif parallel.ring_degree > 1 and model.device.type == "cpu":
            reason = "on a CPU there is no attention in a ring, give ulysses_degree"
        else:
            return
        raise ValueError(
            f"pipe.transformer must not be context-parallel so: {reason}. Else load it without enable_parallelism"
        )


def check_alone(pipe: DiffusionPipeline, cache: Cache | None):
    """Raise ValueError for a cache or fused blocks beside a ControlNet or context parallelism."""
    if cache is not None and controlnets(pipe):
        raise ValueError("cache must be None with a ControlNet, which adds to what is cached: enable without a cache")
    if context_of(blocks.unwrapped(pipe.transformer)) is None:
        return
    if cache is not None:
        raise ValueError("cache must be None with context parallelism: processes would disagree on what to reuse")
    if blocks.is_fused(pipe.transformer):
        raise ValueError(
            "pipe.transformer must not be fused with context parallelism: call enable_parallelism before ralu.enable"
        )


def bind(pipe: DiffusionPipeline, scheduler: RaluScheduler, hook: LayoutHook):
    """Make the scheduler this pipeline's, and the pipeline ready for interruptions."""
    family, transformer = hook.family, blocks.unwrapped(pipe.transformer)
    family.patch(pipe)
    for stand_in in (Strength, Masking):
        if hasattr(pipe, stand_in.name):
            stand_in.put_into(pipe)
    ControlNetHook.put_onto(pipe, family)
    hook.renew_cache(transformer)
    decode = resize = None
    if pipe.vae is not None:
        decode = partial(family.decode, pipe)
        resize = partial(through_pixels, decode=decode, encode=partial(family.encode, pipe))

    def stage_begins(stage: int, steps: int):
        reset_caches(transformer)
        hook.called = None, 0
        if hook.cache is not None:
            hook.cache.reset(transformer, stage, steps)

    def velocity(given):
        if hook.cache is None:
            return given
        tokens = family.pack(given)
        made = hook.cache.velocity(transformer, tokens, scheduler.progress)
        return given if made is tokens else family.unpack(made, (given.shape[-2] // 2, given.shape[-1] // 2))

    scheduler.bind(
        decode, stage_begins, family.pack, family.unpack, velocity, resize, family.normalised(pipe),
        Parallel.of(transformer), family.entry.joins(pipe),
    )  # fmt: skip


def run_begins(scheduler: RaluScheduler):
    """Bind a scheduler to the pipeline that calls it, which may be a copy of the one that was enabled.

    Raises ValueError for a pipeline that RALU does not serve, which took the scheduler over from one that it does.
    """
    pipe = calling_pipeline()
    if getattr(pipe, "scheduler", None) is not scheduler:
        return
    try:
        family = family_of(pipe)
    except ValueError:
        raise ValueError(
            f"{type(pipe).__name__} has the scheduler of a pipeline that RALU is enabled for, and RALU serves "
            f"{' and '.join(served())} alone: call ralu.disable(pipe) first, or give this one a scheduler of its own, "
            "scheduler=FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)"
        ) from None
    hook = LayoutHook.find(pipe.transformer)
    if hook is None or hook.scheduler is not scheduler:
        scheduler.unbind()
        return
    check(pipe, family)
    check_regions(pipe, scheduler)
    check_alone(pipe, hook.cache)
    bind(pipe, scheduler, hook)
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
        """Encode prompts (stock signature), with zeros for padding where the transformer is fused."""
        pipe = self.owner
        encoder = getattr(pipe, str(family_of(pipe).t5))
        # Without T5 SD3 has zeros anyway; the stock attention would attend to the zeros.
        if encoder is None or not blocks.is_fused(pipe.transformer):
            return self.stock(*args, **kwargs)
        hook = encoder.register_forward_hook(_zero_padding)  # no longer than this: pipelines may share their encoders
        try:
            return self.stock(*args, **kwargs)
        finally:
            hook.remove()


def _zero_padding(encoder, args, output):
    output[0].masked_fill_((args[0] == encoder.config.pad_token_id).unsqueeze(-1), 0)


def disable(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Put a pipeline back exactly as it was before `enable`. Does nothing to a stock pipeline. Returns the pipeline.

    Pipelines that share its transformer (`from_pipe`) are disabled with it; a copy (`copy.deepcopy`) is not. A
    scheduler that was put in since stays. Raises TypeError for what is no pipeline.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"pipe must be a DiffusionPipeline, got {type(pipe).__name__}")
    transformer: Any = getattr(pipe, "transformer", None)
    hook = LayoutHook.find(transformer) if isinstance(transformer, Module) else None
    if hook is not None:
        if hook.cache is not None:
            hook.cache.remove(blocks.unwrapped(transformer))
            hooks_changed(blocks.unwrapped(transformer))
        hook.remove(transformer)
        remove_stand_ins(transformer)
        hook.scheduler.unbind()
        reset_caches(blocks.unwrapped(transformer))
        if hook.fused:
            blocks.unfuse(transformer)
        if hook.fused_before is not None:
            blocks.fuse(transformer, **hook.fused_before)
    # A pipeline that was given another transformer and enabled again is not of this one any more.
    others = (
        () if hook is None else (p for p in hook.pipes if p.transformer is None or not LayoutHook.find(p.transformer))
    )
    for sharing in {pipe, *others}:
        remove_stand_ins(sharing)
        ControlNetHook.remove_from(sharing)
        if getattr(sharing, "vae", None) is not None:
            remove_stand_ins(sharing.vae)
        scheduler = getattr(sharing, "scheduler", None)
        if hook is not None and scheduler is hook.scheduler:
            sharing.scheduler = hook.stock
        elif isinstance(scheduler, RaluScheduler):  # loaded from disk, or a copy of one that was disabled
            sharing.scheduler = FlowMatchEulerDiscreteScheduler(**stock_arguments(scheduler.config))
    return pipe
