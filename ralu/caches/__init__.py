"""Temporal methods: a cache lets some transformer calls reuse what earlier ones computed.

A cache is a frozen dataclass whose fields are its options, of type int, float, bool or str, and whose class attribute
`families` names the model families that it serves.
"""

from collections.abc import Callable

CACHES: dict[str, type] = {}


def register(name: str) -> Callable[[type], type]:
    """Return a class decorator that makes a cache known as `name`, as in "flux-5x+NAME"."""

    def add(kind: type) -> type:
        CACHES[name] = kind
        return kind

    return add
