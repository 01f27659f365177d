"""Fused operations for mixed-resolution sampling of flow-matching transformers (RALU, arXiv 2507.08422)."""

from .tokens import TokenPlan, merge_tokens, plan_tokens, promote_tokens
from .upsample import upsample_renoise

__version__ = "0.1.0"
__all__ = ["TokenPlan", "merge_tokens", "plan_tokens", "promote_tokens", "upsample_renoise"]
