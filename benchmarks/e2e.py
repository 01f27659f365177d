"""Whole pictures: what RALU and every switch beside it make of a run's time, and where the time goes.

    python benchmarks/e2e.py [--models mini-flux flux-dev ...] [--methods stock-50 flux-5x+fused ...] [--batch 1 2 4]

On a CPU the embedded models paint. On a GPU FLUX.1-dev, SD3-medium and SD3.5-large in full size, bfloat16: weights and
text embeddings are random, which changes no time but that of FirstBlockCache, whose choices look at the picture.

A method is stock-STEPS or a preset, with switches behind plus signs: fused (kernels inside the blocks), the name of an
attention backend for those, compile (`torch.compile`), taylorseer and firstblock (diffusers' caches). All methods run
in turn, after an untimed round (of few steps), and are compared with the first. A row is a model, a method and a batch,
added to benchmarks/results/e2e-DEVICE.csv:

p20, p50, p80    milliseconds of a run, from the call to the pictures
transformer_ms, text_ms, preview_ms, decode_ms  the models' own work: transformer calls, text encoding, VAE decoder
outside_ms       all else: sampler, region choice, moves, noise, conversion to pictures
*_share          of the run
peak_mib         memory at the peak: what PyTorch holds on a GPU, weights included, or the process's on a CPU
tflop            transformer work as `ralu.estimate` counts it, attention included (none with caches)
tflop_per_s      that over transformer_ms
speedup, flop_ratio  the first method's p50 and tflop over this one's. Their quotient is the ratio of the tflop_per_s
                 times the ratio of the transformer's shares (exactly in one run, nearly for medians of several)

Why the tflop_per_s differ is in benchmarks/results/e2e-DEVICE-MODEL.json, at batch 1: the time of a transformer call by
method and token count; without switches its work, and what it was spent on according to `torch.profiler`; and the
straight line through time and work over all of these, whose intercept is what a call costs however few tokens it has.
"""

import argparse
import gc
import inspect
import json
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import chain
from operator import itemgetter
from pathlib import Path

import diffusers
import numpy as np
import record
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    TaylorSeerCacheConfig,
)
from torch.autograd import DeviceType

import ralu
from ralu.cost import describe
from ralu.mini import CALL_ARGUMENTS, NAMES, PROMPTS
from ralu_kernels import attention

FULL = ("flux-dev", "sd3-medium", "sd3.5-large")
FIRST = {"flux": ("stock-50", "flux-5x", "flux-7x"), "sd3": ("stock-28", "sd3-2x", "sd3-3x")}
CACHES = {
    "taylorseer": lambda dtype: TaylorSeerCacheConfig(taylor_factors_dtype=dtype),
    "firstblock": lambda dtype: FirstBlockCacheConfig(),
}
PARTS = ("transformer", "text", "preview", "decode", "outside")


def ladder(family: str, device: torch.device) -> list[str]:
    first, mild, strong = FIRST[family]
    methods = [first, "stock-10", "stock-7", mild, strong]
    if family == "flux":  # SD3's transformer takes no caches
        methods += [f"{method}+{cache}" for cache in CACHES for method in (first, mild)]
    gpu = device.type == "cuda"
    # No kernel inside the blocks is for a CPU.
    switches = ("fused", "compile", "fused+compile") if gpu else ("compile",)
    methods += [f"{method}+{chosen}" for chosen in switches for method in (first, mild, strong)]
    if gpu:
        methods += [f"{mild}+fused+{name}" for name in attention.BACKENDS if name == "sdpa" or attention._load(name)[0]]
    return methods


class Model:
    """A pipeline, and how it is called. Only the embedded models encode text: the others are given embeddings."""

    def __init__(self, name: str, pixels: int | None, device: torch.device):
        self.name, self.device = name, device
        if name in NAMES:
            self.pipe = ralu.mini_pipeline(name, dtype=torch.float32)
            self.pipe.to(device)
        else:
            self.pipe = full_size(name, device)
        self.family = describe(self.pipe).family.name
        self.pixels = pixels or (256 if name in NAMES else 1024)
        full = {"flux": 512, "sd3": 256}[self.family]  # the pipelines' own
        self.text_tokens = CALL_ARGUMENTS[self.family]["max_sequence_length"] if name in NAMES else full
        self.pipe.set_progress_bar_config(disable=True)

    @cached_property
    def compiled(self) -> torch.nn.Module:
        """One for all methods, so that they share their graphs."""
        return torch.compile(self.pipe.transformer)

    def call(self, batch: int) -> dict:
        call = {"height": self.pixels, "width": self.pixels}
        call["generator"] = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        if self.name in NAMES:
            prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
            return call | {"prompt": prompts} | CALL_ARGUMENTS[self.family]
        config = self.pipe.transformer.config
        tokens = self.text_tokens + (77 if self.family == "sd3" else 0)  # SD3 has CLIP's tokens beside T5's

        def random(*shape):
            return torch.randn(batch, *shape, device=self.device, dtype=self.pipe.dtype)

        for prefix in ("", "negative_") if self.family == "sd3" else ("",):
            call[f"{prefix}prompt_embeds"] = random(tokens, config.joint_attention_dim)
            call[f"{prefix}pooled_prompt_embeds"] = random(config.pooled_projection_dim)
        return call

    def tflop(self, method: str, batch: int) -> dict[int, tuple[int, float]]:
        """Token count -> transformer calls, and the work of each; nothing where a cache decides."""
        name, *switches = method.split("+")
        if CACHES.keys() & set(switches):
            return {}
        stock = name.removeprefix("stock-")
        found = ralu.estimate(
            self.pipe, int(stock) if stock != name else name, height=self.pixels, width=self.pixels,
            text_tokens=self.text_tokens, batch=batch,
        )  # fmt: skip
        stages = [part for part in found.parts if part.name.endswith("resolution")]
        return {part.tokens: (part.calls, (part.tflop + part.attention) / part.calls) for part in stages}


def full_size(name: str, device: torch.device):
    """A published model's pipeline with random weights, made where they are needed."""
    parts = describe(name)
    dtype, before = torch.bfloat16 if device.type == "cuda" else torch.float32, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = parts.transformer.kind.from_config(json.loads(parts.transformer.config))
            scaling = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
            vae = parts.vae.kind.from_config(json.loads(parts.vae.config) | scaling)
    finally:
        torch.set_default_dtype(before)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=parts.family.name == "flux")
    kind = FluxPipeline if parts.family.name == "flux" else StableDiffusion3Pipeline
    absent = [key for key in inspect.signature(kind.__init__).parameters if key.startswith(("text_", "tokenizer"))]
    for module in (transformer, vae):
        torch.nn.Module.to(module, dtype).eval()  # buffers; the models' own `to` warns without a reason
    return kind(scheduler=scheduler, transformer=transformer, vae=vae, **dict.fromkeys(absent))


# ---- methods ----


@contextmanager
def switched(model: Model, method: str):
    """The pipeline as a method has it; yields the number of steps to ask for."""
    name, *switches = method.split("+")
    pipe, transformer = model.pipe, model.pipe.transformer
    with ExitStack() as undo:
        undo.callback(ralu.disable, pipe)
        if "compile" in switches:
            undo.callback(setattr, pipe, "transformer", transformer)
            pipe.transformer = model.compiled
        for cache in CACHES.keys() & set(switches):
            transformer.enable_cache(CACHES[cache](transformer.dtype))
            undo.callback(transformer.disable_cache)
        for backend in set(attention.BACKENDS) & set(switches):
            undo.enter_context(ralu.attention_backend(backend))
        stock, fused = name.startswith("stock-"), "fused" in switches
        if not stock:
            ralu.enable(pipe, name, fused=fused)
        elif fused:
            ralu.fuse(pipe.transformer)
            undo.callback(ralu.unfuse, transformer)
        yield int(name.removeprefix("stock-")) if stock else sum(pipe.scheduler.schedule.steps)


# ---- one run ----


def tokens_of(sample: torch.Tensor) -> int:
    """FLUX's samples are (B, L, C), SD3's latent pixels, four a token."""
    return sample.shape[1] if sample.ndim == 3 else sample.shape[2] * sample.shape[3] // 4


@contextmanager
def watched(pipe, device: torch.device):
    """Yields what becomes a list of [part, tokens, start, end] of the models' calls.

    On a GPU the times are events in its stream, so that nothing waits that would not wait unwatched.
    """
    spans = []

    def mark():
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(part, tokens=0):
        spans.append([part, tokens, mark(), None])

    def end(*_):
        spans[-1][3] = mark()

    def encode_prompt(*args, **kwargs):
        begin("text")
        found = encode(*args, **kwargs)
        end()
        return found

    encode = pipe.encode_prompt
    pipe.encode_prompt = encode_prompt
    # After RALU's own hook, whose work is not the transformer's.
    handles = [
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: begin("transformer", tokens_of(kwargs["hidden_states"])), with_kwargs=True
        ),
        pipe.transformer.register_forward_hook(end),
        pipe.vae.decoder.register_forward_pre_hook(lambda *_: begin("decode")),
        pipe.vae.decoder.register_forward_hook(end),
    ]
    try:
        yield spans
    finally:
        del pipe.encode_prompt
        for handle in handles:
            handle.remove()


def run(model: Model, method: str, batch: int, short: bool = False) -> dict:
    """Milliseconds of a run and of its parts, those of every transformer call by token count, and bytes at the peak.

    short: take two steps where all have the same shapes.
    """
    device, call = model.device, model.call(batch)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with switched(model, method) as steps, watched(model.pipe, device) as spans:
        if short and method.startswith("stock-"):
            steps = 2
        wait()
        start = time.perf_counter()
        _, _, peak = record.peak_memory(lambda: model.pipe(num_inference_steps=steps, **call), device)
        wait()
        found = {"wall": 1e3 * (time.perf_counter() - start), "peak": peak} | dict.fromkeys(PARTS, 0.0)
    calls = defaultdict(list)
    last = max(i for i, span in enumerate(spans) if span[0] == "decode")
    for i, (part, tokens, begin, end) in enumerate(spans):
        took = begin.elapsed_time(end) if device.type == "cuda" else 1e3 * (end - begin)
        found["preview" if part == "decode" and i < last else part] += took
        if part == "transformer":
            calls[tokens].append(took)
    found["outside"] = found["wall"] - sum(found[part] for part in PARTS)
    return found | {"calls": dict(calls)}


def rows(model: Model, runs: dict[str, list[dict]], batch: int) -> list[dict]:
    """`runs` by method, the first being what the others are compared with."""

    def middle(method, value):
        return statistics.median(map(value, runs[method]))

    def share(part):
        return lambda one: one[part] / one["wall"]

    def work(method):
        return sum(calls * each for calls, each in model.tflop(method, batch).values())

    first, *_ = runs
    found = []
    for method, of in runs.items():
        p20, p50, p80 = np.quantile([one["wall"] for one in of], (0.2, 0.5, 0.8))
        row = {
            "model": model.name, "method": method, "pixels": model.pixels, "batch": batch,
            "dtype": str(model.pipe.transformer.dtype)[6:],
            "threads": torch.get_num_threads() if model.device.type == "cpu" else "", "repeats": len(of),
            "p20_ms": f"{p20:.2f}", "p50_ms": f"{p50:.2f}", "p80_ms": f"{p80:.2f}",
            **{f"{part}_ms": f"{middle(method, itemgetter(part)):.2f}" for part in PARTS},
            **{f"{part}_share": f"{middle(method, share(part)):.4f}" for part in PARTS},
            "calls": sum(map(len, of[0]["calls"].values())),
            "peak_mib": f"{max(one['peak'] for one in of) / 2**20:.0f}",
            "images_per_s": f"{1e3 * batch / p50:.4f}",
            "speedup": f"{middle(first, itemgetter('wall')) / p50:.3f}",
        }  # fmt: skip
        if tflop := work(method):
            row["tflop"] = f"{tflop:.4f}"
            row["tflop_per_s"] = f"{1e3 * tflop / middle(method, itemgetter('transformer')):.4f}"
            row["flop_ratio"] = f"{work(first) / tflop:.3f}"
        found.append(row)
    return found


# ---- why ----

KINDS = {"matrix products": "mm", "attention": "attention"}  # of operators, by part of the name


def profile(model: Model, method: str) -> dict[int, dict]:
    """Token count -> what a transformer call spends its time on, a call for each."""
    found, cuda = {}, model.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    running = []

    def before(module, args, kwargs):
        tokens = tokens_of(kwargs["hidden_states"])
        if tokens not in found:
            running.append((tokens, torch.profiler.profile(activities=activities)))
            running[-1][1].start()

    def after(*_):
        if not running:
            return
        tokens, profiler = running.pop()
        if cuda:
            torch.cuda.synchronize()
        profiler.stop()
        events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
        spent = {event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) for event in events}
        shares = dict.fromkeys((*KINDS, "other"), 0.0)
        for operator, microseconds in spent.items():
            kind = next((kind for kind, part in KINDS.items() if part in operator), "other")
            shares[kind] += microseconds / sum(spent.values())
        longest = sorted(spent, key=spent.get, reverse=True)[:12]
        found[tokens] = {
            "operators": sum(event.count for event in events),
            "shares": {kind: round(share, 4) for kind, share in shares.items()},
            "ms_by_operator": {operator: round(spent[operator] / 1e3, 4) for operator in longest},
        }

    with switched(model, method) as steps, ExitStack() as undo:
        undo.callback(model.pipe.transformer.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.callback(model.pipe.transformer.register_forward_hook(after).remove)
        model.pipe(num_inference_steps=steps, **model.call(1))
    return found


def explanation(model: Model, runs: dict[str, list[dict]]) -> dict:
    """Of a transformer call at batch 1: its time by method and token count, without switches its work and profile."""

    def by_tokens(method):
        counts = runs[method][0]["calls"]
        return {tokens: statistics.median(chain(*(one["calls"][tokens] for one in runs[method]))) for tokens in counts}

    spent, stages = {method: by_tokens(method) for method in runs if model.tflop(method, 1)}, {}
    first, *others = runs
    for method in (first, *(method for method in others if method in ralu.PRESETS)):
        seen = profile(model, method)
        for tokens, (calls, tflop) in model.tflop(method, 1).items():
            ms = spent[method][tokens]
            stage = {"calls": calls, "tflop": round(tflop, 7), "ms": round(ms, 4)}
            stages[f"{method}, {tokens} tokens"] = stage | {"tflop_per_s": round(1e3 * tflop / ms, 5)} | seen[tokens]
    slope, fixed = np.polyfit([one["tflop"] for one in stages.values()], [one["ms"] for one in stages.values()], 1)
    line = {"fixed_ms_per_call": round(fixed, 4), "tflop_per_s_beyond": round(1e3 / slope, 5)}
    calls = {method: {tokens: round(ms, 4) for tokens, ms in of.items()} for method, of in spent.items()}
    return line | {"ms_per_call": calls, "stages": stages}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    known = ["mini-flux", "mini-sd3", *FULL]
    add("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--models", nargs="+", choices=known, metavar="MODEL", help=f"{', '.join(known)} (default: the device's)")
    add("--methods", nargs="+", metavar="METHOD", help="(default: a ladder of all switches)")
    add("--pixels", type=int, help="of a picture's side (default: 256 for the embedded models, else 1024)")
    add("--batch", type=int, nargs="+", default=[1, 2, 4])
    add("--repeats", type=int, default=3)
    add("--output", type=Path, help="(default: benchmarks/results/e2e-DEVICE.csv)")
    args = parser.parse_args(argv)
    device = record.pick_device(args.device)
    output = args.output or record.RESULTS / f"e2e-{record.slug(device)}.csv"
    common = record.provenance(device) | {"diffusers": diffusers.__version__}
    torch._dynamo.config.recompile_limit = 64  # beyond it a graph would silently run uncompiled
    for name in args.models or (FULL if device.type == "cuda" else ("mini-flux", "mini-sd3")):
        model = Model(name, args.pixels, device)
        methods = args.methods or ladder(model.family, device)
        for batch in args.batch:
            runs = {method: [] for method in methods}
            for method in methods:
                run(model, method, batch, short=True)
            for _ in range(args.repeats):
                for method in methods:
                    runs[method].append(run(model, method, batch))
            found = rows(model, runs, batch)
            record.append(output, [row | common for row in found])
            for row in found:
                keys = ("model", "method", "batch", "p50_ms", "outside_share", "images_per_s", "speedup", "flop_ratio")
                print(*(row.get(key, "") for key in keys), flush=True)
            if batch == 1 and ralu.PRESETS.keys() & runs.keys():
                found = {"model": name, "pixels": model.pixels} | common | explanation(model, runs)
                output.with_name(f"{output.stem}-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
                print(name, *(f"{key}={found[key]}" for key in ("fixed_ms_per_call", "tflop_per_s_beyond")), flush=True)
        del model  # all of it, before the next one is made
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
