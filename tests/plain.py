"""Transformers in three plain pieces, for methods written out by hand: before the blocks, the blocks, after them."""

from contextlib import contextmanager
from types import MethodType

import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel

import ralu
from ralu.regions import gradient


def before(model, given):
    """The streams of image and text, the vector of time and prompt, and what else the blocks are called with."""
    named = {"joint_attention_kwargs": given.get("joint_attention_kwargs")}
    if isinstance(model, QwenImageTransformer2DModel):
        hidden, text = (
            model.img_in(given["hidden_states"]),
            model.txt_in(model.txt_norm(given["encoder_hidden_states"])),
        )
        shapes = given["img_shapes"], text.device, text.shape[1]
        named |= {"encoder_hidden_states_mask": None, "image_rotary_emb": model.pos_embed(*shapes)}
        return hidden, text, model.time_text_embed(given["timestep"], hidden), named
    if isinstance(model, FluxTransformer2DModel):
        hidden, time = model.x_embedder(given["hidden_states"]), given["timestep"] * 1000
        named["image_rotary_emb"] = model.pos_embed(torch.cat([given["txt_ids"], given["img_ids"]]))
    else:
        hidden, time = model.pos_embed(given["hidden_states"]).contiguous(), given["timestep"]
    text = model.context_embedder(given["encoder_hidden_states"])
    return hidden, text, model.time_text_embed(time, given["pooled_projections"]), named


def blocks(model):
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]


def after(model, given, hidden, temb):
    tokens = model.proj_out(model.norm_out(hidden, temb))
    if not hasattr(model.pos_embed, "proj"):
        return (tokens,)
    *_, height, width = given["hidden_states"].shape
    grid = tokens.unflatten(1, (height // 2, width // 2)).unflatten(-1, (2, 2, -1))
    return (grid.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, height, width),)


@contextmanager
def instead(pipe, method):
    """Run a pipeline's transformer as `method(model, given, state, step)`.

    state: a dict for every kind of call (prompt, negative prompt, fewer layers) that is new in every stage of a run.
    step:  in the stage, from 0.
    """
    model, states = pipe.transformer, {}

    def forward(self, **given):
        index, layout = pipe.scheduler.step_index or 0, getattr(pipe.scheduler, "layout", None)
        stage = 1 if layout is None else layout.stage
        if stage != states.get("stage") or index < states["index"]:
            states.clear()
            states.update(stage=stage, first=index)
        states["index"] = index
        kind = given["encoder_hidden_states"].double().sum().item(), given.get("skip_layers") is not None
        return method(self, given, states.setdefault(kind, {}), index - states["first"])

    model.forward = MethodType(forward, model)
    try:
        yield
    finally:
        del model.forward


@contextmanager
def calls_of(module, record):
    """What `record(args, kwargs)` makes of a module's calls."""
    found = []
    hook = module.register_forward_pre_hook(lambda _, *call: found.append(record(*call)), with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def steps_of(pipe, module, run):
    """The steps, counted over the whole run, at which a module is called."""
    with calls_of(module, lambda *_: pipe.scheduler.step_index or 0) as steps:
        run()
    return steps


def hooks_left(pipe):
    modules = pipe.transformer.modules()
    registries = [module._diffusers_hook for module in modules if hasattr(module, "_diffusers_hook")]
    names = [name for registry in registries for name in registry.hooks]
    return names + [block for block in blocks(pipe.transformer) if "forward" in vars(block)]


def check_undone_after_an_exception(stock, family, cache, latents):
    """A run that fails leaves nothing to the next one, and neither does the cache to the stock pipeline."""
    plain_run = latents(stock, num_inference_steps=4)

    def fail(pipe, step, timestep, tensors):
        if step == 2:
            raise KeyError("stop")
        return tensors

    for preset in ("stock-4", family.presets[0]):
        whole = latents(ralu.enable(stock, preset, cache=cache))
        with pytest.raises(KeyError, match="stop"):
            latents(stock, callback_on_step_end=fail)
        assert torch.equal(latents(stock), whole)
        ralu.disable(stock)
        assert hooks_left(stock) == []
        assert torch.equal(latents(stock, num_inference_steps=4), plain_run)


def check_thresholds_serve_one_image_at_a_time(stock, schedule):
    """Where a batch must keep one number of tokens: refused in words, and alone what the same share makes."""
    scores = []
    ralu.enable(stock, schedule, regions=lambda x0, grid: scores.append(gradient(x0, grid)) or scores[-1])
    tiny.generate(stock, tiny.PROMPTS, seeds=(5, 6, 7))
    threshold = scores[0].quantile(0.7).item()
    ralu.enable(stock, schedule, regions="gradient", threshold=threshold)
    with pytest.raises(ValueError, match="with threshold= generate one at a time, or give ratio="):
        tiny.generate(stock, tiny.PROMPTS, seeds=(5, 6, 7))
    single = tiny.generate(stock, tiny.PROMPTS[0], seeds=(5,))
    share = (scores[0][0] >= threshold).float().mean().item()
    ralu.enable(stock, schedule, regions="gradient", ratio=share)
    torch.testing.assert_close(tiny.generate(stock, tiny.PROMPTS[0], seeds=(5,)), single, rtol=0, atol=2e-5)
    ralu.disable(stock)
