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

import record
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ralu
from ralu_kernels import attention, packed_layout

FLUX = {"heads": 24, "size": 128, "axes": (16, 56, 56), "layers": 19, "single_layers": 38}
TINY = {"heads": 2, "size": 16, "axes": (4, 6, 6), "layers": 1, "single_layers": 1}
TEXT = 512
NOT_COUNTED = ("mm", "addmm", "bmm", "scaled_dot_product_attention", "varlen_attention")


def size(x: Tensor) -> int:
    """Bytes of a tensor; what it repeats by a stride of 0 is there once."""
    return prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.element_size()


def tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class Traffic:
    """A context in which `launches` lists what is run on meta tensors: (name, bytes read and written)."""

    def __init__(self):
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


def transformer(config: dict, device, **layers) -> FluxTransformer2DModel:
    config = config | layers
    torch.set_default_dtype(torch.bfloat16)  # in float32 FLUX.1-dev would not fit next to its copy
    try:
        with torch.device(device):
            return FluxTransformer2DModel(
                in_channels=64, num_layers=config["layers"], num_single_layers=config["single_layers"],
                attention_head_dim=config["size"], num_attention_heads=config["heads"], axes_dims_rope=config["axes"],
                guidance_embeds=True,
            ).eval()  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def block_traffic(kind: str, fused: bool, tokens: int = 4096, batch: int = 1) -> Traffic:
    """Of one FLUX.1-dev block; kind: "double" or "single"."""
    model = transformer(FLUX, "meta", layers=1, single_layers=1)
    layout = {}
    if fused:
        ralu.fuse(model)
        sequences = packed_layout(None, batch, TEXT + tokens, "meta")  # made once for all blocks
        layout = {"joint_attention_kwargs": {"sequences": sequences}}
    block = (model.transformer_blocks if kind == "double" else model.single_transformer_blocks)[0]
    width = FLUX["heads"] * FLUX["size"]
    x, text, temb = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((batch, tokens, width), (batch, TEXT, width), (batch, width))
    )
    tables = tuple(torch.empty(TEXT + tokens, FLUX["size"], device="meta") for _ in range(2))
    with Traffic() as traffic:
        block(hidden_states=x, encoder_hidden_states=text, temb=temb, image_rotary_emb=tables, **layout)
    return traffic


def traffic_rows() -> list[dict]:
    rows = []
    for kind in ("double", "single"):
        for fused in (False, True):
            traffic = block_traffic(kind, fused)
            rows.append({"part": "traffic", "what": kind, "variant": "fused" if fused else "stock", "tokens": 4096,
                         "launches": len(traffic.launches), "bytes": traffic.bytes})  # fmt: skip
    return rows


@torch.no_grad()
def step_rows(
    config: dict, tokens: list[int], text: int, device: torch.device, budget: float, compiler: str
) -> list[dict]:
    model, rows = transformer(config, device), []
    for length in tokens:
        call = {
            "hidden_states": torch.randn(1, length, 64), "encoder_hidden_states": torch.randn(1, text, 4096),
            "pooled_projections": torch.randn(1, 768), "timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5]),
        }  # fmt: skip
        call = {name: value.to(device, torch.bfloat16) for name, value in call.items()}
        call["img_ids"] = torch.rand(length, 3, device=device).mul(64).round()
        call["txt_ids"] = torch.zeros(text, 3, device=device)
        expected = model(**call).sample
        for fused, compiled, name in variants():
            torch.compiler.reset()
            run: nn.Module = torch.compile(model, backend=compiler, dynamic=False) if compiled else model
            if fused:
                ralu.fuse(run)
            try:
                with ralu.attention_backend(name) if fused else nullcontext():
                    found = run(**call).sample
                    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)
                    times = record.in_turn({name: lambda: run(**call)}, device, budget)[name]  # noqa: B023
            finally:
                ralu.unfuse(run)
            variant = f"{'fused' if fused else 'stock'} {'compiled' if compiled else 'eager'}"
            rows.append({"part": "step", "what": "FLUX.1-dev" if config is FLUX else "tiny", "variant": variant,
                         "attention": name, "tokens": length, "ms": f"{statistics.median(times):.3f}"})  # fmt: skip
    return rows


def variants():
    """(fused, compiled, attention) for all that can run here."""
    yield from ((False, compiled, "diffusers'") for compiled in (False, True))
    for name in ("auto", *attention.BACKENDS):
        example = torch.empty(1, 1, 128, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
        if name == "auto" or attention._why_not(name, example) is None:
            yield from ((True, compiled, name) for compiled in (False, True))


def main(arguments=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 1636, 4096], help="image tokens")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds to measure each step for")
    parser.add_argument("--output", type=Path, help="(default: results/blocks-DEVICE.csv; a dry run: nowhere)")
    parser.add_argument("--dry", action="store_true", help="a tiny model on a CPU; the times mean nothing")
    args = parser.parse_args(arguments)
    device = record.pick_device("cpu" if args.dry else "auto")
    rows = traffic_rows()
    if args.dry:
        rows += step_rows(TINY, [6], 3, device, 0, "eager")
    elif device.type == "cuda":
        rows += step_rows(FLUX, args.tokens, TEXT, device, args.budget, "inductor")
    for row in rows:
        print(row, flush=True)
    if args.output or not args.dry:
        output = args.output or record.RESULTS / f"blocks-{record.slug(device)}.csv"
        record.append(output, [row | record.provenance(device) for row in rows])
    return rows


if __name__ == "__main__":
    main()
