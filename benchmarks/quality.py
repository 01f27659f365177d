"""How well RALU keeps the embedded model's pictures, and at what cost.

For captions of the training set with fixed seeds, each method's pictures are compared with all training pictures:

score       share of pictures whose nearest training picture (L2 over PCA latents, in pixel units) is the caption's own
distance    mean L2 distance to the caption's own picture, in pixel units
blockiness  mean absolute horizontal difference across 8-pixel block borders over elsewhere: grid artefacts raise it
tflop       transformer work for one picture, counted from the operators that ran, attention included

    python benchmarks/quality.py [--family flux|sd3] [--captions 64] [--methods stock-50 flux-5x ...]
"""

import argparse
import csv
import math
import platform
import subprocess
from datetime import date
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import ralu
from ralu.mini.train import CAPTIONS, PatchPCA, pictures

SIZE, TEXT_TOKENS = 256, 32
# A method is "stock-STEPS", a preset, or a preset with options of `ralu.enable` behind a slash.
METHODS = {
    "flux": ["stock-50", "stock-10", "stock-7"]
    + [preset + options for preset in ("flux-5x", "flux-7x") for options in ("", "/granularity=token")],
    "sd3": ["stock-28", "stock-10", "sd3-2x", "sd3-3x"],
}


def prepare(pipe, method: str) -> int:
    """Switch the pipeline to a method; returns the number of steps to ask for."""
    ralu.disable(pipe)
    name, _, options = method.partition("/")
    if name.startswith("stock-"):
        return int(name.removeprefix("stock-"))
    chosen = dict(option.split("=") for option in options.split(",") if option)
    numbers = ("ratio", "threshold")
    ralu.enable(pipe, name, **{key: float(value) if key in numbers else value for key, value in chosen.items()})
    return 50


def paint(pipe, captions: list[str], seeds: list[int], steps: int) -> torch.Tensor:
    """Clean latents, (B, 16, 32, 32)."""
    sd3 = isinstance(pipe, diffusers.StableDiffusion3Pipeline)
    latents = pipe(
        captions, height=SIZE, width=SIZE, num_inference_steps=steps, max_sequence_length=TEXT_TOKENS,
        output_type="latent", generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **({"guidance_scale": 2.0} if sd3 else {}),
    ).images  # fmt: skip
    return latents if sd3 else pipe._unpack_latents(latents, SIZE, SIZE, pipe.vae_scale_factor)


def count_tflop(pipe, steps: int) -> float:
    """Transformer work for one picture. Attention in its plain form, which the counter knows on every device."""
    counter, total = FlopCounterMode(display=False), 0

    def before(*_):
        counter.__enter__()

    def after(*_):
        nonlocal total
        counter.__exit__(None, None, None)
        total += counter.get_total_flops()

    hooks = [pipe.transformer.register_forward_pre_hook(before), pipe.transformer.register_forward_hook(after)]
    with sdpa_kernel(SDPBackend.MATH):
        paint(pipe, CAPTIONS[:1], [0], steps)
    for hook in hooks:
        hook.remove()
    return total / 1e12


def blockiness(images: torch.Tensor) -> float:
    steps = images.diff(dim=-1).abs().mean(dim=(0, 1, 2))
    border = torch.arange(1, images.shape[-1]) % 8 == 0
    return (steps[border].mean() / steps[~border].mean()).item()


def interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z, p = 1.96, hits / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=METHODS, default="flux", help="which embedded model")
    parser.add_argument("--captions", type=int, default=64, help="how many, evenly spread over the training set")
    parser.add_argument("--seed", type=int, default=0, help="picture i is painted with seed + i")
    parser.add_argument("--methods", nargs="+", help="the first is what the others' work is compared with")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="where the training pictures are kept")
    parser.add_argument("--output", type=Path, help="(default: benchmarks/results/quality-FAMILY.csv)")
    args = parser.parse_args()
    methods = args.methods or METHODS[args.family]
    output = args.output or Path(f"benchmarks/results/quality-{args.family}.csv")

    images = pictures(args.data)
    pca = PatchPCA(images)
    # Unwhitened, the latent distance is the distance between the pictures' PCA reconstructions.
    known = pca.encode(images).flatten(2) * pca.std[:, None].float()
    chosen = np.linspace(0, len(CAPTIONS), args.captions, endpoint=False).astype(int).tolist()
    pipe = diffusers.DiffusionPipeline.from_pretrained(ralu.mini_path(args.family), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    common = {
        "captions": args.captions, "seed": args.seed, "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "diffusers": diffusers.__version__,
        "commit": commit, "date": date.today().isoformat(),
    }  # fmt: skip
    rows = []
    for method in methods:
        steps = prepare(pipe, method)
        tflop, latents = count_tflop(pipe, steps), []
        for i in tqdm(range(0, len(chosen), args.batch), desc=method):
            seeds = [args.seed + k for k in range(i, min(i + args.batch, len(chosen)))]
            latents.append(paint(pipe, [CAPTIONS[k] for k in chosen[i : i + args.batch]], seeds, steps))
        latents = torch.cat(latents)
        made = latents.flatten(2) * pca.std[:, None].float()
        distances = torch.cdist(made.flatten(1), known.flatten(1))
        hits = int((distances.argmin(1) == torch.tensor(chosen)).sum())
        own = distances[torch.arange(len(chosen)), chosen]
        with torch.no_grad():
            decoded = torch.cat([pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample for z in latents.split(16)])
        low, high = interval(hits, len(chosen))
        rows.append({
            "method": method,
            "score": f"{hits / len(chosen):.3f}", "score_low": f"{low:.3f}", "score_high": f"{high:.3f}",
            "distance": f"{own.mean():.2f}", "distance_se": f"{own.std() / math.sqrt(len(chosen)):.2f}",
            "blockiness": f"{blockiness(decoded):.3f}", "tflop": f"{tflop:.4f}",
            "flop_ratio": f"{float(rows[0]['tflop']) / tflop if rows else 1:.2f}",
            **common,
        })  # fmt: skip
        print({key: rows[-1][key] for key in ("method", "score", "distance", "blockiness", "flop_ratio")})
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
