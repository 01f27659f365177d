"""Distil the embedded FLUX model to four steps, as FLUX.1-schnell was distilled from FLUX.1's base model.

Nobody needs this to use RALU; it is how mini-schnell was made, for the preset `distilled-4`:

    python -m ralu.mini.distill --steps STEPS
    python -m ralu.mini.pack mini-schnell runs/mini-schnell/mini-schnell

Consistency distillation (Song et al., ICML 2023): the clean image predicted at a noise level must be the one
predicted one Euler step of the teacher further on. What learns is a LoRA, the teacher is the model without it. The LoRA
is what is saved, for `load_lora_weights` of a pipeline with FLUX.1-schnell's scheduler.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from tqdm import tqdm

from ralu.mini import mini_path
from ralu.mini.train import (
    CAPTIONS,
    FAMILIES,
    PatchPCA,
    encode,
    pictures,
    prompts,
    resize,
    sheet,
    text_length,
    velocity,
)
from ralu.schedule import shifted

LEVELS = 24  # Euler steps the teacher would take from noise to image
TURNS = (256, 4), (128, 12)  # side in pixels, and images in a batch, of the training steps in turn


def targets(transformer: torch.nn.Module) -> list[str]:
    """List the names of the blocks' linear layers, but for those that only modulate."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in linear if "transformer_blocks" in name and "norm" not in name]


def distil(pipe: FluxPipeline, latents: dict[int, torch.Tensor], weight: torch.Tensor, steps: int, out: Path):
    """Train the pipeline's LoRA on latents {pixels: float32 (N, 16, h, w)} and leave the averaged weights in place.

    The loss is the Pseudo-Huber distance of two predictions over a whole image, so that no outlier dominates a batch.
    weight: (16, 1, 1), of each channel in the loss. out: folder for checkpoints and previews; training resumes from it.
    """
    transformer, family = pipe.transformer.train(), FAMILIES["mini-flux"]
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=4e-4, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    ema = [p.detach().clone() for p in parameters]
    state, start = out / "lora.pt", 0
    if state.exists():
        saved = torch.load(state)
        set_peft_model_state_dict(transformer, saved["lora"])
        optimizer.load_state_dict(saved["optimizer"])
        torch._foreach_copy_(ema, saved["ema"])
        start = saved["step"]
        torch.manual_seed(start), random.seed(start)
    running: dict[int, float] = {}
    clock = time.time()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="distil", mininterval=5)

    def predict(x, sigma, text):
        return x - sigma[:, None, None, None] * velocity(transformer, x, sigma, *text)

    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = 4e-4 * min(1, (step + 1) / 50, (steps - step) / (0.5 * steps))
        size, count = TURNS[step % len(TURNS)]
        pick = torch.randint(len(CAPTIONS), (count,))
        x = latents[size][pick]
        u = torch.rand(count)
        sigma, following = shifted(u, 2.0), shifted((u - 1 / LEVELS).clamp_min(0), 2.0)
        noisy = torch.lerp(x, torch.randn_like(x), sigma[:, None, None, None])
        with torch.no_grad():
            text = encode(pipe, prompts(pick.tolist()), text_length(family.longest_text))
            transformer.disable_adapters()
            clean = predict(noisy, sigma, text)
            transformer.enable_adapters()
            share = (following / sigma)[:, None, None, None]
            target = predict(torch.lerp(clean, noisy, share), following, text)
        difference = ((predict(noisy, sigma, text) - target).square() * weight).flatten(1).mean(1)
        loss = ((difference + 1e-3).sqrt()).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], max(5e-3, 1 / (step + 2)))
        running[size] = 0.98 * running.get(size, loss.item()) + 0.02 * loss.item()
        if step % 20 == 0:
            bar.set_postfix({str(k): f"{r:.4f}" for k, r in sorted(running.items())})
        if time.time() - clock > 300 or step + 1 == steps:
            clock = time.time()
            saved = {"lora": get_peft_model_state_dict(transformer), "optimizer": optimizer.state_dict()}
            torch.save(saved | {"ema": ema, "step": step + 1}, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)
            with open(out / "log.jsonl", "a") as log:
                print(json.dumps({"step": step + 1, "loss": running}), file=log)
            online = [p.detach().clone() for p in parameters]
            torch._foreach_copy_([p.data for p in parameters], ema)
            sheet(pipe, steps=4).save(out / f"preview-{step + 1:06d}.png")
            torch._foreach_copy_([p.data for p in parameters], online)
    torch._foreach_copy_([p.data for p in parameters], ema)


def main():
    """Distil the embedded FLUX model and save the LoRA with its scheduler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/mini-schnell"), help="checkpoints, previews, the result")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="where the images are downloaded to")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rank", type=int, default=32)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    random.seed(0)

    images = pictures(args.data)
    pca = PatchPCA(images)
    pipe = FluxPipeline.from_pretrained(mini_path())
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # FLUX.1-schnell's
    pipe.transformer.requires_grad_(False)
    layers = targets(pipe.transformer)
    pipe.transformer.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=layers))
    latents = {size: pca.encode(resize(images, size)) for size in (256, 128)}
    weight = (pca.std / pca.std.mean()).float().view(-1, 1, 1)
    distil(pipe, latents, weight, args.steps, args.out)
    saved = args.out / "mini-schnell"
    pipe.save_lora_weights(saved, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    pipe.scheduler.save_pretrained(saved / "scheduler")
    print(f"saved; to pack it: python -m ralu.mini.pack mini-schnell {saved}")


if __name__ == "__main__":
    main()
