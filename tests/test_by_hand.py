"""Whole runs of the families beside FLUX and SD3 against the method written out: plain loops around the stock model.

Everything is in patches, (L, 4, 2, 2): a token is a patch of latent pixels, and sits at a place (row, column).
"""

from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

import ralu
from ralu.regions import edge_density
from ralu.stages import seeds_of
from ralu_kernels import reference


def patches_of(image):
    """Cut an image into patches in raster order: (4, 2h, 2w) -> (h·w, 4, 2, 2)."""
    c, h, w = image.shape
    return image.reshape(c, h // 2, 2, w // 2, 2).permute(1, 3, 0, 2, 4).flatten(0, 1)


def image_of(patches, h, w):
    return patches.view(h, w, -1, 2, 2).permute(2, 0, 3, 1, 4).reshape(-1, 2 * h, 2 * w)


class Flux2:
    """The stock transformer takes ids of one image that are no whole numbers; VAE and latents are normalised apart."""

    def __init__(self, pipe, prompt):
        self.pipe, self.text = pipe, tiny.prompted(pipe, prompt)

    def noise(self, height, width, generator):
        return F.pixel_shuffle(torch.randn(1, 16, height // 4, width // 4, generator=generator), 2)[0]

    def run(self, patches, places, sigma, text):
        ids = torch.tensor([[0, y, x, 0] for y, x in places], dtype=torch.float32)
        return self.pipe.transformer(
            hidden_states=patches.flatten(1)[None], encoder_hidden_states=text, img_ids=ids[None],
            timestep=torch.tensor([sigma]), txt_ids=torch.tensor([[[0, 0, 0, i] for i in range(text.shape[1])]]),
        ).sample[0].view(patches.shape)  # fmt: skip

    def velocity(self, patches, places, sigma, grid):
        without = self.run(patches, places, sigma, self.text["negative_prompt_embeds"])
        return without + 3.5 * (self.run(patches, places, sigma, self.text["prompt_embeds"]) - without)

    def restored(self, patches):
        norm = self.pipe.vae.bn
        deviation = torch.sqrt(norm.running_var + self.pipe.vae.config.batch_norm_eps)
        return patches * deviation.view(4, 2, 2) + norm.running_mean.view(4, 2, 2)

    def normalised(self, patches):
        norm = self.pipe.vae.bn
        deviation = torch.sqrt(norm.running_var + self.pipe.vae.config.batch_norm_eps)
        return (patches - norm.running_mean.view(4, 2, 2)) / deviation.view(4, 2, 2)

    def decoded(self, latents):
        return self.pipe.vae.decode(latents[None]).sample

    def output(self, patches, h, w):
        return image_of(self.restored(patches), h, w)


def rotations(places, dim, theta=10000.0):
    """Angles of the rotary embedding as unit complex numbers, (n, dim / 2), in float64."""
    angles = np.outer(places, theta ** -(np.arange(0, dim, 2) / dim))
    return torch.from_numpy(np.exp(1j * angles)).to(torch.complex64)


class QwenImage:
    """The stock transformer takes whole images; for others its table of rotations is made here, from the middle on."""

    def __init__(self, pipe, prompt):
        self.pipe, self.text = pipe, tiny.prompted(pipe, prompt)

    def noise(self, height, width, generator):
        return torch.randn(1, 1, 4, height // 2, width // 2, generator=generator)[0, 0]

    def run(self, patches, places, sigma, text, grid):
        model, (h, w) = self.pipe.transformer, grid
        if len(patches) != h * w or places[1] != (0, 1):
            rows, columns = zip(*places, strict=True)
            centred = [0] * len(rows), [y - (h + 1) // 2 for y in rows], [x - (w + 1) // 2 for x in columns]
            texts = [range(max(h // 2, w // 2), max(h // 2, w // 2) + text.shape[1])] * 3
            tables = [
                torch.cat([rotations(list(p), dim) for p, dim in zip(axes, (4, 6, 6), strict=True)], -1)
                for axes in (centred, texts)
            ]
            model.pos_embed.forward = lambda *_, **__: tables
        out = model(
            hidden_states=patches.flatten(1)[None], encoder_hidden_states=text, img_shapes=[[(1, h, w)]],
            timestep=torch.tensor([sigma]),
        ).sample[0].view(patches.shape)  # fmt: skip
        vars(model.pos_embed).pop("forward", None)
        return out

    def velocity(self, patches, places, sigma, grid):
        without, with_ = (
            self.run(patches, places, sigma, self.text[key], grid)
            for key in ("negative_prompt_embeds", "prompt_embeds")
        )
        guided = without + 3.5 * (with_ - without)
        lengths = [x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (with_, guided)]
        return guided * lengths[0] / lengths[1]

    def restored(self, patches):
        config = self.pipe.vae.config
        return patches * torch.tensor(config.latents_std).view(4, 1, 1) + torch.tensor(config.latents_mean).view(
            4, 1, 1
        )

    def normalised(self, patches):
        config = self.pipe.vae.config
        return (patches - torch.tensor(config.latents_mean).view(4, 1, 1)) / torch.tensor(config.latents_std).view(
            4, 1, 1
        )

    def decoded(self, latents):
        return self.pipe.vae.decode(latents[None, :, None]).sample[:, :, 0]

    def output(self, patches, h, w):
        return patches


class Scaled:
    """What the models with FLUX.1's kind of autoencoder share."""

    def noise(self, height, width, generator):
        return torch.randn(1, 4, height // 2, width // 2, generator=generator)[0]

    def restored(self, patches):
        return patches / self.pipe.vae.config.scaling_factor + self.pipe.vae.config.shift_factor

    def normalised(self, patches):
        return (patches - self.pipe.vae.config.shift_factor) * self.pipe.vae.config.scaling_factor

    def decoded(self, latents):
        return self.pipe.vae.decode(latents[None]).sample


class ZImage(Scaled):
    """The model's blocks one after the other, on tokens anywhere, with those that pad to 32."""

    def __init__(self, pipe, prompt):
        self.pipe, self.text = pipe, tiny.prompted(pipe, prompt)

    def run(self, patches, places, sigma, text):
        model = self.pipe.transformer
        time = model.t_embedder(torch.tensor([1 - sigma]) * model.t_scale)
        tokens = model.all_x_embedder["2-1"](patches.permute(0, 2, 3, 1).flatten(1))
        caption = model.cap_embedder(text)
        first = len(caption) + -len(caption) % 32 + 1
        where = [(first, y, x) for y, x in places] + [(0, 0, 0)] * (-len(tokens) % 32)
        # Of the places that pad a caption the first axis goes on.
        texts = [(1 + i, 0, 0) for i in range(first - 1)]
        tokens = torch.cat([tokens, model.x_pad_token.expand(-len(tokens) % 32, -1)])[None]
        caption = torch.cat([caption, model.cap_pad_token.expand(-len(caption) % 32, -1)])[None]
        tables = [
            torch.cat(
                [rotations(list(p), d, 256.0) for p, d in zip(zip(*each, strict=True), (4, 6, 6), strict=True)], -1
            )
            for each in (where, texts)
        ]
        for block in model.noise_refiner:
            tokens = block(tokens, None, tables[0][None], time)
        for block in model.context_refiner:
            caption = block(caption, None, tables[1][None])
        both, table = torch.cat([tokens, caption], 1), torch.cat(tables)[None]
        for block in model.layers:
            both = block(both, None, table, time)
        out = model.all_final_layer["2-1"](both, c=time)[0, : len(patches)]
        return -out.view(-1, 2, 2, 4).permute(0, 3, 1, 2)

    def velocity(self, patches, places, sigma, grid):
        with_, without = (
            self.run(patches, places, sigma, self.text[key][0]) for key in ("prompt_embeds", "negative_prompt_embeds")
        )
        return with_ + 3.5 * (with_ - without)

    def output(self, patches, h, w):
        return image_of(patches, h, w)


MODELS = {"flux2": Flux2, "qwen_image": QwenImage, "z_image": ZImage}


@torch.no_grad()
def by_hand(model, schedule, height, width, seed, ratio):
    """Generate one image's latents, and list what the later two stages begin with, as patches.

    A low patch may lie half outside the image, of whose patches there may be fewer than twice as many a side.
    """
    h, w, real = -(-height // 8), -(-width // 8), (height // 4, width // 4)
    noise = model.noise(height, width, torch.Generator().manual_seed(seed))
    key = seeds_of(F.pixel_unshuffle(noise[None], 2).flatten(2).transpose(1, 2))[0]
    lows, fulls = ([(y, x) for y in range(k * h) for x in range(k * w)] for k in (1, 2))
    inside = [y < real[0] and x < real[1] for y, x in fulls]
    places_inside = [place for place, kept in zip(fulls, inside, strict=True) if kept]

    def denoise(x, stage, places, grid):
        for sigma, following in pairwise(schedule.sigmas(stage)):
            v = model.velocity(x, places, sigma, grid)
            x0, x = x - sigma * v, x + (following - sigma) * v
        return x, x0

    def normals(shape, stage, kind):
        count = int(np.prod(shape))
        return torch.stack(reference.randn4x(key, torch.arange(count), stage, kind)).view(4, *shape)

    def finished(third):
        third = third[inside]
        return third, denoise(third, 3, places_inside, real)[0]

    def doubled(patches):
        """Copy every latent pixel of an image h x w of patches to 2x2."""
        return F.interpolate(image_of(patches, h, w)[None], scale_factor=2)[0]

    def upsampled(x, x0, stage):
        """Copy noise as it is, and the clean estimate as the VAE's latents, normalised anew."""
        transition, time = schedule.transitions[stage - 2], schedule.ends[stage - 2]
        eps = normals((4, 2 * h, 2 * w), stage, 0)
        z = eps - (1 - (1 - 4 * transition.c) ** 0.5) / 4 * eps.sum(0)
        z = patches_of(F.pixel_shuffle(z.transpose(0, 1).flatten(0, 1)[None], 2)[0])
        clean = model.normalised(patches_of(doubled(model.restored(x0))))
        copied = time * clean + patches_of(doubled(x - time * x0))
        return transition.scale * copied + transition.noise_scale * z

    def kept(x, stage, grid):
        transition = schedule.transitions[stage - 2]
        eps = normals((*grid, 4), stage, 1).permute(1, 2, 3, 0).reshape(x.shape)
        return transition.scale * x + transition.noise_scale * (1 - transition.c) ** 0.5 * eps

    def children(patches):
        """List of every low patch the four that take its place."""
        return patches.view(h, 2, w, 2, 4, 2, 2).transpose(1, 2).reshape(h * w, 4, 4, 2, 2)

    start = F.pixel_shuffle(normals((4, 2 * h, 2 * w), 0, 0).transpose(0, 1).flatten(0, 1)[None], 2)[0]
    start[:, : noise.shape[1], : noise.shape[2]] = noise
    low, x0 = denoise(patches_of(start[:, ::2, ::2]), 1, lows, (h, w))
    scores = edge_density(model.decoded(image_of(model.restored(x0), h, w)), (h, w))[0].tolist()
    chosen = sorted(range(h * w), key=lambda i: (-scores[i], i))[: int(ratio * h * w + 1e-6)]
    second = upsampled(low, x0, 2)
    if len(chosen) == h * w:  # two resolutions, the second at half steps of the first
        halves = [(y / 2, x / 2) for y, x in fulls]
        return second, *finished(kept(denoise(second, 2, halves, (h, w))[0], 3, (2 * h, 2 * w)))
    up, same, tokens, places = children(second), kept(low, 2, (h, w)), [], []
    for i, (y, x) in enumerate(lows):
        tokens += list(up[i]) if i in chosen else [same[i]]
        places += [(y + dy, x + dx) for dy in (0, 0.5) for dx in (0, 0.5)] if i in chosen else [(y, x)]
    mixed, x0 = (iter(x) for x in denoise(torch.stack(tokens), 2, places, (h, w)))
    coarse, estimate, fine = (torch.zeros_like(x) for x in (same, same, up))
    for i in range(h * w):
        if i in chosen:
            fine[i] = torch.stack([next(mixed) for _ in range(4)])
            [next(x0) for _ in range(4)]
        else:
            coarse[i], estimate[i] = next(mixed), next(x0)
    fine = fine.view(h, w, 2, 2, 4, 2, 2).transpose(1, 2).flatten(0, 3)
    third, again = kept(fine, 3, (2 * h, 2 * w)), upsampled(coarse, estimate, 3)
    for place, (y, x) in enumerate(fulls):
        if (y // 2) * w + x // 2 not in chosen:
            third[place] = again[place]
    return torch.stack(tokens), *finished(third)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ratio, height, width", [(1.0, 64, 48), (0.3, 64, 48), (0.3, 60, 52)])  # 15 by 13 tokens
@pytest.mark.serves("guidance")
@pytest.mark.serves("equals a run written out by hand")
def test_whole_runs_equal_the_method_written_out_by_hand(name, ratio, height, width):
    family = tiny.FAMILIES[name]
    pipe, schedule, seen = family.make(), family.schedule.replace(steps=(2, 2, 3)), []
    model = MODELS[name](pipe, tiny.PROMPTS[0])
    second, third, final = by_hand(model, schedule, height, width, 3, ratio)

    def callback(pipe, i, t, values):
        seen.append(values["latents"])
        return values

    ralu.enable(pipe, schedule, ratio=ratio)
    size = {"height": height, "width": width}
    got = tiny.generate(pipe, seeds=(3,), output_type="latent", callback_on_step_end=callback, **size)
    if ratio < 1:
        torch.testing.assert_close(family.patches(seen[1]), second, rtol=0, atol=1e-4)
    full = height // 4, width // 4
    torch.testing.assert_close(patches_of(family.image(seen[3], height, width)[0]), third, rtol=0, atol=1e-4)
    torch.testing.assert_close(patches_of(family.image(seen[-1], height, width)[0]), final, rtol=0, atol=1e-4)
    torch.testing.assert_close(got.view(-1), model.output(final, *full).reshape(-1), rtol=0, atol=1e-4)
