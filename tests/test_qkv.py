from dataclasses import replace

import pytest
import torch
from conftest import assert_as_exact_as, far_apart
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from ralu_kernels import QKV, pack_qkv, packed_layout, reference, unpack
from ralu_kernels._checks import DTYPES, unchecked

AXES = {16: [4, 6, 6], 64: [16, 24, 24], 128: [16, 56, 56]}


def make_stream(b, length, heads, size, dtype, device, norm=True):
    qkv = [torch.randn(b, length, heads * size, device=device).to(dtype) for _ in range(3)]
    return QKV(*qkv, *(torch.rand(size, device=device).to(dtype) + 0.5 for _ in range(2 if norm else 0)))


def make_rotary(b, length, size, device, per_sample):
    """FLUX's tables at fractional positions."""
    embed = FluxPosEmbed(10000, AXES[size])
    tables = [embed(torch.randint(0, 64, (length, 3)) / 2) for _ in range(b if per_sample else 1)]
    cos, sin = (torch.stack(table).float().to(device) for table in zip(*tables, strict=True))
    return (cos, sin) if per_sample else (cos[0], sin[0])


def eager(streams, heads, rotary):
    """As diffusers does it: norm (FLUX's is PyTorch's), concatenation, rotation; (B, S, H, D) each."""
    norm = RMSNorm if rotary is None else torch.nn.RMSNorm
    joint = []
    for name in "qkv":
        parts = []
        for stream in streams:
            x, weight = getattr(stream, name).unflatten(-1, (heads, -1)), getattr(stream, f"norm_{name}", None)
            if weight is not None:
                module = norm(len(weight), eps=1e-6).to(x.device)
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
                x = module(x)
            parts.append(x)
        x = torch.cat(parts, dim=1)
        if rotary is not None and name != "v":
            tables = [table if table.dim() == 3 else table.expand(len(x), -1, -1) for table in rotary]
            rotated = [apply_rotary_emb(y[None], table, sequence_dim=1) for y, *table in zip(x, *tables, strict=True)]
            x = torch.cat(rotated) if rotated else x
        joint.append(x)
    return joint


def exact(streams, heads, rotary):
    """Compute the same in float64, the rotation as a product of complex numbers."""
    joint = []
    for name in "qkv":
        parts = []
        for stream in streams:
            x, weight = getattr(stream, name).unflatten(-1, (heads, -1)), getattr(stream, f"norm_{name}", None)
            x = x.double()
            if weight is not None:
                x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
            parts.append(x)
        x = torch.cat(parts, dim=1)
        if rotary is not None and name != "v":
            turn = torch.complex(*(table[..., ::2].double() for table in rotary)).unsqueeze(-2)
            x = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
        joint.append(x)
    return joint


def ragged_mask(b, length, device):
    """Pad the end of the first sample, the middle of the second, and all of the third."""
    mask = torch.ones(b, length, dtype=torch.bool)
    mask[0, length - length // 4 :] = False
    mask[1, length // 3 : length // 2] = False
    if b > 2:
        mask[2] = torch.rand(length) < 0.5
    return mask.to(device)


CASES = {  # B, lengths, heads, size, norm, rotary (None, shared, per sample), padding
    "FLUX": (1, (5, 8), 24, 128, True, "shared", False),
    "FLUX single": (2, (13,), 24, 128, True, "shared", False),
    "FLUX ragged": (3, (11, 17), 3, 16, True, "per sample", True),
    "FLUX odd": (1, (63, 60), 2, 16, True, "per sample", False),
    "SD3": (2, (9, 7), 24, 64, False, None, True),
    "SD3.5-large": (2, (6, 5), 38, 64, True, None, False),
    "long": (2, (63,), 3, 16, True, "shared", True),
    "no text": (2, (0, 5), 3, 16, True, "shared", False),
    "no image": (2, (5, 0), 3, 16, True, "per sample", True),
    "no power of two": (2, (3, 4), 5, 24, True, None, True),
    "pair": (2, (3, 4), 5, 2, True, None, True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_pack_against_oracle(block_backend, device, case, dtype):
    b, lengths, heads, size, norm, rotary, padded = case
    length = sum(lengths)
    streams = [make_stream(b, n, heads, size, dtype, device, norm) for n in lengths]
    if rotary is not None:
        rotary = make_rotary(b, length, size, device, rotary == "per sample")
    mask = ragged_mask(b, length, device) if padded else None
    layout = packed_layout(mask, b, length, device)
    packed = pack_qkv(streams, layout, heads, rotary=rotary, backend=block_backend)
    kept = torch.ones(b, length, dtype=torch.bool, device=device) if mask is None else mask
    for x, y, oracle in zip(packed, eager(streams, heads, rotary), exact(streams, heads, rotary), strict=True):
        assert x.is_contiguous()
        assert_as_exact_as(x, y[kept], oracle[kept])
    unpacked = unpack(packed[2], layout, lengths, backend=block_backend)
    masks = kept.split(lengths, dim=1)
    for actual, stream, mask in zip(unpacked, streams, masks, strict=True):
        assert torch.equal(actual, torch.where(mask[..., None], stream.v, 0))


def test_tables_without_pairs(block_backend, device):
    """The tables may differ inside a pair, as apply_rotary_emb allows; a weight for q alone."""
    stream = make_stream(2, 7, 3, 16, torch.float32, device)._replace(norm_k=None)
    rotary = torch.randn(7, 16, device=device), torch.randn(7, 16, device=device)
    packed = pack_qkv([stream], packed_layout(None, 2, 7, device), 3, rotary=rotary, backend=block_backend)
    for x, y in zip(packed, eager([stream], 3, rotary), strict=True):
        torch.testing.assert_close(x, y.flatten(0, 1))


def test_strides(block_backend, device):
    """Slices of a fused projection, streams cut from one sequence, transposed and expanded tensors."""
    b, heads, size = 2, 3, 16
    fused = torch.randn(b, 12, 3 * heads * size, device=device)
    q, k, v = fused.chunk(3, dim=-1)
    rotary = make_rotary(b, 12, size, device, True)
    layout = packed_layout(ragged_mask(b, 12, device), b, 12, device)

    def check(*streams):
        actual, expected = (
            pack_qkv(s, layout, heads, rotary=rotary, backend=block_backend)
            for s in (streams, [QKV(*(x.contiguous() for x in stream[:3])) for stream in streams])
        )
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))

    check(QKV(q, k, v))
    check(QKV(q[:, :5], k[:, :5], v[:, :5]), QKV(q[:, 5:], k[:, 5:], v[:, 5:]))
    check(QKV(q, k.contiguous(), v.mT.contiguous().mT))
    check(QKV(*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))))
    check(QKV(*(x[:1].expand(b, -1, -1) for x in (q, k, v))))
    every_other = fused.new_empty(b, 24, heads * size)[:, ::2].copy_(q)
    check(QKV(every_other, every_other, every_other))

    tables = [table.mT.contiguous().mT for table in rotary]
    actual = pack_qkv([QKV(q, k, v)], layout, heads, rotary=tables, backend=block_backend)
    expected = pack_qkv([QKV(q, k, v)], layout, heads, rotary=rotary, backend=block_backend)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    transposed = actual[0].transpose(0, 1).contiguous().transpose(0, 1)
    for pair in zip(*(unpack(x, layout, (5, 7), backend=block_backend) for x in (transposed, actual[0])), strict=True):
        assert torch.equal(*pair)


def test_far_offsets(block_backend, device, tmp_path):
    text, image = (make_stream(3, n, 3, 16, torch.float16, device) for n in (2, 3))
    layout, rotary = packed_layout(None, 3, 5, device), make_rotary(3, 5, 16, device, True)
    near = pack_qkv([text, image], layout, 3, rotary=rotary, backend=block_backend)
    streams = [
        QKV(*(far_apart(x, tmp_path / f"{i}{j}") for j, x in enumerate(stream[:3])), *stream[3:])
        for i, stream in enumerate((text, image))
    ]
    far = pack_qkv(streams, layout, 3, rotary=rotary, backend=block_backend)
    assert all(torch.equal(*pair) for pair in zip(far, near, strict=True))


@pytest.mark.parametrize("length", [1, 63, 217])
def test_sequences(device, length):
    mask = torch.rand(4, length) < 0.6
    mask[1] = False
    mask[2] = True
    layout = packed_layout(mask.to(device), 4, length, device)
    kept = [b * length + s for b in range(4) for s in range(length) if mask[b, s]]
    inverse = [kept.index(token) if token in kept else -1 for token in range(4 * length)]
    lengths = mask.sum(1).tolist()
    assert layout.rows.tolist() == kept and layout.inverse.tolist() == inverse
    assert layout.cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(5)]
    assert (layout.max_seqlen, layout.batch, layout.length) == (max(lengths), 4, length)
    assert layout.total == len(kept)
    tensors = layout.rows, layout.inverse, layout.cu_seqlens
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in tensors)


@pytest.mark.parametrize("b, length", [(3, 5), (0, 5), (2, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_sequences_without_padding(device, b, length, masked):
    mask = torch.ones(b, length, dtype=torch.bool, device=device) if masked else None
    layout = packed_layout(mask, b, length, device)
    assert layout.rows is None and layout.inverse is None and layout.total == b * length
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.tolist() == [i * length for i in range(b + 1)]
    assert (layout.max_seqlen, layout.batch, layout.length) == (length, b, length)


def test_sequences_wait_once_and_only_with_a_mask(monkeypatch):
    with FakeTensorMode():
        assert packed_layout(None, 2, 5, "cpu").cu_seqlens.shape == (3,)
        mask = torch.empty(2, 5, dtype=torch.bool)
        with pytest.raises(DataDependentOutputException):
            packed_layout(mask, 2, 5, "cpu")
        waits = []
        monkeypatch.setattr(FakeTensor, "tolist", lambda x: waits.append(x) or [3, 4])
        layout = packed_layout(mask, 2, 5, "cpu")
        assert len(waits) == 1 and layout.rows.shape == (7,) and layout.max_seqlen == 4


@pytest.mark.parametrize("b, length, padded", [(0, 5, False), (2, 0, False), (2, 4, True)])
def test_empty(block_backend, device, b, length, padded):
    """No samples, no tokens, or nothing but padding."""
    mask = torch.zeros(b, length, dtype=torch.bool, device=device) if padded else None
    layout = packed_layout(mask, b, length, device)
    stream = make_stream(b, length, 3, 16, torch.bfloat16, device)
    for x in pack_qkv([stream], layout, 3, backend=block_backend):
        assert x.shape == (0, 3, 16)
    (out,) = unpack(x, layout, (length,), backend=block_backend)
    assert out.shape == (b, length, 48) and not out.any()


def test_unpack_without_padding_moves_nothing(device):
    x = torch.randn(10, 3, 16, device=device)
    text, image = unpack(x, packed_layout(None, 2, 5, device), (2, 3))
    assert text.shape == (2, 2, 48) and image.shape == (2, 3, 48)
    assert text.data_ptr() == x.data_ptr() and image[0, 0].data_ptr() == x[2].data_ptr()


def test_opcheck(block_backend, device):
    ops = torch.ops.ralu_kernels
    for b, lengths in ((2, (3, 4)), (0, (3, 4))):
        layout = packed_layout(ragged_mask(2, 7, device) if b else None, b, 7, device)
        text, image = (make_stream(b, n, 3, 16, torch.bfloat16, device) for n in lengths)
        cos, sin = make_rotary(2, 7, 16, device, True)
        q = text.q.mT.contiguous().mT
        joint = (q, *text[1:], *image)
        rest = (cos[:b], sin[:b], 3, 1e-6, block_backend)
        torch.library.opcheck(ops.pack_qkv, (*joint, layout.rows, *rest))
        torch.library.opcheck(ops.pack_qkv, (*joint[:5], *[None] * 8, 3, 1e-6, block_backend))
        if b:
            x = torch.randn(3, layout.total, 16, device=device).transpose(0, 1)
            torch.library.opcheck(ops.unpack, (x, layout.inverse, *lengths, block_backend))


def test_compile(block_backend, device):
    def f(streams, layout, rotary):
        streams = [stream._replace(q=2 * stream.q) for stream in streams]
        q, k, v = pack_qkv(streams, layout, 3, rotary=rotary, backend=block_backend)
        lengths = [stream.q.shape[1] for stream in streams]
        return unpack(q + k + v, layout, lengths, backend=block_backend)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for padded in (True, False):
        for b, lengths in ((2, (2, 4)), (3, (3, 5))):
            length = sum(lengths)
            streams = [make_stream(b, n, 3, 16, torch.float32, device) for n in lengths]
            layout = packed_layout(ragged_mask(b, length, device) if padded else None, b, length, device)
            args = streams, layout, make_rotary(b, length, 16, device, True)
            assert all(torch.equal(*pair) for pair in zip(compiled(*args), f(*args), strict=True))


TEXT, IMAGE = (QKV(*[torch.zeros(2, n, 48)] * 3, torch.ones(16), torch.ones(16)) for n in (2, 3))
LAYOUT, TABLE = packed_layout(None, 2, 5, "cpu"), torch.zeros(2, 5, 16)
GRAD = torch.zeros(2, 3, 48, requires_grad=True)
WRONG = {
    "no streams": (dict(streams=[]), r"len\(streams\) must be 1 or 2, got 0"),
    "three streams": (dict(streams=[TEXT, TEXT, TEXT]), r"len\(streams\) must be 1 or 2, got 3"),
    "rank": (dict(streams=[TEXT._replace(q=TEXT.q[0]), IMAGE]), r"streams\[0\].q must be of shape \(B, S_i, H \* D\)"),
    "dtype": (dict(streams=[TEXT._replace(q=TEXT.q.double()), IMAGE]), r"streams\[0\].q.dtype must be float32"),
    "other dtype": (
        dict(streams=[TEXT, IMAGE._replace(v=IMAGE.v.half())]),
        r"streams\[1\].v.dtype must be torch.float32, as streams\[0\].q's, got torch.float16",
    ),
    "device": (dict(streams=[TEXT, IMAGE._replace(k=IMAGE.k.to("meta"))]), r"streams\[1\].k.device must be cpu"),
    "lengths": (dict(streams=[TEXT, IMAGE._replace(k=TEXT.k)]), r"streams\[1\].k.shape must be .*\(2, 3, 48\), got"),
    "channels": (dict(streams=[TEXT, IMAGE._replace(v=IMAGE.v[..., 1:])]), r"streams\[1\].v.shape must be .*got"),
    "grad": (dict(streams=[TEXT, IMAGE._replace(k=GRAD)]), r"streams\[1\].k.requires_grad must be False"),
    "heads": (dict(heads=5), r"heads must be H of 48 = H \* D, D even, got 5"),
    "odd heads": (dict(heads=16), "heads must be H of 48"),
    "no heads": (dict(heads=0), r"heads must be an int in \[1, 2147483647\], got 0"),
    "norm": (
        dict(streams=[TEXT, IMAGE._replace(norm_q=torch.ones(48))]),
        r"streams\[1\].norm_q.shape must be \(D,\) = \(16,\), got \(48,\)",
    ),
    "norm grad": (
        dict(streams=[TEXT._replace(norm_k=torch.ones(16, requires_grad=True)), IMAGE]),
        r"streams\[0\].norm_k.requires_grad must be False",
    ),
    "sequences": (
        dict(layout=packed_layout(None, 2, 6, "cpu")),
        r"the streams' \(B, S\) must be \(2, 6\), the layout's, got \(2, 5\)",
    ),
    "layout device": (dict(layout=packed_layout(None, 2, 5, "meta")), "layout.cu_seqlens.device must be cpu"),
    "tables": (
        dict(rotary=(TABLE[:1], TABLE[:1])),
        r"rotary\[0\].shape must be \(S, D\) or \(B, S, D\) of \(2, 5, 16\)",
    ),
    "tables dtype": (dict(rotary=(TABLE.half(), TABLE)), r"rotary\[0\].dtype must be float32, got torch.float16"),
    "sin": (dict(rotary=(TABLE, TABLE[0])), r"rotary\[1\].shape must be .*2, 5, 16.*, as rotary\[0\]'s, got .*5, 16"),
    "backend": (dict(backend="native"), "backend must be 'auto' or one available on cpu, got 'native'"),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG.keys())
def test_wrong_pack_arguments(change, message):
    arguments = {**dict(streams=[TEXT, IMAGE], layout=LAYOUT, heads=3, rotary=(TABLE, TABLE)), **change}
    with pytest.raises(ValueError, match=message):
        pack_qkv(**arguments)


WRONG_UNPACKS = {
    "rank": (dict(x=torch.zeros(10, 48)), r"x must be of shape \(total, H, D\), got \(10, 48\)"),
    "rows": (dict(x=torch.zeros(9, 3, 16)), r"x.shape\[0\] must be 10, the layout's total, got 9"),
    "three": (dict(lengths=(1, 1, 3)), r"len\(lengths\) must be 1 or 2, got 3"),
    "lengths": (dict(lengths=(2, 2)), r"sum\(lengths\) must be 5, the layout's length, got 4"),
    "backend": (dict(backend="native"), "backend must be 'auto' or one available on cpu, got 'native'"),
}


@pytest.mark.parametrize("change, message", WRONG_UNPACKS.values(), ids=WRONG_UNPACKS.keys())
def test_wrong_unpack_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        unpack(**{**dict(x=torch.zeros(10, 3, 16), layout=LAYOUT, lengths=(2, 3)), **change})


def test_wrong_masks():
    with pytest.raises(ValueError, match=r"mask.dtype must be bool, got torch.float32"):
        packed_layout(torch.ones(2, 5), 2, 5, "cpu")
    with pytest.raises(ValueError, match=r"mask.shape must be \(batch, length\) = \(2, 5\), got \(5, 2\)"):
        packed_layout(torch.ones(5, 2, dtype=torch.bool), 2, 5, "cpu")
    with pytest.raises(ValueError, match=r"batch \* length must be at most 2147483647"):
        packed_layout(None, 2**16, 2**16, "cpu")


def test_a_total_that_is_known_gives_the_same_layout_without_waiting(device):
    mask = torch.rand(5, 17, generator=torch.Generator().manual_seed(0)) > 0.4
    counted = packed_layout(mask, 5, 17, device)
    given = packed_layout(mask, 5, 17, device, total=int(mask.sum()))
    for name in ("rows", "inverse", "cu_seqlens"):
        assert torch.equal(getattr(given, name), getattr(counted, name))
    assert counted.max_seqlen == int(mask.sum(1).max()) and given.max_seqlen == 17
    assert counted.rows.tolist() == mask.flatten().nonzero().flatten().tolist()
    assert packed_layout(torch.ones(2, 3, dtype=torch.bool), 2, 3, device, total=6).rows is None
    with pytest.raises(ValueError, match="total must be at most batch"):
        packed_layout(mask, 5, 17, device, total=86)


# ---- layouts made by hand ----


def small_layout():
    return packed_layout(torch.tensor([[1, 1, 0], [0, 1, 1]]).bool(), 2, 3, "cpu")


def test_a_layout_made_by_hand_is_as_good(device):
    layout = small_layout()
    # Inside a sample any order will do: attention does not see it.
    rows, inverse = torch.tensor([1, 0, 4, 5]), torch.tensor([1, 0, -1, -1, 2, 3])
    rebuilt = replace(layout, rows=rows.int(), inverse=inverse.int())
    x = torch.randn(4, 3, 16)
    (other,), (out,) = unpack(x, rebuilt, (3,)), unpack(x, layout, (3,))
    assert torch.equal(other[1], out[1]) and torch.equal(other[0, [1, 0, 2]], out[0])
    empty = packed_layout(None, 0, 3, "cpu")
    assert replace(empty, max_seqlen=0).total == 0


UNFIT = {
    "a row of another sample": (dict(rows=[0, 1, 2, 5]), "rows must be the indices of one layout with the others"),
    "a row outside": (dict(rows=[0, 1, 4, 6]), "rows must be the indices"),
    "padding that has a row": (dict(inverse=[0, 1, 2, -1, 2, 3]), "inverse must be the indices"),
    "a row outside for a token": (dict(inverse=[0, 1, -1, -1, 2, 4]), "inverse must be the indices"),
    "other lengths": (dict(cu_seqlens=[0, 1, 4], max_seqlen=3), "rows must be the indices"),
    "too short a maximum": (dict(max_seqlen=1), "max_seqlen must be the indices"),
}


@pytest.mark.parametrize("change, message", UNFIT.values(), ids=UNFIT.keys())
def test_a_layout_that_does_not_hold_is_refused_when_it_is_made(change, message):
    change = {name: torch.tensor(x).int() if isinstance(x, list) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        replace(small_layout(), **change)
    with pytest.raises(ValueError, match="cu_seqlens must be the indices"):
        replace(packed_layout(None, 2, 3, "cpu"), cu_seqlens=torch.tensor([0, 2, 6]).int())


@pytest.mark.parametrize("row", [-2, 4, 6, 2**31 - 1, -(2**31)])
def test_kernels_stay_inside_their_tensors(block_backend, device, monkeypatch, row):
    """On a GPU nobody looks at rows: those that name nothing are NaN."""
    monkeypatch.setattr(reference, "_on_host", lambda x: False)
    layout = small_layout()
    layout.inverse[5] = row
    layout.rows[1] = row if row != 4 else 6
    layout = unchecked(
        type(layout), *(x.to(device) if isinstance(x, torch.Tensor) else x for x in vars(layout).values())
    )
    stream = make_stream(2, 3, 3, 16, torch.float32, device)
    for x in pack_qkv([stream], layout, 3, rotary=make_rotary(2, 3, 16, device, True), backend=block_backend):
        assert x[1].isnan().all() and x[[0, 2, 3]].isfinite().all()
    (out,) = unpack(torch.ones(4, 3, 16, device=device), layout, (3,), backend=block_backend)
    assert out[1, 2].isnan().all() and out.nansum() == 3 * 48 and out.isnan().sum() == 48
