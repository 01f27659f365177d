import copy
import math
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_exact_as
from test_upsample import exact_normals, oracle, seeds
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ralu_kernels import (
    TokenPlan,
    plan_tokens,
    reference,
    tokens,
    upsample_remaining,
    upsample_renoise,
    upsample_selected,
)
from ralu_kernels import plan as plans
from ralu_kernels._backend import INTERPRET
from ralu_kernels._checks import DTYPES

TRANSITION = (0.9, 0.4, 0.0177)
GRANULARITIES = tokens.GRANULARITIES
FIELDS = ("cu_seqlens", "source", "child", "inverse", "positions")


def naive_plan(scores, grid, ratio=None, threshold=None):
    """Plan by the definition, token by token."""
    h, w = grid
    n = h * w
    cu_seqlens, source, child, inverse, positions = [0], [], [], [], []
    for sample in scores.tolist():
        if threshold is None:
            order = sorted(
                range(n), key=lambda i: (math.isnan(sample[i]), -sample[i] if sample[i] == sample[i] else 0, i)
            )
            selected = set(order[: math.floor(ratio * n + 1e-6)])
        else:
            selected = {i for i in range(n) if sample[i] >= threshold}
        cover = [[0] * (2 * w) for _ in range(2 * h)]
        for i in range(n):
            y, x = divmod(i, w)
            for j in range(4):
                cover[2 * y + j // 2][2 * x + j % 2] = len(source) + (j if i in selected else 0)
            children = range(4) if i in selected else [0]
            positions += [(y + j // 2 / 2, x + j % 2 / 2) for j in children]
            source += [i] * (4 if i in selected else 1)
            child += [0, 1, 2, 3] if i in selected else [-1]
        inverse.append([row for line in cover for row in line])
        cu_seqlens.append(len(source))
    return dict(
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        source=torch.tensor(source, dtype=torch.int32),
        child=torch.tensor(child, dtype=torch.int32),
        inverse=torch.tensor(inverse, dtype=torch.int32).view(-1, 4 * n),
        positions=torch.tensor(positions, dtype=torch.float32).view(-1, 2),
    )


def assert_plan(plan, expected):
    for name in FIELDS:
        actual = getattr(plan, name).cpu()
        assert actual.dtype == expected[name].dtype and torch.equal(actual, expected[name]), name
    assert plan.max_seqlen == max(expected["cu_seqlens"].diff().tolist(), default=plan.max_seqlen)


def unpack(x, grid):
    """(B, n, 4c) tokens -> (B, c, 2h, 2w) latent, FLUX's packing undone."""
    return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, grid), 2)


def pack(latent):
    return F.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2)


def expected_noise(x, c, seed, stage):
    """White noise of kept tokens x (B, n, C), float64, scaled to variance 1 - c."""
    n, channels = x.shape[1:]
    token, channel = torch.meshgrid(torch.arange(n), torch.arange(channels), indexing="ij")
    eps = exact_normals(seed.cpu(), token * math.ceil(channels / 4) + channel // 4, stage, 1)  # (B, n, C, 4)
    child_of_channel = (channel % 4)[None, ..., None].expand(len(x), -1, -1, 1)
    return math.sqrt(1 - c) * eps.gather(-1, child_of_channel)[..., 0].to(x.device)


def expected_children(low, scale, noise_scale, c, seed, stage, granularity, grid):
    """All tokens of low (B, n, C) upsampled, float64 (B, 4n, C) in raster order."""
    if granularity == "pixel":
        return pack(oracle(unpack(low, grid), scale, noise_scale, c, seed, stage))
    # A token grid is a latent whose elements are counted channel last.
    b, n, channels = low.shape
    latent = low.reshape(b, 1, n * channels, 1)
    blocks = oracle(latent, scale, noise_scale, c, seed, stage)  # (B, 1, 2 n C, 2)
    children = blocks.view(b, *grid, channels, 2, 2).permute(0, 1, 4, 2, 5, 3)
    return children.reshape(b, 4 * n, channels)


def random_plan(b, grid, device, **choice):
    scores = torch.randn(b, grid[0] * grid[1])
    return plan_tokens(scores.to(device), grid, **(choice or {"threshold": 0.5}))


def samples(plan):
    """Sample of every packed row."""
    return torch.repeat_interleave(torch.arange(plan.batch_size, device=plan.source.device), plan.lengths)


def expected_selected(low, plan, scale, noise_scale, c, seed, granularity):
    n = low.shape[1]
    children = expected_children(low, scale, noise_scale, c, seed, 2, granularity, plan.grid)
    kept = scale * low.double() + noise_scale * expected_noise(low, c, seed, 2)
    rows, source, child = samples(plan), plan.source.long(), plan.child.long()
    w = plan.grid[1]
    high = (source // w * 2 + child // 2) * 2 * w + source % w * 2 + child % 2
    return torch.where((child < 0)[:, None], kept[rows, source], children[rows, high.clamp(0, 4 * n - 1)])


def expected_remaining(packed, plan, scale, noise_scale, c, seed, granularity):
    h, w = plan.grid
    cover = plan.inverse.long()
    high = packed[cover]  # (B, 4n, C)
    low = high.view(len(cover), h, 2, w, 2, -1)[:, :, 0, :, 0].flatten(1, 2)
    kept = scale * high.double() + noise_scale * expected_noise(high, c, seed, 3)
    children = expected_children(low, scale, noise_scale, c, seed, 3, granularity, plan.grid)
    return torch.where((plan.child[cover] < 0)[..., None], children, kept)


CHOICES = [{"ratio": 0.0}, {"ratio": 0.2}, {"ratio": 1.0}, {"threshold": 0.3}, {"threshold": 9.0}]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("b, grid", [(3, (5, 7)), (1, (4, 4)), (0, (2, 3))])
def test_plan(backend, device, b, grid, choice):
    scores = torch.randn(b, grid[0] * grid[1])
    plan = plan_tokens(scores.to(device), grid, **choice, backend=backend)
    assert plan.grid == grid and plan.batch_size == b
    assert_plan(plan, naive_plan(scores, grid, **choice))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plan_breaks_ties_by_place(backend, device, dtype):
    """Few distinct scores, both zeros, both infinities and NaN (which ranks last), in a strided tensor."""
    inf, nan = math.inf, math.nan
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, inf, -inf, nan, -nan, 0.5, 0.0], dtype=dtype)
    scores = values[torch.randint(len(values), (35, 3))].T
    for choice in ({"ratio": k / 35} for k in (9, 18, 28)):
        plan = plan_tokens(scores.to(device), (5, 7), **choice, backend=backend)
        assert_plan(plan, naive_plan(scores.float(), (5, 7), **choice))
    plan = plan_tokens(scores.to(device), (5, 7), threshold=0.0, backend=backend)
    assert_plan(plan, naive_plan(scores.float(), (5, 7), threshold=0.0))


def test_threshold_is_not_rounded_to_the_scores_dtype(backend, device):
    scores = torch.tensor([[0.298828125, 0.30078125, 0.0, 1.0]]).bfloat16()  # the first is 0.2995 in bfloat16
    plan = plan_tokens(scores.to(device), (2, 2), threshold=0.2995, backend=backend)
    assert_plan(plan, naive_plan(scores.float(), (2, 2), threshold=0.2995))


@pytest.mark.parametrize("choice", [{"ratio": 0.2}, {"threshold": 1.5}], ids=str)
def test_plan_of_a_large_grid(backend, device, choice):
    scores = torch.randn(1, 128 * 128)
    plan = plan_tokens(scores.to(device), (128, 128), **choice, backend=backend)
    assert_plan(plan, naive_plan(scores, (128, 128), **choice))


def test_plan_counts():
    for n, ratio, k in ((10, 0.3, 3), (1024, 0.2, 204), (100, 0.29, 29), (3, 0.9999, 2)):
        assert plan_tokens(torch.randn(1, n), (1, n), ratio=ratio).max_seqlen == n + 3 * k


def test_plan_waits_for_the_device_only_with_a_threshold():
    with FakeTensorMode():
        plan = plan_tokens(torch.empty(2, 12), (3, 4), ratio=0.5)
        assert plan.source.shape == (2 * 30,) and plan.inverse.shape == (2, 48)
        with pytest.raises(DataDependentOutputException):
            plan_tokens(torch.empty(2, 12), (3, 4), threshold=0.5)


def test_plan_goes_to_devices():
    plan = random_plan(2, (3, 4), "cpu").to("meta")
    assert isinstance(plan, TokenPlan) and all(getattr(plan, name).device.type == "meta" for name in FIELDS)


CASES = {
    "flux": (1, (4, 4), 64),
    "odd": (3, (5, 7), 12),
    "column": (2, (5, 1), 4),
    "channel blocks": (2, (2, 2), 136),
    "wide": (1, (1, 2), 1032),
}


# Interpreting takes seconds a case: then floats of 16 bits have two of them.
ORACLE_CASES = [(name, dtype) for name in CASES for dtype in DTYPES
                if not INTERPRET or dtype == torch.float32 or name in ("flux", "channel blocks")]  # fmt: skip


@pytest.mark.parametrize("name, dtype", ORACLE_CASES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_transitions_against_oracle(backend, device, name, granularity, dtype):
    b, grid, channels = CASES[name]
    channels -= granularity == "token"  # any number of channels will do
    plan, seed = random_plan(b, grid, device), seeds(b, device)
    low = torch.randn(b, grid[0] * grid[1], channels, device=device).to(dtype)
    expected = expected_selected(low, plan, *TRANSITION, seed, granularity)
    out = upsample_selected(low, plan, *TRANSITION, seed, granularity=granularity, backend=backend)
    assert out.is_contiguous()
    assert_as_exact_as(out, expected.to(dtype), expected, atol=2e-6)

    packed = torch.randn(len(plan.source), channels, device=device).to(dtype)
    expected = expected_remaining(packed, plan, *TRANSITION, seed, granularity)
    out = upsample_remaining(packed, plan, *TRANSITION, seed, granularity=granularity, backend=backend)
    assert out.is_contiguous()
    assert_as_exact_as(out, expected.to(dtype), expected, atol=2e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("b, channels", [(0, 8), (2, 0)])
def test_empty_transitions(backend, device, b, channels, granularity):
    plan = random_plan(b, (2, 3), device)
    low = torch.zeros(b, 6, channels, device=device)
    packed = upsample_selected(low, plan, *TRANSITION, 1, granularity=granularity, backend=backend)
    assert packed.shape == (len(plan.source), channels)
    out = upsample_remaining(packed, plan, *TRANSITION, 1, granularity=granularity, backend=backend)
    assert out.shape == (b, 24, channels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_transitions_are_exact(backend, device, granularity, dtype):
    """Without noise the two transitions are nearest-neighbour upsampling, bit for bit, whatever is selected when."""
    grid = (5, 3)
    low = torch.randn(2, 15, 8, device=device).to(dtype)
    settings = dict(scale=1.0, noise_scale=0.0, c=0.1, seed=1, granularity=granularity, backend=backend)
    if granularity == "token":
        up = low.view(2, 5, 1, 3, 1, 8).expand(2, 5, 2, 3, 2, 8).reshape(2, 60, 8)
    else:
        up = pack(unpack(low, grid).repeat_interleave(2, 2).repeat_interleave(2, 3))
    for choice in ({"threshold": 0.2}, {"ratio": 0.0}, {"ratio": 1.0}):
        plan = random_plan(2, grid, device, **choice)
        packed = upsample_selected(low, plan, **settings)
        kept = plan.child < 0
        assert torch.equal(packed[kept], low[samples(plan)[kept], plan.source[kept].long()])
        assert torch.equal(upsample_remaining(packed, plan, **settings), up)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_noncontiguous(backend, device, granularity):
    plan, seed = random_plan(2, (3, 4), device), seeds(2, device)
    settings = dict(granularity=granularity, backend=backend)
    base = torch.randn(2, 12, 8, device=device)
    flipped = torch.randn(8, 12, 4, device=device)
    for low in (
        base.transpose(1, 2).contiguous().transpose(1, 2),
        flipped.permute(2, 1, 0)[1:3],
        base[:1].expand(2, 12, 8),
    ):
        contiguous = low.contiguous()
        expected = upsample_selected(contiguous, plan, *TRANSITION, seed, **settings)
        assert torch.equal(upsample_selected(low, plan, *TRANSITION, seed, **settings), expected)
    packed = expected.T.contiguous().T
    assert torch.equal(
        upsample_remaining(packed, plan, *TRANSITION, seed, **settings),
        upsample_remaining(expected, plan, *TRANSITION, seed, **settings),
    )


def test_tokens_and_latents_share_their_noise(backend, device):
    """At pixel granularity a token sequence gets the noise of the latent that it packs, in both stages."""
    grid, seed = (3, 5), seeds(2, device)
    latent = torch.randn(2, 2, 6, 10, device=device)
    for stage, ratio in ((2, 1.0), (3, 0.0)):
        plan = random_plan(2, grid, device, ratio=ratio)
        if stage == 2:
            packed = upsample_selected(pack(latent), plan, *TRANSITION, seed, backend=backend)
            actual = packed[plan.inverse.long()]
        else:
            actual = upsample_remaining(pack(latent).flatten(0, 1), plan, *TRANSITION, seed, backend=backend)
        assert torch.equal(actual, pack(upsample_renoise(latent, *TRANSITION, seed, stage=stage, backend=backend)))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_noise_depends_on_seed_and_place_alone(backend, device, granularity):
    grid, seed = (3, 4), seeds(3, device)
    scores = torch.randn(3, 12, device=device)
    low = torch.randn(3, 12, 8, device=device)
    settings = dict(granularity=granularity, backend=backend)
    plan = plan_tokens(scores, grid, threshold=0.0)
    packed = upsample_selected(low, plan, *TRANSITION, seed, **settings)
    merged = upsample_remaining(packed, plan, *TRANSITION, seed, **settings)
    for b in range(3):
        alone = plan_tokens(scores[b : b + 1], grid, threshold=0.0)
        rows = packed[plan.cu_seqlens[b] : plan.cu_seqlens[b + 1]]
        assert torch.equal(rows, upsample_selected(low[b : b + 1], alone, *TRANSITION, seed[b : b + 1], **settings))
        assert torch.equal(merged[b], upsample_remaining(rows, alone, *TRANSITION, seed[b : b + 1], **settings)[0])
    # A token's noise does not depend on what happens to the others.
    every = upsample_selected(low, plan_tokens(scores, grid, ratio=1.0), *TRANSITION, seed, **settings).view(3, 48, 8)
    children = every.view(3, 12, 4, 8)[samples(plan), plan.source.long(), plan.child.long()]
    assert torch.equal(packed[plan.child >= 0], children[plan.child >= 0])
    assert not torch.equal(packed, upsample_selected(low, plan, *TRANSITION, 5, **settings))


@pytest.mark.triton
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_noise_does_not_depend_on_the_block_size(device, granularity, monkeypatch):
    plan = random_plan(2, (2, 2), device, ratio=0.5)
    low = torch.randn(2, 4, 8, device=device)
    settings = dict(granularity=granularity, backend="triton")
    packed = upsample_selected(low, plan, *TRANSITION, 1, **settings)
    merged = upsample_remaining(packed, plan, *TRANSITION, 1, **settings)
    for tile in (32, 4096):
        monkeypatch.setattr(tokens, "_TILE_BYTES", tile)
        assert torch.equal(packed, upsample_selected(low, plan, *TRANSITION, 1, **settings))
        assert torch.equal(merged, upsample_remaining(packed, plan, *TRANSITION, 1, **settings))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_kept_noise(backend, device, granularity):
    """The release's kept noise is ours over sqrt(1 - c); selected tokens do not change."""
    c, plan = 0.2, random_plan(2, (3, 4), device)
    low = torch.zeros(2, 12, 8, device=device)
    settings = dict(scale=1.0, noise_scale=1.0, c=c, seed=3, granularity=granularity, backend=backend)
    exact, release = (upsample_selected(low, plan, **settings, kept_noise=name) for name in tokens.KEPT_NOISES)
    factor = torch.where(plan.child < 0, math.sqrt(1 - c), 1.0)[:, None]
    torch.testing.assert_close(exact, release * factor)
    exact, release = (
        upsample_remaining(torch.zeros_like(exact), plan, **settings, kept_noise=name) for name in tokens.KEPT_NOISES
    )
    factor = torch.where(plan.child[plan.inverse.long()] < 0, 1.0, math.sqrt(1 - c))[..., None]
    torch.testing.assert_close(exact, release * factor)


def test_opcheck(backend, device):
    ops = torch.ops.ralu_kernels
    for b, grid in ((2, (3, 5)), (0, (2, 2))):
        n, w = grid[0] * grid[1], grid[1]
        scores = torch.randn(n, b, device=device).bfloat16().T
        plan = plan_tokens(scores, grid, ratio=0.4)
        total = len(plan.source)
        k = total and (total // b - n) // 3
        torch.library.opcheck(ops.plan_tokens, (scores, *grid, k, None, total, backend))
        low = torch.randn(b, 8, n, device=device).bfloat16().transpose(1, 2)
        packed = torch.randn(8, total, device=device).bfloat16().T
        rest = (*TRANSITION, seeds(b, device), "pixel", "exact", backend)
        where = (plan.inverse, plan.cu_seqlens, plan.source, plan.child)
        torch.library.opcheck(ops.upsample_selected, (low, *where, w, plan.max_seqlen, *rest))
        torch.library.opcheck(ops.upsample_remaining, (packed, plan.inverse, w, *rest))


def test_compile(backend, device):
    def f(scores, low, seed, h, w):
        plan = plan_tokens(scores, (h, w), ratio=0.3, backend=backend)
        packed = upsample_selected(low * 2, plan, *TRANSITION, seed, backend=backend)
        return plan, upsample_remaining(packed + 1, plan, *TRANSITION, seed, backend=backend)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, h, w in ((2, 3, 4), (3, 5, 3)):
        args = torch.randn(b, h * w, device=device), torch.randn(b, h * w, 8, device=device), seeds(b, device), h, w
        (plan, out), (expected_plan, expected) = compiled(*args), f(*args)
        assert torch.equal(out, expected) and plan.max_seqlen == expected_plan.max_seqlen
        assert all(torch.equal(getattr(plan, name), getattr(expected_plan, name)) for name in FIELDS)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="PyTorch 2.10 and 2.11 do not see that two sizes that depend on the data are the same sum",
)
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_compile_with_a_threshold(device):
    def f(scores, low):
        plan = plan_tokens(scores, (3, 4), threshold=0.3)
        return upsample_remaining(upsample_selected(low, plan, *TRANSITION, 1), plan, *TRANSITION, 1)

    args = torch.randn(2, 12, device=device), torch.randn(2, 12, 8, device=device)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(*args), f(*args))


SCORES = torch.zeros(2, 12)
WRONG_PLANS = {
    "rank": (dict(scores=SCORES[0]), r"scores must be of shape \(B, n\), got \(12,\)"),
    "dtype": (dict(scores=SCORES.int()), "scores.dtype must be float32, float16 or bfloat16, got torch.int32"),
    "grid": (dict(grid=(3, 5)), r"grid must be \(h, w\) with h \* w = 12, .*, got \(3, 5\)"),
    "negative grid": (dict(grid=(-3, -4)), "grid must be"),
    "both": (dict(threshold=0.5), r"\(ratio, threshold\) must be one None and one number, got \(0.5, 0.5\)"),
    "none": (dict(ratio=None), r"\(ratio, threshold\) must be one None and one number, got \(None, None\)"),
    "ratio": (dict(ratio=1.1), r"ratio must be in \[0, 1\], got 1.1"),
    "negative ratio": (dict(ratio=-0.1), r"ratio must be in \[0, 1\], got -0.1"),
    "nan": (dict(ratio=None, threshold=math.nan), "threshold must be a finite number, got nan"),
    "tokens": (
        dict(scores=SCORES[:1, :1].expand(2**15, 2**14), grid=(2**7, 2**7)),
        "at most 2147483647, got 214748364",
    ),
    "backend": (dict(backend="cuda"), "backend must be 'auto' or one available on cpu, got 'cuda'"),
}


@pytest.mark.parametrize("change, message", WRONG_PLANS.values(), ids=WRONG_PLANS.keys())
def test_wrong_plan_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        plan_tokens(**{**dict(scores=SCORES, grid=(3, 4), ratio=0.5), **change})


PLAN = plan_tokens(SCORES, (3, 4), ratio=0.5)  # 30 rows a sample
LOW, PACKED, SEED = torch.zeros(2, 12, 8), torch.zeros(60, 8), torch.zeros(2, dtype=torch.int64)
BOTH_TRANSITIONS = {
    "c": (dict(c=0.3), r"c must be in \[0, 1/4\], got 0.3"),
    "granularity": (dict(granularity="patch"), r"granularity must be one of \('pixel', 'token'\), got 'patch'"),
    "kept noise": (dict(kept_noise="none"), r"kept_noise must be one of \('exact', 'release'\), got 'none'"),
    "seed": (dict(seed=SEED[:1]), r"seed.shape must be \(2,\)"),
    "backend": (dict(backend="cuda"), "backend must be 'auto' or one available on cpu, got 'cuda'"),
    "plan device": (dict(plan=PLAN.to("meta")), "plan.inverse.device must be cpu, .*, got meta"),
}
WRONG_TRANSITIONS = {
    **{f"selected {name}": (upsample_selected, dict(low=LOW), *case) for name, case in BOTH_TRANSITIONS.items()},
    **{
        f"remaining {name}": (upsample_remaining, dict(packed=PACKED), *case) for name, case in BOTH_TRANSITIONS.items()
    },
    "low rank": (upsample_selected, dict(low=LOW[0]), {}, r"low must be of shape \(B, n, C\)"),
    "low dtype": (upsample_selected, dict(low=LOW.double()), {}, "low.dtype must be"),
    "low grad": (upsample_selected, dict(low=LOW.clone().requires_grad_()), {}, "low.requires_grad must be False"),
    "low batch": (upsample_selected, dict(low=LOW[:1]), {}, r"low.shape\[:2\] must be \(2, 12\), .*, got \(1, 12\)"),
    "low tokens": (
        upsample_selected,
        dict(low=LOW[:, 1:]),
        {},
        r"low.shape\[:2\] must be \(2, 12\), .*, got \(2, 11\)",
    ),
    "low channels": (upsample_selected, dict(low=LOW[..., 1:]), {}, r"low.shape\[-1\] must be a multiple of 4"),
    "packed rank": (upsample_remaining, dict(packed=LOW), {}, r"packed must be of shape \(total, C\)"),
    "packed grad": (
        upsample_remaining,
        dict(packed=PACKED.clone().requires_grad_()),
        {},
        "packed.requires_grad must be False",
    ),
    "packed rows": (upsample_remaining, dict(packed=PACKED[1:]), {}, r"packed.shape\[0\] must be 60, .*, got 59"),
    "packed channels": (
        upsample_remaining,
        dict(packed=PACKED[:, 1:]),
        {},
        r"packed.shape\[-1\] must be a multiple of 4",
    ),
    "low elements": (upsample_selected, dict(low=LOW[..., :1].expand(2, 12, 2**26)), {}, "at most 2147483647"),
    "packed elements": (upsample_remaining, dict(packed=PACKED[:, :1].expand(60, 2**26)), {}, "at most 2147483647"),
}


@pytest.mark.parametrize(
    "transition, tensor, change, message", WRONG_TRANSITIONS.values(), ids=WRONG_TRANSITIONS.keys()
)
def test_wrong_transition_arguments(transition, tensor, change, message):
    arguments = {**dict(plan=PLAN, scale=1.0, noise_scale=1.0, c=0.1, seed=SEED), **tensor, **change}
    with pytest.raises(ValueError, match=message):
        transition(**arguments)


# ---- plans made by hand ----


def changed(plan, name, change):
    """Make one of the tensors of the plan anew, contents and all."""
    return replace(plan, **{name: change(getattr(plan, name).clone())})


def both_transitions(plan, **settings):
    low = torch.randn(plan.batch_size, plan.grid[0] * plan.grid[1], 8)
    packed = torch.randn(len(plan.source), 8)
    return (
        partial(upsample_selected, low, plan, *TRANSITION, 1, **settings),
        partial(upsample_remaining, packed, plan, *TRANSITION, 1, **settings),
    )


def test_a_plan_made_by_hand_is_as_good():
    rebuilt = TokenPlan(PLAN.grid, *(getattr(PLAN, name) for name in TokenPlan.__match_args__[1:]))
    for by_hand, planned in zip(both_transitions(rebuilt), both_transitions(PLAN), strict=True):
        torch.manual_seed(0)
        assert by_hand().shape == planned().shape
    low = torch.randn(2, 12, 8)
    assert torch.equal(upsample_selected(low, rebuilt, *TRANSITION, 1), upsample_selected(low, PLAN, *TRANSITION, 1))
    empty = plan_tokens(torch.zeros(0, 12), (3, 4), ratio=0.5)
    assert replace(empty, max_seqlen=12).batch_size == 0
    assert pickle.loads(pickle.dumps(rebuilt)).grid == copy.deepcopy(rebuilt).grid == (3, 4)


SHORT = dict(source=torch.cat([PLAN.source, PLAN.source[:3]]), child=torch.cat([PLAN.child, PLAN.child[:3]]))
UNFIT = {
    "negative grid": (dict(grid=(-3, -4)), r"grid must be an int in \[1, 2147483647\], got -3"),
    "rows that nothing covers": (
        dict(**SHORT, positions=torch.zeros(63, 2), max_seqlen=33),
        r"inverse must be the indices of the layout that inverse's rows describe, got a torch.int32 tensor",
    ),
    "rows by the dozen": (dict(**SHORT), r"positions.shape must be \(total, 2\), with source's total, = \(63, 2\)"),
    "samples exchanged": (dict(inverse=PLAN.inverse.flip(0)), "inverse must be the indices"),
    "a row twice": (
        dict(inverse=PLAN.inverse.clone().index_fill_(1, torch.tensor(5), 0)),
        "inverse must be the indices",
    ),
    "too short a maximum": (
        dict(max_seqlen=27),
        r"source.shape must be .* 2 times 12 to max_seqlen = 27, .*got \(60,\)",
    ),
}


@pytest.mark.parametrize("change, message", UNFIT.values(), ids=UNFIT.keys())
def test_a_plan_that_does_not_hold_is_refused_when_it_is_made(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **change)


@pytest.mark.parametrize("row", [-1, 60, 2**31 - 1, 3])
def test_a_plan_changed_in_place_is_an_error_and_no_crash(backend, row):
    """Rows outside, and one inside that leaves another unwritten; on a CPU looking does not wait."""
    plan = replace(PLAN, inverse=PLAN.inverse.clone())
    plan.inverse[1, 5] = row
    for transition in both_transitions(plan, backend=backend):
        with pytest.raises(ValueError, match=rf"plan.inverse must be row \d+ for low token 2 of sample 1, got {row}"):
            transition()
    fewer = replace(PLAN, inverse=PLAN.inverse.clone())
    kept = plan_tokens(torch.arange(24.0).view(2, 12), (3, 4), threshold=6.0)
    fewer.inverse.copy_(kept.inverse)
    for transition in both_transitions(fewer, backend=backend):
        with pytest.raises(ValueError, match=r"plan.inverse must be rows \[0, 60\), got \[0, 78\)"):
            transition()


def test_where_looking_would_wait_a_plan_that_does_not_hold_gives_nan(backend, device):
    """As on a GPU: a graph cannot look either. The rows that are named are all there."""

    def f(low, packed, grid, *tensors):
        plan = TokenPlan(grid, tensors[0], 30, *tensors[1:])
        settings = (*TRANSITION, 1)
        return (
            upsample_selected(low, plan, *settings, backend=backend),
            upsample_remaining(packed, plan, *settings, backend=backend),
        )

    plan = PLAN.to(device)
    low, packed = torch.randn(2, 12, 8, device=device), torch.randn(60, 8, device=device)
    names = ("cu_seqlens", "source", "child", "inverse", "positions")
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    good = [getattr(plan, name) for name in names]
    expected = (
        upsample_selected(low, plan, *TRANSITION, 1, backend=backend),
        upsample_remaining(packed, plan, *TRANSITION, 1, backend=backend),
    )
    assert all(map(torch.equal, compiled(low, packed, (3, 4), *good), expected))
    for i, row in ((0, 1), (1, 7), (2, 20)):
        broken = [x.clone() for x in good]
        broken[i][row] += 1
        assert all(out.isnan().all() for out in compiled(low, packed, (3, 4), *broken))


@pytest.fixture
def unchecked_rows(monkeypatch):
    """As on a GPU, where nobody looks at a plan's rows."""
    monkeypatch.setattr(reference, "_on_host", lambda x: False)


@pytest.mark.triton
@pytest.mark.parametrize("row", [-1, 30, 2**31 - 1])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_kernels_stay_inside_their_tensors(device, unchecked_rows, granularity, row):
    """Rows and tokens that a plan names and that are not there are not written, and read as NaN."""
    plan = plan_tokens(torch.rand(1, 12), (3, 4), ratio=0.5).to(device)
    first = reference.children(plan.inverse, 4)[0]
    chosen = first[first[:, 0] != first[:, 1]][0, 0]
    broken = plan.inverse.where(plan.inverse != chosen, row)
    low, around = torch.ones(1, 12, 8, device=device), torch.zeros(94, 8, device=device)
    noise = (1.0, 0.0, 0.0, torch.zeros(1, dtype=torch.int64, device=device))
    common = (2, low, around[32:62], broken, 4, 30, *noise, "exact")
    if granularity == "token":  # the first row that a selected token names decides for all of its four
        tokens._launch(tokens._upsample_selected_kernel, *common)
        assert around.sum() == 26 * 8
    else:  # the rows say which token they are of
        source, end = plan.source.index_fill(0, chosen.long(), row), plan.cu_seqlens * 3 + row
        kernel = tokens._upsample_selected_pixels_kernel
        tokens._launch(kernel, *common, 48, (plan.cu_seqlens, source, plan.child))
        assert around[32:62].isnan().sum() == 8 and around.nansum() == 29 * 8
        tokens._launch(kernel, *common, 48, (end, plan.source, plan.child))
    assert not around[:32].any() and not around[62:].any()
    rest = (4, *noise, granularity, "exact")
    high = tokens._remaining_triton(torch.ones(30, 8, device=device), broken, *rest)
    assert high.isnan().sum() == (4 if granularity == "token" else 1) * 8 and (high.isnan() | (high == 1)).all()
    with pytest.raises(ValueError, match=r"plan.inverse must be rows \[0, 11\), got 12 low tokens"):
        tokens._remaining_triton(torch.ones(11, 8, device=device), broken, *rest)


def test_the_reference_stays_inside_its_tensors(unchecked_rows):
    broken = PLAN.inverse.clone()
    broken[0, 0] = 1000
    rest = (1.0, 0.0, 0.0, torch.zeros(2, dtype=torch.int64), "pixel", "exact")
    rows = (PLAN.cu_seqlens, PLAN.source, PLAN.child)
    selected = reference.upsample_selected(torch.ones(2, 12, 8), broken, *rows, 4, 30, *rest)
    assert selected.shape == (60, 8) and (selected == 1).sum() >= 59 * 8
    assert reference.upsample_remaining(torch.ones(60, 8), broken, 4, *rest).isnan().any()


@pytest.mark.triton
def test_a_plan_stays_inside_its_outputs(device, monkeypatch):
    """Scores that changed between the count of the rows and the launch."""
    memory = [torch.full(size, -7, dtype=torch.int32, device=device) for size in ((2,), (12,), (12,), (1, 48))]
    positions = torch.zeros(12, 2, device=device)
    outputs = memory[0], memory[1][:11], memory[2][:11], memory[3], positions[:11]
    monkeypatch.setattr(plans, "_fake_plan", lambda *_: outputs)
    plans._plan_triton(torch.zeros(1, 12, device=device), 3, 4, 0, None, 11)
    assert memory[1].tolist() == [*range(11), -7] and memory[2][11] == -7 and not positions[11].any()
