"""The commands on a tiny random pipeline, against direct calls of the pipeline and the numbers they claim to show."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, StableDiffusion3Pipeline
from PIL import Image

import ralu
import ralu_kernels
from ralu import caches, families, figures, models, pipeline, runner
from ralu.cli import main
from ralu.families.flux import FAMILY as FLUX
from ralu.presets import PRESETS
from ralu.regions import edge_density
from ralu_kernels import plan_tokens

PROMPTS = tiny.PROMPTS[:2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny.flux().save_pretrained(path)
    return str(path)


@pytest.fixture
def pipe(folder):
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def rows(monkeypatch):
    """Collect the rows of the grid that a command draws."""
    drawn = []
    grid = figures.grid
    monkeypatch.setattr(figures, "grid", lambda columns, rows, note: drawn.extend(rows) or grid(columns, rows, note))
    return drawn


def generate(pipe, prompts, seeds, **call):
    return pipe(prompts, height=64, width=64, generator=tiny.generators(*seeds), **call).images


def pixels(image, size=(64, 64)):
    """Grids show small images scaled up by whole factors; undo that."""
    return np.asarray(image.resize(size, Image.Resampling.NEAREST))


def same(images, others):
    assert len(images) == len(others)
    return all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(images, others, strict=True))


def test_compare(folder, pipe, rows, tmp_path, capsys, monkeypatch):
    stock = generate(pipe, PROMPTS, (5, 6), num_inference_steps=4)
    fast = generate(ralu.enable(pipe, "flux-7x"), PROMPTS, (5, 6))

    runs = []  # transformer calls of every call of the pipeline
    call, forward = FluxPipeline.__call__, FluxTransformer2DModel.forward

    def counted(self, *args, **kwargs):
        runs[-1] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(FluxPipeline, "__call__", lambda *args, **kwargs: runs.append(0) or call(*args, **kwargs))
    monkeypatch.setattr(FluxTransformer2DModel, "forward", counted)
    output = tmp_path / "new" / "compare.png"
    methods = ["stock-4", "stock-2", "flux-7x"]
    options = ["--model", folder, "--size", "64", "--seed", "5", "--methods", *methods, "-o", str(output)]
    assert main(["compare", *PROMPTS, *options]) == 0

    assert runs == [1, 4, 2, 3, 10]  # a short warm-up before the first stock row and before the preset's
    printed = capsys.readouterr()
    table = re.findall(r"^(\S+) +([\d.]+) +(\d+) +([\d.]+)x$", printed.out, re.MULTILINE)
    assert [(name, int(calls)) for name, _, calls, _ in table] == list(zip(methods, (4, 2, 10), strict=True))
    for _, seconds, _, speedup in table:
        assert float(speedup) == pytest.approx(float(table[0][1]) / float(seconds), rel=0.1, abs=0.02)
    assert all(method in printed.err for method in methods)  # progress bars say what is running

    assert [row.title for row in rows] == methods
    assert [row.details[1] for row in rows] == ["4 transformer calls", "2 transformer calls", "10 transformer calls"]
    assert same(rows[0].images, stock)
    assert same(rows[2].images, fast)
    assert Image.open(output).size > (2 * 192, 3 * 192)


def test_regions(folder, pipe, rows, tmp_path, capsys):
    seen = []

    def record(x0, grid):
        seen.append((x0, grid))
        return edge_density(FLUX.decode(pipe, x0, grid), grid)

    finished = generate(ralu.enable(pipe, "flux-7x", regions=record), PROMPTS, (0, 1))
    assert same(finished, generate(ralu.enable(pipe, "flux-7x", regions="canny"), PROMPTS, (0, 1)))
    (x0, grid), ratios = seen[0], (0.1, 0.5)
    with torch.no_grad():
        previews = FLUX.decode(pipe, x0, grid)
    scores = edge_density(previews, grid)

    options = ["--model", folder, "--size", "64", "--preset", "flux-7x", "--ratios", *map(str, ratios)]
    assert main(["regions", *PROMPTS, *options, "-o", str(tmp_path / "regions.png")]) == 0

    assert len(rows) == 3
    printed = capsys.readouterr().out
    assert same(rows[-1].images, finished)
    for ratio, row in zip(ratios, rows, strict=False):
        for i, image in enumerate(row.images):
            plan = plan_tokens(scores[i : i + 1], grid, ratio=ratio)
            chosen = plan.source[plan.child >= 0].unique().tolist()
            assert marked(image, grid) == chosen
            count = f"{len(chosen)} of {grid[0] * grid[1]} regions"
            assert count in row.details
            assert f"ratio {ratio:g}: {count}\n" in printed
    # An image as a mask: its bright tokens go first.
    tokens = [3, 10, 11, 63]
    mask = np.zeros(grid[0] * grid[1], np.uint8)
    mask[tokens] = 255
    Image.fromarray(mask.reshape(grid)).save(tmp_path / "mask.png")
    masked = [*options, "--ratios", "0.0625", "--regions", str(tmp_path / "mask.png"), "-o", str(tmp_path / "m.png")]
    before = rows[0].images[0]
    rows.clear()
    assert main(["regions", *PROMPTS, *masked]) == 0
    assert [marked(image, grid) for image in rows[0].images] == [tokens, tokens]

    # The last of 7 by 8 squares of 32 pixels, all of which go first, lie half outside an image of 13 by 15 tokens.
    rows.clear()
    assert main(["regions", *PROMPTS, *masked, "--size", "60x52", "--ratios", "1"]) == 0
    for image in rows[0].images:
        blue = (np.asarray(image) == (0, 0x57, 0xFF)).all(axis=-1)
        for axis, side in enumerate((240, 208)):
            assert np.flatnonzero(blue.all(axis)).tolist() == [i for i in range(side) if i % 32 in (0, 1, 30, 31)]

    # What no square covers is the decoded prediction, scaled up.
    overlaid = before
    preview = pipe.image_processor.postprocess(previews, output_type="pil")[0].resize(overlaid.size)
    height, width = overlaid.height // grid[0], overlaid.width // grid[1]
    free = ~np.isin(np.arange(grid[0] * grid[1]).reshape(grid), marked(overlaid, grid))
    free = np.kron(free, np.ones((height, width))).astype(bool)
    assert np.array_equal(np.asarray(overlaid)[free], np.asarray(preview)[free])


def marked(image, grid):
    """List the tokens with a blue outline all around."""
    blue = (np.asarray(image) == (0, 0x57, 0xFF)).all(axis=-1)
    (h, w), (height, width) = grid, blue.shape
    blocks = blue.reshape(h, height // h, w, width // w).transpose(0, 2, 1, 3).reshape(h * w, height // h, width // w)
    edges = [np.concatenate([block[0], block[-1], block[:, 0], block[:, -1]]) for block in blocks]
    assert all(edge.all() or not edge.any() for edge in edges)
    return [token for token, edge in enumerate(edges) if edge.all()]


def test_generate(folder, pipe, tmp_path, capsys):
    options = ["--model", folder, "--size", "64", "--seed", "3", "-o", str(tmp_path / "a" / "b" / "cat.png")]
    assert main(["generate", *PROMPTS, "--preset", "flux-7x", "--ratio", "0.5", *options]) == 0
    assert "10 transformer calls, seed 4" in capsys.readouterr().out
    ralu.enable(pipe, "flux-7x", ratio=0.5)
    for i, prompt in enumerate(PROMPTS):
        saved = Image.open(tmp_path / "a" / "b" / f"cat-{i + 1}.png")
        assert same([saved], generate(pipe, [prompt], (3 + i,)))

    assert main(["generate", PROMPTS[0], "--preset", "stock", "--steps", "3", *options]) == 0
    direct = generate(ralu.disable(pipe), PROMPTS[:1], (3,), num_inference_steps=3)
    assert same([Image.open(tmp_path / "a" / "b" / "cat.png")], direct)

    assert main(["generate", PROMPTS[0], "--preset", "stock-3(spacing=trailing)", "--solver", "ab2", *options]) == 0
    assert "stock-3(solver=ab2,spacing=trailing)" in capsys.readouterr().out
    solved = generate(ralu.enable(pipe, "stock-3", solver="ab2", spacing="trailing"), PROMPTS[:1], (3,))
    assert same([Image.open(tmp_path / "a" / "b" / "cat.png")], solved) and not same(solved, direct)


def test_defaults_of_the_embedded_model(folder, tmp_path, monkeypatch):
    calls = []

    class CallError(Exception):
        pass

    def call(self, prompt, **given):
        calls.append(given)
        raise CallError

    monkeypatch.setattr(FluxPipeline, "__call__", call)
    monkeypatch.setenv("RALU_CACHE", str(tmp_path))
    for name in ("mini-flux-0123", "another-0123"):
        shutil.copytree(folder, tmp_path / name)
        with pytest.raises(CallError):
            main(["generate", "fox", "--model", str(tmp_path / name), "-o", str(tmp_path / "x.png")])
    mini, other = calls
    assert (mini["height"], mini["width"], mini["max_sequence_length"]) == (256, 256, 32)
    assert "max_sequence_length" not in other
    assert (other["height"], other["width"]) == (256, 256)  # the tiny pipeline's own: 128 latents of 2 pixels


def test_sd3_goes_by_its_own_presets(rows, tmp_path, monkeypatch, capsys):
    folder, output = str(tmp_path / "sd3"), str(tmp_path / "x.png")
    tiny.sd3().save_pretrained(folder)
    for name, steps in (("sd3-2x", (3, 2, 2)), ("sd3-3x", (2, 2, 2))):  # everything it runs, it runs twice
        monkeypatch.setitem(PRESETS, name, PRESETS[name].replace(steps=steps))
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options = ["--model", folder, "--size", "64", "--seed", "3", "-o", output]
    fast = generate(ralu.enable(pipe, "sd3-2x"), PROMPTS, (3, 4))
    assert main(["generate", PROMPTS[0], *options]) == 0
    printed = capsys.readouterr()
    assert "7 transformer calls" in printed.out and "7/7" in printed.err
    assert same([Image.open(output)], generate(pipe, PROMPTS[:1], (3,)))

    assert main(["regions", *PROMPTS, *options]) == 0
    assert same(rows[-1].images, fast)
    rows.clear()
    assert main(["compare", *PROMPTS, *options]) == 0
    assert [row.title for row in rows] == ["stock-28", "stock-10", "sd3-2x", "sd3-3x"]
    assert same(rows[2].images, fast)
    assert same(rows[3].images, generate(ralu.enable(pipe, "sd3-3x"), PROMPTS, (3, 4)))

    capsys.readouterr()
    assert main(["compare", *options, "--methods", "stock-4", "flux-5x"]) == 2
    assert "StableDiffusion3Pipeline; choose of sd3-2x, sd3-3x, " in capsys.readouterr().err

    calls = []
    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", lambda self, prompt, **given: calls.append(given))
    with pytest.raises(AttributeError):  # the pipeline gives no images any more
        main(["generate", "fox", "--model", "mini-sd3", "-o", output])
    assert calls[0]["height"] == 256 and calls[0]["guidance_scale"] < 7 and calls[0]["max_sequence_length"] == 32


@pytest.mark.parametrize(
    ("arguments", "schedule"),
    [
        ([], ralu.preset("flux-5x")),
        (["--preset", "sd3-2x"], ralu.preset("sd3-2x")),
        (["--preset", "bottleneck-sd3-2x"], ralu.preset("bottleneck-sd3-2x")),
        (["--preset", "qwen-5x"], ralu.preset("qwen-5x", shift=2.0)),
        (["--preset", "distilled-4", "--shift", "1"], ralu.preset("distilled-4", shift=1.0)),
        (["--steps", "2", "3", "5", "--ends", ".2", ".3", "1"], ralu.solve((2, 3, 5), (0.2, 0.3, 1.0))),
    ],
)
def test_schedule(arguments, schedule, tmp_path, capsys):
    output = tmp_path / "schedule.png"
    assert main(["schedule", *arguments, "-o", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    ratio = f", ratio = {schedule.ratio:g}" if schedule.mixed else ""
    assert lines[0].endswith(f"{sum(schedule.steps)} transformer calls, c = {schedule.c:.4f}{ratio}")
    for k, line in enumerate(lines[3:6]):
        start, end, shift, steps, *sigmas = map(float, line.split("resolution")[1].split())
        assert (start, end, shift, steps) == pytest.approx(
            (schedule.starts[k], schedule.ends[k], schedule.shifts[k], schedule.steps[k]), abs=5e-5
        )
        assert sigmas == pytest.approx(schedule.sigmas(k + 1), abs=5e-5)
    for k, line in enumerate(lines[8:10]):
        transition = schedule.transitions[k]
        expected = schedule.ends[k], transition.start, transition.scale, transition.noise_scale
        assert list(map(float, line.split()[3:])) == pytest.approx(expected, abs=5e-5)
    assert Image.open(output).width > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "which command?"),
        ("sketch fox", "'sketch'"),
        ("generate", "PROMPT"),
        ("generate fox --preset flux-9x", "flux-9x"),
        ("generate fox --steps 4", "have their own steps"),
        ("generate fox --preset stock --ratio .3", "no regions"),
        ("generate fox --solver heun", "invalid choice: 'heun' (choose from"),
        ("generate fox --preset stock --regions random", "no regions"),
        ("generate fox --preset distilled-4 --regions change", "needs 2 steps before the selection, distilled-4 has 1"),
        ("regions --preset distilled-4 --regions change", "needs 2 steps before the selection, distilled-4 has 1"),
        ("generate fox --regions {tmp}/nothing.png", "nor an image that can be read"),
        ("generate fox --ratio 1.5", "between 0 and 1"),
        ("generate fox --preset bottleneck-flux-5x --ratio .3", "bottleneck-flux-5x has whole stages alone and has no"),
        ("regions --preset speed-flux-5x", "speed-flux-5x has no regions, choose one of flux-5x, "),
        ("generate fox --size 64by64", "WIDTHxHEIGHT"),
        ("generate fox --size 58x64 --model {tiny}", "divide by 4, got 58x64; the nearest are 56x64 and 60x64"),
        (
            "generate fox --size 62 --preset stock --model {tiny}",
            "divide by 4, got 62x62; the nearest are 60x60 and 64x64",
        ),
        ("generate fox --device nonsense --model {tiny}", "nonsense cannot be used"),
        (
            "generate fox --model {tmp}/nothing",
            "neither mini-flux, nor mini-sd3, nor mini-schnell, nor a folder, nor a hub id",
        ),
        ("generate fox --model mini", "mini is neither mini-flux, nor mini-sd3, nor mini-schnell, nor a folder"),
        ("generate fox --model {tmp}", "no model_index.json"),
        ("generate fox --model {tmp}/broken", "cannot load"),
        ("generate fox -o {tmp}/fox.txt", ".png"),
        ("generate fox -o {tmp}/file/fox.png", "cannot create the folder"),
        ("generate fox -o {tmp}/folder.png", "cannot write"),
        ("compare --methods stock-0", "stock-0"),
        ("regions --preset stock", "no regions"),
        ("schedule --steps 4 5 6", "--ends"),
        ("schedule --steps 4 5 0 --ends .3 .45 1", "'0'"),
        ("schedule --steps 4 5 6 --ends .5 .45 1 -o {tmp}/s.png", "increasing"),
        ("schedule --preset flux-5x --steps 4 5 6 --ends .3 .45 1", "not both"),
        ("schedule --shift 0", "positive"),
    ],
)
def test_mistakes_take_one_line(arguments, words, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    assert main(arguments.format(tmp=tmp_path, tiny=folder).split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("ralu: ") and printed.err.count("\n") == 1
    assert words in printed.err


def test_a_hub_that_is_out_of_reach(tmp_path, monkeypatch, capsys):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub\n" + "details\n" * 100)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    assert main(["generate", "fox", "--model", "somebody/something", "-o", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert "somebody/something" in error and "no route to the hub" in error
    assert error.count("\n") == 1 and len(error) < 400


def test_control_c(monkeypatch, capsys, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "Runner", interrupted)
    assert main(["compare", "-o", str(tmp_path / "x.png")]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_process_ends_with_that_status():
    command = [sys.executable, "-m", "ralu", "generate", "fox", "--preset", "flux-9x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("ralu: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["generate"], ["compare"], ["regions"], ["schedule"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:\n  ralu " in text
    assert "None" not in text


# ---- refusals, and what they must not do ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("generate fox --preset stock-28 --steps 20", "stock-28 says how many steps already"),
        ("generate fox --preset stock-9(solver=ab2) --solver ab2", "--preset stock-9(solver=ab2) says so already"),
        ("generate fox --preset flux-5x(ratio=.3) --ratio .2", "--ratio: --preset flux-5x(ratio=0.3) says so already"),
        ("generate fox --preset flux-5x(threshold=.3) --ratio .2", "--ratio: give ratio or threshold, not both"),
        ("generate fox --preset flux-5x(ratio=3)", "ratio must lie in [0, 1], got 3.0"),
        ("generate fox --preset flux-5x+sloth", "'sloth' is no cache"),
        ("generate fox --size 64 --width 64", "not both"),
        ("generate fox --width 102 --model {tiny}", "got 102x256; the nearest are 100x256 and 104x256"),
        ("generate fox --size 3x3 --model {tiny}", "got 3x3; the nearest is 4x4\n"),
        ("generate fox --size 64x22 --model {tiny}", "got 64x22; the nearest are 64x20 and 64x24\n"),
        ("generate fox --size 512 --model mini-sd3", "makes at most 384x384"),
        ("generate fox --size 0x8", "WIDTHxHEIGHT"),
        ("generate fox --seed -1", "'-1' is no whole number from 0 to 9223372036854775807"),
        ("generate fox --seed 9223372036854775808", "no whole number from 0 to"),
        ("generate fox --seed 1" + "0" * 5000, "no whole number from 0 to"),
        ("generate fox --seed 1.5", "no whole number from 0 to"),
        ("generate fox --preset sd3-2x", "sd3-2x is not for a FluxPipeline; choose of flux-5x, flux-7x, "),
        ("generate fox --model {tmp}/other", "StableDiffusion3Pipeline, ZImagePipeline, but"),
        ("generate fox --model {tmp}/list", "model_index.json is no JSON object"),
        ("generate fox --model {tmp}/halved", "vae/config.json: No such file"),
        ("generate fox --regions {tmp}/truncated.png", "nor an image that can be read"),
        ("estimate --methods flux-5x(threshold=.1)", "depends on the image; give a ratio"),
        ("estimate --model sd3-medium --methods flux-5x", "choose of sd3-2x, sd3-3x, "),
        ("estimate --size 8 --model sd3-medium", "got 8x8; the nearest is 16x16\n"),
    ],
)
def test_refused_before_anything_heavy(arguments, words, folder, tmp_path, monkeypatch, capsys):
    """In a process that has imported neither PyTorch nor diffusers, and without a trace in the output's folder."""
    for name, index in (("other", '{"_class_name": "FluxKontextPipeline"}'), ("list", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(index)
    (tmp_path / "halved").mkdir()
    (tmp_path / "halved" / "model_index.json").write_text(Path(folder, "model_index.json").read_text())
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-30])
    ralu.mini_path()  # which needs PyTorch when a model is unpacked
    heavy = [name for name in ("torch", "diffusers", "transformers") if name in sys.modules]
    for name in heavy:
        monkeypatch.setitem(sys.modules, name, None)  # importing it now fails
    command = arguments.format(tmp=tmp_path, tiny=folder).split()
    output = [] if command[0] == "estimate" else ["-o", str(tmp_path / "new" / "x.png")]
    assert main(command + output) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("ralu: ") and printed.err.count("\n") == 1
    assert words in printed.err
    assert not (tmp_path / "new").exists()


def test_a_fault_of_the_program_keeps_its_traceback(folder, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(FluxPipeline, "__call__", broken)
    with pytest.raises(ValueError, match="shapes do not match"):
        main(["generate", "fox", "--model", folder, "--size", "64", "-o", str(tmp_path / "x.png")])


def test_a_disk_that_is_full_is_told_in_a_line(folder, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    options = ["--preset", "stock-1", "--size", "64", "-o", str(tmp_path / "x.png")]
    assert main(["generate", "fox", "--model", folder, *options]) == 2
    assert "--output: [Errno 28] No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("size", [["--size", "96x64"], ["--width", "96", "--height", "64"]])
def test_sizes_are_width_by_height(size, folder, tmp_path, capsys):
    output = tmp_path / "x.png"
    options = ["--model", folder, "--preset", "stock-1", *size, "-o", str(output)]
    assert main(["generate", "fox", *options]) == 0
    assert Image.open(output).size == (96, 64)
    assert "96×64 pixels" in capsys.readouterr().out


def test_what_is_read_of_a_model_is_what_its_pipeline_says(folder, tmp_path):
    tiny.sd3().save_pretrained(tmp_path)
    for path, kind in ((folder, FluxPipeline), (str(tmp_path), StableDiffusion3Pipeline)):
        pipe, model = kind.from_pretrained(path), models.find_model(path)
        assert (model.pipeline, model.latent) == (kind.__name__, pipe.vae_scale_factor)
        assert model.pixels == pipe.default_sample_size * pipe.vae_scale_factor
        assert model.family == families.family_of(pipe).name
        assert not model.embedded and model.call_arguments == {}
    with pytest.raises(ValueError, match="pos_embed_max_size"):  # one latent pixel of 2 more than the largest
        pipe.transformer.pos_embed.cropped_pos_embed(model.largest // 2 + 2, 2)
    pipe.transformer.pos_embed.cropped_pos_embed(model.largest // 2, 2)


def test_a_distilled_model_goes_by_its_own_defaults(tmp_path, capsys):
    tiny.flux(dynamic=False).save_pretrained(tmp_path)
    assert main(["generate", "fox", "--model", str(tmp_path), "--size", "64", "-o", str(tmp_path / "x.png")]) == 0
    assert "4 transformer calls" in capsys.readouterr().out
    names = {name: [str(method) for method in models.find_model(name).methods] for name in ("mini-schnell", "mini-sd3")}
    assert names["mini-schnell"] == ["stock-4", "stock-2", "distilled-4"]
    assert names["mini-sd3"] == ["stock-28", "stock-10", "sd3-2x", "sd3-3x"]


def test_options_in_a_methods_name(folder, pipe, rows, tmp_path):
    """They are `enable`'s, also where the folder was saved with others."""
    expected = generate(ralu.enable(pipe, "flux-7x", ratio=0.5, granularity="token"), PROMPTS, (0, 1))
    plain = generate(ralu.enable(pipe, "flux-7x"), PROMPTS, (0, 1))
    ralu.enable(pipe, "flux-7x", granularity="token").save_pretrained(tmp_path / "enabled")
    methods = ["flux-7x", "flux-7x(ratio=0.5,granularity=token)"]
    output = ["--size", "64", "-o", str(tmp_path / "x.png")]
    assert main(["compare", *PROMPTS, "--model", str(tmp_path / "enabled"), "--methods", *methods, *output]) == 0
    assert [row.title for row in rows] == methods
    assert same(rows[0].images, plain) and same(rows[1].images, expected)
    assert not same(plain, expected)


def test_a_cache_reaches_enable(folder, tmp_path, monkeypatch, capsys):
    @dataclass(frozen=True)
    class Toy(caches.Cache):
        families: ClassVar = ("flux",)
        interval: int = 2

        def apply(self, transformer):
            """Nothing: `enable` below does without it."""

        remove = apply

    monkeypatch.setitem(caches.CACHES, "toy", Toy)
    given, enable = [], pipeline.enable
    monkeypatch.setattr(
        pipeline, "enable", lambda pipe, preset, cache, **_: given.append(cache) or enable(pipe, preset)
    )
    options = ["--model", folder, "--size", "64", "-o", str(tmp_path / "x.png")]
    assert main(["generate", "fox", "--preset", "flux-7x+toy(interval=3)", *options]) == 0
    assert given == [Toy(3)] and "flux-7x+toy(interval=3)\n" in capsys.readouterr().out
    assert main(["generate", "fox", "--preset", "sd3-2x+toy", "--model", "mini-sd3"]) == 2
    assert "this cache is not for a StableDiffusion3Pipeline, it serves flux" in capsys.readouterr().err

    assert main(["estimate", "--model", "mini-flux", "--methods", "flux-5x", "flux-5x+toy"]) == 0
    plain, cached = capsys.readouterr().out.split("\n\n")[1:]
    assert cached.startswith("flux-5x+toy (at most") and cached.split("\n")[1:9] == plain.split("\n")[1:9]


def test_a_threshold_for_several_images_of_sd3(tmp_path, capsys):
    tiny.sd3().save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--size", "64", "-o", str(tmp_path / "x.png")]
    assert main(["compare", *PROMPTS, "--methods", "sd3-2x(threshold=0.1)", *options]) == 2
    printed = capsys.readouterr().err
    assert printed.count("ralu: ") == 1 and "take one prompt at a time" in printed
    assert main(["compare", PROMPTS[0], "--methods", "sd3-2x(threshold=0.1)", *options]) == 0


def test_sd3s_bar_ends_at_its_end(tmp_path, capsys):
    tiny.sd3().save_pretrained(tmp_path)
    capsys.readouterr()
    for preset, steps in (("sd3-3x", 12), ("distilled-4", 4), ("stock-3", 3)):
        options = ["--preset", preset, "--size", "64", "-o", str(tmp_path / "x.png")]
        assert main(["generate", "fox", "--model", str(tmp_path), *options]) == 0
        counts = re.findall(r"(\d+)/(\d+) \[", capsys.readouterr().err)
        assert counts[-1] == (str(steps), str(steps)) and {total for _, total in counts} == {str(steps)}


def test_info(capsys, monkeypatch):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for package in ("torch", "diffusers", "transformers"):
        assert re.search(rf"^  {package} +{re.escape(metadata.version(package))}$", text, re.MULTILINE)
    blocks = {block.split("\n")[0]: dict(line.split(maxsplit=1) for line in block.split("\n")[1:] if line)
              for block in text.strip().split("\n\n")}  # fmt: skip
    backends = blocks["backends of ralu_kernels on cpu"]
    for backend in ("native", "triton", "reference"):
        try:
            ralu_kernels.upsample_renoise(torch.zeros(1, 4, 2, 2), 1.0, 0.0, 0.0, 0, backend=backend)
            assert backends[backend] == "available"
        except ValueError as error:  # noqa: PERF203
            assert backends[backend] in str(error)
    chosen = backends["auto"].removeprefix("is ")
    assert backends[chosen] == "available"
    attention = blocks["attention backends on cpu, in the order of auto"]
    assert attention["sdpa"] == "available" and "cannot be imported" in attention["flash3"]
    embedded = blocks["embedded models"]
    assert embedded.pop("unpacked") == f"into {os.environ['RALU_CACHE']}"
    assert list(embedded) == ["mini-flux", "mini-sd3", "mini-schnell"]
    assert all(Path(path, "scheduler", "scheduler_config.json").exists() for path in embedded.values())
    if ralu_kernels._backend._extension:
        where, _ = blocks["compiled extension"]["ralu_kernels_C"].split(", ")
        assert Path(where).exists()
    monkeypatch.setattr(ralu_kernels._backend, "_extension", None)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.count("the extension was not compiled when ralu_kernels was installed") == 2  # the backend's reason too
    monkeypatch.delitem(sys.modules, "ralu.mini.unpack")  # nor where the pipelines' packages are absent
    monkeypatch.delattr("ralu.mini.unpack", raising=False)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert main(["info"]) == 0
    monkeypatch.setitem(sys.modules, "ralu_kernels", None)  # a broken installation is what one wants to read about
    assert main(["info"]) == 0
    assert "ralu_kernels\n  broken  " in capsys.readouterr().out


def test_nothing_below_the_command_line_imports_it():
    root = Path(ralu.__file__).parent
    files = [path for path in [*root.rglob("*.py"), *(root.parent / "benchmarks").glob("*.py")]
             if path.parent.name != "cli" and path.name != "__main__.py"]  # fmt: skip
    assert len(files) > 20
    for path in files:
        assert not re.search(r"^\s*(from|import) .*\bcli\b", path.read_text(), re.MULTILINE), path


def test_regions_by_name(folder, pipe, rows, tmp_path, capsys):
    """Evenly spaced ones over the preview, and change, for which the warm-up needs two steps a stage."""
    call = ["--model", folder, "--size", "64", "-o", str(tmp_path / "x.png")]
    assert main(["regions", PROMPTS[0], *call, "--regions", "grid", "--ratios", ".25"]) == 0
    assert marked(rows[0].images[0], (8, 8)) == [
        8 * row + column for row in range(0, 8, 2) for column in range(0, 8, 2)
    ]
    rows.clear()
    assert main(["compare", PROMPTS[0], *call, "--methods", "flux-7x(regions=change)"]) == 0
    assert "10" in rows[0].details[1]
    assert same(rows[0].images, generate(ralu.enable(pipe, "flux-7x", regions="change"), PROMPTS[:1], (0,)))
