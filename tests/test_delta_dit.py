"""Delta-DiT against the method written out, exact where it skips nothing, undone wholly."""

import plain
import pytest
import tiny
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_leaves

import ralu
from ralu.caches import DeltaDiT, Progress
from ralu.caches.hooks import hooks_of
from ralu.counting import LiveBytes

close = dict(rtol=0, atol=2e-5)
RESEARCH = "flux-research"


def latents(pipe, **call):
    return tiny.generate(pipe, output_type="latent", **call)


@pytest.mark.parametrize(
    "cache, stages, expected",
    [
        (DeltaDiT(4, boundary=0.3), [13], "full rear rear rear full front front front full front front front full"),
        (DeltaDiT(2, boundary=0.0), [5], "full front full front full"),
        (DeltaDiT(3, boundary=1.0), [5], "full rear rear full rear"),
        (DeltaDiT(2, boundary=0.5), [3, 4, 3], "full rear full full rear full front full front full"),
        (DeltaDiT(1), [3], "full full full"),
        (DeltaDiT(2, variant=RESEARCH), [5], "full single full single full"),
        (DeltaDiT(5, variant=RESEARCH), [7], "full single modules single modules full single"),
    ],
)  # fmt: skip
def test_steps(cache, stages, expected):
    """A stage begins anew with a full step; where the range changes is counted in the whole run."""
    assert [cache.kind(progress) for stage in Progress.of(stages) for progress in stage] == expected.split()


@pytest.mark.parametrize("steps, interval, full", [(50, 5, 10), (28, 2, 14), (50, 3, 17), (7, 7, 1), (8, 7, 2)])
def test_number_of_full_steps(steps, interval, full):
    (stage,) = Progress.of([steps])
    assert [DeltaDiT(interval).kind(progress) for progress in stage].count("full") == full


def by_hand(pipe, interval, count, boundary, steps):
    """Blocks from `start` to `stop` are left out: the last `count` of them first, and later the first."""

    def method(model, given, state, step):
        hidden, text, temb, named = plain.before(model, given)
        blocks, skipped = plain.blocks(model), given.get("skip_layers") or ()
        total = len(blocks)
        early = (pipe.scheduler.step_index or 0) < boundary * steps
        start, stop = (total - count, total) if early else (0, count)
        full = step % interval == 0 or not state
        seen, index = [(hidden, text)], 0
        while index < total:
            if index == start and not full:
                delta, text_delta = state[start, stop]
                hidden, text, index = hidden + delta, None if text_delta is None else text + text_delta, stop
                continue
            if index not in skipped:
                text, hidden = blocks[index](hidden_states=hidden, encoder_hidden_states=text, temb=temb, **named)
            index += 1
            seen.append((hidden, text))
        if full:
            for a, b in ((total - count, total), (0, count)):
                (x, text_x), (y, text_y) = seen[a], seen[b]
                state[a, b] = y - x, None if text_y is None else text_y - text_x
        return plain.after(model, given, hidden, temb)

    return plain.instead(pipe, method)


GUIDED = {
    "flux": dict(true_cfg_scale=2.0, negative_prompt=tiny.PROMPTS[1]),
    "sd3": dict(skip_guidance_layers=[1], skip_layer_guidance_start=0.1, skip_layer_guidance_stop=0.9),
}


@pytest.mark.parametrize("interval, count, boundary", [(3, 2, 0.5), (2, 1, 0.0), (4, 3, 0.8)])
def test_a_stock_run_equals_the_method_written_out_by_hand(stock, family, interval, count, boundary):
    """With all that guidance adds to a step: in SD3 a second call begins in the middle of an interval."""
    call = GUIDED["flux" if "flux-5x" in family.presets else "sd3"] | dict(seeds=(3,), num_inference_steps=8)
    ralu.enable(stock, "stock-8", cache=DeltaDiT(interval, count, boundary))
    got = latents(stock, **call)
    ralu.disable(stock)
    with by_hand(stock, interval, count, boundary, 8):
        expected = latents(stock, **call)
    torch.testing.assert_close(got, expected, **close)
    assert (got - latents(stock, **call)).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen_image"], indirect=True)
@pytest.mark.serves("DeltaDiT")
def test_a_run_with_stages_equals_the_method_written_out_by_hand(stock, family):
    cache = "delta-dit(interval=2,num_blocks=2,boundary=0.6)"
    got = latents(ralu.enable(stock, family.presets[0], cache=cache))
    ralu.enable(stock, family.presets[0])
    with by_hand(stock, 2, 2, 0.6, stock.num_timesteps):
        expected = latents(stock)
    ralu.disable(stock)
    torch.testing.assert_close(got, expected, **close)


@pytest.mark.parametrize("interval", [2, 5])
def test_the_research_variant_written_out_by_hand(interval):
    pipe = tiny.flux()
    pipe.transformer.add_adapter(LoraConfig(target_modules=["to_q", "proj_out", "linear"], init_lora_weights=False))

    def computed(block, state, names, *call, **named):
        hooks = [
            getattr(block, name).register_forward_hook(lambda *x, name=name: state.update({(block, name): x[-1]}))
            for name in names
        ]
        result = block(*call, **named)
        for hook in hooks:
            hook.remove()
        return result

    def method(model, given, state, step):
        hidden, text, temb, named = plain.before(model, given)
        place = step % interval
        alone = place > 0 and place % 2 == 0
        for block in model.transformer_blocks:
            if not alone:
                text, hidden = computed(block, state, ("attn", "ff", "ff_context"), hidden, text, temb, **named)
                continue
            _, gate, _, _, gate_mlp = block.norm1(hidden, emb=temb)
            _, text_gate, _, _, text_gate_mlp = block.norm1_context(text, emb=temb)
            image_attention, text_attention = state[block, "attn"]
            hidden = hidden + gate[:, None] * image_attention + gate_mlp[:, None] * state[block, "ff"]
            text = text + text_gate[:, None] * text_attention + text_gate_mlp[:, None] * state[block, "ff_context"]
        both = base = torch.cat([text, hidden], dim=1)
        if place % 2:
            both = base + state["delta"]
        else:
            for block in model.single_transformer_blocks:
                if alone:
                    _, gate = block.norm(both, emb=temb)
                    both = both + gate[:, None] * state[block, "proj_out"]
                else:
                    image, words = both[:, text.shape[1] :], both[:, : text.shape[1]]
                    both = torch.cat(computed(block, state, ("proj_out",), image, words, temb, **named), dim=1)
            state["delta"] = both - base
        return plain.after(model, given, both[:, text.shape[1] :], temb)

    call = dict(num_inference_steps=7)
    with plain.instead(pipe, method):
        expected = latents(pipe, **call)
    stock = latents(pipe, **call)
    for fused in (False, True):
        ralu.enable(pipe, "stock-7", cache=DeltaDiT(interval, variant=RESEARCH), fused=fused)
        torch.testing.assert_close(latents(pipe), expected, **close)
    ralu.disable(pipe)
    assert plain.hooks_left(pipe) == [] and (expected - stock).abs().max() > 1e-4
    assert torch.equal(latents(pipe, **call), stock)


def test_without_skipped_steps_nothing_changes(stock, family):
    plain_run = latents(stock, num_inference_steps=5)
    assert torch.equal(latents(ralu.enable(stock, "stock-5+delta-dit(interval=1)")), plain_run)
    expected = latents(ralu.enable(stock, family.short))
    assert torch.equal(latents(ralu.enable(stock, family.short, cache=DeltaDiT(interval=1))), expected)
    ralu.disable(stock)


def test_every_stage_begins_anew(stock, family):
    cache = DeltaDiT(interval=2, num_blocks=1, boundary=0.6)
    pipe = ralu.enable(stock, family.presets[0], cache=cache)
    steps = [progress for stage in Progress.of(pipe.scheduler.schedule.steps) for progress in stage]
    first, *_, last = plain.blocks(pipe.transformer)
    for block, kind in ((first, "front"), (last, "rear")):
        expected = [progress.run_step for progress in steps if cache.kind(progress) != kind]
        assert 0 < len(expected) < len(steps)
        for _ in range(2):  # every run
            assert plain.steps_of(pipe, block.attn.to_q, lambda: latents(pipe)) == expected
    ralu.disable(pipe)


def test_a_batch_equals_its_single_runs(stock, family):
    """With a threshold the mixed stage is padded, which the fused blocks leave out."""
    options = dict(regions=lambda x0, grid: x0.mean(-1), threshold=0.0, fused=True)
    pipe = ralu.enable(stock, family.short, cache=DeltaDiT(2, 2), **options)
    with plain.calls_of(pipe.transformer, lambda *_: pipe.scheduler.layout.mask is not None) as padded:
        together = latents(pipe, prompt=tiny.PROMPTS[:2], seeds=(1, 2))
    assert {*padded} == {True, False}
    alone = [latents(pipe, prompt=prompt, seeds=(seed,)) for prompt, seed in zip(tiny.PROMPTS[:2], (1, 2), strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), **close)
    ralu.disable(pipe)


def test_compiled_blocks_stay_compiled():
    pipe, cache, counter = tiny.flux(), DeltaDiT(2, 3), CompileCounter()
    expected = latents(ralu.enable(pipe, "stock-2", cache=cache))
    pipe.transformer.single_transformer_blocks[-1].compile(backend=counter)
    torch.testing.assert_close(latents(pipe), expected, **close)
    assert 1 <= counter.frame_count <= 2  # behind blocks that are left out its input has other strides
    assert counter.op_count > 20


def test_it_is_undone_also_after_an_exception(stock, family):
    plain.check_undone_after_an_exception(stock, family, DeltaDiT(interval=4), latents)


@pytest.mark.parametrize(
    ("family", "variant"),
    [("flux", "paper"), ("flux", RESEARCH), ("sd3", "paper")],  # SD3 has no single blocks
    indirect=["family"],
    scope="module",
)
def test_memory_by_formula_and_measured(stock, family, variant):
    cache = DeltaDiT(3, variant=variant, **({"num_blocks": 2} if variant == "paper" else {}))
    call, size = dict(prompt=tiny.PROMPTS[:2], seeds=(1, 2), height=96, width=96), 4
    with LiveBytes(1) as without:
        latents(stock, num_inference_steps=5, **call)
    ralu.enable(stock, "stock-5", cache=cache)
    kept = []

    def measure(pipe, step, timestep, tensors):
        (manager,) = {hook.state_manager for _, hook in hooks_of(pipe.transformer)}
        states = manager._state_cache.values()
        kept.append(
            sum(
                x.nbytes
                for state in states
                for x in tree_leaves((state.deltas, state.entries, list(state.outputs.values())))
                if x is not None
            )
        )
        return tensors

    streams = "hidden_states", "encoder_hidden_states"
    with plain.calls_of(
        plain.blocks(stock.transformer)[0], lambda _, named: [named[name].shape[:2] for name in streams]
    ) as shapes:
        latents(stock, callback_on_step_end=measure, **call)
    (batch, tokens), (_, text) = shapes[0]
    (stage,) = Progress.of([5])
    formula = [size * cache.kept(stock.transformer, progress, batch, tokens, text) for progress in stage]
    # After a step there is what the next ones use.
    following = [*zip(stage, formula, strict=True)][1:]
    assert kept == [0 if cache.kind(progress) == "full" else size for progress, size in following] + [0]
    assert max(kept) == max(formula) > 0
    with LiveBytes(1) as within:
        latents(stock, **call)
    ralu.disable(stock)
    assert without.peak < within.peak <= without.peak + max(formula)


@pytest.mark.parametrize(
    "given, error, message",
    [
        ("delta-dit(num_blocks=99)", ValueError, "num_blocks must be at most [34], the transformer's blocks, got 99"),
        ("delta-dit(interval=0)", ValueError, "cache: interval must be at least 1, got 0"),
        ("delta-dit(boundary=1.5)", ValueError, "cache: boundary must be from 0 to 1, got 1.5"),
        ("delta-dit(variant=fast)", ValueError, "cache: variant must be one of paper, flux-research, got 'fast'"),
        (
            "delta-dit(steps=3)",
            ValueError,
            "delta-dit has no option 'steps'; it has interval, num_blocks, boundary, var",
        ),
    ],
)
def test_a_cache_that_does_not_fit_changes_nothing(stock, given, error, message):
    """A pipeline that is enabled otherwise stays so."""
    ralu.enable(stock, "stock-3+taylorseer")
    scheduler, hooks = stock.scheduler, plain.hooks_left(stock)
    with pytest.raises(error, match=message):
        ralu.enable(stock, "stock-2", cache=given)
    assert stock.scheduler is scheduler and plain.hooks_left(stock) == hooks != []
    ralu.disable(stock)


def test_the_research_variant_is_for_flux():
    with pytest.raises(ValueError, match="variant must be 'paper' for SD3Transformer2DModel, got 'flux-research'"):
        ralu.enable(tiny.sd3(), cache=DeltaDiT(variant=RESEARCH))


@pytest.mark.parametrize("option", ["interval", "num_blocks", "boundary", "variant"])
@pytest.mark.parametrize("value", [None, "3", -1, True, [1], float("nan")])
def test_wrong_options(option, value):
    with pytest.raises((TypeError, ValueError), match=f"{option} must be"):
        DeltaDiT(**{option: value})


@pytest.mark.parametrize("option", [dict(num_blocks=3), dict(boundary=0.3)])
def test_the_research_variant_has_a_range_of_its_own(option):
    with pytest.raises(
        ValueError, match=f"{next(iter(option))} must be left out with variant='flux-research', got 0?.?3"
    ):
        DeltaDiT(variant=RESEARCH, **option)


def test_a_transformer_with_a_cache_of_diffusers():
    pipe = tiny.flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"the transformer has a cache of diffusers, disable_cache\(\) takes it off"):
        ralu.enable(pipe, cache="delta-dit")
