"""Schedules: when each stage starts and ends, and how noise is matched between stages. Numbers only.

Time t runs from 0 (noise) to 1 (image); sigma = 1 - t. Equations: the paper's supplement (arXiv 2507.08422).
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

RESOLUTIONS = {"low": "half resolution", "mixed": "mixed resolution", "full": "full resolution"}
KINDS = {
    "renoise": (("low", "full"),),
    "select": (("low", "mixed"),),
    "complete": (("mixed", "full"),),
    "resample": (("full", "low"), ("low", "full")),
}
MATCHINGS = ("covariance", "snr", "off")
SMOOTH = ("bilinear", "bicubic", "lanczos")
INTERPOLATIONS = ("nearest", *SMOOTH, "pixels")


def shifted(u, h):
    """Shift a noise level u by a timestep shift h: h·u / (1 + (h-1)·u). `shifted(s, 1 / h)` undoes it."""
    return h * u / (1 + (h - 1) * u)


def own_shift(scheduler: Mapping[str, Any], known: float = 3.0) -> float:
    """Read a model's own timestep shift off its scheduler's configuration.

    known: what it is where it depends on the resolution. FLUX.1-dev reaches 3 at 1024 px by the paper's tables.
    """
    return known if scheduler.get("use_dynamic_shifting") else float(scheduler.get("shift", 1.0))


@dataclass(frozen=True)
class Stage:
    """Transformer calls at one resolution.

    resolution: "low" is half the image's height and width, "full" its own, "mixed" has tokens of both.
    steps:      transformer calls.
    end:        time at which the stage ends, in (0, 1].
    shift:      timestep shift h of the noise levels inside the stage, positive.

    Raises ValueError for what is not as described.
    """

    resolution: str
    steps: int
    end: float
    shift: float

    def __post_init__(self):
        if self.resolution not in RESOLUTIONS:
            raise ValueError(f"resolution must be one of {', '.join(RESOLUTIONS)}, got {self.resolution!r}")
        if not _is_number(self.steps) or int(self.steps) != self.steps or self.steps < 1:
            raise ValueError(f"steps must be whole numbers of at least 1, got {self.steps!r}")
        if not _is_number(self.end) or not 0 < self.end <= 1:
            raise ValueError(f"ends must be times in (0, 1], got {self.end!r}")
        if not _is_number(self.shift) or self.shift <= 0:
            raise ValueError(f"shifts must be positive numbers, got {self.shift!r}")
        for name, kind in (("steps", int), ("end", float), ("shift", float)):
            object.__setattr__(self, name, kind(getattr(self, name)))


@dataclass(frozen=True)
class Transition:
    """The transition from one stage to the next.

    kind:          "renoise" upsamples all tokens of a low stage, "select" the chosen ones, "complete" those that are
                   left of a mixed stage; "resample" resizes the clean estimate and adds fresh noise to it.
    start:         time at which the next stage starts, in [0, 1).
    scale:         a of Eq. S11, the factor of the upsampled sample (of "resample" the clean estimate's).
    noise_scale:   b, the factor of the noise z ~ N(0, I - c·Sigma).
    c:             correlation of the noise inside each 4x4 block that one value was upsampled to, in [0, 1/4].
    interpolation: how values are upsampled or resized, one of `INTERPOLATIONS`.

    Raises ValueError for what is not as described.
    """

    kind: str
    start: float
    scale: float
    noise_scale: float
    c: float = 0.0
    interpolation: str = "nearest"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        for name in ("start", "scale", "noise_scale", "c"):
            if not _is_number(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)!r}")
        if not 0 <= self.start < 1:
            raise ValueError(f"start must lie in [0, 1), got {self.start}")
        if not 0 <= self.c <= 0.25:
            raise ValueError(f"c must lie in [0, 1/4], got {self.c}")


def match_noise(
    kind: str, end: float, c: float, matching: str = "covariance", interpolation: str = "nearest"
) -> Transition:
    """Match noise and timestep after a stage that ended at time `end` in (0, 1), with 0 < c <= 1/4 (Eq. S10, S11).

    matching: "covariance" is the paper's. The others are for comparison: "snr" goes back to the same start, with white
    noise (c = 0) of the same variance, (1 - start)² in all; "off" neither goes back nor adds noise. A smooth
    interpolation needs "snr", and "pixels" needs "covariance". Raises ValueError for a value that is not as described.
    """
    if not _is_number(end) or not 0 < end < 1:
        raise ValueError(f"end must lie strictly between 0 and 1, got {end!r}")
    if not _is_number(c) or not 0 < c <= 0.25:
        raise ValueError(f"c must lie in (0, 1/4], got {c!r}")
    if matching not in MATCHINGS:
        raise ValueError(f"matching must be one of {', '.join(MATCHINGS)}, got {matching!r}")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"upsampler must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
    check_matching(interpolation, matching)
    if matching == "off":
        return Transition(kind, start=end, scale=1.0, noise_scale=0.0)
    delta = (1 - end) / math.sqrt(c)
    start, scale, noise_scale = end / (delta + end), 1 / (delta + end), delta / (delta + end)
    if matching == "snr":
        return Transition(kind, start, scale, noise_scale * math.sqrt(1 - c), 0.0, interpolation)
    return Transition(kind, start, scale, noise_scale, c, interpolation)


def check_matching(upsampler: str, matching: str | None):
    """Raise ValueError for a kind of matching that an upsampler does not go with; None is the default."""
    needed = {"pixels": "covariance", **dict.fromkeys(SMOOTH, "snr")}.get(upsampler)
    if needed not in (None, matching or MATCHINGS[0]):
        raise ValueError(f"upsampler={upsampler!r} needs matching={needed!r}, got {matching!r}")


def resample_noise(start: float, interpolation: str = "lanczos") -> Transition:
    """Go on at time `start` from the resized clean estimate: start·x0 + (1 - start)·noise (Bottleneck Sampling)."""
    return Transition("resample", start, scale=start, noise_scale=1 - start, interpolation=interpolation)


@dataclass(frozen=True)
class Schedule:
    """Stages of any resolutions, and the transitions between them.

    stages:      at least one; the last is at full resolution and ends at time 1.
    transitions: one fewer than stages. Each fits the resolutions it lies between and starts no later than it can.
    ratio:       share of the low-resolution tokens that "select" upsamples, in [0, 1].

    Both may be given as dicts of their fields, as a saved schedule has them. Raises ValueError for what does not fit.
    """

    stages: tuple[Stage, ...]
    transitions: tuple[Transition, ...] = ()
    ratio: float = 0.2

    def __post_init__(self):
        stages = tuple(_made(Stage, stage, "stages") for stage in self.stages)
        transitions = tuple(_made(Transition, transition, "transitions") for transition in self.transitions)
        if len(stages) != len(transitions) + 1:
            raise ValueError(f"transitions must be one fewer than the {len(stages)} stages, got {len(transitions)}")
        for (before, after), transition in zip(pairwise(stages), transitions, strict=True):
            if (before.resolution, after.resolution) not in KINDS[transition.kind]:
                leads = " or ".join(f"{first} to {second}" for first, second in KINDS[transition.kind])
                raise ValueError(
                    f"transitions of kind {transition.kind!r} lead from {leads}, "
                    f"got one from {before.resolution} to {after.resolution}"
                )
        for stage, start in zip(stages, (0.0, *(transition.start for transition in transitions)), strict=True):
            if not start < stage.end:
                raise ValueError(f"ends must be later than the stages' starts, got {stage.end} after {start}")
        if stages[-1].resolution != "full" or stages[-1].end != 1:
            raise ValueError(f"the last of the stages must be full and end at 1, got {stages[-1]}")
        if not _is_number(self.ratio) or not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must lie in [0, 1], got {self.ratio!r}")
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "transitions", transitions)

    @property
    def steps(self) -> tuple[int, ...]:
        """Transformer calls of each stage."""
        return tuple(stage.steps for stage in self.stages)

    @property
    def mixed(self) -> tuple[int, ...]:
        """Numbers of the mixed stages, from 1."""
        return tuple(k for k, stage in enumerate(self.stages, start=1) if stage.resolution == "mixed")

    @property
    def ends(self) -> tuple[float, ...]:
        """Time at which each stage ends."""
        return tuple(stage.end for stage in self.stages)

    @property
    def shifts(self) -> tuple[float, ...]:
        """Timestep shift of each stage."""
        return tuple(stage.shift for stage in self.stages)

    @property
    def starts(self) -> tuple[float, ...]:
        """Time at which each stage starts."""
        return (0.0, *(transition.start for transition in self.transitions))

    @property
    def c(self) -> float:
        """Correlation of the first transition's noise; 0 where there is none."""
        return self.transitions[0].c if self.transitions else 0.0

    def sigmas(self, stage: int) -> list[float]:
        """List the noise levels of a stage, counted from 1: steps + 1 values, even before the stage's shift."""
        k = stage - 1
        start, end, h, n = self.starts[k], self.ends[k], self.shifts[k], self.steps[k]
        first, last = shifted(1 - start, 1 / h), shifted(1 - end, 1 / h)
        inner = [shifted(first + (last - first) * i / n, h) for i in range(1, n)]
        return [1 - start, *inner, 1 - end]  # the ends exactly, not shifted back and forth

    def replace(self, *, steps=None, shifts=None, ratio: float | None = None) -> "Schedule":
        """Return a schedule with other steps or shifts, one for each stage, or another ratio."""
        changes: list[dict[str, Any]] = [{} for _ in self.stages]
        for name, values in (("steps", steps), ("shift", shifts)):
            if values is not None:
                for change, value in zip(changes, values, strict=True):
                    change[name] = value
        stages = (dataclasses.replace(stage, **change) for stage, change in zip(self.stages, changes, strict=True))
        return Schedule(tuple(stages), self.transitions, self.ratio if ratio is None else ratio)

    def to_dict(self) -> dict:
        """Return what JSON can hold and `Schedule(**...)` takes."""
        return dataclasses.asdict(self)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _made(kind: type, given, name: str):
    if isinstance(given, kind):
        return given
    if isinstance(given, dict):
        return kind(**given)
    raise TypeError(f"{name} must be {kind.__name__}s, got {given!r}")


def region_adaptive(
    steps, ends, shifts, c: float, ratio: float = 0.2, *, matching: str = "covariance", upsampler: str = "nearest"
) -> Schedule:
    """Make RALU's schedule: half resolution, mixed resolution, full resolution.

    steps, ends, shifts: three of each, as `Stage` has them; ends increase and the last is 1.
    c, matching, upsampler: of both transitions, see `match_noise`.
    Raises ValueError for numbers out of range.
    """
    steps, ends, shifts = _three("steps", steps), _three("ends", ends), _three("shifts", shifts)
    if not ends[0] < ends[1] < ends[2] == 1:
        raise ValueError(f"ends must be three increasing times, the last 1, got {ends}")
    stages = tuple(Stage(*values) for values in zip(RESOLUTIONS, steps, ends, shifts, strict=True))
    kinds = zip(("select", "complete"), ends, strict=False)
    return Schedule(stages, tuple(match_noise(kind, end, c, matching, upsampler) for kind, end in kinds), ratio)


def two_resolutions(
    steps, end: float, shifts, c: float, *, matching: str = "covariance", upsampler: str = "nearest"
) -> Schedule:
    """Make a schedule of two stages, half and full resolution, with no regions in between.

    steps, shifts: two of each. end: time at which the first stage ends. With c = 1/4 it is SPEED's (arXiv 2605.18736)
    with the Haar basis: from the noise level s = 1 - end it goes back to 2·s / (1 + s). Raises ValueError for numbers
    out of range.
    """
    low, full = zip(("low", "full"), steps, (end, 1.0), shifts, strict=True)
    return Schedule((Stage(*low), Stage(*full)), (match_noise("renoise", end, c, matching, upsampler),))


def bottleneck(steps, strengths, shifts, *, truncated: bool = True, interpolation: str = "lanczos") -> Schedule:
    """Make a schedule of Bottleneck Sampling (arXiv 2503.18940): full resolution, half, and full again.

    Each stage runs to its end, a clean estimate; that is resized and noised anew, and the next stage starts from there,
    see `resample_noise`.

    steps, shifts: of the stages, which are full, low, full, ...: an odd number of each. One stage is a stock run.
    strengths:     noise level before the shift, in (0, 1], that each stage but the first starts at: the first is at 1.
    truncated:     a stage's steps are those of a whole run, of which it makes the last floor(steps·strength), as
                   image-to-image pipelines do, and it starts at the level of the first of these; else it makes all of
                   its steps from its strength on.
    interpolation: how the estimate is resized, one of `INTERPOLATIONS`.

    The method is known here from the RALU paper's account of it (supplement B.2.1), which has the steps and that noise
    is added and the schedule shifted anew in each stage, but not to which level, by which shift, or where a stage ends.
    With strengths of 0.85 and 0.5 (FLUX) and 0.95 and 0.5 (SD3) truncated stages do the work that the paper measured;
    other strengths do so too, and its steps read literally do not.
    Raises ValueError for numbers out of range and for a strength that leaves no step.
    """
    steps, strengths, shifts = tuple(steps), tuple(strengths), tuple(shifts)
    if len(steps) % 2 == 0 or not len(steps) == len(shifts) == len(strengths) + 1:
        raise ValueError(
            "steps and shifts must be an odd number of each, and strengths one fewer, "
            f"got {len(steps)}, {len(shifts)} and {len(strengths)}"
        )
    stages = [Stage(("full", "low")[k % 2], n, 1.0, h) for k, (n, h) in enumerate(zip(steps, shifts, strict=True))]
    transitions = []
    for k, strength in enumerate(strengths, 1):
        if not _is_number(strength) or not 0 < strength <= 1:
            raise ValueError(f"strengths must lie in (0, 1], got {strength!r}")
        if truncated:
            calls = math.floor(strength * stages[k].steps + 1e-6)
            if not calls:
                raise ValueError(f"strengths must leave each stage a step: {strength} of {stages[k].steps} is none")
            strength = calls / stages[k].steps
            stages[k] = dataclasses.replace(stages[k], steps=calls)
        transitions.append(resample_noise(1 - shifted(strength, stages[k].shift), interpolation))
    return Schedule(tuple(stages), tuple(transitions))


def single(steps: int, shift: float) -> Schedule:
    """Make a schedule of one full stage, the stock one under that timestep shift."""
    return Schedule((Stage("full", steps, 1.0, shift),))


def _three(name: str, values) -> tuple:
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != 3:
        raise ValueError(f"{name} must be three numbers, got {values!r}")
    for value in values:
        if not _is_number(value):
            raise ValueError(f"{name} must be finite numbers, got {value!r}")
    return tuple(values)


def densities(schedule: Schedule, shift: float, points: int = 1000):
    """Return times t, the density of work that the flow asks for (Eq. 11), and the one the schedule gives (Eq. 12).

    Times that a transition goes back over are asked for twice. Returns three float64 arrays of shape (points,).
    """
    import numpy as np

    def pdf(h):
        """Return the density of time when noise levels are drawn evenly and shifted by h."""
        return h / (1 + (h - 1) * t) ** 2

    def truncated(h, start, end):
        """Restrict that density to [start, end] and normalise it; its integral is t / (1 + (h-1)·t) · h."""
        mass = h * (end / (1 + (h - 1) * end) - start / (1 + (h - 1) * start))
        return np.where((t >= start) & (t <= end), pdf(h) / mass, 0.0)

    t = np.linspace(0, 1, points)
    starts, ends, steps = schedule.starts, schedule.ends, schedule.steps
    overlaps = list(zip(starts[1:], ends, strict=False))
    target = pdf(shift) + sum((end - start) * truncated(shift, start, end) for start, end in overlaps)
    target = target / (1 + sum(end - start for start, end in overlaps))
    stages = zip(steps, schedule.shifts, starts, ends, strict=True)
    achieved = sum(n * truncated(h, start, end) for n, h, start, end in stages) / sum(steps)
    return t, target, achieved


def solve(
    steps, ends, shift: float = 3.0, ratio: float = 0.2, *, matching: str = "covariance", upsampler: str = "nearest"
) -> Schedule:
    """Solve for the shifts h and the noise share c that minimise the Jensen-Shannon distance to the target (Eq. S12).

    steps: transformer calls of each of the three stages (not cumulative). ends: time at which each stage ends, the last
    1. shift: the model's own timestep shift (3 for FLUX.1-dev and SD3, 1 for FLUX.1-schnell). The others are passed on
    to `region_adaptive`. Raises ValueError for numbers out of range, and ImportError without SciPy. Bounded
    quasi-Newton over h in [0.5, 10] and 1/sqrt(c) in [2, 100].
    """
    steps, ends = _three("steps", steps), _three("ends", ends)
    region_adaptive(steps, ends, (1.0, 1.0, 1.0), 0.25, ratio, matching=matching, upsampler=upsampler)  # or it raises
    if not _is_number(shift) or shift <= 0:
        raise ValueError(f"shift must be a positive number, got {shift!r}")
    h, c = _minimise(tuple(map(int, steps)), tuple(map(float, ends)), float(shift))
    return region_adaptive(steps, ends, h, c, ratio, matching=matching, upsampler=upsampler)


@lru_cache
def _minimise(steps: tuple, ends: tuple, shift: float) -> tuple[tuple[float, float, float], float]:
    try:
        from scipy.optimize import minimize
        from scipy.spatial.distance import jensenshannon
    except ImportError as error:
        raise ImportError('solving a schedule needs SciPy: pip install "ralu[pipelines]"') from error

    def unknowns(x):
        return tuple(map(float, x[:3])), float(min(0.25, x[3] ** -2))

    def distance(x):
        _, target, achieved = densities(region_adaptive(steps, ends, *unknowns(x)), shift)
        return jensenshannon(target, achieved)

    solution = minimize(distance, x0=[3.0, 3.0, 3.0, 2.0], bounds=[(0.5, 10)] * 3 + [(2, 100)], method="L-BFGS-B")
    return unknowns(solution.x)
