"""Qwen-Image: positions that are centred in the image, and per sample."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from ..layout import Layout, pack, unpack
from ..patch import Unpacking
from . import Family
from ._published import QWEN25_VL_7B


class Places(NamedTuple):
    """What stands for the shapes of images, `img_shapes`, in a call.

    positions: float32 (B, L, 2), (row, column) of every token, from the middle of the image.
    text:      the position of the first token of the text, on all axes.
    """

    positions: Tensor
    text: int


class PerSample:
    """A table of rotations with one set of rows a sample, (B, L, D), where the model expects one for all, (L, D)."""

    def __init__(self, table: Tensor):
        self.table = table

    def unsqueeze(self, dim: int) -> Tensor:  # the model makes (L, D) go with queries (B, L, H, D)
        """Return (B, L, 1, D)."""
        return self.table.unsqueeze(2)


class BatchedRope(QwenEmbedRope):
    """`QwenEmbedRope` that also takes `Places`."""

    def forward(self, video_fhw, device=None, max_txt_seq_len=None):
        """Make the image's rotations, (L, D) of shapes and `PerSample` of places, and the text's, complex64 (T, D)."""
        if not isinstance(video_fhw, Places):
            return super().forward(video_fhw, device=device, max_txt_seq_len=max_txt_seq_len)
        positions, first = video_fhw
        frames = torch.zeros_like(positions[..., :1])
        axes = torch.cat([frames, positions], dim=-1).unbind(-1)
        table = torch.cat([self._rotations(*axis) for axis in zip(axes, self.axes_dim, strict=True)], dim=-1)
        return PerSample(table), self._get_device_freqs(positions.device)[0][first : first + max_txt_seq_len]

    def _rotations(self, places: Tensor, dim: int) -> Tensor:
        """Rotate by places (B, L) as `rope_params` does by whole numbers: complex64 (B, L, dim / 2)."""
        powers = torch.arange(0, dim, 2, device=places.device).to(torch.float32).div(dim)
        angles = places.unsqueeze(-1) * (1.0 / torch.pow(self.theta, powers))
        return torch.polar(torch.ones_like(angles), angles)


class QwenImage(Family):
    """Qwen-Image: tokens travel as tokens, and the model reads their positions off the shape of the image."""

    name = "qwen_image"
    transformer = QwenImageTransformer2DModel
    embedding = (QwenEmbedRope, BatchedRope)
    text_tokens = 512
    published: ClassVar = {"qwen-image": {}}
    vae = AutoencoderKLQwenImage, {"temperal_downsample": (False, True, True)}
    encoders: ClassVar = {"text_encoder": (Qwen2_5_VLForConditionalGeneration, QWEN25_VL_7B)}
    takes_mask = False
    guided = True
    batched_guidance = False

    def check(self, transformer: QwenImageTransformer2DModel) -> None:
        """Raise ValueError for a transformer of the editing pipelines, which has images beside the one it makes."""
        if transformer.config.zero_cond_t:
            raise ValueError("pipe.transformer must have zero_cond_t False, got True, as Qwen-Image-Edit's have it")

    def grid_of(self, arguments: dict) -> tuple[int, int]:
        """Read the full grid off the shapes of the images, which are alike."""
        _, rows, columns = arguments["img_shapes"][0][0]
        return rows, columns

    def set_layout(self, module: Any, arguments: dict, layout: Layout, grid: tuple[int, int]) -> None:
        """Give the call places of its own for every sample. Raises ValueError for unequal counts.

        The model counts from the middle of the image, -ceil(h / 2) to floor(h / 2) - 1, and the text goes on behind.
        """
        if layout.mask is not None:
            raise ValueError(
                "Qwen-Image's attention takes no mask of the image, so the images of a batch must have equal token "
                "counts: with threshold= generate one at a time, or give ratio="
            )
        rows, columns = self.grid_of(arguments) if layout.resolution == "full" else grid
        middle = layout.positions.new_tensor([(rows + 1) // 2, (columns + 1) // 2])
        arguments["img_shapes"] = Places(layout.positions - middle, max(rows // 2, columns // 2))

    def decode(self, pipe: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Decode tokens (B, h·w, 64) to images (B, 3, H, W) in [-1, 1], the only frames of films."""
        deviation, mean = self._statistics(pipe, tokens)
        latents = (unpack(tokens, grid).unsqueeze(2) * deviation + mean).to(pipe.vae.dtype)
        return pipe.vae.decode(latents, return_dict=False)[0][:, :, 0]

    def encode(self, pipe: Any, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to tokens (B, h·w, 64), without chance."""
        deviation, mean = self._statistics(pipe, images)
        latents = pipe.vae.encode(images.to(pipe.vae.dtype).unsqueeze(2)).latent_dist.mode()
        return pack(((latents - mean) / deviation)[:, :, 0])

    def _statistics(self, pipe: Any, like: Tensor) -> Any:
        """Return the deviations and means of the latents' channels, (1, C, 1, 1, 1) each."""
        channels = pipe.vae.config.latents_std, pipe.vae.config.latents_mean
        return (torch.tensor(x, device=like.device).view(1, -1, 1, 1, 1) for x in channels)

    def patch(self, pipe: Any) -> None:
        """Make the pipeline ready for interruptions."""
        Unpacking.put_into(pipe)

    def latents_shape(self, config: Mapping[str, Any], batch: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one frame's latents."""
        return batch, config["z_dim"], 1, height, width

    def flop(self, config: Mapping[str, Any], tokens: int, text_tokens: int) -> int:
        """Count the floating-point operations of a call for one image, as `ralu.estimate` does, by formula."""
        width, both = config["num_attention_heads"] * config["attention_head_dim"], tokens + text_tokens
        blocks = config["num_layers"] * (12 * (both + 1) * width**2 + 2 * both**2 * width)  # the 1: modulation
        vectors = 256 * width + 3 * width**2
        outputs = config["patch_size"] ** 2 * (config["out_channels"] or config["in_channels"]) * tokens
        inputs = config["in_channels"] * tokens + config["joint_attention_dim"] * text_tokens
        return 2 * (blocks + vectors + (inputs + outputs) * width)

    def dummy_call(self, module: Any, dtype: torch.dtype, batch: int, tokens: int, text_tokens: int) -> None:
        """Call the model with empty tensors, at no positions that it has a table of."""
        new, config = partial(torch.empty, dtype=dtype), module.config
        rotations = partial(torch.empty, config.attention_head_dim // 2, dtype=torch.complex64)
        module.pos_embed.forward = lambda *_, **__: tuple(rotations().expand(n, -1) for n in (tokens, text_tokens))
        module(
            hidden_states=new(batch, tokens, config.in_channels),
            encoder_hidden_states=new(batch, text_tokens, config.joint_attention_dim),
            timestep=new(batch),
        )


FAMILY = QwenImage()
