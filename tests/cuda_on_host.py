"""The CUDA operations without a GPU: csrc/cuda/*.cu themselves, compiled for the host by way of cuda_on_host.h."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# cuda_on_host.h says what these would.
EMPTY_HEADERS = (
    "cuda_runtime.h",
    "torch/csrc/stable/accelerator.h",
    "torch/csrc/stable/macros.h",
    "torch/csrc/stable/tensor.h",
    "torch/headeronly/util/Exception.h",
)


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
        ("dtype", ctypes.c_int32),
    )


def toolkit() -> Path:
    nvcc = shutil.which("nvcc") or pytest.skip("no CUDA toolkit: nvcc is not on the PATH")
    answer = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = next(line.partition("TOP=")[2] for line in answer.splitlines() if "TOP=" in line)
    return Path(top.strip())


@cache
def library() -> ctypes.CDLL:
    include = toolkit() / "include"
    compiler = shutil.which("g++") or pytest.skip("no C++ compiler: g++ is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        for name in EMPTY_HEADERS:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-x", "c++"]
        flags += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]  # a GPU would trap too
        paths = ["-include", TESTS / "cuda_on_host.h", f"-I{folder}", f"-I{CSRC}", "-isystem", include]
        out = Path(folder, "cuda_on_host.so")
        subprocess.run([compiler, *flags, *paths, *SOURCES, TESTS / "cuda_on_host.cpp", "-o", out], check=True)
        return ctypes.CDLL(str(out))


def _c(argument):
    if isinstance(argument, torch.Tensor):
        code = DTYPES.index(argument.dtype) if argument.dtype in DTYPES else len(DTYPES)
        return ctypes.byref(Tensor(argument.data_ptr(), tuple(argument.shape), argument.stride(), code))
    if argument is None:
        return None
    kind = {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_double}[type(argument)]
    return kind(argument)


def _plan_tokens(*arguments):
    *others, threshold = map(_c, arguments)
    library().plan_tokens(*others, None if threshold is None else ctypes.byref(threshold))


def operations() -> SimpleNamespace:
    """Stand in for torch.ops.ralu_kernels_C."""
    names = ("upsample_renoise", "upsample_selected", "upsample_remaining", "canny")
    run = {name: lambda *arguments, name=name: getattr(library(), name)(*map(_c, arguments)) for name in names}
    return SimpleNamespace(**run, plan_tokens=_plan_tokens)
