"""Pack an embedded model into the repository: `ralu.mini.unpack` says how it is packed.

    python -m ralu.mini.pack mini-flux FOLDER

FOLDER is a pipeline saved by `save_pretrained`, or its transformer alone, which then replaces the packed model's. Of
mini-schnell it is what `ralu.mini.distill` saves, a LoRA of mini-flux: its other parts are then mini-flux's as packed.
When mini-flux changes, mini-schnell keeps what its LoRA was made for, until it is packed again too.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from . import NAMES
from .unpack import LORA, SCALE, SHARED, TRANSFORMER, WEIGHTS, dtype_of, int8, packed

SMALL = 4096  # elements; smaller weights are not rounded
BASE, DISTILLED = "mini-flux", "mini-schnell"


def rounded(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Replace a file's large weights by int8 and scales, and give the others a dtype."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.ndim > 1 and tensor.numel() >= SMALL:
            found[name], found[name + SCALE] = int8(tensor)
        else:
            found[name] = tensor.to(dtype)
    return found


def read(folder: Path, part: str = "") -> dict[str, bytes]:
    """Pack the files of a pipeline's folder, or of one of its parts. Raises ValueError where weights are missing."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        place = f"{part}{file.relative_to(folder).as_posix()}"
        kind, _, name = place.partition("/")
        if name.endswith(".safetensors"):
            tensors, dtype = load(file.read_bytes()), dtype_of(place)
            if kind == "vae":
                tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
            else:
                tensors = rounded(tensors, dtype)
            found[place] = save(tensors, {"format": "pt"})
        elif name in ("config.json", "scheduler_config.json") or place == "model_index.json":
            config = json.loads(file.read_text())
            config.pop("_name_or_path", None)  # a folder of whoever saved it
            if config.get("_class_name") == "AutoencoderTiny":
                config.pop("block_out_channels", None)  # its constructor adds it, and warns of it when it is given
            found[place] = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
        elif kind.startswith("tokenizer"):
            found[place] = file.read_bytes()
    for kind in {place.partition("/")[0] for place in found if place.endswith("/config.json")}:
        if not any(place.startswith(f"{kind}/") and place.endswith("model.safetensors") for place in found):
            raise ValueError(f"{folder}: {kind} has no whole file of weights, model.safetensors")
    return found


def read_lora(folder: Path, transformer: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Pack a LoRA of a packed transformer, and the scheduler beside it. Raises ValueError for another model's."""
    lora = {name: tensor.half() for name, tensor in load((folder / LORA).read_bytes()).items()}
    weights = {f"transformer.{name.removesuffix('.weight')}" for name in transformer}
    for name in lora:
        module, _, factor = name.rpartition(".lora_")
        if module not in weights or factor not in ("A.weight", "B.weight"):
            raise ValueError(f"{folder / LORA}: {name} is no factor of a weight of {BASE}'s transformer")
    return read(folder / "scheduler", "scheduler/") | {LORA: save(lora, {"format": "pt"})}


def pack(name: str, source: Path) -> None:
    """Pack a model as the command does, and all others anew, so that what is alike is there once.

    Raises ValueError for a source that is none of what the command takes.
    """
    models = {}
    for known in NAMES:
        if (WEIGHTS / known).is_dir():
            models[known] = {place: file.read_bytes() for place, file in packed(known).items()}
    if (source / "model_index.json").is_file():
        models[name] = read(source)
    elif (source / "config.json").is_file() and name in models:
        kept = {p: data for p, data in models[name].items() if not p.startswith("transformer/") and p != LORA}
        models[name] = kept | read(source, "transformer/")
    elif (source / LORA).is_file() and (source / "scheduler").is_dir() and name == DISTILLED and BASE in models:
        models[name] = models[BASE] | read_lora(source, load(models[BASE][TRANSFORMER]))
    else:
        kinds = f"a pipeline, a transformer or, for {DISTILLED}, a LoRA and its scheduler"
        raise ValueError(f"source must be the folder of {kinds}, got {source}")
    write(models)


def write(models: dict[str, dict[str, bytes]]) -> None:
    """Write packed models, {name: {place: content}}, and of equal files the first alone."""
    owners: dict[bytes, str] = {}
    for name in sorted(models, key=NAMES.index):
        shutil.rmtree(WEIGHTS / name, ignore_errors=True)
        shared = {}
        for place, data in sorted(models[name].items()):
            owner = owners.setdefault(data, f"{name}/{place}")
            if owner != f"{name}/{place}":
                shared[place] = owner
                continue
            target = WEIGHTS / name / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        (WEIGHTS / name / SHARED).write_text(json.dumps(shared, indent=1) + "\n")


def main():
    """Pack a model and print what each weighs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("source", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    try:
        pack(args.name, args.source)
    except ValueError as error:
        parser.error(str(error))
    for name in NAMES:
        size = sum(file.stat().st_size for file in (WEIGHTS / name).rglob("*") if file.is_file())
        print(f"{name}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
