"""Z-Image: lists of latents, and mixed sequences as strips of latent pixels, see `ralu.families.sd3`."""

from collections.abc import Mapping
from functools import partial
from math import ceil
from typing import Any, ClassVar

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ADALN_EMBED_DIM, SEQ_MULTI_OF, RopeEmbedder
from torch import Tensor
from transformers import Qwen3Model

from ..blocks import unwrapped
from ..layout import Layout, pack, unpack
from ..patch import WholeDecode, decode_latents, encode_images
from . import Family
from ._published import KL_VAE, QWEN3_4B


class StripRope(RopeEmbedder):
    """A `RopeEmbedder` that gives the tokens of strips positions of their own.

    The model asks for the images' rotations first and then for the captions'. Positions are behind the caption on the
    first axis, and those of the tokens that pad an image stay as they are.
    """

    positions: Tensor | None = None  # (row, column) of the images that are asked for next, (B, L, 2)

    def __call__(self, ids: Tensor) -> Tensor:
        """Make rotations of ids (S, 3): complex64 (S, D)."""
        if self.positions is None:
            return super().__call__(ids)
        positions, self.positions = self.positions, None
        places = ids.double().unflatten(0, (len(positions), -1))
        places[:, : positions.shape[1], 1:] = positions.double()
        axes = zip(places.flatten(0, 1).unbind(-1), self.axes_dims, strict=True)
        return torch.cat([self._rotations(*axis) for axis in axes], dim=-1)

    def _rotations(self, places: Tensor, dim: int) -> Tensor:
        """Rotate by places (S,) as `precompute_freqs_cis` does by whole numbers: complex64 (S, dim / 2)."""
        powers = torch.arange(0, dim, 2, dtype=places.dtype, device=places.device) / dim
        angles = torch.outer(places, 1.0 / self.theta**powers).float()
        return torch.polar(torch.ones_like(angles), angles)


class ZImage(Family):
    """Z-Image: samples are latent pixels, of which the model makes tokens and their positions itself."""

    name = "z_image"
    transformer = ZImageTransformer2DModel
    embedding = (RopeEmbedder, StripRope)
    embedding_name = "rope_embedder"
    text_tokens = 512
    published: ClassVar = {"z-image-turbo": {}}
    vae = KL_VAE
    encoders: ClassVar = {"text_encoder": (Qwen3Model, QWEN3_4B)}
    takes_mask = False
    guided = False
    batched_guidance = True

    def check(self, transformer: ZImageTransformer2DModel) -> None:
        """Raise ValueError for patches of another size than 2x2."""
        if (sizes := tuple(transformer.config.all_patch_size)) != (2,):
            raise ValueError(f"pipe.transformer must have all_patch_size (2,), got {sizes}")

    def sample_of(self, arguments: dict) -> Tensor:
        """Stack the latents of a call, a list of (C, 1, H, W), to (B, C, H, W)."""
        return torch.stack(arguments["x"]).squeeze(2)

    def set_sample(self, arguments: dict, sample: Tensor) -> None:
        """Undo `sample_of`."""
        arguments["x"] = list(sample.unsqueeze(2))

    def pack(self, sample: Tensor) -> Tensor:
        """Pack latent pixels (B, C, 2h, 2w), a strip's too, to tokens (B, h·w, 4C)."""
        return pack(sample)

    def unpack(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Undo `pack`; a mixed sequence is one row."""
        return unpack(tokens, grid)

    def grid_of(self, arguments: dict) -> tuple[int, int]:
        """Read the full grid off the latents: a token is two latent pixels wide and high."""
        *_, height, width = arguments["x"][0].shape
        return height // 2, width // 2

    def set_layout(self, module: Any, arguments: dict, layout: Layout, grid: tuple[int, int]) -> None:
        """Give a strip the positions of its tokens. Raises ValueError for unequal counts, as latents are stacked."""
        if layout.mask is not None:
            raise ValueError(
                "Z-Image's pipeline takes no masks, so the images of a batch must have equal token counts: with "
                "threshold= generate one at a time, or give ratio="
            )
        repeats = len(arguments["x"]) // len(layout.positions)  # guidance doubles the list, and may stop doing so
        positions = None if layout.plan is None else layout.positions.repeat(repeats, 1, 1)
        self._rope(module).positions = positions

    def clear_layout(self, module: Any) -> None:
        """Let the next call be of a whole image."""
        vars(self._rope(module)).pop("positions", None)

    def _rope(self, module: Any) -> Any:
        return unwrapped(module).rope_embedder

    def decode(self, pipe: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Decode tokens (B, h·w, 64) to images (B, 3, H, W) in [-1, 1]; an interruption does not touch them."""
        decode = vars(pipe.vae).get("decode")
        return decode_latents(pipe, unpack(tokens, grid), decode.stock if isinstance(decode, WholeDecode) else None)

    def encode(self, pipe: Any, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to tokens (B, h·w, 64), without chance."""
        return pack(encode_images(pipe, images))

    def patch(self, pipe: Any) -> None:
        """Make the pipeline ready for interruptions."""
        if pipe.vae is not None:
            WholeDecode.put_into(pipe.vae)

    def flop(self, config: Mapping[str, Any], tokens: int, text_tokens: int) -> int:
        """Count the floating-point operations of a call for one image, as `ralu.estimate` does, by formula."""
        width, modulation = config["dim"], min(config["dim"], ADALN_EMBED_DIM)
        image, text = (ceil(n / SEQ_MULTI_OF) * SEQ_MULTI_OF for n in (tokens, text_tokens))

        def blocks(count, rows):
            return count * ((4 * width + 3 * int(width / 3 * 8)) * width * rows + 2 * rows**2 * width)

        refined = sum(blocks(config["n_refiner_layers"], rows) for rows in (image, text))
        modulated = config["n_layers"] + config["n_refiner_layers"]
        vectors = (4 * modulated + 1) * modulation * width + (256 + modulation) * 1024
        pixels = 4 * config["in_channels"]
        ends = (pixels * (2 * image + text) + config["cap_feat_dim"] * text) * width
        return 2 * (blocks(config["n_layers"], image + text) + refined + vectors + ends)

    def dummy_call(self, module: Any, dtype: torch.dtype, batch: int, tokens: int, text_tokens: int) -> None:
        """Call the model with empty tensors, the images strips, at no positions that it has a table of."""
        new, config = partial(torch.empty, dtype=dtype), module.config
        rotations = partial(torch.empty, sum(config.axes_dims) // 2, dtype=torch.complex64)
        module.rope_embedder = lambda ids: rotations().expand(len(ids), -1)
        module(
            list(new(batch, config.in_channels, 1, 2, 2 * tokens)),
            new(batch),
            list(new(batch, text_tokens, config.cap_feat_dim)),
        )


FAMILY = ZImage()
