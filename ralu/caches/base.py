"""What a cache is, and the table of those that are known."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

CACHES: dict[str, type["Cache"]] = {}


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    stage:           number of the stage, from 1.
    step, steps:     index of the step in the stage, from 0, and how many the stage has.
    run_step, run_steps: the same in the whole run.
    mixed:           whether the stage has tokens of two sizes.
    """

    stage: int
    step: int
    steps: int
    run_step: int
    run_steps: int
    mixed: bool = False

    def ahead(self) -> "Iterator[Progress]":
        """List the stage's later steps."""
        for k in range(1, self.steps - self.step):
            yield replace(self, step=self.step + k, run_step=self.run_step + k)

    @staticmethod
    def at(run_step: int, stages: Sequence[int], mixed: Collection[int] = ()) -> "Progress | None":
        """Return where a step is of a run whose stages have so many steps; None after its end.

        mixed: numbers of the mixed stages.
        """
        first = 0
        for stage, steps in enumerate(stages, 1):
            if run_step < first + steps:
                return Progress(stage, run_step - first, steps, run_step, sum(stages), stage in mixed)
            first += steps
        return None

    @staticmethod
    def of(stages: Sequence[int], mixed: Collection[int] = ()) -> "list[list[Progress]]":
        """List the steps of such a run, stage by stage."""
        begins = [Progress.at(sum(stages[:k]), stages, mixed) for k in range(len(stages))]
        return [[begin, *begin.ahead()] for begin in begins if begin is not None]


class Cache(ABC):
    """The interface of a cache. `ralu.enable` calls it: a cache never registers, resets or undoes anything by itself.

    families: names of the model families it serves, see `ralu.families`.
    takes_conditions: whether it serves calls with tokens of condition images behind the sample's.
    """

    families: ClassVar[tuple[str, ...]]
    takes_conditions: ClassVar[bool] = False

    def check(self, transformer: Any) -> None:  # noqa: B027, some serve all
        """Raise ValueError for a transformer that it cannot serve; nothing is changed before."""

    @abstractmethod
    def apply(self, transformer: Any) -> None:
        """Put hooks on a transformer's modules. At every call their state managers' context is a `hooks.Call`."""

    @abstractmethod
    def remove(self, transformer: Any) -> None:
        """Take them off again."""

    def reset(self, transformer: Any, stage: int, steps: int) -> None:  # noqa: B027, hooks forget by themselves
        """Forget what is cached beside the hooks' state: a stage begins, with other tokens, that has so many steps."""

    def velocity(self, transformer: Any, tokens: Any, progress: Progress) -> Any:
        """Return the velocity that a step is made with, tokens (I, L, C) of I images, of what the model gave for it."""
        return tokens

    def shares(self, transformer: Any, progress: Progress, tokens: int, text_tokens: int) -> dict[str, float] | None:
        """Return, by modules' names, the share of its work that each does at a step; None where this is not known.

        A module's parts have its share unless they are named too; the share of what is not named is 1. Where a step
        depends on the image, this is what is expected. tokens: of an image.
        """
        return None

    def kept(self, transformer: Any, progress: Progress, batch: int, tokens: int, text_tokens: int) -> int:
        """Count the elements that are kept during a step, of the transformer's dtype. batch: rows of a call."""
        return 0


def register(name: str) -> Callable[[type], type]:
    """Return a class decorator that makes a cache known as `name`, as in "flux-5x+NAME"."""

    def add(kind: type) -> type:
        CACHES[name] = kind
        return kind

    return add


def is_full_step(step: int, warmup: int, interval: int) -> bool:
    """Say whether a step, from 0, is among the first `warmup` of its stage, or every interval-th from their last on."""
    return step < warmup or (step - warmup + 1) % interval == 0


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise TypeError for what is no whole number, and ValueError for one that is not in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    _check_range(name, value, least, most)


def check_number(name: str, value: Any, least: float, most: float | None = None) -> None:
    """Raise TypeError for what is no number, and ValueError for one that is not in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    _check_range(name, value, least, most)


def _check_range(name: str, value: float, least: float, most: float | None) -> None:
    if not least <= value <= (math.inf if most is None else most) or math.isinf(value):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
