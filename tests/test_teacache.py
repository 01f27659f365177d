"""TeaCache against the method written out, exact where it skips nothing; its calibration; undone wholly."""

import json
import math
from itertools import pairwise

import numpy as np
import plain
import pytest
import tiny
import torch
from diffusers.hooks import apply_group_offloading
from torch._dynamo.testing import CompileCounter

import ralu
from ralu.caches import Progress, TeaCache, teacache
from ralu.caches.calibration import fit, recorded
from ralu.caches.hooks import hooks_of
from ralu.caches.teacache import IDENTITY, PUBLISHED, Polynomial
from ralu.cli import main
from ralu.counting import LiveBytes

close = dict(rtol=0, atol=2e-5)
# For the random models: some steps are skipped between the first and the last.
DELTA = {"flux": 0.5, "sd3": 0.12}
PROMPTS = 2 * tiny.PROMPTS
QUARTIC = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)


def latents(pipe, **call):
    return tiny.generate(pipe, output_type="latent", **call)


def name_of(family):
    return family.presets[0].partition("-")[0]


# ---- the method ----


def by_hand(pipe, delta, polynomial, steps):
    """steps: of the stages. The first call of a step decides for its others; guidance's halves decide together."""
    shared = {}

    def method(model, given, state, step):
        hidden, text, temb, named = plain.before(model, given)
        index = pipe.scheduler.step_index or 0
        layout = getattr(pipe.scheduler, "layout", None)
        last = step == steps[0 if layout is None else layout.stage - 1] - 1
        if shared.get("index") != index:
            modulated = model.transformer_blocks[0].norm1(hidden, emb=temb)[0]
            if step == 0 or last:
                shared["full"], shared["sum"] = True, 0.0
            else:
                change = (modulated - shared["modulated"]).abs().mean() / shared["modulated"].abs().mean()
                shared["sum"] += np.poly1d(polynomial)(change.item())
                shared["full"] = shared["sum"] >= delta
                shared["sum"] *= not shared["full"]
            shared["index"], shared["modulated"] = index, modulated
        if shared["full"] or "residual" not in state:
            entry = hidden
            for i, block in enumerate(plain.blocks(model)):
                if i not in (given.get("skip_layers") or ()):
                    text, hidden = block(hidden, text, temb, **named)
            state["residual"] = hidden - entry
        else:
            hidden = hidden + state["residual"]
        return plain.after(model, given, hidden, temb)

    return plain.instead(pipe, method)


GUIDED = {
    "flux": dict(true_cfg_scale=2.0, negative_prompt=tiny.PROMPTS[1]),
    "sd3": dict(skip_guidance_layers=[0], skip_layer_guidance_start=0.1, skip_layer_guidance_stop=0.9),
}


@pytest.mark.serves("TeaCache")
def test_a_stock_run_equals_the_method_written_out_by_hand(stock, family):
    """With all that guidance adds to a step: in SD3 a second call begins after the first step."""
    name, steps = name_of(family), 8
    call = GUIDED[name] | dict(seeds=(3,), num_inference_steps=steps)
    ralu.enable(stock, "stock-8", cache=TeaCache(DELTA[name]))
    query = stock.transformer.transformer_blocks[1].attn.to_q
    got = []
    computed = set(plain.steps_of(stock, query, lambda: got.append(latents(stock, **call))))
    ralu.disable(stock)
    with by_hand(stock, DELTA[name], QUARTIC if name == "flux" else (1, 0), [steps]):
        assert set(plain.steps_of(stock, query, lambda: got.append(latents(stock, **call)))) == computed
    assert {0, steps - 1} < computed < set(range(steps))
    torch.testing.assert_close(*got, **close)
    assert (got[0] - latents(stock, **call)).abs().max() > 1e-4


def test_a_run_with_stages_equals_the_method_written_out_by_hand(stock, family):
    """Each stage begins and ends with a full step."""
    name = name_of(family)
    pipe = ralu.enable(stock, family.presets[0], cache=TeaCache(DELTA[name]))
    got, steps = [], pipe.scheduler.schedule.steps
    query = pipe.transformer.transformer_blocks[0].attn.to_q
    computed = plain.steps_of(pipe, query, lambda: got.append(latents(pipe)))
    assert computed == plain.steps_of(pipe, query, lambda: got.append(latents(pipe)))  # and so does each run
    ralu.enable(stock, family.presets[0])
    with by_hand(stock, DELTA[name], QUARTIC if name == "flux" else (1, 0), steps):
        assert plain.steps_of(pipe, query, lambda: got.append(latents(pipe))) == computed
    ralu.disable(stock)
    firsts = [sum(steps[:k]) for k in range(3)]
    assert {*firsts, *(first + count - 1 for first, count in zip(firsts, steps, strict=True))} <= set(computed)
    assert len(computed) < sum(steps) and torch.equal(got[0], got[1])
    torch.testing.assert_close(got[0], got[2], **close)


def test_delta_0_changes_nothing(stock, family):
    plain_run = latents(stock, num_inference_steps=5)
    assert torch.equal(latents(ralu.enable(stock, "stock-5+teacache(delta=0)")), plain_run)
    expected = latents(ralu.enable(stock, family.short))
    assert torch.equal(latents(ralu.enable(stock, family.short, cache=TeaCache(0.0))), expected)
    ralu.disable(stock)


def test_a_large_delta_leaves_the_first_and_the_last_step(stock, family):
    pipe = ralu.enable(stock, "stock-6", cache=TeaCache(1e9))
    query = pipe.transformer.transformer_blocks[0].attn.to_q
    assert plain.steps_of(pipe, query, lambda: latents(pipe)) == [0, 5]
    ralu.disable(stock)


@pytest.mark.parametrize("ragged", [True, False])
def test_images_of_a_batch_decide_for_themselves(stock, family, ragged, monkeypatch):
    """At the second step of the mixed stage one of two is computed: among padding, on fused blocks, and without."""
    schedule, halves = family.short.replace(steps=(2, 4, 2)), 2 if "sd3-2x" in family.presets else 1
    options = dict(regions=lambda x0, grid: x0.mean(-1), threshold=0.0, fused=True) if ragged else {}
    options = {"regions": "gradient"} | options
    found, changes = [], teacache.changes
    monkeypatch.setattr(teacache, "changes", lambda *args: found.append(changes(*args)) or found[-1])
    latents(ralu.enable(stock, schedule, cache=TeaCache(0.0, "identity"), **options), prompt=PROMPTS, seeds=range(6))
    least, most = (found[0].index(pick(found[0])) for pick in (min, max))
    delta = (found[0][least] + found[0][most]) / 2

    pipe = ralu.enable(stock, schedule, cache=TeaCache(delta, "identity"), **options)

    def rows(args, named):
        layout = pipe.scheduler.layout
        return pipe.scheduler.step_index, len(named["hidden_states"]), layout is not None and layout.mask is not None

    chosen = dict(prompt=[PROMPTS[least], PROMPTS[most]], seeds=(least, most))
    found.clear()
    with plain.calls_of(pipe.transformer.transformer_blocks[0].attn, rows) as computed:
        together = latents(pipe, **chosen)
    alone = [latents(pipe, prompt=PROMPTS[i], seeds=(i,)) for i in (least, most)]
    ralu.disable(stock)
    third = len(found) // 3  # of the decisions, those of the batch
    assert np.array(found[:third]) == pytest.approx(np.reshape(found[third:], (2, third)).T, rel=1e-3)
    assert (3, halves, ragged) in computed
    torch.testing.assert_close(together, torch.cat(alone), **close)


def test_guidance_that_ends_on_the_way():
    """What a step without guidance is like is not compared with rows of one that had it."""

    def end(pipe, step, timestep, tensors):
        if step != 2:
            return {}
        pipe._guidance_scale = 1.0
        return {name: tensors[name].chunk(2)[-1] for name in names}

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    call = dict(num_inference_steps=6, callback_on_step_end=end, callback_on_step_end_tensor_inputs=names)
    pipe = ralu.enable(tiny.sd3(), "stock-6", cache=TeaCache(0.05))
    single = [latents(pipe, prompt=tiny.PROMPTS[i], seeds=(i,), **call) for i in (0, 1)]
    both = latents(pipe, prompt=tiny.PROMPTS[:2], seeds=(0, 1), **call)
    torch.testing.assert_close(both, torch.cat(single), rtol=0, atol=2e-5)


def test_compiled_blocks_stay_compiled():
    pipe, counter = tiny.sd3(), CompileCounter()
    expected = latents(ralu.enable(pipe, "stock-3", cache=TeaCache(9.0)))
    pipe.transformer.transformer_blocks[1].compile(backend=counter)
    torch.testing.assert_close(latents(pipe), expected, **close)
    assert counter.frame_count == 1 and counter.op_count > 20


def test_it_is_undone_also_after_an_exception(stock, family):
    plain.check_undone_after_an_exception(stock, family, TeaCache(DELTA[name_of(family)]), latents)


def test_memory_by_formula_and_measured(stock, family):
    cache, call = TeaCache(DELTA[name_of(family)]), dict(height=96, width=96)
    with LiveBytes(1) as without:
        latents(stock, num_inference_steps=5, **call)
    pipe = ralu.enable(stock, "stock-5", cache=cache)
    kept = []

    def measure(pipe, step, timestep, tensors):
        (manager,) = {hook.state_manager for _, hook in hooks_of(pipe.transformer)}
        (state,) = manager._state_cache.values()
        tensors_kept = state.residual, state.entry, state.gate.previous
        kept.append(sum(tensor.nbytes for tensor in tensors_kept if tensor is not None))
        return tensors

    with plain.calls_of(pipe.transformer.norm_out, lambda args, _: args[0].shape) as shapes:
        latents(pipe, callback_on_step_end=measure, **call)
    (stage,) = Progress.of([5])
    batch, tokens, _ = shapes[0]
    assert kept == [4 * cache.kept(pipe.transformer, progress, batch, tokens, 0) for progress in stage]
    assert kept[0] == 4 * 2 * shapes[0].numel() and kept[-1] == 0
    with LiveBytes(1) as within:
        latents(pipe, **call)
    ralu.disable(pipe)
    assert without.peak < within.peak <= without.peak + kept[0]


# ---- the polynomial ----


def test_the_published_polynomial_and_the_numbers_of_full_steps_of_the_paper():
    """45 steps have 10 full ones and 30 have 7, with a delta of 0.99, by the work in its tables."""
    for change in (0.0, 0.03, 0.1, 0.5):
        assert PUBLISHED(change) == pytest.approx(np.poly1d(QUARTIC)(change), rel=1e-12)
        assert IDENTITY(change) == change
    changes = np.linspace(0, 0.1, 100001)
    assert PUBLISHED.mean == pytest.approx(np.poly1d(QUARTIC)(changes).mean(), rel=1e-4)
    flux = tiny.flux().transformer
    for steps, full in ((45, 10), (30, 7)):
        (stage,) = Progress.of([steps])
        shares = [TeaCache(0.99).shares(flux, progress, 64, 16) for progress in stage]
        assert sum("transformer_blocks.1" not in each for each in shares) == full
    assert TeaCache(0.99).shares(tiny.sd3().transformer, stage[0], 64, 16) is None


def test_a_polynomial_that_was_fitted():
    """It is never negative, and goes on in proportion where no changes were seen."""
    fitted = Polynomial((-1.0, 0.0, 0.0, 1.0, 0.1), largest=0.5)
    assert fitted(0.25) == pytest.approx(0.1 + 0.25 - 0.25**4)
    assert fitted(1.5) == pytest.approx(3 * (0.1 + 0.5 - 0.5**4))
    assert Polynomial((1.0, -0.5))(0.25) == 0


def test_a_fit_finds_the_polynomial():
    changes = np.linspace(0.01, 0.4, 40)
    expected = np.polyval([3.0, -2.0, 0.5, 0.7, 0.05], changes)
    polynomial, error = fit(list(zip(changes.tolist(), expected.tolist(), strict=True)))
    assert polynomial.coefficients == pytest.approx([3.0, -2.0, 0.5, 0.7, 0.05]) and error < 1e-12
    assert (polynomial.largest, polynomial.mean) == pytest.approx((0.4, expected.mean()))
    with pytest.raises(ValueError, match="more than 5 different changes, got 5"):
        fit([(change, change) for change in (0.1, 0.2, 0.3, 0.4, 0.5, 0.5)])
    with pytest.raises(ValueError, match="must be finite"):
        fit([(change, math.nan) for change in range(9)])


def test_what_a_calibration_records(stock, family):
    seen = []

    def method(model, given, state, step):
        hidden, text, temb, named = plain.before(model, given)
        modulated = model.transformer_blocks[0].norm1(hidden, emb=temb)[0]
        for block in plain.blocks(model):
            text, hidden = block(hidden, text, temb, **named)
        output = plain.after(model, given, hidden, temb)
        seen.append((modulated, output[0]))
        return output

    call = dict(prompt=tiny.PROMPTS[:2], seeds=(1, 2), num_inference_steps=3)
    with recorded(stock.transformer, 2) as pairs:
        latents(stock, **call)
    with plain.instead(stock, method):
        latents(stock, **call)
    expected = []
    for before, after in pairwise(seen):
        for image in (0, 1):  # every second row: guidance repeats the batch
            changes = [
                (y[image::2] - x[image::2]).abs().mean() / x[image::2].abs().mean()
                for x, y in zip(before, after, strict=True)
            ]
            expected.append(tuple(map(float, changes)))
    assert len(pairs) == 4 and np.array(pairs) == pytest.approx(np.array(expected), rel=1e-4)
    assert not stock.transformer._forward_hooks


def test_the_command(tmp_path, capsys):
    folder, file = str(tmp_path / "model"), tmp_path / "new" / "fit.json"
    tiny.sd3().save_pretrained(folder)
    options = ["--model", folder, "--size", "64"]
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.PROMPTS))
    call = ["calibrate", "teacache", *options, "--prompts", str(tmp_path / "prompts.txt"), "--batch", "2"]
    assert main([*call, "--steps", "4", "-o", str(file)]) == 0
    stored = json.loads(file.read_text())
    assert (stored["cache"], stored["steps"], stored["prompts"], stored["width"]) == ("teacache", 4, 3, 64)
    assert len(stored["coefficients"]) == 5 and stored["mean"] > 0 and 0 < stored["largest"] < 1
    assert f"9 changes of up to {stored['largest']:.1%}" in capsys.readouterr().out

    cache = TeaCache(0.05, str(file))
    pipe = ralu.enable(tiny.sd3(), "stock-4", cache=cache)
    p = cache.polynomial(pipe.transformer)
    assert p.coefficients == tuple(stored["coefficients"]) and (p.largest, p.mean) == (
        stored["largest"],
        stored["mean"],
    )
    assert cache.shares(pipe.transformer, Progress.of([4])[0][1], 64, 16) is not None
    preset = f"stock-4+teacache(delta=0.05,coefficients={file})"
    assert main(["generate", "fox", *options, "--preset", preset, "-o", str(tmp_path / "fox.png")]) == 0

    for wrong, words in (
        ([*call, "--steps", "2", "-o", str(file)], "--steps: a fit needs more than 5 different changes, got 3"),
        ([*call, "-o", "fit.txt"], "'fit.txt' must end in one of .json"),
        (["calibrate", "toca", "-o", str(file)], "invalid choice: 'toca'"),
    ):
        assert main(wrong) == 2
        assert words in capsys.readouterr().err


# ---- what is refused ----


@pytest.mark.parametrize(
    "text", [None, "no JSON", "[1, 2]", "{}", '{"coefficients": [], "largest": 1, "mean": 1}',
             '{"coefficients": [1, NaN], "largest": 1, "mean": 1}', '{"coefficients": [1], "largest": 0, "mean": 1}'],
)  # fmt: skip
def test_a_file_that_is_no_calibration_changes_nothing(stock, tmp_path, text):
    path = tmp_path / "fit.json"
    if text is not None:
        path.write_text(text)
    ralu.enable(stock, "stock-3+taylorseer")
    scheduler, hooks = stock.scheduler, plain.hooks_left(stock)
    with pytest.raises(ValueError, match=r"coefficients must be auto, identity or a file that `ralu calibrate"):
        ralu.enable(stock, "stock-2", cache=TeaCache(coefficients=str(path)))
    assert stock.scheduler is scheduler and plain.hooks_left(stock) == hooks != []
    ralu.disable(stock)


@pytest.mark.parametrize("cache", ["teacache", "delta-dit(interval=3,variant=flux-research)"])
def test_blocks_that_are_offloaded_as_a_whole(cache):
    """Their norms are needed while they are not called."""
    here = dict(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"))
    pipe = tiny.flux()
    expected = latents(ralu.enable(pipe, "stock-4", cache=cache))
    apply_group_offloading(pipe.transformer, **here, offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(latents(pipe), expected)
    ralu.disable(pipe)
    with pytest.raises(ValueError, match="offload the transformer with offload_type='leaf_level', or after"):
        ralu.enable(pipe, cache=cache)
    ralu.enable(pipe, cache="delta-dit")


@pytest.mark.parametrize("option", ["delta", "coefficients"])
@pytest.mark.parametrize("value", [None, -1, True, [1], math.nan, math.inf])
def test_wrong_options(option, value):
    with pytest.raises((TypeError, ValueError), match=f"{option} must be"):
        TeaCache(**{option: value})
