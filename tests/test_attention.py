import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_exact_as
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ralu_kernels import attention, attention_backend, varlen_attention
from ralu_kernels._checks import DTYPES


@pytest.fixture(autouse=True)
def every_kernel(poisoned_memory):
    """On a GPU PyTorch's deterministic mode, which poisons memory, rules out cuDNN's attention."""
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(False)


def softmax_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=None, dtype=torch.float64):
    """Attend by the definition in float64 or another dtype, sequence by sequence."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros_like(q, dtype=dtype)
    for i in range(len(cu_seqlens_q) - 1):
        rows, keys = (slice(*cu[i : i + 2].tolist()) for cu in (cu_seqlens_q, cu_seqlens_k))
        scores = torch.einsum("qhd,khd->hqk", q[rows].to(dtype), k[keys].to(dtype)) * scale
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys].to(dtype))
    return out


def packed(lengths, heads, size, dtype, device, lengths_k=None):
    """Arguments of `varlen_attention`."""
    lengths_k = lengths if lengths_k is None else lengths_k
    q, k, v = (torch.randn(sum(n), heads, size, device=device).to(dtype) for n in (lengths, lengths_k, lengths_k))
    cu_seqlens = [torch.tensor([0, *n], device=device).cumsum(0).int() for n in (lengths, lengths_k)]
    return q, k, v, *cu_seqlens, max(lengths, default=0), max(lengths_k, default=0)


LENGTHS = {
    "one": ((63,), None),
    "equal": ((41, 41, 41), None),
    "ragged": ((63, 123, 17), None),
    "empty sequences": ((0, 5, 0, 9, 0), None),
    "cross": ((7, 3), (5, 11)),
    "cross of equal queries": ((4, 4), (5, 11)),
    "nothing": ((0, 0), None),
    "no batch": ((), None),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_against_oracle(device, backend, lengths, dtype):
    args = packed(lengths[0], 3, 16, dtype, device, lengths[1])
    out = varlen_attention(*args, backend=backend)
    oracle = softmax_attention(*args[:5])
    eager = softmax_attention(*args[:5], dtype=dtype) if dtype == torch.float32 else oracle.to(dtype)
    assert out.is_contiguous()
    assert_as_exact_as(out, eager, oracle, atol={torch.float32: 2e-6}.get(dtype, 4e-3))


def test_nothing_waits_for_the_device():
    """A value of a fake tensor cannot be had, though on a CPU SDPA does look, to go sequence by sequence."""
    with FakeTensorMode():
        q, cu_seqlens = torch.empty(14, 2, 16), torch.empty(3, dtype=torch.int32)
        dense, ragged = (q, q, q, cu_seqlens, cu_seqlens, 7, 7), (q, q, q, cu_seqlens, cu_seqlens, 9, 9)
        assert attention._pick(*dense, None, "auto") == attention._pick(*ragged, None, "auto") == "sdpa"
        assert attention._sdpa(*dense).shape == attention._padded(*ragged).shape == q.shape
        with pytest.raises(DataDependentOutputException):
            attention._sdpa(*ragged)


@pytest.mark.parametrize("lengths", [case for name, case in LENGTHS.items() if name[0] != "n"], ids=str)
def test_padding_changes_nothing(device, lengths):
    """What a GPU runs in float32, where lengths differ."""
    args = packed(lengths[0], 3, 16, torch.float32, device, lengths[1])
    oracle, eager = (softmax_attention(*args[:5], dtype=dtype) for dtype in (torch.float64, torch.float32))
    assert_as_exact_as(attention._padded(*args), eager, oracle, atol=2e-6)


def test_strides(device):
    """Slices of a fused (total, 3, H, D), and heads that are not packed."""
    _, _, _, *layout = packed((5, 9), 2, 16, torch.float32, device)
    fused = torch.randn(14, 3, 2, 16, device=device)
    q, k, v = fused.unbind(1)
    oracle, eager = (softmax_attention(q, k, v, *layout[:2], dtype=dtype) for dtype in (torch.float64, torch.float32))
    assert_as_exact_as(varlen_attention(q, k, v, *layout), eager, oracle, atol=2e-6)


# The parameters of each function as published: https://github.com/Dao-AILab/flash-attention (flash-attn-4 4.0.0b36 and
# an earlier one, without qv; flash-attn 3 in hopper/flash_attn_interface.py; flash-attn 2), PyTorch 2.13 and 2.10.
FLASH4_END = (
    "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,"
    " pack_gqa=None, deterministic=False, score_mod=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None,"
    " return_lse=False"
)
FLASH4 = (
    "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,"
    f" seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, {FLASH4_END}, score_mod_bwd=None,"
    " aux_scalars=None, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,"
    " gather_bwd_recompute_p=False, gather_bwd_token_chunk=None"
)
FLASH4_BEFORE = (
    "q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,"
    f" seqused_k=None, page_table=None, {FLASH4_END}, cu_total_m_blocks=None, cu_total_n_blocks=None"
)
FLASH3 = (
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,"
    " softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),"
    " attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,"
    " return_attn_probs=False"
)
FLASH2 = (
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,"
    " window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,"
    " block_table=None"
)
VARLEN = (
    "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),"
    " enable_gqa=False, seqused_k=None, block_table=None, num_splits=None"
)
VARLEN_2_10 = "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None"

STUBS = {  # backend, parameters, whether it returns the logsumexp beside the output
    "flash4": ("flash4", FLASH4, True),
    "flash4 before": ("flash4", FLASH4_BEFORE, True),
    "flash3": ("flash3", FLASH3, False),
    "flash3 before": ("flash3", FLASH3, True),
    "flash2": ("flash2", FLASH2, False),
    "varlen": ("varlen", VARLEN, False),
    "varlen of 2.10": ("varlen", VARLEN_2_10, False),
}
EQUIVALENT = {"query": "q", "key": "k", "value": "v", "cu_seq_q": "cu_seqlens_q", "cu_seq_k": "cu_seqlens_k"}
EQUIVALENT |= {"max_q": "max_seqlen_q", "max_k": "max_seqlen_k"}


@pytest.fixture
def install(monkeypatch):
    """Put a stand-in for a package where it would be, with its parameters; its calls are counted by name."""
    calls = []
    monkeypatch.setattr(attention, "_why_unsuited", lambda name, q: None)

    def run(name, parameters, returns_lse):
        signature = inspect.signature(eval(f"lambda {parameters}: None"))

        def function(*args, **kwargs):
            calls.append(name)
            given = {EQUIVALENT.get(key, key): x for key, x in signature.bind(*args, **kwargs).arguments.items()}
            layout = [given.pop(key) for key in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")]
            scale = given.pop("scale", given.pop("softmax_scale", None))
            for side, cu_seqlens in zip("qk", layout[3:], strict=True):
                assert given.pop(f"max_seqlen_{side}") == cu_seqlens.diff().max() and cu_seqlens.dtype == torch.int32
            assert not given, f"given besides: {given}"
            out = softmax_attention(*layout, scale).to(layout[0].dtype)
            return (out, None) if returns_lse else out

        module, attribute, *_ = attention._PACKED[name]
        stub = ModuleType(module)
        setattr(stub, attribute, function)
        monkeypatch.setitem(sys.modules, module, stub)
        attention._load.cache_clear()
        return calls

    yield run
    attention._load.cache_clear()


@pytest.mark.parametrize("stub", STUBS.values(), ids=STUBS.keys())
def test_packages_are_called_as_they_want(install, stub):
    calls = install(*stub)
    args = packed((7, 3), 2, 16, torch.bfloat16, "cpu", (5, 11))
    out = varlen_attention(*args, backend=stub[0])
    assert calls == [stub[0]]
    assert torch.equal(out, softmax_attention(*args[:5]).bfloat16())


def test_auto_takes_the_newest(install):
    args = packed((7, 3), 2, 16, torch.bfloat16, "cpu")
    for name in ("varlen", "flash2", "flash3", "flash4"):
        calls = install(*STUBS[name])
        varlen_attention(*args)
        assert calls[-1] == name


def test_auto_takes_dense_attention_where_lengths_are_equal(install):
    calls = install(*STUBS["flash4"])
    varlen_attention(*packed((7, 7), 2, 16, torch.bfloat16, "cpu"))
    assert not calls
    varlen_attention(*packed((7, 7), 2, 16, torch.bfloat16, "cpu"), backend="flash4")  # forced all the same
    assert calls == ["flash4"]
    varlen_attention(*packed((7, 7), 2, 16, torch.bfloat16, "cpu", (7, 8)))
    assert calls == ["flash4", "flash4"]


def test_attention_backend(install):
    for name in ("flash2", "flash4"):
        calls = install(*STUBS[name])
    args = packed((7, 3), 2, 16, torch.bfloat16, "cpu")
    with attention_backend("flash2"):
        varlen_attention(*args)
        with attention_backend("sdpa"):
            varlen_attention(*args)
            varlen_attention(*args, backend="flash4")
        varlen_attention(*args)
    varlen_attention(*args)
    assert calls == ["flash2", "flash4", "flash2", "flash4"]
    try:
        attention_backend("flash2")
        varlen_attention(*args)
    finally:
        attention_backend("auto")
    varlen_attention(*args)
    assert calls[4:] == ["flash2", "flash4"]


def test_absent_backends():
    args = packed((7, 3), 2, 16, torch.float32, "cpu")
    message = r"'flash4' \(flash_attn.cute.flash_attn_varlen_func cannot be imported: No module named 'flash_attn'\)"
    if attention._load("flash4")[1] is not None:
        with pytest.raises(
            ValueError, match=f"backend must be 'auto' or one available on cpu, got 'flash4': {message}"
        ):
            varlen_attention(*args, backend="flash4")
        with pytest.raises(ValueError, match=r"name must be installed .*flash_attn.cute.*, got 'flash4'"):
            attention_backend("flash4")
    with pytest.raises(ValueError, match=r"'varlen' \(it has nothing for cpu\), 'sdpa' \(available\)"):
        varlen_attention(*args, backend="varlen")
    assert attention._default == "auto"


def test_package_of_another_version(monkeypatch):
    """flash-attn 4 alone leaves a package flash_attn without flash-attn 2's function."""
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    attention._load.cache_clear()
    assert "has no attribute 'flash_attn_varlen_func'" in attention._load("flash2")[1]
    attention._load.cache_clear()


SUITED = {  # compute capability, dtype, D -> the backends that can run
    "Ampere": (8, torch.bfloat16, 128, ["flash2", "varlen"]),
    "Hopper": (9, torch.float16, 64, ["flash4", "flash3", "flash2", "varlen"]),
    "Hopper, wide": (9, torch.float16, 256, ["flash3", "flash2", "varlen"]),
    "Blackwell": (10, torch.bfloat16, 128, ["flash4", "flash2", "varlen"]),
    "float32": (9, torch.float32, 64, []),
    "odd": (9, torch.bfloat16, 20, []),
    "Turing": (7, torch.float16, 64, []),
}


@pytest.mark.parametrize("capability, dtype, size, names", SUITED.values(), ids=SUITED.keys())
def test_what_suits_a_gpu(monkeypatch, capability, dtype, size, names):
    monkeypatch.setattr(attention, "_capability", lambda device: (capability, 0))
    q = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(5, 2, size))
    assert [name for name in attention._PACKED if attention._why_unsuited(name, q) is None] == names


@pytest.mark.parametrize("capability, first", [(8, None), (9, "CUDNN_ATTENTION"), (12, "CUDNN_ATTENTION")])
def test_dense_attention_prefers_cudnn_from_hopper_on(monkeypatch, capability, first):
    orders = []

    def sdpa(q, k, v, attn_mask=None, scale=None):
        orders.append([backend.name for backend in torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)])
        return torch.empty_like(q)

    monkeypatch.setattr(attention, "_capability", lambda device: (capability, 0))
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    with FakeTensorMode():
        q = torch.empty(14, 2, 16, device="cuda")
        cu_seqlens = torch.empty(3, dtype=torch.int32, device="cuda")
        args = q, q, q, cu_seqlens, cu_seqlens, 7, 7
        assert attention._pick(*args, None, "auto") == "sdpa" and attention._sdpa(*args).shape == q.shape
    (order,), default = orders, [backend.name for backend in before]
    assert order == default if first is None else order[0] == first and set(order) >= {"FLASH_ATTENTION", "MATH"}
    assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == before


def test_opcheck(device):
    for lengths in ((7, 3), (5, 5), ()):
        args = packed(lengths, 2, 16, torch.float32, device)
        torch.library.opcheck(torch.ops.ralu_kernels.varlen_attention, (*args, None, "auto"))


def test_compile(device):
    def f(q, k, v, *layout):
        return varlen_attention(2 * q, k, v, *layout) + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((7, 3), (5, 5), (4, 6, 1)):
        args = packed(lengths, 2, 16, torch.float32, device)
        assert torch.equal(compiled(*args), f(*args))


Q = torch.zeros(5, 2, 16)
CU_SEQLENS = torch.tensor([0, 2, 5], dtype=torch.int32)
WRONG = {
    "rank": (dict(q=Q[0]), r"q must be of shape \(total, H, D\), got \(2, 16\)"),
    "dtype": (dict(q=Q.double()), "q.dtype must be float32, float16 or bfloat16"),
    "grad": (dict(v=Q.clone().requires_grad_()), "v.requires_grad must be False"),
    "heads": (dict(k=Q[:, :1]), r"k.shape must be \(total, H, D\) with q's .*2, 16.*, got \(5, 1, 16\)"),
    "other dtype": (dict(k=Q.half()), "k.dtype must be torch.float32, as q's, got torch.float16"),
    "other device": (dict(v=Q.to("meta")), "v.device must be cpu, as q's, got meta"),
    "keys": (dict(v=Q[:4]), r"v.shape\[0\] must be 5, as k's, got 4"),
    "strides": (dict(k=Q.mT.contiguous().mT), r"k.stride\(-1\) must be 1, got 2"),
    "cu_seqlens": (dict(cu_seqlens_q=CU_SEQLENS.long()), "cu_seqlens_q.dtype must be int32, got torch.int64"),
    "strided cu_seqlens": (dict(cu_seqlens_k=CU_SEQLENS.repeat_interleave(2)[::2]), r"cu_seqlens_k.stride\(\) must be"),
    "sequences": (
        dict(cu_seqlens_k=torch.tensor([0, 5], dtype=torch.int32), max_seqlen_k=5),
        r"len\(cu_seqlens_k\) must be 3, as cu_seqlens_q's, got 2",
    ),
    "backend": (dict(backend="flash"), r"backend must be 'auto' or one of \('flash4', .*'sdpa'\), got 'flash'"),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(change, message):
    arguments = dict(q=Q, k=Q, v=Q, cu_seqlens_q=CU_SEQLENS, cu_seqlens_k=CU_SEQLENS, max_seqlen_q=3, max_seqlen_k=3)
    with pytest.raises(ValueError, match=message):
        varlen_attention(**{**arguments, **change})


def test_wrong_default():
    with pytest.raises(ValueError, match=r"name must be 'auto' or one of \('flash4', .*'sdpa'\), got 'xformers'"):
        attention_backend("xformers")


# ---- the scale of the softmax ----


@pytest.mark.parametrize("scale", [0.7, 1, 0.0, -0.3])
@pytest.mark.parametrize("lengths", [case for name, case in LENGTHS.items() if name[0] != "n"], ids=str)
def test_softmax_scale(device, lengths, scale):
    args = packed(lengths[0], 3, 16, torch.float32, device, lengths[1])
    oracle, eager = (softmax_attention(*args[:5], scale, dtype) for dtype in (torch.float64, torch.float32))
    for backend in ("auto", "sdpa"):
        out = varlen_attention(*args, softmax_scale=scale, backend=backend)
        assert_as_exact_as(out, eager, oracle, atol=2e-6)
    assert_as_exact_as(attention._padded(*args, scale), eager, oracle, atol=2e-6)
    default, eager = (softmax_attention(*args[:5], dtype=dtype) for dtype in (torch.float64, torch.float32))
    assert_as_exact_as(varlen_attention(*args, softmax_scale=0.25), eager, default, atol=2e-6)


@pytest.mark.parametrize("stub", STUBS.values(), ids=STUBS.keys())
def test_packages_are_given_the_scale(install, stub):
    install(*stub)
    args = packed((7, 3), 2, 16, torch.bfloat16, "cpu", (5, 11))
    for scale in (0.7, 2):
        oracle = softmax_attention(*args[:5], scale)
        out = varlen_attention(*args, softmax_scale=scale, backend=stub[0])
        # Where a function takes no scale the queries do, rounded to bfloat16 once more.
        assert_as_exact_as(out, oracle.bfloat16(), oracle, atol=0.02 if stub[0] == "varlen" else 0)


def test_a_scale_is_compiled():
    def f(q, k, v, *layout):
        return varlen_attention(q, k, v, *layout, softmax_scale=0.7)

    args = packed((7, 3), 2, 16, torch.float32, "cpu")
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(*args), f(*args))
    torch.library.opcheck(torch.ops.ralu_kernels.varlen_attention, (*args, 0.7, "auto"))


# ---- what cannot be ----


def test_queries_without_keys_are_zero(device):
    for lengths, lengths_k in (((3, 2), (0, 4)), ((3, 2), (0, 0)), ((2, 2), (0, 0))):
        args = packed(lengths, 2, 16, torch.float32, device, lengths_k)
        out = varlen_attention(*args)
        assert not out[: lengths[0]].any() and out.isfinite().all()


BAD_LAYOUTS = {
    "short": (dict(cu_seqlens_q=[0, 2, 4]), r"cu_seqlens_q must be in ascending order from 0 to q's 5 rows, got"),
    "long": (dict(cu_seqlens_k=[0, 2, 6]), r"cu_seqlens_k must be in ascending order from 0 to k's 5 rows"),
    "not from 0": (dict(cu_seqlens_q=[1, 2, 5]), "cu_seqlens_q must be in ascending order"),
    "descending": (dict(cu_seqlens_k=[0, 7, 5], max_seqlen_k=7), "cu_seqlens_k must be in ascending order"),
    "negative": (dict(cu_seqlens_q=[0, -2, 5], max_seqlen_q=7), "cu_seqlens_q must be in ascending order"),
    "no sequence": (dict(cu_seqlens_q=[0]), r"cu_seqlens_q.shape must be \(B \+ 1,\), with sequences for q's 5 rows"),
    # Sequences of 1 and 5 rows would be taken for two of 3.
    "a longest that is not": (
        dict(cu_seqlens_q=[0, 1, 6], cu_seqlens_k=[0, 1, 6], q=torch.zeros(6, 2, 16), k=torch.zeros(6, 2, 16),
             v=torch.zeros(6, 2, 16)),
        "max_seqlen_q must be at least 5, the longest sequence, got 3",
    ),
    "a longest of nothing": (dict(max_seqlen_k=2), "max_seqlen_k must be at least 3: 2 sequences have 5 rows, got 2"),
    "float": (dict(max_seqlen_q=3.0), r"max_seqlen_q must be an int, got 3.0 \(float\)"),
    "scale": (dict(softmax_scale=float("nan")), "softmax_scale must be a finite number, got nan"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", BAD_LAYOUTS.values(), ids=BAD_LAYOUTS.keys())
def test_layouts_that_cannot_be(change, message):
    arguments = dict(q=Q, k=Q, v=Q, cu_seqlens_q=CU_SEQLENS, cu_seqlens_k=CU_SEQLENS, max_seqlen_q=3, max_seqlen_k=3)
    change = {k: torch.tensor(x, dtype=torch.int32) if isinstance(x, list) else x for k, x in change.items()}
    with pytest.raises((TypeError, ValueError), match=message):
        varlen_attention(**{**arguments, **change})


def test_the_longest_may_be_more_than_there_is(device):
    args = packed((7, 3), 3, 16, torch.float32, device)
    assert torch.equal(varlen_attention(*args[:5], 9, 12), varlen_attention(*args))


def test_attention_backend_again_and_nested(install):
    install(*STUBS["flash2"])
    sdpa = attention_backend("sdpa")
    assert attention._default == "sdpa"
    for _ in range(3):
        with sdpa as same:
            assert same is sdpa and attention._default == "sdpa"
            with attention_backend("flash2") as flash:
                assert attention._default == "flash2"
                with sdpa, flash:
                    assert attention._default == "flash2"
                    with sdpa:
                        assert attention._default == "sdpa"
                    assert attention._default == "flash2"
                assert attention._default == "flash2"
            assert attention._default == "sdpa"
        assert attention._default == "auto"
    with pytest.raises(KeyError), sdpa:
        raise KeyError
    assert attention._default == "auto"
