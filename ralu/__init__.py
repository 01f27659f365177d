"""RALU: training-free region-adaptive latent upsampling for FLUX and Stable Diffusion 3 (arXiv 2507.08422)."""

from .mini import mini_path
from .pipeline import disable, enable
from .schedule import PRESETS, Schedule, preset, solve
from .scheduler import Layout, RaluScheduler, sample

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Layout",
    "RaluScheduler",
    "Schedule",
    "disable",
    "enable",
    "mini_path",
    "preset",
    "sample",
    "solve",
]
