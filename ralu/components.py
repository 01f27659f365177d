"""The models that a pipeline consists of, by their classes and configurations: no weights are loaded."""

import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import transformers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch.nn import Module
from transformers import AutoTokenizer

from . import families
from .blocks import unwrapped
from .families import FAMILIES, Family
from .mini import NAMES, mini_path
from .models import latent_pixels, published_scheduler
from .models import published as published_models


class Model(NamedTuple):
    """A part of a pipeline.

    kind: its class. config: its configuration as JSON, which can be hashed.
    """

    kind: Any
    config: str


class Description(NamedTuple):
    """A pipeline's models, of which nothing is loaded or built, and its scheduler's configuration.

    clip_tokens: length that its CLIP prompts are padded to.
    scheduler:   the configuration, with the pipeline's own `is_distilled` where it has one.
    """

    transformer: Model
    vae: Model | None
    encoders: list[Model]
    clip_tokens: int
    family: Family
    scheduler: Mapping[str, Any]

    @property
    def shrink(self) -> int:
        """Side of a latent pixel, in pixels."""
        if self.vae is None:
            return 8
        return latent_pixels(json.loads(self.vae.config))


def describe(model: str | Path | dict | DiffusionPipeline) -> Description:
    """Read the configurations of a model, given as `estimate` takes it. No weights are loaded.

    Raises ValueError for an unknown name and for a transformer that is of no family, and OSError for configurations
    that cannot be read.
    """
    clip_tokens, published = 77, published_models()
    scheduler: dict[str, Any] = published_scheduler(model if isinstance(model, str) else None)
    family: Family | None
    parts: dict[str, Any]
    if model in NAMES:
        model = mini_path(str(model))
    if isinstance(model, DiffusionPipeline):
        named = {name: part for name, part in model.components.items() if name.startswith(_PARTS)}
        modules = {name: unwrapped(part) for name, part in named.items() if isinstance(part, Module)}
        parts = {name: (type(part), part.config) for name, part in modules.items()}
        clip_tokens = getattr(model, "tokenizer_max_length", clip_tokens)
        scheduler = dict(getattr(model.scheduler, "config", scheduler))
        scheduler["is_distilled"] = model.config.get("is_distilled")
    elif isinstance(model, dict):
        kind = getattr(diffusers, str(model.get("_class_name")), None)
        parts = _published(family, model) if (family := _family(kind)) else {"transformer": (kind, model)}
    elif model in published:
        family = next(families.load(name) for name, entry in FAMILIES.items() if entry is published[model])
        parts = _published(family, family.published[model])
    elif isinstance(model, str | Path) and (Path(model).is_dir() or "/" in str(model)):
        parts = dict(_stored(model))
        if any(kind.__name__.startswith("CLIP") for kind, _ in parts.values()):
            clip_tokens = AutoTokenizer.from_pretrained(model, subfolder="tokenizer").model_max_length
        scheduler = FlowMatchEulerDiscreteScheduler.load_config(model, subfolder="scheduler")
        scheduler["is_distilled"] = DiffusionPipeline.load_config(model).get("is_distilled")
    else:
        known = f"{', '.join([*published, *NAMES])}, a pipeline, its folder or hub id, or a transformer's configuration"
        raise ValueError(f"model must be one of {known}, got {model!r}")
    kind, _ = parts.get("transformer", (None, None))
    family = _family(kind)
    if family is None:
        known = ", ".join(entry.transformer for entry in FAMILIES.values())
        raise ValueError(f"the model's transformer must be one of {known}, got {getattr(kind, '__name__', kind)}")
    built = {name: Model(kind, _json(config)) for name, (kind, config) in sorted(parts.items())}
    encoders = [part for name, part in built.items() if name.startswith("text_encoder")]
    return Description(built["transformer"], built.get("vae"), encoders, clip_tokens, family, scheduler)


_PARTS = "transformer", "vae", "text_encoder"  # of a pipeline, by how their names begin


def _family(kind: type | None) -> Family | None:
    """Return the family of a class of transformers, or None."""
    names = (name for name, entry in FAMILIES.items() if entry.transformer == getattr(kind, "__name__", None))
    return next(map(families.load, names), None)


def _published(family: Family, config: dict) -> dict[str, tuple[type, dict]]:
    """Return a transformer beside the VAE and the text encoders of the published models that it is like."""
    return {"transformer": (family.transformer, config), "vae": family.vae} | family.encoders_of(config)


def _stored(folder: str | Path) -> Iterator[tuple[str, tuple[type, dict]]]:
    """List by name the models of a pipeline on disk or on the hub. Weights are not read."""
    for name, entry in DiffusionPipeline.load_config(folder).items():
        if not name.startswith(_PARTS) or entry[0] is None:
            continue
        kind = getattr(import_module(entry[0]), entry[1])
        if issubclass(kind, transformers.PreTrainedModel):
            yield name, (kind, kind.config_class.from_pretrained(folder, subfolder=name))
        else:
            yield name, (kind, kind.load_config(folder, subfolder=name))


def _json(config) -> str:
    plain = config if isinstance(config, dict) else config.to_dict()
    kept = {key: value for key, value in plain.items() if not key.startswith("_") and key != "quantization_config"}
    return json.dumps(kept, sort_keys=True)


def check_size(height: int, width: int, unit: int):
    """Raise ValueError for an image's size in pixels that does not divide by `unit`."""
    if min(height, width) < 1 or height % unit or width % unit:
        raise ValueError(f"height and width must be positive and divide by {unit}, got {height}x{width}")
