"""What FLUX.2 alone has: dev beside klein, presets for a shift of its own."""

import math

import pytest
import tiny
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

import ralu
from ralu.cli import main
from ralu.families import family_of
from ralu.presets import PRESETS, SOLVED, known_shift
from ralu.regions import gradient
from ralu.schedule import own_shift, shifted

PROMPTS = tiny.PROMPTS
close = dict(rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def stock():
    return tiny.flux2()


@pytest.fixture
def pipe(stock):
    yield ralu.enable(stock, tiny.FAMILIES["flux2"].short)
    ralu.disable(stock)


@pytest.mark.serves("a batch equals its single runs", "Flux2Pipeline")
def test_dev_in_a_batch_without_a_vae():
    pipe = tiny.flux2(dev=True)
    call = {"output_type": "latent", "height": 32, "width": 48}
    whole = tiny.generate(pipe, num_inference_steps=3)
    assert tiny.generate(ralu.enable(pipe, tiny.FAMILIES["flux2"].short)).shape == whole.shape
    ralu.disable(pipe)
    assert torch.equal(tiny.generate(pipe, num_inference_steps=3), whole)
    pipe.vae = None
    with pytest.raises(ValueError, match="regions='canny' needs a VAE"):
        ralu.enable(pipe)
    ralu.enable(pipe, tiny.FAMILIES["flux2"].short, regions="gradient")
    batch = tiny.generate(pipe, PROMPTS, seeds=(5, 6, 7), **call)
    assert batch.shape == (3, 8 * 12, 16)
    for i in range(3):
        torch.testing.assert_close(batch[i : i + 1], tiny.generate(pipe, PROMPTS[i], seeds=(5 + i,), **call), **close)
    assert (batch[0] - tiny.generate(pipe, PROMPTS[0], seeds=(5,), guidance_scale=1.0, **call)[0]).abs().max() > 1e-4


@pytest.mark.serves("token counts of its own for every image", "Flux2KleinPipeline")
def test_images_of_a_batch_may_differ_in_tokens(stock):
    scores = []
    ralu.enable(stock, tiny.FAMILIES["flux2"].short, regions=lambda x0, g: scores.append(gradient(x0, g)) or scores[-1])
    tiny.generate(stock, PROMPTS, seeds=(5, 6, 7))
    threshold = scores[0].quantile(0.7).item()
    assert len({int((row >= threshold).sum()) for row in scores[0]}) > 1
    ralu.enable(stock, tiny.FAMILIES["flux2"].short, regions="gradient", threshold=threshold)
    batch = tiny.generate(stock, PROMPTS, seeds=(5, 6, 7))
    for i in range(3):
        torch.testing.assert_close(batch[i : i + 1], tiny.generate(stock, PROMPTS[i], seeds=(5 + i,)), **close)
    ralu.disable(stock)


def test_copies_of_whole_tokens_need_no_normalisation(pipe, monkeypatch):
    """Each value stays in its channel. Copies of latent pixels do not."""
    images = {}
    for granularity in ("token", "pixel"):
        ralu.enable(pipe, tiny.FAMILIES["flux2"].short, granularity=granularity, regions="grid")
        with_norms = tiny.generate(pipe)
        monkeypatch.setattr(type(family_of(pipe)), "normalised", lambda self, pipe: None)
        images[granularity] = (tiny.generate(pipe) - with_norms).abs().max()
        monkeypatch.undo()
    assert images["token"] < 2e-5 and images["pixel"] > 1e-3


def test_half_precision(stock):
    stock.to(torch.bfloat16)
    assert tiny.generate(ralu.enable(stock, tiny.FAMILIES["flux2"].short)).isfinite().all()
    ralu.disable(stock).to(torch.float32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trim_text": True}, "trim_text False: the blocks of a Flux2Transformer2DModel cannot be fused"),
        ({"preset": "flux-5x"}, "preset must be one of flux2-5x, flux2-7x, klein-4 or a Schedule, got 'flux-5x'"),
    ],
)
def test_what_is_not_served_is_said(stock, options, words):
    scheduler = stock.scheduler
    with pytest.raises(ValueError, match=words):
        ralu.enable(stock, **options)
    assert stock.scheduler is scheduler


@pytest.mark.parametrize(("name", "steps"), [("flux2-5x", 50), ("flux2-7x", 50), ("klein-4", 4)])
def test_presets_are_solved_for_the_shift_at_1024_pixels(stock, name, steps):
    shift = math.exp(compute_empirical_mu(64 * 64, steps))
    assert SOLVED[name].shift == own_shift(stock.scheduler.config, known_shift(name)) == pytest.approx(shift, abs=0.005)
    flux = ralu.preset("distilled-4") if name == "klein-4" else PRESETS[name.replace("flux2", "flux")]
    same_share = [1 - shifted(shifted(1 - end, 1 / 3), shift) for end in flux.ends]
    assert SOLVED[name].steps == flux.steps and SOLVED[name].ends == pytest.approx(same_share, abs=0.001)
    expected = ralu.solve(flux.steps, SOLVED[name].ends, SOLVED[name].shift)
    assert ralu.enable(stock, name).scheduler.schedule == expected
    ralu.disable(stock)


def test_klein_is_told_from_its_base_by_its_configuration(stock, tmp_path, capsys):
    assert ralu.enable(stock).scheduler.config.preset == "flux2-5x"
    klein = type(stock)(**{**ralu.disable(stock).components, "is_distilled": True})
    klein.set_progress_bar_config(disable=True)
    assert ralu.enable(klein).scheduler.config.preset == "klein-4"
    calls = []
    hook = klein.transformer.register_forward_hook(lambda *_: calls.append(1))
    assert tiny.generate(klein).isfinite().all() and len(calls) == klein.num_timesteps == 4  # without guidance
    hook.remove()
    klein.save_pretrained(tmp_path)
    model = ralu.models.find_model(str(tmp_path))
    assert (model.presets[0], model.distilled, model.latent, model.stock_steps) == ("klein-4", True, 2, 4)
    size = {"height": 64, "width": 64, "text_tokens": 5}
    schedule = ralu.schedule_for(2, klein, **size)
    assert schedule == ralu.schedule_for(2, tmp_path, **size)
    assert schedule.ends == SOLVED["klein-4"].ends
    assert schedule.shifts == ralu.solve(schedule.steps, schedule.ends, 9.89).shifts
    ralu.disable(klein)
    assert (
        main(["calibrate", "teacache", "--model", str(tmp_path), "--size", "64", "-o", str(tmp_path / "x.json")]) == 2
    )
    assert "not for a Flux2KleinPipeline, it serves flux, sd3" in capsys.readouterr().err
