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

from ralu_kernels import adaln, plan_tokens, qkv, tokens, upsample

SMS, CLOCK, SCHEDULERS, ISSUED, BANDWIDTH = 132, 1.9e9, 4, 0.85, 3.0e12
SPECIAL = 16 / 32  # warps' instructions an SM starts in a cycle, as the CUDA programming guide has it
NORMAL = 58  # instructions for each of torch.normal_'s
ARCH = 90
SIZES = ((1024, 1), (2048, 64))  # pixels, batch
# As setup.py compiles them.
FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


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


def code(cubin: Path) -> dict[str, Code]:
    """Read a file's functions; those with loops are left out."""
    found, used = {}, resources(cubin)
    for name, sass in disassembled(cubin).items():
        try:
            found[name] = Code(*paths(sass), used[name][0], used[name][2])
        except ValueError:
            continue
    return found


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
