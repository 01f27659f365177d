"""RAS (arXiv 2502.10389): most steps compute some of the image's tokens; the others keep keys, values and velocity."""

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Cache, Progress, check_number, check_whole, register


@register("ras")
@dataclass(frozen=True)
class RAS(Cache):
    """Compute at most steps the image's tokens whose velocity varies neither least nor most, and all of the text's.

    A stage's first `start` steps are dense, and so are those from `end` on and the `resets`; the others are sparse. A
    sparse step drops d = int((1 - ratio) · n) of an image's n tokens: of their metrics, the int(d · (1 - high_ratio))
    lowest and the int(d · high_ratio) highest. Queries are of the tokens that stay, and keys and values of dropped ones
    are those that they had last. A dropped token goes on with its last velocity, of after guidance. The metric is that
    of the velocity at the step before,

        std(v) over the latent's channels, a mean over the token's 4 pixels, times exp(starvation · (steps dropped)).

    These are the published rules and the constants of the authors' script for SD3, whose run of 28 steps has 22 sparse
    ones; their FLUX variant drops in the same way. Each image chooses for itself, for all its calls in a step.

    ratio:      of the tokens that sparse steps compute, above 0 and at most 1, which is exact.
    high_ratio: share of the dropped that have the highest metrics, in [0, 1].
    starvation: at least 0; the more, the sooner a token that was dropped is computed again.
    metric:     "std", or "l2norm", the length of v over the channels instead.
    start:      dense steps at the beginning, at least 1.
    end:        step from which on all are dense; 0 for none.
    resets:     later dense steps, as in "12/20"; "none" for none.

    With RALU steps, metrics and counts are those of each stage, and a mixed stage is dense throughout: its tokens are
    of two sizes, and their velocities vary by size as well. Blocks may be fused; sparse steps and the dense ones before
    them run uncompiled. Attention in sparse steps is PyTorch's. Between steps 2·B·L·D elements an attention are kept,
    of B rows with L tokens of the image.

    Raises ValueError for values out of range, and TypeError for values of another type.
    """

    families: ClassVar[tuple[str, ...]] = ("flux", "sd3")

    ratio: float = 0.5
    high_ratio: float = 0.3
    starvation: float = 0.1
    metric: str = "std"
    start: int = 4
    end: int = 0
    resets: str = "12/20"

    def __post_init__(self):
        check_number("ratio", self.ratio, 0, 1)
        if self.ratio == 0:
            raise ValueError("ratio must be above 0, got 0")
        check_number("high_ratio", self.high_ratio, 0, 1)
        check_number("starvation", self.starvation, 0)
        check_whole("start", self.start, 1)
        check_whole("end", self.end, 0)
        for name in ("metric", "resets"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {getattr(self, name)!r}")
        if self.metric not in ("std", "l2norm"):
            raise ValueError(f"metric must be one of std, l2norm, got {self.metric!r}")
        if self.resets != "none" and not all(step.isdecimal() for step in self.resets.split("/")):
            raise ValueError(f"resets must be steps as in '12/20', or 'none', got {self.resets!r}")

    def is_sparse(self, progress: Progress) -> bool:
        """Say whether a step computes a part of the tokens."""
        resets = () if self.resets == "none" else map(int, self.resets.split("/"))
        inside = self.start <= progress.step < (self.end or progress.steps) and progress.step not in resets
        return self.ratio < 1 and inside and not progress.mixed

    def keeps(self, progress: Progress) -> bool:
        """Say whether the step after this one is sparse."""
        following = next(progress.ahead(), None)
        return following is not None and self.is_sparse(following)

    def dropped(self, tokens: int) -> tuple[int, int]:
        """Count the tokens with the lowest and with the highest metrics that are dropped of so many."""
        count = min(int((1 - self.ratio) * tokens), tokens - 1)
        return int(count * (1 - self.high_ratio)), int(count * self.high_ratio)

    def check(self, transformer: Any) -> None:
        """Raise ValueError for a transformer whose attention is not the stock or the fused one."""
        from ..blocks import Processor
        from ..families import family_of_transformer
        from .hooks import named_blocks

        served = (*family_of_transformer(transformer).stock_processors, Processor)
        for block in named_blocks(transformer).values():
            if not isinstance(block.attn.processor, served):
                kind = type(block.attn.processor).__name__
                raise ValueError(f"cache ras must have stock attention in pipe.transformer, got {kind}")

    def apply(self, transformer: Any) -> None:
        """Put a hook on every block."""
        from ..families import family_of_transformer
        from .hooks import named_blocks
        from .parts import apply_block_hooks
        from .ras_block import Choice, State

        blocks = dict(enumerate(named_blocks(transformer).values()))
        text_first = family_of_transformer(transformer).text_first
        apply_block_hooks(blocks, State, self, text_first, len(blocks), Choice(self))

    def remove(self, transformer: Any) -> None:
        """Take the hooks off."""
        from .hooks import remove_hooks

        remove_hooks(transformer)

    def reset(self, transformer: Any, stage: int, steps: int) -> None:
        """Look whether attention is still the stock one; the hooks' state is reset already."""
        self.check(transformer)

    def velocity(self, transformer: Any, tokens: Any, progress: Progress) -> Any:
        """Give dropped tokens their last velocity, and choose those that the next step drops."""
        from .hooks import hooks_of

        _, hook = next(hooks_of(transformer))
        choice = hook.state_manager._init_args[-1]
        return choice.step(tokens, self.is_sparse(progress), self.keeps(progress))

    def shares(self, transformer: Any, progress: Progress, tokens: int, text_tokens: int) -> dict[str, float]:
        """Leave out the rows of dropped tokens; of attention's weights their rows alone."""
        from .hooks import named_blocks

        if not self.is_sparse(progress):
            return {}
        few = tokens - sum(self.dropped(tokens))
        shares: dict[str, float] = {}
        image, joint = few / tokens, (few + text_tokens) / (tokens + text_tokens)
        for name, block in named_blocks(transformer).items():
            single = hasattr(block, "proj_mlp")
            shares |= {name: joint if single else image, f"{name}.attn": joint}
            text = ("add_q_proj", "add_k_proj", "add_v_proj", "to_added_qkv", "to_add_out")
            for part, _ in block.attn.named_children():
                shares[f"{name}.attn.{part}"] = joint if single else 1.0 if part in text else image
            shares |= dict.fromkeys(
                (f"{name}.{part}" for part in ("norm", "norm1", "norm1_context", "ff_context")), 1.0
            )
        return shares

    def kept(self, transformer: Any, progress: Progress, batch: int, tokens: int, text_tokens: int) -> int:
        """Count the image's keys and values."""
        from .hooks import named_blocks

        if not (self.is_sparse(progress) or self.keeps(progress)):
            return 0
        blocks = named_blocks(transformer).values()
        attentions = sum(1 + (getattr(block, "attn2", None) is not None) for block in blocks)
        return 2 * batch * tokens * transformer.inner_dim * attentions
