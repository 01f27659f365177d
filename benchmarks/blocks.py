"""FLUX's transformer blocks, stock and fused: bytes and launches by count, and a step's time where there is a GPU.

    python benchmarks/blocks.py [--tokens 4096 1024 1636] [--minutes 3] [--output benchmarks/results/blocks-DEVICE.csv]
    python benchmarks/blocks.py --dry    # on a CPU, a tiny model, to see that everything runs

traffic  of one FLUX.1-dev block, in bfloat16 and counted without a device: kernel launches, and the bytes that all but
         the matrix products and the attention read and write. A view is free; norms and attention are one kernel each.
step     one forward of FLUX.1-dev with random weights, 512 text tokens, for each number of image tokens: stock and
         fused, eager and with the blocks compiled one by one (regional compilation), the fused ones with every
         attention that is installed. Milliseconds, the median; seconds of the first call, compilation included; and
         how far the result is from the stock one, in parts of its norm.

The fused operations by themselves are in bench.py.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import record
import torch
from cases import tensors
from models import TINY, flux_call, transformer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ralu
from ralu_kernels import attention, packed_layout

TEXT = 512
NOT_COUNTED = ("mm", "addmm", "bmm", "scaled_dot_product_attention", "varlen_attention")


def size(x: Tensor) -> int:
    """Bytes of a tensor; what it repeats by a stride of 0 is there once."""
    return prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.element_size()


class Traffic:
    """A context in which `launches` lists what is run on meta tensors: (name, bytes read and written)."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, int]] = []
        traffic = self

        class Dispatch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if not (func.is_view or func is torch.ops.aten._unsafe_view.default):
                    traffic.add(func.overloadpacket.__name__, args, kwargs, out)
                return out

        class OneKernel(TorchFunctionMode):
            """What a GPU runs as one kernel and PyTorch takes apart for a meta tensor."""

            def __torch_function__(self, func, types, args=(), kwargs=None):
                before = len(traffic.launches)
                out = func(*args, **(kwargs or {}))
                if func.__name__ in ("rms_norm", "scaled_dot_product_attention"):
                    out = torch.empty_like(tensors((args, kwargs))[0])  # attention lays it out as the queries
                    del traffic.launches[before:]
                    traffic.add(func.__name__, args, kwargs, out)
                return out

        self._modes = OneKernel, Dispatch

    def add(self, name: str, *moved):
        """Note a launch, and the bytes of the tensors it reads and writes."""
        self.launches.append((name, sum(map(size, tensors(moved)))))

    def __enter__(self):
        self._open = [mode() for mode in self._modes]
        for mode in self._open:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._open):
            mode.__exit__(*error)

    @property
    def bytes(self) -> int:
        """What all but matrix products and attention move."""
        return sum(moved for name, moved in self.launches if name not in NOT_COUNTED)


@torch.no_grad()
def block_traffic(kind: str, fused: bool, tokens: int = 4096, batch: int = 1) -> Traffic:
    """Count what one FLUX.1-dev block moves.

    kind:   "double" or "single".
    tokens: of an image, beside 512 of its text.
    """
    model = transformer("flux-dev", "meta", num_layers=1, num_single_layers=1)
    layout = {}
    if fused:
        ralu.fuse(model)
        sequences = packed_layout(None, batch, TEXT + tokens, "meta")  # made once for all blocks
        layout = {"joint_attention_kwargs": {"sequences": sequences}}
    block = (model.transformer_blocks if kind == "double" else model.single_transformer_blocks)[0]
    width, size = model.inner_dim, model.config.attention_head_dim
    x, text, temb = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((batch, tokens, width), (batch, TEXT, width), (batch, width))
    )
    tables = tuple(torch.empty(TEXT + tokens, size, device="meta") for _ in range(2))
    with Traffic() as traffic:
        block(hidden_states=x, encoder_hidden_states=text, temb=temb, image_rotary_emb=tables, **layout)
    return traffic


def traffic_rows() -> list[dict]:
    """Count what both kinds of blocks move, stock and fused."""
    rows = []
    for kind in ("double", "single"):
        for fused in (False, True):
            traffic = block_traffic(kind, fused)
            rows.append({"part": "traffic", "what": kind, "variant": "fused" if fused else "stock", "tokens": 4096,
                         "launches": len(traffic.launches), "bytes": traffic.bytes})  # fmt: skip
    return rows


@contextmanager
def compiled_blocks(model: Any, compiler: str) -> Iterator[None]:
    """Compile a transformer's blocks one by one inside the context: a graph for each class of them and shape."""
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=compiler)
    try:
        yield
    finally:
        for block in model.modules():
            block._compiled_call_impl = None


@torch.no_grad()
def step_row(
    model: Any, call: dict, expected: Tensor, way: tuple[bool, bool, str], budget: float, compiler: str
) -> dict:
    """Time a step in one of the `ways`; raise where it is not the stock one but for rounding."""
    fused, compiled, backend = way
    with ExitStack() as undo:
        if fused:
            undo.callback(ralu.unfuse, model)
            ralu.fuse(model)
            undo.enter_context(ralu.attention_backend(backend))
        if compiled:
            undo.enter_context(compiled_blocks(model, compiler))
        start = time.perf_counter()
        error = ((model(**call).sample.float() - expected).norm() / expected.norm()).item()
        first = time.perf_counter() - start
        if not error < 0.1:  # of 57 blocks in bfloat16
            raise AssertionError(f"{way} is {error:.2g} away from the stock step, in parts of its norm")
        times = record.in_turn({"step": partial(model, **call)}, expected.device, budget)["step"]
    return {"variant": variant(*way), "attention": backend, "ms": f"{statistics.median(times):.3f}",
            "error": f"{error:.2g}", "first_s": f"{first:.1f}"}  # fmt: skip


def variant(fused: bool, compiled: bool, backend: str) -> str:
    """Name a way to run the blocks, without the attention."""
    return f"{'fused' if fused else 'stock'} {'compiled' if compiled else 'eager'}"


def ways() -> list[tuple[bool, bool, str]]:
    """List (fused, compiled, attention) for all that can run here, what matters most first."""
    example = torch.empty(1, 1, 128, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
    usual: list = [(False, "diffusers'"), (True, "auto")]
    others = [(True, name) for name in attention.BACKENDS if attention._why_not(name, example) is None]
    return [(fused, compiled, name) for of in (usual, others) for compiled in (False, True) for fused, name in of]


@torch.no_grad()
def steps(args: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Time a step of FLUX.1-dev, or of what is tiny, in all ways and for each number of image tokens."""
    name, tokens, text = ("tiny", [6], 3) if args.dry else ("FLUX.1-dev", args.tokens, TEXT)
    changes: dict[str, Any] = TINY if args.dry else {}
    model = transformer("flux-dev", device, **changes)
    calls = {length: flux_call(model, text, length, device) for length in tokens}
    expected = {length: model(**call).sample.float() for length, call in calls.items()}
    work = {f"{variant(*way)}, {way[2]}, {length} tokens": (way, length) for way in ways() for length in tokens}
    budget, compiler = (0, "eager") if args.dry else (args.budget, "inductor")
    for way, length in record.in_time(work, args.minutes):
        row = step_row(model, calls[length], expected[length], way, budget, compiler)
        yield {"part": "step", "what": name, "tokens": length} | row


def main(arguments=None) -> list[dict]:
    """Count, and on a GPU time, what the command line asks for; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 1024, 1636], help="of the image")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds to measure each step for")
    parser.add_argument("--minutes", type=float, help="start nothing new after so many (default: no limit)")
    parser.add_argument("--output", type=Path, help="(default: results/blocks-DEVICE.csv; a dry run: nowhere)")
    parser.add_argument("--dry", action="store_true", help="a tiny model on a CPU; the times mean nothing")
    args = parser.parse_args(arguments)
    device = record.pick_device("cpu" if args.dry else "auto")
    output = args.output or (None if args.dry else record.RESULTS / f"blocks-{record.slug(device)}.csv")
    common, rows = record.provenance(device), []
    for row in chain(traffic_rows(), steps(args, device) if args.dry or device.type == "cuda" else ()):
        print(*row.values(), flush=True)
        if output:
            record.append(output, [row | common])
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
