"""`ralu info`: what is installed, what runs on which device, and what is missing and why."""

import argparse
import os
import platform
from importlib import metadata

from ..mini import NAMES, cache_folder
from . import arguments

PACKAGES = (
    "ralu", "torch", "triton", "diffusers", "transformers", "accelerate", "numpy", "scipy", "opencv-python-headless",
    "pyiqa", "flash-attn",
)  # fmt: skip


def add(commands):
    """Add the command to the command line."""
    arguments.add_command(
        commands,
        run,
        "info",
        "show versions, backends and models, and what is missing",
        "For bug reports, and to see which kernels run here.",
        "  ralu info",
    )


def run(args: argparse.Namespace):
    """Print a block for each concern. What is absent or broken is said, and is no error."""
    _print("versions", {"Python": platform.python_version()} | {p: _version(p) for p in PACKAGES})
    try:
        import torch
    except ImportError as error:
        _print("device", {"torch": f"cannot be imported: {error}"})
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [torch.device("cpu"), *([accelerator] if accelerator else [])]
    _print("devices", {str(device): _described(device) for device in devices})
    try:
        from ralu_kernels import _backend, attention
    except ImportError as error:
        _print("ralu_kernels", {"broken": str(error)})
        return
    extension = _backend._extension
    where = extension and f"{extension.__file__}, with{'out' * (not extension.cuda)} CUDA"
    _print("compiled extension", {_backend._EXTENSION: where or _backend.why_no_extension()})
    for device in devices:
        reasons = {name: why(device) for name, why in _backend._ABSENT.items()}
        lines = {name: why or "available" for name, why in reasons.items()}
        _print(f"backends of ralu_kernels on {device}", lines | {"auto": f"is {_backend.resolve('auto', device)}"})
        query = torch.empty(0, 1, 64, dtype=torch.bfloat16, device=device)
        lines = {name: attention._why_not(name, query) or "available" for name in attention.BACKENDS}
        _print(f"attention backends on {device}, in the order of auto", lines)
    _print("embedded models", {name: _packed(name) for name in NAMES} | {"unpacked": f"into {cache_folder()}"})


def _print(title: str, lines: dict[str, str]):
    width = max(map(len, lines))
    print(f"{title}\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in lines.items()) + "\n")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _packed(name: str) -> str:
    from ..mini import unpack

    try:
        unpack.packed(name)
    except FileNotFoundError as error:
        return str(error)
    return str(unpack.WEIGHTS / name)


def _described(device) -> str:
    import torch

    if device.type == "cpu":
        return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, " + (
            f"{torch.get_num_threads()} threads"
        )
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"
    return "available"
