"""Schedules with names: RALU's own, and those of the methods it is compared with. Numbers only."""

import math
from itertools import pairwise
from typing import Any, NamedTuple

from .schedule import Schedule, bottleneck, region_adaptive, solve, two_resolutions


def _differences(*totals: int) -> tuple[int, ...]:
    return tuple(b - a for a, b in pairwise((0, *totals)))


class Solved(NamedTuple):
    """A preset that is solved for a model's own timestep shift.

    shift: of the models it is for, of those that shift by resolution at 1024 px in a stock run; None where they differ.
    """

    steps: tuple[int, ...]
    ends: tuple[float, ...]
    shift: float | None = None


# Table S1, which gives cumulative steps.
PRESETS = {
    "flux-5x": region_adaptive(_differences(4, 9, 15), (0.3, 0.45, 1.0), (5.12, 2.64, 2.25), 0.0177, ratio=0.2),
    "flux-7x": region_adaptive(_differences(2, 5, 10), (0.2, 0.3, 1.0), (8.14, 2.86, 2.19), 0.0255, ratio=0.2),
    "sd3-2x": region_adaptive(_differences(5, 11, 20), (0.2, 0.3, 1.0), (6.21, 2.23, 1.97), 0.0586, ratio=0.3),
    "sd3-3x": region_adaptive(_differences(3, 6, 12), (0.25, 0.3, 1.0), (6.40, 2.60, 2.23), 0.0255, ratio=0.2),
}
# What `solve` finds for the shifts of FLUX.1-schnell and SD3.5-large-turbo. The minimum is flat and has kinks, so that
# a processor's rounding moves it by a percent, and images with it: these are the same everywhere.
_SOLUTIONS = {
    ("distilled-4", 1.0): ((1.007704080219396, 0.5675231984300045, 0.864008966471574), 0.25),
    ("distilled-4", 3.0): ((4.584506000881206, 2.2768537650242657, 2.6073826201615926), 0.0006234145791643087),
}
# The ends are FLUX.1's at the same share of a stock run.
SOLVED = {
    "flux2-5x": Solved((4, 5, 6), (0.145, 0.245, 1.0), 7.56), "flux2-7x": Solved((2, 3, 5), (0.09, 0.145, 1.0), 7.56),
    "qwen-5x": Solved((4, 5, 6), (0.391, 0.551, 1.0), 2.0), "qwen-7x": Solved((2, 3, 5), (0.273, 0.391, 1.0), 2.0),
    "zimage-2x": Solved((1, 2, 3), (0.3, 0.45, 1.0), 3.0),
    "zimage-5x": Solved((4, 5, 6), (0.176, 0.29, 1.0), 6.0), "zimage-7x": Solved((2, 3, 5), (0.111, 0.176, 1.0), 6.0),
    "klein-4": Solved((1, 1, 2), (0.115, 0.199, 1.0), 9.89), "distilled-4": Solved((1, 1, 2), (0.3, 0.45, 1.0)),
}  # fmt: skip
DISTILLED = ("klein-4", "distilled-4")  # of the models of four steps

# FLUX shifts by the number of tokens: what `FluxPipeline` does at 1024 px and, in the low stages, at 512.
_FLUX_FULL, _FLUX_LOW, _SD3 = math.exp(1.15), math.exp(0.63), 3.0

# Bottleneck Sampling's steps are those of the RALU paper, cumulative (supplement B.2.1); see `bottleneck` for the rest.
_BOTTLENECK_FLUX = (0.85, 0.5), (_FLUX_FULL, _FLUX_LOW, _FLUX_FULL)
_BOTTLENECK_SD3 = (0.95, 0.5), (_SD3, _SD3, _SD3)
BASELINES = {
    "bottleneck-flux-5x": bottleneck(_differences(4, 16, 21), *_BOTTLENECK_FLUX),
    "bottleneck-flux-7x": bottleneck(_differences(3, 11, 15), *_BOTTLENECK_FLUX),
    "bottleneck-sd3-2x": bottleneck(_differences(6, 24, 31), *_BOTTLENECK_SD3),
    "bottleneck-sd3-3x": bottleneck(_differences(4, 16, 20), *_BOTTLENECK_SD3),
    # SPEED's transition; `preset` tells where the steps and the end are from.
    "speed-flux-5x": two_resolutions((11, 6), 0.45, (_FLUX_LOW, _FLUX_FULL), 0.25),
    "speed-flux-7x": two_resolutions((6, 5), 0.3, (_FLUX_LOW, _FLUX_FULL), 0.25),
    "speed-sd3-2x": two_resolutions((16, 9), 0.3, (_SD3, _SD3), 0.25),
    "speed-sd3-3x": two_resolutions((8, 6), 0.3, (_SD3, _SD3), 0.25),
}


def known_shift(name: Any) -> float:
    """Return the timestep shift of the models that a preset is for, where they shift by resolution: as a rule 3."""
    return (SOLVED[name].shift if isinstance(name, str) and name in SOLVED else None) or 3.0


def preset(
    name: str,
    shift: float | None = None,
    ratio: float | None = None,
    *,
    matching: str = "covariance",
    upsampler: str = "nearest",
) -> Schedule:
    """Return a named schedule: RALU's of the paper, or one of the methods it is compared with.

    "bottleneck-..." are Bottleneck Sampling's at the paper's steps, see `ralu.schedule.bottleneck` for what the paper
    leaves open. "speed-..." have SPEED's transition (arXiv 2605.18736, Haar basis), see `two_resolutions`. Their steps
    are chosen here, for the work of the RALU preset of that name: as many full steps, and so many low ones that 1024 px
    cost as much to within 1.5 %, attention included. They become full at the time at which that preset does, under the
    model's own shift at each resolution.

    shift: the model's own, which matters for the names in `SOLVED` alone; None for the one that is known of them. With
           "distilled-4" it is 1 for FLUX.1-schnell, as by default, and 3 for SD3.5-large-turbo.
    ratio: replaces the preset's. matching, upsampler: for comparison, see `match_noise`. All three of RALU's alone.
    Raises ValueError for an unknown name or a value out of range, and ImportError where SciPy is needed and absent.
    """
    if name in BASELINES:
        if ratio is not None or matching != "covariance" or upsampler != "nearest":
            raise ValueError(f"{name} has whole stages alone and has no ratio, matching, upsampler")
        return BASELINES[name]
    if name in PRESETS:
        plain = PRESETS[name]
        given = plain.steps, plain.ends, plain.shifts, plain.c, plain.ratio
        schedule = region_adaptive(*given, matching=matching, upsampler=upsampler)
    elif name in SOLVED:
        steps, ends, known = SOLVED[name]
        own = known or 1.0 if shift is None else shift
        h, c = _SOLUTIONS.get((name, own)) or _solution(steps, ends, own)
        schedule = region_adaptive(steps, ends, h, c, matching=matching, upsampler=upsampler)
    else:
        raise ValueError(f"preset must be one of {', '.join([*PRESETS, *SOLVED, *BASELINES])}, got {name!r}")
    return schedule if ratio is None else schedule.replace(ratio=ratio)


def _solution(steps, ends, shift: float):
    solved = solve(steps, ends, shift)
    return solved.shifts, solved.c
