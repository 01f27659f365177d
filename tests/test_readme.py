"""The README's examples run as they stand there."""

import re
from pathlib import Path

import tiny
import torch
from PIL import Image

import ralu

README = (Path(__file__).parents[1] / "README.md").read_text()


def example(word: str) -> str:
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if word in block]
    return code


def test_kernels_in_a_plain_loop():
    """With a point target the exact velocity is known, and the loop must end there."""
    scope = {"velocity": lambda x, sigma: (x - (1 - sigma) * 0.7) / sigma - 0.7}
    exec(example("upsample_renoise"), scope)
    assert scope["x"].shape == (2, 16, 64, 64)
    torch.testing.assert_close(scope["x"], torch.full((2, 16, 64, 64), 0.7), rtol=0, atol=1e-5)


def test_sample():
    scope = {
        "model": lambda x, sigma, positions: (x - (1 - sigma) * 0.7) / sigma - 0.7,
        "noise": torch.randn(1, 64, 16),
        "grid": (8, 8),
    }
    exec(example("ralu.sample"), scope)
    torch.testing.assert_close(scope["tokens"], torch.full((1, 64, 16), 0.7), rtol=0, atol=1e-5)


def test_budgets():
    pipe, seen = tiny.flux(), []
    for line in example("speedup=6").splitlines():
        exec(line, {"pipe": pipe, "ralu": ralu})
        seen.append(pipe.scheduler.schedule)
    assert seen == [ralu.schedule_for(6, pipe, height=h, width=w) for h, w in ((256, 256), (512, 768))]


def test_regions(tmp_path, monkeypatch):
    """Each line's choice of tokens, in an image of 8x8 low tokens whose left half is masked."""
    monkeypatch.chdir(tmp_path)
    mask = torch.zeros(64, 64)
    mask[:, :32] = 1
    Image.fromarray((mask * 255).byte().numpy()).save("face-mask.png")
    pipe, plans = tiny.flux(), []

    def keep(pipe, step, timestep, kwargs):
        if pipe.scheduler.layout and pipe.scheduler.layout.plan:
            plans.append(pipe.scheduler.layout.plan)
        return kwargs

    scope = {"pipe": pipe, "ralu": ralu, "mask": mask}
    for line in example("face-mask").splitlines():
        exec(line, scope)
        if "enable" in line:
            tiny.generate(pipe, callback_on_step_end=keep)
    chosen = [plan.source[plan.child == 0] for plan in plans[::5]]
    left = torch.arange(64).view(8, 8)[:, :4].flatten()
    assert [len(tokens) for tokens in chosen] == [19, 32, 12, 12, 12]
    assert torch.isin(chosen[0], left).all() and torch.equal(chosen[1], left)
