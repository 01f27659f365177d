"""RALU inside the unmodified FluxPipeline, against stock runs, single runs and a hand-written loop."""

import copy
import pickle
from itertools import pairwise

import accelerate
import pytest
import tiny
import torch
from diffusers import (
    DiffusionPipeline,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    TaylorSeerCacheConfig,
)
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

import ralu
from ralu import mini
from ralu.regions import edge_density, gradient
from ralu.schedule import PRESETS
from ralu.scheduler import seeds_of
from ralu_kernels import reference

PROMPTS = tiny.PROMPTS
close = dict(rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def stock():
    return tiny.flux()


@pytest.fixture
def pipe(stock):
    yield ralu.enable(stock, "flux-5x")
    ralu.disable(stock)


def plan_of(scores, grid, ratio):
    """The stage-2 layout of one sample written out anew: rows as (token, child or None)."""
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
    g = size // 8  # low grid: a token is 4x4 pixels of the picture
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
        move = schedule.transitions[stage - 2]
        k = (1 - (1 - 4 * move.c) ** 0.5) / 4
        row, col = divmod(i, g)
        children = torch.empty(4, 16)
        for ch in range(16):
            c, py, px = ch // 4, ch // 2 % 2, ch % 2
            eps = normals((c * 2 * g + 2 * row + py) * 2 * g + 2 * col + px, stage, 0)
            z = eps - k * eps.sum()
            children[2 * py + px, 4 * c : 4 * c + 4] = move.scale * token[ch] + move.noise_scale * z
        return children

    def carry(token, row, col, width, stage):
        move = schedule.transitions[stage - 2]
        eps = torch.cat([normals((row * width + col) * 4 + four, stage, 1) for four in range(4)])
        return move.scale * token + move.noise_scale * (1 - move.c) ** 0.5 * eps

    low = FluxPipeline._pack_latents(noise[..., ::2, ::2], 1, 4, 2 * g, 2 * g)[0]
    tokens, x0 = denoise(low, [divmod(i, g) for i in range(g * g)], 1)
    preview = FluxPipeline._unpack_latents(x0[None], size // 2, size // 2, 2)
    image = vae.decode(preview / vae.config.scaling_factor + vae.config.shift_factor).sample
    rows = plan_of(edge_density(image, (g, g))[0].tolist(), g, schedule.ratio)
    children = {i: upsample(tokens[i], i, 2) for i, child in rows if child == 0}
    mixed = torch.stack([
        carry(tokens[i], *divmod(i, g), g, 2) if child is None else children[i][child] for i, child in rows
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
            full[y * 2 * g + x] = carry(token, y, x, 2 * g, 3)
    tokens, _ = denoise(full, [divmod(i, 2 * g) for i in range(4 * g * g)], 3)
    return tokens[None]


def test_whole_run_equals_the_method_written_out_by_hand(stock):
    expected = by_hand(stock, PROMPTS[0], seed=3)
    ralu.enable(stock, "flux-5x")
    got = tiny.paint(stock, seeds=(3,), output_type="latent")
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

    tiny.paint(stock, callback_on_step_end=callback)
    steps = stock.scheduler.schedule.steps
    ralu.disable(stock)
    low, high = 64, 256
    mixed = low + 3 * int(0.2 * low)
    # A callback at a stage's last step already sees the next stage's tokens.
    counts = [low] * (steps[0] - 1) + [mixed] * steps[1] + [high] * (steps[2] + 1)
    assert seen == list(enumerate(counts)) and set(totals) == {sum(steps)}


def test_a_batch_equals_its_single_runs_though_regions_differ(pipe):
    plans = []
    pipe.scheduler._mix = lambda *a, mix=pipe.scheduler._mix: (mix(*a), plans.append(pipe.scheduler.layout.plan))[0]
    batch = tiny.paint(pipe, PROMPTS, seeds=(5, 6, 7))
    child = plans[0].child.view(3, -1)
    assert not torch.equal(child[0], child[1]) and not torch.equal(child[1], child[2])
    for i in range(3):
        torch.testing.assert_close(batch[i : i + 1], tiny.paint(pipe, PROMPTS[i], seeds=(5 + i,)), **close)
    assert (batch[0] - batch[1]).abs().max() > 0.05


def test_ragged_batches_equal_their_single_runs(stock):
    """A threshold chooses another number of tokens in every image: the shorter sequences are padded and masked."""
    scores = []

    def record(x0, grid):
        scores.append(gradient(x0, grid))
        return scores[-1]

    tiny.paint(ralu.enable(stock, regions=record), PROMPTS, seeds=(5, 6, 7))
    threshold = scores[0].quantile(0.7).item()
    assert len({int((row >= threshold).sum()) for row in scores[0]}) > 1
    ralu.enable(stock, regions="gradient", threshold=threshold)
    batch = tiny.paint(stock, PROMPTS, seeds=(5, 6, 7))
    for i in range(3):
        torch.testing.assert_close(batch[i : i + 1], tiny.paint(stock, PROMPTS[i], seeds=(5 + i,)), **close)
    ralu.disable(stock)


def test_same_seed_same_image_by_generator_or_latents(pipe):
    first = tiny.paint(pipe, seeds=(1,))
    assert torch.equal(first, tiny.paint(pipe, seeds=(1,)))
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    packed = FluxPipeline._pack_latents(latents, 1, 4, 32, 32)
    given = pipe(PROMPTS[0], height=64, width=64, latents=packed, max_sequence_length=16, output_type="pt").images
    assert torch.equal(first, given)
    assert not torch.equal(first, tiny.paint(pipe, seeds=(2,)))
    twice = tiny.paint(pipe, PROMPTS[0], seeds=(1, 2), num_images_per_prompt=2)
    torch.testing.assert_close(twice, torch.cat([first, tiny.paint(pipe, seeds=(2,))]), **close)


def test_true_cfg_and_guidance():
    pipe = ralu.enable(tiny.flux(guidance_embeds=True))
    call = {"negative_prompt": "blue", "true_cfg_scale": 3.0}
    batch = tiny.paint(pipe, PROMPTS[:2], seeds=(1, 2), **(call | {"negative_prompt": ["blue", "blue"]}))
    for i in range(2):
        torch.testing.assert_close(batch[i : i + 1], tiny.paint(pipe, PROMPTS[i], seeds=(1 + i,), **call), **close)
    assert (tiny.paint(pipe, seeds=(1,)) - batch[:1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("height, width", [(64, 64), (72, 40), (16, 48)])
def test_output_types_and_sizes(pipe, kind, height, width):
    out = tiny.paint(pipe, output_type=kind, height=height, width=width)
    if kind == "pil":
        assert out[0].size == (width, height)
    elif kind == "latent":
        assert out.shape == (1, height * width // 16, 16)
    else:
        assert tuple(out.shape) == ((1, height, width, 3) if kind == "np" else (1, 3, height, width))


def test_odd_sizes_name_the_nearest_ones(pipe):
    with pytest.raises(ValueError, match=r"divide by 8, got 68x64.*64x64 or 72x\d+"):
        tiny.paint(pipe, height=68, width=64)
    assert tiny.paint(pipe).isfinite().all()


def test_fewer_than_three_steps_run_the_stock_schedule(stock):
    expected = tiny.paint(stock, num_inference_steps=2)
    ralu.enable(stock)
    assert torch.equal(tiny.paint(stock, num_inference_steps=2), expected)
    ralu.disable(stock)


def test_disable_restores_stock_images_bit_for_bit(stock):
    expected = tiny.paint(stock, num_inference_steps=4)
    scheduler, pos_embed, keys = stock.scheduler, stock.transformer.pos_embed, list(stock.transformer.state_dict())
    before = dict(stock.__dict__)
    ralu.enable(stock, "flux-7x")
    assert list(stock.transformer.state_dict()) == keys
    assert not torch.equal(tiny.paint(stock, num_inference_steps=4), expected)
    ralu.enable(stock, "flux-5x")  # anew, without disabling first
    tiny.paint(stock)
    ralu.disable(stock)
    ralu.disable(stock)
    assert stock.scheduler is scheduler and stock.transformer.pos_embed is pos_embed
    assert stock.__dict__.keys() == before.keys() and not stock.transformer._forward_pre_hooks
    assert torch.equal(tiny.paint(stock, num_inference_steps=4), expected)


@pytest.mark.parametrize("step", [1, 3, 6, 12])
def test_after_an_exception_in_the_middle(stock, step):
    expected = tiny.paint(stock, num_inference_steps=4)
    ralu.enable(stock)
    whole = tiny.paint(stock)

    def fail(pipe, i, t, values):
        if i == step:
            raise KeyboardInterrupt
        return values

    with pytest.raises(KeyboardInterrupt):
        tiny.paint(stock, callback_on_step_end=fail)
    assert torch.equal(tiny.paint(stock), whole)
    with pytest.raises(KeyboardInterrupt):
        tiny.paint(stock, callback_on_step_end=fail)
    ralu.disable(stock)
    assert torch.equal(tiny.paint(stock, num_inference_steps=4), expected)


@pytest.mark.parametrize("step", [0, 2, 3, 7, 8, 13])
def test_an_interrupted_run_decodes_what_there_is(pipe, step):
    """Low latents are enlarged by nearest neighbour, and promoted ones are put where they belong."""
    seen = []

    def stop(pipe, i, t, values):
        pipe._interrupt = i == step
        seen.append((values["latents"], pipe.scheduler.layout))
        return values

    vae = pipe.vae
    decoded = []
    stock_decode = vae.decode
    vae.decode = lambda z, **kwargs: decoded.append(z) or stock_decode(z, **kwargs)
    image = tiny.paint(pipe, callback_on_step_end=stop)
    del vae.decode
    assert image.shape == (1, 3, 64, 64) and len(seen) == step + 1
    tokens, layout = seen[-1]
    full = (decoded[-1] - vae.config.shift_factor) * vae.config.scaling_factor
    if layout.stage == 1:
        low = FluxPipeline._unpack_latents(tokens, 32, 32, 2)
        expected = torch.nn.functional.interpolate(low, scale_factor=2, mode="nearest")
    elif layout.stage == 2:
        expected = torch.empty_like(full)
        for row, (source, child) in enumerate(
            zip(layout.plan.source.tolist(), layout.plan.child.tolist(), strict=True)
        ):
            y, x = 4 * (source // 8), 4 * (source % 8)
            patch = tokens[0, row].view(4, 2, 2)
            if child < 0:
                expected[0, :, y : y + 4, x : x + 4] = patch.repeat_interleave(2, 1).repeat_interleave(2, 2)
            else:
                y, x = y + 2 * (child // 2), x + 2 * (child % 2)
                expected[0, :, y : y + 2, x : x + 2] = patch
    else:
        expected = FluxPipeline._unpack_latents(tokens, 64, 64, 2)
    torch.testing.assert_close(full, expected, rtol=0, atol=1e-5)


def test_lora_scales_as_in_stock():
    pipe = ralu.enable(tiny.flux())
    plain = tiny.paint(pipe)
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    changed = tiny.paint(pipe)
    unscaled = tiny.paint(pipe, joint_attention_kwargs={"scale": 0.0})
    assert (changed - plain).abs().max() > 1e-3
    torch.testing.assert_close(unscaled, plain, **close)


def test_ip_adapter_scales_as_in_stock():
    pipe = ralu.enable(tiny.flux())
    plain = tiny.paint(pipe)
    given = tiny.load_ip_adapter(pipe)
    assert (tiny.paint(pipe, **given) - plain).abs().max() > 1e-2
    pipe.set_ip_adapter_scale(0.0)
    torch.testing.assert_close(tiny.paint(pipe, **given), plain, **close)


@pytest.mark.parametrize(
    "cache",
    [FirstBlockCacheConfig(threshold=0.0), TaylorSeerCacheConfig(cache_interval=1, disable_cache_before_step=1)],
)
def test_caches_start_anew_in_every_stage(pipe, cache):
    """With settings that never reuse anything the picture is the uncached one, through two changes of token count."""
    expected = tiny.paint(pipe)
    pipe.transformer.enable_cache(cache)
    try:
        torch.testing.assert_close(tiny.paint(pipe), expected, **close)
    finally:
        pipe.transformer.disable_cache()


@pytest.mark.parametrize("step", [6, 12])
def test_caches_after_an_exception(stock, step):
    expected = tiny.paint(stock, num_inference_steps=4)
    whole = tiny.paint(ralu.enable(stock))

    def fail(pipe, i, t, values):
        if i == step:
            raise KeyboardInterrupt
        return values

    stock.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    try:
        with pytest.raises(KeyboardInterrupt):
            tiny.paint(stock, callback_on_step_end=fail)
        torch.testing.assert_close(tiny.paint(stock), whole, **close)
        with pytest.raises(KeyboardInterrupt):
            tiny.paint(stock, callback_on_step_end=fail)
        ralu.disable(stock)
        torch.testing.assert_close(tiny.paint(stock, num_inference_steps=4), expected, **close)
    finally:
        stock.transformer.disable_cache()


def config_of(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def test_save_load_and_the_advice_in_between(pipe, tmp_path):
    ralu.enable(pipe, "flux-7x", ratio=0.4, granularity="token", regions="gradient")
    expected = tiny.paint(pipe)
    pipe.save_pretrained(tmp_path)
    for kind in (FluxPipeline, DiffusionPipeline):
        loaded = kind.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert isinstance(loaded.scheduler, ralu.RaluScheduler)
        with pytest.raises(RuntimeError, match=r"ralu\.enable\(pipe\)"):
            tiny.paint(loaded)
        torch.testing.assert_close(tiny.paint(ralu.enable(loaded)), expected, **close)
        assert type(ralu.disable(loaded).scheduler) is FlowMatchEulerDiscreteScheduler
        assert config_of(loaded.scheduler) == config_of(ralu.disable(pipe).scheduler)
        ralu.enable(pipe, "flux-7x", ratio=0.4, granularity="token", regions="gradient")


def test_from_pipe_shares_the_enabled_parts(pipe):
    expected = tiny.paint(pipe)
    twin = FluxPipeline.from_pipe(pipe, dtype=torch.float32)
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.paint(twin), expected)
    ralu.disable(twin)
    assert type(twin.scheduler) is type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    ralu.enable(pipe)
    assert torch.equal(tiny.paint(pipe), expected)


def test_image_to_image_from_an_enabled_pipe_is_refused(pipe):
    twin = FluxImg2ImgPipeline.from_pipe(pipe, dtype=torch.float32)
    with pytest.raises(ValueError, match="starts from pure noise"):
        twin(PROMPTS[0], image=torch.rand(1, 3, 64, 64), height=64, width=64, strength=0.5, max_sequence_length=16)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"preset": "flux-6x"}, "preset must be one of"),
        ({"granularity": "block"}, "granularity must be"),
        ({"carry_noise": "none"}, "carry_noise must be"),
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
    expected = tiny.paint(stock, num_inference_steps=4)
    twin = FluxPipeline.from_pipe(stock, dtype=torch.float32)
    twin.scheduler = FlowMatchEulerDiscreteScheduler.from_config(stock.scheduler.config)
    twin.set_progress_bar_config(disable=True)
    enabled = tiny.paint(ralu.enable(stock))
    assert torch.equal(tiny.paint(twin, num_inference_steps=4), expected)  # a stock neighbour stays stock
    assert torch.equal(tiny.paint(ralu.enable(twin)), enabled)
    assert torch.equal(tiny.paint(stock, num_inference_steps=4), expected)
    twin.scheduler = FlowMatchEulerDiscreteScheduler.from_config(twin.scheduler.config)  # behind RALU's back
    assert torch.equal(tiny.paint(ralu.disable(twin), num_inference_steps=4), expected)


class Offload(accelerate.hooks.ModelHook):
    """What offloading does to a model's forward, without the transfers."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        Offload.calls += 1
        return args, kwargs


@pytest.mark.parametrize("enabled_first", [True, False])
def test_offloading_hooks_come_and_go(enabled_first):
    pipe = tiny.flux()
    plain = tiny.paint(pipe, num_inference_steps=4)
    expected = tiny.paint(ralu.enable(pipe))
    if not enabled_first:
        ralu.disable(pipe)
    accelerate.hooks.add_hook_to_module(pipe.transformer, Offload())
    ralu.enable(pipe)
    for _ in range(2):  # diffusers takes the hooks off and puts them on again after every call
        assert torch.equal(tiny.paint(pipe), expected)
        accelerate.hooks.remove_hook_from_module(pipe.transformer)
        accelerate.hooks.add_hook_to_module(pipe.transformer, Offload())
    ralu.disable(pipe)
    Offload.calls = 0
    assert torch.equal(tiny.paint(pipe, num_inference_steps=4), plain) and Offload.calls == 4


def test_compiled_transformer_needs_no_graph_a_step():
    pipe = ralu.enable(tiny.flux())
    expected = tiny.paint(pipe)
    ralu.disable(pipe)
    counter = CompileCounter()
    pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)
    torch.testing.assert_close(tiny.paint(ralu.enable(pipe)), expected, **close)
    assert counter.frame_count <= 3
    first = counter.frame_count
    torch.testing.assert_close(tiny.paint(pipe), expected, **close)
    assert counter.frame_count == first


def test_a_copied_scheduler_leaves_the_model_behind(pipe):
    expected = tiny.paint(pipe)
    for copied in (copy.deepcopy(pipe.scheduler), pickle.loads(pickle.dumps(pipe.scheduler))):
        assert not copied.bound and config_of(copied) == config_of(pipe.scheduler)
        assert len(pickle.dumps(copied)) < 100_000
    assert torch.equal(tiny.paint(pipe), expected)


def test_an_enabled_pipeline_is_enabled_anew(pipe):
    expected = tiny.paint(ralu.enable(pipe, "flux-7x"))
    ralu.enable(pipe, "flux-5x", granularity="token", threshold=0.3, regions=gradient)
    assert torch.equal(tiny.paint(ralu.enable(pipe, "flux-7x")), expected)


def test_a_scorer_of_ones_own_cannot_be_saved(pipe, tmp_path):
    expected = tiny.paint(ralu.enable(pipe, "flux-7x", regions=gradient))
    pipe.save_pretrained(tmp_path)
    loaded = FluxPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="regions="):
        ralu.enable(loaded)
    torch.testing.assert_close(tiny.paint(ralu.enable(loaded, regions=gradient)), expected, **close)


def test_a_schedule_of_ones_own_is_saved(pipe, tmp_path):
    schedule = ralu.solve([1, 2, 2], [0.25, 0.5, 1.0], ratio=0.5)
    expected = tiny.paint(ralu.enable(pipe, schedule))
    pipe.save_pretrained(tmp_path)
    loaded = FluxPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(tiny.paint(ralu.enable(loaded)), expected, **close)
    assert loaded.num_timesteps == 5 and loaded.scheduler.schedule == schedule


def test_enable_refuses_what_it_cannot_serve(stock):
    with pytest.raises(ValueError, match="FluxImg2ImgPipeline"):
        ralu.enable(FluxImg2ImgPipeline.from_pipe(stock, dtype=torch.float32))
    bent = tiny.flux()
    bent.scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    with pytest.raises(ValueError, match="use_karras_sigmas"):
        ralu.enable(bent)
    with pytest.raises(ValueError, match="custom sigmas"):
        tiny.paint(ralu.enable(stock), sigmas=[1.0, 0.7, 0.2])
    ralu.disable(stock)


def test_sample_is_the_pipelines_loop(pipe):
    expected = tiny.paint(pipe, seeds=(4,), output_type="latent")
    embeds, pooled, text_ids = pipe.encode_prompt(PROMPTS[0], PROMPTS[0], max_sequence_length=16)
    preview = pipe.scheduler.scorer
    ralu.disable(pipe)

    def velocity(x, sigma, layout):
        ids = torch.nn.functional.pad(layout.positions[0], (1, 0))
        return pipe.transformer(
            hidden_states=x, timestep=torch.tensor([sigma]), pooled_projections=pooled, encoder_hidden_states=embeds,
            txt_ids=text_ids, img_ids=ids, return_dict=False,
        )[0]  # fmt: skip

    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(4))
    noise = FluxPipeline._pack_latents(noise, 1, 4, 32, 32)
    got = ralu.sample(velocity, noise, (16, 16), "flux-5x", regions=preview)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_seeds_depend_on_the_samples_own_noise_alone():
    noise = torch.randn(3, 40, 64)
    seeds = seeds_of(noise)
    assert seeds.dtype == torch.int64 and len(set(seeds.tolist())) == 3
    assert torch.equal(seeds_of(noise[1:2]), seeds[1:2])
    touched = noise.clone()
    touched[0, 7, 3] = torch.nextafter(touched[0, 7, 3], torch.tensor(9.0))
    assert (seeds_of(touched) != seeds).tolist() == [True, False, False]
    swapped = noise[:, torch.randperm(40)]
    assert (seeds_of(swapped) != seeds).all()


def test_the_distilled_embedded_model_paints_what_it_was_asked_for():
    """Of the pictures that its teacher paints in ten steps, each of its own is nearest to that of the same prompt."""

    def paint(name, preset=None, **call):
        pipe = DiffusionPipeline.from_pretrained(ralu.mini_path(name), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        if preset:
            ralu.enable(pipe, preset)
        return tiny.paint(pipe, mini.PROMPTS, seeds=range(len(mini.PROMPTS)), height=256, width=256, **call).flatten(1)

    taught = paint("flux", num_inference_steps=10)
    for painted in (paint("schnell", num_inference_steps=4), paint("schnell", "distilled-4")):
        assert torch.cdist(painted, taught).argmin(1).tolist() == list(range(len(mini.PROMPTS)))
