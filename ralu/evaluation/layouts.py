"""Images laid out as other people's scorers expect them."""

import json
import shutil
from pathlib import Path

from .folder import write_text
from .metrics import MetricUnavailable
from .prompts import Sample


def geneval(folder: Path, method: str, samples: list[Sample]) -> Path:
    """Lay out FOLDER/geneval/METHOD as evaluation/evaluate_images.py of github.com/djghosh13/geneval takes it.

    Raises MetricUnavailable for prompts that are not of its own file.
    """
    target = folder / "geneval" / method
    for prompt in dict.fromkeys(sample.prompt for sample in samples):
        if not {"tag", "include"} <= prompt.metadata.keys():
            raise MetricUnavailable(
                f'it needs its own evaluation_metadata.jsonl as --prompts; line {prompt.line + 1} has no "tag"'
            )
        images = target / f"{prompt.line:05d}"
        write_text(images / "metadata.jsonl", json.dumps(prompt.metadata))
        shutil.rmtree(images / "samples", ignore_errors=True)
    for sample in samples:
        images = target / f"{sample.prompt.line:05d}"
        _link(folder / method / sample.file, images / "samples" / f"{sample.number:04d}.png")
    return target


def t2i_compbench(folder: Path, method: str, samples: list[Sample]) -> Path:
    """Lay out FOLDER/t2i-compbench/METHOD as the scorers of github.com/Karine-Huang/T2I-CompBench take it.

    They read a prompt from its file's name, up to the first underscore, and order files by the number at the end.
    Raises MetricUnavailable for prompts that no file's name can hold.
    """
    target = folder / "t2i-compbench" / method
    for prompt in dict.fromkeys(sample.prompt for sample in samples):
        if {"/", "_", "\0"} & set(prompt.text) or len(prompt.text.encode()) > 240:
            raise MetricUnavailable(
                f"its scorers read prompts from files' names, and line {prompt.line + 1} cannot be in one"
            )
    shutil.rmtree(target / "samples", ignore_errors=True)
    for number, sample in enumerate(samples):
        _link(folder / method / sample.file, target / "samples" / f"{sample.prompt.text}_{number:06d}.png")
    return target


def _link(source: Path, target: Path):
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:  # a file system that has none
        shutil.copyfile(source, target)


LAYOUTS = {"geneval": geneval, "t2i-compbench": t2i_compbench}
