"""`ralu evaluate`: one, two and killed processes against the pipeline itself, scores against the metrics' authors."""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from importlib import metadata
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import tiny
import torch
import tqdm.auto
from accelerate import PartialState
from diffusers import FluxPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import ralu
from ralu import caches
from ralu.cli import main
from ralu.evaluation import folder as folders
from ralu.evaluation import generate, layouts, metrics, report
from ralu.evaluation.__main__ import score_folder
from ralu.evaluation.metrics import MetricUnavailable
from ralu.evaluation.prompts import Prompt, Sample, read_prompts
from ralu.method import Method
from ralu.runner import Result

METHODS = ["stock-2", "flux-7x"]
CAPTIONS = ["fox", "", "penguin", "pizza"]  # with a blank line, which counts


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("evaluate")
    (workspace / "prompts.txt").write_text("\n".join(CAPTIONS))
    return workspace


def arguments(workspace, folder, *more):
    options = ["--prompts", workspace / "prompts.txt", "--methods", *METHODS, "--metrics", "geneval", "--size", 64]
    return ["evaluate", *map(str, [*options, "--seed", 5, "--device", "cpu", "-o", folder, *more])]


@pytest.fixture(scope="module")
def whole(workspace):
    """Evaluate in one process without interruption."""
    assert main(arguments(workspace, workspace / "whole")) == 0
    return workspace / "whole"


def image_files(folder):
    return {str(path.relative_to(folder)): path for method in METHODS for path in folder.glob(f"{method}/*")}


def same(folder, other):
    ours, theirs = image_files(folder), image_files(other)
    pixels = ((np.asarray(Image.open(ours[name])), np.asarray(Image.open(theirs[name]))) for name in ours)
    return ours.keys() == theirs.keys() and all(np.array_equal(a, b) for a, b in pixels)


def test_images_are_the_pipelines(whole):
    pipe = FluxPipeline.from_pretrained(ralu.mini_path())
    pipe.set_progress_bar_config(disable=True)
    lines = {0: "fox", 2: "penguin", 3: "pizza"}
    assert sorted(image_files(whole)) == sorted(f"{method}/{line:05d}-00.png" for method in METHODS for line in lines)
    for line, caption in lines.items():
        for method, steps in zip(METHODS, (2, 10), strict=True):
            (ralu.disable if steps == 2 else ralu.enable)(pipe, *([method] if steps == 10 else []))
            call = {"num_inference_steps": steps, "height": 64, "width": 64, "max_sequence_length": 32}
            image = pipe(caption, generator=tiny.generators(5 + line), **call).images[0]
            path = whole / method / f"{line:05d}-00.png"
            assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))
            written = folders.read_record(path)
            assert (written["prompt"], written["seed"], written["calls"]) == (caption, 5 + line, steps)


def start(workspace, folder, **environment):
    """`ralu` in a process of its own, which is forked from this one: it need not import everything again."""

    def run():
        PartialState._reset_state()
        torch.set_num_threads(1)  # OpenMP's threads are not forked
        for bars in (tqdm.tqdm, tqdm.auto.tqdm):  # a fork shares their lock, and killed with it would keep it for ever
            bars.set_lock(threading.RLock())
        os.environ.update(environment)
        folder.mkdir(exist_ok=True)
        with open(folder / "printed.txt", "a") as file, redirect_stdout(file), redirect_stderr(file):
            sys.exit(main(arguments(workspace, folder)))

    process = get_context("fork").Process(target=run)
    process.start()
    return process


def test_two_processes_make_the_same(workspace, whole):
    """In the environment that `accelerate launch` gives each."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    both = [start(workspace, workspace / "two", **common, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    for process in both:
        process.join(300)
        process.kill()
    printed = (workspace / "two" / "printed.txt").read_text()
    assert [process.exitcode for process in both] == [0, 0], printed
    assert printed.count("report.html") == 1  # one of them reports
    assert same(workspace / "two", whole)
    assert all(folders.read_record(path)["processes"] == 2 for path in image_files(workspace / "two").values())


def test_a_killed_run_goes_on(workspace, whole, monkeypatch):
    folder = workspace / "killed"
    run = start(workspace, folder)
    while not list(folder.glob("*/*.png")) and run.is_alive():
        time.sleep(0.002)
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL

    left = {name: path for name, path in image_files(folder).items() if path.suffix == ".png"}
    missing = sorted(image_files(whole).keys() - left.keys())
    assert left and missing
    before = {name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in left.items()}
    half = folder / f"{missing[0]}.part"  # as if it had been killed while it wrote this one
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(image_files(whole)[missing[0]].read_bytes()[:100])

    saved, save = [], folders.save_image
    monkeypatch.setattr(generate, "save_image", lambda image, path, made: saved.append(path) or save(image, path, made))
    assert main(arguments(workspace, folder)) == 0
    assert sorted(str(path.relative_to(folder)) for path in saved) == missing
    assert same(folder, whole)  # nor is a half-written file left
    assert {name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in left.items()} == before

    saved.clear()
    assert main(arguments(workspace, folder)) == 0
    assert not saved


# ---- without a model ----


class ColourRunner:
    """Makes an image of each seed's colour, in no time."""

    def __init__(self, *methods, seed=0):
        self.pipe = SimpleNamespace(device=torch.device("cpu"))
        self.methods, self.seed, self.batches = [Method.parse(name) for name in methods], seed, []
        self.warm_up = lambda *_: None

    def use(self, method):
        self.method = method

    def generate(self, prompts, label, seeds, **bar):
        self.batches.append((str(self.method), prompts, seeds))
        images = [Image.new("RGB", (8, 8), colour(seed)) for seed in seeds]
        return Result(images, len(prompts) / 2, self.method.steps)


def generate_with(runner, folder, *others):
    generate.generate(runner, folder, runner.methods, *others)


SAMPLE = 1_000_000  # between the seeds of two samples, as --help says


def colour(seed):
    return seed % SAMPLE, seed // SAMPLE, 0


def process(index=0, count=1):
    return SimpleNamespace(process_index=index, num_processes=count, is_main_process=not index, wait_for_everyone=int)


def samples_of(texts, samples=1, **metadata):
    prompts = [Prompt(line, text, {"prompt": text} | metadata) for line, text in enumerate(texts)]
    return [Sample(prompt, sample) for sample in range(samples) for prompt in prompts]


def test_processes_share_the_work_and_seeds_stay(tmp_path, monkeypatch):
    wanted = samples_of("abcdefg", samples=2)
    runners = [ColourRunner("stock-4", "stock-2", seed=3) for _ in range(3)]
    present = folders.present
    monkeypatch.setattr(generate, "present", lambda workspace, part: 0)  # all look before one generates
    for index, runner in enumerate(runners):
        generate_with(runner, tmp_path, wanted, 2, process(index, 3))
    done = [(method, seed) for runner in runners for method, _, seeds in runner.batches for seed in seeds]
    seeds = [3 + line + SAMPLE * sample for sample in (0, 1) for line in range(7)]
    assert sorted(done) == sorted((method, seed) for method in ("stock-4", "stock-2") for seed in seeds)

    monkeypatch.setattr(generate, "present", present)
    gone, kept = tmp_path / "stock-2" / "00004-01.png", tmp_path / "stock-2" / "00003-01.png"
    gone.unlink()
    before, runner = kept.stat().st_ino, ColourRunner("stock-4", "stock-2", seed=3)
    generate_with(runner, tmp_path, wanted, 2, process())
    assert runner.batches == [("stock-2", ["d", "e"], [3 + SAMPLE + 3, 3 + SAMPLE + 4])]  # the batch it was in
    assert Image.open(gone).getpixel((0, 0)) == colour(3 + SAMPLE + 4)
    assert kept.stat().st_ino == before


SETTINGS = {"--prompts": "prompts.txt", "--model": "model", "--size": "64", "--methods": "stock-1 flux-7x", "-o": "out"}
SETTINGS |= {"--metrics": "geneval"}


def evaluate(settings):
    return main(["evaluate", *(word for key, value in settings.items() for word in (key, *value.split()))])


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder in which `evaluate` ran."""
    folder = tmp_path_factory.mktemp("begun")
    pipe = tiny.flux()
    pipe.save_pretrained(folder / "model")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias += 1
    pipe.save_pretrained(folder / "other")
    (folder / "prompts.txt").write_text("a cat\na dog")
    (folder / "other.txt").write_text("a cat\na cow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert evaluate(SETTINGS) == 0
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--size": "32"}, "another height: 64, now 32"),
        ({"--seed": "1"}, "another seed: 0, now 1"),
        ({"--dtype": "bfloat16"}, "another dtype"),
        ({"--prompts": "other.txt"}, "another prompts"),
        ({"--model": "other"}, "another model"),
        ({"--methods": "stock-2 flux-7x"}, "another method flux-7x"),
        ({"--methods": "stock-1 stock-2"}, None),
        ({"--samples": "2", "--batch": "2"}, None),
    ],
)
def test_other_settings_do_not_mix(change, words, begun, tmp_path, monkeypatch, capsys):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in Path("out").rglob("*.*")}
    if words and "flux-7x" in words:
        monkeypatch.setitem(ralu.PRESETS, "flux-7x", ralu.PRESETS["flux-5x"])
    assert evaluate(SETTINGS | change) == (2 if words else 0)
    printed = capsys.readouterr().err
    if words:
        assert printed.count("\n") == 1 and words in printed
        assert before == {path: path.read_bytes() for path in Path("out").rglob("*.*")}
    else:
        assert all(path.read_bytes() == data for path, data in before.items() if path.suffix == ".png")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "\n \n", "has no prompt"),
        ("p.jsonl", '{"prompt": "a"}\nfox', 'line 2 of p.jsonl has no "prompt": fox'),
        ("p.jsonl", '{"prompt": 3}', "line 1"),
        ("p.jsonl", "[1]", "line 1"),
    ],
)
def test_prompt_files_that_are_none(name, text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        read_prompts(Path(name))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("p.txt", "ein Hund\nein Bär\n".encode("latin-1"), "line 2 of p.txt is not UTF-8, at byte 6: b'ein B\\xe4r'"),
        ("p.txt", "a fox".encode("utf-16"), "line 1 of p.txt is not UTF-8, at byte 1"),
        ("p.txt", b"a fox\n\tspatial\n", r"line 2 of p.txt has an empty prompt: '\tspatial'"),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n\n{"prompt": " "}',
            'line 3 of p.jsonl has an empty prompt: \'{"prompt": " "}\'',
        ),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b"', 'line 2 of p.jsonl has no "prompt"'),
        ("nothing.txt", None, "cannot read nothing.txt: No such file"),
    ],
)
def test_prompt_files_that_cannot_be_read(name, data, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if data is not None:
        Path(name).write_bytes(data)
    assert main(["evaluate", "--prompts", name, "-o", "out"]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert not Path("out").exists()


def test_prompt_files(tmp_path):
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("\ufeffa fox\n\nein Bär\tspatial\n", encoding="utf-8")
    assert read_prompts(text) == [Prompt(0, "a fox"), Prompt(2, "ein Bär")]
    lines.write_text('{"tag": "colors", "prompt": "a\u2028b"}\n', encoding="utf-8")
    (prompt,) = read_prompts(lines)
    assert (prompt.text, prompt.metadata["tag"]) == ("a\u2028b", "colors")


# ---- metrics ----


def test_interval():
    """Student's t for four degrees of freedom is 2.776 at 97.5 %; samples of a prompt count once."""
    values = np.array([[1.0, 2.0, 3.0, 4.0, 5.0]])
    expected = (3.0, 3 - 2.77645 * 0.5**0.5, 3 + 2.77645 * 0.5**0.5)
    assert report.interval(values) == pytest.approx(expected, rel=1e-5)
    assert report.interval(np.vstack([values - 1, values, values + 1])) == pytest.approx(expected, rel=1e-5)
    holes = np.array([[np.nan, 1.0, 2.0, 3.0, 9.0, 5.0], [np.nan, np.inf, np.nan, np.nan, -1.0, np.nan]])
    assert report.interval(holes) == pytest.approx(expected, rel=1e-5)
    assert report.interval(values[:, :1])[0] == 1.0 and np.isnan(report.interval(values[:, :1])[1:]).all()
    assert np.isnan(report.interval(values * np.nan)).all()


def absent(name):
    raise metadata.PackageNotFoundError(name)


needs_pyiqa = pytest.mark.skipif(find_spec("pyiqa") is None, reason="pyiqa is not installed")
needs_parameters = pytest.mark.skipif(find_spec("iqa") is None, reason="iqa-torch is not installed")


@needs_pyiqa
@needs_parameters
@pytest.mark.parametrize(
    ("name", "matlab", "rel"),
    [("I04", 3.65492152353770, 1e-5), ("I06", 3.23547743716998, 1e-3), ("I08", 3.18403333858339, 3e-3)],
)
def test_niqe_is_its_authors(name, matlab, rel):
    """Against the authors' MATLAB program on three images of TID2013, as pyiqa publishes them beside its own figures.

    pyiqa's own differ from MATLAB's by no more than these tolerances; the parameters are iqa-torch's.
    """
    path = metadata.distribution("pyiqa").locate_file(f"ResultsCalibra/dist_dir/{name}.bmp")
    assert metrics._niqe("cpu")(Path(path), "") == pytest.approx(matlab, rel=rel)


@needs_pyiqa
@needs_parameters
def test_niqe_of_generated_images(workspace, tmp_path, capsys):
    """The report's is the mean of the images', and noise makes it worse."""
    options = arguments(workspace, tmp_path, "--size", 256, "--methods", "stock-4", "--metrics", "niqe")
    assert main(options) == 0
    score = metrics._niqe("cpu")
    clean = [score(path, "") for path in sorted((tmp_path / "stock-4").glob("*.png"))]
    assert re.search(rf"NIQE \(lower is better\) {np.mean(clean):.3f} \(", capsys.readouterr().out)
    for i, path in enumerate(sorted((tmp_path / "stock-4").glob("*.png"))):
        pixels = np.asarray(Image.open(path)) + np.random.default_rng(i).normal(0, 25, (256, 256, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / "noisy.png")
        assert score(tmp_path / "noisy.png", "") > clean[i]


@needs_pyiqa
def test_niqe_without_its_parameters_says_which_file(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    with metrics._torchvision_or_none():
        from pyiqa.utils import download_util
    monkeypatch.setattr(metrics.metadata, "distribution", absent)
    monkeypatch.setattr(download_util, "DEFAULT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(
        MetricUnavailable, match=r"package pyiqa, and niqe_modelparameters\.mat in .*pyiqa.*no route to host"
    ):
        metrics.score("niqe", tmp_path, ["stock-4"], samples_of("a"), generate.processes("cpu"), "cpu")


def brightness(calls):
    def load(device):
        return lambda path, prompt: calls.append(path.name) or float(np.asarray(Image.open(path)).mean())

    return metrics.Metric("Brightness", "higher", "pillow", "nothing", load)


def test_scores_are_kept_and_a_metric_that_cannot_be_had_is_left_out(tmp_path, monkeypatch):
    wanted, state, calls = samples_of("ab", samples=2), generate.processes("cpu"), []
    generate_with(ColourRunner("stock-4"), tmp_path, wanted, 1, state)
    monkeypatch.setitem(metrics.METRICS, "niqe", brightness(calls))

    def load(device):
        raise OSError("no route to host")

    gone = metrics.Metric("CLIP-IQA", "higher", "pillow", "weights.pt in {hub}/clip", load)
    monkeypatch.setitem(metrics.METRICS, "clip-iqa", gone)

    def tabulate(samples):
        calls.clear()
        names = ["clip-iqa", "niqe", "t2i-compbench"]
        return report.tabulate(tmp_path, ["stock-4"], samples, names, state, "cpu")

    table = tabulate(wanted[:2])
    assert table.heads[3:] == ["Brightness (higher is better)"]
    assert table.rows["stock-4"][0] == "2" and table.rows["stock-4"][3].startswith("0.167 (")  # red of 0 and 1
    assert f"weights.pt in {torch.hub.get_dir()}/clip (OSError: no route to host)" in "".join(table.notes)
    assert "t2i-compbench: the images are laid out" in table.notes[-1]
    assert len(calls) == 2
    tabulate(wanted)
    assert sorted(calls) == ["00000-01.png", "00001-01.png"]  # what the other two scored is kept
    tabulate(wanted)
    assert calls == []
    monkeypatch.setattr(metrics.Metric, "version", "pillow, another")
    tabulate(wanted)
    assert len(calls) == 4

    (tmp_path / "scores" / "niqe" / "stock-4.json").unlink()
    (tmp_path / "stock-4" / "00001-00.png").write_bytes(b"no image")
    with pytest.raises(MetricUnavailable, match=r"fails at stock-4/00001-00\.png \(UnidentifiedImageError"):
        metrics.score("niqe", tmp_path, ["stock-4"], wanted, state, "cpu")


def test_scores_of_another_environment_are_reported(tmp_path, monkeypatch):
    """ImageReward's package is called as its README does; where it is absent, the scores that it gave stay."""
    wanted, state = samples_of(["a fox", "a cat"]), generate.processes("cpu")
    generate_with(ColourRunner("stock-4"), tmp_path, wanted, 1, state)
    settings = {"prompts": [[0, "a fox"], [1, "a cat"]], "versions": {"ralu": "0"}}
    folders.check_manifest(tmp_path, {"settings": settings, "methods": {"stock-4": {}}})
    package, seen = ModuleType("ImageReward"), []
    package.load = lambda name, device: SimpleNamespace(
        score=lambda prompt, file: seen.append((prompt, file)) or len(seen)
    )
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    score_folder(tmp_path, ["image-reward"])
    assert seen == [(text, str(tmp_path / "stock-4" / f"0000{i}-00.png")) for i, text in enumerate(["a fox", "a cat"])]

    monkeypatch.delitem(sys.modules, "ImageReward")
    table = report.tabulate(tmp_path, ["stock-4"], wanted, ["image-reward"], state, "cpu")
    assert table.heads[-1] == "ImageReward (higher is better)"
    assert table.rows["stock-4"][-1].startswith("1.500 (")


def test_scoring_elsewhere_needs_no_diffusers(tmp_path):
    code = f"""import runpy, sys
sys.modules["diffusers"] = sys.modules["transformers"] = None
sys.argv = ["ralu.evaluation", {str(tmp_path)!r}, "niqe"]
runpy.run_module("ralu.evaluation", run_name="__main__")"""
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        score_folder(tmp_path, ["niqe"])
    (tmp_path / "manifest.json").write_text('{"settings": {"prompts": [], "versions": {"ralu": "0"}}, "methods": {}}')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- layouts, read as their scorers do ----


def test_geneval_layout(tmp_path):
    wanted = samples_of(["a photo of a bench", "a/b_c"], samples=4, tag="single_object", include=[{"class": "bench"}])
    generate_with(ColourRunner("stock-4"), tmp_path, wanted, 1, process())
    workspace = layouts.geneval(tmp_path, "stock-4", wanted)
    assert layouts.geneval(tmp_path, "stock-4", wanted) == workspace == tmp_path / "geneval" / "stock-4"
    folders = sorted(path for path in workspace.iterdir() if path.is_dir() and path.name.isdigit())
    assert [path.name for path in folders] == ["00000", "00001"]
    for line, folder in enumerate(folders):
        with open(folder / "metadata.jsonl") as file:
            assert json.load(file) == wanted[line].prompt.metadata
        samples = sorted(path.name for path in (folder / "samples").iterdir() if re.match(r"\d+\.png", path.name))
        assert samples == ["0000.png", "0001.png", "0002.png", "0003.png"]
        for sample, name in enumerate(samples):
            source = tmp_path / "stock-4" / f"{line:05d}-{sample:02d}.png"
            assert (folder / "samples" / name).read_bytes() == source.read_bytes()
    with pytest.raises(MetricUnavailable, match=r"evaluation_metadata\.jsonl.*line 1"):
        layouts.geneval(tmp_path, "stock-4", samples_of("ab"))


def test_t2i_compbench_layout(tmp_path):
    texts = ["a green bench and a blue bowl", "one. two: 3 dogs!"]
    wanted = samples_of(texts, samples=3)
    generate_with(ColourRunner("stock-4"), tmp_path, wanted, 1, process())
    layouts.t2i_compbench(tmp_path, "stock-4", wanted[:2])
    workspace = tmp_path / "t2i-compbench" / "stock-4"
    (workspace / "annotation_blip").mkdir()  # a scorer's
    assert layouts.t2i_compbench(tmp_path, "stock-4", wanted) == workspace
    assert (workspace / "annotation_blip").exists()
    files = sorted((workspace / "samples").iterdir(), key=lambda path: int(path.name.split("_")[-1].split(".")[0]))
    assert files[0].name == "a green bench and a blue bowl_000000.png"
    assert [path.name.split("_")[0] for path in files] == texts * 3
    for path, sample in zip(files, wanted, strict=True):
        assert path.read_bytes() == (tmp_path / "stock-4" / sample.file).read_bytes()
    for text in ("a_b", "a/b", "a" * 300):
        with pytest.raises(MetricUnavailable, match="line 2"):
            layouts.t2i_compbench(tmp_path, "stock-4", samples_of(["fine", text]))


# ---- the report ----


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.cells, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag in ("th", "td", "li"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


def test_the_page_stands_alone(tmp_path):
    texts = ["fox", '<script>alert("&amp;")</script>\' onload="x"']
    wanted, state = samples_of(texts), generate.processes("cpu")
    generate_with(ColourRunner("stock-4", "stock-2"), tmp_path, wanted, 1, state)
    table = report.tabulate(tmp_path, ["stock-4", "stock-2"], wanted, ["geneval"], state, "cpu")
    text = report.page("a <model>", tmp_path, table, [sample.prompt for sample in wanted])
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags) and "url(" not in text
    cells = [cell.strip() for cell in page.cells]
    assert set(texts) < set(cells) and text.count("a &lt;model&gt;") == 2
    assert cells[cells.index("stock-2") :][:4] == ["stock-2", "2", "0.500", "2"]
    expected = [f"{method}: {prompt}" for method in ("stock-4", "stock-2") for prompt in texts]
    assert [image["alt"] for image in page.images] == expected
    for image in page.images:
        assert set(image) == {"alt", "src"}
        kind, data = image["src"].split(",")
        assert kind == "data:image/webp;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (192, 192)


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert "examples:\n  ralu evaluate" in text and "None" not in text


# ---- damaged folders ----


def png(**text):
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    Image.new("RGB", (8, 8)).save(data := io.BytesIO(), format="png", pnginfo=info)
    return data.getvalue()


RECORD = json.dumps({"prompt": "fox", "seed": 0, "seconds": 1, "calls": 2, "device": "cpu", "batch": 1, "processes": 1})
IMAGE, SCORES = "stock-2/00000-00.png", "scores/niqe/stock-2.json"


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        (IMAGE, png(ralu=RECORD)[:-20], "it is truncated; delete it"),
        (IMAGE, png(ralu=RECORD)[:40], "delete it"),
        (IMAGE, b"", "delete it"),
        (IMAGE, png(), "it has no record; delete it"),
        (IMAGE, png(ralu="{"), "delete it"),
        (IMAGE, png(ralu="[1]"), "it has no record; delete it"),
        (IMAGE, png(ralu='{"prompt": "fox"}'), "its record lacks batch, calls, device, processes, seconds, seed"),
        ("manifest.json", b'{"settings": {"seed": 0', "line 1 column"),
        ("manifest.json", b"\xff\xfe", "is no manifest of `ralu evaluate`"),
        ("manifest.json", b"[]", "it has not the settings of images"),
        ("manifest.json", b'{"name": "app", "icons": []}', "it has not the settings of images; take another folder"),
        ("manifest.json", b'{"settings": {"versions": {"ralu": "0"}}, "methods": []}', "not the settings of images"),
        (SCORES, b'{"by": "pyiqa 0", "scores": {"00', "line 1 column"),
        (SCORES, b"3", "it has no scores by image; delete it"),
        (SCORES, b'{"by": null, "scores": {"00000-00.png": "good"}}', "it has no scores by image"),
        (SCORES, b'{"by": null}', "it has no scores by image"),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_loaded(file, data, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ralu.runner.Runner", None)
    (tmp_path / "prompts.txt").write_text("fox\npenguin")
    path = tmp_path / "out" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--methods", "stock-2", "-o", str(tmp_path / "out")]
    assert main(["evaluate", *options]) == 2
    printed = capsys.readouterr()
    assert str(path) in printed.err and words in printed.err and printed.err.count("\n") == 1
    assert [file for file in (tmp_path / "out").rglob("*") if file.is_file()] == [path] and path.read_bytes() == data


def test_whole_files_are_taken(tmp_path):
    """The cases above differ from these in what they name alone."""
    for file, data in ((IMAGE, png(ralu=RECORD)), (SCORES, b'{"by": null, "scores": {"00000-00.png": NaN}}')):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_bytes(data)
    assert folders.read_record(tmp_path / IMAGE)["calls"] == 2
    metrics.check_scores(tmp_path, ["stock-2"], ["niqe"])


# ---- methods with options and caches ----


@dataclass(frozen=True)
class Toy:
    families: ClassVar = ("flux",)
    interval: int = 2


def test_cached_and_uncached_images_never_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(caches.CACHES, "toy", Toy)
    names = ["stock-4", "stock-4+toy", "stock-4+toy(interval=3)"]
    wanted = samples_of("ab")
    for first, name in enumerate(names):
        generate_with(ColourRunner(name, seed=first), tmp_path, wanted, 1, process())
    for first, name in enumerate(names):
        for sample in wanted:
            assert Image.open(tmp_path / name / sample.file).getpixel((0, 0)) == colour(first + sample.prompt.line)


def test_the_manifest_says_all_of_a_method(tmp_path, monkeypatch):
    """Also a cache's defaults, so that other ones do not mix."""
    monkeypatch.setitem(caches.CACHES, "toy", Toy)
    pipe = tiny.flux()
    names = "stock-4", "stock-4+toy", "flux-7x(ratio=0.5)", "stock-4(solver=ab2)", "flux-7x(solver=ab2)"
    methods = [Method.parse(text) for text in names]

    def use(method):
        plain = not method.preset and not method.options.given()
        ralu.disable(pipe) if plain else ralu.enable(pipe, replace(method, cache=None))

    runner = SimpleNamespace(pipe=pipe, call_arguments={"height": 64}, seed=3, use=use)
    manifest = folders.describe(runner, methods, [])
    assert list(manifest["methods"]) == [str(method) for method in methods]
    stock, cached, _, *solved = manifest["methods"].values()
    assert [method["scheduler"]["solver"] for method in solved] == ["ab2", "ab2"]
    assert cached == stock | {"cache": {"interval": 2}}
    folders.check_manifest(tmp_path, manifest)
    changed = manifest["methods"] | {"stock-4+toy": stock | {"cache": {"interval": 5}}}
    with pytest.raises(ValueError, match=r'another method stock-4\+toy: .*"interval": 2'):
        folders.check_manifest(tmp_path, manifest | {"methods": changed})
