"""RALU Sampler and RALU Schedule, and what they say of inputs that they cannot serve."""

from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import latent_preview
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image, ImageDraw
from torch import Tensor

from ralu.budget import anchors_of, check_speedup, reach
from ralu.errors import nearest_sizes
from ralu.families import DISTILLED_STEPS, FAMILIES, load
from ralu.options import CHOICES, Options, schedule_of
from ralu.presets import PRESETS
from ralu.regions import scorer_of
from ralu.schedule import RESOLUTIONS, Schedule, solve
from ralu.stages import Run, pack, unpack

from .sampling import Positions, Sampler

CATEGORY = "sampling/RALU"
LATENT_PIXELS = 8  # side of a latent pixel in the image
TEXT_TOKENS = {"flux": 512, "sd3": 333}  # what a speed-up is counted with
# Of a conditioning, what belongs to places in the image; mixed sequences have others.
SPATIAL = ("area", "mask", "control", "gligen", "reference_latents", "concat_latent_image")
PLOT_COLORS = dict(zip(RESOLUTIONS, ("#0057ff", "#e8710a", "#12855a"), strict=True))


def schedule_inputs() -> list[io.Input]:
    """Make the inputs that decide a schedule."""
    return [
        io.Model.Input("model", tooltip="FLUX.1 or Stable Diffusion 3, as ComfyUI loads them."),
        io.Latent.Input("latent_image", tooltip="Gives size and batch: width and height must divide by 16 pixels."),
        io.Combo.Input("preset", options=[*PRESETS, "distilled-4"], tooltip="The paper's schedules by model family."),
        io.Float.Input(
            "speedup", default=0.0, min=0.0, max=12.0, step=0.1,
            tooltip="Instead of a preset: the stock run's work by this, counted in the transformer against 50 steps "
            "(FLUX.1-dev), 28 (SD3) or 4 (FLUX.1-schnell). 0 takes the preset.",
        ),
        io.Float.Input(
            "ratio", default=-1.0, min=-1.0, max=1.0, step=0.05,
            tooltip="Share of the half-resolution tokens that are upsampled early. -1 is the preset's own.",
        ),
    ]  # fmt: skip


def family_of(model: Any) -> str:
    """Name the family of a model, a `ModelPatcher`. Raises ValueError for one that is not served."""
    families = {"Flux": "flux", "SD3": "sd3"}
    kind = type(model.model).__name__
    if kind not in families:
        raise ValueError(f"model must be FLUX.1 or Stable Diffusion 3, ComfyUI's {' or '.join(families)}, got {kind}")
    if model.model_options.get("transformer_options", {}).get("rope_options"):
        raise ValueError("model has scaled positions (RoPE options), which a mixed-resolution stage would not have")
    return families[kind]


def checked_latent(model: Any, latent: dict[str, Any]) -> Tensor:
    """Return the samples (B, C, H, W) of a latent. Raises ValueError for what cannot be sampled."""
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(f"latent_image must be of images, (B, {channels}, H, W), got {tuple(samples.shape)}")
    height, width = samples.shape[2:]
    if height % 2 or width % 2:
        unit, (height, width) = 2 * LATENT_PIXELS, (side * LATENT_PIXELS for side in (height, width))
        raise ValueError(
            f"latent_image must have a width and height that divide by {unit} pixels, got {width}x{height}; "
            f"the nearest {nearest_sizes(width, height, unit)}"
        )
    if latent.get("noise_mask") is not None:
        raise ValueError("latent_image has a mask for inpainting, which RALU does not do")
    return samples


def schedule_for(model: Any, samples: Tensor, preset: str, speedup: float, ratio: float, options: Options) -> Schedule:
    """Make the schedule that the inputs of `schedule_inputs` ask for. Raises ValueError for what cannot be."""
    family = family_of(model)
    dynamic = model.model.model_type.name == "FLUX"  # the paper's tables are for the shift at 1024 pixels, 3
    shift = 3.0 if dynamic else float(model.get_model_object("model_sampling").shift)
    if not speedup:
        return schedule_of(preset, options, shift)
    if ratio >= 0:
        raise ValueError(f"give speedup or ratio, not both: got speedup={speedup:g}, ratio={ratio:g}")
    distilled = family == "flux" and not dynamic
    stock_steps = DISTILLED_STEPS if distilled else FAMILIES[family].stock_steps
    model_width = model.get_model_object("diffusion_model").hidden_size

    def work(tokens: int) -> int:  # of a block, where n tokens cost 12·n·w² + 2·n²·w multiplications
        both = tokens + TEXT_TOKENS[family]
        return both * (6 * model_width + both)

    height, width = (LATENT_PIXELS * side for side in samples.shape[2:])
    anchors = anchors_of(load(family), distilled)
    point = reach(check_speedup(speedup), stock_steps, anchors, work, height, width, 2 * LATENT_PIXELS)
    schedule = solve(point.steps, point.ends, shift, point.ratio)
    options.check_steps(schedule.steps[0], f"speedup={speedup:g}")
    return schedule


class RALUSampler(io.ComfyNode):
    """Sample from noise to image in three stages of growing resolution."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="RALUSampler",
            display_name="RALU Sampler",
            category=CATEGORY,
            description="Region-adaptive latent upsampling (arXiv 2507.08422): half resolution, then full resolution "
            "where it matters, then all of it.",
            inputs=[
                *schedule_inputs(),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative", tooltip="Unused where cfg is 1."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
                    tooltip="Of the batch's first image; the next ones have the numbers that follow, so that each can "
                    "be made again alone.",
                ),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="1 for FLUX."),
                io.Combo.Input("regions", options=list(CHOICES["regions"]), tooltip="What is upsampled early: where "
                               "a decoded preview has edges (canny, which needs a VAE), or the latent is steep."),
                io.Combo.Input("granularity", options=list(CHOICES["granularity"])),
                io.Combo.Input("solver", options=list(CHOICES["solver"])),
                io.Vae.Input("vae", optional=True, tooltip="For regions=canny."),
                io.Mask.Input("mask", optional=True, tooltip="Upsample early what is white here, instead of regions."),
            ],
            outputs=[io.Latent.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, latent_image, preset, speedup, ratio, positive, negative, seed, cfg, regions, granularity, solver,
        vae=None, mask=None,
    ) -> io.NodeOutput:  # fmt: skip
        """Sample. Raises ValueError for inputs that cannot be served, before the model is called."""
        family, samples = family_of(model), checked_latent(model, latent_image)
        for name, conditioning in (("positive", positive), ("negative", negative)):
            if spatial := [key for _, extra in conditioning for key in SPATIAL if key in extra]:
                raise ValueError(f"{name} has {spatial[0]}, which is tied to places in the image: RALU cannot serve it")
        options = Options(
            ratio=None if ratio < 0 else ratio, regions=regions if mask is None else mask,
            granularity=granularity, solver=solver,
        )  # fmt: skip
        schedule = schedule_for(model, samples, preset, speedup, ratio, options)

        def decode(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
            pictures = vae.decode(model.model.process_latent_out(unpack(tokens, grid)))  # (B, H, W, 3) in [0, 1]
            comfy.model_management.load_models_gpu([guider.model_patcher])  # it may have had to make room for the VAE
            return (2 * pictures[..., :3] - 1).movedim(-1, 1).to(tokens.device)

        if vae is None and isinstance(options.regions, str) and options.regions == "canny":
            raise ValueError("regions=canny looks at a decoded preview: connect a vae, or choose other regions")
        scorer = scorer_of(options.regions, decode)
        run = Run(schedule, scorer, options, pack=pack, unpack=unpack)
        indices = latent_image.get("batch_index") or range(len(samples))
        noise = [comfy.sample.prepare_noise(samples[:1], (seed + index) % 2**64) for index in indices]
        positions = Positions()
        guider = comfy.samplers.CFGGuider(positions.put_into(model, family))
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        result = guider.sample(
            torch.cat(noise), torch.zeros_like(samples), Sampler(run, positions), ending(run),
            callback=latent_preview.prepare_callback(model, len(run.steps)), seed=seed,
        )  # fmt: skip
        return io.NodeOutput({**latent_image, "samples": result.to(latent_image["samples"].device)})


class RALUSchedule(io.ComfyNode):
    """Show what RALU Sampler would do with the same inputs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="RALUSchedule",
            display_name="RALU Schedule",
            category=CATEGORY,
            description="The noise levels of RALU Sampler's calls, and a plot of them. They go up where resolution "
            "changes, so that other samplers cannot use them.",
            inputs=schedule_inputs(),
            outputs=[io.Sigmas.Output(), io.Image.Output(display_name="plot")],
        )

    @classmethod
    def execute(cls, model, latent_image, preset, speedup, ratio) -> io.NodeOutput:
        """Make the noise levels, float32 (steps + 1,), and the plot, (1, H, W, 3) in [0, 1]."""
        options = Options(ratio=None if ratio < 0 else ratio)
        schedule = schedule_for(model, checked_latent(model, latent_image), preset, speedup, ratio, options)
        picture = torch.from_numpy(np.asarray(plot(schedule), dtype=np.float32) / 255)
        return io.NodeOutput(ending(Run(schedule, scorer_of("grid"), options)), picture[None])


def ending(run: Run) -> Tensor:
    """Return the noise level of every step of a run and the last one, 0: float32 (steps + 1,)."""
    return torch.cat([run.sigmas, torch.zeros(1)])


def plot(schedule: Schedule, width: int = 640, height: int = 360) -> Image.Image:
    """Draw the noise level, from 1 down to 0, over the calls of the model, a line for each stage."""
    image = Image.new("RGB", (width, height), "white")
    draw, calls, first = ImageDraw.Draw(image), sum(schedule.steps), 0
    left, top, right, bottom = 40, 40, width - 20, height - 30

    def at(call: float, sigma: float) -> tuple[float, float]:
        return left + (right - left) * call / calls, bottom - (bottom - top) * sigma

    draw.rectangle((left, top, right, bottom), outline="#afb8c1")
    for level in (0, 0.5, 1):
        draw.text((left - 24, at(0, level)[1] - 5), f"{level:g}", fill="#59636e")
    for number, stage in enumerate(schedule.stages, start=1):
        line = [at(first + step, sigma) for step, sigma in enumerate(schedule.sigmas(number))]
        color = PLOT_COLORS[stage.resolution]
        draw.line(line, fill=color, width=3)
        for x, y in line[:-1]:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=color)
        text = f"{stage.steps} at {RESOLUTIONS[stage.resolution].removesuffix(' resolution')}"
        draw.text((at(first, 0)[0] + 6, top - 18), text, fill=color)
        first += stage.steps
    draw.text((left, bottom + 10), f"noise level over {calls} calls, ratio {schedule.ratio:.3g}", fill="#59636e")
    return image
