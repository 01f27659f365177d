"""The README's samplers run as they stand there."""

import re
from pathlib import Path

import torch

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
