"""Untrained pipelines for the embedded models: small tokenizers, autoencoder, text encoders and transformers."""

import json
import math
from collections import Counter

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LATENT_CHANNELS = 16
VAE_SCALE = 3.0  # AutoencoderTiny squashes latents with 3·tanh(x/3): keep unit-variance latents in its linear part


# ---- tokenizers ----


def clip_tokenizer(texts: list[str], length: int = 77) -> CLIPTokenizer:
    """Train a byte-level BPE. Special tokens come last, as in CLIP's vocabulary: pooling takes the largest id."""
    bos, eos = "<|startoftext|>", "<|endoftext|>"
    stock = CLIPTokenizer().backend_tokenizer
    tok = Tokenizer(models.BPE(unk_token=eos, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tok.normalizer, tok.pre_tokenizer = stock.normalizer, stock.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, show_progress=False,
        continuing_subword_prefix="", end_of_word_suffix="</w>",
    )  # fmt: skip
    tok.train_from_iterator(texts, trainer)
    state = json.loads(tok.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    tokens += [letter + "</w>" for letter in alphabet if letter + "</w>" not in state["vocab"]] + [bos, eos]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=length)


def t5_tokenizer(texts: list[str]) -> T5TokenizerFast:
    """Make a unigram tokenizer: every word of the captions is a piece, anything else falls apart into letters."""
    words = Counter(word for text in texts for word in text.split())
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'-▁"
    pieces = [("▁" + word, math.log(count / words.total())) for word, count in words.most_common()]
    pieces += [(letter, -20.0) for letter in letters]
    fixed = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -30.0)]  # ids 0, 1, 2 as T5 has them
    return T5TokenizerFast(vocab=fixed + pieces, extra_ids=0, model_max_length=512)


# ---- models ----


def build_vae() -> AutoencoderTiny:
    """Make an untrained autoencoder with 8x8 pixels to a latent pixel of 16 channels."""
    return AutoencoderTiny(
        latent_channels=LATENT_CHANNELS, scaling_factor=VAE_SCALE, shift_factor=0.0,
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
    )  # fmt: skip


def clip_config(tok: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    """Configure a small CLIP text encoder."""
    return CLIPTextConfig(
        vocab_size=len(tok), hidden_size=width, intermediate_size=2 * width, num_attention_heads=width // 32,
        num_hidden_layers=layers, projection_dim=width, max_position_embeddings=77, hidden_act="gelu",
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
    )  # fmt: skip


def t5_config(tok: T5TokenizerFast, width: int) -> T5Config:
    """Configure a small T5 encoder."""
    return T5Config(
        vocab_size=len(tok), d_model=width, d_kv=32, d_ff=2 * width, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip


def build_flux(vae: AutoencoderTiny, tok: CLIPTokenizer, tok2: T5TokenizerFast) -> FluxPipeline:
    """Build an untrained pipeline whose shift at 256 px (256 tokens) is FLUX.1-dev's at 1024 px (4096 tokens)."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True,
        base_shift=0.5, max_shift=1.15, base_image_seq_len=16, max_image_seq_len=256,
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS, num_layers=3, num_single_layers=6, num_attention_heads=4,
        attention_head_dim=64, joint_attention_dim=128, pooled_projection_dim=128,
        axes_dims_rope=(16, 24, 24), guidance_embeds=False,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=scheduler, vae=vae, transformer=transformer, tokenizer=tok, tokenizer_2=tok2,
        text_encoder=CLIPTextModel(clip_config(tok, 128, layers=2)),
        text_encoder_2=T5EncoderModel(t5_config(tok2, 128)),
    )  # fmt: skip


def build_sd3(vae: AutoencoderTiny, tok: CLIPTokenizer, tok3: T5TokenizerFast) -> StableDiffusion3Pipeline:
    """Build an untrained pipeline. The CLIPs' outputs, side by side, must fit into the T5's width: 64 + 96 < 192."""
    transformer = SD3Transformer2DModel(
        sample_size=32, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=6, num_attention_heads=4,
        attention_head_dim=64, joint_attention_dim=192, caption_projection_dim=256, pooled_projection_dim=64 + 96,
        pos_embed_max_size=24, qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, transformer=transformer,
        tokenizer=tok, tokenizer_2=tok, tokenizer_3=tok3,
        text_encoder=CLIPTextModelWithProjection(clip_config(tok, 64, layers=3)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tok, 96, layers=3)),
        text_encoder_3=T5EncoderModel(t5_config(tok3, 192)),
    )  # fmt: skip


def blank(transformer: torch.nn.Module):
    """Start every block as the identity and the prediction at zero."""
    for name, module in transformer.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear", "proj_out")) and (
            "single_transformer_blocks" not in name or not name.endswith("proj_out")
        ):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
