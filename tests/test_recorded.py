"""Images stay what they were: values of whole runs, recorded before the code was taken apart and put together anew.

`python tests/test_recorded.py FILE` writes them; with --bits FILE it writes hashes of all values, to compare two
revisions on one machine. Regions do not hang on rounding here: a preview's edges would, between processors.
"""

import argparse
import hashlib
import json
from functools import lru_cache
from itertools import product
from pathlib import Path

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny import vae

import ralu
from ralu.presets import BASELINES, PRESETS, preset

RECORD = Path(__file__).with_name("recorded.json")
FLUX, SD3 = ["flux-5x", "flux-7x", "distilled-4"], ["sd3-2x", "sd3-3x", "distilled-4"]


def columns(x0, grid):
    """Scores without ties, from the place alone."""
    n = grid[0] * grid[1]
    return (torch.arange(n) * 7919 % n / n).expand(len(x0), n)


def ragged(x0, grid):
    """Scores of which one sample has more over a half than the other."""
    return columns(x0, grid) * torch.linspace(0.6, 1.0, len(x0))[:, None]


MASK = torch.linspace(0, 1, 64).view(8, 8).T.contiguous()


def velocity(x, sigma, layout):
    """Smooth, of its own kind at every place, and mixing channels."""
    wave = torch.sin(layout.positions.sum(-1, keepdim=True) * 0.7 + torch.arange(x.shape[-1]) * 0.3)
    return torch.tanh(x.roll(1, -1)) * (0.5 + sigma) + wave


def decode(x0, grid):
    """Decode to stripes, whatever is asked for."""
    height, width = 8 * grid[0], 8 * grid[1]
    rows, cols = torch.arange(height)[:, None], torch.arange(width)
    return torch.where((rows * cols // 37) % 2 == 0, 0.9, -0.9).expand(len(x0), 3, height, width)


def sampled(name, **options):
    noise = torch.randn(2, 8 * 12, 16, generator=torch.Generator().manual_seed(1))
    return ralu.sample(velocity, noise, (8, 12), name, **options)


@lru_cache
def flux():
    torch.manual_seed(0)
    return FluxPipeline(
        tokenizer=None, tokenizer_2=None, text_encoder=None, text_encoder_2=None, vae=vae(),
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=False,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip


@lru_cache
def sd3(dual=False):
    torch.manual_seed(0)
    return StableDiffusion3Pipeline(
        tokenizer=None, tokenizer_2=None, tokenizer_3=None, text_encoder=None, text_encoder_2=None,
        text_encoder_3=None, vae=vae(),
        transformer=SD3Transformer2DModel(
            sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64,
            pos_embed_max_size=24, **({"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if dual else {}),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def run(pipe, name, batch=1, guidance=1.0, fused=False, **options):
    """Latents of a pipeline, with embeddings of no text."""
    wide = 64 if isinstance(pipe, StableDiffusion3Pipeline) else 32
    random = torch.Generator().manual_seed(2)
    given = {
        "prompt_embeds": torch.randn(batch, 6, wide, generator=random),
        "pooled_prompt_embeds": torch.randn(batch, wide, generator=random),
    }
    scale = "guidance_scale"
    if guidance > 1:
        given |= {f"negative_{key}": -value for key, value in given.items()}
        scale = "true_cfg_scale" if isinstance(pipe, FluxPipeline) else scale
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    ralu.enable(pipe, name, fused=fused, **({"regions": columns} | options))
    try:
        return pipe(
            height=32, width=48, generator=generators, output_type="latent", **{scale: guidance}, **given
        ).images
    finally:
        ralu.disable(pipe)


def configurations():
    """Of every preset, family, granularity, region choice and ablation: {name: a run}."""
    runs = {}
    for name, granularity in product([*FLUX, *SD3[:2]], ("pixel", "token")):
        runs[f"sample {name} {granularity}"] = lambda n=name, g=granularity: sampled(n, granularity=g)
        runs[f"flux {name} {granularity}"] = lambda n=name, g=granularity: run(flux(), n, granularity=g)
        if name not in FLUX:
            del runs[f"flux {name} {granularity}"]
    for name, granularity, dual in product(SD3, ("pixel", "token"), (False, True)):
        kind = "sd3.5" if dual else "sd3"
        runs[f"{kind} {name} {granularity}"] = lambda n=name, g=granularity, d=dual: run(sd3(d), n, granularity=g)
    ablations = [
        {"kept_noise": "release"}, {"kept_noise": "release", "granularity": "token"},
        {"matching": "snr"}, {"matching": "off"}, {"matching": "off", "granularity": "token"},
        *({"upsampler": u, "matching": "snr", "granularity": g}
          for u in ("bilinear", "bicubic", "lanczos") for g in ("pixel", "token")),
        *({"ratio": ratio} for ratio in (0.0, 0.1, 0.5, 1.0)),
        {"regions": "gradient"}, {"regions": "change"}, {"regions": "grid"}, {"regions": "random"},
        {"regions": MASK}, {"seeds": [3, 4]}, {"seeds": 5},
        {"regions": ragged, "threshold": 0.5}, {"regions": ragged, "threshold": 0.5, "granularity": "token"},
        {"regions": "canny", "decode": decode}, {"regions": "canny", "decode": decode, "threshold": 0.05},
    ]  # fmt: skip
    for options in ablations:
        title = ",".join(f"{key}={getattr(value, '__name__', 'mask' if value is MASK else value)}"
                         for key, value in options.items())  # fmt: skip
        runs[f"sample flux-5x {title}"] = lambda o=options: sampled("flux-5x", **o)
    for name in BASELINES:
        pipe = flux if "flux" in name else sd3
        runs[f"sample {name}"] = lambda n=name: sampled(n)
        runs[f"{'flux' if pipe is flux else 'sd3'} {name}"] = lambda n=name, p=pipe: run(p(), n, regions=None)
    shifts = PRESETS["flux-5x"].replace(shifts=(3.0, 3.0, 3.0))
    runs["sample shifts=3"] = lambda: sampled(shifts)
    runs["sample distilled shift=3"] = lambda: sampled(preset("distilled-4", shift=3.0))
    for batch, guidance in ((2, 1.0), (1, 3.0), (2, 3.0)):
        for fused in (False, True):
            title = f"batch={batch} guidance={guidance}{' fused' * fused}"
            runs[f"flux {title}"] = lambda b=batch, g=guidance, f=fused: run(flux(), "flux-5x", b, g, f)
            runs[f"sd3 {title}"] = lambda b=batch, g=guidance, f=fused: run(sd3(True), "sd3-2x", b, g, f)
    wanted = {"regions": ragged, "threshold": 0.5}
    runs["flux regions=change"] = lambda: run(flux(), "flux-5x", regions="change")
    runs["sd3 regions=change"] = lambda: run(sd3(True), "sd3-2x", 2, 3.0, regions="change")
    runs["flux ragged"] = lambda: run(flux(), "flux-5x", 2, **wanted)
    runs["flux ragged fused"] = lambda: run(flux(), "flux-5x", 2, fused=True, **wanted)
    runs["sd3 ragged fused"] = lambda: run(sd3(True), "sd3-2x", 2, 3.0, fused=True, **wanted)
    runs["flux upsampler=lanczos"] = lambda: run(flux(), "flux-5x", upsampler="lanczos", matching="snr")
    runs["sd3 upsampler=bilinear"] = lambda: run(sd3(False), "sd3-3x", upsampler="bilinear", matching="snr")
    return runs


def digest(latents):
    """Mean, deviation and sixteen of the values."""
    values = latents.double().flatten()
    picked = values[:: max(1, len(values) // 16)][:16]
    return [round(v, 6) for v in (values.mean().item(), values.std().item(), *picked.tolist())]


RUNS = configurations()


@pytest.mark.parametrize("name", RUNS)
def test_values_are_those_recorded(name):
    recorded = json.loads(RECORD.read_text())[name]
    torch.testing.assert_close(torch.tensor(digest(RUNS[name]())), torch.tensor(recorded), rtol=1e-3, atol=1e-3)


def test_every_record_has_its_run():
    assert len(RUNS) >= 60 and json.loads(RECORD.read_text()).keys() == RUNS.keys()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--bits", action="store_true")
    args = parser.parse_args()
    torch.set_grad_enabled(False)

    def bits(latents):
        return hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()

    values = {name: (bits if args.bits else digest)(make()) for name, make in RUNS.items()}
    args.file.write_text("{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in values.items()) + "\n}\n")
