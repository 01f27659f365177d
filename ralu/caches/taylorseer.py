"""TaylorSeer (arXiv 2503.06923): the outputs of attention and MLPs at skipped steps, by a Taylor series in the step."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Cache, Progress, check_whole, is_full_step, register

# Whole modules: diffusers' default hooks attention alone, which leaves three quarters of a step's work.
_PREDICTED = [r"transformer_blocks\.\d+\.(attn|attn2|ff|ff_context)", r"single_transformer_blocks\.\d+\.proj_out"]
_SKIPPED = [r"single_transformer_blocks\.\d+\.(attn|proj_mlp)"]  # only what follows them is predicted


@register("taylorseer")
@dataclass(frozen=True)
class TaylorSeer(Cache):
    """Predict module outputs from those of the last full steps, on diffusers' own hooks.

    The transformer is computed in full at steps 0 to warmup - 1, and then at every interval-th step from warmup - 1 on,
    as in the published code; diffusers' own schedule comes two steps later. In between only norms, modulation and
    embeddings are computed.

    interval: N, steps from one full step to the next, at least 1.
    order:    of the Taylor series, 0 to 2.
    warmup:   W, full steps at the beginning, at least 1; with RALU at the beginning of every stage.

    Raises ValueError for values out of range, and TypeError for what is no whole number.
    """

    families: ClassVar[tuple[str, ...]] = ("flux", "sd3")

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

    def apply(self, transformer: Any) -> None:
        """Put diffusers' hooks on the modules, with the published schedule."""
        from diffusers import TaylorSeerCacheConfig
        from diffusers.hooks import apply_taylorseer_cache

        config = TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.warmup,
            max_order=self.order,
            taylor_factors_dtype=transformer.dtype,
            cache_identifiers=_PREDICTED,
            skip_predict_identifiers=_SKIPPED,
        )
        apply_taylorseer_cache(transformer, config)
        for _, hook in self._hooks(transformer):
            hook._measure_should_compute = _Schedule(self, hook)

    def remove(self, transformer: Any) -> None:
        """Take the hooks off."""
        for registry, _ in list(self._hooks(transformer)):
            registry.remove_hook("taylorseer_cache", recurse=False)

    def shares(self, transformer: Any, progress: Progress, tokens: int, text_tokens: int) -> dict[str, float]:
        """Leave out the modules that are predicted, and those that these alone need."""
        if self.is_full(progress.step):
            return {}
        return dict.fromkeys(_matching(transformer, _PREDICTED + _SKIPPED), 0.0)

    def kept(self, transformer: Any, progress: Progress, batch: int, tokens: int, text_tokens: int) -> int:
        """Count the factors of every prediction: the outputs, and a difference for each order from the next on."""
        fulls = sum(self.is_full(step) for step in range(progress.step + 1))
        widths = {"attn": tokens + text_tokens, "attn2": tokens, "ff": tokens, "ff_context": text_tokens}
        names = _matching(transformer, _PREDICTED)
        rows = sum(widths.get(name.rpartition(".")[2], tokens + text_tokens) for name in names)
        return batch * rows * transformer.inner_dim * min(fulls, self.order + 1)

    @staticmethod
    def _hooks(transformer: Any):
        for module in transformer.modules():
            registry = getattr(module, "_diffusers_hook", None)
            if registry is not None and (hook := registry.get_hook("taylorseer_cache")) is not None:
                yield registry, hook


def _matching(transformer: Any, patterns: list[str]) -> list[str]:
    """Name the modules that one of the patterns fits."""
    whole = re.compile("|".join(patterns))
    return [name for name, _ in transformer.named_modules() if whole.fullmatch(name)]


@dataclass(frozen=True)
class _Schedule:
    """Stands in for a hook's `_measure_should_compute`."""

    cache: TaylorSeer
    hook: Any

    def __call__(self) -> tuple[bool, Any]:
        state = self.hook.state_manager.get_state()
        state.current_step += 1
        return self.cache.is_full(state.current_step), state
