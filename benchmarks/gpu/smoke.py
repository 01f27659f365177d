"""First light on a GPU: every operation against its reference, on streams, in graphs, at the edges. One line each.

    python benchmarks/gpu/smoke.py [--device cpu]

On a CPU, to see that all of it runs: small shapes, no streams or graphs, and Triton under TRITON_INTERPRET=1 alone.
"""

import argparse
import sys
import time
import traceback
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from cases import tensors

import ralu_kernels as rk
from ralu_kernels import _backend, attention
from ralu_kernels._checks import DTYPES

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cuda")
DEVICE = torch.device(parser.parse_args().device)
CUDA = DEVICE.type == "cuda"
BF16 = torch.bfloat16
NOISE = 0.9, 0.4, 0.02  # scale, noise_scale, c
UNIT = {torch.float32: 4e-6, torch.float16: 2e-3, BF16: 1.6e-2}  # what one unit of a value may be off by
# An image of 1024 pixels; less on a CPU, where an interpreted kernel takes its time.
GRID, LATENT = ((32, 32), (2, 16, 64, 64)) if CUDA else ((2, 2), (2, 4, 4, 6))
KINDS = DTYPES if CUDA else (BF16,)
FAILED = []
torch.manual_seed(0)


def check(name, f, *args, **kwargs):
    """Run a check and print its verdict; what it returns is a note."""
    start = time.perf_counter()
    try:
        note = f(*args, **kwargs) or ""
        if CUDA:
            torch.cuda.synchronize()
        verdict = "ok  "
    except Exception as error:
        FAILED.append(name)
        verdict, note = "FAIL", " ".join("".join(traceback.format_exception_only(error)).split())[:300]
        traceback.print_exc()
    print(f"{verdict} {time.perf_counter() - start:6.2f}s {name} {note}", flush=True)
    if any(sign in note for sign in ("illegal memory", "misaligned", "launch failure")):
        raise SystemExit("the context is lost; stopping")


def agree(actual, expected) -> float:
    """Return the largest error, as a share of what is allowed. Raise where it is more, or where integers differ."""
    worst = 0.0
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
        if not b.is_floating_point():
            assert torch.equal(a, b), f"{(a != b).sum().item()} of {b.numel()} integers differ"
        elif b.numel():
            assert a.isfinite().all(), f"{(~a.isfinite()).sum().item()} are not finite"
            error = (a.double() - b.double()).abs() / (UNIT[b.dtype] * (1 + b.double().abs()))
            worst = max(worst, error.max().item())
    assert worst <= 1, f"{worst:.1f} times what is allowed"
    return worst


def compare(f, *args, backend, **kwargs) -> str:
    """Compare an operation's backend with the reference."""
    return f"{agree(f(*args, **kwargs, backend=backend), f(*args, **kwargs, backend='reference')):.2f} of the tolerance"


def available(*names):
    """List the backends that run on the device."""
    return [name for name in names if _backend._ABSENT[name](DEVICE) is None]


def rand(*shape, dtype=BF16):
    """Draw normals on the device."""
    return torch.randn(shape, device=DEVICE).to(dtype)


def random_scores(batch, n):
    """Draw scores (B, n) on the device."""
    return torch.rand(batch, n, device=DEVICE)


# ---- the transitions ----


def upsample(backend, dtype, shape=LATENT, layout=lambda x: x):
    """Compare `upsample_renoise`."""
    seed = torch.arange(shape[0], device=DEVICE)
    return compare(rk.upsample_renoise, layout(rand(*shape, dtype=dtype)), *NOISE, seed, backend=backend)


def tokens(backend, dtype, batch=2, side=GRID, channels=64, **rules):
    """Compare `plan_tokens` and the transitions of tokens."""
    scores = random_scores(batch, side[0] * side[1])
    compare(rk.plan_tokens, scores, side, threshold=0.7, backend=backend)
    compare(rk.plan_tokens, scores, side, ratio=0.25, backend=backend)
    plan = rk.plan_tokens(scores, side, ratio=0.25, backend="reference")
    low, seed = rand(*scores.shape, channels, dtype=dtype), torch.tensor([7, -(2**63)], device=DEVICE)[:batch]
    compare(rk.upsample_selected, low, plan, *NOISE, seed, backend=backend, **rules)
    mixed = rk.upsample_selected(low, plan, *NOISE, seed, backend="reference", **rules)
    return compare(rk.upsample_remaining, mixed, plan, *NOISE, seed, backend=backend, **rules)


def over_two_gigabytes(backend):
    """Compare the last sample of an output whose offsets do not fit into 32 bits."""
    x = rand(20, 16, 1024, 1024)
    last = rk.upsample_renoise(x, 1.0, 0.0, 0.0, 1, backend=backend)[-1]
    agree(last, F.interpolate(x[-1:], scale_factor=2)[0])


def edges():
    """Compare `canny`, again and again, at several thresholds."""
    coarse = torch.rand(3, 1, *(32, 32) if CUDA else (8, 8), device=DEVICE)
    images = F.interpolate(coarse, scale_factor=32 if CUDA else 8, mode="bicubic").clamp(0, 1)[:, 0]
    images = images.mul(255).to(torch.uint8)
    count = 0
    for low, high in ((100, 200), (20, 400), (0, 0)):
        expected = rk.canny(images, low, high, backend="reference")
        count += expected.count_nonzero().item()
        for _ in range(5):  # the GPU's thread blocks race
            assert torch.equal(rk.canny(images, low, high, backend="native"), expected)
    assert count
    return f"{count} pixels"


for backend in available("triton", "native"):
    for dtype in KINDS:
        check(f"upsample {backend} {dtype}", upsample, backend, dtype)
        check(f"plan and tokens {backend} {dtype}", tokens, backend, dtype)
    check(f"upsample odd {backend}", upsample, backend, BF16, (3, 3, 5, 7))
    check(f"upsample transposed {backend}", upsample, backend, BF16, (2, 4, 4, 6), lambda x: x.transpose(2, 3))
    check(f"upsample nothing {backend}", upsample, backend, BF16, (0, 4, 8, 8))
    check(f"many samples {backend}", upsample, backend, torch.float32, (70_000 if CUDA else 3, 1, 1, 2))
    check(f"tokens by the other rules {backend}", tokens, backend, BF16, granularity="token", kept_noise="release")
    check(f"tokens of 12 channels {backend}", tokens, backend, BF16, channels=12)
    check(f"one token {backend}", tokens, backend, torch.float32, batch=1, side=(1, 1), channels=4)
    if CUDA:
        check(f"2^31 bytes and more {backend}", over_two_gigabytes, backend)
if available("native"):
    check("edges", edges)


# ---- the operations inside the blocks ----


def block_operations(dtype, backend):
    """Compare all operations of a block with both kinds of layout and rotation."""
    batch, image, text, heads, size = (2, 200, 40, 24, 128) if CUDA else (2, 4, 2, 2, 16)
    width = heads * size
    x, y = rand(2, batch, image, width, dtype=dtype)
    gate, shift, scale = rand(batch, 3 * width, dtype=dtype).chunk(3, 1)
    compare(rk.modulate, x, shift, scale, backend=backend)
    compare(rk.gated_add, x, gate, y, backend=backend)
    compare(rk.gated_add_modulate, x, gate, y, shift, scale, backend=backend)
    compare(rk.concat_gelu, x, torch.cat([y] * 4, 2), backend=backend)
    weights = [1 + 0.1 * rand(size, dtype=dtype) for _ in range(2)]
    streams = [rk.QKV(*rand(batch, n, 3 * width, dtype=dtype).chunk(3, 2), *weights) for n in (text, image)]
    angle = torch.rand(batch, text + image, size, device=DEVICE)
    mask = torch.rand(batch, text + image, device=DEVICE) < 0.8
    mask[:, 0] = True
    for attended in (None, mask):
        layout = rk.packed_layout(attended, batch, text + image, DEVICE)
        for rotary in (None, (angle[0].cos(), angle[0].sin()), (angle.cos(), angle.sin())):
            note = compare(rk.pack_qkv, streams, layout, heads, rotary=rotary, backend=backend)
        values = rand(layout.total, heads, size, dtype=dtype)
        compare(rk.unpack, values, layout, (text, image), backend=backend)
    return note


def attend(dtype, lengths):
    """Compare every attention backend that is here with float64 attention, sequence by sequence."""
    ends = F.pad(torch.tensor(lengths, device=DEVICE).cumsum(0), (1, 0)).int()
    q, k, v = (rand(sum(lengths), 4, 128, dtype=dtype) for _ in range(3))
    parts = zip(*(x.double().transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
    expected = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 1).transpose(0, 1)
    layout = ends, ends, max(lengths), max(lengths)
    names = [name for name in attention.BACKENDS if attention._why_not(name, q) is None]
    for name in ("auto", *names):
        error = (rk.varlen_attention(q, k, v, *layout, backend=name).double() - expected).abs().max().item()
        assert error < (1e-4 if dtype == torch.float32 else 2e-2), (name, error)
    return f"auto is {attention._pick(q, k, v, *layout, None, 'auto')}, of {names}"


for backend, dtype in product(available("triton"), KINDS):
    check(f"block operations {backend} {dtype}", block_operations, dtype, backend)
for dtype, lengths in product(KINDS, ([300, 300, 300], [300, 17, 1])):
    check(f"attention {dtype} {lengths}", attend, dtype, lengths)


# ---- what only a GPU has ----


def on_a_stream():
    """Check that what waits behind a long kernel of another stream is not seen early."""
    x, stream = torch.zeros(1, 16, 64, 64, device=DEVICE), torch.cuda.Stream()
    for backend in available("triton", "native"):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            out = rk.upsample_renoise(x + 3.0, 1.0, 0.0, 0.0, 1, backend=backend)
        stream.synchronize()
        assert (out == 3).all(), backend


def transitions(scores: Tensor, low: Tensor, seed: Tensor | int, backend: str):
    """Plan, and run both transitions of tokens."""
    plan = rk.plan_tokens(scores, (32, 32), ratio=0.25, backend=backend)
    mixed = rk.upsample_selected(low, plan, *NOISE, seed, backend=backend)
    return plan.inverse, mixed, rk.upsample_remaining(mixed, plan, *NOISE, seed, backend=backend)


def in_a_graph():
    """Check that a CUDA graph of the transitions works on inputs that were changed since."""
    scores, low, seed = random_scores(1, 1024), rand(1, 1024, 64), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    image = (torch.rand(1, 512, 512, device=DEVICE) * 255).to(torch.uint8)

    def work(backend):
        density = rk.edge_density(image, 16, backend=backend) if backend == "native" else scores
        return *transitions(scores, low, seed, backend), density

    for backend in available("triton", "native"):
        work(backend)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = work(backend)
        for changed, value in ((scores, torch.rand_like(scores)), (low, torch.randn_like(low)), (image, 255 - image)):
            changed.copy_(value)
        graph.replay()
        assert all(map(torch.equal, out, work(backend))), backend


def without_waiting():
    """Check that the transitions do not wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for backend in available("triton", "native"):
            transitions(random_scores(2, 1024), rand(2, 1024, 64), 1, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiled():
    """Check an operation under `torch.compile` in one graph."""

    def f(x):
        return rk.modulate(x * 2, x[:, 0], x[:, 1]) + 1

    x = rand(2, 64, 256)
    torch.testing.assert_close(torch.compile(f, fullgraph=True)(x), f(x))


if CUDA:
    check("the current stream is used", on_a_stream)
    check("CUDA graphs of the transitions", in_a_graph)
    check("nothing waits for the GPU", without_waiting)
    check("torch.compile", compiled)
    from captured import images, steps, uncaptured  # which import diffusers

    for fused in (False, True):
        check(f"CUDA graphs of steps, {'fused' if fused else 'stock'}", steps, DEVICE, fused)
    check("CUDA graphs of stages", images, DEVICE)
    check("a capture that fails", uncaptured, DEVICE)  # last: what it leaves behind is to be seen
print(f"SMOKE {'FAILED: ' + ', '.join(FAILED) if FAILED else 'passed'}, with {available('triton', 'native')}")
raise SystemExit(bool(FAILED))
