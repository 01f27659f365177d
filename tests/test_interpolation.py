"""Other upsamplers and kinds of matching: weights against PyTorch and the formula, moments against the flow's."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F

import ralu
from ralu.interpolation import complete, resized, select, upsampled, weights
from ralu.options import Options
from ralu.presets import PRESETS
from ralu.schedule import INTERPOLATIONS, match_noise
from ralu_kernels import plan_tokens, upsample_remaining, upsample_selected

SMOOTH = INTERPOLATIONS[1:]
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
@pytest.mark.parametrize("kind", INTERPOLATIONS)
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


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_batch_equals_its_single_runs(family, kind):
    pipe = tiny.flux() if family == "flux" else tiny.sd3()
    ralu.enable(pipe, upsampler=kind, matching="snr")
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
        (dict(upsampler="area", matching="snr"), "upsampler must be one of nearest, bilinear, bicubic, lanczos"),
        (dict(upsampler="bicubic"), "upsampler='bicubic' needs matching='snr', got None"),
        (dict(matching="on"), "matching must be one of covariance, snr, off, got 'on'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ralu.RaluScheduler("flux-5x", **options)
