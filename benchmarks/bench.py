"""Every kernel against every other way to do its work, at the shapes of FLUX and SD3, in turn in one process.

    python benchmarks/bench.py [--device cuda] [--ops upsample_renoise ...] [--pixels 512 1024 2048] [--batch 1 4] ...

A row is an operation, a provider and a shape; rows are added to benchmarks/results/DEVICE.csv, and only after the
provider's result has passed its check in this process. Providers:

eager      what a careful author writes with PyTorch alone: `interpolate`, `randn`, block means, in-place updates;
           `index_select` and `index_copy_` for the transitions, whose indices are ready before the clock. Where the
           operation is nothing but PyTorch's the reference backend itself
compile    that under `torch.compile`, one graph a shape, which takes seconds: see `has_graph`
reference  the specification in eager PyTorch, with the kernels' own random numbers (batch 1)
native, triton, and the backends of varlen_attention (FlashAttention among them)  the kernels, where they can run
comfy-kitchen, liger  what these packages have for the same work, where they are installed: `adaln` for modulate, and
           `rms_rope` with PyTorch's concatenation and gather for pack_qkv; a layer norm whose weight and bias are one
           image's vectors
fill       as many Philox and Box-Muller normals as the output has values, and nothing else: the floor (CPU: one thread)
dense      the way of the paper's release for the noise alone: a dense covariance and its Cholesky factor, made anew
copy       as many bytes read and written as the operation must read and write: the device's own bandwidth

p20, p50, p80  milliseconds, quantiles over the repeats; on a GPU with a cold L2 cache (`record.clock`)
gbps           10^9 bytes that must be moved (inputs once, output once) a second
copy_fraction, fill_fraction, eager_ratio  the p50 of copy, fill and eager over this p50
memory         how far memory grew at the peak of a call, over the bytes of the output; on a CPU in rows of their own,
               at 16 images of 2048 pixels, where allocators' caches do not hide it
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import block_cases
import cases
import numpy as np
import record
import torch
from cases import BOTH, DTYPES, Case, Operation, Shape, agree, installed, tensors

import ralu_kernels

OPERATIONS = cases.OPERATIONS | block_cases.OPERATIONS


def has_graph(operation: Operation, shape: Shape, in_minutes: bool) -> bool:
    """Tell whether a shape is worth a graph of `torch.compile`: one image, on a CPU of 1024 pixels.

    Where minutes are counted those that the tables have: FLUX in bfloat16, at 1024 and 2048 pixels.
    """
    if shape.device.type == "cpu":
        return shape.batch == 1 and shape.pixels == 1024
    in_tables = shape.model == operation.models[0] and shape.dtype == torch.bfloat16 and shape.pixels >= 1024
    return shape.batch == 1 and (in_tables or not in_minutes)


def checked(case: Case, shape: Shape, expected, chosen: list[str] | None, graph: bool) -> dict[str, Callable]:
    """List all (or the chosen) that can do a case's work here, once each has passed its check against the reference."""
    same, eager = partial(agree, expected=expected), case.eager or partial(case.ours, "reference")
    providers = {"eager": (eager, case.check or same)}
    if case.eager and graph:
        torch.compiler.reset()
        providers["compile"] = torch.compile(eager, fullgraph=True, dynamic=False), case.check or same
    providers |= {name: (partial(case.ours, name), same) for name in case.backends}
    providers |= {name: (call, same) for name, call in case.others.items()}
    providers |= case.floors
    if case.eager and shape.batch == 1:
        providers["reference"] = partial(case.ours, "reference"), same
    providers = {name: call for name, call in providers.items() if chosen is None or name in chosen}
    for name, (call, check) in providers.items():
        check(expected if name == "reference" else call())
    return {name: call for name, (call, _) in providers.items()}


def nbytes(result) -> int:
    """Count the bytes of all tensors of a result."""
    return sum(x.nbytes for x in tensors(result))


def measure(name: str, shape: Shape, args: argparse.Namespace) -> list[dict]:
    """Measure an operation at one shape; returns its rows."""
    case, graph = OPERATIONS[name].case(shape), has_graph(OPERATIONS[name], shape, args.minutes is not None)
    expected = case.ours("reference")
    calls, moved = checked(case, shape, expected, args.providers, graph), nbytes(case.inputs) + nbytes(expected)
    source = torch.empty(moved // 2, dtype=torch.uint8, device=shape.device)
    calls["copy"] = partial(torch.empty_like(source).copy_, source)
    cpu, rows = shape.device.type == "cpu", []
    for threads in args.threads if cpu else [None]:
        if cpu:
            torch.set_num_threads(threads)
        turns = {one: call for one, call in calls.items() if one != "fill" or not cpu or threads == 1}
        times = record.in_turn(turns, shape.device, args.budget)
        p20, p50, p80 = ({one: np.quantile(ms, q) for one, ms in times.items()} for q in (0.2, 0.5, 0.8))
        for provider in times:
            row = {
                "op": name, "provider": provider, "model": shape.model, "pixels": shape.pixels, "batch": shape.batch,
                "input": "x".join(map(str, case.inputs[0].shape)), "dtype": str(case.inputs[0].dtype)[6:],
                "threads": threads, "repeats": len(times[provider]),
                "p20_ms": f"{p20[provider]:.5g}", "p50_ms": f"{p50[provider]:.5g}", "p80_ms": f"{p80[provider]:.5g}",
            }  # fmt: skip
            if provider not in case.floors:
                row["gbps"] = f"{moved / p50[provider] / 1e6:.4g}"
            for other, column in (("copy", "copy_fraction"), ("fill", "fill_fraction"), ("eager", "eager_ratio")):
                if other in p50:
                    row[column] = f"{p50[other] / p50[provider]:.4g}"
            if not cpu:
                _, before, peak = record.peak_memory(calls[provider], shape.device)
                row["memory"] = f"{(peak - before) / nbytes(expected):.2f}"
            rows.append(row)
    return rows


# ---- a CPU's memory ----

LARGE = {"pixels": 2048, "batch": 16}
TRANSITIONS = ("upsample_renoise", "upsample_selected", "upsample_remaining")


def grow(name: str, provider: str):
    """Print by how much of its output's size a call makes this process grow."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")

    def call(shape):
        case = OPERATIONS[name].case(shape)
        return case.eager if provider == "eager" else partial(case.ours, provider)

    call(Shape(BOTH, 128, 1, torch.float32, cpu))()  # first calls load and allocate
    out, before, peak = record.peak_memory(call(Shape(BOTH, **LARGE, dtype=torch.float32, device=cpu)), cpu)
    print((peak - before) / nbytes(out))


def memory_rows(name: str) -> list[dict]:
    """Measure memory in a process for each provider, so that none finds what another has left."""
    rows = []
    for provider in ("eager", *installed(torch.device("cpu"), "native")):
        command = [sys.executable, __file__, "--grow", name, provider]
        growth = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row = {"op": name, "provider": provider, "model": BOTH, **LARGE, "dtype": "float32", "threads": 1}
        rows.append(row | {"memory": f"{growth:.2f}"})
    return rows


def by_worth(names: list[str], args: argparse.Namespace, device: torch.device) -> dict[str, tuple[str, Shape]]:
    """List what is measured: all operations at the first of the dtypes, batches, models and sizes, and so on."""
    work = {}
    for i, name in enumerate(names):
        operation = OPERATIONS[name]
        ways = product(*map(enumerate, (operation.dtypes or args.dtypes, args.batch, operation.models, args.pixels)))
        for (d, dtype), (b, batch), (m, model), (p, pixels) in ways:
            label = f"{name} {model} {pixels} px x {batch} {dtype}"
            work[d, b, m, p, i] = label, (name, Shape(model, pixels, batch, DTYPES.get(dtype), device))
    return dict(work[key] for key in sorted(work))


def main(argv: list[str] | None = None):
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--ops", nargs="+", choices=OPERATIONS, metavar="OP", help=f"{', '.join(OPERATIONS)} (default: the device's)")
    add("--providers", nargs="+", metavar="PROVIDER", help="beside copy (default: all that can run)")
    add("--pixels", type=int, nargs="+", default=[1024, 2048, 512], help="of an image's side, what matters most first")
    add("--batch", type=int, nargs="+", default=[1, 4])
    add("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    add("--threads", type=int, nargs="+", default=[1, 2], help="on a CPU")
    add("--budget", type=float, default=0.3, help="seconds for a provider at a shape (at least 3 calls, at most 200)")
    add("--minutes", type=float, help="start nothing new after so many, and compile less (default: no limit)")
    add("--memory", action="store_true", help="peak memory too, on a CPU in a process for each provider")
    add("--output", type=Path, help="(default: benchmarks/results/DEVICE.csv)")
    add("--grow", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.grow:
        grow(*args.grow)
        return
    device = record.pick_device(args.device)
    output = args.output or record.RESULTS / f"{record.slug(device)}.csv"
    common = record.provenance(device)
    torch.manual_seed(0)

    def write(rows):
        record.append(output, [row | common for row in rows])
        for row in rows:
            print(*(row[key] for key in row if key not in ("p20_ms", "p80_ms", "gbps", "repeats")), flush=True)

    usual = [name for name in OPERATIONS if device.type in OPERATIONS[name].devices and hasattr(ralu_kernels, name)]
    names = args.ops or usual
    for name, shape in record.in_time(by_worth(names, args, device), args.minutes):
        write(measure(name, shape, args))
    if args.memory and device.type == "cpu":
        for name in TRANSITIONS:
            if name in names:
                write(memory_rows(name))


if __name__ == "__main__":
    main()
