"""Compile every Triton kernel ahead of time, as its launcher would launch it, for GPUs that need not be here.

    python benchmarks/aot.py [--arch 80 90 ...] [-o benchmarks/results/aot.csv]

One row a variant and architecture: registers, local memory and spills as ptxas reports them for the launched module,
and the widths in bits of its global stores and loads in PTX (``64+128`` = both occur). Rows of other releases of Triton
stay: run it with each that is supported.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import record
import torch
import triton
from triton.backends.compiler import GPUTarget

from ralu_kernels import adaln, plan, qkv, tokens, upsample

MODULES = (adaln, plan, qkv, tokens, upsample)
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Report:
    """A row: a kernel, its variant and architecture, and what the compiler made of them."""

    kernel: str
    variant: str
    arch: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    store_bits: str
    load_bits: str
    triton: str


class _Driver:
    """Stands in for the CUDA driver: compilation asks it for nothing but the target."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


class _Recorder:
    """Stands in for a kernel: compiles what a launch would run, and does not run it."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.compiled = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.compiled.append((self.kernel.warmup(*args, grid=grid, **kwargs), grid))


def _meta(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def variants() -> list[tuple[str, str, Callable[[], object]]]:
    """List (kernel, variant, a call of its launcher) at the sizes of a 1024x1024 FLUX image."""
    seed, inverse = _meta(1, dtype=torch.int64), _meta(1, 4096, dtype=torch.int32)
    plan_of_rows: Any = (inverse, *(_meta(size, dtype=torch.int32) for size in (2, 1636, 1636)), 32, 1636)
    noise = (0.9, 0.4, 0.02, seed)
    selected: Callable = tokens._selected_triton
    listed: list[tuple[str, str, Callable[[], object]]] = []
    for name, dtype in DTYPES.items():
        latent, low, packed, scores = (
            _meta(*shape, dtype=dtype) for shape in ((1, 16, 64, 64), (1, 1024, 64), (1636, 64), (1, 1024))
        )
        listed.append(("upsample", name, partial(upsample._upsample_triton, latent, *noise, 2)))
        for granularity in tokens.GRANULARITIES:
            variant, transition = f"{name} {granularity}", (*noise, granularity, "exact")
            pixels = "_pixels" if granularity == "pixel" else ""
            listed += [
                (f"upsample_selected{pixels}", variant,
                 partial(selected, low, *plan_of_rows, *transition)),
                (f"upsample_remaining{pixels}", variant,
                 partial(tokens._remaining_triton, packed, inverse, 32, *transition)),
            ]  # fmt: skip
        listed.append(("plan", f"{name} ratio", partial(plan._plan_triton, scores, 32, 32, 204, None, 1636)))
    listed.append(("plan", f"{name} threshold", partial(plan._plan_triton, scores, 32, 32, 0, 0.5, 1636)))
    # 72 columns divide by 8 but not by the 16 that Triton looks for: what the launcher's ALIGN is for.
    latent = _meta(1, 16, 70, 72, dtype=torch.bfloat16)
    listed.append(("upsample", "bfloat16 72 columns", partial(upsample._upsample_triton, latent, *noise, 2)))
    return listed + _block_variants()


def _block_variants() -> list[tuple[str, str, Callable[[], object]]]:
    """List what runs inside a block: FLUX at 1024x1024 (512 + 4096 tokens, 24 heads of 128), and SD3's other shapes."""

    def stream(tokens, heads, size, norm=True) -> list[Any]:
        return [meta(2, tokens, heads * size)] * 3 + [meta(size) if norm else None] * 2

    listed: list[tuple[str, str, Callable[[], object]]] = []
    pack: Callable = qkv._pack_triton
    cu_seqlens, rows, tables = _meta(3, dtype=torch.int32), _meta(8000, dtype=torch.int32), [_meta(2, 4608, 128)] * 2
    for name, dtype in DTYPES.items():
        meta = partial(_meta, dtype=dtype)
        x, vector = meta(8000, 3072), meta(2, 6 * 3072)[:, :3072]
        streams = stream(512, 24, 128) + stream(4096, 24, 128)
        listed += [
            ("adaln", f"{name} ragged", partial(adaln._launch, x, vector, x, vector, vector, cu_seqlens, 1e-6)),
            ("pack", f"{name} ragged", partial(pack, *streams, rows, *tables, 24, 1e-6)),
            ("unpack", name, partial(qkv._unpack_triton, meta(8000, 24, 128), rows, 512, 4096)),
            ("concat_gelu", name, partial(adaln._concat_gelu_triton, meta(2, 4608, 3072), meta(2, 4608, 12288))),
        ]
    x = meta(2, 4096, 3072)
    single, tables = stream(4608, 24, 128), [table[0] for table in tables]
    listed += [
        ("adaln", f"{name} modulate", partial(adaln._modulate_triton, x, vector, vector, None, 1e-6)),
        ("adaln", f"{name} gated_add", partial(adaln._gated_add_triton, x, vector, x, None)),
        ("adaln", f"{name} both", partial(adaln._launch, x, vector, x, vector, vector, None, 1e-6)),
        ("pack", f"{name} single", partial(pack, *single, *[None] * 6, *tables, 24, 1e-6)),
    ]
    # SD3-medium has no norm; SD3.5-large 38 heads of 64, a width that is no power of two. Neither has a rotation.
    for model, heads, norm in (("SD3", 24, False), ("SD3.5-large", 38, True)):
        streams = stream(4096, heads, 64, norm) + stream(333, heads, 64, norm)
        x, vector = meta(2, 4096, heads * 64), meta(2, heads * 64)
        listed += [
            ("adaln", f"{name} {model}", partial(adaln._launch, x, vector, x, vector, vector, None, 1e-6)),
            ("pack", f"{name} {model}", partial(pack, *streams, None, None, None, heads, 1e-6)),
        ]
    return listed


def compile_variant(kernel: str, launch: Callable[[], object], arch: int):
    """Compile the kernel that ``launch`` would run on ``sm_<arch>``; returns it and the grid of its programs."""
    module = next(module for module in MODULES if hasattr(module, f"_{kernel}_kernel"))
    recorder = _Recorder(getattr(module, f"_{kernel}_kernel"))
    triton.runtime.driver.set_active(_Driver(arch))
    with mock.patch.object(module, f"_{kernel}_kernel", recorder):
        launch()
    (launched,) = recorder.compiled
    return launched


def _ptxas(arch: int) -> str:
    """Return the assembler; from Triton 3.6 on another one comes with it for Blackwell."""
    tools = triton.knobs.nvidia
    path: str = getattr(tools, "ptxas_blackwell" if arch >= 100 else "ptxas", tools.ptxas).path
    return path


def _bits(ptx: str, operation: str) -> str:
    """List the widths of all accesses of global memory, as in ``st.global.v4.b32`` (128)."""
    accesses = re.findall(rf"\b{operation}\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)", ptx)
    return "+".join(map(str, sorted({int(vector or 1) * int(width) for vector, width in accesses})))


def report(kernel: str, variant: str, launch: Callable[[], object], arch: int) -> Report:
    """Compile and assemble a kernel, and read what the assembler says of it."""
    compiled, _ = compile_variant(kernel, launch, arch)
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [_ptxas(arch), "-v", f"--gpu-name={target}", source.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stack, stores, loads = map(
        int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()
    )
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    return Report(
        kernel, variant, target, registers, stack, stores + loads,
        _bits(ptx, "st"), _bits(ptx, "ld"), triton.__version__,
    )  # fmt: skip


def main() -> None:
    """Compile what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("-o", "--output", type=Path, default=record.RESULTS / "aot.csv")
    options = parser.parse_args()
    commit, rows = record.provenance(torch.device("cpu"))["commit"], []
    for kernel, variant, launch in variants():
        for arch in options.arch:
            rows.append(asdict(report(kernel, variant, launch, arch)) | {"commit": commit})
            print(*rows[-1].values(), file=sys.stderr, flush=True)
    others = record.read(options.output) if options.output.exists() else []
    options.output.unlink(missing_ok=True)
    record.append(options.output, [row for row in others if row["triton"] != triton.__version__] + rows)


if __name__ == "__main__":
    main()
