import copy

import pytest
import torch
from conftest import assert_as_exact_as, far_apart
from diffusers.models import normalization

from ralu_kernels import concat_gelu, gated_add, gated_add_modulate, modulate
from ralu_kernels._checks import DTYPES


def norm(x):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def eager_modulate(x, shift, scale):
    """As diffusers writes it."""
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def eager_gated_add(x, gate, y):
    return x + gate[:, None] * y


def inputs(b, s, d, dtype, device):
    x, y = (torch.randn(b, s, d, device=device).to(dtype) for _ in range(2))
    return x, y, *(torch.randn(b, d, device=device).to(dtype) for _ in range(3))


SHAPES = {
    "FLUX": (1, 5, 3072),
    "SD3.5-large": (2, 3, 2432),
    "SD3": (1, 7, 1536),
    "odd": (2, 21, 123),
    "row": (3, 1, 217),
    "column": (2, 3, 1),
    "wide": (1, 2, 10000),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_oracle(block_backend, device, shape, dtype):
    x, y, gate, shift, scale = inputs(*shape, dtype, device)
    exact = [t.double() for t in (x, y, gate, shift, scale)]
    out = modulate(x, shift, scale, backend=block_backend)
    assert_as_exact_as(out, eager_modulate(x, shift, scale), eager_modulate(exact[0], *exact[3:]))
    total = gated_add(x, gate, y, backend=block_backend)
    assert_as_exact_as(total, eager_gated_add(x, gate, y), eager_gated_add(exact[0], exact[2], exact[1]))
    assert out.is_contiguous() and total.is_contiguous()

    both = gated_add_modulate(x, gate, y, shift, scale, backend=block_backend)
    assert torch.equal(both[0], total)
    assert torch.equal(both[1], modulate(total, shift, scale, backend=block_backend))
    assert both[0].is_contiguous() and both[1].is_contiguous()


NO_WEIGHTS = dict(elementwise_affine=False, eps=1e-6)
ADALN = {  # diffusers' modules: parts of their linear layer's output, which are shift and scale, which output
    "AdaLayerNormZero": (dict(), "emb", 6, 0, 1, 0),  # FLUX, SD3
    "AdaLayerNormZeroSingle": (dict(), "emb", 3, 0, 1, 0),  # FLUX
    "AdaLayerNormContinuous": (dict(conditioning_embedding_dim=48, **NO_WEIGHTS), "conditioning_embedding", 2, 1, 0, 0),
    "SD35AdaLayerNormZeroX": (dict(), "emb", 9, 0, 1, 0),  # SD3.5-medium
    "SD35AdaLayerNormZeroX, second norm": (dict(), "emb", 9, 6, 7, 5),
}


@pytest.mark.parametrize("name, case", ADALN.items(), ids=ADALN.keys())
def test_diffusers_modules(block_backend, device, name, case):
    arguments, emb_name, parts, shift, scale, output = case
    module = getattr(normalization, name.partition(",")[0])(48, **arguments).to(device)
    exact = copy.deepcopy(module).double()
    x, emb = torch.randn(2, 9, 48, device=device), torch.randn(2, 48, device=device)
    with torch.no_grad():
        vectors = exact.linear(exact.silu(emb.double())).float().chunk(parts, dim=1)
        out = modulate(x, vectors[shift], vectors[scale], backend=block_backend)
        eager, oracle = module(x, **{emb_name: emb}), exact(x.double(), **{emb_name: emb.double()})
    if isinstance(eager, tuple):
        eager, oracle = eager[output], oracle[output]
    assert_as_exact_as(out, eager, oracle)


def test_variance_of_values_far_from_zero(block_backend, device):
    """E[x^2] - mean^2 would lose every digit."""
    x, _, _, shift, scale = inputs(2, 3, 512, torch.float32, device)
    x = x + 10000
    oracle = eager_modulate(x.double(), shift.double(), scale.double())
    assert_as_exact_as(modulate(x, shift, scale, backend=block_backend), eager_modulate(x, shift, scale), oracle)


def test_eps(block_backend, device):
    x, _, _, shift, scale = inputs(1, 3, 20, torch.float32, device)
    expected = torch.nn.functional.layer_norm(x, (20,), eps=0.5) * (1 + scale) + shift
    torch.testing.assert_close(modulate(x, shift, scale, eps=0.5, backend=block_backend), expected)
    assert gated_add_modulate(x, shift, torch.zeros_like(x), shift, scale, eps=0.5, backend=block_backend)[1].equal(
        modulate(x, shift, scale, eps=0.5, backend=block_backend)
    )


def test_vectors_of_another_dtype(block_backend, device):
    x, y, gate, shift, scale = inputs(2, 5, 24, torch.bfloat16, device)
    vectors = gate.float(), y, shift.float(), scale.float()
    for actual, expected in zip(
        gated_add_modulate(x, *vectors, backend=block_backend),
        gated_add_modulate(x, gate, y, shift, scale, backend=block_backend),
        strict=True,
    ):
        assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(3,), (23, 1, 9), (0, 5, 0, 0, 9, 0), (0, 0), ()], ids=str)
def test_packed(block_backend, device, lengths, dtype):
    """Every packed sequence as if it were alone, in a batch of one."""
    b, total = len(lengths), sum(lengths)
    x, y = inputs(1, total, 40, dtype, device)[:2]
    gate, shift, scale = inputs(b, 1, 40, dtype, device)[2:]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    settings = dict(cu_seqlens=cu_seqlens, backend=block_backend)
    out = modulate(x[0], shift, scale, **settings)
    total, both = gated_add_modulate(x[0], gate, y[0], shift, scale, **settings)
    assert torch.equal(total, gated_add(x[0], gate, y[0], **settings))
    for i in range(b):
        rows = slice(cu_seqlens[i], cu_seqlens[i + 1])
        vectors = gate[i : i + 1], y[:, rows], shift[i : i + 1], scale[i : i + 1]
        assert torch.equal(out[rows], modulate(x[:, rows], *vectors[2:], backend=block_backend)[0])
        alone = gated_add_modulate(x[:, rows], *vectors, backend=block_backend)
        assert torch.equal(total[rows], alone[0][0]) and torch.equal(both[rows], alone[1][0])


def test_noncontiguous(block_backend, device):
    x, y, *vectors = inputs(2, 10, 24, torch.float32, device)
    expected = gated_add_modulate(x, vectors[0], y, *vectors[1:], backend=block_backend)
    chunks = torch.cat(vectors, dim=1).chunk(3, dim=1)  # as AdaLN's linear layer gives them
    columns = [v.T.contiguous().T for v in vectors]
    part = torch.cat([y, x, y], dim=1)[:, 10:20]
    transposed, flipped = x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT
    for other, (gate, shift, scale) in ((part, chunks), (transposed, columns), (flipped, vectors)):
        assert not other.is_contiguous()
        actual = gated_add_modulate(other, gate, y, shift, scale, backend=block_backend)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
        actual = gated_add_modulate(y, gate, other, shift, scale, backend=block_backend)
        assert torch.equal(actual[0], gated_add(y, vectors[0], x, backend=block_backend))
    shared = [v[:1].expand(2, -1) for v in vectors]
    actual = modulate(x[:1].expand(2, -1, -1), *shared[:2], backend=block_backend)
    assert torch.equal(actual[1], actual[0]) and torch.equal(
        actual, modulate(x[[0, 0]], vectors[0][[0, 0]], vectors[1][[0, 0]], backend=block_backend)
    )


def test_far_offsets(block_backend, device, tmp_path):
    x, y, *vectors = inputs(3, 2, 24, torch.float16, device)
    far = gated_add_modulate(far_apart(x, tmp_path / "x"), vectors[0], y, *vectors[1:], backend=block_backend)
    near = gated_add_modulate(x, vectors[0], y, *vectors[1:], backend=block_backend)
    assert torch.equal(far[0], near[0]) and torch.equal(far[1], near[1])
    vectors = [far_apart(v, tmp_path / str(i)) for i, v in enumerate(vectors)]
    far = gated_add_modulate(y, vectors[0], far_apart(x, tmp_path / "x"), *vectors[1:], backend=block_backend)
    near = gated_add_modulate(y, *(v.contiguous() for v in (vectors[0], x, *vectors[1:])), backend=block_backend)
    assert torch.equal(far[0], near[0]) and torch.equal(far[1], near[1])


@pytest.mark.parametrize("b, s", [(0, 3), (2, 0)])
def test_empty(block_backend, device, b, s):
    x, y, gate, shift, scale = inputs(b, s, 8, torch.bfloat16, device)
    for out in gated_add_modulate(x, gate, y, shift, scale, backend=block_backend):
        assert out.shape == (b, s, 8)


def test_opcheck(block_backend, device):
    ops = torch.ops.ralu_kernels
    for b, s in ((2, 3), (0, 3)):
        x, y, gate, shift, scale = inputs(b, s, 16, torch.bfloat16, device)
        x = x.mT.contiguous().mT
        cu_seqlens = torch.arange(b + 1, dtype=torch.int32, device=device) * s
        for x, y, cu in ((x, y, None), (x.flatten(0, 1), y.flatten(0, 1), cu_seqlens)):  # noqa: B020
            torch.library.opcheck(ops.modulate, (x, shift, scale, cu, 1e-6, block_backend))
            torch.library.opcheck(ops.gated_add, (x, gate, y, cu, block_backend))
            torch.library.opcheck(ops.gated_add_modulate, (x, gate, y, shift, scale, cu, 1e-6, block_backend))


def test_compile(block_backend, device):
    def f(x, y, gate, shift, scale, cu_seqlens):
        x = gated_add(2 * x, gate, y, backend=block_backend)
        x, y = gated_add_modulate(x, gate, y, shift, scale, backend=block_backend)
        packed = modulate(x.flatten(0, 1), shift, scale, cu_seqlens=cu_seqlens, backend=block_backend)
        return x, y, packed + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, s in ((2, 3), (3, 5)):
        cu_seqlens = torch.arange(b + 1, dtype=torch.int32, device=device) * s
        args = *inputs(b, s, 16, torch.float32, device), cu_seqlens
        assert all(torch.equal(*pair) for pair in zip(compiled(*args), f(*args), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "b, s, d, m", [(1, 3, 3072, 12288), (2, 5, 24, 96), (3, 7, 217, 63), (2, 1, 1, 1), (0, 3, 4, 8)]
)
def test_concat_gelu(block_backend, device, b, s, d, m, dtype):
    x, y = (torch.randn(b, s, n, device=device).to(dtype) for n in (d, m))
    eager, oracle = (
        torch.cat([x, torch.nn.functional.gelu(y, approximate="tanh")], dim=2)
        for x, y in ((x, y), (x.double(), y.double()))
    )
    joint = torch.cat([y, x, y], dim=2)
    for views in ((x, y), (joint[..., m : m + d], joint[..., :m]), (x.mT.contiguous().mT, y.mT.contiguous().mT)):
        out = concat_gelu(*views, backend=block_backend)
        assert_as_exact_as(out, eager, oracle)
        assert torch.equal(out[..., :d], x) and out.is_contiguous()
    torch.library.opcheck(torch.ops.ralu_kernels.concat_gelu, (x, y, block_backend))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # NumPy's, in the interpreter
def test_concat_gelu_of_large_values(block_backend, device):
    y = torch.tensor([-1e13, -300.0, -9.0, -0.0, 9.0, 300.0, 1e13], device=device).view(1, 1, -1)
    expected = torch.nn.functional.gelu(y.double(), approximate="tanh").float()
    out = concat_gelu(y, y, backend=block_backend)[..., 7:]
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(y=torch.zeros(2, 4, 8)), r"y.shape must be .*, got \(2, 4, 8\)"),
        (dict(y=torch.zeros(2, 3, 8).half()), "y.dtype must be torch.float32, as x's, got torch.float16"),
        (dict(x=torch.zeros(2, 8)), r"x must be of shape \(B, S, D\), got \(2, 8\)"),
        (dict(backend="native"), "backend must be 'auto' or one available on cpu, got 'native'"),
    ],
)
def test_wrong_arguments_of_concat_gelu(change, message):
    with pytest.raises(ValueError, match=message):
        concat_gelu(**{**dict(x=torch.zeros(2, 3, 8), y=torch.zeros(2, 3, 9)), **change})


X, VECTOR = torch.zeros(2, 3, 8), torch.zeros(2, 8)
CU_SEQLENS = torch.tensor([0, 3, 6], dtype=torch.int32)
PACKED = dict(x=X.flatten(0, 1), y=X.flatten(0, 1), cu_seqlens=CU_SEQLENS)
WRONG = {
    "rank": (dict(x=X[0]), r"x must be of shape \(B, S, D\), got \(3, 8\)"),
    "packed rank": (dict(cu_seqlens=CU_SEQLENS), r"x must be of shape \(total, D\), got \(2, 3, 8\)"),
    "dtype": (dict(x=X.double()), "x.dtype must be float32, float16 or bfloat16, got torch.float64"),
    "grad": (dict(x=X.clone().requires_grad_()), "x.requires_grad must be False"),
    "y shape": (dict(y=X[:, :2]), r"y.shape must be .*2, 3, 8.*, as x's, got .*2, 2, 8"),
    "y dtype": (dict(y=X.bfloat16()), "y.dtype must be torch.float32, as x's, got torch.bfloat16"),
    "y grad": (dict(y=X.clone().requires_grad_()), "y.requires_grad must be False"),
    "gate": (dict(gate=VECTOR[:1]), r"gate.shape must be \(B, D\) = \(2, 8\), got \(1, 8\)"),
    "shift": (dict(shift=VECTOR[:, None]), r"shift must be of shape \(B, D\), got \(2, 1, 8\)"),
    "scale": (dict(scale=VECTOR[:, :7]), r"scale.shape must be \(B, D\) = \(2, 8\), got \(2, 7\)"),
    "scale grad": (dict(scale=VECTOR.clone().requires_grad_()), "scale.requires_grad must be False"),
    "scale device": (dict(scale=VECTOR.to("meta")), "scale.device must be cpu, .*, got meta"),
    "vectors": ({**PACKED, "gate": torch.zeros(3, 8)}, r"gate.shape must be \(B, D\) = \(2, 8\), got \(3, 8\)"),
    "cu_seqlens": ({**PACKED, "cu_seqlens": CU_SEQLENS.long()}, "cu_seqlens.dtype must be int32, got torch.int64"),
    "cu_seqlens shape": ({**PACKED, "cu_seqlens": CU_SEQLENS[None]}, r"cu_seqlens must be of shape \(B \+ 1,\)"),
    "cu_seqlens device": (
        {**PACKED, "cu_seqlens": CU_SEQLENS.to("meta")},
        "cu_seqlens.device must be cpu, as x's, got meta",
    ),
    "backend": (dict(backend="native"), "backend must be 'auto' or one available on cpu, got 'native'"),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(change, message):
    arguments = {**dict(x=X, gate=VECTOR, y=X, shift=VECTOR, scale=VECTOR), **change}
    with pytest.raises(ValueError, match=message):
        gated_add_modulate(**arguments)
