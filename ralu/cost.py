"""`estimate`: what a run costs before it is run, in floating-point operations and in memory.

Nothing is allocated: a pipeline's modules run on PyTorch's meta device, once for each number of tokens, while
`torch.utils.flop_counter` counts. A multiply-add is two operations; only matrix products and convolutions count.
"""

import json
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from .blocks import unwrapped
from .schedule import Schedule, preset, presets

aten = torch.ops.aten

_FAMILIES = {FluxTransformer2DModel: "flux", SD3Transformer2DModel: "sd3"}
_TEXT_TOKENS = {"flux": 512, "sd3": 256}  # the pipelines' own max_sequence_length

# The published models: of a configuration only what differs from the class's defaults.
_SD3 = {
    "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip
MODELS = {
    "flux-dev": (FluxTransformer2DModel, {"guidance_embeds": True}),
    "flux-schnell": (FluxTransformer2DModel, {}),
    "sd3-medium": (SD3Transformer2DModel, _SD3),
    "sd3.5-medium": (SD3Transformer2DModel, _SD3 | {
        "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)),
    }),
    "sd3.5-large": (SD3Transformer2DModel, _SD3 | {
        "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm",
    }),
}  # fmt: skip
_CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
_ENCODERS = {
    "flux": {"text_encoder": (CLIPTextModel, _CLIP_L), "text_encoder_2": (T5EncoderModel, _T5_XXL)},
    "sd3": {
        "text_encoder": (CLIPTextModelWithProjection, _CLIP_L | {"projection_dim": 768}),
        "text_encoder_2": (CLIPTextModelWithProjection, _CLIP_G),
        "text_encoder_3": (T5EncoderModel, _T5_XXL),
    },
}


@dataclass(frozen=True)
class Part:
    """A stage, or what runs before and after the stages.

    calls:         forward passes, each over the whole batch.
    tokens:        a sample's: of the picture for the transformer, of the prompt for an encoder, latent pixels for the
                   VAE.
    tflop:         10^12 operations of all calls together, without attention's two matrix products.
    attention:     10^12 operations of those.
    peak_bytes:    the most that the tensors of a call hold at one time, beside the weights.
    scratch_bytes: a bound of what PyTorch's libraries hold besides on a CPU, within one operation (`cpu_scratch`).
    """

    name: str
    calls: int
    tokens: int
    tflop: float
    attention: float
    peak_bytes: int
    scratch_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What `estimate` returns; `str` makes a table of it.

    parts:        in the order in which they run.
    weight_bytes: all parameters and buffers together.
    """

    parts: tuple[Part, ...]
    weight_bytes: int

    @property
    def tflop(self) -> float:
        """10^12 operations without attention's matrix products, as the paper counts."""
        return sum(part.tflop for part in self.parts)

    @property
    def attention(self) -> float:
        """10^12 operations of attention's matrix products."""
        return sum(part.attention for part in self.parts)

    @property
    def total(self) -> float:
        """10^12 operations, attention's included."""
        return self.tflop + self.attention

    @property
    def peak_bytes(self) -> int:
        """The weights and the part that holds most beside them."""
        return self.weight_bytes + max(part.peak_bytes for part in self.parts)

    @property
    def scratch_bytes(self) -> int:
        """A bound of what a CPU's libraries hold besides."""
        return max(part.scratch_bytes for part in self.parts)

    def to_dict(self) -> dict:
        """Fields and sums, ready for JSON."""
        sums = "tflop", "attention", "total", "peak_bytes", "scratch_bytes"
        return asdict(self) | {key: getattr(self, key) for key in sums}

    def __str__(self) -> str:
        lines = [
            f"{'':<28}{'calls':>5}{'tokens':>8}{'TFLOP':>10}{'with attention':>16}{'peak GiB':>10}{'CPU scratch':>13}"
        ]
        for part in self.parts:
            work = f"{part.tflop:>10.2f}{part.tflop + part.attention:>16.2f}"
            memory = f"{part.peak_bytes / 2**30:>10.2f}{part.scratch_bytes / 2**30:>13.2f}"
            lines.append(f"{part.name:<28}{part.calls:>5}{part.tokens:>8}{work}{memory}")
        lines.append(f"{'weights':<67}{self.weight_bytes / 2**30:>10.2f}")
        memory = f"{self.peak_bytes / 2**30:>10.2f}{self.scratch_bytes / 2**30:>13.2f}"
        lines.append(f"{'total':<41}{self.tflop:>10.2f}{self.total:>16.2f}{memory}")
        return "\n".join(lines)


def estimate(
    model: str | Path | dict | DiffusionPipeline = "flux-dev",
    method: str | int | Schedule | None = None,
    *,
    height: int = 1024,
    width: int = 1024,
    ratio: float | None = None,
    text_tokens: int | None = None,
    batch: int = 1,
    guided: bool | None = None,
    preview: bool = True,
    dtype: torch.dtype | None = None,
) -> Estimate:
    """Floating-point operations and peak memory of a run, without running it.

    model:         a name in `MODELS`, a FLUX or SD3 pipeline, its folder or hub id (of which only configurations are
                   read), or a transformer's configuration with "_class_name", to which the published VAE and text
                   encoders are added.
    method:        a preset's name, a `Schedule`, or the number of steps of a stock run; None for the default preset.
    height, width: of the pictures, in pixels.
    ratio:         share of the tokens to upsample early; None for the schedule's.
    text_tokens:   of T5 (`max_sequence_length`); None for the pipeline's default, 512 for FLUX and 256 for SD3.
    batch:         pictures in one run. All figures are for the whole batch.
    guided:        whether every step also has a pass for the negative prompt (FLUX: `true_cfg_scale`); None for SD3
                   alone.
    preview:       whether a preview is decoded to find edges, as regions="canny" does.
    dtype:         of weights and activations; None for a given pipeline's own, else bfloat16.

    The peak is that of a pipeline that is wholly on the device, under fused attention, all of it in one dtype (loaded
    as float16, T5 keeps a part in float32). It is what tensors hold, which is the same on every machine. What
    libraries hold for themselves is more: on a CPU at most `scratch_bytes` within an operation, whatever its
    instruction set, with as many threads as this process has (`torch.get_num_threads()`). A GPU's workspaces,
    fragments and the libraries' own code are not looked at, and neither are adapters and quantisation.
    Raises ValueError for an unknown model or method, and for sizes that do not fit.
    """
    parts = describe(model)
    family = parts.family
    method = _method(method, family, ratio)
    stock = isinstance(method, int)
    text_tokens = _TEXT_TOKENS[family] if text_tokens is None else text_tokens
    for name, value in (("batch", batch), ("text_tokens", text_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if dtype is None:
        dtype = model.dtype if isinstance(model, DiffusionPipeline) else torch.bfloat16
    shrink = 2 ** (len(_built(parts.vae, dtype).config.block_out_channels) - 1)
    unit = shrink * (2 if stock else 4)
    if min(height, width) < 1 or height % unit or width % unit:
        raise ValueError(f"height and width must be positive and divide by {unit}, got {height}x{width}")
    passes = 2 if (family == "sd3" if guided is None else guided) else 1

    def encoder(model):
        tokens = text_tokens if model.kind is T5EncoderModel else parts.clip_tokens
        return model.kind.__name__, passes, tokens, model, _encode, (batch, tokens)

    def stage(name, steps, tokens):
        if family == "flux":  # guidance is a second call, for SD3 a doubled batch
            return name, steps * passes, tokens, parts.transformer, _flux, (batch, tokens, text_tokens)
        shape = batch * passes, tokens, parts.clip_tokens + text_tokens
        return name, steps, tokens, parts.transformer, _sd3, shape

    def decoder(name, height, width):
        return name, 1, height * width, parts.vae, _decode, (batch, height, width)

    height, width = height // shrink, width // shrink
    full = height * width // 4
    if stock:
        stages = [stage("full resolution", method, full)]
    else:
        low, steps = full // 4, method.steps
        mixed = low + 3 * math.floor(method.ratio * low + 1e-6)  # the rule of `plan_tokens`
        stages = [
            stage("stage 1, half resolution", steps[0], low),
            *([decoder("preview", height // 2, width // 2)] if preview else []),
            stage("stage 2, mixed resolution", steps[1], mixed),
            stage("stage 3, full resolution", steps[2], full),
        ]
    rows = []
    for name, calls, tokens, *run in [*map(encoder, parts.encoders), *stages, decoder("picture", height, width)]:
        tflop, attention, *memory = _cost(torch.get_num_threads(), dtype, *run)
        rows.append(Part(name, calls, tokens, calls * tflop, calls * attention, *memory))
    modules = [_built(part, dtype) for part in (*parts.encoders, parts.transformer, parts.vae)]
    weights = sum(tensor.nbytes for module in modules for tensor in chain(module.parameters(), module.buffers()))
    return Estimate(tuple(rows), weights)


def _method(method: str | int | Schedule | None, family: str, ratio: float | None) -> int | Schedule:
    known = presets(family)
    method = known[0] if method is None else method
    if isinstance(method, str):
        if method not in known:
            raise ValueError(f"method must be {', '.join(known)}, a Schedule or a number of steps, got {method!r}")
        method = preset(method)
    if isinstance(method, Schedule):
        return method if ratio is None else replace(method, ratio=ratio)
    if method < 1:
        raise ValueError(f"method, as a number of steps, must be at least 1, got {method}")
    if ratio is not None:
        raise ValueError(f"a stock run upsamples nothing, so ratio must be None, got {ratio}")
    return method


# ---- what a pipeline consists of ----


class _Model(NamedTuple):
    kind: type
    config: str  # JSON, which can be hashed


class Description(NamedTuple):
    """A pipeline's models, of which nothing is loaded or built, and the length its CLIP prompts are padded to."""

    transformer: _Model
    vae: _Model
    encoders: list[_Model]
    clip_tokens: int

    @property
    def family(self) -> str:
        return _FAMILIES[self.transformer.kind]


def describe(model: str | Path | dict | DiffusionPipeline) -> Description:
    """What `estimate` needs to know of a model, which is as `estimate` takes it."""
    clip_tokens = 77
    if isinstance(model, DiffusionPipeline):
        modules = {name: unwrapped(part) for name, part in model.components.items() if isinstance(part, Module)}
        found = {name: (type(part), part.config) for name, part in modules.items()}
        clip_tokens = model.tokenizer_max_length
    elif isinstance(model, dict):
        found = _published(getattr(diffusers, str(model.get("_class_name")), None), model)
    elif model in MODELS:
        found = _published(*MODELS[model])
    elif isinstance(model, str | Path) and (Path(model).is_dir() or "/" in str(model)):
        found = dict(_stored(model))
        clip_tokens = AutoTokenizer.from_pretrained(model, subfolder="tokenizer").model_max_length
    else:
        known = f"{', '.join(MODELS)}, a pipeline, its folder or hub id, or a transformer's configuration"
        raise ValueError(f"model must be one of {known}, got {model!r}")
    kind, _ = found.get("transformer", (None, None))
    if kind not in _FAMILIES:
        known = ", ".join(kind.__name__ for kind in _FAMILIES)
        raise ValueError(f"the model's transformer must be one of {known}, got {getattr(kind, '__name__', kind)}")
    models = {name: _Model(kind, _json(config)) for name, (kind, config) in sorted(found.items())}
    encoders = [part for name, part in models.items() if name.startswith("text_encoder")]
    return Description(models["transformer"], models["vae"], encoders, clip_tokens)


def _published(kind: type, config: dict) -> dict[str, tuple[type, dict]]:
    """A transformer beside the VAE and the text encoders that all published models of its family share."""
    return {"transformer": (kind, config), "vae": (AutoencoderKL, _VAE)} | _ENCODERS.get(_FAMILIES.get(kind), {})


def _stored(folder: str | Path) -> Iterator[tuple[str, tuple[type, dict]]]:
    """By name the models of a pipeline on disk or on the hub. Weights are not read."""
    for name, entry in DiffusionPipeline.load_config(folder).items():
        if not name.startswith(("transformer", "vae", "text_encoder")) or entry[0] is None:
            continue
        if entry[0] == "transformers":
            kind = getattr(transformers, entry[1])
            yield name, (kind, kind.config_class.from_pretrained(folder, subfolder=name))
        else:
            kind = getattr(diffusers, entry[1])
            yield name, (kind, kind.load_config(folder, subfolder=name))


def _json(config) -> str:
    plain = config if isinstance(config, dict) else config.to_dict()
    kept = {key: value for key, value in plain.items() if not key.startswith("_") and key != "quantization_config"}
    return json.dumps(kept, sort_keys=True)


@lru_cache
def _built(model: _Model, dtype: torch.dtype) -> Module:
    config = json.loads(model.config)
    with torch.device("meta"):
        if issubclass(model.kind, transformers.PreTrainedModel):
            module = model.kind(model.kind.config_class(**config))
        else:
            module = model.kind.from_config(config)
    return Module.to(module, dtype).eval()  # the models' own `to` warns about what these do not have


# ---- forward passes; what a sample looks like does not matter, only its size ----


def _flux(module: Module, dtype: torch.dtype, batch: int, tokens: int, text_tokens: int):
    new, config = partial(torch.empty, dtype=dtype), module.config
    module(
        hidden_states=new(batch, tokens, config.in_channels),
        encoder_hidden_states=new(batch, text_tokens, config.joint_attention_dim),
        pooled_projections=new(batch, config.pooled_projection_dim),
        timestep=new(batch),
        guidance=new(batch) if config.guidance_embeds else None,
        img_ids=new(tokens, 3),
        txt_ids=new(text_tokens, 3),
    )


def _sd3(module: Module, dtype: torch.dtype, batch: int, tokens: int, text_tokens: int):
    new, config = partial(torch.empty, dtype=dtype), module.config
    # A strip, as in `ralu.sd3`: one token a patch, and rows of positions of its own.
    module.pos_embed.cropped_pos_embed = lambda height, width: new(1, tokens, module.inner_dim)
    module(
        hidden_states=new(batch, config.in_channels, config.patch_size, config.patch_size * tokens),
        encoder_hidden_states=new(batch, text_tokens, config.joint_attention_dim),
        pooled_projections=new(batch, config.pooled_projection_dim),
        timestep=new(batch),
    )


def _encode(module: Module, dtype: torch.dtype, batch: int, tokens: int):
    module(torch.empty(batch, tokens, dtype=torch.long))


def _decode(module: Module, dtype: torch.dtype, batch: int, height: int, width: int):
    module.decode(torch.empty(batch, module.config.latent_channels, height, width, dtype=dtype))


# ---- counting ----


@lru_cache
def _cost(
    threads: int, dtype: torch.dtype, model: _Model, call: Callable, shape: tuple[int, ...]
) -> tuple[float, float, int, int]:
    """Of one forward pass: 10^12 operations without attention's, those of attention's, peak and scratch in bytes."""
    module, counter, memory = _built(model, dtype), FlopCounterMode(display=False), LiveBytes(threads)
    with torch.device("meta"), torch.no_grad(), FusedAttention(), counter, memory:
        call(module, dtype, *shape)
    counts = counter.get_flop_counts()["Global"]
    weighted = sum(counts.get(op, 0) for op in (aten.mm, aten.addmm, aten.convolution))
    return weighted / 1e12, (sum(counts.values()) - weighted) / 1e12, memory.peak, memory.scratch


class FusedAttention(TorchFunctionMode):
    """Attention as GPUs' kernels do it, without a matrix of weights, where the meta device would make one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return _fused_attention(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)


def _fused_attention(query, key, value, attn_mask=None, *_, **__):
    return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, False)[0]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made under it and are still in use: `now`, and at most `peak`.

    `scratch` is the largest of the operations' `cpu_scratch`.
    """

    def __init__(self, threads: int):
        super().__init__()
        self.threads = threads
        self.now = self.peak = self.scratch = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        before = _storages(operands)
        for key, storage in _storages(results).items():
            if key not in before:  # else a view, or written in place
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        self.scratch = max(self.scratch, cpu_scratch(func, operands, results, self.threads))
        return result

    def _add(self, size: int):
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(tensors: list[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage for storage in storages}


def cpu_scratch(func, operands: list[torch.Tensor], results: list[torch.Tensor], threads: int) -> int:
    """A bound of the bytes that one operation on a CPU takes and gives back, beside its operands and results.

    A library may copy any of these into a layout of its own. oneDNN's blocks of convolutions hold 16 channels. Where
    it does not serve (floats of 16 bits on most CPUs, and small inputs) PyTorch unfolds the input: every pixel of the
    output has a column of all that its kernel sees. Attention goes over 256 queries and 512 keys at a time; every
    thread holds their scores, two sums a query and its output in float32, and of shorter floats scores, queries and
    keys anew.
    """
    if func.is_view:
        return 0
    copies = sum(x.nbytes for x in (*operands, *results))
    if func is aten.convolution.default:
        (x, weight, *_), (y,) = operands, results
        for tensor, dims in ((x, (1,)), (weight, (0, 1)), (y, (1,))):
            blocked = math.prod(math.ceil(n / 16) * 16 if i in dims else n for i, n in enumerate(tensor.shape))
            copies += blocked * tensor.itemsize - tensor.nbytes
        if x.dtype != torch.float32 or x.numel() <= 20480:
            copies += weight[0].numel() * y[:, 0].numel() * x.itemsize
    elif func in _ATTENTION:
        query, key = operands[:2]
        queries, keys, width = min(256, query.shape[-2]), min(512, key.shape[-2]), query.shape[-1]
        copies += threads * 4 * queries * (keys + 2 + width)
        if query.dtype != torch.float32:
            copies += threads * query.itemsize * (queries * keys + (queries + keys) * width)
    return copies


_ATTENTION = {
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
