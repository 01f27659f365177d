"""TaylorSeer (arXiv 2503.06923): the outputs of attention and MLPs at skipped steps, by a Taylor series in the step."""

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import register

# Whole modules: diffusers' default hooks attention alone, which leaves three quarters of a step's work.
_PREDICTED = [r"transformer_blocks\.\d+\.(attn|attn2|ff|ff_context)", r"single_transformer_blocks\.\d+\.proj_out"]
_SKIPPED = [r"single_transformer_blocks\.\d+\.(attn|proj_mlp)"]  # only what follows them is predicted


@register("taylorseer")
@dataclass(frozen=True)
class TaylorSeer:
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
        for name, least, most in (("interval", 1, None), ("order", 0, 2), ("warmup", 1, None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
            if value < least or (most is not None and value > most):
                allowed = f"at least {least}" if most is None else f"from {least} to {most}"
                raise ValueError(f"{name} must be {allowed}, got {value}")

    def is_full(self, step: int) -> bool:
        """Say whether a stage's step, counted from 0, is computed in full."""
        return step < self.warmup or (step - self.warmup + 1) % self.interval == 0

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

    def reset(self, transformer: Any, stage: int, steps: int) -> None:
        """Forget nothing beyond the hooks' own state, which is reset with every diffusers cache."""

    @staticmethod
    def _hooks(transformer: Any):
        for module in transformer.modules():
            registry = getattr(module, "_diffusers_hook", None)
            if registry is not None and (hook := registry.get_hook("taylorseer_cache")) is not None:
                yield registry, hook


@dataclass(frozen=True)
class _Schedule:
    """Stands in for a hook's `_measure_should_compute`."""

    cache: TaylorSeer
    hook: Any

    def __call__(self) -> tuple[bool, Any]:
        state = self.hook.state_manager.get_state()
        state.current_step += 1
        return self.cache.is_full(state.current_step), state
