"""Train the embedded model: a small, complete FLUX pipeline that paints 3D emoji at 128 and 256 pixels.

Nobody needs this to use RALU; it is how `ralu/mini/flux` was made, all of stock diffusers and transformers classes.

Pictures: npm package @lobehub/fluent-emoji-3d 1.1.0 (Microsoft Fluent emoji, MIT licence).
Names:    npm package emojibase-data 17.0.0 (MIT licence).

Stages, each resumed from `--out` when it was interrupted:
  vae          a fixed whitened PCA of 8x8 pixel blocks is the latent space; a decoder and an encoder are fitted
  text         both text encoders learn to tell the captions apart and what each picture roughly looks like
  transformer  flow matching on packed latents, the text encoders frozen
  export       half-precision pipeline folder for `FluxPipeline.from_pretrained`
"""

import argparse
import json
import math
import random
import subprocess
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from ralu.schedule import shifted

SOURCES = {"pictures": "@lobehub/fluent-emoji-3d@1.1.0", "names": "emojibase-data@17.0.0"}

# The captions are the emoji's own names: animals, plants and food that look different from each other.
CAPTIONS = """
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
""".replace("\n", " ")
CAPTIONS = [name.strip() for name in CAPTIONS.split(";")]
TEMPLATES = ["{}", "{}", "a {}", "the {}", "a picture of a {}", "a 3d {}", "{} emoji"]
TEMPLATES += ["a small {} on a white background"]

LATENT_CHANNELS, PATCH = 16, 8
VAE_SCALE = 3.0  # AutoencoderTiny squashes latents with 3·tanh(x/3): keep unit-variance latents in its linear part


def pictures(cache: Path) -> torch.Tensor:
    """The training pictures, (len(CAPTIONS), 3, 256, 256) float in [-1, 1] on white, downloaded once into `cache`."""
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
    """Bicubic with antialias, clamped to [-1, 1]."""
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
        blocks = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2).double()
        latents = ((blocks - self.mean) @ self.basis / self.std).float()
        return latents.transpose(1, 2).unflatten(2, (images.shape[2] // PATCH, images.shape[3] // PATCH))


# ---- tokenizers ----


def clip_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """Byte-level BPE; the special tokens come last, as in CLIP's own vocabulary, where pooling takes the largest id."""
    bos, eos = "<|startoftext|>", "<|endoftext|>"
    stock = CLIPTokenizer().backend_tokenizer
    tok = Tokenizer(models.BPE(unk_token=eos, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tok.normalizer, tok.pre_tokenizer = stock.normalizer, stock.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, show_progress=False,
        continuing_subword_prefix="", end_of_word_suffix="</w>",
    )  # fmt: skip
    tok.train_from_iterator(texts, trainer)
    state = json.loads(tok.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    tokens += [letter + "</w>" for letter in alphabet if letter + "</w>" not in state["vocab"]] + [bos, eos]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=77)


def t5_tokenizer(texts: list[str]) -> T5TokenizerFast:
    """Unigram: every word of the captions is a piece, anything else falls apart into letters."""
    words = Counter(word for text in texts for word in text.split())
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'-▁"
    pieces = [("▁" + word, math.log(count / words.total())) for word, count in words.most_common()]
    pieces += [(letter, -20.0) for letter in letters]
    fixed = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -30.0)]  # ids 0, 1, 2 as T5 has them
    return T5TokenizerFast(vocab=fixed + pieces, extra_ids=0, model_max_length=512)


# ---- models ----


def build_vae() -> AutoencoderTiny:
    return AutoencoderTiny(
        latent_channels=LATENT_CHANNELS, scaling_factor=VAE_SCALE, shift_factor=0.0,
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
    )  # fmt: skip


def build_text(texts: list[str], saved: Path):
    tok2 = t5_tokenizer(texts)
    if not saved.exists():  # learning a byte-pair vocabulary twice does not give the same one
        clip_tokenizer(texts).save_pretrained(saved)
    tok = CLIPTokenizer.from_pretrained(saved)
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tok), hidden_size=128, intermediate_size=256, num_attention_heads=4, num_hidden_layers=2,
        projection_dim=128, max_position_embeddings=77, hidden_act="gelu",
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
    ))  # fmt: skip
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(tok2), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    ))  # fmt: skip
    return tok, tok2, clip, t5


def build_transformer() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS, num_layers=3, num_single_layers=6, num_attention_heads=4,
        attention_head_dim=64, joint_attention_dim=128, pooled_projection_dim=128,
        axes_dims_rope=(16, 24, 24), guidance_embeds=False,
    )  # fmt: skip
    for name, module in model.named_modules():  # start every block as the identity and the prediction at zero
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear", "proj_out")) and (
            "single_transformer_blocks" not in name or not name.endswith("proj_out")
        ):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


# ---- training ----


def train_vae(vae: AutoencoderTiny, images: torch.Tensor, pca: PatchPCA, steps: int, device: str, out: Path):
    """Decoder from noisy PCA latents to pixels (L1 + L2 + gradient L1); encoder from pixels to PCA latents (L2)."""
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


class Captions:
    """Tokenised prompts: a random template around each name; index len(CAPTIONS) is the empty prompt."""

    def __init__(self, tok, tok2):
        self.tok, self.tok2 = tok, tok2

    def __call__(self, indices: list[int], length: int, device):
        texts = [random.choice(TEMPLATES).format(CAPTIONS[i]) if i < len(CAPTIONS) else "" for i in indices]
        # CLIP is causal and pooled at the end-of-text token, so its padding may stop at the longest prompt.
        clip = self.tok(texts, padding=True, return_tensors="pt").input_ids
        t5 = self.tok2(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        return clip.to(device), t5.to(device)


def text_length() -> int:
    """A user who forgets `max_sequence_length` gets 512 padded T5 tokens: show a few of those too."""
    return 512 if random.random() < 0.005 else random.choice((16, 24, 32, 32))


def train_text(clip, t5, captions: Captions, images: torch.Tensor, steps: int, device: str, out: Path):
    """Each encoder alone must name the picture (cross-entropy) and know its 12x12 thumbnail (L2), by linear heads."""
    state, empty = out / "text.pt", len(CAPTIONS)
    encoders = torch.nn.ModuleDict({"text_encoder": clip, "text_encoder_2": t5}).to(device)
    if state.exists():
        encoders.load_state_dict(torch.load(state, map_location=device))
        return encoders.eval()
    thumbnails = torch.cat([resize(images, 12).flatten(1), torch.zeros(1, 432)]).to(device)
    heads = torch.nn.ModuleList(torch.nn.Linear(128, empty + 1 + 432) for _ in range(2)).to(device)
    parameters = [*encoders.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    bar = tqdm(range(steps), desc="text", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50, (steps - step) / (0.4 * steps))
        label = torch.randint(empty + 1, (96,))
        clip_ids, t5_ids = captions(label.tolist(), text_length(), device)
        label = label.to(device)
        loss = 0.0
        for head, feature in zip(heads, (clip(clip_ids).pooler_output, t5(t5_ids)[0].mean(1)), strict=True):
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


def train_transformer(transformer, encoders, captions, latents, weight, steps, device, out: Path, decay, preview):
    """Flow matching on eps - x0, alternating 8 pictures of 256 px and 24 of 128 px.

    Noise levels are drawn as the sampler visits them, evenly and then shifted by 3: what a caption looks like is
    learned where there is almost nothing but noise. Latent channels weigh as much as they show (`weight`, by channel).
    A tenth of the captions is dropped for classifier-free guidance. `preview` is called with the averaged weights in
    place whenever a checkpoint is written.
    """
    transformer.to(device).train()
    parameters = list(transformer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ema = [p.detach().clone() for p in parameters]
    state, start = out / "transformer.pt", 0
    if state.exists():
        saved = torch.load(state, map_location=device)
        transformer.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch._foreach_copy_(ema, saved["ema"])
        start = saved["step"]
        torch.manual_seed(start), random.seed(start)  # not the same captions and noise again
    ids = {
        size: FluxPipeline._prepare_latent_image_ids(1, size // 16, size // 16, device, torch.float32)
        for size in latents
    }
    packed = {
        size: FluxPipeline._pack_latents(x, len(x), LATENT_CHANNELS, size // 8, size // 8).to(device)
        for size, x in latents.items()
    }
    running, clock = {}, time.time()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="transformer", mininterval=5)
    for step in bar:
        remaining = (steps - step) / (decay * steps)  # constant, then down to zero over the last `decay` of the steps
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 200, remaining)
        size, count = ((256, 8), (128, 24))[step % 2]
        pick = torch.randint(len(CAPTIONS), (count,))
        length = text_length()
        shown = torch.where(torch.rand(count) < 0.1, len(CAPTIONS), pick)
        clip_ids, t5_ids = captions(shown.tolist(), length, device)
        with torch.no_grad():
            pooled = encoders["text_encoder"](clip_ids).pooler_output
            text = encoders["text_encoder_2"](t5_ids)[0]
        x = packed[size][pick]
        noise = torch.randn_like(x)
        sigma = shifted(torch.rand(count, device=device), 3.0)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            v = transformer(
                hidden_states=torch.lerp(x, noise, sigma[:, None, None]), timestep=sigma, guidance=None,
                pooled_projections=pooled, encoder_hidden_states=text,
                txt_ids=torch.zeros(length, 3, device=device), img_ids=ids[size], return_dict=False,
            )[0]  # fmt: skip
        loss = ((v.float() - noise + x).square() * weight).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(ema, parameters, max(2e-3, 1 / (step + 2)))
        running[size] = 0.98 * running.get(size, loss.item()) + 0.02 * loss.item()
        if step % 20 == 0:
            bar.set_postfix({str(k): f"{r:.3f}" for k, r in sorted(running.items())})
        if time.time() - clock > 300 or step + 1 == steps:
            clock = time.time()
            saved = {"model": transformer.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema}
            torch.save(saved | {"step": step + 1}, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)
            with open(out / "log.jsonl", "a") as log:
                print(json.dumps({"step": step + 1, "loss": running}), file=log)
            online = [p.detach().clone() for p in parameters]
            torch._foreach_copy_([p.data for p in parameters], ema)
            transformer.eval()
            preview(step + 1)
            transformer.train()
            torch._foreach_copy_([p.data for p in parameters], online)
    torch._foreach_copy_([p.data for p in parameters], ema)
    return transformer.eval()


def assemble(parts, vae, tok, tok2) -> FluxPipeline:
    """A stock pipeline. Its shift at 256 px (256 tokens) is what FLUX.1-dev has at 1024 px (4096 tokens)."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True,
        base_shift=0.5, max_shift=1.15, base_image_seq_len=16, max_image_seq_len=256,
    )  # fmt: skip
    return FluxPipeline(scheduler=scheduler, vae=vae, tokenizer=tok, tokenizer_2=tok2, **parts)


def sheet(pipe: FluxPipeline, steps: int, columns: int = 8, rows: int = 4) -> Image.Image:
    """A contact sheet of evenly spread captions, for the eye."""
    chosen = CAPTIONS[:: len(CAPTIONS) // (columns * rows)][: columns * rows]
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        chosen, height=256, width=256, num_inference_steps=steps, max_sequence_length=32,
        generator=[torch.Generator().manual_seed(i) for i in range(len(chosen))],
    ).images  # fmt: skip
    paper = Image.new("RGB", (columns * 128, rows * 128))
    for i, image in enumerate(images):
        paper.paste(image.resize((128, 128)), (i % columns * 128, i // columns * 128))
    return paper


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/mini-flux"), help="checkpoints, previews, the result")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="where the pictures are downloaded to")
    parser.add_argument("--steps", type=int, default=9000, help="transformer steps")
    parser.add_argument("--decay", type=float, default=0.4, help="share of the steps in which the rate falls to 0")
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=["vae", "transformer"], help="train one part alone, without the export")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    random.seed(0)

    images = pictures(args.data)
    pca, vae = PatchPCA(images), build_vae()
    if args.only != "transformer":
        train_vae(vae, images, pca, args.vae_steps, args.device, args.out)
    if args.only == "vae":
        return
    tok, tok2, clip, t5 = build_text(
        [template.format(name) for name in CAPTIONS for template in TEMPLATES], args.out / "tokenizer"
    )
    captions, transformer = Captions(tok, tok2), build_transformer()
    encoders = train_text(clip, t5, captions, images, 400, args.device, args.out)
    parts = {"transformer": transformer, "text_encoder": clip, "text_encoder_2": t5}
    print({name: f"{sum(p.numel() for p in m.parameters()) / 1e6:.2f} M" for name, m in [*parts.items(), ("vae", vae)]})

    def preview(step):
        if (args.out / "vae.pt").exists():
            vae.load_state_dict(torch.load(args.out / "vae.pt", map_location=args.device)["model"])
            sheet(assemble(parts, vae.eval(), tok, tok2), steps=10).save(args.out / f"preview-{step:06d}.png")

    latents = {size: pca.encode(resize(images, size)) for size in (256, 128)}
    weight = (pca.std / pca.std.mean()).float().repeat_interleave(4).to(args.device)  # a packed token has 4 pixels
    train_transformer(
        transformer, encoders, captions, latents, weight, args.steps, args.device, args.out, args.decay, preview
    )
    if args.only is None:
        pipe = assemble(parts, vae, tok, tok2).to("cpu")
        # Diffusers loads half-precision weights as float32 unless told otherwise, transformers as they are: with small
        # float32 text encoders, `from_pretrained` without a dtype gives a pipeline of one dtype.
        pipe.transformer.half(), pipe.vae.half()
        pipe.save_pretrained(args.out / "flux")
        print("saved", args.out / "flux")


if __name__ == "__main__":
    main()
