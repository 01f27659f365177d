"""Whole pipelines with random weights that generate in milliseconds. One token is 4x4 pixels, and 2x2 of 4 channels.

Pipelines whose text encoders are language models have none: prompts are made embeddings here, see `prompted`.
"""

from collections.abc import Callable
from functools import lru_cache
from inspect import signature
from typing import NamedTuple
from zlib import crc32

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
    VisualClozeGenerationPipeline,
    ZImageOmniPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from ralu.mini.build import clip_tokenizer, t5_tokenizer
from ralu.presets import preset
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


VAE = {
    "block_out_channels": (8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


def vae(channels=4):
    """Make a VAE that shrinks by 2."""
    return AutoencoderKL(
        **VAE | {"latent_channels": channels}, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.1159, scaling_factor=0.3611,
    ).eval()  # fmt: skip


def flux(seed=0, guidance_embeds=False, dynamic=True, in_channels=16) -> FluxPipeline:
    torch.manual_seed(seed)
    tok, tok2 = tokenizers()
    pipe = FluxPipeline(
        tokenizer=tok, tokenizer_2=tok2,
        text_encoder=CLIPTextModel(clip_config(tok)).eval(), text_encoder_2=t5_encoder(tok2, 32), vae=vae(),
        transformer=FluxTransformer2DModel(
            in_channels=in_channels, out_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
            guidance_embeds=guidance_embeds,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3(version="3.5-medium", seed=0, channels=4) -> StableDiffusion3Pipeline:
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
        text_encoder_3=t5_encoder(tok3, 64), vae=vae(channels),
        transformer=SD3Transformer2DModel(
            sample_size=32, patch_size=2, in_channels=channels, out_channels=channels, num_layers=3,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=32,
            pooled_projection_dim=64, **extra,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux2(seed=0, dev=False) -> Flux2KleinPipeline | Flux2Pipeline:
    """Make klein, or dev, whose VAE's channels are far from alike."""
    torch.manual_seed(seed)
    decoder = AutoencoderKLFlux2(**VAE).eval()
    decoder.bn.running_mean.normal_()
    decoder.bn.running_var.uniform_(0.3, 3)
    pipe = (Flux2Pipeline if dev else Flux2KleinPipeline)(
        tokenizer=None, text_encoder=None, vae=decoder,
        transformer=Flux2Transformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=(2, 6, 6, 2), guidance_embeds=dev,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def qwen_image(seed=0) -> QwenImagePipeline:
    torch.manual_seed(seed)
    pipe = QwenImagePipeline(
        tokenizer=None, text_encoder=None,
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.3, -0.2, 0.1, -0.4], latents_std=[1.5, 0.7, 2.0, 1.1],
        ).eval(),
        transformer=QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def z_image(seed=0) -> ZImagePipeline:
    """Make Z-Image, whose tokens that pad images and captions are no zeros."""
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    ).eval()  # fmt: skip
    transformer.x_pad_token.data.normal_()
    transformer.cap_pad_token.data.normal_()
    pipe = ZImagePipeline(
        tokenizer=None, text_encoder=None, vae=vae(), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def other(kind, pipe, **parts):
    """Make another pipeline of the same parts, and of others."""
    kept = {name: part for name, part in pipe.components.items() if name in signature(kind).parameters}
    twin = kind(**kept | parts)
    twin.set_progress_bar_config(disable=True)
    return twin


def kontext() -> FluxKontextPipeline:
    return other(FluxKontextPipeline, flux())


def flux_fill() -> FluxFillPipeline:
    """Make Fill: behind a sample's 16 channels a masked image's, and 2x2 pixels of a mask for each of 4 latent ones."""
    return other(FluxFillPipeline, flux(in_channels=48))


def flux_control(kind=FluxControlPipeline):
    return other(kind, flux(in_channels=32))


def controlnet(pipe, seed=1, **config):
    """Make a ControlNet for a pipeline of FLUX or SD3; none of its weights are zeros, as before training."""
    torch.manual_seed(seed)
    kind = FluxControlNetModel if isinstance(pipe, FluxPipeline) else SD3ControlNetModel
    given = {key: value for key, value in pipe.transformer.config.items() if key in signature(kind).parameters}
    net = kind(**given | {"num_layers": 1} | config).eval()
    for weight in net.parameters():
        if not weight.any():
            weight.data.normal_(std=0.2)
    return net


def flux_controlnet(kind=FluxControlNetPipeline, **config):
    pipe = flux()
    return other(kind, pipe, controlnet=controlnet(pipe, num_single_layers=1, **config))


def sd3_controlnet(kind=StableDiffusion3ControlNetPipeline, **config):
    pipe = sd3("3.0")
    return other(kind, pipe, controlnet=controlnet(pipe, **config))


def shallow(pipe):
    """Leave a pipeline the first block of each kind and SD3's last one: what is compiled takes a second a block."""
    transformer = pipe.transformer
    if isinstance(pipe, ZImagePipeline):
        del transformer.layers[1:]
        return pipe
    del transformer.transformer_blocks[1 : -1 if isinstance(pipe, StableDiffusion3Pipeline) else None]
    if hasattr(transformer, "single_transformer_blocks"):
        del transformer.single_transformer_blocks[1:]
    return pipe


def compile(pipe, in_place, backend):
    """Compile the transformer, in the two ways there are."""
    if in_place:
        pipe.transformer.compile(backend=backend, fullgraph=True)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)


def _scaled(vae, patches):
    return patches / vae.config.scaling_factor + vae.config.shift_factor


def _from_channels(vae, patches):
    deviation, mean = (torch.tensor(x).view(4, 1, 1) for x in (vae.config.latents_std, vae.config.latents_mean))
    return patches * deviation + mean


def _from_norm(vae, patches):
    deviation, mean = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt(), vae.bn.running_mean
    return patches * deviation.view(4, 2, 2) + mean.view(4, 2, 2)


class Family(NamedTuple):
    """What tests that hold for every family have to know of one.

    other:   a pipeline of the same models that RALU does not serve.
    latents: what is drawn from a generator, (B, 4, H, W), to what the pipeline's `latents` are at full size.
    image:   latents in a callback to (B, 4, H, W), at any size.
    patches: the second stage's latents of one image, as (L, 4, 2, 2).
    decoded: patches (L, 4, 2, 2) to what the VAE decodes for them.
    packed:  whether output_type="latent" gives tokens.
    kwargs:  name of the pipeline's argument that has LoRA's scale.
    calls:   of the transformer in a step.
    embedding: name of the transformer's position embedding.
    """

    make: Callable[..., DiffusionPipeline]
    presets: tuple[str, ...]
    other: type[DiffusionPipeline]
    latents: Callable[[torch.Tensor], torch.Tensor]
    image: Callable[[torch.Tensor, int, int], torch.Tensor]
    patches: Callable[[torch.Tensor], torch.Tensor]
    decoded: Callable = _scaled
    packed: bool = True
    kwargs: str = "joint_attention_kwargs"
    calls: int = 1
    embedding: str = "pos_embed"

    @property
    def schedule(self) -> Schedule:
        """The first preset."""
        return preset(self.presets[0])

    @property
    def short(self) -> Schedule:
        """The first preset in two steps a stage."""
        return self.schedule.replace(steps=(2, 2, 2))


FAMILIES = {
    "flux": Family(
        flux, ("flux-5x", "flux-7x"), VisualClozeGenerationPipeline,
        latents=lambda x: FluxPipeline._pack_latents(x, *x.shape),
        image=lambda x, height, width: FluxPipeline._unpack_latents(x, height, width, 2),
        patches=lambda x: x[0].view(-1, 4, 2, 2),
    ),
    "sd3": Family(
        sd3, ("sd3-2x", "sd3-3x"), StableDiffusion3PAGPipeline,
        latents=lambda x: x,
        image=lambda x, height, width: x,
        patches=lambda x: x[0].unflatten(-1, (-1, 2)).permute(2, 0, 1, 3), packed=False,
    ),
    "flux2": Family(
        flux2, ("flux2-5x", "flux2-7x"), Flux2KleinKVPipeline,
        latents=lambda x: x.reshape(len(x), 16, x.shape[2] // 2, x.shape[3] // 2),
        image=lambda x, height, width: FluxPipeline._unpack_latents(x, height, width, 2),
        patches=lambda x: x[0].view(-1, 4, 2, 2), decoded=_from_norm, packed=False, kwargs="attention_kwargs", calls=2,
    ),
    "qwen_image": Family(
        qwen_image, ("qwen-5x", "qwen-7x"), QwenImageEditPipeline,
        latents=lambda x: QwenImagePipeline._pack_latents(x, *x.shape),
        image=lambda x, height, width: QwenImagePipeline._unpack_latents(x, height, width, 2)[:, :, 0],
        patches=lambda x: x[0].view(-1, 4, 2, 2), decoded=_from_channels, kwargs="attention_kwargs", calls=2,
    ),
    "z_image": Family(
        z_image, ("zimage-2x", "zimage-5x"), ZImageOmniPipeline,
        latents=lambda x: x,
        image=lambda x, height, width: x,
        patches=lambda x: x[0].unflatten(-1, (-1, 2)).permute(2, 0, 1, 3), packed=False, embedding="rope_embedder",
    ),
}  # fmt: skip


def prompted(pipe, prompt) -> dict:
    """What to call a pipeline with for prompts: without a text encoder random embeddings, the same for the same words.

    They are 5 to 7 tokens wherever the pipeline takes any number.
    """
    if hasattr(pipe, "text_encoder_2") or pipe.text_encoder is not None:
        return {"prompt": prompt}
    prompts = [prompt] if isinstance(prompt, str) else prompt
    ragged = type(pipe).__name__.startswith("ZImage")

    def embed(words):
        embeds = [
            torch.randn(5 + ragged * len(text) % 3, 32, generator=torch.Generator().manual_seed(crc32(text.encode())))
            for text in words
        ]
        embeds = [each.to(pipe.transformer.dtype) for each in embeds]
        return embeds if ragged else torch.stack(embeds)

    given = {"prompt_embeds": embed(prompts)}
    if not isinstance(pipe, Flux2Pipeline):
        given["negative_prompt_embeds"] = embed([""] * len(prompts))
    return given


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def generate(pipe, prompt=PROMPTS[0], seeds=(0,), height=64, width=64, **call):
    """Images as a tensor (B, 3, H, W) in [0, 1]."""
    call = {"max_sequence_length": 16, "output_type": "pt", "guidance_scale": 3.5} | call
    if type(pipe).__name__.startswith("QwenImage"):  # its guidance_scale is for models that nobody has seen
        call["true_cfg_scale"] = call.pop("guidance_scale")
    call = prompted(pipe, prompt) | call
    return pipe(height=height, width=width, generator=generators(*seeds), **call).images


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
