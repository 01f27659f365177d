"""The grammar of methods: what is printed parses back, one way to sample has one name, refusals say what is allowed."""

import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from ralu import caches, method, schedule
from ralu.method import Method, Options
from ralu.presets import DISTILLED, PRESETS, preset


@dataclass(frozen=True)
class Toy:
    """Options of all four types."""

    families: ClassVar = ("flux",)
    interval: int
    decay: float = 0.5
    warm: bool = True
    kind: str = "last"


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(caches.CACHES, "toy", Toy)


@pytest.mark.parametrize(
    ("text", "canonical", "expected"),
    [
        ("flux-5x", None, lambda: Method("flux-5x")),
        ("stock", None, lambda: Method("stock")),
        ("stock-50", None, lambda: Method("stock-50")),
        ("sd3-2x(ratio=.3)", "sd3-2x", lambda: Method("sd3-2x")),  # the preset's own
        ("flux-5x(ratio=.30)", "flux-5x(ratio=0.3)", lambda: Method("flux-5x", Options(ratio=0.3))),
        ("flux-5x()", "flux-5x", lambda: Method("flux-5x")),
        (
            " flux-7x( upsampler=bicubic , matching=snr,regions=canny)",
            "flux-7x(matching=snr,upsampler=bicubic)",
            lambda: Method("flux-7x", Options(matching="snr", upsampler="bicubic")),
        ),
        (
            "distilled-4(threshold=1e-7,granularity=token,kept_noise=release,backend=reference)+toy(interval=3)",
            "distilled-4(threshold=1e-07,granularity=token,kept_noise=release,backend=reference)+toy(interval=3)",
            lambda: Method(
                "distilled-4",
                Options(threshold=1e-7, granularity="token", kept_noise="release", backend="reference"),
                Toy(3),
            ),
        ),
        (
            "stock-28+toy(warm=False,interval=-2,decay=1e20,kind=first)",
            "stock-28+toy(interval=-2,decay=1e+20,warm=false,kind=first)",
            lambda: Method("stock-28", cache=Toy(-2, 1e20, False, "first")),
        ),
        (
            "flux-5x(threshold=2,regions=change)",
            None,
            lambda: Method("flux-5x", Options(threshold=2, regions="change")),
        ),
        ("stock-10( solver=ab2 )", "stock-10(solver=ab2)", lambda: Method("stock-10", Options(solver="ab2"))),
        (
            "stock(spacing=trailing,solver=euler)",  # euler is the default
            "stock(spacing=trailing)",
            lambda: Method("stock", Options(spacing="trailing")),
        ),
        (
            "sd3-2x(solver=ab2-limited)+toy(interval=1)",
            "sd3-2x(solver=ab2-limited)+toy(interval=1)",
            lambda: Method("sd3-2x", Options(solver="ab2-limited"), Toy(1)),
        ),
        (
            "stock-28+teacache(delta=.40,coefficients=fits/sd3 medium.json)",
            "stock-28+teacache(delta=0.4,coefficients=fits/sd3 medium.json)",
            lambda: Method("stock-28", cache=caches.TeaCache(0.4, "fits/sd3 medium.json")),
        ),
        ("flux-5x+toy(interval=1,decay=0.5)", "flux-5x+toy(interval=1)", lambda: Method("flux-5x", cache=Toy(1))),
    ],
)
def test_parse_and_print(text, canonical, expected):
    parsed = Method.parse(text)
    assert parsed == expected() and hash(parsed) == hash(expected())
    assert str(parsed) == (canonical or text)
    assert Method.parse(str(parsed)) == parsed


def test_random_methods_parse_back():
    rng = np.random.default_rng(0)
    for _ in range(300):
        words = {name: values for name, values in method.CHOICES.items() if name != "spacing"}
        options = {name: str(rng.choice(values)) for name, values in words.items() if rng.random() < 0.5}
        options |= {["ratio", "threshold"][rng.integers(2)]: float(10 ** rng.uniform(-9, 0))}
        if (upsampler := options.get("upsampler", "nearest")) != "nearest":
            options["matching"] = "covariance" if upsampler == "pixels" else "snr"
        cache = Toy(int(rng.integers(-9, 99)), float(rng.normal()), bool(rng.integers(2)))
        # distilled-4's step is one
        fitting = PRESETS if options.get("regions") == "change" else (*PRESETS, *DISTILLED)
        built = Method(str(rng.choice(list(fitting))), Options(**options), cache if rng.random() < 0.5 else None)
        assert Method.parse(str(built)) == built
        assert all(getattr(built.options, name) in (value, None) for name, value in options.items())


def test_what_it_stands_for():
    assert [Method.parse(text).preset for text in ("flux-5x", "stock", "stock-50")] == ["flux-5x", None, None]
    assert [Method.parse(text).steps for text in ("flux-5x", "stock", "stock-50")] == [None, None, 50]
    assert Method.parse("flux-5x(ratio=0,regions=random)").options.given() == {"ratio": 0.0, "regions": "random"}
    mask = np.zeros((2, 2))
    custom = Method("flux-5x", Options(regions=mask))
    assert custom.options.given()["regions"] is mask
    with pytest.raises(ValueError, match="canny, gradient, change, grid, random, mask, got 'custom'"):
        Method.parse(str(custom))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must have the form SPATIAL"),
        ("flux-5x/ratio=1", "must have the form"),
        ("flux-5x(ratio=1", "must have the form"),
        ("flux-5x+toy(interval=1)+toy(interval=1)", "must have the form"),
        ("flux-9x", "none of flux-5x, .*, distilled-4, bottleneck-flux-5x, .*, stock, stock-STEPS"),
        ("stock-0", "stock-STEPS"),
        ("stock-05", "stock-STEPS"),
        ("stock-5(ratio=.1)", "stock-5 has no option 'ratio'; it has solver, spacing"),
        ("stock-5(solver=heun)", "solver must be one of euler, ab2, ab2-limited, got 'heun'"),
        ("stock-5(spacing=leading)", "spacing must be one of stock, trailing, got 'leading'"),
        ("flux-5x(spacing=trailing)", "flux-5x has no option 'spacing'; it has ratio"),
        ("flux-5x(ration=.1)", "no option 'ration'; it has ratio, threshold, regions"),
        ("flux-5x(ratio=.1,ratio=.2)", "'ratio' twice"),
        ("flux-5x(ratio)", "option=value"),
        ("flux-5x(ratio=)", "option=value"),
        ("flux-5x(ratio=.1,)", "option=value"),
        ("flux-5x(ratio=much)", "ratio must be a number, got 'much'"),
        ("speedup-6x", "none of .* stock-STEPS, speedup-X"),
        ("speedup--6", "none of"),
        ("speedup-12.5", "speedup must lie between 1.5 and 12, got 12.5"),
        ("speedup-6(threshold=.1)", "speedup-6 has no option 'threshold'; it has regions, "),
        ("flux-5x(ratio=1.5)", r"ratio must lie in \[0, 1\]"),
        ("flux-5x(threshold=nan)", "threshold must be finite"),
        ("flux-5x(ratio=.1,threshold=.1)", "not both"),
        ("flux-5x(threshold=2,regions=grid)", r"threshold must lie in \[0, 1\]"),
        ("distilled-4(regions=change)", "regions='change' needs 2 steps before the selection, distilled-4 has 1"),
        ("flux-5x(granularity=pixels)", "granularity must be one of pixel, token"),
        ("flux-5x(upsampler=bicubic)", "needs matching='snr'"),
        ("flux-5x+sloth", "'sloth' is no cache; choose of .*toy"),
        ("flux-5x+toy", "toy needs interval"),
        ("flux-5x+toy(interval=2.5)", "interval must be a whole number"),
        ("flux-5x+toy(interval=2,decay=inf)", "decay must be finite"),
        ("flux-5x+toy(interval=2,warm=1)", "warm must be true or false"),
        ("flux-5x+delta-dit(interval=0)", "interval must be at least 1, got 0"),
        ("flux-5x+delta-dit(num_blocks=-1)", "num_blocks must be at least 0, got -1"),
        ("flux-5x+delta-dit(boundary=1.1)", "boundary must be from 0 to 1, got 1.1"),
        ("flux-5x+delta-dit(variant=deep)", "variant must be one of paper, flux-research, got 'deep'"),
        ("flux-5x+teacache(delta=-0.1)", "delta must be at least 0, got -0.1"),
        ("flux-5x+teacache(threshold=0.1)", "teacache has no option 'threshold'; it has delta, coefficients"),
        ("flux-5x+toca(cache_ratio=1.5)", "cache_ratio must be from 0 to 1, got 1.5"),
        ("flux-5x+toca(score=edges)", "score must be one of attention, norm, got 'edges'"),
        ("flux-5x+toca(ratio=0.1)", "toca has no option 'ratio'; it has interval, cache_ratio, score"),
        ("sd3-2x+ras(ratio=0)", "ratio must be above 0, got 0"),
        ("sd3-2x+ras(start=0)", "start must be at least 1, got 0"),
        ("sd3-2x+ras(resets=12-20)", "resets must be steps as in '12/20', or 'none', got '12-20'"),
        ("flux-5x+toy(interval=2,speed=1)", "toy has no option 'speed'; it has interval, decay, warm, kind"),
    ],
)
def test_refusals(text, words):
    with pytest.raises(ValueError, match=words):
        Method.parse(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Method.parse(3),
        lambda: Method(None),
        lambda: Options(ratio="0.3"),
        lambda: Options(threshold=True),
        lambda: Options(granularity=1),
        lambda: Options(solver=2),
        lambda: Options(spacing=True),
    ],
)
def test_wrong_types(make):
    with pytest.raises(TypeError):
        make()


def test_an_unregistered_cache():
    with pytest.raises(ValueError, match="cache must be one of"):
        Method("flux-5x", cache=dataclass(frozen=True)(type("Other", (), {}))())


def test_the_choices_are_those_of_the_modules_that_make_them():
    from ralu import regions, scheduler, solver
    from ralu_kernels import _backend, tokens

    assert set(method.CHOICES["regions"]) == {"canny", *regions._NAMED}
    assert set(method.CHOICES["granularity"]) == {*tokens.GRANULARITIES}
    assert set(method.CHOICES["kept_noise"]) == {*tokens.KEPT_NOISES}
    assert set(method.CHOICES["matching"]) == {*schedule.MATCHINGS}
    assert set(method.CHOICES["upsampler"]) == {*schedule.INTERPOLATIONS}
    assert set(method.CHOICES["solver"]) == {*solver.SOLVERS}
    assert set(method.CHOICES["backend"]) == {"auto", *_backend._ABSENT}
    assert scheduler.RaluScheduler().config.regions == method.CHOICES["regions"][0]
    plain = scheduler.RaluScheduler("flux-5x").schedule
    chosen = {name: method.CHOICES[name][0] for name in ("matching", "upsampler")}
    assert plain == PRESETS["flux-5x"] == preset("flux-5x", **chosen)


def test_no_heavy_import():
    code = "import sys, ralu.method; print([name for name in ('torch', 'diffusers', 'scipy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
