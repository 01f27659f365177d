"""The embedded models: small pipelines of the real architectures, trained on emoji, that run anywhere in seconds."""

import os
import sys
from pathlib import Path
from typing import Any

PROMPTS = ["fox", "penguin", "strawberry", "hamburger", "sunflower", "tropical fish"]  # captions that the models know
NAMES = ("mini-flux", "mini-sd3", "mini-schnell")
PIXELS = 256  # side of their images
# By family how to call the pipelines. They were seldom trained on captions padded to hundreds of tokens.
CALL_ARGUMENTS: dict[str, dict] = {
    "flux": {"max_sequence_length": 32},
    "sd3": {"max_sequence_length": 32, "guidance_scale": 2.0},
}


def mini_path(name: str = "mini-flux") -> Path:
    """Return the pipeline folder of an embedded model, one of `NAMES`, for diffusers' `from_pretrained`.

    It is unpacked into the cache, about 30 MB, when it is first asked for; nothing is downloaded. The cache is the
    folder RALU_CACHE, or else ralu in the user's cache folder. The folder of mini-schnell also has the LoRA that made
    it of mini-flux, for `load_lora_weights`.

    Raises ValueError for another name (TypeError for what is no string), FileNotFoundError for a model that this
    installation does not have, and OSError where the cache cannot be written.
    """
    if name not in NAMES:
        wrong = ValueError if isinstance(name, str) else TypeError
        raise wrong(f"name must be {', '.join(NAMES[:-1])} or {NAMES[-1]}, got {name!r}")
    from .unpack import unpacked

    return unpacked(name)


def mini_pipeline(name: str = "mini-flux", dtype: Any = None):
    """Load an embedded model, one of `NAMES`, in a torch dtype (default: float32).

    This is `DiffusionPipeline.from_pretrained(mini_path(name))` with two differences. A call without a size makes 256
    pixels: `FluxPipeline` sets its default, 128 latent pixels a side, in its constructor, where no configuration
    reaches. Give `max_sequence_length=32`: with the default length images of mini-flux come out smudged. And the
    autoencoder, an `AutoencoderTiny`, is put in afterwards, since `from_pretrained` warns of any that is no
    `AutoencoderKL`.

    Raises what `mini_path` raises, and TypeError for a dtype that is none.
    """
    import torch
    from diffusers import AutoencoderTiny, DiffusionPipeline

    if not isinstance(dtype, torch.dtype | None):
        raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
    folder = mini_path(name)
    pipe = DiffusionPipeline.from_pretrained(folder, vae=None, dtype=dtype)
    pipe.register_modules(vae=AutoencoderTiny.from_pretrained(folder / "vae", dtype=dtype))
    pipe.default_sample_size = PIXELS // pipe.vae_scale_factor
    return pipe


def is_unpacked(folder: str | Path) -> bool:
    """Say whether a folder is one that `mini_path` returned."""
    path = Path(folder).resolve()
    return path.parent == cache_folder().resolve() and path.name.rpartition("-")[0] in NAMES


def cache_folder() -> Path:
    """Return where the models are unpacked: RALU_CACHE, or ralu in the user's cache folder of this platform."""
    if chosen := os.environ.get("RALU_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        home = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        home = "~/Library/Caches"
    else:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "ralu"
