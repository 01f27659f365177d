"""Mixed-resolution token sequences: which low tokens become four high tokens, and the two moves between the stages."""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import reference
from ._backend import MAX_ELEMENTS, check, check_noise, check_values, register, resolve, seed_tensor

GRANULARITIES = ("pixel", "token")
CARRY_NOISES = ("exact", "release")


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """Where every token of a batch of mixed-resolution sequences comes from.

    The samples' sequences are concatenated ("packed"). Inside a sample low tokens stand in raster order, and a promoted
    one is replaced, in place, by its four children in row-major order.

    Attributes:
        grid: (h, w), the low grid; n = h * w.
        cu_seqlens: int32 (B + 1,), first packed row of every sample; the last entry is the total.
        max_seqlen: the longest sequence.
        source: int32 (total,), index of the low token inside its sample.
        child: int32 (total,), -1 for a carried low token, else di * 2 + dj for child (di, dj).
        inverse: int32 (B, 4n), the packed row that covers each token of the high grid, in raster order over (2h, 2w):
            its own row if its parent was promoted, else its parent's row.
        positions: float32 (total, 2), (row, column) in low tokens; child (di, dj) is at its parent + (di, dj) / 2.
    """

    grid: tuple[int, int]
    cu_seqlens: Tensor
    max_seqlen: int
    source: Tensor
    child: Tensor
    inverse: Tensor
    positions: Tensor

    @property
    def batch_size(self) -> int:
        return self.inverse.shape[0]

    @property
    def lengths(self) -> Tensor:
        """int32 (B,), tokens of every sample."""
        return self.cu_seqlens.diff()

    def to(self, device: torch.device | str) -> "TokenPlan":
        values = (getattr(self, field.name) for field in fields(self))
        return TokenPlan(*(value.to(device) if isinstance(value, Tensor) else value for value in values))


def _fake_plan(scores, h, w, k, threshold, total):
    b, n = scores.shape
    ints = {"dtype": torch.int32}
    return (
        scores.new_empty(b + 1, **ints),
        scores.new_empty(total, **ints),
        scores.new_empty(total, **ints),
        scores.new_empty(b, 4 * n, **ints),
        scores.new_empty(total, 2, dtype=torch.float32),
    )


def _fake_promote(low, inverse, width, total, *rest):
    return low.new_empty(total, low.shape[2])


def _fake_merge(packed, inverse, *rest):
    return packed.new_empty(*inverse.shape, packed.shape[1])


register(
    "plan_tokens(Tensor scores, SymInt h, SymInt w, SymInt k, float? threshold, SymInt total, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_plan,
    reference=reference.plan_tokens,
)
register(
    "promote_tokens(Tensor low, Tensor inverse, SymInt width, SymInt total, float scale, float noise_scale, float c,"
    " Tensor seed, str granularity, str carry_noise, str backend) -> Tensor",
    _fake_promote,
    reference=reference.promote_tokens,
)
register(
    "merge_tokens(Tensor packed, Tensor inverse, SymInt width, float scale, float noise_scale, float c,"
    " Tensor seed, str granularity, str carry_noise, str backend) -> Tensor",
    _fake_merge,
    reference=reference.merge_tokens,
)


def plan_tokens(
    scores: Tensor,
    grid: tuple[int, int],
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    backend: str = "auto",
) -> TokenPlan:
    """Choose the low tokens that become four high tokens, and lay out the packed sequences.

    Args:
        scores: (B, n) float32, float16 or bfloat16, any strides; the higher, the sooner a token is promoted.
        grid: (h, w), the low grid, h * w = n.
        ratio: promote the k = floor(ratio * n + 1e-6) highest scores of every sample. Ties go to the lower index; NaN
            ranks last. No host synchronisation.
        threshold: promote scores >= threshold; sequence lengths then differ, and the host waits once for them.
            (Tracing this needs ``torch._dynamo.config.capture_scalar_outputs``.)
        backend: "auto", "triton" or "reference".

    Raises:
        ValueError: an argument is not as described, not exactly one of ratio and threshold is given, or the backend
            cannot run here.
    """
    check_values("scores", scores, "(B, n)")
    b, n = scores.shape
    h, w = grid
    check(h > 0 and w > 0 and h * w == n, "grid", (h, w), f"(h, w) with h * w = {n}, the scores of one sample")
    check((ratio is None) != (threshold is None), "(ratio, threshold)", (ratio, threshold), "one None and one number")
    check(4 * b * n <= MAX_ELEMENTS, "the number of high tokens of the batch", 4 * b * n, f"at most {MAX_ELEMENTS}")
    resolve(backend, scores.device)
    if ratio is not None:
        check(0 <= ratio <= 1, "ratio", ratio, "in [0, 1]")
        k = math.floor(ratio * n + 1e-6)
        max_seqlen = n + 3 * k
        total = b * max_seqlen
    else:
        check(not math.isnan(threshold), "threshold", threshold, "a number")
        k = 0
        counts = (scores >= threshold).sum(1).tolist()
        max_seqlen = n + 3 * max(counts, default=0)
        total = b * n + 3 * sum(counts)
    tensors = torch.ops.ralu_kernels.plan_tokens(scores, h, w, k, threshold, total, backend)
    cu_seqlens, source, child, inverse, positions = tensors
    return TokenPlan((h, w), cu_seqlens, max_seqlen, source, child, inverse, positions)


def _check_move(name, x, plan, c, granularity, carry_noise, backend):
    check(granularity in GRANULARITIES, "granularity", repr(granularity), f"one of {GRANULARITIES}")
    check(carry_noise in CARRY_NOISES, "carry_noise", repr(carry_noise), f"one of {CARRY_NOISES}")
    channels = x.shape[-1]
    if granularity == "pixel":
        check(channels % 4 == 0, f"{name}.shape[-1]", channels, 'a multiple of 4 at granularity "pixel"')
    h, w = plan.grid
    check(
        tuple(plan.inverse.shape) == (plan.cu_seqlens.shape[0] - 1, 4 * h * w),
        "plan.inverse.shape",
        tuple(plan.inverse.shape),
        f"(B, 4n) = ({plan.cu_seqlens.shape[0] - 1}, {4 * h * w})",
    )
    check(plan.inverse.device == x.device, "plan", f"on {plan.inverse.device}", f"on {x.device}, {name}'s device")
    check_noise(backend, x.device, c, 4 * h * w * channels)


def promote_tokens(
    low: Tensor,
    plan: TokenPlan,
    scale: float,
    noise_scale: float,
    c: float,
    seed: Tensor | int,
    *,
    granularity: str = "pixel",
    carry_noise: str = "exact",
    backend: str = "auto",
) -> Tensor:
    """Stage 1 to 2: enlarge the promoted low tokens, carry the others, re-noise all (supplement A.1).

    A child is ``scale * Up(low) + noise_scale * z``, z ~ N(0, I - c * Sigma) with a 4x4 block of ones in Sigma for each
    enlarged value. A carried token is ``scale * low + noise_scale * sqrt(1 - c) * eps``.

    Args:
        low: (B, n, C) float32, float16 or bfloat16, any strides.
        plan: what to promote; see `plan_tokens`.
        scale, noise_scale: a and b of supplement A.1.
        c: correlation of the noise, in [0, 1/4].
        seed: int64 (B,), the 64-bit key of each sample, on low's device; or an int, the key of every sample.
        granularity: "pixel" enlarges latent pixels: token channel = channel * 4 + py * 2 + px, and child (di, dj) takes
            inner pixel (di, dj) in all four of its own. "token" copies a token whole to its four children.
        carry_noise: "exact", or "release" for the public release's ``noise_scale * eps``, too noisy by b^2 c.
        backend: "auto", "triton" or "reference".

    Returns:
        Packed (total, C) in low's dtype; the arithmetic is float32. Forward only.

    Raises:
        ValueError: an argument is not as described, the plan is another batch's, or the backend cannot run here.
    """
    check_values("low", low, "(B, n, C)")
    shape = (plan.batch_size, plan.grid[0] * plan.grid[1])
    check(tuple(low.shape[:2]) == shape, "low.shape[:2]", tuple(low.shape[:2]), f"{shape}, the plan's (B, n)")
    _check_move("low", low, plan, c, granularity, carry_noise, backend)
    seed = seed_tensor(seed, plan.batch_size, low.device)
    total, width = plan.source.shape[0], plan.grid[1]
    return torch.ops.ralu_kernels.promote_tokens(
        low, plan.inverse, width, total, scale, noise_scale, c, seed, granularity, carry_noise, backend
    )


def merge_tokens(
    packed: Tensor,
    plan: TokenPlan,
    scale: float,
    noise_scale: float,
    c: float,
    seed: Tensor | int,
    *,
    granularity: str = "pixel",
    carry_noise: str = "exact",
    backend: str = "auto",
) -> Tensor:
    """Stage 2 to 3: enlarge the tokens that are still low, carry the children, re-noise all, restore raster order.

    The same law as `promote_tokens`, with the parts exchanged.

    Args:
        packed: (total, C) float32, float16 or bfloat16, any strides, laid out by ``plan``.
        plan, scale, noise_scale, c, seed, granularity, carry_noise, backend: as in `promote_tokens`.

    Returns:
        (B, 4n, C), raster order over the (2h, 2w) grid, in packed's dtype; the arithmetic is float32. Forward only.

    Raises:
        ValueError: an argument is not as described, the plan is another batch's, or the backend cannot run here.
    """
    check_values("packed", packed, "(total, C)")
    total = plan.source.shape[0]
    check(packed.shape[0] == total, "packed.shape[0]", packed.shape[0], f"{total}, the plan's total")
    _check_move("packed", packed, plan, c, granularity, carry_noise, backend)
    seed = seed_tensor(seed, plan.batch_size, packed.device)
    return torch.ops.ralu_kernels.merge_tokens(
        packed, plan.inverse, plan.grid[1], scale, noise_scale, c, seed, granularity, carry_noise, backend
    )
