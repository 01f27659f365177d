"""RALU inside the unmodified StableDiffusion3Pipeline, against stock runs, single runs and hand-written loops."""

import copy
from itertools import pairwise

import accelerate
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)

import ralu
from ralu.families.sd3 import Positions, pack
from ralu.presets import PRESETS
from ralu.regions import edge_density, gradient
from ralu.stages import seeds_of
from ralu_kernels import reference

PROMPTS = tiny.PROMPTS
close = dict(rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def stock():
    return tiny.sd3()


@pytest.fixture
def pipe(stock):
    yield ralu.enable(stock)
    ralu.disable(stock)


# ---- the method written out anew ----


def sincos(config, places):
    """Position embeddings (n, D) at (row, column) places of the stored grid, in float64."""
    width = config.num_attention_heads * config.attention_head_dim
    scaled = np.asarray(places, np.float64) * (config.sample_size // config.patch_size) / config.pos_embed_max_size
    angles = scaled[..., None] / 10000 ** (np.arange(width // 4) / (width / 4))  # (n, 2, D / 4)
    (row, column), parts = (angles[:, 0], angles[:, 1]), []
    for axis in (column, row):
        parts += [np.sin(axis), np.cos(axis)]
    return torch.from_numpy(np.concatenate(parts, -1)).float()


def on_tokens(transformer, patches, places, timestep, text, pooled):
    """Run the transformer on tokens anywhere. patches: (L, C, 2, 2); places: L (row, column) on the stored grid."""
    embed, n = transformer.pos_embed, len(patches)
    x = F.linear(patches.flatten(1), embed.proj.weight.flatten(1), embed.proj.bias)
    x = (x + sincos(transformer.config, places))[None]
    temb, text = transformer.time_text_embed(timestep, pooled), transformer.context_embedder(text)
    for block in transformer.transformer_blocks:
        text, x = block(hidden_states=x, encoder_hidden_states=text, temb=temb)
    out = transformer.proj_out(transformer.norm_out(x, temb))
    return out.view(n, 2, 2, -1).permute(0, 3, 1, 2)  # the output's channels are (row, column, latent channel)


def patches_of(image):
    """Cut an image into patches: (C, 2h, 2w) -> (h·w, C, 2, 2)."""
    c, h, w = image.shape
    return image.view(c, h // 2, 2, w // 2, 2).permute(1, 3, 0, 2, 4).reshape(-1, c, 2, 2)


def image_of(patches, h, w):
    return patches.view(h, w, -1, 2, 2).permute(2, 0, 3, 1, 4).reshape(-1, 2 * h, 2 * w)


@torch.no_grad()
def by_hand(pipe, prompt, seed, preset, ratio, guidance=3.5, height=64, width=48):
    """One image, half of guidance at a time. Where all tokens are selected, stage 2 is the stock transformer's own."""
    schedule, transformer, vae = PRESETS[preset], pipe.transformer, pipe.vae
    text, no_text, pooled, no_pooled = pipe.encode_prompt(prompt, None, None, max_sequence_length=16)
    h, w = height // 8, width // 8  # low grid
    size = transformer.config.pos_embed_max_size
    top, left = (size - h) // 2, (size - w) // 2
    noise = torch.randn(1, 4, 4 * h, 4 * w, generator=torch.Generator().manual_seed(seed))
    key = seeds_of(F.pixel_unshuffle(noise, 2).flatten(2).transpose(1, 2))[0]

    def guided(velocity):
        without, with_ = velocity(no_text, no_pooled), velocity(text, pooled)
        return without + guidance * (with_ - without)

    def denoise(x, stage, velocity):
        for sigma, following in pairwise(schedule.sigmas(stage)):
            t = torch.tensor([1000 * sigma])
            v = guided(lambda text, pooled, x=x, t=t: velocity(x, t, text, pooled))
            x0, x = x - sigma * v, x + (following - sigma) * v
        return x, x0

    def as_image(x, t, text, pooled):
        return transformer(x[None], text, pooled, t, return_dict=False)[0][0]

    def normals(shape, stage, kind):
        count = int(np.prod(shape))
        return torch.stack(reference.randn4x(key, torch.arange(count), stage, kind)).view(4, *shape)

    def upsampled(x, stage):
        transition = schedule.transitions[stage - 2]
        eps = normals(x.shape, stage, 0)
        z = eps - (1 - (1 - 4 * transition.c) ** 0.5) / 4 * eps.sum(0)
        z = F.pixel_shuffle(z.transpose(0, 1).flatten(0, 1)[None], 2)[0]
        return transition.scale * F.interpolate(x[None], scale_factor=2)[0] + transition.noise_scale * z

    def kept(x, stage):
        transition = schedule.transitions[stage - 2]
        channels, rows, columns = x.shape
        eps = normals((rows // 2, columns // 2, channels), stage, 1)  # of a 2x2 patch, all channels
        eps = eps.permute(3, 1, 2, 0).unflatten(-1, (2, 2)).transpose(2, 3).reshape(x.shape)
        return transition.scale * x + transition.noise_scale * (1 - transition.c) ** 0.5 * eps

    low, x0 = denoise(noise[0, :, ::2, ::2], 1, as_image)
    image = vae.decode(x0[None] / vae.config.scaling_factor + vae.config.shift_factor).sample
    scores = edge_density(image, (h, w))[0].tolist()
    chosen = sorted(range(h * w), key=lambda i: (-scores[i], i))[: int(ratio * h * w + 1e-6)]
    selected = torch.zeros(h * w, dtype=torch.bool)
    selected[chosen] = True
    up, same = upsampled(low, 2), patches_of(kept(low, 2))
    if selected.all():
        halves = [(top + y / 2, left + x / 2) for y in range(2 * h) for x in range(2 * w)]
        embed = transformer.pos_embed
        embed.cropped_pos_embed = lambda *size: sincos(transformer.config, halves)
        high = denoise(up, 2, as_image)[0]
        del embed.cropped_pos_embed
        return kept(high, 3), denoise(kept(high, 3), 3, as_image)[0][None]
    children = patches_of(up).view(h, 2, w, 2, 4, 2, 2).transpose(1, 2).reshape(h * w, 4, 4, 2, 2)
    tokens, places = [], []
    for i in range(h * w):
        y, x = top + i // w, left + i % w
        tokens += list(children[i]) if selected[i] else [same[i]]
        places += [(y + dy, x + dx) for dy in (0, 0.5) for dx in (0, 0.5)] if selected[i] else [(y, x)]
    mixed, _ = denoise(
        torch.stack(tokens), 2, lambda x, t, text, pooled: on_tokens(transformer, x, places, t, text, pooled)
    )
    mixed, coarse, fine = iter(mixed), torch.zeros_like(same), torch.zeros_like(children)
    for i in range(h * w):
        if selected[i]:
            fine[i] = torch.stack([next(mixed) for _ in range(4)])
        else:
            coarse[i] = next(mixed)
    fine = image_of(fine.view(h, w, 2, 2, 4, 2, 2).transpose(1, 2).flatten(0, 3), 2 * h, 2 * w)
    where = F.interpolate(selected.view(1, 1, h, w).float(), scale_factor=4)[0] > 0
    third = torch.where(where, kept(fine, 3), upsampled(image_of(coarse, h, w), 3))
    return third, denoise(third, 3, as_image)[0][None]


@pytest.mark.parametrize("version", tiny.SD3)
@pytest.mark.parametrize("preset, ratio", [("sd3-3x", 1.0), ("sd3-2x", 0.3)])
@pytest.mark.serves("equals a run written out by hand", "StableDiffusion3Pipeline")
def test_whole_runs_equal_the_method_written_out_by_hand(version, preset, ratio):
    pipe = tiny.sd3(version)
    third, expected = by_hand(pipe, PROMPTS[0], 3, preset, ratio)
    seen = []

    def callback(pipe, i, t, values):
        seen.append(values["latents"])
        return values

    ralu.enable(pipe, preset, ratio=ratio)
    got = tiny.generate(pipe, seeds=(3,), width=48, output_type="latent", callback_on_step_end=callback)
    torch.testing.assert_close(seen[sum(PRESETS[preset].steps[:2]) - 1][0], third, rtol=0, atol=1e-4)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


# ---- positions ----


@pytest.mark.parametrize("version", tiny.SD3)
def test_positions_at_half_steps_are_the_formulas(version):
    transformer = tiny.sd3(version).transformer
    positions, size = Positions(transformer.pos_embed), transformer.config.pos_embed_max_size
    assert positions.analytic
    grid = (6, 10)
    places = torch.rand(2, 50, 2).mul(20).round() / 2 % torch.tensor(grid)
    offset = torch.tensor([(size - 6) // 2, (size - 10) // 2])
    for sample, rows in zip(places, positions(places, grid), strict=True):
        torch.testing.assert_close(rows, sincos(transformer.config, sample + offset), rtol=0, atol=2e-6)
    whole = torch.cartesian_prod(torch.arange(6.0), torch.arange(10.0))[None]
    assert torch.equal(positions(whole, grid), transformer.pos_embed.cropped_pos_embed(12, 20))


def test_a_checkpoint_with_other_positions_is_interpolated():
    transformer = tiny.sd3("3.0").transformer
    embed = transformer.pos_embed
    embed.pos_embed = torch.randn_like(embed.pos_embed)
    positions = Positions(embed)
    assert not positions.analytic
    grid = torch.randn(24, 24, 32).copy_(embed.pos_embed.view(24, 24, 32))
    places = torch.tensor([[[0, 0], [2.5, 1], [3, 0.5], [23, 23.5], [11.5, 4.5]]])
    got = positions(places, (24, 24))[0]
    expected = [
        grid[0, 0], (grid[2, 1] + grid[3, 1]) / 2, (grid[3, 0] + grid[3, 1]) / 2, grid[23, 23],
        (grid[11, 4] + grid[11, 5] + grid[12, 4] + grid[12, 5]) / 4,
    ]  # fmt: skip
    torch.testing.assert_close(got, torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_positions_still_count_as_the_formulas(dtype):
    pipe = tiny.sd3().to(dtype=dtype)
    assert pipe.transformer.pos_embed.pos_embed.dtype == dtype
    assert Positions(pipe.transformer.pos_embed).analytic
    assert tiny.generate(ralu.enable(pipe)).isfinite().all()


# ---- inside the pipeline ----


def test_skip_layer_guidance_in_batches(pipe):
    """3.5-medium's own guidance calls the transformer a second time, with the batch not doubled."""
    call = {"skip_guidance_layers": [1], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
    batch = tiny.generate(pipe, PROMPTS, seeds=(5, 6, 7), **call)
    for i in range(3):
        torch.testing.assert_close(batch[i : i + 1], tiny.generate(pipe, PROMPTS[i], seeds=(5 + i,), **call), **close)
    assert (batch - tiny.generate(pipe, PROMPTS, seeds=(5, 6, 7))).abs().max() > 1e-3
    unmoved = tiny.generate(pipe, PROMPTS, seeds=(5, 6, 7), **call, skip_layer_guidance_scale=0.0)
    torch.testing.assert_close(unmoved, tiny.generate(pipe, PROMPTS, seeds=(5, 6, 7)), **close)


@pytest.mark.serves("guidance", "StableDiffusion3Pipeline")
def test_without_guidance_and_with_a_negative_prompt(pipe):
    plain = tiny.generate(pipe, seeds=(1,), guidance_scale=1.0)
    assert (tiny.generate(pipe, seeds=(1,)) - plain).abs().max() > 1e-3
    # The same prompt on both sides guides nowhere.
    itself = tiny.generate(pipe, seeds=(1,), guidance_scale=3.0, negative_prompt=PROMPTS[0])
    torch.testing.assert_close(itself, plain, **close)


@pytest.mark.parametrize("preset", ["sd3-2x", "sd3-3x", "distilled-4"])
def test_shapes_of_the_stages_and_the_callback_index(stock, preset):
    ralu.enable(stock, preset)
    seen, totals = [], []

    def callback(pipe, i, t, values):
        totals.append(pipe.num_timesteps)
        seen.append((i, tuple(values["latents"].shape)))
        return values

    tiny.generate(stock, callback_on_step_end=callback)
    steps, ratio = stock.scheduler.schedule.steps, stock.scheduler.schedule.ratio
    ralu.disable(stock)
    strip = 2 * (64 + 3 * int(64 * ratio))
    # A callback at a stage's last step already sees the next stage's latents.
    shapes = [(1, 4, 16, 16)] * (steps[0] - 1) + [(1, 4, 2, strip)] * steps[1] + [(1, 4, 32, 32)] * (steps[2] + 1)
    assert seen == list(enumerate(shapes)) and set(totals) == {sum(steps)}


@pytest.mark.refuses("token counts of its own for every image", "StableDiffusion3Pipeline")
def test_thresholds_serve_one_image_at_a_time(stock):
    """The attention of SD3 ignores masks without a word, so padded sequences must not reach it."""
    scores = []
    ralu.enable(stock, regions=lambda x0, grid: scores.append(gradient(x0, grid)) or scores[-1])
    tiny.generate(stock, PROMPTS, seeds=(5, 6, 7))
    threshold = scores[0].quantile(0.7).item()
    assert len({int((row >= threshold).sum()) for row in scores[0]}) > 1
    ralu.enable(stock, regions="gradient", threshold=threshold)
    with pytest.raises(ValueError, match="threshold= generate one at a time"):
        tiny.generate(stock, PROMPTS, seeds=(5, 6, 7))
    single = tiny.generate(stock, PROMPTS[0], seeds=(5,))
    share = (scores[0][0] >= threshold).float().mean().item()
    torch.testing.assert_close(
        tiny.generate(ralu.enable(stock, regions="gradient", ratio=share), PROMPTS[0], seeds=(5,)), single, **close
    )
    ralu.disable(stock)


@pytest.mark.parametrize("step", [0, 8])
def test_latents_of_an_interrupted_run_are_decoded_as_they_are(pipe, step):
    """output_type="latent" leaves the decoding to the caller, who may have made them full-size, or have others.

    Others may be of any size, that of the stage where the run ended too: nothing tells them from its latents.
    """

    def stop(pipe, i, t, values):
        pipe._interrupt = i == step
        return values

    latents = tiny.generate(pipe, callback_on_step_end=stop, output_type="latent")
    full = pipe.scheduler.full_resolution(latents)
    assert latents.shape != full.shape == (1, 4, 32, 32)
    decode = type(pipe.vae).decode.__get__(pipe.vae)
    with torch.no_grad():
        for others in (full, torch.randn(1, 4, 12, 20), torch.randn(latents.shape)):
            assert torch.equal(pipe.vae.decode(others).sample, decode(others).sample)


def test_an_interruption_does_not_touch_the_preview(pipe, monkeypatch):
    """It may come from another thread, while the last step of stage 1 is being made."""
    run = pipe.transformer.forward
    last = PRESETS["sd3-2x"].steps[0] - 1

    def forward(*args, **kwargs):
        pipe._interrupt = pipe.scheduler.step_index == last
        return run(*args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    latents = tiny.generate(pipe, output_type="latent")
    assert pipe.scheduler.running and pipe.scheduler.layout.stage == 2
    assert latents.shape == (1, 4, 2, 2 * pipe.scheduler.layout.plan.max_seqlen)


def test_pipelines_that_share_a_vae(stock):
    """Whichever is disabled first, the decoder ends as it was."""
    other = tiny.sd3("3.0")
    other.vae = stock.vae
    for first, last in ((stock, other), (other, stock)):
        ralu.enable(stock), ralu.enable(other)
        ralu.disable(first)
        assert tiny.generate(last).isfinite().all()
        ralu.disable(last)
        assert "decode" not in vars(stock.vae)


def test_copies_of_the_parts_are_stock_and_on_their_own(pipe):
    ralu.disable(pipe)
    expected = tiny.generate(pipe, num_inference_steps=4)
    tiny.generate(ralu.enable(pipe))
    parts = copy.deepcopy({"vae": pipe.vae, "transformer": pipe.transformer})
    twin = StableDiffusion3Pipeline(**{**pipe.components, **parts, "scheduler": ralu.disable(pipe).scheduler})
    twin.set_progress_bar_config(disable=True)
    tiny.generate(ralu.enable(pipe))  # leaves a strip's positions behind in the original
    bias = pipe.vae.decoder.conv_out.bias.data
    bias += 1.0
    assert torch.equal(tiny.generate(twin, num_inference_steps=4), expected)
    bias -= 1.0


def test_from_pipe_shares_the_enabled_parts(pipe):
    expected = tiny.generate(pipe)
    unguided = tiny.generate(pipe, guidance_scale=1.0)
    twin = StableDiffusion3Pipeline.from_pipe(pipe, dtype=torch.float32)
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.generate(twin), expected)  # though the pipe itself last ran without guidance
    assert torch.equal(tiny.generate(twin, guidance_scale=1.0), unguided)
    ralu.disable(twin)
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler


class Offload(accelerate.hooks.ModelHook):
    """What offloading does to a model's forward, without the transfers."""

    def pre_forward(self, module, *args, **kwargs):
        return args, kwargs


def test_presets_belong_to_families(stock):
    flux = tiny.flux()
    with pytest.raises(ValueError, match=r"one of flux-5x, flux-7x, .*, distilled-4 or a Schedule, got 'sd3-2x'"):
        ralu.enable(flux, "sd3-2x")
    with pytest.raises(ValueError, match=r"one of sd3-2x, sd3-3x, .*, distilled-4 or a Schedule, got 'flux-5x'"):
        ralu.enable(stock, "flux-5x")
    assert ralu.enable(stock).scheduler.schedule == PRESETS["sd3-2x"]
    assert ralu.enable(flux).scheduler.schedule == PRESETS["flux-5x"]
    assert ralu.enable(stock, PRESETS["flux-7x"]).scheduler.schedule == PRESETS["flux-7x"]  # on one's own account
    assert ralu.disable(stock).scheduler.config.shift == 3.0


@pytest.mark.parametrize("family, shift", [("flux", 1.0), ("sd3", 3.0)])
def test_distilled_models_go_by_their_own_shift(family, shift):
    """FLUX.1-schnell and SD3.5-Large-Turbo: four steps, no guidance."""
    pipe = tiny.flux(dynamic=False) if family == "flux" else tiny.sd3("3.5-large")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    ralu.enable(pipe, "distilled-4")
    solved = ralu.solve((1, 1, 2), (0.3, 0.45, 1.0), shift=shift)
    assert pipe.scheduler.schedule.shifts == pytest.approx(solved.shifts, rel=0.02)  # as far as a solution goes
    image = tiny.generate(pipe, guidance_scale=0.0, num_inference_steps=4)
    assert image.isfinite().all() and image.std() > 0 and pipe.num_timesteps == 4


def test_packing_is_the_fluxes():
    latents = torch.randn(2, 4, 6, 10)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 4, 6, 10))


def test_the_embedded_model_generates_stock_images():
    pipe = StableDiffusion3Pipeline.from_pretrained(ralu.mini_path("mini-sd3"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 256, "width": 256, "guidance_scale": 2.0}
    sunflower, fox = (tiny.generate(pipe, prompt, num_inference_steps=6, **call) for prompt in ("sunflower", "fox"))
    for preset in ("sd3-2x", "sd3-3x"):
        generated = tiny.generate(ralu.enable(pipe, preset), "sunflower", seeds=(1,), **call)
        assert (generated - sunflower).abs().mean() < 0.1 * (generated - fox).abs().mean()
