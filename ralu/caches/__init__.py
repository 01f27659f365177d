"""Temporal methods: a cache lets some transformer calls reuse what earlier ones computed. One file each.

A cache is a frozen dataclass whose fields are its options, of type int, float, bool or str. This package and the
modules in it import nothing heavy before a cache is applied.
"""

from .base import CACHES, Cache, Progress, register
from .delta_dit import DeltaDiT
from .ras import RAS
from .taylorseer import TaylorSeer
from .teacache import TeaCache
from .toca import ToCa

__all__ = ["CACHES", "RAS", "Cache", "DeltaDiT", "Progress", "TaylorSeer", "TeaCache", "ToCa", "register"]
