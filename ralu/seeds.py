"""A seed for each sample of a run, where none was given. Needs PyTorch alone."""

import torch
from torch import Tensor


def seeds_of(noise: Tensor) -> Tensor:
    """Derive a 64-bit seed for each sample from the signs of its starting noise (B, ...): int64 (B,).

    Diffusers gives a scheduler's `step` no generator, and a sample's noise says all that its generator would. Rounding
    keeps signs, so noise in bfloat16, or that differs in its last bits, gives the same seed. Integer arithmetic alone:
    the seed depends neither on the batch nor on the device.
    """
    negative = noise.detach().flatten(1).signbit()
    keys = _mixed(torch.arange(1, negative.shape[1] + 1, device=noise.device) * -0x61C8864680B583EB)
    return _mixed((keys * negative).sum(dim=1))


def _mixed(bits: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser, a bijection in which each bit depends on all 64: int64 of any shape."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits = (bits ^ _shifted_right(bits, shift)) * factor
    return bits ^ _shifted_right(bits, 31)


def _shifted_right(bits: Tensor, count: int) -> Tensor:
    """Shift right with zeros from the left, where >> would repeat the sign."""
    return bits >> count & (1 << 64 - count) - 1
