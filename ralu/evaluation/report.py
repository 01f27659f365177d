"""The report of an evaluation: a table of scores with intervals, and one HTML page that needs no other file."""

import base64
import html
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.stats
from PIL import Image

from ..errors import usage
from .folder import read_record
from .layouts import LAYOUTS
from .metrics import METRICS, MetricUnavailable, score
from .prompts import Prompt, Sample

if TYPE_CHECKING:
    from accelerate import PartialState

SHOWN = 12  # prompts in the report's grid


@dataclass
class Table:
    """The report's table: a row for each method, with cells under heads, and notes below."""

    heads: list[str]
    rows: dict[str, list[str]]
    notes: list[str]


def tabulate(
    folder: Path, methods: list[str], samples: list[Sample], metrics: list[str], state: "PartialState", device: str
) -> Table:
    """Score with all metrics, write all layouts, and put the results in a table; all processes must call it.

    Raises UsageError for a damaged image or file of scores.
    """
    prompts = len({sample.prompt for sample in samples})
    made = {method: [read_record(folder / method / sample.file) for sample in samples] for method in methods}
    table = Table(["images", "seconds an image", "transformer calls"], {}, [])
    for method, records in made.items():
        seconds = np.array([entry["seconds"] for entry in records])
        calls = sorted({entry["calls"] for entry in records})
        table.rows[method] = [str(len(records)), _cell(seconds.reshape(-1, prompts)), ", ".join(map(str, calls))]
    runs = sorted(
        {(entry["device"], entry["batch"], entry["processes"]) for entries in made.values() for entry in entries}
    )
    places = "; ".join(f"{device}, batch {batch}, processes {count}" for device, batch, count in runs)
    table.notes = [
        "Means over prompts with Student's 95 % interval. All methods have the same prompts and seeds.",
        f"Seconds are the pipeline's alone, after a warm-up, a batch's shared out among its images: {places}.",
    ]
    if len(runs) > 1:
        table.notes.append("These are of several devices, batches or numbers of processes: do not compare the seconds.")
    for name in metrics:
        try:
            if name in METRICS:
                metric, scores = METRICS[name], score(name, folder, methods, samples, state, device)
                table.heads.append(f"{metric.title} ({metric.better} is better)")
                for method, values in scores.items():
                    table.rows[method].append(_cell(values.reshape(-1, prompts)))
                    if lacking := int((~np.isfinite(values)).sum()):
                        table.notes.append(f"{metric.title} has no value for {lacking} images of {method}.")
            elif state.is_main_process:
                layouts = [str(LAYOUTS[name](folder, method, samples)) for method in methods]
                table.notes.append(f"{name}: the images are laid out for its own scorer in {', '.join(layouts)}.")
        except MetricUnavailable as why:  # noqa: PERF203  the other metrics go on
            table.notes.append(f"{name} is left out: {why}.")
    return table


def _cell(values: np.ndarray) -> str:
    mean, low, high = interval(values)
    if math.isnan(mean):
        return "none"
    return f"{mean:.3f}" if math.isnan(low) else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean and the ends of Student's 95 % interval, over prompts.

    values: (samples, prompts), NaN where there is none.

    A prompt's samples are averaged first: they are alike, and would make the interval too narrow.
    """
    kept = values[:, np.isfinite(values).any(axis=0)]
    if not kept.size:
        return (math.nan,) * 3
    means = np.nanmean(np.where(np.isfinite(kept), kept, math.nan), axis=0)
    if len(means) < 2 or not means.std():
        return means.mean(), math.nan, math.nan
    return means.mean(), *scipy.stats.t.interval(0.95, len(means) - 1, means.mean(), scipy.stats.sem(means))


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; margin: 2rem; }
p, li { max-width: 60rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }
.numbers th, .numbers td { border-bottom: 1px solid #d8dee4; font-variant-numeric: tabular-nums; }
.images th { max-width: 192px; font-weight: normal; overflow-wrap: anywhere; }
img { display: block; width: 192px; border: 1px solid #d8dee4; }
"""


def page(title: str, folder: Path, table: Table, prompts: list[Prompt]) -> str:
    """Return the report, one HTML page that needs no other file. It shows the first prompts' first samples."""
    from ..figures import fitted

    def row(tag: str, head: str, cells: Iterable[str]) -> str:
        return f"<tr><th>{html.escape(head)}</th>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    def image(method: str, prompt: Prompt) -> str:
        path = folder / method / Sample(prompt, 0).file
        with usage(str(path), OSError), Image.open(path) as stored:
            fitted(stored.convert("RGB")).save(data := io.BytesIO(), format="webp", quality=90)
        source = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
        return f'<img alt="{html.escape(f"{method}: {prompt.text}")}" src="{source}">'

    shown, heading = prompts[:SHOWN], html.escape(title)
    numbers = [row("th", "method", map(html.escape, table.heads))]
    numbers += [row("td", method, map(html.escape, cells)) for method, cells in table.rows.items()]
    images = [row("th", "", (html.escape(prompt.text) for prompt in shown))]
    images += [row("td", method, (image(method, prompt) for prompt in shown)) for method in table.rows]
    return "\n".join([
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{heading}</title><style>{STYLE}</style></head><body><h1>{heading}</h1>",
        '<table class="numbers">', *numbers, "</table>",
        "<ul>", *(f"<li>{html.escape(note)}</li>" for note in table.notes), "</ul>",
        f"<h2>{len(shown)} of {len(prompts)} prompts</h2>",
        '<table class="images">', *images, "</table></body></html>", "",
    ])  # fmt: skip
