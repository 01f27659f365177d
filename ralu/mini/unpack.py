"""The embedded models' packed form, and how it becomes a pipeline folder.

A packed model is a pipeline folder in `weights` with three differences:

- a large weight W (out, ...) of a transformer or text encoder is int8 q and a scale s (out,), W = s·q (see `int8`);
- a file that an earlier model has too is there once: `shared.json` tells where;
- a file `pytorch_lora_weights.safetensors` is yet to be added to the transformer: W + BA.
"""

import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from . import cache_folder

WEIGHTS = Path(__file__).parent / "weights"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"  # diffusers' name
SHARED = "shared.json"
SCALE = ".int8_scale"  # after a weight's name


def dtype_of(place: str) -> torch.dtype:
    """Return the dtype of a file's weights, by its place in the pipeline folder.

    Diffusers loads half precision as float32 unless told otherwise, transformers as it is: with float32 text encoders
    `from_pretrained` without a dtype gives a pipeline of one dtype.
    """
    return torch.float32 if place.startswith("text_encoder") else torch.float16


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight (out, ...) to int8 and float32 scales (out,): the largest of each output channel becomes ±127."""
    scale = weight.float().flatten(1).abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, 1)
    return (weight.float() / _column(scale, weight)).round().to(torch.int8), scale


def expanded(
    tensors: dict[str, Tensor], dtype: torch.dtype, lora: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Undo `int8` in a file's tensors, and add a LoRA of a transformer's weights."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE):
            continue
        weight, module = tensor.float(), f"transformer.{name.removesuffix('.weight')}"
        if name + SCALE in tensors:
            weight *= _column(tensors[name + SCALE], weight)
        if lora and f"{module}.lora_A.weight" in lora:
            weight += lora[f"{module}.lora_B.weight"].float() @ lora[f"{module}.lora_A.weight"].float()
        found[name] = weight.to(dtype)
    return found


def _column(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weight.ndim - 1))


def packed(name: str) -> dict[str, Path]:
    """Return a model's packed files, by their places in the pipeline folder. Raises FileNotFoundError without them."""
    folder = WEIGHTS / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{name} is no part of the wheel: install RALU from its source (repository or sdist)")
    own = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    shared = json.loads(own.pop(SHARED).read_text())
    return own | {place: WEIGHTS / owner for place, owner in shared.items()}


def unpacked(name: str) -> Path:
    """Return a model's pipeline folder in the cache, and make it if it is not there.

    Its name has a hash of the packed files and of this one. It is made beside its place and moved there when it is
    complete, so that another process sees all of it or nothing. Raises as `ralu.mini_path`.
    """
    files, cache = packed(name), cache_folder()
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for place, file in sorted(files.items()):
        digest.update(f"{place} {file.stat().st_size} ".encode() + file.read_bytes())
    folder = cache / f"{name}-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob("unpacking-*"):  # by a process that was killed; unpacking takes seconds
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="unpacking-", dir=cache) as beside:
            _unpack(files, Path(beside, name))
            Path(beside, name).rename(folder)
    except OSError as error:
        if not folder.is_dir():  # nor has another process made it meanwhile
            why = error.strerror or error
            raise OSError(f"cannot unpack {name} into {cache} ({why}): RALU_CACHE can name another folder") from error
    return folder


def _unpack(files: dict[str, Path], folder: Path) -> None:
    from safetensors.torch import load, save  # diffusers brings it; where a model lies can be asked without

    lora = load(files[LORA].read_bytes()) if LORA in files else None
    for place, file in files.items():
        data = file.read_bytes()
        if place.endswith("model.safetensors"):
            tensors = expanded(load(data), dtype_of(place), lora if place == TRANSFORMER else None)
            data = save(tensors, {"format": "pt"})
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
