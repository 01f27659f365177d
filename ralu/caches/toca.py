"""ToCa (arXiv 2410.05317): attention's outputs are kept, and the MLPs run for the few tokens that matter most."""

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Cache, Progress, check_number, check_whole, is_full_step, register


@register("toca")
@dataclass(frozen=True)
class ToCa(Cache):
    """Compute at most steps no attention, and of every MLP the rows of a few tokens alone.

    The transformer is computed in full at steps 0 to warmup - 1, and then at every interval-th step from warmup - 1 on.
    In between a block uses again what its attention gave at the last full step, under the modulation of the step. Its
    MLP (FLUX's single blocks: MLP and output projection) is computed for the k tokens of n with the highest

        score / ||score||_2 + staleness · (steps that it was left out since it was computed) / interval,

    and is for all others what it was when they were computed. Layer l of 0, 1, ... of its kind computes

        k = int(n · (1 - cache_ratio) · (1 + layer_weight · (1 - 2 l / 27)) · stream),

    from 0 to n, where stream is 1 - stream_weight in FLUX's double blocks, 1 + stream_weight in its single blocks and
    1 in SD3. Text and image are chosen from separately where a block has two streams. Every sample chooses for itself,
    each half of guidance too, and padding is never chosen. These are the rules of the published code for FLUX, which is
    for one image; for SD3 none was published.

    interval:      N, steps from one full step to the next, at least 1.
    cache_ratio:   R, in [0, 1].
    score:         "attention": the attention that the token's key received at the last full step, a mean over heads and
                   queries. "norm": its length, a mean over heads, before keys are normalised; costs nothing.
    staleness:     weight of the second term, at least 0.
    layer_weight:  at least 0; 0 treats all layers alike.
    stream_weight: in [0, 1]; 0 treats all blocks alike.
    warmup:        full steps at the beginning, at least 1; with RALU at the beginning of every stage.

    Blocks may be fused. Compiled ones run as compiled in full steps that are followed by another one, and otherwise
    module by module. Between steps 2·B·(L + T)·D elements a block are kept, with L tokens of the image and T of the
    text, and B·L·D more where SD3.5-medium has a second attention; no step keeps what the next one does not use.
    Memory for scores grows with L, never with L²: attention's weights are made for a few queries at a time.

    Raises ValueError for values out of range, and TypeError for values of another type.
    """

    families: ClassVar[tuple[str, ...]] = ("flux", "sd3")

    interval: int = 4
    cache_ratio: float = 0.9
    score: str = "attention"
    staleness: float = 0.25
    layer_weight: float = 0.5
    stream_weight: float = 0.6
    warmup: int = 3

    def __post_init__(self):
        check_whole("interval", self.interval, 1)
        check_number("cache_ratio", self.cache_ratio, 0, 1)
        if not isinstance(self.score, str):
            raise TypeError(f"score must be a string, got {self.score!r}")
        if self.score not in ("attention", "norm"):
            raise ValueError(f"score must be one of attention, norm, got {self.score!r}")
        check_number("staleness", self.staleness, 0)
        check_number("layer_weight", self.layer_weight, 0)
        check_number("stream_weight", self.stream_weight, 0, 1)
        check_whole("warmup", self.warmup, 1)

    def is_full(self, step: int) -> bool:
        """Say whether a stage's step, counted from 0, is computed in full."""
        return is_full_step(step, self.warmup, self.interval)

    def keeps(self, progress: Progress) -> bool:
        """Say whether the step after this one uses what a block keeps."""
        return progress.step + 1 < progress.steps and not self.is_full(progress.step + 1)

    def fresh_ratio(self, layer: int, stream: int) -> float:
        """Return k / n of a layer. stream: -1 for FLUX's double blocks, 1 for its single blocks, 0 for SD3's."""
        layers = 1 + self.layer_weight - 2 * self.layer_weight * layer / 27
        return min(1.0, max(0.0, (1 - self.cache_ratio) * layers * (1 + stream * self.stream_weight)))

    def apply(self, transformer: Any) -> None:
        """Put a hook on every block."""
        from ..families import family_of_transformer
        from .parts import apply_block_hooks
        from .toca_block import State

        blocks = {place: transformer.get_submodule(name) for name, place in _places(transformer).items()}
        apply_block_hooks(blocks, State, self, family_of_transformer(transformer).text_first)

    def remove(self, transformer: Any) -> None:
        """Take the hooks off."""
        from .hooks import remove_hooks

        remove_hooks(transformer)

    def shares(self, transformer: Any, progress: Progress, tokens: int, text_tokens: int) -> dict[str, float]:
        """Leave out attention, and of the MLPs all but k of n rows; scores take queries times keys once more."""
        shares: dict[str, float] = {}
        for name, (layer, stream) in _places(transformer).items():
            block = transformer.get_submodule(name)
            if not self.is_full(progress.step):
                shares |= dict.fromkeys((f"{name}.attn", f"{name}.attn2"), 0.0)
                rows = ("proj_mlp", "proj_out") if stream == 1 else ("ff", "ff_context")
                shares |= {f"{name}.{part}": self.fresh_ratio(layer, stream) for part in rows}
            elif self.keeps(progress) and self.score == "attention":
                shares |= {f"{name}.attn.{part}": 1.0 for part, _ in block.attn.named_children()}
                shares[f"{name}.attn"] = 1.5
        return shares

    def kept(self, transformer: Any, progress: Progress, batch: int, tokens: int, text_tokens: int) -> int:
        """Count the outputs of attention and MLPs, and float32 scores and ages."""
        if self.is_full(progress.step) and not self.keeps(progress):
            return 0
        elements, numbers = 0, 2 * 4 // transformer.dtype.itemsize
        for name in _places(transformer):
            block = transformer.get_submodule(name)
            both = tokens if getattr(block, "context_pre_only", False) else tokens + text_tokens
            second = tokens if getattr(block, "attn2", None) is not None else 0
            elements += (2 * both + second) * transformer.inner_dim + both * numbers
        return batch * elements


def _places(transformer: Any) -> dict[str, tuple[int, int]]:
    """Return of every block, by name, its layer and stream, see `ToCa.fresh_ratio`."""
    blocks = {part: getattr(transformer, part, ()) for part in ("transformer_blocks", "single_transformer_blocks")}
    streams = -1 if blocks["single_transformer_blocks"] else 0, 1
    return {
        f"{part}.{layer}": (layer, stream)
        for (part, kind), stream in zip(blocks.items(), streams, strict=True)
        for layer in range(len(kind))
    }
