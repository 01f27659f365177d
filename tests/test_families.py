"""What holds for RALU inside the unmodified pipelines of all families, `tiny.FAMILIES`."""

import inspect
from types import SimpleNamespace

import accelerate
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

import ralu
from ralu.caches import CACHES
from ralu.families import family_of
from ralu.schedule import bottleneck, region_adaptive, single

PROMPTS = tiny.PROMPTS
close = dict(rtol=0, atol=2e-5)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request):
    """Take all families in turn, where other modules' tests take FLUX and SD3."""
    return tiny.FAMILIES[request.param]


@pytest.mark.serves("a batch equals its single runs")
def test_a_batch_equals_its_single_runs_though_regions_differ(pipe):
    plans = []

    def note_plan(pipe, step, timestep, tensors):
        layout = pipe.scheduler.layout
        plans.extend([layout.plan] if layout is not None and layout.plan is not None else [])
        return tensors

    batch = tiny.generate(pipe, PROMPTS, seeds=(5, 6, 7), callback_on_step_end=note_plan)
    child = plans[0].child.view(3, -1)  # one plan row an image, not one for each half of guidance
    assert not torch.equal(child[0], child[1]) and not torch.equal(child[1], child[2])
    for i in range(3):
        torch.testing.assert_close(batch[i : i + 1], tiny.generate(pipe, PROMPTS[i], seeds=(5 + i,)), **close)
    assert (batch[0] - batch[1]).abs().max() > 0.05


def test_encoding_undoes_decoding(stock, monkeypatch):
    """With an autoencoder that gives back what it is given: how latents are scaled, shifted and packed cancels."""

    def given(latents):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

    monkeypatch.setattr(stock.vae, "decode", lambda latents, return_dict: (latents,))
    monkeypatch.setattr(stock.vae, "encode", given)
    served, grid = family_of(stock), (3, 5)
    config = stock.vae.config
    channels = config.z_dim if hasattr(config, "z_dim") else config.latent_channels
    tokens = torch.randn(2, 15, 4 * channels)
    images = served.decode(stock, tokens, grid)
    assert images.shape == (2, channels, 6, 10)
    torch.testing.assert_close(served.encode(stock, images), tokens, rtol=0, atol=1e-5)


@pytest.mark.serves("upsampler=pixels")
def test_upsampling_by_way_of_the_image(stock, family):
    """With every family's own encoder: a batch is its single runs, and it is not nearest neighbour."""
    plain = family.short
    schedule = region_adaptive(plain.steps, plain.ends, plain.shifts, plain.c, plain.ratio, upsampler="pixels")
    nearest = tiny.generate(ralu.enable(stock, plain), PROMPTS[:2], seeds=(5, 6))
    ralu.enable(stock, schedule)
    batch = tiny.generate(stock, PROMPTS[:2], seeds=(5, 6))
    torch.testing.assert_close(batch[1:], tiny.generate(stock, PROMPTS[1], seeds=(6,)), **close)
    assert batch.isfinite().all() and (batch - nearest).abs().max() > 1e-3
    ralu.disable(stock)


def test_same_seed_same_image_by_generator_or_latents(pipe, family):
    first = tiny.generate(pipe, seeds=(1,))
    assert torch.equal(first, tiny.generate(pipe, seeds=(1,)))
    latents = family.latents(torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(first, tiny.generate(pipe, seeds=(0,), latents=latents))
    other = tiny.generate(pipe, seeds=(2,))
    assert not torch.equal(first, other)
    twice = tiny.generate(pipe, PROMPTS[0], seeds=(1, 2), num_images_per_prompt=2)
    torch.testing.assert_close(twice, torch.cat([first, other]), **close)


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("height, width", [(64, 64), (72, 40), (16, 52)])
def test_output_types_and_sizes(pipe, family, kind, height, width):
    out = tiny.generate(pipe, output_type=kind, height=height, width=width)
    if kind == "pil":
        assert out[0].size == (width, height)
    elif kind == "latent":
        assert out.shape == ((1, height * width // 16, 16) if family.packed else (1, 4, height // 2, width // 2))
    else:
        assert tuple(out.shape) == ((1, height, width, 3) if kind == "np" else (1, 3, height, width))


ODD = {"height": 60, "width": 52}  # 15 by 13 tokens
FULL_LOW_FULL = bottleneck((1, 2, 1), (0.8, 0.5), (3.0, 3.0, 3.0), truncated=False)


@pytest.mark.serves("sizes that divide by 16 alone")
@pytest.mark.parametrize("schedule, seeds", [(None, None), (None, [7, 8]), (FULL_LOW_FULL, None)])
def test_sizes_that_cannot_be_halved(stock, family, schedule, seeds):
    """What continues the noise is each sample's own, also where guidance doubles the samples."""
    schedule = schedule or family.short
    batch = tiny.generate(ralu.enable(stock, schedule, seeds=seeds), PROMPTS[:2], seeds=(5, 6), **ODD)
    assert batch.shape == (2, 3, 60, 52) and batch.isfinite().all()
    second = tiny.generate(ralu.enable(stock, schedule, seeds=seeds and 8), PROMPTS[1], seeds=(6,), **ODD)
    torch.testing.assert_close(batch[1:], second, **close)
    ralu.disable(stock)


def test_a_full_stage_at_such_a_size_is_the_stock_pipeline(stock, family):
    """With the same tokens at the same positions."""
    own = stock.scheduler
    stock.scheduler = type(own).from_config(own.config, shift_terminal=None)  # which bends Qwen-Image's levels
    expected = tiny.generate(ralu.enable(stock, "stock-4", spacing="trailing"), **ODD)
    u, sigma = 3 / 4, stock.scheduler.sigmas[1].item()
    shift = sigma * (1 - u) / (u * (1 - sigma))
    torch.testing.assert_close(tiny.generate(ralu.enable(stock, single(4, shift)), **ODD), expected, **close)
    ralu.disable(stock)
    stock.scheduler = own


@pytest.mark.parametrize("step", [0, 2, 4])
def test_previews_and_interruptions_of_such_a_size(pipe, family, step):
    """In every stage they are of the image alone; the low one's are copies of its latent pixels."""
    served, seen = family_of(pipe), []

    def stop(pipe, i, t, values):
        pipe._interrupt = i == step
        seen.append((values["latents"], pipe.scheduler.full_resolution(values["latents"])))
        return values

    image = tiny.generate(pipe, callback_on_step_end=stop, **ODD)
    assert image.shape == (1, 3, 60, 52) and len(seen) == step + 1
    assert {tuple(served.pack(preview).shape) for _, preview in seen} == {(1, 15 * 13, 16)}
    expected = served.decode(pipe, served.pack(seen[-1][1]), (15, 13))
    torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
    if family.make is not tiny.flux2:  # whose channels are normalised apart
        low, preview = seen[0]
        copies = F.interpolate(family.image(low, 32, 28), scale_factor=2)[..., :30, :26]
        torch.testing.assert_close(family.image(preview, 60, 52), copies, rtol=0, atol=1e-6)


def test_fewer_than_three_steps_run_the_stock_schedule(stock):
    expected = tiny.generate(stock, num_inference_steps=2)
    ralu.enable(stock)
    assert torch.equal(tiny.generate(stock, num_inference_steps=2), expected)
    ralu.disable(stock)


def traces(pipe, family):
    """Everything that `enable` might leave behind."""
    embedding = getattr(pipe.transformer, family.embedding)
    parts = {"transformer": pipe.transformer, "embed": embedding, "vae": pipe.vae}
    own = ("_feat_map", "_conv_idx")  # of a film's VAE, which makes them anew whenever it runs
    kept = {name: {k: id(v) for k, v in vars(part).items() if not k.endswith(own)} for name, part in parts.items()}
    return kept, dict(vars(pipe)), list(pipe.transformer.state_dict()), dict(pipe.transformer._forward_pre_hooks)


@pytest.mark.serves("disable restores every bit")
def test_disable_restores_stock_images_bit_for_bit(stock, family):
    expected = tiny.generate(stock, num_inference_steps=4)
    before = traces(stock, family)
    ralu.enable(stock, family.presets[1])
    assert list(stock.transformer.state_dict()) == before[2]
    assert not torch.equal(tiny.generate(stock, num_inference_steps=4), expected)
    ralu.enable(stock, family.presets[0])  # anew, without disabling first
    tiny.generate(stock)
    ralu.disable(stock)
    ralu.disable(stock)
    assert torch.equal(tiny.generate(stock, num_inference_steps=4), expected)
    assert traces(stock, family) == before


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_after_an_exception_in_the_middle(stock, family, step):
    """In a stage, and in the last step of each."""
    expected = tiny.generate(stock, num_inference_steps=4)
    whole = tiny.generate(pipe := ralu.enable(stock, family.short))

    def fail(pipe, i, t, values):
        if i == step:
            raise KeyboardInterrupt
        return values

    with pytest.raises(KeyboardInterrupt):
        tiny.generate(pipe, callback_on_step_end=fail)
    assert torch.equal(tiny.generate(pipe), whole)
    with pytest.raises(KeyboardInterrupt):
        tiny.generate(pipe, callback_on_step_end=fail)
    assert torch.equal(tiny.generate(ralu.disable(pipe), num_inference_steps=4), expected)


def decoded_image(family, vae, image):
    """What the VAE decodes for one image of latents, (1, 4, H, W)."""
    (_, channels, height, width), side = image.shape, 2
    patches = image.view(channels, height // side, side, width // side, side).permute(1, 3, 0, 2, 4)
    patches = family.decoded(vae, patches.flatten(0, 1)).view(height // side, width // side, channels, side, side)
    return patches.permute(2, 0, 3, 1, 4).reshape(1, channels, height, width)


@pytest.mark.parametrize("step", range(5))
@pytest.mark.serves("callbacks, previews, interruption")
def test_an_interrupted_run_decodes_what_there_is(pipe, family, step, monkeypatch):
    """Low latents are upsampled by nearest neighbour, and selected ones are put where they belong."""
    vae, decoded, seen = pipe.vae, [], []
    ralu.disable(pipe)
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", spy := lambda z, **call: decoded.append(z) or decode(z, **call))
    ralu.enable(pipe, family.short)

    def stop(pipe, i, t, values):
        pipe._interrupt = i == step
        seen.append((values["latents"], pipe.scheduler.layout))
        return values

    image = tiny.generate(pipe, callback_on_step_end=stop)
    assert image.shape == (1, 3, 64, 64) and len(seen) == step + 1
    latents, layout = seen[-1]
    full = decoded[-1] if decoded[-1].ndim == 4 else decoded[-1][:, :, 0]  # of a film the only frame
    if layout.stage == 2:
        expected, patches = torch.empty_like(full), family.decoded(vae, family.patches(latents))
        for source, child, patch in zip(layout.plan.source.tolist(), layout.plan.child.tolist(), patches, strict=True):
            y, x = 4 * (source // 8), 4 * (source % 8)
            if child < 0:
                expected[0, :, y : y + 4, x : x + 4] = patch.repeat_interleave(2, 1).repeat_interleave(2, 2)
            else:
                y, x = y + 2 * (child // 2), x + 2 * (child % 2)
                expected[0, :, y : y + 2, x : x + 2] = patch
    elif layout.stage == 1:
        expected = F.interpolate(decoded_image(family, vae, family.image(latents, 32, 32)), scale_factor=2)
    else:
        expected = decoded_image(family, vae, family.image(latents, 64, 64))
    torch.testing.assert_close(full, expected, rtol=0, atol=1e-5)
    assert torch.equal(tiny.generate(pipe), tiny.generate(pipe))  # and the next runs are whole ones
    ralu.disable(pipe)
    assert vars(vae)["decode"] is spy  # the caller's, put back


@pytest.mark.serves("LoRA")
def test_lora_scales_as_in_stock(family):
    pipe = ralu.enable(family.make(), family.short)
    plain = tiny.generate(pipe)
    targets = ["to_q", "to_v", "proj"]  # SD3's patch convolution is a proj too
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    changed = tiny.generate(pipe)
    unscaled = tiny.generate(pipe, **{family.kwargs: {"scale": 0.0}})
    assert (changed - plain).abs().max() > 1e-3
    torch.testing.assert_close(unscaled, plain, **close)


def config_of(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


@pytest.mark.serves("saving and loading")
def test_save_load_and_the_advice_in_between(stock, family, tmp_path):
    was = config_of(stock.scheduler)
    pipe = ralu.enable(stock, family.presets[1], ratio=0.4, granularity="token", regions="gradient")
    expected = tiny.generate(pipe)
    pipe.save_pretrained(tmp_path)
    ralu.disable(pipe)
    for kind in (type(stock), DiffusionPipeline):
        absent = {name: None for name, part in stock.components.items() if part is None}
        loaded = kind.from_pretrained(tmp_path, **absent)
        loaded.set_progress_bar_config(disable=True)
        assert isinstance(loaded.scheduler, ralu.RaluScheduler)
        with pytest.raises(RuntimeError, match=r"ralu\.enable\(pipe\)"):
            tiny.generate(loaded)
        torch.testing.assert_close(tiny.generate(ralu.enable(loaded)), expected, **close)
        assert type(ralu.disable(loaded).scheduler) is FlowMatchEulerDiscreteScheduler
        assert config_of(loaded.scheduler) == was


class Offload(accelerate.hooks.ModelHook):
    """What offloading does to a model's forward, without the transfers."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        Offload.calls += 1
        return args, kwargs


@pytest.mark.parametrize("enabled_first", [True, False])
@pytest.mark.serves("offloading")
def test_offloading_hooks_come_and_go(family, enabled_first):
    pipe = family.make()
    parts = pipe.transformer, pipe.vae
    plain = tiny.generate(pipe, num_inference_steps=4)
    expected = tiny.generate(ralu.enable(pipe, family.short))
    if not enabled_first:
        ralu.disable(pipe)
    for part in parts:
        accelerate.hooks.add_hook_to_module(part, Offload())
    ralu.enable(pipe, family.short)
    for _ in range(2):  # diffusers takes the hooks off and puts them on again after every call
        assert torch.equal(tiny.generate(pipe), expected)
        for part in parts:
            accelerate.hooks.remove_hook_from_module(part)
        assert torch.equal(tiny.generate(pipe), expected)
        accelerate.hooks.add_hook_to_module(pipe.transformer, Offload())
    ralu.disable(pipe)
    Offload.calls = 0
    assert torch.equal(tiny.generate(pipe, num_inference_steps=4), plain) and Offload.calls == 4 * family.calls


@pytest.mark.parametrize("family", ["flux", "sd3", "flux2"], indirect=True)
@pytest.mark.serves("torch.compile")
def test_compiled_transformer_needs_no_graph_a_step(family):
    """FLUX's inside a wrapper, SD3's in place; in test_blocks.py, where blocks are fused, it is the other way round."""
    pipe = ralu.enable(tiny.shallow(family.make()), family.short)
    expected = tiny.generate(pipe)
    ralu.disable(pipe)
    counter = CompileCounter()
    tiny.compile(pipe, in_place=family is tiny.FAMILIES["sd3"], backend=counter)
    torch.testing.assert_close(tiny.generate(ralu.enable(pipe, family.short)), expected, **close)
    assert 1 <= counter.frame_count <= 3
    first = counter.frame_count
    torch.testing.assert_close(tiny.generate(pipe), expected, **close)
    assert counter.frame_count == first


def test_enable_refuses_what_it_cannot_serve(stock, family):
    takes = inspect.signature(family.other).parameters.values()
    parts = {each.name: stock.components.get(each.name) for each in takes if each.default is each.empty}
    with pytest.raises(ValueError, match=family.other.__name__):
        ralu.enable(family.other(**parts))
    scheduler = stock.scheduler
    stock.scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    with pytest.raises(ValueError, match="use_karras_sigmas"):
        ralu.enable(stock)
    stock.scheduler = scheduler
    with pytest.raises(ValueError, match="custom sigmas"):
        tiny.generate(ralu.enable(stock), sigmas=[1.0, 0.7, 0.2])
    ralu.disable(stock)


def refused():
    """List every family with what does not serve it: the fused blocks and the caches."""
    for name in tiny.FAMILIES:
        if name not in ("flux", "sd3"):
            words = "the blocks of a .* cannot be fused"
            yield pytest.param(name, {"fused": True}, words, marks=pytest.mark.refuses("fused blocks"))
        for cache, kind in CACHES.items():
            if name not in kind.families:
                words = f"cache {kind.__name__} serves .*, and the pipeline's family is {name}"
                yield pytest.param(name, {"cache": cache}, words, marks=pytest.mark.refuses(kind.__name__))


@pytest.mark.parametrize(("family", "options", "words"), [*refused()], indirect=["family"])
def test_what_does_not_serve_a_family_is_said(stock, options, words):
    scheduler = stock.scheduler
    with pytest.raises(ValueError, match=words):
        ralu.enable(stock, **options)
    assert stock.scheduler is scheduler
