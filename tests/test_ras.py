"""RAS against the method written out with plain loops over all tokens; exact where nothing is dropped.

The images have 8x12 tokens.
"""

import math
from dataclasses import replace
from itertools import pairwise
from types import MethodType

import pytest
import tiny
import torch
from peft import LoraConfig
from torch.nn.functional import scaled_dot_product_attention

import ralu
from ralu.caches import RAS, Progress, ras_block
from ralu.caches.hooks import hooks_of, named_blocks
from ralu.caches.ras_block import Choice
from ralu.presets import PRESETS

close = dict(rtol=0, atol=2e-5)
FLUX = tiny.FAMILIES["flux"]
TOKENS = 8 * 12
SHORT = RAS(ratio=0.4, starvation=0.5, start=2, resets="4")  # dense: 0, 1, 4


def latents(pipe, **call):
    return tiny.generate(pipe, **{"output_type": "latent", "height": 32, "width": 48} | call)


def guided(family, images=1):
    """Both kinds of guidance: a batch twice as large, and a second call."""
    call = {"negative_prompt": ["a dog"] * images}
    return call | ({"true_cfg_scale": 2.0, "guidance_scale": 1.0} if family is FLUX else {"guidance_scale": 3.5})


# ---- its rules ----


def test_sparse_steps_are_the_published_ones():
    steps = Progress.of((28,))[0]
    dense = [progress.step for progress in steps if not RAS(ratio=0.32).is_sparse(progress)]
    assert dense == [0, 1, 2, 3, 12, 20]
    assert not any(RAS(ratio=1).is_sparse(progress) for progress in steps)
    ending = RAS(end=10, start=6, resets="none")
    assert [progress.step for progress in steps if ending.is_sparse(progress)] == [6, 7, 8, 9]
    low, mixed, full = Progress.of((5, 6, 9), mixed=(2,))
    assert [sum(map(RAS().is_sparse, stage)) for stage in (low, mixed, full)] == [1, 0, 5]


@pytest.mark.parametrize(
    ("ratio", "high_ratio", "low", "high"),
    [(0.32, 0.3, 1949, 835), (0.05, 0.3, 2723, 1167), (0.5, 1.0, 0, 2048), (0.5, 0.0, 2048, 0), (1e-9, 0.0, 4095, 0)],
)
def test_how_many_are_dropped(ratio, high_ratio, low, high):
    assert RAS(ratio=ratio, high_ratio=high_ratio).dropped(4096) == (low, high)


def test_neither_the_lowest_nor_the_highest_stay_and_the_starved_return():
    choice = Choice(RAS(ratio=0.5, high_ratio=0.5, starvation=10.0))
    scale = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 8.0, 7.0])
    velocity = torch.randn(1, 1, 4, 4).expand(2, 8, 4, 4) * scale[:, None, None]  # its std is in proportion
    choice.step(velocity.reshape(2, 8, 16), False, True)
    assert choice.active.tolist() == [[0, 2, 4, 5]] * 2  # 3 to 6
    choice.step(velocity.reshape(2, 8, 16), True, True)
    assert choice.active.tolist() == [[0, 1, 3, 5]] * 2  # of 0, 2, 4, 5 the lowest two went, and 6 and 7 again


# ---- the method by hand ----


def by_hand(pipe, cache):
    """Compute all rows of all blocks, but with the keys and values that dropped tokens had last. Returns an undo."""
    model, scheduler, flux = pipe.transformer, pipe.scheduler, hasattr(pipe.transformer, "single_transformer_blocks")
    run = {"step": 0, "call": -1, "dropped": None, "velocity": None, "counts": None, "text": 0}

    def sparse(step):
        resets = [] if cache.resets == "none" else [int(reset) for reset in cache.resets.split("/")]
        return cache.start <= step < len(scheduler.timesteps) and step not in resets

    def before_call(module, args, kwargs):
        run["call"] += 1
        run["text"] = kwargs["encoder_hidden_states"].shape[1]

    class Processor:
        def __init__(self):
            self.kept = {}  # by call of a step

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, mask=None, image_rotary_emb=None, **_):
            parts = [(hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))]
            if encoder_hidden_states is not None:
                added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
                parts.insert(0 if flux else 1, (encoder_hidden_states, *added))
            joint = []
            for x, linears, norms in parts:
                q, k, v = (linear(x).unflatten(-1, (attn.heads, -1)) for linear in linears)
                joint.append((*(y if norm is None else norm(y) for y, norm in zip((q, k), norms, strict=True)), v))
            q, k, v = (torch.cat(each, dim=1) for each in zip(*joint, strict=True))
            if image_rotary_emb is not None:
                cos, sin = (table[:, None] for table in image_rotary_emb)
                q, k = (y * cos + torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2) * sin for y in (q, k))
            first = run["text"] if flux else 0
            if run["dropped"] is not None and run["call"] in self.kept:
                for b in range(len(k)):
                    for i in run["dropped"][b % len(run["dropped"])]:
                        k[b, first + i], v[b, first + i] = (kept[b, i] for kept in self.kept[run["call"]])
            self.kept[run["call"]] = tuple(y[:, first : first + TOKENS].clone() for y in (k, v))
            out = scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2).flatten(2)
            if attn.pre_only:
                return out
            if encoder_hidden_states is None:
                return attn.to_out[0](out)
            cut = encoder_hidden_states.shape[1] if flux else hidden_states.shape[1]
            text, image = (out[:, :cut], out[:, cut:]) if flux else (out[:, cut:], out[:, :cut])
            return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)

    def pixels(velocity, b, i):
        """A token's pixels, (channels, 4)."""
        if flux:
            return velocity[b, i].view(-1, 4)
        row, column = 2 * (i // 12), 2 * (i % 12)
        return velocity[b, :, row : row + 2, column : column + 2].reshape(-1, 4)

    def step(self, model_output, timestep, sample, *args, **kwargs):
        velocity = model_output.clone()
        for b, dropped in enumerate(run["dropped"] or []):
            for i in dropped:
                if flux:
                    velocity[b, i] = run["velocity"][b, i]
                else:
                    row, column = 2 * (i // 12), 2 * (i % 12)
                    place = b, slice(None), slice(row, row + 2), slice(column, column + 2)
                    velocity[place] = run["velocity"][place]
        run["velocity"], run["dropped"] = velocity, None
        run["step"], run["call"] = run["step"] + 1, -1
        if run["step"] < len(scheduler.timesteps) and sparse(run["step"]):
            run["dropped"] = []
            for b in range(len(velocity)):
                counts = run.setdefault(("counts", b), [0] * TOKENS)
                metrics = []
                for i in range(TOKENS):
                    by_pixel = pixels(velocity, b, i)
                    spread = by_pixel.std(0) if cache.metric == "std" else by_pixel.square().sum(0).sqrt()
                    metrics.append(float(spread.mean()) * math.exp(cache.starvation * counts[i]))
                order = sorted(range(TOKENS), key=metrics.__getitem__)
                count = int((1 - cache.ratio) * TOKENS)
                low, high = int(count * (1 - cache.high_ratio)), int(count * cache.high_ratio)
                run["dropped"].append(order[:low] + order[TOKENS - high :])
                for i in run["dropped"][-1]:
                    counts[i] += 1
        return type(self).step(self, velocity, timestep, sample, *args, **kwargs)

    stock = {}
    for block in named_blocks(model).values():
        for attn in filter(None, (block.attn, getattr(block, "attn2", None))):
            stock[attn], attn.processor = attn.processor, Processor()
    hook = model.register_forward_pre_hook(before_call, with_kwargs=True)
    scheduler.step = MethodType(step, scheduler)

    def undo():
        hook.remove()
        del scheduler.step
        for attn, processor in stock.items():
            attn.processor = processor

    return undo


@pytest.mark.parametrize("cache", [SHORT, replace(SHORT, metric="l2norm", high_ratio=0.0, ratio=0.7)])
@pytest.mark.serves("RAS")
def test_a_run_equals_the_method_written_out_by_hand(stock, family, cache):
    call = {"prompt": tiny.PROMPTS[:2], "seeds": (3, 4)} | guided(family, 2)
    found = latents(ralu.enable(stock, "stock-7", cache=cache), **call)
    ralu.disable(stock)
    undo = by_hand(stock, cache)
    expected = latents(stock, num_inference_steps=7, **call)
    undo()
    torch.testing.assert_close(found, expected, **close)
    assert (found - latents(stock, num_inference_steps=7, **call)).abs().max() > 1e-2


# ---- in pipelines ----


def test_where_nothing_is_dropped_nothing_changes(stock, family):
    plain = latents(stock, num_inference_steps=6)
    for cache in ("ras(ratio=1)", "ras(start=6)", "ras(end=3)"):
        assert torch.equal(latents(ralu.enable(stock, f"stock-6+{cache}")), plain)
    expected = latents(ralu.enable(stock, family.short))
    assert torch.equal(latents(ralu.enable(stock, family.short, cache="ras(ratio=1)")), expected)
    ralu.disable(stock)
    assert torch.equal(latents(stock, num_inference_steps=6), plain)


def test_dropped_velocities_are_bitwise_the_last_ones(stock, family, monkeypatch):
    steps, stock_step = [], Choice.step

    def step(self, velocity, sparse, following):
        active = self.active
        made = stock_step(self, velocity, sparse, following)
        steps.append((sparse, active, velocity.clone(), made.clone()))
        return made

    monkeypatch.setattr(Choice, "step", step)
    ralu.enable(stock, "stock-7", cache=SHORT)
    latents(stock, prompt=tiny.PROMPTS[:2], seeds=(1, 2), **guided(family, 2))
    ralu.disable(stock)
    assert [sparse for sparse, *_ in steps] == [False, False, True, True, False, True, True]
    stay = TOKENS - sum(SHORT.dropped(TOKENS))
    for (_, _, _, before), (sparse, active, velocity, made) in pairwise(steps):
        if not sparse:
            assert torch.equal(made, velocity)
            continue
        assert active.shape == (2, stay) and all(len(set(row)) == stay for row in active.tolist())
        dropped = torch.ones(2, TOKENS, dtype=torch.bool).scatter_(1, active, False)
        assert torch.equal(made[dropped], before[dropped]) and torch.equal(made[~dropped], velocity[~dropped])
        assert not torch.equal(velocity[dropped], before[dropped])


def tokens_of_steps(pipe, run):
    """The image's tokens that the first block's MLP computes at each call."""
    seen = []
    hook = pipe.transformer.transformer_blocks[0].ff.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    run()
    hook.remove()
    return seen


def test_stages_begin_anew_and_the_mixed_one_is_dense(stock, family, monkeypatch):
    warned = []
    monkeypatch.setattr(ras_block.logger, "warning_once", warned.append)
    schedule = PRESETS[family.presets[0]].replace(steps=(4, 4, 5))
    cache = RAS(ratio=0.5, start=2, resets="none")
    pipe = ralu.enable(stock, schedule, cache=cache, regions="gradient")
    low, mixed, full = TOKENS // 4, TOKENS // 4 + 3 * int(schedule.ratio * TOKENS // 4), TOKENS
    few, many = (count - sum(cache.dropped(count)) for count in (low, full))
    expected = [low, low, few, few] + [mixed] * 4 + [full, full, many, many, many]
    warned.clear()
    for _ in range(2):
        assert tokens_of_steps(pipe, lambda: latents(pipe, guidance_scale=1.0)) == expected
    assert warned and all("RAS computes all tokens of a mixed stage" in text for text in warned)
    ralu.disable(pipe)


def test_a_batch_equals_its_single_runs(family):
    """Also where every prompt is as long as it is, and its padding in no attention."""
    pipe = family.make()
    for options in ({"fused": False}, {"fused": True, "trim_text": True}):
        ralu.enable(pipe, family.short.replace(steps=(4, 2, 4)), cache=SHORT, regions="gradient", **options)
        together = latents(pipe, prompt=tiny.PROMPTS[:2], seeds=(1, 2), **guided(family, 2))
        for i, prompt in enumerate(tiny.PROMPTS[:2]):
            alone = latents(pipe, prompt=prompt, seeds=(1 + i,), **guided(family))
            torch.testing.assert_close(together[i : i + 1], alone, **close)


def test_fused_blocks_have_the_same_points(stock, family):
    plain = latents(ralu.enable(stock, "stock-6", cache=SHORT, fused=False), **guided(family))
    fused = latents(ralu.enable(stock, "stock-6", cache=SHORT, fused=True), **guided(family))
    assert ralu.blocks.is_fused(stock.transformer)
    ralu.disable(stock)
    torch.testing.assert_close(fused, plain, **close)


def test_skip_layer_guidance_drops_the_same_tokens():
    """But for its first call, which has no keys yet, in a sparse step."""
    pipe = tiny.sd3()
    call = {"guidance_scale": 3.5, "skip_guidance_layers": [0], "num_inference_steps": 6}
    call |= {"skip_layer_guidance_start": 0.4, "skip_layer_guidance_stop": 1.0}  # from step 3 on
    ralu.enable(pipe, "stock-6", cache=SHORT)
    seen = []
    block = pipe.transformer.transformer_blocks[1]
    hook = block.ff.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    found = latents(pipe, **call)
    hook.remove()
    few = TOKENS - sum(SHORT.dropped(TOKENS))
    once = [(2, TOKENS), (2, TOKENS), (2, few)]
    assert seen == [*once, (2, few), (1, TOKENS), (2, TOKENS), (1, TOKENS), (2, few), (1, few)]
    ralu.disable(pipe)
    by_hand(pipe, SHORT)
    torch.testing.assert_close(found, latents(pipe, **call), **close)


def test_it_is_undone_also_after_an_exception(stock, family):
    plain = latents(stock, num_inference_steps=3)

    def fail(pipe, step, timestep, tensors):
        if step == 3:
            raise KeyError("stop")
        return tensors

    for preset in ("stock-6", family.short.replace(steps=(4, 2, 4))):
        ralu.enable(stock, preset, cache=SHORT)
        with pytest.raises(KeyError, match="stop"):
            latents(stock, callback_on_step_end=fail)
        again = latents(stock)
        torch.testing.assert_close(latents(stock), again, rtol=0, atol=0)  # what it left behind does no harm
        ralu.disable(stock)
        assert not list(hooks_of(stock.transformer))
        assert torch.equal(latents(stock, num_inference_steps=3), plain)


def test_adapters_that_come_after(family):
    pipe = family.make()
    ralu.enable(pipe, "stock-4", cache=SHORT)
    parts = ("to_q", "to_k", "add_k_proj", "net.0.proj", "proj_mlp", "proj_out")
    names = [name for name, _ in pipe.transformer.named_modules() if "blocks" in name and name.endswith(parts)]
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    found = latents(pipe, **guided(family))
    ralu.disable(pipe)
    by_hand(pipe, SHORT)
    torch.testing.assert_close(found, latents(pipe, num_inference_steps=4, **guided(family)), **close)


def test_joined_projections():
    pipe = tiny.flux()
    expected = latents(ralu.enable(pipe, "stock-4", cache=SHORT))
    pipe.transformer.fuse_qkv_projections()
    torch.testing.assert_close(latents(pipe), expected, **close)


def test_another_attention_is_refused():
    pipe = tiny.flux()
    ralu.enable(pipe, "stock-4", cache="ras")
    tiny.load_ip_adapter(pipe)
    with pytest.raises(ValueError, match=r"stock attention in .*, got FluxIPAdapterAttnProcessor"):
        latents(pipe)
    ralu.disable(pipe)
    with pytest.raises(ValueError, match=r"stock attention in .*, got FluxIPAdapterAttnProcessor"):
        ralu.enable(pipe, "stock-4", cache="ras")
    assert not list(hooks_of(pipe.transformer))


def test_what_is_kept_is_as_much_as_the_formula_says_and_nothing_in_the_end(stock, family):
    found = []

    def look(pipe, step, timestep, tensors):
        _, hook = next(hooks_of(pipe.transformer))
        pairs = [pair for state in hook.state_manager._state_cache.values()
                 for attentions in state.kept.values() for pair in attentions.values()]  # fmt: skip
        found.append(sum(x.untyped_storage().nbytes() for pair in pairs for x in pair))
        return tensors

    ralu.enable(stock, "stock-7", cache=SHORT)
    latents(stock, prompt=tiny.PROMPTS[:2], seeds=(1, 2), guidance_scale=1.0, callback_on_step_end=look)
    ralu.disable(stock)
    elements = [SHORT.kept(stock.transformer, progress, 2, TOKENS, 16) for progress in Progress.of((7,))[0]]
    assert [bool(number) for number in elements] == [False, True, True, True, True, True, True]
    assert found == [0, *(4 * number for number in elements[1:3]), 0, *(4 * number for number in elements[4:6]), 0]


# ---- wrong options ----


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("ratio", [0, -0.1, 1.5, None, "1", True, float("nan")], "ratio must be"),
        ("high_ratio", [-0.1, 1.1, None], "high_ratio must be"),
        ("starvation", [-1, None, float("inf")], "starvation must be"),
        ("metric", ["max", None, 2], "metric must be"),
        ("start", [0, -1, 1.5, None, True], "start must be"),
        ("end", [-1, 2.0, None], "end must be"),
        ("resets", ["", "12,20", "a", "1/", None, 12], "resets must be"),
    ],
)
def test_wrong_options(option, values, message):
    for value in values:
        with pytest.raises((TypeError, ValueError), match=message):
            RAS(**{option: value})


def test_in_names():
    assert ralu.Method.parse("stock-28+ras(ratio=0.32,resets=9/15)").cache == RAS(ratio=0.32, resets="9/15")
    assert str(ralu.Method.parse("sd3-2x+ras(start=2,resets=none)")) == "sd3-2x+ras(start=2,resets=none)"
