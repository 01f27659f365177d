"""ToCa against the method written out with plain loops and the whole map of attention; exact where nothing is left out.

The images have 8x8 tokens.
"""

from dataclasses import replace
from types import MethodType

import pytest
import tiny
import torch
from peft import LoraConfig

import ralu
from ralu.caches import Progress, ToCa, toca_block
from ralu.caches.hooks import hooks_of
from ralu.counting import LiveBytes
from ralu.presets import PRESETS

close = dict(rtol=0, atol=2e-5)
FLUX = tiny.FAMILIES["flux"]
MILD = ToCa(interval=3, cache_ratio=0.6, warmup=2)


def latents(pipe, **call):
    return tiny.generate(pipe, **{"output_type": "latent", "height": 32, "width": 32, "guidance_scale": 1.0} | call)


# ---- its rules ----


@pytest.mark.parametrize(
    ("interval", "steps", "full"),
    [
        (5, 40, [0, 1, 2, 7, 12, 17, 22, 27, 32, 37]),  # the paper's for FLUX
        (3, 28, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26]),  # and for SD3
        (4, 12, [0, 1, 2, 6, 10]),
        (1, 5, [0, 1, 2, 3, 4]),
    ],
)
def test_full_steps_are_the_published_ones(interval, steps, full):
    assert [step for step in range(steps) if ToCa(interval).is_full(step)] == full


@pytest.mark.parametrize(
    ("layer", "stream", "tokens", "count"),
    [
        (0, -1, 4096, 245),  # 4096 · 0.1 · 1.5 · 0.4 = 245.76
        (18, -1, 512, 17),  # 512 · 0.1 · (1.5 - 18/27) · 0.4 = 17.07
        (0, 1, 4608, 1105),  # 4608 · 0.1 · 1.5 · 1.6 = 1105.92
        (37, 1, 4608, 95),  # 4608 · 0.1 · (1.5 - 37/27) · 1.6 = 95.57
        (0, 0, 4096, 614),  # 4096 · 0.1 · 1.5 = 614.4
        (45, 0, 4096, 0),  # below 0
    ],
)
def test_counts_of_tokens(layer, stream, tokens, count):
    assert int(tokens * ToCa().fresh_ratio(layer, stream)) == count


def test_all_tokens_at_most():
    assert ToCa(cache_ratio=0.1).fresh_ratio(0, 1) == 1.0
    assert ToCa(cache_ratio=0, layer_weight=0, stream_weight=0).fresh_ratio(30, -1) == 1.0


@pytest.mark.parametrize("weights", [1, 700, 2**24])  # a query at a time, a few, all
def test_received_attention_is_the_column_sum_of_the_whole_map(weights, monkeypatch):
    monkeypatch.setattr(toca_block, "_WEIGHTS", weights)
    query, key = torch.randn(2, 2, 23, 3, 8)
    whole = torch.einsum("bqhd,bkhd->bhqk", query, key).div(8**0.5).softmax(-1).sum((1, 2))
    torch.testing.assert_close(toca_block.received(query, key), whole, rtol=1e-5, atol=1e-5)
    valid = torch.arange(23) < torch.tensor([[23], [9]])
    found = toca_block.received(query, key, valid)
    assert (found[1, 9:] == 0).all()
    alone = torch.einsum("qhd,khd->hqk", query[1, :9], key[1, :9]).div(8**0.5).softmax(-1).sum((0, 1))
    torch.testing.assert_close(found[0], whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1, :9], alone, rtol=1e-5, atol=1e-5)


def test_padding_is_never_chosen():
    valid = torch.arange(20) < torch.tensor([[20], [11], [1]])
    scores = torch.rand(3, 20) + 2.0 * ~valid  # padding would win
    tokens = toca_block.Tokens(scores, valid)
    for _ in range(9):  # and would grow older than all others
        rows = tokens.choose(0.45, 1.0)
        chosen = [set(row[kept].tolist()) for row, kept in zip(rows.places, rows.chosen, strict=True)]
        assert [len(each) for each in chosen] == [9, 4, 0]  # int(0.45 n)
        assert max(chosen[1]) < 11


# ---- the method by hand ----


def by_hand(transformer, cache):
    """Replace the blocks' forwards by ToCa in plain loops over samples, heads and tokens. Returns what undoes it."""
    flux = hasattr(transformer, "single_transformer_blocks")

    def rotated(x, rotary):
        if rotary is None:
            return x
        cos, sin = rotary
        turned = torch.empty_like(x)
        turned[:, 0::2] = x[:, 0::2] * cos[:, 0::2] - x[:, 1::2] * sin[:, 0::2]
        turned[:, 1::2] = x[:, 1::2] * cos[:, 1::2] + x[:, 0::2] * sin[:, 1::2]
        return turned

    def attend(attn, image, text=None, rotary=None):
        """Outputs before the projection, and scores, of the joint sequence in the family's order."""
        norms = [attn.norm_q, attn.norm_k]
        parts = [(image, [attn.to_q, attn.to_k, attn.to_v], norms)]
        if text is not None:
            added = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
            parts.insert(0 if flux else 1, (text, added, [attn.norm_added_q, attn.norm_added_k]))
        outputs, scores = [], []
        for b in range(len(image)):
            heads, received, lengths = [], 0, 0
            for h in range(attn.heads):
                q, k, v, plain = [], [], [], []
                for x, linears, normings in parts:
                    each = [linear(x[b]).chunk(attn.heads, -1)[h] for linear in linears]
                    plain.append(each[1])
                    for i, norm in enumerate(normings):
                        each[i] = each[i] if norm is None else norm(each[i])
                    for joined, one in zip((q, k, v), each, strict=True):
                        joined.append(one)
                q, k, v, plain = map(torch.cat, (q, k, v, plain))
                q, k = rotated(q, rotary), rotated(k, rotary)
                weights = (q @ k.T / q.shape[1] ** 0.5).softmax(-1)
                heads.append(weights @ v)
                received = received + weights.mean(0) / attn.heads
                lengths = lengths + plain.norm(dim=-1) / attn.heads
            outputs.append(torch.cat(heads, -1))
            scores.append(lengths if cache.score == "norm" else received)
        return torch.stack(outputs), scores

    def chosen(state, stream, b, layer, factor):
        score, age = state["scores"][stream][b], state["age"][stream][b]
        size = len(score)
        unit = score / sum(float(s) ** 2 for s in score) ** 0.5
        k = int(size * (1 - cache.cache_ratio) * (1.5 - layer / 27) * factor)
        total = [float(unit[i]) + cache.staleness * age[i] / cache.interval for i in range(size)]
        rows = sorted(range(size), key=lambda i: -total[i])[:k]
        for i in range(size):
            age[i] = 0 if i in rows else age[i] + 1
        return rows

    def remember(state, **scores):
        state["scores"], state["age"] = scores, {name: [[0] * len(s) for s in each] for name, each in scores.items()}

    def mlp(state, stream, module, x, layer, full):
        if full:
            state[stream] = module(x)
            return state[stream]
        state[stream] = state[stream].clone()
        for b in range(len(x)):
            for i in chosen(state, stream, b, layer, 0.4 if flux else 1.0):
                state[stream][b, i] = module(x[b, i])
        return state[stream]

    def forward_of(layer):
        state = {"step": -1}

        def double(
            self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
        ):
            state["step"] += 1
            full, image, text = cache.is_full(state["step"]), hidden_states, encoder_hidden_states
            second = getattr(self, "attn2", None) is not None
            if second:
                normed, gate, shift, scale, gate_mlp, normed2, gate2 = self.norm1(image, emb=temb)
            else:
                normed, gate, shift, scale, gate_mlp = self.norm1(image, emb=temb)
            last = getattr(self, "context_pre_only", False)
            text_normed, *modulation = (self.norm1_context(text, temb),) if last else self.norm1_context(text, emb=temb)
            if full:
                output, scores = attend(self.attn, normed, text_normed, image_rotary_emb)
                cut = text.shape[1] if flux else image.shape[1]
                first, rest = output[:, :cut], output[:, cut:]
                image_output, text_output = (rest, first) if flux else (first, rest)
                state["attn"] = self.attn.to_out[0](image_output)
                state["text attn"] = None if last else self.attn.to_add_out(text_output)
                parts = [s[:cut] for s in scores], [s[cut:] for s in scores]
                remember(state, **dict(zip(("text", "image") if flux else ("image", "text"), parts, strict=True)))
                if second:
                    state["attn2"] = self.attn2.to_out[0](attend(self.attn2, normed2)[0])
            image = image + gate[:, None] * state["attn"]
            if second:
                image = image + gate2[:, None] * state["attn2"]
            normed = self.norm2(image) * (1 + scale[:, None]) + shift[:, None]
            image = image + gate_mlp[:, None] * mlp(state, "image", self.ff, normed, layer, full)
            if last:
                return None, image
            gate, shift, scale, gate_mlp = modulation
            text = text + gate[:, None] * state["text attn"]
            normed = self.norm2_context(text) * (1 + scale[:, None]) + shift[:, None]
            return text + gate_mlp[:, None] * mlp(state, "text", self.ff_context, normed, layer, full), image

        def single(
            self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
        ):
            state["step"] += 1
            x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
            normed, gate = self.norm(x, emb=temb)

            def both(attention, normed):
                return self.proj_out(torch.cat([attention, self.act_mlp(self.proj_mlp(normed))], -1))

            if cache.is_full(state["step"]):
                state["attn"], scores = attend(self.attn, normed, rotary=image_rotary_emb)
                remember(state, joint=scores)
                state["total"] = both(state["attn"], normed)
            else:
                state["total"] = state["total"].clone()
                for b in range(len(x)):
                    for i in chosen(state, "joint", b, layer, 1.6):
                        state["total"][b, i] = both(state["attn"][b, i], normed[b, i])
            x = x + gate[:, None] * state["total"]
            return x[:, : encoder_hidden_states.shape[1]], x[:, encoder_hidden_states.shape[1] :]

        return double, single

    blocks = [(block, *pair) for block, *pair in _numbered(transformer)]
    for block, kind, layer in blocks:
        block.forward = MethodType(forward_of(layer)[kind], block)

    def undo():
        for block, *_ in blocks:
            del block.forward

    return undo


def _numbered(transformer):
    for kind, part in enumerate(("transformer_blocks", "single_transformer_blocks")):
        for layer, block in enumerate(getattr(transformer, part, ())):
            yield block, kind, layer


@pytest.mark.parametrize("score", ["attention", "norm"])
def test_a_run_equals_the_method_written_out_by_hand(stock, score):
    cache = replace(MILD, score=score)
    call = {"prompt": tiny.PROMPTS[:2], "seeds": (3, 4)}
    found = latents(ralu.enable(stock, "stock-7", cache=cache), **call)
    ralu.disable(stock)
    undo = by_hand(stock.transformer, cache)
    expected = latents(stock, num_inference_steps=7, **call)
    undo()
    torch.testing.assert_close(found, expected, **close)
    assert (found - latents(stock, num_inference_steps=7, **call)).abs().max() > 1e-3


def test_with_all_tokens_it_is_the_stock_run_but_for_attention(stock):
    """Attention's outputs of the last full step, under every step's own modulation."""
    cache = ToCa(interval=3, cache_ratio=0, layer_weight=0, stream_weight=0, warmup=1)
    found = latents(ralu.enable(stock, "stock-5", cache=cache))
    ralu.disable(stock)
    patched = []
    for block, *_ in _numbered(stock.transformer):
        for attn in filter(None, (block.attn, getattr(block, "attn2", None))):
            kept = {"step": -1}

            def forward(self, *args, kept=kept, stock=attn.forward, **kwargs):
                kept["step"] += 1
                if kept["step"] % 3 == 0:
                    kept["output"] = stock(*args, **kwargs)
                return kept["output"]

            attn.forward = MethodType(forward, attn)
            patched.append(attn)
    expected = latents(stock, num_inference_steps=5)
    for attn in patched:
        del attn.forward
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - latents(stock, num_inference_steps=5)).abs().max() > 1e-3


# ---- in pipelines ----


def test_without_skipped_steps_nothing_changes(stock, family):
    plain = latents(stock, num_inference_steps=4)
    for cache in ("toca(interval=1)", "toca(warmup=4)"):
        assert torch.equal(latents(ralu.enable(stock, f"stock-4+{cache}")), plain)
    expected = latents(ralu.enable(stock, family.short))
    assert torch.equal(latents(ralu.enable(stock, family.short, cache="toca(interval=1)")), expected)
    ralu.disable(stock)
    assert torch.equal(latents(stock, num_inference_steps=4), plain)


def kept(pipe):
    """The blocks' states of all contexts, by place."""
    _, hook = next(hooks_of(pipe.transformer))
    return [state.blocks for state in hook.state_manager._state_cache.values()]


def test_so_many_rows_change_in_every_layer(stock):
    before, seen = {}, []

    def look(pipe, step, timestep, tensors):
        for blocks in kept(pipe):
            for place, block in blocks.items():
                for name, stream in (("ff", "image"), ("ff_context", "text"), ("proj_out", "joint")):
                    if name not in block.kept:
                        continue
                    now, key = block.kept[name].clone(), (place, name)
                    if not MILD.is_full(step):
                        assert stream in block.tokens
                        changed = (now != before[key]).any(-1).sum(-1).tolist()
                        seen.append((step, place))
                        assert changed == [int(now.shape[1] * MILD.fresh_ratio(*place))] * 2
                    before[key] = now
        return tensors

    ralu.enable(stock, "stock-7", cache=MILD)
    latents(stock, prompt=tiny.PROMPTS[:2], seeds=(1, 2), callback_on_step_end=look)
    ralu.disable(stock)
    assert {step for step, _ in seen} == {2, 5} and len({place for _, place in seen}) >= 3  # at 3 all is let go


@pytest.mark.serves("ToCa")
def test_every_stage_begins_anew(stock, family):
    """Also the mixed one; a step with a cache but without its attention calls no projection."""
    cache = ToCa(interval=2, warmup=1)
    pipe = ralu.enable(stock, family.presets[0], cache=cache, regions="gradient")
    steps, computed = pipe.scheduler.schedule.steps, set()
    hook = pipe.transformer.transformer_blocks[0].attn.to_q.register_forward_pre_hook(
        lambda *_: computed.add(pipe.scheduler.step_index or 0)
    )
    expected = {sum(steps[:k]) + step for k in range(3) for step in range(steps[k]) if cache.is_full(step)}
    for _ in range(2):
        latents(pipe)
        assert computed == expected < set(range(sum(steps)))
        computed.clear()
    hook.remove()
    ralu.disable(pipe)


def test_a_batch_equals_its_single_runs_where_images_differ_in_tokens(family):
    """A threshold pads the mixed stage; guidance gives every image a second row, or a second call."""
    pipe = family.make()
    schedule = PRESETS[family.presets[0]].replace(steps=(3, 3, 3))
    call = {"guidance_scale": 3.5, "negative_prompt": "a dog"} | ({"true_cfg_scale": 2.0} if family is FLUX else {})
    cache = ToCa(interval=3, cache_ratio=0.5, warmup=1, stream_weight=0)
    options = {"regions": lambda x0, grid: x0.mean(-1), "threshold": 0.0, "fused": family is not FLUX}
    ralu.enable(pipe, schedule, cache=cache, **options)
    lengths = []

    def look(pipe, step, timestep, tensors):
        if step == 2:
            lengths.extend(pipe.scheduler.layout.plan.lengths.tolist())
        return tensors

    several = call | {"negative_prompt": ["a dog"] * 2}
    together = latents(pipe, prompt=tiny.PROMPTS[:2], seeds=(1, 2), callback_on_step_end=look, **several)
    assert len(set(lengths)) == 2
    for i, prompt in enumerate(tiny.PROMPTS[:2]):
        torch.testing.assert_close(together[i : i + 1], latents(pipe, prompt=prompt, seeds=(1 + i,), **call), **close)


def test_fused_blocks_have_the_same_points(stock, family):
    plain = latents(ralu.enable(stock, family.short, cache=replace(MILD, interval=2, warmup=1), fused=False))
    fused = latents(ralu.enable(stock, family.short, cache=replace(MILD, interval=2, warmup=1), fused=True))
    assert ralu.blocks.is_fused(stock.transformer)
    ralu.disable(stock)
    torch.testing.assert_close(fused, plain, **close)


def test_it_is_undone_also_after_an_exception(stock, family):
    plain, state = latents(stock, num_inference_steps=3), dict(stock.transformer.transformer_blocks[0].__dict__)

    def fail(*_):
        raise KeyError("stop")

    for preset in ("stock-5", family.presets[0]):
        ralu.enable(stock, preset, cache=replace(MILD, warmup=1), regions=None if preset == "stock-5" else "gradient")
        broken = stock.transformer.transformer_blocks[-1].ff.register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="stop"):
            latents(stock)
        broken.remove()
        ralu.disable(stock)
        left = dict(stock.transformer.transformer_blocks[0].__dict__)
        assert not left.keys() - state.keys() - {"_diffusers_hook"} and not list(hooks_of(stock.transformer))
        assert torch.equal(latents(stock, num_inference_steps=3), plain)


def test_adapters_that_come_after(family):
    pipe, cache = family.make(), replace(MILD, warmup=1)
    ralu.enable(pipe, "stock-4", cache=cache)
    parts = ("to_q", "add_k_proj", "net.0.proj", "proj_mlp", "proj_out")
    names = [name for name, _ in pipe.transformer.named_modules() if "blocks" in name and name.endswith(parts)]
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    found = latents(pipe)
    ralu.disable(pipe)
    by_hand(pipe.transformer, cache)
    torch.testing.assert_close(found, latents(pipe, num_inference_steps=4), **close)


@pytest.mark.parametrize("score", ["attention", "norm"])
def test_joined_projections(score):
    pipe = tiny.flux()
    ralu.enable(pipe, "stock-4", cache=replace(MILD, warmup=1, score=score))
    expected = latents(pipe)
    pipe.transformer.fuse_qkv_projections()
    torch.testing.assert_close(latents(pipe), expected, **close)


def test_compiled_blocks():
    """A step that keeps nothing runs the compiled block, and no step has it compiled anew."""
    pipe = tiny.shallow(tiny.flux())
    ralu.enable(pipe, "stock-4", cache=ToCa(interval=3, warmup=2))
    expected = latents(pipe)
    pipe.transformer.single_transformer_blocks[0].compile(backend="eager")
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    torch.testing.assert_close(latents(pipe), expected, **close)
    assert graphs["unique_graphs"] == 1
    latents(pipe)
    assert graphs["unique_graphs"] == 1


def test_skip_layer_guidance_has_a_history_of_its_own():
    pipe = tiny.sd3()
    call = {"guidance_scale": 3.5, "skip_guidance_layers": [1], "num_inference_steps": 6}
    call |= {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    plain = latents(pipe, **call)
    assert torch.equal(latents(ralu.enable(pipe, "stock-6", cache="toca(interval=1)"), **call), plain)
    ralu.enable(pipe, "stock-6", cache=ToCa(interval=3, warmup=1, cache_ratio=0, layer_weight=0))
    assert 1e-4 < (latents(pipe, **call) - plain).abs().max() < 0.5


# ---- memory ----


def storages(blocks):
    for block in blocks.values():
        values = [*block.kept.values()]
        for tokens in block.tokens.values():
            values += [tokens.scores, tokens.age]
        for value in values:
            yield from (x for x in (value if isinstance(value, tuple) else (value,)) if x is not None)


def text_tokens(pipe):
    seen = []
    hook = pipe.transformer.context_embedder.register_forward_hook(lambda *given: seen.append(given[2].shape[1]))
    latents(pipe, num_inference_steps=1)
    hook.remove()
    return seen[0]


def test_what_is_kept_is_as_much_as_the_formula_says_and_nothing_in_the_end(stock):
    steps, cache, found = 7, replace(MILD, interval=4), []

    def look(pipe, step, timestep, tensors):
        found.append(sum(x.untyped_storage().nbytes() for blocks in kept(pipe) for x in storages(blocks)))
        return tensors

    text = text_tokens(stock)
    ralu.enable(stock, f"stock-{steps}", cache=cache)
    latents(stock, prompt=tiny.PROMPTS[:2], seeds=(1, 2), callback_on_step_end=look)
    ralu.disable(stock)
    elements = [cache.kept(stock.transformer, progress, 2, 64, text) for progress in Progress.of((steps,))[0]]
    assert [bool(number) for number in elements] == [False, True, True, True, True, True, True]  # during a step
    assert found == [0] + [4 * number for number in elements[1:4]] + [0] + [4 * elements[5]] + [0]  # after it


def test_the_peak_of_a_run_is_the_stock_one_and_what_is_kept(stock, monkeypatch):
    """And queries and keys, three times each, and a few rows of the map, which as a whole would be far more."""
    text = text_tokens(stock)
    queries, rows = (64 + text) * 32, 2 * (64 + text) * 4
    monkeypatch.setattr(toca_block, "_WEIGHTS", rows)
    peaks = {}
    for cache in (None, MILD):
        ralu.enable(stock, "stock-4", cache=cache)
        with LiveBytes(1) as memory:
            latents(stock)
        peaks[cache] = memory.peak
    ralu.disable(stock)
    formula = MILD.kept(stock.transformer, Progress.of((4,))[0][1], 1, 64, text)
    assert 4 * formula / 2 < peaks[MILD] - peaks[None] < 4 * (formula + 6 * queries + 4 * rows)


# ---- wrong options ----


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("interval", [0, -1, 2.5, True, None, "3"], "interval must be"),
        ("warmup", [0, 1.0, False, None], "warmup must be"),
        ("cache_ratio", [-0.1, 1.1, "0.9", None, True, float("nan")], "cache_ratio must be"),
        ("score", ["attn", "", None, 3], "score must be"),
        ("staleness", [-1, float("inf"), "1", None], "staleness must be"),
        ("layer_weight", [-0.5, None, float("nan")], "layer_weight must be"),
        ("stream_weight", [-0.5, 1.5, None], "stream_weight must be"),
    ],
)
def test_wrong_options(option, values, message):
    for value in values:
        with pytest.raises((TypeError, ValueError), match=message):
            ToCa(**{option: value})


def test_in_names(stock):
    scheduler = stock.scheduler
    for name, message in (("toca(ratio=2)", "toca has no option 'ratio'"), ("toca(cache_ratio=2)", "cache_ratio must")):
        with pytest.raises(ValueError, match=message):
            ralu.enable(stock, cache=name)
    assert stock.scheduler is scheduler and not list(hooks_of(stock.transformer))
    assert str(ralu.Method.parse("stock-40+toca(interval=5,score=norm)")) == "stock-40+toca(interval=5,score=norm)"
