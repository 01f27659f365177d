"""The compiled kernels on a CPU against eager PyTorch doing the same work, in one process and side by side.

For FLUX at 1024 and 2048 pixels, in float32 and bfloat16, with one thread and with several, each operation is timed in
turn with

eager  what a careful author writes with PyTorch alone: `interpolate`, `randn`, block means and in-place updates;
       `index_select` and `index_copy_` for the moves between token sequences (their indices are ready before the clock)
fill   as many Philox and Box-Muller normals as the output has values, and nothing else: the floor (one thread)
dense  the way of the paper's release for the noise alone: a dense covariance and its Cholesky factor (once a row of
       `upsample_renoise` at 1024 pixels; the factor is made anew, as in a run of the release)

and a line is written only if the operation has just agreed with the reference. Times are medians in milliseconds.
`*_memory` is how far the process grew above its inputs, over the bytes of the output, at 16 pictures of 2048 pixels.

    python benchmarks/native.py [--repeats 200] [--output benchmarks/results/native.csv]
"""

import argparse
import csv
import ctypes
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from ralu_kernels import merge_tokens, plan_tokens, promote_tokens, reference, upsample_renoise

ROOT = Path(__file__).parents[1]
SCALE, NOISE_SCALE, C = 0.82, 0.39, 0.0177  # about flux-5x
RATIO = 0.2
SIDES = {1024: 32, 2048: 64}  # picture -> low token grid
CHANNELS = 64  # of a packed token: 16 latent channels, 2x2 pixels

FILL = """
#include <algorithm>

#include "cpu/simd.h"
using namespace ralu::cpu;

extern "C" void fill(float* out, int64_t n) {
  vectorized([&](Isa isa) RALU_BODY {
    uint32_t element[RUN];
    for (int32_t j = 0; j < RUN; ++j) element[j] = j;
    for (int64_t start = 0; start < n / 4; start += RUN) {
      const int64_t quarter = std::min<int64_t>(RUN, n / 4 - start);
      Run words;
      philox_run(isa, 1, element, static_cast<uint32_t>(start), 2, 0, RUN, words);
      float* o = out + 4 * start;
      for (int64_t j = 0; j < quarter; ++j) {
        const ralu::Normals x = ralu::normals(words[j]);
        o[j] = x.n0, o[j + quarter] = x.n1, o[j + 2 * quarter] = x.n2, o[j + 3 * quarter] = x.n3;
      }
    }
  });
}
"""


def build_fill():
    """The floor's loop, built with the extension's own flags from its own headers."""
    flags = re.search(r"^CXX_FLAGS = \[(.*)\]", (ROOT / "setup.py").read_text(), re.M)[1].replace('"', "").split(", ")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "fill.cpp").write_text(FILL)
        command = ["c++", *flags, "-fvisibility=default", "-std=c++20", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, "fill.cpp", "-o", "fill.so"], cwd=folder, check=True)
        library = ctypes.CDLL(f"{folder}/fill.so")

    def fill(out):
        library.fill(ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.numel()))

    return fill


# ---- eager ----


def block_noise(eps, k4: float, dim=None):
    """eps - k * (sum of the block): 2x2 blocks of a latent, or the children of a token in dimension `dim`."""
    if dim is not None:
        return eps.sub_(eps.mean(dim, keepdim=True), alpha=k4)
    return eps.sub_(F.interpolate(F.avg_pool2d(eps, 2), scale_factor=2), alpha=k4)


def eager_upsample(x):
    out = F.interpolate(x, scale_factor=2, mode="nearest").mul_(SCALE)
    return out.add_(block_noise(torch.randn_like(out), 4 * reference.block_coefficient(C)), alpha=NOISE_SCALE)


def enlarge(chosen):
    """Pixel granularity: (m, C) -> (m, 4, C)."""
    m, channels = chosen.shape
    up = (SCALE * chosen).view(m, channels // 4, 4, 1).expand(-1, -1, -1, 4)
    z = block_noise(torch.randn(m, channels // 4, 4, 4, dtype=chosen.dtype), 4 * reference.block_coefficient(C), -1)
    return z.mul_(NOISE_SCALE).add_(up).transpose(1, 2).reshape(m, 4, channels)


def carry(values):
    return torch.randn_like(values).mul_(NOISE_SCALE * (1 - C) ** 0.5).add_(values, alpha=SCALE)


def indices(plan):
    """Low tokens, packed rows and raster rows of the promoted and of the carried: flat, for one batch."""
    w = plan.grid[1]
    corners = reference._children(plan.inverse, w).flatten(0, 1).long()  # (B n, 4)
    raster = reference._children(torch.arange(corners.numel()).view(plan.batch_size, -1), w).flatten(0, 1)
    promoted = corners[:, 1] != corners[:, 0]
    return (promoted.nonzero()[:, 0], corners[promoted], raster[promoted]), (
        (~promoted).nonzero()[:, 0], corners[~promoted][:, 0], raster[~promoted],
    )  # fmt: skip


def eager_promote(low, total, promoted, carried):
    flat = low.flatten(0, 1)
    out = low.new_empty(total, low.shape[2])
    out.index_copy_(0, promoted[1].flatten(), enlarge(flat.index_select(0, promoted[0])).flatten(0, 1))
    return out.index_copy_(0, carried[1], carry(flat.index_select(0, carried[0])))


def eager_merge(packed, rows, promoted, carried):
    out = packed.new_empty(rows, packed.shape[1])
    out.index_copy_(0, carried[2].flatten(), enlarge(packed.index_select(0, carried[1])).flatten(0, 1))
    return out.index_copy_(0, promoted[2].flatten(), carry(packed.index_select(0, promoted[1].flatten())))


def dense_noise(side: int, channels: int):
    """N(0, I - c * Sigma) for every high token, by the Cholesky factor of its covariance."""
    cell = (torch.arange(2 * side)[:, None] // 2 * side + torch.arange(2 * side)[None] // 2).flatten()
    covariance = torch.eye(len(cell)) - C * (cell[:, None] == cell[None]).float()
    return torch.linalg.cholesky(covariance) @ torch.randn(len(cell), channels)


# ---- cases ----


def cases(side: int, dtype, batch: int = 1):
    """name, native(backend), eager, for one picture size."""
    x = torch.randn(batch, CHANNELS // 4, 2 * side, 2 * side).to(dtype)
    low = torch.randn(batch, side * side, CHANNELS).to(dtype)
    plan = plan_tokens(torch.rand(batch, side * side), (side, side), ratio=RATIO)
    packed = torch.randn(len(plan.source), CHANNELS).to(dtype)
    promoted, carried = indices(plan)
    seed, rest = torch.arange(batch), (SCALE, NOISE_SCALE, C)
    return {
        "upsample_renoise": (
            x,
            lambda backend: upsample_renoise(x, *rest, seed, backend=backend),
            partial(eager_upsample, x),
        ),
        "promote_tokens": (
            low,
            lambda backend: promote_tokens(low, plan, *rest, seed, backend=backend),
            partial(eager_promote, low, len(plan.source), promoted, carried),
        ),
        "merge_tokens": (
            packed,
            lambda backend: merge_tokens(packed, plan, *rest, seed, backend=backend),
            partial(eager_merge, packed, batch * 4 * side * side, promoted, carried),
        ),
    }


def agree(native, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(native("native"), native("reference"), rtol=tolerance, atol=tolerance)


def medians(functions: dict, repeats: int) -> dict:
    """Milliseconds of each, called in turn."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 3):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def growth(op: str, provider: str) -> float:
    """Bytes that a call adds to the process at its peak, over the bytes of its output; in a process of its own."""
    command = [sys.executable, __file__, "--grow", op, provider]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def grow(op: str, provider: str):
    torch.set_num_threads(1)
    _, native, eager = cases(SIDES[2048], torch.float32, batch=16)[op]
    call = {"native": lambda: native("native"), "eager": eager}[provider]
    cases(4, torch.float32)[op][1]("native"), cases(4, torch.float32)[op][2]()  # first calls load and allocate

    def status(key):
        return int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    out = call()
    print((status("VmHWM") - before) / out.nbytes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/native.csv")
    parser.add_argument("--grow", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.grow:
        return grow(*args.grow)
    fill = build_fill()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    device = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    common = {
        "device": device[1] if device else platform.processor(), "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__, "commit": commit, "date": date.today().isoformat(),
    }  # fmt: skip
    memory = {op: {who: growth(op, who) for who in ("native", "eager")} for op in cases(4, torch.float32)}
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for size, side in SIDES.items():
            for dtype in (torch.float32, torch.bfloat16):
                for op, (x, native, eager) in cases(side, dtype).items():
                    agree(native, dtype)
                    normals = torch.empty(native("native").numel())
                    functions = {"native": partial(native, "native"), "eager": eager}
                    if threads == 1:
                        functions["fill"] = partial(fill, normals)
                    time_of = medians(functions, args.repeats)
                    if dense := op == "upsample_renoise" and size == 1024 and dtype == torch.float32:
                        time_of |= medians({"dense": partial(dense_noise, side, CHANNELS)}, 5)
                    row = {
                        "op": op, "pixels": size, "input": "x".join(map(str, x.shape)), "dtype": str(dtype)[6:],
                        "threads": threads, "repeats": args.repeats,
                        **{f"{who}_ms": f"{time_of[who]:.4f}" if who in time_of else ""
                           for who in ("native", "eager", "fill", "dense")},
                        "eager_over_native": f"{time_of['eager'] / time_of['native']:.2f}",
                        "native_over_fill": f"{time_of['native'] / time_of['fill']:.2f}" if threads == 1 else "",
                        "dense_over_native": f"{time_of['dense'] / time_of['native']:.0f}" if dense else "",
                        **{f"{who}_memory": f"{memory[op][who]:.2f}" for who in ("native", "eager")},
                        **common,
                    }  # fmt: skip
                    rows.append(row)
                    print({k: v for k, v in row.items() if k not in common}, flush=True)
    with open(args.output, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
