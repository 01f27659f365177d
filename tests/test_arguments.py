"""Every argument of every public function of ralu_kernels, given what it must not be: refused by name."""

import inspect
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

import ralu_kernels
from ralu_kernels import QKV, PackedLayout, TokenPlan, packed_layout, plan_tokens

NAN, INF = math.nan, math.inf
F32, I32 = torch.float32, torch.int32


class Odd:
    """Nothing that anything could be made of."""


def zeros(*shape, dtype=F32, **options):
    return torch.zeros(shape, dtype=dtype, **options)


def no_tensors():
    return [
        None,
        "x",
        1.5,
        True,
        1 + 2j,
        [[1.0]],
        (1.0,),
        {},
        Odd(),
        np.zeros((2, 12)),
        torch.float32,
        torch.Size((2, 3)),
    ]


def values(*shape, dtype=F32, optional=False):
    """Wrong for a tensor of values of this shape and dtype."""
    good = zeros(*shape)
    wrong = no_tensors()[1:] if optional else no_tensors()
    wrong += [good.double(), good.to(torch.complex64), good.long(), good.bool(), good.to_sparse(), good[None], good[0]]
    wrong += [zeros(*shape, dtype=dtype, requires_grad=True), torch.nn.Parameter(good)]
    return wrong


def indices(*shape):
    """Wrong for a tensor of indices."""
    good = zeros(*shape, dtype=I32)
    return [
        *no_tensors(),
        good.to(torch.int16),
        good.float(),
        good.bool(),
        good.to(torch.complex64),
        good[None],
        good.to("meta"),
    ]


def no_numbers():
    return [None, "1", "nan", 1 + 2j, True, [1.0], (0.1,), {}, Odd(), np.zeros(2), np.ones(1), zeros(1), zeros(2, 2)]


def finite(*more):
    return [*no_numbers(), NAN, INF, -INF, 1e300, 10**400, Fraction(10**400), *more]


def no_ints():
    return [None, "1", 1.0, 1.5, NAN, INF, 1 + 2j, True, [1], (1,), {}, Odd(), np.zeros(1, dtype=int), zeros(1), 10**30]


def seeds():
    return [
        None, "1", 1.5, NAN, 1 + 2j, True, [1, 2], {}, Odd(), np.zeros(2, dtype=int), 2**63, -(2**63) - 1, zeros(2),
        zeros(2, dtype=I32), zeros(3, dtype=torch.int64), zeros(2, 1, dtype=torch.int64),
        zeros(2, dtype=torch.int64, device="meta"),
    ]  # fmt: skip


def backends():
    return [
        None,
        1,
        1.5,
        True,
        1 + 2j,
        [],
        ["native"],
        (),
        {},
        Odd(),
        np.zeros(2),
        zeros(2),
        "",
        "cuda",
        "Native",
        "auto ",
    ]


def choices():
    return [
        None,
        1,
        1.5,
        True,
        1 + 2j,
        [],
        ["pixel"],
        (),
        {},
        Odd(),
        np.zeros(2),
        zeros(2),
        "",
        "Exact",
        "pixels",
        b"x",
    ]


def devices():
    return [None, 1.5, True, 1 + 2j, [], ("cpu",), {}, Odd(), np.zeros(2), zeros(2), "", "nowhere", "cpu:x", F32]


PLAN = plan_tokens(torch.rand(2, 12), (3, 4), ratio=0.5)
OTHER_PLAN = plan_tokens(torch.rand(3, 12), (4, 3), ratio=0.25)
PLANS = [*no_tensors(), OTHER_PLAN, PLAN.to("meta"), vars(PLAN)]
MASK = torch.ones(2, 5).tril(3).bool()  # 9 of 10 tokens
LAYOUT = packed_layout(MASK, 2, 5, "cpu")
OTHER_LAYOUTS = [packed_layout(None, 2, 6, "cpu"), packed_layout(None, 2, 5, "meta")]
LAYOUTS = [*no_tensors(), *OTHER_LAYOUTS]
STARTS = torch.tensor([0, 4, 9], dtype=I32)
WRONG_STARTS = [
    *indices(3), *(torch.tensor(rows, dtype=I32) for rows in ([0, 4, 8], [0, 9, 4], [1, 4, 9], [-1, 4, 9], [0], [])),
    STARTS.repeat_interleave(2)[::2],
]  # fmt: skip
IMAGE = torch.zeros(2, 6, 8, dtype=torch.uint8)
STREAMS = [QKV(*[zeros(2, n, 48)] * 3, zeros(16), zeros(16)) for n in (2, 3)]
TABLES = zeros(5, 16), zeros(5, 16)


def with_stream(**change):
    return [STREAMS[0], STREAMS[1]._replace(**change)]


TRANSITION = dict(plan=PLAN, scale=1.0, noise_scale=0.5, c=0.1, seed=3)
WRONG_TRANSITION = {
    "plan": PLANS,
    "scale": finite(),
    "noise_scale": finite(),
    "c": [*no_numbers(), NAN, INF, -INF, -0.01, 0.26],
    "seed": seeds(),
    "granularity": choices(),
    "kept_noise": choices(),
    "backend": backends(),
}
ROWS = zeros(9, 8)
VECTOR = zeros(2, 8)
WRONG_ROWS = [*values(9, 8), zeros(9, 8, 1)]
WRONG_VECTOR = [*values(2, 8), zeros(3, 8), zeros(2, 7), zeros(2, 8, device="meta")]
ADALN = {"cu_seqlens": WRONG_STARTS[1:], "eps": finite(-1e-6), "backend": backends()}
WRONG_Y = [*values(9, 8), zeros(8, 8), zeros(9, 7), zeros(9, 8, dtype=torch.half), zeros(9, 8, device="meta")]
HEADS = zeros(9, 2, 16)
WRONG_HEADS = [*values(9, 2, 16), zeros(9, 16, 2).mT]
WRONG_KEYS = [*WRONG_HEADS, zeros(9, 1, 16), zeros(9, 2, 8), HEADS.half(), HEADS.to("meta")]
PLAN_FIELDS = dict(PLAN.__dict__)
LAYOUT_FIELDS = dict(LAYOUT.__dict__)
WRONG_THRESHOLDS = [*no_numbers(), NAN, INF, -INF, -1]


def rows_of(x, *others):
    """Change an index in place of ``others``, each in a tensor of its own."""
    return [x.flatten().index_fill(0, torch.tensor(0), value).view(x.shape) for value in others]


# Function -> its good arguments, and for each argument the bad ones.
CASES = {
    ralu_kernels.upsample_renoise: (
        dict(x=zeros(2, 4, 3, 5), scale=1.0, noise_scale=0.5, c=0.1, seed=3),
        {
            "x": values(2, 4, 3, 5),
            **{name: WRONG_TRANSITION[name] for name in ("scale", "noise_scale", "c", "seed", "backend")},
            "stage": [*no_ints(), -1, 2**31],
        },
    ),
    ralu_kernels.plan_tokens: (
        dict(scores=zeros(2, 12), grid=(3, 4), ratio=0.5),
        {
            "scores": values(2, 12),
            "grid": [None, "34", 12, 1.5, True, {3, 4}, np.array([3, 4]), zeros(2), (3,), (3, 4, 1), (3, 5), (-3, -4),
                     (0, 12), (3.0, 4.0), (True, 12), (None, 4), ("3", 4), Odd()],
            "ratio": [*no_numbers(), NAN, INF, -INF, -0.1, 1.1],
            "backend": backends(),
        },
    ),
    ralu_kernels.upsample_selected: (
        TRANSITION | dict(low=zeros(2, 12, 8)),
        WRONG_TRANSITION | {"low": [*values(2, 12, 8), zeros(2, 11, 8), zeros(3, 12, 8), zeros(2, 12, 6)]},
    ),
    ralu_kernels.upsample_remaining: (
        TRANSITION | dict(packed=zeros(60, 8)),
        WRONG_TRANSITION | {"packed": [*values(60, 8), zeros(59, 8), zeros(60, 6)]},
    ),
    ralu_kernels.TokenPlan: (
        {name: PLAN_FIELDS[name] for name in TokenPlan.__match_args__},
        {
            "grid": [None, "34", 12, 1.5, True, {3, 4}, np.array([3, 4]), zeros(2), (3,), (-3, -4), (0, 12), (3.0, 4.0),
                     (True, 12), (4, 4)],
            "cu_seqlens": [*indices(3), zeros(4, dtype=I32), *rows_of(PLAN.cu_seqlens, 1, -1)],
            "max_seqlen": [*no_ints(), 0, -1, 11, 49, 29],
            "source": [*indices(60), zeros(30, dtype=I32), torch.cat([PLAN.source] * 2), *rows_of(PLAN.source, -1, 12)],
            "child": [*indices(60), zeros(30, dtype=I32), *rows_of(PLAN.child, -2, 4, 2)],
            "inverse": [*indices(2, 48), zeros(2, 47, dtype=I32), *rows_of(PLAN.inverse, -1, 60, 2**31 - 1, 7)],
            "positions": [*values(60, 2)[:-2], zeros(60, 3), zeros(59, 2), zeros(60, 2, device="meta")],
        },
    ),
    ralu_kernels.modulate: (
        dict(x=ROWS, shift=VECTOR, scale=VECTOR, cu_seqlens=STARTS),
        {"x": WRONG_ROWS, "shift": WRONG_VECTOR, "scale": WRONG_VECTOR, **ADALN},
    ),
    ralu_kernels.gated_add: (
        dict(x=ROWS, gate=VECTOR, y=ROWS, cu_seqlens=STARTS),
        {"x": WRONG_ROWS, "gate": WRONG_VECTOR, "y": WRONG_Y, "cu_seqlens": ADALN["cu_seqlens"], "backend": backends()},
    ),
    ralu_kernels.gated_add_modulate: (
        dict(x=ROWS, gate=VECTOR, y=ROWS, shift=VECTOR, scale=VECTOR, cu_seqlens=STARTS),
        {"x": WRONG_ROWS, "gate": WRONG_VECTOR, "y": WRONG_Y, "shift": WRONG_VECTOR, "scale": WRONG_VECTOR, **ADALN},
    ),
    ralu_kernels.concat_gelu: (
        dict(x=zeros(2, 3, 8), y=zeros(2, 3, 9)),
        {
            "x": values(2, 3, 8),
            "y": [*values(2, 3, 9), zeros(2, 4, 9), zeros(2, 3, 9).half(), zeros(2, 3, 9, device="meta")],
            "backend": backends(),
        },
    ),
    ralu_kernels.packed_layout: (
        dict(mask=MASK, batch=2, length=5, device="cpu", total=None),
        {
            "mask": [*no_tensors()[1:], MASK.int(), MASK.float(), MASK.to(torch.complex64), MASK[0], MASK[None], MASK.T,
                     MASK.to("meta"), MASK.to_sparse()],
            "batch": [*no_ints(), -1, 2**31, 3],
            "length": [*no_ints(), -1, 2**31, 4],
            "device": devices(),
            "total": [*no_ints()[1:], -1, 2**31, 11],
        },
    ),
    ralu_kernels.PackedLayout: (
        {name: LAYOUT_FIELDS[name] for name in PackedLayout.__match_args__},
        {
            "rows": [*indices(9), zeros(11, dtype=I32), *rows_of(LAYOUT.rows, -1, 10, 9)],
            "inverse": [*indices(10), zeros(9, dtype=I32), *rows_of(LAYOUT.inverse, -2, 9, 3)],
            "cu_seqlens": [*indices(3), *(start for start in WRONG_STARTS[-7:])],
            "max_seqlen": [*no_ints(), -1, 6, 3],
            "batch": [*no_ints(), -1, 3, 2**31],
            "length": [*no_ints(), -1, 4, 2**31],
        },
    ),
    ralu_kernels.pack_qkv: (
        dict(streams=STREAMS, layout=LAYOUT, heads=3, rotary=TABLES),
        {
            "streams": [None, "x", 1, True, {}, Odd(), np.zeros(2), zeros(2, 2, 48), [], STREAMS * 2, STREAMS[0],
                        [None],
                        [tuple(STREAMS[0])], *(with_stream(k=x) for x in values(2, 3, 48)),
                        *(with_stream(norm_q=x) for x in values(16, optional=True)),
                        with_stream(v=zeros(2, 3, 48, device="meta")), with_stream(v=zeros(2, 3, 48).half()),
                        with_stream(q=zeros(3, 3, 48)), with_stream(norm_k=zeros(17))],
            "layout": LAYOUTS,
            "heads": [*no_ints(), 0, -3, 5, 16, 2**40],
            "rotary": ["xy", 1, True, {}, Odd(), np.zeros(2), zeros(2, 5, 16), (), TABLES[:1], TABLES * 2, [None, None],
                       *((x, TABLES[1]) for x in values(5, 16)), *((TABLES[0], x) for x in values(5, 16)),
                       (TABLES[0].half(), TABLES[1]), (TABLES[0], TABLES[1].to("meta")), (zeros(4, 16), zeros(4, 16))],
            "eps": finite(-1e-6),
            "backend": backends(),
        },
    ),
    ralu_kernels.unpack: (
        dict(x=HEADS, layout=LAYOUT, lengths=(2, 3)),
        {
            "x": [*values(9, 2, 16), zeros(8, 2, 16)],
            "layout": LAYOUTS,
            "lengths": [None, "23", 5, 1.5, True, {2, 3}, np.array([2, 3]), zeros(2), Odd(), (), (1, 1, 3), (2, 2),
                        (7, -2),
                        (2.0, 3.0), (None, 5), ("2", 3)],
            "backend": backends(),
        },
    ),
    ralu_kernels.varlen_attention: (
        dict(q=HEADS, k=HEADS, v=HEADS, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS + 0, max_seqlen_q=5, max_seqlen_k=5),
        {
            "q": WRONG_HEADS,
            "k": WRONG_KEYS,
            "v": [*WRONG_KEYS, zeros(8, 2, 16)],
            "cu_seqlens_q": WRONG_STARTS,
            "cu_seqlens_k": [*WRONG_STARTS, torch.tensor([0, 4, 6, 9], dtype=I32)],
            "max_seqlen_q": [*no_ints(), -1, 2**31, 4],
            "max_seqlen_k": [*no_ints(), -1, 2**31, 4],
            "softmax_scale": finite()[1:],
            "backend": [*backends(), "native", "flash"],
        },
    ),
    ralu_kernels.attention_backend: (dict(name="sdpa"), {"name": [*backends(), "xformers", "native"]}),
    ralu_kernels.canny: (
        dict(image=IMAGE),
        {"image": [*no_tensors(), IMAGE.float(), IMAGE.int(), IMAGE.bool(), IMAGE[0], IMAGE[None], IMAGE.to_sparse()],
         "low": WRONG_THRESHOLDS, "high": WRONG_THRESHOLDS, "backend": [*backends(), "triton"]},
    ),
    ralu_kernels.edge_density: (
        dict(image=IMAGE, block=2),
        {"image": [*no_tensors(), IMAGE.float(), IMAGE.int(), IMAGE.bool(), IMAGE[0], IMAGE[None], IMAGE.to_sparse()],
         "block": [None, "2", 1.5, NAN, True, {2}, np.array([2, 2]), zeros(2), Odd(), (), (2,), (2, 2, 2), 4, 0, -2,
                   (3, 0),
                   (1, 3), (2.0, 2.0), 10**30],
         "low": WRONG_THRESHOLDS, "high": WRONG_THRESHOLDS, "backend": [*backends(), "triton"]},
    ),
}  # fmt: skip
TABLE = [(function, name, wrong) for function, (_, table) in CASES.items() for name, wrong in table.items()]


@pytest.mark.parametrize(
    "function, name, wrong", TABLE, ids=[f"{function.__name__}-{name}" for function, name, _ in TABLE]
)
def test_wrong_arguments_are_refused_by_name(function, name, wrong):
    good = CASES[function][0]
    assert len(wrong) >= 12
    for value in wrong:
        with pytest.raises((TypeError, ValueError)) as refused:
            function(**{**good, name: value})
        assert type(refused.value) in (TypeError, ValueError)
        assert name in str(refused.value), (value, refused.value)
        assert len(str(refused.value)) < 500


def test_a_threshold_takes_the_place_of_a_ratio():
    for value in finite()[1:]:
        with pytest.raises((TypeError, ValueError), match="threshold"):
            plan_tokens(zeros(2, 12), (3, 4), threshold=value)
    with pytest.raises(ValueError, match=r"scores.device must be one that has values, .*threshold.*got meta"):
        plan_tokens(zeros(2, 12, device="meta"), (3, 4), threshold=0.5)


def test_a_plan_goes_to_devices_alone():
    for value in devices():
        with pytest.raises((TypeError, ValueError), match="device"):
            PLAN.to(value)


def test_the_table_is_complete():
    """Every public name, every argument; what is refused is what is varied, since the others are good."""
    functions = {getattr(ralu_kernels, name) for name in ralu_kernels.__all__} - {
        QKV
    }  # a tuple, checked where it is used
    assert functions == set(CASES)
    varied = {function: set(table) for function, (_, table) in CASES.items()}
    varied[ralu_kernels.plan_tokens] |= {"threshold"}
    for function, (good, _) in CASES.items():
        assert varied[function] == set(inspect.signature(function).parameters)
        if function is not ralu_kernels.attention_backend:
            function(**good)


def test_numbers_of_numpy_are_numbers():
    low = torch.randn(2, 12, 8)
    numbers = dict(scale=np.float32(0.5), noise_scale=np.float64(0.25), c=np.float32(0.125), seed=np.int64(3))
    expected = ralu_kernels.upsample_selected(low, PLAN, 0.5, 0.25, 0.125, 3)
    assert torch.equal(ralu_kernels.upsample_selected(low, PLAN, **numbers), expected)
    plan = plan_tokens(torch.rand(2, 12), (np.int64(3), np.int32(4)), ratio=np.float64(0.5))
    assert plan.grid == (3, 4) and all(type(side) is int for side in plan.grid)
    assert replace(PLAN, max_seqlen=np.int64(30)).max_seqlen == 30
