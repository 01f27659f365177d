"""The grammar of methods, `SPATIAL[(option=value,...)][+CACHE[(option=value,...)]]`, parsed and printed here alone.

SPATIAL is a preset of `ralu.presets`, "speedup-X" for X times less work than a stock run's (`ralu.schedule_for`),
"stock-STEPS", or "stock" for the pipeline's own number of steps; CACHE is a name in `ralu.caches`. For example
"flux-5x(ratio=0.3,regions=gradient)+taylorseer(interval=3)".
"""

import math
import re
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, get_type_hints

from .budget import speedup_of
from .caches import CACHES
from .options import BASELINE_OPTIONS, CHOICES, Options
from .presets import BASELINES, PRESETS, SOLVED

SPATIAL = (*PRESETS, *SOLVED, *BASELINES)
_TYPES = {"ratio": float, "threshold": float, "seeds": int}  # those of options that are no words
_STOCK_OPTIONS = "solver", "spacing"  # those that mean something where nothing is upsampled
_PRESET_OPTIONS = tuple(field.name for field in fields(Options) if field.name != "spacing")
_NAME, _OPTIONS = r"[\w.-]+", r"(?:\(([^()]*)\))?"
_GRAMMAR = re.compile(rf"({_NAME}){_OPTIONS}(?:\+({_NAME}){_OPTIONS})?")
FORM = "SPATIAL[(option=value,...)][+CACHE[(option=value,...)]]"


@dataclass(frozen=True)
class Method:
    """A way to sample: a spatial method with its options and, beside it, a cache.

    spatial: a name in `SPATIAL`, "speedup-X", "stock", or "stock-STEPS".
    options: of the spatial method; a value that is the preset's own or the default becomes None, so that one way to
             sample has one name.
    cache:   an instance of a class in `ralu.caches.CACHES`, or None.

    Raises ValueError for an unknown spatial method, an option that it does not have or cannot follow, or an
    unregistered cache.
    """

    spatial: str
    options: Options = field(default_factory=Options)
    cache: Any = None

    def __post_init__(self):
        if not isinstance(self.spatial, str):
            raise TypeError(f"spatial must be a string, got {self.spatial!r}")
        if (speedup := speedup_of(self.spatial)) is not None:
            object.__setattr__(self, "spatial", f"speedup-{_number(speedup)}")
        elif self.spatial not in SPATIAL and not re.fullmatch(r"stock(-[1-9]\d*)?", self.spatial):
            raise ValueError(f"{self.spatial!r} is none of {', '.join(SPATIAL)}, stock, stock-STEPS, speedup-X")
        if self.cache is not None and type(self.cache) not in CACHES.values():
            raise ValueError(f"cache must be one of {_known_caches()}, got {self.cache!r}")
        given = self.options.given()
        if odd := given.keys() - set(self._options()):
            why = (
                "upsamples nothing"
                if self.preset is None
                else "has whole stages alone"
                if not self.has_regions
                else "chooses its own ratio"
                if self.speedup
                else "has stages"
            )
            raise ValueError(f"{self.spatial} {why} and has no {', '.join(sorted(odd))}")
        if self.spatial in SOLVED:
            self.options.check_steps(SOLVED[self.spatial].steps[0], self.spatial)
        defaults, printable = _defaults(self.spatial), str | float | int
        plain = [name for name, value in given.items() if isinstance(value, printable) and value == defaults[name]]
        object.__setattr__(self, "options", replace(self.options, **dict.fromkeys(plain)))

    @property
    def preset(self) -> str | None:
        """The name of the preset, or "speedup-X"; None for the stock pipeline."""
        return None if self.spatial.startswith("stock") else self.spatial

    @property
    def has_regions(self) -> bool:
        """Whether it chooses regions, and so has a mixed stage."""
        return self.preset is not None and self.spatial not in BASELINES

    @property
    def speedup(self) -> float | None:
        """The X of "speedup-X"; None for others."""
        return speedup_of(self.spatial)

    @property
    def steps(self) -> int | None:
        """The number N of "stock-N"; None for a preset, which has its own, and for "stock"."""
        stock, _, number = self.spatial.partition("-")
        return int(number) if stock == "stock" and number else None

    @classmethod
    def parse(cls, text: str) -> "Method":
        """Return the method that `text` names.

        Raises ValueError, naming what is allowed, for text that does not follow the grammar, an unknown preset, cache
        or option, and a value that does not fit.
        """
        if not isinstance(text, str):
            raise TypeError(f"a method must be a string, got {text!r}")
        match = _GRAMMAR.fullmatch(text.strip())
        if not match:
            raise ValueError(f"{text!r} is no method: it must have the form {FORM}")
        spatial, options, name, cache_options = match.groups()
        method = cls(spatial)  # an unknown name is told before its options
        types = {name: _TYPES.get(name, str) for name in method._options()}
        chosen = _assignments(options, spatial, types)
        if name is None:
            return cls(spatial, Options(**chosen))
        if name not in CACHES:
            raise ValueError(f"{name!r} is no cache; choose of {_known_caches()}")
        kind: Any = CACHES[name]
        given = _assignments(cache_options, name, _types(kind))
        if lacking := [field.name for field in fields(kind) if field.default is MISSING and field.name not in given]:
            raise ValueError(f"{name} needs {', '.join(lacking)}, as in {name}({lacking[0]}=...)")
        return cls(spatial, Options(**chosen), kind(**given))

    def _options(self) -> tuple[str, ...]:
        """List the options that mean something for this spatial method."""
        if self.preset is None:
            return _STOCK_OPTIONS
        if not self.has_regions:
            return BASELINE_OPTIONS
        if self.speedup is None:
            return _PRESET_OPTIONS
        return tuple(name for name in _PRESET_OPTIONS if name not in ("ratio", "threshold"))

    def __str__(self) -> str:
        """Print the name, with the options that differ from the defaults: `Method.parse` undoes it.

        A mask or a scorer has no name: it is printed as regions=custom, which `parse` refuses.
        """
        options = {name: value if isinstance(value, str | float | int) else "custom"
                   for name, value in self.options.given().items()}  # fmt: skip
        text = self.spatial + _printed(options)
        if self.cache is None:
            return text
        name = next(name for name, kind in CACHES.items() if kind is type(self.cache))
        values = {field.name: (getattr(self.cache, field.name), field.default) for field in fields(self.cache)}
        return f"{text}+{name}" + _printed(
            {key: value for key, (value, default) in values.items() if default is MISSING or value != default}
        )


def _defaults(spatial: str) -> dict[str, Any]:
    first = {name: allowed[0] for name, allowed in CHOICES.items()}
    return first | {"ratio": PRESETS[spatial].ratio if spatial in PRESETS else 0.2, "threshold": None, "seeds": None}


def _known_caches() -> str:
    return ", ".join(CACHES) or "(there is none)"


def _types(kind: type) -> dict[str, type]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _assignments(text: str | None, owner: str, types: dict[str, type]) -> dict[str, Any]:
    """Parse "option=value,..." of `owner`, whose options have these types."""
    values: dict[str, Any] = {}
    for part in text.split(",") if text is not None and text.strip() else ():
        name, equals, value = map(str.strip, part.partition("="))
        if not equals or not value:
            raise ValueError(f"{part.strip()!r} of {owner} must have the form option=value")
        if name not in types:
            raise ValueError(f"{owner} has no option {name!r}; it has {', '.join(types) or 'none'}")
        if name in values:
            raise ValueError(f"{owner} has the option {name!r} twice")
        values[name] = _value(name, value, types[name])
    return values


def _value(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, got {text!r}")
        return text.lower() == "true"
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"{name} must be a {'whole ' * (kind is int)}number, got {text!r}") from None
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {text!r}")
    return value


def _number(x: float) -> str:
    return f"{x:g}" if float(f"{x:g}") == x else str(x)


def _printed(options: dict[str, Any]) -> str:
    def value(x):
        if isinstance(x, bool):
            return str(x).lower()
        return _number(x) if isinstance(x, float) else str(x)

    return f"({','.join(f'{name}={value(x)}' for name, x in options.items())})" if options else ""
