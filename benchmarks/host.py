"""What a step of FLUX.1-dev and of SD3.5-large costs the host, stock and fused, on a GPU's launch path without a GPU.

    python benchmarks/host.py [--models flux-dev sd3.5-large] [--repeats 30]

A GPU works while the host prepares what it does next: a step takes the longer of the two. Here the transformers have
all their blocks, but two heads of 16 channels and six tokens, so that next to nothing is left but the host's work, in
one thread. Stock and fused steps are made in turn, and timed in CPU time of the process. A row a model and variant is
added to benchmarks/results/host.csv:

ms, p10, p90  median and percentiles of a step's milliseconds
ratio         to the stock step made next to it, the median
launches      of Triton's kernels in a step

What is stubbed, alike in both: a linear layer and an attention are one allocation each, where they enter PyTorch
(`F.linear`, `F.scaled_dot_product_attention`), and an RMS norm is one operator as on a GPU (`F.layer_norm`), where a
CPU takes it apart. All other operators of the stock blocks run on the CPU: its kernels, on six tokens, stand for
launches. The fused operations go the way of CUDA tensors on an H100, compiled for it, and through all of Triton's
Python; left out is the C function that hands a kernel's arguments to the driver (before Triton 3.7 with the little
Python around it, as it is compiled anew for every signature). So the driver's own time, some
microseconds a launch, is missing on both sides, and stock has two and a half times as many (blocks.py counts them).
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import record
import torch
import torch.nn.functional as F
from aot import _Driver
from models import TINY, transformer
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

import ralu
from ralu import families
from ralu_kernels import _backend, _checks, attention

SMALL: dict[str, Any] = {name: TINY[name] for name in TINY if not name.endswith("layers")}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux-dev": ("flux", SMALL),
    "sd3.5-large": ("sd3", SMALL | {"caption_projection_dim": 32, "pos_embed_max_size": 8}),
}
IMAGE, TEXT = 4, 2  # tokens
CAPABILITY = 9, 0  # of an H100


class Launching(_Driver):
    """Stands in for the CUDA driver: counts launches, and hands nothing to a GPU."""

    launches = 0  # of all instances: a compiled kernel stays with the first that loads it

    def __init__(self) -> None:
        super().__init__(10 * CAPABILITY[0])
        self.launcher_cls = nvidia.CudaLauncher if hasattr(nvidia, "PyKernelArg") else _Launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 2**17},
            load_binary=lambda *_: (object(), object(), 0, 0, 1024),
            build_signature_metadata=lambda signature: b"",
            launch=lambda *args: Launching.launched(*args),
        )

    @classmethod
    def launched(cls, *_) -> None:
        """Take a launch, as the function in C does: grid, stream, kernel, ..., the kernel's arguments."""
        cls.launches += 1


class _Launcher:
    """Stands in for what Triton before 3.7 compiles for a kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, x, y, z, stream, kernel, metadata, launch_metadata, enter, leave, *arguments) -> None:
        Launching.launched(x, y, z, stream, kernel, launch_metadata, arguments)


@contextmanager
def stubbed() -> Iterator[None]:
    """Make CPU tensors go a GPU's way as far as the driver, and leave out the arithmetic."""

    def linear(x, weight, bias=None):
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    def scaled_dot_product_attention(query, key, value, **_):
        return torch.empty_like(query)  # laid out as a GPU's implementations do

    def rms_norm(x, shape, weight=None, eps=None):
        return F.layer_norm(x, shape, weight)

    before = driver._active
    with ExitStack() as stack:
        for function in (linear, scaled_dot_product_attention, rms_norm):
            stack.enter_context(mock.patch.object(F, function.__name__, function))
        stack.enter_context(mock.patch.dict(_backend._ORDER, cpu=_backend._ORDER["cuda"]))
        stack.enter_context(mock.patch.dict(_backend._ABSENT, triton=lambda device: None))
        stack.enter_context(mock.patch.object(_checks, "can_look", lambda x: False))
        stack.enter_context(mock.patch.object(attention, "_capability", lambda device: CAPABILITY))
        if hasattr(nvidia, "PyKernelArg"):
            stack.enter_context(mock.patch.object(nvidia, "PyKernelArg", SimpleNamespace))
        stack.callback(driver.set_active, before)
        driver.set_active(Launching())
        yield


def calls(name: str) -> dict:
    """Make the calls of a model's step: "stock", "fused"."""
    kind, config = MODELS[name]
    family, made = families.load(kind), {}
    for variant in ("stock", "fused"):
        model = transformer(name, "cpu", **config)
        given: dict = {}

        def keep(module, args, kwargs, given=given):
            given |= {key: torch.zeros_like(x) if torch.is_tensor(x) else x for key, x in kwargs.items()}

        handle = model.register_forward_pre_hook(keep, with_kwargs=True)
        family.dummy_call(model, torch.bfloat16, 1, IMAGE, TEXT)
        handle.remove()
        vars(model.pos_embed).pop("cropped_pos_embed", None)
        if variant == "fused":
            ralu.fuse(model)
        made[variant] = lambda model=model, given=given: model(**given)
    return made


@torch.no_grad()
def rows(name: str, repeats: int) -> list[dict]:
    """Measure a model's steps."""
    with stubbed():
        steps = calls(name)
        times: dict[str, list[float]] = {variant: [] for variant in steps}
        launches = {}
        for warm in range(-2, repeats):
            for variant, step in steps.items():
                Launching.launches, start = 0, time.process_time()
                step()
                if warm >= 0:
                    times[variant].append(1e3 * (time.process_time() - start))
                    launches[variant] = Launching.launches
    made = []
    for variant in steps:
        low, *_, high = statistics.quantiles(times[variant], n=10)
        ratios = [each / stock for each, stock in zip(times[variant], times["stock"], strict=True)]
        made.append({
            "model": name, "variant": variant, "ms": f"{statistics.median(times[variant]):.2f}", "p10": f"{low:.2f}",
            "p90": f"{high:.2f}", "ratio": f"{statistics.median(ratios):.3f}",
            "launches": launches[variant], "repeats": repeats,
        })  # fmt: skip
    return made


def main(argv: list[str] | None = None):
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, default=record.RESULTS / "host.csv")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    common = record.provenance(torch.device("cpu"))
    for name in args.models:
        measured = rows(name, args.repeats)
        record.append(args.output, [row | common for row in measured])
        for row in measured:
            print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
