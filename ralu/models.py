"""Models as their configurations describe them, before anything heavy is imported or any weight is loaded."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .budget import check_speedup, schedule_for
from .errors import UsageError, nearest_sizes, shortened, usage
from .families import DISTILLED_STEPS, FAMILIES, Entry, name_of_pipeline
from .method import Method
from .mini import CALL_ARGUMENTS, NAMES, PIXELS, is_unpacked, mini_path
from .schedule import Schedule

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "RaluScheduler")
_SCHEDULERS: dict[str | None, dict[str, Any]] = {  # of published models, where they are no usual ones
    "flux-schnell": {"use_dynamic_shifting": False, "shift": 1.0},
    "flux2-klein-4b": {"is_distilled": True}, "flux2-klein-9b": {"is_distilled": True},
    "z-image-turbo": {"use_dynamic_shifting": False, "shift": 3.0},
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A pipeline that is not loaded yet.

    name:      as the user gave it.
    location:  its folder or hub id.
    pipeline:  the class, by name.
    family:    name of the model's family, see `ralu.families`.
    presets:   for this model, its default first.
    distilled: made for four steps, as far as the configuration tells.
    embedded:  whether it is one of `ralu.mini`.
    pixels:    side of the images that it makes by default.
    latent:    side of a latent pixel, in pixels.
    largest:   the longest side that its position embedding reaches, in pixels; None without a limit.
    """

    name: str
    location: str
    pipeline: str
    family: str
    presets: tuple[str, ...]
    distilled: bool
    embedded: bool
    pixels: int
    latent: int
    largest: int | None = None

    @property
    def stock_steps(self) -> int:
        """Steps of the stock run that RALU is compared with."""
        return DISTILLED_STEPS if self.distilled else FAMILIES[self.family].stock_steps

    @property
    def methods(self) -> list[Method]:
        """Methods that are compared by default, the stock pipeline first."""
        if self.distilled:
            names = ["stock-4", "stock-2", self.presets[0]]
        else:
            names = [f"stock-{self.stock_steps}", "stock-10", *self.presets[:2]]
        return [Method(name) for name in names]

    @property
    def call_arguments(self) -> dict:
        """Further keyword arguments of the pipeline's calls: the embedded models' captions are short."""
        return CALL_ARGUMENTS[self.family] if self.embedded else {}

    def check_methods(self, methods: Iterable[Method]):
        """Raise UsageError for a preset or a cache that is made for another family."""
        for method in methods:
            if method.preset and method.speedup is None and method.preset not in self.presets:
                raise UsageError(f"{method} is not for a {self.pipeline}; choose of {', '.join(self.presets)}")
            if method.cache is not None and self.family not in method.cache.families:
                served = ", ".join(method.cache.families)
                raise UsageError(f"{method}: this cache is not for a {self.pipeline}, it serves {served}")

    def check_size(self, width: int, height: int):
        """Raise UsageError for a size in pixels that is too large, or that the pipeline would round or refuse."""
        if self.largest and max(width, height) > self.largest:
            raise UsageError(f"--size: {self.name} makes at most {self.largest}x{self.largest}, got {width}x{height}")
        unit = 2 * self.latent
        if width % unit or height % unit:
            raise UsageError(
                f"--size: width and height must divide by {unit}, got {width}x{height}; "
                f"the nearest {nearest_sizes(width, height, unit)}"
            )

    def budget(self, method: Method, width: int, height: int, pipe: Any = None, shift: float | None = None) -> Schedule:
        """Return the schedule of a method that names a speedup, for images of this size in pixels.

        pipe: the model, if it is loaded. shift: in place of the model's own. Raises UsageError for what cannot be
        reached.
        """
        options = method.options.given()
        matched = {name: options[name] for name in ("matching", "upsampler") if name in options}
        text_tokens = self.call_arguments.get("max_sequence_length")
        with usage(str(method)):
            return schedule_for(
                check_speedup(method.speedup), pipe or self.location, height=height, width=width,
                text_tokens=text_tokens, shift=shift, **matched,
            )  # fmt: skip


def find_model(name: str, others: Iterable[str] = ()) -> Model:
    """Read the configurations of an embedded model, of a pipeline's folder or of a hub id.

    others: what else the name may be, for the error.
    Raises UsageError for a model that is not there, is damaged, or is of a family that RALU does not serve. Of a hub id
    four small files are downloaded, if they are not in the cache.
    """
    location = _location(name, others)
    index = _config(name, location, "model_index.json")
    pipeline = index.get("_class_name")
    family = name_of_pipeline(str(pipeline))
    if family is None:
        served = ", ".join(served for entry in FAMILIES.values() for served in entry.pipelines)
        raise UsageError(f"--model: the command line serves {served}, but {name} is a {pipeline}")
    entry = FAMILIES[family]
    parts = {part: _config(name, location, f"{part}/config.json") for part in ("vae", "transformer")}
    scheduler = _config(name, location, "scheduler/scheduler_config.json")
    scheduler["is_distilled"] = index.get("is_distilled")
    if scheduler.get("_class_name") not in SCHEDULERS:
        raise UsageError(f"--model: RALU needs a {SCHEDULERS[0]}, {name} has a {scheduler.get('_class_name')}")
    embedded = is_unpacked(location)
    try:
        latent = latent_pixels(parts["vae"])
        transformer = parts["transformer"]
        side = entry.sample_size or transformer["sample_size"]  # as the pipelines' default_sample_size
        patches = transformer[entry.position_limit] if entry.position_limit else None
    except (KeyError, TypeError) as error:
        raise UsageError(f"--model: cannot load {name}: a configuration lacks {error}") from error
    return Model(
        name=name, location=location, pipeline=str(pipeline), family=family,
        presets=tuple(entry.fitting_presets(scheduler)), distilled=entry.is_distilled(scheduler),
        embedded=embedded, pixels=PIXELS if embedded else side * latent, latent=latent,
        largest=patches and patches * 2 * latent,
    )  # fmt: skip


def published() -> dict[str, Entry]:
    """List what `ralu.estimate` knows by name, with the families."""
    return {name: entry for entry in FAMILIES.values() for name in entry.published}


def published_scheduler(name: str | None) -> dict:
    """Return what matters here of a published model's scheduler; without a name of one that is not distilled."""
    return {"use_dynamic_shifting": True} | _SCHEDULERS.get(name, {})


def latent_pixels(vae: Mapping[str, Any]) -> int:
    """Return the side of a latent pixel, in pixels, by a VAE's configuration. Raises KeyError for an unknown one."""
    if "temperal_downsample" in vae:  # a film's
        return 2 ** len(vae["temperal_downsample"])
    blocks = vae.get("block_out_channels") or vae["decoder_block_out_channels"]  # as AutoencoderTiny saves it
    return 2 ** (len(blocks) - 1)


def published_model(name: str) -> Model:
    """Describe a published model without any file."""
    family, entry = next((family, entry) for family, entry in FAMILIES.items() if name in entry.published)
    scheduler = published_scheduler(name)
    return Model(
        name, name, entry.pipelines[0], family, tuple(entry.fitting_presets(scheduler)), entry.is_distilled(scheduler),
        embedded=False, pixels=1024, latent=8,
    )  # fmt: skip


def _location(name: str, others: Iterable[str]) -> str:
    if name in NAMES:
        with usage("--model", OSError):
            return str(mini_path(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UsageError(f"--model: the folder {name} is no pipeline, it has no model_index.json")
        return str(folder)
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        known = ", nor ".join([*others, *NAMES])
        raise UsageError(f"--model: {name} is neither {known}, nor a folder, nor a hub id (owner/name)")
    return name


def _config(name: str, location: str, file: str) -> dict:
    if Path(location).is_dir():
        path = Path(location, file)
    else:
        import huggingface_hub as hub

        try:
            cached = hub.try_to_load_from_cache(location, file)
            if not isinstance(cached, str):
                hub.get_hf_file_metadata(hub.hf_hub_url(location, file))  # the download itself would retry for long
                cached = hub.hf_hub_download(location, file)
            path = Path(cached)
        except Exception as error:  # the hub and the network have errors of their own
            why = f"there is no such folder, and the hub did not give it: {shortened(error)}"
            raise UsageError(f"--model: cannot load {name}: {why}") from error
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--model: cannot load {name}: {file}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--model: cannot load {name}: {file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"--model: cannot load {name}: {file} is no JSON object")
    return config
