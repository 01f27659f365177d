"""`ralu evaluate`: prompts painted with several methods into one folder, scored, and reported on one HTML page.

Every file is written beside its place and then renamed, so a folder is whole at any moment: a run that was killed goes
on where it was. `python -m ralu.evaluate FOLDER METRIC ...` scores a folder that is already painted, in an environment
that needs no diffusers: for a package that does not get along with this one's requirements.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import scipy.io
import scipy.stats
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from . import __version__

SAMPLE = 1_000_000  # between the seeds of a prompt's samples, so that those of neighbouring lines never meet
SHOWN = 12  # prompts in the report's grid


@dataclass(frozen=True)
class Prompt:
    """A line of a prompt file. line: its number, from 0; metadata: the whole object of a line of JSON."""

    line: int
    text: str
    metadata: dict = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Picture:
    """One of a prompt's samples."""

    prompt: Prompt
    sample: int

    @property
    def name(self) -> str:
        return f"{self.prompt.line:05d}-{self.sample:02d}.png"

    def seed(self, first: int) -> int:
        """It depends on the line and the sample alone: not on the other prompts, the batch or the process."""
        return first + self.prompt.line + SAMPLE * self.sample


def read_prompts(path: Path) -> list[Prompt]:
    """Of a text file, a prompt a line up to a tab, or of a .jsonl file with a "prompt" in every line's object.

    Blank lines are left out but counted. Raises ValueError for a file without prompts or with a line that is none.
    """
    prompts = []
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file):
            if not text.strip():
                continue
            entry = {"prompt": text.split("\t")[0].strip()}
            if path.suffix == ".jsonl":
                try:
                    entry = json.loads(text)
                    str.strip(entry["prompt"])
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(f'--prompts: line {line + 1} of {path} has no "prompt": {text.strip()}') from error
            prompts.append(Prompt(line, entry["prompt"], entry))
    if not prompts:
        raise ValueError(f"--prompts: {path} has no prompt")
    return prompts


def processes(device: str) -> PartialState:
    """The processes that `accelerate launch` started, or this one. device: "auto", or "cpu" to leave GPUs alone."""
    cpu = device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(weeks=1))  # for one process may be done hours before another
    if state.num_processes > 1 and device not in ("auto", "cpu"):
        raise ValueError(f"--device: {state.num_processes} processes take a device each, leave {device} out")
    return state


# ---- the folder ----


def write_text(path: Path, text: str):
    """All of a text file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _save(image: Image.Image, path: Path, record: dict):
    """As PNG, with a record of how it was made inside: no second file that could get lost."""
    info = PngInfo()
    info.add_text("ralu", json.dumps(record))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    image.save(part, format="png", pnginfo=info)
    os.replace(part, path)


def record(path: Path) -> dict:
    """How a picture was made: prompt, seed, seconds (its share of the batch's), calls, device, batch and processes."""
    with Image.open(path) as image:
        return json.loads(image.text["ralu"])


def settle(folder: Path, wanted: dict, write: bool = True):
    """Hold a folder to one setting.

    wanted: what the pictures depend on, by names that an error can show; what the folder's manifest has besides stays.
    write:  whether to record it; one of several processes is enough.

    Raises ValueError if the folder's pictures were painted with anything else.
    """
    file = folder / "manifest.json"
    wanted = json.loads(json.dumps(wanted, default=str))
    held = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for key in wanted:
        if held.get(key, wanted[key]) != wanted[key]:
            was, now = (textwrap.shorten(json.dumps(x[key]), 80, placeholder=" …") for x in (held, wanted))
            raise ValueError(f"--output: {folder} has pictures of another {key}: {was}, now {now}; take another folder")
    if write and not wanted.items() <= held.items():
        write_text(file, json.dumps(held | wanted, indent=1))


def setting(painter, prompts: list[Prompt]) -> dict:
    """Everything that the pictures of `painter`'s methods depend on, for `settle`. Leaves the last method in use."""
    pipe = painter.pipe
    versions = {"ralu": __version__} | {name: metadata.version(name) for name in ("diffusers", "transformers", "torch")}
    found = painter.call | {
        "dtype": str(pipe.dtype), "seed": painter.seed, "prompts": [[prompt.line, prompt.text] for prompt in prompts],
        "versions": versions, "model": _digest(pipe),
    }  # fmt: skip
    for method in painter.methods:
        painter.use(method)
        config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
        schedule = asdict(pipe.scheduler.schedule) if method.preset else {"steps": method.steps}
        found[f"method {method.name}"] = schedule | {"scheduler": config}
    return found


def _digest(pipe) -> str:
    """Of a pipeline's configurations and the first values of every weight."""
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, torch.nn.Module):
            own = part.config if isinstance(part.config, dict) else part.config.to_dict()
            own = {key: value for key, value in own.items() if not key.startswith("_")}
            digest.update(json.dumps([name, own], sort_keys=True, default=str).encode())
            for key, weight in part.state_dict().items():
                digest.update(f"{key} {tuple(weight.shape)} {weight.dtype}".encode())
                digest.update(weight.flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def paint(painter, folder: Path, pictures: list[Picture], batch: int, state: PartialState):
    """Paint what the folder lacks, FOLDER/METHOD/LINE-SAMPLE.png, together with the other processes.

    A batch is always made of the same pictures, and painted again as a whole if one of them is missing, so they are
    the same, bit for bit, however often a run was interrupted.
    """
    batches = [pictures[i : i + batch] for i in range(0, len(pictures), batch)]
    rooms = {method: folder / method.name for method in painter.methods}
    lacking = {method: [part for part in batches if _there(room, part) < len(part)] for method, room in rooms.items()}
    state.wait_for_everyone()  # nobody paints before everybody has looked
    device = painter.pipe.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    where = {"device": name, "batch": batch, "processes": state.num_processes}
    for method, room in rooms.items():
        mine = lacking[method][state.process_index :: state.num_processes]
        if mine:
            painter.warm_up(method, [picture.prompt.text for picture in mine[0]])
        painter.use(method)
        with tqdm(total=len(pictures), desc=method.name, disable=not state.is_main_process, dynamic_ncols=True) as bar:
            bar.update(_there(room, pictures))
            for part in mine:
                texts, seeds = [picture.prompt.text for picture in part], [p.seed(painter.seed) for p in part]
                painting = painter.paint(method, texts, method.name, seeds=seeds, disable=True)
                made = {"seconds": painting.seconds / len(part), "calls": painting.calls} | where
                for picture, text, seed, image in zip(part, texts, seeds, painting.images, strict=True):
                    if not _there(room, [picture]):
                        _save(image, room / picture.name, {"prompt": text, "seed": seed} | made)
                bar.update(_there(room, pictures) - bar.n)  # the other processes' too
            state.wait_for_everyone()
            bar.update(_there(room, pictures) - bar.n)


def _there(room: Path, pictures: list[Picture]) -> int:
    """How many of the pictures a folder has."""
    return sum((room / picture.name).exists() for picture in pictures)


# ---- metrics ----


@dataclass(frozen=True)
class Metric:
    """A score of single pictures.

    package: whose it is, by the name pip knows.
    needs:   the files it must have, and where they are looked for.
    load:    `(device) -> ((path, prompt) -> score)`.
    """

    title: str
    better: str
    package: str
    needs: str
    load: Callable[[str], Callable[[Path, str], float]]

    @property
    def version(self) -> str | None:
        try:
            return f"{self.package} {metadata.version(self.package)}"
        except metadata.PackageNotFoundError:
            return None


@contextmanager
def _torchvision_or_none() -> Iterator[None]:
    """pyiqa imports torchvision, which NIQE does not use, and whose builds on PyPI do not load beside a CPU torch."""
    names = ["torchvision", "torchvision.utils", "torchvision.transforms", "torchvision.transforms.functional"]
    absent = [] if find_spec("torchvision") else [ModuleType(name) for name in names]
    try:
        for module in absent:
            module.make_grid = None
            sys.modules[module.__name__] = module
        yield
    finally:
        for module in absent:
            del sys.modules[module.__name__]


def _pyiqa(name: str, device: str, **options) -> Callable[[Path, str], float]:
    with _torchvision_or_none():
        import pyiqa

        metric = pyiqa.create_metric(name, device=torch.device(device), **options)

    def score(path: Path, prompt: str) -> float:
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
        return float(metric(pixels.permute(2, 0, 1)[None].float() / 255))

    return score


def _niqe(device: str) -> Callable[[Path, str], float]:
    """With the parameters that iqa-torch carries, the official ones; without it pyiqa downloads the same."""
    try:
        file = metadata.distribution("iqa-torch").locate_file("iqa/niqe/niqe_pris_params.npz")
    except metadata.PackageNotFoundError:
        return _pyiqa("niqe", device)
    given, matlab = np.load(file), io.BytesIO()
    scipy.io.savemat(matlab, {f"{key}_prisparam": given[f"{key}_pris_param"] for key in ("mu", "cov")})
    return _pyiqa("niqe", device, pretrained_model_path=matlab)


def _clip_iqa(device: str) -> Callable[[Path, str], float]:
    return _pyiqa("clipiqa", device)


def _image_reward(device: str) -> Callable[[Path, str], float]:
    import ImageReward

    model = ImageReward.load("ImageReward-v1.0", device=device)
    return lambda path, prompt: model.score(prompt, str(path))


METRICS = {
    "niqe": Metric("NIQE", "lower", "pyiqa", "niqe_modelparameters.mat in {hub}/pyiqa or the package iqa-torch", _niqe),
    "clip-iqa": Metric("CLIP-IQA", "higher", "pyiqa", "RN50.pt in {hub}/clip", _clip_iqa),
    "image-reward": Metric(
        "ImageReward", "higher", "image-reward",
        "ImageReward.pt and med_config.json in ~/.cache/ImageReward, and bert-base-uncased's tokenizer; if it cannot "
        "be loaded beside transformers 5, `python -m ralu.evaluate FOLDER image-reward` scores in another environment",
        _image_reward,
    ),
}  # fmt: skip


class Missing(Exception):
    """Why a metric is left out."""


def score(
    name: str, folder: Path, methods: list[str], pictures: list[Picture], state: PartialState, device: str
) -> dict:
    """Scores of each method's pictures, {method: (P,) float64}, NaN where the metric has none.

    They are kept in FOLDER/scores/METRIC/METHOD.json with the version of the package they are from; what is lacking is
    computed by all processes together. Raises `Missing`, which names the files needed, if the metric cannot be had.
    """
    metric, found, scorer = METRICS[name], {}, None
    for method in methods:
        file = folder / "scores" / name / f"{method}.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"by": None, "scores": {}}
        known = kept["scores"] if metric.version in (None, kept["by"]) else {}
        if todo := [picture for picture in pictures if picture.name not in known]:
            with state.local_main_process_first():  # it may download
                scorer = scorer or _loaded(metric, device)
            mine, why = {}, scorer if isinstance(scorer, str) else ""
            share = [] if why else todo[state.process_index :: state.num_processes]
            try:
                for picture in tqdm(share, f"{name}, {method}", disable=not state.is_main_process, dynamic_ncols=True):
                    mine[picture.name] = scorer(folder / method / picture.name, picture.prompt.text)
            except Exception as error:  # a package has errors of its own, and the other processes wait for this one
                why = f"it fails at {method}/{picture.name} ({_short(error)})"
            parts = gather_object([(mine, why)])
            if why := next((why for _, why in parts if why), ""):
                raise Missing(why)
            for part, _ in parts:
                known |= part
            if state.is_main_process:
                write_text(file, json.dumps({"by": metric.version, "scores": dict(sorted(known.items()))}, indent=1))
        found[method] = np.array([known[picture.name] for picture in pictures])
    return found


def _loaded(metric: Metric, device: str) -> Callable[[Path, str], float] | str:
    """Its scorer, or why there is none."""
    try:
        return metric.load(device)
    except Exception as error:  # packages, downloads and file formats have errors of their own
        needs = metric.needs.format(hub=torch.hub.get_dir())
        return f"it needs the package {metric.package}, and {needs} ({_short(error)})"


def _short(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and the ends of Student's 95 % interval, over prompts. values: (samples, prompts), NaN where there is none.

    A prompt's samples are averaged first: they are alike, and would make the interval too narrow.
    """
    kept = values[:, np.isfinite(values).any(axis=0)]
    if not kept.size:
        return (math.nan,) * 3
    means = np.nanmean(np.where(np.isfinite(kept), kept, math.nan), axis=0)
    if len(means) < 2 or not means.std():
        return means.mean(), math.nan, math.nan
    return means.mean(), *scipy.stats.t.interval(0.95, len(means) - 1, means.mean(), scipy.stats.sem(means))


# ---- other people's layouts ----


def geneval(folder: Path, method: str, pictures: list[Picture]) -> Path:
    """FOLDER/geneval/METHOD as evaluation/evaluate_images.py of github.com/djghosh13/geneval takes it."""
    room = folder / "geneval" / method
    for prompt in dict.fromkeys(picture.prompt for picture in pictures):
        if not {"tag", "include"} <= prompt.metadata.keys():
            raise Missing(
                f'it needs its own evaluation_metadata.jsonl as --prompts; line {prompt.line + 1} has no "tag"'
            )
        own = room / f"{prompt.line:05d}"
        write_text(own / "metadata.jsonl", json.dumps(prompt.metadata))
        shutil.rmtree(own / "samples", ignore_errors=True)
    for picture in pictures:
        own = room / f"{picture.prompt.line:05d}"
        _link(folder / method / picture.name, own / "samples" / f"{picture.sample:04d}.png")
    return room


def t2i_compbench(folder: Path, method: str, pictures: list[Picture]) -> Path:
    """FOLDER/t2i-compbench/METHOD as the scorers of github.com/Karine-Huang/T2I-CompBench take it.

    They read a prompt from its file's name, up to the first underscore, and order files by the number at the end.
    """
    room = folder / "t2i-compbench" / method
    for prompt in dict.fromkeys(picture.prompt for picture in pictures):
        if {"/", "_", "\0"} & set(prompt.text) or len(prompt.text.encode()) > 240:
            raise Missing(f"its scorers read prompts from files' names, and line {prompt.line + 1} cannot be in one")
    shutil.rmtree(room / "samples", ignore_errors=True)
    for number, picture in enumerate(pictures):
        _link(folder / method / picture.name, room / "samples" / f"{picture.prompt.text}_{number:06d}.png")
    return room


def _link(source: Path, target: Path):
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:  # a file system that has none
        shutil.copyfile(source, target)


LAYOUTS = {"geneval": geneval, "t2i-compbench": t2i_compbench}


# ---- the report ----


@dataclass
class Table:
    """What the report says of each method, a row a method: cells under heads, and notes below."""

    heads: list[str]
    rows: dict[str, list[str]]
    notes: list[str]


def tabulate(
    folder: Path, methods: list[str], pictures: list[Picture], metrics: list[str], state: PartialState, device: str
) -> Table:
    """Score with all metrics, write all layouts, and put the results in a table; all processes must call it."""
    prompts = len({picture.prompt for picture in pictures})
    made = {method: [record(folder / method / picture.name) for picture in pictures] for method in methods}
    table = Table(["pictures", "seconds a picture", "transformer calls"], {}, [])
    for method, records in made.items():
        seconds = np.array([entry["seconds"] for entry in records])
        calls = sorted({entry["calls"] for entry in records})
        table.rows[method] = [str(len(records)), _cell(seconds.reshape(-1, prompts)), ", ".join(map(str, calls))]
    runs = sorted(
        {(entry["device"], entry["batch"], entry["processes"]) for entries in made.values() for entry in entries}
    )
    where = "; ".join(f"{device}, batch {batch}, processes {count}" for device, batch, count in runs)
    table.notes = [
        "Means over prompts with Student's 95 % interval. All methods have the same prompts and seeds.",
        f"Seconds are the pipeline's alone, after a warm-up, a batch's shared out among its pictures: {where}.",
    ]
    if len(runs) > 1:
        table.notes.append("These are of several devices, batches or numbers of processes: do not compare the seconds.")
    for name in metrics:
        try:
            if name in METRICS:
                metric, scores = METRICS[name], score(name, folder, methods, pictures, state, device)
                table.heads.append(f"{metric.title} ({metric.better} is better)")
                for method, values in scores.items():
                    table.rows[method].append(_cell(values.reshape(-1, prompts)))
                    if lacking := int((~np.isfinite(values)).sum()):
                        table.notes.append(f"{metric.title} has no value for {lacking} pictures of {method}.")
            elif state.is_main_process:
                places = [str(LAYOUTS[name](folder, method, pictures)) for method in methods]
                table.notes.append(f"{name}: the pictures are laid out for its own scorer in {', '.join(places)}.")
        except Missing as why:
            table.notes.append(f"{name} is left out: {why}.")
    return table


def _cell(values: np.ndarray) -> str:
    mean, low, high = interval(values)
    if math.isnan(mean):
        return "none"
    return f"{mean:.3f}" if math.isnan(low) else f"{mean:.3f} ({low:.3f} to {high:.3f})"


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; margin: 2rem; }
p, li { max-width: 60rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }
.numbers th, .numbers td { border-bottom: 1px solid #d8dee4; font-variant-numeric: tabular-nums; }
.pictures th { max-width: 192px; font-weight: normal; overflow-wrap: anywhere; }
img { display: block; width: 192px; border: 1px solid #d8dee4; }
"""


def page(title: str, folder: Path, table: Table, prompts: list[Prompt]) -> str:
    """The report: one HTML page that needs no other file. Shows the first prompts' first samples."""
    from .figures import fitted

    def row(tag: str, head: str, cells: Iterable[str]) -> str:
        return f"<tr><th>{html.escape(head)}</th>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    def picture(method: str, prompt: Prompt) -> str:
        with Image.open(folder / method / Picture(prompt, 0).name) as image:
            fitted(image.convert("RGB")).save(data := io.BytesIO(), format="webp", quality=90)
        source = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
        return f'<img alt="{html.escape(f"{method}: {prompt.text}")}" src="{source}">'

    shown, heading = prompts[:SHOWN], html.escape(title)
    numbers = [row("th", "method", map(html.escape, table.heads))]
    numbers += [row("td", method, map(html.escape, cells)) for method, cells in table.rows.items()]
    pictures = [row("th", "", (html.escape(prompt.text) for prompt in shown))]
    pictures += [row("td", method, (picture(method, prompt) for prompt in shown)) for method in table.rows]
    return "\n".join([
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{heading}</title><style>{STYLE}</style></head><body><h1>{heading}</h1>",
        '<table class="numbers">', *numbers, "</table>",
        "<ul>", *(f"<li>{html.escape(note)}</li>" for note in table.notes), "</ul>",
        f"<h2>{len(shown)} of {len(prompts)} prompts</h2>",
        '<table class="pictures">', *pictures, "</table></body></html>", "",
    ])  # fmt: skip


def main(folder: Path, metrics: list[str]):
    """Score the pictures that a folder has; the next `ralu evaluate` reports them."""
    held = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    texts, state = dict(held["prompts"]), processes("auto")
    for method in [key.removeprefix("method ") for key in held if key.startswith("method ")]:
        places = [map(int, path.stem.split("-")) for path in sorted((folder / method).glob("*.png"))]
        pictures = [Picture(Prompt(line, texts[line]), sample) for line, sample in places]
        for name in metrics:
            score(name, folder, [method], pictures, state, str(state.device))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m ralu.evaluate", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("metrics", nargs="+", choices=METRICS)
    try:
        main(**vars(parser.parse_args()))
    except Missing as why:
        sys.exit(str(why))
