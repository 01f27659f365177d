"""The models that benchmarks run: embedded ones, and published ones with random weights, which change no time."""

import inspect
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import diffusers
import torch
from torch import nn

import ralu
from ralu import families
from ralu.components import describe
from ralu.mini import CALL_ARGUMENTS, NAMES, PROMPTS

# In place of FLUX.1-dev's own: a model that takes milliseconds on a CPU, to see that everything runs.
TINY = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 32, "pooled_projection_dim": 32}  # fmt: skip


def _built(kind: Any, config: dict, device: torch.device | str, dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # built in float32 FLUX.1-dev would not fit beside its copy
    try:
        with torch.device(device):
            model = kind.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return nn.Module.to(model, dtype).eval()  # buffers; the models' own `to` warns without a reason


def transformer(name: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """Build the transformer of a published model ("flux-dev", see `ralu.families`) on a device.

    changes: of its configuration.
    """
    model = describe(name).transformer
    return _built(model.kind, json.loads(model.config) | changes, device, dtype)


def pipeline(name: str, device: torch.device) -> diffusers.DiffusionPipeline:
    """Build the pipeline of a published model without text encoders, bfloat16 on a GPU and float32 on a CPU."""
    parts, dtype = describe(name), torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = json.loads(parts.vae.config) | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    entry = parts.family.entry
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=entry.dynamic_shifting)
    kind = getattr(diffusers, entry.pipelines[0])
    absent = [key for key in inspect.signature(kind.__init__).parameters if key.startswith(("text_", "tokenizer"))]
    return kind(
        scheduler=scheduler, transformer=transformer(name, device, dtype), **dict.fromkeys(absent),
        vae=_built(parts.vae.kind, vae, device, dtype),
    )  # fmt: skip


def token_count(sample: torch.Tensor) -> int:
    """Count an image's tokens: FLUX's samples are (B, L, C), SD3's latent pixels, four a token."""
    return sample.shape[1] if sample.ndim == 3 else sample.shape[2] * sample.shape[3] // 4


class Model:
    """A pipeline, and how it is called. Only the embedded models encode text: the others are given embeddings.

    pixels: of an image's side; None for 256 of the embedded models and 1024 of the others.
    """

    def __init__(self, name: str, pixels: int | None, device: torch.device):
        self.name, self.device, self.embedded = name, device, name in NAMES
        if self.embedded:
            self.pipe = ralu.mini_pipeline(name, dtype=torch.float32)
            self.pipe.to(device)
        else:
            self.pipe = pipeline(name, device)
        self.family = families.family_of(self.pipe)
        self.call_arguments = CALL_ARGUMENTS[self.family.name] if self.embedded else {}
        self.text_tokens = self.call_arguments.get("max_sequence_length", self.family.text_tokens)
        self.pixels = pixels or (256 if self.embedded else 1024)
        self.pipe.set_progress_bar_config(disable=True)

    @cached_property
    def compiled(self) -> Any:
        """One for all cases, so that they share their graphs."""
        return torch.compile(self.pipe.transformer)

    def call(self, batch: int) -> dict[str, Any]:
        """Make the arguments of a pipeline's call for a batch of images."""
        call: dict[str, Any] = {"height": self.pixels, "width": self.pixels} | self.call_arguments
        call["generator"] = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        if self.embedded:
            return call | {"prompt": [PROMPTS[i % len(PROMPTS)] for i in range(batch)]}
        config = self.pipe.transformer.config
        tokens = self.text_tokens + (77 if self.family.joins_clip else 0)

        def random(*shape):
            return torch.randn(batch, *shape, device=self.device, dtype=self.pipe.dtype)

        for prefix in ("", "negative_") if self.family.guided else ("",):
            call[f"{prefix}prompt_embeds"] = random(tokens, config.joint_attention_dim)
            call[f"{prefix}pooled_prompt_embeds"] = random(config.pooled_projection_dim)
        return call

    @contextmanager
    def watched(self) -> Iterator[list]:
        """Yield what becomes a list of [part, tokens, start, end] of the models' calls.

        On a GPU the times are events in its stream, so that nothing waits that would not wait unwatched.
        """
        spans: list[list] = []

        def mark():
            if self.device.type != "cuda":
                return time.perf_counter()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        def begin(part, tokens=0):
            spans.append([part, tokens, mark(), None])

        def end(*_):
            spans[-1][3] = mark()

        def encode_prompt(*args, **kwargs):
            begin("text")
            embeddings = encode(*args, **kwargs)
            end()
            return embeddings

        def transformer_begins(module, args, kwargs):
            begin("transformer", token_count(kwargs["hidden_states"]))

        pipe, encode = self.pipe, self.pipe.encode_prompt
        pipe.encode_prompt = encode_prompt
        # After RALU's own hook, whose work is not the transformer's.
        handles = [
            pipe.transformer.register_forward_pre_hook(transformer_begins, with_kwargs=True),
            pipe.transformer.register_forward_hook(end),
            pipe.vae.decoder.register_forward_pre_hook(lambda *_: begin("decode")),
            pipe.vae.decoder.register_forward_hook(end),
        ]
        try:
            yield spans
        finally:
            del pipe.encode_prompt
            for handle in handles:
                handle.remove()


def flux_call(model: nn.Module, text: int, tokens: int, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Make the arguments of a FLUX transformer's call: a sample of `text` and `tokens` tokens of text and image."""
    config: Any = model.config
    call = {
        "hidden_states": torch.randn(1, tokens, config.in_channels),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
    }
    call = {name: value.to(device, torch.bfloat16) for name, value in call.items()}
    return call | {
        "img_ids": torch.rand(tokens, 3, device=device).mul(64).round(),
        "txt_ids": torch.zeros(text, 3, device=device),
    }
