"""Bottleneck Sampling and SPEED, which RALU is compared with, as presets: against the methods written out by hand."""

from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from plain import calls_of, steps_of

import ralu
from ralu.caches import CACHES, TaylorSeer
from ralu.method import Method
from ralu.presets import BASELINES
from ralu.schedule import Schedule, bottleneck, resample_noise, shifted
from ralu.stages import seeds_of
from ralu_kernels import reference

# The paper's cumulative steps (supplement B.2.1), and the strengths that make their work the paper's.
BOTTLENECK = {
    "bottleneck-flux-5x": ([4, 16, 21], (0.85, 0.5), (4, 10, 2)),
    "bottleneck-flux-7x": ([3, 11, 15], (0.85, 0.5), (3, 6, 2)),
    "bottleneck-sd3-2x": ([6, 24, 31], (0.95, 0.5), (6, 17, 3)),
    "bottleneck-sd3-3x": ([4, 16, 20], (0.95, 0.5), (4, 11, 2)),
}
# FLUX's own, by its pipeline's rule for 4096 and for 1024 tokens.
FULL, LOW = (np.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)) for tokens in (4096, 1024))


def names(family, kind):
    """The presets of a family, the cheapest last."""
    return [name for name in BASELINES if name.startswith(kind) and family.presets[0].split("-")[0] in name]


def latents(pipe, **call):
    return tiny.generate(pipe, output_type="latent", **call)


# ---- numbers ----


@pytest.mark.parametrize("name", BOTTLENECK)
def test_bottlenecks_stages_are_the_ends_of_whole_runs(name):
    """A stage's noise levels are the last of a run of all its steps, under its own shift."""
    totals, strengths, calls = BOTTLENECK[name]
    schedule = ralu.preset(name)
    assert [stage.resolution for stage in schedule.stages] == ["full", "low", "full"]
    assert schedule.steps == calls and schedule.ends == (1, 1, 1)
    shifts = (FULL, LOW, FULL) if "flux" in name else (3, 3, 3)
    for k, (of, n, h) in enumerate(zip(np.diff([0, *totals]), calls, shifts, strict=True), 1):
        u = np.linspace(1, 0, of + 1)
        np.testing.assert_allclose(schedule.sigmas(k), (h * u / (1 + (h - 1) * u))[-n - 1 :], atol=1e-12)
    assert all(transition.interpolation == "lanczos" for transition in schedule.transitions)
    # Read literally a stage makes all of its steps, from its strength on.
    literal = bottleneck(np.diff([0, *totals]).tolist(), strengths, shifts, truncated=False)
    assert literal.steps == tuple(np.diff([0, *totals]))
    for k, strength in enumerate(strengths, 2):
        assert literal.sigmas(k)[0] == pytest.approx(shifted(strength, shifts[k - 1]))


def test_what_is_no_bottleneck_is_refused():
    right = {"steps": (4, 6, 5), "strengths": (0.8, 0.5), "shifts": (1.0, 1.0, 1.0)}
    for change, words in (
        ({"steps": (4, 6)}, "odd number of each, and strengths one fewer, got 2, 3 and 2"),
        ({"strengths": (0.8,)}, "got 3, 3 and 1"),
        ({"strengths": (0.8, 1.1)}, r"strengths must lie in \(0, 1\], got 1.1"),
        ({"strengths": (0.8, "1")}, r"strengths must lie in \(0, 1\], got '1'"),
        ({"strengths": (0.8, 0.1)}, "leave each stage a step: 0.1 of 5 is none"),
        ({"steps": (4, 0, 5)}, "steps must be whole numbers of at least 1, got 0"),
        ({"shifts": (1.0, -1.0, 1.0)}, "shifts must be positive"),
        ({"interpolation": "area"}, "interpolation must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            bottleneck(**right | change)


def test_noise_is_added_up_to_the_level_of_the_next_stage():
    """Of a model that knows the image: what is left without its share is white, of variance sigma²."""
    image, found = torch.tensor([0.7, -1.2]).view(2, 1, 1), []

    def velocity(x, sigma, layout):
        found.append((layout.stage, sigma, (x - (1 - sigma) * image).double()))
        return (x - image) / sigma

    noise = torch.randn(2, 64 * 64, 16, generator=torch.Generator().manual_seed(0))
    ralu.sample(velocity, noise, (64, 64), "bottleneck-flux-7x")
    for stage in (2, 3):
        _, sigma, rest = next(of for of in found if of[0] == stage)
        assert sigma == pytest.approx(BASELINES["bottleneck-flux-7x"].sigmas(stage)[0])
        assert rest.var().item() == pytest.approx(sigma**2, rel=0.03) and abs(rest.mean()) < 0.02
        assert abs((rest[:, 1:] * rest[:, :-1]).mean() / sigma**2) < 0.02
    fresh = [next(of for of in found if of[0] == stage)[2] / BASELINES["bottleneck-flux-7x"].sigmas(stage)[0]
             for stage in (1, 3)]  # fmt: skip
    assert abs((fresh[0] * fresh[1]).mean()) < 0.02


# ---- whole runs ----


@torch.no_grad()
def velocity_of(pipe, prompt, guidance=3.5):
    """(1, 4, H, W) and its noise level to the velocity: the stock transformer at any whole resolution."""
    transformer, latent_ids = pipe.transformer, getattr(pipe, "_prepare_latent_image_ids", None)
    if latent_ids is not None:
        embeds, pooled, text_ids = pipe.encode_prompt(prompt, prompt, max_sequence_length=16)

        def velocity(x, sigma):
            height, width = x.shape[-2:]
            tokens = F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
            v = transformer(
                hidden_states=tokens, timestep=torch.tensor([sigma]), guidance=None, pooled_projections=pooled,
                encoder_hidden_states=embeds, txt_ids=text_ids, return_dict=False,
                img_ids=latent_ids(1, height // 2, width // 2, x.device, x.dtype),
            )[0]  # fmt: skip
            return F.pixel_shuffle(v.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)

        return velocity
    text, no_text, pooled, no_pooled = pipe.encode_prompt(prompt, None, None, max_sequence_length=16)

    def guided(x, sigma):
        t = torch.tensor([1000 * sigma])
        without, with_ = (
            transformer(x, *given, t, return_dict=False)[0] for given in ((no_text, no_pooled), (text, pooled))
        )
        return without + guidance * (with_ - without)  # fmt: skip

    return guided


def normals(key, shape, stage):
    """Four values for each element of a shape (C, h, w), (4, C, h, w)."""
    count = torch.arange(int(np.prod(shape)))
    return torch.stack(reference.randn4x(key, count, stage, 0)).view(4, *shape)


def euler(x, velocity, levels):
    for sigma, following in pairwise(levels):
        x = x + (following - sigma) * velocity(x, sigma)
    return x


@torch.no_grad()
def bottleneck_by_hand(velocity, noise, key, stages):
    """stages: (side as a share, steps, of how many, shift) of each."""
    x, (height, width) = noise, noise.shape[-2:]
    for k, (share, n, of, h) in enumerate(stages, 1):
        u = np.linspace(n / of, 0, n + 1)
        levels = (h * u / (1 + (h - 1) * u)).tolist()
        if k > 1:  # the stage before ended at its clean estimate
            size = int(width * share), int(height * share)
            planes = [np.asarray(Image.fromarray(p.numpy()).resize(size, Image.Resampling.LANCZOS)) for p in x[0]]
            eps = normals(key, (4, size[1] // 2, size[0] // 2), k)
            fresh = F.pixel_shuffle(eps.transpose(0, 1).flatten(0, 1)[None], 2)
            x = (1 - levels[0]) * torch.from_numpy(np.stack(planes))[None] + levels[0] * fresh
        x = euler(x, velocity, levels)
    return x


@torch.no_grad()
def speed_by_hand(velocity, noise, key, steps, end, shifts):
    """The low image's Haar coefficients, and new details, at a noise level that suits both."""

    def levels(first, last, n, h):
        u = np.linspace(*(s / (h - (h - 1) * s) for s in (first, last)), n + 1)
        return (h * u / (1 + (h - 1) * u)).tolist()

    sigma = 1 - end
    low = euler(noise[..., ::2, ::2], velocity, levels(1, sigma, steps[0], shifts[0]))
    eps = normals(key, low.shape[1:], 2)
    details = F.pixel_shuffle((eps - eps.mean(0)).transpose(0, 1).flatten(0, 1)[None], 2)
    up = low.repeat_interleave(2, -1).repeat_interleave(2, -2)
    x, start = (up + 2 * sigma * details) / (1 + sigma), 2 * sigma / (1 + sigma)
    return euler(x, velocity, levels(start, 0, steps[1], shifts[1]))


def test_runs_equal_the_methods_written_out_by_hand(stock, family):
    noise = torch.randn(1, 4, 32, 48, generator=torch.Generator().manual_seed(3))
    key, velocity = (
        seeds_of(F.pixel_unshuffle(noise, 2).flatten(2).transpose(1, 2))[0],
        velocity_of(stock, tiny.PROMPTS[0]),
    )
    flux = "flux-5x" in family.presets
    full, low = (FULL, LOW) if flux else (3, 3)
    of = (3, 8, 4) if flux else (4, 12, 4)
    expected, tokens = {}, {}
    for name in (names(family, "bottleneck")[-1], names(family, "speed")[-1]):
        if name in BOTTLENECK:
            steps = BOTTLENECK[name][2]
            stages = zip((1, 0.5, 1), steps, of, (full, low, full), strict=True)
            expected[name] = bottleneck_by_hand(velocity, noise, key, stages)
            tokens[name] = [n for n, calls in zip((384, 96, 384), steps, strict=True) for _ in range(calls)]
        else:
            steps, end = ((6, 5), 0.3) if flux else ((8, 6), 0.3)
            expected[name] = speed_by_hand(velocity, noise, key, steps, end, (low, full))
            tokens[name] = [96] * steps[0] + [384] * steps[1]
    for name, by_hand in expected.items():
        ralu.enable(stock, name)
        with calls_of(stock.transformer, lambda args, given: given["hidden_states"].shape) as shapes:
            got = latents(stock, latents=family.latents(noise), height=64, width=96)
        ralu.disable(stock)
        assert [shape[1] if flux else shape[2] * shape[3] // 4 for shape in shapes] == tokens[name]
        torch.testing.assert_close(family.image(got, 64, 96), by_hand, rtol=0, atol=1e-4)


def test_one_stage_is_the_stock_pipeline(stock, family):
    """Under the shift that FLUX's own pipeline has at that size, and SD3's."""
    tokens = 16 * 16
    shift = np.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)).item() if "flux-5x" in family.presets else 3.0
    plain = latents(stock, sigmas=np.linspace(1, 1 / 6, 6).tolist(), num_inference_steps=6)
    ralu.enable(stock, bottleneck((6,), (), (shift,)))
    got = latents(stock)
    ralu.disable(stock)
    torch.testing.assert_close(got, plain, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["bottleneck", "speed"])
def test_caches_begin_anew_in_every_stage(stock, family, kind):
    name = names(family, kind)[-1]
    schedule = BASELINES[name]
    plain = latents(ralu.enable(stock, name))
    begins = {sum(schedule.steps[:k]) for k in range(len(schedule.steps))}
    query = stock.transformer.transformer_blocks[0].attn.to_q
    for cache in CACHES:
        method = f"{name}+{cache}" + "(start=1)" * (cache == "ras")
        ralu.enable(stock, method)
        computed = steps_of(stock, query, lambda: latents(stock))
        assert begins <= {*computed}, method
    taylor = TaylorSeer(interval=2, warmup=1)
    ralu.enable(stock, f"{name}+taylorseer(interval=2,warmup=1)")
    computed = steps_of(stock, query, lambda: latents(stock))
    full = [k for first, n in zip(sorted(begins), schedule.steps, strict=True) for k in range(first, first + n, 2)]
    assert sorted({*computed}) == full and taylor.is_full(2) and not taylor.is_full(1)
    ralu.enable(stock, f"{name}+taylorseer(interval=1)")
    assert torch.equal(latents(stock), plain)
    ralu.disable(stock)


# ---- as presets ----

NONE_OF_THEM = [
    {"ratio": 0.3}, {"threshold": 0.3}, {"regions": "gradient"}, {"regions": np.ones((4, 4))}, {"granularity": "token"},
    {"kept_noise": "release"}, {"matching": "off"}, {"matching": "snr", "upsampler": "bicubic"},
]  # fmt: skip


@pytest.mark.parametrize("options", NONE_OF_THEM, ids=lambda options: "+".join(options))
def test_options_of_regions_are_refused(options):
    words = f"bottleneck-flux-5x has whole stages alone and has no .*{next(iter(options))}"
    with pytest.raises(ValueError, match=words):
        ralu.sample(None, torch.zeros(1, 16, 4), (4, 4), "bottleneck-flux-5x", **options)
    with pytest.raises(ValueError, match=words):
        ralu.RaluScheduler("bottleneck-flux-5x", **options)
    with pytest.raises(ValueError, match=words):
        Method("bottleneck-flux-5x", ralu.Options(**options))
    if options.keys() <= {"ratio", "matching", "upsampler"}:
        with pytest.raises(ValueError, match=words):
            ralu.preset("bottleneck-flux-5x", **options)


def test_they_are_methods_as_any_other():
    method = Method.parse("speed-flux-7x(solver=ab2,seeds=3,backend=reference)+taylorseer(interval=3)")
    assert Method.parse(str(method)) == method and method.preset == "speed-flux-7x" and not method.has_regions
    with pytest.raises(ValueError, match=r"speed-flux-7x has no option 'ratio'; it has solver, backend, seeds"):
        Method.parse("speed-flux-7x(ratio=0.3)")
    with pytest.raises(ValueError, match="speed-flux-7x has whole stages alone, so ratio must be None"):
        ralu.estimate("flux-dev", "speed-flux-7x", ratio=0.3)
    parts = [part for part in ralu.estimate("flux-dev", "bottleneck-flux-5x").parts if "stage" in part.name]
    assert [(part.calls, part.tokens) for part in parts] == [(4, 4096), (10, 1024), (2, 4096)]
    assert not any(part.name == "preview" for part in ralu.estimate("flux-dev", "speed-flux-5x").parts)


def test_they_need_no_decoder_and_come_back_from_a_saved_configuration(family, tmp_path):
    pipe, (first, *_) = family.make(), names(family, "speed")
    pipe.vae = None
    pipe.vae_scale_factor = 2  # of the decoder that it had
    got = latents(ralu.enable(pipe, first))
    pipe.scheduler.save_pretrained(tmp_path)
    assert ralu.RaluScheduler.from_pretrained(tmp_path).schedule == BASELINES[first]
    assert got.isfinite().all()
    with pytest.raises(ValueError, match="regions='canny' needs a VAE"):
        ralu.enable(pipe, family.presets[0])


def test_a_schedule_of_ones_own(stock, family):
    """Five stages, resized otherwise, both ways to read the steps."""
    for truncated in (False, True):
        chosen = bottleneck(
            (2, 2, 2, 2, 2), (0.9, 0.7, 0.5, 0.5), (2.0,) * 5, truncated=truncated, interpolation="bilinear"
        )
        assert isinstance(chosen, Schedule) and chosen.transitions[0] == resample_noise(chosen.starts[1], "bilinear")
        ralu.enable(stock, chosen)
        with calls_of(stock.transformer, lambda args, given: given["hidden_states"].shape[1:]) as shapes:
            latents(stock)
        ralu.disable(stock)
        assert len(shapes) == (6 if truncated else 10) and len({*shapes}) == 2
