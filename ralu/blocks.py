"""`fuse` and `unfuse`: the transformer blocks of FLUX and SD3 on `ralu_kernels`, with or without RALU.

The blocks' modules stay where they are and are called as modules: LoRA, quantised linears and hooks on them never know.
Between them the stock blocks make a pass over memory for every product and sum; these make one for each residual.
"""

from functools import lru_cache, partial
from inspect import signature
from types import MethodType
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

import ralu_kernels
from ralu_kernels import QKV, PackedLayout, packed_layout, unchecked

from .families import Family, family_of_transformer

logger = logging.get_logger("diffusers.ralu")  # diffusers' own verbosity rules


def fuse(transformer: nn.Module, *, trim_text: bool = False) -> nn.Module:
    """Make the blocks of a stock transformer run on `ralu_kernels`. Returns the same transformer.

    transformer: a `FluxTransformer2DModel` or `SD3Transformer2DModel` (SD3, SD3.5), compiled or not; for inference.
    trim_text:   leave text tokens whose embedding is all zeros out of the sequences: prompts of different lengths then
                 share a batch, and none has padding in its attention. This changes the images: as they were trained,
                 FLUX and SD3 attend to the padding of T5. `ralu.enable(pipe, trim_text=True)` makes padding zeros;
                 embeddings of your own need `prompt_embeds * mask.unsqueeze(-1)`.

    Up to rounding the images are the stock ones. Every hook keeps working: caches (TaylorSeer, FirstBlockCache, ...),
    offloading and LoRA may come before or after. Attention goes by `ralu.attention_backend`, not by diffusers'
    `set_attention_backend`. Images of different lengths in one batch are padded at will and told apart by
    ``joint_attention_kwargs={"image_mask": mask}``, bool (B, image tokens), or (b, image tokens) where guidance repeats
    a batch of b; their padding is in no attention, and what comes out there has no meaning. A mask, or text to trim, is
    read once, which waits for the device: for other contents give another tensor. Compile first, then fuse.

    A transformer whose attention is not the stock one (IP-adapter, context parallelism, a chosen attention backend) or
    whose weights are offloaded layer by layer is left unfused, now or later, which is said once; so is one that has
    blocks of other classes or is tensor-parallel. Raises ValueError for another model, and for blocks whose forward was
    replaced, and TypeError for what is no module or trim_text that is no bool.
    """
    model = unwrapped(transformer)
    family = family_of_transformer(model)
    check_trim_text(trim_text)
    check_fusible(family)
    unfuse(model)
    blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]
    strange = next((type(block).__name__ for block in blocks if type(block) not in family.fused_blocks), None)
    obstacle = f"it has blocks of class {strange}" if strange else _obstacle(blocks, family.stock_processors)
    if getattr(model, "_parallel_config", None) is not None:
        obstacle = "it is parallel"
    if obstacle:
        logger.warning_once(f"RALU leaves this transformer unfused: {obstacle}")
        return transformer
    model.ralu_fusion = Fusion(transformer, family, blocks, trim_text)
    first = {type(block): block for block in reversed(blocks)}
    try:
        for block in blocks:
            replacement = family.fused_blocks[type(block)]
            _replace_forward(block, type(block).forward, replacement.forward)
            for attention in _attentions(block):
                checked = block is first[type(block)]
                attention.set_processor(replacement.processor(attention.processor, checked))
                _replace_forward(attention, type(attention).forward, _attend, required=False)
    except ValueError:
        unfuse(model)
        raise
    return transformer


def unfuse(transformer: nn.Module) -> nn.Module:
    """Put a transformer back exactly as it was before `fuse`; does nothing to a stock one. Returns the transformer.

    Raises TypeError for what is no module.
    """
    if not isinstance(transformer, nn.Module):
        raise TypeError(f"transformer must be a module, got {type(transformer).__name__}")
    fusion = vars(unwrapped(transformer)).pop("ralu_fusion", None)
    if fusion is not None:
        fusion.handle.remove()
        for block in fusion.blocks:
            fused = fusion.family.fused_blocks[type(block)].forward
            _replace_forward(block, fused, type(block).forward, required=False)
            for attention in _attentions(block):
                _replace_forward(attention, _attend, type(attention).forward, required=False)
                if isinstance(attention.processor, Processor):  # and not one put in since
                    attention.set_processor(attention.processor.stock or attention._default_processor_cls())
    return transformer


def check_fusible(family: Family):
    """Raise ValueError for a family whose blocks cannot be fused."""
    if not family.fused_blocks:
        name = family.transformer.__name__
        raise ValueError(f"fused must be False or 'auto' and trim_text False: the blocks of a {name} cannot be fused")


def check_trim_text(trim_text: bool):
    """Raise TypeError for what is no bool."""
    if not isinstance(trim_text, bool):
        raise TypeError(f"trim_text must be True or False, got {trim_text!r}")


def is_fused(transformer: nn.Module) -> bool:
    """Say whether a transformer is fused. Where its attention is not `fuse`'s any more, it is unfused first."""
    fusion = vars(unwrapped(transformer)).get("ralu_fusion")
    if fusion is None or fusion.as_seen():
        return fusion is not None
    if obstacle := _obstacle(fusion.blocks, fusion.processors):
        logger.warning_once(f"RALU unfuses this transformer: {obstacle}")
        unfuse(transformer)
        return False
    fusion.seen = [(attention, attention.processor, attention.norm_q) for attention in _all_attention(fusion.blocks)]
    return True


def unwrapped(transformer: nn.Module) -> Any:  # to PyTorch's annotations all that a module has is Tensor | Module
    """Return the model itself, where `torch.compile` has made a new module of it."""
    return getattr(transformer, "_orig_mod", transformer)


def named_arguments(transformer: nn.Module) -> list[str]:
    """List the names of what the model's forward takes, in order."""
    return list(signature(type(unwrapped(transformer)).forward).parameters)[1:]


class Fusion:
    """A forward pre-hook that lays out the joint sequences, once for all blocks and for all calls with one layout."""

    def __init__(self, transformer: nn.Module, family: Family, blocks: list[nn.Module], trim_text: bool):
        self.family, self.blocks, self.trim_text = family, blocks, trim_text
        self.parameters = named_arguments(transformer)
        self.handle = transformer.register_forward_pre_hook(self, with_kwargs=True)
        self.seen: list[tuple[Any, ...]] = []
        self._remember()

    @property
    def processors(self) -> tuple[type, ...]:
        """Classes of the attention processors that `fuse` sets."""
        return tuple(block.processor for block in self.family.fused_blocks.values())

    def as_seen(self) -> bool:
        """Say whether no attention has another processor or new hooks since it was looked at closely."""
        for attention, processor, norm in self.seen:
            if attention.processor is not processor or (norm is not None and not _HOOKS.isdisjoint(vars(norm))):
                return False
        return bool(self.seen)

    def _remember(self):
        # To these caches tensors are equal when they are the same object.
        self.text_mask, self.layouts = lru_cache(4)(_text_mask), lru_cache(8)(_layouts)

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key not in ("text_mask", "layouts")}

    def __setstate__(self, state):
        self.__dict__ = state
        self._remember()

    @torch.compiler.disable  # the hook is within what `transformer.compile()` compiles
    def __call__(self, module, args, kwargs):
        """Put the packed layouts into a call's `joint_attention_kwargs`, under "sequences" and "image_sequences".

        Raises ValueError for an `attention_mask` among them.
        """
        if not is_fused(module):
            return args, kwargs
        family, kwargs = self.family, dict(zip(self.parameters, args, strict=False)) | kwargs
        sample, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        given = dict(kwargs.get("joint_attention_kwargs") or {})
        if "attention_mask" in given:
            raise ValueError("fused attention takes no attention_mask; tell of padding by image_mask, or ralu.unfuse")
        length, text_mask = text.shape[1], None
        if self.trim_text:
            length, text_mask = self.text_mask(text)
            family.trim_text(kwargs, length)
        lengths = length, family.image_tokens(module, kwargs)
        masks, total = (text_mask, given.pop("image_mask", None)), given.pop("image_total", None)
        order = family.text_first, family.image_alone
        given["sequences"], image = self.layouts(*masks, total, len(sample), *lengths, sample.device, *order)
        if family.image_alone:
            given["image_sequences"] = image
        kwargs["joint_attention_kwargs"] = given
        return (), kwargs


def _text_mask(text: Tensor) -> tuple[int, Tensor]:
    """Find the length t, up to the last of the embeddings (B, T, D) that is not 0, and which are not, bool (B, t)."""
    mask = text.any(-1)
    length = int((mask.any(0) * torch.arange(1, 1 + text.shape[1], device=text.device)).amax().clamp_min(1))
    return length, mask[:, :length]


def _layouts(
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    image_total: int | None,
    batch: int,
    text: int,
    image: int,
    device,
    text_first: bool,
    image_alone: bool,
) -> tuple[PackedLayout, PackedLayout | None]:
    """Lay out the joint sequences, and for SD3 the image's alone, which SD3.5-medium's second attention is over.

    image_total: the image tokens of all samples of the mask, where it is known: then nothing waits for the device.
    """
    joint = total = None
    if image_mask is not None:
        repeats = batch // len(image_mask)
        image_mask = image_mask.repeat(repeats, 1)
        image_total = None if image_total is None else image_total * repeats
        total = None if image_total is None or text_mask is not None else image_total + batch * text
    if text_mask is not None or image_mask is not None:
        full = torch.ones(1, 1, dtype=torch.bool, device=device)
        masks = [
            full.expand(batch, length) if mask is None else mask.to(device)
            for mask, length in ((text_mask, text), (image_mask, image))
        ]
        joint = torch.cat(masks if text_first else masks[::-1], dim=1)
    alone = packed_layout(image_mask, batch, image, device, total=image_total) if image_alone else None
    return packed_layout(joint, batch, text + image, device, total=total), alone


# ---- attention ----


class Processor:
    """Attention of one stream, or jointly of two, that computes no padding.

    checked: whether the block's operations check their arguments. The first block of a class does it for all, which
             have the same shapes.
    """

    text_first = True

    def __init__(self, stock=None, checked: bool = True):
        self.stock, self.checked = stock, checked

    @property
    def operations(self) -> Any:
        """The module with the block's operations."""
        return ralu_kernels if torch.compiler.is_compiling() or self.checked else unchecked

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None,
        sequences: PackedLayout | None = None,
    ):  # fmt: skip
        """Attend: streams (B, L, D), the image's first, to results of the same shapes (stock signature)."""
        ops, streams = self.operations, [_project(attn, hidden_states, *_IMAGE)]
        if encoder_hidden_states is not None:
            streams.append(_project(attn, encoder_hidden_states, *_TEXT))
        order = -1 if self.text_first else 1
        lengths = [stream.q.shape[1] for stream in streams[::order]]
        if sequences is None:
            sequences = packed_layout(None, len(hidden_states), sum(lengths), hidden_states.device)
        if image_rotary_emb is not None and not isinstance(image_rotary_emb[0], Tensor):
            image_rotary_emb = tuple(t.table for t in image_rotary_emb)
        q, k, v = ops.pack_qkv(streams[::order], sequences, attn.heads, rotary=image_rotary_emb)
        starts, longest = sequences.cu_seqlens, sequences.max_seqlen
        attended = ops.varlen_attention(q, k, v, starts, starts, longest, longest)
        image, *text = ops.unpack(attended, sequences, lengths)[::order]
        for module in () if attn.pre_only else attn.to_out:
            image = module(image)
        if not text:
            return image
        return image, text[0] if attn.context_pre_only else attn.to_add_out(text[0])


_ARGUMENTS = {"encoder_hidden_states", "attention_mask", "image_rotary_emb", "sequences"}


def _attend(attn, hidden_states, *args, **kwargs):
    """Call the processor as the stock forward does, which reads the processor's signature first, every time."""
    known = isinstance(attn.processor, Processor) and kwargs.keys() <= _ARGUMENTS
    forward = attn.processor if known else type(attn).forward  # which warns of the others, and leaves them out
    return forward(attn, hidden_states, *args, **kwargs)


# Projections of the image's stream and of the text's, the same in one (`fuse_qkv_projections`), and their norms.
_IMAGE = ("to_q", "to_k", "to_v"), "to_qkv", ("norm_q", "norm_k")
_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv", ("norm_added_q", "norm_added_k")


def _project(attn, x: Tensor, separate: tuple[str, ...], together: str, norms: tuple[str, ...]) -> QKV:
    if attn.fused_projections:
        qkv = getattr(attn, together)(x).chunk(3, dim=-1)
    else:
        qkv = (getattr(attn, name)(x) for name in separate)
    return QKV(*qkv, *(getattr(getattr(attn, name), "weight", None) for name in norms))


# ---- what the forwards of families' blocks share ----


def operations(block) -> Any:
    """Return the module with a fused block's operations. Caches put functions in place of its attention meanwhile."""
    return block._modules["attn"].processor.operations


def vectors(norm, temb: Tensor, count: int) -> tuple[Tensor, ...]:
    """Compute the `count` modulation vectors of an adaptive norm from the timestep's embedding: (B, D) each."""
    return norm.linear(_activated(norm, temb)).chunk(count, dim=1)


def _activated(norm, temb: Tensor) -> Tensor:
    """Activate the embedding that all blocks of a call share, for the first of them."""
    if torch.compiler.is_compiling():
        return norm.silu(temb)
    if "activated" not in vars(temb):
        temb.activated = norm.silu(temb)  # type: ignore[attr-defined]
    return temb.activated  # type: ignore[attr-defined]


def feed_forward(ops, x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, gate_mlp: Tensor, ff) -> Tensor:
    """Compute the rest of a block for a stream x, (B, L, D), from its attention's output y: the residual and the MLP.

    ops: the block's operations. gate, shift, scale, gate_mlp: (B, D), of the adaptive norm. ff: the block's MLP.
    """
    x, normed = ops.gated_add_modulate(x, gate, y, shift, scale)
    return ops.gated_add(x, gate_mlp, ff(normed))


def clipped(x: Tensor) -> Tensor:
    """Clip float16 to its finite range, as the stock blocks do; other dtypes pass unchanged."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


# ---- in and out ----


_HOOKS = {"_diffusers_hook", "_hf_hook"}  # the attributes that diffusers and accelerate set in a module with hooks


def _attentions(block) -> list[Any]:
    return [attention for attention in (block.attn, getattr(block, "attn2", None)) if attention is not None]


def _all_attention(blocks: list[nn.Module]) -> list[Any]:
    return [attention for block in blocks for attention in _attentions(block)]


def _obstacle(blocks: list[nn.Module], processors: tuple[type, ...]) -> str | None:
    """Say why blocks whose attention processors should be of these classes cannot be fused; None if they can."""
    for attention in _all_attention(blocks):
        processor, norm = attention.processor, attention.norm_q
        if type(processor) not in processors:
            return f"its attention is {type(processor).__name__}'s"
        if any(getattr(processor, name, None) is not None for name in ("_attention_backend", "_parallel_config")):
            return "diffusers was given an attention backend or parallelism for it"
        hooks = getattr(norm, "_diffusers_hook", None)
        grouped = hooks is not None and hooks.get_hook("group_offloading") is not None
        if grouped or (norm is not None and hasattr(norm, "_hf_hook") and norm.weight.is_meta):
            return "its weights are offloaded layer by layer"
    return None


def _replace_forward(block: nn.Module, old, new, required: bool = True):
    """Replace the method that calls of a block end up in, beneath the hooks of diffusers and of accelerate.

    A hook registered now would stand above those that are there, which would never be called again.
    """
    innermost = getattr(getattr(block, "_diffusers_hook", None), "_fn_refs", [])[:1]
    places = [(block, "forward"), (block, "_old_forward")]
    places += [(reference, name) for reference in innermost for name in ("forward", "original_forward")]
    stale = [place for place in places if _function(getattr(*place, None)) is old]
    if required and not stale:
        raise ValueError(f"the forward of {type(block).__name__} has been replaced: it cannot be fused")
    stock = new is type(block).forward
    for place in stale:
        setattr(*place, MethodType(new, block) if stock else partial(new, block))
    if vars(block).get("forward") == MethodType(type(block).forward, block):
        del block.forward


def _function(forward):
    """Return the function of a block's own method, or of a partial: a bound method would be pickled by its name."""
    return forward.func if type(forward) is partial else getattr(forward, "__func__", None)
