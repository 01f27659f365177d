"""Builds ralu_kernels.ralu_kernels_C, the compiled kernels; everything else about the package is in pyproject.toml.

RALU_NATIVE=0 installs pure Python, 1 makes a build that cannot be an error. Unset: built where it can be.
RALU_CUDA=0 leaves the CUDA kernels out, 1 makes it an error if they cannot be built. Unset: built where torch has CUDA
    and a toolkit is found.
TORCH_CUDA_ARCH_LIST as for every PyTorch extension. Unset: the GPUs that are here; without any, all supported ones.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"ralu: setuptools {setuptools.__version__} is too old to read pyproject.toml. Leave --no-build-isolation out, "
        'and pip takes a newer one by itself; or first: pip install "setuptools>=77" wheel ninja'
    )

# pip builds apart from what is installed; the extension has to fit the PyTorch of the environment that it is for.
sys.path += {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}.difference(sys.path)

PACKAGE = "ralu_kernels"  # which looks for an extension of its own name
ARCHITECTURES = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
# libtorch's stable ABI as of PyTorch 2.10 and, by py_limited_api, Python's: one binary serves all later ones.
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("TORCH_STABLE_ONLY", None)]
# Nobody reads errno or traps of these loops; both would keep them from becoming SIMD.
CXX_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]
if platform.machine() == "x86_64":  # GCC 12 warns of its own AVX-512 header, for pages
    CXX_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]

# PyTorch forbids the conversions of half precision that these kernels use.
NVCC_FLAGS = ["-O3", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]


def why_no_native() -> str | None:
    if platform.system() == "Windows":
        return "Windows is not served"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded Python has no limited API"
    if not shutil.which((os.environ.get("CXX") or "c++").split()[0]):
        return "no C++ compiler is on the PATH"
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return "Python's headers are not installed"
    try:
        import torch
    except ImportError:
        return "torch cannot be imported while building: install it first, and build with --no-build-isolation"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    return None


def find_toolkit() -> str | None:
    """The CUDA toolkit: CUDA_HOME, or that of the nvcc on the PATH, which may be a script that starts another one."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named or not shutil.which("nvcc"):
        from torch.utils.cpp_extension import CUDA_HOME

        return named or CUDA_HOME
    said = subprocess.run(["nvcc", "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ _?TOP=(.+)$", said, re.M)
    return os.path.realpath(top[1].strip()) if top else None


def why_no_cuda() -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    home = find_toolkit()
    nvcc = f"{home}/bin/nvcc"
    if not os.path.exists(nvcc):
        return "no CUDA toolkit is found (CUDA_HOME, or nvcc on the PATH)"
    if not any(glob(f"{home}/{lib}/libcudart.so") for lib in ("lib64", "lib", "targets/*/lib")):
        return f"{home} has no lib64/libcudart.so to link with (CUDA_HOME can name another toolkit)"
    release = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if not release or release[1] != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is not of CUDA {torch.version.cuda}, with which torch is built"
    if not (torch.cuda.is_available() or os.environ.get("TORCH_CUDA_ARCH_LIST") or architectures(nvcc)):
        return f"{nvcc} knows none of the GPUs {', '.join(ARCHITECTURES)}: TORCH_CUDA_ARCH_LIST can name others"
    return None


def wanted(switch: str, what: str, obstacle) -> bool:
    """Whether to build `what`, said aloud with the reason."""
    asked = os.environ.get(switch, "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"{switch} must be 0 or 1, got {asked!r}")
    reason = f"{switch}=0" if asked == "0" else obstacle()
    if reason and asked == "1":
        raise SystemExit(f"ralu: {switch}=1, but {what} cannot be built: {reason}")
    print(f"ralu: {what}: " + (f"not built, since {reason}" if reason else "built"))
    return reason is None


def architectures(nvcc: str) -> str:
    """Those that this toolkit knows, and PTX for what comes later; empty if it knows none."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    numbers = set(re.findall(r"compute_(\d+)", known))
    served = ";".join(a for a in ARCHITECTURES if a.replace(".", "") in numbers)
    return served and served + "+PTX"


def extension() -> dict:
    if not wanted("RALU_NATIVE", "the C++ kernels", why_no_native):
        editable = {"editable_wheel", "develop"} & set(sys.argv)
        for left in glob(f"{PACKAGE}/*_C*.so") if editable else ():  # by an earlier one: it would still be imported
            print(f"ralu: removing {left}")
            os.remove(left)
        return {}
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    kind, sources = CppExtension, ["csrc/binding.cpp", *glob("csrc/cpu/*.cpp")]
    macros, flags = MACROS, {"cxx": CXX_FLAGS}
    if wanted("RALU_CUDA", "the CUDA kernels", why_no_cuda):
        cpp_extension.CUDA_HOME = find_toolkit()  # PyTorch guesses it from the place of nvcc on the PATH
        kind, sources = CUDAExtension, [*sources, *glob("csrc/cuda/*.cu")]
        macros, flags = [*macros, ("RALU_CUDA", None), ("USE_CUDA", None)], {**flags, "nvcc": NVCC_FLAGS}
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(f"{cpp_extension.CUDA_HOME}/bin/nvcc"))
    module = kind(
        f"{PACKAGE}.{PACKAGE}_C", sorted(sources), define_macros=macros, extra_compile_args=flags,
        depends=glob("csrc/**/*h", recursive=True), py_limited_api=True,
    )  # fmt: skip
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def readme() -> str:
    """The README with addresses for its links into the repository, which a package index does not have."""
    url = re.search(r'^Repository = "(.*)"', Path("pyproject.toml").read_text(), re.MULTILINE)[1]
    return re.sub(
        r"\]\((?!https?://)([^)]+)\)",
        lambda link: f"]({url}/{'raw' if link[1].endswith('.png') else 'blob'}/main/{link[1]})",
        Path("README.md").read_text(encoding="utf-8"),
    )


setuptools.setup(long_description=readme(), long_description_content_type="text/markdown", **extension())
