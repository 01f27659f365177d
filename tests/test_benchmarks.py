"""The benchmarks on shapes that take milliseconds: what they count and conclude, and what they refuse to write."""

import argparse
import csv
import importlib
import math
import os
import re
import runpy
import subprocess
import sys
import tarfile
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import scipy.stats
import tiny
import torch

import ralu
import ralu_kernels
from ralu import blocks, families
from ralu.method import Method
from ralu_kernels import attention

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench
import block_cases
import cases
import compare
import e2e
import models
import record
import render
import saved
import tables
import work

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
NATIVE = bool(cases.installed(CPU, "native"))


@pytest.fixture(autouse=True)
def unpoisoned():
    """Leave memory as it comes: the benchmarks time what users run."""
    torch.use_deterministic_algorithms(False)


def measured(tmp_path, *arguments):
    output = tmp_path / "rows.csv"
    bench.main(["--device", "cpu", "--threads", "1", "--budget", "0", "--output", str(output), *arguments])
    return record.read(output)


# ---- kernels ----


def test_every_operation_has_rows(tmp_path, monkeypatch):
    small = {"flux-dev": (True, True), "sd3-medium": (False, False), "sd3.5-large": (True, False)}
    for model, (norm, rotary) in small.items():
        monkeypatch.setitem(block_cases.BLOCKS, model, block_cases.Block(2, 8, 6, norm, rotary))
    rows = measured(tmp_path, "--ops", *bench.OPERATIONS, "--pixels", "128", "--batch", "1", "3")
    for op, operation in bench.OPERATIONS.items():
        for model in operation.models:
            providers = {row["provider"] for row in rows if (row["op"], row["model"], row["batch"]) == (op, model, "1")}
            is_transition = op in bench.TRANSITIONS
            assert providers >= {"eager", "copy"} | ({"reference"} if is_transition else set())
            assert not (is_transition and NATIVE) or "native" in providers
    for row in rows:
        assert row["torch"] == torch.__version__ and row["date"] and row["device"]
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        for provider, column in (("eager", "eager_ratio"), ("copy", "copy_fraction")):
            other = next(one for one in rows if record.case(one) == record.case(row | {"provider": provider}))
            ratio = float(other["p50_ms"]) / float(row["p50_ms"])
            assert float(row[column]) == pytest.approx(ratio, rel=1e-3)


def test_other_packages_do_the_same_work(capsys, monkeypatch):
    """Where they are installed their results are checked as ours are; where not, a line says why they are left out."""
    monkeypatch.setitem(block_cases.BLOCKS, "flux-dev", block_cases.Block(2, 8, 6, True, True))
    shape = cases.Shape("flux-dev", 128, 2, torch.float32, CPU)
    for name in ("modulate", "pack_qkv"):
        cases.package.cache_clear()
        with monkeypatch.context() as absent:
            absent.setattr(cases, "import_module", lambda module: importlib.import_module(f"no.{module}"))
            assert bench.OPERATIONS[name].case(shape).others == {}
        assert capsys.readouterr().err == "left out: comfy_kitchen (No module named 'no')\n"
    cases.package.cache_clear()
    pytest.importorskip("comfy_kitchen")
    for name in ("modulate", "pack_qkv"):
        case = bench.OPERATIONS[name].case(shape)
        cases.agree(case.others["comfy-kitchen"](), case.ours("reference"))


@pytest.mark.parametrize(
    "op, required",
    [
        ("upsample_renoise", 16 * 8 * 8 * 4 * (1 + 4)),
        # 16 low tokens of 64 values, of which 3 become 4 each; 4 bytes for each of the 64 rows of the high grid.
        ("upsample_selected", (16 + 16 + 3 * 3) * 64 * 4 + 64 * 4),
        ("upsample_remaining", (16 + 3 * 3 + 64) * 64 * 4 + 64 * 4),
        ("edge_density", 64 * 64 + 4 * 4 * 4),
    ],
)
def test_bandwidth_counts_what_must_be_read_and_written(tmp_path, op, required):
    for row in measured(tmp_path, "--ops", op, "--pixels", "128", "--batch", "1", "--dtypes", "float32"):
        if row["gbps"]:
            assert float(row["gbps"]) == pytest.approx(required / float(row["p50_ms"]) / 1e6, rel=1e-3)


@pytest.mark.parametrize(
    "op, spoil",
    [
        ("upsample_remaining", lambda out: out + 1e-3),
        pytest.param("plan_tokens", lambda plan: replace(plan, positions=plan.positions + 1), marks=pytest.mark.native),
    ],
)
def test_a_wrong_kernel_gets_no_row(tmp_path, monkeypatch, op, spoil):
    right = getattr(ralu_kernels, op)

    def wrong(*args, backend="reference", **kwargs):
        out = right(*args, backend="reference", **kwargs)
        return out if backend == "reference" else spoil(out)

    monkeypatch.setattr(ralu_kernels, op, wrong)
    with pytest.raises(AssertionError):
        measured(tmp_path, "--ops", op, "--pixels", "128", "--batch", "1", "--dtypes", "float32")
    assert not (tmp_path / "rows.csv").exists()


@pytest.mark.parametrize("op", bench.TRANSITIONS)
def test_noise_of_another_law_is_seen(op, monkeypatch):
    """Eager that forgets the correlation, whose every value has almost the right variance."""
    shape = cases.Shape(cases.BOTH, 2048, 1, torch.float32, CPU)
    case = bench.OPERATIONS[op].case(shape)
    case.check(case.eager())
    white = (1 - cases.C) ** 0.5
    monkeypatch.setattr(cases, "decorrelate", lambda eps, mean: eps.mul_(white))
    with pytest.raises(AssertionError, match="variance"):
        case.check(case.eager())


def test_calls_take_turns_until_their_budget_is_spent(monkeypatch):
    monkeypatch.setattr(record, "clock", lambda device: lambda call: call())
    order = []

    def call(name, milliseconds):
        order.append(name)
        return milliseconds

    calls = {"slow": partial(call, "slow", 200.0), "fast": partial(call, "fast", 1.0)}
    times = record.in_turn(calls, CPU, budget=0.5, repeats=40)
    assert {name: len(spent) for name, spent in times.items()} == {"slow": 3, "fast": 40}
    assert order[:8] == ["slow", "fast"] * 4  # the first round is not timed


def test_work_is_begun_until_the_time_is_up(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(record.time, "monotonic", lambda: clock[0])

    def done(minutes):
        for one in record.in_time({"first": 1, "second": 2, "third": 3}, minutes):
            clock[0] += 60
            yield one

    assert [*done(1.5)] == [1, 2]
    assert capsys.readouterr().out == "after 1.5 minutes 1 of 3 are left out:\n  third\n"
    assert [*done(None)] == [1, 2, 3] and not capsys.readouterr().out
    bench.main(["--device", "cpu", "--ops", "plan_tokens", "--pixels", "128", "--batch", "1", "3", "--minutes", "-1"])
    assert "2 of 2 are left out" in capsys.readouterr().out


def test_a_gpus_minutes_begin_with_what_the_tables_have():
    """Every operation at 1024 pixels of FLUX, then at 2048; only these have graphs, but in a run without a limit."""
    args = argparse.Namespace(dtypes=["bfloat16", "float32"], batch=[1, 4], pixels=[1024, 2048, 512])
    names = list(bench.OPERATIONS)
    work = list(bench.by_worth(names, args, torch.device("cuda")).values())
    for i, pixels in enumerate(args.pixels):
        first = work[i * len(names) : (i + 1) * len(names)]
        assert [name for name, _ in first] == names
        assert {(shape.pixels, shape.batch) for _, shape in first} == {(pixels, 1)}
        assert all(shape.model in tables.FLUX for _, shape in first)
        assert {name for name, shape in first if shape.dtype != torch.bfloat16} == {"plan_tokens", "edge_density"}
    every = [
        (name, model, dtype, batch, pixels)
        for name, operation in bench.OPERATIONS.items()
        for model, dtype, batch, pixels in product(
            operation.models, operation.dtypes or args.dtypes, args.batch, args.pixels
        )
    ]
    assert len(set(work)) == len(work) == len(every)

    def graphs(in_minutes):
        return [one for one in work if bench.has_graph(bench.OPERATIONS[one[0]], one[1], in_minutes)]

    compiled = [name for name in names if name not in ("plan_tokens", "edge_density")]
    assert [(shape.pixels, name) for name, shape in graphs(True)] == [*product((1024, 2048), compiled)]
    assert graphs(False) == [one for one in work if one[1].batch == 1]


@pytest.mark.parametrize("dry", ["", "1"])
def test_a_gpus_session_runs_its_scripts_with_arguments_that_they_take(tmp_path, monkeypatch, dry):
    """All its steps, with something in place of Python that notes what it is asked for."""
    script, asked = tmp_path / "python", tmp_path / "asked"
    script.write_text(f'#!/bin/sh\necho "$@" >>{asked}\n')
    script.chmod(0o755)
    for tool in ("ncu", "compute-sanitizer"):
        (tmp_path / tool).symlink_to(script)
    folders = {name: str(tmp_path / name.lower()) for name in ("OUT", "KIT", "CACHE")}
    done = subprocess.run(
        ["bash", "benchmarks/gpu/gpu_session.sh"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | folders | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PY": str(script), "DRY": dry},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = dict(re.findall(r"^(\S+) +(rc=\S+)", (tmp_path / "out/summary.txt").read_text(), re.MULTILINE))
    readme = (ROOT / "benchmarks/gpu/README.md").read_text()
    steps = re.findall(
        r"[a-z0-9]+", " ".join(re.findall(r"^\| ([a-z0-9, ]+) \| .* \| [\d, ]+ \|$", readme, re.MULTILINE))
    )
    assert len(steps) > 9 and {name.split(".")[0] for name in verdicts} == set(steps) - ({"ncu"} if dry else set())
    assert set(verdicts.values()) == {"rc=0"}
    with tarfile.open(tmp_path / "out/all.tar.gz") as archive:
        assert {"./summary.txt", "./logs/smoke.log"} <= set(archive.getnames())
    commands = asked.read_text().splitlines()
    assert all((ROOT / file).exists() for line in commands for file in re.findall(r"tests/\S+", line))
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *args):
        raise StopIteration(parse(parser, *args))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    ran = [match.groups() for line in commands if (match := re.search(r"(benchmarks/\S+\.py)(.*)", line))]
    assert len(ran) > 6
    for file, arguments in ran:
        monkeypatch.setattr(sys, "argv", [file, *arguments.split()])
        with pytest.raises(StopIteration):
            runpy.run_path(str(ROOT / file), run_name="__main__")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells a process's peak")
def test_peak_memory_sees_what_is_freed():
    def call():
        torch.ones(2**26)
        return "done"

    out, before, peak = record.peak_memory(call, CPU)
    assert out == "done" and 0.95 * 2**28 < peak - before < 1.2 * 2**28


def test_rows_of_other_columns_are_kept(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    record.append(path, [{"op": "a", "p50_ms": 1}])
    record.append(path, [{"op": "b", "p50_ms": 2, "memory": 3}])
    assert record.read(path) == [{"op": "a", "p50_ms": "1", "memory": ""}, {"op": "b", "p50_ms": "2", "memory": "3"}]


# ---- whole images ----


@pytest.fixture
def small_models(monkeypatch):
    """Give the published models' names to tiny ones; a token is 4x4 pixels."""
    for name, pipe in (("flux-dev", tiny.flux(guidance_embeds=True)), ("sd3-medium", tiny.sd3("3.0"))):
        family = families.family_of(pipe)
        monkeypatch.setitem(family.published, name, dict(pipe.transformer.config))
        monkeypatch.setattr(family, "vae", (type(pipe.vae), dict(pipe.vae.config)))


def counted(model, method):
    return record.transformer_tflop(model.pipe.transformer, lambda: e2e.run(model, e2e.Case(Method(method)), 1))


@pytest.mark.parametrize(
    "name, preset, cached, fused, batches",
    [("flux-dev", "flux-7x", ["stock-6+taylorseer"], ["no", "yes"], "1"), ("sd3-medium", "sd3-3x", [], ["no"], "12")],
)
def test_whole_images(tmp_path, small_models, name, preset, cached, fused, batches):
    output = tmp_path / "e2e.csv"
    methods = ["stock-6", preset, *cached]
    e2e.main(["--device", "cpu", "--models", name, "--methods", *methods, "--fused", *fused, "--pixels", "32",
              "--batch", *batches, "--repeats", "1", "--output", str(output)])  # fmt: skip
    rows = {(record.label(row), row["batch"]): row for row in record.read(output)}
    labels = [f"{method}{', fused' * (switch == 'yes')}" for method in methods for switch in fused]
    assert set(rows) == set(product(labels, batches))
    model = models.Model(name, 32, CPU)
    for (label, batch), row in rows.items():
        method = row["method"]
        parts = {part: float(row[f"{part}_ms"]) for part in e2e.PARTS}
        assert sum(parts.values()) == pytest.approx(float(row["p50_ms"]), abs=0.1)
        assert parts["transformer"] > 0 and parts["decode"] > 0 and parts["outside"] > 0
        assert (parts["preview"] > 0) == method.startswith(preset)
        assert int(row["calls"]) == {"flux-7x": 10, "sd3-3x": 12}.get(method, 6)
        assert float(row["images_per_s"]) == pytest.approx(1e3 * int(batch) / float(row["p50_ms"]), rel=1e-3)
        assert (row["fused"] == "yes") == label.endswith("fused")
        if method in cached:
            assert not row["tflop"]
            continue
        # The quotient of the speed-up and the ratio of the work is explained in full.
        first = rows["stock-6", batch]
        factors = [float(row[key]) / float(first[key]) for key in ("tflop_per_s", "transformer_share")]
        assert float(row["speedup"]) == pytest.approx(float(row["flop_ratio"]) * math.prod(factors), rel=0.05)
    ratio = counted(model, "stock-6") / counted(model, preset)
    assert float(rows[preset, "1"]["flop_ratio"]) == pytest.approx(ratio, abs=1e-3)
    assert type(model.pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"

    profile = e2e.json.loads((tmp_path / f"e2e-{name}.json").read_text())
    tokens = [int(stage.split()[1]) for stage in profile["stages"]]
    assert set(profile["ms_per_call"]) == {label for label in labels if "taylorseer" not in label}
    assert tokens == [64, 16, 16 + 3 * int(16 * ralu.preset(preset).ratio), 64]
    for stage in profile["stages"].values():
        assert sum(stage["shares"].values()) == pytest.approx(1, abs=1e-3) and stage["shares"]["attention"] > 0
        assert stage["ms"] > 0 and stage["operators"] > 100
    table = tables.images(list(rows.values()), output)
    assert [table.count(f"| `{preset}`{', fused' * (switch == 'yes')} |") for switch in fused] == [1, 2][: len(fused)]


def test_switches_are_on_for_one_run(small_models):
    """All at once; afterwards the model is as it was, for the next one."""
    model = models.Model("flux-dev", 32, CPU)
    case = e2e.Case(Method("flux-5x"), fused=True, compile=True, attention="sdpa", diffusers_cache="firstblock")
    stock = model.pipe.transformer
    with e2e.switched(model, case) as steps:
        assert model.pipe.transformer is model.compiled
        assert steps == 15 and blocks.is_fused(model.pipe.transformer) and model.pipe.transformer.is_cache_enabled
        assert attention._default == "sdpa"
    assert model.pipe.transformer is stock and not blocks.is_fused(stock) and not stock.is_cache_enabled
    assert attention._default != "sdpa" and not isinstance(model.pipe.scheduler, ralu.RaluScheduler)
    assert record.label(case.columns) == "flux-5x, fused, compile, attention sdpa, diffusers cache firstblock"
    assert not e2e.work(model, case, 1)


def test_a_line_through_time_and_work(small_models, monkeypatch):
    """Calls that take 3 ms and 2 ms a GFLOP."""
    model = models.Model("flux-dev", 64, CPU)
    monkeypatch.setattr(e2e, "profile", lambda model, case: {tokens: {} for tokens in e2e.work(model, case, 1)})
    runs = {
        case: [{"calls": {t: [3 + 2e3 * each] * calls for t, (calls, each) in e2e.work(model, case, 1).items()}}]
        for case in (e2e.Case(Method("stock-6")), e2e.Case(Method("flux-5x")))
    }
    line = e2e.explanation(model, runs)
    assert line["fixed_ms_per_call"] == pytest.approx(3, abs=1e-3)
    assert line["tflop_per_s_beyond"] == pytest.approx(0.5, rel=1e-3)


def test_the_ladder_leaves_out_what_cannot_run():
    on_cpu, on_gpu = (e2e.ladder("flux", torch.device(kind)) for kind in ("cpu", "cuda"))
    assert [str(case.method) for case in on_cpu[:5]] == ["stock-50", "stock-10", "stock-7", "flux-5x", "flux-7x"]
    mild = Method("flux-5x")
    assert e2e.Case(mild, compile=True) in on_cpu and not any(case.fused for case in on_cpu)
    assert e2e.Case(mild, fused=True, compile=True) in on_gpu and set(on_cpu) < set(on_gpu)
    assert not any(case.diffusers_cache for case in e2e.ladder("sd3", torch.device("cuda")))


@pytest.mark.parametrize("method, message", [("stock", "needs its number of steps"), ("flux-5x+fused", "is no cache")])
def test_what_is_no_method_to_time_is_refused(capsys, method, message):
    with pytest.raises(SystemExit):
        e2e.main(["--methods", "flux-5x", method])
    assert message in capsys.readouterr().err


# ---- provenance ----


def test_results_do_not_make_a_commit_dirty(tmp_path, monkeypatch):
    kept, result = tmp_path / "ralu_kernels/__init__.py", tmp_path / "benchmarks/results/cpu.csv"
    for file in (kept, result):
        file.parent.mkdir(parents=True)
        file.touch()
    monkeypatch.setattr(record.ralu_kernels, "__file__", str(kept))
    assert record.provenance(CPU)["commit"] == "unknown"
    with monkeypatch.context() as without_git:
        without_git.setenv("PATH", str(tmp_path))
        assert record.provenance(CPU)["commit"] == "unknown"

    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    commit = git("rev-parse", "--short", "HEAD")
    result.write_text("row")
    assert record.provenance(CPU)["commit"] == commit
    kept.write_text("1")
    assert record.provenance(CPU)["commit"] == f"{commit}-dirty"


# ---- the README and the pages ----


def kernel_row(**changes):
    plain = {
        "op": "upsample_renoise", "provider": "native", "model": cases.BOTH, "pixels": "1024", "batch": "1",
        "dtype": "float32", "threads": "1", "p20_ms": "0.9", "p50_ms": "1.0", "p80_ms": "1.1", "gbps": "5",
        "copy_fraction": "0.4", "fill_fraction": "0.8", "eager_ratio": "8.9", "memory": "",
        "device": "A CPU", "isa": "AVX", "torch": "2.13", "triton": "", "cuda": "", "commit": "abc",
        "date": "2026-01-01",
    }  # fmt: skip
    return plain | changes


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_tables_are_of_the_rows(tmp_path):
    path = tmp_path / "a-cpu.csv"
    rows = [
        kernel_row(eager_ratio="3.3"),  # measured again below
        kernel_row(),
        kernel_row(pixels="2048", eager_ratio="6.32", fill_fraction="0.5"),
        kernel_row(provider="dense", p50_ms="2100", gbps="", eager_ratio="0.004"),
        *(kernel_row(provider=provider, pixels="2048", batch="16", p50_ms="", gbps="", memory=memory)
          for provider, memory in (("native", "1.00"), ("eager", "3.17"))),
    ]  # fmt: skip
    write(path, rows)
    block = tables.block(path)
    assert "| `upsample_renoise` | 8.9 / 6.3 |" in block and "3.3" not in block
    assert "| `upsample_renoise` | 1.2 / 2.0 | 1.0 | 3.2 | 2100 |" in block
    readme = f"top\n\n<!-- begin {path} -->\nold figures\n<!-- end {path} -->\n\nbottom\n"
    new = tables.rendered(readme, tmp_path)
    assert block in new and "old figures" not in new and new.startswith("top\n") and new.endswith("\nbottom\n")
    assert tables.rendered(new, tmp_path) == new
    render.draw_kernels(tables.latest(path), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    write(path, [row | {"cuda": "13.0", "device_type": "cpu"} for row in rows])  # a build for GPUs, on a CPU
    assert tables.block(path) == block


def test_gpu_tables(tmp_path):
    gpu = partial(kernel_row, cuda="13.0", isa="", device_type="cuda", threads="", dtype="bfloat16", triton="3.7")
    rows = [
        gpu(provider="triton", p50_ms="0.0123", copy_fraction="0.871"),
        gpu(provider="compile", p50_ms="0.0246", eager_ratio="4.4"),
        gpu(provider="triton", dtype="float32", p50_ms="7"),
    ]
    write(tmp_path / "gpu.csv", rows)
    assert "| `upsample_renoise`, bfloat16 | triton | 12.3 | 87% | 8.9 | 2.0 |" in tables.block(tmp_path / "gpu.csv")


def test_the_compile_table_has_the_worst_of_every_release(tmp_path):
    def row(triton, arch, registers, spill="0"):
        return {"kernel": "plan", "variant": "float32", "arch": arch, "registers": registers, "spill_bytes": spill,
                "triton": triton, "commit": "abc"}  # fmt: skip

    rows = [row("3.5.1", "sm_80", "64"), row("3.5.1", "sm_86", "100"), row("3.6.0", "sm_80", "96", "8")]
    write(tmp_path / "aot.csv", rows)
    assert tables.block(tmp_path / "aot.csv").splitlines()[-1] == "| `plan` | 1 | 100 / 96 | 0 / 8 |"


def test_curves_are_of_the_rows(tmp_path):
    """Work in steps of the reference, and the measure, curve by curve, sorted; what chance does as a line."""
    import matplotlib.pyplot as plt

    measured = {"distance_se": "1", "frechet_se": "0.01", "edge_error_se": "0.01"}
    common = {"captions": "3", "seeds": "0 1", "commit": "abc"} | measured

    def row(curve, method, tflop, value):
        figures = dict.fromkeys(["distance", "frechet", "edge_error"], str(value))
        return {"curve": curve, "method": method, "tflop": str(tflop)} | figures | common

    rows = [row("converged", "stock-50", 5.0, 0), row("converged", "stock-50, other seeds", 5.0, 0.25)]
    rows += [row("fewer steps, Euler", "stock-10", 1.0, 0.5), row("fewer steps, Euler", "stock-4", 0.4, 0.75)]
    for given, grey in ((rows, [0.25, 0.25]), ([rows[0], *rows[2:]], None)):
        render.draw_quality(given, tmp_path / "curves.png")
        axes = plt.gcf().axes[0]
        curve = next(line for line in axes.lines if len(line.get_xdata()) == 2)
        assert curve.get_xdata() == pytest.approx([4, 10]) and curve.get_ydata() == pytest.approx([0.75, 0.5])
        levels = [line.get_ydata() for line in axes.lines if line.get_color() == "grey"]
        assert [list(y) for y in levels] == ([] if grey is None else [grey])
        plt.close("all")


def test_short_tables(tmp_path):
    """What the README has: the first of a CPU's tables, plain methods alone, and quotients of work."""
    write(tmp_path / "a-cpu.csv", [kernel_row()])
    short = tables.block(tmp_path / "a-cpu.csv", short=True)
    assert "| `upsample_renoise` | 8.9 |" in short and "![" not in short and "random numbers" not in short
    columns = ["score", "score_low", "score_high", *(f"{name}{end}" for name in tables.MEASURES for end in ("", "_se"))]
    where = {"flop_ratio": "2", "captions": "3", "seeds": "0", "torch": "2.13", "commit": "abc", "date": "today"}
    methods = "stock-50", "flux-5x", "flux-5x(ratio=0)"
    write(tmp_path / "quality-a.csv", [dict.fromkeys(columns, "1") | where | {"method": name} for name in methods])
    whole, short = (tables.block(tmp_path / "quality-a.csv", short=short) for short in (False, True))
    assert [line.count("`") for line in short.splitlines() if "`" in line] == [2, 2] and "`flux-5x(ratio=0)`" in whole
    rows = [("a", "stock-50", 100), ("b", "stock-50", 7), ("a", "stock-10", 20), ("b", "stock-10", 2), ("a", "x", 25)]
    write(tmp_path / "saved.csv", [dict(model=m, method=name, calls=1, tflop=work) for m, name, work in rows])
    assert tables.block(tmp_path / "saved.csv").splitlines()[-1] == "| a | `x` | 1 | 25 | 4.00 | 0.80 |"


def test_pages_have_what_was_measured():
    pages = [page.read_text() for page in (ROOT / "README.md", *render.DOCS.glob("*.md"))]
    assert len(pages) > 2 and [tables.rendered(page) for page in pages] == pages
    for path in (path for path in tables.RESULTS.glob("*.csv") if tables.block(path)):
        assert any(re.search(rf"<!-- begin benchmarks/results/{path.name}( short)? -->", page) for page in pages), path


def test_what_is_saved_is_that_of_the_table_of_the_papers_work():
    """The same runs in two files, which two scripts have counted."""
    other = {(row["model"], row["method"], row["text_tokens"]): row["total"] for row in record.read(work.OUTPUT)}
    rows = {(row["model"], row["method"]): row for row in record.read(tables.RESULTS / "saved.csv")}
    assert list(rows) == [(model, method) for model, methods in saved.METHODS.items() for method in methods]
    for method in ("stock-50", "flux-5x", "flux-7x"):
        assert rows["flux-dev", method]["tflop"] == other["flux-dev", method, "512"]
    for (_, method), row in rows.items():
        calls = [int(method[6:])] if method.startswith("stock-") else ralu.preset(method).steps
        assert int(row["calls"]) == sum(calls)


# ---- the paper's work ----


def test_the_table_of_work_is_that_of_a_plain_formula():
    """FLUX.1-dev: 12·D² multiply-adds a token and block, and D for each value that goes in and out of them."""

    def step(image, text=512):
        return 2e-12 * (57 * 12 * (image + text) * 3072**2 + (128 * image + 4096 * text) * 3072)

    low, full = step(1024), step(4096)
    rows = {(row["method"], row["text_tokens"]): float(row["tflop"]) for row in record.read(work.OUTPUT)}
    rest, preview = rows["stock-50", "512"] - 50 * full, 2.48  # by Table S3
    for method, steps in {
        "bottleneck-flux-5x": 6 * full + 10 * low,
        "bottleneck-flux-5x, all steps made": 9 * full + 12 * low,
        "bottleneck-flux-7x": 5 * full + 6 * low,
        "flux-5x": 4 * low + 5 * step(1024 + 3 * 204) + 6 * full + preview,
        "flux-7x(ratio=0.1)": 2 * low + 3 * step(1024 + 3 * 102) + 5 * full + preview,
        "stock-45+teacache(delta=0.99)": 10 * full,
    }.items():
        assert rows[method, "512"] == pytest.approx(steps + rest, rel=1e-3), method
    # What they skip costs little: the full steps of the paper, and at most a hundredth of a step for each other.
    for method, fulls, others in (
        ("stock-50+taylorseer(interval=7)", 9, 41),
        ("stock-50+taylorseer(interval=11)", 7, 43),
    ):
        assert 0 < rows[method, "512"] - rest - fulls * full < 0.01 * others * full


def test_the_table_of_work_is_fresh():
    rows = record.read(work.OUTPUT)
    assert [(row["name"], row["method"], row["note"]) for row in rows] == [
        (row.name, row.method, row.note) for row in work.ROWS
    ]
    cheap = next(i for i, row in enumerate(work.ROWS) if row.method == "bottleneck-sd3-3x")
    found = work.counted(work.ROWS[cheap])
    assert found.keys() <= rows[cheap].keys()
    for key in ("tflop", "total", "ours", "paper"):
        assert float(found[key]) == pytest.approx(float(rows[cheap][key]), rel=1e-3)


# ---- two revisions ----


def test_interval_is_students():
    ratios = [1.1, 0.9, 1.05, 1.2]
    logs = [math.log(ratio) for ratio in ratios]
    low, high = scipy.stats.t.interval(0.95, 3, scipy.stats.tmean(logs), scipy.stats.sem(logs))
    expected = math.exp(scipy.stats.tmean(logs)), math.exp(low), math.exp(high)
    assert compare.ratio_interval(ratios) == pytest.approx(expected)


def test_revisions_take_turns_with_their_own_packages(tmp_path, capsys):
    script = tmp_path / "benchmark.py"
    script.write_text(
        "import sys, ralu_kernels\n"
        f"open({str(tmp_path / 'order')!r}, 'a').write(ralu_kernels.NAME)\n"
        "open(sys.argv[-1], 'w').write(f'op,p50_ms\\ncopy,{ralu_kernels.MS}\\n{ralu_kernels.NAME},1\\n')\n"
    )
    for name, milliseconds in (("a", 2.0), ("b", 3.0)):
        package = tmp_path / name / "ralu_kernels"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"NAME, MS = {name!r}, {milliseconds}\n")
    ratios = compare.alternate(tmp_path / "a", tmp_path / "b", [str(script)], rounds=3)
    assert [(case[0], ratio) for case, ratio in ratios.items()] == [("copy", [1.5] * 3)]
    assert (tmp_path / "order").read_text() == "abbaab"
    assert compare.report(tmp_path / "a", tmp_path / "b", [str(script)], rounds=2)
    assert capsys.readouterr().out == " 1.500 (1.500 to 1.500)  copy  slower\n"


def test_what_one_revision_lacks_does_not_lose_the_other_benchmarks(tmp_path, capsys):
    (tmp_path / "benchmark.py").write_text("import a_module_of_tomorrow\n")
    assert not compare.report(compare.ROOT, compare.ROOT, [str(tmp_path / "benchmark.py")], rounds=2)
    assert "a_module_of_tomorrow" in capsys.readouterr().err


def test_a_worktree_is_built_and_taken_away(tmp_path):
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "setup.py").write_text("import sys\nopen('built', 'w').write(' '.join(sys.argv[1:]))\n")
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "First"]):
        subprocess.run([*git, *command], cwd=repository, check=True)
    with compare.worktree("HEAD", tmp_path / "tree", repository) as tree:
        assert (tree / "built").read_text() == "--quiet build_ext --inplace"
    assert not (tmp_path / "tree").exists()
    (repository / "setup.py").write_text("raise SystemExit('no compiler')\n")
    subprocess.run([*git, "commit", "-qam", "Second"], cwd=repository, check=True)
    with pytest.raises(RuntimeError, match="no compiler"), compare.worktree("HEAD", tmp_path / "tree", repository):
        pass
