"""Checks of the arguments of public functions. A check that passes formats nothing and never waits for a device.

What fails raises TypeError for a wrong type, else ValueError, with the argument's name, its value and what is allowed.
"""

import reprlib
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_ELEMENTS = 2**31 - 1
_MAX_FLOAT = torch.finfo(torch.float32).max  # the kernels' arithmetic is float32


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, (torch.device, torch.Size)):
        return str(value) if isinstance(value, torch.device) else str(tuple(value))
    return reprlib.repr(value)


def wrong(name: str, value: object, allowed: str) -> ValueError:
    """Return the error for an argument whose value is not allowed."""
    return ValueError(f"{name} must be {allowed}, got {_shown(value)}")


def wrong_type(name: str, value: object, allowed: str) -> TypeError:
    """Return the error for an argument of another type."""
    return TypeError(f"{name} must be {allowed}, got {_shown(value)} ({type(value).__name__})")


def check_type(name: str, value: object, kind: type, allowed: str) -> None:
    """Check that ``value`` is a ``kind``."""
    if not isinstance(value, kind):
        raise wrong_type(name, value, allowed)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that ``value`` is one of some strings."""
    if not isinstance(value, str):
        raise wrong_type(name, value, f"one of {choices}")
    if value not in choices:
        raise wrong(name, value, f"one of {choices}")


def integer(name: str, value: Any, least: int, most: int = MAX_ELEMENTS) -> int:
    """Return an integer in [least, most] as an int; a bool is none."""
    if type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
            raise wrong_type(name, value, "an int")
        value = value if isinstance(value, torch.SymInt) else int(value)
    if not least <= value <= most:
        raise wrong(name, value, f"an int in [{least}, {most}]")
    whole: int = value
    return whole


def number(name: str, value: Any) -> float:
    """Return a real number as a float or an int; a bool is none."""
    if type(value) is not float and type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
            raise wrong_type(name, value, "a number")
        try:
            value = value if isinstance(value, (torch.SymFloat, torch.SymInt)) else float(value)
        except OverflowError as error:  # a fraction of large integers
            raise wrong(name, value, "a number that a float can hold") from error
    real: float = value
    return real


def finite(name: str, value: Any, least: float = -_MAX_FLOAT) -> float:
    """Return a real number that float32 can hold, and not below ``least``."""
    real = number(name, value)
    if not least <= real <= _MAX_FLOAT:
        at_least = "" if least == -_MAX_FLOAT else f", at least {least}"
        raise wrong(name, real, f"a finite number{at_least}")
    return real


def check_tensor(name: str, x: object, shape: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Check a tensor's rank, layout and dtype; ``shape`` is written as in "(B, n, C)", or "(D,)" for one dimension."""
    if not isinstance(x, Tensor):
        raise wrong_type(name, x, "a torch.Tensor")
    if x.dim() != shape.count(", ") + 1 or x.layout is not torch.strided:
        if x.layout is not torch.strided:
            raise wrong(f"{name}.layout", x.layout, "torch.strided")
        raise wrong(name, x.shape, f"of shape {shape}")
    if x.dtype not in dtypes:
        *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise wrong(f"{name}.dtype", x.dtype, f"{', '.join(others)} or {last}" if others else last)


def check_values(name: str, x: Tensor, shape: str) -> None:
    """Check a tensor of values, which may not want a gradient: these forward-only operations would drop it silently."""
    check_tensor(name, x, shape)
    if x.requires_grad and torch.is_grad_enabled():
        raise wrong(f"{name}.requires_grad", True, "False (forward only)")


def fits(x: object, shape: Sequence[int], dtypes: tuple[torch.dtype, ...], device: torch.device) -> bool:
    """Tell whether a tensor of values passes `check_values`, `check_shape` and `check_device`, sooner than they would.

    Blocks of a transformer ask a thousand times a step. Where it does not, those say what is wrong.
    """
    return (
        isinstance(x, Tensor)
        and x.shape == shape
        and x.dtype in dtypes
        and x.device == device
        and x.layout is torch.strided
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Check a tensor's sizes; ``meaning`` names them, as in "(B, D)"."""
    if x.shape != shape:
        raise wrong(f"{name}.shape", x.shape, f"{meaning} = {tuple(shape)}")


def check_device(name: str, x: Tensor, other: Tensor, whose: str) -> None:
    """Check that two tensors are on one device."""
    if x.device != other.device:
        raise wrong(f"{name}.device", x.device, f"{other.device}, as {whose}")


def check_alike(name: str, x: Tensor, other: Tensor, whose: str) -> None:
    """Check that two tensors are of one dtype and on one device."""
    if x.dtype != other.dtype:
        raise wrong(f"{name}.dtype", x.dtype, f"{other.dtype}, as {whose}")
    check_device(name, x, other, whose)


def can_look(x: Tensor) -> bool:
    """Tell whether the host can read a tensor's values without waiting: on a CPU, unless it is traced."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def check_sequences(name: str, starts: Tensor, total: int, x: Tensor, whose: str, longest: int | None = None) -> None:
    """Check the first rows of packed sequences, ``starts``, and that none is longer than ``longest``.

    On another device than a CPU looking would wait: there the values are the caller's promise.
    """
    check_tensor(name, starts, "(B + 1,)", (torch.int32,))
    if starts.shape[0] == 0 or (starts.shape[0] == 1 and total > 0):
        raise wrong(f"{name}.shape", starts.shape, f"(B + 1,), with sequences for {whose} {total} rows")
    if not starts.is_contiguous():
        raise wrong(f"{name}.stride()", starts.stride(), "(1,)")
    check_device(name, starts, x, whose)
    if longest is not None and total > (starts.shape[0] - 1) * longest:
        sequences = starts.shape[0] - 1
        at_least = f"at least {-(-total // max(sequences, 1))}: {sequences} sequences have {total} rows"
        raise wrong(name.replace("cu_seqlens", "max_seqlen"), longest, at_least)
    if can_look(starts):
        rows = starts.tolist()
        lengths = [end - start for start, end in pairwise(rows)]
        if rows[0] != 0 or rows[-1] != total or min(lengths, default=0) < 0:
            raise wrong(name, rows, f"in ascending order from 0 to {whose} {total} rows")
        if longest is not None and max(lengths, default=0) > longest:
            raise wrong(
                name.replace("cu_seqlens", "max_seqlen"), longest, f"at least {max(lengths)}, the longest sequence"
            )


def correlation(c: Any, elements: int) -> float:
    """Return ``c``; checks too the number of output elements of a sample, whose indices must fit one 32-bit word."""
    real = number("c", c)
    if not 0 <= real <= 0.25:
        raise wrong("c", real, "in [0, 1/4]")
    if elements > MAX_ELEMENTS:
        raise wrong("the number of output elements of one sample", elements, f"at most {MAX_ELEMENTS}")
    return real


def seed_tensor(seed: Any, batch: int, x: Tensor) -> Tensor:
    """Return the 64-bit key of every sample of x, int64 (batch,). An int is every sample's key."""
    if isinstance(seed, Tensor):
        check_tensor("seed", seed, "(B,)", (torch.int64,))
        if seed.shape[0] != batch:
            raise wrong("seed.shape", seed.shape, f"({batch},), one key for each sample")
        if seed.device != x.device:
            raise wrong("seed.device", seed.device, str(x.device))
        return seed
    if type(seed) is not int:
        if isinstance(seed, bool) or not isinstance(seed, (Integral, torch.SymInt)):
            raise wrong_type("seed", seed, "an int64 tensor or an int")
        seed = seed if isinstance(seed, torch.SymInt) else int(seed)
    if not -(2**63) <= seed < 2**63:
        raise wrong("seed", seed, "a 64-bit signed integer")
    key: int = seed
    return torch.full((batch,), key, dtype=torch.int64, device=x.device)


def unchecked(kind: type[_T], *values: Any) -> _T:
    """Return a dataclass of values that are known to be right, without its checks."""
    made = object.__new__(kind)
    for name, value in zip(kind.__match_args__, values, strict=True):  # type: ignore[attr-defined]
        object.__setattr__(made, name, value)  # as the __init__ of a frozen dataclass does
    return made


def device_of(name: str, device: Any) -> torch.device:
    """Return a device given as one or by its name."""
    if isinstance(device, torch.device):
        return device
    if not isinstance(device, str):
        raise wrong_type(name, device, "a torch.device or its name")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise wrong(name, device, "a torch.device or its name") from error


def grid_sides(grid: Any) -> tuple[int, int]:
    """Return the sides of a grid, h and w."""
    h, w = members("grid", grid, 2, "(h, w), two positive ints")
    return integer("grid", h, 1), integer("grid", w, 1)


def members(name: str, value: Any, count: int, allowed: str) -> Sequence[Any]:
    """Return a tuple or list of ``count`` members."""
    if not isinstance(value, (tuple, list)):
        raise wrong_type(name, value, allowed)
    if len(value) != count:
        raise wrong(name, value, allowed)
    return value
