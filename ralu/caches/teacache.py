"""TeaCache (arXiv 2411.19108): what all blocks add to the image's stream is reused while their input changes little."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from .base import Cache, Progress, check_number, register


class Polynomial(NamedTuple):
    """p, which makes the change of the output in a step of the change of the input.

    coefficients: the highest power's first.
    largest:      change up to which it is known; it goes on in proportion.
    mean:         of p over the steps of a run; None where this is not known.
    """

    coefficients: tuple[float, ...]
    largest: float = math.inf
    mean: float | None = None

    def __call__(self, change: float) -> float:
        """Evaluate it; a change is not negative, whatever a fit says."""
        value, x = 0.0, min(change, self.largest)
        for coefficient in self.coefficients:
            value = value * x + coefficient
        return max(value, 0.0) * (change / x if change > x else 1)


_FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
# The authors' fit for FLUX.1-dev. It is 0.18 to 0.26 where a step changes the input by up to 12 %; of its mean over
# changes of up to 10 % come the numbers of full steps that the paper of RALU has.
PUBLISHED = Polynomial(_FLUX, mean=sum(c * 0.1**k / (k + 1) for k, c in enumerate(reversed(_FLUX))))
IDENTITY = Polynomial((1.0, 0.0))
FIRST_NORM = "transformer_blocks.0.norm1"  # what it makes of the image's stream tells of the change


@register("teacache")
@dataclass(frozen=True)
class TeaCache(Cache):
    """Compute the blocks of an image when their input has changed by more than `delta` since they were computed.

    m is the image's stream under the norm and the modulation of the first block, and d = mean|m - m'| / mean|m'| its
    change since the step before. p(d), with a polynomial p that makes the change of the output of it, is added up from
    step to step: while the sum is less than delta, the blocks are left out and the image's stream gets what they added
    to it when they were computed last; else they are computed, and the sum begins anew. A stage's first and last steps
    are computed. Each image of a batch decides for itself, and only the rows of those that need it are computed. All
    calls of a step (FLUX's second one for a negative prompt, skip-layer guidance) go by the image's one decision, which
    is made in the first call, of both halves of the batch in SD3.

    delta:        δ, at least 0, at which nothing is skipped. For FLUX.1-dev the authors name 0.25, 0.4, 0.6 and 0.8,
                  and the paper of RALU has 0.99 with 45 and with 30 steps.
    coefficients: of p: "auto" is the published polynomial for FLUX, and for SD3, for which there is none, the identity,
                  with which delta is about the input itself; "identity"; or a file of `ralu calibrate teacache`.

    Blocks may be fused and compiled. A step waits for the device once, for a number an image. Between steps 2·B·L·D
    elements are kept of a call with B rows and L tokens, and B·L·D of a step's other calls.

    Raises ValueError for a value out of range, and TypeError for one of a wrong type.
    """

    families: ClassVar[tuple[str, ...]] = ("flux", "sd3")
    takes_conditions: ClassVar[bool] = True

    delta: float = 0.6
    coefficients: str = "auto"

    def __post_init__(self):
        check_number("delta", self.delta, 0)
        if not isinstance(self.coefficients, str):
            raise TypeError(f"coefficients must be a string, got {self.coefficients!r}")

    def polynomial(self, transformer: Any) -> Polynomial:
        """Return p for a transformer. Raises ValueError for a file that cannot be read or is no calibration."""
        if self.coefficients == "auto" and hasattr(transformer, "single_transformer_blocks"):
            return PUBLISHED
        if self.coefficients in ("auto", "identity"):
            return IDENTITY
        try:
            stored = json.loads(Path(self.coefficients).expanduser().read_text(encoding="utf-8"))
            *coefficients, largest, mean = map(float, (*stored["coefficients"], stored["largest"], stored["mean"]))
            if not (coefficients and largest > 0 and all(map(math.isfinite, (*coefficients, largest, mean)))):
                raise ValueError(f"its numbers are {coefficients}, {largest}, {mean}")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                "coefficients must be auto, identity or a file that `ralu calibrate teacache` wrote, "
                f"got {self.coefficients!r} ({type(error).__name__}: {error})"
            ) from None
        return Polynomial(tuple(coefficients), largest, mean)

    def check(self, transformer: Any) -> None:
        """Raise ValueError for coefficients that cannot be read, and for blocks that are offloaded as a whole."""
        from .hooks import check_norms

        self.polynomial(transformer)
        check_norms(transformer)

    def apply(self, transformer: Any) -> None:
        """Put hooks on all blocks."""
        from .hooks import apply_hooks, named_blocks

        blocks = dict(enumerate(named_blocks(transformer).values()))
        apply_hooks(blocks, _State, _Gate(self.delta, self.polynomial(transformer)), len(blocks))

    def remove(self, transformer: Any) -> None:
        """Take them off again."""
        from .hooks import remove_hooks

        remove_hooks(transformer)

    def shares(self, transformer: Any, progress: Progress, tokens: int, text_tokens: int) -> dict[str, float] | None:
        """Leave out all blocks as often as is expected of the polynomial's mean; the first norm decides."""
        from .hooks import named_blocks

        mean, last = self.polynomial(transformer).mean, progress.step == progress.steps - 1
        if mean is None:
            return None
        period = max(1, math.ceil(self.delta / mean)) if mean > 0 else progress.steps
        if last or progress.step % period == 0:
            return {} if last else {FIRST_NORM: 2.0}
        return dict.fromkeys(named_blocks(transformer), 0.0) | {FIRST_NORM: 1.0}

    def kept(self, transformer: Any, progress: Progress, batch: int, tokens: int, text_tokens: int) -> int:
        """Count the last input and what the blocks added, which no step needs after the last one."""
        return 0 if progress.step == progress.steps - 1 else 2 * batch * tokens * transformer.inner_dim


def changes(new: Any, old: Any, images: int) -> list[float]:
    """Return mean|new - old| / mean|old| of every image, of (B, ...) each, whose row r is of image r % images."""
    from torch import float32, linalg

    sums = (linalg.vector_norm(x.flatten(1), ord=1, dim=1, dtype=float32) for x in (new - old, old))
    change, size = (x.view(-1, images).sum(0) for x in sums)
    return (change / size).tolist()


class _Gate:
    """Which images a step computes: decided once a step, for the calls of all contexts."""

    def __init__(self, delta: float, polynomial: Polynomial):
        self.delta, self.polynomial = delta, polynomial
        self.reset()

    def reset(self) -> None:
        self.step = -1
        self.needs: list[bool] = []
        self.previous: Any = None
        self.sums: list[float] = []

    def decide(self, call: Any, block: Any, hidden: Any, temb: Any) -> list[bool]:
        """Return of every image whether its rows are to be computed. block: the first one, with what it is given."""
        progress = call.progress
        if progress.step == self.step:
            return self.needs
        self.step, self.needs = progress.step, [True] * call.images
        if progress.step == progress.steps - 1:
            self.previous = None
            return self.needs
        modulated = block.norm1(hidden, emb=temb)[0]
        if call.mask is not None:
            modulated = modulated.masked_fill(~call.mask.repeat(len(hidden) // call.images, 1).unsqueeze(-1), 0)
        if self.previous is None or len(self.previous) != len(modulated):  # guidance ended
            self.sums = [0.0] * call.images
        else:
            found = changes(modulated, self.previous, call.images)
            sums = [sum_ + self.polynomial(change) for sum_, change in zip(self.sums, found, strict=True)]
            self.needs = [not sum_ < self.delta for sum_ in sums]
            self.sums = [0.0 if needed else sum_ for sum_, needed in zip(sums, self.needs, strict=True)]
        self.previous = modulated
        return self.needs


class _State:
    """What is kept of one context's calls.

    residual: what the blocks added to the image's stream (B, L, D).
    entry:    in a call that computes blocks, the stream before them.
    rows:     which rows a call computes, int64; None for all.
    taken:    of these rows, what the blocks are called with besides the streams.
    """

    def __init__(self, gate: _Gate, count: int):
        self.gate, self.count = gate, count
        self.call: Any = None
        self.residual: Any = None

    def reset(self) -> None:
        self.call = self.residual = None
        self.gate.reset()

    def begin(self, call: Any) -> None:
        from .hooks import ends

        self.ends = ends(range(self.count), call)
        self.entry: Any = None
        self.rows: Any = None
        self.skips = False
        self.taken: dict[int, tuple] = {}

    def enter(self, place: int, module: Any, args: tuple, kwargs: dict) -> tuple[Any, tuple, dict]:
        from .hooks import streams

        hidden, encoder, temb = streams(args, kwargs)
        if place == self.ends[0]:
            self._begin_blocks(self.gate.decide(self.call, module, hidden, temb), hidden)
            if self.skips:
                hidden = self._moved(hidden)
        if self.skips:
            return (encoder, hidden), args, kwargs
        return (None, args, kwargs) if self.rows is None else (None, self._of_rows(args), self._of_rows(kwargs))

    def leave(self, place: int, args: tuple, kwargs: dict, output: Any) -> Any:
        encoder, hidden = output
        return (encoder, self._end_blocks(hidden)) if place == self.ends[1] else output

    def _begin_blocks(self, needs: list[bool], hidden: Any) -> None:
        from torch import tensor

        rows = [row for row in range(len(hidden)) if needs[row % len(needs)]]
        self.skips = self.residual is not None and not rows
        if self.residual is not None and 0 < len(rows) < len(hidden):
            self.rows = tensor(rows, device=hidden.device)
        if not self.skips and self.call.progress.step < self.call.progress.steps - 1:
            self.entry = hidden
        if not self.skips and self.rows is None:
            self.residual = None

    def _moved(self, hidden: Any) -> Any:
        from ..blocks import clipped

        return clipped(hidden + self.residual)

    def _end_blocks(self, hidden: Any) -> Any:
        from ..blocks import clipped

        entry, self.entry, self.taken = self.entry, None, {}
        if self.rows is None:
            self.residual = None if entry is None else clipped(hidden - entry)
            return hidden
        whole = self._moved(entry).index_copy_(0, self.rows, hidden)
        self.residual.index_copy_(0, self.rows, clipped(hidden - entry[self.rows]))
        return whole

    def _of_rows(self, x: Any) -> Any:
        """Take the rows out of whatever has one for each of the batch; each argument once for all blocks."""
        if isinstance(x, dict):
            return {name: self._of_rows(value) for name, value in x.items()}
        if isinstance(x, tuple | list):
            return type(x)(map(self._of_rows, x))
        if id(x) not in self.taken:
            self.taken[id(x)] = x, taken_rows(x, self.rows, len(self.entry))
        return self.taken[id(x)][1]


def taken_rows(x: Any, rows: Any, batch: int) -> Any:
    """Take rows, int64 (b,), out of a tensor, a rotary table or a packed layout of a batch; return others unchanged."""
    from torch import Tensor

    from ralu_kernels import PackedLayout, packed_layout

    from ..families.flux import PerSample

    if isinstance(x, PerSample):
        return PerSample(x.table[rows])
    if isinstance(x, PackedLayout):
        mask = None if x.inverse is None else x.inverse.view(batch, x.length)[rows] >= 0
        return packed_layout(mask, len(rows), x.length, rows.device)
    return x[rows] if isinstance(x, Tensor) and x.ndim and len(x) == batch else x
