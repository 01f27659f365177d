"""The options of a spatial method, their values and their defaults. Imports nothing heavy."""

import math
from dataclasses import dataclass, fields
from typing import Any

from .presets import BASELINES, preset
from .schedule import INTERPOLATIONS, MATCHINGS, Schedule, check_matching, single
from .solver import SOLVERS

# What the options that are words can be; the first is the default.
CHOICES = {
    "regions": ("canny", "gradient", "change", "grid", "random"),
    "granularity": ("pixel", "token"),
    "kept_noise": ("exact", "release"),
    "matching": MATCHINGS,
    "upsampler": INTERPOLATIONS,
    "solver": SOLVERS,
    "spacing": ("stock", "trailing"),
    "backend": ("auto", "native", "triton", "reference"),
}
BASELINE_OPTIONS = "solver", "backend", "seeds"  # those that mean something without a mixed stage


@dataclass(frozen=True)
class Options:
    """Keyword options of a spatial method, as `sample`, `RaluScheduler` and `enable` take them.

    None is the preset's or the default, which is the first one named.

    ratio:       share of the low-resolution tokens to upsample early, in [0, 1].
    threshold:   upsample early what scores at least this much instead; counts then differ between images.
    regions:     "canny" (VAE preview and Canny edges), "gradient" (latent differences from place to place), "change"
                 (from step to step), "grid" or "random" (evenly spaced or at random, for comparison), "mask" (what an
                 inpainting pipeline repaints), a mask of your own (an image, or an array or tensor (H, W) or (B, H, W))
                 or a scorer, see `ralu.regions`.
    granularity: "pixel" upsamples latent pixels; "token" copies whole packed tokens, as the paper's release does.
    kept_noise:  "exact" gives kept tokens the flow's variance; "release" gives them plain noise (too much by b²·c).
    matching:    of noise and timestep between stages: "covariance" (the paper's), "snr" or "off", see
                 `ralu.schedule.match_noise`.
    upsampler:   "nearest" (the paper's); "pixels" corrects it by the image, which the VAE decodes and encodes again at
                 each transition; with matching="snr" also "bilinear", "bicubic", "lanczos", see `ralu.interpolation`.
    solver:      "euler" (the paper's); "ab2" and "ab2-limited", which is safer where steps are few, are of second order
                 for as many calls, see `ralu.solver`.
    spacing:     of "stock-STEPS" alone: "stock" as the pipeline has it, or "trailing", noise levels 1, ..., 1/STEPS
                 before the shift. FLUX's are; SD3's stock ones spend their last call on what is almost clean.
    backend:     of `ralu_kernels`: "auto", "native", "triton" or "reference".
    seeds:       a 64-bit number for each image of a batch, or one for all, that the later stages' noise is made of; by
                 default it comes from the signs of the image's starting noise. Give it where starting noise is
                 interpolated from image to image: signs flip along the way, and the later noise would jump.

    Raises ValueError for a value out of range, and TypeError for one of a wrong type.
    """

    ratio: float | None = None
    threshold: float | None = None
    regions: Any = None
    granularity: str | None = None
    kept_noise: str | None = None
    matching: str | None = None
    upsampler: str | None = None
    solver: str | None = None
    spacing: str | None = None
    backend: str | None = None
    seeds: Any = None

    def __post_init__(self):
        for name in ("ratio", "threshold"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must lie in [0, 1], got {self.ratio}")
        if self.ratio is not None and self.threshold is not None:
            raise ValueError(f"give ratio or threshold, not both: got ratio={self.ratio}, threshold={self.threshold}")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value is None or (name == "regions" and not isinstance(value, str)):
                continue
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a string, got {value!r}")
            if name == "regions":
                allowed = *allowed, "mask"
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.upsampler is not None:
            check_matching(self.upsampler, self.matching)
        # Beyond [0, 1] all or nothing would be selected; differences and a scorer's scores have no such range.
        differences = isinstance(self.regions, str) and self.regions in ("gradient", "change")
        bounded = not (callable(self.regions) or differences)
        if self.threshold is not None and bounded and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], in which edges and masks score, got {self.threshold}")
        object.__setattr__(self, "seeds", _seeds(self.seeds))

    @property
    def fewest_steps(self) -> int:
        """How many steps there must be in a stage before a selection: "change" compares two."""
        return 2 if isinstance(self.regions, str) and self.regions == "change" else 1

    def check_steps(self, steps: int, name: str):
        """Raise ValueError where a schedule, called `name`, has too few steps before a selection."""
        if steps < (fewest := self.fewest_steps):
            raise ValueError(f"regions={self.regions!r} needs {fewest} steps before the selection, {name} has {steps}")

    def check_whole(self, name: str):
        """Raise ValueError for options that mean nothing to a preset, called `name`, without a mixed stage."""
        given = {key: value for key, value in self.given().items() if key not in BASELINE_OPTIONS}
        # A default changes nothing, and a scheduler always has its regions.
        odd = [key for key, value in given.items() if not isinstance(value, str) or value != CHOICES[key][0]]
        if odd:
            raise ValueError(f"{name} has whole stages alone and has no {', '.join(odd)}")

    def given(self) -> dict[str, Any]:
        """Return the options that are not None, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def chosen(self, *names: str) -> dict[str, Any]:
        """Return the options of these names, with the defaults of those that are None."""
        return {name: getattr(self, name) or CHOICES[name][0] for name in names}


def _seeds(given) -> int | list[int] | None:
    """Return seeds as a saved configuration can hold them."""
    if given is None:
        return None
    numbers = given.tolist() if hasattr(given, "tolist") else given  # arrays and tensors
    several = isinstance(numbers, list | tuple) and len(numbers) > 0
    for number in numbers if several else [numbers]:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"seeds must be a whole number, or one for each image, got {given!r}")
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"seeds must be 64-bit signed numbers, got {number}")
    return list(numbers) if several else numbers


def schedule_of(name: str | dict | Schedule, options: Options, shift: float = 1.0) -> Schedule:
    """Return the schedule that a preset's name, a saved schedule or a schedule means under these options.

    shift: the model's own timestep shift, for distilled presets. Raises ValueError for an unknown name, for options
    that only a name can be given with, and for a schedule with too few steps for regions="change".
    """
    schedule, title = _schedule_of(name, options, shift), name if isinstance(name, str) else "the schedule"
    for stage, transition in zip(schedule.stages, schedule.transitions, strict=False):
        if transition.kind == "select":
            options.check_steps(stage.steps, title)
    return schedule


def _schedule_of(name: str | dict | Schedule, options: Options, shift: float) -> Schedule:
    if isinstance(name, str) and name.startswith("stock-") and name[6:].isdecimal() and int(name[6:]):
        return single(int(name[6:]), shift)
    if isinstance(name, str) and name.startswith("speedup-"):
        raise ValueError(f"{name!r} needs to know the model's work: give ralu.schedule_for(speedup, model) instead")
    if options.spacing is not None:
        raise ValueError(f"spacing goes with 'stock-STEPS' alone, got spacing={options.spacing!r} and {name!r}")
    if isinstance(name, str):
        if name in BASELINES:
            options.check_whole(name)
        return preset(name, shift, options.ratio, **options.chosen("matching", "upsampler"))
    if not isinstance(name, dict | Schedule):
        raise TypeError(f"preset must be a name or a Schedule, got {name!r}")
    schedule = Schedule(**name) if isinstance(name, dict) else name
    for option in ("matching", "upsampler"):
        if getattr(options, option) is not None:
            raise ValueError(f"{option} goes with a preset's name: a Schedule has transitions of its own")
    return schedule if options.ratio is None else schedule.replace(ratio=options.ratio)
