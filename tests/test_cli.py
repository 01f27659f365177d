"""The commands on a tiny random pipeline, against direct calls of the pipeline and the numbers they claim to show."""

import re
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, StableDiffusion3Pipeline
from PIL import Image

import ralu
from ralu import cli, figures
from ralu.cli import main
from ralu.families.flux import decode
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
    """The rows of the grid that a command draws."""
    drawn = []
    grid = figures.grid
    monkeypatch.setattr(figures, "grid", lambda columns, rows, note: drawn.extend(rows) or grid(columns, rows, note))
    return drawn


def paint(pipe, prompts, seeds, **call):
    return pipe(prompts, height=64, width=64, generator=tiny.generators(*seeds), **call).images


def pixels(image, size=(64, 64)):
    """Grids show small pictures enlarged by whole factors; take that back."""
    return np.asarray(image.resize(size, Image.Resampling.NEAREST))


def same(images, others):
    assert len(images) == len(others)
    return all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(images, others, strict=True))


def test_compare(folder, pipe, rows, tmp_path, capsys, monkeypatch):
    stock = paint(pipe, PROMPTS, (5, 6), num_inference_steps=4)
    fast = paint(ralu.enable(pipe, "flux-7x"), PROMPTS, (5, 6))

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
        return edge_density(decode(pipe, x0, grid), grid)

    finished = paint(ralu.enable(pipe, "flux-7x", regions=record), PROMPTS, (0, 1))
    assert same(finished, paint(ralu.enable(pipe, "flux-7x", regions="canny"), PROMPTS, (0, 1)))
    (x0, grid), ratios = seen[0], (0.1, 0.5)
    with torch.no_grad():
        previews = decode(pipe, x0, grid)
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
    # A picture as a mask: its bright tokens go first.
    tokens = [3, 10, 11, 63]
    picture = np.zeros(grid[0] * grid[1], np.uint8)
    picture[tokens] = 255
    Image.fromarray(picture.reshape(grid)).save(tmp_path / "mask.png")
    masked = [*options, "--ratios", "0.0625", "--regions", str(tmp_path / "mask.png"), "-o", str(tmp_path / "m.png")]
    before = rows[0].images[0]
    rows.clear()
    assert main(["regions", *PROMPTS, *masked]) == 0
    assert [marked(image, grid) for image in rows[0].images] == [tokens, tokens]

    # What no square covers is the decoded prediction, enlarged.
    overlaid = before
    preview = pipe.image_processor.postprocess(previews, output_type="pil")[0].resize(overlaid.size)
    height, width = overlaid.height // grid[0], overlaid.width // grid[1]
    free = ~np.isin(np.arange(grid[0] * grid[1]).reshape(grid), marked(overlaid, grid))
    free = np.kron(free, np.ones((height, width))).astype(bool)
    assert np.array_equal(np.asarray(overlaid)[free], np.asarray(preview)[free])


def marked(image, grid):
    """The tokens with a blue outline all around."""
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
        painted = Image.open(tmp_path / "a" / "b" / f"cat-{i + 1}.png")
        assert same([painted], paint(pipe, [prompt], (3 + i,)))

    assert main(["generate", PROMPTS[0], "--preset", "stock", "--steps", "3", *options]) == 0
    direct = paint(ralu.disable(pipe), PROMPTS[:1], (3,), num_inference_steps=3)
    assert same([Image.open(tmp_path / "a" / "b" / "cat.png")], direct)


def test_defaults_of_the_embedded_model(folder, tmp_path, monkeypatch):
    calls = []

    class Given(Exception):
        pass

    def call(self, prompts, **given):
        calls.append(given)
        raise Given

    monkeypatch.setattr(FluxPipeline, "__call__", call)
    for embedded in (folder, str(tmp_path / "elsewhere")):
        monkeypatch.setattr(cli, "mini_path", lambda _, path=embedded: cli.Path(path))
        with pytest.raises(Given):
            main(["generate", "fox", "--model", folder, "-o", str(tmp_path / "x.png")])
    mini, other = calls
    assert (mini["height"], mini["width"], mini["max_sequence_length"]) == (256, 256, 32)
    assert "max_sequence_length" not in other
    assert (other["height"], other["width"]) == (256, 256)  # the tiny pipeline's own: 128 latents of 2 pixels


def test_sd3_goes_by_its_own_presets(rows, tmp_path, monkeypatch, capsys):
    folder, output = str(tmp_path / "sd3"), str(tmp_path / "x.png")
    tiny.sd3().save_pretrained(folder)
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options = ["--model", folder, "--size", "64", "--seed", "3", "-o", output]
    fast = paint(ralu.enable(pipe, "sd3-2x"), PROMPTS, (3, 4))
    assert main(["generate", PROMPTS[0], *options]) == 0
    printed = capsys.readouterr()
    assert "20 transformer calls" in printed.out and "20/20" in printed.err
    assert same([Image.open(output)], paint(pipe, PROMPTS[:1], (3,)))

    assert main(["regions", *PROMPTS, *options]) == 0
    assert same(rows[-1].images, fast)
    rows.clear()
    assert main(["compare", *PROMPTS, *options]) == 0
    assert [row.title for row in rows] == ["stock-28", "stock-10", "sd3-2x", "sd3-3x"]
    assert same(rows[2].images, fast)
    assert same(rows[3].images, paint(ralu.enable(pipe, "sd3-3x"), PROMPTS, (3, 4)))

    capsys.readouterr()
    assert main(["compare", *options, "--methods", "stock-4", "flux-5x"]) == 2
    assert "StableDiffusion3Pipeline; choose of sd3-2x, sd3-3x, distilled-4" in capsys.readouterr().err

    calls = []
    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", lambda self, prompts, **given: calls.append(given))
    monkeypatch.setattr(cli, "mini_path", lambda name: tmp_path / name)
    with pytest.raises(AttributeError):  # the pipeline gives no pictures any more
        main(["generate", "fox", "--model", "mini-sd3", "-o", output])
    assert calls[0]["height"] == 256 and calls[0]["guidance_scale"] < 7 and calls[0]["max_sequence_length"] == 32


@pytest.mark.parametrize(
    ("arguments", "schedule"),
    [
        ([], ralu.preset("flux-5x")),
        (["--preset", "sd3-2x"], ralu.preset("sd3-2x")),
        (["--preset", "distilled-4", "--shift", "1"], ralu.preset("distilled-4", shift=1.0)),
        (["--steps", "2", "3", "5", "--ends", ".2", ".3", "1"], ralu.solve((2, 3, 5), (0.2, 0.3, 1.0))),
    ],
)
def test_schedule(arguments, schedule, tmp_path, capsys):
    output = tmp_path / "schedule.png"
    assert main(["schedule", *arguments, "-o", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{sum(schedule.steps)} transformer calls, c = {schedule.c:.4f}, ratio = {schedule.ratio:g}" in lines[0]
    for k, line in enumerate(lines[3:6]):
        start, end, shift, steps, *sigmas = map(float, line.split("resolution")[1].split())
        assert (start, end, shift, steps) == pytest.approx(
            (schedule.starts[k], schedule.ends[k], schedule.shifts[k], schedule.steps[k]), abs=5e-5
        )
        assert sigmas == pytest.approx(schedule.sigmas(k + 1), abs=5e-5)
    for k, line in enumerate(lines[8:10]):
        move = schedule.transitions[k]
        expected = schedule.ends[k], move.start, move.scale, move.noise_scale
        assert list(map(float, line.split()[3:])) == pytest.approx(expected, abs=5e-5)
    assert Image.open(output).width > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "which command?"),
        ("paint fox", "'paint'"),
        ("generate", "PROMPT"),
        ("generate fox --preset flux-9x", "flux-9x"),
        ("generate fox --steps 4", "have their own steps"),
        ("generate fox --preset stock --ratio .3", "no regions"),
        ("generate fox --preset stock --regions random", "no regions"),
        ("generate fox --regions {tmp}/nothing.png", "nor a picture that can be read"),
        ("generate fox --ratio 1.5", "between 0 and 1"),
        ("generate fox --size 64by64", "HEIGHTxWIDTH"),
        ("generate fox --size 60x64 --model {tiny}", "divide by 8, got 60x64; the nearest are 56x64 and 64x72"),
        ("generate fox --size 62 --preset stock --model {tiny}", "divide by 4, got 62x62"),
        ("generate fox --device nonsense --model {tiny}", "nonsense cannot be used"),
        (
            "generate fox --model {tmp}/nothing",
            "neither mini, nor mini-flux, nor mini-schnell, nor mini-sd3, nor a folder, nor a hub id",
        ),
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

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", unreachable)
    assert main(["generate", "fox", "--model", "somebody/something", "-o", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert "somebody/something" in error and "no route to the hub" in error
    assert error.count("\n") == 1 and len(error) < 400


def test_control_c(monkeypatch, capsys, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "Painter", interrupted)
    assert main(["compare", "-o", str(tmp_path / "x.png")]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_process_ends_with_that_status():
    command = [sys.executable, "-m", "ralu.cli", "generate", "fox", "--preset", "flux-9x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
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
