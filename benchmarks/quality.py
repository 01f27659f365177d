"""How well RALU keeps the embedded model's images, at what cost, and what each of its choices is worth.

For captions of the training set with fixed seeds, each method's images are compared with the training images and with
the first method's images of the same captions and seeds:

score       share of images whose nearest training image (L2 over PCA latents, in pixel units) is the caption's
distance    mean L2 distance to the caption's training image, in pixel units
frechet     Frechet distance to the first method's images: mean and deviation of each latent channel as features
edge_error  mean of |edge energy / edge energy of the first method's image - 1|; energy: mean Sobel gradient of luma
blockiness  mean absolute horizontal difference across 8-pixel block borders over elsewhere: grid artefacts raise it
drift       root mean square of latent minus the first method's; only what stays at full resolution follows its path
tflop       transformer work for one image, counted from the operators that ran, attention included
seconds     for one image, of the fastest batch

The score has Wilson's 95% interval, the others a standard error (_se) by leaving out a sixteenth of the captions in
turn. Frechet distances are taken seed by seed and averaged; the row "NAME, other seeds" compares the first method's
images of one seed with those of the next, which is what chance alone does.

    python benchmarks/quality.py [--model mini-sd3] [--curves] [--captions 152] [--seeds 0 1] [--methods METHOD ...]

With --curves the methods are every accelerator, alone and with RALU, each at several strengths, and the file is
pareto-MODEL.csv. --autocast samples in bfloat16, latents between the steps included, as pipelines do on GPUs.

Latents are kept in --cache and sampled once: an interrupted run goes on, and another table or --grid costs seconds.
"""

import argparse
import csv
import math
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import cv2
import diffusers
import numpy as np
import scipy.linalg
import torch
from record import RESULTS, device_name, instructions, provenance, transformer_tflop
from search import best
from tqdm import tqdm

import ralu
from ralu.families import family_of
from ralu.figures import Row, grid
from ralu.method import Method
from ralu.mini import PROMPTS
from ralu.mini.train import CAPTIONS, GUIDANCE, PatchPCA, pictures
from ralu.options import CHOICES
from ralu.schedule import Schedule, two_resolutions

SIZE, TEXT_TOKENS = 256, 32


def scorers(preset: str) -> list[str]:
    """List the preset with every way to choose regions of images made from text; the first is the preset as it is."""
    return [str(Method.parse(f"{preset}(regions={name})")) for name in CHOICES["regions"] if name != "mask"]


# Methods as `ralu.method` has them, or a name of SCHEDULES.
METHODS = {
    "mini-flux": [
        "stock-50(solver=ab2)", "stock-50", "stock-28", "stock-10", "stock-7", "stock-5", "stock-10(solver=ab2)",
        "stock-5(solver=ab2)", "bottleneck-flux-7x", "speed-flux-7x", "flux-7x", "flux-7x(solver=ab2)", "3+3-pixels",
        *scorers("flux-5x"),
        *(f"flux-5x({options})" for options in (
            "solver=ab2", "solver=ab2-limited", "upsampler=pixels", "granularity=token", "matching=off",
        )),
    ],
    "mini-schnell": ["stock-4", "stock-2", "stock-1", "distilled-4", "distilled-4(granularity=token)"],
    "mini-sd3": [
        "stock-28(solver=ab2,spacing=trailing)", "stock-28", *(f"stock-{n}(spacing=trailing)" for n in (10, 7, 4)),
        "stock-4(solver=ab2-limited,spacing=trailing)", "bottleneck-sd3-3x", "speed-sd3-3x", "3+3-pixels", "3+5-pixels",
        "sd3-2x", *scorers("sd3-3x"),
        *(f"sd3-3x({options})" for options in (
            "solver=ab2", "solver=ab2-limited", "upsampler=pixels", "granularity=token"
        )),
    ],
}  # fmt: skip

PIXELS = [(1, 2), (2, 2), (3, 3), (3, 5), (5, 8)]  # steps at half and at full resolution
SCHEDULES: dict[str, tuple[Schedule, dict]] = {  # and the options that go with them
    f"{low}+{full}-pixels": (two_resolutions((low, full), 0.3, (3.0, 3.0), 0.1, upsampler="pixels"), {})
    for low, full in PIXELS
}
SEARCHED = [f"searched-{less}x" for less in (5, 7, 10, 14)]  # what search.py has found


def strengths(form: str, *values) -> list[str]:
    """Fill a number into a method's name."""
    return [str(Method.parse(form.format(value))) for value in values]


# What `--curves` draws, quality against work: lists of one method at several strengths. The first is the reference.
CURVES = {
    "mini-flux": {
        "converged": ["stock-50(solver=ab2)"],
        "fewer steps, Euler": strengths("stock-{}", 50, 28, 10, 7, 5, 3, 2),
        "fewer steps, ab2": strengths("stock-{}(solver=ab2)", 10, 7, 5, 3),
        "RALU": ["flux-5x", "flux-7x", "speedup-10"],
        "RALU, ab2": strengths("{}(solver=ab2)", "flux-5x", "flux-7x", "speedup-10"),
        "two stages, pixels": [f"{low}+{full}-pixels" for low, full in PIXELS],
        "searched": SEARCHED,
        "Bottleneck Sampling": ["bottleneck-flux-5x", "bottleneck-flux-7x"],
        "SPEED": ["speed-flux-5x", "speed-flux-7x"],
        "Delta-DiT": strengths("stock-28+delta-dit(interval={})", 2, 3, 5),
        "TeaCache": strengths("stock-28+teacache(delta={})", 0.2, 0.4, 0.8),
        "ToCa": strengths("stock-28+toca(interval={})", 2, 4, 7),
        "RAS": strengths("stock-28+ras(ratio={})", 0.5, 0.25, 0.1),
        "TaylorSeer": strengths("stock-28+taylorseer(interval={})", 2, 4, 6),
        "RALU + TaylorSeer": [
            "flux-5x+taylorseer(interval=3)", "flux-7x+taylorseer(interval=2,warmup=2)",
        ],
        "RALU + Delta-DiT": strengths("{}+delta-dit", "flux-5x", "flux-7x"),
        "RALU + ToCa": strengths("{}+toca(interval=3,warmup=2)", "flux-5x", "flux-7x"),
    },
    "mini-sd3": {
        "converged": ["stock-28(solver=ab2,spacing=trailing)"],
        "fewer steps, Euler": strengths("stock-{}(spacing=trailing)", 28, 10, 7, 5, 4, 3, 2),
        "fewer steps, ab2-limited": strengths("stock-{}(solver=ab2-limited,spacing=trailing)", 10, 7, 5, 4, 3),
        "RALU": ["sd3-2x", "sd3-3x", "speedup-6"],
        "two stages, pixels": [f"{low}+{full}-pixels" for low, full in PIXELS],
        "searched": SEARCHED,
        "Bottleneck Sampling": ["bottleneck-sd3-2x", "bottleneck-sd3-3x"],
        "SPEED": ["speed-sd3-2x", "speed-sd3-3x"],
        "Delta-DiT": strengths("stock-28+delta-dit(interval={})", 2, 3, 5),
        "TeaCache": strengths("stock-28+teacache(delta={})", 0.2, 0.4, 0.8),
        "ToCa": strengths("stock-28+toca(interval={})", 2, 4, 7),
        "RAS": strengths("stock-28+ras(ratio={})", 0.5, 0.25, 0.125),
        "TaylorSeer": strengths("stock-28+taylorseer(interval={})", 2, 4, 6),
        "RALU + TaylorSeer": ["sd3-2x+taylorseer(interval=3)", "sd3-3x+taylorseer(interval=2,warmup=2)"],
        "RALU + Delta-DiT": strengths("{}+delta-dit", "sd3-2x", "sd3-3x"),
    },
}  # fmt: skip


def prepare(pipe, method: str) -> int:
    """Switch the pipeline to a method; returns the number of steps to ask for.

    TeaCache has the model's own polynomial, which `ralu calibrate teacache` has fitted, unless the method names one.
    """
    ralu.disable(pipe)
    if method in SCHEDULES:
        schedule, options = SCHEDULES[method]
        ralu.enable(pipe, schedule, **options)
        return 50
    parsed = Method.parse(method)
    if isinstance(parsed.cache, ralu.TeaCache) and parsed.cache.coefficients == "auto":
        fitted = RESULTS / f"teacache-mini-{family_of(pipe).name}.json"
        parsed = replace(parsed, cache=replace(parsed.cache, coefficients=str(fitted)))
    if parsed.speedup:
        schedule = ralu.schedule_for(parsed.speedup, pipe, height=SIZE, width=SIZE, text_tokens=TEXT_TOKENS)
        ralu.enable(pipe, schedule, cache=parsed.cache, **parsed.options.given())
    elif parsed.preset or parsed.cache or parsed.options.given():
        ralu.enable(pipe, parsed)
    return parsed.steps or 50


def sample(pipe, captions: list[str], seeds: list[int], steps: int) -> torch.Tensor:
    """Sample clean latents, (B, 16, 32, 32)."""
    sd3 = isinstance(pipe, diffusers.StableDiffusion3Pipeline)
    latents = pipe(
        captions, height=SIZE, width=SIZE, num_inference_steps=steps, max_sequence_length=TEXT_TOKENS,
        output_type="latent", generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **({"guidance_scale": GUIDANCE} if sd3 else {}),
    ).images  # fmt: skip
    return latents if sd3 else pipe._unpack_latents(latents, SIZE, SIZE, pipe.vae_scale_factor)


# ---- measures ----


def features(latents: torch.Tensor) -> np.ndarray:
    """Compute mean and deviation of every channel: (N, 16, h, w) -> (N, 32)."""
    return torch.cat([latents.mean((2, 3)), latents.std((2, 3))], dim=1).double().numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the distance of the normals with the samples' moments: |m - n|² + tr(S + T - 2·(S·T)^(1/2))."""
    s, t = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(s @ t).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root))


def edge_energy(images: torch.Tensor) -> np.ndarray:
    """Compute the mean Sobel gradient of every image's luma, (N, 3, H, W) in [-1, 1] -> (N,)."""
    luma = np.einsum("nchw,c->nhw", images.clamp(-1, 1).numpy(), np.array([0.299, 0.587, 0.114], np.float32))
    return np.array([np.hypot(cv2.Sobel(x, cv2.CV_32F, 1, 0), cv2.Sobel(x, cv2.CV_32F, 0, 1)).mean() for x in luma])


def blockiness(images: torch.Tensor) -> np.ndarray:
    """Compute mean differences (across borders of 8-pixel blocks, elsewhere) of every image, (N, 2)."""
    steps = images.diff(dim=-1).abs().mean(dim=(1, 2))
    border = torch.arange(1, images.shape[-1]) % 8 == 0
    return torch.stack([steps[:, border].mean(1), steps[:, ~border].mean(1)], dim=1).double().numpy()


def jackknife(statistic, captions: int, blocks: int = 16) -> tuple[float, float]:
    """Compute a statistic of a choice of captions (bool, (captions,)) for all of them, and its standard error."""
    block = np.arange(captions) * blocks // captions
    left_out = np.array([statistic(block != i) for i in range(blocks)])
    error = math.sqrt((blocks - 1) / blocks * ((left_out - left_out.mean()) ** 2).sum())
    return statistic(np.ones(captions, dtype=bool)), error


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """Compute Wilson's 95% interval of a share."""
    z, p = 1.96, hits / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


# ---- the table ----


def sampled(pipe, method: str, captions: list[int], seed: int, batch: int, cache: Path, commit: str) -> dict:
    """Sample and measure, or load, images of captions by number: what is kept of one method and one seed.

    latents:     (N, 16, 32, 32).
    edge_energy, blockiness: of the decoded images, in float32.
    tflop, seconds: work and time for one image. commit: of the code that sampled.
    """
    file = cache / f"{method}-{len(captions)}-{seed}.pt"
    found = torch.load(file, weights_only=False) if file.exists() else {}
    if not found:
        steps, latents, seconds = prepare(pipe, method), [], []
        for i in tqdm(range(0, len(captions), batch), desc=f"{method}, seed {seed}"):
            seeds = [1000 * seed + k for k in range(i, min(i + batch, len(captions)))]
            start = time.perf_counter()
            latents.append(sample(pipe, [CAPTIONS[k] for k in captions[i : i + batch]], seeds, steps))
            seconds.append((time.perf_counter() - start) / len(seeds))
        # With a threshold and with TeaCache the work differs from image to image.
        varied = "threshold" in method or "teacache" in method
        counted = [CAPTIONS[k] for k in captions[:: max(1, len(captions) // 16)][: 16 if varied else 1]]
        tflop = transformer_tflop(
            pipe.transformer, lambda: [sample(pipe, [caption], [i], steps) for i, caption in enumerate(counted)]
        ) / len(counted)
        found = {"latents": torch.cat(latents), "tflop": tflop, "seconds": min(seconds), "commit": commit}
    if "edge_energy" not in found:
        images = decoded(pipe.vae, found["latents"])
        found |= {"edge_energy": edge_energy(images), "blockiness": blockiness(images)}
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(found, file)
    return found


def decoded(vae, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents (N, 16, 32, 32) to images (N, 3, 256, 256), in float32 however they were sampled."""
    with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
        parts = latents.float().div(vae.config.scaling_factor).split(16)
        return torch.cat([vae.decode(part).sample for part in parts])


class Images:
    """What the measures need of a method's images, seeds first: (seeds, captions, ...)."""

    def __init__(self, runs: list[dict], pca: PatchPCA, training: torch.Tensor, captions: list[int]):
        self.latents = torch.stack([run["latents"] for run in runs]).float()
        shape = self.latents.shape[:2]
        unwhitened = (self.latents.flatten(3) * pca.std[:, None].float()).flatten(0, 1).flatten(1)
        distances, wanted = torch.cdist(unwhitened, training), torch.tensor(captions).repeat(shape[0])
        self.hits = (distances.argmin(1) == wanted).view(shape).numpy()
        self.distance = distances.gather(1, wanted[:, None]).view(shape).double().numpy()
        self.features = features(self.latents.flatten(0, 1)).reshape(*shape, -1)
        self.edge_energy = np.stack([run["edge_energy"] for run in runs])
        self.blockiness = np.stack([run["blockiness"] for run in runs])


def follows(method: str) -> bool:
    """Say whether a method follows the stock run's path from noise to image, which a change of stage leaves."""
    return method not in SCHEDULES and Method.parse(method).preset is None


def measures(images: Images, reference: Images, captions: int, drifts: bool = False) -> dict:
    """Measure a method's images against the first method's, `drifts` too if asked; returns the columns of its row."""

    def frechet_to(mask):
        pairs = zip(images.features, reference.features, strict=True)
        return float(np.mean([frechet(a[mask], b[mask]) for a, b in pairs]))

    low, high = wilson_interval(int(images.hits.sum()), images.hits.size)
    columns = {"score": f"{images.hits.mean():.3f}", "score_low": f"{low:.3f}", "score_high": f"{high:.3f}"}
    errors = np.abs(images.edge_energy / reference.edge_energy - 1)
    for name, statistic, digits in (
        ("distance", lambda mask: images.distance[:, mask].mean(), 2),
        ("frechet", frechet_to, 3),
        ("edge_error", lambda mask: errors[:, mask].mean(), 3),
        ("blockiness", lambda mask: np.divide(*images.blockiness[:, mask].mean((0, 1))), 3),
    ):
        value, error = jackknife(statistic, captions)
        columns |= {name: f"{round(value, digits) + 0.0:.{digits}f}", f"{name}_se": f"{error:.{digits}f}"}
    drift = (images.latents - reference.latents).square().mean().sqrt().item()
    return columns | {"drift": f"{drift:.3f}" if drifts else ""}


def show(pipe, methods: list[str], runs: list[dict], captions: list[int]):
    """Draw the same few images of every method, a row a method, with what sets the rows apart."""
    columns = [i for i, k in enumerate(captions) if CAPTIONS[k] in PROMPTS]
    rows = []
    for method, run in zip(methods, runs, strict=True):
        images = decoded(pipe.vae, run["latents"][columns])
        parsed = None if method in SCHEDULES else Method.parse(method)
        name, options = (parsed.spatial, parsed.options.given()) if parsed else (method, {})
        note = [f"{option}={value}" for option, value in options.items()]
        rows.append(Row(name, pipe.image_processor.postprocess(images, output_type="pil"), note))
    return grid([CAPTIONS[captions[i]] for i in columns], rows, "The embedded model, the same seeds in every row.")


def main():
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=METHODS, default="mini-flux")
    parser.add_argument("--captions", type=int, default=len(CAPTIONS), help="how many, evenly spread over the set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="image i is sampled with 1000·seed + i")
    parser.add_argument("--methods", nargs="+", help="the first is what the others are compared with")
    parser.add_argument("--curves", action="store_true", help="quality against work: all accelerators at all strengths")
    parser.add_argument("--autocast", action="store_true", help="sample in bfloat16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="where the training images are kept")
    parser.add_argument("--cache", type=Path, help="where the sampled latents are kept (default: runs/quality-MODEL)")
    parser.add_argument("--grid", type=Path, help="save a few images of every method here, and make no table")
    parser.add_argument("--output", type=Path, help="(default: benchmarks/results/quality-MODEL.csv)")
    args = parser.parse_args()
    if args.curves and args.model not in CURVES:
        parser.error(f"--curves are of {' and '.join(CURVES)}")
    SCHEDULES.update(best(args.model))
    curves = CURVES[args.model] if args.curves else {"": METHODS[args.model]}
    if args.methods:
        curves = {"": args.methods}
    methods = [method for curve in curves.values() for method in curve]
    output = args.output or Path(f"benchmarks/results/{'pareto' if args.curves else 'quality'}-{args.model}.csv")
    cache = args.cache or Path(f"runs/quality-{args.model}{'-autocast' * args.autocast}")

    images = pictures(args.data)
    pca = PatchPCA(images)
    # Unwhitened, the latent distance is the distance between the images' PCA reconstructions.
    training = (pca.encode(images).flatten(2) * pca.std[:, None].float()).flatten(1)
    chosen = np.linspace(0, len(CAPTIONS), args.captions, endpoint=False).astype(int).tolist()
    pipe = ralu.mini_pipeline(args.model, dtype=torch.float32)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)

    device = torch.device("cpu")
    commit = provenance(device)["commit"]
    common = {
        "captions": args.captions, "seeds": " ".join(map(str, args.seeds)),
        "device": device_name(device), "isa": instructions(device), "threads": torch.get_num_threads(),
        "dtype": "autocast to bfloat16" if args.autocast else "float32",
        "torch": torch.__version__, "diffusers": diffusers.__version__, "date": date.today().isoformat(),
    }  # fmt: skip

    def runs_of(method: str, seeds: list[int]) -> list[dict]:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.autocast):
            return [sampled(pipe, method, chosen, seed, args.batch, cache, commit) for seed in seeds]

    if args.grid:
        show(pipe, methods, [runs_of(method, args.seeds[:1])[0] for method in methods], chosen).save(args.grid)
        return
    rows = []
    for curve, method in ((curve, method) for curve, members in curves.items() for method in members):
        runs = runs_of(method, args.seeds)
        sampled_images = Images(runs, pca, training, chosen)
        if not rows:
            reference, work = sampled_images, runs[0]["tflop"]
        tflop = float(np.mean([run["tflop"] for run in runs]))
        cost = {"tflop": f"{tflop:.4f}", "flop_ratio": f"{work / tflop:.2f}"}
        cost |= {"seconds": f"{min(run['seconds'] for run in runs):.3f}", "commit": runs[0]["commit"]}
        measured = measures(sampled_images, reference, args.captions, follows(method))
        rows.append({"curve": curve, "method": method} | measured | cost | common)
        if len(rows) == 1 and len(runs) > 1:
            turned = Images(runs[1:] + runs[:1], pca, training, chosen)
            measured = measures(turned, reference, args.captions)
            rows.append({"curve": curve, "method": f"{method}, other seeds"} | measured | cost | common)
        print({key: rows[-1][key] for key in ("method", "score", "distance", "frechet", "edge_error", "blockiness")})
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
