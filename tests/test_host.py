"""Launches of the fused blocks on a GPU's path without a GPU, and what host.py makes of them."""

import sys
from pathlib import Path

import pytest
import torch

from ralu_kernels._backend import INTERPRET, triton

if triton is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if INTERPRET:
    pytest.skip("TRITON_INTERPRET=1 leaves Triton no compiler: run in a process without it", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import host
import record
import tables

from ralu_kernels import _backend, qkv


@pytest.fixture
def launched(monkeypatch):
    """Every launch as it reaches the driver: grid, compiled kernel, arguments."""
    seen = []
    monkeypatch.setattr(host.Launching, "launched", lambda *args: seen.append((args[:3], args[4], args[-1])))
    monkeypatch.setattr(_backend, "_variants", {})
    return seen


def layouts():
    """Arguments that Triton compiles for differently: dtypes, addresses and numbers that divide by 16 or not, and 1."""
    half = torch.bfloat16
    for dtype, width, first, offset in (
        (torch.float32, 32, 16, 0), (half, 32, 16, 0), (half, 32, 16, 1), (half, 32, 1, 0), (half, 24, 16, 0)
    ):  # fmt: skip
        x = torch.zeros(18 * width + offset, dtype=dtype)[offset:].view(18, 1, width)
        yield x, torch.zeros(18, dtype=torch.int32), first, 18 - first


def test_the_variant_that_is_kept_is_the_one_triton_finds(launched):
    """Each is launched three times: by Triton, as it is kept, and by Triton again."""
    with host.stubbed():
        for arguments in layouts():
            for again in (False, False, True):
                if again:
                    _backend._variants.clear()
                qkv._unpack_triton(*arguments)
    kernels = [kernel for _, kernel, _ in launched]
    by_triton, kept, again = launched[::3], launched[1::3], launched[2::3]
    outputs = slice(2, 4)  # new ones every time
    for first, second, third in zip(by_triton, kept, again, strict=True):
        assert first[:2] == second[:2] == third[:2]
        for other in (second, third):
            assert [x for i, x in enumerate(other[2]) if i not in (2, 3)] == [
                x for i, x in enumerate(first[2]) if i not in (2, 3)
            ]
            assert [(x.shape, x.dtype) for x in other[2][outputs]] == [(x.shape, x.dtype) for x in first[2][outputs]]
    assert len(set(map(id, kernels))) == 5


def test_no_more_variants_are_kept_than_a_few_thousand(launched, monkeypatch):
    monkeypatch.setattr(_backend, "_MOST_VARIANTS", 2)
    kept = []
    with host.stubbed():
        for arguments in layouts():
            qkv._unpack_triton(*arguments)
            kept.append(len(_backend._variants))
    assert kept == [1, 2, 1, 2, 1] and len(launched) == 5


def test_hooks_hear_of_every_launch(launched, monkeypatch):
    """They are handed to the driver's launch, with what tells the kernel's name."""
    hooks, arguments, seen = triton.knobs.runtime.launch_enter_hook, next(layouts()), []
    monkeypatch.setattr(host.Launching, "launched", lambda *args: seen.append(args))
    with host.stubbed():
        for calls in ([], [], [print], []):
            monkeypatch.setattr(hooks, "calls", calls)
            qkv._unpack_triton(*arguments)
    names = [[x.get()["name"] for x in args if hasattr(x, "get")] for args in seen]
    assert names[1:] == [[], ["_unpack_kernel"], []]


def test_the_ratio_is_that_of_steps_side_by_side(monkeypatch):
    """Where the machine gets slower meanwhile, the ratio of the medians, 10 / 20 here, is not the ratio of the work."""
    milliseconds = [1, 1, 1, 1, 10, 9, 20, 10, 40, 36]  # stock and fused in turn, the first two of each to warm up
    clock = [0.0]

    def take_time():
        clock[0] += 1e-3 * milliseconds.pop(0)

    monkeypatch.setattr(host, "calls", lambda name: {"stock": take_time, "fused": take_time})
    monkeypatch.setattr(host.time, "process_time", lambda: clock[0])
    stock, fused = host.rows("flux-dev", 3)
    assert (stock["ms"], fused["ms"]) == ("20.00", "10.00") and (stock["ratio"], fused["ratio"]) == ("1.000", "0.900")


def test_rows_count_every_launch(monkeypatch, tmp_path, capsys):
    """A double block has seven, one of three operations for each stream and one for both; a single block has four."""
    for name, counts in {
        "flux-dev": {"num_layers": 2, "num_single_layers": 3},
        "sd3.5-large": {"num_layers": 2},
    }.items():
        kind, config = host.MODELS[name]
        monkeypatch.setitem(host.MODELS, name, (kind, config | counts))
    host.main(["--repeats", "3", "--output", str(tmp_path / "host.csv")])
    rows = {(row["model"], row["variant"]): row for row in record.read(tmp_path / "host.csv")}
    assert [rows[model, "stock"]["launches"] for model in host.MODELS] == ["0", "0"]
    # SD3's last block computes no text behind its attention.
    assert rows["flux-dev", "fused"]["launches"] == str(2 * 7 + 3 * 4)
    assert rows["sd3.5-large", "fused"]["launches"] == str(7 + 5)
    for row in rows.values():
        assert float(row["p10"]) <= float(row["ms"]) <= float(row["p90"]) and row["commit"] and row["device"]
    table = tables.block(tmp_path / "host.csv")
    assert table.count("\n| ") == 4 and f"| {rows['flux-dev', 'fused']['ms']} (" in table
    assert triton.runtime.driver._active is None or not isinstance(triton.runtime.driver._active, host.Launching)
