"""Every kernel against every other way to do its work, at the shapes of FLUX and SD3, in turn in one process.

    python benchmarks/bench.py [--device cuda] [--ops upsample_renoise ...] [--pixels 512 1024 2048] [--batch 1 4] ...

A row is an operation, a provider and a shape; rows are added to benchmarks/results/DEVICE.csv, and only after the
provider's result has passed its check in this process. Providers:

eager      what a careful author writes with PyTorch alone: `interpolate`, `randn`, block means, in-place updates;
           `index_select` and `index_copy_` for the moves, whose indices are ready before the clock. Where the operation
           is nothing but PyTorch's (or OpenCV's) the reference backend itself
compile    that under `torch.compile`, one graph a shape; batch 1, and on a CPU 1024 pixels: a graph takes seconds to build
reference  the specification in eager PyTorch, with the kernels' own random numbers (batch 1)
native, triton  the kernels, where they can run
fill       as many Philox and Box-Muller normals as the output has values, and nothing else: the floor (CPU: one thread)
dense      the way of the paper's release for the noise alone: a dense covariance and its Cholesky factor, made anew
copy       as many bytes read and written as the operation must read and write: the device's own bandwidth

p20, p50, p80  milliseconds, quantiles over the repeats; on a GPU with a cold L2 cache (`record.clock`)
gbps           10^9 bytes that must be moved (inputs once, output once) a second
copy_fraction, fill_fraction, eager_ratio  the p50 of copy, fill and eager over this p50
memory         how far memory grew at the peak of a call, over the bytes of the output; on a CPU in rows of their own,
               at 16 pictures of 2048 pixels, where allocators' caches do not hide it
"""

import argparse
import ctypes
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import record
import torch
import torch.nn.functional as F
from record import ROOT
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ralu_kernels import TokenPlan, edge_density, merge_tokens, plan_tokens, promote_tokens, upsample_renoise
from ralu_kernels._backend import INTERPRET, resolve

SCALE, NOISE_SCALE, C = 0.82, 0.39, 0.0177  # about flux-5x
RATIO = 0.2
CHANNELS = 64  # of a packed token: 16 latent channels, 2x2 pixels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BOTH = "flux, sd3"  # their latents and tokens have the same shapes


@dataclass(frozen=True)
class Shape:
    model: str
    pixels: int
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def grid(self) -> tuple[int, int]:
        """Low tokens, 32 pixels each."""
        return self.pixels // 32, self.pixels // 32

    def randn(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.device).to(self.dtype)


@dataclass
class Case:
    """An operation at one shape.

    inputs: all that it reads.
    ours:   backend name -> result.
    eager:  the same in eager PyTorch; None where the reference is just that.
    check:  raises unless eager's result has the right law, where its random numbers are not ours.
    floors: other providers, and their checks.
    """

    inputs: list[Tensor]
    ours: Callable
    eager: Callable | None = None
    check: Callable[[Tensor], None] | None = None
    floors: dict[str, tuple[Callable, Callable[[Tensor], None]]] = field(default_factory=dict)
    backends: tuple[str, ...] = ("native", "triton")


@dataclass(frozen=True)
class Operation:
    case: Callable[[Shape], Case]
    models: tuple[str, ...] = (BOTH,)
    dtypes: tuple[str, ...] | None = None  # None: whichever are asked for


# ---- checks ----


def tensors(result) -> list[Tensor]:
    result = vars(result) if isinstance(result, TokenPlan) else result
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def agree(actual, expected):
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        tolerance = 1e-5 if a.dtype == torch.float32 else 0.02
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def check_variance(values: Tensor, expected: float):
    """Zero-mean normals have it within five standard errors."""
    found, allowed = values.double().square().mean().item(), 5 * math.sqrt(2 / values.numel())
    if not abs(found / expected - 1) < allowed:
        raise AssertionError(f"variance {found:.4f} instead of {expected:.4f} ± {allowed:.2%}")


def check_law(z: Tensor, blocks: Tensor):
    """z has the variance of N(0, I - c * Sigma), and so have the sums of its blocks of four (the last dimension)."""
    check_variance(z, 1 - C)
    check_variance(blocks.sum(-1), 4 * (1 - 4 * C))


def noisy(shape: Shape, inputs, ours, eager, blocks, numel: int, **floors) -> Case:
    """A move: `ours(backend, noise_scale)`, `eager(noise_scale)` and where the enlarged blocks are in an output."""

    @lru_cache
    def noiseless():
        plain = eager(0.0)
        agree(plain, ours("auto", 0.0))
        return plain.float()

    def check(out):
        z = (out.float() - noiseless()) / NOISE_SCALE
        check_law(z, blocks(z))

    if shape.device.type == "cuda" or shutil.which("c++"):
        normals = torch.empty(numel, device=shape.device)
        floors["fill"] = lambda: fill(shape.device)(normals), lambda _: check_variance(normals, 1.0)
    return Case(inputs, partial(ours, noise_scale=NOISE_SCALE), partial(eager, NOISE_SCALE), check, floors)


# ---- floors ----

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
      philox_run<4>(isa, 1, element, static_cast<uint32_t>(start), 2, 0, RUN, words);
      float* o = out + 4 * start;
      for (int64_t j = 0; j < quarter; ++j) {
        const ralu::Normals x = ralu::normals(words[j]);
        o[j] = x.n0, o[j + quarter] = x.n1, o[j + 2 * quarter] = x.n2, o[j + 3 * quarter] = x.n3;
      }
    }
  });
}
"""


@lru_cache
def fill(device: torch.device) -> Callable[[Tensor], object]:
    """The floor: on a GPU PyTorch's own Philox, on a CPU a loop built with the extension's flags from its headers."""
    if device.type == "cuda":
        return Tensor.normal_
    flags = re.search(r"^CXX_FLAGS = \[(.*)\]", (ROOT / "setup.py").read_text(), re.M)[1].replace('"', "").split(", ")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "fill.cpp").write_text(FILL)
        command = ["c++", *flags, "-fvisibility=default", "-std=c++20", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, "fill.cpp", "-o", "fill.so"], cwd=folder, check=True)
        library = ctypes.CDLL(f"{folder}/fill.so")
    return lambda out: library.fill(ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.numel()))


def dense_noise(side: int, channels: int, device: torch.device) -> Tensor:
    """N(0, I - c * Sigma) for every high token, by the Cholesky factor of its covariance."""
    place = torch.arange(2 * side, device=device) // 2
    cell = (place[:, None] * side + place).flatten()
    covariance = torch.eye(len(cell), device=device) - C * (cell[:, None] == cell).float()
    return torch.linalg.cholesky(covariance) @ torch.randn(len(cell), channels, device=device)


# ---- the operations: ours, and eager PyTorch's ----


def decorrelate(eps: Tensor, mean: Tensor) -> Tensor:
    """eps - k * (sum of the block)."""
    return eps.sub_(mean, alpha=4 * C / (1 + math.sqrt(1 - 4 * C)))


def upsample_case(shape: Shape) -> Case:
    (h, w), (b, device) = shape.grid, (shape.batch, shape.device)
    x, seed = shape.randn(b, CHANNELS // 4, 2 * h, 2 * w), torch.arange(b, device=device)

    def ours(backend, noise_scale):
        return upsample_renoise(x, SCALE, noise_scale, C, seed, backend=backend)

    def eager(noise_scale):
        out = F.interpolate(x, scale_factor=2, mode="nearest").mul_(SCALE)
        eps = torch.randn_like(out)
        return out.add_(decorrelate(eps, F.interpolate(F.avg_pool2d(eps, 2), scale_factor=2)), alpha=noise_scale)

    def check_dense(z):
        check_law(z, z.view(h, 2, w, 2, -1).permute(0, 2, 4, 1, 3).flatten(3))

    small = b == 1 and h <= 32 and shape.dtype == torch.float32  # its memory grows with the fourth power of the pixels
    floors = {"dense": (partial(dense_noise, h, CHANNELS, device), check_dense)} if small else {}
    return noisy(
        shape, [x], ours, eager, lambda z: F.pixel_unshuffle(z, 2).unflatten(1, (-1, 4)).movedim(2, -1), 4 * x.numel(),
        **floors,
    )  # fmt: skip


def enlarge(chosen: Tensor, noise_scale: float) -> Tensor:
    """Pixel granularity: (m, C) -> (m, 4, C)."""
    m, channels = chosen.shape
    up = (SCALE * chosen).view(m, channels // 4, 4, 1).expand(-1, -1, -1, 4)
    eps = torch.randn(m, channels // 4, 4, 4, dtype=chosen.dtype, device=chosen.device)
    z = decorrelate(eps, eps.mean(-1, keepdim=True))
    return z.mul_(noise_scale).add_(up).transpose(1, 2).reshape(m, 4, channels)


def carry(values: Tensor, noise_scale: float) -> Tensor:
    return torch.randn_like(values).mul_(noise_scale * (1 - C) ** 0.5).add_(values, alpha=SCALE)


def indices(plan: TokenPlan):
    """Low tokens, packed rows and raster rows (m, 4) of the promoted and of the carried, flat over the batch."""
    h, w = plan.grid
    sample = torch.arange(plan.batch_size, device=plan.child.device).repeat_interleave(plan.lengths)
    token = sample * h * w + plan.source
    row, column = (2 * plan.positions).long().unbind(1)
    raster = (sample * 2 * h + row) * 2 * w + column
    carried, promoted = ((plan.child < 0).nonzero()[:, 0], (plan.child >= 0).nonzero().view(-1, 4))
    corners = torch.tensor([0, 1, 2 * w, 2 * w + 1], device=raster.device)
    return (token[promoted[:, 0]], promoted, raster[promoted]), (
        token[carried], carried, raster[carried][:, None] + corners,
    )  # fmt: skip


def planned(shape: Shape):
    scores = torch.rand(shape.batch, shape.grid[0] * shape.grid[1], device=shape.device)
    plan = plan_tokens(scores, shape.grid, ratio=RATIO)
    return scores, plan, indices(plan), torch.arange(shape.batch, device=shape.device)


def patches(tokens: Tensor) -> Tensor:
    """The 2x2 latent pixels of each channel: what enlarging makes of one."""
    return tokens.unflatten(-1, (-1, 4))


def promote_case(shape: Shape) -> Case:
    scores, plan, (promoted, carried), seed = planned(shape)
    low, total = shape.randn(*scores.shape, CHANNELS), len(plan.source)

    def ours(backend, noise_scale):
        return promote_tokens(low, plan, SCALE, noise_scale, C, seed, backend=backend)

    def eager(noise_scale):
        flat = low.flatten(0, 1)
        out = low.new_empty(total, CHANNELS)
        children = enlarge(flat.index_select(0, promoted[0]), noise_scale)
        out.index_copy_(0, promoted[1].flatten(), children.flatten(0, 1))
        return out.index_copy_(0, carried[1], carry(flat.index_select(0, carried[0]), noise_scale))

    return noisy(
        shape, [low, plan.inverse], ours, eager, lambda z: patches(z[promoted[1].flatten()]), total * CHANNELS
    )


def merge_case(shape: Shape) -> Case:
    scores, plan, (promoted, carried), seed = planned(shape)
    packed, high = shape.randn(len(plan.source), CHANNELS), 4 * scores.numel()

    def ours(backend, noise_scale):
        return merge_tokens(packed, plan, SCALE, noise_scale, C, seed, backend=backend)

    def eager(noise_scale):
        out = packed.new_empty(high, CHANNELS)
        children = enlarge(packed.index_select(0, carried[1]), noise_scale)
        out.index_copy_(0, carried[2].flatten(), children.flatten(0, 1))
        kept = carry(packed.index_select(0, promoted[1].flatten()), noise_scale)
        return out.index_copy_(0, promoted[2].flatten(), kept).view(shape.batch, -1, CHANNELS)

    return noisy(
        shape, [packed, plan.inverse], ours, eager,
        lambda z: patches(z.flatten(0, 1)[carried[2].flatten()]), high * CHANNELS,
    )  # fmt: skip


def plan_case(shape: Shape) -> Case:
    scores, *_ = planned(shape)
    return Case([scores], lambda backend: plan_tokens(scores, shape.grid, ratio=RATIO, backend=backend))


def edge_case(shape: Shape) -> Case:
    """The preview, which has half the picture's pixels in each direction: smooth, with edges."""
    coarse = torch.rand(shape.batch, 1, *shape.grid, device=shape.device)
    image = F.interpolate(coarse, scale_factor=16, mode="bicubic").clamp(0, 1).mul(255).round().to(torch.uint8)[:, 0]
    backends = ("native",) if shape.device.type == "cuda" else ()  # elsewhere OpenCV works for every backend
    return Case([image], lambda backend: edge_density(image, 16, backend=backend), backends=backends)


# One entry an operation: its cases, and where not the usual ones its models and dtypes.
OPERATIONS = {
    "upsample_renoise": Operation(upsample_case),
    "promote_tokens": Operation(promote_case),
    "merge_tokens": Operation(merge_case),
    "plan_tokens": Operation(plan_case, dtypes=("float32",)),
    "edge_density": Operation(edge_case, dtypes=("uint8",)),
}


# ---- rows ----


def available(backend: str, device: torch.device) -> bool:
    try:
        resolve(backend, device)
    except ValueError:
        return False
    return not (backend == "triton" and INTERPRET)


def checked(case: Case, shape: Shape, expected) -> dict[str, Callable]:
    """All that can do a case's work here, once each has passed its check; `expected` is the reference's result."""
    same, eager = partial(agree, expected=expected), case.eager or partial(case.ours, "reference")
    found = {"eager": (eager, case.check or same)}
    if case.eager and shape.batch == 1 and (shape.device.type == "cuda" or shape.pixels == 1024):
        torch.compiler.reset()
        found["compile"] = torch.compile(eager, fullgraph=True, dynamic=False), case.check or same
    found |= {name: (partial(case.ours, name), same) for name in case.backends if available(name, shape.device)}
    found |= case.floors
    for call, check in found.values():
        check(call())
    calls = {name: call for name, (call, _) in found.items()}
    return calls | ({"reference": partial(case.ours, "reference")} if case.eager and shape.batch == 1 else {})


def nbytes(result) -> int:
    return sum(x.nbytes for x in tensors(result))


def measure(name: str, shape: Shape, threads_choice: list[int], budget: float) -> list[dict]:
    """The rows of an operation at one shape."""
    case = OPERATIONS[name].case(shape)
    expected = case.ours("reference")
    calls, moved = checked(case, shape, expected), nbytes(case.inputs) + nbytes(expected)
    source = torch.empty(moved // 2, dtype=torch.uint8, device=shape.device)
    calls["copy"] = partial(torch.empty_like(source).copy_, source)
    cpu, rows = shape.device.type == "cpu", []
    for threads in threads_choice if cpu else [""]:
        if cpu:
            torch.set_num_threads(threads)
        turns = {who: call for who, call in calls.items() if who != "fill" or not cpu or threads == 1}
        times = record.in_turn(turns, shape.device, budget)
        p20, p50, p80 = ({who: np.quantile(ms, q) for who, ms in times.items()} for q in (0.2, 0.5, 0.8))
        for who in times:
            row = {
                "op": name, "provider": who, "model": shape.model, "pixels": shape.pixels, "batch": shape.batch,
                "input": "x".join(map(str, case.inputs[0].shape)), "dtype": str(case.inputs[0].dtype)[6:],
                "threads": threads, "repeats": len(times[who]),
                "p20_ms": f"{p20[who]:.4f}", "p50_ms": f"{p50[who]:.4f}", "p80_ms": f"{p80[who]:.4f}",
            }  # fmt: skip
            if who not in case.floors:
                row["gbps"] = f"{moved / p50[who] / 1e6:.2f}"
            for other, column in (("copy", "copy_fraction"), ("fill", "fill_fraction"), ("eager", "eager_ratio")):
                if other in p50:
                    row[column] = f"{p50[other] / p50[who]:.3f}"
            if not cpu:
                _, before, peak = record.peak_memory(calls[who], shape.device)
                row["memory"] = f"{(peak - before) / nbytes(expected):.2f}"
            rows.append(row)
    return rows


# ---- a CPU's memory ----

ROOMY = {"pixels": 2048, "batch": 16}
MOVES = ("upsample_renoise", "promote_tokens", "merge_tokens")


def grow(name: str, provider: str):
    """Prints by how much of its output's size a call makes this process grow."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")

    def call(shape):
        case = OPERATIONS[name].case(shape)
        return case.eager if provider == "eager" else partial(case.ours, provider)

    call(Shape(BOTH, 128, 1, torch.float32, cpu))()  # first calls load and allocate
    out, before, peak = record.peak_memory(call(Shape(BOTH, **ROOMY, dtype=torch.float32, device=cpu)), cpu)
    print((peak - before) / nbytes(out))


def memory_rows(name: str) -> list[dict]:
    """In a process for each provider, so that none finds what another has left."""
    rows = []
    for provider in ("eager", "native"):
        if provider == "eager" or available(provider, torch.device("cpu")):
            command = [sys.executable, __file__, "--grow", name, provider]
            growth = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append(
                {"op": name, "provider": provider, "model": BOTH, **ROOMY, "dtype": "float32", "threads": 1}
                | {"memory": f"{float(growth):.2f}"}
            )
    return rows


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--ops", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), metavar="OP", help=", ".join(OPERATIONS))
    add("--pixels", type=int, nargs="+", default=[512, 1024, 2048], help="of a picture's side")
    add("--batch", type=int, nargs="+", default=[1, 4])
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    add("--threads", type=int, nargs="+", default=[1, 2], help="on a CPU")
    add("--budget", type=float, default=0.3, help="seconds for a provider at a shape (at least 3 calls, at most 200)")
    add("--memory", action="store_true", help="the moves' peak memory too, on a CPU in a process for each provider")
    add("--output", type=Path, help="(default: benchmarks/results/DEVICE.csv)")
    add("--grow", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.grow:
        return grow(*args.grow)
    device = record.pick_device(args.device)
    output = args.output or record.RESULTS / f"{record.slug(device)}.csv"
    common = record.provenance(device)
    torch.manual_seed(0)

    def keep(rows):
        record.append(output, [row | common for row in rows])
        for row in rows:
            print(*(f"{key}={value}" for key, value in row.items()), flush=True)

    for name in args.ops:
        operation = OPERATIONS[name]
        for model, pixels, batch in product(operation.models, args.pixels, args.batch):
            for dtype in operation.dtypes or args.dtypes:
                keep(measure(name, Shape(model, pixels, batch, DTYPES.get(dtype), device), args.threads, args.budget))
        if args.memory and device.type == "cpu" and name in MOVES:
            keep(memory_rows(name))


if __name__ == "__main__":
    main()
