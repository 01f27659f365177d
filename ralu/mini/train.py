"""Train an embedded model: a small, complete FLUX or SD3 pipeline that generates 3D emoji at 128 and 256 pixels.

Nobody needs this to use RALU; it is how mini-sd3 was made, and mini-flux begun (docs/models.md tells how it went on),
all of stock diffusers and transformers classes:

    python -m ralu.mini.train --model mini-flux --steps STEPS
    python -m ralu.mini.train --model mini-flux --minutes MINUTES         # the embedded model's transformer further
    python -m ralu.mini.pack mini-flux runs/mini-flux/mini-flux

Images: npm package @lobehub/fluent-emoji-3d 1.1.0 (Microsoft Fluent emoji, MIT licence).
Names:  npm package emojibase-data 17.0.0 (MIT licence).

Stages, each resumed from `--out` when it was interrupted:
  vae          a fixed whitened PCA of 8x8 pixel blocks is the latent space; a decoder and an encoder are fitted
               (FLUX alone: SD3 takes the embedded FLUX model's)
  text         the text encoders learn to tell the captions apart and what each image roughly looks like
  transformer  flow matching on latents, the text encoders frozen
  export       pipeline folder for `from_pretrained`, which `ralu.mini.pack` packs into the repository
"""

import argparse
import json
import math
import random
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DiffusionPipeline, FluxPipeline, SD3Transformer2DModel
from PIL import Image
from tqdm import tqdm
from transformers import CLIPTokenizer, T5EncoderModel

from ralu.mini import mini_path, mini_pipeline
from ralu.mini.build import (
    LATENT_CHANNELS,
    VAE_SCALE,
    blank,
    build_flux,
    build_sd3,
    build_vae,
    clip_tokenizer,
    t5_tokenizer,
)
from ralu.schedule import shifted

SOURCES = {"pictures": "@lobehub/fluent-emoji-3d@1.1.0", "names": "emojibase-data@17.0.0"}

# The captions are the emoji's own names: animals, plants and food that look different from each other.
_LISTED = """
monkey face; monkey; gorilla; orangutan; dog face; dog; poodle; wolf; fox; raccoon; cat face; cat; black cat; lion;
tiger face; tiger; horse face; moose; unicorn; zebra; deer; cow face; cow; pig face; pig; ram; goat; camel; llama;
giraffe; elephant; rhinoceros; hippopotamus; mouse face; mouse; hamster; rabbit face; rabbit; chipmunk; beaver;
hedgehog; bat; bear; polar bear; koala; panda; sloth; otter; kangaroo; turkey; chicken; rooster; hatching chick; baby
chick; penguin; dove; eagle; duck; swan; owl; flamingo; peacock; parrot; frog; crocodile; turtle; snake; dragon;
T-Rex; spouting whale; dolphin; seal; fish; tropical fish; blowfish; shark; octopus; spiral shell; jellyfish; crab;
lobster; squid; snail; butterfly; bug; honeybee; lady beetle; spider; cherry blossom; lotus; rose; hibiscus;
sunflower; tulip; seedling; potted plant; evergreen tree; deciduous tree; palm tree; cactus; four leaf clover; maple
leaf; mushroom; grapes; watermelon; tangerine; lemon; banana; pineapple; red apple; green apple; pear; peach;
cherries; strawberry; blueberries; kiwi fruit; tomato; coconut; avocado; eggplant; carrot; ear of corn; hot pepper;
broccoli; onion; bread; croissant; pretzel; bagel; pancakes; cheese wedge; bacon; hamburger; french fries; pizza; hot
dog; sandwich; taco; popcorn; sushi; soft ice cream; doughnut; cookie; birthday cake; shortcake; cupcake; lollipop;
teapot; wine glass; tropical drink; bubble tea
"""
CAPTIONS = [name.strip() for name in _LISTED.replace("\n", " ").split(";")]
TEMPLATES = ["{}", "{}", "a {}", "the {}", "a picture of a {}", "a 3d {}", "{} emoji"]
TEMPLATES += ["a small {} on a white background"]

PATCH = 8  # pixels to a latent pixel
GUIDANCE = 2.0  # of the previews; without a meaning for FLUX, whose embedded model has no guidance


def pictures(cache: Path) -> torch.Tensor:
    """Return the images, float32 (len(CAPTIONS), 3, 256, 256) in [-1, 1] on white, downloaded once into `cache`."""
    saved = cache / "pictures.pt"
    if not saved.exists():
        cache.mkdir(parents=True, exist_ok=True)
        for name, package in SOURCES.items():
            if not (cache / name).exists():
                command = ["npm", "pack", package, "--silent"]
                packed = subprocess.run(command, cwd=cache, check=True, capture_output=True, text=True).stdout
                with tarfile.open(cache / packed.strip().splitlines()[-1]) as tar:
                    tar.extractall(cache / name, filter="data")
        names = json.loads((cache / "names/package/en/data.json").read_text())
        code = {entry["label"]: entry["hexcode"].lower() for entry in names}
        images = []
        for caption in CAPTIONS:
            stem = code[caption].replace("-fe0f", "")
            file = next((cache / "pictures/package/assets").glob(f"{stem}*.webp"))
            rgba = Image.open(file).convert("RGBA")
            images.append(np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")))
        torch.save(torch.from_numpy(np.stack(images)), saved)
    return torch.load(saved).permute(0, 3, 1, 2).float() / 127.5 - 1


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize images (B, C, H, W) to size x size pixels: bicubic with antialias, clamped to [-1, 1]."""
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)


class PatchPCA:
    """Whitened PCA of 8x8x3 pixel blocks: the fixed latent space, (B,3,H,W) -> (B,16,H/8,W/8) with unit variance."""

    def __init__(self, images: torch.Tensor):
        blocks = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH * PATCH).double()
        self.mean = blocks.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((blocks - self.mean).T))
        self.std = values[-LATENT_CHANNELS:].flip(0).sqrt()
        self.basis = vectors[:, -LATENT_CHANNELS:].flip(1)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Project images (B, 3, H, W) to latents, float32 (B, 16, H/8, W/8)."""
        blocks = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2).double()
        latents = ((blocks - self.mean) @ self.basis / self.std).float()
        return latents.transpose(1, 2).unflatten(2, (images.shape[2] // PATCH, images.shape[3] // PATCH))


@dataclass(frozen=True)
class Family:
    """What sets the training of the two families apart.

    build:        makes the untrained pipeline of a VAE and two tokenizers.
    clip_tokens:  length that prompts are padded to for CLIP.
    longest_text: the pipeline's default number of T5 tokens.
    turns:        (side in pixels, images in a batch) of the training steps in turn.
    """

    build: Callable[..., DiffusionPipeline]
    clip_tokens: int
    longest_text: int
    turns: tuple[tuple[int, int], ...]


# SD3's transformer reads CLIP's tokens too, padding included, so short padding saves much.
FAMILIES = {
    "mini-flux": Family(build_flux, clip_tokens=77, longest_text=512, turns=((256, 8), (128, 24))),
    "mini-sd3": Family(build_sd3, clip_tokens=16, longest_text=256, turns=((256, 8), (128, 24), (256, 8))),
}


def encode(pipe: DiffusionPipeline, texts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode prompts as the pipeline does for its transformer: tokens (B, L, width) and pooled vectors (B, width)."""
    if isinstance(pipe, FluxPipeline):
        tokens, pooled, _ = pipe.encode_prompt(texts, None, max_sequence_length=length)
    else:
        tokens, _, pooled, _ = pipe.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    return tokens, pooled


def velocity(transformer: torch.nn.Module, x, sigma, tokens, pooled) -> torch.Tensor:
    """Predict d x / d sigma of latents x (B, 16, h, w) at noise levels sigma (B,), in the shape of x."""
    text = {"encoder_hidden_states": tokens, "pooled_projections": pooled, "return_dict": False}
    if isinstance(transformer, SD3Transformer2DModel):
        return transformer(x, timestep=1000 * sigma, **text)[0]
    packed = F.pixel_unshuffle(x, 2)
    h, w = packed.shape[2:]
    v = transformer(
        hidden_states=packed.flatten(2).transpose(1, 2), timestep=sigma, guidance=None,
        txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, h, w, x.device, torch.float32), **text,
    )[0]  # fmt: skip
    return F.pixel_shuffle(v.transpose(1, 2).unflatten(2, (h, w)), 2)


# ---- training ----


def train_vae(vae: AutoencoderTiny, images: torch.Tensor, pca: PatchPCA, steps: int, device: str, out: Path):
    """Fit the decoder from noisy latents to pixels (L1 + L2 + gradient L1), and the encoder to invert it (L2)."""
    state, start = out / "vae.pt", 0
    vae.to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    if state.exists():
        saved = torch.load(state, map_location=device)
        vae.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    sizes = {256: images, 128: resize(images, 128)}
    latents = {size: pca.encode(x) for size, x in sizes.items()}
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="vae", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-5
        size = 256 if random.random() < 0.7 else 128
        pick = torch.randint(len(images), (12,))
        row, col = (random.randrange(0, (size - 96) // 8 + 1) for _ in range(2))
        x = sizes[size][pick][..., row * 8 : row * 8 + 96, col * 8 : col * 8 + 96].to(device)
        z = latents[size][pick][..., row : row + 12, col : col + 12].to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            y = vae.decode((z + 0.05 * torch.randn_like(z)) / VAE_SCALE).sample.float()
            fitted = vae.encode(x[:4]).latents.float() * VAE_SCALE if step % 2 else None
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (-1, -2))
        loss = (y - x).abs().mean() + (y - x).square().mean() + edges
        if fitted is not None:
            loss = loss + 0.1 * (fitted - z[:4]).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(dB=f"{-10 * math.log10((y - x).square().mean().item() / 4):.2f}")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            torch.save({"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, state)
    return vae.eval()


def prompts(indices: list[int]) -> list[str]:
    """Put a random template around each caption; index len(CAPTIONS) is the empty prompt."""
    return [random.choice(TEMPLATES).format(CAPTIONS[i]) if i < len(CAPTIONS) else "" for i in indices]


def text_length(longest: int) -> int:
    """Draw a number of T5 tokens, seldom `longest`: that is what a caller without `max_sequence_length` gets."""
    return longest if random.random() < 0.005 else random.choice((16, 24, 32, 32))


def train_text(pipe: DiffusionPipeline, family: Family, images: torch.Tensor, steps: int, device: str, out: Path):
    """Train each encoder alone to name the image (cross-entropy) and its 12x12 thumbnail (L2), by linear heads.

    The heads read the pooled vectors and the mean of each kind of token that the transformer sees.
    """
    state, empty = out / "text.pt", len(CAPTIONS)
    names = [name for name in pipe.components if name.startswith("text_encoder")]
    encoders = torch.nn.ModuleDict({name: pipe.components[name] for name in names}).to(device)
    if state.exists():
        encoders.load_state_dict(torch.load(state, map_location=device))
        return encoders.eval()
    thumbnails = torch.cat([resize(images, 12).flatten(1), torch.zeros(1, 432)]).to(device)
    clips = [m.config.projection_dim for m in map(pipe.components.get, names) if not isinstance(m, T5EncoderModel)]

    def features(label, length):
        tokens, pooled = encode(pipe, prompts(label.tolist()), length)
        kinds = tokens.split([tokens.shape[1] - length, length], dim=1)  # FLUX shows its transformer no CLIP tokens
        return [*pooled.split(clips, dim=1), *(kind.mean(1) for kind in kinds if kind.shape[1])]

    widths = [feature.shape[1] for feature in features(torch.arange(1), 16)]
    heads = torch.nn.ModuleList(torch.nn.Linear(width, empty + 1 + 432) for width in widths).to(device)
    parameters = [*encoders.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    bar = tqdm(range(steps), desc="text", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50, (steps - step) / (0.4 * steps))
        label = torch.randint(empty + 1, (96,))
        shown = features(label, text_length(family.longest_text))
        label = label.to(device)
        loss: Any = 0.0
        for head, feature in zip(heads, shown, strict=True):
            name, thumbnail = head(feature).split((empty + 1, 432), dim=1)
            loss = loss + F.cross_entropy(name, label) + F.mse_loss(thumbnail, thumbnails[label])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    torch.save(encoders.state_dict(), state)
    return encoders.eval()


def optimizers(transformer: torch.nn.Module, further: bool) -> list[torch.optim.Optimizer]:
    """Make AdamW, and for further training Muon beside it, for the blocks' matrices."""
    named = list(transformer.named_parameters())
    muon = [p for name, p in named if further and p.ndim == 2 and "blocks" in name and "norm" not in name]
    rest = [p for _, p in named if all(p is not other for other in muon)]
    adam = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    if not muon:
        return [adam]
    return [torch.optim.Muon(muon, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), adam]


def train_transformer(pipe, family: Family, latents, weight, steps, minutes, device, out: Path, decay, preview):
    """Train by flow matching on eps - x0, on small batches of 256 and 128 px in turn (`family.turns`).

    Noise levels are drawn as the sampler visits them, evenly and then shifted by 3: what a caption looks like is
    learned where there is almost nothing but noise. Latent channels weigh as much as they show (`weight`, by channel).
    A tenth of the captions is dropped for classifier-free guidance. `preview` is called with the averaged weights in
    place at every fourth checkpoint. With `minutes` it ends by the clock, whatever `steps`, and trains on with Muon.
    """
    transformer = pipe.transformer.to(device).train()
    parameters = list(transformer.parameters())
    learners = optimizers(transformer, minutes is not None)
    peak, decay = (1e-3, decay) if minutes is None else (8e-4, 1.0)
    ema = [p.detach().clone() for p in parameters]
    state, start = out / "transformer.pt", 0
    if state.exists():
        saved = torch.load(state, map_location=device)
        transformer.load_state_dict(saved["model"])
        for learner, learned in zip(learners, saved["optimizers"], strict=True):
            learner.load_state_dict(learned)
        torch._foreach_copy_(ema, saved["ema"])
        start = saved["step"]
        torch.manual_seed(start), random.seed(start)  # not the same captions and noise again
    latents = {size: x.to(device) for size, x in latents.items()}
    running: dict[int, float] = {}

    def save(step: int, previewing: bool):
        saved = {"model": transformer.state_dict(), "optimizers": [learner.state_dict() for learner in learners]}
        torch.save(saved | {"ema": ema, "step": step}, state.with_suffix(".tmp"))
        state.with_suffix(".tmp").replace(state)
        with open(out / "log.jsonl", "a") as log:
            print(json.dumps({"step": step, "loss": running}), file=log)
        if previewing:
            online = [p.detach().clone() for p in parameters]
            torch._foreach_copy_([p.data for p in parameters], ema)
            preview(step)
            torch._foreach_copy_([p.data for p in parameters], online)

    begin = clock = time.time()
    checkpoints, bar = 0, tqdm(count(start), initial=start, desc="transformer", mininterval=5)
    for step in bar:
        done = step / steps if minutes is None else (time.time() - begin) / (60 * minutes)
        if done >= 1:
            save(step, previewing=True)
            break
        for group in (group for learner in learners for group in learner.param_groups):
            # Constant, then down to zero over the last `decay` of the way.
            group["lr"] = peak * min(1, (step + 1) / 200, (1 - done) / decay)
        size, number = family.turns[step % len(family.turns)]
        pick = torch.randint(len(CAPTIONS), (number,))
        shown = torch.where(torch.rand(number) < 0.1, len(CAPTIONS), pick)
        with torch.no_grad():
            text = encode(pipe, prompts(shown.tolist()), text_length(family.longest_text))
        x = latents[size][pick]
        noise = torch.randn_like(x)
        sigma = shifted(torch.rand(number, device=device), 3.0)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            v = velocity(transformer, torch.lerp(x, noise, sigma[:, None, None, None]), sigma, *text)
        loss = ((v.float() - noise + x).square() * weight).mean()
        for learner in learners:
            learner.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for learner in learners:
            learner.step()
        torch._foreach_lerp_(ema, parameters, max(2e-3, 1 / (step + 2)))
        running[size] = 0.98 * running.get(size, loss.item()) + 0.02 * loss.item()
        if step % 20 == 0:
            bar.set_postfix({str(k): f"{r:.3f}" for k, r in sorted(running.items())})
        if time.time() - clock > (300 if minutes is None else 60):
            clock, checkpoints = time.time(), checkpoints + 1
            save(step + 1, previewing=checkpoints % 4 == 0)
    torch._foreach_copy_([p.data for p in parameters], ema)


def sheet(pipe: DiffusionPipeline, steps: int, columns: int = 4, rows: int = 2, **call) -> Image.Image:
    """Generate a contact sheet of evenly spread captions. call: more arguments of the pipeline."""
    chosen = CAPTIONS[:: len(CAPTIONS) // (columns * rows)][: columns * rows]
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        chosen, height=256, width=256, num_inference_steps=steps, max_sequence_length=32,
        generator=[torch.Generator().manual_seed(i) for i in range(len(chosen))], **call,
    ).images  # fmt: skip
    paper = Image.new("RGB", (columns * 128, rows * 128))
    for i, image in enumerate(images):
        paper.paste(image.resize((128, 128)), (i % columns * 128, i // columns * 128))
    return paper


def afresh(args: argparse.Namespace, out: Path, images: torch.Tensor, pca: PatchPCA) -> DiffusionPipeline | None:
    """Build a pipeline and train what comes before its transformer; None where that was all that was asked for."""
    family, vae = FAMILIES[args.model], build_vae()
    if args.model == "mini-sd3":
        vae.load_state_dict(AutoencoderTiny.from_pretrained(mini_path() / "vae").state_dict())
    elif args.only != "transformer":
        train_vae(vae, images, pca, args.vae_steps, args.device, out)
    if args.only == "vae":
        return None
    texts = [template.format(name) for name in CAPTIONS for template in TEMPLATES]
    if not (out / "tokenizer").exists():  # learning a byte-pair vocabulary twice does not give the same one
        clip_tokenizer(texts, family.clip_tokens).save_pretrained(out / "tokenizer")
    pipe = family.build(vae, CLIPTokenizer.from_pretrained(out / "tokenizer"), t5_tokenizer(texts)).to(args.device)
    blank(pipe.transformer)
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    print({name: f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M" for name, module in modules.items()})
    train_text(pipe, family, images, 400, args.device, out)
    return pipe


def main(argv: list[str] | None = None):
    """Train an embedded model and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*FAMILIES], default="mini-flux")
    parser.add_argument("--out", type=Path, help="checkpoints, previews, the result (default: runs/MODEL)")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="where the images are downloaded to")
    parser.add_argument("--steps", type=int, default=9000, help="transformer steps")
    parser.add_argument("--minutes", type=float, help="train the embedded transformer, or --out's, further for so long")
    parser.add_argument("--decay", type=float, default=0.4, help="share of the steps in which the rate falls to 0")
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=["vae", "transformer"], help="train one part alone, without the export")
    args = parser.parse_args(argv)
    if args.model == "mini-sd3" and args.only == "vae":
        parser.error("--only vae: SD3 takes the embedded FLUX model's")
    further = args.minutes is not None
    if further and args.only:
        parser.error("--minutes trains the transformer alone, and exports it: give no --only")
    out = args.out or Path("runs", args.model + "-further" * further)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    random.seed(0)

    images = pictures(args.data)
    pca = PatchPCA(images)
    pipe: Any
    if further:
        pipe = mini_pipeline(args.model, dtype=torch.float32).to(args.device)
    elif (pipe := afresh(args, out, images, pca)) is None:
        return

    def preview(step):
        if (out / "vae.pt").exists():  # FLUX's decoder may be learning in another process meanwhile
            pipe.vae.load_state_dict(torch.load(out / "vae.pt", map_location=args.device)["model"])
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            sheet(pipe, steps=14, guidance_scale=GUIDANCE).save(out / f"preview-{step:06d}.png")

    latents = {size: pca.encode(resize(images, size)) for size in (256, 128)}
    weight = (pca.std / pca.std.mean()).float().view(-1, 1, 1).to(args.device)
    train_transformer(
        pipe, FAMILIES[args.model], latents, weight, args.steps, args.minutes, args.device, out, args.decay, preview
    )
    if args.only is None:
        (pipe.transformer if further else pipe).save_pretrained(out / args.model)
        print(f"saved; to pack it: python -m ralu.mini.pack {args.model} {out / args.model}")


if __name__ == "__main__":
    main()
