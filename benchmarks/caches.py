"""What a step that a cache skips still costs on the embedded models, on one core: all of it, and what the host does.

    python benchmarks/caches.py [--models mini-flux mini-sd3] [--repeats 3]

A run has seven steps of which every method here skips the third to the fifth. They are timed from the end of the step
before, sampler included, in CPU time of the process, which other processes disturb little; runs of all methods are made
in turn. A row is a model and a method, added to benchmarks/results/caches-DEVICE.csv:

ms          median of a skipped step's milliseconds, at 256 pixels
share       of a step of the stock pipeline
host_ms     the same at 32 pixels, where four tokens leave next to no arithmetic: what Python and PyTorch do besides
host_share  of a step of the stock pipeline at 256 pixels

The row "no blocks" is of the stock pipeline with a transformer that has none: what no cache can save. What another row
has more than that is the cache's own.
"""

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import record
import torch
from models import Model

import ralu
from ralu.caches.hooks import named_blocks

STEPS, SKIPPED = 7, range(2, 5)
BARE = "no blocks"
CACHES = {
    "stock": "",
    BARE: "",
    "delta-dit": "+delta-dit(interval=5)",
    "delta-dit, all blocks": "+delta-dit(interval=5,num_blocks={blocks})",
    "ras": "+ras(ratio=0.3,start=2,resets=none)",
    "taylorseer": "+taylorseer(interval=5,warmup=2)",
    "teacache": "+teacache(delta=1000000)",
    "toca": "+toca(interval=5,warmup=2)",
}


def skipped_steps(model: Model, cache: str, method: str) -> list[float]:
    """Run a method and return the milliseconds of its skipped steps."""
    ends: list[float] = []

    def note(pipe, step, timestep, tensors):
        ends.append(1e3 * time.process_time())
        return tensors

    ralu.enable(model.pipe, method)
    parts = model.pipe.transformer._modules
    without = {name: torch.nn.ModuleList() for name in parts if cache == BARE and name.endswith("transformer_blocks")}
    with mock.patch.dict(parts, without):
        model.pipe(num_inference_steps=STEPS, callback_on_step_end=note, output_type="latent", **model.call(1))
    ralu.disable(model.pipe)
    return [ends[step] - ends[step - 1] for step in SKIPPED]


def main(argv: list[str] | None = None):
    """Measure all caches on each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("mini-flux", "mini-sd3"), default=["mini-flux", "mini-sd3"])
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=[*CACHES], metavar="CACHE")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="(default: benchmarks/results/caches-DEVICE.csv)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    output = args.output or record.RESULTS / f"caches-{record.slug(device)}.csv"
    common = record.provenance(device)
    for name in args.models:
        sizes = [Model(name, pixels, device) for pixels in (args.pixels, 32)]
        blocks = len(named_blocks(sizes[0].pipe.transformer))
        methods = {cache: f"stock-{STEPS}{CACHES[cache].format(blocks=blocks)}" for cache in ("stock", *args.caches)}
        times: dict = defaultdict(list)
        for _ in range(args.repeats):
            for cache, method in methods.items():
                for model in sizes:
                    times[cache, model.pixels] += skipped_steps(model, cache, method)
        ms = {key: statistics.median(values) for key, values in times.items()}
        whole = ms["stock", args.pixels]
        for cache, method in methods.items():
            step, host = ms[cache, args.pixels], ms[cache, 32]
            row = {
                "model": name, "cache": cache, "method": method, "pixels": args.pixels, "repeats": args.repeats,
                "ms": f"{step:.3f}", "share": f"{step / whole:.4f}",
                "host_ms": f"{host:.3f}", "host_share": f"{host / whole:.4f}",
            }  # fmt: skip
            record.append(output, [row | common])
            print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
