"""Bytes of a forward pass on the meta device: what tensors hold, and a bound of what libraries hold besides."""

import math
import weakref

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class FusedAttention(TorchFunctionMode):
    """Attention as GPUs' kernels do it, without a matrix of weights, where the meta device would make one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return _fused_attention(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)


def _fused_attention(query, key, value, attn_mask=None, *_, **__):
    return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, False)[0]


def own_work(counts: dict[str, dict]) -> dict[str, tuple[int, int]]:
    """Split the operations of a model among its modules, by their names in it: each with those of none of its parts.

    counts: what a `FlopCounterMode` counted in one call of the model, which itself has the name "".
    Returns (without attention's two matrix products, of those) for each.
    """
    names = sorted((name.split(".")[1:], split_work(ops)) for name, ops in counts.items() if name != "Global")
    own: dict[str, tuple[int, int]] = {}
    for path, work in names:
        own[".".join(path)] = work
        above = next((".".join(path[:k]) for k in range(len(path) - 1, -1, -1) if ".".join(path[:k]) in own), None)
        if path and above is not None:
            own[above] = own[above][0] - work[0], own[above][1] - work[1]
    return own


def split_work(counts: dict) -> tuple[int, int]:
    """Return the operations without attention's two matrix products, and those of these, of counts by operation."""
    weighted = sum(counts.get(op, 0) for op in (aten.mm, aten.addmm, aten.convolution))
    return weighted, sum(counts.values()) - weighted


def shared_work(own: dict[str, tuple[int, int]], shares: dict[str, float]) -> tuple[float, float]:
    """Sum up what modules do of their own work; each has the share of the longest name that is its own or above it."""
    tflop = attention = 0.0
    for name, (weighted, products) in own.items():
        path = name.split(".")
        share = next((shares[n] for k in range(len(path), 0, -1) if (n := ".".join(path[:k])) in shares), 1.0)
        tflop, attention = tflop + share * weighted, attention + share * products
    return tflop, attention


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that are made under it and are still in use: `now`, and at most `peak`.

    `scratch` is the largest of the operations' `cpu_scratch`.
    """

    def __init__(self, threads: int):
        super().__init__()
        self.threads = threads
        self.now = self.peak = self.scratch = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        before = _storages(operands)
        for key, storage in _storages(results).items():
            if key not in before:  # else a view, or written in place
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        self.scratch = max(self.scratch, cpu_scratch(func, operands, results, self.threads))
        return result

    def _add(self, size: int):
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(tensors: list[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage for storage in storages}


def cpu_scratch(func, operands: list[torch.Tensor], results: list[torch.Tensor], threads: int) -> int:
    """Bound the bytes that one operation on a CPU allocates and frees, beside its operands and results.

    A library may copy any of these into a layout of its own. oneDNN's blocks of convolutions hold 16 channels. Where
    it does not serve (floats of 16 bits on most CPUs, and small inputs) PyTorch unfolds the input: every pixel of the
    output has a column of all that its kernel sees. Attention goes over 256 queries and 512 keys at a time; every
    thread holds their scores, two sums a query and its output in float32, and of shorter floats scores, queries and
    keys anew.
    """
    if func.is_view:
        return 0
    copies = sum(x.nbytes for x in (*operands, *results))
    if func is aten.convolution.default:
        (x, weight, *_), (y,) = operands, results
        for tensor, dims in ((x, (1,)), (weight, (0, 1)), (y, (1,))):
            blocked = math.prod(math.ceil(n / 16) * 16 if i in dims else n for i, n in enumerate(tensor.shape))
            copies += blocked * tensor.itemsize - tensor.nbytes
        if x.dtype != torch.float32 or x.numel() <= 20480:
            copies += weight[0].numel() * y[:, 0].numel() * x.itemsize
    elif func in _ATTENTION:
        query, key = operands[:2]
        queries, keys, width = min(256, query.shape[-2]), min(512, key.shape[-2]), query.shape[-1]
        copies += threads * 4 * queries * (keys + 2 + width)
        if query.dtype != torch.float32:
            copies += threads * query.itemsize * (queries * keys + (queries + keys) * width)
    return copies


_ATTENTION = {
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
