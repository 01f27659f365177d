"""What bench.py measures: for an operation what the kernels do at one shape, and the same in eager PyTorch.

Another operation is a function from a `Shape` to a `Case`, and an entry in `OPERATIONS`, here or in block_cases.py.
"""

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
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import ROOT
from torch import Tensor
from torch.utils._pytree import tree_leaves

import ralu_kernels
from ralu_kernels import TokenPlan
from ralu_kernels._backend import INTERPRET, resolve

SCALE, NOISE_SCALE, C = 0.82, 0.39, 0.0177  # about flux-5x
RATIO = 0.2
CHANNELS = 64  # of a packed token: 16 latent channels, 2x2 pixels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BOTH = "flux, sd3"  # their latents and tokens have the same shapes


@dataclass(frozen=True)
class Shape:
    """What an operation is measured at: a model's tokens in images of so many pixels a side."""

    model: str
    pixels: int
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def grid(self) -> tuple[int, int]:
        """Low tokens (rows, columns), 32 pixels each."""
        return self.pixels // 32, self.pixels // 32

    def randn(self, *size: int) -> Tensor:
        """Draw normals."""
        return torch.randn(size, device=self.device).to(self.dtype)


@dataclass
class Case:
    """An operation at one shape.

    inputs: all that it reads.
    ours:   backend name -> result.
    eager:  the same in eager PyTorch; None where the reference is just that.
    check:  raises unless eager's result has the right law, where its random numbers are not ours.
    floors: other providers, and their checks.
    backends: which of ours can run here, the reference apart.
    others: what other packages have for the same work, by the packages' names.
    """

    inputs: list[Tensor]
    ours: Callable
    eager: Callable | None = None
    check: Callable[[Tensor], None] | None = None
    floors: dict[str, tuple[Callable, Callable[[Tensor], None]]] = field(default_factory=dict)
    backends: tuple[str, ...] = ()
    others: dict[str, Callable] = field(default_factory=dict)


@dataclass(frozen=True)
class Operation:
    """An operation of `ralu_kernels`.

    case:    makes its case at a shape.
    models:  whose shapes it is measured at.
    dtypes:  that it takes; None for whichever are asked for.
    devices: where it is measured by default.
    """

    case: Callable[[Shape], Case]
    models: tuple[str, ...] = (BOTH,)
    dtypes: tuple[str, ...] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")


def installed(device: torch.device, *backends: str) -> tuple[str, ...]:
    """List those of the backends that run on a device. Triton's interpreter is none."""

    def runs(backend):
        try:
            return resolve(backend, device) and not (backend == "triton" and INTERPRET)
        except ValueError:
            return False

    return tuple(filter(runs, backends))


@lru_cache
def package(module: str) -> Any:
    """Import what another package has for the same work; None, and once a line that says why, where it is not there."""
    try:
        return import_module(module)
    except ImportError as error:
        print(f"left out: {module} ({error})", file=sys.stderr)
        return None


# ---- checks ----


def tensors(result) -> list[Tensor]:
    """List the tensors of a result."""
    result = vars(result) if isinstance(result, TokenPlan) else result
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def agree(actual, expected):
    """Raise unless integers are equal, and other results up to rounding, measured by their root mean square."""
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        tolerance = (1e-5 if b.dtype == torch.float32 else 0.02) if b.is_floating_point() else 0.0
        usual = b.double().square().mean().sqrt().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * usual)


def check_variance(values: Tensor, expected: float, rounding: float = 0.0):
    """Raise for zero-mean normals whose variance is off by more than five standard errors.

    rounding: a share that is allowed besides, where the arithmetic has few bits.
    """
    variance, allowed = values.double().square().mean().item(), 5 * math.sqrt(2 / values.numel()) + rounding
    if not abs(variance / expected - 1) < allowed:
        raise AssertionError(f"variance {variance:.4f} instead of {expected:.4f} ± {allowed:.2%}")


def check_law(z: Tensor, blocks: Tensor, rounding: float = 0.0):
    """Raise unless z, and the sums of its blocks of four (last dimension), have the variances of N(0, I - c·Sigma)."""
    check_variance(z, 1 - C, rounding)
    check_variance(blocks.sum(-1), 4 * (1 - 4 * C), rounding)


def noisy(shape: Shape, inputs, ours, eager, blocks, numel: int, **floors) -> Case:
    """Make a transition's case of `ours(backend, noise_scale)`, `eager(noise_scale)` and the blocks of an output."""

    @lru_cache
    def noiseless():
        plain = eager(0.0)
        agree(plain, ours("auto", 0.0))
        return plain.float()

    def check(out):
        z = (out.float() - noiseless()) / NOISE_SCALE
        check_law(z, blocks(z), torch.finfo(out.dtype).eps / 2)

    if shape.device.type == "cuda" or shutil.which("c++"):
        normals = torch.empty(numel, device=shape.device)
        floors["fill"] = lambda: fill(shape.device)(normals), lambda _: check_variance(normals, 1.0)
    return Case(
        inputs, partial(ours, noise_scale=NOISE_SCALE), partial(eager, NOISE_SCALE), check, floors,
        installed(shape.device, "native", "triton"),
    )  # fmt: skip


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


@lru_cache
def fill(device: torch.device) -> Callable[[Tensor], object]:
    """Make the floor: on a GPU PyTorch's Philox, on a CPU a loop built with the extension's flags from its headers."""
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
    """Draw N(0, I - c·Sigma) for every high token, by the Cholesky factor of its covariance."""
    place = torch.arange(2 * side, device=device) // 2
    cell = (place[:, None] * side + place).flatten()
    covariance = torch.eye(len(cell), device=device) - C * (cell[:, None] == cell).float()
    return torch.linalg.cholesky(covariance) @ torch.randn(len(cell), channels, device=device)


# ---- the operations: ours, and eager PyTorch's ----


def decorrelate(eps: Tensor, mean: Tensor) -> Tensor:
    """Compute eps - k·(sum of the block) in place, whose covariance is I - c·Sigma."""
    return eps.sub_(mean, alpha=4 * C / (1 + math.sqrt(1 - 4 * C)))


def upsample_case(shape: Shape) -> Case:
    """Upsample and re-noise a whole latent."""
    (h, w), (b, device) = shape.grid, (shape.batch, shape.device)
    x, seed = shape.randn(b, CHANNELS // 4, 2 * h, 2 * w), torch.arange(b, device=device)

    def ours(backend, noise_scale):
        return ralu_kernels.upsample_renoise(x, SCALE, noise_scale, C, seed, backend=backend)

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


def eager_upsample(chosen: Tensor, noise_scale: float) -> Tensor:
    """Upsample tokens (m, C) to (m, 4, C) with pixel granularity, re-noised."""
    m, channels = chosen.shape
    up = (SCALE * chosen).view(m, channels // 4, 4, 1).expand(-1, -1, -1, 4)
    eps = torch.randn(m, channels // 4, 4, 4, dtype=chosen.dtype, device=chosen.device)
    z = decorrelate(eps, eps.mean(-1, keepdim=True))
    return z.mul_(noise_scale).add_(up).transpose(1, 2).reshape(m, 4, channels)


def eager_keep(values: Tensor, noise_scale: float) -> Tensor:
    """Re-noise tokens that keep their size."""
    return torch.randn_like(values).mul_(noise_scale * (1 - C) ** 0.5).add_(values, alpha=SCALE)


def indices(plan: TokenPlan):
    """List low tokens, packed rows and raster rows (m, 4) of the selected and of the kept, flat over the batch."""
    h, w = plan.grid
    sample = torch.arange(plan.batch_size, device=plan.child.device).repeat_interleave(plan.lengths)
    token = sample * h * w + plan.source
    row, column = (2 * plan.positions).long().unbind(1)
    raster = (sample * 2 * h + row) * 2 * w + column
    kept, selected = ((plan.child < 0).nonzero()[:, 0], (plan.child >= 0).nonzero().view(-1, 4))
    corners = torch.tensor([0, 1, 2 * w, 2 * w + 1], device=raster.device)
    return (token[selected[:, 0]], selected, raster[selected]), (
        token[kept], kept, raster[kept][:, None] + corners,
    )  # fmt: skip


def planned(shape: Shape):
    """Make scores, their plan, its `indices` and seeds."""
    scores = torch.rand(shape.batch, shape.grid[0] * shape.grid[1], device=shape.device)
    plan = ralu_kernels.plan_tokens(scores, shape.grid, ratio=RATIO)
    return scores, plan, indices(plan), torch.arange(shape.batch, device=shape.device)


def patches(tokens: Tensor) -> Tensor:
    """Split a token's channels into 2x2 latent pixels: what upsampling makes of one."""
    return tokens.unflatten(-1, (-1, 4))


def selected_case(shape: Shape) -> Case:
    """Upsample the selected tokens, and re-noise all."""
    scores, plan, (selected, kept), seed = planned(shape)
    low, total = shape.randn(*scores.shape, CHANNELS), len(plan.source)

    def ours(backend, noise_scale):
        return ralu_kernels.upsample_selected(low, plan, SCALE, noise_scale, C, seed, backend=backend)

    def eager(noise_scale):
        flat = low.flatten(0, 1)
        out = low.new_empty(total, CHANNELS)
        children = eager_upsample(flat.index_select(0, selected[0]), noise_scale)
        out.index_copy_(0, selected[1].flatten(), children.flatten(0, 1))
        return out.index_copy_(0, kept[1], eager_keep(flat.index_select(0, kept[0]), noise_scale))

    return noisy(shape, [low, plan.inverse], ours, eager, lambda z: patches(z[selected[1].flatten()]), total * CHANNELS)


def remaining_case(shape: Shape) -> Case:
    """Upsample the remaining tokens, and re-noise all."""
    scores, plan, (selected, kept), seed = planned(shape)
    packed, high = shape.randn(len(plan.source), CHANNELS), 4 * scores.numel()

    def ours(backend, noise_scale):
        return ralu_kernels.upsample_remaining(packed, plan, SCALE, noise_scale, C, seed, backend=backend)

    def eager(noise_scale):
        out = packed.new_empty(high, CHANNELS)
        children = eager_upsample(packed.index_select(0, kept[1]), noise_scale)
        out.index_copy_(0, kept[2].flatten(), children.flatten(0, 1))
        high_rows = eager_keep(packed.index_select(0, selected[1].flatten()), noise_scale)
        return out.index_copy_(0, selected[2].flatten(), high_rows).view(shape.batch, -1, CHANNELS)

    return noisy(
        shape, [packed, plan.inverse], ours, eager,
        lambda z: patches(z.flatten(0, 1)[kept[2].flatten()]), high * CHANNELS,
    )  # fmt: skip


def plan_case(shape: Shape) -> Case:
    """Select a fifth of the tokens by their scores."""
    scores, *_ = planned(shape)
    return Case(
        [scores], lambda backend: ralu_kernels.plan_tokens(scores, shape.grid, ratio=RATIO, backend=backend),
        backends=installed(shape.device, "native", "triton"),
    )  # fmt: skip


def edge_case(shape: Shape) -> Case:
    """Find edges in a preview, which has half the image's pixels in each direction: smooth, with edges."""
    coarse = torch.rand(shape.batch, 1, *shape.grid, device=shape.device)
    image = F.interpolate(coarse, scale_factor=16, mode="bicubic").clamp(0, 1).mul(255).round().to(torch.uint8)[:, 0]
    return Case(
        [image], lambda backend: ralu_kernels.edge_density(image, 16, backend=backend),
        backends=installed(shape.device, "native"),
    )  # fmt: skip


# One entry an operation: its cases, and where not the usual ones its models and dtypes.
OPERATIONS = {
    "upsample_renoise": Operation(upsample_case),
    "upsample_selected": Operation(selected_case),
    "upsample_remaining": Operation(remaining_case),
    "plan_tokens": Operation(plan_case, dtypes=("float32",)),
    "edge_density": Operation(edge_case, dtypes=("uint8",)),
}
