"""TaylorSeer (arXiv 2503.06923): the outputs of attention and MLPs at skipped steps, by a Taylor series in the step."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Cache, Progress, check_whole, is_full_step, register


@register("taylorseer")
@dataclass(frozen=True)
class TaylorSeer(Cache):
    """Predict the outputs of attention and MLPs from those of the last full steps.

    The transformer is computed in full at steps 0 to warmup - 1, and then at every interval-th step from warmup - 1 on,
    as in the published code; diffusers' own schedule comes two steps later. In between only embeddings and the vectors
    that modulate the blocks are computed, and an output f becomes, s steps after the last full one,

        f + s·f1 + s²/2·f2, where f1 = (f - f before) / (steps between) and f2 = (f1 - f1 before) / (steps between),

    as far as the order goes and there were full steps for it.

    interval: N, steps from one full step to the next, at least 1.
    order:    of the Taylor series, 0 to 2.
    warmup:   W, full steps at the beginning, at least 1; with RALU at the beginning of every stage.

    Blocks may be fused and compiled. Between steps order + 1 times the outputs are kept: 2·B·(L + T)·D elements of a
    block with two streams and B·(L + T)·D of one with one, with L tokens of the image and T of the text, and B·L·D more
    where SD3.5-medium has a second attention.

    Raises ValueError for values out of range, and TypeError for what is no whole number.
    """

    families: ClassVar[tuple[str, ...]] = ("flux", "flux2", "qwen_image", "sd3")
    takes_conditions: ClassVar[bool] = True

    interval: int = 5
    order: int = 1
    warmup: int = 3

    def __post_init__(self):
        check_whole("interval", self.interval, 1)
        check_whole("order", self.order, 0, 2)
        check_whole("warmup", self.warmup, 1)

    def is_full(self, step: int) -> bool:
        """Say whether a stage's step, counted from 0, is computed in full."""
        return is_full_step(step, self.warmup, self.interval)

    def check(self, transformer: Any) -> None:
        """Raise ValueError where a block's norms are offloaded while it is not called, or its MLPs run in chunks."""
        from .hooks import check_norms, named_blocks

        check_norms(transformer)
        if any(getattr(block, "_chunk_size", None) is not None for block in named_blocks(transformer).values()):
            raise ValueError("cache needs whole MLPs: call transformer.disable_forward_chunking() before")

    def apply(self, transformer: Any) -> None:
        """Put hooks on the blocks, and on what is predicted in them."""
        from .hooks import apply_hooks, named_blocks, reused

        blocks = named_blocks(transformer)
        parts = {(block, name): getattr(blocks[block], name) for block in blocks for name in reused(blocks[block])}
        apply_hooks(blocks | parts, _State, self)

    def remove(self, transformer: Any) -> None:
        """Take the hooks off."""
        from .hooks import remove_hooks

        remove_hooks(transformer)

    def shares(self, transformer: Any, progress: Progress, tokens: int, text_tokens: int) -> dict[str, float]:
        """Leave out all of the blocks but the vectors that modulate them."""
        from .hooks import modulation_alone

        return {} if self.is_full(progress.step) else modulation_alone(transformer)

    def kept(self, transformer: Any, progress: Progress, batch: int, tokens: int, text_tokens: int) -> int:
        """Count the factors of every prediction: the outputs, and a difference for each order from the next on."""
        from .hooks import named_blocks, reused

        fulls = sum(self.is_full(step) for step in range(progress.step + 1))
        widths = {"attn2": tokens} | dict.fromkeys(("ff", "img_mlp"), tokens)
        widths |= dict.fromkeys(("ff_context", "txt_mlp"), text_tokens)
        names = (name for block in named_blocks(transformer).values() for name in reused(block))
        rows = sum(widths.get(name, tokens + text_tokens) for name in names)
        return batch * rows * transformer.inner_dim * min(fulls, self.order + 1)


class _State:
    """What is kept of one context's calls, see `ralu.caches.hooks`.

    factors: by the names of a block and of a module in it, the step of its last output and for each tensor of that the
             factors of its Taylor series.
    """

    def __init__(self, cache: TaylorSeer):
        self.cache = cache
        self.reset()

    def reset(self) -> None:
        self.call: Any = None
        self.factors: dict[tuple[str, str], tuple[int, list[list]]] = {}

    def begin(self, call: Any) -> None:
        self.step = call.progress.step
        # Skip-layer guidance may begin between two full steps.
        self.full = self.cache.is_full(self.step) or not self.factors

    def enter(self, place: Any, module: Any, args: tuple, kwargs: dict) -> tuple[Any, tuple, dict]:
        from .hooks import modulated

        output = None
        if not self.full and isinstance(place, str):
            output = modulated(module, args, kwargs, lambda name: self._predicted((place, name)))
        return output, args, kwargs

    def leave(self, place: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        if isinstance(place, tuple):
            last, before = self.factors.get(place, (0, []))
            factors = [[x] for x in (output if isinstance(output, tuple) else (output,))]
            for new, old in zip(factors, before, strict=False):
                for previous in old[: self.cache.order]:
                    new.append((new[-1] - previous) / (self.step - last))
            self.factors[place] = self.step, factors
        return output

    def _predicted(self, place: tuple[str, str]) -> list:
        last, factors = self.factors[place]
        ahead, outputs = self.step - last, []
        for output, *differences in factors:
            for k, difference in enumerate(differences, 1):
                output = output.add(difference, alpha=ahead**k / math.factorial(k))
            outputs.append(output)
        return outputs
