"""Budgets: the work of what is chosen, by other counts than its own, is what was asked for, everywhere in the range."""

import json
import math
import re

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ralu
from ralu import budget
from ralu.budget import schedule_for
from ralu.cli import main
from ralu.families import family_of
from ralu.method import Method
from ralu.presets import BASELINES, PRESETS
from ralu.schedule import region_adaptive

SPEEDUPS = np.geomspace(1.5, 12, 80).tolist()
STOCK = {"flux-dev": 50, "sd3-medium": 28}


def plain(model, tokens):
    """Multiply-adds of a call, without what does not depend on the image or is done once a call."""
    blocks, width, text = {"flux-dev": (57, 3072, 512), "sd3-medium": (24, 1536, 77 + 256)}[model]
    text_inputs = 4096 * text * width
    last = 9 * text * width**2 if model == "sd3-medium" else 0  # its text goes no further
    both = tokens + text
    return blocks * (12 * both * width**2 + 2 * both**2 * width) + 128 * tokens * width + text_inputs - last


def total(schedule, work, low):
    """The work of a schedule in calls at full resolution, given that of a call by its tokens."""
    mixed = low + 3 * math.floor(schedule.ratio * low + 1e-6)
    calls = zip(schedule.steps, (low, mixed, 4 * low), strict=True)
    return sum(n * work(tokens) for n, tokens in calls) / work(4 * low)


@pytest.fixture
def unsolved(monkeypatch):
    """Shifts and c, which have no part in the work, are not solved for."""
    monkeypatch.setattr(
        budget, "solve", lambda steps, ends, shift, ratio, **_: region_adaptive(steps, ends, [shift] * 3, 0.02, ratio)
    )


def counted(pipe, tokens, text_tokens):
    """Operations of a call of its transformer."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        family_of(pipe).dummy_call(pipe.transformer, torch.float32, 1, tokens, text_tokens)
    return counter.get_total_flops()


@pytest.mark.parametrize("size", [(1024, 1024), (768, 1280), (2048, 2048), (512, 512)])
@pytest.mark.parametrize("model", STOCK)
def test_the_work_is_what_was_asked_for(unsolved, model, size):
    height, width = size
    low = height * width // 32**2
    region = (plain(model, 4 * low) - plain(model, 4 * low - 3)) / plain(model, 4 * low)
    before, slack = math.inf, 0
    for speedup in SPEEDUPS:
        schedule = schedule_for(speedup, model, height=height, width=width)
        made = total(schedule, lambda tokens: plain(model, tokens), low)
        assert made == pytest.approx(STOCK[model] / speedup, rel=0.01)
        assert min(schedule.steps) >= 1 and 0 < schedule.ends[0] < schedule.ends[1] < 1
        assert 0.05 <= schedule.ratio <= 0.7
        assert made <= before + max(slack, schedule.steps[1] * region)  # never more, but for a region's work
        before, slack = made, schedule.steps[1] * region


FLUX = {"flux": tiny.flux, "guided": lambda: tiny.flux(guidance_embeds=True)}
PIPELINES = FLUX | {
    "klein": tiny.flux2,
    "dev": lambda: tiny.flux2(dev=True),
    "qwen": tiny.qwen_image,
    "z": tiny.z_image,
}
PIPELINES |= {version: lambda version=version: tiny.sd3(version) for version in tiny.SD3}


@pytest.mark.parametrize("name", PIPELINES)
def test_operations_of_a_call(name):
    pipe = PIPELINES[name]()
    for size in ((16, 32), (100, 7)):
        assert family_of(pipe).flop(pipe.transformer.config, *size) == counted(pipe, *size)


@pytest.mark.parametrize("speedup", [4.7, 11])
def test_operations_of_real_runs(stock, family, speedup):
    """By the tokens that the transformer sees, 256 at full resolution, and 16 of text, with SD3's as many of CLIP."""
    flux, seen = family.make is tiny.flux, []

    def note(module, args, given):
        sample = given["hidden_states"]
        seen.append(sample.shape[1] if flux else sample[0, 0].numel() // 4)

    ralu.enable(stock, schedule_for(speedup, stock, height=64, width=64, text_tokens=16))
    hook = stock.transformer.register_forward_pre_hook(note, with_kwargs=True)
    tiny.generate(stock)
    hook.remove()
    ralu.disable(stock)
    fresh, text_tokens = family.make(), 16 if flux else 16 + stock.tokenizer_max_length
    work = {tokens: counted(fresh, tokens, text_tokens) for tokens in {*seen}}
    assert len(work) == 3 and stock.num_timesteps == len(seen)
    assert (50 if flux else 28) * work[256] / sum(work[tokens] for tokens in seen) == pytest.approx(speedup, rel=0.01)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_points_of_it(name):
    known, model = PRESETS[name], "flux-dev" if name in tiny.FAMILIES["flux"].presets else "sd3-medium"
    found = schedule_for(STOCK[model] / total(known, lambda tokens: plain(model, tokens), 1024), model)
    assert (found.steps, found.ends) == (known.steps, known.ends)
    assert math.floor(found.ratio * 1024 + 1e-6) == math.floor(known.ratio * 1024 + 1e-6)
    # Table S1 rounds, and has two slips, see test_schedule.py.
    assert found.shifts == pytest.approx(known.shifts, abs=0.1) and found.c == pytest.approx(known.c, abs=5.1e-5)


@pytest.mark.parametrize(("name", "speedup"), [("flux-5x", 5.4), ("flux-7x", 7.3), ("sd3-2x", 2.2), ("sd3-3x", 3.6)])
def test_what_the_readme_says_of_them(unsolved, name, speedup):
    found = schedule_for(speedup, "flux-dev" if "flux" in name else "sd3-medium")
    assert found.steps == PRESETS[name].steps and found.ratio == pytest.approx(PRESETS[name].ratio, abs=0.02)


@pytest.mark.parametrize("name", [name for name in BASELINES if name.startswith("speed")])
def test_speed_does_the_work_of_the_preset_of_its_name(name):
    chosen, known = BASELINES[name], PRESETS[name.removeprefix("speed-")]
    model = "flux-dev" if "flux" in name else "sd3-medium"
    low, full = (plain(model, tokens) for tokens in (1024, 4096))
    made = (chosen.steps[0] * low + chosen.steps[1] * full) / full
    assert made == pytest.approx(total(known, lambda tokens: plain(model, tokens), 1024), rel=0.015)
    assert chosen.steps[1] == known.steps[2] and chosen.ends == (known.ends[1], 1) and chosen.c == 0.25


def test_a_family_without_anchors_goes_by_its_presets(unsolved, monkeypatch):
    before = schedule_for(6, "flux-dev")
    monkeypatch.delitem(budget.ANCHORS, "flux")
    assert schedule_for(6, "flux-dev") == before
    monkeypatch.setitem(budget.ANCHORS, "flux", (budget.Point((2, 2, 20), (0.1, 0.2, 1.0), 0.3),))
    assert schedule_for(6, "flux-dev").ends == (0.1, 0.2, 1.0)


def test_shifts_are_solved_for_the_models_own():
    found = schedule_for(2, "flux-schnell")
    assert found == ralu.solve(found.steps, found.ends, 1.0, found.ratio)
    again = schedule_for(2, "flux-schnell", shift=3.0, matching="snr", upsampler="lanczos")
    assert again == ralu.solve(found.steps, found.ends, 3.0, found.ratio, matching="snr", upsampler="lanczos")


# ---- what cannot be ----


@pytest.mark.parametrize("case", [{"model": "flux-schnell"}, {"model": "sd3.5-large", "stock_steps": 4}])
def test_the_range_that_is_told_can_be_reached(unsolved, case):
    with pytest.raises(
        ValueError, match=r"^speedup=12 cannot be reached at 1024x1024 pixels, against 4 steps: "
    ) as told:
        schedule_for(12, **case)
    most, nearest = map(
        float, re.search(r"at most ([\d.]+), and the nearest to it is ([\d.]+)$", str(told.value)).groups()
    )
    assert 2.4 < most == pytest.approx(nearest, abs=0.01)
    for speedup in np.linspace(1.5, most, 50):
        schedule_for(speedup, **case)
    with pytest.raises(ValueError, match="cannot be reached"):
        schedule_for(1.02 * most, **case)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"speedup": 1.4}, r"speedup must lie between 1\.5 and 12, got 1\.4"),
        ({"speedup": math.nan}, "speedup must lie between"),
        ({"speedup": -math.inf}, "speedup must lie between"),
        (
            {"speedup": 6, "height": 64, "width": 64},
            "speedup=6 cannot be reached at 64x64 .* at most 12, and the nearest to it is",
        ),
        ({"speedup": 6, "width": 1000}, "height and width must be positive and divide by 16, got 1024x1000"),
        ({"speedup": 6, "height": 0}, "height must be at least 1, got 0"),
        ({"speedup": 6, "text_tokens": 0}, "text_tokens must be at least 1, got 0"),
        ({"speedup": 6, "stock_steps": 0}, "stock_steps must be at least 1, got 0"),
        ({"speedup": 6, "model": "flux-9"}, "model must be one of flux-dev, .* got 'flux-9'"),
        ({"speedup": 6, "shift": 0.0}, "shift must be a positive number"),
        ({"speedup": 6, "upsampler": "lanczos"}, "needs matching='snr'"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        schedule_for(**arguments)


@pytest.mark.parametrize("name", ["speedup", "height", "width", "text_tokens", "stock_steps", "shift"])
def test_numbers_are_numbers(name):
    for wrong in ("6", True, [6], 6j, torch.tensor(6.0), *([None] if name == "speedup" else [])):
        with pytest.raises((TypeError, ValueError), match=f"{name} must be a"):
            schedule_for(**{"speedup": 6} | {name: wrong})


# ---- in pipelines ----


def test_every_spelling_is_one_schedule(stock, family):
    """Of the pipeline's default size, whatever is generated; and it comes back from disk."""
    size, text_tokens = (256, 512) if family.make is tiny.flux else (64, 256)
    expected = schedule_for(5, stock, height=size, width=size, text_tokens=text_tokens)
    for enabled in (
        lambda: ralu.enable(stock, speedup=5),
        lambda: ralu.enable(stock, "speedup-5.0"),
        lambda: ralu.enable(stock, Method("speedup-5")),
        lambda: ralu.enable(stock, schedule_for(5, stock)),
    ):
        assert enabled().scheduler.schedule == expected
    image = tiny.generate(stock)
    assert image.isfinite().all() and stock.num_timesteps == sum(expected.steps)
    saved = ralu.RaluScheduler.from_config(json.loads(stock.scheduler.to_json_string()))
    assert saved.schedule == expected
    ralu.enable(stock, "speedup-5(regions=gradient,matching=snr)")
    assert stock.scheduler.config.regions == "gradient"
    assert stock.scheduler.schedule == schedule_for(5, stock, matching="snr")
    ralu.disable(stock)
    assert not torch.equal(image, tiny.generate(stock, num_inference_steps=4))


def test_four_step_models_in_pipelines():
    pipe = tiny.flux(dynamic=False)  # by this it is told
    assert ralu.enable(pipe, speedup=2).scheduler.schedule == schedule_for(2, pipe, stock_steps=4, shift=3.0)
    before = pipe.scheduler
    with pytest.raises(ValueError, match=r"speedup=5 cannot be reached .* against 4 steps"):
        ralu.enable(pipe, speedup=5)
    assert pipe.scheduler is before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset": "flux-5x", "speedup": 5}, "give preset or speedup, not both"),
        ({"speedup": 20}, "speedup must lie between"),
        ({"preset": "speedup-20"}, "preset: speedup must lie between"),
        ({"preset": "speedup-fast"}, "preset: 'speedup-fast' is none of .*speedup-X"),
        ({"speedup": 5, "ratio": 0.3}, "a speedup chooses its own ratio, so ratio must be None, got 0.3"),
        ({"speedup": 5, "threshold": 0.3}, "so threshold must be None"),
        ({"preset": "speedup-5(ratio=0.3)"}, "speedup-5 has no option 'ratio'; it has regions"),
    ],
)
def test_refusals_of_enable(stock, arguments, words):
    before = stock.scheduler
    with pytest.raises(ValueError, match=words):
        ralu.enable(stock, **arguments)
    assert stock.scheduler is before


def test_a_scheduler_alone_does_not_know_the_work(unsolved):
    with pytest.raises(ValueError, match=r"'speedup-6' needs .* ralu\.schedule_for"):
        ralu.RaluScheduler("speedup-6")
    schedule = schedule_for(6, "flux-dev")
    assert ralu.RaluScheduler(schedule).schedule == schedule


# ---- by name ----


def test_names():
    for text, name, value in (
        ("speedup-6", "speedup-6", 6), ("speedup-6.50", "speedup-6.5", 6.5), ("speedup-012", "speedup-12", 12),
        ("speedup-2.1234567891", "speedup-2.1234567891", 2.1234567891), ("speedup-6.0(regions=canny)", "speedup-6", 6),
    ):  # fmt: skip
        parsed = Method.parse(text)
        assert parsed.preset == parsed.spatial == str(parsed) == name
        assert parsed.speedup == value and parsed.steps is None and Method.parse(name) == parsed
    full = Method.parse("speedup-6(regions=random,matching=snr)+taylorseer(interval=3)")
    assert Method.parse(str(full)) == full and full.options.given() == {"regions": "random", "matching": "snr"}
    with pytest.raises(ValueError, match="speedup-6 chooses its own ratio and has no threshold"):
        Method("speedup-6", ralu.Options(threshold=0.5))


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_estimate(stock):
    """Of a pipeline, as a string and as a method; its transformer's parts are 1/4 of the stock run's."""
    size = {"height": 64, "width": 64, "text_tokens": 16}

    def work(method):
        parts = ralu.estimate(stock, method, **size).parts
        return sum(part.tflop + part.attention for part in parts if "resolution" in part.name)

    assert work(50) / work("speedup-4") == pytest.approx(4, rel=0.01)
    assert work("speedup-4") == work(Method("speedup-4"))
    with pytest.raises(ValueError, match=r"speedup-4 chooses its own ratio, so ratio must be None, got 0\.3"):
        ralu.estimate(stock, "speedup-4", ratio=0.3, **size)


def test_command_line(tmp_path, capsys):
    """It plans for the size that it generates."""
    folder, output = str(tmp_path / "tiny"), str(tmp_path / "out.png")
    pipe = tiny.flux()
    pipe.save_pretrained(folder)
    options = ["--model", folder, "--size", "64", "-o", output]
    schedule = schedule_for(7.5, pipe, height=64, width=64)
    assert main(["generate", "fox", "--speedup", "7.5", "--regions", "gradient", *options]) == 0
    printed = capsys.readouterr().out
    assert "speedup-7.5(regions=gradient)\n" in printed and f"{sum(schedule.steps)} transformer calls" in printed
    ralu.enable(pipe, schedule, regions="gradient")
    expected = tiny.generate(pipe, "fox", output_type="pil", max_sequence_length=512)[0]
    assert np.array_equal(np.asarray(Image.open(output)), np.asarray(expected))

    assert main(["compare", "fox", "--methods", "stock-1", "speedup-7.5(regions=gradient)", *options]) == 0
    assert re.search(rf"^speedup-7\.5\(regions=gradient\) +\S+ +{sum(schedule.steps)} ", capsys.readouterr().out, re.M)

    for model, shift in (("sd3-medium", "3"), ("flux-schnell", "1")):
        shown, size = schedule_for(2, model, height=768), ["--size", "1024x768"]
        assert main(["schedule", "--speedup", "2", "--model", model, "--shift", shift, *size, "-o", output]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"speedup-2: {sum(shown.steps)} transformer calls, c = {shown.c:.4f}, ratio = ")
        assert [int(line.split("resolution")[1].split()[3]) for line in lines[3:6]] == list(shown.steps)
        assert Image.open(output).width > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("generate fox --speedup 20", "--speedup: speedup must lie between 1.5 and 12, got 20"),
        ("generate fox --speedup fast", "--speedup: 'fast' is no number"),
        ("generate fox --speedup 6 --preset flux-5x", "not both"),
        ("generate fox --speedup 6 --steps 4", "have their own steps"),
        ("generate fox --speedup 6 --ratio .3", "speedup-6 chooses its own ratio and has no ratio"),
        ("generate fox --model mini-schnell --speedup 6", "speedup-6: speedup=6 cannot be reached at 256x256"),
        ("schedule --speedup 6 --preset flux-5x", "not both"),
        ("schedule --speedup 6 --model flux-9", "--model: flux-9 is neither"),
        ("schedule --speedup 6 --size 1000", "divide by 16, got 1000x1000"),
        ("schedule --speedup 6 --model flux-schnell", "cannot be reached at 1024x1024 pixels, against 4 steps"),
    ],
)
def test_mistakes_take_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("ralu: ") and printed.err.count("\n") == 1
    assert words in printed.err
