"""`ralu.sample` on velocities whose exact solution is known."""

import pytest
import torch

import ralu
from ralu.schedule import PRESETS


def gaussian(mean, variance):
    """The exact velocity of a flow from N(0, I) to N(mean, variance): d x / d sigma, value by value."""

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


def test_the_first_noise_is_a_subsampling_by_nearest_neighbour():
    noise = torch.arange(1 * 4 * 16.0).view(1, 1, 8, 8)
    tokens = torch.nn.functional.pixel_unshuffle(noise, 2).flatten(2).transpose(1, 2)  # (1, 16, 4)
    seen = []
    ralu.sample(lambda x, s, layout: (seen.append(x), torch.zeros_like(x))[1], tokens, (4, 4))
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
        (torch.zeros(1, 15, 4), (3, 5), "odd"),
        (torch.zeros(1, 15, 4), (4, 4), "15 tokens, but the grid 4x4 has 16"),
    ],
)
def test_wrong_grids(noise, grid, message):
    with pytest.raises(ValueError, match=message):
        ralu.sample(lambda x, s, layout: x, noise, grid)


def test_canny_needs_a_decoder():
    with pytest.raises(ValueError, match="decoder"):
        ralu.sample(lambda x, s, layout: x, torch.zeros(1, 16, 4), (4, 4), regions="canny")
