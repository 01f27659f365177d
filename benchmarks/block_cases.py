"""What bench.py measures inside the transformer blocks; see cases.py."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from cases import Case, Operation, Shape, installed, package
from torch import Tensor

import ralu_kernels


@dataclass(frozen=True)
class Block:
    """What a model's blocks have in common.

    heads, size: of attention, and channels of a head.
    text:        tokens of a prompt.
    norm, rotary: whether queries and keys are normalised, and rotated.
    """

    heads: int
    size: int
    text: int
    norm: bool
    rotary: bool

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.size


BLOCKS = {
    "flux-dev": Block(24, 128, 512, norm=True, rotary=True),
    "sd3-medium": Block(24, 64, 333, norm=False, rotary=False),
    "sd3.5-large": Block(38, 64, 333, norm=True, rotary=False),
}


def block_case(shape: Shape, inputs, ours, eager, **others) -> Case:
    """Make the case of an operation that Triton alone has a kernel for."""
    return Case(inputs, ours, eager, backends=installed(shape.device, "triton"), others=others)


def modulated(shape: Shape):
    """Make the image's tokens (B, S, D), and three vectors (B, D)."""
    block = BLOCKS[shape.model]
    x = shape.randn(shape.batch, (shape.pixels // 16) ** 2, block.width)
    return x, *(0.1 * shape.randn(shape.batch, block.width) for _ in range(3))


def eager_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute `ralu_kernels.modulate` in eager PyTorch."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def modulate_case(shape: Shape) -> Case:
    """Normalise and modulate, as AdaLN does before attention."""
    x, shift, scale, _ = inputs = modulated(shape)
    ours = partial(ralu_kernels.modulate, x, shift, scale)
    others = {}
    if kitchen := package("comfy_kitchen"):
        others["comfy-kitchen"] = lambda: kitchen.adaln(x, scale[:, None], shift[:, None])
    if shape.batch == 1 and shape.device.type == "cuda" and (liger := package("liger_kernel.transformers.functional")):
        others["liger"] = lambda: liger.liger_layer_norm(x, 1 + scale[0], shift[0], 1e-6)  # one weight for all samples
    return block_case(
        shape, inputs[:3], lambda backend: ours(backend=backend), partial(eager_modulate, x, shift, scale), **others
    )


def gated_add_case(shape: Shape) -> Case:
    """Add a gated branch to the residual stream."""
    (x, gate, *_), y = modulated(shape), modulated(shape)[0]
    ours = partial(ralu_kernels.gated_add, x, gate, y)
    return block_case(shape, [x, gate, y], lambda backend: ours(backend=backend), lambda: x + gate[:, None] * y)


def gated_add_modulate_case(shape: Shape) -> Case:
    """Do both in one pass."""
    (x, gate, shift, scale), y = modulated(shape), modulated(shape)[0]
    ours = partial(ralu_kernels.gated_add_modulate, x, gate, y, shift, scale)

    def eager():
        total = x + gate[:, None] * y
        return total, eager_modulate(total, shift, scale)

    return block_case(shape, [x, gate, y, shift, scale], lambda backend: ours(backend=backend), eager)


def concat_gelu_case(shape: Shape) -> Case:
    """Put attention's output beside the activated MLP, as FLUX's single blocks do."""
    x, *_ = modulated(shape)
    y = shape.randn(*x.shape[:2], 4 * x.shape[2])
    return block_case(
        shape, [x, y], lambda backend: ralu_kernels.concat_gelu(x, y, backend=backend),
        lambda: torch.cat([x, F.gelu(y, approximate="tanh")], dim=2),
    )  # fmt: skip


def joint(shape: Shape, dense: bool):
    """Make the lengths of both streams, the layout of their packed sequences, and the padded rows that are packed.

    The images of a ragged batch have different numbers of tokens, and their texts half of theirs.
    """
    lengths = BLOCKS[shape.model].text, (shape.pixels // 16) ** 2
    if not BLOCKS[shape.model].rotary:
        lengths = lengths[::-1]  # SD3 has the image first
    tokens = torch.arange(max(lengths), device=shape.device)
    masks = []
    for length in lengths:
        shares = [0.5 if length == BLOCKS[shape.model].text else 1 - i / (2 * shape.batch) for i in range(shape.batch)]
        masks.append(torch.stack([tokens[:length] < int(share * length) for share in shares]))
    mask = torch.cat(masks, dim=1)
    if dense:
        mask = torch.ones_like(mask)
    layout = ralu_kernels.packed_layout(mask, shape.batch, sum(lengths), shape.device)
    return lengths, layout, mask.flatten().nonzero()[:, 0]


def pack_case(shape: Shape) -> Case:
    """Normalise, rotate and pack the queries, keys and values of two streams."""
    from diffusers.models.embeddings import apply_rotary_emb

    block, dense = BLOCKS[shape.model], shape.batch == 1
    lengths, layout, rows = joint(shape, dense)
    weights = [1 + 0.1 * shape.randn(block.size) if block.norm else None for _ in range(2)]
    streams = [
        ralu_kernels.QKV(*(shape.randn(shape.batch, length, block.width) for _ in range(3)), *weights)
        for length in lengths
    ]
    angle = torch.rand(sum(lengths), block.size // 2, device=shape.device).repeat_interleave(2, dim=-1)
    rotary = (angle.cos(), angle.sin()) if block.rotary else None

    def ours(backend):
        return ralu_kernels.pack_qkv(streams, layout, block.heads, rotary=rotary, backend=backend)

    def eager():
        packed = []
        for name, weight in zip("qkv", (*weights, None), strict=True):
            parts = [getattr(stream, name).unflatten(2, (block.heads, block.size)) for stream in streams]
            if weight is not None:
                parts = [F.rms_norm(x, (block.size,), weight, eps=1e-6) for x in parts]
            x = torch.cat(parts, dim=1)
            if rotary and name != "v":
                x = apply_rotary_emb(x, rotary, sequence_dim=1)
            packed.append(x.flatten(0, 1) if dense else x.flatten(0, 1).index_select(0, rows))
        return tuple(packed)

    others = {}
    if block.norm and rotary and (kitchen := package("comfy_kitchen")):
        cos, sin = (table[None, :, None, ::2] for table in rotary)
        turns = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2)).split(lengths, dim=1)

        def rotated():
            """Norm and rotate each stream with its kernel, since a model's two have weights of their own."""
            parts = []
            for stream, turn in zip(streams, turns, strict=True):
                q, k, v = (x.unflatten(2, (block.heads, block.size)) for x in stream[:3])
                parts.append((*kitchen.rms_rope(q, k, turn, *weights, 1e-6), v))
            joined = (torch.cat(pair, dim=1).flatten(0, 1) for pair in zip(*parts, strict=True))
            return tuple(x if dense else x.index_select(0, rows) for x in joined)

        others["comfy-kitchen"] = rotated
    inputs = [x for stream in streams for x in stream[:3]] + [x for x in (*weights, *(rotary or ())) if x is not None]
    return block_case(shape, inputs, ours, eager, **others)


def unpack_case(shape: Shape) -> Case:
    """Undo the packing of a ragged batch."""
    block = BLOCKS[shape.model]
    lengths, layout, rows = joint(shape, dense=False)  # a dense one is nothing but views
    x = shape.randn(len(rows), block.heads, block.size)

    def eager():
        padded = x.new_zeros(shape.batch * sum(lengths), block.width).index_copy_(0, rows, x.flatten(1))
        return padded.unflatten(0, (shape.batch, -1)).split(lengths, dim=1)

    return block_case(
        shape,
        [x, layout.inverse],
        lambda backend: ralu_kernels.unpack(x, layout, lengths, backend=backend),
        eager,
    )


def attention_case(shape: Shape) -> Case:
    """Attend jointly, dense for one image and ragged for several; eager pads and masks."""
    from ralu_kernels import attention

    block, dense = BLOCKS[shape.model], shape.batch == 1
    lengths, layout, rows = joint(shape, dense)
    q, k, v = (shape.randn(len(rows), block.heads, block.size) for _ in range(3))
    mask = torch.zeros(shape.batch * sum(lengths), dtype=torch.bool, device=shape.device).index_fill_(0, rows, True)
    padded = [x.new_zeros(len(mask), *x.shape[1:]).index_copy_(0, rows, x) for x in (q, k, v)]
    padded = [x.unflatten(0, (shape.batch, -1)).transpose(1, 2) for x in padded]
    mask = None if dense else mask.view(shape.batch, 1, 1, -1)

    def ours(backend):
        if backend == "reference":
            parts = (x.float().split(layout.cu_seqlens.diff().tolist()) for x in (q, k, v))
            attended = [
                F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part)) for part in zip(*parts, strict=True)
            ]
            return torch.cat([x.transpose(0, 1) for x in attended]).to(q.dtype)
        ends, longest = layout.cu_seqlens, layout.max_seqlen
        return ralu_kernels.varlen_attention(q, k, v, ends, ends, longest, longest, backend=backend)

    def eager():
        x = F.scaled_dot_product_attention(*padded, attn_mask=mask).transpose(1, 2).flatten(0, 1)
        return x if dense else x.index_select(0, rows)

    backends = tuple(name for name in attention.BACKENDS if attention._why_not(name, q) is None)
    return Case([q, k, v], ours, eager, backends=backends)


# No kernel of these is for a CPU.
OPERATIONS = {
    "modulate": Operation(modulate_case, tuple(BLOCKS), devices=("cuda",)),
    "gated_add": Operation(gated_add_case, tuple(BLOCKS), devices=("cuda",)),
    "gated_add_modulate": Operation(gated_add_modulate_case, tuple(BLOCKS), devices=("cuda",)),
    "concat_gelu": Operation(concat_gelu_case, ("flux-dev",), devices=("cuda",)),
    "pack_qkv": Operation(pack_case, tuple(BLOCKS), devices=("cuda",)),
    "unpack": Operation(unpack_case, tuple(BLOCKS), devices=("cuda",)),
    "varlen_attention": Operation(attention_case, tuple(BLOCKS), devices=("cuda",)),
}
