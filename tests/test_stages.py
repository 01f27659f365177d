"""`ralu.sample` on velocities whose exact solution is known."""

import itertools
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import ralu
from ralu import stages
from ralu.presets import PRESETS
from ralu.schedule import Schedule, Stage, resample_noise, single, two_resolutions
from ralu.stages import seeds_of
from ralu_kernels import plan_tokens, reference


def gaussian(mean, variance):
    """Compute the exact velocity of a flow from N(0, I) to N(mean, variance): d x / d sigma, value by value."""

    def velocity(x, sigma, layout):
        m = mean(layout)
        t = 1 - sigma
        total = t * t * variance + sigma * sigma
        x0 = m + t * variance / total * (x - t * m)
        eps = sigma / total * (x - t * m)
        return eps - x0

    return velocity


@pytest.mark.parametrize("granularity", ["pixel", "token"])
@pytest.mark.parametrize("preset", ["flux-5x", "flux-7x", "sd3-2x", "sd3-3x", "distilled-4"])
def test_a_point_target_is_reached_exactly(preset, granularity):
    """A single image, constant over space: every stage predicts it, so the end is that image to rounding."""
    noise = torch.randn(2, 8 * 12, 16, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0.7, -1.2]).view(2, 1, 1)
    out = ralu.sample(gaussian(lambda layout: target, 0.0), noise, (8, 12), preset, granularity=granularity)
    torch.testing.assert_close(out, target.expand_as(noise), rtol=0, atol=2e-6)


def test_layouts_of_the_stages():
    seen = []

    def velocity(x, sigma, layout):
        seen.append((layout.stage, tuple(x.shape), sigma))
        assert layout.positions.shape == (*x.shape[:2], 2) and layout.mask is None
        if layout.stage == 1:
            assert layout.positions[0, :7].tolist() == [[0, i] for i in range(6)] + [[1, 0]]
        elif layout.stage == 2:
            fractional = layout.positions[1] % 1 != 0
            assert fractional.any(1).sum() == 3 * 4  # of four children three are off the low grid
        else:
            assert layout.positions[0, -1].tolist() == [7, 11]
        return torch.zeros_like(x)

    ralu.sample(velocity, torch.randn(2, 8 * 12, 16), (8, 12), "flux-5x")
    schedule = PRESETS["flux-5x"]
    assert [(stage, shape[1]) for stage, shape, _ in seen] == [(1, 24)] * 4 + [(2, 24 + 3 * 4)] * 5 + [(3, 96)] * 6
    expected = [sigma for stage in (1, 2, 3) for sigma in schedule.sigmas(stage)[:-1]]
    torch.testing.assert_close(torch.tensor([s for *_, s in seen]), torch.tensor(expected))


@pytest.mark.parametrize("granularity", ["pixel", "token"])
def test_the_first_noise_is_a_subsampling_by_nearest_neighbour(granularity):
    noise = torch.arange(1 * 4 * 16.0).view(1, 1, 8, 8)
    tokens = torch.nn.functional.pixel_unshuffle(noise, 2).flatten(2).transpose(1, 2)  # (1, 16, 4)
    seen = []
    ralu.sample(lambda x, s, layout: (seen.append(x), torch.zeros_like(x))[1], tokens, (4, 4), granularity=granularity)
    low = torch.nn.functional.interpolate(noise, scale_factor=0.5, mode="nearest")
    expected = torch.nn.functional.pixel_unshuffle(low, 2).flatten(2).transpose(1, 2)
    assert torch.equal(seen[0], expected)


def test_marginals_stay_standard_normal_when_nothing_is_learned():
    """Data ~ N(0, I) makes every marginal of the flow known: at the first step of stages 2 and 3 as well."""
    spreads = {}

    def velocity(x, sigma, layout):
        spreads.setdefault(layout.stage, (sigma, x.double().pow(2).mean().item()))
        return gaussian(lambda layout: 0.0, 1.0)(x, sigma, layout)

    noise = torch.randn(4, 64 * 64, 16, generator=torch.Generator().manual_seed(0))
    ralu.sample(velocity, noise, (64, 64), "flux-5x")
    for stage in (2, 3):
        sigma, variance = spreads[stage]
        assert variance == pytest.approx(sigma**2 + (1 - sigma) ** 2, rel=0.02)


@pytest.mark.parametrize(
    "noise, grid, message",
    [
        (torch.zeros(1, 15, 4), (5, 5), "15 tokens, but the grid 5x5 has 25"),
        (torch.zeros(1, 15, 4), (4, 4), "15 tokens, but the grid 4x4 has 16"),
    ],
)
def test_wrong_grids(noise, grid, message):
    with pytest.raises(ValueError, match=message):
        ralu.sample(lambda x, s, layout: x, noise, grid)


def test_canny_needs_a_decoder():
    with pytest.raises(ValueError, match="decoder"):
        ralu.sample(lambda x, s, layout: x, torch.zeros(1, 16, 4), (4, 4), regions="canny")


def test_the_smallest_change_of_the_noise_leaves_the_later_noise_alone():
    """Signs alone seed it: one unit in the last place, a scale or rounding to bfloat16 do not."""
    noise = torch.randn(3, 64, 16, generator=torch.Generator().manual_seed(0))
    nudged = noise.clone()
    nudged.view(-1)[0] = torch.nextafter(noise.view(-1)[0], torch.tensor(9.0))
    seeds = seeds_of(noise)
    assert len(set(seeds.tolist())) == 3
    for same in (nudged, noise * 1.0001, noise.bfloat16(), noise.half().double()):
        assert torch.equal(seeds_of(same), seeds)
    flipped = noise.clone()
    flipped[1, 63, 15] *= -1
    assert (seeds_of(flipped) != seeds).tolist() == [False, True, False]

    def run(start):
        return ralu.sample(gaussian(lambda layout: 0.0, 0.25), start, (8, 8))

    torch.testing.assert_close(run(nudged), run(noise), rtol=0, atol=1e-5)
    torch.testing.assert_close(run(noise.bfloat16().float()), run(noise), rtol=0, atol=2e-2)


def test_seeds_are_spread_over_all_bits():
    """Each bit is set in half of them, and no two of 4,096 starts that differ in one sign share a seed."""
    noise = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    starts = torch.where(torch.eye(4096, dtype=torch.bool), -noise, noise)
    seeds = seeds_of(starts)
    assert len(seeds.unique()) == 4096
    share = torch.stack([(seeds >> bit & 1).float().mean() for bit in range(64)])
    assert (share - 0.5).abs().max() < 5 * 0.5 / 64  # five standard deviations of 4,096 coin flips


def test_given_seeds_make_the_later_noise():
    """With them noise that is negated in one place keeps its later noise; the first sample's is its own alone."""
    noise = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    other = noise.clone()
    other[:, 5] *= -1

    def run(start, seeds):
        return ralu.sample(lambda x, sigma, layout: torch.zeros_like(x), start, (8, 8), regions="random", seeds=seeds)

    first, second = run(noise, [7, 8]), run(other, [7, 8])
    changed = (first != second).any(-1)
    assert 0 < changed.sum() <= 2 * 16  # the low tokens that row 5 is in, wherever they were copied to
    assert torch.equal(run(noise, torch.tensor([7, 8])), first)
    assert torch.equal(run(noise, 7)[0], first[0]) and not torch.equal(run(noise, 7)[1], first[1])


@pytest.mark.parametrize(
    "seeds", [1.5, "3", [1, None], [], True, [2**63], {}, object(), [[1]], torch.zeros(2), b"1", 1j]
)
def test_wrong_seeds(seeds):
    with pytest.raises((TypeError, ValueError), match="seeds"):
        ralu.sample(lambda x, s, layout: x, torch.zeros(1, 16, 4), (4, 4), seeds=seeds)


def test_seeds_for_another_batch():
    with pytest.raises(ValueError, match="each of the 2 images, got 3"):
        ralu.sample(lambda x, s, layout: x, torch.zeros(2, 16, 4), (4, 4), seeds=[1, 2, 3])


@pytest.mark.parametrize(
    "velocity",
    [
        lambda x: x[:, :-1], lambda x: x[..., :1], lambda x: x[:1], lambda x: x[0], lambda x: x.long(),
        lambda x: x.bool(), lambda x: x.to(torch.complex64),
    ],
)  # fmt: skip
def test_a_velocity_of_another_shape_or_kind_is_refused_at_the_first_call(velocity):
    calls = []
    with pytest.raises(ValueError, match=r"velocity must be real and of shape \(2, 4, 4\)"):
        ralu.sample(lambda x, s, layout: (calls.append(1), velocity(x))[1], torch.zeros(2, 16, 4), (4, 4))
    assert len(calls) == 1


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_noise_that_holds_no_latent_pixels_is_refused(channels):
    with pytest.raises(ValueError, match=f"4 values for each latent channel in a token, got {channels}"):
        ralu.sample(lambda x, s, layout: x, torch.zeros(1, 16, channels), (4, 4))


def test_float32_noise_and_a_bfloat16_model():
    """As in diffusers a step is in float32, and its result in the model's dtype."""
    noise = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))
    exact = gaussian(lambda layout: 0.5, 0.25)
    dtypes = []

    def half(x, sigma, layout):
        dtypes.append(x.dtype)
        return exact(x.float(), sigma, layout).bfloat16()

    out = ralu.sample(half, noise, (8, 8))
    assert out.dtype == torch.bfloat16 and set(dtypes[1:]) == {torch.bfloat16}
    torch.testing.assert_close(out.float(), ralu.sample(exact, noise, (8, 8)), rtol=0, atol=0.05)


# ---- other stages than RALU's ----


def to_pixels(tokens, grid):
    """(n, 4C) as (C, 2h, 2w)."""
    h, w = grid
    return tokens.view(h, w, -1, 2, 2).permute(2, 0, 3, 1, 4).reshape(-1, 2 * h, 2 * w)


def to_tokens(pixels):
    c, height, width = pixels.shape
    return pixels.view(c, height // 2, 2, width // 2, 2).permute(1, 3, 0, 2, 4).reshape(-1, 4 * c)


def four_normals(key, element, stage):
    return [z.item() for z in reference.randn4x(key, torch.tensor([element]), stage, 0)]


def swirl(x, sigma, layout):
    """Return a velocity that depends on the value, the level and the place."""
    return torch.tanh(x) * (0.5 + sigma) + torch.sin(layout.positions.sum(-1, keepdim=True))


def euler(tokens, levels, grid):
    """Of tokens (n, C) on a whole grid; also the clean estimate of the last step."""
    places = torch.tensor([[float(i), float(j)] for i in range(grid[0]) for j in range(grid[1])])
    for sigma, following in pairwise(levels):
        v = swirl(tokens, torch.tensor(sigma, dtype=torch.float32).item(), SimpleNamespace(positions=places))
        x0, tokens = tokens - sigma * v, tokens + (following - sigma) * v
    return tokens, x0


def white(key, stage, grid):
    """Noise of latent pixels (2, 2h, 2w) of a grid (h, w), four normals a token and channel."""
    fresh = torch.empty(2, 2 * grid[0], 2 * grid[1])
    for c, i, j in itertools.product(range(2), range(grid[0]), range(grid[1])):
        eps = four_normals(key, (c * grid[0] + i) * grid[1] + j, stage)
        fresh[c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = torch.tensor(eps).view(2, 2)
    return fresh


GRIDS = pytest.mark.parametrize(
    "grid", [(4, 6), (3, 5)]
)  # the low grid is 2 x 3: the second one is padded to the first


@GRIDS
def test_two_stages_equal_the_method_written_out_by_hand(grid):
    """Half resolution, then full: SPEED with the Haar basis at c = 1/4, one value after the other."""
    schedule = two_resolutions((3, 4), 0.4, (2.0, 1.5), 0.25)
    noise = torch.randn(2, grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(3))
    got = ralu.sample(swirl, noise, grid, schedule)
    height, width = 2 * grid[0], 2 * grid[1]
    for tokens, key, result in zip(noise, seeds_of(noise), got, strict=True):
        start = white(key, 0, (4, 6))
        start[:, :height, :width] = to_pixels(tokens, grid)
        low, _ = euler(to_tokens(start[:, ::2, ::2]), schedule.sigmas(1), (2, 3))
        pixels, full = to_pixels(low, (2, 3)), torch.empty(2, 8, 12)
        sigma = 1 - 0.4
        for c, i, j in itertools.product(range(2), range(4), range(6)):
            eps = four_normals(key, (c * 4 + i) * 6 + j, 2)
            for child in range(4):
                # (I - c Sigma)^(1/2) at c = 1/4: the block without its mean.
                z = eps[child] - sum(eps) / 4
                value = pixels[c, i, j] / (1 + sigma) + 2 * sigma / (1 + sigma) * z
                full[c, 2 * i + child // 2, 2 * j + child % 2] = value
        expected, _ = euler(to_tokens(full[:, :height, :width]), schedule.sigmas(2), grid)
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


@GRIDS
def test_full_low_full_equals_the_method_written_out_by_hand(grid):
    """Bottleneck Sampling: the clean estimate is resized by Pillow, and fresh noise of an earlier time is added."""
    chosen = (Stage("full", 2, 0.3, 2.0), Stage("low", 3, 0.6, 1.5), Stage("full", 2, 1.0, 1.0))
    schedule = Schedule(chosen, (resample_noise(0.2), resample_noise(0.45)))
    noise = torch.randn(1, grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(4))
    seen = []

    def watched(x, sigma, layout):
        seen.append((layout.stage, layout.resolution, x.shape[1], sigma))
        return swirl(x, sigma, layout)

    got, count = ralu.sample(watched, noise, grid, schedule)[0], grid[0] * grid[1]
    lengths = [("full", count)] * 2 + [("low", 6)] * 3 + [("full", count)] * 2
    assert [(resolution, length) for _, resolution, length, _ in seen] == lengths
    assert [sigma for *_, sigma in seen] == pytest.approx([s for k in (1, 2, 3) for s in schedule.sigmas(k)[:-1]])

    tokens, x0, (key,) = noise[0], None, seeds_of(noise)
    height, width = 2 * grid[0], 2 * grid[1]
    for k, stage in enumerate(chosen, 1):
        if k == 2:  # what the image lacks of 4 x 6 tokens is its last latent pixels
            pixels = to_pixels(x0, grid)[:, [min(i, height - 1) for i in range(8)]]
            pixels, target = pixels[:, :, [min(i, width - 1) for i in range(12)]], (2, 3)
        elif k == 3:
            pixels, target = to_pixels(x0, (2, 3)), (4, 6)
        if k > 1:
            size = 2 * target[1], 2 * target[0]
            resized = np.stack([
                np.asarray(Image.fromarray(plane.numpy()).resize(size, Image.Resampling.LANCZOS)) for plane in pixels
            ])  # fmt: skip
            start = schedule.starts[k - 1]
            mixed = start * torch.from_numpy(resized) + (1 - start) * white(key, k, target)
            tokens = to_tokens(mixed[:, :height, :width])
        tokens, x0 = euler(tokens, schedule.sigmas(k), grid if stage.resolution == "full" else (2, 3))
    torch.testing.assert_close(got, tokens, rtol=0, atol=2e-5)


def test_one_full_stage_is_the_stock_schedule():
    noise = torch.randn(1, 5 * 3, 8, generator=torch.Generator().manual_seed(5))  # odd sizes are fine
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6).tolist())
    places = torch.cartesian_prod(torch.arange(5.0), torch.arange(3.0))[None]
    x = noise
    for t, sigma in zip(stock.timesteps, stock.sigmas, strict=False):
        v = swirl(x, sigma.item(), SimpleNamespace(positions=places))
        x = stock.step(v, t, x, return_dict=False)[0]
    got = ralu.sample(swirl, noise, (5, 3), single(6, 3.0))
    torch.testing.assert_close(got, x, rtol=0, atol=2e-5)
    plain = ralu.sample(swirl, noise, (5, 3), "stock-6")
    torch.testing.assert_close(plain, ralu.sample(swirl, noise, (5, 3), single(6, 1.0)), rtol=0, atol=0)


def test_a_layout_tells_what_chose_its_tokens():
    layouts = []
    scores = torch.rand(2, 24, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 8 * 12, 16, generator=torch.Generator().manual_seed(1))
    ralu.sample(lambda x, s, layout: (layouts.append(layout), x)[1], noise, (8, 12), regions=lambda x0, grid: scores)
    first = layouts[0]
    assert first.scores is None and first.plan is None and first.mask is None
    mixed = next(layout for layout in layouts if layout.plan is not None)
    assert torch.equal(mixed.scores, scores) and mixed.x0.shape == (2, 24, 16) and mixed.mask is None
    expected = {tuple(row.topk(4).indices.sort().values.tolist()) for row in scores}
    rows = mixed.plan.source.view(2, -1), mixed.plan.child.view(2, -1)
    assert {tuple(source[child == 0].tolist()) for source, child in zip(*rows, strict=True)} == expected


def test_packed_rows_of_different_lengths_are_padded_and_stripped():
    plan = plan_tokens(torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]), (2, 2), threshold=0.5)
    packed = torch.arange(plan.source.shape[0] * 2.0).view(-1, 2)
    padded = stages.pad(packed, plan)
    assert padded.shape == (3, 10, 2) and plan.lengths.tolist() == [10, 7, 4]
    for sample, (first, last) in enumerate(pairwise(plan.cu_seqlens.tolist())):
        assert torch.equal(padded[sample, : last - first], packed[first:last])
    assert torch.equal(stages.strip(padded, plan), packed)


TORCH_ALONE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Blocker())
import torch
import ralu.stages, ralu

torch.manual_seed(0)
noise = torch.randn(2, 64, 8)
out = ralu.sample(lambda x, sigma, layout: torch.tanh(x) + sigma, noise, (8, 8), "flux-7x")
mask = ralu.sample(lambda x, sigma, layout: x, noise, (8, 8), regions=torch.eye(4), threshold=0.5)
print(out.double().sum().item(), mask.double().sum().item())
try:
    ralu.enable
except ImportError as error:
    assert str(error) == 'ralu.enable needs diffusers, which is not installed: pip install "ralu[pipelines]"', error
else:
    raise AssertionError("diffusers was not needed")
"""


def test_stages_run_where_there_is_torch_alone():
    blocked = {
        "numpy",
        "PIL",
        "diffusers",
        "transformers",
        "accelerate",
        "scipy",
        "cv2",
        "matplotlib",
        "tqdm",
        "triton",
    }
    code = TORCH_ALONE.replace("{blocked}", repr(blocked))
    alone = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    torch.manual_seed(0)
    noise = torch.randn(2, 64, 8)
    out = ralu.sample(lambda x, sigma, layout: torch.tanh(x) + sigma, noise, (8, 8), "flux-7x")
    masked = ralu.sample(lambda x, sigma, layout: x, noise, (8, 8), regions=torch.eye(4), threshold=0.5)
    expected = [out.double().sum().item(), masked.double().sum().item()]
    assert [float(x) for x in alone.stdout.split()] == pytest.approx(expected, abs=1e-4)
