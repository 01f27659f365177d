"""What Z-Image alone has: captions of any length, lists of latents, guidance that may stop on the way."""

import plain
import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_z_image import RopeEmbedder

import ralu
from ralu.families.z_image import StripRope
from ralu.presets import PRESETS, SOLVED
from ralu.schedule import shifted

PROMPTS = tiny.PROMPTS
SHORT = tiny.FAMILIES["z_image"].short
close = dict(rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def stock():
    return tiny.z_image()


def test_whole_positions_are_the_stock_ones_bit_for_bit():
    arguments = {"theta": 256.0, "axes_dims": [32, 48, 48], "axes_lens": [1024, 512, 512]}
    stock, ours = RopeEmbedder(**arguments), StripRope(**arguments)
    places = torch.stack([torch.randint(1, 500, (96,), dtype=torch.int32) for _ in range(3)], dim=1)
    expected = stock(places)
    assert torch.equal(ours(places), expected)
    strips = places.clone().view(2, 48, 3)
    strips[:, :40, 1:] = 0  # what the model makes of a strip does not matter, and padding stays
    ours.positions = places.view(2, 48, 3)[:, :40, 1:].float()
    assert torch.equal(ours(strips.view(96, 3)), expected)
    assert torch.equal(ours(places), expected)  # the captions', which come next


@pytest.mark.serves("guidance", "ZImagePipeline")
def test_without_guidance_and_where_it_stops(stock):
    """Turbo is called once for each image; `cfg_truncation` halves the list in the later steps."""
    ralu.enable(stock, SHORT)
    lengths, call = [], {"seeds": (5, 6), "prompt": PROMPTS[:2]}
    hook = stock.transformer.register_forward_hook(lambda module, args, out: lengths.append(len(out[0])))
    tiny.generate(stock, guidance_scale=0.0, **call)
    halfway = 1 - SHORT.sigmas(2)[1] - 1e-3
    batch = tiny.generate(stock, cfg_truncation=halfway, **call)
    levels = [level for stage in (1, 2, 3) for level in SHORT.sigmas(stage)[:-1]]
    assert lengths == [2] * 6 + [2 if 1 - level > halfway else 4 for level in levels]
    assert {*lengths[6:]} == {2, 4} and lengths[8:10] == [4, 2]  # within a stage too
    for i in range(2):
        one = tiny.generate(stock, PROMPTS[i], (5 + i,), cfg_truncation=halfway)
        torch.testing.assert_close(batch[i : i + 1], one, **close)
    hook.remove()
    ralu.disable(stock)


def test_normalised_guidance(stock):
    """The norm is of a whole image, which has other tokens in every stage."""
    ralu.enable(stock, SHORT)
    plain = tiny.generate(stock)
    batch = tiny.generate(stock, PROMPTS, seeds=(0, 1, 2), cfg_normalization=0.9)
    torch.testing.assert_close(batch[:1], tiny.generate(stock, cfg_normalization=0.9), **close)
    assert (batch[:1] - plain).abs().max() > 1e-3
    ralu.disable(stock)


@pytest.mark.refuses("token counts of its own for every image", "ZImagePipeline")
def test_thresholds_serve_one_image_at_a_time(stock):
    plain.check_thresholds_serve_one_image_at_a_time(stock, SHORT)


def test_half_precision_models_have_latents_in_float32(stock):
    stock.to(torch.bfloat16)
    ralu.enable(stock, SHORT)
    latents = tiny.generate(stock, output_type="latent")
    assert latents.dtype == torch.float32 and latents.isfinite().all()
    ralu.disable(stock).to(torch.float32)


def test_presets_are_solved_for_the_models_own_shift(stock):
    """3 for Turbo and 6 for the undistilled model, by their schedulers' configurations."""
    assert ralu.enable(stock).scheduler.schedule == ralu.solve((1, 2, 3), (0.3, 0.45, 1.0), 3.0)
    assert SOLVED["zimage-2x"].ends == PRESETS["flux-5x"].ends
    ralu.disable(stock).scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    for name in ("zimage-5x", "zimage-7x"):
        flux = PRESETS[name.replace("zimage", "flux")]
        same_share = [1 - shifted(shifted(1 - end, 1 / 3), 6.0) for end in flux.ends]
        assert SOLVED[name].steps == flux.steps and SOLVED[name].ends == pytest.approx(same_share, abs=0.001)
        assert ralu.enable(stock, name).scheduler.schedule == ralu.solve(flux.steps, SOLVED[name].ends, 6.0)
    ralu.disable(stock).scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
