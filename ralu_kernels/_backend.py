"""Which implementation of an operation runs."""

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._checks import wrong_type

triton: Any
tl: Any
try:
    triton, tl = import_module("triton"), import_module("triton.language")
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=None)  # the kernels are defined, with their annotations, all the same

# The operations' namespace and the extension are named after the package, so that copies of it do not meet. setup.py
# adds a suffix to the extension's name, and Hugging Face's kernel-builder does not.
_PACKAGE = __name__.rpartition(".")[0]
NAMESPACE = _PACKAGE.replace(".", "_")
_EXTENSION = NAMESPACE if find_spec(f".{NAMESPACE}", _PACKAGE) else f"{NAMESPACE}_C"

_extension: Any
try:
    _extension = import_module(f".{_EXTENSION}", _PACKAGE)
except ModuleNotFoundError:
    _extension = None  # a pure Python installation
except ImportError as error:
    raise ImportError(
        f"the compiled extension of {_PACKAGE} is there but cannot be loaded: {error}. Install {_PACKAGE} again, "
        "against this PyTorch, or without the extension (RALU_NATIVE=0)"
    ) from error

INTERPRET = triton is not None and triton.knobs.runtime.interpret
native = getattr(torch.ops, _EXTENSION)  # the extension's operations, where it is there

_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # beside what a kernel-builder extension defines
_Result = TypeVar("_Result")


def jit(kernel: Any) -> Any:
    """Return the function as ``triton.jit`` does, where Triton is installed; elsewhere as it is, and never launched."""
    return kernel if triton is None else triton.jit(kernel)


@cache
def why_no_extension() -> str:
    """Say why there is no compiled extension: it is not built, or it is in a copy that is not the imported one."""
    folder = Path(__file__).parent
    for other in (Path(entry).resolve() / folder.name for entry in sys.path):
        if other != folder.resolve() and any(other.glob(f"{_EXTENSION}.*")):
            return (
                f"{_PACKAGE} is imported from {folder}, where the extension was not compiled; {other}, which has it, "
                "comes later in sys.path. Is Python started in a clone? Start it in another folder"
            )
    return f"the extension was not compiled when {_PACKAGE} was installed"


@cache
def _warn_of_plain(device: str) -> None:
    """Warn, once, that operations run in plain PyTorch although something faster could."""
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if os.environ.get("RALU_NATIVE") != "0" and (device == "cuda" or shutil.which(compiler)):
        warnings.warn(
            f"{_PACKAGE} runs in plain PyTorch on {device}, which is slow: {why_no_extension()}. A build with "
            "RALU_NATIVE=1 in the environment says what it lacks; RALU_NATIVE=0 silences this",
            stacklevel=2,
        )


def _why_no_triton(device: torch.device) -> str | None:
    if triton is None:
        return "triton is not installed"
    if device.type == "cpu" and not INTERPRET:
        return "on CPU tensors it needs TRITON_INTERPRET=1 set before the import"
    return None


def _why_no_native(device: torch.device) -> str | None:
    if _extension is None:
        return why_no_extension()
    if device.type == "cuda" and not _extension.cuda:
        return "the extension was compiled without CUDA"
    return None if device.type in ("cpu", "cuda") else f"it has nothing for {device.type}"


# Backend name -> why it cannot run on a device (None: it can).
_ABSENT: dict[str, Callable[[torch.device], str | None]] = {
    "native": _why_no_native,
    "triton": _why_no_triton,
    "reference": lambda device: None,
}
# What "auto" tries, in this order. On a GPU Triton stays first until measurements say otherwise.
_ORDER = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}


def resolve(backend: str, device: torch.device, among: Collection[str] = _ABSENT) -> str:
    """Name the implementation, of those in ``among``, that runs for ``backend`` on ``device``.

    "auto" is the compiled extension on a CPU, Triton on CUDA, and where these are absent the next of `_ORDER`.
    Raises ``ValueError`` for a backend that is unknown or cannot run on this device, ``TypeError`` if it is no string.
    """
    if not isinstance(backend, str):
        raise wrong_type("backend", backend, "a string")
    if backend == "auto":
        for name in _ORDER.get(device.type, ("reference",)):
            if name in among and _ABSENT[name](device) is None:
                return name
    if backend not in among or _ABSENT[backend](device) is not None:
        states = ", ".join(f"{name!r} ({_ABSENT[name](device) or 'available'})" for name in among)
        raise ValueError(f"backend must be 'auto' or one available on {device.type}, got {backend!r}: {states}")
    return backend


def register(
    schema: str,
    fake: Callable[..., _Result],
    pick: Callable[..., str] | None = None,
    **implementations: Callable[..., _Result],
) -> Callable[..., _Result]:
    """Define an opaque op by its schema, whose last argument, ``str backend``, picks what runs.

    ``pick``, of the op's arguments, names the implementation where `resolve` is not enough. Returns the op as a
    function that leaves its dispatch out where nothing is traced: the way through PyTorch to a Python implementation
    takes the host longer than a launch.
    """
    name = schema.partition("(")[0]

    def chosen(args: tuple[Any, ...]) -> str:
        return pick(*args) if pick else resolve(args[-1], args[0].device, implementations)

    def run(*args: Any) -> _Result:
        return perform(chosen(args), args)

    def perform(name: str, args: tuple[Any, ...]) -> _Result:
        if name == "reference" and args[-1] == "auto" and "native" in implementations:
            _warn_of_plain(args[0].device.type)
        return implementations[name](*args[:-1])

    def call(*args: Any) -> _Result:
        x = args[0]
        # Who watches what is dispatched sees the op, or the extension's own.
        if type(x) is Tensor and (x.is_cuda or x.is_cpu) and not torch.compiler.is_compiling():
            name = chosen(args)
            if name == "native" or not torch._C._len_torch_dispatch_stack():
                return perform(name, args)
        elif not pick:
            resolve(args[-1], x.device, implementations)
        result: _Result = op(*args)
        return result

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: fake(*args[:-1]), lib=_library)
    op: Callable[..., _Result] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return call


def rowwise(x: Tensor) -> Tensor:
    """Return x for kernels that take any strides but one along the last dimension."""
    return x if x.stride()[-1] == 1 else x.contiguous()


def new_like(x: Tensor) -> Tensor:
    """Allocate a contiguous tensor of x's shape and dtype, in a third of the host's time for `new_empty`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is not below n. Triton's own takes the host as long as a launch."""
    return 1 << max(n - 1, 0).bit_length()


_variants: dict[tuple[Any, ...], Any] = {}  # what was launched -> how Triton compiled it
_MOST_VARIANTS = 4096  # where every image has another number of tokens, there is no end of them


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    numbers: tuple[float, ...],
    constants: tuple[int, ...],
    num_warps: int,
) -> None:
    """Launch a Triton kernel on its tensors' device; its parameters are inputs, outputs, numbers and constants.

    To find the variant that it has compiled Triton looks at every argument, which takes the host longer than the launch
    itself. Here that depends on the numbers, and the dtypes and alignment of the inputs: outputs are new, and of the
    first input's dtype. What was found is launched as Triton does it, but without a profiler's hooks: where there are
    any, Triton launches.
    """
    first: Any = inputs[0]
    index = first.get_device()
    if index >= 0 and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return launch(kernel, grid, inputs, outputs, numbers, constants, num_warps)
    seen = [None if x is None else (x.dtype, x.data_ptr() % 16) for x in inputs]
    key = id(kernel), index, num_warps, constants, numbers, *seen  # a kernel's own hash is of its source
    found = _variants.get(key)
    if found and not _hooked(triton.knobs.runtime):
        stream = triton.runtime.driver.active.get_current_stream(index)
        before = *grid, stream, found.function, found.packed_metadata, None, None, None
        found.run(*before, *inputs, *outputs, *numbers, *constants)
    elif compiled := kernel[grid](*inputs, *outputs, *numbers, *constants, num_warps=num_warps):
        if len(_variants) >= _MOST_VARIANTS:
            _variants.clear()
        _variants[key] = compiled  # the interpreter has none
    return None


def _hooked(runtime: Any) -> bool:
    """Say whether somebody, as Triton's profiler does, wants to know of launches."""
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook  # None, a function, or a list of such
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
