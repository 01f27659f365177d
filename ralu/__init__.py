"""RALU: training-free region-adaptive latent upsampling for FLUX and SD3 (arXiv 2507.08422)."""

from importlib import import_module
from typing import TYPE_CHECKING

from .budget import schedule_for
from .errors import lacking
from .mini import mini_path, mini_pipeline
from .options import Options
from .presets import PRESETS, preset
from .schedule import Schedule, solve

if TYPE_CHECKING:
    from ralu_kernels import attention_backend

    from .blocks import fuse, unfuse
    from .caches import RAS, DeltaDiT, TaylorSeer, TeaCache, ToCa
    from .cost import estimate
    from .method import Method
    from .pipeline import disable, enable
    from .scheduler import RaluScheduler
    from .stages import Layout, sample

__all__ = [
    "PRESETS",
    "RAS",
    "DeltaDiT",
    "Layout",
    "Method",
    "Options",
    "RaluScheduler",
    "Schedule",
    "TaylorSeer",
    "TeaCache",
    "ToCa",
    "attention_backend",
    "disable",
    "enable",
    "estimate",
    "fuse",
    "mini_path",
    "mini_pipeline",
    "preset",
    "sample",
    "schedule_for",
    "solve",
    "unfuse",
]

# Torch and diffusers take seconds to import; the schedule's numbers and `ralu --help` do without them.
_HOMES = {
    "Layout": ".stages",
    "Method": ".method",
    "RaluScheduler": ".scheduler",
    "attention_backend": "ralu_kernels",
    "disable": ".pipeline",
    "enable": ".pipeline",
    "estimate": ".cost",
    "fuse": ".blocks",
    "sample": ".stages",
    "unfuse": ".blocks",
    "DeltaDiT": ".caches",
    "TaylorSeer": ".caches",
    "RAS": ".caches",
    "TeaCache": ".caches",
    "ToCa": ".caches",
    "__version__": "ralu_kernels",
    "SchedulerMixin": ".scheduler",  # diffusers looks it up beside RaluScheduler, to load a saved one
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name], __name__), name)
    except ModuleNotFoundError as error:
        raise lacking(error, f"ralu.{name}") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
