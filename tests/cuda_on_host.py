"""The CUDA operations without a GPU: csrc/cuda/*.cu themselves, compiled for the host by way of cuda_on_host.h."""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

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


def including(sources) -> str:
    """One source that is all of them: what they include is read once."""
    return "".join(f'#include "{source}"\n' for source in sources)


@cache
def library() -> ctypes.CDLL:
    """Compiled by whichever process of the tests is first, and again when the code has changed."""
    include = toolkit() / "include"
    compiler = shutil.which("g++") or pytest.skip("no C++ compiler: g++ is not on the PATH")
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-pthread"]
    flags += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]  # a GPU would trap too
    used = sorted(path for path in [*CSRC.glob("*.h"), *CSRC.glob("cuda/*"), *TESTS.glob("cuda_on_host*")])
    key = hashlib.sha256(b"".join(path.read_bytes() for path in used) + str(include).encode()).hexdigest()
    folder = TESTS.parent / "build/cuda_on_host"
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{key[:16]}.so"
    with FileLock(folder / "lock"), tempfile.TemporaryDirectory(dir=folder) as scratch:
        if not out.exists():
            for name in EMPTY_HEADERS:
                path = Path(scratch, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            Path(scratch, "all.cpp").write_text(including([*SOURCES, TESTS / "cuda_on_host.cpp"]))
            paths = ["-include", TESTS / "cuda_on_host.h", f"-I{scratch}", f"-I{CSRC}", "-isystem", include]
            subprocess.run([compiler, *flags, *paths, f"{scratch}/all.cpp", "-o", f"{scratch}/all.so"], check=True)
            Path(scratch, "all.so").replace(out)
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
