"""Budgets: the schedule whose transformer work is a given part of a stock run's.

Work is counted as `ralu.estimate` does, attention included, in the transformer alone. It does not depend on the ends.
Whole steps make it jump, and the ratio, which sets the tokens of the mixed stage, fills the gaps.
"""

import inspect
import json
import math
import re
from bisect import bisect
from collections.abc import Callable, Iterable
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from .families import DISTILLED_STEPS
from .presets import DISTILLED, PRESETS, SOLVED
from .schedule import Schedule, solve

if TYPE_CHECKING:
    from .families import Family

SPEEDUPS = (1.5, 12.0)  # what may be asked for
RATIOS = (0.05, 0.7)  # what is chosen from
TOLERANCE = 0.01  # of the work


class Point(NamedTuple):
    """What decides a schedule of three stages before its shifts and its c are solved for.

    steps: transformer calls of each stage. ends: times at which the stages end, the last 1. ratio: see `Schedule`.
    """

    steps: tuple[float, ...]
    ends: tuple[float, ...]
    ratio: float


def _preset(name: str) -> Point:
    plain: Any = PRESETS.get(name) or SOLVED[name]
    return Point(plain.steps, plain.ends, getattr(plain, "ratio", 0.2))


# What budgets are interpolated between, by family; in any order. Other families have their presets.
ANCHORS: dict[str, tuple[Point, ...]] = {
    "flux": (_preset("flux-7x"), _preset("flux-5x")),
    "sd3": (_preset("sd3-3x"), _preset("sd3-2x")),
}


def check_speedup(speedup: Any) -> float:
    """Return a speedup as a float. Raises TypeError for what is no number, ValueError for one out of range."""
    if isinstance(speedup, bool) or not isinstance(speedup, int | float):
        raise TypeError(f"speedup must be a number, got {speedup!r}")
    if not SPEEDUPS[0] <= speedup <= SPEEDUPS[1]:
        raise ValueError(f"speedup must lie between {SPEEDUPS[0]:g} and {SPEEDUPS[1]:g}, got {speedup:g}")
    return float(speedup)


def speedup_of(name: str) -> float | None:
    """Return the X of a method's name "speedup-X", None for another name. Raises ValueError for X out of range."""
    match = re.fullmatch(r"speedup-(\d+(?:\.\d+)?)", name)
    return check_speedup(float(match[1])) if match else None


def schedule_for(
    speedup: float,
    model: Any = "flux-dev",
    *,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int | None = None,
    stock_steps: int | None = None,
    shift: float | None = None,
    matching: str = "covariance",
    upsampler: str = "nearest",
) -> Schedule:
    """Make the schedule whose transformer work is 1/speedup of a stock run's.

    Steps, ends and ratio lie as near as may be to a line through the family's presets, see `fit`; the shifts and c are
    those of `ralu.solve`.

    speedup:       from 1.5 to 12, as far as three steps do not take more; the work is within 1 % of what it asks for.
    model:         as `ralu.estimate` takes it.
    height, width: of the images, in pixels; None for a loaded pipeline's default, else 1024. The schedule makes other
                   sizes too, but then the work is another part, which `ralu.estimate(model, schedule, ...)` tells.
    text_tokens:   of T5 (`max_sequence_length`); None for the pipeline's default, 512 for FLUX and 256 for SD3.
    stock_steps:   of the stock run; None for the family's, 50 for FLUX and 28 for SD3, or 4 for FLUX.1-schnell.
                   SD3.5-large-turbo cannot be told from its configuration, so give 4 for it.
    shift:         the model's own timestep shift; None for what its configuration says.
    matching, upsampler: for comparison, see `ralu.schedule.match_noise`.

    Raises TypeError for what is no number, ValueError for what cannot be reached, an unknown model or a size that does
    not fit, and ImportError without SciPy.
    """
    speedup = check_speedup(speedup)
    from .components import check_size, describe

    parts = describe(model)
    family, config = parts.family, _complete(parts.transformer.kind, json.loads(parts.transformer.config))
    text_tokens = family.text_tokens if text_tokens is None else text_tokens
    stock_steps = family.entry.stock_steps_of(parts.scheduler) if stock_steps is None else stock_steps
    pixels = model.default_sample_size * parts.shrink if hasattr(model, "default_sample_size") else 1024
    height, width = (pixels if side is None else side for side in (height, width))
    numbers = {"height": height, "width": width, "text_tokens": text_tokens, "stock_steps": stock_steps}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_size(height, width, 2 * parts.shrink)
    text_tokens += parts.clip_tokens if family.joins_clip else 0

    def work(tokens):
        return family.flop(config, tokens, text_tokens)

    distilled = family.entry.is_distilled(parts.scheduler) or stock_steps == DISTILLED_STEPS
    point = reach(speedup, stock_steps, anchors_of(family, distilled), work, height, width, 2 * parts.shrink)
    shift = family.entry.own_shift(parts.scheduler) if shift is None else shift
    return solve(point.steps, point.ends, shift, point.ratio, matching=matching, upsampler=upsampler)


def reach(
    speedup: float,
    stock_steps: int,
    anchors: Iterable[Point],
    work: Callable[[int], float],
    height: int,
    width: int,
    token_pixels: int,
) -> Point:
    """Find steps, ends and ratio for 1/speedup of a stock run's work, see `fit`.

    height, width: of the image in pixels, multiples of a token. token_pixels: side of a token.
    Raises ValueError for a speedup that no schedule comes within `TOLERANCE` of.
    """
    low = math.prod(math.ceil(side / (2 * token_pixels)) for side in (height, width))
    full = height * width // token_pixels**2
    point, calls = fit(stock_steps / speedup, anchors, work, low, full)
    if abs(calls * speedup / stock_steps - 1) > TOLERANCE:
        least = 1 + (work(low) + work(low + 3 * _selectable(low)[0])) / work(full)
        most = math.floor(100 * min(SPEEDUPS[1], stock_steps / least)) / 100
        raise ValueError(
            f"speedup={speedup:g} cannot be reached at {height}x{width} pixels, against {stock_steps} steps: "
            f"it can be at most {most:g}, and the nearest to it is {stock_steps / calls:.3g}"
        )
    return point


def anchors_of(family: "Family", distilled: bool) -> Iterable[Point]:
    """List the points that a family's budgets are interpolated between, of its distilled models or of the others."""
    if distilled:
        return [_preset(name) for name in family.entry.presets if name in DISTILLED] or [_preset("distilled-4")]
    named = (name for name in family.entry.presets if name not in DISTILLED)
    return ANCHORS.get(family.name) or [_preset(name) for name in named if name in PRESETS or name in SOLVED]


def _complete(kind: type, config: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults of a model's class to what a configuration says."""
    return {name: each.default for name, each in inspect.signature(kind).parameters.items()} | config


def fit(
    calls: float, anchors: Iterable[Point], work: Callable[[int], float], low: int, full: int
) -> tuple[Point, float]:
    """Find steps, ends and ratio for the work of `calls` calls at full resolution. Returns them and the work they make.

    anchors: the points to keep near to. Between two of them, steps, ends and ratio are interpolated by their work;
             beyond, the steps of the nearest are scaled, and its ends and ratio stay.
    work:    a call's, by its number of image tokens, in any unit.
    low, full: image tokens at half and at full resolution.

    Of all whole steps near those, each with the ratio that makes up for the work, take the ones with the least sum of
    (n - m)²/m over the stages, weighted by the work of their calls, where n are the steps and m those interpolated,
    and of the squares of how far ratio and work are off, in units of 0.3 and 0.3 %.
    """
    whole = work(full)
    half, mixed = work(low) / whole, [work(low + 3 * k) / whole for k in _selectable(low)]

    def mixed_at(ratio):
        return work(low + 3 * math.floor(ratio * low + 1e-6)) / whole  # the rule of `plan_tokens`

    def total(point):
        return point.steps[0] * half + point.steps[1] * mixed_at(point.ratio) + point.steps[2]

    ideal = _interpolated(calls, sorted((total(point), point) for point in anchors))
    weights = half, mixed_at(ideal.ratio), 1

    def completed(steps):
        wanted = (calls - steps[0] * half - steps[2]) / steps[1]
        above = min(max(bisect(mixed, wanted), 1), len(mixed) - 1)
        nearest = min((above - 1, above), key=lambda k: abs(mixed[k] - wanted))
        point = Point(steps, ideal.ends, _selectable(low)[nearest] / low)
        moved = sum(w * (n - m) ** 2 / m for w, n, m in zip(weights, steps, ideal.steps, strict=True))
        made = total(point)
        return moved + ((point.ratio - ideal.ratio) / 0.3) ** 2 + ((made / calls - 1) / 0.003) ** 2, point, made

    near = (range(max(1, math.floor(m) - 2), math.ceil(m) + 3) for m in ideal.steps)
    _, point, made = min(map(completed, product(*near)))
    return point, made


def _selectable(low: int) -> range:
    """Return how many of the low tokens the mixed stage may upsample."""
    fewest = math.ceil(RATIOS[0] * low)
    return range(fewest, max(fewest, math.floor(RATIOS[1] * low)) + 1)


def _interpolated(calls: float, anchors: list[tuple[float, Point]]) -> Point:
    """Return the point at this work on the line through anchors, in order of their work."""
    after = bisect([made for made, _ in anchors], calls)
    if 0 < after < len(anchors):
        (below, a), (above, b) = anchors[after - 1 : after + 1]
        x = (calls - below) / (above - below)

        def between(low, high):
            return tuple((1 - x) * p + x * q for p, q in zip(low, high, strict=True))

        steps, ends, (ratio,) = between(a.steps, b.steps), between(a.ends, b.ends), between([a.ratio], [b.ratio])
    else:
        made, nearest = anchors[min(after, len(anchors) - 1)]
        steps, ends, ratio = tuple(n * calls / made for n in nearest.steps), nearest.ends, nearest.ratio
    return Point(steps, tuple(round(end, 3) for end in ends), ratio)
