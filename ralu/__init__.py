"""RALU: training-free region-adaptive latent upsampling for FLUX and SD3 (arXiv 2507.08422)."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .mini import mini_path
from .schedule import PRESETS, Schedule, preset, solve

if TYPE_CHECKING:
    from ralu_kernels import attention_backend

    from .blocks import fuse, unfuse
    from .cost import estimate
    from .pipeline import disable, enable
    from .scheduler import Layout, RaluScheduler, sample

# The one version is ralu_kernels'; read, since importing it would import torch.
__version__ = re.search(r'^__version__ = "(.+)"', Path(find_spec("ralu_kernels").origin).read_text(), re.M)[1]
__all__ = [
    "PRESETS",
    "Layout",
    "RaluScheduler",
    "Schedule",
    "attention_backend",
    "disable",
    "enable",
    "estimate",
    "fuse",
    "mini_path",
    "preset",
    "sample",
    "solve",
    "unfuse",
]

# Torch and diffusers take seconds to import; the schedule's numbers and `ralu --help` do without them.
_HOMES = {
    "Layout": ".scheduler",
    "RaluScheduler": ".scheduler",
    "attention_backend": "ralu_kernels",
    "disable": ".pipeline",
    "enable": ".pipeline",
    "estimate": ".cost",
    "fuse": ".blocks",
    "sample": ".scheduler",
    "unfuse": ".blocks",
    "SchedulerMixin": ".scheduler",  # diffusers looks it up beside RaluScheduler, to load a saved one
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
