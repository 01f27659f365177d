"""Which implementation of an operation runs, and the argument checks every public function shares."""

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=None)  # the kernels are defined, with their annotations, all the same

try:
    _extension = import_module("ralu_kernels._C")
except ModuleNotFoundError:
    _extension = None  # a pure Python installation
except ImportError as error:
    raise ImportError(
        f"the compiled extension of ralu_kernels is there but cannot be loaded: {error}. Install ralu_kernels again, "
        "against this PyTorch, or without the extension (RALU_NATIVE=0)"
    ) from error

INTERPRET = triton is not None and triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_ELEMENTS = 2**31 - 1

_library = torch.library.Library("ralu_kernels", "DEF")


def jit(kernel):
    """``triton.jit`` where Triton is installed; elsewhere the function is left as it is and never launched."""
    return kernel if triton is None else triton.jit(kernel)


def _why_no_triton(device: torch.device) -> str | None:
    if triton is None:
        return "triton is not installed"
    if device.type == "cpu" and not INTERPRET:
        return "on CPU tensors it needs TRITON_INTERPRET=1 set before the import"
    return None


def _why_no_native(device: torch.device) -> str | None:
    if _extension is None:
        return "the extension was not compiled when ralu_kernels was installed"
    if device.type == "cuda" and not _extension.cuda:
        return "the extension was compiled without CUDA"
    return None if device.type in ("cpu", "cuda") else f"it has nothing for {device.type}"


# Backend name -> why it cannot run on a device (None: it can).
_ABSENT = {"native": _why_no_native, "triton": _why_no_triton, "reference": lambda device: None}
# What "auto" tries, in this order. On a GPU Triton stays first until measurements say otherwise.
_ORDER = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}


def resolve(backend: str, device: torch.device, among=_ABSENT) -> str:
    """The implementation, of those in ``among``, that runs for ``backend`` on ``device``.

    "auto" is the compiled extension on a CPU, Triton on CUDA, and where these are absent the next of `_ORDER`.
    Raises ``ValueError`` for a backend that is unknown or cannot run on this device.
    """
    if backend == "auto":
        for name in _ORDER.get(device.type, ("reference",)):
            if name in among and _ABSENT[name](device) is None:
                return name
    if backend not in among or _ABSENT[backend](device) is not None:
        states = ", ".join(f"{name!r} ({_ABSENT[name](device) or 'available'})" for name in among)
        raise ValueError(f"backend must be 'auto' or one available on {device.type}, got {backend!r}: {states}")
    return backend


def register(schema: str, fake, pick=None, **implementations) -> Callable:
    """Define ``ralu_kernels::<schema>``, one opaque op whose last argument, ``str backend``, picks what runs.

    ``pick``, of the op's arguments, names the implementation where `resolve` is not enough. Returns the op as a
    function that leaves its dispatch out where the extension runs and nothing is traced: at a FLUX latent's size the
    way through PyTorch to a Python implementation takes a tenth of the whole call.
    """
    name = schema.partition("(")[0]

    def run(*args):
        name = pick(*args) if pick else resolve(args[-1], args[0].device, implementations)
        return implementations[name](*args[:-1])

    def call(*args):
        plain = type(args[0]) is torch.Tensor and not torch.compiler.is_compiling()
        if plain and resolve(args[-1], args[0].device, implementations) == "native":
            return implementations["native"](*args[:-1])
        return op(*args)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ralu_kernels::{name}", lambda *args: fake(*args[:-1]), lib=_library)
    op = getattr(torch.ops.ralu_kernels, name)
    return call


def rowwise(x: torch.Tensor) -> torch.Tensor:
    """x for kernels that take any strides but one along the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check(condition: bool, name: str, value, allowed: str, *of) -> None:
    """``allowed`` may be a format of ``of``: a check that passes writes nothing."""
    if not condition:
        value = tuple(value) if isinstance(value, torch.Size) else value
        raise ValueError(f"{name} must be {allowed.format(*of) if of else allowed}, got {value}")


def check_values(name: str, x: torch.Tensor, shape: str) -> None:
    """A tensor of values: rank, dtype, and no gradient, which these forward-only operations would silently drop."""
    rank = shape.count(", ") + 1
    check(x.dim() == rank, name, x.shape, "of shape {}", shape)
    check(x.dtype in DTYPES, f"{name}.dtype", x.dtype, "float32, float16 or bfloat16")
    check(not (x.requires_grad and torch.is_grad_enabled()), f"{name}.requires_grad", True, "False (forward only)")


def check_alike(name: str, y: torch.Tensor, x: torch.Tensor, whose: str, attributes=("dtype", "device")) -> None:
    for attribute in attributes:
        found, expected = getattr(y, attribute), getattr(x, attribute)
        check(found == expected, f"{name}.{attribute}", found, f"{expected}, as {whose}")


def check_sequences(name: str, cu_seqlens: torch.Tensor, device: torch.device) -> None:
    """The first rows of packed sequences. That they ascend to the total is the caller's promise: looking would wait."""
    check(cu_seqlens.dim() == 1 and cu_seqlens.shape[0] > 0, f"{name}.shape", tuple(cu_seqlens.shape), "(B + 1,)")
    check(cu_seqlens.is_contiguous(), f"{name}.stride()", cu_seqlens.stride(), "(1,)")
    check(cu_seqlens.dtype == torch.int32, f"{name}.dtype", cu_seqlens.dtype, "int32")
    check(cu_seqlens.device == device, f"{name}.device", cu_seqlens.device, str(device))


def check_noise(c: float, elements: int) -> None:
    """``c`` and the number of output elements in one sample, whose indices must fit one 32-bit counter word."""
    check(0 <= c <= 0.25, "c", c, "in [0, 1/4]")
    check(elements <= MAX_ELEMENTS, "the number of output elements of one sample", elements, "at most {}", MAX_ELEMENTS)


def seed_tensor(seed: torch.Tensor | int, batch: int, device: torch.device) -> torch.Tensor:
    """The 64-bit key of every sample, int64 (batch,). An int is every sample's key."""
    if isinstance(seed, torch.Tensor):
        check(seed.dtype == torch.int64, "seed.dtype", seed.dtype, "int64")
        check(seed.shape == (batch,), "seed.shape", seed.shape, "({},), one key for each sample", batch)
        check(seed.device == device, "seed.device", seed.device, "{}", device)
        return seed
    check(isinstance(seed, int), "seed", seed, "an int64 tensor or an int")
    check(-(2**63) <= seed < 2**63, "seed", seed, "a 64-bit signed integer")
    return torch.full((batch,), seed, dtype=torch.int64, device=device)
