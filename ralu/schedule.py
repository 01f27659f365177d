"""Noise-timestep matching: when each stage starts and ends, and how much noise goes in between. Numbers only.

Time t runs from 0 (noise) to 1 (image); sigma = 1 - t. Equations: the paper's supplement (arXiv 2507.08422).
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np


def shifted(u, h):
    """Timestep shift of a noise level: h·u / (1 + (h-1)·u). `shifted(s, 1 / h)` undoes it."""
    return h * u / (1 + (h - 1) * u)


@dataclass(frozen=True)
class Transition:
    """The move from a stage's end e to the next stage's start s (Eq. S11).

    next = scale · Up(x) + noise_scale · z with z ~ N(0, I - c·Sigma), which has the flow's mean and covariance at s.
    """

    start: float
    scale: float
    noise_scale: float
    c: float


MATCHINGS = ("covariance", "snr", "off")


def transition(end: float, c: float, matching: str = "covariance") -> Transition:
    """Eq. S10-S11 for a stage that ended at time `end` in (0, 1), with 0 < c <= 1/4.

    matching: "covariance" is the paper's. The others are for comparison: "snr" goes back to the same start, with white
    noise (c = 0) of the same variance, (1 - start)² in all; "off" neither goes back nor adds noise.
    """
    if not 0 < end < 1:
        raise ValueError(f"end must lie strictly between 0 and 1, got {end}")
    if not 0 < c <= 0.25:
        raise ValueError(f"c must lie in (0, 1/4], got {c}")
    if matching not in MATCHINGS:
        raise ValueError(f"matching must be one of {', '.join(MATCHINGS)}, got {matching!r}")
    if matching == "off":
        return Transition(start=end, scale=1.0, noise_scale=0.0, c=0.0)
    delta = (1 - end) / math.sqrt(c)
    move = Transition(start=end / (delta + end), scale=1 / (delta + end), noise_scale=delta / (delta + end), c=c)
    return move if matching == "covariance" else replace(move, noise_scale=move.noise_scale * math.sqrt(1 - c), c=0.0)


@dataclass(frozen=True)
class Schedule:
    """Three stages: half resolution, mixed resolution, full resolution.

    steps:    transformer calls of each stage, for example (4, 5, 6).
    ends:     time at which each stage ends; the last is 1.
    shifts:   timestep shift h of each stage.
    c:        share of correlated noise, in (0, 1/4].
    ratio:    share of the low-resolution tokens that are upsampled early, in [0, 1].
    matching: what happens between stages, see `transition`.
    """

    steps: tuple[int, int, int]
    ends: tuple[float, float, float]
    shifts: tuple[float, float, float]
    c: float
    ratio: float = 0.2
    matching: str = "covariance"

    def __post_init__(self):
        _check(self.steps, self.ends)
        for name, kind in (("steps", int), ("ends", float), ("shifts", float)):
            object.__setattr__(self, name, tuple(map(kind, getattr(self, name))))
        if len(self.shifts) != 3 or min(self.shifts) <= 0:
            raise ValueError(f"shifts must be three positive numbers, got {self.shifts}")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must lie in [0, 1], got {self.ratio}")
        _ = self.transitions  # checks c and matching

    @property
    def transitions(self) -> tuple[Transition, Transition]:
        """From stage 1 to 2 and from 2 to 3."""
        return tuple(transition(end, self.c, self.matching) for end in self.ends[:2])

    @property
    def starts(self) -> tuple[float, float, float]:
        """Time at which each stage starts."""
        return (0.0, *(move.start for move in self.transitions))

    def sigmas(self, stage: int) -> list[float]:
        """The noise levels of stage 1, 2 or 3: steps + 1 values, evenly spaced before the stage's shift."""
        start, end, h, n = (values[stage - 1] for values in (self.starts, self.ends, self.shifts, self.steps))
        first, last = shifted(1 - start, 1 / h), shifted(1 - end, 1 / h)
        inner = [shifted(first + (last - first) * i / n, h) for i in range(1, n)]
        return [1 - start, *inner, 1 - end]  # the ends exactly, not shifted back and forth


def _check(steps, ends):
    if len(steps) != 3 or any(int(n) != n or n < 1 for n in steps):
        raise ValueError(f"steps must be three whole numbers of at least 1, got {tuple(steps)}")
    if len(ends) != 3 or not 0 < ends[0] < ends[1] < ends[2] == 1:
        raise ValueError(f"ends must be three increasing times, the last 1, got {tuple(ends)}")


def _pdf(t, h):
    """Density of time when noise levels are drawn evenly and shifted by h."""
    return h / (1 + (h - 1) * t) ** 2


def _truncated(t, h, start, end):
    """That density restricted to [start, end] and normalised; its integral is t / (1 + (h-1)·t) · h."""
    mass = h * (end / (1 + (h - 1) * end) - start / (1 + (h - 1) * start))
    return np.where((t >= start) & (t <= end), _pdf(t, h) / mass, 0.0)


def densities(schedule: Schedule, shift: float, points: int = 1000):
    """Times t, the density of denoising work the flow asks for (Eq. 11) and the one the schedule gives (Eq. 12).

    Times that a transition goes back over are asked for twice. Returns three arrays of shape (points,).
    """
    t = np.linspace(0, 1, points)
    starts, ends, steps = schedule.starts, schedule.ends, schedule.steps
    overlaps = [(starts[k + 1], ends[k]) for k in range(2)]
    target = _pdf(t, shift) + sum((end - start) * _truncated(t, shift, start, end) for start, end in overlaps)
    target = target / (1 + sum(end - start for start, end in overlaps))
    stages = zip(steps, schedule.shifts, starts, ends, strict=True)
    achieved = sum(n * _truncated(t, h, start, end) for n, h, start, end in stages) / sum(steps)
    return t, target, achieved


def solve(steps, ends, shift: float = 3.0, ratio: float = 0.2) -> Schedule:
    """The schedule whose shifts h and noise share c minimise the Jensen-Shannon distance to the target (Eq. S12).

    steps: transformer calls of each of the three stages (not cumulative). ends: time at which each stage ends, the last
    1. shift: the model's own timestep shift (3 for FLUX.1-dev and SD3, 1 for FLUX.1-schnell). ratio is passed on.
    Raises ValueError for numbers out of range. Bounded quasi-Newton over h in [0.5, 10] and 1/sqrt(c) in [2, 100].
    """
    steps, ends = tuple(steps), tuple(ends)
    _check(steps, ends)
    if shift <= 0:
        raise ValueError(f"shift must be positive, got {shift}")
    return replace(_minimise(steps, ends, float(shift)), ratio=ratio)


@lru_cache
def _minimise(steps, ends, shift: float) -> Schedule:
    from scipy.optimize import minimize
    from scipy.spatial.distance import jensenshannon

    def schedule(x):
        return Schedule(steps, ends, tuple(x[:3]), float(min(0.25, x[3] ** -2)))

    def distance(x):
        _, target, achieved = densities(schedule(x), shift)
        return jensenshannon(target, achieved)

    found = minimize(distance, x0=[3.0, 3.0, 3.0, 2.0], bounds=[(0.5, 10)] * 3 + [(2, 100)], method="L-BFGS-B")
    return schedule(found.x)


def _cumulative(*totals):
    return tuple(b - a for a, b in zip((0, *totals), totals, strict=False))


# Table S1. The distilled models' shifts are solved for each model's own timestep shift, see `preset`.
PRESETS = {
    "flux-5x": Schedule(_cumulative(4, 9, 15), (0.3, 0.45, 1.0), (5.12, 2.64, 2.25), 0.0177, ratio=0.2),
    "flux-7x": Schedule(_cumulative(2, 5, 10), (0.2, 0.3, 1.0), (8.14, 2.86, 2.19), 0.0255, ratio=0.2),
    "sd3-2x": Schedule(_cumulative(5, 11, 20), (0.2, 0.3, 1.0), (6.21, 2.23, 1.97), 0.0586, ratio=0.3),
    "sd3-3x": Schedule(_cumulative(3, 6, 12), (0.25, 0.3, 1.0), (6.40, 2.60, 2.23), 0.0255, ratio=0.2),
}
DISTILLED = {"distilled-4": (_cumulative(1, 2, 4), (0.3, 0.45, 1.0))}


def presets(family: str) -> list[str]:
    """The names of the presets for "flux" or "sd3", the default one first."""
    return [*(name for name in PRESETS if name.startswith(f"{family}-")), *DISTILLED]


def preset(name: str, shift: float = 1.0, ratio: float | None = None) -> Schedule:
    """A named schedule of the paper.

    shift: the model's own, which matters for "distilled-4" alone: 1 for FLUX.1-schnell, 3 for SD3.5-large-turbo.
    ratio: replaces the preset's.
    """
    if name in PRESETS:
        chosen = PRESETS[name]
    elif name in DISTILLED:
        chosen = solve(*DISTILLED[name], shift=shift)
    else:
        raise ValueError(f"preset must be one of {', '.join([*PRESETS, *DISTILLED])}, got {name!r}")
    return chosen if ratio is None else replace(chosen, ratio=ratio)
