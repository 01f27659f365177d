"""What Qwen-Image alone has: centred positions, prompts of different lengths, a schedule with a terminal."""

import math

import plain
import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

import ralu
from ralu.families.qwen_image import BatchedRope, Places
from ralu.presets import PRESETS, SOLVED, known_shift
from ralu.schedule import own_shift, shifted, single
from ralu.stages import raster

PROMPTS = tiny.PROMPTS
SHORT = tiny.FAMILIES["qwen_image"].short
close = dict(rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def stock():
    return tiny.qwen_image()


@pytest.mark.parametrize("grid", [(8, 8), (5, 12), (9, 7), (1, 2)])
def test_whole_positions_are_the_stock_ones_bit_for_bit(grid):
    stock, ours = (kind(theta=10000, axes_dim=[16, 56, 56], scale_rope=True) for kind in (QwenEmbedRope, BatchedRope))
    (h, w), device = grid, torch.device("cpu")
    expected = stock([[(1, h, w)]], max_txt_seq_len=7, device=device)
    middle = torch.tensor([(h + 1) // 2, (w + 1) // 2])
    table, text = ours(Places(raster(grid, 2, device) - middle, max(h // 2, w // 2)), max_txt_seq_len=7, device=device)
    assert torch.equal(table.table, expected[0].expand(2, -1, -1)) and torch.equal(text, expected[1])
    for a, b in zip(ours([[(1, h, w)]], max_txt_seq_len=7, device=device), expected, strict=True):
        assert torch.equal(a, b)


def test_a_full_stage_is_the_stock_model(stock):
    ralu.enable(stock, single(3, 2.0))
    got = tiny.generate(stock, output_type="latent")
    levels = stock.scheduler.sigmas[:-1].tolist()
    ralu.disable(stock)
    plain, stock.scheduler = stock.scheduler, FlowMatchEulerDiscreteScheduler()
    expected = tiny.generate(stock, output_type="latent", sigmas=levels)
    stock.scheduler = plain
    torch.testing.assert_close(got, expected, **close)


@pytest.mark.serves("guidance", "QwenImagePipeline")
def test_prompts_of_different_lengths_in_a_batch(stock):
    """The stock attention masks what pads them."""
    embeds = tiny.prompted(stock, PROMPTS)["prompt_embeds"]
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, 3:] = 0
    ralu.enable(stock, SHORT)
    call = {"negative_prompt_embeds": embeds / 2, "prompt_embeds_mask": mask}
    batch = tiny.generate(stock, PROMPTS, seeds=(5, 6, 7), **call)
    one = {"prompt_embeds": embeds[:1, :3], "negative_prompt_embeds": embeds[:1] / 2}
    torch.testing.assert_close(batch[:1], tiny.generate(stock, PROMPTS[0], seeds=(5,), **one), **close)
    ralu.disable(stock)


@pytest.mark.refuses("token counts of its own for every image", "QwenImagePipeline")
def test_thresholds_serve_one_image_at_a_time(stock):
    plain.check_thresholds_serve_one_image_at_a_time(stock, SHORT)


def test_the_terminal_is_for_stock_schedules(stock):
    assert stock.scheduler.config.shift_terminal == 0.02
    expected = tiny.generate(stock, num_inference_steps=5)
    levels = stock.scheduler.sigmas.tolist()
    assert levels[-2:] == pytest.approx([0.02, 0])
    ralu.enable(stock, "stock-5")
    assert torch.equal(tiny.generate(stock), expected)
    ralu.enable(stock, SHORT)
    tiny.generate(stock)
    staged = [level for stage in (1, 2, 3) for level in SHORT.sigmas(stage)[:-1]]
    assert stock.scheduler.sigmas.tolist() == pytest.approx([*staged, 0])
    assert ralu.disable(stock).scheduler.config.shift_terminal == 0.02


def test_how_far_the_terminal_moves_fifty_steps():
    """By what the scheduler's documentation says, at most by itself."""
    moved = [FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=end) for end in (None, 0.02)]
    for scheduler in moved:
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 50, 50).tolist(), mu=math.log(2.0))
    plain, stretched = (scheduler.sigmas for scheduler in moved)
    assert 0.01 < (plain - stretched).abs().max() < 0.02


def test_presets_are_solved_for_the_shift_at_1024_pixels(stock):
    shift = math.exp(calculate_shift(64 * 64, 256, 8192, 0.5, 0.9))
    for name in ("qwen-5x", "qwen-7x"):
        assert (
            SOLVED[name].shift
            == own_shift(stock.scheduler.config, known_shift(name))
            == pytest.approx(shift, abs=0.005)
        )
        flux = PRESETS[name.replace("qwen", "flux")]
        same_share = [1 - shifted(shifted(1 - end, 1 / 3), shift) for end in flux.ends]
        assert SOLVED[name].steps == flux.steps and SOLVED[name].ends == pytest.approx(same_share, abs=0.001)
        assert ralu.enable(stock, name).scheduler.schedule == ralu.solve(flux.steps, SOLVED[name].ends, 2.0)
    assert ralu.enable(stock).scheduler.config.preset == "qwen-5x"
    ralu.disable(stock)


def test_the_research_variant_is_of_flux(stock):
    with pytest.raises(ValueError, match="variant must be 'paper' for QwenImageTransformer2DModel"):
        ralu.enable(stock, cache="delta-dit(variant=flux-research)")


def test_transformers_of_the_editing_pipelines_are_refused(stock):
    stock.transformer.register_to_config(zero_cond_t=True)
    with pytest.raises(ValueError, match="zero_cond_t False, got True"):
        ralu.enable(stock)
    stock.transformer.register_to_config(zero_cond_t=False)
