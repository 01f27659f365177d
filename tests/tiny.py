"""Whole FLUX and SD3 pipelines with random weights that generate in milliseconds. One token is 4x4 pixels."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from ralu.mini.build import clip_tokenizer, t5_tokenizer
from ralu.presets import PRESETS
from ralu.schedule import Schedule

PROMPTS = ["a red circle", "two blue squares on a table", "a small grey cat"]
SD3 = ["3.0", "3.5-medium", "3.5-large"]


@lru_cache  # training a byte-pair vocabulary twice does not give the same one
def tokenizers():
    return clip_tokenizer(PROMPTS, 16), t5_tokenizer(PROMPTS)


def clip_config(tok):
    return CLIPTextConfig(
        vocab_size=len(tok), hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        projection_dim=32, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
    )  # fmt: skip


def t5_encoder(tok, width):
    config = T5Config(vocab_size=len(tok), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0)
    return T5EncoderModel(config).eval()


def vae():
    """Make a VAE that shrinks by 2."""
    return AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611,
    ).eval()  # fmt: skip


def flux(seed=0, guidance_embeds=False, dynamic=True) -> FluxPipeline:
    torch.manual_seed(seed)
    tok, tok2 = tokenizers()
    pipe = FluxPipeline(
        tokenizer=tok, tokenizer_2=tok2,
        text_encoder=CLIPTextModel(clip_config(tok)).eval(), text_encoder_2=t5_encoder(tok2, 32), vae=vae(),
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=guidance_embeds,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3(version="3.5-medium", seed=0) -> StableDiffusion3Pipeline:
    torch.manual_seed(seed)
    tok, tok3 = tokenizers()
    extra = {
        "3.0": {"pos_embed_max_size": 24},
        "3.5-medium": {"pos_embed_max_size": 48, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
        "3.5-large": {"pos_embed_max_size": 24, "qk_norm": "rms_norm"},
    }[version]
    pipe = StableDiffusion3Pipeline(
        tokenizer=tok, tokenizer_2=tok, tokenizer_3=tok3,
        text_encoder=CLIPTextModelWithProjection(clip_config(tok)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tok)).eval(),
        text_encoder_3=t5_encoder(tok3, 64), vae=vae(),
        transformer=SD3Transformer2DModel(
            sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, **extra,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shallow(pipe):
    """Leave a pipeline the first block of each kind and SD3's last one: what is compiled takes a second a block."""
    transformer = pipe.transformer
    del transformer.transformer_blocks[1 : -1 if isinstance(pipe, StableDiffusion3Pipeline) else None]
    if isinstance(pipe, FluxPipeline):
        del transformer.single_transformer_blocks[1:]
    return pipe


def compile(pipe, in_place, backend):
    """Compile the transformer, in the two ways there are."""
    if in_place:
        pipe.transformer.compile(backend=backend, fullgraph=True)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)


class Family(NamedTuple):
    """What tests that hold for every family have to know of one.

    latents: (B, 4, H, W) to what the pipeline's `latents` are at full size, and `image` back from there, at any size.
    patches: the second stage's latents of one image, as (L, 4, 2, 2).
    """

    make: Callable[..., DiffusionPipeline]
    presets: tuple[str, ...]
    image_to_image: type[DiffusionPipeline]
    latents: Callable[[torch.Tensor], torch.Tensor]
    image: Callable[[torch.Tensor, int, int], torch.Tensor]
    patches: Callable[[torch.Tensor], torch.Tensor]

    @property
    def short(self) -> Schedule:
        """The first preset in two steps a stage."""
        return PRESETS[self.presets[0]].replace(steps=(2, 2, 2))


FAMILIES = {
    "flux": Family(
        flux, ("flux-5x", "flux-7x"), FluxImg2ImgPipeline,
        latents=lambda x: FluxPipeline._pack_latents(x, *x.shape),
        image=lambda x, height, width: FluxPipeline._unpack_latents(x, height, width, 2),
        patches=lambda x: x[0].view(-1, 4, 2, 2),
    ),
    "sd3": Family(
        sd3, ("sd3-2x", "sd3-3x"), StableDiffusion3Img2ImgPipeline,
        latents=lambda x: x,
        image=lambda x, height, width: x,
        patches=lambda x: x[0].unflatten(-1, (-1, 2)).permute(2, 0, 1, 3),
    ),
}  # fmt: skip


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def generate(pipe, prompt=PROMPTS[0], seeds=(0,), height=64, width=64, **call):
    """Images as a tensor (B, 3, H, W) in [0, 1]."""
    call = {"max_sequence_length": 16, "output_type": "pt", "guidance_scale": 3.5} | call
    return pipe(prompt, height=height, width=width, generator=generators(*seeds), **call).images


def load_ip_adapter(pipe: FluxPipeline) -> dict:
    """Random weights of an IP-adapter; returns what the pipeline is then to be called with."""
    width, text = pipe.transformer.inner_dim, pipe.transformer.config.joint_attention_dim
    weights = {"image_proj": {"proj.weight": torch.randn(4 * text, 8), "proj.bias": torch.zeros(4 * text)}}
    weights["image_proj"] |= {"norm.weight": torch.ones(text), "norm.bias": torch.zeros(text)}
    weights["ip_adapter"] = {
        f"{block}.to_{name}_ip.{kind}": torch.randn(width, text) if kind == "weight" else torch.zeros(width)
        for block in range(2)
        for name in "kv"
        for kind in ("weight", "bias")
    }
    pipe.transformer._load_ip_adapter_weights([weights])
    embeds = torch.randn(1, 1, 8)
    return {"ip_adapter_image_embeds": [embeds], "negative_ip_adapter_image_embeds": [torch.zeros_like(embeds)]}
