"""The measures of benchmarks/quality.py against closed forms, SciPy and an image whose answer is known."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import tiny
import torch

import ralu
from ralu.method import Method
from ralu.patch import LayoutHook
from ralu.schedule import two_resolutions

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import quality
import record
import search

RNG = np.random.default_rng(0)


def test_frechet_of_diagonal_normals():
    """Against its closed form for independent features: (m - n)² + (s - t)², feature by feature."""
    a, b = RNG.standard_normal((2, 4000, 3)) * np.array([[[1.0, 2.0, 0.5]], [[3.0, 2.0, 1.0]]])
    a, b = (x @ whiten(x) * scale for x, scale in ((a, [1.0, 2.0, 0.5]), (b, [3.0, 2.0, 1.0])))
    b = b - b.mean(0) + a.mean(0) + [0.0, 0.3, -1.0]
    assert quality.frechet(a, b) == pytest.approx(2.0**2 + 0.5**2 + 0.3**2 + 1.0, rel=1e-6)
    assert quality.frechet(a, a) == pytest.approx(0.0, abs=1e-6)


def whiten(x):
    """Make the sample covariance the identity, exactly."""
    return np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T


def test_jackknife_of_a_mean_is_its_standard_error():
    values = RNG.standard_normal(64)
    value, error = quality.jackknife(lambda mask: values[mask].mean(), 64, blocks=64)
    assert value == pytest.approx(values.mean())
    assert error == pytest.approx(scipy.stats.sem(values), rel=1e-9)


@pytest.mark.parametrize("hits, n", [(0, 10), (7, 10), (64, 64), (150, 302)])
def test_interval_of_a_share(hits, n):
    expected = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert quality.wilson_interval(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_edge_energy_of_a_ramp():
    """A grey ramp that climbs by g a pixel: Sobel's kernel weighs the step with 8, and borders are mirrored to 0."""
    ramp = (torch.arange(32) * 0.01).expand(2, 3, 32, 32)
    inside = 8 * 0.01 * 30 / 32
    assert quality.edge_energy(ramp) == pytest.approx([inside, inside], rel=1e-4)


def test_blockiness_of_a_known_grid():
    """Steps of 3 at borders of 8-pixel blocks and of 1 elsewhere."""
    steps = torch.where(torch.arange(1, 64) % 8 == 0, 3.0, 1.0)
    row = torch.cat([torch.zeros(1), steps.cumsum(0)]).expand(1, 3, 64, 64)
    across, elsewhere = quality.blockiness(row)[0]
    assert (across, elsewhere) == pytest.approx((3.0, 1.0))


def test_features_are_moments_of_the_channels():
    z = torch.from_numpy(RNG.standard_normal((2, 16, 8, 8)))
    got = quality.features(z)
    np.testing.assert_allclose(got[:, :16], z.numpy().mean((2, 3)))
    np.testing.assert_allclose(got[:, 16:], z.numpy().std((2, 3), ddof=1))


def test_the_table_has_every_scorer_at_equal_ratio():
    """And what the rows name can be parsed."""
    for family in ("flux", "sd3"):
        rows = quality.METHODS[f"mini-{family}"]
        parsed = {row: Method.parse(row) for row in rows if row not in quality.SCHEDULES}
        assert len(set(rows)) == len(rows) and all(str(method) == row for row, method in parsed.items())
        plain = [method for method in parsed.values() if method.spatial == {"flux": "flux-5x", "sd3": "sd3-3x"}[family]]
        names = {method.options.regions for method in plain if method.options.given().keys() <= {"regions"}}
        assert names == {None, "gradient", "change", "grid", "random"}


def test_the_curves_have_every_cache_at_several_strengths():
    """Alone, and beside plain steps with both solvers; a method stands in one curve only."""
    for model, curves in quality.CURVES.items():
        schedules = quality.SCHEDULES | search.best(model)
        named = [method for curve in curves.values() for method in curve if method not in schedules]
        methods = [Method.parse(method) for method in named]
        assert len(set(map(str, methods))) == len(methods)
        for kind in ralu.caches.CACHES.values():
            alone = {method for method in methods if type(method.cache) is kind and method.preset is None}
            assert 3 <= len(alone) <= 5
        plain = [method for method in methods if method.preset is None and method.cache is None]
        assert {method.options.solver for method in plain} >= {None} and len(plain) > 10
        assert all(quality.follows(str(method)) == (method.preset is None) for method in methods)


@pytest.mark.parametrize("stock_steps", [50, 28])
@pytest.mark.parametrize("less", [5, 7, 10])
def test_searched_schedules_are_of_the_work(stock_steps, less):
    work = {0.0: 0.3, 0.1: 0.35, 0.2: 0.4, 0.3: 0.45, 0.4: 0.5}
    rows = []
    for index in range(12):
        draw = search.draw_of(rows, index, 12, stock_steps / less, work)
        schedule = search.schedule_of(draw)
        calls = {"low": 0.3, "mixed": work[draw["ratio"]], "full": 1.0}
        made = sum(stage.steps * calls[stage.resolution] for stage in schedule.stages)
        assert made == pytest.approx(stock_steps / less, rel=0.05)
        lists = {name: " ".join(map(str, draw[name])) for name in ("steps", "ends", "shifts")}
        rows.append({name: str(value) for name, value in draw.items()} | lists | {"frechet": f"{1 / (1 + index)}"})
        assert search.parsed(rows[-1]) == draw
    drawn = map(search.parsed, rows)
    fixed = [(len(draw["steps"]), draw["ratio"], draw["upsampler"], draw["solver"]) for draw in drawn]
    for index in range(8, 12):  # the last third: changes of the best three before them, which here are the latest
        assert fixed[index] in fixed[index - 3 : index]


def test_the_best_of_a_search_is_the_nearest(monkeypatch, tmp_path):
    row = {"steps": "2 3", "ends": "0.3", "shifts": "3 2", "ratio": 0.2, "upsampler": "pixels", "solver": "euler"}
    found = (5, 0.1, 0.3), (5, 0.2, 0.02), (7, 0.05, 0.1)
    rows = [row | {"less": less, "c": c, "frechet": frechet} for less, c, frechet in found]
    record.append(tmp_path / "search-mini-flux.csv", rows)
    monkeypatch.setattr(search, "RESULTS", tmp_path)
    expected = {
        name: (two_resolutions((2, 3), 0.3, (3.0, 2.0), c, upsampler="pixels"), {"solver": "euler"})
        for name, c in {"searched-5x": 0.2, "searched-7x": 0.05}.items()
    }
    assert search.best("mini-flux") == expected
    assert search.best("mini-sd3") == {}


def test_drift_is_the_root_mean_square_of_the_difference():
    latents = RNG.standard_normal((2, 4, 16, 32, 32)).astype(np.float32)
    pca = SimpleNamespace(std=torch.ones(16))
    others = {"edge_energy": np.ones(4), "blockiness": np.ones((4, 2))}
    runs = [[{"latents": torch.from_numpy(x)} | others for x in latents * scale] for scale in (1.0, 1.5)]
    training = torch.zeros(4, 16 * 32 * 32)
    first, second = (quality.Images(each, pca, training, [0, 1, 2, 3]) for each in runs)
    columns = quality.measures(second, first, 4, drifts=True)
    assert float(columns["drift"]) == pytest.approx(np.sqrt(np.mean((0.5 * latents) ** 2)), abs=1e-3)
    assert quality.measures(second, first, 4)["drift"] == ""


def test_teacache_has_the_models_own_polynomial_unless_it_is_named():
    pipe = tiny.flux()
    for options, name in (("", "teacache-mini-flux.json"), ("(coefficients=identity)", "identity")):
        quality.prepare(pipe, f"stock-4+teacache{options}")
        assert Path(LayoutHook.find(pipe.transformer).cache.coefficients).name == name


def test_a_method_is_prepared_whole():
    """With its options and its cache, and the next one without them."""
    pipe = tiny.flux()
    assert quality.prepare(pipe, "flux-7x(ratio=0.5)+taylorseer(interval=2)") == 50
    hook = LayoutHook.find(pipe.transformer)
    assert hook.cache == ralu.TaylorSeer(interval=2) and pipe.scheduler.schedule.ratio == 0.5
    assert quality.prepare(pipe, "stock-4+taylorseer") == 4
    assert LayoutHook.find(pipe.transformer).cache == ralu.TaylorSeer()
    assert quality.prepare(pipe, "stock-4") == 4 and LayoutHook.find(pipe.transformer) is None
