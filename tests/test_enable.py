"""In and out of pipelines: previews, copies, shared parts, and refusals, for both families."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import tiny
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_taylorseer_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

import ralu
from ralu.presets import PRESETS

PROMPT = tiny.PROMPTS[0]
MAKE = {"flux": tiny.flux, "sd3": tiny.sd3}
KIND = {"flux": FluxPipeline, "sd3": StableDiffusion3Pipeline}
SHORT = {name: family.short for name, family in tiny.FAMILIES.items()}
STOCK = {"num_inference_steps": 4}
close = dict(rtol=0, atol=2e-5)


@pytest.fixture(scope="module", params=MAKE)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def stock(family):
    return MAKE[family]()


@pytest.fixture(scope="module")
def stock_image(stock):
    return tiny.generate(stock, **STOCK)


@pytest.fixture
def pipe(stock, family):
    yield ralu.enable(stock, SHORT[family])
    ralu.disable(stock)


def from_pipe(kind, pipe, **parts):
    twin = kind.from_pipe(pipe, dtype=torch.float32, **parts)
    twin.set_progress_bar_config(disable=True)
    return twin


def traces(pipe):
    """Everything that `enable` might leave behind."""
    embed = pipe.transformer.pos_embed
    parts = {"pipe": pipe, "transformer": pipe.transformer, "embed": embed, "vae": pipe.vae}
    kept = {name: {key: id(value) for key, value in vars(part).items()} for name, part in parts.items()}
    return kept, type(embed), dict(pipe.transformer._forward_pre_hooks), list(pipe.transformer.state_dict())


# ---- previews and interruptions ----


def preview(pipe, latents):
    """As a user interface makes them: full-size, through the pipeline's own unpacking, through the decoder."""
    full = pipe.scheduler.full_resolution(latents)
    if isinstance(pipe, FluxPipeline):
        full = pipe._unpack_latents(full, 64, 64, pipe.vae_scale_factor)
    full = full / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.vae.decode(full, return_dict=False)[0]


@pytest.mark.parametrize("ratio", [None, 1.0])  # with all tokens selected stage 2 is as long as stage 3
def test_previews_never_change_a_run(stock, family, ratio):
    ralu.enable(stock, SHORT[family], ratio=ratio)
    expected, shapes = tiny.generate(stock), []

    def callback(pipe, i, t, values):
        shapes.append(tuple(preview(pipe, values["latents"]).shape))
        return values

    assert torch.equal(tiny.generate(stock, callback_on_step_end=callback), expected)
    ralu.disable(stock)
    assert set(shapes) == {(1, 3, 64, 64)} and len(shapes) == stock.num_timesteps


LAST_STEPS = range(5)  # of two a stage: the callbacks at 1 and 3 see the next stage's latents already


@pytest.mark.parametrize("ratio", [None, 1.0])
@pytest.mark.parametrize("previewing", [False, True])
def test_interruptions_in_every_stage_decode_what_there_is(stock, family, ratio, previewing):
    ralu.enable(stock, SHORT[family], ratio=ratio)
    for step in LAST_STEPS:
        expected = []

        def stop(pipe, i, t, values, step=step, expected=expected):
            if i == step:
                expected.append(preview(pipe, values["latents"]))
                pipe._interrupt = True
                if previewing:
                    preview(pipe, values["latents"])
            return values

        image = tiny.generate(stock, callback_on_step_end=stop)
        torch.testing.assert_close(image, (expected[0] / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
    ralu.disable(stock)


def test_a_from_pipe_copy_is_interrupted_as_the_pipe_itself(pipe, family):
    twin = from_pipe(KIND[family], pipe)
    for step in LAST_STEPS:

        def stop(pipe, i, t, values, step=step):
            pipe._interrupt = i == step
            return values

        expected = tiny.generate(pipe, callback_on_step_end=stop)
        assert torch.equal(tiny.generate(twin, callback_on_step_end=stop), expected)
    ralu.disable(twin)
    for each in (pipe, twin):
        assert "_unpack_latents" not in vars(each) and "decode" not in vars(each.vae)


def test_a_stock_neighbour_stays_stock_after_a_run_that_broke_off(pipe, stock_image, family):
    """Their transformer is shared, and the enabled pipeline's run was never finished."""
    twin = from_pipe(KIND[family], pipe, scheduler=FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config))

    def fail(pipe, i, t, values):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.generate(pipe, callback_on_step_end=fail)
    assert torch.equal(tiny.generate(twin, **STOCK), stock_image)


# ---- copies ----


def by_deepcopy(pipe):
    return copy.deepcopy(pipe)


def by_pickle(pipe):
    return pickle.loads(pickle.dumps(pipe))


def by_torch_save(pipe):
    file = io.BytesIO()
    torch.save(pipe, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_spawning(pipe):
    """Do what `multiprocessing` does to send to a process that it spawns."""
    return pickle.loads(ForkingPickler.dumps(pipe))


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle, by_torch_save, by_spawning])
def test_a_copy_is_enabled_too_and_its_own(family, stock_image, copied):
    pipe = ralu.enable(MAKE[family](), SHORT[family])  # once it has run, transformers' CLIP itself cannot be pickled
    twin, before = copied(pipe), traces(pipe)
    expected = tiny.generate(pipe)
    parts = zip(pipe.transformer.modules(), twin.transformer.modules(), strict=True)
    assert all(ours is not theirs for ours, theirs in parts)
    assert torch.equal(tiny.generate(twin), expected)
    assert torch.equal(tiny.generate(ralu.disable(twin), **STOCK), stock_image)
    assert type(twin.scheduler) is FlowMatchEulerDiscreteScheduler and not twin.transformer._forward_pre_hooks
    assert type(twin.transformer.pos_embed) in (FluxPosEmbed, PatchEmbed)
    assert traces(pipe)[2:] == before[2:] and torch.equal(tiny.generate(pipe), expected)
    tiny.generate(ralu.enable(twin, SHORT[family], ratio=0.5))  # anew, with other options
    assert torch.equal(tiny.generate(pipe), expected)
    ralu.disable(pipe)
    assert isinstance(twin.scheduler, ralu.RaluScheduler) and twin.num_timesteps == sum(SHORT[family].steps)


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle])
def test_a_copy_is_disabled_before_it_ever_ran(family, stock_image, copied):
    pipe = ralu.enable(MAKE[family]())
    twin = ralu.disable(copied(pipe))
    assert torch.equal(tiny.generate(twin, **STOCK), stock_image)
    assert isinstance(pipe.scheduler, ralu.RaluScheduler)


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle])
def test_a_fused_copy_is_its_own(family, stock_image, copied):
    stock = ralu.enable(MAKE[family](), SHORT[family], fused=True, trim_text=True)
    twin, expected = copied(stock), tiny.generate(stock)
    assert torch.equal(tiny.generate(twin), expected)
    ralu.disable(stock)
    assert torch.equal(tiny.generate(stock, **STOCK), stock_image)
    assert torch.equal(tiny.generate(twin), expected)
    assert torch.equal(tiny.generate(ralu.disable(twin), **STOCK), stock_image)
    assert all("forward" not in vars(module) for module in twin.transformer.modules())


def test_weights_of_a_copy_are_its_own_in_every_stage(pipe):
    """Decoders, position embeddings and caches that a copy reaches are not the original's."""
    expected = tiny.generate(pipe)
    twin = copy.deepcopy(pipe)
    for part in (pipe.transformer, pipe.vae):
        for weight in part.parameters():
            weight.data.add_(1)
    got = tiny.generate(twin)
    for part in (pipe.transformer, pipe.vae):
        for weight, theirs in zip(
            part.parameters(), getattr(twin, "vae" if part is pipe.vae else "transformer").parameters(), strict=True
        ):
            weight.data.copy_(theirs)
    assert torch.equal(got, expected) and torch.equal(tiny.generate(pipe), expected)


def test_disable_keeps_a_scheduler_that_was_put_in_since(stock, stock_image):
    before = stock.scheduler
    ralu.enable(stock)
    later = FlowMatchEulerDiscreteScheduler.from_config(before.config)
    stock.scheduler = later
    assert ralu.disable(stock).scheduler is later
    assert torch.equal(tiny.generate(stock, **STOCK), stock_image)
    stock.scheduler = before


def test_a_transformer_that_was_given_away_takes_nothing_along(pipe, family):
    """Enabled with another transformer, a pipeline stays so when the first one is enabled and disabled elsewhere."""
    expected, old = tiny.generate(pipe), pipe.transformer
    elsewhere = KIND[family](**pipe.components)
    pipe.transformer = copy.deepcopy(old)
    ralu.enable(pipe, SHORT[family])
    elsewhere.scheduler = FlowMatchEulerDiscreteScheduler.from_config(elsewhere.scheduler.config)
    try:
        ralu.disable(ralu.enable(elsewhere))
        assert torch.equal(tiny.generate(pipe), expected)
    finally:
        ralu.disable(pipe)
        pipe.transformer = old


# ---- parts that are missing or stand apart ----


@torch.no_grad()
def embeddings(pipe):
    """Encode the prompt, as arguments of a call."""
    if isinstance(pipe, FluxPipeline):
        prompt, pooled, _ = pipe.encode_prompt(PROMPT, None, max_sequence_length=16)
        return {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, pipe.encode_prompt(PROMPT, None, None, max_sequence_length=16), strict=True))


def test_without_vae_and_text_encoders(stock, family):
    expected = tiny.generate(ralu.enable(stock, SHORT[family], regions="gradient"), output_type="latent")
    given = embeddings(ralu.disable(stock))
    names = [name for name in stock.components if name.startswith(("text_encoder", "tokenizer")) or name == "vae"]
    bare = KIND[family](**stock.components | dict.fromkeys(names))
    bare.vae_scale_factor = stock.vae_scale_factor  # without a VAE diffusers takes it for 8, as big models have it
    bare.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"regions='canny' needs a VAE.*regions='gradient'"):
        ralu.enable(bare)
    assert type(bare.scheduler) is FlowMatchEulerDiscreteScheduler and not bare.transformer._forward_pre_hooks
    ralu.enable(bare, SHORT[family], regions="gradient")
    assert torch.equal(tiny.generate(bare, None, output_type="latent", **given), expected)
    ralu.disable(bare)


def test_other_pipelines_are_refused_by_name_and_the_ways_out_work():
    stock, kind = tiny.sd3(), StableDiffusion3PAGPipeline
    call = {"prompt": PROMPT, "height": 64, "width": 64, "max_sequence_length": 16, "output_type": "pt", "pag_scale": 0}

    def generate(twin):
        return twin(**call, num_inference_steps=4, generator=tiny.generators(0)).images

    def refused(pipe, i, t, values):
        raise AssertionError("a step was made")

    expected = generate(from_pipe(kind, stock))
    ralu.enable(stock)
    twin = from_pipe(kind, stock)
    with pytest.raises(ValueError, match=rf"{kind.__name__} has the scheduler .* ralu\.disable\(pipe\) first, or"):
        twin(**call, num_inference_steps=4, generator=tiny.generators(0), callback_on_step_end=refused)
    with pytest.raises(ValueError, match=rf"pipe must be .*, got {kind.__name__}"):
        ralu.enable(twin)
    twin.scheduler = FlowMatchEulerDiscreteScheduler.from_config(stock.scheduler.config)
    assert torch.equal(generate(twin), expected)
    twin.scheduler = stock.scheduler
    assert torch.equal(generate(ralu.disable(twin)), expected)
    assert type(stock.scheduler) is FlowMatchEulerDiscreteScheduler


# ---- how the transformer is called ----


def test_a_cache_through_diffusers_hooks_starts_every_stage_as_a_run():
    """SD3's model and pipeline know nothing of caches: the caller sets the context, once."""
    pipe, computed = tiny.sd3(), []
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.to_q.register_forward_pre_hook(lambda *_: computed.append(pipe.scheduler.step_index or 0))
    config = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, max_order=1)
    apply_taylorseer_cache(pipe.transformer, config)
    _set_cache_context(pipe.transformer, CacheContext("any"))
    first, second, third = PRESETS["sd3-2x"].steps
    tiny.generate(pipe, num_inference_steps=third)
    alone, computed[:] = list(computed), []
    assert len(alone) < third
    tiny.generate(ralu.enable(pipe))
    stages = (0, first), (first, second), (first + second, third)
    assert computed == [start + i for start, steps in stages for i in alone if i < steps]


def test_positional_arguments_of_the_transformer(pipe, family):
    width = 32 if family == "flux" else 64
    given = {"encoder_hidden_states": torch.randn(1, 16, width), "pooled_projections": torch.randn(1, width)}
    if family == "flux":
        given = {"hidden_states": torch.randn(1, 256, 16), **given, "timestep": torch.ones(1)}
        given["img_ids"] = FluxPipeline._prepare_latent_image_ids(1, 16, 16, "cpu", torch.float32)
        given["txt_ids"] = torch.zeros(16, 3)
    else:
        given = {"hidden_states": torch.randn(1, 4, 32, 32), **given, "timestep": torch.full((1,), 1000.0)}
    outputs = []
    for args, kwargs in ((), given), (given.values(), {}):
        pipe.scheduler.set_timesteps()
        with torch.no_grad():
            outputs.append(pipe.transformer(*args, **kwargs, return_dict=False)[0])
    assert 4 * outputs[0].numel() == given["hidden_states"].numel() and torch.equal(*outputs)


# ---- refusals ----


def test_masks_for_another_batch_are_refused_before_the_first_step(stock, family):
    calls = []
    handle = stock.transformer.register_forward_hook(lambda *_: calls.append(1))
    ralu.enable(stock, SHORT[family], regions=torch.rand(2, 16, 16))
    for images in (1, 3):
        with pytest.raises(ValueError, match=f"regions has masks for 2 images, but the batch has {images}"):
            tiny.generate(stock, tiny.PROMPTS[:images], seeds=range(images))
    assert not calls
    assert tiny.generate(stock, tiny.PROMPTS[:2], seeds=(0, 1)).isfinite().all() and calls
    ralu.disable(stock)
    handle.remove()


STRANGE = [b"x", (), [0.3], {}, {"a": 1}, object(), 1j, "", "none", float, range(3)]  # no option takes any
NO_NUMBER = [*STRANGE[:9], "0.3", True, float("nan"), float("inf"), -1e30, 1e30, range(3), torch.ones(2)]
NO_NAME = [*STRANGE, 3, 0.5, True, float("nan"), "Nearest ", torch.ones(1)]
NO_BOOL = [*STRANGE, 0, 1, 2.0, None, "no", "True"]
WRONG = {
    "preset": [x for x in NO_NAME if x is not None] + ["flux-6x", "sd3-4x", "stock-0"],
    "speedup": [x for x in NO_NUMBER if x is not None] + [0, 1.4, 12.1, -6],
    "ratio": [*NO_NUMBER, -0.1, 1.1, 30],
    "threshold": [*NO_NUMBER, -0.1, 1.1, 100],
    "regions": [x for x in NO_NAME if x is not float and not isinstance(x, torch.Tensor)] + ["sobel", "Canny"],
    "granularity": NO_NAME,
    "kept_noise": NO_NAME,
    "matching": NO_NAME,
    "upsampler": NO_NAME,
    "solver": [*NO_NAME, "heun"],
    "spacing": [*NO_NAME, "trailing", "stock"],  # which go with "stock-STEPS" alone
    "backend": [*NO_NAME, "cuda"],
    "fused": NO_BOOL,
    "trim_text": NO_BOOL,
}


@pytest.mark.parametrize("option", WRONG)
def test_wrong_options_of_enable_change_nothing(stock, stock_image, option):
    assert len(WRONG[option]) >= 12
    before = traces(stock), stock.scheduler
    for value in WRONG[option]:
        with pytest.raises((TypeError, ValueError), match=rf"\b{option}\b"):
            ralu.enable(stock, **{option: value})
        assert (traces(stock), stock.scheduler) == before
    assert torch.equal(tiny.generate(stock, **STOCK), stock_image)


@pytest.mark.parametrize("function, argument", [
    (ralu.enable, "pipe"), (ralu.disable, "pipe"), (ralu.fuse, "transformer"), (ralu.unfuse, "transformer"),
])  # fmt: skip
def test_what_is_no_pipeline_or_transformer(function, argument):
    values = [None, *STRANGE, 3, FluxPipeline, torch.ones(2)]
    for value in values:
        with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b"):
            function(value)


def test_wrong_trim_text_of_fuse_changes_nothing(stock, stock_image):
    before = traces(stock)
    for value in NO_BOOL:
        with pytest.raises(TypeError, match=r"\btrim_text\b"):
            ralu.fuse(stock.transformer, trim_text=value)
        assert traces(stock) == before
    assert torch.equal(tiny.generate(stock, **STOCK), stock_image)


def test_a_pipeline_without_a_transformer(stock, family):
    bare = KIND[family](**stock.components | {"transformer": None})
    with pytest.raises(ValueError, match=r"pipe\.transformer must be a model, got None"):
        ralu.enable(bare)
    assert ralu.disable(bare) is bare


def test_a_position_embedding_of_ones_own_is_refused(stock):
    embed = stock.transformer.pos_embed

    class Other(type(embed)):
        pass

    stock.transformer.pos_embed = copy.copy(embed)
    stock.transformer.pos_embed.__class__ = Other
    with pytest.raises(ValueError, match=rf"pos_embed must be a {type(embed).__name__}, got Other"):
        ralu.enable(stock)
    stock.transformer.pos_embed = embed
