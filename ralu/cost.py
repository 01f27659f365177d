"""`estimate`: what a run costs before it is run, in floating-point operations and in memory.

Nothing is allocated: a pipeline's modules run on PyTorch's meta device, once for each number of tokens, while
`torch.utils.flop_counter` counts. A multiply-add is two operations; only matrix products and convolutions count.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline
from torch.nn import Module

from .budget import schedule_for
from .caches import Cache, Progress
from .components import Model, check_size, describe
from .counting import FusedAttention, LiveBytes, Repeats, flop_counter, own_work, shared_work, split_work
from .families import Family
from .method import Method
from .presets import preset
from .schedule import RESOLUTIONS, Schedule


@dataclass(frozen=True)
class Part:
    """A stage, or what runs before and after the stages.

    calls:         forward passes, each over the whole batch.
    tokens:        a sample's: of the image for the transformer, of the prompt for an encoder, latent pixels for the
                   VAE.
    tflop:         10^12 operations of all calls together, without attention's two matrix products.
    attention:     10^12 operations of those.
    peak_bytes:    the most that the tensors of a call hold at one time, beside the weights.
    scratch_bytes: a bound of what PyTorch's libraries hold besides on a CPU, within one operation (`cpu_scratch`).
    """

    name: str
    calls: int
    tokens: int
    tflop: float
    attention: float
    peak_bytes: int
    scratch_bytes: int


@dataclass(frozen=True)
class Estimate:
    """The cost of a run, as `estimate` returns it; `str` prints it as a table.

    parts:        in the order in which they run.
    weight_bytes: all parameters and buffers together.
    at_most:      whether there is a cache of which is not known, before a run, what it saves: nothing less is counted.
    """

    parts: tuple[Part, ...]
    weight_bytes: int
    at_most: bool = False

    @property
    def tflop(self) -> float:
        """10^12 operations without attention's matrix products, as the paper counts."""
        return sum(part.tflop for part in self.parts)

    @property
    def attention(self) -> float:
        """10^12 operations of attention's matrix products."""
        return sum(part.attention for part in self.parts)

    @property
    def total(self) -> float:
        """10^12 operations, attention's included."""
        return self.tflop + self.attention

    @property
    def peak_bytes(self) -> int:
        """Bytes of the weights and of the part that holds most beside them."""
        return self.weight_bytes + max(part.peak_bytes for part in self.parts)

    @property
    def scratch_bytes(self) -> int:
        """Bound of the bytes that a CPU's libraries hold besides."""
        return max(part.scratch_bytes for part in self.parts)

    def to_dict(self) -> dict:
        """Return the fields and the sums, ready for JSON."""
        sums = "tflop", "attention", "total", "peak_bytes", "scratch_bytes"
        return asdict(self) | {key: getattr(self, key) for key in sums}

    def __str__(self) -> str:
        lines = [
            f"{'':<28}{'calls':>5}{'tokens':>8}{'TFLOP':>10}{'with attention':>16}{'peak GiB':>10}{'CPU scratch':>13}"
        ]
        for part in self.parts:
            work = f"{part.tflop:>10.2f}{part.tflop + part.attention:>16.2f}"
            memory = f"{part.peak_bytes / 2**30:>10.2f}{part.scratch_bytes / 2**30:>13.2f}"
            lines.append(f"{part.name:<28}{part.calls:>5}{part.tokens:>8}{work}{memory}")
        lines.append(f"{'weights':<67}{self.weight_bytes / 2**30:>10.2f}")
        memory = f"{self.peak_bytes / 2**30:>10.2f}{self.scratch_bytes / 2**30:>13.2f}"
        lines.append(f"{'total':<41}{self.tflop:>10.2f}{self.total:>16.2f}{memory}")
        return "\n".join(lines)


def estimate(
    model: str | Path | dict | DiffusionPipeline = "flux-dev",
    method: str | int | Method | Schedule | None = None,
    *,
    height: int = 1024,
    width: int = 1024,
    ratio: float | None = None,
    text_tokens: int | None = None,
    batch: int = 1,
    guided: bool | None = None,
    preview: bool = True,
    dtype: torch.dtype | None = None,
) -> Estimate:
    """Estimate the floating-point operations and the peak memory of a run, without running it.

    model:         a published model's name ("flux-dev", "sd3-medium", ..., see `ralu.families`) or an embedded one's
                   ("mini-flux", ...), a pipeline, its folder or hub id (of which only configurations are read), or a
                   transformer's configuration with "_class_name", to which the published VAE and text encoders are
                   added.
    method:        a method or its name, see `ralu.method`, of which a speedup is for this size; a `Schedule`, or the
                   number of steps of a stock run; None for the default preset. Of a cache that goes by the image, what
                   is expected is counted.
    height, width: of the images, in pixels.
    ratio:         share of the tokens to upsample early; None for the schedule's.
    text_tokens:   of T5 (`max_sequence_length`); None for the pipeline's default, 512 for FLUX and 256 for SD3.
    batch:         images in one run. All figures are for the whole batch.
    guided:        whether every step also has a pass for the negative prompt (FLUX: `true_cfg_scale`); None for SD3
                   alone.
    preview:       whether a preview is decoded to find edges, as regions="canny" does.
    dtype:         of weights and activations; None for a given pipeline's own, else bfloat16.

    The peak is that of a pipeline that is wholly on the device, under fused attention, all of it in one dtype (loaded
    as float16, T5 keeps a part in float32). It is what tensors hold, which is the same on every machine. What
    libraries hold for themselves is more: on a CPU at most `scratch_bytes` within an operation, whatever its
    instruction set, with as many threads as this process has (`torch.get_num_threads()`). A GPU's workspaces,
    fragments and the libraries' own code are not looked at, and neither are adapters and quantisation.
    Raises ValueError for an unknown model or method, and for sizes that do not fit.
    """
    parts = describe(model)
    family = parts.family
    if parts.vae is None:
        raise ValueError("model must have a VAE, which decodes its images: pipe.vae is None")

    def budget(speedup, **matched):
        return schedule_for(speedup, model, height=height, width=width, text_tokens=text_tokens, **matched)

    method, cache = _method(method, family, ratio, budget)
    if cache is not None:
        cache.check(_built(parts.transformer, torch.bfloat16 if dtype is None else dtype))
    text_tokens = family.text_tokens if text_tokens is None else text_tokens
    for name, value in (("batch", batch), ("text_tokens", text_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if dtype is None:
        dtype = model.dtype if isinstance(model, DiffusionPipeline) else torch.bfloat16
    shrink = parts.shrink
    check_size(height, width, 2 * shrink)
    passes = 2 if (family.guided if guided is None else guided) else 1

    def encoder(model):
        tokens = parts.clip_tokens if model.kind.__name__.startswith("CLIP") else text_tokens
        return model.kind.__name__, passes, tokens, model, _encode, (batch, tokens)

    def stage(name, steps, tokens):
        text = text_tokens + (parts.clip_tokens if family.joins_clip else 0)
        calls, samples = (steps, batch * passes) if family.batched_guidance else (steps * passes, batch)
        return name, calls, tokens, parts.transformer, family.dummy_call, (samples, tokens, text)

    def decoder(name, height, width):
        shape = family.latents_shape(_built(parts.vae, dtype).config, batch, height, width)
        return name, 1, height * width, parts.vae, _decode, shape

    def image_encoder(height, width):
        frames = (1,) * (len(family.latents_shape(_built(parts.vae, dtype).config, batch, height, width)) - 4)
        shape = batch, 3, *frames, height * shrink, width * shrink
        return "resized estimate", 1, height * width, parts.vae, _encode_image, shape

    height, width = height // shrink, width // shrink
    full = height * width // 4
    if isinstance(method, int):
        stages = [stage("full resolution", method, full)]
    else:
        half = [2 * math.ceil(side / 4) for side in (height, width)]
        low = half[0] * half[1] // 4
        mixed = low + 3 * math.floor(method.ratio * low + 1e-6)  # the rule of `plan_tokens`
        tokens, selects = {"low": low, "mixed": mixed, "full": full}, decoder("preview", *half)
        stages = []
        for k, each in enumerate(method.stages):
            if k and method.transitions[k - 1].interpolation == "pixels":
                before = 2 if method.stages[k - 1].resolution == "full" else 1
                after = 1 if each.resolution == "low" else 2
                stages.append(decoder("clean estimate", *(before * side for side in half)))
                stages.append(image_encoder(*(after * side for side in half)))
            stages += [selects] if preview and each.resolution == "mixed" else []
            stages.append(stage(f"stage {k + 1}, {RESOLUTIONS[each.resolution]}", each.steps, tokens[each.resolution]))
    rows, at_most, progress = (
        [],
        False,
        iter(Progress.of((method,)) if isinstance(method, int) else Progress.of(method.steps, method.mixed)),
    )
    for name, calls, tokens, *run in [*map(encoder, parts.encoders), *stages, decoder("image", height, width)]:
        tflop, attention, own, peak, scratch = _cost(torch.get_num_threads(), dtype, *run)
        work: tuple[float, float] = calls * tflop, calls * attention
        if cache is not None and run[0] is parts.transformer:
            steps = next(progress)
            cached = _cached_cost(cache, steps, calls // len(steps), _built(run[0], dtype), own, run[2])
            if cached is None:
                at_most = True
            else:
                work, peak = cached[:2], peak + cached[2] * dtype.itemsize
        rows.append(Part(name, calls, tokens, *work, peak, scratch))
    modules = [_built(part, dtype) for part in (*parts.encoders, parts.transformer, parts.vae)]
    weights = sum(tensor.nbytes for module in modules for tensor in chain(module.parameters(), module.buffers()))
    return Estimate(tuple(rows), weights, at_most)


def _method(
    method: str | int | Method | Schedule | None,
    family: Family,
    ratio: float | None,
    budget: Callable[..., Schedule],
) -> tuple[int | Schedule, Cache | None]:
    """Return the schedule that is meant, or a number of stock steps, and the cache.

    budget: makes the schedule of a speedup, with `matching` and `upsampler`.
    """
    cache = None
    known = family.entry.presets
    method = known[0] if method is None else method
    if isinstance(method, str):
        try:
            method = Method.parse(method)
        except ValueError as error:
            raise ValueError(f"method: {error}") from None
    if isinstance(method, Method):
        if method.speedup is not None and ratio is not None:
            raise ValueError(f"{method} chooses its own ratio, so ratio must be None, got {ratio}")
        if method.preset is not None and method.speedup is None and method.preset not in known:
            raise ValueError(f"method must be one of {', '.join(known)}, a Schedule or a number of steps, got {method}")
        if method.preset is None and method.steps is None:
            raise ValueError("method must say how many steps, as stock-50 does, got stock")
        cache = method.cache
        if cache is not None and family.name not in cache.families:
            raise ValueError(f"method must have a cache for {family.name}, got {method}")
        if method.preset is not None and not method.has_regions and ratio is not None:
            raise ValueError(f"{method.spatial} has whole stages alone, so ratio must be None, got {ratio}")
        ratio = method.options.ratio if ratio is None else ratio
        matched = method.options.chosen("matching", "upsampler")
        method = method.steps or (
            budget(method.speedup, **matched) if method.speedup else preset(method.spatial, **matched)
        )
    if isinstance(method, Schedule):
        return method if ratio is None else method.replace(ratio=ratio), cache
    if isinstance(method, bool) or not isinstance(method, int):
        raise TypeError(f"method must be a method's name, a Schedule or a number of steps, got {method!r}")
    if method < 1:
        raise ValueError(f"method, as a number of steps, must be at least 1, got {method}")
    if ratio is not None:
        raise ValueError(f"a stock run upsamples nothing, so ratio must be None, got {ratio}")
    return method, cache


# ---- forward passes; what a sample looks like does not matter, only its size ----


def _encode(module: Any, dtype: torch.dtype, batch: int, tokens: int):
    module(torch.empty(batch, tokens, dtype=torch.long))


def _decode(module: Any, dtype: torch.dtype, *shape: int):
    module.decode(torch.empty(shape, dtype=dtype))


def _encode_image(module: Any, dtype: torch.dtype, *shape: int):
    module.encode(torch.empty(shape, dtype=dtype))


@lru_cache
def _built(model: Model, dtype: torch.dtype) -> Any:
    config = json.loads(model.config)
    with torch.device("meta"):
        if issubclass(model.kind, transformers.PreTrainedModel):
            module = model.kind(model.kind.config_class(**config))
        else:
            module = model.kind.from_config(config)
    return Module.to(module, dtype).eval()  # the models' own `to` warns about what these do not have


@lru_cache
def _cost(
    threads: int, dtype: torch.dtype, model: Model, call: Callable, shape: tuple[int, ...]
) -> tuple[float, float, dict[str, tuple[int, int]], int, int]:
    """Measure a forward pass.

    Returns (10^12 operations without attention's, those of attention's, operations by module, peak and scratch in
    bytes).
    """
    module, counter, memory = _built(model, dtype), flop_counter(), LiveBytes(threads)
    repeats = Repeats(counter, memory)
    with torch.device("meta"), torch.no_grad(), FusedAttention(), counter, memory, repeats.of(module):
        call(module, dtype, *shape)
    counts = counter.get_flop_counts()
    weighted, attention = split_work(counts["Global"])
    return weighted / 1e12, attention / 1e12, own_work(counts), memory.peak, memory.scratch


def _cached_cost(
    cache: Cache, steps: list[Progress], passes: int, transformer: Any, own: dict, shape: tuple[int, ...]
) -> tuple[float, float, int] | None:
    """Count a stage under a cache, of whose forward passes each module's operations are known.

    passes: in a step, with what each keeps.
    Returns (10^12 operations without attention's, those of attention's, elements kept); None where it is not known.
    """
    tflop = attention = 0.0
    for progress in steps:
        if (shares := cache.shares(transformer, progress, *shape[1:])) is None:
            return None
        work = shared_work(own, shares)
        tflop, attention = tflop + work[0], attention + work[1]
    kept = max(cache.kept(transformer, progress, *shape) for progress in steps)
    return passes * tflop / 1e12, passes * attention / 1e12, passes * kept
