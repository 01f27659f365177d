"""TeaCache's polynomial for a model: how much what it predicts changes where the input of its blocks does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .teacache import FIRST_NORM, Polynomial, changes

DEGREE = 4


@contextmanager
def recorded(transformer: Any, images: int) -> Iterator[list[tuple[float, float]]]:
    """Record a run of so many images: at each step from the second on, for each image, two changes since the last.

    The first is that of the blocks' modulated input, as `TeaCache` takes it, and the second that of the output. The
    transformer is a stock one, and called once a step.
    """
    pairs: list[tuple[float, float]] = []
    last: dict[str, Any] = {}
    found: dict[str, list[float]] = {}

    def record(name: str, tensor: Any):
        if name in last:
            found[name] = changes(tensor, last[name], images)
        last[name] = tensor
        if len(found) == 2:
            pairs.extend(zip(found.pop("input"), found.pop("output"), strict=True))

    handles = [
        transformer.get_submodule(FIRST_NORM).register_forward_hook(lambda *call: record("input", call[-1][0])),
        transformer.register_forward_hook(lambda *call: record("output", call[-1][0])),
    ]
    try:
        yield pairs
    finally:
        for handle in handles:
            handle.remove()


def fit(pairs: list[tuple[float, float]]) -> tuple[Polynomial, float]:
    """Fit the polynomial of degree 4 to (input, output) changes by least squares. Returns it and the error's RMS.

    Raises ValueError for too few changes, and for changes that are not finite.
    """
    inputs, outputs = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    if len(np.unique(inputs)) <= DEGREE + 1:
        raise ValueError(f"a fit needs more than {DEGREE + 1} different changes, got {len(np.unique(inputs))}")
    if not np.isfinite([inputs, outputs]).all():
        raise ValueError("the model's changes must be finite, got NaN or infinity")
    coefficients = np.polyfit(inputs, outputs, DEGREE)
    polynomial = Polynomial(tuple(coefficients.tolist()), float(inputs.max()), float(outputs.mean()))
    errors = [polynomial(change) - expected for change, expected in zip(inputs.tolist(), outputs, strict=True)]
    return polynomial, float(np.sqrt(np.mean(np.square(errors))))
