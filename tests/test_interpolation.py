"""Other upsamplers and kinds of matching: weights against PyTorch and the formula, moments against the flow's."""

import math
from functools import partial

import pytest
import tiny
import torch
import torch.nn.functional as F

import ralu
from ralu.interpolation import complete, resized, select, through_pixels, upsampled, weights
from ralu.layout import pack, strip, unpack
from ralu.options import Options
from ralu.presets import PRESETS
from ralu.schedule import SMOOTH, Schedule, Stage, match_noise, resample_noise, two_resolutions
from ralu.stages import Run
from ralu_kernels import plan_tokens, upsample_remaining, upsample_selected

GRANULARITIES = ("pixel", "token")


def lanczos(size):
    """Three lobes in float64: normalised over the pixels that exist."""
    out = torch.zeros(2 * size, size, dtype=torch.float64)
    for i in range(2 * size):
        for j in range(size):
            x = (i + 0.5) / 2 - (j + 0.5)
            if abs(x) < 3:
                out[i, j] = (
                    torch.sinc(torch.tensor(x, dtype=torch.float64)) * math.sin(math.pi * x / 3) / (math.pi * x / 3)
                )
    return out / out.sum(1, keepdim=True)


@pytest.mark.parametrize("size", [1, 2, 7, 16])
@pytest.mark.parametrize("kind", SMOOTH)
def test_weights(kind, size):
    impulses = torch.eye(size)[None, None]
    if kind == "lanczos":
        expected = lanczos(size)
    else:
        expected = F.interpolate(impulses, size=(2 * size, size), mode=kind, antialias=True)[0, 0].double()
    torch.testing.assert_close(weights(kind, size, 2 * size).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_interpolating_tokens_is_interpolating_their_image(kind, granularity):
    """Pixel granularity is PyTorch's interpolation of the latent, token granularity that of the grid of tokens."""
    h, w = 3, 5
    image = torch.randn(2, 4, 2 * h, 2 * w) if granularity == "pixel" else torch.randn(2, 16, h, w)

    def pack(planes):
        return (F.pixel_unshuffle(planes, 2) if granularity == "pixel" else planes).flatten(2).transpose(1, 2)

    larger = F.interpolate(image, scale_factor=2, mode=kind, antialias=True)
    got, _ = upsampled(pack(image), (h, w), kind, granularity)
    torch.testing.assert_close(got, pack(larger), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("grid, target", [((4, 6), (2, 3)), ((2, 3), (4, 6)), ((3, 5), (3, 5))])
def test_resizing_is_resizing_the_latent(grid, target, kind):
    latent = torch.randn(2, 4, 2 * grid[0], 2 * grid[1])
    size = 2 * target[0], 2 * target[1]
    expected = F.interpolate(latent, size=size, mode=kind, antialias=True)
    tokens = F.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2)
    got = resized(tokens, grid, target, kind)
    torch.testing.assert_close(got, F.pixel_unshuffle(expected, 2).flatten(2).transpose(1, 2), rtol=0, atol=1e-5)


def mixed_plan(batch, h, w):
    scores = torch.zeros(h, w)
    scores[0, 0] = scores[1, 1] = scores[1, 2] = scores[h - 1, w - 1] = 1.0
    return plan_tokens(scores.flatten().expand(batch, -1), (h, w), ratio=4 / (h * w))


def moments(kind, matching, granularity, stage, e=0.4, c=0.1, batch=6000):
    """Many samples of a transition of a flow at time e towards a known image, the transition, and the image."""
    h, w, channels = 3, 4, 8
    transition = match_noise("select", e, c, matching, kind)
    generator = torch.Generator().manual_seed(stage)
    plan, seed = mixed_plan(batch, h, w), torch.arange(batch) * 7919
    x1 = torch.linspace(-2, 2, channels // 4).repeat_interleave(4)  # a flat image: no upsampler changes it
    rows = h * w if stage == 2 else plan.source.shape[0] // batch
    x = e * x1 + (1 - e) * torch.randn(batch, rows, channels, generator=generator)
    if stage == 3:
        x = x.flatten(0, 1)
    if kind == "nearest":
        fused = upsample_selected if stage == 2 else upsample_remaining
        out = fused(x, plan, transition.scale, transition.noise_scale, transition.c, seed, granularity=granularity)
    else:
        out = (select if stage == 2 else complete)(x, plan, transition, seed, Options(granularity=granularity))
    out = out.view(batch, -1, channels).double()
    return out, transition, x1


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["nearest", *SMOOTH])
def test_the_signal_to_noise_ratio_is_the_flows_at_every_value(kind, granularity, stage):
    out, transition, x1 = moments(kind, "snr", granularity, stage)
    count = out.shape[0]
    std = 1 - transition.start
    assert ((out.mean(0) - transition.start * x1).abs() < 5 * std / math.sqrt(count)).all()
    assert ((out.var(0) / std**2 - 1).abs() < 5.5 * math.sqrt(2 / count)).all()


def test_snr_matching_leaves_the_covariance_wrong():
    """Siblings share a²·(1-e)²: c of their variance. With covariance matching nothing is shared."""
    shared = {}
    for matching in ("snr", "covariance"):
        out, transition, x1 = moments("nearest", matching, "token", 2)
        noise = (out - transition.start * x1) / (1 - transition.start)
        shared[matching] = (noise[:, 0] * noise[:, 1]).mean().item()  # the first two children of token 0
    assert shared["snr"] == pytest.approx(0.1, abs=0.02)
    assert shared["covariance"] == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_without_matching_tokens_are_copied_and_time_goes_on(granularity):
    schedule, seen = PRESETS["flux-5x"], []

    def velocity(x, sigma, layout):
        seen.append((layout.stage, sigma, x))
        return torch.zeros_like(x)

    noise = torch.randn(1, 64, 16)
    options = dict(matching="off", granularity=granularity)
    ralu.sample(velocity, noise, (8, 8), "flux-5x", **options)
    last = {stage: x for stage, _, x in seen}
    first = {stage: (sigma, x) for stage, sigma, x in reversed(seen)}
    assert [first[stage][0] for stage in (2, 3)] == pytest.approx([1 - end for end in schedule.ends[:2]])
    assert set(first[2][1].flatten().tolist()) <= set(last[1].flatten().tolist())
    assert set(first[3][1].flatten().tolist()) == set(last[1].flatten().tolist())


@pytest.mark.parametrize("kind", SMOOTH)
def test_selected_tokens_alone_are_interpolated(kind):
    """Without noise left, at the end of the flow, a transition only interpolates: against PyTorch, token by token."""
    h, w = 3, 4
    plan, transition = mixed_plan(2, h, w), match_noise("select", 1 - 1e-9, 0.1, "snr", kind)
    low = torch.randn(2, h * w, 8)
    high, _ = upsampled(low, (h, w), kind, "pixel")
    packed = select(low, plan, transition, torch.zeros(2, dtype=torch.int64), Options())
    for row, (source, child) in enumerate(zip(plan.source.tolist(), plan.child.tolist(), strict=True)):
        sample, y, x = int(row >= plan.cu_seqlens[1]), source // w, source % w
        place = (2 * y + child // 2) * 2 * w + 2 * x + child % 2
        expected = low[sample, source] if child < 0 else high[sample, place]
        torch.testing.assert_close(packed[row], expected, rtol=0, atol=1e-5)
    # What was selected stays; a flat remainder is interpolated without a seam.
    flat = torch.where(plan.child[:, None] >= 0, packed, torch.full((), 0.5))
    merged = complete(flat, plan, transition, torch.zeros(2, dtype=torch.int64), Options())
    children = (plan.child >= 0)[plan.inverse.long()]
    torch.testing.assert_close(merged[children], flat[plan.inverse.long()][children], rtol=0, atol=1e-5)


def halves(tokens, grid):
    """Decode tokens to an image of 2x2 pixels each, of half the latent's size."""
    return unpack(tokens, grid) / 2


def doubles(images):
    """Undo `halves`."""
    return pack(2 * images)


def enlarged(low, grid):
    """Enlarge the image of low tokens (B, n, C), whose values are clamped: bicubic, written out with PyTorch's own."""
    image = F.interpolate(unpack(low, grid) / 2, scale_factor=2, mode="bicubic", antialias=True)
    return pack(2 * image.clamp(-1, 1))


def doubled(low, grid, granularity):
    """Repeat latent pixels, or tokens, in each direction: (B, n, C) to (B, 4n, C)."""
    planes = unpack(low, grid) if granularity == "pixel" else low.mT.unflatten(2, grid)
    planes = planes.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return pack(planes) if granularity == "pixel" else planes.flatten(2).mT


def stages(schedule, options, noise, grid):
    """Run a schedule of one step a stage with a velocity that is half the sample: yield stage, run, x, estimate."""
    resize = partial(through_pixels, decode=halves, encode=doubles)
    run = Run(schedule, lambda x0, low: x0.square().mean(2), options, resize)
    run.start(noise, grid)
    x = noise
    for sigma in run.sigmas.tolist():
        given = run.first(x)
        layout = run.layout
        x, _ = run.step(x, given / 2)
        yield layout, run, x, given - sigma * given / 2


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_pixels_move_the_mean_of_upsampled_tokens_alone(granularity):
    """The difference to nearest neighbours, whose noise is the same, is s times that of the clean estimates."""
    grid, low = (8, 12), (4, 6)
    noise = torch.randn(2, 96, 12)
    made = {
        name: list(stages(
            ralu.schedule.region_adaptive((1, 1, 1), (0.3, 0.45, 1.0), (3.0, 3.0, 3.0), 0.1, 0.3, upsampler=name),
            Options(granularity=granularity), noise, grid,
        ))
        for name in ("nearest", "pixels")
    }  # fmt: skip
    first, second = ralu.schedule.region_adaptive((1, 1, 1), (0.3, 0.45, 1.0), (3.0, 3.0, 3.0), 0.1).transitions
    (_, run, plain, x0), (_, _, moved, same) = made["nearest"][0], made["pixels"][0]
    assert torch.equal(x0, same)
    plan = made["pixels"][1][0].plan
    children = (plan.child >= 0)[plan.inverse.long()]
    change = first.start * (enlarged(x0, low) - doubled(x0, low, granularity))
    difference = (moved - plain).flatten(0, 1)[plan.inverse.long()]
    torch.testing.assert_close(difference[children], change[children], rtol=0, atol=1e-5)
    assert not difference[~children].any() and change[children].abs().max() > 0.01

    # The second transition: from the tokens of the mixed stage, the estimate of the selected being the first one's.
    _, run, after, estimate = made["pixels"][1]
    packed = strip(estimate, plan)
    sigma, following = (run.steps[1][k] for k in (1, 2))
    ended = strip(moved + (following - sigma) * moved / 2, plan)
    nearest = upsample_remaining(
        ended, plan, second.scale, second.noise_scale, second.c, run._seeds, granularity=granularity
    )
    kept = x0.clone()
    for b in range(2):
        for i in range(24):
            corner = 2 * (i // 6) * 12 + 2 * (i % 6)
            if not children[b, corner]:
                kept[b, i] = packed[plan.inverse[b, corner]]
    change = second.start * (enlarged(kept, low) - doubled(kept, low, granularity))
    torch.testing.assert_close((after - nearest)[~children], change[~children], rtol=0, atol=1e-5)
    torch.testing.assert_close(after[children], nearest[children], rtol=0, atol=1e-6)


def test_pixels_between_whole_stages():
    """Of a low stage all tokens are corrected; a resampled estimate is the image's own."""
    grid, low, noise = (8, 12), (4, 6), torch.randn(2, 96, 12)
    of = {
        name: next(stages(two_resolutions((1, 1), 0.4, (3, 3), 0.1, upsampler=name), Options(), noise, grid))
        for name in ("nearest", "pixels")
    }
    (_, _, plain, x0), (_, run, moved, _) = of["nearest"], of["pixels"]
    change = run.schedule.transitions[0].start * (enlarged(x0, low) - doubled(x0, low, "pixel"))
    torch.testing.assert_close(moved - plain, change, rtol=0, atol=1e-5)

    full, half = Stage("full", 1, 1.0, 3.0), Stage("low", 1, 1.0, 3.0)
    schedule = Schedule((full, half, full), (resample_noise(0.4, "pixels"), resample_noise(0.9, "pixels")))
    (_, _, low_x, x0), (_, _, full_x, _), _ = stages(schedule, Options(), noise, grid)
    shrunk = F.interpolate(unpack(x0, grid) / 2, scale_factor=0.5, mode="bicubic", antialias=True).clamp(-1, 1)
    schedule = Schedule((full, half, full), (resample_noise(0.4), resample_noise(0.9)))
    again = list(stages(schedule, Options(), noise, grid))
    white = (again[0][2] - 0.4 * resized(x0, grid, low, "lanczos")) / 0.6  # the seed's noise, which does not differ
    torch.testing.assert_close(low_x, 0.4 * pack(2 * shrunk) + 0.6 * white, rtol=0, atol=1e-5)
    assert full_x.shape == noise.shape and torch.isfinite(full_x).all()


def test_pixels_change_nothing_of_a_flat_image():
    """Whose enlargement is what nearest neighbours make of it; so with a batch of such noise at any ratio."""
    noise = torch.linspace(-1.5, 1.5, 3).repeat_interleave(4).expand(2, 96, 12).contiguous()
    for ratio in (0, 0.3, 1):
        presets = [ralu.preset("flux-7x", ratio=ratio, upsampler=name) for name in ("nearest", "pixels")]
        schedules = [preset.replace(steps=(1, 1, 1)) for preset in presets]
        runs = [list(stages(schedule, Options(), noise, (8, 12))) for schedule in schedules]
        torch.testing.assert_close(runs[0][0][2], runs[1][0][2], rtol=0, atol=1e-6)


def test_pixels_need_an_autoencoder():
    pipe = tiny.flux()
    pipe.vae = None
    before = pipe.scheduler
    with pytest.raises(ValueError, match="upsampler='pixels' needs an autoencoder"):
        ralu.enable(pipe, upsampler="pixels", regions="gradient")
    assert pipe.scheduler is before
    noise = torch.randn(1, 64, 12)
    for given in ({}, {"decode": halves}, {"encode": doubles}):
        with pytest.raises(ValueError, match="decode and encode"):
            ralu.sample(lambda x, *_: x, noise, (8, 8), upsampler="pixels", **given)
    assert ralu.sample(
        lambda x, *_: x, noise, (8, 8), "flux-7x", upsampler="pixels", regions="gradient", decode=halves, encode=doubles
    ).shape == noise.shape  # fmt: skip


@pytest.mark.parametrize("kind", [*SMOOTH, "pixels"])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_batch_equals_its_single_runs(family, kind):
    pipe = tiny.flux() if family == "flux" else tiny.sd3()
    ralu.enable(pipe, upsampler=kind, matching="snr" if kind in SMOOTH else None)
    together = tiny.generate(pipe, tiny.PROMPTS[:2], seeds=(1, 2))
    alone = [tiny.generate(pipe, prompt, seeds=(seed,)) for prompt, seed in zip(tiny.PROMPTS[:2], (1, 2), strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-4)
    assert not torch.equal(together, tiny.generate(ralu.enable(pipe), tiny.PROMPTS[:2], seeds=(1, 2)))


def test_threshold_counts_may_differ():
    pipe = ralu.enable(tiny.flux(), upsampler="bicubic", matching="snr", regions="gradient", threshold=0.4)
    together = tiny.generate(pipe, tiny.PROMPTS, seeds=(1, 2, 3), output_type="latent")
    alone = [
        tiny.generate(pipe, p, seeds=(s,), output_type="latent") for p, s in zip(tiny.PROMPTS, (1, 2, 3), strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-4)


def test_options_are_saved(tmp_path):
    ralu.RaluScheduler("flux-7x", matching="snr", upsampler="lanczos").save_pretrained(tmp_path)
    again = ralu.RaluScheduler.from_pretrained(tmp_path)
    assert again.schedule == ralu.preset("flux-7x", matching="snr", upsampler="lanczos")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(upsampler="area", matching="snr"),
            "upsampler must be one of nearest, bilinear, bicubic, lanczos, pixels",
        ),
        (dict(upsampler="bicubic"), "upsampler='bicubic' needs matching='snr', got None"),
        (dict(upsampler="pixels", matching="snr"), "upsampler='pixels' needs matching='covariance', got 'snr'"),
        (dict(matching="on"), "matching must be one of covariance, snr, off, got 'on'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ralu.RaluScheduler("flux-5x", **options)
