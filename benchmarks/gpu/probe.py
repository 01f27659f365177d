"""What the other benchmarks cannot tell: the GPU's time without the host's, and the host's without the GPU's.

    python benchmarks/gpu/probe.py PART ... [--device cpu] [--tiny] [--csv FILE]

roof      the device's own copy (bytes read and written), a bfloat16 matrix product, and PyTorch's random normals
kernels   every operation at an image of 1024 pixels and at a size that fills the chip: many calls over different
          inputs in one CUDA graph, so that neither gaps between launches nor a warm L2 cache count
host      microseconds of the host for a call of every operation
step      FLUX.1-dev with random weights: milliseconds of a step as Python drives it, of the host until all is queued,
          and of a CUDA graph of it (the GPU alone); stock and fused, with the error against stock
"""

import argparse
import csv
import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import OPERATIONS, TRANSITIONS
from block_cases import OPERATIONS as BLOCK_OPERATIONS
from cases import Shape, tensors
from models import TINY, flux_call, transformer

BF16 = torch.bfloat16


def synchronize():
    """Wait for the GPU, if there is one."""
    if CUDA:
        torch.cuda.synchronize()


def note(part: str, what: str, **numbers):
    """Print a row, and write it with all before it to the file that was asked for."""
    row = {"part": part, "what": what}
    row |= {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in numbers.items()}
    ROWS.append(row)
    print(part, what, *(f"{name}={row[name]}" for name in numbers), flush=True)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(name for row in ROWS for name in row), restval="")
            writer.writeheader()
            writer.writerows(ROWS)


def seconds(call: Callable, repeats: int) -> float:
    """Measure the median time of a call, between two events on a GPU."""
    times = []
    for _ in range(repeats):
        if CUDA:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def captured(calls: list[Callable]) -> Callable:
    """Capture all calls in one CUDA graph, to be replayed; on a CPU just make them."""
    for call in calls[:2]:
        call()
    synchronize()
    if not CUDA:
        return lambda: [call() for call in calls]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph.replay


def copy_speed() -> float:
    """Measure the bytes that a copy reads and writes in a second."""
    a, b = torch.zeros(2, 2**24 if args.tiny else 2**31, dtype=torch.uint8, device=DEVICE)
    return 2 * a.nbytes / seconds(lambda: b.copy_(a), 20)


def roof():
    """Measure what bounds every kernel: copies, matrix products and random numbers."""
    note("roof", "copy", tb_s=copy_speed() / 1e12)
    n = 256 if args.tiny else 8192
    a, b = torch.randn(2, n, n, device=DEVICE).to(BF16)
    seconds(lambda: a @ b, 3)
    note("roof", "matmul", tflop_s=2 * n**3 / seconds(lambda: a @ b, 10) / 1e12)
    x = torch.empty(2**20 if args.tiny else 2**28, device=DEVICE)
    note("roof", "normals", gnormals_s=x.numel() / seconds(x.normal_, 10) / 1e9)


def operations():
    """List (name, its Operation) for all that can run here."""
    return [(name, operation) for name, operation in OPERATIONS.items() if DEVICE.type in operation.devices]


def kernels():
    """Measure every operation over inputs that the L2 cache does not hold, in one CUDA graph."""
    copy = copy_speed()
    for name, operation in operations():
        in_block = name in BLOCK_OPERATIONS
        model = "flux-dev" if in_block else operation.models[0]
        sizes = ((512, 1), (1024, 1)) if in_block else ((1024, 1), (2048, 16 if name == "edge_density" else 64))
        for pixels, batch in ((128, 1),) if args.tiny else sizes:
            for dtype in (BF16, torch.float32) if name in TRANSITIONS else (BF16,):
                make = partial(operation.case, Shape(model, pixels, batch, dtype, DEVICE))
                for backend in make().backends:
                    made = [make()]
                    out = tensors(made[0].ours(backend))
                    moved = sum(x.nbytes for x in [*made[0].inputs, *out])
                    normals = sum(x.numel() for x in out) if name in TRANSITIONS else 0
                    copies = 2 if args.tiny else min(max(4 * 10**8 // moved, 4), 64)  # more than fits into the L2 cache
                    made += [make() for _ in range(copies - 1)]
                    spent = seconds(captured([partial(case.ours, backend) for case in made]), 10) / copies
                    numbers = {"us": 1e6 * spent, "mb": moved / 1e6, "of_copy": moved / spent / copy}
                    if normals:
                        numbers["gnormals_s"] = normals / spent / 1e9
                    what = f"{name} {pixels} px x {batch} {str(made[0].inputs[0].dtype)[6:]} {backend}"
                    note("kernels", what, **numbers)
                    del made, out
                    gc.collect()


def host():
    """Measure the host's time for a call, with tensors so small that the GPU is never behind."""
    x, weight = torch.randn(2, 128, 128, device=DEVICE).to(BF16)
    calls = {"torch.add": lambda: x + x, "F.linear": lambda: F.linear(x, weight), "new_empty": lambda: x.new_empty(128)}
    for name, operation in operations():
        case = operation.case(Shape("flux-dev", 128, 1, BF16, DEVICE))
        calls |= {f"{name} {backend}": partial(case.ours, backend) for backend in (*case.backends, "auto")}
    for name, call in calls.items():
        for _ in range(5):
            call()
        best = float("inf")
        for _ in range(2 if args.tiny else 10):
            synchronize()
            start = time.perf_counter()
            for _ in range(50):
                call()
            best = min(best, (time.perf_counter() - start) / 50)
        note("host", name, us=1e6 * best)


# ---- a step of FLUX.1-dev ----


def timed(call: Callable) -> dict:
    """Measure milliseconds of a call as Python drives it, until all is queued, and of the GPU alone."""
    start = time.perf_counter()
    call()
    synchronize()
    numbers: dict = {"first_s": time.perf_counter() - start}
    walls, queued = [], []
    for _ in range(3 if args.tiny else 8):
        start = time.perf_counter()
        call()
        queued.append(time.perf_counter() - start)
        synchronize()
        walls.append(time.perf_counter() - start)
    numbers |= {"wall_ms": 1e3 * statistics.median(walls), "host_ms": 1e3 * min(queued)}
    if CUDA:
        try:
            numbers["graph_ms"] = 1e3 * seconds(captured([call]), 6)
        except RuntimeError as problem:
            numbers["graph_ms"] = f"failed: {str(problem)[:120]}"
    return numbers


def step():
    """Measure a step of FLUX.1-dev, stock and fused."""
    import ralu

    model = transformer("flux-dev", DEVICE, **(TINY if args.tiny else {}))
    text, lengths = (3, [6]) if args.tiny else (512, args.tokens)
    calls = {length: partial(model, **flux_call(model, text, length, DEVICE)) for length in lengths}
    stock = {length: call().sample.float() for length, call in calls.items()}
    for name in ("stock", "fused"):
        if name == "fused":
            ralu.fuse(model)
        for length, call in calls.items():
            numbers = timed(call)
            numbers["error"] = ((call().sample.float() - stock[length]).norm() / stock[length].norm()).item()
            note("step", f"{name} {length} tokens", **numbers)


PARTS = {"roof": roof, "kernels": kernels, "host": host, "step": step}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
parser.add_argument("--device", default="cuda")
parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 1636, 4096], help="of the image, in a step")
parser.add_argument("--tiny", action="store_true", help="shapes that take no time, to see that all of it runs")
parser.add_argument("--csv", type=Path)
args = parser.parse_args()
DEVICE = torch.device(args.device)
CUDA = DEVICE.type == "cuda"
ROWS: list[dict] = []
torch.manual_seed(0)
with torch.no_grad():
    for part in [part for part in PARTS if part in args.parts]:
        PARTS[part]()
if CUDA:
    print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
print("PROBE done:", *args.parts)
