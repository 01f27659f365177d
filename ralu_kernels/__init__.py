"""Fused operations for mixed-resolution sampling of flow-matching transformers (RALU, arXiv 2507.08422)."""

from .adaln import concat_gelu, gated_add, gated_add_modulate, modulate
from .attention import attention_backend, varlen_attention
from .canny import canny, edge_density
from .qkv import Sequences, Stream, pack_qkv, pack_sequences, unpack
from .tokens import TokenPlan, merge_tokens, plan_tokens, promote_tokens
from .upsample import upsample_renoise

__version__ = "0.1.0"
__all__ = [
    "Sequences",
    "Stream",
    "TokenPlan",
    "attention_backend",
    "canny",
    "concat_gelu",
    "edge_density",
    "gated_add",
    "gated_add_modulate",
    "merge_tokens",
    "modulate",
    "pack_qkv",
    "pack_sequences",
    "plan_tokens",
    "promote_tokens",
    "unpack",
    "upsample_renoise",
    "varlen_attention",
]
