"""FLUX.2, dev and klein: per-sample positions on four axes, and latents that are normalised by packed channel."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed
from torch import Tensor
from transformers import Mistral3ForConditionalGeneration, Qwen3ForCausalLM

from ..layout import Layout, pack, unpack
from ..patch import Unpacking
from . import Family
from ._published import MISTRAL_SMALL, QWEN3_4B, QWEN3_8B
from .flux import PerSampleIds


class BatchedPosEmbed(PerSampleIds, Flux2PosEmbed):
    """`Flux2PosEmbed` that also takes per-sample ids of shape (S, 1, B, 4)."""


class Scattering(Unpacking):
    """`Unpacking` under the name of FLUX.2, whose pipelines put each token in its place by its id."""

    name = "_unpack_latents_with_ids"


class Flux2(Family):
    """FLUX.2: tokens travel as tokens. All four of a token's pixels have a deviation and a mean of their own."""

    name = "flux2"
    transformer = Flux2Transformer2DModel
    embedding = (Flux2PosEmbed, BatchedPosEmbed)
    text_tokens = 512
    published: ClassVar = {
        "flux2-dev": {},
        "flux2-klein-4b": {
            "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        "flux2-klein-9b": {
            "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288, "guidance_embeds": False,
        },
    }  # fmt: skip
    vae = AutoencoderKLFlux2, {"block_out_channels": (128, 256, 512, 512)}
    takes_mask = True
    guided = False
    batched_guidance = False

    def check(self, transformer: Flux2Transformer2DModel) -> None:
        """Raise ValueError for patches in the model, beside those that are made of latents before it."""
        if (size := transformer.config.patch_size) != 1:
            raise ValueError(f"pipe.transformer must have patch_size 1, got {size}")

    def normalised(self, pipe: Any) -> tuple[Tensor, Tensor] | None:
        """Return the deviations and means of the VAE's batch norm; without a VAE nothing is known of them."""
        if pipe.vae is None:
            return None
        norm = pipe.vae.bn
        return (norm.running_var.float() + pipe.vae.config.batch_norm_eps).sqrt(), norm.running_mean.float()

    def condition_tokens(self, arguments: dict) -> int:
        """Count those whose axis 0 is not the image's."""
        return int(arguments["img_ids"][0, :, 0].count_nonzero())

    def grid_of(self, arguments: dict) -> tuple[int, int]:
        """Count rows and columns of the image's ids."""
        ids = arguments["img_ids"][0]
        ids = ids[ids[:, 0] == 0]
        columns = int((ids[:, 1] == 0).sum())
        return len(ids) // columns, columns

    def set_layout(self, module: Any, arguments: dict, layout: Layout, grid: tuple[int, int]) -> None:
        """Give the call ids of its own for every sample, float32 (L, 1, B, 4); text and conditions keep theirs."""
        ids = F.pad(layout.positions, (1, 1))  # axis 0 tells condition images apart, axis 3 is the text's
        if layout.conditions:
            ids = torch.cat([ids, arguments["img_ids"][:, -layout.conditions :].to(ids.dtype)], dim=1)
        text_ids = arguments["txt_ids"].to(ids.dtype)
        arguments["img_ids"], arguments["txt_ids"] = (x.transpose(0, 1).unsqueeze(1) for x in (ids, text_ids))
        if (image := layout.mask_with_conditions) is not None:
            mask = F.pad(image, (text_ids.shape[1], 0), value=True)  # over [text, image]
            joint = arguments.get("joint_attention_kwargs") or {}
            arguments["joint_attention_kwargs"] = {**joint, "attention_mask": mask}

    def decode(self, pipe: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Decode tokens (B, h·w, 128) to images (B, 3, H, W) in [-1, 1]."""
        deviation, mean = (x.to(tokens.device) for x in self.normalised(pipe) or ())
        latents = unpack(tokens * deviation + mean, grid)
        return pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]

    def encode(self, pipe: Any, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to tokens (B, h·w, 128), without chance."""
        deviation, mean = (x.to(images.device) for x in self.normalised(pipe) or ())
        return (pack(pipe.vae.encode(images.to(pipe.vae.dtype)).latent_dist.mode()) - mean) / deviation

    def patch(self, pipe: Any) -> None:
        """Make the pipeline ready for interruptions."""
        Scattering.put_into(pipe)

    def encoders_of(self, config: Mapping[str, Any]) -> dict[str, tuple[type, dict]]:
        """Return dev's encoder or klein's, whose embeddings are of three layers each."""
        qwen = {7680: QWEN3_4B, 12288: QWEN3_8B}.get(config.get("joint_attention_dim", 15360))
        encoder = (Mistral3ForConditionalGeneration, MISTRAL_SMALL) if qwen is None else (Qwen3ForCausalLM, qwen)
        return {"text_encoder": encoder}

    def flop(self, config: Mapping[str, Any], tokens: int, text_tokens: int) -> int:
        """Count the floating-point operations of a call for one image, as `ralu.estimate` does, by formula."""
        width, both = config["num_attention_heads"] * config["attention_head_dim"], tokens + text_tokens
        rows = (4 * width + 3 * int(config["mlp_ratio"] * width)) * width
        blocks = (config["num_layers"] + config["num_single_layers"]) * (rows * both + 2 * both**2 * width)
        modulations = (2 * 6 + 3 + 2) * width**2  # one for all double blocks, of two streams, and one for all others
        vectors = (1 + config["guidance_embeds"]) * (config["timestep_guidance_channels"] + width) * width
        inputs = config["in_channels"] * tokens + config["joint_attention_dim"] * text_tokens
        outputs = (config["out_channels"] or config["in_channels"]) * tokens
        return 2 * (blocks + modulations + vectors + (inputs + outputs) * width)

    def dummy_call(self, module: Any, dtype: torch.dtype, batch: int, tokens: int, text_tokens: int) -> None:
        """Call the model with empty tensors."""
        new, config = partial(torch.empty, dtype=dtype), module.config
        module(
            hidden_states=new(batch, tokens, config.in_channels),
            encoder_hidden_states=new(batch, text_tokens, config.joint_attention_dim),
            timestep=new(batch),
            guidance=new(batch) if config.guidance_embeds else None,
            img_ids=new(tokens, 4),
            txt_ids=new(text_tokens, 4),
        )


FAMILY = Flux2()
