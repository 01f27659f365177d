"""FLUX's transformer blocks, stock and fused: bytes and launches by count, and a step's time where there is a GPU.

    python benchmarks/blocks.py [--tokens 1024 1636 4096] [--budget 2] [--output benchmarks/results/blocks-DEVICE.csv]
    python benchmarks/blocks.py --dry    # on a CPU, a tiny model, to see that everything runs

traffic  of one FLUX.1-dev block, in bfloat16 and counted without a device: kernel launches, and the bytes that all but
         the matrix products and the attention read and write. A view is free; norms and attention are one kernel each.
step     one forward of FLUX.1-dev with random weights, 512 text tokens, for each number of image tokens: stock and
         fused, eager and compiled, the fused ones with every attention that is installed. Milliseconds, the median.

The fused operations by themselves are in bench.py.
"""

import argparse
import statistics
from contextlib import nullcontext
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


@torch.no_grad()
def step_rows(
    name: str, config: dict, tokens: list[int], text: int, device: torch.device, budget: float, compiler: str
) -> list[dict]:
    """Time a step of FLUX.1-dev, or of what its configuration becomes, for each number of image tokens."""
    model, rows = transformer("flux-dev", device, **config), []
    for length in tokens:
        call = flux_call(model, text, length, device)
        expected = model(**call).sample
        for fused, compiled, backend in variants():
            torch.compiler.reset()
            run: Any = torch.compile(model, backend=compiler, dynamic=False) if compiled else model
            if fused:
                ralu.fuse(run)
            try:
                with ralu.attention_backend(backend) if fused else nullcontext():
                    sample = run(**call).sample
                    torch.testing.assert_close(sample.float(), expected.float(), rtol=0.05, atol=0.05)
                    times = record.in_turn({"step": lambda: run(**call)}, device, budget)["step"]  # noqa: B023
            finally:
                ralu.unfuse(run)
            variant = f"{'fused' if fused else 'stock'} {'compiled' if compiled else 'eager'}"
            rows.append({"part": "step", "what": name, "variant": variant, "attention": backend, "tokens": length,
                         "ms": f"{statistics.median(times):.3f}"})  # fmt: skip
    return rows


def variants():
    """Yield (fused, compiled, attention) for all that can run here."""
    yield from ((False, compiled, "diffusers'") for compiled in (False, True))
    for name in ("auto", *attention.BACKENDS):
        example = torch.empty(1, 1, 128, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
        if name == "auto" or attention._why_not(name, example) is None:
            yield from ((True, compiled, name) for compiled in (False, True))


def main(arguments=None) -> list[dict]:
    """Count, and on a GPU time, what the command line asks for; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 1636, 4096], help="image tokens")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds to measure each step for")
    parser.add_argument("--output", type=Path, help="(default: results/blocks-DEVICE.csv; a dry run: nowhere)")
    parser.add_argument("--dry", action="store_true", help="a tiny model on a CPU; the times mean nothing")
    args = parser.parse_args(arguments)
    device = record.pick_device("cpu" if args.dry else "auto")
    rows = traffic_rows()
    if args.dry:
        rows += step_rows("tiny", TINY, [6], 3, device, 0, "eager")
    elif device.type == "cuda":
        rows += step_rows("FLUX.1-dev", {}, args.tokens, TEXT, device, args.budget, "inductor")
    for row in rows:
        print(row, flush=True)
    if args.output or not args.dry:
        output = args.output or record.RESULTS / f"blocks-{record.slug(device)}.csv"
        record.append(output, [row | record.provenance(device) for row in rows])
    return rows


if __name__ == "__main__":
    main()
