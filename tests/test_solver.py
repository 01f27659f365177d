"""Solvers inside a stage, against closed forms and loops written out in plain numbers."""

import csv
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import ralu
from ralu.options import Options
from ralu.presets import PRESETS
from ralu.schedule import Schedule, Stage, single, two_resolutions
from ralu.solver import SOLVERS, Solver
from ralu.stages import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import solver as benchmark

SECOND = [name for name in SOLVERS if name != "euler"]


def advance(solver, x, v, sigma, h, before):
    """One step of h from x. before: (v0, h0) of the step before in this stage, or None."""
    if solver == "euler" or before is None:
        return x + h * v
    v0, h0 = before
    rate = (v - v0) / h0  # the velocity is taken for the line that is v0 at -h0 and v at 0, and integrated from 0 to h
    if solver == "ab2-limited":
        parts = size(x - sigma * v) ** 2 + size(x + (1 - sigma) * v) ** 2
        rate = rate / (1 + 16 * size(h * rate) ** 4 / (parts**2 + 1e-30))
    return x + h * v + h * h / 2 * rate


def size(v):
    """Of every sample of a tensor (B, ...), or of all of a vector or number."""
    if not isinstance(v, torch.Tensor):
        return np.linalg.norm(v)
    return torch.stack([row.norm() for row in v]).view(-1, *[1] * (v.ndim - 1))


def integrate(solver, field, x, levels):
    """Plain numbers or tensors through one stage: the samples at its levels, and at its end."""
    path, before = [x], None
    for sigma, following in pairwise(levels):
        v, h = field(x, sigma), following - sigma
        x, before = advance(solver, x, v, sigma, h, before), (v, h)
        path.append(x)
    return path


# ---- data that are N(0, s²) in every value: the exact velocity is linear ----


def slope(sigma, s):
    """Times x this is dx / dsigma: x spreads as the root of (1 - sigma)²·s² + sigma²."""
    return (sigma - (1 - sigma) * s * s) / ((1 - sigma) ** 2 * s * s + sigma**2)


def excess(schedule, solver, s):
    """How much more variance the end has than the data: each of the run's independent noises is followed alone."""
    parts = np.ones(1)
    for k in range(len(schedule.stages)):
        if k:
            move = schedule.transitions[k - 1]
            parts = np.append(move.scale * parts, move.noise_scale * math.sqrt(1 - move.c))
        parts = integrate(solver, lambda x, sigma: slope(sigma, s) * x, parts, schedule.sigmas(k + 1))[-1]
    return (parts**2).sum() / s**2 - 1


GAUSSIAN = {
    ("stock-50", "euler"): ("-7", "-11"), ("stock-10", "euler"): ("-31", "-45"),
    ("flux-5x", "euler"): ("-34", "-48"), ("flux-7x", "euler"): ("-42", "-57"),
    ("stock-10", "ab2"): ("+4.4", "-10"), ("flux-5x", "ab2"): ("+2.9", "-12"), ("flux-7x", "ab2"): ("+2.7", "-21"),
}  # fmt: skip
SCHEDULES = PRESETS | {f"stock-{n}": single(n, 3.0) for n in (50, 10, 4)}
SCHEDULES["all upsampled early"] = PRESETS["flux-7x"].replace(ratio=1.0)  # the last two stages are of one shape


@pytest.mark.parametrize(("name", "solver"), GAUSSIAN)
def test_the_variance_of_gaussian_data(name, solver):
    """In per cent of it, for a standard deviation of 1 and of 1/2."""
    for s, percent in zip((1.0, 0.5), GAUSSIAN[name, solver], strict=True):
        digits = len(percent.partition(".")[2])
        assert f"{100 * excess(SCHEDULES[name], solver, s):+.{digits}f}" == percent


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "stock-50"])
def test_sample_is_the_recursion(name, solver):
    """Every call of every stage, from what the stage began with, and the variance that is left at the end."""
    schedule = SCHEDULES[name]
    for s in (1.0, 0.5):
        seen = {k: [] for k in range(1, 1 + len(schedule.stages))}

        def velocity(x, sigma, layout, s=s, seen=seen):
            seen[layout.stage].append(x.double())
            return slope(sigma, s) * x

        noise = torch.randn(1, 32 * 32, 64, generator=torch.Generator().manual_seed(7))
        out = ralu.sample(velocity, noise, (32, 32), schedule, solver=solver, regions="random")
        seen[len(schedule.stages)].append(out.double())
        for k, path in seen.items():
            levels = schedule.sigmas(k)
            expected = integrate(solver, lambda x, sigma, s=s: slope(sigma, s) * x, path[0], levels)
            for got, wanted in zip(path, expected, strict=False):
                torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
        ratio = out.double().pow(2).mean().item() / s**2 / (1 + excess(schedule, solver, s))
        assert ratio == pytest.approx(1, abs=5 * math.sqrt(2 / out.numel()))  # five standard deviations


# ---- order ----


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), *((name, 2) for name in SECOND)])
def test_order_of_convergence(solver, order):
    """dx/dsigma = x² from x(1) = 1, which is 1/2 at 0, in steps of which every other one is three times as long."""
    errors = []
    for n in (64, 128, 256):
        levels = [1 - (i - i % 2 + i % 2 / 2) / n for i in range(n + 1)]
        step, x = Solver(solver, lambda x: x * x), 1.0
        for sigma, following in pairwise(levels):
            x += (following - sigma) * step(x, x * x, sigma, following)
        errors.append(abs(x - 0.5))
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([order] * 2, abs=0.1)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), *((name, 2) for name in SECOND)])
def test_order_of_convergence_of_sample(solver, order):
    """The same field in shifted steps, from starts of its own in every value: x(0) = x(1) / (1 + x(1))."""
    noise, errors = torch.linspace(0.5, 1.5, 64).view(1, 4, 16), []
    for n in (16, 32, 64):
        out = ralu.sample(lambda x, sigma, layout: x * x, noise, (2, 2), single(n, 3.0), solver=solver)
        errors.append((out - noise / (1 + noise)).abs().max().item())
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([order] * 2, abs=0.2)


# ---- what the history is ----


@pytest.mark.parametrize("solver", SECOND)
def test_a_model_may_reuse_its_outputs_memory(solver):
    noise, schedule = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0)), PRESETS["flux-5x"]
    memory = {}

    def velocity(x, sigma, layout):
        return memory.setdefault(layout.stage, torch.empty_like(x)).copy_(torch.sin(3 * x) + sigma)

    settings = dict(solver=solver, regions="random")
    got = ralu.sample(velocity, noise, (8, 8), schedule, **settings)
    fresh = ralu.sample(lambda *call: velocity(*call).clone(), noise, (8, 8), schedule, **settings)
    assert torch.equal(got, fresh)


@pytest.mark.parametrize("solver", SECOND)
def test_what_pads_does_not_count(solver):
    noise = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    padded = []

    def velocity(x, sigma, layout):
        v = torch.sin(3 * x + layout.positions.sum(-1, keepdim=True)) + sigma
        if layout.mask is not None:
            padded.append(~layout.mask)
            v[~layout.mask] = 1e9
        return v

    settings = dict(solver=solver, regions=lambda x0, grid: x0[..., 0], threshold=0.3)
    together = ralu.sample(velocity, noise, (8, 8), "flux-5x", **settings)
    assert len(padded) == 5 and padded[0].any()
    alone = [ralu.sample(velocity, one[None], (8, 8), "flux-5x", **settings) for one in noise]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", SECOND)
def test_nothing_is_divided_by_a_sample_of_zeros(solver):
    nothing = torch.zeros(2, 64, 16)
    assert torch.equal(ralu.sample(lambda x, sigma, layout: x, nothing, (8, 8), single(4, 1.0), solver=solver), nothing)


@pytest.mark.parametrize("solver", SECOND)
def test_the_history_is_in_float32(solver):
    """Of velocities in bfloat16, whose differences would lose what a step is corrected by."""
    schedule = single(5, 3.0)
    run, levels = Run(schedule, None, Options(solver=solver)), schedule.sigmas(1)
    x = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(1))
    run.start(x, (4, 4))
    velocities = [torch.sin(x + i).bfloat16() for i in range(5)]
    expected = integrate(solver, lambda x, sigma: velocities[levels.index(sigma)].double(), x.double(), levels)[1:]
    for v, wanted in zip(velocities, expected, strict=True):
        x, _ = run.step(x, v)
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("solver", SECOND)
def test_a_stage_begins_with_an_euler_step(solver):
    """Of one step each there is nothing but Euler's; a second step makes the solvers differ."""
    noise = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(2))
    stages = (Stage("full", 1, 0.3, 1.0), Stage("low", 1, 0.6, 1.0), Stage("full", 1, 1.0, 1.0))
    resampled = Schedule(stages, (ralu.schedule.resample_noise(0.2), ralu.schedule.resample_noise(0.5)))
    for schedule in (PRESETS["flux-5x"].replace(steps=(1, 1, 1)), resampled, two_resolutions((1, 1), 0.4, (2, 2), 0.1)):
        outs = [
            ralu.sample(lambda x, sigma, layout: torch.sin(x) + sigma, noise, (8, 8), given, solver=name)
            for given in (schedule, schedule.replace(steps=[2] * len(schedule.stages)))
            for name in ("euler", solver)
        ]
        assert torch.equal(*outs[:2]) and not torch.equal(*outs[2:])


# ---- pipelines ----


def recorded(monkeypatch, pipe, **call):
    """Run a pipeline: its steps, as (sample, velocity, next sample), with what the scheduler was given."""
    steps, step = [], pipe.scheduler.step

    def watched(velocity, t, sample, *args, **kwargs):
        result = step(velocity, t, sample, *args, **kwargs)
        steps.append((sample.double(), velocity.double(), result[0].double()))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(pipe.scheduler, "step", watched)
        tiny.generate(pipe, **{"output_type": "latent"} | call)
    return steps


def check_steps(steps, solver, levels):
    """Of one stage: every step, but those to another stage, is the solver's."""
    assert len(steps) == len(levels) - 1
    before = None
    for (x, v, got), (sigma, following) in zip(steps, pairwise(levels), strict=True):
        h = following - sigma
        if got.shape == x.shape:
            torch.testing.assert_close(got, advance(solver, x, v, sigma, h, before), rtol=0, atol=2e-6)
        before = v, h


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_stock_schedule_is_solved(monkeypatch, stock, solver):
    """At the noise levels of the stock pipeline, with the velocity that guidance makes."""
    expected = tiny.generate(stock, output_type="latent", num_inference_steps=10)
    levels = stock.scheduler.sigmas.tolist()
    ralu.enable(stock, f"stock-10(solver={solver})")
    steps = recorded(monkeypatch, stock)
    check_steps(steps, solver, levels)
    assert all(torch.equal(a[2], b[0]) for a, b in pairwise(steps))
    assert torch.equal(steps[-1][2].float(), expected) == (solver == "euler")
    ralu.enable(stock, "stock", solver=solver)  # as many as are asked for
    check_steps(recorded(monkeypatch, stock, num_inference_steps=4), solver, stock.scheduler.sigmas.tolist())
    ralu.disable(stock)


@pytest.mark.parametrize("solver", SECOND)
def test_stages_of_a_pipeline_are_solved(monkeypatch, stock, family, solver):
    """Each on its own, and also where a cache predicts what the velocity is made of."""
    plain = recorded(monkeypatch, ralu.enable(stock, family.presets[0]))[-1][2]
    ends = []
    for cache in ("", "+taylorseer(interval=2,warmup=1)"):
        ralu.enable(stock, f"{family.presets[0]}(solver={solver}){cache}")
        schedule, steps = stock.scheduler.schedule, recorded(monkeypatch, stock)
        ends.append(steps[-1][2])
        for k, count in enumerate(schedule.steps):
            of_stage, steps = steps[:count], steps[count:]
            if k == 0:  # the full-size noise, of which the model sees a quarter
                noise = family.image(of_stage[0][0], 64, 64)
                low = noise[..., ::2, ::2]
                of_stage[0] = (family.latents(low), *of_stage[0][1:])
            levels = schedule.sigmas(k + 1)
            if k + 1 < len(schedule.steps):  # the last step's sample is the next stage's
                of_stage, levels = of_stage[:-1], levels[:-1]
            check_steps(of_stage, solver, levels)
        assert not steps
    ralu.disable(stock)
    assert min((a - b).abs().max() for a, b in ((plain, ends[0]), (plain, ends[1]), (ends[0], ends[1]))) > 1e-4


@pytest.mark.parametrize("spatial", ["stock-5", "stages"])
def test_callbacks_and_interruptions(monkeypatch, stock, family, spatial):
    """A callback's latents go on with the history of velocities; a run that was cut short leaves none."""
    pipe = ralu.enable(stock, family.short if spatial == "stages" else spatial, solver="ab2")

    def dim(pipe, i, t, values):
        return {"latents": values["latents"] * (0.5 if i == 2 else 1)}

    def stop(pipe, i, t, values):
        pipe._interrupt = i == 2
        return values

    plain = recorded(monkeypatch, pipe)
    if spatial != "stages":
        changed = recorded(monkeypatch, pipe, callback_on_step_end=dim)
        assert torch.equal(changed[3][0], 0.5 * changed[2][2])
        check_steps(changed, "ab2", pipe.scheduler.sigmas.tolist())
    assert len(recorded(monkeypatch, pipe, callback_on_step_end=stop)) == 3
    again = recorded(monkeypatch, pipe)
    assert all(torch.equal(a, b) for a, b in zip(plain[-1], again[-1], strict=True))
    ralu.disable(pipe)


@pytest.mark.parametrize("spatial", ["stock-4", "stages", "padded stages"])
def test_a_batch_equals_its_single_runs(stock, family, spatial):
    """Also where its samples have other numbers of tokens: the limiter's norms are each one's own."""
    options, lengths = {}, set()
    if spatial == "padded stages":
        options = dict(regions=lambda x0, grid: x0[..., 0], threshold=0.3, fused=True)
    given = spatial if spatial == "stock-4" else family.short
    pipe, call = ralu.enable(stock, given, solver="ab2-limited", **options), dict(output_type="latent")

    def count(pipe, i, t, values):
        plan = pipe.scheduler.layout and pipe.scheduler.layout.plan
        lengths.add(None if plan is None else tuple(plan.lengths.tolist()))
        return values

    together = tiny.generate(pipe, tiny.PROMPTS[:2], seeds=(1, 2), callback_on_step_end=count, **call)
    assert any(of and of[0] != of[1] for of in lengths) == (spatial == "padded stages")
    alone = [tiny.generate(pipe, tiny.PROMPTS[i], seeds=(i + 1,), **call) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-5)
    ralu.disable(pipe)


@pytest.mark.parametrize("solver", SECOND)
def test_in_bfloat16_a_stock_step_rounds_once(solver):
    scheduler = ralu.RaluScheduler("stock-4", solver=solver, shift=3.0)
    scheduler.bind()
    scheduler.set_timesteps(4)
    x = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    before = None
    for t, (sigma, following) in zip(scheduler.timesteps, pairwise(scheduler.sigmas.tolist()), strict=True):
        v, h = torch.sin(3 * x + sigma), following - sigma
        expected = advance(solver, x.double(), v.double(), sigma, h, before)
        before = v.double(), h
        x = scheduler.step(v, t, x).prev_sample
        assert x.dtype == torch.bfloat16 and (x == expected.bfloat16()).float().mean() > 0.999


def test_trailing_spacing(stock):
    """Noise levels of even steps before the shift; FLUX's are so anyway, SD3's end near nothing."""
    count = 4
    tiny.generate(stock, output_type="latent", num_inference_steps=count)
    own = stock.scheduler
    h = own.config.shift
    if own.config.use_dynamic_shifting:  # the pipeline's mu, off the stock scheduler's second level
        u, sigma = 1 - 1 / count, own.sigmas[1].item()
        h = sigma * (1 - u) / (u * (1 - sigma))
    even = [h * u / (1 + (h - 1) * u) for u in (1 - i / count for i in range(count + 1))]
    for name, steps in ((f"stock-{count}", {}), ("stock", {"num_inference_steps": count})):
        tiny.generate(ralu.enable(stock, name, spacing="trailing"), output_type="latent", **steps)
        assert stock.scheduler.sigmas.tolist() == pytest.approx(even, abs=1e-6)
        assert stock.num_timesteps == count
    tiny.generate(ralu.enable(stock, f"stock-{count}"), output_type="latent")
    assert torch.equal(stock.scheduler.sigmas, own.sigmas)
    ralu.disable(stock)
    assert (own.sigmas[-2] < 0.01) == (own.config.use_dynamic_shifting is False)
    assert type(stock.scheduler) is FlowMatchEulerDiscreteScheduler


def test_spacing_goes_with_stock_alone():
    noise, refusal = torch.zeros(1, 16, 4), "spacing goes with 'stock-STEPS' alone, got spacing='trailing'"
    for given in ("flux-5x", PRESETS["flux-5x"]):
        with pytest.raises(ValueError, match=refusal):
            ralu.RaluScheduler(given, spacing="trailing")
        with pytest.raises(ValueError, match=refusal):
            ralu.sample(None, noise, (4, 4), given, spacing="trailing")
    assert ralu.RaluScheduler("stock-4", spacing="trailing").config.spacing == "trailing"


def test_a_saved_solver_is_loaded(tmp_path):
    ralu.RaluScheduler("stock-4", solver="ab2-limited", spacing="trailing").save_pretrained(tmp_path)
    again = ralu.RaluScheduler.from_pretrained(tmp_path)
    assert (again.options.solver, again.options.spacing) == ("ab2-limited", "trailing")


def test_the_committed_table_is_the_recursions():
    """Of every preset and of stock schedules, as benchmarks/solver.py writes it."""
    rows = list(csv.DictReader((benchmark.RESULTS / "solver-gaussian.csv").open()))
    assert rows == [{key: str(value) for key, value in row.items()} for row in benchmark.rows()]
    assert {row["method"] for row in rows} == {*benchmark.SCHEDULES} >= {*PRESETS}
    for row in rows:
        name, s = row["method"], float(row["deviation"])
        schedule = PRESETS[name] if name in PRESETS else single(int(name.removeprefix("stock-")), 3.0)
        assert [float(row[solver]) for solver in SOLVERS] == pytest.approx(
            [excess(schedule, solver, s) for solver in SOLVERS], abs=6e-5
        )
