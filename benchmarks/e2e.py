"""Whole images: what RALU and every switch beside it make of a run's time, and where the time goes.

    python benchmarks/e2e.py [--models mini-flux flux-dev ...] [--methods stock-50 flux-5x ...] [--batch 1 2 4]
    python benchmarks/e2e.py --methods stock-50 flux-5x --fused no yes --compile no yes

On a CPU the embedded models run. On a GPU FLUX.1-dev, SD3-medium and SD3.5-large in full size, bfloat16: weights and
text embeddings are random, which changes no time but that of FirstBlockCache, whose choices look at the image.

A case is a method, as `ralu.method` has them, and its switches: fused (the blocks run on `ralu_kernels`), compile
(`torch.compile`), attention (the backend of fused blocks) and diffusers_cache (a cache of diffusers' own, with its
defaults). All cases run in turn, after an untimed round (of few steps), and are compared with the first. A row is a
model, a case and a batch, added to benchmarks/results/e2e-DEVICE.csv:

p20, p50, p80    milliseconds of a run, from the call to the images
transformer_ms, text_ms, preview_ms, decode_ms  the models' work: transformer calls, text encoding, VAE decoder
outside_ms       all else: sampler, region choice, transitions, noise, conversion to images
*_share          of the run
peak_mib         memory at the peak: what PyTorch holds on a GPU, weights included, or the process's on a CPU
tflop            transformer work as `ralu.estimate` counts it, attention included (none with caches)
tflop_per_s      that over transformer_ms
speedup, flop_ratio  the first case's p50 and tflop over this one's. Their quotient is the ratio of the tflop_per_s
                 times the ratio of the transformer's shares (exactly in one run, nearly for medians of several)

Why the tflop_per_s differ is in benchmarks/results/e2e-DEVICE-MODEL.json, at batch 1: the time of a transformer call by
case and token count; without switches its work, and what it was spent on according to `torch.profiler`; and the
straight line through time and work over all of these, whose intercept is what a call costs however few tokens it has.
"""

import argparse
import gc
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import record
import torch
from models import Model, token_count
from torch._C._autograd import DeviceType

import ralu
from ralu import families
from ralu.method import Method
from ralu_kernels import attention

FULL = ("flux-dev", "sd3-medium", "sd3.5-large")
DIFFUSERS_CACHES = {
    "firstblock": lambda dtype: diffusers.FirstBlockCacheConfig(),
    "taylorseer": lambda dtype: diffusers.TaylorSeerCacheConfig(taylor_factors_dtype=dtype),
}
PARTS = ("transformer", "text", "preview", "decode", "outside")


@dataclass(frozen=True)
class Case:
    """A method and the switches it runs with, see the top of this file."""

    method: Method
    fused: bool = False
    compile: bool = False
    attention: str = ""
    diffusers_cache: str = ""

    @property
    def columns(self) -> dict[str, str]:
        """The case as a row has it, see `record.label`."""
        return {key: "yes" * value if isinstance(value, bool) else str(value) for key, value in vars(self).items()}

    @property
    def is_counted(self) -> bool:
        """Whether its work is known before it runs."""
        return not (self.method.cache or self.diffusers_cache) and self.method.options.threshold is None

    @property
    def is_plain(self) -> bool:
        """Whether it is a preset without any switch, whose calls are profiled."""
        return self == Case(self.method) and self.is_counted and self.method.preset is not None


def ladder(family: str, device: torch.device) -> list[Case]:
    """List the cases that are run by default: every switch by itself and with the others, where it can run."""
    entry = families.FAMILIES[family]
    first, mild, strong = (Method(name) for name in (f"stock-{entry.stock_steps}", *entry.presets[:2]))
    cases = [Case(method) for method in (first, Method("stock-10"), Method("stock-7"), mild, strong)]
    cases += [Case(Method.parse(f"{method}+taylorseer")) for method in (first, mild)]
    if family == "flux":  # diffusers' SD3 transformer has no enable_cache
        cases += [Case(method, diffusers_cache="firstblock") for method in (first, mild)]
    gpu = device.type == "cuda"
    # No kernel inside the blocks is for a CPU.
    for fused, compiled in ((True, False), (False, True), (True, True)) if gpu else ((False, True),):
        cases += [Case(method, fused, compiled) for method in (first, mild, strong)]
    if gpu:
        names = [name for name in attention.BACKENDS if name == "sdpa" or attention._load(name)[0]]
        cases += [Case(mild, fused=True, attention=name) for name in names]
    return cases


def work(model: Model, case: Case, batch: int) -> dict[int, tuple[int, float]]:
    """Count a run's work: token count -> transformer calls, and TFLOP of each; nothing where a cache decides."""
    if not case.is_counted:
        return {}
    estimate = ralu.estimate(
        model.pipe, case.method, height=model.pixels, width=model.pixels, text_tokens=model.text_tokens, batch=batch
    )
    stages = [part for part in estimate.parts if part.name.endswith("resolution")]
    return {part.tokens: (part.calls, (part.tflop + part.attention) / part.calls) for part in stages}


@contextmanager
def switched(model: Model, case: Case) -> Iterator[int]:
    """Put a model's pipeline into a case; yield the number of steps to ask for."""
    pipe, transformer, method = model.pipe, model.pipe.transformer, case.method
    with ExitStack() as undo:
        if case.compile:
            undo.callback(setattr, pipe, "transformer", transformer)
            pipe.transformer = model.compiled
        undo.callback(ralu.disable, pipe)  # before the compiled module is taken out, which has RALU's hook
        if case.diffusers_cache:
            transformer.enable_cache(DIFFUSERS_CACHES[case.diffusers_cache](transformer.dtype))
            undo.callback(transformer.disable_cache)
        if case.attention:
            undo.enter_context(ralu.attention_backend(case.attention))
        if method.preset or method.cache:
            ralu.enable(pipe, method, fused=case.fused)
        elif case.fused:
            ralu.fuse(pipe.transformer)
            undo.callback(ralu.unfuse, transformer)
        yield method.steps or sum(pipe.scheduler.schedule.steps)


# ---- one run ----


def run(model: Model, case: Case, batch: int, short: bool = False) -> dict[str, Any]:
    """Measure milliseconds of a run and of its parts, of every transformer call by token count, and peak bytes.

    short: take two steps where all have the same shapes.
    """
    device, call = model.device, model.call(batch)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with switched(model, case) as steps, model.watched() as spans:
        if short and not case.method.preset:
            steps = 2
        wait()
        start = time.perf_counter()
        _, _, peak = record.peak_memory(lambda: model.pipe(num_inference_steps=steps, **call), device)
        wait()
        measured: dict[str, Any] = {"wall": 1e3 * (time.perf_counter() - start), "peak": peak}
    measured |= dict.fromkeys(PARTS, 0.0)
    calls, last = defaultdict(list), max(i for i, (part, *_) in enumerate(spans) if part == "decode")
    for i, (part, tokens, begin, end) in enumerate(spans):
        took = begin.elapsed_time(end) if device.type == "cuda" else 1e3 * (end - begin)
        measured["preview" if part == "decode" and i < last else part] += took
        if part == "transformer":
            calls[tokens].append(took)
    measured["outside"] = measured["wall"] - sum(measured[part] for part in PARTS)
    shares = {f"{part}_share": measured[part] / measured["wall"] for part in PARTS}
    return measured | shares | {"calls": dict(calls)}


def summary(model: Model, runs: dict[Case, list[dict]], batch: int) -> list[dict]:
    """Make the rows of all cases' runs, the first being what the others are compared with."""

    def median(case, key):
        return statistics.median(one[key] for one in runs[case])

    def tflop(case):
        return sum(calls * each for calls, each in work(model, case, batch).values())

    first, rows = next(iter(runs)), []
    for case, measured in runs.items():
        p20, p50, p80 = np.quantile([one["wall"] for one in measured], (0.2, 0.5, 0.8))
        row = {
            "model": model.name, **case.columns, "pixels": model.pixels, "batch": batch,
            "dtype": str(model.pipe.transformer.dtype)[6:],
            "threads": torch.get_num_threads() if model.device.type == "cpu" else "", "repeats": len(measured),
            "p20_ms": f"{p20:.2f}", "p50_ms": f"{p50:.2f}", "p80_ms": f"{p80:.2f}",
            **{f"{part}_ms": f"{median(case, part):.2f}" for part in PARTS},
            **{f"{part}_share": f"{median(case, f'{part}_share'):.4f}" for part in PARTS},
            "calls": sum(map(len, measured[0]["calls"].values())),
            "peak_mib": f"{max(one['peak'] for one in measured) / 2**20:.0f}",
            "images_per_s": f"{1e3 * batch / p50:.4f}",
            "speedup": f"{median(first, 'wall') / p50:.3f}",
        }  # fmt: skip
        if total := tflop(case):
            row["tflop"] = f"{total:.4f}"
            row["tflop_per_s"] = f"{1e3 * total / median(case, 'transformer'):.5g}"
            row["flop_ratio"] = f"{tflop(first) / total:.3f}"
        rows.append(row)
    return rows


# ---- why ----

KINDS = {"matrix products": "mm", "attention": "attention"}  # of operators, by part of the name


def profile(model: Model, case: Case) -> dict[int, dict]:
    """Profile a transformer call for each token count: token count -> what its time is spent on."""
    profiles, running, cuda = {}, [], model.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]

    def before(module, args, kwargs):
        tokens = token_count(kwargs["hidden_states"])
        if tokens not in profiles:
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
        longest = sorted(spent, key=spent.__getitem__, reverse=True)[:12]
        profiles[tokens] = {
            "operators": sum(event.count for event in events),
            "shares": {kind: round(share, 4) for kind, share in shares.items()},
            "ms_by_operator": {operator: round(spent[operator] / 1e3, 4) for operator in longest},
        }

    with switched(model, case) as steps, ExitStack() as undo:
        undo.callback(model.pipe.transformer.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.callback(model.pipe.transformer.register_forward_hook(after).remove)
        model.pipe(num_inference_steps=steps, **model.call(1))
    return profiles


def explanation(model: Model, runs: dict[Case, list[dict]]) -> dict[str, Any]:
    """Explain transformer calls at batch 1: time by case and token count; without switches work and profile too."""

    def by_tokens(case):
        tokens = runs[case][0]["calls"]
        return {count: statistics.median(chain(*(one["calls"][count] for one in runs[case]))) for count in tokens}

    spent, stages = {case: by_tokens(case) for case in runs if case.is_counted}, {}
    for case in dict.fromkeys([next(iter(runs)), *(case for case in spent if case.is_plain)]):
        profiles = profile(model, case)
        for tokens, (calls, tflop) in work(model, case, 1).items():
            ms = spent[case][tokens]
            stage = {"calls": calls, "tflop": round(tflop, 7), "ms": round(ms, 4)}
            stage |= {"tflop_per_s": round(1e3 * tflop / ms, 5)} | profiles[tokens]
            stages[f"{record.label(case.columns)}, {tokens} tokens"] = stage
    slope, fixed = np.polyfit([one["tflop"] for one in stages.values()], [one["ms"] for one in stages.values()], 1)
    line = {"fixed_ms_per_call": round(fixed, 4), "tflop_per_s_beyond": round(1e3 / slope, 5)}
    by_case = {
        record.label(case.columns): {count: round(ms, 4) for count, ms in by_count.items()}
        for case, by_count in spent.items()
    }
    return line | {"ms_per_call": by_case, "stages": stages}


def main(argv: list[str] | None = None):
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, known = parser.add_argument, ["mini-flux", "mini-sd3", *FULL]
    switch: dict[str, Any] = {"nargs": "+", "metavar": "SWITCH"}
    add("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--models", nargs="+", choices=known, metavar="MODEL", help=f"{', '.join(known)} (default: the device's)")
    add("--methods", nargs="+", metavar="METHOD", help="(default: a ladder of all switches)")
    for name in ("--fused", "--compile"):
        add(name, choices=("no", "yes"), default=["no"], help="of the methods: no, yes or both", **switch)
    add("--attention", choices=attention.BACKENDS, default=[""], help=", ".join(attention.BACKENDS), **switch)
    add("--diffusers-cache", choices=DIFFUSERS_CACHES, default=[""], help=", ".join(DIFFUSERS_CACHES), **switch)
    add("--pixels", type=int, help="of an image's side (default: 256 for the embedded models, else 1024)")
    add("--batch", type=int, nargs="+", default=[1, 2, 4])
    add("--repeats", type=int, default=3)
    add("--output", type=Path, help="(default: benchmarks/results/e2e-DEVICE.csv)")
    args = parser.parse_args(argv)
    device = record.pick_device(args.device)
    output = args.output or record.RESULTS / f"e2e-{record.slug(device)}.csv"
    common = record.provenance(device) | {"diffusers": diffusers.__version__}
    torch._dynamo.config.recompile_limit = 64  # beyond it a graph would silently run uncompiled
    try:
        methods = [Method.parse(text) for text in args.methods or ()]
    except ValueError as error:
        parser.error(f"--methods: {error}")
    if any(method.spatial == "stock" for method in methods):
        parser.error("--methods: stock needs its number of steps, such as stock-50")
    switches = product(methods, args.fused, args.compile, args.attention, args.diffusers_cache)
    asked = [Case(method, fused == "yes", compiled == "yes", *rest) for method, fused, compiled, *rest in switches]
    for name in args.models or (FULL if device.type == "cuda" else ("mini-flux", "mini-sd3")):
        model = Model(name, args.pixels, device)
        cases = asked or ladder(model.family.name, device)
        for batch in args.batch:
            runs: dict[Case, list[dict]] = {case: [] for case in cases}
            for case in cases:
                run(model, case, batch, short=True)
            for _ in range(args.repeats):
                for case in cases:
                    runs[case].append(run(model, case, batch))
            rows = summary(model, runs, batch)
            record.append(output, [row | common for row in rows])
            for row in rows:
                keys = ("batch", "p50_ms", "outside_share", "images_per_s", "speedup", "flop_ratio")
                print(name, record.label(row), *(row.get(key, "") for key in keys), flush=True)
            if batch == 1 and any(case.is_plain for case in cases):
                reasons = {"model": name, "pixels": model.pixels} | common | explanation(model, runs)
                output.with_name(f"{output.stem}-{name}.json").write_text(json.dumps(reasons, indent=1) + "\n")
                print(
                    name, *(f"{key}={reasons[key]}" for key in ("fixed_ms_per_call", "tflop_per_s_beyond")), flush=True
                )
        del model  # all of it, before the next one is made
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
