import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_exact_as

from ralu_kernels import reference, upsample, upsample_renoise
from ralu_kernels._backend import INTERPRET
from ralu_kernels._checks import DTYPES

SETTINGS = dict(scale=0.9, noise_scale=0.4, c=0.0177)
SHAPES = {
    "flux": (1, 16, 8, 16),
    "odd": (3, 3, 5, 7),
    "align2": (2, 1, 3, 6),
    "align8": (1, 2, 9, 24),
    "one": (1, 1, 1, 1),
    "empty batch": (0, 4, 2, 2),
    "empty width": (2, 4, 2, 0),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: F.pad(x, (1, 2, 1, 0))[..., 1:, 1 : x.shape[-1] + 1],
    "expanded": lambda x: x[..., :1].expand(x.shape),
}


def seeds(b, device):
    return torch.tensor([7, -(2**63), 2**40 + 1], device=device)[:b]


def exact_normals(seed, element, stage, kind):
    """Draw the four normals of each element, (B, *element.shape, 4): float64 from the float32 uniform numbers on."""
    words = reference.philox(seed.view(-1, *[1] * element.dim()), element, stage, kind, 0)
    u0, u1, u2, u3 = (reference._uniform(word).double() for word in words)
    one = torch.polar((-2 * u0.clamp_min(1e-7).log()).sqrt(), 2 * torch.pi * u1)
    two = torch.polar((-2 * u2.clamp_min(1e-7).log()).sqrt(), 2 * torch.pi * u3)
    return torch.stack([one.real, one.imag, two.real, two.imag], -1)


def oracle(x, scale, noise_scale, c, seed, stage=2):
    """Upsample by the definition in float64, with the square root of I - cJ from its eigendecomposition."""
    channels, h, w = x.shape[1:]
    values, vectors = torch.linalg.eigh(torch.eye(4).double() - c)
    root = vectors @ values.clamp_min(0).sqrt().diag() @ vectors.T
    element = torch.arange(channels * h * w).view(channels, h, w)
    z = exact_normals(seed.cpu(), element, stage, 0) @ root  # (B, C, H, W, 4)
    z = F.pixel_shuffle(z.movedim(-1, 2).flatten(1, 2), 2)
    up = F.interpolate(x.cpu().double(), scale_factor=2, mode="nearest") if x.numel() else z
    return (scale * up + noise_scale * z).to(x.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_oracle(backend, device, dtype, shape):
    x = torch.randn(shape, device=device).to(dtype)
    seed = seeds(len(x), device)
    expected = oracle(x, **SETTINGS, seed=seed)
    out = upsample_renoise(x, **SETTINGS, seed=seed, backend=backend)
    assert out.is_contiguous()
    assert_as_exact_as(out, expected.to(dtype), expected, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_exact_to_its_last_place(backend, device, dtype):
    """Rounding is half a unit in the last place of the exact value; the rest of a unit is more than float32 loses.

    Near zero a unit is less than that: an error of 4e-6 comes of the radius, at most 5.7, times the 2^-21 by which a
    GPU's fast sine and cosine, and the rounding of the angle, may be wrong.
    """
    x = torch.randn(1, 4, 32, 32, device=device).to(dtype)
    settings = dict(scale=0.9, noise_scale=0.7, c=0.0177, seed=seeds(1, device))
    expected = oracle(x, **settings)
    out = upsample_renoise(x, **settings, backend=backend)
    bits = 11 if dtype == torch.float16 else 8
    unit = torch.ldexp(torch.ones_like(expected), expected.abs().frexp().exponent - bits)
    error = (out.double() - expected).abs()
    assert (error <= unit.clamp_min(2 * 4e-6)).all() and (error > unit / 4).any()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(backend, device, layout):
    x = layout(torch.randn(2, 3, 4, 6, device=device))
    seed = seeds(2, device)
    out = upsample_renoise(x, **SETTINGS, seed=seed, backend=backend)
    assert torch.equal(out, upsample_renoise(x.contiguous(), **SETTINGS, seed=seed, backend=backend))
    torch.testing.assert_close(out, upsample_renoise(x, **SETTINGS, seed=seed, backend="reference"), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transition_is_exact(backend, device, dtype):
    x = torch.randn(2, 3, 5, 7, device=device).to(dtype)
    out = upsample_renoise(x, 1.0, 0.0, 0.1, 1, backend=backend)
    assert torch.equal(out, F.interpolate(x.cpu().float(), scale_factor=2, mode="nearest").to(x))


def test_noise_depends_on_seed_and_place_alone(backend, device):
    x = torch.zeros(3, 4, 6, 10, device=device)
    seed = seeds(3, device)
    together = upsample_renoise(x, **SETTINGS, seed=seed, backend=backend)
    for b in range(3):
        alone = upsample_renoise(x[b : b + 1], **SETTINGS, seed=seed[b : b + 1], backend=backend)
        assert torch.equal(together[b], alone[0])
    assert torch.equal(together.flip(0), upsample_renoise(x, **SETTINGS, seed=seed.flip(0), backend=backend))
    assert torch.equal(together[0], upsample_renoise(x, **SETTINGS, seed=int(seed[0]), backend=backend)[2])
    assert torch.equal(together[:, :2], upsample_renoise(x[:, :2], **SETTINGS, seed=seed, backend=backend))
    other = upsample_renoise(x, **SETTINGS, seed=seed, stage=3, backend=backend)
    assert not torch.isclose(together, other).any(1).all()
    assert (together[0] - together[1]).abs().mean() > 0.1


@pytest.mark.triton
def test_noise_does_not_depend_on_the_block_size(device, monkeypatch):
    x = torch.randn(2, 4, 6, 10, device=device)
    usual = upsample_renoise(x, **SETTINGS, seed=3, backend="triton")
    for tile in (128, 4096):
        monkeypatch.setattr(upsample, "_TILE_BYTES", tile)
        assert torch.equal(usual, upsample_renoise(x, **SETTINGS, seed=3, backend="triton"))


def test_opcheck(backend, device):
    for shape in ((2, 3, 4, 6), (0, 1, 2, 2), (1, 2, 3, 5)):
        for layout in ("contiguous", "transposed"):
            x = LAYOUTS[layout](torch.randn(shape, device=device).bfloat16())
            args = (x, 0.9, 0.4, 0.02, seeds(shape[0], device), 2, backend)
            torch.library.opcheck(torch.ops.ralu_kernels.upsample_renoise, args)


def test_compile(backend, device):
    def f(x, seed):
        return upsample_renoise(x * 2, **SETTINGS, seed=seed, backend=backend) + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3, 4, 6), (3, 2, 5, 7)):
        x, seed = torch.randn(shape, device=device), seeds(shape[0], device)
        assert torch.equal(compiled(x, seed), f(x, seed))
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x, 5), f(x, 5))


@pytest.mark.skipif(INTERPRET, reason="Inductor never looks into the operation: its code is the same for all backends")
def test_inductor(backend, device):
    def f(x, seed):
        return upsample_renoise(x * 2, **SETTINGS, seed=seed, backend=backend) + 1

    x, seed = torch.randn(2, 3, 5, 7, device=device), seeds(2, device)
    # Trying a C++ compiler's vector instructions and compiling headers ahead take it longer than the test does.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}):
        torch.testing.assert_close(torch.compile(f, fullgraph=True)(x, seed), f(x, seed))


X = torch.zeros(2, 4, 3, 5)
S = torch.zeros(2, dtype=torch.int64)
WRONG = {
    "rank": (dict(x=X[0]), r"x must be of shape \(B, C, H, W\), got \(4, 3, 5\)"),
    "dtype": (dict(x=X.double()), "x.dtype must be float32, float16 or bfloat16, got torch.float64"),
    "grad": (dict(x=X.clone().requires_grad_()), "x.requires_grad"),
    "negative c": (dict(c=-0.01), r"c must be in \[0, 1/4\], got -0.01"),
    "large c": (dict(c=0.26), r"c must be in \[0, 1/4\], got 0.26"),
    "nan c": (dict(c=float("nan")), r"c must be in \[0, 1/4\], got nan"),
    "stage": (dict(stage=-1), r"stage must be an int in \[0, 2147483647\], got -1"),
    "seed shape": (dict(seed=S[:1]), r"seed.shape must be \(2,\), one key for each sample, got \(1,\)"),
    "seed dtype": (dict(seed=S.int()), "seed.dtype must be int64, got torch.int32"),
    "seed device": (dict(seed=S.to("meta")), "seed.device must be cpu, got meta"),
    "seed range": (dict(seed=2**63), "seed must be a 64-bit signed integer, got 9223372036854775808"),
    "elements": (dict(x=X[:1, :1, :1, :1].expand(1, 1, 2**15, 2**14), seed=S[:1]), "at most 2147483647, got 214748364"),
    "unknown backend": (dict(backend="cuda"), "backend must be 'auto' or one available on cpu, got 'cuda': 'native'"),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        upsample_renoise(**{**dict(x=X, seed=S), **SETTINGS, **change})


def test_grad_is_refused_only_where_it_would_be_recorded():
    with torch.no_grad():
        upsample_renoise(X.clone().requires_grad_(), **SETTINGS, seed=S)


def test_large_tensors_are_accepted_on_meta():
    x = torch.empty(2**9, 16, 2**11, 2**11, device="meta")  # 2^37 elements, 2^28 in every output sample
    out = upsample_renoise(x, **SETTINGS, seed=torch.empty(2**9, dtype=torch.int64, device="meta"))
    assert out.shape == (2**9, 16, 2**12, 2**12)


def test_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, ralu_kernels
assert "torch._inductor" not in sys.modules and not torch.cuda.is_initialized()
assert ralu_kernels.upsample_renoise(torch.zeros(1, 1, 2, 2), 1.0, 1.0, 0.1, 0).shape == (1, 1, 4, 4)
try:
    ralu_kernels.upsample_renoise(torch.zeros(1, 1, 2, 2), 1.0, 1.0, 0.1, 0, backend="triton")
except ValueError as error:
    assert "'triton' (triton is not installed), 'reference' (available)" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
