"""What every kernel should cost on an H100, predicted from its machine code, without a GPU.

    python benchmarks/roof.py [-o benchmarks/results/roof.csv]

Needs nvcc for the CUDA kernels; the disassembler comes with Triton. The model: a kernel takes as long as the slowest of
its bytes at 3.0 TB/s; its instructions, of which 132 SMs at 1.9 GHz issue 85 % of four a cycle; and those of the
special functions, half a warp's a cycle. Its roof is what no kernel of this output can beat: the bytes that must be
moved, or the same normals alone as `torch.normal_` draws them. A kernel that draws them with fewer instructions than
that gets a share above 1.

The instructions of a warp are those of one path through its code: the path that stores and draws the most, by the
fewest instructions (aligned rows, no slow path of a square root, no row missing).
"""

import argparse
import csv
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import aot
import torch
import triton
from record import RESULTS, ROOT

from ralu_kernels import adaln, qkv, tokens, upsample

SMS, CLOCK, SCHEDULERS, ISSUED, BANDWIDTH = 132, 1.9e9, 4, 0.85, 3.0e12
SPECIAL = 16 / 32  # warps' instructions an SM starts in a cycle, as the CUDA programming guide has it
NORMAL = 58  # instructions for each of torch.normal_'s
ARCH = 90
SIZES = ((1024, 1), (2048, 64))  # pixels, batch
SELECTED = 0.2  # of the low tokens, at random places: edges would lie closer together
# As setup.py compiles them.
FLAGS = ["-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


@dataclass(frozen=True)
class Code:
    """What a warp of a kernel issues on its way from the first instruction to the last, and what it occupies."""

    instructions: int
    special: int  # of these, those of the special function unit
    idle: int  # instructions of a warp that has nothing to do
    registers: int
    shared_bytes: int


@dataclass(frozen=True)
class Work:
    """What a launch has to do: values that it writes, bytes that it must move, normals that it draws."""

    values: int
    bytes: int
    normals: int = 0


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    kernel: str
    backend: str
    pixels: int
    batch: int
    instructions_per_value: float
    registers: int
    occupancy: float
    bytes: int
    us: float
    limit: str
    roof_share: float
    compiler: str


# ---- machine code ----


def disassembled(cubin: Path) -> dict[str, str]:
    """Return the machine code of every function in a file of nvcc's or Triton's."""
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", text, re.DOTALL))


def resources(cubin: Path) -> dict[str, tuple[int, int, int]]:
    """Return the registers, the bytes on the stack and the bytes of shared memory of every function in a file."""
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    return {name: (int(registers), int(stack), int(shared)) for name, registers, stack, shared in found}


def paths(sass: str) -> tuple[int, int, int]:
    """Return (instructions, special functions, instructions to the nearest exit) of a warp's way through a function.

    Raises:
        ValueError: there is a loop, whose turns the code does not say.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", sass)
    place = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    # From the end: (stores and special functions, -instructions, special functions) from here on, and the way out.
    best: list[tuple[int, int, int]] = [(-1, 0, 0)] * (len(lines) + 1)
    out = [10**9] * (len(lines) + 1)
    for i in reversed(range(len(lines))):
        _, predicate, operation, operands = lines[i]
        follow = [i + 1]
        if operation in ("EXIT", "RET") or operation.startswith("RET."):
            follow = follow if predicate else []
        elif operation == "BRA" or operation.startswith("BRA."):
            target = place[int(re.search(r"0x([0-9a-f]+)", operands)[1], 16)]
            conditional = predicate or "P" in operands.split("0x")[0] or ".DIV" in operation
            if target <= i and target != i:
                raise ValueError(f"a loop from {lines[i][0]} to {lines[target][0]}")
            follow = ([i + 1] if conditional else []) + [target] * (target > i)
        leaves = operation == "EXIT"
        work, negative, special = max([best[j] for j in follow] + [(0, 0, 0)] * leaves, default=(-1, 0, 0))
        mufu = operation.startswith("MUFU")
        best[i] = (work, negative, special) if work < 0 else (
            work + operation.startswith("STG") + mufu, negative - 1, special + mufu
        )  # fmt: skip
        out[i] = 1 + min([out[j] for j in follow] + [0] * leaves, default=10**9)
    return -best[0][1], best[0][2], out[0]


def code(cubin: Path, name: str = "") -> dict[str, Code]:
    """Read a file's functions with `name` in theirs."""
    used = resources(cubin)
    return {
        function: Code(*paths(sass), used[function][0], used[function][2])
        for function, sass in disassembled(cubin).items()
        if name in function
    }


def occupancy(code: Code, warps: int) -> float:
    """Return the share of an SM's 64 warps that fit with their registers and shared memory, in blocks of `warps`."""
    registers = warps * -(-code.registers * 32 // 256) * 256
    shared = code.shared_bytes + 1024
    return min(64 // warps, 32, 65536 // registers, 233472 // shared) * warps / 64


# ---- the model ----


def predicted(code: Code, work: Work, warps: float, idle_warps: float = 0.0) -> tuple[float, str, float]:
    """Return a launch's seconds, what limits them, and the share of its roof."""
    slots = SMS * CLOCK * SCHEDULERS * ISSUED
    times = {
        "memory": work.bytes / BANDWIDTH,
        "issue": (warps * code.instructions + idle_warps * code.idle) / slots,
        "special functions": warps * code.special / (SMS * CLOCK * SPECIAL),
    }
    limit = max(times, key=times.__getitem__)
    roof = max(times["memory"], work.normals * NORMAL / 32 / slots)
    return times[limit], limit, roof / times[limit]


def row(kernel: str, backend: str, size: tuple[int, int], code: Code, work: Work, block: int, warps: float,
        idle: float, compiler: str) -> Row:  # fmt: skip
    """Fill a line of the table; `block`: warps in a block."""
    seconds, limit, share = predicted(code, work, warps, idle)
    return Row(
        kernel, backend, *size, round(32 * warps * code.instructions / work.values, 1), code.registers,
        round(occupancy(code, block), 2), work.bytes, round(1e6 * seconds, 2), limit, round(share, 2), compiler,
    )  # fmt: skip


def cases(pixels: int, batch: int) -> list[tuple[str, str, Callable[[], object], Work]]:
    """List (name, Triton's kernel, a call of its launcher, its work) for FLUX in bfloat16."""
    meta = partial(aot._meta, dtype=torch.bfloat16)
    integers = partial(aot._meta, dtype=torch.int32)
    side, noise = pixels // 16, (0.9, 0.4, 0.02, aot._meta(batch, dtype=torch.int64))
    grid = side // 2
    n, length = grid**2, pixels**2 // 256
    longest = n + 3 * int(SELECTED * n)
    total, values, joint = batch * longest, batch * 64 * 4 * n, batch * (512 + length)
    inverse = integers(batch, 4 * n)
    plan = (inverse, integers(batch + 1), integers(total), integers(total), grid, longest)
    rules = (*noise, "pixel", "exact")
    x, vector = meta(batch, length, 3072), meta(batch, 6 * 3072)[:, :3072]
    streams: list[Any] = []
    for tokens_of_stream in (512, length):
        streams += [meta(batch, tokens_of_stream, 3072)] * 3 + [meta(128)] * 2
    tables = [aot._meta(512 + length, 128)] * 2
    packing: Callable = qkv._pack_triton
    both, packed = (batch, 512 + length), meta(joint, 24, 128)
    size = x.numel()
    return [
        ("upsample_renoise", "upsample", partial(upsample._upsample_triton, meta(batch, 16, side, side), *noise, 2),
         Work(values, values * 2 * 5 // 4, values)),
        ("upsample_selected", "upsample_selected_pixels",
         partial(tokens._selected_triton, meta(batch, n, 64), *plan, *rules),
         Work(64 * total, 2 * 64 * (total + batch * n) + 8 * total, 64 * total)),
        ("upsample_remaining", "upsample_remaining_pixels",
         partial(tokens._remaining_triton, meta(total, 64), inverse, grid, *rules),
         Work(values, 2 * (values + 64 * total) + 4 * inverse.numel(), values)),
        ("modulate", "adaln", partial(adaln._modulate_triton, x, vector, vector, None, 1e-6), Work(size, 4 * size)),
        ("gated_add", "adaln", partial(adaln._gated_add_triton, x, vector, x, None), Work(size, 6 * size)),
        ("gated_add_modulate", "adaln", partial(adaln._launch, x, vector, x, vector, vector, None, 1e-6),
         Work(2 * size, 8 * size)),
        ("pack_qkv", "pack", partial(packing, *streams, None, *tables, 24, 1e-6),
         Work(9216 * joint, 4 * 9216 * joint + 2 * 512 * (512 + length))),
        ("unpack", "unpack", partial(qkv._unpack_triton, packed, integers(joint), 512, length),
         Work(3072 * joint, 4 * 3072 * joint + 4 * joint)),
        ("concat_gelu", "concat_gelu",
         partial(adaln._concat_gelu_triton, meta(*both, 3072), meta(*both, 12288)),
         Work(15360 * joint, 4 * 15360 * joint)),
    ]  # fmt: skip


def of_triton(folder: Path) -> Iterator[Row]:
    """Predict the Triton kernels."""
    for size in SIZES:
        for name, kernel, launch, work in cases(*size):
            compiled, grid = aot.compile_variant(kernel, launch, ARCH)
            path = folder / "triton.cubin"
            path.write_bytes(compiled.asm["cubin"])
            (found,) = code(path).values()
            block = compiled.metadata.num_warps
            yield row(
                name, "triton", size, found, work, block, math.prod(grid) * block, 0, f"Triton {triton.__version__}"
            )


def nvcc(source: Path, out: Path, *flags: str | Path) -> str:
    """Compile for one GPU, and return the compiler's version."""
    includes: list[str | Path] = [f"-I{ROOT / 'csrc'}", "-isystem", Path(torch.__file__).parent / "include"]
    subprocess.run(["nvcc", "-cubin", source, "-o", out, f"-arch=sm_{ARCH}", *FLAGS, *includes, *flags], check=True)
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.search(r"release ([\d.]+)", version)[1]


def warps_of_tiles(pixels: int, batch: int) -> tuple[int, int]:
    """Count the warps of CUDA's upsample_selected that have rows, eight each, and those that have none.

    A tile of 16 tokens has as many warps as its rows, four a token at most, may need.
    """
    n = (pixels // 32) ** 2
    scores = torch.rand(batch, n, generator=torch.Generator().manual_seed(0))
    selected = scores.argsort(1) < int(SELECTED * n)
    busy = int((16 + 3 * selected.view(-1, 16).sum(1) + 7).div(8, rounding_mode="floor").sum())
    return busy, batch * n // 2 - busy


def of_cuda(folder: Path) -> Iterator[Row]:
    """Predict the CUDA kernels, in the instances with the widest vectors."""
    source, out = folder / "all.cu", folder / "all.cubin"
    source.write_text("".join(f'#include "{ROOT}/csrc/cuda/{name}.cu"\n' for name in ("tokens", "upsample")))
    version = nvcc(source, out)
    found = {
        (instance[1], int(instance[2])): each
        for kernel in ("upsample_kernel", "_pixels_kernel")
        for mangled, each in code(out, f"{kernel}I13__nv_bfloat16").items()
        if (instance := re.match(r"_ZN4ralu4cuda\d+(\w+)_kernelI13__nv_bfloat16Li(\d+)E", mangled))
    }
    for size in SIZES:
        for name, kernel, _, work in cases(*size)[:3]:
            v = max(width for name_of, width in found if name_of == kernel)
            each = found[kernel, v]
            warps, idle = work.values / 32 / (4 * v if kernel == "upsample" else v), 0
            if kernel == "upsample_selected_pixels":
                warps, idle = warps_of_tiles(*size)
            yield row(name, "cuda", size, each, work, 4, warps, idle, version)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "roof.csv")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        rows = [*of_triton(Path(folder)), *of_cuda(Path(folder))]
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(map(astuple, rows))
    for each in rows:
        print(*astuple(each), file=sys.stderr)


if __name__ == "__main__":
    main()
