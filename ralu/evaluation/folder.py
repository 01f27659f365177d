"""The folder of an evaluation: FOLDER/METHOD/LINE-SAMPLE.png, each with a record of its making, and a manifest."""

import hashlib
import json
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, usage
from .prompts import Prompt, Sample

if TYPE_CHECKING:
    from PIL import Image

    from ..runner import Runner

RECORD = {"prompt", "seed", "seconds", "calls", "device", "batch", "processes"}
_PNG_END = b"IEND\xaeB`\x82"


def write_text(path: Path, text: str):
    """Write all of a text file or nothing. Raises UsageError where the disk refuses."""
    with _whole(path) as part:
        part.write_text(text, encoding="utf-8")


def save_image(image: "Image.Image", path: Path, record: dict):
    """Save all of an image as PNG or nothing, with a record of how it was made inside, which so cannot get lost.

    Raises UsageError where the disk refuses.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("ralu", json.dumps(record))
    with _whole(path) as part:
        image.save(part, format="png", pnginfo=info)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yield a file beside `path`, which it becomes at the end."""
    part = path.with_name(f"{path.name}.part")
    with usage("--output", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)


def read_record(path: Path) -> dict:
    """Return how an image was made: prompt, seed, seconds (its share of the batch's), calls, device, batch, processes.

    Raises UsageError for a file that is truncated or was not written by `save_image`.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            record = json.loads(image.info["ralu"])
        with path.open("rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            if file.read() != _PNG_END:
                raise ValueError("it is truncated")
        if lacking := RECORD - record.keys():
            raise ValueError(f"its record lacks {', '.join(sorted(lacking))}")
    except (OSError, KeyError, ValueError, AttributeError, SyntaxError) as error:
        why = "it has no record" if isinstance(error, KeyError | AttributeError) else error
        raise UsageError(f"{path} is no image of `ralu evaluate`: {why}; delete it to have it made again") from error
    return record


def present(folder: Path, samples: list[Sample]) -> int:
    """Count the samples whose images a method's folder has."""
    return sum((folder / sample.file).exists() for sample in samples)


def read_manifest(folder: Path) -> dict:
    """Return the settings of a folder's images, {} for a new folder.

    Raises UsageError for a manifest that is truncated or another program's.
    """
    file = folder / "manifest.json"
    if not file.exists():
        return {}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if not ({"settings", "methods"} <= manifest.keys() and "ralu" in manifest["settings"]["versions"]):
            raise KeyError("settings")
        dict.keys(manifest["methods"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = error if isinstance(error, OSError | ValueError) else "it has not the settings of images"
        raise UsageError(f"--output: {file} is no manifest of `ralu evaluate`: {why}; take another folder") from error
    return manifest


def check_manifest(folder: Path, manifest: dict, write: bool = True):
    """Hold a folder to one manifest.

    manifest: {"settings": ..., "methods": {name: ...}}, all that the images depend on, by names that an error can show;
              methods that the folder's own manifest has besides stay.
    write:    whether to record it; one of several processes is enough.

    Raises UsageError if the folder's images were made with anything else.
    """
    manifest = json.loads(json.dumps(manifest, default=str))
    held = read_manifest(folder)
    for kind, prefix in (("settings", ""), ("methods", "method ")):
        for key, value in manifest[kind].items():
            before = held.get(kind, {}).get(key, value)
            if before != value:
                if isinstance(before, dict) and isinstance(value, dict):  # of these only what differs is told
                    differing = [name for name in before | value if before.get(name) != value.get(name)]
                    before, value = ({name: x.get(name) for name in differing} for x in (before, value))
                was, now = (textwrap.shorten(json.dumps(x), 80, placeholder=" …") for x in (before, value))
                raise UsageError(
                    f"--output: {folder} has images of another {prefix}{key}: {was}, now {now}; take another folder"
                )
    merged = {kind: held.get(kind, {}) | manifest[kind] for kind in ("settings", "methods")}
    if write and merged != held:
        write_text(folder / "manifest.json", json.dumps(merged, indent=1))


def describe(runner: "Runner", methods: list, prompts: list[Prompt]) -> dict:
    """Return the manifest of everything that the images depend on. Leaves the last method in use."""
    from .. import __version__

    pipe = runner.pipe
    versions = {"ralu": __version__} | {name: metadata.version(name) for name in ("diffusers", "transformers", "torch")}
    settings = runner.call_arguments | {
        "dtype": str(pipe.dtype), "seed": runner.seed, "prompts": [[prompt.line, prompt.text] for prompt in prompts],
        "versions": versions, "model": _digest(pipe),
    }  # fmt: skip
    described = {}
    for method in methods:
        runner.use(method)
        config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
        schedule = pipe.scheduler.schedule.to_dict() if method.preset else {"steps": method.steps}
        cache = {} if method.cache is None else {"cache": asdict(method.cache)}
        described[str(method)] = schedule | {"scheduler": config} | cache
    return {"settings": settings, "methods": described}


def _digest(pipe) -> str:
    """Hash a pipeline's configurations and the first values of every weight."""
    import torch

    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, torch.nn.Module):
            config: Any = part.config
            config = config if isinstance(config, dict) else config.to_dict()
            config = {key: value for key, value in config.items() if not key.startswith("_")}
            digest.update(json.dumps([name, config], sort_keys=True, default=str).encode())
            for key, weight in part.state_dict().items():
                digest.update(f"{key} {tuple(weight.shape)} {weight.dtype}".encode())
                digest.update(weight.flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()
