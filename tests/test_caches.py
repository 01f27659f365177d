"""Caches in pipelines: TaylorSeer against the method written out, exact where it skips nothing, undone wholly."""

import pickle
from copy import copy, deepcopy
from itertools import product
from types import MethodType

import accelerate
import plain
import pytest
import tiny
import torch
from diffusers import TaylorSeerCacheConfig

import ralu
from ralu.caches import CACHES, Progress, TaylorSeer, taylorseer
from ralu.caches.hooks import Call

close = dict(rtol=0, atol=2e-5)
PREDICTED = {"attn", "attn2", "ff", "ff_context", "img_mlp", "txt_mlp", "proj_out"}
every_family = pytest.mark.parametrize("family", ["flux", "sd3", "flux2", "qwen_image"], indirect=True)


@pytest.mark.parametrize(
    "cache, steps, full",
    [
        (TaylorSeer(interval=7), 50, [0, 1, 2, 9, 16, 23, 30, 37, 44]),
        (TaylorSeer(interval=11), 50, [0, 1, 2, 13, 24, 35, 46]),
        (TaylorSeer(interval=4), 28, [0, 1, 2, 6, 10, 14, 18, 22, 26]),
        (TaylorSeer(interval=2, warmup=1), 28, list(range(0, 28, 2))),
        (TaylorSeer(interval=3, warmup=2), 6, [0, 1, 4]),
        (TaylorSeer(interval=1, warmup=1), 5, [0, 1, 2, 3, 4]),
    ],
)
def test_full_steps_are_the_published_ones(cache, steps, full):
    """For FLUX N = 7 and 11 and for SD3 N = 4 and 2, whose counts give the work that the paper's tables have."""
    assert [step for step in range(steps) if cache.is_full(step)] == full


def latents(pipe, **call):
    return tiny.generate(pipe, output_type="latent", **call)


def steps_of(pipe, run):
    """List the steps, counted over the whole run, at which the first block's queries were computed."""
    computed = []
    query = pipe.transformer.transformer_blocks[0].attn.to_q
    hook = query.register_forward_pre_hook(lambda *_: computed.append(pipe.scheduler.step_index or 0))
    try:
        run()
    finally:
        hook.remove()
    return sorted(set(computed))


def predict_by_hand(transformer, is_full, order, calls=1, begins=()):
    """TaylorSeer written out: a module's output at a skipped step, from those of its last full steps, by differences.

    calls:  of the transformer in a step, each of which has outputs of its own.
    begins: steps of the run before which all outputs are forgotten.

    Returns what puts the modules back.
    """
    replaced = []

    def patched(module, skipped):
        stock, states = module.forward, [{"step": -1, "last": None, "factors": []} for _ in range(calls)]

        def forward(self, *args, **kwargs):
            states.append(state := states.pop(0))
            state["step"] += 1
            if state["step"] in begins:
                state.update(last=None, factors=[])
            if is_full(state["step"]):
                output = stock(*args, **kwargs)
                parts = output if isinstance(output, tuple) else (output,)
                gap = None if state["last"] is None else state["step"] - state["last"]
                factors = []
                for i, part in enumerate(parts):
                    new = [part]
                    for k in range(min(order, len(state["factors"][i]) if gap else 0)):
                        new.append((new[k] - state["factors"][i][k]) / gap)
                    factors.append(new)
                state.update(last=state["step"], factors=factors, single=not isinstance(output, tuple))
                return output
            ahead = state["step"] - state["last"]
            if skipped:
                parts = [torch.zeros_like(new[0]) for new in state["factors"]]
            else:
                parts = [
                    sum(f * ahead**k / (2 if k == 2 else 1) for k, f in enumerate(new)) for new in state["factors"]
                ]
            return parts[0] if state["single"] else tuple(parts)

        module.forward = MethodType(forward, module)
        replaced.append(module)

    for name, module in transformer.named_modules():
        block, _, part = name.rpartition(".")
        if block.startswith("transformer_blocks") and block.count(".") == 1 and part in PREDICTED:
            patched(module, skipped=False)
        if block.startswith("single_transformer_blocks") and part in ("proj_out", "attn", "proj_mlp"):
            patched(module, skipped=part != "proj_out" and hasattr(transformer.get_submodule(block), "proj_out"))

    def undo():
        for module in replaced:
            del module.forward

    return undo


def test_schedule_and_series_are_those_of_cache_dit():
    """Whose first difference is that of the third step: so long a warm-up, and the first order."""
    name = "cache_dit.caching.cache_contexts.calibrators.taylorseer"
    oracle = pytest.importorskip(name, reason="cache-dit is not installed", exc_type=ImportError).TaylorSeerState
    for warmup, interval in product(range(1, 6), range(1, 8)):
        cache, theirs = TaylorSeer(interval, warmup=warmup), oracle(1, warmup, interval)
        assert [cache.is_full(step) for step in range(50)] == [theirs.should_compute(step) for step in range(50)]
    outputs, cache, theirs = torch.randn(20, 2, 3, 4), TaylorSeer(interval=4), oracle(1, 3, 4)
    state = taylorseer._State(cache)
    for progress, output in zip(Progress.of((20,))[0], outputs, strict=True):
        state.begin(Call("cond", progress=progress))
        expected = theirs.step(output)
        if state.full:
            state.leave(("block", "attn"), (), {}, output)
        torch.testing.assert_close(state._predicted(("block", "attn"))[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "order"), [*product(["flux", "sd3"], [0, 1, 2]), ("flux2", 1), ("qwen_image", 1)], indirect=["family"]
)
@pytest.mark.serves("TaylorSeer")
def test_a_stock_run_equals_the_method_written_out_by_hand(stock, family, order):
    cache = TaylorSeer(interval=3, order=order, warmup=2)
    ralu.enable(stock, "stock-9", cache=cache)
    got = latents(stock, seeds=(3,), guidance_scale=1.0, num_inference_steps=9)
    ralu.disable(stock)
    undo = predict_by_hand(stock.transformer, cache.is_full, order)
    expected = latents(stock, seeds=(3,), guidance_scale=1.0, num_inference_steps=9)
    undo()
    torch.testing.assert_close(got, expected, **close)
    assert (got - latents(stock, seeds=(3,), guidance_scale=1.0, num_inference_steps=9)).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["flux2", "qwen_image"], indirect=True)
@pytest.mark.serves("TaylorSeer")
def test_a_guided_run_with_stages_equals_the_method_written_out_by_hand(stock, family):
    """The negative prompt's call has predictions of its own, and no stage knows those of the one before."""
    cache = TaylorSeer(interval=3, order=2, warmup=2)
    schedule = family.schedule.replace(steps=(3, 4, 7))
    full = [cache.is_full(step) for count in schedule.steps for step in range(count)]
    ralu.enable(stock, schedule)
    whole = latents(stock, seeds=(3,))
    undo = predict_by_hand(stock.transformer, full.__getitem__, 2, family.calls, begins=(0, 3, 7))
    expected = latents(stock, seeds=(3,))
    undo()
    got = latents(ralu.enable(stock, schedule, cache=cache), seeds=(3,))
    ralu.disable(stock)
    assert plain.hooks_left(stock) == []
    torch.testing.assert_close(got, expected, **close)
    assert (got - whole).abs().max() > 1e-4


@every_family
def test_without_skipped_steps_nothing_changes(stock, family):
    plain = latents(stock, num_inference_steps=5)
    ralu.enable(stock, "stock-5+taylorseer(interval=1)")
    assert torch.equal(latents(stock, num_inference_steps=5), plain) and stock.num_timesteps == 5
    ralu.enable(stock, family.short)
    expected = latents(stock)
    for cache in (TaylorSeer(interval=1), "taylorseer(interval=9,warmup=9)"):
        torch.testing.assert_close(latents(ralu.enable(stock, family.short, cache=cache)), expected, **close)
    ralu.disable(stock)
    assert torch.equal(latents(stock, num_inference_steps=5), plain)


def test_every_stage_begins_anew(stock, family):
    cache = TaylorSeer(interval=2, warmup=2)
    pipe = ralu.enable(stock, family.presets[0], cache=cache)
    steps = pipe.scheduler.schedule.steps
    expected, first = [], 0
    for count in steps:
        expected += [first + step for step in range(count) if cache.is_full(step)]
        first += count
    assert 0 < len(expected) < sum(steps)
    assert steps_of(pipe, lambda: latents(pipe)) == expected
    assert steps_of(pipe, lambda: latents(pipe)) == expected  # and every run
    ralu.disable(pipe)


@every_family
def test_a_batch_equals_its_single_runs(stock, family):
    pipe = ralu.enable(stock, family.short, cache=TaylorSeer(interval=2, warmup=1), regions="gradient")
    together = latents(pipe, prompt=tiny.PROMPTS[:2], seeds=(1, 2))
    alone = [latents(pipe, prompt=prompt, seeds=(seed,)) for prompt, seed in zip(tiny.PROMPTS[:2], (1, 2), strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), **close)
    ralu.disable(pipe)


def test_fused_blocks_have_the_same_points(stock, family):
    cache = TaylorSeer(interval=2, warmup=2)
    plain = latents(ralu.enable(stock, family.presets[0], cache=cache))
    fused = latents(ralu.enable(stock, family.presets[0], cache=cache, fused=True))
    ralu.disable(stock)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-4)


def test_it_is_undone_also_after_an_exception(stock, family):
    plain.check_undone_after_an_exception(stock, family, TaylorSeer(interval=2, warmup=1), latents)


def test_weights_offloaded_while_it_is_on_come_back_after_it():
    """FLUX's single blocks have a layer with weights and a hook, whose forward offloading wraps."""
    pipe = tiny.flux()
    plain_run = latents(pipe, num_inference_steps=2)
    method = "stock-4+taylorseer(interval=2,warmup=1)"
    expected = latents(ralu.enable(pipe, method))
    accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))
    assert torch.equal(latents(ralu.enable(pipe, method)), expected)
    assert torch.equal(latents(ralu.disable(pipe), num_inference_steps=2), plain_run)
    ralu.enable(pipe, method)
    accelerate.hooks.remove_hook_from_module(pipe.transformer, recurse=True)
    assert torch.equal(latents(ralu.disable(pipe), num_inference_steps=2), plain_run)


@pytest.mark.parametrize(
    "cache, error, message",
    [
        ("teleport", ValueError, "cache: 'teleport' is no cache; choose of .*taylorseer"),
        ("taylorseer(steps=3)", ValueError, "cache: taylorseer has no option 'steps'; it has interval, order, warmup"),
        ("taylorseer(interval=0)", ValueError, "cache: interval must be at least 1, got 0"),
        ("taylorseer(order=3)", ValueError, "cache: order must be from 0 to 2, got 3"),
        ("taylorseer(interval=2.5)", ValueError, "interval must be a whole number"),
        (TaylorSeer, TypeError, "cache must be one of .*taylorseer"),
        (3, TypeError, "cache must be one of .*, or an instance of its class, got 3"),
        (TaylorSeerCacheConfig(), TypeError, "cache must be one of .*taylorseer"),
    ],
)
def test_a_wrong_cache_changes_nothing(stock, cache, error, message):
    scheduler = stock.scheduler
    with pytest.raises(error, match=message):
        ralu.enable(stock, cache=cache)
    assert stock.scheduler is scheduler and plain.hooks_left(stock) == []


@pytest.mark.parametrize("option", ["interval", "order", "warmup"])
@pytest.mark.parametrize("value", [None, "3", 2.0, -1, True, [1]])
def test_wrong_options(option, value):
    with pytest.raises((TypeError, ValueError), match=f"{option} must be"):
        TaylorSeer(**{option: value})


def test_two_caches_are_refused():
    pipe = tiny.flux()
    pipe.transformer.enable_cache(TaylorSeerCacheConfig())
    with pytest.raises(ValueError, match=r"the transformer has a cache of diffusers, disable_cache\(\) takes it off"):
        ralu.enable(pipe, cache="taylorseer")
    pipe.transformer.disable_cache()
    with pytest.raises(ValueError, match=r"cache given twice: in 'flux-5x.taylorseer' and as a keyword"):
        ralu.enable(pipe, "flux-5x+taylorseer", cache=TaylorSeer())
    with pytest.raises(ValueError, match="ratio given twice"):
        ralu.enable(pipe, "flux-5x(ratio=0.3)", ratio=0.4)


def test_every_registered_cache_says_whom_it_serves():
    for name, kind in CACHES.items():
        assert kind.families and all(isinstance(family, str) for family in kind.families), name
        for part in ("check", "apply", "remove", "reset", "shares", "kept"):
            assert callable(getattr(kind, part))


@pytest.mark.parametrize("name", CACHES)
def test_a_copy_of_a_pipeline_has_a_cache_of_its_own(name, family):
    pipe = ralu.enable(family.make(), f"stock-4+{name}")
    expected = latents(pipe)
    twin = deepcopy(pipe)
    for weight in pipe.transformer.parameters():
        weight.data.add_(1)
    assert torch.equal(latents(twin), expected)
    ralu.disable(twin)
    assert plain.hooks_left(twin) == [] != plain.hooks_left(pipe)


@pytest.mark.parametrize("name", ["taylorseer", "toca"])
def test_pickling_is_refused_in_words_and_saving_works(name, family, tmp_path):
    """What is refused changes nothing; caches of both kinds of hooks."""
    pipe = ralu.enable(family.make(), f"stock-2+{name}")
    for save in (pickle.dumps, lambda given: torch.save(given, tmp_path / "pipe.pt")):
        for given in (pipe, pipe.transformer):
            with pytest.raises(TypeError, match=r"with a cache cannot be pickled.*call ralu.disable\(pipe\)"):
                save(given)
    expected = latents(pipe)
    assert torch.equal(expected, latents(deepcopy(pipe)))
    pipe.save_pretrained(tmp_path / "folder")
    loaded = type(pipe).from_pretrained(tmp_path / "folder")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents(ralu.enable(loaded, cache=name)), expected)
    pipe.transformer = pickle.loads(pickle.dumps(ralu.disable(pipe).transformer))
    assert torch.equal(latents(ralu.enable(pipe, f"stock-2+{name}")), expected)


def test_a_call_of_another_pipeline_is_not_cached(family):
    """One with the same transformer and a scheduler of its own, within a run and outside."""
    pipe, found = family.make(), []
    other = type(pipe)(**pipe.components | {"scheduler": copy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    expected = latents(other, num_inference_steps=3)

    def run_other(pipe, step, timestep, tensors):
        if step == 0:
            found.append(latents(other, num_inference_steps=3))
        return tensors

    for cache in ("delta-dit", "teacache(delta=9)"):
        ralu.enable(pipe, "stock-4", cache=cache)
        latents(pipe, callback_on_step_end=run_other)
        found.append(latents(other, num_inference_steps=3))
    assert len(found) == 4 and all(torch.equal(each, expected) for each in found)
