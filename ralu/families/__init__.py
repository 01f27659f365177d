"""Model families: how RALU reads and changes a model's calls, one file each.

A family is registered by the names of its classes, so that nothing heavy is imported before it is needed: its module
has an instance of `Family` called FAMILY.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

from ..presets import DISTILLED, known_shift
from ..schedule import own_shift

DISTILLED_STEPS = 4  # of a distilled model's stock run


@dataclass(frozen=True)
class Entry:
    """The properties of a family that are needed before its module is imported.

    module:           where it is, with a `Family` called FAMILY.
    pipelines:        names of the pipeline classes it serves, in diffusers, that a text is enough for.
    image_pipelines:  names of those that take an image too, which the command line has none for.
    joining:          names of those of them that join samples with others of full size in every step: blend them, or
                      put these behind as channels.
    transformer:      name of their transformer's class.
    presets:          names of the presets that fit, the default one first and the distilled models' last.
    stock_steps:      of a stock run, which RALU is compared with; the distilled models' have `DISTILLED_STEPS`.
    published:        names of models that `ralu.estimate` knows.
    dynamic_shifting: whether distilled models are told by noise levels that are not shifted by resolution.
    sample_size:      side of the latents by default; None for what the transformer's configuration says.
    position_limit:   name of what limits their side in patches, in the transformer's configuration.
    """

    module: str
    pipelines: tuple[str, ...]
    transformer: str
    presets: tuple[str, ...]
    stock_steps: int
    published: tuple[str, ...] = ()
    dynamic_shifting: bool = False
    sample_size: int | None = None
    position_limit: str | None = None
    image_pipelines: tuple[str, ...] = ()
    joining: tuple[str, ...] = ()

    def joins(self, pipe: Any) -> bool:
        """Say whether a pipeline of these joins samples with others of full size in every step."""
        return any(kind.__name__ in self.joining for kind in type(pipe).__mro__)

    def is_distilled(self, scheduler: Mapping[str, Any]) -> bool:
        """Say whether a model is a few-step one, as far as its configuration tells.

        scheduler: the scheduler's configuration, with the pipeline's own `is_distilled` where it has one.
        """
        return bool(scheduler.get("is_distilled")) or (
            self.dynamic_shifting and not scheduler.get("use_dynamic_shifting")
        )

    def own_shift(self, scheduler: Mapping[str, Any]) -> float:
        """Return the model's own timestep shift, where it depends on the resolution that at 1024 px."""
        return own_shift(scheduler, known_shift(self.fitting_presets(scheduler)[0]))

    def stock_steps_of(self, scheduler: Mapping[str, Any]) -> int:
        """Return the steps of a stock run of a model with this scheduler."""
        return DISTILLED_STEPS if self.is_distilled(scheduler) else self.stock_steps

    def fitting_presets(self, scheduler: Mapping[str, Any]) -> list[str]:
        """List the presets for a model with this scheduler, the one for it first."""
        distilled = self.is_distilled(scheduler)
        return sorted(self.presets, key=lambda name: (name in DISTILLED) != distilled)


# One line a family.
FAMILIES: dict[str, Entry] = {
    "flux": Entry(
        f"{__name__}.flux", ("FluxPipeline",), "FluxTransformer2DModel",
        ("flux-5x", "flux-7x", "bottleneck-flux-5x", "bottleneck-flux-7x", "speed-flux-5x", "speed-flux-7x",
         "distilled-4"),
        50, ("flux-dev", "flux-schnell"), dynamic_shifting=True, sample_size=128,
        image_pipelines=(
            "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline", "FluxKontextPipeline",
            "FluxKontextInpaintPipeline", "FluxControlPipeline", "FluxControlImg2ImgPipeline",
            "FluxControlInpaintPipeline", "FluxControlNetPipeline", "FluxControlNetImg2ImgPipeline",
            "FluxControlNetInpaintPipeline",
        ),
        joining=(
            "FluxInpaintPipeline", "FluxFillPipeline", "FluxKontextInpaintPipeline", "FluxControlPipeline",
            "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline", "FluxControlNetInpaintPipeline",
        ),
    ),
    "flux2": Entry(
        f"{__name__}.flux2", ("Flux2Pipeline", "Flux2KleinPipeline"), "Flux2Transformer2DModel",
        ("flux2-5x", "flux2-7x", "klein-4"), 50, ("flux2-dev", "flux2-klein-4b", "flux2-klein-9b"), sample_size=128,
    ),
    "qwen_image": Entry(
        f"{__name__}.qwen_image", ("QwenImagePipeline",), "QwenImageTransformer2DModel", ("qwen-5x", "qwen-7x"), 50,
        ("qwen-image",), sample_size=128,
        image_pipelines=("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"), joining=("QwenImageInpaintPipeline",),
    ),
    "sd3": Entry(
        f"{__name__}.sd3", ("StableDiffusion3Pipeline",), "SD3Transformer2DModel",
        ("sd3-2x", "sd3-3x", "bottleneck-sd3-2x", "bottleneck-sd3-3x", "speed-sd3-2x", "speed-sd3-3x", "distilled-4"),
        28, ("sd3-medium", "sd3.5-medium", "sd3.5-large"), position_limit="pos_embed_max_size",
        image_pipelines=(
            "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline", "StableDiffusion3ControlNetPipeline",
            "StableDiffusion3ControlNetInpaintingPipeline",
        ),
        joining=("StableDiffusion3InpaintPipeline",),
    ),
    "z_image": Entry(
        f"{__name__}.z_image", ("ZImagePipeline",), "ZImageTransformer2DModel",
        ("zimage-2x", "zimage-5x", "zimage-7x"), 8, ("z-image-turbo",), sample_size=128,
        image_pipelines=("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"), joining=("ZImageInpaintPipeline",),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class FusedBlock:
    """How one class of transformer blocks runs on `ralu_kernels`.

    forward:   replaces the block's; it takes and returns the same.
    processor: class of the attention processor that goes with it.
    """

    forward: Callable
    processor: type


class Family(ABC):
    """The interface of a model family; subclasses define all of it.

    name:          as registered.
    transformer:   class of the model.
    embedding:     class of the model's position embedding, and the class it becomes while RALU is enabled.
    embedding_name: of the model's attribute that it is.
    fused_blocks:  by class of block; empty where blocks cannot be fused.
    stock_processors: classes of the attention processors that may be fused.
    text_first:    whether text comes before the image in the joint sequence.
    image_alone:   whether blocks may have a second attention, of the image alone.
    t5:            name of the pipeline's T5 encoder, whose padding can be trimmed; None where it has none.
    joins_clip:    whether CLIP's tokens are in the sequence beside T5's.
    text_tokens:   of T5 or what stands for it, as the pipeline's `max_sequence_length` is by default.
    published:     names of published models -> what their transformer's configuration has that is no default.
    vae:           the published models' class of VAE, and its configuration.
    encoders:      the published models' text encoders, by name: class in transformers, and configuration.
    takes_mask:    whether the stock attention takes a mask, so that images of a batch may differ in tokens.
    guided:        whether a negative prompt is usual.
    batched_guidance: whether it doubles the batch, instead of a second call.
    context_parallel: whether sequences may be split over processes, see `ralu.parallel`.
    """

    name: str
    transformer: type
    embedding: tuple[type, type]
    embedding_name: str = "pos_embed"
    fused_blocks: ClassVar[dict[type, FusedBlock]] = {}
    stock_processors: tuple[type, ...] = ()
    text_first: bool
    image_alone: bool = False
    t5: str | None = None
    joins_clip: bool = False
    text_tokens: int
    published: ClassVar[dict[str, dict]]
    vae: tuple[type, dict]
    encoders: ClassVar[dict[str, tuple[type, dict]]]
    takes_mask: bool
    guided: bool
    batched_guidance: bool
    context_parallel: bool = False

    @property
    def entry(self) -> Entry:
        """The entry it is registered with."""
        return FAMILIES[self.name]

    def check(self, transformer: Any) -> None:  # noqa: B027, most families serve all
        """Raise ValueError for a transformer that cannot be served."""

    def sample_of(self, arguments: dict):
        """Return the sample (B, ...) of a call of the model."""
        return arguments["hidden_states"]

    def set_sample(self, arguments: dict, sample: Any) -> None:
        """Change the sample of a call."""
        arguments["hidden_states"] = sample

    def own_channels(self, transformer: Any) -> int | None:
        """Count the channels of the model's input that are the sample's own, (B, L, C); None where all are.

        Behind them are those of a condition in latents, as many, and those of a mask in pixels.
        """
        return None

    def condition_tokens(self, arguments: dict) -> int:
        """Count the tokens of condition images that stand behind the image's in the model's first call, (B, L, C)."""
        return 0

    def pack(self, sample):
        """Make tokens (B, n, C) of a sample of the pipeline's."""
        return sample

    def unpack(self, tokens, grid: tuple[int, int]):
        """Undo `pack`."""
        return tokens

    def normalised(self, pipe: Any) -> tuple | None:
        """Return the deviations and means by which the channels of a token are normalised, see `ralu.stages.Run`.

        None where the four pixels of a token, which copies of any of them come to, are normalised alike.
        """
        return None

    @abstractmethod
    def grid_of(self, arguments: dict) -> tuple[int, int]:
        """Read the full token grid (rows, columns) off the arguments of the model's first call."""

    @abstractmethod
    def set_layout(self, module: Any, arguments: dict, layout: Any, grid: tuple[int, int]) -> None:
        """Give a call, whose arguments are changed in place, the positions and masks of a layout.

        module: the transformer, or a ControlNet. The call's sample is the layout's already, and condition images, if
        there are any, are behind it. grid: the low grid (h, w).
        """

    def clear_layout(self, module: Any) -> None:  # noqa: B027, there is nothing to undo in most
        """Undo what `set_layout` left in the model."""

    def image_tokens(self, module: Any, arguments: dict) -> int:
        """Count the image's tokens of a call of a model with blocks that can be fused."""
        return arguments["hidden_states"].shape[1]

    def trim_text(self, arguments: dict, length: int) -> None:
        """Leave a call's text tokens from `length` on out of its arguments, which are changed in place."""
        arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"][:, :length]

    @abstractmethod
    def decode(self, pipe: Any, tokens, grid: tuple[int, int]):
        """Decode tokens (B, h·w, C) to images (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def encode(self, pipe: Any, images):
        """Encode images (B, 3, H, W) in [-1, 1] to tokens (B, h·w, C), without chance."""

    def patch(self, pipe: Any) -> None:  # noqa: B027, most pipelines need none
        """Put stand-ins into a pipeline, see `ralu.patch.StandIn`; they are removed by their type."""

    @abstractmethod
    def flop(self, config: Mapping[str, Any], tokens: int, text_tokens: int) -> int:
        """Count the floating-point operations of a call for one image, as `ralu.estimate` does, by formula.

        config: the transformer's, complete. text_tokens: CLIP's included where they are in the sequence.
        """

    def encoders_of(self, config: Mapping[str, Any]) -> dict[str, tuple[type, dict]]:
        """Return the published text encoders that go with a transformer's configuration, which may leave out much."""
        return self.encoders

    def latents_shape(self, config: Mapping[str, Any], batch: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of what a VAE of this complete configuration decodes; height and width in latent pixels."""
        return batch, config["latent_channels"], height, width

    @abstractmethod
    def dummy_call(self, module: Any, dtype: Any, batch: int, tokens: int, text_tokens: int) -> None:
        """Call the model with anything of the right size. Only sizes matter: it may be on the meta device."""


def register(name: str, entry: Entry) -> None:
    """Make a family known. Its classes' names must not be another family's."""
    FAMILIES[name] = entry


def load(name: str) -> Family:
    """Import a registered family."""
    return import_module(FAMILIES[name].module).FAMILY


def name_of_pipeline(class_name: str) -> str | None:
    """Name the family that serves a class of pipelines that text is enough for, or None."""
    return next((name for name, entry in FAMILIES.items() if class_name in entry.pipelines), None)


def served() -> list[str]:
    """List the classes of all pipelines that are served."""
    return [name for entry in FAMILIES.values() for name in (*entry.pipelines, *entry.image_pipelines)]


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline. Raises ValueError for one that is not served, and TypeError for what is none."""
    for kind in type(pipe).__mro__:
        for name, entry in FAMILIES.items():
            if kind.__name__ in (*entry.pipelines, *entry.image_pipelines):
                return load(name)
    wrong = ValueError if hasattr(pipe, "components") else TypeError
    raise wrong(f"pipe must be a {' or '.join(served())}, got {type(pipe).__name__}")


def family_of_transformer(transformer: Any) -> Family:
    """Return the family of a transformer. Raises ValueError for another model, and TypeError for what is none."""
    names = [kind.__name__ for kind in type(transformer).__mro__]
    by_class = {entry.transformer: name for name, entry in FAMILIES.items()}
    for class_name in names:
        if class_name in by_class:
            return load(by_class[class_name])
    served = " or ".join(entry.transformer for entry in FAMILIES.values())
    wrong = ValueError if "Module" in names else TypeError
    raise wrong(f"transformer must be a {served}, got {type(transformer).__name__}")
