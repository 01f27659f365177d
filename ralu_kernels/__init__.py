"""Fused operations for mixed-resolution sampling of flow-matching transformers (RALU, arXiv 2507.08422)."""

from .adaln import concat_gelu, gated_add, gated_add_modulate, modulate
from .attention import attention_backend, varlen_attention
from .edges import canny, edge_density
from .layout import PackedLayout, packed_layout
from .plan import TokenPlan, plan_tokens
from .qkv import QKV, pack_qkv, unpack
from .tokens import upsample_remaining, upsample_selected
from .upsample import upsample_renoise

__version__ = "0.1.0"
__all__ = [
    "QKV",
    "PackedLayout",
    "TokenPlan",
    "attention_backend",
    "canny",
    "concat_gelu",
    "edge_density",
    "gated_add",
    "gated_add_modulate",
    "modulate",
    "pack_qkv",
    "packed_layout",
    "plan_tokens",
    "unpack",
    "upsample_remaining",
    "upsample_renoise",
    "upsample_selected",
    "varlen_attention",
]
