"""What a cache is, and the table of those that are known."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

CACHES: dict[str, type] = {}


class Cache(Protocol):
    """The interface of a cache. `ralu.enable` calls it: a cache never registers, resets or undoes anything by itself.

    families: names of the model families it serves, see `ralu.families`.
    """

    families: ClassVar[tuple[str, ...]]

    def apply(self, transformer: Any) -> None:
        """Put hooks on a transformer's modules."""

    def remove(self, transformer: Any) -> None:
        """Take them off again."""

    def reset(self, transformer: Any, stage: int, steps: int) -> None:
        """Forget what is cached: a stage begins, with other tokens, that has so many steps."""


def register(name: str) -> Callable[[type], type]:
    """Return a class decorator that makes a cache known as `name`, as in "flux-5x+NAME"."""

    def add(kind: type) -> type:
        CACHES[name] = kind
        return kind

    return add
