"""Image-to-image and inpainting in diffusers' unmodified pipelines, against runs written out by hand and stock runs."""

from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
)
from diffusers.pipelines.flux.pipeline_flux_img2img import calculate_shift
from test_sd3 import image_of, on_tokens, patches_of

import ralu
from ralu.image import ImageRun
from ralu.layout import Layout, gather, pad, raster, spread
from ralu.options import Options
from ralu.presets import PRESETS
from ralu.regions import edge_density, gradient
from ralu.stages import seeds_of
from ralu_kernels import plan_tokens, reference

PROMPTS = tiny.PROMPTS
HEIGHT, WIDTH = 64, 48
ODD = {"height": 60, "width": 52}  # whose token grid, 15 x 13, is padded
H, W = HEIGHT // 8, WIDTH // 8  # the low grid
KINDS = {
    "flux": (FluxImg2ImgPipeline, FluxInpaintPipeline),
    "sd3": (StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline),
}
SERVED = [kind.__name__ for pair in KINDS.values() for kind in pair]
# Of 100 steps asked for: strengths that start in each of the stages.
STRENGTHS = {"flux": (0.97, 0.88, 0.5), "sd3": (0.97, 0.8, 0.4)}
SHORT = {"flux": tiny.FAMILIES["flux"].short, "sd3": tiny.FAMILIES["sd3"].short}


@pytest.fixture(scope="module", params=KINDS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def stock(family):
    return tiny.flux() if family == "flux" else tiny.sd3(channels=16)  # the others' masks are for 16 channels alone


@pytest.fixture(scope="module")
def images():
    drawn = torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(11))
    return F.interpolate(drawn, size=(HEIGHT, WIDTH))


@pytest.fixture(scope="module")
def mask():
    """What is painted: a block, whose edges are on no token's."""
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., 12:42, 6:38] = 1
    return mask


def made_of(kind, pipe):
    twin = kind.from_pipe(pipe, dtype=torch.float32)
    twin.set_progress_bar_config(disable=True)
    return twin


def generate(pipe, prompt=PROMPTS[0], seeds=(3,), **call):
    """Latents; of a pipeline that takes an image."""
    call = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 100, "output_type": "latent"} | call
    return pipe(prompt, generator=tiny.generators(*seeds), max_sequence_length=16, guidance_scale=3.5, **call).images


def as_image(latents, height=HEIGHT, width=WIDTH):
    """Latents of one image as the pipelines return them, as (1, C, h, w)."""
    return FluxPipeline._unpack_latents(latents, height, width, 2) if latents.dim() == 3 else latents


@torch.no_grad()
def encoded(pipe, image, seed):
    """One image's latents, and noise: drawn one after the other as the pipelines do."""
    generator, config = torch.Generator().manual_seed(seed), pipe.vae.config
    drawn = pipe.vae.encode(2 * image - 1).latent_dist.sample(generator)
    clean = (drawn - config.shift_factor) * config.scaling_factor
    return clean, torch.randn(clean.shape, generator=generator)


# ---- the method written out ----


def stock_level(pipe, strength, steps):
    """The noise level at which a stock run starts."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    if isinstance(pipe.transformer, SD3Transformer2DModel):
        scheduler.set_timesteps(steps)
    else:
        length, names = 4 * H * W, ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(length, *(scheduler.config[name] for name in names))
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    return scheduler.sigmas[int(steps - steps * strength)].item()


def levels_of(schedule, level):
    """The noise levels that are made in each of the three stages."""
    stages = [schedule.sigmas(k) for k in (1, 2, 3)]
    low = (level / 2) / (level / 2 + 1 - level)  # the mean of 2x2 has half the noise
    own = (low, level, level)
    first = max(k for k in range(3) if own[k] <= stages[k][0] + 1e-6)
    kept = [own[first], *(sigma for sigma in stages[first] if sigma < own[first] - 1e-6)]
    return [[], [], [], *[kept], *stages[first + 1 :]][-3:], first + 1


class Model:
    """The stock transformer on patches (L, C, 2, 2) at places (row, column) of a grid."""

    def __init__(self, pipe, prompt=PROMPTS[0]):
        self.pipe, self.sd3 = pipe, isinstance(pipe.transformer, SD3Transformer2DModel)
        with torch.no_grad():
            self.text = pipe.encode_prompt(prompt, None, *[None] * self.sd3, max_sequence_length=16)

    def __call__(self, patches, places, sigma, grid):
        model = self.pipe.transformer
        if self.sd3:
            size, t = model.config.pos_embed_max_size, torch.tensor([1000 * sigma])
            places = [(y + (size - grid[0]) // 2, x + (size - grid[1]) // 2) for y, x in places]
            text, no_text, pooled, no_pooled = self.text
            without = on_tokens(model, patches, places, t, no_text, no_pooled)
            return without + 3.5 * (on_tokens(model, patches, places, t, text, pooled) - without)
        embeds, pooled, text_ids = self.text
        return model(
            hidden_states=patches.flatten(1)[None], encoder_hidden_states=embeds, pooled_projections=pooled,
            timestep=torch.tensor([sigma]), img_ids=torch.tensor([[0, y, x] for y, x in places]).float(),
            txt_ids=text_ids,
        ).sample[0].view(patches.shape)  # fmt: skip


@torch.no_grad()
def by_hand(model, schedule, clean, noise, level, score, mask=None):
    """One image's latents (C, 4H, 4W).

    model: patches, their places, the noise level and the grid to velocities. score: of a low x0 (C, 2H, 2W), a list of
    tokens' scores. mask: 1 paints.
    """
    key = seeds_of(F.pixel_unshuffle(noise, 2).flatten(2).transpose(1, 2))[0]
    clean, noise, channels = clean[0], noise[0], clean.shape[1]
    averaged, low_noise = F.avg_pool2d(clean, 2), noise[:, ::2, ::2]
    lows, fulls = ([(y, x) for y in range(k * H) for x in range(k * W)] for k in (1, 2))
    levels, first = levels_of(schedule, level)

    def mixed_with(image, noise, sigma):
        return (1 - sigma) * image + sigma * noise

    def blended(low, full, sigma):
        """Put the known image in, into low latents by the mask at the first of each 2x2 pixels."""
        if mask is None:
            return low, full
        small = mask[:, ::2, ::2]
        return (
            low if low is None else (1 - small) * mixed_with(averaged, low_noise, sigma) + small * low,
            full if full is None else (1 - mask) * mixed_with(clean, noise, sigma) + mask * full,
        )

    def normals(shape, stage, kind):
        count = int(np.prod(shape))
        return torch.stack(reference.randn4x(key, torch.arange(count), stage, kind)).view(4, *shape)

    def upsampled(x, stage):
        transition = schedule.transitions[stage - 2]
        eps = normals((channels, 2 * H, 2 * W), stage, 0)
        z = eps - (1 - (1 - 4 * transition.c) ** 0.5) / 4 * eps.sum(0)
        z = F.pixel_shuffle(z.transpose(0, 1).flatten(0, 1)[None], 2)[0]
        return transition.scale * F.interpolate(x[None], scale_factor=2)[0] + transition.noise_scale * z

    def kept(x, stage):
        transition = schedule.transitions[stage - 2]
        rows, columns = x.shape[1] // 2, x.shape[2] // 2
        eps = normals((rows, columns, channels), stage, 1).permute(3, 1, 2, 0)
        eps = eps.unflatten(-1, (2, 2)).transpose(2, 3).reshape(x.shape)
        return transition.scale * x + transition.noise_scale * (1 - transition.c) ** 0.5 * eps

    if first == 1:
        low = mixed_with(averaged, low_noise, levels[0][0])
        for sigma, following in pairwise(levels[0]):
            v = image_of(model(patches_of(low), lows, sigma, (H, W)), H, W)
            x0, low = low - sigma * v, low + (following - sigma) * v
            if following != levels[0][-1]:
                low, _ = blended(low, None, following)
    if first < 3:
        scores = score(averaged if first == 2 else x0)
        chosen = sorted(range(H * W), key=lambda i: (-scores[i], i))[: int(schedule.ratio * H * W + 1e-6)]
        where = torch.zeros(H * W)
        where[chosen] = 1
        where = F.interpolate(where.view(1, 1, H, W), scale_factor=4)[0] > 0
        rows = [(y, x, d) for y, x in lows for d in (range(4) if y * W + x in chosen else [None])]
        places = [(y + (d or 0) // 2 / 2, x + (d or 0) % 2 / 2) for y, x, d in rows]
        if first == 1:
            low, full = blended(kept(low, 2), upsampled(low, 2), levels[1][0])
        else:
            low, full = mixed_with(averaged, low_noise, levels[1][0]), mixed_with(clean, noise, levels[1][0])
        for sigma, following in pairwise(levels[1]):
            coarse, fine = patches_of(low), patches_of(full).view(2 * H, 2 * W, channels, 2, 2)
            v = model(
                torch.stack([
                    coarse[y * W + x] if d is None else fine[2 * y + d // 2, 2 * x + d % 2] for y, x, d in rows
                ]), places, sigma, (H, W),
            )  # fmt: skip
            coarse, fine = torch.zeros_like(coarse), torch.zeros_like(fine)
            for one, (y, x, d) in zip(v, rows, strict=True):
                if d is None:
                    coarse[y * W + x] = one
                else:
                    fine[2 * y + d // 2, 2 * x + d % 2] = one
            low = low + (following - sigma) * image_of(coarse, H, W)
            full = full + (following - sigma) * image_of(fine.flatten(0, 1), 2 * H, 2 * W)
            if following != levels[1][-1]:
                low, full = blended(low, full, following)
        full = torch.where(where, kept(full, 3), upsampled(low, 3))
        _, full = blended(None, full, levels[2][0])
    else:
        full = mixed_with(clean, noise, levels[2][0])
    for sigma, following in pairwise(levels[2]):
        v = image_of(model(patches_of(full), fulls, sigma, (2 * H, 2 * W)), 2 * H, 2 * W)
        _, full = blended(None, full + (following - sigma) * v, following)
    return full[None], first


@pytest.mark.serves("equals a run written out by hand", "FluxImg2ImgPipeline", "StableDiffusion3Img2ImgPipeline")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_image_to_image_equals_the_method_written_out_by_hand(stock, family, images, stage):
    strength, config = STRENGTHS[family][stage - 1], stock.vae.config

    def edges(x0):
        decoded = stock.vae.decode(x0[None] / config.scaling_factor + config.shift_factor).sample
        return edge_density(decoded, (H, W))[0].tolist()

    clean, noise = encoded(stock, images[:1], 3)
    level = stock_level(stock, strength, 100)
    expected, first = by_hand(Model(stock), SHORT[family], clean, noise, level, edges)
    assert first == stage
    twin = made_of(KINDS[family][0], ralu.enable(stock, SHORT[family]))
    got = generate(twin, image=images[:1], strength=strength)
    ralu.disable(stock)
    torch.testing.assert_close(as_image(got), expected, rtol=0, atol=1e-4)


@pytest.mark.serves("equals a run written out by hand", "FluxInpaintPipeline", "StableDiffusion3InpaintPipeline")
@pytest.mark.parametrize("stage", [1, 2])
def test_inpainting_equals_the_method_written_out_by_hand(stock, family, images, mask, stage):
    """Strength 1 goes through all the stages. What is not painted ends as in the stock run, to the bit."""
    kind, strength = KINDS[family][1], (1.0, *STRENGTHS[family][1:])[stage - 1]
    call = {"image": images[:1], "mask_image": mask, "strength": strength}
    plain = generate(made_of(kind, stock), **call | {"num_inference_steps": 4})
    clean, noise = encoded(stock, images[:1], 3)
    latent_mask = F.interpolate(mask, size=clean.shape[2:])[0]

    def painted(x0):
        return F.avg_pool2d(mask, HEIGHT // H).flatten().tolist()

    expected, first = by_hand(
        Model(stock), SHORT[family], clean, noise, stock_level(stock, strength, 100), painted, latent_mask
    )
    assert first == stage
    pipe = ralu.enable(made_of(kind, stock), SHORT[family], regions="mask")
    got = generate(pipe, **call)
    ralu.disable(pipe)
    torch.testing.assert_close(as_image(got), expected, rtol=0, atol=1e-4)
    outside = latent_mask.expand_as(clean[0]) == 0
    assert torch.equal(as_image(got)[0][outside], as_image(plain)[0][outside])


# ---- against other runs ----


def test_strength_1_and_a_mask_of_everything_are_text_to_image(stock, family, images):
    _, noise = encoded(stock, images[:1], 3)
    ralu.enable(stock, SHORT[family])
    expected = generate(stock, latents=tiny.FAMILIES[family].latents(noise))
    image_to_image, inpaint = (made_of(kind, stock) for kind in KINDS[family])
    everything = torch.ones(1, 1, HEIGHT, WIDTH)
    assert torch.equal(generate(image_to_image, image=images[:1], strength=1.0), expected)
    assert torch.equal(generate(inpaint, image=images[:1], mask_image=everything, strength=1.0), expected)
    for strength in STRENGTHS[family]:
        call = {"image": images[:1], "strength": strength}
        assert torch.equal(generate(inpaint, **call, mask_image=everything), generate(image_to_image, **call))
    ralu.disable(stock)


@pytest.mark.serves("a batch equals its single runs", *SERVED)
@pytest.mark.serves("disable restores every bit", *SERVED)
@pytest.mark.parametrize("inpaint", [False, True])
def test_batches_equal_their_single_runs_and_disable_restores(stock, family, images, mask, inpaint):
    kind = KINDS[family][inpaint]
    parts = {"mask_image": torch.cat([mask, mask.flip(3)])} if inpaint else {}
    before = generate(made_of(kind, stock), image=images[:1], strength=0.6, num_inference_steps=4, **{
        name: part[:1] for name, part in parts.items()
    })  # fmt: skip
    regions = "mask" if inpaint else "gradient"
    pipe = ralu.enable(made_of(kind, stock), SHORT[family], regions=regions)
    strength = STRENGTHS[family][1]
    batch = generate(pipe, PROMPTS[:2], (3, 4), image=images, strength=strength, **parts)
    for i in range(2):
        one = {name: part[i : i + 1] for name, part in parts.items()}
        single = generate(pipe, PROMPTS[i], (3 + i,), image=images[i : i + 1], strength=strength, **one)
        torch.testing.assert_close(batch[i : i + 1], single, rtol=0, atol=2e-5)
    ralu.disable(pipe)
    again = generate(made_of(kind, stock), image=images[:1], strength=0.6, num_inference_steps=4, **{
        name: part[:1] for name, part in parts.items()
    })  # fmt: skip
    assert torch.equal(before, again)
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert not {"get_timesteps", "prepare_mask_latents", "_unpack_latents"} & vars(pipe).keys()


@pytest.mark.serves("sizes that divide by 16 alone", *SERVED)
def test_odd_grids(stock, family, images, mask):
    """Outside a mask as in the stock run; everything painted as image-to-image; batches as their single runs."""
    image_to_image, inpaint = (made_of(kind, stock) for kind in KINDS[family])
    images, mask = (F.interpolate(x, size=tuple(ODD.values())) for x in (images, mask))
    everything, painted = torch.ones_like(mask), {"image": images[:1], "mask_image": mask} | ODD
    plain = generate(inpaint, **painted, strength=0.6, num_inference_steps=4)
    known = (F.interpolate(mask, size=(30, 26)) == 0).expand(-1, stock.vae.config.latent_channels, -1, -1)
    ralu.enable(stock, SHORT[family], regions="gradient")
    image_to_image, inpaint = (made_of(kind, stock) for kind in KINDS[family])
    for strength in (1.0, STRENGTHS[family][1]):
        got = generate(image_to_image, image=images[:1], strength=strength, **ODD)
        assert torch.equal(generate(inpaint, **painted | {"mask_image": everything}, strength=strength), got)
        got = generate(inpaint, **painted, strength=strength)
        assert torch.equal(as_image(got, **ODD)[known], as_image(plain, **ODD)[known])
        batch = generate(inpaint, PROMPTS[:2], (3, 4), **painted | {"image": images}, strength=strength)
        torch.testing.assert_close(batch[:1], got, rtol=0, atol=2e-5)
    ralu.disable(stock)


def test_images_of_a_prompt_share_its_mask(stock, family, images, mask):
    pipe, seen = ralu.enable(made_of(KINDS[family][1], stock), SHORT[family], regions="mask"), []
    masks = torch.cat([mask, mask.flip(3)])

    def callback(pipe, i, t, values):
        seen.append(getattr(pipe.scheduler.layout, "scores", None))
        return values

    call = {"image": images, "mask_image": masks, "strength": 1.0, "callback_on_step_end": callback}
    generate(pipe, PROMPTS[:2], (3, 4, 5, 6), num_images_per_prompt=2, **call)
    ralu.disable(pipe)
    expected = [F.avg_pool2d(m, HEIGHT // H).flatten() for m in (mask, mask.flip(3))]
    assert torch.equal(seen[1], torch.stack(expected * 2))  # the pipelines repeat masks in turn


@pytest.mark.serves("callbacks, previews, interruption", *SERVED)
@pytest.mark.parametrize("inpaint", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_an_interrupted_run_decodes_what_there_is(stock, family, images, mask, inpaint, stage):
    kind, config, shown = KINDS[family][inpaint], stock.vae.config, []
    pipe = ralu.enable(made_of(kind, stock), SHORT[family].replace(steps=(2, 3, 1)))

    def stop(pipe, i, t, values):
        pipe._interrupt = True
        assert pipe.scheduler.layout.resolution == ("low", "mixed")[stage - 1]
        latents = values["latents"]
        shown.append(latents if inpaint else pipe.scheduler.full_resolution(latents))
        return values

    parts = {"mask_image": mask} if inpaint else {}
    call = {"image": images[:1], "strength": (1.0, STRENGTHS[family][1])[stage - 1], "output_type": "pt"} | parts
    got = generate(pipe, **call, callback_on_step_end=stop)
    ralu.disable(pipe)
    shift = 0 if inpaint and family == "sd3" else config.shift_factor  # which that pipeline leaves out
    with torch.no_grad():
        decoded = stock.vae.decode(as_image(shown[0]) / config.scaling_factor + shift).sample
    torch.testing.assert_close(got, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.serves("upsampler=pixels", "FluxImg2ImgPipeline", "StableDiffusion3Img2ImgPipeline")
def test_low_tokens_of_an_image_by_way_of_the_pixels(stock, family, images):
    preset, config, seen = tiny.FAMILIES[family].presets[0], stock.vae.config, []
    pipe = ralu.enable(made_of(KINDS[family][0], stock), preset, upsampler="pixels")

    def callback(pipe, i, t, values):
        seen.append(pipe.scheduler.layout.x0)
        pipe._interrupt = True
        return values

    generate(pipe, image=images[:1], strength=STRENGTHS[family][1], callback_on_step_end=callback)
    ralu.disable(pipe)
    clean, _ = encoded(stock, images[:1], 3)
    with torch.no_grad():
        image = stock.vae.decode(clean / config.scaling_factor + config.shift_factor).sample
        half = F.interpolate(image, scale_factor=0.5, mode="bicubic", antialias=True).clamp(-1, 1)
        low = (stock.vae.encode(half).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    torch.testing.assert_close(seen[0], F.pixel_unshuffle(low, 2).flatten(2).transpose(1, 2), rtol=0, atol=1e-4)


@pytest.mark.serves("TaylorSeer", "FluxImg2ImgPipeline", "StableDiffusion3Img2ImgPipeline")
@pytest.mark.parametrize(
    "method", ["stock-6", "stock-6+taylorseer(interval=2,warmup=1)", "{}+taylorseer(interval=3,warmup=1)"]
)
def test_steps_of_other_schedules_and_with_caches(stock, family, images, method):
    """SD3's pipelines count the steps that were asked for, not those that are made; a cache starts with the run."""
    pipe, model, steps, computed = made_of(KINDS[family][0], stock), stock.transformer, [], []
    ralu.enable(pipe, method.format(tiny.FAMILIES[family].presets[0]))
    hook = model.transformer_blocks[0].attn.to_q.register_forward_pre_hook(lambda *_: computed.append(len(steps)))

    def callback(pipe, i, t, values):
        steps.append(pipe.scheduler.progress)
        return values

    for strength in (0.7, 0.35):
        steps.clear()
        computed.clear()
        call = {"strength": strength, "num_inference_steps": 40, "callback_on_step_end": callback}
        assert generate(pipe, image=images[:1], **call).isfinite().all()
        made = pipe.num_timesteps
        if "stock" in method:
            assert made == 6 - int(6 - 6 * strength)
        assert len(steps) == made and computed[0] == 0
        assert [(at.run_step, at.run_steps) for at in steps[:-1]] == [(k, made) for k in range(1, made)]
        assert (len(computed) == made) == ("taylorseer" not in method)
    hook.remove()
    ralu.disable(pipe)


# ---- the parts ----


@pytest.mark.parametrize("preset", ["flux-5x", "flux-7x", "sd3-2x", "sd3-3x", "bottleneck-flux-5x", "speed-flux-5x"])
def test_a_run_begins_at_the_level_and_never_exceeds_it(preset):
    schedule, before = ralu.preset(preset), 0
    for level in np.linspace(1, 0.001, 97):
        run = ImageRun(schedule, gradient, Options(), lambda *_: None)
        stages = [schedule.stages[stage - 1].resolution for stage, _, _ in run.steps]
        index = run.begin_at(level)
        low = level / 2 / (1 - level / 2)
        own = low if stages[index] == "low" else level
        assert run.steps[index][1] == pytest.approx(own) and run.steps[index][2] < own
        for (_, sigma, _), resolution in zip(run.steps[index:], stages[index:], strict=True):
            assert sigma <= (low if resolution == "low" else level) + 1e-6
        assert index >= before and sum(run.made) == len(run.steps) - index
        before = index


def test_no_strength_gives_an_empty_list():
    """Whatever is asked for, a run makes a step where the stock run makes one."""
    scheduler = ralu.RaluScheduler("sd3-3x", shift=3.0, regions="gradient")
    for steps in range(3, 12):
        for strength in np.linspace(0, 1, 41):
            scheduler.bind()
            scheduler.set_timesteps(steps)
            if int(max(steps - steps * strength, 0)) == steps:
                with pytest.raises(ValueError, match=rf"strength must leave one of the {steps} steps"):
                    scheduler.begin_at(strength)
            else:
                timesteps = scheduler.begin_at(strength)
                assert 1 <= len(timesteps) <= 12 and timesteps[-1] > 0
                assert torch.equal(timesteps, 1000 * scheduler.sigmas[-1 - len(timesteps) : -1])
    scheduler.unbind()


def test_a_later_step_is_set_as_in_stock():
    scheduler = ralu.RaluScheduler("flux-5x", regions="gradient")
    scheduler.bind()
    scheduler.set_timesteps(15)
    scheduler.set_begin_index(9)
    clean, noise = torch.randn(2, 2, 4, 8, 8)
    sigma = PRESETS["flux-5x"].sigmas(3)[0]
    mixed = scheduler.scale_noise(clean, scheduler.timesteps[9:10], noise)
    torch.testing.assert_close(mixed, (1 - sigma) * clean + sigma * noise)
    tokens = F.pixel_unshuffle(mixed, 2).flatten(2).transpose(1, 2)
    scheduler.start(tokens, (4, 4))
    assert scheduler.layout.resolution == "full" and torch.equal(scheduler.subsample_first(tokens), tokens)
    assert scheduler.progress.stage == 3 and scheduler.progress.step == 0 and scheduler.progress.run_steps == 6


def test_an_odd_grid_begins_with_a_padded_image():
    clean, noise = torch.randn(2, 2, 4, 6, 10)
    sigma = 0.97 / 2 / (1 - 0.97 / 2)

    def begun(clean):
        run = ImageRun(PRESETS["flux-5x"], gradient, Options())
        run.begin_at(0.97)
        tokens = F.pixel_unshuffle(run.noised(clean, noise), 2).flatten(2).mT
        run.start(tokens, (3, 5))
        return F.pixel_shuffle(run.first(tokens).mT.unflatten(2, (2, 3)), 2)

    white, mean = begun(0 * clean) / sigma, F.avg_pool2d(F.pad(clean, (0, 2, 0, 2), mode="replicate"), 2)
    torch.testing.assert_close(begun(clean) - sigma * white, (1 - sigma) * mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(white[..., :3, :5], noise[..., ::2, ::2])
    assert len(white.unique()) == white.numel()  # what pads has noise of its own


def test_a_layouts_tokens_are_gathered_and_spread_without_loss():
    grid, x = (3, 4), torch.randn(2, 48, 8)
    low = Layout(1, "low", raster(grid, 2, x.device))
    assert torch.equal(gather(spread(x[:, :12], low, grid), low, grid), x[:, :12])
    for chosen in ({"ratio": 0.0}, {"ratio": 0.3}, {"ratio": 1.0}, {"threshold": 0.6}):
        plan = plan_tokens(torch.rand(2, 12), grid, **chosen)
        layout = Layout(2, "mixed", pad(plan.positions, plan), plan)
        full = spread(gather(x, layout, grid), layout, grid)
        image, whole = (F.pixel_shuffle(t.mT.unflatten(2, (6, 8)), 2) for t in (full, x))
        for b in range(2):
            lengths = plan.cu_seqlens.tolist()
            rows = range(lengths[b], lengths[b + 1])
            picked = {plan.source[row].item() for row in rows if plan.child[row] >= 0}
            for token in range(12):
                y, x0 = token // 4 * 4, token % 4 * 4
                part = whole[b, :, y : y + 4, x0 : x0 + 4]
                if token not in picked:  # the first of each 2x2 pixels stands for all four
                    part = part[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2)
                assert torch.equal(image[b, :, y : y + 4, x0 : x0 + 4], part)
        assert torch.equal(gather(full, layout, grid), gather(x, layout, grid))
        twice = gather(torch.cat([x, 2 * x]), layout, grid)
        assert torch.equal(twice, torch.cat([gather(x, layout, grid), gather(2 * x, layout, grid)]))


# ---- refusals ----


def test_what_is_refused(stock, family, images, mask):
    later, early = STRENGTHS[family][1], STRENGTHS[family][0]
    image_to_image, inpaint = (made_of(kind, stock) for kind in KINDS[family])
    with pytest.raises(ValueError, match=r"regions='mask' needs an inpainting pipeline, got .*Img2Img"):
        ralu.enable(image_to_image, regions="mask")
    with pytest.raises(ValueError, match="regions='mask' needs an inpainting pipeline"):
        ralu.sample(lambda x, sigma, layout: x, torch.randn(1, 16, 16), (4, 4), regions="mask")
    ralu.enable(inpaint, regions="mask")
    with pytest.raises(ValueError, match="regions='mask' needs an inpainting pipeline"):
        generate(made_of(type(stock), inpaint))
    ralu.enable(inpaint, SHORT[family])
    latents = tiny.FAMILIES[family].latents(torch.randn(1, stock.vae.config.latent_channels, HEIGHT // 2, WIDTH // 2))
    if family == "sd3":
        with pytest.raises(ValueError, match="latents must be None"):
            generate(inpaint, image=images[:1], mask_image=mask, strength=later, latents=latents)
    with pytest.raises(ValueError, match="latents must be None"):
        generate(made_of(KINDS[family][0], inpaint), image=images[:1], strength=early, latents=latents)
    with pytest.raises(ValueError, match="strength must leave one of the 100 steps"):
        generate(made_of(KINDS[family][0], inpaint), image=images[:1], strength=0.0)
    ralu.enable(inpaint, SHORT[family], regions="change")
    with pytest.raises(ValueError, match=r"regions='change' needs 2 steps before the selection, .* has 0"):
        generate(inpaint, image=images[:1], mask_image=mask, strength=later)
    ralu.disable(inpaint)


def test_channels_that_are_no_condition_are_refused():
    for count in (17, 40, 52):
        pipe = tiny.flux(in_channels=count)
        with pytest.raises(ValueError, match=f"in_channels must be 16, 32 with a control image, .* got {count}"):
            ralu.enable(pipe)


def test_mask_and_image_in_further_channels_are_refused():
    pipe = tiny.sd3()
    pipe.transformer.register_to_config(in_channels=33)
    with pytest.raises(ValueError, match="as many in_channels as the 4 out_channels, got 33"):
        ralu.enable(pipe)
