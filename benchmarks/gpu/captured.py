"""Whether CUDA graphs of a transformer's calls give what the calls give: smoke.py's checks of `ralu.graphs`."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import TINY, Model, flux_call, transformer

import ralu
from ralu.graphs import Graphs


def same(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """Compare results, and say how: the same kernels need not choose the same order of sums."""
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
    return "bit for bit" if torch.equal(actual, expected) else "up to rounding"


@torch.no_grad()
def steps(device: torch.device, fused: bool) -> str:
    """Compare calls of a tiny FLUX with other inputs than those of the capture."""
    model = transformer("flux-dev", device, **TINY)
    if fused:
        ralu.fuse(model)
    calls = [flux_call(model, 8, 16, device) for _ in range(3)]
    expected = [model(**call).sample for call in calls]
    Graphs.put_into(model)
    found = [same(model(**call).sample, wanted) for _ in range(2) for call, wanted in zip(calls, expected, strict=True)]
    (call,) = vars(model)["forward"].calls.values()
    assert call is not None, "nothing was captured"
    return found[-1]


@torch.no_grad()
def uncaptured(device: torch.device) -> str:
    """Compare calls that wait for the device, and so cannot be captured, and draw random numbers after the attempt."""
    model = transformer("flux-dev", device, **TINY)
    call = flux_call(model, 8, 16, device)
    expected = model(**call).sample
    stock = model.proj_out.forward
    model.proj_out.forward = lambda x: stock(x) * float(x.isfinite().all())
    Graphs.put_into(model)
    found = [same(model(**call).sample, expected) for _ in range(3)]
    assert "forward" not in vars(model), "it was captured"
    assert torch.randn(8, device=device).isfinite().all()
    return found[-1]


def images(device: torch.device, pixels: int = 256) -> str:
    """Compare the latents of two images through all stages, of which the second replays what the first captured."""
    model = Model("mini-flux", pixels, device)
    call = model.call(2) | {"output_type": "latent"}
    calls = [call | {name: call[name][k : k + 1] for name in ("prompt", "generator")} for k in (0, 1)]

    def made(**options):
        ralu.enable(model.pipe, "flux-7x", **options)
        for call in calls:
            call["generator"][0].manual_seed(7)
        return [model.pipe(**call).images for call in calls]

    expected, actual = made(), made(graphs=True)
    captured = vars(model.pipe.transformer)["forward"].calls
    assert len(captured) == 3 and all(captured.values()), "not every stage was captured"
    return [same(a, b) for a, b in zip(actual, expected, strict=True)][-1]
