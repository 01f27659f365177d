"""The random stream, and the law of the noise made from it (supplement A.1)."""

import math

import pytest
import torch
from conftest import assert_as_exact_as

from ralu_kernels import plan_tokens, reference, upsample_remaining, upsample_renoise, upsample_selected
from ralu_kernels._backend import jit, tl
from ralu_kernels.upsample import _box_muller, normals

MASK = 0xFFFFFFFF
# Random123's known answers for philox4x32-10: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
CORRELATIONS = [0.0, 0.0177, 0.125, 0.25]


@jit
def _words_kernel(seed_ptr, offset_ptr, out_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    w0, w1, w2, w3 = tl.randint4x(tl.load(seed_ptr + i), tl.load(offset_ptr + i))
    tl.store(out_ptr + i, w0.to(tl.int64))
    tl.store(out_ptr + n + i, w1.to(tl.int64))
    tl.store(out_ptr + 2 * n + i, w2.to(tl.int64))
    tl.store(out_ptr + 3 * n + i, w3.to(tl.int64))


@jit
def _randn_kernel(seed_ptr, offset_ptr, theirs_ptr, ours_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    seed, offset = tl.load(seed_ptr + i), tl.load(offset_ptr + i)
    n0, n1, n2, n3 = tl.randn4x(seed, offset)
    tl.store(theirs_ptr + i, n0)
    tl.store(theirs_ptr + n + i, n1)
    tl.store(theirs_ptr + 2 * n + i, n2)
    tl.store(theirs_ptr + 3 * n + i, n3)
    n0, n1, n2, n3 = normals(seed, offset.to(tl.int32), (offset >> 32).to(tl.int32), 0)
    tl.store(ours_ptr + i, n0)
    tl.store(ours_ptr + n + i, n1)
    tl.store(ours_ptr + 2 * n + i, n2)
    tl.store(ours_ptr + 3 * n + i, n3)


@jit
def _box_muller_kernel(word1_ptr, word2_ptr, out_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    word1, word2 = tl.load(word1_ptr + i).to(tl.uint32), tl.load(word2_ptr + i).to(tl.uint32)
    n1, n2 = _box_muller(word1, word2)
    tl.store(out_ptr + i, n1)
    tl.store(out_ptr + n + i, n2)


def seeds_and_offsets(n, device):
    """64-bit seeds of both signs and counters up to 2^63, the edges of 32 bits among them."""
    edges = torch.tensor([0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)])
    random = torch.randint(-(2**63), 2**63 - 1, (2, n))
    random[0, : 10 * 10] = edges.repeat(10)
    random[1, : 10 * 10] = edges.clamp_min(0).repeat_interleave(10)
    random[1] &= 2**63 - 1
    random[1, n // 2 :] &= MASK  # the counters that tokens and latents use
    return random.to(device)


def exact_pair(word1, word2):
    """Draw a pair of normals in float64, (2, n): the angle is the word's, the radius that of its uniform number."""
    folded = torch.where(word2 > MASK // 2, word2 ^ MASK, word2).double()
    pair = torch.polar((-2 * reference._uniform(word1).double().clamp_min(1e-7).log()).sqrt(), folded * math.pi / 2**30)
    return torch.stack([pair.real, pair.imag])


def as_counter(offset):
    return offset & MASK, offset >> 32


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    seed = key[0] | key[1] << 32
    assert reference.philox(seed, *counter) == expected
    seed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    tensors = reference.philox(seed, *(torch.tensor([word]) for word in counter))
    assert tuple(int(word) for word in tensors) == expected


@pytest.mark.triton
def test_stream_is_tritons(device):
    n = 4096
    seed, offset = seeds_and_offsets(n, device)
    words = torch.empty(4, n, dtype=torch.int64, device=device)
    _words_kernel[(1,)](seed, offset, words, n)
    assert torch.equal(words & MASK, torch.stack(reference.philox(seed, *as_counter(offset), 0, 0)))

    theirs, ours = torch.empty(2, 4, n, device=device)
    _randn_kernel[(1,)](seed, offset, theirs, ours, n)
    words = reference.philox(seed, *as_counter(offset), 0, 0)
    exact = torch.cat([exact_pair(*words[:2]), exact_pair(*words[2:])])
    # |n| < 5.7: two units in the last place, and 7e-7 of a GPU's approximate square root. Triton's uniform number is
    # rounded before it becomes an angle, twice: 6e-8 of a turn.
    eager = torch.stack(reference.randn4x(seed, *as_counter(offset)))
    for drawn, error in ((ours, 1.7e-6), (theirs, 3.9e-6), (eager, 3.2e-6)):
        torch.testing.assert_close(drawn.double(), exact, rtol=0, atol=error)


@pytest.mark.triton
def test_box_muller_at_its_edges(device):
    """All quadrants' ends, the smallest and the largest radius."""
    edges = [q * 2**28 + d for q in range(17) for d in (-2, -1, 0, 1, 2)]
    words = torch.tensor([edge & MASK for edge in edges], device=device)
    word1, word2 = torch.cartesian_prod(words, words).T.contiguous()[:, :4096]
    out = torch.empty(2, 4096, device=device)
    _box_muller_kernel[(1,)](word1, word2, out, 4096)
    torch.testing.assert_close(out.double(), exact_pair(word1, word2), rtol=0, atol=1.7e-6)


def test_normals_are_normal():
    element = torch.arange(2**16)
    x = torch.cat(reference.randn4x(torch.tensor([123456789012345]), element, 2, 0)).double()
    n = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean().item() - moment) < 5 * math.sqrt(variance / n)


def blocks_of(latent):
    """Cut a latent into blocks: (B, C, 2H, 2W) -> (B * C * H * W, 4)."""
    return latent.unfold(2, 2, 2).unfold(3, 2, 2).reshape(-1, 4).double()


def assert_covariance(samples, expected):
    """Every entry within 5 standard deviations of its sampling distribution; the mean is known to be 0."""
    n = len(samples)
    covariance = samples.T @ samples / n
    sigma = ((expected.diag().outer(expected.diag()) + expected**2) / n).sqrt()
    assert ((covariance - expected).abs() <= 5 * sigma + 1e-9).all(), (covariance - expected).abs().div(sigma).max()


def assert_independent(pairs):
    """No correlation of any of the last dimension's entries of the one with any of the other's."""
    for name, (one, two) in pairs.items():
        one, two = one.reshape(-1, one.shape[-1]), two.reshape(-1, two.shape[-1])
        correlation = one.T @ two / len(one)
        assert correlation.abs().max() < 5 / math.sqrt(len(one)), name


@pytest.mark.parametrize("c", CORRELATIONS)
def test_block_covariance(c):
    x = torch.zeros(4, 8, 64, 64)
    seed = torch.tensor([1, 2, -3, 2**40])
    z = blocks_of(upsample_renoise(x, 1.0, 1.0, c, seed))
    assert_covariance(z, torch.eye(4).double() - c)
    if c == 0.25:
        assert z.sum(1).abs().max() < 4e-6


@pytest.mark.parametrize("c", CORRELATIONS)
def test_blocks_are_independent(c):
    x = torch.zeros(2, 4, 64, 64)
    z = upsample_renoise(x, 1.0, 1.0, c, torch.tensor([1, 2])).double()
    blocks = z.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)  # (B, C, H, W, 4)
    other_stage = upsample_renoise(x, 1.0, 1.0, c, torch.tensor([1, 2]), stage=3).double()
    kept = reference._kept_noise(torch.tensor([1, 2]), 4 * 64 * 64, 4, 2).double()  # one token for each block
    pairs = {
        "column": (blocks[:, :, :, 1:], blocks[:, :, :, :-1]),
        "row": (blocks[:, :, 1:], blocks[:, :, :-1]),
        "channel": (blocks[:, 1:], blocks[:, :-1]),
        "sample": (blocks[1], blocks[0]),
        "stage": (blocks, other_stage.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)),
        "kind": (blocks, kept),
    }
    assert_independent(pairs)


def test_kept_values_are_independent():
    """Inside the four channels that share a counter, and between those of any two counters."""
    seed = torch.tensor([1, 2])
    low, plan = torch.zeros(2, 1024, 64), plan_tokens(torch.zeros(2, 1024), (32, 32), ratio=0.0)
    z = upsample_selected(low, plan, 1.0, 1.0, 0.0, seed).double().view(2, 32, 32, 16, 4)
    packed, plan = torch.zeros(2048, 64), plan_tokens(torch.zeros(2, 256), (16, 16), ratio=1.0)
    other_stage = upsample_remaining(packed, plan, 1.0, 1.0, 0.0, seed).double().view(2, 32, 32, 16, 4)
    for fours in (z, other_stage):
        assert_covariance(fours.reshape(-1, 4), torch.eye(4).double())
    pairs = {
        "channels": (z[:, :, :, 1:], z[:, :, :, :-1]),
        "column": (z[:, :, 1:], z[:, :, :-1]),
        "row": (z[:, 1:], z[:, :-1]),
        "end of a token": (z.flatten(1, 2)[:, 1:, 0], z.flatten(1, 2)[:, :-1, -1]),
        "sample": (z[1], z[0]),
        "stage": (z, other_stage),
    }
    assert_independent(pairs)


@pytest.mark.parametrize("kept_noise, variance", [("exact", lambda c: 1 - c), ("release", lambda c: 1.0)])
@pytest.mark.parametrize("c", CORRELATIONS)
def test_kept_variance(c, kept_noise, variance):
    low = torch.zeros(4, 64, 256)
    plan = plan_tokens(torch.zeros(4, 64), (8, 8), ratio=0.0)
    x = upsample_selected(low, plan, 1.0, 1.0, c, 5, kept_noise=kept_noise).double()
    plan = plan_tokens(torch.zeros(4, 64), (8, 8), ratio=1.0)
    y = upsample_remaining(torch.zeros(4 * 256, 256), plan, 1.0, 1.0, c, 5, kept_noise=kept_noise).double()
    for z in (x, y):
        assert abs(z.var().item() - variance(c)) < 5 * variance(c) * math.sqrt(2 / z.numel())
        assert abs(z.mean().item()) < 5 * math.sqrt(variance(c) / z.numel())


def matched(e, c):
    """Compute a, b and s of supplement A.1."""
    delta = (1 - e) / math.sqrt(c)
    return 1 / (delta + e), delta / (delta + e), e / (delta + e)


def assert_normal(samples, mean, covariance):
    samples = samples.flatten(1).double() - mean.flatten().double()
    n = len(samples)
    assert (samples.mean(0).abs() <= 5 * (covariance.diag() / n).sqrt()).all()
    assert_covariance(samples, covariance)


N = 20000


@pytest.mark.parametrize("e, c", [(0.3, 0.0177), (0.45, 0.0177), (0.2, 0.25)])
def test_transition_of_latents(e, c):
    """x_e = e x_1 + (1 - e) eps becomes a sample of the flow at time s: mean s Up(x_1), covariance (1 - s)^2 I."""
    a, b, s = matched(e, c)
    x1 = torch.randn(1, 1, 2, 2)
    xe = e * x1 + (1 - e) * torch.randn(N, 1, 2, 2)
    out = upsample_renoise(xe, a, b, c, torch.arange(N))
    up = torch.nn.functional.interpolate(x1, scale_factor=2, mode="nearest")
    assert_normal(out, s * up, (1 - s) ** 2 * torch.eye(16).double())


def transition_of_tokens(stage, e, c, granularity, kept_noise):
    """N samples of a selected and a kept token of 4 channels: outputs, known mean of x_1, mask of the kept."""
    a, b, s = matched(e, c)
    plan = plan_tokens(torch.tensor([[1.0, 0.0]]).expand(N, 2), (1, 2), ratio=0.5)
    one = plan_tokens(torch.tensor([[1.0, 0.0]]), (1, 2), ratio=0.5)
    still = dict(scale=1.0, noise_scale=0.0, c=c, seed=0, granularity=granularity)
    low = torch.randn(1, 2, 4)
    mixed = upsample_selected(low, one, **still)  # Up of the selected token, without noise
    settings = dict(granularity=granularity, kept_noise=kept_noise)
    if stage == 2:
        xe = e * low + (1 - e) * torch.randn(N, 2, 4)
        out = upsample_selected(xe, plan, a, b, c, torch.arange(N), **settings).view(N, 5, 4)
        x1, kept = mixed, one.child == -1
    else:
        mixed[one.child >= 0] = torch.randn(4, 4)  # by now the children differ
        xe = e * mixed + (1 - e) * torch.randn(N, 5, 4)
        out = upsample_remaining(xe.flatten(0, 1), plan, a, b, c, torch.arange(N), **settings)
        x1, kept = upsample_remaining(mixed, one, **still)[0], one.child[one.inverse[0].long()] >= 0
    return out, s * x1, (1 - s) ** 2, kept.repeat_interleave(4)


@pytest.mark.parametrize("granularity", ["pixel", "token"])
@pytest.mark.parametrize("stage", [2, 3])
def test_transition_of_tokens(stage, granularity):
    e, c = 0.45, 0.0586
    out, mean, variance, _ = transition_of_tokens(stage, e, c, granularity, "exact")
    assert_normal(out, mean, variance * torch.eye(mean.numel()).double())


@pytest.mark.parametrize("stage", [2, 3])
def test_release_keeps_too_much_noise(stage):
    e, c = 0.45, 0.0586
    out, mean, variance, kept = transition_of_tokens(stage, e, c, "token", "release")
    excess = matched(e, c)[1] ** 2 * c
    assert_normal(out, mean, torch.diag(variance + excess * kept.double()))
    assert excess > 5 * variance * math.sqrt(2 / N)  # the test above can tell


def test_assert_as_exact_as_can_fail():
    oracle = torch.randn(100, dtype=torch.float64)
    eager = oracle.bfloat16()
    assert_as_exact_as(eager, eager, oracle)
    with pytest.raises(AssertionError):
        assert_as_exact_as(eager * 1.02, eager, oracle)
    with pytest.raises(AssertionError):
        assert_as_exact_as(torch.empty(100, dtype=torch.bfloat16), eager, oracle)
