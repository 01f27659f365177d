"""Fused operations for mixed-resolution sampling of flow-matching transformers (RALU, arXiv 2507.08422)."""

from .canny import canny, edge_density
from .tokens import TokenPlan, merge_tokens, plan_tokens, promote_tokens
from .upsample import upsample_renoise

__version__ = "0.1.0"
__all__ = ["TokenPlan", "canny", "edge_density", "merge_tokens", "plan_tokens", "promote_tokens", "upsample_renoise"]
