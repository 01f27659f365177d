"""Delta-DiT (arXiv 2406.01125): what a range of blocks adds to its input is reused at skipped steps."""

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Cache, Progress, check_number, check_whole, register

VARIANTS = ("paper", "flux-research")


@register("delta-dit")
@dataclass(frozen=True)
class DeltaDiT(Cache):
    """Compute all blocks at every interval-th step of a stage, and leave `num_blocks` of them out at the others.

    A full step keeps the deviation Δ = F(x) - x of a range F of consecutive blocks; a skipped one computes the other
    blocks and x + Δ. Early in a run the range is the last blocks, which make details, and later the first ones, which
    make outlines. The paper publishes neither where it changes nor how many blocks there are in the range.

    interval:   N, steps from one full step to the next, at least 1, at which nothing is skipped.
    num_blocks: how many blocks are left out, at most the model's: FLUX.1's 19 double and 38 single ones are 57,
                SD3-medium has 24. 0 stands for two thirds of them, 38 and 16.
    boundary:   share of the run's steps, in [0, 1], after which the first blocks are left out and not the last.
    variant:    "paper", or "flux-research": what TaylorSeer's authors compare with, on FLUX alone. Its range is the
                single blocks in every step. Of the steps between two full ones the first, third, ... are so, and the
                second, fourth, ... compute nothing: they reuse the outputs of all blocks' attention and MLPs, which
                steps of both other kinds renew, under the modulation of the step; Δ is then kept anew. Takes neither
                num_blocks nor boundary.

    Blocks may be fused and compiled. A full step's Δ are kept only as far as a later step needs them: B·L·D elements
    for the last blocks, B·(L + T)·D for the first, with L tokens of the image and T of the text. "flux-research" with
    an interval of at least 3 keeps 76 times B·(L + T)·D in FLUX.1 besides.

    Raises ValueError for values out of range, and TypeError for those of a wrong type.
    """

    families: ClassVar[tuple[str, ...]] = ("flux", "qwen_image", "sd3")
    takes_conditions: ClassVar[bool] = True

    interval: int = 2
    num_blocks: int = 0
    boundary: float = 0.5
    variant: str = "paper"

    def __post_init__(self):
        check_whole("interval", self.interval, 1)
        check_whole("num_blocks", self.num_blocks, 0)
        check_number("boundary", self.boundary, 0, 1)
        if not isinstance(self.variant, str):
            raise TypeError(f"variant must be a string, got {self.variant!r}")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        for name in ("num_blocks", "boundary"):
            if self.variant != "paper" and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} must be left out with variant={self.variant!r}, got {getattr(self, name)}")

    @property
    def alternates(self) -> bool:
        """Whether there are steps of the kind "modules"."""
        return self.variant != "paper" and self.interval > 2

    def kind(self, progress: Progress) -> str:
        """Name what a step does: "full", or leaves out the "rear", "front" or "single" blocks, or all ("modules")."""
        place = progress.step % self.interval
        if place == 0:
            return "full"
        if self.variant != "paper":
            return "single" if place % 2 else "modules"
        return "rear" if progress.run_step < self.boundary * progress.run_steps else "front"

    def needed(self, progress: Progress) -> set[str]:
        """Name the kinds of the steps from the next one on to the next full one."""
        kinds: set[str] = set()
        for later in progress.ahead():
            if (kind := self.kind(later)) == "full":
                break
            kinds.add(kind)
        return kinds

    def span(self, transformer: Any, kind: str) -> range:
        """Return the indices of the blocks that a step of this kind reuses the Δ of; of "full" and "modules", none."""
        double = len(transformer.transformer_blocks)
        total = double + len(getattr(transformer, "single_transformer_blocks", ()))
        count = self.num_blocks or round(total * 2 / 3)
        spans = {"rear": range(total - count, total), "front": range(count), "single": range(double, total)}
        return spans.get(kind, range(0))

    def check(self, transformer: Any) -> None:
        """Raise ValueError for a transformer that has fewer blocks, or is of a kind that the variant is not for."""
        from .hooks import check_norms

        total = self.span(transformer, "rear").stop
        if self.num_blocks > total:
            raise ValueError(f"num_blocks must be at most {total}, the transformer's blocks, got {self.num_blocks}")
        if self.variant != "paper" and not hasattr(transformer, "single_transformer_blocks"):
            raise ValueError(f"variant must be 'paper' for {type(transformer).__name__}, got {self.variant!r}")
        if self.alternates:
            check_norms(transformer)

    def apply(self, transformer: Any) -> None:
        """Put hooks on the blocks of all spans, and on what is reused inside of blocks."""
        from .hooks import apply_hooks, named_blocks, reused

        blocks, kinds = list(named_blocks(transformer).values()), ("rear", "front") * (self.variant == "paper")
        hooked: dict[Any, Any] = {i: blocks[i] for kind in kinds or ("single",) for i in self.span(transformer, kind)}
        if self.alternates:
            hooked = dict(enumerate(blocks))
            for i, block in enumerate(blocks):
                hooked |= {(i, name): getattr(block, name) for name in reused(block)}
        apply_hooks(hooked, _State, self, transformer)

    def remove(self, transformer: Any) -> None:
        """Take them off again."""
        from .hooks import remove_hooks

        remove_hooks(transformer)

    def shares(self, transformer: Any, progress: Progress, tokens: int, text_tokens: int) -> dict[str, float]:
        """Leave out the blocks of the span; where modules are reused, all but the vectors that modulate them."""
        from .hooks import modulation_alone, named_blocks

        names, kind = list(named_blocks(transformer)), self.kind(progress)
        if kind == "modules":
            return modulation_alone(transformer)
        return {names[i]: 0.0 for i in self.span(transformer, kind)}

    def kept(self, transformer: Any, progress: Progress, batch: int, tokens: int, text_tokens: int) -> int:
        """Count Δ of the spans that this step or a later one reuses, and the modules' outputs."""
        kinds = {self.kind(progress), *self.needed(progress)} - {"full"}
        double, total = len(transformer.transformer_blocks), self.span(transformer, "rear").stop
        rows = sum(tokens + text_tokens * (self.span(transformer, kind).stop < total) for kind in kinds - {"modules"})
        rows += (tokens + text_tokens) * (double + total) * ("modules" in kinds)  # of double blocks two outputs
        return batch * rows * transformer.inner_dim


class _State:
    """What is kept of one context's calls.

    deltas:  Δ of the streams, by kind of span: of the image, and of the text where blocks follow that see it.
    entries: in a call that keeps Δ, the streams at the spans' beginnings.
    outputs: of attention and MLPs, by index of the block and name.
    """

    def __init__(self, cache: DeltaDiT, transformer: Any):
        self.cache, self.spans = cache, {kind: cache.span(transformer, kind) for kind in ("rear", "front", "single")}
        self.reset()

    def reset(self) -> None:
        self.call: Any = None
        self.deltas: dict[str, list] = {}
        self.entries: dict[str, list] = {}
        self.outputs: dict[tuple[int, str], Any] = {}

    def begin(self, call: Any) -> None:
        from .hooks import ends

        kind, self.needed = self.cache.kind(call.progress), self.cache.needed(call.progress)
        there = self.outputs if kind == "modules" else kind in self.deltas
        self.kind = kind if there else "full"  # skip-layer guidance may begin between two full steps
        self.ends = {name: ends(span, call) for name, span in self.spans.items()}
        self.entries, self.renewed = {}, set()
        if self.kind in ("full", "modules"):
            self.deltas, self.renewed = {}, self.needed - {"modules"}
        if self.kind == "full":
            self.outputs = {}

    def enter(self, place: Any, module: Any, args: tuple, kwargs: dict) -> tuple[Any, tuple, dict]:
        from .hooks import modulated, streams

        output = None
        if not isinstance(place, tuple):
            hidden, encoder, _ = streams(args, kwargs)
            for kind in self.renewed:
                if place == self.ends[kind][0]:
                    self.entries[kind] = self._seen(kind, hidden, encoder)
            if place in self.spans.get(self.kind, ()):
                output = self._moved(hidden, encoder) if place == self.ends[self.kind][0] else (encoder, hidden)
            elif self.kind == "modules":
                output = modulated(module, args, kwargs, lambda name: self._output((place, name)))
                self._keep(place, output)
        return output, args, kwargs

    def leave(self, place: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        if isinstance(place, tuple):
            if "modules" in self.needed:
                self.outputs[place] = output
        else:
            self._keep(place, output)
        return output

    def _keep(self, place: int, output: tuple) -> None:
        """Keep Δ of the spans that end with a block."""
        encoder, hidden = output
        for kind in self.renewed:
            if place == self.ends[kind][1]:
                after = self._seen(kind, hidden, encoder)
                self.deltas[kind] = [y - x for x, y in zip(self.entries.pop(kind), after, strict=True)]

    def _seen(self, kind: str, hidden: Any, encoder: Any) -> list:
        """Return the streams that blocks after a span see."""
        return [hidden] if self.spans[kind].stop == self.spans["rear"].stop else [hidden, encoder]

    def _moved(self, hidden: Any, encoder: Any) -> tuple:
        """Add Δ, and drop it after its last use."""
        from ..blocks import clipped

        deltas = self.deltas[self.kind] if self.kind in self.needed else self.deltas.pop(self.kind)
        hidden, *seen = (clipped(x + y) for x, y in zip((hidden, encoder), deltas, strict=False))
        return (seen or [encoder])[0], hidden

    def _output(self, place: tuple[int, str]) -> tuple:
        """Return what a module gave, and drop it after its last use."""
        output = self.outputs[place] if "modules" in self.needed else self.outputs.pop(place)
        return output if isinstance(output, tuple) else (output,)
