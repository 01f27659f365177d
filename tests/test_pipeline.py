"""RALU inside the unmodified FluxPipeline, against stock runs, single runs and a hand-written loop."""

import copy
import pickle
from itertools import pairwise

import pytest
import tiny
import torch
from diffusers import (
    DiffusionPipeline,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    TaylorSeerCacheConfig,
)

import ralu
from ralu import mini
from ralu.presets import PRESETS
from ralu.regions import edge_density, gradient
from ralu.stages import seeds_of
from ralu_kernels import reference

PROMPTS = tiny.PROMPTS
SHORT = tiny.FAMILIES["flux"].short
close = dict(rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def stock():
    return tiny.flux()


@pytest.fixture
def pipe(stock):
    yield ralu.enable(stock, SHORT)
    ralu.disable(stock)


def plan_of(scores, grid, ratio):
    """Write out the stage-2 layout of one sample anew: rows as (token, child or None)."""
    n = len(scores)
    chosen = set(sorted(range(n), key=lambda i: (-scores[i], i))[: int(ratio * n + 1e-6)])
    rows = []
    for i in range(n):
        rows += [(i, child) for child in range(4)] if i in chosen else [(i, None)]
    return rows


@torch.no_grad()
def by_hand(pipe, prompt, seed, size=64, preset="flux-5x"):
    """RALU for one image: the stock transformer with fractional 2-D ids, and noise drawn value by value."""
    schedule, transformer, vae = PRESETS[preset], pipe.transformer, pipe.vae
    embeds, pooled, text_ids = pipe.encode_prompt(prompt, prompt, max_sequence_length=16)
    g = size // 8  # low grid: a token is 4x4 pixels of the image
    noise = torch.randn(1, 4, 4 * g, 4 * g, generator=torch.Generator().manual_seed(seed))
    key = seeds_of(FluxPipeline._pack_latents(noise, 1, 4, 4 * g, 4 * g))[0]

    def normals(element, stage, kind):
        element = torch.tensor([element])
        return torch.stack([z[0] for z in reference.randn4x(key, element, stage, kind)])

    def denoise(tokens, positions, stage):
        ids = torch.cat([torch.zeros(len(positions), 1), torch.tensor(positions, dtype=torch.float32)], 1)
        levels = schedule.sigmas(stage)
        for sigma, following in pairwise(levels):
            v = transformer(
                hidden_states=tokens[None], timestep=torch.tensor([sigma]), guidance=None, pooled_projections=pooled,
                encoder_hidden_states=embeds, txt_ids=text_ids, img_ids=ids, return_dict=False,
            )[0][0]  # fmt: skip
            x0, tokens = tokens - sigma * v, tokens + (following - sigma) * v
        return tokens, x0

    def upsample(token, i, stage):
        """One low token (16 values) to its four children, (4, 16), nearest neighbour on latent pixels."""
        transition = schedule.transitions[stage - 2]
        k = (1 - (1 - 4 * transition.c) ** 0.5) / 4
        row, col = divmod(i, g)
        children = torch.empty(4, 16)
        for ch in range(16):
            c, py, px = ch // 4, ch // 2 % 2, ch % 2
            eps = normals((c * 2 * g + 2 * row + py) * 2 * g + 2 * col + px, stage, 0)
            z = eps - k * eps.sum()
            children[2 * py + px, 4 * c : 4 * c + 4] = transition.scale * token[ch] + transition.noise_scale * z
        return children

    def keep(token, row, col, width, stage):
        transition = schedule.transitions[stage - 2]
        eps = torch.cat([normals((row * width + col) * 4 + four, stage, 1) for four in range(4)])
        return transition.scale * token + transition.noise_scale * (1 - transition.c) ** 0.5 * eps

    low = FluxPipeline._pack_latents(noise[..., ::2, ::2], 1, 4, 2 * g, 2 * g)[0]
    tokens, x0 = denoise(low, [divmod(i, g) for i in range(g * g)], 1)
    preview = FluxPipeline._unpack_latents(x0[None], size // 2, size // 2, 2)
    image = vae.decode(preview / vae.config.scaling_factor + vae.config.shift_factor).sample
    rows = plan_of(edge_density(image, (g, g))[0].tolist(), g, schedule.ratio)
    children = {i: upsample(tokens[i], i, 2) for i, child in rows if child == 0}
    mixed = torch.stack([
        keep(tokens[i], *divmod(i, g), g, 2) if child is None else children[i][child] for i, child in rows
    ])  # fmt: skip
    places = [(i // g + (child or 0) // 2 / 2, i % g + (child or 0) % 2 / 2) for i, child in rows]
    tokens, _ = denoise(mixed, places, 2)
    full = torch.empty(4 * g * g, 16)
    for token, (i, child) in zip(tokens, rows, strict=True):
        row, col = divmod(i, g)
        if child is None:
            for kid, value in enumerate(upsample(token, i, 3)):
                full[(2 * row + kid // 2) * 2 * g + 2 * col + kid % 2] = value
        else:
            y, x = 2 * row + child // 2, 2 * col + child % 2
            full[y * 2 * g + x] = keep(token, y, x, 2 * g, 3)
    tokens, _ = denoise(full, [divmod(i, 2 * g) for i in range(4 * g * g)], 3)
    return tokens[None]


@pytest.mark.serves("equals a run written out by hand", "FluxPipeline")
def test_whole_run_equals_the_method_written_out_by_hand(stock):
    expected = by_hand(stock, PROMPTS[0], seed=3)
    ralu.enable(stock, "flux-5x")
    got = tiny.generate(stock, seeds=(3,), output_type="latent")
    ralu.disable(stock)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("preset", ["flux-5x", "flux-7x", "distilled-4"])
def test_steps_tokens_and_the_global_callback_index(stock, preset):
    ralu.enable(stock, preset)
    seen, totals = [], []

    def callback(pipe, i, t, values):
        totals.append(pipe.num_timesteps)
        seen.append((i, values["latents"].shape[1]))
        return values

    tiny.generate(stock, callback_on_step_end=callback)
    steps = stock.scheduler.schedule.steps
    ralu.disable(stock)
    low, high = 64, 256
    mixed = low + 3 * int(0.2 * low)
    # A callback at a stage's last step already sees the next stage's tokens.
    counts = [low] * (steps[0] - 1) + [mixed] * steps[1] + [high] * (steps[2] + 1)
    assert seen == list(enumerate(counts)) and set(totals) == {sum(steps)}


@pytest.mark.serves("token counts of its own for every image", "FluxPipeline")
def test_ragged_batches_equal_their_single_runs(stock):
    """A threshold chooses another number of tokens in every image: the shorter sequences are padded and masked."""
    scores = []

    def record(x0, grid):
        scores.append(gradient(x0, grid))
        return scores[-1]

    tiny.generate(ralu.enable(stock, SHORT, regions=record), PROMPTS, seeds=(5, 6, 7))
    threshold = scores[0].quantile(0.7).item()
    assert len({int((row >= threshold).sum()) for row in scores[0]}) > 1
    ralu.enable(stock, SHORT, regions="gradient", threshold=threshold)
    batch = tiny.generate(stock, PROMPTS, seeds=(5, 6, 7))
    for i in range(3):
        torch.testing.assert_close(batch[i : i + 1], tiny.generate(stock, PROMPTS[i], seeds=(5 + i,)), **close)
    ralu.disable(stock)


@pytest.mark.serves("guidance", "FluxPipeline")
def test_true_cfg_and_guidance():
    pipe = ralu.enable(tiny.flux(guidance_embeds=True), SHORT)
    call = {"negative_prompt": "blue", "true_cfg_scale": 3.0}
    batch = tiny.generate(pipe, PROMPTS[:2], seeds=(1, 2), **(call | {"negative_prompt": ["blue", "blue"]}))
    for i in range(2):
        torch.testing.assert_close(batch[i : i + 1], tiny.generate(pipe, PROMPTS[i], seeds=(1 + i,), **call), **close)
    assert (tiny.generate(pipe, seeds=(1,)) - batch[:1]).abs().max() > 1e-3


@pytest.mark.serves("IP-adapters", "FluxPipeline")
def test_ip_adapter_scales_as_in_stock():
    pipe = ralu.enable(tiny.flux(), SHORT)
    plain = tiny.generate(pipe)
    given = tiny.load_ip_adapter(pipe)
    assert (tiny.generate(pipe, **given) - plain).abs().max() > 1e-2
    pipe.set_ip_adapter_scale(0.0)
    torch.testing.assert_close(tiny.generate(pipe, **given), plain, **close)


@pytest.mark.parametrize(
    "cache",
    [FirstBlockCacheConfig(threshold=0.0), TaylorSeerCacheConfig(cache_interval=1, disable_cache_before_step=1)],
)
def test_caches_start_anew_in_every_stage(pipe, cache):
    """With settings that never reuse anything the image is the uncached one, through two changes of token count."""
    expected = tiny.generate(pipe)
    pipe.transformer.enable_cache(cache)
    try:
        torch.testing.assert_close(tiny.generate(pipe), expected, **close)
    finally:
        pipe.transformer.disable_cache()


@pytest.mark.parametrize("step", [3, 5])
def test_caches_after_an_exception(stock, step):
    expected = tiny.generate(stock, num_inference_steps=4)
    whole = tiny.generate(ralu.enable(stock, SHORT))

    def fail(pipe, i, t, values):
        if i == step:
            raise KeyboardInterrupt
        return values

    stock.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    try:
        with pytest.raises(KeyboardInterrupt):
            tiny.generate(stock, callback_on_step_end=fail)
        torch.testing.assert_close(tiny.generate(stock), whole, **close)
        with pytest.raises(KeyboardInterrupt):
            tiny.generate(stock, callback_on_step_end=fail)
        ralu.disable(stock)
        torch.testing.assert_close(tiny.generate(stock, num_inference_steps=4), expected, **close)
    finally:
        stock.transformer.disable_cache()


def config_of(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def test_from_pipe_shares_the_enabled_parts(pipe):
    expected = tiny.generate(pipe)
    twin = FluxPipeline.from_pipe(pipe, dtype=torch.float32)
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.generate(twin), expected)
    ralu.disable(twin)
    assert type(twin.scheduler) is type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    ralu.enable(pipe, SHORT)
    assert torch.equal(tiny.generate(pipe), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"preset": "flux-6x"}, "preset: 'flux-6x' is none of flux-5x"),
        ({"preset": "sd3-2x"}, "preset must be one of flux-5x, .*, speed-flux-5x, .* or a Schedule"),
        ({"granularity": "block"}, "granularity must be"),
        ({"kept_noise": "none"}, "kept_noise must be"),
        ({"regions": "sobel"}, "regions must be"),
        ({"ratio": 0.2, "threshold": 0.1}, "not both"),
        ({"ratio": 2.0}, "ratio must lie"),
    ],
)
def test_enable_is_all_or_nothing(stock, change, message):
    scheduler, pos_embed = stock.scheduler, stock.transformer.pos_embed
    with pytest.raises(ValueError, match=message):
        ralu.enable(stock, **change)
    assert stock.scheduler is scheduler and stock.transformer.pos_embed is pos_embed


def test_one_transformer_serves_one_enabled_pipeline_at_a_time(stock):
    expected = tiny.generate(stock, num_inference_steps=4)
    twin = FluxPipeline.from_pipe(stock, dtype=torch.float32)
    twin.scheduler = FlowMatchEulerDiscreteScheduler.from_config(stock.scheduler.config)
    twin.set_progress_bar_config(disable=True)
    enabled = tiny.generate(ralu.enable(stock, SHORT))
    assert torch.equal(tiny.generate(twin, num_inference_steps=4), expected)  # a stock neighbour stays stock
    assert torch.equal(tiny.generate(ralu.enable(twin, SHORT)), enabled)
    assert torch.equal(tiny.generate(stock, num_inference_steps=4), expected)
    twin.scheduler = FlowMatchEulerDiscreteScheduler.from_config(twin.scheduler.config)  # behind RALU's back
    assert torch.equal(tiny.generate(ralu.disable(twin), num_inference_steps=4), expected)


def test_a_copied_scheduler_leaves_the_model_behind(pipe):
    expected = tiny.generate(pipe)
    for copied in (copy.deepcopy(pipe.scheduler), pickle.loads(pickle.dumps(pipe.scheduler))):
        assert not copied.bound and config_of(copied) == config_of(pipe.scheduler)
        assert len(pickle.dumps(copied)) < 100_000
    assert torch.equal(tiny.generate(pipe), expected)


def test_an_enabled_pipeline_is_enabled_anew(pipe):
    expected = tiny.generate(ralu.enable(pipe, "flux-7x"))
    ralu.enable(pipe, "flux-5x", granularity="token", threshold=0.3, regions=gradient)
    assert torch.equal(tiny.generate(ralu.enable(pipe, "flux-7x")), expected)


def test_a_scorer_of_ones_own_cannot_be_saved(pipe, tmp_path):
    expected = tiny.generate(ralu.enable(pipe, "flux-7x", regions=gradient))
    pipe.save_pretrained(tmp_path)
    loaded = FluxPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="regions="):
        ralu.enable(loaded)
    torch.testing.assert_close(tiny.generate(ralu.enable(loaded, regions=gradient)), expected, **close)


def test_a_schedule_of_ones_own_is_saved(pipe, tmp_path):
    schedule = ralu.solve([1, 2, 2], [0.25, 0.5, 1.0], ratio=0.5)
    expected = tiny.generate(ralu.enable(pipe, schedule))
    pipe.save_pretrained(tmp_path)
    loaded = FluxPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(tiny.generate(ralu.enable(loaded)), expected, **close)
    assert loaded.num_timesteps == 5 and loaded.scheduler.schedule == schedule


def test_sample_is_the_pipelines_loop(pipe):
    expected = tiny.generate(pipe, seeds=(4,), output_type="latent")
    embeds, pooled, text_ids = pipe.encode_prompt(PROMPTS[0], PROMPTS[0], max_sequence_length=16)
    ralu.disable(pipe)

    def decode(x0, grid):
        latents = FluxPipeline._unpack_latents(x0, 64 // 2, 64 // 2, 2)
        return pipe.vae.decode(latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample

    def velocity(x, sigma, layout):
        ids = torch.nn.functional.pad(layout.positions[0], (1, 0))
        return pipe.transformer(
            hidden_states=x, timestep=torch.tensor([sigma]), pooled_projections=pooled, encoder_hidden_states=embeds,
            txt_ids=text_ids, img_ids=ids, return_dict=False,
        )[0]  # fmt: skip

    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(4))
    noise = FluxPipeline._pack_latents(noise, 1, 4, 32, 32)
    got = ralu.sample(velocity, noise, (16, 16), SHORT, decode=decode)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(grid=8), dict(grid=(8.0, 8)), dict(grid=(-8, -8)), dict(grid=(8, 8, 1)), dict(noise=torch.randn(64, 16)),
        dict(noise=torch.randn(2, 64, 16).numpy()), dict(noise=torch.ones(2, 64, 16, dtype=torch.int64)),
    ],
)  # fmt: skip
def test_what_sample_is_given_wrong_is_told_before_the_model_is_called(wrong):
    def velocity(*_):
        raise AssertionError("called")

    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        ralu.sample(**dict(velocity=velocity, noise=torch.randn(2, 64, 16), grid=(8, 8)) | wrong)


def test_seeds_depend_on_the_samples_own_noise_alone():
    noise = torch.randn(3, 40, 64)
    seeds = seeds_of(noise)
    assert seeds.dtype == torch.int64 and len(set(seeds.tolist())) == 3
    assert torch.equal(seeds_of(noise[1:2]), seeds[1:2])
    touched = noise.clone()
    touched[0, 7, 3] *= -1
    assert (seeds_of(touched) != seeds).tolist() == [True, False, False]
    swapped = noise[:, torch.randperm(40)]
    assert (seeds_of(swapped) != seeds).all()


def test_the_distilled_embedded_model_generates_what_it_was_asked_for():
    """Of the images of its teacher in six steps, the one of the same prompt is nearest to each of its images."""
    prompts = mini.PROMPTS[:3]

    def generate(name, preset=None, **call):
        pipe = DiffusionPipeline.from_pretrained(ralu.mini_path(name), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        if preset:
            ralu.enable(pipe, preset)
        return tiny.generate(pipe, prompts, seeds=range(len(prompts)), height=256, width=256, **call).flatten(1)

    taught = generate("mini-flux", num_inference_steps=6)
    for distilled in (generate("mini-schnell", num_inference_steps=4), generate("mini-schnell", "distilled-4")):
        assert torch.cdist(distilled, taught).argmin(1).tolist() == list(range(len(prompts)))
